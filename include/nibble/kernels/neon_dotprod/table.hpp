// All kernels of one ISA: neon's, and integer products on the dot product instructions (DotProd, ARMv8.2). This
// file is that ISA's only target region: nothing may be included inside but our own .inl files. Never run on silicon;
// correct under qemu 7.2 (2026-11-23).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/core/abi.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/neon/table.hpp"
#include "nibble/kernels/table.hpp"

#if NIBBLE_ARM64

#include <arm_neon.h>

NIBBLE_TARGET_BEGIN(NIBBLE_TARGET_DOTPROD)

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::neon_dotprod {

// clang-format off
#include "nibble/kernels/neon/int_ops.inl"
#include "nibble/kernels/vector/int_params.inl"
#include "nibble/kernels/neon/quads.inl"
#include "nibble/kernels/neon_dotprod/int_dots.inl"
#include "nibble/kernels/neon/int_tiles.inl"
// clang-format on

inline constexpr KernelTable table = [] {
  KernelTable t = neon::table;
  t.isa = Isa::neon_dotprod;
  t.gemm_w8a8 = &gemm_w8a8;
  t.gemm_w4a8 = &gemm_w4a8;
  return t;
}();

}  // namespace detail::neon_dotprod
}  // namespace NIBBLE_ABI
}  // namespace nibble

NIBBLE_TARGET_END

#endif  // NIBBLE_ARM64
