// Double quantization of scales against a naive version, and the map's properties by its definition.
#include "nibble/ptq/double_quant.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <set>

#include "gemm_support.hpp"

namespace {

using namespace nibble;
using gemm_test::scheme_of;

std::vector<float> random_scales(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::lognormal_distribution<float> values(-4.0F, 0.4F);
  std::vector<float> scales(n);
  for (float& s : scales) s = values(random);
  return scales;
}

TEST(DoubleQuant, TheDynamicMapIsItsDefinition) {
  const std::array<float, 256>& map = scale_map_values(ScaleMap::dynamic);
  // create_dynamic_map(signed, 7 exponent bits, 8 bits in all), as a set: for i = 0..6, 10^(i - 6) times the means of
  // neighbours of linspace(0.1, 1, 2^i + 1), both signs; 0 and 1.
  std::multiset<double> expected = {0.0, 1.0};
  for (int i = 0; i < 7; ++i) {
    const int items = (1 << i) + 1;
    for (int j = 0; j + 1 < items; ++j) {
      const double a = 0.1 + 0.9 * j / (items - 1);
      const double b = 0.1 + 0.9 * (j + 1) / (items - 1);
      expected.insert(std::pow(10.0, i - 6) * (a + b) / 2.0);
      expected.insert(-std::pow(10.0, i - 6) * (a + b) / 2.0);
    }
  }
  ASSERT_EQ(expected.size(), 256U);
  std::size_t c = 0;
  for (const double e : expected) {
    // One rounding to float, and a few of doubles.
    EXPECT_NEAR(static_cast<double>(map[c]), e, std::fabs(e) * 6.1e-8) << c;
    ++c;
  }
  EXPECT_TRUE(std::is_sorted(map.begin(), map.end()));
  EXPECT_EQ(std::adjacent_find(map.begin(), map.end()), map.end());
  EXPECT_EQ(map[127], 0.0F);
  EXPECT_EQ(map[255], 1.0F);
  EXPECT_EQ(map[254], 0.99296875F);
  EXPECT_EQ(map[0], -0.99296875F);
  for (std::size_t i = 1; i < 128; ++i) EXPECT_EQ(map[127 + i], -map[127 - i]);
  EXPECT_FLOAT_EQ(map[128], 5.5e-7F);
}

TEST(DoubleQuant, TheLinearMap) {
  const std::array<float, 256>& map = scale_map_values(ScaleMap::linear);
  EXPECT_EQ(map[1], -1.0F);
  EXPECT_EQ(map[128], 0.0F);
  EXPECT_EQ(map[255], 1.0F);
  EXPECT_EQ(map[129], 1.0F / 127.0F);
}

/// One line an equation, codes by trying all.
std::vector<float> naive(const std::vector<float>& scales, const DoubleQuantOptions& o) {
  double mean = 0.0;
  for (const float s : scales) mean += static_cast<double>(s);
  const float offset = static_cast<float>(mean / static_cast<double>(scales.size()));
  const std::array<float, 256>& map = scale_map_values(o.map);
  std::vector<float> decoded;
  for (std::size_t p = 0; p < scales.size(); ++p) {
    float absmax = 0.0F;
    for (std::size_t i = p / o.block * o.block; i < std::min(scales.size(), (p / o.block + 1) * o.block); ++i)
      absmax = std::max(absmax, std::fabs(scales[i] - offset));
    const float x = absmax == 0.0F ? 0.0F : (scales[p] - offset) / absmax;
    std::size_t best = 0;
    for (std::size_t c = 1; c < 256; ++c)
      if (std::fabs(static_cast<double>(map[c]) - static_cast<double>(x)) <
          std::fabs(static_cast<double>(map[best]) - static_cast<double>(x)))
        best = c;
    const volatile float product = map[best] * absmax;  // no fma
    decoded.push_back(product + offset);
  }
  return decoded;
}

TEST(DoubleQuant, IsTheNaiveOne) {
  for (const ScaleMap map : {ScaleMap::dynamic, ScaleMap::linear})
    for (const std::size_t n : {1U, 2U, 255U, 256U, 257U, 5000U}) {
      DoubleQuantOptions options;
      options.map = map;
      const std::vector<float> scales = random_scales(n, static_cast<unsigned>(n));
      const DoubleQuantizedScales q = double_quantize_scales(scales, options);
      EXPECT_EQ(q.decode(), naive(scales, options));
      EXPECT_EQ(q.absmax.size(), (n + 255) / 256);
      // Half the widest gap: 0.9 / 64 / 2 of the block's absmax (the lower end of the dynamic map is that far from -1),
      // and two roundings.
      for (std::size_t p = 0; p < n; ++p)
        EXPECT_NEAR(static_cast<double>(q.scale(p)), static_cast<double>(scales[p]),
                    static_cast<double>(q.absmax[p / 256]) * 0.00704 + 1e-7 * static_cast<double>(scales[p]));
    }
}

TEST(DoubleQuant, BitsPerWeight) {
  const QuantizedTensor nf4 = gemm_test::random_quantized(
      scheme_of(Format::nf4, Symmetry::symmetric, Granularity::per_group(64)), 256, 1024, 1);
  const DoubleQuantizedTensor d = double_quantize(nf4);
  // 4 + 8 / 64 + 32 / (64 * 256), and the offset's 32 bits: the paper's 0.127.
  EXPECT_NEAR(d.bits_per_weight(), 4.127, 0.0005);
  EXPECT_EQ(d.byte_size(), 256U * 512U + 4096U + 16U * 4U + 4U);
}

TEST(DoubleQuant, EverySchemeKeepsItsCodes) {
  for (const Format format : {Format::int8, Format::int4, Format::nf4, Format::fp4, Format::int3, Format::int5})
    for (const Symmetry symmetry : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
      for (const ScaleType type : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16})
        for (const Granularity& granularity :
             {Granularity::per_group(32, 1), Granularity::per_channel(0), Granularity::per_tensor()}) {
          if (!is_integer(format) && symmetry != Symmetry::symmetric) continue;
          const QuantizedTensor q = DynamicQuantizer(scheme_of(format, symmetry, granularity, type))
                                        .quantize(gemm_test::random_floats(9, 70, 3));
          const DoubleQuantizedTensor d = double_quantize(q);
          EXPECT_EQ(d.tensor.scheme().scale_type, ScaleType::fp32);
          const std::vector<float> scales = d.scales.decode();
          ASSERT_EQ(scales.size(), q.param_count());
          for (std::size_t p = 0; p < q.param_count(); ++p) {
            EXPECT_EQ(d.tensor.scale(p), scales[p]);
            EXPECT_EQ(d.tensor.zero_point(p), q.zero_point(p));
            EXPECT_EQ(d.tensor.offset(p), q.offset(p));
          }
          for (std::size_t l = 0; l < 9; ++l)
            for (std::size_t i = 0; i < 70; ++i) EXPECT_EQ(d.tensor.code(l, i), q.code(l, i));
        }
}

TEST(DoubleQuant, CostsLittleOnRealWeights) {
  const Eigen::MatrixXf w = gemm_test::random_floats(64, 2048, 5) * 0.02F;
  const QuantizedTensor q =
      DynamicQuantizer(scheme_of(Format::nf4, Symmetry::symmetric, Granularity::per_group(64))).quantize(w);
  const auto error = [&](const QuantizedTensor& t) {
    return static_cast<double>((dequantize(t) - w).squaredNorm());
  };
  for (const ScaleMap map : {ScaleMap::dynamic, ScaleMap::linear}) {
    DoubleQuantOptions options;
    options.map = map;
    // Scales move by at most 0.7 % of their block's spread, which is about their mean: 1e-4 of the squared error's own.
    EXPECT_LT(error(double_quantize(q, options).tensor), 1.01 * error(q));
  }
}

TEST(DoubleQuant, GroupsOfZerosDoNotSpoilTheirBlock) {
  Eigen::MatrixXf w = gemm_test::random_floats(4, 1024, 6) * 0.01F;
  w.block(0, 64, 4, 64).setZero();  // these get scale 1, 50 times that of the others
  for (const Format format : {Format::nf4, Format::int4}) {
    const QuantizedTensor q =
        DynamicQuantizer(scheme_of(format, Symmetry::symmetric, Granularity::per_group(64))).quantize(w);
    ASSERT_EQ(q.scale(1), 1.0F);
    const DoubleQuantizedTensor d = double_quantize(q);
    EXPECT_LT(d.scales.absmax[0], 0.05F);
    EXPECT_TRUE((dequantize(d.tensor).block(0, 64, 4, 64).array() == 0.0F).all());
  }
  // All zeros.
  const QuantizedTensor none =
      DynamicQuantizer(scheme_of(Format::nf4, Symmetry::symmetric, Granularity::per_group(64)))
          .quantize(Eigen::MatrixXf::Zero(2, 64));
  EXPECT_TRUE(dequantize(double_quantize(none).tensor).isZero(0.0F));
}

TEST(DoubleQuant, PositiveScalesStayPositive) {
  std::vector<float> scales(256, 0.01F);
  scales[3] = 1e-6F;
  scales[9] = 5.0F;  // makes the steps of the map as large as the others' scale
  for (const ScaleMap map : {ScaleMap::dynamic, ScaleMap::linear}) {
    DoubleQuantOptions options;
    options.map = map;
    for (const float s : double_quantize_scales(scales, options).decode()) EXPECT_GT(s, 0.0F);
  }
}

TEST(DoubleQuant, ConstantAndEmpty) {
  const DoubleQuantizedScales constant = double_quantize_scales(std::vector<float>(300, 0.25F));
  EXPECT_EQ(constant.decode(), std::vector<float>(300, 0.25F));
  EXPECT_TRUE(double_quantize_scales({}).decode().empty());
  EXPECT_EQ(DoubleQuantizedTensor().bits_per_weight(), 0.0);
}

TEST(DoubleQuant, BadInputsAreNamed) {
  EXPECT_THROW(double_quantize_scales({1.0F, std::nanf("")}), InvalidArgument);
  EXPECT_THROW(double_quantize_scales({std::numeric_limits<float>::infinity()}), InvalidArgument);
  EXPECT_THROW(double_quantize_scales({1.0F}, {}, {true, false}), InvalidArgument);
  DoubleQuantOptions options;
  options.block = 0;
  EXPECT_THROW(double_quantize_scales({1.0F}, options), InvalidArgument);
  EXPECT_THROW(
      double_quantize(gemm_test::random_quantized(scheme_of(Format::fp16, Symmetry::symmetric, {}), 2, 4, 1)),
      InvalidArgument);
}

}  // namespace
