// Grids and codes of weights: those of the quantizers bit for bit, and the search for clipped ranges.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "nibble/ptq/weight_grids.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace

bool same(const Buffer& a, const Buffer& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}
void expect_same(const QuantizedTensor& a, const QuantizedTensor& b) {
  EXPECT_TRUE(a.scheme() == b.scheme());
  EXPECT_EQ(a.shape(), b.shape());
  EXPECT_TRUE(same(a.codes(), b.codes()));
  EXPECT_TRUE(same(a.scales(), b.scales()));
  EXPECT_TRUE(same(a.zeros(), b.zeros()));
}

RowMajorMatrix random_weights(Eigen::Index rows, Eigen::Index cols, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.02F, 0.5F);
  RowMajorMatrix w(rows, cols);
  for (Eigen::Index i = 0; i < w.size(); ++i) w.data()[i] = normal(random);
  w.row(rows / 2).setZero();
  if (rows > 2) w.row(1).setConstant(-0.75F);
  return w;
}

std::vector<Scheme> schemes() {
  std::vector<Scheme> all;
  for (const Format f : all_formats)
    for (const Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
      for (const Granularity& g :
           {Granularity::per_channel(0), Granularity::per_group(32), Granularity::per_group(128, 1)})
        for (const ScaleType t : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16})
          for (const bool full : {false, true})
            if (has_scales(f) && (is_integer(f) || s == Symmetry::symmetric) &&
                (!full || (is_integer(f) && s == Symmetry::symmetric)))
              all.push_back({f, s, g, t, full});
  return all;
}

TEST(PtqWeightGrids, AreTheQuantizersToTheBit) {
  ThreadPool pool(3);
  int checked = 0;
  for (const Scheme& scheme : schemes())
    for (const Eigen::Index cols : {1, 31, 200, 5000}) {
      if (cols == 5000 && scheme.scale_type != ScaleType::fp32) continue;
      const RowMajorMatrix w = random_weights(5, cols, static_cast<unsigned>(cols));
      const QuantizedTensor expected = DynamicQuantizer(scheme).quantize(w);
      const WeightGrids grids = fit_min_max(scheme, w, checked % 2 == 0 ? &pool : nullptr);
      const CodeMatrix codes = grids.encode(w, checked % 2 == 0 ? nullptr : &pool);
      expect_same(grids.assemble(codes), expected);
      EXPECT_EQ(codes, codes_of(expected));
      const Eigen::MatrixXf values = dequantize(expected);
      EXPECT_EQ(Eigen::MatrixXf(grids.decode(codes)), values);
      for (Eigen::Index r = 0; r < w.rows(); ++r)
        for (Eigen::Index k = 0; k < cols; k += 1 + cols / 40) {
          ASSERT_EQ(grids.encode(r, k, w(r, k)), codes(r, k));
          ASSERT_EQ(grids.decode(r, k, codes(r, k)), values(r, k));
        }
      expect_same(WeightGrids::of(expected).assemble(codes), expected);
      // A column-major matrix is the same matrix.
      expect_same(fit_min_max(scheme, Eigen::MatrixXf(w)).assemble(codes), expected);
      ++checked;
    }
  EXPECT_GT(checked, 100);
}

TEST(PtqWeightGrids, RunsUnderAGrid) {
  const Scheme scheme{Format::int4, Symmetry::asymmetric, Granularity::per_group(32, 1), ScaleType::fp16, false};
  const RowMajorMatrix w = random_weights(3, 32, 5);
  const WeightGrids grids = fit_min_max(scheme, w);
  std::vector<std::int8_t> codes(32);
  std::vector<float> values(32);
  const Grid g = grids.at(0, 0);
  grids.encode_run(g, w.data(), 32, codes.data());
  grids.decode_run(g, codes.data(), 32, values.data());
  for (int k = 0; k < 32; ++k) {
    EXPECT_EQ(codes[static_cast<std::size_t>(k)], grids.encode(0, k, w(0, k)));
    EXPECT_EQ(values[static_cast<std::size_t>(k)], grids.decode(0, k, codes[static_cast<std::size_t>(k)]));
  }
}

/// One group, one candidate after the other, in double.
double naive_error(const WeightGrids& grids, const Grid& g, const Eigen::VectorXf& w,
                   const Eigen::VectorXf& importance, double norm) {
  double sum = 0.0;
  for (Eigen::Index k = 0; k < w.size(); ++k) {
    const double e = static_cast<double>(grids.decode(g, grids.encode(g, w[k]))) - static_cast<double>(w[k]);
    sum += (importance.size() == 0 ? 1.0 : static_cast<double>(importance[k])) * std::pow(std::fabs(e), norm);
  }
  return sum;
}

TEST(PtqWeightGrids, MseFindsTheBestOfTheCandidates) {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(0.0F, 4.0F);
  for (const Scheme& scheme : schemes()) {
    if (scheme.scale_type == ScaleType::bf16) continue;
    const RowMajorMatrix w = random_weights(4, 96, 11);
    Eigen::VectorXf importance(96);
    for (Eigen::Index k = 0; k < 96; ++k) importance[k] = uniform(random);
    for (const bool weighted : {false, true})
      for (const double norm : {2.4, 2.0}) {
        const Eigen::VectorXf weights = weighted ? importance : Eigen::VectorXf();
        MseOptions options;
        options.norm = norm;
        const WeightGrids grids = fit_mse(scheme, w, options, weights);
        const WeightGrids plain = fit_min_max(scheme, w);
        for (Eigen::Index r = 0; r < w.rows(); ++r)
          for (Eigen::Index g = 0; g < grids.groups(); ++g) {
            const auto range = grids.inputs_of(g);
            const Eigen::Index n = range.second - range.first;
            const Eigen::VectorXf part = w.row(r).segment(range.first, n).transpose();
            const Eigen::VectorXf part_weights =
                weighted ? Eigen::VectorXf(weights.segment(range.first, n)) : weights;
            double least = naive_error(grids, plain.at(r, g), part, part_weights, norm);
            for (int i = 1; i < 80; ++i) {
              const auto p = static_cast<float>(1.0 - i / 100.0);
              const Grid candidate = grids.fit({part.minCoeff() * p, part.maxCoeff() * p});
              least = std::min(least, naive_error(grids, candidate, part, part_weights, norm));
            }
            // Sums of at most 96 terms, and powers from a table that is exact to 1e-5.
            EXPECT_LE(naive_error(grids, grids.at(r, g), part, part_weights, norm), least * (1.0 + 4e-5));
          }
      }
  }
}

TEST(PtqWeightGrids, MseHelpsOutliersAndThreadsChangeNothing) {
  const Scheme scheme{Format::int4, Symmetry::symmetric, Granularity::per_group(64, 1), ScaleType::fp32, false};
  RowMajorMatrix w = random_weights(20, 256, 2);
  w.col(3) *= 6.0F;
  const WeightGrids plain = fit_min_max(scheme, w);
  const WeightGrids clipped = fit_mse(scheme, w);
  const float before = (plain.decode(plain.encode(w)) - w).squaredNorm();
  const float after = (clipped.decode(clipped.encode(w)) - w).squaredNorm();
  EXPECT_LT(after, 0.95F * before);
  ThreadPool pool(3);
  MseOptions options;
  options.pool = &pool;
  const WeightGrids threaded = fit_mse(scheme, w, options);
  expect_same(threaded.assemble(threaded.encode(w, &pool)), clipped.assemble(clipped.encode(w)));
  // Importance of one input alone: it is hit as well as any candidate can.
  Eigen::VectorXf importance = Eigen::VectorXf::Zero(256);
  importance[5] = 1.0F;
  const WeightGrids one = fit_mse(scheme, w, {}, importance);
  for (Eigen::Index r = 0; r < w.rows(); ++r)
    EXPECT_LE(std::fabs(one.decode(r, 5, one.encode(r, 5, w(r, 5))) - w(r, 5)),
              std::fabs(plain.decode(r, 5, plain.encode(r, 5, w(r, 5))) - w(r, 5)));
}

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "";
}

TEST(PtqWeightGrids, BadInputs) {
  const Scheme scheme{Format::int4, Symmetry::asymmetric, Granularity::per_group(32, 1), ScaleType::fp16, false};
  RowMajorMatrix w = random_weights(4, 64, 7);
  WeightGrids grids = fit_min_max(scheme, w);
  const auto refuses = [&](const Scheme& s) { return !message_of([&] { WeightGrids(s, 4, 64); }).empty(); };
  EXPECT_TRUE(refuses({Format::fp16, Symmetry::symmetric, {}, ScaleType::fp32, false}));
  EXPECT_TRUE(refuses({Format::int4, Symmetry::symmetric, Granularity::per_tensor(), ScaleType::fp32, false}));
  EXPECT_TRUE(refuses({Format::int4, Symmetry::symmetric, Granularity::per_channel(1), ScaleType::fp32, false}));
  EXPECT_TRUE(refuses({Format::int4, Symmetry::symmetric, Granularity::per_group(32, 0), ScaleType::fp32, false}));
  EXPECT_NE(message_of([&] { grids.encode(RowMajorMatrix::Zero(4, 63)); }).find("4 x 63"), std::string::npos);
  CodeMatrix codes = grids.encode(w);
  codes(2, 3) = 16;
  EXPECT_NE(message_of([&] { grids.assemble(codes); }).find("(2, 3) is 16"), std::string::npos);
  EXPECT_NE(message_of([&] { grids.set(1, 1, Grid{1e9F, 0.0F, 3}); }).find("row 1, group 1"), std::string::npos);
  EXPECT_NE(message_of([&] {
              grids.set(1, 1, Grid{1.0F, 0.0F, 16});
            }).find("zero point is 16"),
            std::string::npos);
  grids.set(1, 1, Grid{0.0F, 0.0F, 3});
  EXPECT_EQ(grids.at(1, 1).scale, 0x1p-24F);
  grids.set(1, 1, Grid{0.1F, 0.0F, 3});
  EXPECT_EQ(grids.at(1, 1).scale, detail::round_to(ScaleType::fp16, 0.1F));
  EXPECT_FALSE(message_of([&] { fit_mse(scheme, w, {}, Eigen::VectorXf::Ones(63)); }).empty());
  EXPECT_FALSE(message_of([&] { fit_mse(scheme, w, {}, -Eigen::VectorXf::Ones(64)); }).empty());
  MseOptions options;
  options.grid = 0;
  EXPECT_FALSE(message_of([&] { fit_mse(scheme, w, options); }).empty());
  w(3, 40) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(message_of([&] { fit_min_max(scheme, w); }).find("(3, 40)"), std::string::npos);
  EXPECT_NE(message_of([&] { fit_mse(scheme, w); }).find("(3, 40)"), std::string::npos);
  EXPECT_NE(message_of([&] { grids.encode(w); }).find("(3, 40)"), std::string::npos);
  // Nothing at all is fine.
  const WeightGrids none = fit_min_max(scheme, RowMajorMatrix(0, 64));
  EXPECT_EQ(none.assemble(none.encode(RowMajorMatrix(0, 64))).size(), 0U);
}

}  // namespace
