// One block forward and backward: the gradients of its weights for a loss on its output.
#pragma once

#include <Eigen/Core>
#include <array>
#include <cmath>
#include <cstddef>

#include "block.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/nn/gate.hpp"
#include "nibble/nn/norm.hpp"
#include "nibble/nn/rope.hpp"
#include "nibble/train/attention.hpp"
#include "nibble/train/linear.hpp"
#include "nibble/train/rms_norm.hpp"
#include "nibble/train/swiglu.hpp"

namespace llm {

/// Gradients of a block's parameters. Matrices that nobody asked for stay as they were.
struct BlockGradients {
  std::array<WeightMatrix, 7> matrices;
  Eigen::VectorXf attention_norm;
  Eigen::VectorXf ffn_norm;

  WeightMatrix& operator[](BlockMatrix m) { return matrices[static_cast<std::size_t>(m)]; }
  const WeightMatrix& operator[](BlockMatrix m) const { return matrices[static_cast<std::size_t>(m)]; }
};

/// Runs blocks of one model forward and backward. Hidden states are as BlockRunner's; results have the same bits for any
/// number of threads. One thread at a time may use it.
class BlockTrainer {
 public:
  using Matrix = Eigen::MatrixXf;

  BlockTrainer(const Hparams& h, const BlockOptions& options) : h_(h), options_(options) {
    rope_ = block_rope(h, options);
    train_.pool = options.pool;
    train_.workspace = &workspace_;
    shape_.heads = h.heads;
    shape_.kv_heads = h.kv_heads;
    shape_.head_size = h.head_size;
    shape_.window = options.window;
  }

  const Hparams& hparams() const { return h_; }
  const BlockOptions& options() const { return options_; }

  /// How linear layers are multiplied from now on: fp32, or bf16 (see TrainOptions).
  void set_products(nibble::Activations products) { train_.products = products; }

  /// y = block(x), dim x T; valid until the next call. x must live until backward().
  const Matrix& forward(const FloatBlock& block, const Matrix& x) {
    check(block, h_);
    nibble::detail::require(static_cast<std::size_t>(x.rows()) == h_.dim, "hidden states have ", x.rows(),
                            " rows, expected ", h_.dim);
    norm(x, block.attention_norm, attention_norm_);
    multiply(block[BlockMatrix::query], attention_norm_, query_);
    multiply(block[BlockMatrix::key], attention_norm_, key_);
    multiply(block[BlockMatrix::value], attention_norm_, value_);
    const float scale = 1.0F / std::sqrt(static_cast<float>(h_.head_size));
    turn([&](std::size_t position, Eigen::Index t) {
      rope_.apply(query_.col(t).data(), h_.heads, h_.head_size, position, scale);
      rope_.apply(key_.col(t).data(), h_.kv_heads, h_.head_size, position);
    });
    attended_.resize(query_.rows(), x.cols());
    nibble::causal_attention(shape_, query_, key_, value_, attended_, train_);
    multiply(block[BlockMatrix::output], attended_, hidden_, nibble::Epilogue().add(x));
    norm(hidden_, block.ffn_norm, ffn_norm_);
    multiply(block[BlockMatrix::gate], ffn_norm_, gate_);
    multiply(block[BlockMatrix::up], ffn_norm_, up_);
    gated_.resize(gate_.rows(), gate_.cols());
    nibble::detail::for_chunks(options_.pool, x.cols(), [&](Eigen::Index t, Eigen::Index n, std::size_t) {
      gated_.middleCols(t, n) = gate_.middleCols(t, n);
      nibble::silu_multiply(gated_.middleCols(t, n), up_.middleCols(t, n));
    });
    multiply(block[BlockMatrix::down], gated_, output_, nibble::Epilogue().add(hidden_));
    return output_;
  }

  /// Gradients of a loss whose gradient with respect to the output of the last forward(block, x) is dy.
  /// @param wanted  matrices whose gradients are computed; the others of `out` stay as they are
  /// @param dx      the gradient with respect to x and, with it, those of the norms; nullptr: not asked for
  void backward(const FloatBlock& block, const Matrix& x, const Matrix& dy, BlockGradients& out,
                const std::array<bool, 7>& wanted, Matrix* dx = nullptr) {
    nibble::detail::require_shape(x, hidden_.rows(), hidden_.cols(), "x");
    nibble::detail::require_shape(dy, hidden_.rows(), hidden_.cols(), "dy");
    const auto weight = [&](BlockMatrix m, const Matrix& d, const Matrix& input) {
      if (!wanted[static_cast<std::size_t>(m)]) return;
      out[m].resize(d.rows(), input.rows());
      nibble::linear_backward_weight(d, input, nibble::RowMajorRef(out[m]), train_);
    };
    const auto input = [&](BlockMatrix m, const Matrix& d, Matrix& to, nibble::Gradient how) {
      to.resize(block[m].cols(), d.cols());
      nibble::linear_backward_input(block[m], d, to, train_, how);
    };
    constexpr nibble::Gradient set = nibble::Gradient::set, add = nibble::Gradient::add;

    weight(BlockMatrix::down, dy, gated_);
    input(BlockMatrix::down, dy, dgate_, set);
    dup_.resize(dgate_.rows(), dgate_.cols());
    nibble::silu_multiply_backward(gate_, up_, dgate_, dgate_, dup_, train_);
    weight(BlockMatrix::gate, dgate_, ffn_norm_);
    weight(BlockMatrix::up, dup_, ffn_norm_);
    input(BlockMatrix::gate, dgate_, dhidden_, set);
    input(BlockMatrix::up, dup_, dhidden_, add);
    const nibble::ConstMatrixRef residual(dy);
    nibble::rms_norm_backward(hidden_, block.ffn_norm, h_.rms_epsilon, dhidden_, dhidden_,
                              dx != nullptr ? &out.ffn_norm : nullptr, &residual, train_);

    weight(BlockMatrix::output, dhidden_, attended_);
    const bool deeper = dx != nullptr || wanted[0] || wanted[1] || wanted[2];
    if (!deeper) return;
    input(BlockMatrix::output, dhidden_, dattended_, set);
    dquery_.resize(query_.rows(), query_.cols());
    dkey_.resize(key_.rows(), key_.cols());
    dvalue_.resize(value_.rows(), value_.cols());
    nibble::causal_attention_backward(shape_, query_, key_, value_, dattended_, dquery_, dkey_, dvalue_, train_);
    const float scale = 1.0F / std::sqrt(static_cast<float>(h_.head_size));
    turn([&](std::size_t position, Eigen::Index t) {
      rope_.apply_inverse(dquery_.col(t).data(), h_.heads, h_.head_size, position, scale);
      rope_.apply_inverse(dkey_.col(t).data(), h_.kv_heads, h_.head_size, position);
    });
    weight(BlockMatrix::query, dquery_, attention_norm_);
    weight(BlockMatrix::key, dkey_, attention_norm_);
    weight(BlockMatrix::value, dvalue_, attention_norm_);
    if (dx == nullptr) return;
    input(BlockMatrix::query, dquery_, *dx, set);
    input(BlockMatrix::key, dkey_, *dx, add);
    input(BlockMatrix::value, dvalue_, *dx, add);
    const nibble::ConstMatrixRef through(dhidden_);
    nibble::rms_norm_backward(x, block.attention_norm, h_.rms_epsilon, *dx, *dx, &out.attention_norm, &through,
                              train_);
  }

 private:
  void norm(const Matrix& x, const Eigen::VectorXf& weight, Matrix& out) {
    out.resize(x.rows(), x.cols());
    nibble::detail::for_chunks(options_.pool, x.cols(), [&](Eigen::Index t, Eigen::Index n, std::size_t) {
      nibble::rms_norm(x.middleCols(t, n), weight, h_.rms_epsilon, out.middleCols(t, n));
    });
  }
  void multiply(const WeightMatrix& w, const Matrix& x, Matrix& y, const nibble::Epilogue& epilogue = {}) {
    y.resize(w.rows(), x.cols());
    nibble::gemm(w, x, y, nibble::detail::product_options(train_, epilogue));
  }
  /// f(position, column) for all tokens.
  template <class F>
  void turn(F&& f) {
    nibble::detail::for_chunks(options_.pool, query_.cols(), [&](Eigen::Index first, Eigen::Index n, std::size_t) {
      for (Eigen::Index t = first; t < first + n; ++t) f(static_cast<std::size_t>(t) % options_.window, t);
    });
  }

  const Hparams h_;
  BlockOptions options_;
  nibble::Rope rope_;
  nibble::Workspace workspace_;
  nibble::TrainOptions train_;
  nibble::AttentionShape shape_;
  Matrix attention_norm_, query_, key_, value_, attended_, hidden_, ffn_norm_, gate_, up_, gated_, output_;
  Matrix dgate_, dup_, dhidden_, dattended_, dquery_, dkey_, dvalue_;
};

}  // namespace llm
