// The float kernels of every ISA against the oracle, and the exponential against the C library.
#include "kernels_float_checks.hpp"
#include "nibble/kernels/dispatch.hpp"

using namespace kernels_float;  // NOLINT

namespace {

class FloatKernels : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (!isa_available(GetParam())) GTEST_SKIP() << "this CPU cannot run " << name_of(GetParam());
  }
  const KernelTable& table() const { return kernels_for(GetParam()); }
  FpEnvironment environment_;
};

TEST_P(FloatKernels, PackedWeights) { check_packed_weights(table()); }
TEST_P(FloatKernels, FloatWeightSpecials) { check_float_weight_specials(table()); }
TEST_P(FloatKernels, Gemm) { check_gemm_float(table()); }
TEST_P(FloatKernels, ProductsAgree) { check_products_agree(table()); }
TEST_P(FloatKernels, GemmBf16) { check_gemm_bf16(table()); }
TEST_P(FloatKernels, GemvDense) { check_gemv_dense(table()); }
TEST_P(FloatKernels, QuantizeRows) { check_quantize_rows(table()); }
TEST_P(FloatKernels, BlockSums) { check_block_sums(table()); }
TEST_P(FloatKernels, Epilogue) { check_epilogue(table()); }
TEST_P(FloatKernels, Activations) { check_activations(table()); }
TEST_P(FloatKernels, Lines) { check_lines(table()); }
TEST_P(FloatKernels, Conversions) { check_conversions(table()); }

// All but scalar, the first.
INSTANTIATE_TEST_SUITE_P(Isas, FloatKernels, testing::ValuesIn(built_isas.begin() + 1, built_isas.end()),
                         [](const testing::TestParamInfo<Isa>& isa) { return std::string(name_of(isa.param)); });

// The definition against hand-made cases: order, flushing of operands and results, and its bound after rounding.
TEST(Bf16Product, Definition) {
  const auto step = [](float a, float b, float c) { return float_bits(scalar::fma_flushed(a, b, c)); };
  const float least = bits_float(0x00800000);  // 2^-126
  const float tiny = bits_float(0x007F0000);   // a bfloat16 below it
  EXPECT_EQ(step(tiny, 1.0F, 0.0F), 0U);
  EXPECT_EQ(step(tiny, -1.0F, -0.0F), 0x80000000U);
  EXPECT_EQ(step(1.0F, 1.0F, tiny), 0x3F800000U);
  EXPECT_EQ(step(least, 1.0F, tiny), 0x00800000U);
  EXPECT_EQ(step(least, 0.5F, 0.0F), 0U);
  EXPECT_EQ(step(least, -0.5F, 0.0F), 0x80000000U);
  // 2^-126 - 2^-150 rounds to 2^-126 on the grid of subnormals, but is below it in 24 bits; less than half a unit of
  // those below 2^-126 is 2^-126.
  EXPECT_EQ(step(-std::ldexp(1.0F, -50), std::ldexp(1.0F, -100), least), 0U);
  EXPECT_EQ(step(-std::ldexp(1.0F, -51), std::ldexp(1.0F, -100), least), 0x00800000U);
  EXPECT_EQ(step(-std::ldexp(1.0F, -50), std::ldexp(1.5F, -101), least), 0U);
  EXPECT_NE(scalar::fma_flushed(std::numeric_limits<float>::quiet_NaN(), 0.0F, 0.0F), 0.0F);

  // 2^24 + 1 (odd k) is lost, then -2^24 (even k) leaves nothing; the other way round 1 would stay.
  PanelView w;
  w.format = Format::bf16;
  w.n = 1;
  w.k = 2;
  w.k_padded = 8;
  w.panel_bytes = 256;
  std::uint8_t codes[256] = {};
  const std::uint16_t pair[2] = {nibble::bf16_from_float(-16777216.0F), nibble::bf16_from_float(1.0F)};
  std::memcpy(codes, pair, 4);
  w.codes = codes;
  const std::uint32_t ones[4] = {0x3F803F80U, 0, 0, 0};
  float acc[16] = {16777216.0F};
  Bf16GemmArgs a;
  a.w = w;
  a.panel_end = 1;
  a.k_end = 8;
  a.x = ones;
  a.x_tile_stride = 4;
  a.tile_rows = 1;
  a.rows = 1;
  a.accumulate = true;
  a.acc = acc;
  a.acc_stride = 16;
  scalar::table.gemm_bf16(a);
  EXPECT_EQ(acc[0], 0.0F);
}

// Every 61st float. A unit is the gap between floats at the exact result; exp of a double is exact enough for
// that.
TEST(ExpReference, WithinTwoUlp) {
  double worst = 0.0;
  float at = 0.0F;
  for (std::uint64_t bits = 0; bits <= 0xFFFFFFFFU; bits += 61) {
    const float x = bits_float(static_cast<std::uint32_t>(bits));
    const float y = exp_reference(x);
    if (x != x) {
      ASSERT_NE(y, y);
      continue;
    }
    const double exact = std::exp(static_cast<double>(x));
    // Half a unit beyond FLT_MAX: what rounds to Inf. A result may be Inf one unit earlier.
    if (std::isinf(y)) {
      ASSERT_GT(exact, 3.4028232e38) << x;
      continue;
    }
    ASSERT_LT(exact, 3.4028236e38) << x;
    int exponent = 0;
    std::frexp(exact, &exponent);
    const double error =
        std::fabs(static_cast<double>(y) - exact) / std::ldexp(1.0, std::max(exponent - 24, -149));
    if (error > worst) {
      worst = error;
      at = x;
    }
  }
  EXPECT_LT(worst, 1.0) << "at " << at;
}

TEST(ExpReference, EdgesAreExact) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(exp_reference(0.0F), 1.0F);
  EXPECT_EQ(exp_reference(-0.0F), 1.0F);
  EXPECT_EQ(exp_reference(infinity), infinity);
  EXPECT_EQ(float_bits(exp_reference(-infinity)), 0U);
  EXPECT_EQ(exp_reference(std::numeric_limits<float>::max()), infinity);
  EXPECT_EQ(exp_reference(88.8F), infinity);
  EXPECT_EQ(exp_reference(-104.0F), 0.0F);
  EXPECT_EQ(exp_reference(-103.0F), bits_float(1));
  EXPECT_EQ(exp_reference(1e-45F), 1.0F);
}

}  // namespace
