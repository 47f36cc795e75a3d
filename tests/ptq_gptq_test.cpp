// GPTQ against the optimal brain quantizer it comes from: one input at a time, with the explicit inverse of what remains
// of the Hessian, in double.
#include <gtest/gtest.h>

#include <Eigen/LU>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "nibble/ptq/gptq.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace

Eigen::MatrixXf correlated(Eigen::Index k, Eigen::Index tokens, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Eigen::MatrixXf x(k, tokens);
  for (Eigen::Index i = 0; i < x.size(); ++i) x.data()[i] = normal(random);
  for (Eigen::Index i = 1; i < k; ++i) x.row(i) = 0.8F * x.row(i - 1) + 0.6F * x.row(i);
  for (Eigen::Index i = 0; i < k; ++i) x.row(i) *= 0.5F + static_cast<float>(i * 7 % 11) * 0.25F;
  return x;
}
RowMajorMatrix random_weights(Eigen::Index n, Eigen::Index k, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, 0.5F);
  RowMajorMatrix w(n, k);
  for (Eigen::Index i = 0; i < w.size(); ++i) w.data()[i] = normal(random);
  return w;
}
Hessian hessian_of(const Eigen::MatrixXf& x) {
  Hessian h(x.rows());
  h.add(x);
  return h;
}

std::vector<Scheme> schemes(std::size_t group) {
  std::vector<Scheme> all;
  for (const Format f : {Format::int8, Format::int6, Format::int5, Format::int4, Format::int3, Format::int2,
                         Format::nf4, Format::fp4})
    for (const Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
      if (has_scales(f) && (is_integer(f) || s == Symmetry::symmetric))
        all.push_back({f, s, group == 0 ? Granularity::per_channel(0) : Granularity::per_group(group, 1),
                       group == 16 ? ScaleType::fp16 : ScaleType::fp32, false});
  return all;
}
std::string text_of(const Scheme& s) {
  return std::string(name_of(s.format)) + " " + std::string(name_of(s.symmetry)) + " " +
         std::to_string(s.granularity.group_size);
}

double quadratic(const Eigen::MatrixXd& e, const Eigen::MatrixXd& h) { return (e * h * e.transpose()).trace(); }

struct Naive {
  Eigen::MatrixXd h;  // undamped
  double damp = 0.0;  // absolute
  std::vector<Eigen::Index> order;
};
Naive naive_setup(const Hessian& hessian, const GptqOptions& options) {
  Naive n;
  n.h = hessian.matrix().cast<double>();
  const Eigen::Index k = n.h.rows();
  for (Eigen::Index i = 0; i < k; ++i)
    if (n.h(i, i) == 0.0)
      n.h(i, i) = n.h.diagonal().sum() / static_cast<double>((n.h.diagonal().array() != 0.0).count());
  n.damp = options.damp * n.h.diagonal().mean();
  for (Eigen::Index i = 0; i < k; ++i) n.order.push_back(i);
  if (options.act_order)
    std::stable_sort(n.order.begin(), n.order.end(),
                     [&](Eigen::Index a, Eigen::Index b) { return n.h(a, a) > n.h(b, b); });
  return n;
}

/// Follows the sweep in double, equation (2) and (3) of the paper: w_F -= (w_i - q_i) / [H_F^-1]_ii [H_F^-1]_{:, i}. Every
/// code and grid of the result must be what the definition gives, up to rounding errors: the weights that they are made
/// from may differ by `slack` of a step, so a code may be the next one only where the weight lies that close to the
/// midpoint. The walk goes on with the result's codes, so that one near tie does not hide what follows.
void follow(const RowMajorMatrix& w, const Hessian& hessian, const GptqResult& result, const GptqOptions& options,
            double slack) {
  const Naive setup = naive_setup(hessian, options);
  const Eigen::Index k = w.cols();
  const WeightGrids grids = WeightGrids::of(result.weights);
  const CodeMatrix codes = codes_of(result.weights);
  Eigen::MatrixXd damped = setup.h;
  damped.diagonal().array() += setup.damp;
  Eigen::MatrixXd rest(w.rows(), k);  // in the order of the sweep
  Eigen::MatrixXd h(k, k);
  for (Eigen::Index j = 0; j < k; ++j) {
    rest.col(j) = w.col(setup.order[static_cast<std::size_t>(j)]).cast<double>();
    for (Eigen::Index i = 0; i < k; ++i)
      h(i, j) = damped(setup.order[static_cast<std::size_t>(i)], setup.order[static_cast<std::size_t>(j)]);
  }
  Eigen::MatrixXd error(w.rows(), k);  // in the inputs' order
  for (Eigen::Index i = 0; i < k; ++i) {
    const Eigen::Index input = setup.order[static_cast<std::size_t>(i)];
    const Eigen::Index column = options.static_groups ? input : i;
    const Eigen::MatrixXd inverse = h.bottomRightCorner(k - i, k - i).inverse();
    for (Eigen::Index r = 0; r < w.rows(); ++r) {
      if (!options.static_groups && i % grids.group_size() == 0) {
        const Eigen::Index group = grids.group_of(i);
        const Eigen::Index count = grids.inputs_of(group).second - i;
        const Eigen::VectorXf now = rest.row(r).segment(i, count).transpose().cast<float>();
        const Grid expected = grids.fit({now.minCoeff(), now.maxCoeff()});
        const Grid actual = grids.at(r, group);
        ASSERT_NEAR(actual.scale, expected.scale, std::fabs(expected.scale) * 1e-3F);
        ASSERT_LE(std::abs(actual.zero - expected.zero), 1);
        ASSERT_NEAR(actual.offset, expected.offset,
                    0.01F * std::fabs(expected.scale) + 1e-3F * std::fabs(expected.offset));
      }
      const double now = rest(r, i);
      const Grid g = grids.at(r, grids.group_of(column));
      const double q = static_cast<double>(grids.decode(g, codes(r, column)));
      double best = std::numeric_limits<double>::infinity();
      for (int code = grids.min_code(); code <= grids.max_code(); ++code)
        best = std::min(best, std::fabs(static_cast<double>(grids.decode(g, code)) - now));
      ASSERT_LE(std::fabs(q - now), best + slack * std::fabs(static_cast<double>(g.scale)))
          << "row " << r << ", step " << i;
      error(r, input) = static_cast<double>(w(r, input)) - q;
      const double err = (now - q) / inverse(0, 0);
      rest.row(r).tail(k - i) -= err * inverse.row(0);
    }
  }
  Eigen::MatrixXd undamped = setup.h;
  for (Eigen::Index i = 0; i < k; ++i)
    if (hessian.matrix()(i, i) == 0.0F) undamped(i, i) = 0.0;
  const double expected = quadratic(error, undamped);
  // A sum of squares of floats, and the damping's share taken off: 1e-3 is far above their rounding.
  EXPECT_NEAR(result.error, expected, 1e-3 * expected + 1e-3 * setup.damp * error.squaredNorm());
}

// Weights after up to 80 updates of float, with U exact to cond(H) K u = about 2000 * 80 * 6e-8: 1 %; steps of one
// follow from an error of one before.
constexpr double step_slack = 0.02;

TEST(PtqGptq, FollowsTheOptimalBrainQuantizer) {
  int checked = 0;
  for (const Eigen::Index k : {1, 40, 80}) {
    const RowMajorMatrix w = random_weights(5, k, 3);
    const Hessian h = hessian_of(correlated(k, 4 * k + 5, 4));
    for (const std::size_t group : {std::size_t{0}, std::size_t{16}, std::size_t{32}})
      for (const Scheme& scheme : schemes(group))
        for (const bool act_order : {false, true})
          for (const bool static_groups : {false, true}) {
            SCOPED_TRACE(text_of(scheme) + " K " + std::to_string(k) + (act_order ? " act-order" : "") +
                         (static_groups ? " static" : ""));
            GptqOptions options;
            options.act_order = act_order;
            options.static_groups = static_groups;
            options.block = 24;  // groups start inside blocks, and blocks inside groups
            const GptqResult result = gptq(w, h, scheme, options);
            EXPECT_FALSE(result.fell_back_to_rtn);
            EXPECT_EQ(result.report, "");
            EXPECT_EQ(result.permutation.empty(), static_groups || !act_order);
            ASSERT_NO_FATAL_FAILURE(follow(w, h, result, options, step_slack));
            ++checked;
          }
  }
  EXPECT_EQ(checked, 3 * 3 * 20 * 4);
}

TEST(PtqGptq, BlocksChangeRoundingErrorsAlone) {
  const Eigen::Index k = 200;
  const RowMajorMatrix w = random_weights(60, k, 5);
  const Hessian h = hessian_of(correlated(k, 900, 6));
  for (const bool static_groups : {false, true})
    for (const std::size_t group : {std::size_t{16}, std::size_t{32}, std::size_t{48}, std::size_t{128}}) {
      const Scheme scheme{Format::int4, Symmetry::asymmetric, Granularity::per_group(group, 1), ScaleType::fp32,
                          false};
      GptqOptions options;
      options.static_groups = static_groups;
      options.block = 1;
      const GptqResult one = gptq(w, h, scheme, options);
      const CodeMatrix codes = codes_of(one.weights);
      for (const Eigen::Index block : {7, 64, 128, 1024}) {
        options.block = block;
        const GptqResult other = gptq(w, h, scheme, options);
        // A weight near a tie may go the other way and take what follows in its row with it.
        const auto different = (codes_of(other.weights).array() != codes.array()).count();
        EXPECT_LE(different, codes.size() / 50) << block;
        EXPECT_NEAR(other.error, one.error, 0.01 * one.error);
      }
    }
}

TEST(PtqGptq, LongGroupsAndManyInputs) {
  // More inputs than a superblock has, groups that end inside one.
  const Eigen::Index k = 1100;
  const RowMajorMatrix w = random_weights(3, k, 8);
  const Hessian h = hessian_of(correlated(k, 1500, 9));
  for (const std::size_t group : {std::size_t{16}, std::size_t{192}, std::size_t{1056}})
    for (const bool static_groups : {false, true}) {
      if (static_groups && group == 1056) continue;  // each costs two factorizations
      const Scheme scheme{Format::int4, Symmetry::asymmetric, Granularity::per_group(group, 1), ScaleType::fp32,
                          false};
      GptqOptions options;
      options.static_groups = static_groups;
      options.block = 1;
      const GptqResult one = gptq(w, h, scheme, options);
      options.block = 128;
      const GptqResult lazy = gptq(w, h, scheme, options);
      EXPECT_NEAR(lazy.error, one.error, 0.01 * one.error);
      const auto different = (codes_of(lazy.weights).array() != codes_of(one.weights).array()).count();
      EXPECT_LE(different, w.size() / 20);
      const WeightGrids a = WeightGrids::of(one.weights);
      const WeightGrids b = WeightGrids::of(lazy.weights);
      // Grids that are fitted on the way see the same weights up to rounding (or the near tie above).
      double apart = 0.0;
      for (Eigen::Index r = 0; r < 3; ++r)
        for (Eigen::Index g = 0; g < a.groups(); ++g)
          apart += std::fabs(static_cast<double>(a.at(r, g).scale / b.at(r, g).scale) - 1.0);
      EXPECT_LE(apart / static_cast<double>(3 * a.groups()), 0.01);
    }
}

TEST(PtqGptq, IsBetterThanRoundingToNearestInEveryFormat) {
  const Eigen::Index k = 160;
  const RowMajorMatrix w = random_weights(40, k, 11);
  const Hessian h = hessian_of(correlated(k, 1200, 12));
  const Eigen::MatrixXd exact = h.matrix().cast<double>();
  for (const std::size_t group : {std::size_t{0}, std::size_t{64}})
    for (const Scheme& scheme : schemes(group)) {
      SCOPED_TRACE(text_of(scheme));
      const QuantizedTensor nearest = DynamicQuantizer(scheme).quantize(w);
      const double rtn = quadratic((w - dequantize(nearest)).cast<double>(), exact);
      for (const GridFit fit : {GridFit::min_max, GridFit::mse, GridFit::weighted_mse})
        for (const bool static_groups : {false, true}) {
          GptqOptions options;
          options.grid_fit = fit;
          options.static_groups = static_groups;
          const GptqResult result = gptq(w, h, scheme, options);
          Eigen::MatrixXf back = dequantize(result.weights);
          if (!result.permutation.empty()) {
            const Eigen::MatrixXf permuted = back;
            for (std::size_t j = 0; j < result.permutation.size(); ++j)
              back.col(result.permutation[j]) = permuted.col(static_cast<Eigen::Index>(j));
          }
          const double error = quadratic((w - back).cast<double>(), exact);
          EXPECT_LT(error, 0.75 * rtn);
          EXPECT_NEAR(result.error, error, 1e-3 * error);
        }
    }
}

void expect_same(const GptqResult& a, const GptqResult& b) {
  const auto same = [](const Buffer& x, const Buffer& y) {
    return x.size() == y.size() && (x.empty() || std::memcmp(x.data(), y.data(), x.size()) == 0);
  };
  EXPECT_TRUE(same(a.weights.codes(), b.weights.codes()));
  EXPECT_TRUE(same(a.weights.scales(), b.weights.scales()));
  EXPECT_TRUE(same(a.weights.zeros(), b.weights.zeros()));
  EXPECT_EQ(a.permutation, b.permutation);
  EXPECT_EQ(a.error, b.error);
  EXPECT_EQ(a.report, b.report);
}

TEST(PtqGptq, ThreadsChangeNothing) {
  const RowMajorMatrix w = random_weights(300, 180, 13);
  const Eigen::MatrixXf x = correlated(180, 700, 14);
  const Eigen::MatrixXf y = x + 0.05F * correlated(180, 700, 15);
  ThreadPool two(2);
  ThreadPool five(5);
  for (const bool static_groups : {false, true})
    for (const GridFit fit : {GridFit::min_max, GridFit::weighted_mse}) {
      const Scheme scheme{Format::int4, Symmetry::asymmetric, Granularity::per_group(32, 1), ScaleType::fp16,
                          false};
      Hessian h(180);
      h.add(x, y);
      GptqOptions options;
      options.static_groups = static_groups;
      options.grid_fit = fit;
      const GptqResult alone = gptq(w, h, scheme, options);
      for (ThreadPool* pool : {&two, &five}) {
        Hessian threaded(180, pool);
        threaded.add(x, y);
        options.pool = pool;
        expect_same(gptq(w, threaded, scheme, options), alone);
      }
      // Rows do not know of each other, and neither does the order of the matrix in memory matter.
      options.pool = nullptr;
      const GptqResult some = gptq(w.middleRows(131, 7), h, scheme, options);
      EXPECT_EQ(codes_of(some.weights), CodeMatrix(codes_of(alone.weights).middleRows(131, 7)));
      expect_same(gptq(Eigen::MatrixXf(w), h, scheme, options), alone);
    }
}

TEST(PtqGptq, TwoStreamsAimAtTheFloatOutputs) {
  const Eigen::Index k = 48;
  const RowMajorMatrix w = random_weights(10, k, 16);
  const Eigen::MatrixXf x = correlated(k, 600, 17);
  const Eigen::MatrixXf y = x + 0.2F * correlated(k, 600, 18);
  Hessian h(k);
  h.add(x, y);
  // At 8 bits rounding is nothing, and what is left is the target: W + s W D (H + damp)^-1, in double.
  const Scheme fine{Format::int8, Symmetry::asymmetric, Granularity::per_channel(0), ScaleType::fp32, false};
  const Eigen::MatrixXd wide = y.cast<double>();
  const double scale = 2.0 / 600.0;
  Eigen::MatrixXd damped = wide * wide.transpose() * scale;
  damped.diagonal().array() += 0.01 * damped.diagonal().mean();
  const Eigen::MatrixXd d = (x.cast<double>() - wide) * wide.transpose() * scale;
  for (const double strength : {0.0, 0.5, 1.0}) {
    GptqOptions options;
    options.correction = strength;
    const GptqResult result = gptq(w, h, fine, options);
    const Eigen::MatrixXd target = w.cast<double>() + strength * w.cast<double>() * d * damped.inverse();
    const Eigen::MatrixXd e = dequantize(result.weights).cast<double>() - target;
    const double expected = quadratic(e, wide * wide.transpose() * scale);
    EXPECT_NEAR(result.error, expected, 0.01 * expected);
  }
  // At 4 bits the outputs come closer to W X than without.
  const Scheme scheme{Format::int4, Symmetry::asymmetric, Granularity::per_group(16, 1), ScaleType::fp32, false};
  const auto output_error = [&](double strength) {
    GptqOptions options;
    options.correction = strength;
    const Eigen::MatrixXd q = dequantize(gptq(w, h, scheme, options).weights).cast<double>();
    return (q * wide - w.cast<double>() * x.cast<double>()).squaredNorm();
  };
  EXPECT_LT(output_error(1.0), 0.9 * output_error(0.0));
  EXPECT_LT(output_error(1.0), output_error(0.5));
  // The same stream twice corrects nothing.
  Hessian twice(k);
  twice.add(x, x);
  EXPECT_EQ(codes_of(gptq(w, twice, scheme).weights), codes_of(gptq(w, hessian_of(x), scheme).weights));
}

TEST(PtqGptq, PlantedCases) {
  const Scheme scheme{Format::int4, Symmetry::asymmetric, Granularity::per_group(16, 1), ScaleType::fp32, false};
  const Eigen::Index k = 64;
  const RowMajorMatrix w = random_weights(6, k, 21);
  const auto finite = [](const GptqResult& r) { return dequantize(r.weights).allFinite(); };
  for (const bool static_groups : {false, true}) {
    GptqOptions options;
    options.static_groups = static_groups;
    // An outlier input.
    Eigen::MatrixXf x = correlated(k, 300, 22);
    x.row(9) *= 1000.0F;
    Hessian h = hessian_of(x);
    GptqResult result = gptq(w, h, scheme, options);
    EXPECT_FALSE(result.fell_back_to_rtn);
    EXPECT_TRUE(finite(result));
    ASSERT_NO_FATAL_FAILURE(follow(w, h, result, options, step_slack));
    // Dead inputs lose their weights and count for nothing.
    x = correlated(k, 300, 23);
    x.row(5).setZero();
    x.row(40).setZero();
    RowMajorMatrix dead_weights = w;
    dead_weights.col(5).setConstant(1e6F);
    h = hessian_of(x);
    result = gptq(dead_weights, h, scheme, options);
    EXPECT_EQ(result.dead_inputs, 2);
    EXPECT_FALSE(result.fell_back_to_rtn);
    RowMajorMatrix cleared = w;
    cleared.col(5).setZero();
    cleared.col(40).setZero();
    ASSERT_NO_FATAL_FAILURE(follow(cleared, h, result, options, step_slack));
    // One token: a Hessian of rank one, which the damping carries.
    h = hessian_of(correlated(k, 1, 24));
    result = gptq(w, h, scheme, options);
    EXPECT_FALSE(result.fell_back_to_rtn);
    EXPECT_TRUE(finite(result));
    // All weights equal, all zero, one output, one input.
    h = hessian_of(correlated(k, 300, 25));
    EXPECT_TRUE(finite(gptq(RowMajorMatrix::Constant(3, k, 0.3F), h, scheme, options)));
    EXPECT_EQ(dequantize(gptq(RowMajorMatrix::Zero(3, k), h, scheme, options).weights).norm(), 0.0F);
    EXPECT_TRUE(finite(gptq(w.topRows(1), h, scheme, options)));
    EXPECT_TRUE(finite(gptq(w.leftCols(1), hessian_of(correlated(1, 1, 26)), scheme, options)));
    EXPECT_EQ(gptq(RowMajorMatrix(0, k), h, scheme, options).weights.size(), 0U);
    // Nothing but dead inputs.
    result = gptq(w, hessian_of(Eigen::MatrixXf::Zero(k, 4)), scheme, options);
    EXPECT_EQ(result.dead_inputs, k);
    EXPECT_EQ(result.error, 0.0);
    EXPECT_EQ(dequantize(result.weights).norm(), 0.0F);
    // Tiny and huge inputs are a matter of scale: powers of two change no code.
    x = correlated(k, 300, 27);
    const GptqResult plain = gptq(w, hessian_of(x), scheme, options);
    for (const float factor : {0x1p-50F, 0x1p50F}) {
      const GptqResult scaled = gptq(w, hessian_of(x * factor), scheme, options);
      EXPECT_EQ(codes_of(scaled.weights), codes_of(plain.weights));
      EXPECT_EQ(scaled.error, plain.error * static_cast<double>(factor) * static_cast<double>(factor));
    }
  }
}

TEST(PtqGptq, AFailingFactorisationIsAnswered) {
  const Scheme scheme{Format::int4, Symmetry::asymmetric, Granularity::per_group(16, 1), ScaleType::fp32, false};
  const Eigen::Index k = 64;
  const RowMajorMatrix w = random_weights(6, k, 31);
  // Singular without damping: more of it helps.
  const Hessian singular = hessian_of(correlated(k, 20, 32));
  GptqOptions options;
  options.damp = 0.0;
  GptqResult result = gptq(w, singular, scheme, options);
  EXPECT_FALSE(result.fell_back_to_rtn);
  EXPECT_GE(result.damp, 0.001);
  EXPECT_NE(result.report.find("raised"), std::string::npos) << result.report;
  EXPECT_TRUE(dequantize(result.weights).allFinite());
  // No more allowed: rounded to nearest, and said so.
  options.max_damp = 0.0;
  result = gptq(w, singular, scheme, options);
  EXPECT_TRUE(result.fell_back_to_rtn);
  EXPECT_NE(result.report.find("rounded to nearest"), std::string::npos);
  EXPECT_EQ(codes_of(result.weights), codes_of(DynamicQuantizer(scheme).quantize(w)));
  const double expected =
      quadratic((w - dequantize(result.weights)).cast<double>(), singular.matrix().cast<double>());
  EXPECT_NEAR(result.error, expected, 1e-4 * expected);
  // Activations whose squares no float holds.
  Eigen::MatrixXf huge = correlated(k, 100, 33);
  huge.row(3) *= 1e25F;
  result = gptq(w, hessian_of(huge), scheme, {});
  EXPECT_TRUE(result.fell_back_to_rtn);
  EXPECT_NE(result.report.find("not finite"), std::string::npos);
  EXPECT_TRUE(dequantize(result.weights).allFinite());
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

TEST(PtqGptq, BadInputs) {
  const Scheme scheme{Format::int4, Symmetry::asymmetric, Granularity::per_group(16, 1), ScaleType::fp32, false};
  RowMajorMatrix w = random_weights(6, 64, 41);
  const Hessian h = hessian_of(correlated(64, 100, 42));
  EXPECT_NE(message_of([&] { gptq(w.leftCols(63), h, scheme); }).find("6 x 63"), std::string::npos);
  EXPECT_NE(message_of([&] { gptq(w, Hessian(64), scheme); }).find("no token"), std::string::npos);
  EXPECT_FALSE(message_of([&] {
                 gptq(w, h, {Format::fp16, Symmetry::symmetric, {}, ScaleType::fp32, false});
               }).empty());
  const auto refused = [&](auto change) {
    GptqOptions options;
    change(options);
    return !message_of([&] { gptq(w, h, scheme, options); }).empty();
  };
  EXPECT_TRUE(refused([](GptqOptions& o) { o.damp = -0.1; }));
  EXPECT_TRUE(refused([](GptqOptions& o) { o.damp = std::nan(""); }));
  EXPECT_TRUE(refused([](GptqOptions& o) { o.max_damp = 0.001; }));
  EXPECT_TRUE(refused([](GptqOptions& o) { o.correction = 1.5; }));
  EXPECT_TRUE(refused([](GptqOptions& o) { o.block = 0; }));
  EXPECT_TRUE(refused([](GptqOptions& o) { o.mse.grid = 0; }));
  w(4, 33) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(message_of([&] { gptq(w, h, scheme); }).find("(4, 33)"), std::string::npos);
}

}  // namespace
