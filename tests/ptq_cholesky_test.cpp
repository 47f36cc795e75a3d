// The factor of an inverse against Eigen's in double, and what happens where there is none.
#include <gtest/gtest.h>

#include <Eigen/Cholesky>
#include <Eigen/Eigenvalues>
#include <cmath>
#include <limits>
#include <random>

#include "nibble/ptq/cholesky.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace

/// Correlated inputs, n tokens, damped.
Eigen::MatrixXf hessian(Eigen::Index k, Eigen::Index tokens, float damp, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Eigen::MatrixXf x(k, tokens);
  for (Eigen::Index i = 0; i < x.size(); ++i) x.data()[i] = normal(random);
  for (Eigen::Index i = 1; i < k; ++i) x.row(i) = 0.7F * x.row(i - 1) + 0.7F * x.row(i);
  Hessian h(k);
  h.add(x);
  Eigen::MatrixXf m = h.matrix();
  m.diagonal().array() += damp * m.diagonal().mean();
  return m;
}

TEST(PtqCholesky, IsTheFactorOfTheInverse) {
  ThreadPool pool(3);
  for (const Eigen::Index k : {1, 2, 63, 64, 65, 130, 257, 600}) {
    const Eigen::MatrixXf h = hessian(k, 2 * k + 3, 0.01F, static_cast<unsigned>(k));
    Eigen::MatrixXf u = h;
    EXPECT_TRUE(inverse_cholesky(u).ok);
    EXPECT_TRUE(u.isUpperTriangular(0.0F));
    // The definition, by Eigen in double: H^-1 = L L^T, U = L^T.
    const Eigen::MatrixXd wide = h.cast<double>();
    const Eigen::MatrixXd inverse = wide.inverse();
    const Eigen::MatrixXd expected = Eigen::LLT<Eigen::MatrixXd>(inverse).matrixU();
    // Backward error (K + c) u, c about 64, and a forward error of at most the condition number times that.
    const Eigen::VectorXd values = Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>(wide).eigenvalues();
    const double condition = values.maxCoeff() / values.minCoeff();
    const double bound = static_cast<double>(k + 64) * 0x1p-24 * condition;
    ASSERT_LT(bound, 0.05);
    EXPECT_LE((u.cast<double>() - expected).norm(), bound * expected.norm()) << k;
    // U H U^T = 1.
    const Eigen::MatrixXd unit = u.cast<double>() * wide * u.cast<double>().transpose();
    EXPECT_LE((unit - Eigen::MatrixXd::Identity(k, k)).norm(), bound * std::sqrt(static_cast<double>(k)));

    Eigen::MatrixXf threaded = h;
    EXPECT_TRUE(inverse_cholesky(threaded, &pool).ok);
    EXPECT_EQ(threaded, u);
    // The lower triangle is not read.
    Eigen::MatrixXf half = h.triangularView<Eigen::Upper>();
    EXPECT_TRUE(inverse_cholesky(half).ok);
    EXPECT_EQ(half, u);
  }
}

TEST(PtqCholesky, ScaleAndOutliersDoNotMatter) {
  // Powers of two on the diagonal scale R exactly.
  const Eigen::Index k = 150;
  const Eigen::MatrixXf h = hessian(k, 400, 0.01F, 7);
  Eigen::VectorXf scale(k);
  for (Eigen::Index i = 0; i < k; ++i) scale[i] = std::ldexp(1.0F, static_cast<int>(i * 7 % 31) - 15);
  Eigen::MatrixXf u = h;
  Eigen::MatrixXf v = scale.asDiagonal() * h * scale.asDiagonal();
  EXPECT_TRUE(inverse_cholesky(u).ok);
  EXPECT_TRUE(inverse_cholesky(v).ok);
  EXPECT_EQ(Eigen::MatrixXf(v * scale.asDiagonal()), u);
}

TEST(PtqCholesky, LongTrianglesAndHugeTokens) {
  // U H U^T v = v, at sizes whose inverse is put together from pieces wider than a block, and with a token that is most of
  // H (an attention sink): the condition number then is nearly K / damp.
  ThreadPool pool(2);
  for (const Eigen::Index k : {1100, 1536}) {
    std::mt19937 random(static_cast<unsigned>(k));
    std::normal_distribution<float> normal;
    Eigen::MatrixXf x(k, 700);
    for (Eigen::Index i = 0; i < x.size(); ++i) x.data()[i] = normal(random);
    x.col(5) *= 60.0F;
    x(3, 5) = 25000.0F;
    for (const bool sink : {false, true}) {
      Hessian sums(k, &pool);
      sums.add(sink ? x : Eigen::MatrixXf(x.rightCols(600)));
      Eigen::MatrixXf h = sums.matrix();
      const float damp = 0.01F * h.diagonal().mean();
      h.diagonal().array() += damp;
      Eigen::MatrixXf u = h;
      ASSERT_TRUE(inverse_cholesky(u, &pool).ok);
      Eigen::VectorXd v(k);
      for (Eigen::Index i = 0; i < k; ++i) v[i] = static_cast<double>(normal(random));
      const Eigen::VectorXd inner = u.cast<double>().transpose() * v;
      const Eigen::VectorXd back = u.cast<double>() * (h.cast<double>() * inner);
      // As above: (K + c) u times the condition number, which is at most trace / damp.
      const double condition = static_cast<double>(h.diagonal().sum()) / static_cast<double>(damp);
      EXPECT_LE((back - v).norm(), static_cast<double>(k + 64) * 0x1p-24 * condition * v.norm()) << k << sink;
      EXPECT_LE((back - v).norm(), 0.05 * v.norm()) << k << sink;
    }
  }
}

TEST(PtqCholesky, FailuresAreReported) {
  // Two equal inputs.
  Eigen::MatrixXf h = hessian(100, 300, 0.0F, 9);
  h.row(70) = h.row(20);
  h.col(70) = h.col(20);
  CholeskyStatus status = inverse_cholesky(h);
  EXPECT_FALSE(status.ok);
  EXPECT_EQ(status.failed_at, 20);  // from the end
  EXPECT_LT(std::fabs(status.pivot), 1e-6);
  // Fewer tokens than inputs.
  h = hessian(300, 100, 0.0F, 10);
  EXPECT_FALSE(inverse_cholesky(h).ok);
  // Not finite, zero, negative.
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 0.0F, -1.0F})
    for (const Eigen::Index at : {0, 50, 99}) {
      h = hessian(100, 300, 0.01F, 11);
      h(at, at) = bad;
      EXPECT_FALSE(inverse_cholesky(h).ok);
    }
  h = hessian(100, 300, 0.01F, 11);
  h(3, 80) = h(80, 3) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(inverse_cholesky(h).ok);
  Eigen::MatrixXf wide = Eigen::MatrixXf::Ones(3, 4);
  EXPECT_THROW(inverse_cholesky(wide), InvalidArgument);
  Eigen::MatrixXf none(0, 0);
  EXPECT_TRUE(inverse_cholesky(none).ok);
}

}  // namespace
