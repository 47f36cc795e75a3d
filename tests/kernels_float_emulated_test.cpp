// The AVX-512 float kernels over plain C++ operations: their tiles, tails and layouts tested on any machine.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels_float_checks.hpp"
#include "nibble/kernels/avx512vnni/table.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::emulated_floats {

#include "emulation/avx512_float_ops.inl"
#include "nibble/kernels/vector/decode.inl"
#include "nibble/kernels/vector/unpack.inl"
#include "nibble/kernels/vector/gemm_float.inl"
#include "nibble/kernels/vector/gemv_float.inl"
#include "nibble/kernels/vector/gemv_dense.inl"
#include "nibble/kernels/vector/gemv_rows.inl"
#include "emulation/bf16_ops.inl"
#include "nibble/kernels/vector/gemm_bf16.inl"
#include "nibble/kernels/vector/gemm_direct.inl"
#include "nibble/kernels/vector/lines.inl"
#include "nibble/kernels/vector/quantize_rows.inl"
#include "nibble/kernels/vector/exp.inl"
#include "nibble/kernels/vector/epilogue.inl"
#include "nibble/kernels/vector/nn.inl"
#undef NIBBLE_UNROLL

inline constexpr KernelTable table = [] {
  KernelTable t = avx512vnni::table;  // its tile parameters
  t.unpack = &unpack;
  t.gemm_float = &gemm_float;
  t.gemv_float = &gemv_float;
  t.gemm_bf16 = &gemm_bf16;
  t.gemv_dense = &gemv_dense;
  t.gemv_rows = &gemv_rows;
  t.gemm_direct = &gemm_direct;
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
  return t;
}();

}  // namespace detail::emulated_floats
}  // namespace NIBBLE_ABI
}  // namespace nibble

using namespace kernels_float;  // NOLINT

namespace {

class EmulatedFloatKernels : public testing::Test {
 protected:
  const KernelTable& table() const { return emulated_floats::table; }
  FpEnvironment environment_;
};

TEST_F(EmulatedFloatKernels, PackedWeights) { check_packed_weights(table()); }
TEST_F(EmulatedFloatKernels, FloatWeightSpecials) { check_float_weight_specials(table()); }
TEST_F(EmulatedFloatKernels, Gemm) { check_gemm_float(table()); }
TEST_F(EmulatedFloatKernels, ProductsAgree) { check_products_agree(table()); }
TEST_F(EmulatedFloatKernels, GemmBf16) { check_gemm_bf16(table()); }
TEST_F(EmulatedFloatKernels, GemvDense) { check_gemv_dense(table()); }
TEST_F(EmulatedFloatKernels, QuantizeRows) { check_quantize_rows(table()); }
TEST_F(EmulatedFloatKernels, BlockSums) { check_block_sums(table()); }
TEST_F(EmulatedFloatKernels, Epilogue) { check_epilogue(table()); }
TEST_F(EmulatedFloatKernels, Activations) { check_activations(table()); }
TEST_F(EmulatedFloatKernels, Lines) { check_lines(table()); }
TEST_F(EmulatedFloatKernels, Conversions) { check_conversions(table()); }

}  // namespace
