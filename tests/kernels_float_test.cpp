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
