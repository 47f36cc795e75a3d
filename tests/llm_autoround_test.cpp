// A block's gradients against differences of a naive block in double, and AutoRound of a block.
// NIBBLE_THREADED_TEST
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <vector>

#include "llm/block.hpp"
#include "llm/block_training.hpp"
#include "llm/ptq/autoround_step.hpp"
#include "llm_support.hpp"
#include "nibble/ptq/weight_grids.hpp"

namespace {

using namespace llm;
using llm_test::random_matrix;
using Double = Eigen::MatrixXd;

FloatBlock random_block(const Hparams& h, unsigned seed) {
  std::mt19937 random(seed);
  FloatBlock block;
  for (const BlockMatrix m : block_matrices) {
    const MatrixShape s = shape_of(h, m);
    block[m] = random_matrix(random, s.rows, s.cols, 1.0F / std::sqrt(static_cast<float>(s.cols)));
  }
  block.attention_norm = random_matrix(random, static_cast<Eigen::Index>(h.dim), 1, 0.2F).array() + 1.0F;
  block.ffn_norm = random_matrix(random, static_cast<Eigen::Index>(h.dim), 1, 0.2F).array() + 1.0F;
  return block;
}

/// A block as its equations say, a token at a time, in double.
struct NaiveBlock {
  Hparams h;
  std::size_t window;
  std::array<Double, 7> matrices;
  Eigen::VectorXd attention_norm, ffn_norm;

  NaiveBlock(const Hparams& hparams, std::size_t w, const FloatBlock& b) : h(hparams), window(w) {
    for (std::size_t m = 0; m < 7; ++m) matrices[m] = b.matrices[m].cast<double>();
    attention_norm = b.attention_norm.cast<double>();
    ffn_norm = b.ffn_norm.cast<double>();
  }
  Double norm(const Double& x, const Eigen::VectorXd& weight) const {
    Double y = x;
    for (Eigen::Index t = 0; t < x.cols(); ++t)
      y.col(t) = x.col(t).cwiseProduct(weight) / std::sqrt(x.col(t).squaredNorm() / static_cast<double>(x.rows()) +
                                                           static_cast<double>(h.rms_epsilon));
    return y;
  }
  void turn(Double& x) const {
    const auto size = static_cast<Eigen::Index>(h.head_size), turned = static_cast<Eigen::Index>(h.rope_size);
    for (Eigen::Index t = 0; t < x.cols(); ++t)
      for (Eigen::Index head = 0; head < x.rows(); head += size)
        for (Eigen::Index i = 0; i < turned; i += 2) {
          const double angle = static_cast<double>(static_cast<std::size_t>(t) % window) *
                               std::pow(h.rope_base, -static_cast<double>(i) / static_cast<double>(turned));
          const double a = x(head + i, t), b = x(head + i + 1, t);
          x(head + i, t) = a * std::cos(angle) - b * std::sin(angle);
          x(head + i + 1, t) = a * std::sin(angle) + b * std::cos(angle);
        }
  }
  Double forward(const Double& x) const {
    const Double n = norm(x, attention_norm);
    Double q = matrices[0] * n, k = matrices[1] * n;
    const Double v = matrices[2] * n;
    turn(q);
    turn(k);
    Double attended = Double::Zero(q.rows(), q.cols());
    const auto size = static_cast<Eigen::Index>(h.head_size), w = static_cast<Eigen::Index>(window);
    for (Eigen::Index head = 0; head < static_cast<Eigen::Index>(h.heads); ++head) {
      const Eigen::Index kv = head / static_cast<Eigen::Index>(h.heads / h.kv_heads) * size;
      for (Eigen::Index t = 0; t < x.cols(); ++t) {
        const Eigen::Index first = t / w * w, seen = t - first + 1;
        Eigen::ArrayXd p =
            (k.block(kv, first, size, seen).transpose() * q.block(head * size, t, size, 1)).col(0).array() /
            std::sqrt(static_cast<double>(size));
        p = (p - p.maxCoeff()).exp();
        attended.block(head * size, t, size, 1) = v.block(kv, first, size, seen) * (p / p.sum()).matrix();
      }
    }
    const Double hidden = x + matrices[3] * attended;
    const Double m = norm(hidden, ffn_norm);
    const Double gate = matrices[4] * m, up = matrices[5] * m;
    return hidden + matrices[6] * Double(up.array() * gate.array() / (1.0 + (-gate.array()).exp()));
  }
};

struct Problem {
  Hparams h = llm_test::small_hparams();
  static constexpr std::size_t window = 9;
  FloatBlock block;
  Eigen::MatrixXf x, dy;
  explicit Problem(std::size_t rope_size = 8) {
    h.rope_size = rope_size;
    block = random_block(h, 5);
    std::mt19937 random(6);
    x = random_matrix(random, static_cast<Eigen::Index>(h.dim), 22, 1.0F);  // two windows and a shorter one
    dy = random_matrix(random, static_cast<Eigen::Index>(h.dim), 22, 1.0F);
  }
  BlockOptions options(nibble::ThreadPool* pool = nullptr) const {
    BlockOptions o;
    o.window = window;
    o.pool = pool;
    return o;
  }
};

constexpr std::array<bool, 7> all = {true, true, true, true, true, true, true};

TEST(BlockTrainer, ForwardIsTheBlock) {
  const Problem p;
  BlockTrainer trainer(p.h, p.options());
  const Eigen::MatrixXf y = trainer.forward(p.block, p.x);
  // Chains of sums of at most 80 terms of order 1, seven products deep: 7 * 80 * 2^-24 = 3e-5 of values of order 1.
  const Double naive = NaiveBlock(p.h, Problem::window, p.block).forward(p.x.cast<double>());
  EXPECT_LE((y.cast<double>() - naive).cwiseAbs().maxCoeff(), 2e-4);
  BlockRunner runner(p.h, p.options());
  Eigen::MatrixXf other(y.rows(), y.cols());
  runner.forward(p.block, p.x, other);
  EXPECT_LE((y - other).cwiseAbs().maxCoeff(), 2e-4F);
}

TEST(BlockTrainer, GradientsAreDifferencesOfTheNaiveBlock) {
  for (const std::size_t rope_size : {8U, 4U}) {
    const Problem p(rope_size);
    BlockTrainer trainer(p.h, p.options());
    trainer.forward(p.block, p.x);
    BlockGradients gradients;
    Eigen::MatrixXf dx;
    trainer.backward(p.block, p.x, p.dy, gradients, all, &dx);
    NaiveBlock naive(p.h, Problem::window, p.block);
    Double x = p.x.cast<double>();
    const auto loss = [&] { return (p.dy.cast<double>().array() * naive.forward(x).array()).sum(); };
    // Differences with h = 2^-17 are right to h^2 and 1e-16 * loss / h: 1e-9. Float gradients are sums of up to 22 * 80
    // products through twice the depth of the forward pass: about sqrt(1760) * 14 * 2^-24 = 4e-5 of the largest, taken
    // five times. Some elements of each are looked at, at steps that share no factor with the sizes.
    const auto check = [&](double* at, const float* got, Eigen::Index size, float largest, const char* name) {
      for (Eigen::Index i = 0; i < size; i += std::max<Eigen::Index>(1, size / 37)) {
        constexpr double h = 0x1p-17;
        const double middle = at[i];
        at[i] = middle + h;
        const double above = loss();
        at[i] = middle - h;
        const double below = loss();
        at[i] = middle;
        ASSERT_NEAR(static_cast<double>(got[i]), (above - below) / (2.0 * h), 2e-4 * static_cast<double>(largest))
            << name << " " << i;
      }
    };
    for (const BlockMatrix m : block_matrices) {
      const Eigen::MatrixXf columns = gradients[m];
      check(naive.matrices[static_cast<std::size_t>(m)].data(), columns.data(), columns.size(),
            columns.cwiseAbs().maxCoeff(), name_of(m));
    }
    check(naive.attention_norm.data(), gradients.attention_norm.data(), gradients.attention_norm.size(),
          gradients.attention_norm.cwiseAbs().maxCoeff(), "attention norm");
    check(naive.ffn_norm.data(), gradients.ffn_norm.data(), gradients.ffn_norm.size(),
          gradients.ffn_norm.cwiseAbs().maxCoeff(), "ffn norm");
    check(x.data(), dx.data(), dx.size(), dx.cwiseAbs().maxCoeff(), "x");
  }
}

TEST(BlockTrainer, ThreadsAndWhatIsWantedChangeNoBits) {
  const Problem p;
  nibble::ThreadPool pool(3);
  BlockTrainer one(p.h, p.options()), three(p.h, p.options(&pool));
  EXPECT_EQ(one.forward(p.block, p.x), three.forward(p.block, p.x));
  BlockGradients a, b, some;
  Eigen::MatrixXf dx, dx3;
  one.backward(p.block, p.x, p.dy, a, all, &dx);
  three.backward(p.block, p.x, p.dy, b, all, &dx3);
  EXPECT_EQ(dx, dx3);
  EXPECT_EQ(a.ffn_norm, b.ffn_norm);
  EXPECT_EQ(a.attention_norm, b.attention_norm);
  for (const BlockMatrix m : block_matrices) {
    EXPECT_EQ(a[m], b[m]) << name_of(m);
    std::array<bool, 7> wanted{};
    wanted[static_cast<std::size_t>(m)] = true;
    some = {};
    one.backward(p.block, p.x, p.dy, some, wanted);
    for (const BlockMatrix other : block_matrices) {
      if (other == m)
        EXPECT_EQ(some[m], a[m]) << name_of(m);
      else
        EXPECT_EQ(some[other].size(), 0);
    }
  }
}

struct Calibration {
  Hparams h = llm_test::small_hparams();
  FloatBlock block = random_block(h, 8);
  std::vector<Eigen::MatrixXf> x, y;
  std::array<nibble::QuantizedTensor, 7> start{};
  explicit Calibration(nibble::Format down = nibble::Format::int4) {
    std::mt19937 random(9);
    BlockOptions options;
    options.window = 16;
    BlockRunner runner(h, options);
    for (int i = 0; i < 6; ++i) {
      x.push_back(random_matrix(random, static_cast<Eigen::Index>(h.dim), 16, 1.0F));
      y.push_back(x.back());
      runner.forward(block, x.back(), y.back());
    }
    for (const BlockMatrix m : block_matrices) {
      const nibble::Scheme s = m == BlockMatrix::down
                                   ? llm_test::scheme_of(down)
                                   : llm_test::scheme_of(nibble::Format::int4, nibble::Symmetry::asymmetric);
      start[static_cast<std::size_t>(m)] = nibble::DynamicQuantizer(s).quantize(block[m]);
    }
  }
  double loss(const std::array<nibble::QuantizedTensor, 7>& tensors, bool relative) const {
    FloatBlock q = block;
    for (const BlockMatrix m : block_matrices) tensors[static_cast<std::size_t>(m)].dequantize(q[m].data());
    BlockOptions options;
    options.window = 16;
    BlockRunner runner(h, options);
    double sum = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      Eigen::MatrixXf out(x[i].rows(), x[i].cols());
      runner.forward(q, x[i], out);
      for (Eigen::Index t = 0; t < out.cols(); ++t) {
        const double weight =
            relative ? static_cast<double>(h.dim) / static_cast<double>(y[i].col(t).squaredNorm()) : 1.0;
        sum += weight * static_cast<double>((out.col(t) - y[i].col(t)).squaredNorm());
      }
    }
    return sum / static_cast<double>(6 * x[0].size());
  }
};

bool same(const nibble::QuantizedTensor& a, const nibble::QuantizedTensor& b) {
  const auto bytes = [](const nibble::Buffer& m, const nibble::Buffer& n) {
    return m.size() == n.size() && (m.empty() || std::memcmp(m.data(), n.data(), m.size()) == 0);
  };
  return bytes(a.codes(), b.codes()) && bytes(a.scales(), b.scales()) && bytes(a.zeros(), b.zeros());
}

TEST(AutoRoundBlock, LowersTheOutputErrorDeterministically) {
  for (const nibble::Format down : {nibble::Format::int4, nibble::Format::nf4, nibble::Format::fp16}) {
    const Calibration c(down);
    nibble::ThreadPool pool(3);
    std::array<nibble::QuantizedTensor, 7> results[3];
    for (int run = 0; run < 3; ++run) {
      BlockOptions options;
      options.window = 16;
      options.pool = run == 1 ? &pool : nullptr;
      BlockTrainer trainer(c.h, options);
      AutoRoundStepOptions step;
      step.iterations = 60;
      step.batch = 4;
      step.seed = run == 2 ? 1 : 0;
      step.relative = down != nibble::Format::nf4;
      std::array<nibble::QuantizedTensor, 7> tensors = c.start;
      const nibble::AutoRoundReport report = autoround_block(trainer, c.block, tensors, c.x, c.y, step);
      EXPECT_LT(report.best_loss, 0.8 * report.start_loss);
      // What is reported is what the tensors do: forward passes differ by their rounding.
      EXPECT_NEAR(report.start_loss, c.loss(c.start, step.relative), 1e-3 * report.start_loss);
      EXPECT_NEAR(report.best_loss, c.loss(tensors, step.relative), 1e-3 * report.best_loss);
      results[run] = tensors;
    }
    bool another = false;
    for (std::size_t m = 0; m < 7; ++m) {
      EXPECT_TRUE(same(results[0][m], results[1][m])) << m;
      another = another || !same(results[0][m], results[2][m]);
      EXPECT_TRUE(results[0][m].scheme() == c.start[m].scheme());
    }
    EXPECT_TRUE(another);
    if (down != nibble::Format::int4) {
      EXPECT_TRUE(same(results[0][6], c.start[6]));
    }
  }
}

TEST(AutoRoundBlock, BadInputsAreRefused) {
  const Calibration c;
  BlockOptions options;
  options.window = 16;
  BlockTrainer trainer(c.h, options);
  std::array<nibble::QuantizedTensor, 7> tensors = c.start;
  AutoRoundStepOptions step;
  step.iterations = 1;
  auto fewer = c.y;
  fewer.pop_back();
  EXPECT_THROW(autoround_block(trainer, c.block, tensors, c.x, fewer, step), nibble::InvalidArgument);
  EXPECT_THROW(autoround_block(trainer, c.block, tensors, {}, {}, step), nibble::InvalidArgument);
  auto shorter = c.y;
  shorter[2].resize(shorter[2].rows(), 15);
  EXPECT_THROW(autoround_block(trainer, c.block, tensors, c.x, shorter, step), nibble::InvalidArgument);
  step.batch = 0;
  EXPECT_THROW(autoround_block(trainer, c.block, tensors, c.x, c.y, step), nibble::InvalidArgument);
  step.batch = 4;
  auto broken = c.x;
  broken[1](3, 4) = std::nanf("");
  EXPECT_THROW(autoround_block(trainer, c.block, tensors, broken, c.y, step), nibble::InvalidArgument);
  for (std::size_t m = 0; m < 7; ++m) EXPECT_TRUE(same(tensors[m], c.start[m]));
}

}  // namespace
