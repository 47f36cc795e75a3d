// Rotations against matrices multiplied out, and the functions of small networks that must not change.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "nibble/core/thread_pool.hpp"
#include "nibble/nn/norm.hpp"
#include "nibble/ptq/fold.hpp"
#include "nibble/ptq/hadamard.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace
using Eigen::Index;

Eigen::MatrixXf normal(Index rows, Index cols, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> d;
  return Eigen::MatrixXf::NullaryExpr(rows, cols, [&] { return d(random); });
}

// A matrix of entries that are one rounding of +-1/sqrt(n), times its transpose, in double: off by 2^-24 * 2 a term of
// 1/n, n terms.
constexpr double rounding = 2.0 * 0x1p-24 + 1e-12;

TEST(Hadamard, EveryEntryIsOneOverRootAndRowsAreOrthogonal) {
  for (const Index n : {1,  2,  4,  8,  12, 16, 20, 24,  28,  36,  40,  44,  48,  56,  60,
                        64, 68, 72, 76, 80, 84, 88, 108, 140, 144, 240, 576, 768, 960, 1536}) {
    SCOPED_TRACE(n);
    for (const bool random : {false, true}) {
      const HadamardRotation r = random ? HadamardRotation(n, 0, 7) : HadamardRotation(n);
      const Eigen::MatrixXf m = r.matrix();
      const auto entry = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
      EXPECT_TRUE((m.array().abs() == entry).all());
      const Eigen::MatrixXd d = m.cast<double>();
      EXPECT_LE((d * d.transpose() - Eigen::MatrixXd::Identity(n, n)).cwiseAbs().maxCoeff(), rounding);
    }
  }
}

TEST(Hadamard, FastProductsAreTheMatrixProducts) {
  for (const Index n : {1, 8, 12, 36, 48, 144, 576}) {
    SCOPED_TRACE(n);
    const HadamardRotation r(n, 0, 5);
    const Eigen::MatrixXd m = r.matrix().cast<double>();
    const Eigen::MatrixXf x = normal(n, 19, 1);
    const Eigen::MatrixXf w = normal(21, n, 2);
    // The matrix's entries are rounded (2^-24 of the sum of |x| / sqrt(n) <= |x|), the result once more.
    const auto near = [](const Eigen::MatrixXf& a, const Eigen::MatrixXd& b) {
      return ((a.cast<double>() - b).cwiseAbs().maxCoeff()) <= 4.0 * 0x1p-24 * b.norm();
    };
    Eigen::MatrixXf y = x;
    r.rotate(y);
    EXPECT_TRUE(near(y, m.transpose() * x.cast<double>()));
    r.unrotate(y);
    EXPECT_LE((y - x).cwiseAbs().maxCoeff(), 4.0F * 0x1p-24F * x.colwise().norm().maxCoeff());
    y = x;
    r.unrotate(y);
    EXPECT_TRUE(near(y, m * x.cast<double>()));
    Eigen::MatrixXf v = w;
    r.rotate_inputs(v);
    EXPECT_TRUE(near(v, w.cast<double>() * m));
    v = w.transpose();
    r.rotate_outputs(v);
    EXPECT_TRUE(near(v, m.transpose() * w.transpose().cast<double>()));
  }
}

TEST(Hadamard, BlocksRepeatOneBlock) {
  const HadamardRotation whole(12, 0, 3);
  const HadamardRotation blocks(48, 12, 3);
  EXPECT_EQ(blocks.block(), 12);
  Eigen::MatrixXf expected = Eigen::MatrixXf::Zero(48, 48);
  for (Index b = 0; b < 4; ++b) expected.block(12 * b, 12 * b, 12, 12) = whole.matrix();
  EXPECT_EQ(blocks.matrix(), expected);
}

TEST(Hadamard, SeedsAndThreads) {
  EXPECT_EQ(HadamardRotation(576, 0, 1).matrix(), HadamardRotation(576, 0, 1).matrix());
  EXPECT_NE(HadamardRotation(576, 0, 1).matrix(), HadamardRotation(576, 0, 2).matrix());
  EXPECT_NE(HadamardRotation(576, 0, 1).matrix(), HadamardRotation(576).matrix());
  ThreadPool pool(3);
  const HadamardRotation r(576, 0, 1);
  const Eigen::MatrixXf x = normal(576, 101, 4);
  Eigen::MatrixXf alone = x;
  Eigen::MatrixXf threads = x;
  r.rotate(alone);
  r.rotate(threads, &pool);
  EXPECT_EQ(alone, threads);
  // A column's bits do not depend on its neighbours.
  Eigen::MatrixXf one = x.col(57);
  r.rotate(one);
  EXPECT_EQ(one, alone.col(57));
  const Eigen::MatrixXf w = x.transpose();
  Eigen::MatrixXf turned = w;
  r.rotate_inputs(turned, &pool);
  EXPECT_EQ(turned, Eigen::MatrixXf(alone.transpose()));
  RowMajorMatrix rows = w;
  r.rotate_inputs(rows);
  EXPECT_EQ(rows, RowMajorMatrix(turned));
  rows = x;
  r.rotate_outputs(rows);
  EXPECT_EQ(rows, RowMajorMatrix(alone));
  // A block of a larger matrix.
  Eigen::MatrixXf large = Eigen::MatrixXf::Constant(580, 101, 3.0F);
  large.middleRows(2, 576) = x;
  r.rotate(large.middleRows(2, 576));
  EXPECT_EQ(Eigen::MatrixXf(large.middleRows(2, 576)), alone);
  EXPECT_TRUE((large.topRows(2).array() == 3.0F).all() && (large.bottomRows(2).array() == 3.0F).all());
}

TEST(Hadamard, AnOutlierIsSpread) {
  Eigen::MatrixXf x = normal(576, 1, 9);
  x(77, 0) = 1000.0F;
  HadamardRotation(576, 0, 1).rotate(x);
  EXPECT_LT(x.cwiseAbs().maxCoeff(), 50.0F);  // 1000 / 24 and noise
}

TEST(Hadamard, LargestBlocks) {
  EXPECT_EQ(hadamard_block(172), 4);
  EXPECT_EQ(hadamard_block(576), 576);
  EXPECT_EQ(hadamard_block(1536), 1536);
  EXPECT_EQ(hadamard_block(44), 44);
  EXPECT_EQ(hadamard_block(7), 1);
  EXPECT_EQ(hadamard_block(24 * 47), 24);  // 47 comes in no order up to 512
}

TEST(Hadamard, RefusesWhatItCannotDo) {
  try {
    HadamardRotation(172);
    FAIL();
  } catch (const Unsupported& e) {
    EXPECT_NE(std::string(e.what()).find("172"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find("order 4"), std::string::npos);
  }
  EXPECT_THROW(HadamardRotation(3), Unsupported);
  EXPECT_THROW(HadamardRotation(0), InvalidArgument);
  EXPECT_THROW(HadamardRotation(-4), InvalidArgument);
  EXPECT_THROW(HadamardRotation(64, 48), InvalidArgument);
  EXPECT_THROW(HadamardRotation(64, -1), InvalidArgument);
  EXPECT_THROW(hadamard_block(0), InvalidArgument);
  const HadamardRotation r(8);
  Eigen::MatrixXf x = Eigen::MatrixXf::Zero(7, 2);
  EXPECT_THROW(r.rotate(x), InvalidArgument);
  EXPECT_THROW(r.rotate_inputs(x), InvalidArgument);
  x = Eigen::MatrixXf::Zero(8, 20);
  x(3, 17) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(r.rotate(x), InvalidArgument);
  x(3, 17) = std::numeric_limits<float>::infinity();
  ThreadPool pool(2);
  EXPECT_THROW(r.unrotate(x, &pool), InvalidArgument);
  Eigen::MatrixXf none(8, 0);
  r.rotate(none);
}

// x -> x + W2 norm(x): rotated, the same function of a rotated state.
TEST(Hadamard, ResidualStreamOfANorm) {
  const Index n = 48;
  const Eigen::MatrixXf x = normal(n, 5, 1);
  Eigen::VectorXf g = normal(n, 1, 2);
  Eigen::MatrixXf reader = normal(30, n, 3);
  Eigen::MatrixXf writer = normal(n, 30, 4);
  const auto run = [&](const Eigen::MatrixXf& in) {
    Eigen::MatrixXf normed(in.rows(), in.cols());
    rms_norm(in, g, 1e-5F, normed);
    return Eigen::MatrixXf(in + writer * (reader * normed).cwiseMax(0.0F));
  };
  const Eigen::MatrixXf expected = run(x);
  fold_norm(g, reader);
  EXPECT_TRUE((g.array() == 1.0F).all());
  const HadamardRotation r(n, 0, 11);
  r.rotate_inputs(reader);
  r.rotate_outputs(writer);
  Eigen::MatrixXf y = x;
  r.rotate(y);
  y = run(y);
  r.unrotate(y);
  // Two products of 30 to 48 terms and a norm, each within some roundings of 2^-24.
  EXPECT_LE((y - expected).norm(), 64.0F * 0x1p-24F * expected.norm());
}

TEST(Fold, GroupedQueries) {
  const HeadLayout layout{4, 2, 3};
  Eigen::VectorXf values(12);
  values << 1, 2, 3, 4, 0, -6, 7, 8, 9, 1, 12, 9;
  Eigen::VectorXf largest(6);
  largest << 4, 2, 3, 7, 12, 9;
  EXPECT_EQ(max_over_queries(values, layout), largest);
  Eigen::VectorXf mean(6);
  mean << 2.5F, 1, -1.5F, 4, 10, 9;
  EXPECT_EQ(mean_over_queries(values, layout), mean);
  Eigen::VectorXf wide(12);
  wide << 4, 2, 3, 4, 2, 3, 7, 12, 9, 7, 12, 9;
  EXPECT_EQ(expand_to_queries(largest, layout), wide);
  EXPECT_THROW(expand_to_queries(values, layout), InvalidArgument);
  EXPECT_THROW(max_over_queries(largest, layout), InvalidArgument);
  EXPECT_THROW(mean_over_queries(largest, layout), InvalidArgument);
  EXPECT_THROW(max_over_queries(values, HeadLayout{4, 3, 3}), InvalidArgument);
}

// o(attention mean of v(x)) with grouped queries, scaled by a factor a kv channel.
TEST(Fold, ValuesIntoOutput) {
  const HeadLayout layout{4, 2, 4};
  const Eigen::MatrixXf x = normal(10, 6, 1);
  Eigen::MatrixXf v = normal(8, 10, 2);
  Eigen::MatrixXf o = normal(10, 16, 3);
  const Eigen::MatrixXf p = normal(6, 6, 4).cwiseAbs();  // any mixing of tokens
  const auto run = [&] {
    const Eigen::MatrixXf values = v * x * p;
    Eigen::MatrixXf heads(16, 6);
    for (Index c = 0; c < 16; ++c) heads.row(c) = values.row(layout.kv_channel(c));
    return Eigen::MatrixXf(o * heads);
  };
  const Eigen::MatrixXf expected = run();
  const Eigen::VectorXf s = normal(8, 1, 5).cwiseAbs().array() + 0.1F;
  RowMajorMatrix rows = v;
  unscale_outputs(rows, s);
  unscale_outputs(v, s);
  EXPECT_EQ(rows, RowMajorMatrix(v));
  scale_inputs(o, expand_to_queries(s, layout));
  // Three products of 6 to 16 terms and two factors, each within some roundings of 2^-24.
  EXPECT_LE((run() - expected).norm(), 64.0F * 0x1p-24F * expected.norm());
  const Eigen::MatrixXf before = o;
  HadamardRotation(8, 4, 3).rotate_outputs(v);
  HadamardRotation(16, 4, 3).rotate_inputs(o);
  EXPECT_GT((o - before).norm(), 0.1F * before.norm());
  EXPECT_LE((run() - expected).norm(), 64.0F * 0x1p-24F * expected.norm());
}

TEST(Fold, NormAndHessian) {
  const Eigen::MatrixXf x = normal(5, 40, 1);
  const Eigen::VectorXf s = normal(5, 1, 2).cwiseAbs().array() + 0.1F;
  const Eigen::MatrixXf scaled = s.cwiseInverse().asDiagonal() * x;
  const Eigen::MatrixXf expected = scaled * scaled.transpose();
  const Eigen::MatrixXf h = unscale_hessian(x * x.transpose(), s);
  EXPECT_LE((h - expected).norm(), 64.0F * 0x1p-24F * expected.norm());
  Eigen::MatrixXf symmetric = x * x.transpose();
  symmetric.triangularView<Eigen::StrictlyLower>() = symmetric.transpose();
  const Eigen::MatrixXf out = unscale_hessian(symmetric, s);
  EXPECT_EQ(out, Eigen::MatrixXf(out.transpose()));
  Eigen::VectorXf norm = Eigen::VectorXf::Constant(5, 2.0F);
  unscale_norm(norm, s);
  EXPECT_EQ(norm, Eigen::VectorXf(2.0F / s.array()));
}

TEST(Fold, RefusesBadInput) {
  Eigen::MatrixXf w = normal(4, 5, 1);
  Eigen::VectorXf s = Eigen::VectorXf::Ones(4);
  EXPECT_THROW(scale_inputs(w, s), InvalidArgument);
  EXPECT_THROW(unscale_hessian(w, s), InvalidArgument);
  for (const float bad :
       {0.0F, -1.0F, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    s[2] = bad;
    EXPECT_THROW(unscale_outputs(w, s), InvalidArgument);
    EXPECT_THROW(unscale_norm(s, s), InvalidArgument);
    EXPECT_THROW(unscale_hessian(Eigen::MatrixXf::Identity(4, 4), s), InvalidArgument);
  }
  Eigen::VectorXf norm = Eigen::VectorXf::Ones(4);
  EXPECT_THROW(fold_norm(norm, w), InvalidArgument);
  EXPECT_THROW(unscale_outputs(w, Eigen::VectorXf::Ones(5)), InvalidArgument);
  EXPECT_THROW(unscale_norm(norm, Eigen::VectorXf::Ones(5)), InvalidArgument);
}

}  // namespace
