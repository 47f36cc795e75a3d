// AutoRound against its equations in double, on planted matrices, and on a network of two layers.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "nibble/gemm/dense.hpp"
#include "nibble/ptq/autoround.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace {

using namespace nibble;
using Matrix = Eigen::MatrixXf;

RowMajorMatrix random_matrix(unsigned seed, Eigen::Index rows, Eigen::Index cols, float size = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, size);
  RowMajorMatrix m(rows, cols);
  for (Eigen::Index i = 0; i < m.size(); ++i) m.data()[i] = normal(random);
  return m;
}

Scheme scheme_of(Format format, Symmetry symmetry, std::size_t group, ScaleType type = ScaleType::fp32,
                 bool full_range = false) {
  Scheme s;
  s.format = format;
  s.symmetry = symmetry;
  s.granularity = group == 0 ? Granularity::per_channel(0) : Granularity::per_group(group, 1);
  s.scale_type = type;
  s.full_range = full_range;
  return s;
}

std::vector<Scheme> schemes() {
  return {scheme_of(Format::int4, Symmetry::asymmetric, 16),
          scheme_of(Format::int4, Symmetry::asymmetric, 32, ScaleType::fp16),
          scheme_of(Format::int4, Symmetry::symmetric, 16),
          scheme_of(Format::int4, Symmetry::symmetric, 16, ScaleType::bf16, true),
          scheme_of(Format::int8, Symmetry::asymmetric, 0),
          scheme_of(Format::int8, Symmetry::symmetric, 0, ScaleType::fp16)};
}

RowMajorMatrix values_of(const QuantizedTensor& q) {
  RowMajorMatrix out(static_cast<Eigen::Index>(q.shape()[0]), static_cast<Eigen::Index>(q.shape()[1]));
  q.dequantize(out.data());
  return out;
}

/// One row and group, by the paper's equations and the chain rule, in double. Scales stay unrounded.
struct NaiveGroup {
  std::vector<double> w, v;
  bool symmetric;
  int min_code, max_code, implied_zero;
  double low = 1.0, high = 1.0;

  double min() const { return std::min(0.0, *std::min_element(w.begin(), w.end())); }
  double max() const { return std::max(0.0, *std::max_element(w.begin(), w.end())); }
  double scale() const {
    if (symmetric) return high * std::max(-min() / (implied_zero - min_code), max() / (max_code - implied_zero));
    return (high * max() - low * min()) / (max_code - min_code);
  }
  int zero() const {
    if (symmetric) return implied_zero;
    const double z = std::nearbyint(min_code - low * min() / scale());
    return static_cast<int>(std::min<double>(max_code, std::max<double>(min_code, z)));
  }
  double unclamped(std::size_t k) const { return std::nearbyint(w[k] / scale() + v[k]) + zero(); }
  bool clamped(std::size_t k) const { return unclamped(k) < min_code || unclamped(k) > max_code; }
  int code(std::size_t k) const {
    return static_cast<int>(std::min<double>(max_code, std::max<double>(min_code, unclamped(k))));
  }
  void step(const float* dw, double lr, double scale_lr) {
    const auto sign = [](double x) { return x > 0.0 ? 1.0 : x < 0.0 ? -1.0 : 0.0; };
    const double s = scale();
    const int z = zero();
    double ds = 0.0, dz = 0.0;
    std::vector<double> dv(w.size());
    for (std::size_t k = 0; k < w.size(); ++k) {
      // y = s (q - z). In range q - z = round(w / s + v), whose derivative by s is taken as -w / s^2; else q is fixed.
      const double g = static_cast<double>(dw[k]);
      ds += g * (code(k) - z);
      if (clamped(k)) {
        dz -= g * s;
      } else {
        ds += g * s * (-w[k] / (s * s));
        dv[k] = g * s;
      }
    }
    const double lo = low * min();
    const double steps = max_code - min_code;
    double dlow = 0.0, dhigh = 0.0;
    if (symmetric) {
      dlow = dhigh = ds;  // the scale is proportional to the factor
    } else {
      const double ds_all = ds + dz * lo / (s * s);  // z = min_code - lo / s
      dhigh = ds_all / steps * max();
      dlow = (-ds_all / steps - dz / s) * min();
    }
    for (std::size_t k = 0; k < w.size(); ++k) v[k] = std::min(0.5, std::max(-0.5, v[k] - lr * sign(dv[k])));
    low = std::min(1.0, low - scale_lr * sign(dlow));
    high = std::min(1.0, high - scale_lr * sign(dhigh));
  }
};

TEST(AutoRound, EquationsInDouble) {
  // Gradients are no whole multiples of anything: no sum is near 0, and no position within float's rounding of a tie.
  for (const Symmetry symmetry : {Symmetry::asymmetric, Symmetry::symmetric}) {
    const Eigen::Index rows = 3, cols = 40;  // groups of 16, 16 and 8
    const RowMajorMatrix w = random_matrix(1, rows, cols);
    const Scheme scheme = scheme_of(Format::int4, symmetry, 16);
    AutoRoundMatrix matrix(w, fit_min_max(scheme, w));
    const WeightGrids& grids = matrix.grids();
    std::vector<NaiveGroup> naive;
    for (Eigen::Index r = 0; r < rows; ++r)
      for (Eigen::Index g = 0; g < grids.groups(); ++g) {
        NaiveGroup n;
        for (Eigen::Index k = grids.inputs_of(g).first; k < grids.inputs_of(g).second; ++k)
          n.w.push_back(static_cast<double>(w(r, k)));
        n.v.resize(n.w.size());
        n.symmetric = symmetry == Symmetry::symmetric;
        n.min_code = grids.min_code();
        n.max_code = grids.max_code();
        n.implied_zero = grids.at(r, g).zero;
        naive.push_back(n);
      }
    std::size_t clamped = 0;
    for (int i = 0; i < 60; ++i) {
      // Pushed one way now and then: ranges shrink, and codes are clamped.
      RowMajorMatrix dw = random_matrix(static_cast<unsigned>(100 + i), rows, cols);
      if (i % 2 == 0) dw.array() = dw.array().abs() * w.array().sign();
      const float lr = 0.02F * static_cast<float>(60 - i) / 60.0F;
      matrix.step(dw, lr, lr);
      const CodeMatrix codes = matrix.codes();
      for (Eigen::Index r = 0; r < rows; ++r)
        for (Eigen::Index g = 0; g < grids.groups(); ++g) {
          NaiveGroup& n = naive[static_cast<std::size_t>(r * grids.groups() + g)];
          const Eigen::Index first = grids.inputs_of(g).first;
          n.step(dw.data() + r * cols + first, static_cast<double>(lr), static_cast<double>(lr));
          // Factors are sums of at most 60 steps, each rounded to 2^-24.
          ASSERT_NEAR(grids.at(r, g).scale, n.scale(), 1e-5 * n.scale()) << i;
          ASSERT_EQ(grids.at(r, g).zero, n.zero()) << i;
          for (std::size_t k = 0; k < n.w.size(); ++k) {
            const Eigen::Index col = first + static_cast<Eigen::Index>(k);
            ASSERT_NEAR(matrix.offsets()(r, col), n.v[k], 1e-5) << i;
            ASSERT_EQ(codes(r, col), n.code(k)) << i;
            clamped += n.clamped(k) ? 1 : 0;
          }
        }
    }
    EXPECT_GT(clamped, 0U);
  }
}

TEST(AutoRound, StartsAtRoundToNearest) {
  const RowMajorMatrix w = random_matrix(2, 7, 75);
  for (const Scheme& scheme : schemes()) {
    const AutoRoundMatrix matrix(w, fit_min_max(scheme, w));
    const QuantizedTensor q = DynamicQuantizer(scheme).quantize(w);
    EXPECT_EQ(values_of(matrix.result()), values_of(q));
    EXPECT_EQ(matrix.weights(), values_of(q));
  }
}

TEST(AutoRound, WeightsAreWhatTheTensorHolds) {
  const RowMajorMatrix w = random_matrix(3, 9, 70);
  ThreadPool pool(3);
  for (const Scheme& scheme : schemes()) {
    AutoRoundMatrix matrix(w, fit_mse(scheme, w)), threaded(w, fit_mse(scheme, w), &pool);
    for (unsigned i = 0; i < 20; ++i) {
      const RowMajorMatrix dw = random_matrix(50 + i, 9, 70);
      matrix.step(dw, 0.04F, 0.02F);
      threaded.step(dw, 0.04F, 0.02F, &pool);
    }
    EXPECT_EQ(values_of(matrix.result()), matrix.weights());
    EXPECT_EQ(threaded.weights(), matrix.weights());
    EXPECT_NE(matrix.weights(), values_of(DynamicQuantizer(scheme).quantize(w)));
    // Later steps do not touch what was kept.
    matrix.keep_best(&pool);
    const RowMajorMatrix kept = matrix.weights();
    matrix.step(random_matrix(99, 9, 70), 0.5F, 0.1F);
    EXPECT_NE(matrix.weights(), kept);
    EXPECT_EQ(values_of(matrix.result()), kept);
  }
}

TEST(AutoRound, StartsAtGivenCodes) {
  const RowMajorMatrix w = random_matrix(4, 6, 48);
  for (const Scheme& scheme : schemes()) {
    const WeightGrids grids = fit_mse(scheme, w);
    CodeMatrix codes = grids.encode(w);
    std::mt19937 random(5);
    for (Eigen::Index i = 0; i < codes.size(); ++i) {
      const int moved = codes.data()[i] + static_cast<int>(random() % 5) - 2;
      codes.data()[i] = static_cast<std::int8_t>(std::min(grids.max_code(), std::max(grids.min_code(), moved)));
    }
    AutoRoundMatrix matrix(w, grids, codes);
    EXPECT_EQ(matrix.codes(), codes);
    EXPECT_EQ(matrix.weights(), grids.decode(codes));
    // The first steps do not leave the codes far behind: no v has moved by more than the step.
    matrix.step(random_matrix(6, 6, 48), 0.01F, 0.0F);
    EXPECT_LE((matrix.codes().cast<int>() - codes.cast<int>()).cwiseAbs().maxCoeff(), 1);
  }
}

/// y = W2 relu(W1 x) for 200 columns of x whose entries go together.
struct Network {
  Matrix x, y;
  RowMajorMatrix w1 = random_matrix(11, 24, 32, 0.3F), w2 = random_matrix(12, 8, 24, 0.3F);
  Network() {
    const Matrix mix = random_matrix(13, 32, 32), noise = random_matrix(14, 32, 200);
    x = mix * noise + 0.5F * Matrix(random_matrix(15, 32, 200));
    y = forward(w1, w2);
  }
  Matrix forward(const RowMajorMatrix& a, const RowMajorMatrix& b) const { return b * (a * x).cwiseMax(0.0F); }
  double loss(const std::vector<AutoRoundMatrix>& m) const {
    return static_cast<double>((forward(m[0].weights(), m[1].weights()) - y).squaredNorm());
  }
  double gradients(const std::vector<AutoRoundMatrix>& m, std::vector<RowMajorMatrix>& dw) const {
    const Matrix hidden = (m[0].weights() * x).cwiseMax(0.0F);
    const Matrix error = m[1].weights() * hidden - y;
    dw[1] = 2.0F * error * hidden.transpose();
    Matrix dhidden = 2.0F * m[1].weights().transpose() * error;
    dhidden = dhidden.cwiseProduct(hidden.unaryExpr([](float h) { return h > 0.0F ? 1.0F : 0.0F; }));
    dw[0] = dhidden * x.transpose();
    return static_cast<double>(error.squaredNorm());
  }
};

TEST(AutoRound, BeatsRoundToNearestOnTwoLayers) {
  const Network network;
  for (const Scheme& scheme : {scheme_of(Format::int4, Symmetry::asymmetric, 16),
                               scheme_of(Format::int4, Symmetry::symmetric, 16, ScaleType::fp16)}) {
    std::vector<AutoRoundMatrix> m;
    for (const RowMajorMatrix* w : {&network.w1, &network.w2}) m.emplace_back(*w, fit_min_max(scheme, *w));
    const double rtn = network.loss(m);
    AutoRoundOptions options;
    options.iterations = 200;
    options.scale_lr = 0.1F / 200.0F;
    const AutoRoundReport report = auto_round(
        m, options, [&](int, std::vector<RowMajorMatrix>& dw) { return network.gradients(m, dw); },
        [&] { return network.loss(m); });
    EXPECT_EQ(report.start_loss, rtn);
    EXPECT_EQ(report.batch_losses.size(), 200U);
    EXPECT_LT(report.best_loss, 0.8 * rtn);
    const Matrix y = network.forward(values_of(m[0].result()), values_of(m[1].result()));
    EXPECT_EQ(static_cast<double>((y - network.y).squaredNorm()), report.best_loss);
  }
}

TEST(AutoRound, NeverEndsWorseThanItsStart) {
  const Network network;
  const Scheme scheme = scheme_of(Format::int8, Symmetry::asymmetric, 0);
  std::vector<AutoRoundMatrix> m;
  for (const RowMajorMatrix* w : {&network.w1, &network.w2}) m.emplace_back(*w, fit_min_max(scheme, *w));
  const RowMajorMatrix start = m[0].weights();
  AutoRoundOptions options;
  options.iterations = 5;
  options.lr = 0.5F;
  // Uphill.
  const AutoRoundReport report = auto_round(
      m, options,
      [&](int, std::vector<RowMajorMatrix>& dw) {
        const double loss = network.gradients(m, dw);
        for (RowMajorMatrix& d : dw) d = -d;
        return loss;
      },
      [&] { return network.loss(m); });
  EXPECT_EQ(report.best_iteration, 0);
  EXPECT_EQ(report.best_loss, report.start_loss);
  EXPECT_EQ(values_of(m[0].result()), start);
  EXPECT_NE(m[0].weights(), start);
  // No iterations: the start.
  options.iterations = 0;
  std::vector<AutoRoundMatrix> one;
  one.emplace_back(network.w1, fit_min_max(scheme, network.w1));
  auto_round(
      one, options, [](int, std::vector<RowMajorMatrix>&) { return 0.0; }, [] { return 1.0; });
  EXPECT_EQ(values_of(one[0].result()), start);
}

TEST(AutoRound, PlantedMatrices) {
  RowMajorMatrix outlier = random_matrix(21, 4, 32, 0.01F);
  outlier.col(3).setConstant(50.0F);
  RowMajorMatrix dead = random_matrix(22, 4, 32);
  dead.col(7).setZero();
  dead.row(1).setZero();
  for (const RowMajorMatrix& w :
       {outlier, dead, RowMajorMatrix(RowMajorMatrix::Constant(3, 32, -0.75F)),
        RowMajorMatrix(RowMajorMatrix::Zero(3, 32)), random_matrix(23, 5, 1), RowMajorMatrix(0, 0)})
    for (const Scheme& scheme : schemes()) {
      AutoRoundMatrix matrix(w, fit_min_max(scheme, w));
      for (unsigned i = 0; i < 30; ++i) matrix.step(random_matrix(i, w.rows(), w.cols()), 0.03F, 0.03F);
      EXPECT_TRUE(matrix.weights().allFinite());
      EXPECT_EQ(values_of(matrix.result()), matrix.weights());
      // v moves a weight by a step at most; the range has shrunk by 0.9 at most.
      if (w.size() > 0) {
        EXPECT_LE(matrix.weights().cwiseAbs().maxCoeff(), 1.2F * w.cwiseAbs().maxCoeff() + 1.0F);
      }
    }
}

TEST(AutoRound, BadInputsAreRefused) {
  RowMajorMatrix w = random_matrix(31, 4, 32);
  const Scheme scheme = scheme_of(Format::int4, Symmetry::asymmetric, 16);
  const WeightGrids grids = fit_min_max(scheme, w);
  EXPECT_THROW(AutoRoundMatrix(random_matrix(1, 4, 31), grids), InvalidArgument);
  EXPECT_THROW(AutoRoundMatrix(w, grids, CodeMatrix(4, 31)), InvalidArgument);
  EXPECT_THROW(AutoRoundMatrix(w, grids, CodeMatrix(CodeMatrix::Constant(4, 32, 16))), InvalidArgument);
  for (const Scheme& other :
       {scheme_of(Format::nf4, Symmetry::symmetric, 16), scheme_of(Format::int4, Symmetry::float_offset, 16)})
    EXPECT_THROW(AutoRoundMatrix(w, fit_min_max(other, w)), InvalidArgument);
  AutoRoundMatrix matrix(w, grids);
  EXPECT_THROW(matrix.step(RowMajorMatrix::Zero(4, 31), 0.1F, 0.1F), InvalidArgument);
  std::vector<AutoRoundMatrix> m(1, matrix);
  AutoRoundOptions options;
  options.iterations = 3;
  const auto zero = [](int, std::vector<RowMajorMatrix>& dw) {
    dw[0].setZero();
    return 0.0;
  };
  const auto run = [&](const auto& gradients, const auto& loss) { auto_round(m, options, gradients, loss); };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(run(zero, [&] { return nan; }), InvalidArgument);
  EXPECT_THROW(run([&](int i, auto&) { return i == 2 ? nan : 0.0; }, [] { return 0.0; }), InvalidArgument);
  options.iterations = -1;
  EXPECT_THROW(run(zero, [] { return 0.0; }), InvalidArgument);
  options.iterations = 1;
  options.evaluations = 0;
  EXPECT_THROW(run(zero, [] { return 0.0; }), InvalidArgument);
  w(2, 5) = std::numeric_limits<float>::quiet_NaN();
  try {
    AutoRoundMatrix(w, grids);
    FAIL();
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("(2, 5)"), std::string::npos) << e.what();
  }
}

}  // namespace
