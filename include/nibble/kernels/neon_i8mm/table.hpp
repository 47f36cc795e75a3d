// All kernels of one ISA: neon_dotprod's, and integer products on the matrix multiplications of bytes (I8MM, ARMv8.6). This
// file is that ISA's only target region: nothing may be included inside but our own .inl files. Never run on silicon;
// correct under qemu 7.2 (2026-11-23).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/core/abi.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/neon_dotprod/table.hpp"
#include "nibble/kernels/table.hpp"

#if NIBBLE_ARM64

#include <arm_neon.h>

NIBBLE_TARGET_BEGIN(NIBBLE_TARGET_I8MM)

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::neon_i8mm {

// clang-format off
#include "nibble/kernels/neon/int_ops.inl"
#include "nibble/kernels/vector/int_params.inl"
#include "nibble/kernels/neon_i8mm/int_dots.inl"
#include "nibble/kernels/neon/int_tiles.inl"
// clang-format on

inline constexpr KernelTable table = [] {
  KernelTable t = neon_dotprod::table;
  t.isa = Isa::neon_i8mm;
  t.gemm_w8a8 = &gemm_w8a8;
  t.gemm_w4a8 = &gemm_w4a8;
  return t;
}();

}  // namespace detail::neon_i8mm
}  // namespace NIBBLE_ABI
}  // namespace nibble

NIBBLE_TARGET_END

#endif  // NIBBLE_ARM64
