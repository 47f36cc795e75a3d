// SmoothQuant, cross-layer equalization and bias correction against their papers' equations.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "nibble/core/thread_pool.hpp"
#include "nibble/ptq/bias_correction.hpp"
#include "nibble/ptq/equalize.hpp"
#include "nibble/ptq/smooth_quant.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace
using Eigen::Index;

RowMajorMatrix normal(Index rows, Index cols, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> d;
  RowMajorMatrix m(rows, cols);
  for (float& v : m.reshaped()) v = d(random);
  return m;
}

const Scheme weights_int8{Format::int8, Symmetry::symmetric, Granularity::per_channel(0), ScaleType::fp32, false};
const Scheme tokens_int8{Format::int8, Symmetry::symmetric, Granularity::per_channel(1), ScaleType::fp32, false};
const Scheme static_int8{Format::int8, Symmetry::symmetric, Granularity::per_tensor(), ScaleType::fp32, false};

TEST(SmoothQuant, ScalesAreEquationFour) {
  const RowMajorMatrix a = normal(10, 12, 1);
  RowMajorMatrix b = normal(7, 12, 2) * 2.0F;
  Eigen::VectorXf x = normal(12, 1, 3).cwiseAbs();
  x[5] = 0.0F;    // never active
  x[6] = 1e-30F;  // nearly so: clamped
  b.col(7).setZero();
  RowMajorMatrix c = a;
  c.col(7).setZero();  // no weights
  for (const double alpha : {0.0, 0.5, 0.85, 1.0}) {
    const Eigen::VectorXf s = smooth_scales(x, {&c, &b}, alpha);
    for (Index j = 0; j < 12; ++j) {
      double w = 1e-5;
      for (const RowMajorMatrix* m : {&c, &b})
        for (Index r = 0; r < m->rows(); ++r) w = std::max(w, static_cast<double>(std::fabs((*m)(r, j))));
      const double v = std::pow(static_cast<double>(x[j]), alpha) * std::pow(w, alpha - 1.0);
      const double expected = j == 5 ? 1.0 : std::max(v, 1e-5);
      EXPECT_NEAR(static_cast<double>(s[j]), expected, 1e-6 * expected) << alpha << " " << j;
    }
  }
  const HeadLayout heads{4, 2, 3};
  const Eigen::VectorXf kv = smooth_scales(x, {&a}, 0.5, heads);
  const Eigen::VectorXf expected =
      smooth_scales(max_over_queries(x, heads), max_over_queries(input_absmax({&a}), heads), 0.5);
  EXPECT_EQ(kv, expected);
  EXPECT_EQ(kv.size(), 6);
}

TEST(SmoothQuant, FoldedItIsTheSameFunction) {
  const Eigen::MatrixXf x = normal(12, 9, 1);
  RowMajorMatrix up = normal(20, 12, 2);
  RowMajorMatrix down = normal(12, 20, 3);
  const Eigen::MatrixXf gate = normal(20, 9, 4);
  const auto run = [&] { return Eigen::MatrixXf(down * Eigen::MatrixXf((up * x).array() * gate.array())); };
  const Eigen::MatrixXf expected = run();
  const Eigen::MatrixXf inner = (up * x).array() * gate.array();
  const Eigen::VectorXf s = smooth_scales(inner.cwiseAbs().rowwise().maxCoeff(), {&down}, 0.6);
  unscale_outputs(up, s);
  scale_inputs(down, s);
  // Two products of 12 and 20 terms and two factors.
  EXPECT_LE((run() - expected).norm(), 64.0F * 0x1p-24F * expected.norm());
}

TEST(SmoothQuant, SearchIsTheBestAlpha) {
  Eigen::MatrixXf x = normal(48, 64, 1);
  x.row(7) *= 60.0F;
  x.row(30) *= 25.0F;
  const RowMajorMatrix a = normal(20, 48, 2);
  const RowMajorMatrix b = normal(12, 48, 3);
  for (const Scheme& activations : {tokens_int8, static_int8}) {
    const SmoothSearch found = search_smooth_alpha(x, {&a, &b}, weights_int8, activations);
    ASSERT_EQ(found.errors.size(), 21U);
    const auto naive = [&](const Eigen::VectorXf& s) {
      const Eigen::MatrixXf q =
          DynamicQuantizer(activations).fake_quantize(Eigen::MatrixXf(s.cwiseInverse().asDiagonal() * x));
      double sum = 0.0;
      for (const RowMajorMatrix* w : {&a, &b}) {
        const Eigen::MatrixXf wq =
            DynamicQuantizer(weights_int8).fake_quantize(Eigen::MatrixXf(*w * s.asDiagonal()));
        sum += (wq.cast<double>() * q.cast<double>() - w->cast<double>() * x.cast<double>()).squaredNorm();
      }
      return sum / (32.0 * 64.0);
    };
    // x times 1/s instead of x / s moves a value by 2^-24 of itself and, rarely, a code: the whole by little.
    EXPECT_NEAR(found.plain_error, naive(Eigen::VectorXf::Ones(48)), 1e-3 * found.plain_error);
    double least = found.plain_error;
    for (std::size_t i = 0; i < 21; ++i) {
      const Eigen::VectorXf s =
          smooth_scales(x.cwiseAbs().rowwise().maxCoeff(), {&a, &b}, static_cast<double>(i) / 20.0);
      EXPECT_NEAR(found.errors[i], naive(s), 1e-2 * found.errors[i]);
      least = std::min(least, found.errors[i]);
    }
    EXPECT_EQ(found.error, least);
    EXPECT_LT(found.error, 0.3 * found.plain_error);
    EXPECT_GT(found.alpha, 0.2);
    ThreadPool pool(3);
    SmoothSearchOptions options;
    options.pool = &pool;
    EXPECT_EQ(search_smooth_alpha(x, {&a, &b}, weights_int8, activations, options).errors, found.errors);
    options.heads = {6, 2, 8};
    const SmoothSearch tied = search_smooth_alpha(x, {&a, &b}, weights_int8, activations, options);
    EXPECT_EQ(tied.kv_scales.size(), 16);
    EXPECT_EQ(tied.scales, expand_to_queries(tied.kv_scales, options.heads));
    EXPECT_LT(tied.error, tied.plain_error);
  }
}

TEST(SmoothQuant, OneTokenAndDeadChannels) {
  Eigen::MatrixXf x = normal(16, 1, 1);
  x(3, 0) = 0.0F;
  const RowMajorMatrix w = normal(5, 16, 2);
  const SmoothSearch found = search_smooth_alpha(x, {&w}, weights_int8, tokens_int8);
  EXPECT_TRUE(found.scales.allFinite());
  EXPECT_LE(found.error, found.plain_error);
  const RowMajorMatrix zero = RowMajorMatrix::Zero(5, 16);
  EXPECT_TRUE((search_smooth_alpha(x, {&zero}, weights_int8, tokens_int8).scales.array() == 1.0F).all());
}

TEST(SmoothQuant, RefusesBadInput) {
  const RowMajorMatrix w = normal(5, 16, 2);
  const Eigen::VectorXf x = Eigen::VectorXf::Ones(16);
  EXPECT_THROW(smooth_scales(x, {&w}, 1.5), InvalidArgument);
  EXPECT_THROW(smooth_scales(x, {&w}, -0.1), InvalidArgument);
  EXPECT_THROW(smooth_scales(x, {&w}, std::nan("")), InvalidArgument);
  EXPECT_THROW(smooth_scales(x.head(15), {&w}, 0.5), InvalidArgument);
  EXPECT_THROW(smooth_scales(-x, {&w}, 0.5), InvalidArgument);
  EXPECT_THROW(smooth_scales(x, WeightList{}, 0.5), InvalidArgument);
  EXPECT_THROW(smooth_scales(x, {&w, nullptr}, 0.5), InvalidArgument);
  EXPECT_THROW(search_smooth_alpha(Eigen::MatrixXf(16, 0), {&w}, weights_int8, tokens_int8), InvalidArgument);
  EXPECT_THROW(search_smooth_alpha(Eigen::MatrixXf::Ones(15, 2), {&w}, weights_int8, tokens_int8),
               InvalidArgument);
  SmoothSearchOptions options;
  options.grid = 0;
  EXPECT_THROW(search_smooth_alpha(Eigen::MatrixXf::Ones(16, 2), {&w}, weights_int8, tokens_int8, options),
               InvalidArgument);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Eigen::VectorXf v = x;
    v[2] = bad;
    EXPECT_THROW(smooth_scales(v, {&w}, 0.5), InvalidArgument);
    RowMajorMatrix m = w;
    m(1, 15) = bad;
    EXPECT_THROW(smooth_scales(x, {&m}, 0.5), InvalidArgument);
    Eigen::MatrixXf data = Eigen::MatrixXf::Ones(16, 2);
    data(3, 1) = bad;
    EXPECT_THROW(search_smooth_alpha(data, {&w}, weights_int8, tokens_int8), InvalidArgument);
  }
}

TEST(Equalize, BothSidesGetTheGeometricMean) {
  RowMajorMatrix first = normal(20, 12, 1);
  first.row(4) *= 100.0F;
  RowMajorMatrix second = normal(9, 20, 2);
  Eigen::VectorXf bias = normal(20, 1, 3);
  const Eigen::MatrixXf x = normal(12, 8, 4);
  const auto run = [&] { return Eigen::MatrixXf(second * ((first * x).colwise() + bias).cwiseMax(0.0F)); };
  const Eigen::MatrixXf expected = run();
  const RowMajorMatrix before = first;
  const RowMajorMatrix behind = second;
  const Eigen::VectorXf s = equalize(first, second, &bias);
  for (Index i = 0; i < 20; ++i) {
    const auto r1 = static_cast<double>(before.row(i).cwiseAbs().maxCoeff());
    const auto r2 = static_cast<double>(behind.col(i).cwiseAbs().maxCoeff());
    const double mean = std::sqrt(r1 * r2);
    EXPECT_NEAR(static_cast<double>(s[i]), mean / r2, 1e-6 * mean / r2);
    EXPECT_NEAR(static_cast<double>(first.row(i).cwiseAbs().maxCoeff()), mean, 1e-6 * mean);
    EXPECT_NEAR(static_cast<double>(second.col(i).cwiseAbs().maxCoeff()), mean, 1e-6 * mean);
  }
  // Two products of 12 and 20 terms and two factors; ReLU passes positive factors on.
  EXPECT_LE((run() - expected).norm(), 64.0F * 0x1p-24F * expected.norm());
}

TEST(Equalize, PlantedCases) {
  RowMajorMatrix first = normal(6, 5, 1);
  RowMajorMatrix second = normal(4, 6, 2);
  first.row(1).setZero();
  second.col(2).setZero();
  first.row(3).setConstant(1e-45F);
  const Eigen::VectorXf s = equalizing_scales(first, {&second});
  EXPECT_EQ(s[1], 1.0F);
  EXPECT_EQ(s[2], 1.0F);
  EXPECT_TRUE((s.array() > 0.0F).all() && s.allFinite());
  // Grouped queries: o's columns that read the same value channel have one factor.
  const HeadLayout heads{4, 2, 3};
  const RowMajorMatrix o = normal(7, 12, 3);
  const Eigen::VectorXf kv = equalizing_scales(first, o, heads);
  ASSERT_EQ(kv.size(), 6);
  const auto r1 = static_cast<double>(first.row(4).cwiseAbs().maxCoeff());
  const auto r2 = static_cast<double>(std::max(o.col(7).cwiseAbs().maxCoeff(), o.col(10).cwiseAbs().maxCoeff()));
  EXPECT_NEAR(static_cast<double>(kv[4]), std::sqrt(r1 / r2), 1e-6 * std::sqrt(r1 / r2));
  EXPECT_THROW(equalizing_scales(first, {&o}), InvalidArgument);
  EXPECT_THROW(equalizing_scales(first, second, heads), InvalidArgument);
  Eigen::VectorXf bias(5);
  EXPECT_THROW(equalize(first, second, &bias), InvalidArgument);
  first(2, 2) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(equalizing_scales(first, {&second}), InvalidArgument);
}

TEST(BiasCorrection, TakesTheMeanErrorAway) {
  const RowMajorMatrix w = normal(30, 40, 1);
  Eigen::MatrixXf x = normal(40, 100, 2);
  x.array() += 0.7F;
  const RowMajorMatrix q = DynamicQuantizer(Scheme{Format::int4, Symmetry::symmetric, Granularity::per_channel(0),
                                                   ScaleType::fp32, false})
                               .fake_quantize(Eigen::MatrixXf(w));
  const Eigen::VectorXf mean = x.rowwise().mean();
  const Eigen::VectorXf b = bias_correction(q, w, mean);
  const Eigen::MatrixXd error = (q.cast<double>() - w.cast<double>()) * x.cast<double>();
  EXPECT_GT(error.rowwise().mean().norm(), 0.1);
  // mean and b are rounded to float: 40 terms and one.
  EXPECT_LE((error.rowwise().mean() + b.cast<double>()).norm(), 1e-5 * w.cast<double>().norm());
  // The quantized model's own activations.
  const Eigen::VectorXf other = mean.array() + 0.1F;
  const Eigen::VectorXd expected =
      w.cast<double>() * mean.cast<double>() - q.cast<double>() * other.cast<double>();
  EXPECT_LE((bias_correction(q, w, mean, other).cast<double>() - expected).norm(), 1e-6 * expected.norm());
  ThreadPool pool(3);
  EXPECT_EQ(bias_correction(q, w, mean, &pool), b);
  EXPECT_TRUE((bias_correction(w, w, mean).array() == 0.0F).all());
}

TEST(BiasCorrection, RefusesBadInput) {
  const RowMajorMatrix w = normal(3, 4, 1);
  const Eigen::VectorXf mean = Eigen::VectorXf::Ones(4);
  EXPECT_THROW(bias_correction(w.topRows(2), w, mean), InvalidArgument);
  EXPECT_THROW(bias_correction(w, w, mean.head(3)), InvalidArgument);
  EXPECT_THROW(bias_correction(w, w, mean, mean.head(3)), InvalidArgument);
  RowMajorMatrix bad = w;
  bad(1, 2) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(bias_correction(bad, w, mean), InvalidArgument);
  EXPECT_THROW(bias_correction(w, bad, mean), InvalidArgument);
  Eigen::VectorXf nan = mean;
  nan[0] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(bias_correction(w, w, nan), InvalidArgument);
}

}  // namespace
