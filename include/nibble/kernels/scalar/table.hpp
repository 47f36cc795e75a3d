// The portable kernels: slow, plain, and the reference that every other table must equal.
#pragma once

#include "nibble/kernels/scalar/epilogue.hpp"
#include "nibble/kernels/scalar/gemm_float.hpp"
#include "nibble/kernels/scalar/gemm_int.hpp"
#include "nibble/kernels/scalar/groups.hpp"
#include "nibble/kernels/scalar/lanes.hpp"
#include "nibble/kernels/scalar/lines.hpp"
#include "nibble/kernels/scalar/nn.hpp"
#include "nibble/kernels/table.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::scalar {

inline constexpr KernelTable table = [] {
  KernelTable t;
  t.isa = Isa::scalar;
  t.float_tile_rows = float_tile_rows;
  t.gemm_w8a8 = &gemm_int;
  t.gemm_w4a8 = &gemm_int;
  t.gemm_bits = &gemm_int;
  t.gemm_bits_rows = static_cast<std::size_t>(-1);
  t.expand = &expand;
  t.unpack = &unpack;
  t.gemm_float = &gemm_float;
  t.gemv_float = &gemv_float;
  t.gemm_bf16 = &gemm_bf16;
  t.gemv_dense = &gemv_dense;
  t.gemv_rows = &gemv_rows;
  t.gemm_direct = &gemv_float;
  t.quantize_rows = &quantize_rows;
  t.epilogue = &epilogue;
  t.block_sums = &block_sums;
  t.rms_norm = &rms_norm;
  t.softmax = &softmax;
  t.softmax_codes = &softmax_codes;
  t.rope = &rope;
  t.line_range = &line_range;
  t.quantize_line = &quantize_line;
  t.dequantize_line = &dequantize_line;
  t.fp16_from_float = &fp16_from_float;
  t.float_from_fp16 = &float_from_fp16;
  t.bf16_from_float = &bf16_from_float;
  t.float_from_bf16 = &float_from_bf16;
  t.group_ranges = &group_ranges;
  t.fit_ranges = &fit_ranges;
  t.widen_ranges = &widen_ranges;
  t.quantize_groups = &quantize_groups;
  t.dequantize_groups = &dequantize_groups;
  t.rows_to_lanes = &rows_to_lanes;
  t.lanes_to_rows = &lanes_to_rows;
  return t;
}();

}  // namespace detail::scalar
}  // namespace NIBBLE_ABI
}  // namespace nibble
