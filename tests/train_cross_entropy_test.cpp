// Cross-entropy against its definition in double, alone and fused with the output layer.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "nibble/core/thread_pool.hpp"
#include "nibble/train/cross_entropy.hpp"

namespace {

using namespace nibble;
using Matrix = Eigen::MatrixXf;
using Double = Eigen::MatrixXd;
using Targets = std::vector<std::int32_t>;

Matrix random_matrix(unsigned seed, Eigen::Index rows, Eigen::Index cols, float size) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, size);
  Matrix m(rows, cols);
  for (Eigen::Index i = 0; i < m.size(); ++i) m.data()[i] = normal(random);
  return m;
}

/// Every third token is ignored.
Targets random_targets(unsigned seed, Eigen::Index vocabulary, Eigen::Index tokens) {
  std::mt19937 random(seed);
  Targets targets(static_cast<std::size_t>(tokens));
  for (std::size_t t = 0; t < targets.size(); ++t)
    targets[t] = t % 3 == 2 ? -100 : static_cast<std::int32_t>(random() % static_cast<unsigned>(vocabulary));
  return targets;
}

/// The definition: the mean of -log(exp(x_target) / sum of exp(x)), and its derivative p - [v = target], over `divisor`.
double naive(const Double& logits, const Targets& targets, double divisor, Double* gradient) {
  double sum = 0.0;
  if (gradient != nullptr) gradient->setZero(logits.rows(), logits.cols());
  for (Eigen::Index t = 0; t < logits.cols(); ++t) {
    const std::int32_t target = targets[static_cast<std::size_t>(t)];
    if (target == -100) continue;
    const double largest = logits.col(t).maxCoeff();
    const Eigen::VectorXd e = (logits.col(t).array() - largest).exp();
    sum += std::log(e.sum()) + largest - logits(target, t);
    if (gradient == nullptr) continue;
    gradient->col(t) = e / e.sum() / divisor;
    (*gradient)(target, t) -= 1.0 / divisor;
  }
  return sum / divisor;
}

std::size_t counted(const Targets& targets) {
  std::size_t n = 0;
  for (const auto t : targets) n += t != -100 ? 1U : 0U;
  return n;
}

template <class F>
void expect_error(F&& f, const std::string& part) {
  try {
    f();
    ADD_FAILURE() << "no error with '" << part << "'";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

// Exponentials are within 1.1 ulp of exp of a difference that was rounded, |x - max| <= 64: 33 ulp of 2^-24 in all; a sum of
// at most 1000 of them in float adds at most 1000 ulp, in practice a few. Taken: 64 ulp, 4e-6, of losses and of shares.
constexpr double tolerance = 64 * 0x1p-24;

TEST(CrossEntropy, IsItsDefinition) {
  for (const Eigen::Index vocabulary : {1, 2, 17, 1000})
    for (const Eigen::Index tokens : {1, 2, 33, 70})
      for (const float size : {0.0F, 1.0F, 10.0F}) {
        Matrix logits = random_matrix(1, vocabulary, tokens, size);
        const Targets targets = random_targets(2, vocabulary, tokens);
        for (const double divisor : {0.0, 1.0, 37.0}) {
          CrossEntropyOptions how;
          how.divisor = divisor;
          const double used = divisor == 0.0 ? static_cast<double>(counted(targets)) : divisor;
          Double want;
          const double loss = naive(logits.cast<double>(), targets, used, &want);
          Matrix x = logits;
          const CrossEntropy got = cross_entropy(x, targets, how);
          EXPECT_EQ(got.counted, counted(targets));
          EXPECT_NEAR(got.loss, loss, tolerance * (1.0 + static_cast<double>(got.counted) / used));
          EXPECT_LE((x.cast<double>() - want).cwiseAbs().maxCoeff(), tolerance / used);
        }
      }
}

TEST(CrossEntropy, GradientIsThatOfTheLoss) {
  Double x = random_matrix(1, 11, 5, 2.0F).cast<double>();
  const Targets targets = random_targets(3, 11, 5);
  Matrix gradient = x.cast<float>();
  cross_entropy(gradient, targets);
  const auto n = static_cast<double>(counted(targets));
  // h = 2^-14: the quotient is off by h^2 / 6 and by 1e-16 / h.
  for (Eigen::Index i = 0; i < x.size(); ++i) {
    const double middle = x.data()[i];
    x.data()[i] = middle + 0x1p-14;
    const double above = naive(x, targets, n, nullptr);
    x.data()[i] = middle - 0x1p-14;
    const double below = naive(x, targets, n, nullptr);
    x.data()[i] = middle;
    EXPECT_NEAR(static_cast<double>(gradient.data()[i]), (above - below) * 0x1p13, 1e-6);
  }
}

TEST(CrossEntropy, LargeLogitsAndIgnoredOnes) {
  Matrix x(3, 3);
  x.col(0) << 1e38F, -1e38F, 0.0F;  // the target is infinitely unlikely, or certain: finite in double
  x.col(1) << 1e38F, -1e38F, 0.0F;
  x.col(2).setConstant(std::nanf(""));  // nobody looks
  const CrossEntropy got = cross_entropy(x, {0, 1, -100});
  EXPECT_EQ(got.counted, 2U);
  EXPECT_NEAR(got.loss, 1e38, 1e32);
  EXPECT_EQ(x.col(0), Eigen::Vector3f::Zero());
  EXPECT_EQ(x.col(1), Eigen::Vector3f(0.5F, -0.5F, 0.0F));
  EXPECT_EQ(x.col(2), Eigen::Vector3f::Zero());

  Matrix nothing = Matrix::Ones(3, 2), none(3, 0);
  EXPECT_EQ(cross_entropy(nothing, {-100, -100}).loss, 0.0);
  EXPECT_EQ(nothing, Matrix::Zero(3, 2));
  EXPECT_EQ(cross_entropy(none, {}).counted, 0U);
}

TEST(CrossEntropy, WrongInputsAreNamed) {
  const Matrix logits = random_matrix(1, 5, 40, 1.0F);
  Targets targets = random_targets(2, 5, 40);
  for (const std::int32_t bad : {5, -1, 1000000}) {
    Targets wrong = targets;
    wrong[34] = bad;
    Matrix x = logits;
    expect_error([&] { cross_entropy(x, wrong); },
                 "target of token 34 is " + std::to_string(bad) + ", expected 0 to 4");
    EXPECT_EQ(x, logits);
  }
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {std::nanf(""), inf, -inf}) {
    Matrix x = logits;
    x(3, 36) = bad;
    x(3, 39) = bad;
    ThreadPool pool(2);
    TrainOptions options;
    options.pool = &pool;
    expect_error([&] { cross_entropy(x, targets, {}, options); }, "logits of token 36 ");
  }
  Matrix x = logits;
  expect_error([&] { cross_entropy(x, Targets(39, 0)); }, "39 targets for 40 tokens");
  CrossEntropyOptions how;
  how.divisor = -1.0;
  expect_error([&] { cross_entropy(x, targets, how); }, "divisor is -1");
}

TEST(LinearCrossEntropy, IsProductsAndCrossEntropy) {
  constexpr Eigen::Index dim = 12, vocabulary = 150;
  const RowMajorMatrix e = random_matrix(1, vocabulary, dim, 0.5F);
  for (const Eigen::Index tokens : {1, 31, 100}) {
    const Matrix h = random_matrix(2, dim, tokens, 1.0F);
    Targets targets = random_targets(3, vocabulary, tokens);
    for (Eigen::Index t = 32; t < std::min<Eigen::Index>(tokens, 64); ++t)
      targets[static_cast<std::size_t>(t)] = -100;  // a chunk that nobody asks for
    const auto n = static_cast<double>(counted(targets));
    Double dlogits;
    const Double logits = e.cast<double>() * h.cast<double>();
    const double loss = naive(logits, targets, n, &dlogits);
    const Double dh_want = e.cast<double>().transpose() * dlogits;
    const Double de_want = dlogits * h.cast<double>().transpose();
    for (const Eigen::Index chunk : {0, 1, 32, 1000}) {
      CrossEntropyOptions how;
      how.chunk = chunk;
      Matrix dh = Matrix::Constant(dim, tokens, 7.0F);
      RowMajorMatrix de = RowMajorMatrix::Ones(vocabulary, dim);
      MatrixRef dh_ref(dh);
      RowMajorRef de_ref(de);
      const CrossEntropy got = linear_cross_entropy(h, e, targets, &dh_ref, &de_ref, how);
      // Logits of size 2, sums of 12 products, are off by some 12 ulp of 2: well within the tolerance above.
      EXPECT_NEAR(got.loss, loss, 2 * tolerance);
      EXPECT_LE((dh.cast<double>() - dh_want).cwiseAbs().maxCoeff(), 8 * tolerance / n);
      // Every token adds what is rounded at 1.
      EXPECT_LE((de.cast<double>().array() - 1.0 - de_want.array()).abs().maxCoeff(), 8 * tolerance);
      EXPECT_EQ(linear_cross_entropy(h, e, targets, nullptr, nullptr, how).loss, got.loss);

      Workspace memory;
      how.logits = &memory;
      for (const int threads : {2, 3}) {
        ThreadPool pool(threads);
        TrainOptions options;
        options.pool = &pool;
        Matrix dh2(dim, tokens);
        RowMajorMatrix de2 = RowMajorMatrix::Ones(vocabulary, dim);
        MatrixRef dh2_ref(dh2);
        RowMajorRef de2_ref(de2);
        EXPECT_EQ(linear_cross_entropy(h, e, targets, &dh2_ref, &de2_ref, how, options).loss, got.loss);
        EXPECT_EQ(dh2, dh);
        EXPECT_EQ(de2, de);
      }
    }
  }
}

TEST(LinearCrossEntropy, AccumulatedBatchesAreOneBatch) {
  const RowMajorMatrix e = random_matrix(1, 20, 6, 1.0F);
  const Matrix h = random_matrix(2, 6, 64, 1.0F);
  const Targets targets = random_targets(3, 20, 64);
  CrossEntropyOptions how;
  how.chunk = 32;
  RowMajorMatrix whole = RowMajorMatrix::Zero(20, 6), parts = whole;
  RowMajorRef whole_ref(whole), parts_ref(parts);
  const double loss = linear_cross_entropy(h, e, targets, nullptr, &whole_ref, how).loss;
  how.divisor = static_cast<double>(counted(targets));
  double sum = 0.0;
  for (const Eigen::Index first : {0, 32})
    sum += linear_cross_entropy(h.middleCols(first, 32), e,
                                Targets(targets.begin() + first, targets.begin() + first + 32), nullptr,
                                &parts_ref, how)
               .loss;
  EXPECT_NEAR(sum, loss, 1e-14 * loss);  // two sums in double
  EXPECT_EQ(parts, whole);
}

TEST(LinearCrossEntropy, WrongInputsAreNamed) {
  const RowMajorMatrix e = random_matrix(1, 20, 6, 1.0F);
  Matrix h = random_matrix(2, 6, 40, 1.0F);
  const Targets targets(40, 3);
  Matrix wrong(5, 40);
  MatrixRef wrong_ref(wrong);
  expect_error([&] { linear_cross_entropy(wrong, e, targets, nullptr, nullptr); }, "h is 5 x 40, expected 6 x 40");
  expect_error([&] { linear_cross_entropy(h, e, targets, &wrong_ref, nullptr); }, "dh is 5 x 40, expected 6 x 40");
  expect_error([&] { linear_cross_entropy(h, e, Targets(40, 20), nullptr, nullptr); }, "target of token 0 is 20");
  h(2, 35) = std::nanf("");
  CrossEntropyOptions how;
  how.chunk = 16;
  expect_error([&] { linear_cross_entropy(h, e, targets, nullptr, nullptr, how); }, "logits of token 35 ");
}

}  // namespace
