// Causal grouped-query attention over whole windows, forward and backward.
//
// A task is one key-value head of one window, with all query heads that share it: gradients of keys and values are sums
// over queries, and stay within a task. Probabilities are computed again in the backward pass, a block of queries at a
// time: stored, they would take more memory than everything else of a block.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>

#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/train/options.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Heads and windows. Queries are heads * head_size x T, keys and values kv_heads * head_size x T; columns
/// [i * window, (i + 1) * window) are one sequence (the last may be shorter), in which each sees itself and those
/// before it. Query head h looks at key-value head h / (heads / kv_heads).
struct AttentionShape {
  std::size_t heads = 0;
  std::size_t kv_heads = 0;
  std::size_t head_size = 0;
  std::size_t window = 0;
};

namespace detail {

class CausalAttention {
 public:
  CausalAttention(const AttentionShape& shape, const ConstMatrixRef& q, const ConstMatrixRef& k,
                  const ConstMatrixRef& v, const TrainOptions& options)
      : q_(q), k_(k), v_(v), options_(options), kernels_(kernels_of(options)) {
    require(shape.heads > 0 && shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0 && shape.head_size > 0 &&
                shape.window > 0,
            "attention has ", shape.heads, " heads, ", shape.kv_heads, " key-value heads of ", shape.head_size,
            " and windows of ", shape.window, ", expected at least 1 of each, and heads a multiple of kv_heads");
    kv_heads_ = static_cast<Eigen::Index>(shape.kv_heads);
    shared_ = static_cast<Eigen::Index>(shape.heads) / kv_heads_;
    size_ = static_cast<Eigen::Index>(shape.head_size);
    window_ = std::min(static_cast<Eigen::Index>(shape.window), q.cols());
    require_shape(q, shared_ * kv_heads_ * size_, q.cols(), "q");
    require_shape(k, kv_heads_ * size_, q.cols(), "k");
    require_shape(v, kv_heads_ * size_, q.cols(), "v");
    // Blocks of queries whose scores stay in the second-level cache, and of which few look at more than they may.
    block_ = std::clamp<Eigen::Index>(192 / shared_, 16, 64);
    product_.isa = options.isa;
  }

  void forward(MatrixRef& out) {
    require_shape(out, q_.rows(), q_.cols(), "out");
    run([&](const Item& item, float* scratch) {
      Scratch s(scratch, *this);
      for (Eigen::Index first = 0; first < item.tokens; first += block_) {
        const Eigen::Index n = std::min(block_, item.tokens - first);
        const Eigen::Index seen = first + n;
        Matrix q = s.take(size_, shared_ * n), p = s.take(seen, shared_ * n), o = s.take(size_, shared_ * n);
        gather(q_, item, first, n, q);
        // As attention() has it, to the bit: the numerators meet the values, then each output is divided.
        Matrix sums = s.take(1, shared_ * n);
        numerators(item, first, n, q, p, sums);
        gemm(v_.block(item.kv_row, item.column, size_, seen), p, o, product_);
        for (Eigen::Index c = 0; c < o.cols(); ++c)
          o.col(c) = ((o.col(c).array() + 0.0F) * (1.0F / sums(0, c))).matrix();
        scatter(o, item, first, n, out);
        s.reset();
      }
    });
  }

  void backward(const ConstMatrixRef& dout, MatrixRef& dq, MatrixRef& dk, MatrixRef& dv) {
    require_shape(dout, q_.rows(), q_.cols(), "dout");
    require_shape(dq, q_.rows(), q_.cols(), "dq");
    require_shape(dk, k_.rows(), k_.cols(), "dk");
    require_shape(dv, v_.rows(), v_.cols(), "dv");
    run([&](const Item& item, float* scratch) {
      Scratch s(scratch, *this);
      // Transposed, so that products read the large operand in its own order.
      Matrix dk_sum = s.take(item.tokens, size_), dv_sum = s.take(item.tokens, size_);
      dk_sum.setZero();
      dv_sum.setZero();
      const Scratch kept = s;
      for (Eigen::Index first = 0; first < item.tokens; first += block_) {
        s = kept;
        const Eigen::Index n = std::min(block_, item.tokens - first);
        const Eigen::Index seen = first + n;
        const auto keys = k_.block(item.kv_row, item.column, size_, seen);
        const auto values = v_.block(item.kv_row, item.column, size_, seen);
        Matrix q = s.take(size_, shared_ * n), d = s.take(size_, shared_ * n);
        Matrix p = s.take(seen, shared_ * n), ds = s.take(seen, shared_ * n);
        gather(q_, item, first, n, q);
        gather(dout, item, first, n, d);
        Matrix sums = s.take(1, shared_ * n);
        probabilities(item, first, n, q, p, sums);
        gemm(values.transpose(), d, ds, product_);
        for (Eigen::Index c = 0; c < ds.cols(); ++c) {
          const float mean = (p.col(c).array() * ds.col(c).array()).sum();
          ds.col(c).array() = p.col(c).array() * (ds.col(c).array() - mean);
        }
        add(p, d, dv_sum.topRows(seen));
        add(ds, q, dk_sum.topRows(seen));
        gemm(keys, ds, q, product_);
        scatter(q, item, first, n, dq);
      }
      dk.block(item.kv_row, item.column, size_, item.tokens) = dk_sum.transpose();
      dv.block(item.kv_row, item.column, size_, item.tokens) = dv_sum.transpose();
    });
  }

 private:
  using Matrix = Eigen::Map<Eigen::MatrixXf, Eigen::Aligned64>;

  struct Item {
    Eigen::Index column;  // the window's first
    Eigen::Index tokens;
    Eigen::Index kv_head;
    Eigen::Index kv_row;
  };

  /// Matrices out of one thread's memory, each at a cache line.
  class Scratch {
   public:
    Scratch(float* memory, const CausalAttention&) : memory_(memory) {}
    Matrix take(Eigen::Index rows, Eigen::Index cols) {
      float* at = memory_ + used_;
      used_ += padded(rows * cols);
      return Matrix(at, rows, cols);
    }
    void reset() { used_ = 0; }

   private:
    float* memory_;
    Eigen::Index used_ = 0;
  };
  static Eigen::Index padded(Eigen::Index floats) { return (floats + 15) / 16 * 16; }

  template <class F>
  void run(F&& f) {
    if (q_.cols() == 0) return;
    const Eigen::Index windows = (q_.cols() + window_ - 1) / window_;
    const Eigen::Index columns = shared_ * std::min(block_, window_);
    const Eigen::Index floats = padded(2 * padded(window_ * size_) + 2 * padded(size_ * columns) +
                                       2 * padded(window_ * columns) + padded(columns) + 16);
    const std::size_t threads = options_.pool == nullptr ? 1 : static_cast<std::size_t>(options_.pool->threads());
    // Products inside take the threads' own workspaces, so this must not be one of them.
    Workspace own;
    Workspace& workspace = options_.workspace == nullptr ? own : *options_.workspace;
    auto* memory = reinterpret_cast<float*>(workspace.take(
        checked_mul(threads * sizeof(float), static_cast<std::size_t>(floats), "attention scratch")));
    for_tasks(options_.pool, static_cast<std::size_t>(windows * kv_heads_),
              [&](std::size_t task, std::size_t thread) {
                const FpEnvironment environment;
                Item item;
                item.column = static_cast<Eigen::Index>(task) / kv_heads_ * window_;
                item.tokens = std::min(window_, q_.cols() - item.column);
                item.kv_head = static_cast<Eigen::Index>(task) % kv_heads_;
                item.kv_row = item.kv_head * size_;
                f(item, memory + static_cast<Eigen::Index>(thread) * floats);
              });
  }

  /// Queries [first, first + n) of all heads that share: head by head, a column each.
  void gather(const ConstMatrixRef& m, const Item& item, Eigen::Index first, Eigen::Index n, Matrix& out) const {
    for (Eigen::Index h = 0; h < shared_; ++h)
      out.middleCols(h * n, n) = m.block((item.kv_head * shared_ + h) * size_, item.column + first, size_, n);
  }
  void scatter(const Matrix& in, const Item& item, Eigen::Index first, Eigen::Index n, MatrixRef& m) const {
    for (Eigen::Index h = 0; h < shared_; ++h)
      m.block((item.kv_head * shared_ + h) * size_, item.column + first, size_, n) = in.middleCols(h * n, n);
  }

  /// p: a column a query, softmax's numerators of the keys that it sees, 0 below; sums: theirs.
  void numerators(const Item& item, Eigen::Index first, Eigen::Index n, const Matrix& q, Matrix& p,
                  Matrix& sums) const {
    gemm(k_.block(item.kv_row, item.column, size_, p.rows()).transpose(), q, p, product_);
    for (Eigen::Index h = 0; h < shared_; ++h) {
      SoftmaxArgs args;
      args.x = p.col(h * n).data();
      args.x_stride = static_cast<std::size_t>(p.rows());
      args.rows = static_cast<std::size_t>(n);
      args.n = static_cast<std::size_t>(p.rows());
      args.first_visible = static_cast<std::size_t>(first) + 1;
      args.sums = sums.data() + h * n;
      kernels_.softmax(args);
    }
  }
  /// p: softmax itself.
  void probabilities(const Item& item, Eigen::Index first, Eigen::Index n, const Matrix& q, Matrix& p,
                     Matrix& sums) const {
    numerators(item, first, n, q, p, sums);
    for (Eigen::Index c = 0; c < p.cols(); ++c) p.col(c) *= 1.0F / sums(0, c);
  }

  /// sum += a b^T.
  template <class Sum>
  void add(const Matrix& a, const Matrix& b, Sum&& sum) const {
    MatmulOptions options = product_;
    options.epilogue.add(sum);
    gemm(a, b.transpose(), sum, options);
  }

  const ConstMatrixRef& q_;
  const ConstMatrixRef& k_;
  const ConstMatrixRef& v_;
  const TrainOptions& options_;
  const KernelTable& kernels_;
  MatmulOptions product_;  // for products inside of a task
  Eigen::Index kv_heads_ = 0, shared_ = 0, size_ = 0, window_ = 0, block_ = 0;
};

}  // namespace detail

/// out = V softmax(K^T q) for every query over the keys that it may see: the bits of attention() with fp32 caches. Scores are not scaled: queries bring their
/// 1 / sqrt(head_size). Shapes as AttentionShape says; out is as q. Throws InvalidArgument where shapes do not fit.
inline void causal_attention(const AttentionShape& shape, const ConstMatrixRef& q, const ConstMatrixRef& k,
                             const ConstMatrixRef& v, MatrixRef out, const TrainOptions& options = {}) {
  detail::CausalAttention(shape, q, k, v, options).forward(out);
}

/// Its gradients, with p the probabilities of a query and dp = V^T dout:
///   ds = p * (dp - sum of p dp);  dq = K ds;  dk = q ds^T and dv = dout p^T summed over the queries that look
/// dq, dk and dv are set; they must not overlap q, k, v or dout. Throws InvalidArgument where shapes do not fit.
inline void causal_attention_backward(const AttentionShape& shape, const ConstMatrixRef& q,
                                      const ConstMatrixRef& k, const ConstMatrixRef& v, const ConstMatrixRef& dout,
                                      MatrixRef dq, MatrixRef dk, MatrixRef dv, const TrainOptions& options = {}) {
  detail::CausalAttention(shape, q, k, v, options).backward(dout, dq, dk, dv);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
