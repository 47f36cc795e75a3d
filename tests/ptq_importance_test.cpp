// Importance-weighted grids against the best there are: every way to round a group, each with its best scale.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "nibble/ptq/hessian.hpp"
#include "nibble/ptq/importance.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace

RowMajorMatrix random_weights(Eigen::Index n, Eigen::Index k, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.05F, 0.5F);
  RowMajorMatrix w(n, k);
  for (Eigen::Index i = 0; i < w.size(); ++i) w.data()[i] = normal(random);
  return w;
}
Eigen::VectorXf random_importance(Eigen::Index k, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Eigen::VectorXf v(k);
  for (Eigen::Index i = 0; i < k; ++i) v[i] = std::exp(1.5F * normal(random));
  return v;
}

/// sum_k w_k (x_k - value_k)^2 with the root that the header defines, in double.
double weighted_error(const WeightGrids& grids, const Grid& g, const Eigen::VectorXf& x,
                      const Eigen::VectorXd& weights) {
  double sum = 0.0;
  for (Eigen::Index k = 0; k < x.size(); ++k) {
    const double e = static_cast<double>(x[k]) - static_cast<double>(grids.decode(g, grids.encode(g, x[k])));
    sum += weights[k] * e * e;
  }
  return sum;
}

/// The least error of any scale: between two scales at which some code changes all codes are constant, and for them the
/// best scale is sum w x c / sum w c^2 (the best scale of any codes is no worse than that of nearest codes, so taking them
/// all gives the global optimum). With a zero point: for each of them.
double exhaustive(const Eigen::VectorXf& x, const Eigen::VectorXd& weights, int lowest, int highest,
                  bool asymmetric, bool both_signs) {
  double best = std::numeric_limits<double>::infinity();
  for (int zero = asymmetric ? lowest : 0; zero <= (asymmetric ? highest : 0); ++zero)
    for (const double sign : {1.0, -1.0}) {
      if (sign < 0.0 && !both_signs) continue;
      std::vector<double> edges;
      for (Eigen::Index k = 0; k < x.size(); ++k)
        for (int q = lowest; q < highest; ++q) {
          const double scale = sign * static_cast<double>(x[k]) / (q - zero + 0.5);
          if (scale > 0.0) edges.push_back(scale);
        }
      std::sort(edges.begin(), edges.end());
      edges.insert(edges.begin(), edges.front() / 2.0);
      edges.push_back(edges.back() * 2.0);
      for (std::size_t i = 0; i + 1 < edges.size(); ++i) {
        const double scale = sign * 0.5 * (edges[i] + edges[i + 1]);
        double xx = 0.0;
        double xc = 0.0;
        double cc = 0.0;
        for (Eigen::Index k = 0; k < x.size(); ++k) {
          const auto v = static_cast<double>(x[k]);
          const double c =
              std::clamp(std::round(v / scale) + zero, static_cast<double>(lowest), static_cast<double>(highest)) -
              zero;
          xx += weights[k] * v * v;
          xc += weights[k] * v * c;
          cc += weights[k] * c * c;
        }
        best = std::min(best, cc > 0.0 ? xx - xc * xc / cc : xx);
      }
    }
  return best;
}

Eigen::VectorXd effective(const RowMajorMatrix& w, Eigen::Index row, const Eigen::VectorXf& importance,
                          bool magnitude) {
  Eigen::VectorXd weights = importance.cast<double>();
  const double mean = w.row(row).cast<double>().squaredNorm() / static_cast<double>(w.cols());
  if (magnitude)
    for (Eigen::Index k = 0; k < w.cols(); ++k)
      weights[k] *= std::sqrt(mean + static_cast<double>(w(row, k)) * static_cast<double>(w(row, k)));
  return weights;
}

TEST(PtqImportance, ComesCloseToTheBestThereIs) {
  const Eigen::Index k = 16;
  const RowMajorMatrix w = random_weights(60, k, 1);
  const Eigen::VectorXf importance = random_importance(k, 2);
  for (const Format f : {Format::int4, Format::int3, Format::int2})
    for (const Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric})
      for (const bool full : {false, true})
        for (const bool magnitude : {false, true}) {
          if (full && s == Symmetry::asymmetric) continue;
          const Scheme scheme{f, s, Granularity::per_group(16, 1), ScaleType::fp32, full};
          SCOPED_TRACE(std::string(name_of(f)) + " " + std::string(name_of(s)) + (full ? " full" : ""));
          ImportanceOptions options;
          options.magnitude = magnitude;
          const WeightGrids grids = fit_importance(scheme, w, importance, options);
          const WeightGrids plain = fit_min_max(scheme, w);
          const int shift = s == Symmetry::symmetric ? symmetric_zero_of(f) : 0;
          double found = 0.0;
          double best = 0.0;
          double before = 0.0;
          for (Eigen::Index r = 0; r < w.rows(); ++r) {
            const Eigen::VectorXd weights = effective(w, r, importance, magnitude);
            const Eigen::VectorXf x = w.row(r).transpose();
            const double mine = weighted_error(grids, grids.at(r, 0), x, weights);
            const double least = exhaustive(x, weights, grids.min_code() - shift, grids.max_code() - shift,
                                            s == Symmetry::asymmetric, full);
            const double old = weighted_error(plain, plain.at(r, 0), x, weights);
            EXPECT_LE(mine, old * (1.0 + 1e-5));
            // The scale is a float: its rounding costs 1e-7 of values of 3 steps' error.
            EXPECT_GE(mine, least * (1.0 - 1e-4));
            found += mine;
            best += least;
            before += old;
          }
          // A search of 40 scales and 3 zero points does not find every optimum among thousands of intervals.
          EXPECT_LE(found, 1.25 * best);
          EXPECT_LE(found, 0.75 * before);
        }
}

std::vector<Scheme> schemes() {
  std::vector<Scheme> all;
  for (const Format f : all_formats)
    for (const Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
      for (const ScaleType t : {ScaleType::fp32, ScaleType::fp16})
        if (has_scales(f) && (is_integer(f) || s == Symmetry::symmetric))
          all.push_back({f, s, Granularity::per_group(32, 1), t, false});
  return all;
}

TEST(PtqImportance, HelpsEveryFormatAndThreadsChangeNothing) {
  const Eigen::Index k = 100;
  const RowMajorMatrix w = random_weights(30, k, 3);
  const Eigen::VectorXf importance = random_importance(k, 4);
  ThreadPool pool(3);
  for (const Scheme& scheme : schemes()) {
    SCOPED_TRACE(std::string(name_of(scheme.format)) + " " + std::string(name_of(scheme.symmetry)));
    ImportanceOptions options;
    options.magnitude = false;
    const QuantizedTensor q = quantize_importance(scheme, w, importance, options);
    const auto error = [&](const QuantizedTensor& t) {
      return ((w - dequantize(t)).array().square().matrix() * importance).cast<double>().sum();
    };
    const double before = error(DynamicQuantizer(scheme).quantize(w));
    EXPECT_LT(error(q), (bits_of(scheme.format) >= 5 ? 1.0 : 0.9) * before);
    options.pool = &pool;
    const QuantizedTensor threaded = quantize_importance(scheme, w, importance, options);
    EXPECT_EQ(std::memcmp(q.codes().data(), threaded.codes().data(), q.codes().size()), 0);
    EXPECT_EQ(std::memcmp(q.scales().data(), threaded.scales().data(), q.scales().size()), 0);
    // Only the importances' ratios count (powers of two: to the bit).
    EXPECT_EQ(codes_of(quantize_importance(scheme, w, importance * 0x1p60F, options)), codes_of(q));
  }
}

TEST(PtqImportance, WhatMattersIsHit) {
  const Scheme scheme{Format::int3, Symmetry::asymmetric, Granularity::per_group(32, 1), ScaleType::fp32, false};
  const RowMajorMatrix w = random_weights(20, 64, 5);
  Eigen::VectorXf importance = Eigen::VectorXf::Constant(64, 1e-3F);
  importance[7] = 1000.0F;
  importance[40] = 1000.0F;
  ImportanceOptions options;
  options.smallest = 0.1;  // some of these weights are small beside their groups
  options.candidates = 100;
  const WeightGrids grids = fit_importance(scheme, w, importance, options);
  const WeightGrids plain = fit_min_max(scheme, w);
  const RowMajorMatrix error = grids.decode(grids.encode(w)) - w;
  const RowMajorMatrix before = plain.decode(plain.encode(w)) - w;
  for (const Eigen::Index k : {7, 40}) EXPECT_LT(error.col(k).norm(), 0.1F * before.col(k).norm());
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

TEST(PtqImportance, PlantedCasesAndBadInputs) {
  for (const Scheme& scheme : schemes()) {
    RowMajorMatrix w = random_weights(5, 40, 6);
    w.row(0).setZero();
    w.row(1).setConstant(0.3F);
    w.row(2) *= 1e-30F;
    w.row(3).head(32).setZero();
    if (scheme.scale_type == ScaleType::fp32) w.row(4) *= 1e30F;
    Eigen::VectorXf importance = random_importance(40, 7);
    importance.tail(8).setZero();  // the whole last group
    importance[3] = 0.0F;
    const QuantizedTensor q = quantize_importance(scheme, w, importance);
    const Eigen::MatrixXf back = dequantize(q);
    EXPECT_TRUE(back.allFinite());
    EXPECT_EQ(back.row(0).norm(), 0.0F);
    const QuantizedTensor even = quantize_importance(scheme, w, Eigen::VectorXf());
    EXPECT_TRUE(dequantize(even).allFinite());
    EXPECT_EQ(codes_of(even), codes_of(quantize_importance(scheme, w, Eigen::VectorXf::Ones(40))));
    EXPECT_EQ(quantize_importance(scheme, w.leftCols(1), importance.head(1)).size(), 5U);
    EXPECT_EQ(quantize_importance(scheme, RowMajorMatrix(0, 40), importance).size(), 0U);
  }
  const Scheme scheme{Format::int4, Symmetry::asymmetric, Granularity::per_group(32, 1), ScaleType::fp32, false};
  RowMajorMatrix w = random_weights(4, 40, 8);
  EXPECT_FALSE(message_of([&] { fit_importance(scheme, w, Eigen::VectorXf::Ones(41)); }).empty());
  EXPECT_FALSE(message_of([&] { fit_importance(scheme, w, -Eigen::VectorXf::Ones(40)); }).empty());
  ImportanceOptions options;
  options.candidates = 0;
  EXPECT_FALSE(message_of([&] { fit_importance(scheme, w, Eigen::VectorXf(), options); }).empty());
  options = {};
  options.smallest = 0.0;
  EXPECT_FALSE(message_of([&] { fit_importance(scheme, w, Eigen::VectorXf(), options); }).empty());
  w(2, 39) = std::numeric_limits<float>::infinity();
  EXPECT_NE(message_of([&] { fit_importance(scheme, w, Eigen::VectorXf()); }).find("(2, 39)"), std::string::npos);
}

}  // namespace
