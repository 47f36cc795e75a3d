// Backward functions against central differences, in double, of forward functions written from their equations.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "nibble/gemm/matmul.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/nn/gate.hpp"
#include "nibble/nn/norm.hpp"
#include "nibble/nn/rope.hpp"
#include "nibble/quantize/quantizer.hpp"
#include "nibble/train/attention.hpp"
#include "nibble/train/linear.hpp"
#include "nibble/train/rms_norm.hpp"
#include "nibble/train/swiglu.hpp"

namespace {

using namespace nibble;
using Matrix = Eigen::MatrixXf;
using Double = Eigen::MatrixXd;
using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

Matrix random_matrix(unsigned seed, Eigen::Index rows, Eigen::Index cols, float size = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, size);
  Matrix m(rows, cols);
  for (Eigen::Index i = 0; i < m.size(); ++i) m.data()[i] = normal(random);
  return m;
}

/// d loss / d at, element by element. With h = 2^-17 and third derivatives of order 1, the difference quotient is off by
/// h^2 / 6 ~ 1e-11 and by the loss' rounding over h, 1e-16 |loss| 2^17 ~ 1e-11 |loss|.
Double differences(Double at, const std::function<double(const Double&)>& loss) {
  constexpr double h = 0x1p-17;
  Double out(at.rows(), at.cols());
  for (Eigen::Index i = 0; i < at.size(); ++i) {
    const double middle = at.data()[i];
    at.data()[i] = middle + h;
    const double above = loss(at);
    at.data()[i] = middle - h;
    const double below = loss(at);
    at.data()[i] = middle;
    out.data()[i] = (above - below) / (2.0 * h);
  }
  return out;
}

/// Every gradient here is a chain of at most four sums of at most `terms` terms whose sizes are a few times the largest
/// gradient's: in float it is off by at most about 4 * terms * 2^-24 of that few-fold, taken as 8. The differences are
/// exact beside it. A wrong term would be wrong by whole percents.
void expect_near(const Matrix& got, const Double& want, Eigen::Index terms) {
  ASSERT_EQ(got.rows(), want.rows());
  ASSERT_EQ(got.cols(), want.cols());
  const double largest = want.cwiseAbs().maxCoeff();
  ASSERT_GT(largest, 0.0);
  const double tolerance = 32.0 * static_cast<double>(terms) * 0x1p-24 * largest + 1e-8;
  ASSERT_LT(tolerance, 0.01 * largest);
  EXPECT_LE((got.cast<double>() - want).cwiseAbs().maxCoeff(), tolerance);
}

double inner(const Matrix& dy, const Double& y) { return (dy.cast<double>().array() * y.array()).sum(); }

TEST(Linear, Gradients) {
  const Matrix w = random_matrix(1, 21, 13), x = random_matrix(2, 13, 9), dy = random_matrix(3, 21, 9);
  Matrix dx(13, 9), dw(21, 13);
  linear_backward_input(w, dy, dx);
  linear_backward_weight(dy, x, dw);
  expect_near(dx, differences(x.cast<double>(), [&](const Double& v) { return inner(dy, w.cast<double>() * v); }),
              21);
  expect_near(dw, differences(w.cast<double>(), [&](const Double& v) { return inner(dy, v * x.cast<double>()); }),
              9);
  // Row-major weights: the same bits.
  const RowMajor wr = w;
  RowMajor dwr(21, 13);
  Matrix dxr(13, 9);
  linear_backward_input(wr, dy, dxr);
  linear_backward_weight(dy, x, dwr);
  EXPECT_EQ(dxr, dx);
  EXPECT_EQ(Matrix(dwr), dw);
  // Accumulation: one rounding more an element.
  linear_backward_weight(dy, x, dwr, {}, Gradient::add);
  linear_backward_input(w, dy, dx, {}, Gradient::add);
  EXPECT_EQ(Matrix(dwr), 2.0F * dw);
  EXPECT_EQ(dx, 2.0F * dxr);
}

// Few columns take another way through gemm(), where the sum must not be added to itself.
TEST(Linear, AddsToFewColumns) {
  ThreadPool pool(2);
  TrainOptions options;
  options.pool = &pool;
  for (const Eigen::Index k : {1, 2, 3, 4, 5, 8, 9}) {
    const Matrix dy = random_matrix(1, 150, 7), x = random_matrix(2, k, 7), before = random_matrix(3, 150, k);
    Matrix product(150, k), dw = before;
    RowMajor rows = before;
    linear_backward_weight(dy, x, product);
    linear_backward_weight(dy, x, dw, options, Gradient::add);
    linear_backward_weight(dy, x, rows, options, Gradient::add);
    EXPECT_EQ(dw, product + before) << k;
    EXPECT_EQ(Matrix(rows), product + before) << k;
  }
}

// gemm() in bfloat16 is matmul() of packed bf16 weights, whatever the orders in memory.
TEST(Linear, Bf16ProductsAreThoseOfPackedWeights) {
  Scheme bf16;
  bf16.format = Format::bf16;
  ThreadPool pool(3);
  for (const Eigen::Index n : {1, 16, 37})
    for (const Eigen::Index k : {1, 2, 7, 300})
      for (const Eigen::Index m : {1, 3, 12, 29, 300}) {
        const Matrix a = random_matrix(1, n, k), b = random_matrix(2, k, m);
        const RowMajor ar = a, br = b;
        MatmulOptions options;
        options.activations = Activations::bf16;
        Matrix want(n, m), got(n, m);
        matmul(pack(DynamicQuantizer(bf16).quantize(a)), b, want, options);
        options.pool = &pool;
        gemm(a, b, got, options);
        ASSERT_EQ(got, want) << n << " " << k << " " << m;
        got.setZero();
        gemm(ar, br, got, options);
        ASSERT_EQ(got, want) << n << " " << k << " " << m;
        options.epilogue.add(got);
        gemm(ar, b, got, options);
        ASSERT_EQ(got, 2.0F * want) << n << " " << k << " " << m;
      }
  Matrix strided = random_matrix(3, 40, 60), out(20, 15), want(20, 15);
  const auto every_other = [](Matrix& of, Eigen::Index rows, Eigen::Index cols) {
    return Eigen::Map<Matrix, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>(
        of.data(), rows, cols, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>(80, 2));
  };
  MatmulOptions options;
  options.activations = Activations::bf16;
  gemm(every_other(strided, 20, 20), every_other(strided, 20, 15), out, options);
  gemm(Matrix(every_other(strided, 20, 20)), Matrix(every_other(strided, 20, 15)), want, options);
  EXPECT_EQ(out, want);
}

TEST(RmsNorm, Gradients) {
  const float epsilon = 1e-3F;
  for (const Eigen::Index n : {1, 7, 48}) {
    const Eigen::Index tokens = 70;  // more than two chunks
    const Matrix x = random_matrix(1, n, tokens), dy = random_matrix(2, n, tokens);
    const Eigen::VectorXf weight = random_matrix(3, n, 1).col(0);
    const auto forward = [&](const Double& xs, const Double& w) {
      Double y(n, tokens);
      for (Eigen::Index t = 0; t < tokens; ++t) {
        const double f =
            1.0 / std::sqrt(xs.col(t).squaredNorm() / static_cast<double>(n) + static_cast<double>(epsilon));
        y.col(t) = xs.col(t).cwiseProduct(w.col(0)) * f;
      }
      return y;
    };
    Matrix dx(n, tokens);
    Eigen::VectorXf dweight;
    rms_norm_backward(x, weight, epsilon, dy, dx, &dweight);
    const Double w = weight.cast<double>();
    if (n > 1)  // x / |x| has next to no gradient: the epsilon's alone, in which float loses all digits
      expect_near(dx, differences(x.cast<double>(), [&](const Double& v) { return inner(dy, forward(v, w)); }), n);
    expect_near(dweight, differences(w, [&](const Double& v) { return inner(dy, forward(x.cast<double>(), v)); }),
                tokens);
    // A residual's gradient on top, in place.
    const Matrix more = random_matrix(4, n, tokens);
    const ConstMatrixRef more_ref(more);
    Matrix in_place = dy;
    rms_norm_backward(x, weight, epsilon, in_place, in_place, nullptr, &more_ref);
    EXPECT_EQ(in_place, more + dx);
  }
}

TEST(Rope, TurnsBack) {
  RopeOptions options;
  options.dimensions = 6;
  options.positions = 40;
  Rope rope(options);
  rope.prepare(40);
  // The gradient of y = R x is R^T dy: <R x, dy> = <x, R^T dy> for all x, dy; R's columns are R of unit vectors.
  for (const std::size_t position : {0U, 1U, 39U}) {
    Matrix forward = Matrix::Identity(8, 8), back = Matrix::Identity(8, 8);
    for (Eigen::Index c = 0; c < 8; ++c) {
      rope.apply(forward.col(c).data(), 1, 8, position, 0.25F);
      rope.apply_inverse(back.col(c).data(), 1, 8, position, 0.25F);
    }
    EXPECT_EQ(back, forward.transpose());
    // Sines and cosines are rounded to 2^-24, so squares add up to 1 within a few of these.
    EXPECT_TRUE((16.0F * forward * back).isApprox(Matrix::Identity(8, 8), 1e-6F));
  }
  EXPECT_THROW(rope.apply_inverse(nullptr, 1, 8, 40), InvalidArgument);
}

TEST(SiluMultiply, Gradients) {
  for (const Eigen::Index n : {1, 16, 37}) {
    const Matrix gate = random_matrix(1, n, 40, 2.0F), up = random_matrix(2, n, 40), dy = random_matrix(3, n, 40);
    const auto forward = [](const Double& g, const Double& u) {
      return Double(u.array() * g.array() / (1.0 + (-g.array()).exp()));
    };
    Matrix dgate(n, 40), dup(n, 40);
    silu_multiply_backward(gate, up, dy, dgate, dup);
    const Double g = gate.cast<double>(), u = up.cast<double>();
    expect_near(dgate, differences(g, [&](const Double& v) { return inner(dy, forward(v, u)); }), 4);
    expect_near(dup, differences(u, [&](const Double& v) { return inner(dy, forward(g, v)); }), 4);
  }
  // Far out: gradients of 1 and 0, never NaN.
  Matrix gate(2, 1), one = Matrix::Ones(2, 1), dgate(2, 1), dup(2, 1);
  gate << 200.0F, -200.0F;
  silu_multiply_backward(gate, one, one, dgate, dup);
  EXPECT_EQ(dgate(0), 1.0F);
  EXPECT_EQ(dup(0), 200.0F);
  EXPECT_NEAR(dgate(1), 0.0F, 1e-30F);
  EXPECT_NEAR(dup(1), 0.0F, 1e-30F);
}

/// Attention as its equations say, one query at a time.
Double naive_attention(const AttentionShape& shape, const Double& q, const Double& k, const Double& v) {
  Double out = Double::Zero(q.rows(), q.cols());
  const auto size = static_cast<Eigen::Index>(shape.head_size), window = static_cast<Eigen::Index>(shape.window);
  const auto shared = static_cast<Eigen::Index>(shape.heads / shape.kv_heads);
  for (Eigen::Index h = 0; h < static_cast<Eigen::Index>(shape.heads); ++h)
    for (Eigen::Index t = 0; t < q.cols(); ++t) {
      const Eigen::Index first = t / window * window, seen = t - first + 1;
      const auto keys = k.block(h / shared * size, first, size, seen);
      const auto values = v.block(h / shared * size, first, size, seen);
      Eigen::ArrayXd scores = (keys.transpose() * q.block(h * size, t, size, 1)).col(0).array();
      scores = (scores - scores.maxCoeff()).exp();
      out.block(h * size, t, size, 1) = values * (scores / scores.sum()).matrix();
    }
  return out;
}

TEST(Attention, ForwardAndGradients) {
  // Windows shorter and longer than a block of queries, a last one that is shorter, one head a key and several.
  struct Case {
    AttentionShape shape;
    Eigen::Index tokens;
  };
  for (const Case& c :
       {Case{{2, 2, 4, 5}, 12}, Case{{3, 1, 4, 70}, 90}, Case{{4, 2, 3, 1}, 3}, Case{{6, 2, 5, 9}, 9}}) {
    const auto rows = static_cast<Eigen::Index>(c.shape.heads * c.shape.head_size);
    const auto kv_rows = static_cast<Eigen::Index>(c.shape.kv_heads * c.shape.head_size);
    const Matrix q = random_matrix(1, rows, c.tokens), k = random_matrix(2, kv_rows, c.tokens),
                 v = random_matrix(3, kv_rows, c.tokens), dout = random_matrix(4, rows, c.tokens);
    const Double qd = q.cast<double>(), kd = k.cast<double>(), vd = v.cast<double>();
    Matrix out(rows, c.tokens);
    causal_attention(c.shape, q, k, v, out);
    expect_near(out, naive_attention(c.shape, qd, kd, vd), static_cast<Eigen::Index>(c.shape.window));
    Matrix dq(rows, c.tokens), dk(kv_rows, c.tokens), dv(kv_rows, c.tokens);
    causal_attention_backward(c.shape, q, k, v, dout, dq, dk, dv);
    const auto terms = static_cast<Eigen::Index>(c.shape.window * c.shape.heads);
    const auto loss = [&](const Double& a, const Double& b, const Double& d) {
      return inner(dout, naive_attention(c.shape, a, b, d));
    };
    if (c.shape.window > 1) {
      expect_near(dq, differences(qd, [&](const Double& x) { return loss(x, kd, vd); }), terms);
      expect_near(dk, differences(kd, [&](const Double& x) { return loss(qd, x, vd); }), terms);
    } else {  // one key: its weight is 1 whatever the scores are
      EXPECT_EQ(dq, Matrix::Zero(rows, c.tokens));
      EXPECT_EQ(dk, Matrix::Zero(kv_rows, c.tokens));
    }
    expect_near(dv, differences(vd, [&](const Double& x) { return loss(qd, kd, x); }), terms);

    // Bits of any number of threads.
    ThreadPool pool(3);
    Workspace workspace;
    TrainOptions options;
    options.pool = &pool;
    options.workspace = &workspace;
    Matrix out2 = out, dq2 = dq, dk2 = dk, dv2 = dv;
    causal_attention(c.shape, q, k, v, out2, options);
    causal_attention_backward(c.shape, q, k, v, dout, dq2, dk2, dv2, options);
    EXPECT_EQ(out2, out);
    EXPECT_EQ(dq2, dq);
    EXPECT_EQ(dk2, dk);
    EXPECT_EQ(dv2, dv);
  }
}

TEST(Threads, NeverChangeBits) {
  ThreadPool pool(4);
  TrainOptions options;
  options.pool = &pool;
  const Eigen::Index n = 50, tokens = 300;
  const Matrix x = random_matrix(1, n, tokens), y = random_matrix(2, n, tokens), d = random_matrix(3, n, tokens);
  const Eigen::VectorXf weight = random_matrix(4, n, 1).col(0);
  Matrix a(n, tokens), b(n, tokens), a2 = a, b2 = b;
  Eigen::VectorXf dw, dw2;
  rms_norm_backward(x, weight, 1e-5F, d, a, &dw);
  rms_norm_backward(x, weight, 1e-5F, d, a2, &dw2, nullptr, options);
  EXPECT_EQ(a, a2);
  EXPECT_EQ(dw, dw2);
  silu_multiply_backward(x, y, d, a, b);
  silu_multiply_backward(x, y, d, a2, b2, options);
  EXPECT_EQ(a, a2);
  EXPECT_EQ(b, b2);
}

TEST(Shapes, WrongOnesAreRefused) {
  Matrix a = Matrix::Ones(4, 3), b = Matrix::Ones(4, 2), c = Matrix::Ones(4, 3);
  const Eigen::VectorXf weight = Eigen::VectorXf::Ones(4), wrong = Eigen::VectorXf::Ones(3);
  EXPECT_THROW(rms_norm_backward(a, wrong, 1e-5F, a, c), InvalidArgument);
  EXPECT_THROW(rms_norm_backward(a, weight, 1e-5F, b, c), InvalidArgument);
  EXPECT_THROW(silu_multiply_backward(a, b, a, c, c), InvalidArgument);
  EXPECT_THROW(linear_backward_weight(a, b, MatrixRef(c)), InvalidArgument);
  EXPECT_THROW(linear_backward_input(Matrix::Ones(3, 4), a, c), InvalidArgument);
  Matrix dk(2, 3), dv(2, 3), dq(4, 3);
  const Matrix kv = Matrix::Ones(2, 3);
  EXPECT_THROW(causal_attention(AttentionShape{3, 2, 2, 4}, a, kv, kv, c), InvalidArgument);
  EXPECT_THROW(causal_attention(AttentionShape{2, 1, 2, 0}, a, kv, kv, c), InvalidArgument);
  EXPECT_THROW(causal_attention_backward(AttentionShape{2, 1, 2, 4}, a, kv, kv, b, dq, dk, dv), InvalidArgument);
  EXPECT_THROW(causal_attention_backward(AttentionShape{2, 2, 2, 4}, a, kv, kv, a, dq, dk, dv), InvalidArgument);
}

}  // namespace
