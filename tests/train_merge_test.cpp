// Low-rank approximations, LoftQ and merging, against the explicit linear algebra that defines them, in double.
#include <gtest/gtest.h>

#include <Eigen/Eigenvalues>
#include <Eigen/SVD>
#include <cmath>
#include <limits>
#include <random>

#include "nibble/gemm/pack.hpp"
#include "nibble/train/loftq.hpp"
#include "nibble/train/merge.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace

RowMajorMatrix random_matrix(Eigen::Index n, Eigen::Index k, unsigned seed, float deviation = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, deviation);
  RowMajorMatrix m(n, k);
  for (Eigen::Index i = 0; i < m.size(); ++i) m.data()[i] = normal(random);
  return m;
}
/// Tokens whose inputs are correlated and of unequal size.
Eigen::MatrixXf correlated(Eigen::Index k, Eigen::Index tokens, unsigned seed) {
  Eigen::MatrixXf x = random_matrix(k, tokens, seed);
  for (Eigen::Index i = 1; i < k; ++i) x.row(i) = 0.9F * x.row(i - 1) + 0.4F * x.row(i);
  for (Eigen::Index i = 0; i < k; ++i) x.row(i) *= 0.5F + static_cast<float>(i * 7 % 11) * 0.25F;
  return x;
}
Hessian hessian_of(const Eigen::MatrixXf& x, ThreadPool* pool = nullptr) {
  Hessian h(x.rows(), pool);
  h.add(x);
  return h;
}
Scheme grouped(Format format, Symmetry symmetry = Symmetry::symmetric) {
  Scheme s;
  s.format = format;
  s.symmetry = symmetry;
  s.granularity = Granularity::per_group(32, 1);
  s.scale_type = ScaleType::fp16;
  return s;
}
Eigen::MatrixXd product_of(const LowRank& l) { return l.scale * (l.b.cast<double>() * l.a.cast<double>()); }
Eigen::MatrixXd values_of(const QuantizedTensor& q) {
  Eigen::MatrixXd m(static_cast<Eigen::Index>(q.shape()[0]), static_cast<Eigen::Index>(q.shape()[1]));
  std::vector<float> line(q.line_length());
  for (Eigen::Index r = 0; r < m.rows(); ++r) {
    q.dequantize_line(static_cast<std::size_t>(r), 0, line.size(), line.data());
    for (Eigen::Index k = 0; k < m.cols(); ++k) m(r, k) = static_cast<double>(line[static_cast<std::size_t>(k)]);
  }
  return m;
}

TEST(TrainLowRank, IsTheTruncatedSingularValueDecomposition) {
  for (const auto& shape : {std::pair<Eigen::Index, Eigen::Index>(40, 24), {24, 40}, {16, 16}}) {
    const RowMajorMatrix e = random_matrix(shape.first, shape.second, 7);
    const Eigen::JacobiSVD<Eigen::MatrixXd> svd(e.cast<double>());
    for (const Eigen::Index rank : {1, 5, 16}) {
      const LowRank l = best_low_rank(e, rank);
      EXPECT_EQ(l.rank(), rank);
      const double optimum = svd.singularValues().tail(svd.singularValues().size() - rank).squaredNorm();
      const double error = (e.cast<double>() - product_of(l)).squaredNorm();
      // Six powers of the Gram matrix of a random matrix, whose spectrum is as flat as spectra get: within 2 %; and
      // rounding errors of floats.
      EXPECT_LE(error, 1.02 * optimum + 1e-8 * e.cast<double>().squaredNorm()) << rank;
      EXPECT_GE(error, optimum - 1e-6 * e.cast<double>().squaredNorm());
      for (Eigen::Index i = 0; i < rank; ++i)  // balanced
        EXPECT_NEAR(l.a.row(i).norm(), l.b.col(i).norm(), 1e-4F * l.a.row(i).norm());
    }
  }
}

TEST(TrainLowRank, IsTheBestInTheMetricOfAHessian) {
  const Eigen::MatrixXf x = correlated(48, 300, 3);
  const Eigen::MatrixXf h = hessian_of(x).matrix();
  const RowMajorMatrix e = random_matrix(20, 48, 4);
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> eigen(h.cast<double>());
  const Eigen::JacobiSVD<Eigen::MatrixXd> svd(e.cast<double>() * eigen.operatorSqrt());
  for (const Eigen::Index rank : {1, 3, 8}) {
    const LowRank l = best_low_rank(e, rank, h);
    const Eigen::MatrixXd rest = e.cast<double>() - product_of(l);
    const double optimum = svd.singularValues().tail(svd.singularValues().size() - rank).squaredNorm();
    const double whole = svd.singularValues().squaredNorm();
    const double error = (rest * h.cast<double>() * rest.transpose()).trace();
    // The spectrum decays: six powers leave nothing, so what remains is floats' rounding.
    EXPECT_LE(error, optimum + 1e-5 * whole);
    EXPECT_GE(error, optimum - 1e-5 * whole);
  }
}

TEST(TrainLowRank, PlantedRanksZerosAndBadInputs) {
  LowRank planted;
  planted.a = random_matrix(3, 30, 1);
  planted.b = random_matrix(25, 3, 2);
  RowMajorMatrix e = RowMajorMatrix::Zero(25, 30);
  merge_low_rank(planted, e);
  const LowRank found = best_low_rank(e, 3);
  // Products of floats, rank 3: their rounding errors alone are left, 2^-24 an element and operand.
  EXPECT_LE((product_of(found) - product_of(planted)).norm(), 1e-6 * product_of(planted).norm() * 8);
  EXPECT_EQ(product_of(best_low_rank(RowMajorMatrix::Zero(8, 9), 2)).norm(), 0.0);
  EXPECT_EQ(best_low_rank(e, 100).rank(), 25);
  EXPECT_EQ(best_low_rank(e, 0).rank(), 0);
  e(3, 4) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(best_low_rank(e, 2), InvalidArgument);
  EXPECT_THROW(best_low_rank(RowMajorMatrix::Zero(8, 9), -1), InvalidArgument);
  EXPECT_THROW(best_low_rank(RowMajorMatrix::Zero(8, 9), 2, Eigen::MatrixXf::Zero(8, 8)), InvalidArgument);
}

TEST(TrainMerge, FloatMergeRoundsOnce) {
  LowRank l;
  l.a = random_matrix(7, 33, 1);
  l.b = random_matrix(19, 7, 2, 0.1F);
  l.scale = 32.0 / 7.0;
  const RowMajorMatrix w = random_matrix(19, 33, 3);
  RowMajorMatrix merged = w;
  merge_low_rank(l, merged);
  for (Eigen::Index r = 0; r < w.rows(); ++r)
    for (Eigen::Index k = 0; k < w.cols(); ++k) {
      long double sum = 0.0L;
      for (Eigen::Index i = 0; i < l.rank(); ++i)
        sum += static_cast<long double>(l.b(r, i)) * static_cast<long double>(l.a(i, k));
      const auto exact = static_cast<long double>(w(r, k)) + static_cast<long double>(l.scale) * sum;
      // Half an ulp, and what double sums lose: 2^-50 is far more than 8 of their roundings.
      const double ulp = std::ldexp(1.0, std::ilogb(static_cast<double>(exact)) - 23);
      EXPECT_LE(std::fabs(static_cast<double>(exact - static_cast<long double>(merged(r, k)))),
                0.5 * ulp + 0x1p-46);
    }
  RowMajorMatrix wrong = RowMajorMatrix::Zero(19, 32);
  EXPECT_THROW(merge_low_rank(l, wrong), InvalidArgument);
  l.b(0, 0) = std::numeric_limits<float>::infinity();
  EXPECT_THROW(merge_low_rank(l, merged), InvalidArgument);
}

TEST(TrainMerge, LoftqStartsNearerThanTheQuantizedWeightsAlone) {
  const RowMajorMatrix w = random_matrix(48, 64, 5, 0.05F);
  LoftqOptions options;
  options.iterations = 3;
  const LoftqResult one = [&] {
    LoftqOptions o = options;
    o.iterations = 1;
    return loftq(w, grouped(Format::nf4), 8, o);
  }();
  // Naive: the quantizer's values, and the singular values of what they leave.
  const WeightGrids grids = fit_min_max(grouped(Format::nf4), w);
  const Eigen::MatrixXd residual = w.cast<double>() - values_of(grids.assemble(grids.encode(w)));
  const Eigen::JacobiSVD<Eigen::MatrixXd> svd(residual);
  EXPECT_NEAR(one.error_without, residual.norm(), 1e-6 * residual.norm());
  const double optimum = svd.singularValues().tail(svd.singularValues().size() - 8).norm();
  EXPECT_NEAR(one.error, optimum, 0.02 * optimum);
  const LoftqResult more = loftq(w, grouped(Format::nf4), 8, options);
  EXPECT_LE(more.error, one.error);
  EXPECT_NEAR((w.cast<double>() - values_of(more.base) - product_of(more.start)).norm(), more.error,
              1e-5 * more.error);
  options.double_quantized = true;
  EXPECT_LT(loftq(w, grouped(Format::nf4), 8, options).error, residual.norm());
  EXPECT_THROW(loftq(w, grouped(Format::nf4), 0), InvalidArgument);
  options.iterations = 0;
  EXPECT_THROW(loftq(w, grouped(Format::nf4), 2, options), InvalidArgument);
}

TEST(TrainMerge, QuantizedMergeReportsTheErrorOfItsOutputs) {
  const Eigen::MatrixXf x = correlated(96, 400, 9);
  const Hessian hessian = hessian_of(x);
  RowMajorMatrix target = random_matrix(64, 96, 10, 0.05F);
  LowRank trained;
  trained.a = random_matrix(4, 96, 11, 0.1F);
  trained.b = random_matrix(64, 4, 12, 0.02F);
  merge_low_rank(trained, target);
  for (const double share : {0.0, 0.25}) {
    MergeOptions options;
    options.side_share = share;
    const MergeResult r = merge_quantized(target, hessian, grouped(Format::int4, Symmetry::asymmetric), options);
    // Over the tokens themselves.
    Eigen::MatrixXd e = target.cast<double>() - values_of(r.weights);
    if (!r.side.empty()) e -= product_of(r.side);
    const double direct = (e * x.cast<double>()).squaredNorm() / static_cast<double>(64 * x.cols());
    EXPECT_NEAR(r.error, direct, 1e-3 * direct);  // the Hessian is summed in floats
    const WeightGrids grids = fit_min_max(grouped(Format::int4, Symmetry::asymmetric), target);
    const Eigen::MatrixXd naive = target.cast<double>() - values_of(grids.assemble(grids.encode(target)));
    const double rounded = (naive * x.cast<double>()).squaredNorm() / static_cast<double>(64 * x.cols());
    EXPECT_NEAR(r.naive_error, rounded, 1e-3 * rounded);
    EXPECT_LE(r.error, 0.5 * r.naive_error);
    const std::size_t bytes = r.weights.codes().size() + r.weights.scales().size() + r.weights.zeros().size();
    EXPECT_LE(static_cast<double>(r.side.byte_size(2)), share * static_cast<double>(bytes));
    EXPECT_EQ(r.side.empty(), share == 0.0);
  }
}

TEST(TrainMerge, SideTermHelpsAndThreadsChangeNoBit) {
  const Eigen::MatrixXf x = correlated(96, 400, 19);
  const RowMajorMatrix target = random_matrix(64, 96, 20, 0.05F);
  ThreadPool pool(2);
  const Hessian hessian = hessian_of(x);
  MergeOptions options;
  const double without = merge_quantized(target, hessian, grouped(Format::int4), options).error;
  options.side_share = 0.25;
  const MergeResult alone = merge_quantized(target, hessian, grouped(Format::int4), options);
  EXPECT_LT(alone.error, 0.9 * without);
  options.gptq.pool = &pool;
  const MergeResult two = merge_quantized(target, hessian, grouped(Format::int4), options);
  EXPECT_EQ(alone.side.a, two.side.a);
  EXPECT_EQ(alone.side.b, two.side.b);
  EXPECT_EQ(values_of(alone.weights), values_of(two.weights));
}

TEST(TrainMerge, PlantedCasesAndBadOptions) {
  const Hessian hessian = hessian_of(correlated(32, 64, 1));
  const Scheme scheme = grouped(Format::int4);
  MergeOptions options;
  options.side_share = 0.5;
  const MergeResult zero = merge_quantized(RowMajorMatrix::Zero(16, 32), hessian, scheme, options);
  EXPECT_EQ(zero.error, 0.0);
  // One token: the Hessian has rank 1.
  const MergeResult one =
      merge_quantized(random_matrix(16, 32, 2), hessian_of(correlated(32, 1, 4)), scheme, options);
  EXPECT_LE(one.error, one.naive_error);
  RowMajorMatrix bad = random_matrix(16, 32, 2);
  EXPECT_THROW(merge_quantized(bad, hessian_of(correlated(31, 8, 4)), scheme, options), InvalidArgument);
  options.side_share = 1.5;
  EXPECT_THROW(merge_quantized(bad, hessian, scheme, options), InvalidArgument);
  options.side_share = 0.1;
  options.rounds = 0;
  EXPECT_THROW(merge_quantized(bad, hessian, scheme, options), InvalidArgument);
  options.rounds = 1;
  options.side_format = Format::int8;
  options.side_share = 1.0;
  EXPECT_THROW(merge_quantized(bad, hessian, scheme, options), InvalidArgument);
  bad(1, 2) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(merge_quantized(bad, hessian, scheme), InvalidArgument);
}

}  // namespace
