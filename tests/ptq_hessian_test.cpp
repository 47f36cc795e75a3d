// Calibration sums: exact sums of products as far as float allows, whatever the batches and the threads.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "nibble/ptq/hessian.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace

Eigen::MatrixXf random_inputs(Eigen::Index k, Eigen::Index t, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.3F, 1.0F);
  Eigen::MatrixXf x(k, t);
  for (Eigen::Index i = 0; i < x.size(); ++i) x.data()[i] = normal(random);
  if (k > 3) x.row(2) *= 50.0F;
  return x;
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

/// (514 + n / 512) u sqrt(H_ii H_jj), as the class derives it.
void expect_close(const Eigen::MatrixXf& h, const Eigen::MatrixXd& exact, const Eigen::VectorXd& left,
                  const Eigen::VectorXd& right, Eigen::Index tokens) {
  const double factor = (514.0 + static_cast<double>(tokens) / 512.0) * 0x1p-24;
  for (Eigen::Index j = 0; j < h.cols(); ++j)
    for (Eigen::Index i = 0; i < h.rows(); ++i)
      ASSERT_LE(std::fabs(static_cast<double>(h(i, j)) - exact(i, j)), factor * std::sqrt(left[i] * right[j]))
          << i << ", " << j;
}

TEST(PtqHessian, IsTheSumOfProducts) {
  for (const Eigen::Index k : {1, 5, 64, 300})
    for (const Eigen::Index n : {1, 7, 512, 1300}) {
      const Eigen::MatrixXf x = random_inputs(k, n, static_cast<unsigned>(k + n));
      Hessian hessian(k);
      hessian.add(x);
      EXPECT_EQ(hessian.tokens(), n);
      const Eigen::MatrixXd wide = x.cast<double>();
      const Eigen::MatrixXd exact = wide * wide.transpose() * (2.0 / static_cast<double>(n));
      const Eigen::MatrixXf h = hessian.matrix();
      expect_close(h, exact, exact.diagonal(), exact.diagonal(), n);
      EXPECT_EQ(h, Eigen::MatrixXf(h.transpose()));
      for (Eigen::Index i = 0; i < k; ++i) {
        // Sums in double, rounded once.
        const auto near = [](float a, double b) {
          return std::fabs(static_cast<double>(a) - b) <= 1e-7 * (std::fabs(b) + 1e-6);
        };
        EXPECT_TRUE(near(hessian.mean()[i], wide.row(i).mean()));
        EXPECT_TRUE(near(hessian.mean_abs()[i], wide.row(i).cwiseAbs().mean()));
        EXPECT_TRUE(near(hessian.mean_square()[i], wide.row(i).squaredNorm() / static_cast<double>(n)));
        EXPECT_EQ(hessian.max_abs()[i], x.row(i).cwiseAbs().maxCoeff());
      }
    }
}

TEST(PtqHessian, NeitherBatchesNorThreadsChangeABit) {
  ThreadPool pool(3);
  const Eigen::MatrixXf x = random_inputs(130, 1500, 1);
  const Eigen::MatrixXf y = x + 0.01F * random_inputs(130, 1500, 2);
  Hessian whole(130);
  whole.add(x, y);
  Hessian pieces(130, &pool);
  for (Eigen::Index t = 0, step = 1; t < x.cols(); t += step, step = step * 2 + 1) {
    const Eigen::Index count = std::min(step, x.cols() - t);
    pieces.add(x.middleCols(t, count), y.middleCols(t, count));
    if (t < 700) pieces.matrix();  // looking changes nothing
  }
  EXPECT_EQ(whole.matrix(), pieces.matrix());
  EXPECT_EQ(whole.difference(), pieces.difference());
  EXPECT_EQ(whole.mean(), pieces.mean());
  EXPECT_EQ(whole.mean_square(), pieces.mean_square());
}

TEST(PtqHessian, TwoStreams) {
  const Eigen::Index k = 40;
  const Eigen::Index n = 900;
  const Eigen::MatrixXf x = random_inputs(k, n, 5);
  const Eigen::MatrixXf y = x + 0.05F * random_inputs(k, n, 6);
  Hessian hessian(k);
  hessian.add(x, y);
  EXPECT_TRUE(hessian.two_streams());
  const double scale = 2.0 / static_cast<double>(n);
  const Eigen::MatrixXd wide = y.cast<double>();
  const Eigen::MatrixXd h = wide * wide.transpose() * scale;
  // The difference is rounded to float once: one more u.
  const Eigen::MatrixXd delta = (x - y).cast<double>();
  expect_close(hessian.matrix(), h, h.diagonal(), h.diagonal(), n);
  expect_close(hessian.difference(), delta * wide.transpose() * scale, delta.rowwise().squaredNorm() * scale,
               h.diagonal(), n);
  // The same stream twice: nothing to correct.
  Hessian same(k);
  same.add(x, x);
  EXPECT_EQ(same.difference(), Eigen::MatrixXf::Zero(k, k));
}

TEST(PtqHessian, ManyTokensStayAccurate) {
  // 200,000 tokens of one value: a chain of floats would stop growing short of the sum.
  const Eigen::MatrixXf x = Eigen::MatrixXf::Constant(3, 4000, 1.1F);
  Hessian hessian(3);
  for (int i = 0; i < 50; ++i) hessian.add(x);
  const double v = static_cast<double>(1.1F);
  const double exact = 2.0 * v * v;
  // All terms are equal and positive: the bound of the class, (514 + 391) u.
  EXPECT_NEAR(static_cast<double>(hessian.matrix()(2, 1)), exact, exact * 905.0 * 0x1p-24);
}

TEST(PtqHessian, QuadraticError) {
  const Eigen::MatrixXf e = random_inputs(7, 600, 3).leftCols(600);
  Hessian hessian(600);
  hessian.add(random_inputs(600, 800, 4));
  const Eigen::MatrixXf h = hessian.matrix();
  const Eigen::MatrixXd wide = e.cast<double>();
  const double exact = (wide * h.cast<double>() * wide.transpose()).trace();
  // One fma a k over 600: 600 u of the sum of magnitudes.
  const double magnitude = (wide.cwiseAbs() * h.cast<double>().cwiseAbs() * wide.cwiseAbs().transpose()).trace();
  EXPECT_NEAR(quadratic_error(e, h), exact, 600.0 * 0x1p-24 * magnitude);
  EXPECT_FALSE(message_of([&] { quadratic_error(e.leftCols(5), h); }).empty());
}

TEST(PtqHessian, BadInputs) {
  EXPECT_FALSE(message_of([] { Hessian(0); }).empty());
  Hessian hessian(4);
  EXPECT_NE(message_of([&] { hessian.matrix(); }).find("no token"), std::string::npos);
  EXPECT_NE(message_of([&] { hessian.add(Eigen::MatrixXf::Ones(5, 2)); }).find("5 x 2"), std::string::npos);
  hessian.add(Eigen::MatrixXf::Ones(4, 10));
  Eigen::MatrixXf x = Eigen::MatrixXf::Ones(4, 3);
  x(2, 1) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(message_of([&] { hessian.add(x); }).find("token 11, input 2"), std::string::npos);
  x(2, 1) = -std::numeric_limits<float>::infinity();
  EXPECT_NE(message_of([&] { hessian.add(x); }).find("token 11, input 2"), std::string::npos);
  EXPECT_NE(message_of([&] {
              hessian.add(Eigen::MatrixXf::Ones(4, 3), Eigen::MatrixXf::Ones(4, 3));
            }).find("one stream"),
            std::string::npos);
  EXPECT_NE(message_of([&] { hessian.difference(); }).find("expected two"), std::string::npos);
  // What was refused left no trace.
  EXPECT_EQ(hessian.tokens(), 10);
  EXPECT_EQ(hessian.matrix(), Eigen::MatrixXf::Constant(4, 4, 2.0F));
  hessian.add(Eigen::MatrixXf(4, 0));
  EXPECT_EQ(hessian.tokens(), 10);
}

}  // namespace
