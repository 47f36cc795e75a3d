// Quantizers against the naive reference: every scheme, granularity, axis and rank, with tails.
#include <gtest/gtest.h>

#include "nibble/quantize/fake_quantize.hpp"
#include "nibble/quantize/tensor.hpp"
#include "quantize_support.hpp"

namespace {

using namespace nibble_test;

void expect_equals_reference(const Values& v, const Scheme& s) {
  SCOPED_TRACE(describe(s, v.shape));
  const nibble::QuantizedTensor q = quantize(v, s);
  // With 16-bit scales the fit may go on from the rounded scale; the properties test covers that. The codes that
  // belong to the stored parameters are compared exactly in any case.
  const bool fitted = s.scale_type == ScaleType::fp32;
  const Reference r = reference(v, s, fitted ? std::vector<nibble::Grid>{} : grids_of(q));
  ASSERT_EQ(q.param_count(), r.grids.size());
  for (std::size_t p = 0; p < r.grids.size(); ++p) {
    ASSERT_EQ(bits(q.scale(p)), bits(r.grids[p].scale)) << "parameter " << p;
    ASSERT_EQ(q.zero_point(p), r.grids[p].zero) << "parameter " << p;
    ASSERT_EQ(bits(q.offset(p)), bits(r.grids[p].offset)) << "parameter " << p;
  }
  for (std::size_t i = 0; i < v.x.size(); ++i) {
    const std::size_t length = q.line_length();
    ASSERT_EQ(q.param_index(i / length, i % length), r.param[i]) << "element " << i;
  }
  ASSERT_EQ(codes_of(q), r.codes);
  ASSERT_TRUE(same_bits(values_of(q), r.values));
}

std::vector<Granularity> all_granularities(const Shape& shape) {
  std::vector<Granularity> all = {Granularity::per_tensor()};
  const int rank = static_cast<int>(shape.size());
  for (int axis = -rank; axis < rank; ++axis) {
    all.push_back(Granularity::per_channel(axis));
    all.push_back(Granularity::per_group(16, axis));
    all.push_back(Granularity::per_group(48, axis));
  }
  return all;
}

TEST(Quantizer, EverySchemeGranularityAxisAndRank) {
  unsigned seed = 0;
  for (const Shape& shape : {Shape{}, Shape{1}, Shape{37}, Shape{5, 50}, Shape{50, 5}, Shape{1, 33}, Shape{33, 1},
                             Shape{4, 19, 21}, Shape{3, 2, 17, 5}, Shape{2, 3, 2, 3, 18}}) {
    const Values v = random_values(shape, ++seed);
    for (const Granularity& g : all_granularities(shape))
      for (const Scheme& s : all_schemes(g)) expect_equals_reference(v, s);
  }
}

TEST(Quantizer, GroupsThatDoNotDivideTheAxis) {
  struct Case {
    std::size_t k, group;
  };
  for (const Case& c : {Case{576, 128}, Case{172, 64}, Case{100, 512}, Case{512, 512}}) {
    const Values v = random_values({3, c.k}, static_cast<unsigned>(c.k));
    for (const Scheme& s : all_schemes(Granularity::per_group(c.group))) expect_equals_reference(v, s);
  }
  for (std::size_t k = 1; k <= 95; ++k) {
    const Values v = random_values({2, k}, static_cast<unsigned>(k));
    for (std::size_t group : {16U, 48U, 96U})
      for (const Scheme& s : all_schemes(Granularity::per_group(group)))
        if (s.scale_type == ScaleType::fp32) expect_equals_reference(v, s);
  }
}

TEST(Quantizer, ScalesAreTheNearestStorableOrTheNextLarger) {
  const Values v = random_values({40, 64}, 11);
  for (const Scheme& s : all_schemes(Granularity::per_group(16))) {
    if (s.scale_type == ScaleType::fp32 || s.symmetry == Symmetry::float_offset) continue;
    SCOPED_TRACE(describe(s, v.shape));
    const nibble::QuantizedTensor q = quantize(v, s);
    const Reference r = reference(v, s);
    std::size_t stepped = 0;
    for (std::size_t p = 0; p < q.param_count(); ++p) {
      const float nearest = r.grids[p].scale;
      if (bits(q.scale(p)) == bits(nearest)) continue;
      ++stepped;
      EXPECT_EQ(bits(q.scale(p)), bits(nibble::detail::step_to(s.scale_type, nearest, 1)));
    }
    // Only where the nearest leaves a value more than half a step out: with bf16's 8 bits never for the 7.5 steps of
    // half an int4 grid that is not used to its end.
    if (s.format == Format::int4 && s.symmetry == Symmetry::symmetric && !s.full_range) {
      EXPECT_EQ(stepped, 0U);
    }
  }
}

TEST(Quantizer, LinesLongerThanTheChunksInside) {
  for (std::size_t k : {511U, 512U, 513U, 1500U, 4099U}) {
    const Values v = random_values({3, k}, static_cast<unsigned>(k));
    for (const Granularity& g :
         {Granularity::per_tensor(), Granularity::per_channel(0), Granularity::per_channel(1),
          Granularity::per_group(48), Granularity::per_group(16, 0)})
      for (const Scheme& s : all_schemes(g))
        if (s.scale_type == ScaleType::fp32) expect_equals_reference(v, s);
  }
}

TEST(Quantizer, ManyLinesInEitherOrder) {
  // More lines than a block holds, and dimensions of one on either side.
  for (const Shape& shape : {Shape{150, 20}, Shape{1, 130, 3}, Shape{130, 1, 3}, Shape{67, 70, 1}}) {
    const Values v = random_values(shape, 5);
    const Scheme s{Format::int8, Symmetry::asymmetric, Granularity::per_channel(0), ScaleType::fp32, false};
    expect_equals_reference(v, s);
    // The same numbers first dimension fastest.
    std::vector<float> reversed(v.x.size());
    nibble::detail::InputView view{reversed.data(), nibble::detail::ScalarType::fp32, {}};
    std::size_t stride = 1;
    std::vector<std::size_t> strides;
    for (std::size_t length : shape) {
      view.layout.add(length, static_cast<std::ptrdiff_t>(stride));
      strides.push_back(stride);
      stride *= length;
    }
    for (std::size_t i = 0; i < v.x.size(); ++i) {
      const auto index = index_of(shape, i);
      std::size_t at = 0;
      for (std::size_t d = 0; d < shape.size(); ++d) at += index[d] * strides[d];
      reversed[at] = v.x[i];
    }
    EXPECT_EQ(codes_of(nibble::detail::quantize_view(view, s, {})), codes_of(quantize(v, s)));
    std::vector<float> back(v.x.size());
    quantize(v, s).dequantize(nibble::detail::OutputView{back.data(), view.layout});
    const std::vector<float> values = values_of(quantize(v, s));
    for (std::size_t i = 0; i < v.x.size(); ++i) {
      const auto index = index_of(shape, i);
      std::size_t at = 0;
      for (std::size_t d = 0; d < shape.size(); ++d) at += index[d] * strides[d];
      ASSERT_EQ(bits(back[at]), bits(values[i]));
    }
  }
}

TEST(Quantizer, FloatFormatsKeepTheirBits) {
  const Values v = random_values({7, 29}, 3);
  for (Format f : {Format::fp32, Format::fp16, Format::bf16}) {
    // Granularity and scales mean nothing here, and do no harm.
    const nibble::QuantizedTensor q =
        quantize(v, {f, Symmetry::asymmetric, Granularity::per_group(16), ScaleType::fp16, false});
    EXPECT_EQ(q.param_count(), 0U);
    EXPECT_TRUE(q.scales().empty());
    EXPECT_EQ(q.scheme(), (Scheme{f, Symmetry::symmetric, Granularity::per_tensor(), ScaleType::fp32, false}));
    for (std::size_t i = 0; i < v.x.size(); ++i) {
      const float x = v.x[i];
      const auto expected = f == Format::fp32   ? static_cast<std::int64_t>(bits(x))
                            : f == Format::fp16 ? static_cast<std::int64_t>(Eigen::half(x).x)
                                                : static_cast<std::int64_t>(Eigen::bfloat16(x).value);
      ASSERT_EQ(q.code(i / 29, i % 29), expected);
    }
  }
}

TEST(Quantizer, TypeStatesTheScheme) {
  using Q = nibble::Quantizer<nibble::Int4, nibble::Asymmetric, nibble::PerGroup<128>, Eigen::half>;
  EXPECT_EQ(Q::scheme(),
            (Scheme{Format::int4, Symmetry::asymmetric, Granularity::per_group(128, -1), ScaleType::fp16, false}));
  using Full = nibble::Quantizer<nibble::Int4, nibble::SymmetricFull, nibble::PerChannel<>, Eigen::bfloat16>;
  EXPECT_EQ(Full::scheme(),
            (Scheme{Format::int4, Symmetry::symmetric, Granularity::per_channel(0), ScaleType::bf16, true}));
  EXPECT_EQ(nibble::Quantizer<nibble::Nf4>::scheme(),
            (Scheme{Format::nf4, Symmetry::symmetric, Granularity::per_tensor(), ScaleType::fp32, false}));
}

TEST(Quantizer, StaticAndRunTimeTwinAgree) {
  const Eigen::MatrixXf w = Eigen::MatrixXf::Random(6, 70);
  using Q = nibble::Quantizer<nibble::Int8, nibble::FloatOffset, nibble::PerGroup<32>, Eigen::half>;
  const auto typed = nibble::quantize<Q>(w);
  const nibble::QuantizedTensor erased = nibble::DynamicQuantizer(Q::scheme()).quantize(w);
  EXPECT_EQ(typed.erased().scheme(), erased.scheme());
  EXPECT_EQ(codes_of(typed), codes_of(erased));
  EXPECT_EQ(nibble::dequantize(typed), nibble::dequantize(erased));
  EXPECT_EQ(nibble::Quantized<Q>(erased).byte_size(), typed.byte_size());
  using Other = nibble::Quantizer<nibble::Int8, nibble::FloatOffset, nibble::PerGroup<16>, Eigen::half>;
  EXPECT_THROW(nibble::Quantized<Other>{erased}, nibble::InvalidArgument);
}

TEST(Quantizer, FullRangeInt4UsesMinusEight) {
  using Full = nibble::Quantizer<nibble::Int4, nibble::SymmetricFull>;
  using Plain = nibble::Quantizer<nibble::Int4, nibble::Symmetric>;
  Eigen::MatrixXf w(1, 4);
  w << -8.0F, 3.0F, 0.0F, 4.5F;
  EXPECT_EQ(nibble::quantize<Full>(w).erased().scale(0), 1.0F);
  EXPECT_EQ(codes_of(nibble::quantize<Full>(w)), (std::vector<int>{0, 11, 8, 12}));
  EXPECT_EQ(nibble::quantize<Plain>(w).erased().scale(0), 8.0F / 7.0F);
  EXPECT_EQ(codes_of(nibble::quantize<Plain>(w)), (std::vector<int>{1, 11, 8, 12}));
  w << -7.0F, 7.0F, 0.0F, -7.5F;  // 7 / 7 beats 7.5 / 8; -7.5 -> -8, a tie to even
  EXPECT_EQ(nibble::quantize<Full>(w).erased().scale(0), 1.0F);
  EXPECT_EQ(codes_of(nibble::quantize<Full>(w)), (std::vector<int>{1, 15, 8, 0}));
}

TEST(Quantizer, TiesGoToEven) {
  Eigen::MatrixXf w(1, 8);
  w << 127.0F, 0.5F, 1.5F, 2.5F, -0.5F, -1.5F, -2.5F, -0.0F;
  const auto q = nibble::quantize<nibble::Quantizer<nibble::Int8>>(w);
  EXPECT_EQ(q.erased().scale(0), 1.0F);
  EXPECT_EQ(codes_of(q), (std::vector<int>{127, 0, 2, 2, 0, -2, -2, 0}));
}

TEST(Quantizer, GivenRanges) {
  Eigen::MatrixXf w(2, 4);
  w << 1.0F, -5.0F, 0.25F, 2.0F, 0.5F, 100.0F, -0.125F, 0.0F;
  using Q = nibble::Quantizer<nibble::Int8, nibble::Symmetric, nibble::PerChannel<0>>;
  const auto one = Q({{-1.0F, 1.0F}}).quantize(w);
  EXPECT_EQ(one.erased().scale(0), 1.0F / 127.0F);
  EXPECT_EQ(one.erased().scale(1), 1.0F / 127.0F);
  EXPECT_EQ(codes_of(one), (std::vector<int>{127, -127, 32, 127, 64, 127, -16, 0}));  // 31.75, 63.5 -> 64, -15.875
  const auto each = Q({{-2.0F, 2.0F}, {0.0F, 127.0F}}).quantize(w);
  EXPECT_EQ(each.erased().scale(0), 2.0F / 127.0F);
  EXPECT_EQ(each.erased().scale(1), 1.0F);
  EXPECT_EQ(each.erased().code(1, 1), 100);
  EXPECT_THROW(Q({{-1, 1}, {-1, 1}, {-1, 1}}).quantize(w), nibble::InvalidArgument);
  EXPECT_THROW(Q({{-1, std::numeric_limits<float>::infinity()}}).quantize(w), nibble::InvalidArgument);
}

TEST(Quantizer, ObserverSeesEverythingAndItsRangesServe) {
  const Values first = random_values({4, 3, 40}, 1);
  Values second = random_values({4, 3, 40}, 2);
  second.x[77] = 50.0F;
  for (const Granularity& g : all_granularities(first.shape)) {
    const Scheme s{Format::int8, Symmetry::asymmetric, g, ScaleType::fp32, false};
    nibble::MinMaxObserver observer;
    nibble::Ranges ranges = nibble::detail::observe_view(view_of(first), s, observer);
    EXPECT_EQ(codes_of(quantize(first, s, ranges)), codes_of(quantize(first, s)));
    ranges = nibble::detail::observe_view(view_of(second), s, observer);
    // Both tensors: as if they were one.
    const nibble::QuantizedTensor a = quantize(first, s);
    const nibble::QuantizedTensor b = quantize(second, s);
    ASSERT_EQ(ranges.size(), a.param_count());
    for (std::size_t i = 0; i < first.x.size(); ++i) {
      const std::size_t p = a.param_index(i / 40, i % 40);
      EXPECT_LE(ranges[p].lo, std::min(first.x[i], second.x[i]));
      EXPECT_GE(ranges[p].hi, std::max(first.x[i], second.x[i]));
    }
    EXPECT_EQ(ranges[b.param_index(77 / 40, 77 % 40)].hi, 50.0F);
  }
}

TEST(Quantizer, ObserverOfAnotherShapeIsRefused) {
  nibble::MinMaxObserver observer;
  const Scheme s{Format::int8, Symmetry::symmetric, Granularity::per_channel(0), ScaleType::fp32, false};
  const nibble::DynamicQuantizer quantizer(s);
  quantizer.observe(Eigen::MatrixXf::Random(3, 4), observer);
  EXPECT_THROW(quantizer.observe(Eigen::MatrixXf::Random(4, 4), observer), nibble::InvalidArgument);
}

TEST(Quantizer, EmptyMatricesAndTensors) {
  for (const Granularity& g : {Granularity::per_tensor(), Granularity::per_channel(0), Granularity::per_channel(1),
                               Granularity::per_group(16), Granularity::per_group(16, 0)}) {
    std::vector<Scheme> schemes = all_schemes(g);
    schemes.push_back({Format::fp32, Symmetry::symmetric, g, ScaleType::fp32, false});
    schemes.push_back({Format::fp16, Symmetry::symmetric, g, ScaleType::fp32, false});
    for (const Scheme& s : schemes) {
      for (const auto& [rows, cols] : {std::pair<int, int>{0, 0}, {0, 5}, {5, 0}}) {
        SCOPED_TRACE(describe(s, {std::size_t(rows), std::size_t(cols)}));
        const Eigen::MatrixXf empty(rows, cols);
        const nibble::QuantizedTensor q = nibble::DynamicQuantizer(s).quantize(empty);
        EXPECT_TRUE(q.empty());
        // Parameters of channels without elements are there, and harmless.
        for (std::size_t p = 0; p < q.param_count(); ++p) EXPECT_EQ(q.scale(p), 1.0F);
        const Eigen::MatrixXf back = nibble::dequantize(q);
        EXPECT_EQ(back.rows(), rows);
        EXPECT_EQ(back.cols(), cols);
        EXPECT_EQ(nibble::DynamicQuantizer(s).fake_quantize(empty).size(), 0);
      }
    }
  }
  const Eigen::Tensor<float, 3> none(2, 0, 3);
  const auto q = nibble::quantize<nibble::Quantizer<nibble::Int4, nibble::Symmetric, nibble::PerGroup<16>>>(none);
  EXPECT_EQ(nibble::dequantize(q).dimension(1), 0);
}

}  // namespace
