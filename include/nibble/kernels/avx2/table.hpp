// All kernels of one ISA: AVX2, FMA and F16C. This file is that ISA's only target region: nothing may be
// included inside but our own .inl files, for what a library header defines there would be compiled for this ISA and
// then shared with all of the program.
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
#include "nibble/kernels/table.hpp"

#if NIBBLE_X86

#include <immintrin.h>

NIBBLE_TARGET_BEGIN("avx2,fma,f16c")

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::avx2 {

namespace floats {
#include "nibble/kernels/avx2/float_ops.inl"
#include "nibble/kernels/vector/decode.inl"
#include "nibble/kernels/vector/unpack.inl"
#include "nibble/kernels/vector/gemm_float.inl"
#include "nibble/kernels/vector/gemv_float.inl"
#include "nibble/kernels/vector/gemv_dense.inl"
#include "nibble/kernels/vector/gemv_rows.inl"
// clang-format off
#include "nibble/kernels/vector/bf16_fma.inl"
#include "nibble/kernels/vector/gemm_bf16.inl"
// clang-format on
#include "nibble/kernels/vector/gemm_direct.inl"
#include "nibble/kernels/vector/lines.inl"
#include "nibble/kernels/vector/quantize_rows.inl"
#include "nibble/kernels/vector/exp.inl"
#include "nibble/kernels/vector/epilogue.inl"
#include "nibble/kernels/vector/nn.inl"
#include "nibble/kernels/vector/fill.inl"
#include "nibble/kernels/avx2/line_ops.inl"
#include "nibble/kernels/vector/groups.inl"
#include "nibble/kernels/vector/lanes.inl"
#undef NIBBLE_UNROLL
}  // namespace floats

// clang-format off
#include "nibble/kernels/avx2/int_ops.inl"
#include "nibble/kernels/vector/int_params.inl"
#include "nibble/kernels/avx2/w8a8.inl"
#include "nibble/kernels/avx2/w4a8.inl"
#include "nibble/kernels/vector/bit_codes.inl"
#include "nibble/kernels/avx2/wba8.inl"
// clang-format on

inline constexpr KernelTable table = [] {
  KernelTable t;
  t.isa = Isa::avx2;
  t.int_panels = 2;
  t.gemm_w8a8 = &gemm_w8a8;
  t.gemm_w4a8 = &gemm_w4a8;
  t.gemm_bits = &gemm_bits;
  t.gemm_bits_rows = 1;
  floats::fill(t);
  t.bf16_tile_rows = floats::bf16_tile_rows;
  t.gemm_bf16 = &floats::gemm_bf16;
  floats::fill_lines(t);
  t.gemv_rows = &floats::gemv_rows;
  return t;
}();

}  // namespace detail::avx2
}  // namespace NIBBLE_ABI
}  // namespace nibble

NIBBLE_TARGET_END

#endif  // NIBBLE_X86
