// AWQ against the paper's equations written out: every alpha and every clipped range, errors summed token by token.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "nibble/core/thread_pool.hpp"
#include "nibble/ptq/awq.hpp"
#include "nibble/ptq/gptq.hpp"
#include "nibble/ptq/hessian.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace
using Eigen::Index;

Scheme scheme_of(Format format, Symmetry symmetry, std::size_t group) {
  Scheme s;
  s.format = format;
  s.symmetry = symmetry;
  s.granularity = group == 0 ? Granularity::per_channel(0) : Granularity::per_group(group, 1);
  return s;
}

RowMajorMatrix normal(Index rows, Index cols, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> d;
  RowMajorMatrix m(rows, cols);
  for (float& v : m.reshaped()) v = d(random);
  return m;
}

/// K x T activations: correlated, of uneven channels, a few large.
Eigen::MatrixXf activations(Index inputs, Index tokens, unsigned seed) {
  Eigen::MatrixXf x = normal(inputs, inputs, seed) * normal(inputs, tokens, seed + 1) / 4.0F;
  std::mt19937 random(seed + 2);
  std::normal_distribution<float> d;
  for (Index k = 0; k < inputs; ++k) x.row(k) *= std::exp(d(random));
  for (Index k = 3; k < inputs; k += 17) x.row(k) *= 20.0F;
  return x;
}

Eigen::MatrixXf hessian_of(const Eigen::MatrixXf& x) {
  const Eigen::MatrixXd d = x.cast<double>();
  return (d * d.transpose() * (2.0 / static_cast<double>(x.cols()))).cast<float>();
}
Eigen::VectorXf mean_abs_of(const Eigen::MatrixXf& x) { return x.cwiseAbs().rowwise().mean(); }

/// 2 / T sum over tokens of |(wq - w) x|^2, in double, token by token.
double naive_error(const RowMajorMatrix& wq, const RowMajorMatrix& w, const Eigen::MatrixXf& x) {
  const Eigen::MatrixXd e = (wq.cast<double>() - w.cast<double>()) * x.cast<double>();
  return 2.0 / static_cast<double>(x.cols()) * e.squaredNorm();
}

RowMajorMatrix rounded_to(const Scheme& scheme, const RowMajorMatrix& w) {
  return DynamicQuantizer(scheme).fake_quantize(Eigen::MatrixXf(w));
}

/// s = mean|x|^alpha / (w^power + 1e-4), clamped and normalized, from the paper's text; powers of 0 leave w out.
Eigen::VectorXf naive_scales(const Eigen::VectorXf& x, const Eigen::VectorXd& w, double alpha, double power) {
  Eigen::VectorXd s(x.size());
  for (Index k = 0; k < s.size(); ++k) {
    s[k] = std::pow(static_cast<double>(x[k]), alpha);
    if (power > 0.0) s[k] /= std::pow(w[k], power) + 1e-4;
    if (s[k] < 1e-4) s[k] = 1e-4;
  }
  return (s / std::sqrt(s.maxCoeff() * s.minCoeff())).cast<float>();
}

// The library's error differs from the naive one by H's rounding to float (2^-24 of |e|^T |H| |e|) and the float products of
// K terms (K 2^-24 of the same); |e| |H| |e| is within K of e H e here: K^2 2^-24 = 4e-4 of it at K = 80.
constexpr double near = 1e-3;

TEST(Awq, OutputErrorIsTheTokensError) {
  const RowMajorMatrix w = normal(30, 80, 1);
  const Eigen::MatrixXf x = activations(80, 200, 2);
  const RowMajorMatrix q = rounded_to(scheme_of(Format::int4, Symmetry::asymmetric, 32), w);
  const double expected = naive_error(q, w, x);
  EXPECT_NEAR(output_error(q, w, hessian_of(x)), expected, near * expected);
  EXPECT_EQ(output_error(w, w, hessian_of(x)), 0.0);
  EXPECT_THROW(output_error(q, w.topRows(3), hessian_of(x)), InvalidArgument);
  EXPECT_THROW(output_error(q, w, hessian_of(x).topRows(3)), InvalidArgument);
  Eigen::MatrixXf h = hessian_of(x);
  h(3, 3) = -1.0F;
  EXPECT_THROW(output_error(q, w, h), InvalidArgument);
  h(3, 3) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(output_error(q, w, h), InvalidArgument);
}

TEST(Awq, ScalesAreThePapersSearch) {
  const Eigen::MatrixXf x = activations(80, 200, 2);
  const Eigen::VectorXf mean_abs = mean_abs_of(x);
  const RowMajorMatrix a = normal(30, 80, 1);
  const RowMajorMatrix b = normal(20, 80, 5) * 0.3F;
  for (const Scheme& scheme :
       {scheme_of(Format::int4, Symmetry::asymmetric, 32), scheme_of(Format::int4, Symmetry::symmetric, 0),
        scheme_of(Format::nf4, Symmetry::symmetric, 16), scheme_of(Format::int8, Symmetry::float_offset, 64)}) {
    const Index group = scheme.granularity.kind == Granularity::Kind::per_channel
                            ? 80
                            : static_cast<Index>(scheme.granularity.group_size);
    Eigen::VectorXd magnitudes = Eigen::VectorXd::Zero(80);
    for (const RowMajorMatrix* w : {&a, &b})
      for (Index r = 0; r < w->rows(); ++r)
        for (Index k = 0; k < 80; ++k) {
          double largest = 0.0;
          for (Index j = k / group * group; j < std::min<Index>(80, (k / group + 1) * group); ++j)
            largest = std::max(largest, static_cast<double>(std::fabs((*w)(r, j))));
          magnitudes[k] += static_cast<double>(std::fabs((*w)(r, k))) / (largest + 1e-6) / 50.0;
        }
    for (const int duo : {0, 1, 2}) {
      SCOPED_TRACE(duo);
      AwqOptions options;
      if (duo == 1) options.weight_powers = {};
      if (duo == 2) options.weight_powers = {0.0, 0.5};
      const AwqScales found = awq_scales(scheme, {&a, &b}, mean_abs, hessian_of(x), options);
      std::size_t next = 0;
      double least = std::numeric_limits<double>::infinity();
      for (int i = 0; i < 20; ++i) {
        const double alpha = i / 20.0;
        std::vector<double> powers = {0.0};
        if (duo == 1) powers = {1.0 - alpha};
        if (duo == 2) powers = {0.0, 0.5};
        for (const double power : powers) {
          const Eigen::VectorXf s = naive_scales(mean_abs, magnitudes, alpha, power);
          double loss = 0.0;
          for (const RowMajorMatrix* w : {&a, &b}) {
            RowMajorMatrix q = *w * s.asDiagonal();
            q = rounded_to(scheme, q);
            for (Index k = 0; k < 80; ++k) q.col(k) /= s[k];
            loss += naive_error(q, *w, x);
          }
          ASSERT_LT(next, found.losses.size());
          // Codes may flip where the scale's last bit (a norm of magnitudes summed in another order) differs.
          EXPECT_NEAR(found.losses[next], loss, (duo == 0 ? near : 1e-2) * loss) << alpha << " " << power;
          ++next;
          least = std::min(least, loss);
        }
      }
      EXPECT_EQ(next, found.losses.size());
      EXPECT_NEAR(found.loss, std::min(least, found.plain_loss), 1e-2 * least);
      EXPECT_LE(found.loss, found.plain_loss);
      const Eigen::VectorXf s = naive_scales(mean_abs, magnitudes, found.alpha, found.weight_power);
      if (found.loss < found.plain_loss) {
        EXPECT_LE((found.scales - s).cwiseAbs().maxCoeff(), 1e-5F * s.maxCoeff());
      }
    }
  }
}

TEST(Awq, OutlierChannelIsProtected) {
  Eigen::MatrixXf x = normal(64, 256, 1);
  x.row(11) *= 100.0F;
  const RowMajorMatrix w = normal(64, 64, 2);
  const Scheme scheme = scheme_of(Format::int4, Symmetry::asymmetric, 64);
  const AwqScales found = awq_scales(scheme, {&w}, mean_abs_of(x), hessian_of(x));
  EXPECT_GT(found.alpha, 0.2);
  EXPECT_LT(found.loss, 0.5 * found.plain_loss);
  Index largest = 0;
  found.scales.maxCoeff(&largest);
  EXPECT_EQ(largest, 11);
}

TEST(Awq, TiedScalesOfGroupedQueries) {
  const HeadLayout heads{4, 2, 16};
  const Eigen::MatrixXf x = activations(64, 200, 2);
  const RowMajorMatrix o = normal(30, 64, 1);
  AwqOptions options;
  options.heads = heads;
  const AwqScales found =
      awq_scales(scheme_of(Format::int4, Symmetry::asymmetric, 32), {&o}, mean_abs_of(x), hessian_of(x), options);
  ASSERT_EQ(found.kv_scales.size(), 32);
  EXPECT_EQ(found.scales, expand_to_queries(found.kv_scales, heads));
  EXPECT_GT(found.alpha, 0.0);
  const Eigen::VectorXf s = naive_scales(mean_over_queries(mean_abs_of(x), heads), {}, found.alpha, 0.0);
  EXPECT_LE((found.kv_scales - s).cwiseAbs().maxCoeff(), 1e-5F * s.maxCoeff());
  options.heads = {4, 2, 8};
  EXPECT_THROW(
      awq_scales(scheme_of(Format::int4, Symmetry::asymmetric, 32), {&o}, mean_abs_of(x), hessian_of(x), options),
      InvalidArgument);
}

TEST(Awq, OwnLossAndRounding) {
  const Eigen::MatrixXf x = activations(64, 200, 2);
  const RowMajorMatrix w = normal(30, 64, 1);
  const Scheme scheme = scheme_of(Format::int4, Symmetry::symmetric, 32);
  const Eigen::MatrixXf h = hessian_of(x);
  const AwqScales plain = awq_scales(scheme, {&w}, mean_abs_of(x), h);
  AwqOptions options;
  options.loss = [&](const std::vector<RowMajorMatrix>& effective) { return output_error(effective.at(0), w, h); };
  options.rounding = [&](std::size_t i, const RowMajorMatrix& scaled, const Eigen::VectorXf& scales) {
    EXPECT_EQ(i, 0U);
    EXPECT_LE((scaled - w * scales.asDiagonal()).norm(), 1e-6F * scaled.norm());
    return rounded_to(scheme, scaled);
  };
  const AwqScales same = awq_scales(scheme, {&w}, mean_abs_of(x), Eigen::MatrixXf(), options);
  EXPECT_EQ(plain.losses, same.losses);
  EXPECT_EQ(plain.scales, same.scales);
  // Clipping inside the search is the same as rounding to clipped ranges.
  options = {};
  options.clip = ClipOptions{};
  const AwqScales clipped = awq_scales(scheme, {&w}, mean_abs_of(x), h, options);
  EXPECT_LT(clipped.loss, plain.loss);
  options.clip.reset();
  options.rounding = [&](std::size_t, const RowMajorMatrix& scaled, const Eigen::VectorXf& scales) {
    const WeightGrids grids = awq_clip(scheme, scaled, unscale_hessian(h, scales));
    return grids.decode(grids.encode(scaled));
  };
  EXPECT_EQ(awq_scales(scheme, {&w}, mean_abs_of(x), h, options).losses, clipped.losses);
  options = {};
  // A loss that likes the largest alpha.
  double calls = 0.0;
  options.loss = [&](const std::vector<RowMajorMatrix>&) { return -(calls += 1.0); };
  EXPECT_EQ(awq_scales(scheme, {&w}, mean_abs_of(x), h, options).alpha, 0.95);
  options.loss = [](const std::vector<RowMajorMatrix>&) { return std::nan(""); };
  EXPECT_THROW(awq_scales(scheme, {&w}, mean_abs_of(x), h, options), InvalidArgument);
  options.rounding = [](std::size_t, const RowMajorMatrix&, const Eigen::VectorXf&) {
    return RowMajorMatrix(1, 1);
  };
  EXPECT_THROW(awq_scales(scheme, {&w}, mean_abs_of(x), h, options), InvalidArgument);
}

TEST(Awq, PlantedCases) {
  const Scheme scheme = scheme_of(Format::int4, Symmetry::asymmetric, 32);
  const RowMajorMatrix w = normal(8, 48, 1);
  // A dead channel, one token only: a Hessian of rank one.
  Eigen::MatrixXf x = normal(48, 1, 3);
  x(7, 0) = 0.0F;
  const AwqScales one = awq_scales(scheme, {&w}, mean_abs_of(x), hessian_of(x));
  EXPECT_TRUE(one.scales.allFinite());
  EXPECT_TRUE((one.scales.array() > 0.0F).all());
  EXPECT_LE(one.loss, one.plain_loss);
  EXPECT_LE(output_error(awq_clip(scheme, w, hessian_of(x)).decode(awq_clip(scheme, w, hessian_of(x)).encode(w)),
                         w, Eigen::MatrixXf::Identity(48, 48)),
            1e3);
  // No data at all: nothing to gain, plain ranges.
  const Eigen::MatrixXf zero = Eigen::MatrixXf::Zero(48, 48);
  const AwqScales none = awq_scales(scheme, {&w}, Eigen::VectorXf::Zero(48), zero);
  EXPECT_EQ(none.alpha, 0.0);
  EXPECT_TRUE((none.scales.array() == 1.0F).all());
  const WeightGrids plain = fit_min_max(scheme, w);
  EXPECT_EQ(awq_clip(scheme, w, zero).encode(w), plain.encode(w));
  // Constant weights, K = 1, no rows.
  const RowMajorMatrix constant = RowMajorMatrix::Constant(4, 48, 0.75F);
  const Eigen::MatrixXf h = hessian_of(activations(48, 90, 3));
  for (const ClipLoss loss : {ClipLoss::diagonal, ClipLoss::group, ClipLoss::row}) {
    ClipOptions options;
    options.loss = loss;
    const WeightGrids grids = awq_clip(scheme, constant, h, options);
    EXPECT_LE((grids.decode(grids.encode(constant)) - constant).cwiseAbs().maxCoeff(), 1e-6F);
  }
  const RowMajorMatrix narrow = normal(5, 1, 9);
  EXPECT_EQ(awq_scales(scheme, {&narrow}, Eigen::VectorXf::Ones(1), Eigen::MatrixXf::Ones(1, 1)).scales[0], 1.0F);
  const WeightGrids grids = awq_clip(scheme, narrow, Eigen::MatrixXf::Ones(1, 1));
  EXPECT_LE((grids.decode(grids.encode(narrow)) - narrow).cwiseAbs().maxCoeff(), 1e-6F);
  EXPECT_EQ(awq_clip(scheme, RowMajorMatrix(0, 48), h).rows(), 0);
}

/// What a range costs, from the tokens: the group's part of the output.
TEST(AwqClip, IsTheBestOfAllThatAreTried) {
  const Index inputs = 80;
  const Eigen::MatrixXf x = activations(inputs, 150, 4);
  const Eigen::MatrixXf h = hessian_of(x);
  const RowMajorMatrix w = normal(9, inputs, 7);
  for (const Scheme& scheme :
       {scheme_of(Format::int4, Symmetry::asymmetric, 32), scheme_of(Format::int4, Symmetry::symmetric, 32),
        scheme_of(Format::nf4, Symmetry::symmetric, 32), scheme_of(Format::int4, Symmetry::float_offset, 0)})
    for (const ClipLoss loss : {ClipLoss::diagonal, ClipLoss::group})
      for (const ClipEnds ends :
           {ClipEnds::magnitude, ClipEnds::together, ClipEnds::either, ClipEnds::separately}) {
        SCOPED_TRACE(static_cast<int>(loss) * 10 + static_cast<int>(ends));
        ClipOptions options;
        options.loss = loss;
        options.ends = ends;
        const WeightGrids found = awq_clip(scheme, w, h, options);
        WeightGrids tried = found;
        for (Index r = 0; r < w.rows(); ++r)
          for (Index g = 0; g < found.groups(); ++g) {
            const auto [begin, end] = found.inputs_of(g);
            const Index first = begin;
            const Index n = end - begin;
            const auto cost = [&](const WeightGrids& grids) {
              Eigen::RowVectorXd e(n);
              for (Index k = 0; k < n; ++k)
                e[k] = static_cast<double>(
                    grids.decode(r, first + k, grids.encode(r, first + k, w(r, first + k))) - w(r, first + k));
              if (loss == ClipLoss::group)
                return 2.0 / 150.0 * (e * x.middleRows(first, n).cast<double>()).squaredNorm();
              double sum = 0.0;
              for (Index k = 0; k < n; ++k) sum += e[k] * e[k] * static_cast<double>(h(first + k, first + k));
              return sum;
            };
            const float lo = w.row(r).segment(first, n).minCoeff();
            const float hi = w.row(r).segment(first, n).maxCoeff();
            double least = std::numeric_limits<double>::infinity();
            for (int i = 0; i < 10; ++i)
              for (int j = 0; j < 10; ++j) {
                if (ends == ClipEnds::either && i != 0 && j != 0 && j != i) continue;
                if (ends < ClipEnds::either && j != i) continue;
                const auto p = static_cast<float>(1.0 - i / 20.0);
                const auto q = static_cast<float>(1.0 - j / 20.0);
                Range range{lo * p, hi * q};
                if (ends == ClipEnds::magnitude) {
                  const float m = std::max(-lo, hi) * p;
                  range = {std::max(lo, -m), std::min(hi, m)};
                }
                tried.set(r, g, range);
                least = std::min(least, cost(tried));
              }
            EXPECT_NEAR(cost(found), least, near * least);
          }
      }
}

TEST(AwqClip, WholeRowsCountTheOtherGroups) {
  const Index inputs = 128;
  // Activations with a large common part: errors of different groups add up or cancel.
  Eigen::MatrixXf x = normal(inputs, 300, 1);
  x.array() += 1.0F;
  const Eigen::MatrixXf h = hessian_of(x);
  const RowMajorMatrix w = normal(40, inputs, 3);
  const Scheme scheme = scheme_of(Format::int4, Symmetry::asymmetric, 32);
  ClipOptions options;
  options.ends = ClipEnds::together;
  const auto error = [&](const WeightGrids& grids) { return naive_error(grids.decode(grids.encode(w)), w, x); };
  const double plain = error(fit_min_max(scheme, w));
  const double group = error(awq_clip(scheme, w, h, options));
  options.loss = ClipLoss::row;
  options.passes = 1;
  const double once = error(awq_clip(scheme, w, h, options));
  options.passes = 4;
  const double often = error(awq_clip(scheme, w, h, options));
  EXPECT_LT(group, plain);
  EXPECT_LT(once, 0.95 * group);
  EXPECT_LE(often, once * (1.0 + near));
  // No single group's range among those tried does better: a fixed point, reached or nearly so.
  options.passes = 30;
  const WeightGrids settled = awq_clip(scheme, w, h, options);
  const double end = error(settled);
  for (const Index r : {0, 17})
    for (Index g = 0; g < settled.groups(); ++g)
      for (int i = 0; i < 10; ++i) {
        WeightGrids other = settled;
        const auto p = static_cast<float>(1.0 - i / 20.0);
        other.set(r, g,
                  Range{w.row(r).segment(32 * g, 32).minCoeff() * p, w.row(r).segment(32 * g, 32).maxCoeff() * p});
        EXPECT_GE(error(other), end * (1.0 - 1e-5));
      }
}

// Scales and ranges from here, codes from GPTQ.
TEST(Awq, ComposesWithGptq) {
  const Eigen::MatrixXf x = activations(96, 400, 2);
  const RowMajorMatrix w = normal(40, 96, 1);
  const Scheme scheme = scheme_of(Format::int4, Symmetry::asymmetric, 32);
  const AwqScales found = awq_scales(scheme, {&w}, mean_abs_of(x), hessian_of(x));
  RowMajorMatrix scaled = w;
  scale_inputs(scaled, found.scales);
  Eigen::MatrixXf inputs = x;
  unscale_outputs(inputs, found.scales);
  Hessian hessian(96);
  hessian.add(inputs);
  const Eigen::MatrixXf h = hessian.matrix();
  const WeightGrids grids = awq_clip(scheme, scaled, h);
  GptqOptions options;
  options.fit_grids = [&](const RowMajorMatrix& target) {
    EXPECT_EQ(target, scaled);
    return grids;
  };
  const QuantizedTensor q = gptq(scaled, hessian, scheme, options).weights;
  const WeightGrids kept = WeightGrids::of(q);
  for (Index r = 0; r < 40; ++r)
    for (Index g = 0; g < 3; ++g) {
      EXPECT_EQ(kept.at(r, g).scale, grids.at(r, g).scale);
      EXPECT_EQ(kept.at(r, g).zero, grids.at(r, g).zero);
    }
  EXPECT_LT(output_error(dequantize(q), scaled, h), output_error(grids.decode(grids.encode(scaled)), scaled, h));
  options.fit_grids = [&](const RowMajorMatrix&) { return WeightGrids(scheme, 40, 64); };
  EXPECT_THROW(gptq(scaled, hessian, scheme, options), InvalidArgument);
  options.static_groups = false;
  EXPECT_THROW(gptq(scaled, hessian, scheme, options), InvalidArgument);
}

TEST(Awq, ThreadsChangeNothing) {
  ThreadPool pool(3);
  const Eigen::MatrixXf x = activations(96, 200, 2);
  const Eigen::MatrixXf h = hessian_of(x);
  const RowMajorMatrix w = normal(150, 96, 1);
  const Scheme scheme = scheme_of(Format::int4, Symmetry::asymmetric, 32);
  AwqOptions options;
  const AwqScales alone = awq_scales(scheme, {&w}, mean_abs_of(x), h, options);
  options.pool = &pool;
  const AwqScales threads = awq_scales(scheme, {&w}, mean_abs_of(x), h, options);
  EXPECT_EQ(alone.losses, threads.losses);
  EXPECT_EQ(alone.scales, threads.scales);
  for (const ClipLoss loss : {ClipLoss::diagonal, ClipLoss::group, ClipLoss::row}) {
    ClipOptions clip;
    clip.loss = loss;
    const WeightGrids a = awq_clip(scheme, w, h, clip);
    clip.pool = &pool;
    const WeightGrids b = awq_clip(scheme, w, h, clip);
    EXPECT_EQ(a.encode(w), b.encode(w));
    EXPECT_EQ(a.decode(a.encode(w)), b.decode(b.encode(w)));
  }
}

TEST(Awq, RefusesBadInput) {
  const Scheme scheme = scheme_of(Format::int4, Symmetry::asymmetric, 32);
  const RowMajorMatrix w = normal(8, 64, 1);
  const RowMajorMatrix other = normal(8, 32, 1);
  const Eigen::MatrixXf h = Eigen::MatrixXf::Identity(64, 64);
  const Eigen::VectorXf ones = Eigen::VectorXf::Ones(64);
  EXPECT_THROW(awq_scales(scheme, {}, ones, h), InvalidArgument);
  EXPECT_THROW(awq_scales(scheme, {nullptr}, ones, h), InvalidArgument);
  EXPECT_THROW(awq_scales(scheme, {&w, &other}, ones, h), InvalidArgument);
  EXPECT_THROW(awq_scales(scheme, {&w}, ones.head(63), h), InvalidArgument);
  EXPECT_THROW(awq_scales(scheme, {&w}, -ones, h), InvalidArgument);
  EXPECT_THROW(awq_scales(scheme, {&w}, ones, h.leftCols(63)), InvalidArgument);
  Scheme wrong = scheme;
  wrong.granularity = Granularity::per_tensor();
  EXPECT_THROW(awq_scales(wrong, {&w}, ones, h), InvalidArgument);
  EXPECT_THROW(awq_clip(wrong, w, h), InvalidArgument);
  wrong.format = Format::fp16;
  EXPECT_THROW(awq_scales(wrong, {&w}, ones, h), InvalidArgument);
  AwqOptions options;
  options.grid = 0;
  EXPECT_THROW(awq_scales(scheme, {&w}, ones, h, options), InvalidArgument);
  options = {};
  options.weight_powers = {2.0};
  EXPECT_THROW(awq_scales(scheme, {&w}, ones, h, options), InvalidArgument);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Eigen::VectorXf mean = ones;
    mean[5] = bad;
    EXPECT_THROW(awq_scales(scheme, {&w}, mean, h), InvalidArgument);
    Eigen::MatrixXf hessian = h;
    hessian(3, 5) = bad;
    EXPECT_THROW(awq_scales(scheme, {&w}, ones, hessian), InvalidArgument);
    EXPECT_THROW(awq_clip(scheme, w, hessian), InvalidArgument);
    RowMajorMatrix weights = w;
    weights(7, 63) = bad;
    ThreadPool pool(2);
    options = {};
    options.pool = &pool;
    EXPECT_THROW(awq_scales(scheme, {&weights}, ones, h, options), InvalidArgument);
    ClipOptions clip;
    clip.pool = &pool;
    EXPECT_THROW(awq_clip(scheme, weights, h, clip), InvalidArgument);
  }
  ClipOptions clip;
  clip.grid = 0;
  EXPECT_THROW(awq_clip(scheme, w, h, clip), InvalidArgument);
  clip = {};
  clip.max_shrink = 1.5;
  EXPECT_THROW(awq_clip(scheme, w, h, clip), InvalidArgument);
  clip = {};
  clip.passes = 0;
  EXPECT_THROW(awq_clip(scheme, w, h, clip), InvalidArgument);
  EXPECT_THROW(awq_clip(scheme, w, h.topRows(3)), InvalidArgument);
}

}  // namespace
