// All kernels of one ISA: AArch64's Advanced SIMD, which every such CPU has. Never run on silicon; correct under qemu
// 7.2 (2026-11-23). Nothing may be included inside the namespace but our own .inl files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/core/abi.hpp"
#include "nibble/formats/format.hpp"
#include "nibble/formats/int4.hpp"
#include "nibble/formats/fp4.hpp"
#include "nibble/formats/nf4.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/scalar/exp.hpp"
#include "nibble/kernels/scalar/table.hpp"
#include "nibble/kernels/table.hpp"

#if NIBBLE_ARM64

#include <arm_neon.h>

// GCC 12 does not see that a decoder whose format has groups begins with one.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::neon {

namespace floats {
#include "nibble/kernels/neon/float_ops.inl"
#include "nibble/kernels/vector/decode.inl"
#include "nibble/kernels/vector/unpack.inl"
#include "nibble/kernels/vector/gemm_float.inl"
#include "nibble/kernels/vector/gemv_float.inl"
#include "nibble/kernels/vector/gemv_dense.inl"
// clang-format off
#include "nibble/kernels/vector/bf16_fma.inl"
#include "nibble/kernels/vector/gemm_bf16.inl"
#include "nibble/kernels/neon/bf16_checked.inl"
// clang-format on
#include "nibble/kernels/vector/gemm_direct.inl"
#include "nibble/kernels/vector/lines.inl"
#include "nibble/kernels/vector/quantize_rows.inl"
#include "nibble/kernels/vector/exp.inl"
#include "nibble/kernels/vector/epilogue.inl"
#include "nibble/kernels/vector/nn.inl"
#include "nibble/kernels/vector/fill.inl"
#include "nibble/kernels/neon/line_ops.inl"
#include "nibble/kernels/vector/groups.inl"
#include "nibble/kernels/vector/lanes.inl"
#undef NIBBLE_UNROLL
}  // namespace floats

// clang-format off
#include "nibble/kernels/neon/int_ops.inl"
#include "nibble/kernels/vector/int_params.inl"
#include "nibble/kernels/neon/quads.inl"
#include "nibble/kernels/neon/int_dots.inl"
#include "nibble/kernels/neon/int_tiles.inl"
// clang-format on

inline constexpr KernelTable table = [] {
  KernelTable t = scalar::table;  // for what has no kernel here
  t.isa = Isa::neon;
  t.gemv_rows = nullptr;
  t.int_panels = 4;
  t.gemm_w8a8 = &gemm_w8a8;
  t.gemm_w4a8 = &gemm_w4a8;
  floats::fill(t);
  floats::fill_lines(t);
  t.bf16_tile_rows = floats::bf16_tile_rows;
  t.gemm_bf16 = &floats::gemm_bf16_checked;
  return t;
}();

}  // namespace detail::neon
}  // namespace NIBBLE_ABI
}  // namespace nibble

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif  // NIBBLE_ARM64
