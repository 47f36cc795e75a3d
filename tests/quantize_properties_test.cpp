// Properties that hold for every scheme: error bounds, hostile values, one rounding under any MXCSR or FPCR, errors that say
// where.
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "fp_modes.hpp"
#include "nibble/quantize/bounds.hpp"
#include "nibble/quantize/fake_quantize.hpp"
#include "quantize_support.hpp"

namespace {

using namespace nibble_test;

constexpr float float_max = std::numeric_limits<float>::max();
constexpr float infinity = std::numeric_limits<float>::infinity();

std::vector<Scheme> schemes_and_float_formats(const Granularity& g) {
  std::vector<Scheme> schemes = all_schemes(g);
  for (Format f : {Format::fp32, Format::fp16, Format::bf16})
    schemes.push_back({f, Symmetry::symmetric, g, ScaleType::fp32, false});
  return schemes;
}

struct Hostile {
  const char* name;
  Values values;
};

std::vector<Hostile> hostile_values() {
  std::mt19937 random(99);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
  const Shape shape = {3, 70};
  std::vector<Hostile> all;
  const auto add = [&](const char* name, const std::function<float(std::size_t)>& f) {
    Values v{shape, std::vector<float>(count(shape))};
    for (std::size_t i = 0; i < v.x.size(); ++i) v.x[i] = f(i);
    all.push_back({name, v});
  };
  add("zeros", [](std::size_t) { return 0.0F; });
  add("negative zeros", [](std::size_t) { return -0.0F; });
  add("normal", [&](std::size_t) { return normal(random); });
  add("uniform", [&](std::size_t) { return uniform(random); });
  add("positive", [&](std::size_t) { return std::fabs(normal(random)); });
  add("negative", [&](std::size_t) { return -std::fabs(normal(random)); });
  add("constant", [](std::size_t) { return 0.3F; });
  add("constant, negative", [](std::size_t) { return -7.7F; });
  add("large constant", [](std::size_t) { return 12345.678F; });
  add("far from zero", [&](std::size_t) { return 1000.0F + 0.001F * normal(random); });
  add("very far from zero", [&](std::size_t i) { return std::nextafter(3.0e4F, i % 2 == 0 ? 4e4F : 3.0e4F); });
  add("one outlier", [&](std::size_t i) { return i == 40 ? 1000.0F : 0.01F * normal(random); });
  add("one value among zeros", [](std::size_t i) { return i == 100 ? -0.25F : 0.0F; });
  add("absmax 1e-40", [&](std::size_t) { return 1e-40F * uniform(random); });
  add("smallest subnormal", [](std::size_t i) { return i % 3 == 0 ? 0x1p-149F : i % 3 == 1 ? -0x1p-149F : 0.0F; });
  add("around the smallest normal", [&](std::size_t) { return 0x1p-126F * 4.0F * uniform(random); });
  add("around fp16's smallest subnormal", [&](std::size_t) { return 0x1p-24F * 3.0F * uniform(random); });
  add("small", [&](std::size_t) { return 1e-9F * normal(random); });
  add("ties", [](std::size_t i) { return i % 70 == 0 ? 127.0F : static_cast<float>(i % 64) - 31.5F; });
  add("int4 ties", [](std::size_t i) { return i % 70 == 0 ? 7.0F : static_cast<float>(i % 14) * 0.5F - 3.5F; });
  add("large for fp16", [&](std::size_t) { return 60000.0F * uniform(random); });
  add("mixed magnitudes",
      [&](std::size_t i) { return std::ldexp(uniform(random), static_cast<int>(i % 40) - 30); });
  return all;
}

/// Values that only fp32 and bf16 storage holds.
std::vector<Hostile> huge_values() {
  std::mt19937 random(98);
  std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
  const Shape shape = {3, 70};
  std::vector<Hostile> all;
  for (const auto& [name, top] : {std::pair<const char*, float>{"1e30", 1e30F}, {"1.6e38", 1.6e38F}}) {
    Values v{shape, std::vector<float>(count(shape))};
    for (float& x : v.x) x = top * uniform(random);
    all.push_back({name, v});
  }
  return all;
}

void expect_within_bounds(const Values& v, const Scheme& s, const char* name) {
  SCOPED_TRACE(std::string(name) + ": " + describe(s, v.shape));
  const nibble::QuantizedTensor q = quantize(v, s);
  const std::vector<float> values = values_of(q);
  for (std::size_t i = 0; i < v.x.size(); ++i) {
    nibble::Grid g;
    if (q.param_count() != 0) g = q.grid(q.param_index(i / 70, i % 70));
    ASSERT_TRUE(std::isfinite(g.scale) && g.scale > 0);
    ASSERT_TRUE(std::isfinite(values[i]));
    const double error = std::fabs(wide(values[i]) - wide(v.x[i]));
    ASSERT_LE(error, nibble::error_bound(s, g, v.x[i]))
        << "element " << i << ": " << v.x[i] << " became " << values[i] << ", scale " << g.scale << ", offset "
        << g.offset;
  }
}

const std::vector<Granularity>& granularities() {
  static const std::vector<Granularity> all = {Granularity::per_tensor(),   Granularity::per_channel(0),
                                               Granularity::per_channel(1), Granularity::per_group(16),
                                               Granularity::per_group(48),  Granularity::per_group(16, 0)};
  return all;
}

TEST(Bounds, HoldForHostileValues) {
  for (const Hostile& h : hostile_values())
    for (const Granularity& g : granularities())
      for (const Scheme& s : schemes_and_float_formats(g)) expect_within_bounds(h.values, s, h.name);
}

TEST(Bounds, HoldForHugeValues) {
  for (const Hostile& h : huge_values()) {
    for (const Granularity& g : granularities()) {
      for (const Scheme& s : schemes_and_float_formats(g)) {
        if (s.format == Format::fp16 || s.scale_type == ScaleType::fp16) continue;
        expect_within_bounds(h.values, s, h.name);
      }
    }
  }
}

TEST(Bounds, HoldForManyRandomRanges) {
  // Short groups over ranges of every size and place, where grids end on unlucky roundings.
  std::mt19937 random(5);
  std::uniform_real_distribution<float> uniform(0.0F, 1.0F);
  for (int round = 0; round < 3000; ++round) {
    const float place = std::ldexp(uniform(random) - 0.5F, static_cast<int>(random() % 14) - 4);
    const float spread = std::ldexp(uniform(random), static_cast<int>(random() % 24) - 14);
    Values v{{3, 70}, std::vector<float>(210)};
    for (float& x : v.x) x = place + spread * (uniform(random) - 0.5F);
    for (const Scheme& s : all_schemes(Granularity::per_group(16))) expect_within_bounds(v, s, "random range");
  }
}

TEST(Bounds, AreReached) {
  // Not slack: values that come within a part in a thousand of them.
  const Values v = random_values({200, 70}, 17);
  for (const Scheme& s : schemes_and_float_formats(Granularity::per_group(16))) {
    if (s.format == Format::fp32) continue;
    SCOPED_TRACE(describe(s, v.shape));
    const nibble::QuantizedTensor q = quantize(v, s);
    const std::vector<float> values = values_of(q);
    double closest = 0;
    for (std::size_t i = 0; i < v.x.size(); ++i) {
      nibble::Grid g;
      if (q.param_count() != 0) g = q.grid(q.param_index(i / 70, i % 70));
      closest = std::max(closest, std::fabs(wide(values[i]) - wide(v.x[i])) / nibble::error_bound(s, g, v.x[i]));
    }
    // NF4's widest gap lies at -1, where a group has few values.
    EXPECT_GT(closest, s.format == Format::nf4 ? 0.95 : 0.999);
    EXPECT_LE(closest, 1.0);
  }
}

TEST(Properties, ZeroStaysZero) {
  for (const Granularity& g : granularities()) {
    for (const Scheme& s : schemes_and_float_formats(g)) {
      SCOPED_TRACE(describe(s, {4, 40}));
      Values v = random_values({4, 40}, 8);
      for (std::size_t i = 0; i < v.x.size(); i += 3) v.x[i] = 0.0F;
      const std::vector<float> values = values_of(quantize(v, s));
      if (s.symmetry == Symmetry::float_offset) continue;  // its grid need not hold zero
      for (std::size_t i = 0; i < v.x.size(); i += 3) ASSERT_EQ(values[i], 0.0F);
    }
    for (const Scheme& s : schemes_and_float_formats(g)) {
      const Values zeros{{4, 40}, std::vector<float>(160, 0.0F)};
      const nibble::QuantizedTensor q = quantize(zeros, s);
      for (float x : values_of(q)) ASSERT_EQ(x, 0.0F) << describe(s, zeros.shape);
      for (std::size_t p = 0; p < q.param_count(); ++p) ASSERT_EQ(q.scale(p), 1.0F);
    }
  }
}

TEST(Properties, QuantizingTwiceChangesNothingMore) {
  // Dequantized values lie on the grid: quantizing them onto the same grid gives the same codes.
  const Values v = random_values({5, 70}, 4);
  for (const Scheme& s : all_schemes(Granularity::per_group(16))) {
    SCOPED_TRACE(describe(s, v.shape));
    const nibble::QuantizedTensor q = quantize(v, s);
    const Values again{v.shape, values_of(q)};
    EXPECT_EQ(reference(again, s, grids_of(q)).codes, codes_of(q));
  }
}

TEST(Properties, FakeQuantizeEqualsTheRoundTrip) {
  std::vector<Hostile> all = hostile_values();
  all.push_back({"three dimensions", random_values({4, 33, 18}, 6)});
  for (const Hostile& h : all) {
    const auto view = view_of(h.values);
    for (const Granularity& g : granularities()) {
      for (const Scheme& s : schemes_and_float_formats(g)) {
        SCOPED_TRACE(std::string(h.name) + ": " + describe(s, h.values.shape));
        const std::vector<float> expected = values_of(quantize(h.values, s));
        std::vector<float> out(h.values.x.size());
        nibble::detail::fake_quantize_view(view, s, {}, {out.data(), view.layout});
        ASSERT_TRUE(same_bits(out, expected));
        Values in_place = h.values;
        nibble::detail::fake_quantize_view(view_of(in_place), s, {}, {in_place.x.data(), view.layout});
        ASSERT_TRUE(same_bits(in_place.x, expected));
      }
    }
  }
}

TEST(Properties, FakeQuantizeOfMatricesInEitherOrder) {
  const Eigen::MatrixXf w = Eigen::MatrixXf::Random(70, 90);
  const Eigen::Matrix<float, -1, -1, Eigen::RowMajor> rows = w;
  using Q = nibble::Quantizer<nibble::Int4, nibble::Asymmetric, nibble::PerGroup<32>, Eigen::half>;
  const Eigen::MatrixXf expected = nibble::dequantize(nibble::quantize<Q>(w));
  EXPECT_EQ(nibble::fake_quantize<Q>(w), expected);
  EXPECT_EQ(nibble::fake_quantize<Q>(rows), expected);
  Eigen::MatrixXf columns_out(70, 90);
  nibble::fake_quantize_into<Q>(rows, columns_out);
  EXPECT_EQ(columns_out, expected);
  Eigen::Matrix<float, -1, -1, Eigen::RowMajor> rows_out(70, 90);
  nibble::fake_quantize_into<Q>(w, rows_out);
  EXPECT_EQ(Eigen::MatrixXf(rows_out), expected);
  Eigen::MatrixXf in_place = w;
  nibble::fake_quantize_into<Q>(in_place, in_place);
  EXPECT_EQ(in_place, expected);
  Eigen::MatrixXf wrong(90, 70);
  EXPECT_THROW(nibble::fake_quantize_into<Q>(w, wrong), nibble::InvalidArgument);
}

#if NIBBLE_TEST_FP_MODES
TEST(Properties, TheControlWordPlaysNoPartAndComesBack) {
  const auto saved = fp_modes::get();
  for (const Hostile& h : hostile_values()) {
    for (const Scheme& s : schemes_and_float_formats(Granularity::per_group(16))) {
      SCOPED_TRACE(std::string(h.name) + ": " + describe(s, h.values.shape));
      const nibble::QuantizedTensor expected = quantize(h.values, s);
      const std::vector<float> expected_values = values_of(expected);
      for (const auto mode : fp_modes::hostile) {
        fp_modes::set(mode);
        const nibble::QuantizedTensor q = quantize(h.values, s);
        const auto after_quantize = fp_modes::get();
        std::vector<float> values(h.values.x.size()), fake(h.values.x.size());
        q.dequantize(values.data());
        const auto after_dequantize = fp_modes::get();
        const auto view = view_of(h.values);
        nibble::detail::fake_quantize_view(view, s, {}, {fake.data(), view.layout});
        const auto after_fake = fp_modes::get();
        fp_modes::set(saved);
        ASSERT_EQ(after_quantize, mode);
        ASSERT_EQ(after_dequantize, mode);
        ASSERT_EQ(after_fake, mode);
        ASSERT_EQ(codes_of(q), codes_of(expected));
        ASSERT_TRUE(same_bytes(q.scales(), expected.scales()));
        ASSERT_TRUE(same_bits(values, expected_values));
        ASSERT_TRUE(same_bits(fake, expected_values));
      }
    }
  }
}

TEST(Properties, TheControlWordComesBackAfterAnError) {
  const auto saved = fp_modes::get();
  Values v = random_values({2, 40}, 1);
  v.x[50] = infinity;
  fp_modes::set(fp_modes::hostile[1]);
  EXPECT_THROW(quantize(v, {Format::int8, Symmetry::symmetric, {}, ScaleType::fp32, false}),
               nibble::InvalidArgument);
  const auto after = fp_modes::get();
  fp_modes::set(saved);
  EXPECT_EQ(after, fp_modes::hostile[1]);
}
#endif

/// The message of the InvalidArgument that `call` throws.
template <class Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const nibble::InvalidArgument& e) {
    return e.what();
  }
  return "no error";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST(Errors, NanAndInfinityNameTheirIndex) {
  const Shape shape = {3, 4, 41};
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity}) {
    for (std::size_t at : {std::size_t{0}, std::size_t{41 + 17}, std::size_t{2 * 4 * 41 + 3 * 41 + 40}}) {
      Values v = random_values(shape, 2);
      v.x[at] = bad;
      const auto index = index_of(shape, at);
      const std::string expected = nibble::detail::shape_text({index[0], index[1], index[2]});
      std::vector<Granularity> all = granularities();
      all.push_back(Granularity::per_channel(2));
      for (const Granularity& g : all) {
        for (const Scheme& s : schemes_and_float_formats(g)) {
          SCOPED_TRACE(describe(s, shape));
          const std::string message = error_of([&] { quantize(v, s); });
          ASSERT_TRUE(contains(message, expected)) << message;
          const std::string given = error_of([&] { quantize(v, s, {{-1.0F, 1.0F}}); });
          ASSERT_TRUE(contains(given, expected)) << given;
        }
      }
    }
  }
}

TEST(Errors, ValuesBeyondTheFormat) {
  Eigen::MatrixXf w = Eigen::MatrixXf::Random(3, 20);
  w(2, 5) = 65519.0F;  // rounds to 65504
  EXPECT_EQ(nibble::dequantize(nibble::quantize<nibble::Quantizer<nibble::Fp16>>(w))(2, 5), 65504.0F);
  w(2, 5) = -65520.0F;
  EXPECT_TRUE(contains(error_of([&] { nibble::quantize<nibble::Quantizer<nibble::Fp16>>(w); }), "(2, 5)"));
  w(1, 3) = float_max;
  EXPECT_TRUE(contains(error_of([&] { nibble::quantize<nibble::Quantizer<nibble::Bf16>>(w); }), "(1, 3)"));
  Eigen::MatrixXd d = Eigen::MatrixXd::Random(3, 20);
  d(0, 7) = 1e300;
  EXPECT_TRUE(contains(error_of([&] { nibble::quantize<nibble::Quantizer<nibble::Int8>>(d); }), "(0, 7)"));
  EXPECT_TRUE(contains(error_of([&] { nibble::quantize<nibble::Quantizer<nibble::Bf16>>(d); }), "(0, 7)"));
  EXPECT_TRUE(contains(error_of([&] { nibble::fake_quantize<nibble::Quantizer<nibble::Fp16>>(d); }), "(0, 7)"));
}

TEST(Errors, ScalesThatDoNotFitTheirType) {
  Eigen::MatrixXf w = Eigen::MatrixXf::Random(3, 20);
  w(1, 4) = 65504.0F * 127.0F;
  using Q = nibble::Quantizer<nibble::Int8, nibble::Symmetric, nibble::PerChannel<0>, Eigen::half>;
  EXPECT_EQ(nibble::quantize<Q>(w).erased().scale(1), 65504.0F);
  w(1, 4) = 65520.0F * 127.0F;
  const std::string message = error_of([&] { nibble::quantize<Q>(w); });
  EXPECT_TRUE(contains(message, "range 1 ") && contains(message, "fp16")) << message;
  using Wide = nibble::Quantizer<nibble::Int8, nibble::Symmetric, nibble::PerChannel<0>>;
  EXPECT_NO_THROW(nibble::quantize<Wide>(w));
  // Offsets as well.
  Eigen::MatrixXf far = Eigen::MatrixXf::Constant(2, 20, 70000.0F);
  using O = nibble::Quantizer<nibble::Int4, nibble::FloatOffset, nibble::PerChannel<0>, Eigen::half>;
  EXPECT_TRUE(contains(error_of([&] { nibble::quantize<O>(far); }), "fp16"));
}

TEST(Errors, LargestFloatsAreFineOrRefusedButNeverInfinite) {
  for (float top : {float_max, -float_max, float_max / 2}) {
    Values v{{1, 32}, std::vector<float>(32, 0.0F)};
    v.x[3] = top;
    v.x[4] = -top / 2;
    for (const Scheme& s : schemes_and_float_formats(Granularity::per_tensor())) {
      SCOPED_TRACE(describe(s, v.shape));
      try {
        const nibble::QuantizedTensor q = quantize(v, s);
        for (float x : values_of(q)) ASSERT_TRUE(std::isfinite(x));
      } catch (const nibble::InvalidArgument&) {
      }
    }
    // The plain fp32-scaled symmetric grids take even the largest.
    for (Format f : {Format::int8, Format::int4, Format::nf4, Format::int2, Format::int5, Format::fp4})
      EXPECT_NO_THROW(quantize(v, {f, Symmetry::symmetric, {}, ScaleType::fp32, false}));
  }
}

TEST(Errors, SchemesThatMakeNoSense) {
  const Values v = random_values({4, 40}, 1);
  const auto message = [&](const Scheme& s) { return error_of([&] { quantize(v, s); }); };
  const auto scheme = [](const Granularity& g) {
    return Scheme{Format::int8, Symmetry::symmetric, g, ScaleType::fp32, false};
  };
  EXPECT_TRUE(contains(message(scheme(Granularity::per_channel(2))), "axis 2"));
  EXPECT_TRUE(contains(message(scheme(Granularity::per_channel(-3))), "axis -3"));
  for (std::size_t size : {0U, 1U, 8U, 17U, 24U})
    EXPECT_TRUE(contains(message(scheme(Granularity::per_group(size))), "group size is " + std::to_string(size)));
  EXPECT_TRUE(contains(message({Format::nf4, Symmetry::asymmetric, {}, ScaleType::fp32, false}), "nf4"));
  EXPECT_TRUE(contains(message({Format::fp4, Symmetry::float_offset, {}, ScaleType::fp32, false}), "fp4"));
  EXPECT_TRUE(contains(message({static_cast<Format>(77), Symmetry::symmetric, {}, ScaleType::fp32, false}), "77"));
}

}  // namespace
