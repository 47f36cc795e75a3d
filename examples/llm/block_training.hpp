// One block forward and backward, whatever its linear layers are: the gradients of its weights for a loss on its output.
#pragma once

#include <Eigen/Core>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

#include "block.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/nn/gate.hpp"
#include "nibble/nn/norm.hpp"
#include "nibble/nn/rope.hpp"
#include "nibble/train/attention.hpp"
#include "nibble/train/dropout.hpp"
#include "nibble/train/linear.hpp"
#include "nibble/train/linear_layer.hpp"
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

/// A norm's weights, dim floats, and where their gradients are added; nullptr: nobody asks.
struct NormLayer {
  const Eigen::VectorXf* weight = nullptr;
  Eigen::VectorXf* gradient = nullptr;
};

/// What a block is made of in training; the layers are somebody else's.
struct BlockLayers {
  std::array<nibble::LinearLayer*, 7> matrices{};
  NormLayer attention_norm;
  NormLayer ffn_norm;

  nibble::LinearLayer& operator[](BlockMatrix m) const { return *matrices[static_cast<std::size_t>(m)]; }
};

/// What backward() needs of forward(): a column a token.
struct BlockActivations {
  Eigen::MatrixXf attention_norm, query, key, value, attended, hidden, ffn_norm, gate, up, gated;
};

/// Dropout of what a block adds to the residual stream (Vaswani 2017, section 5.4). The key is that of the attention branch;
/// the other branch's stream is the next. Its first column counts for the block's layers, too.
struct ResidualDropout {
  double rate = 0.0;
  nibble::DropoutKey key;
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
  BlockTrainer(const BlockTrainer&) = delete;
  BlockTrainer& operator=(const BlockTrainer&) = delete;

  const Hparams& hparams() const { return h_; }
  const BlockOptions& options() const { return options_; }
  const nibble::TrainOptions& train_options() const { return train_; }

  /// How linear layers are multiplied from now on: fp32, or bf16 (see TrainOptions).
  void set_products(nibble::Activations products) { train_.products = products; }

  /// y = block(x), dim x T; y may be x only where backward() is not called. `a` is filled for it.
  void forward(const BlockLayers& block, const Matrix& x, BlockActivations& a, Matrix& y,
               const ResidualDropout& dropout = {}) {
    nibble::detail::require(static_cast<std::size_t>(x.rows()) == h_.dim, "hidden states have ", x.rows(),
                            " rows, expected ", h_.dim);
    train_.first_column = dropout.key.first_column;
    norm(x, *block.attention_norm.weight, a.attention_norm);
    multiply(block[BlockMatrix::query], a.attention_norm, a.query);
    multiply(block[BlockMatrix::key], a.attention_norm, a.key);
    multiply(block[BlockMatrix::value], a.attention_norm, a.value);
    const float scale = 1.0F / std::sqrt(static_cast<float>(h_.head_size));
    turn(x.cols(), [&](std::size_t position, Eigen::Index t) {
      rope_.apply(a.query.col(t).data(), h_.heads, h_.head_size, position, scale);
      rope_.apply(a.key.col(t).data(), h_.kv_heads, h_.head_size, position);
    });
    a.attended.resize(a.query.rows(), x.cols());
    nibble::causal_attention(shape_, a.query, a.key, a.value, a.attended, train_);
    add_branch(block[BlockMatrix::output], a.attended, x, a.hidden, dropout, 0);
    norm(a.hidden, *block.ffn_norm.weight, a.ffn_norm);
    multiply(block[BlockMatrix::gate], a.ffn_norm, a.gate);
    multiply(block[BlockMatrix::up], a.ffn_norm, a.up);
    a.gated.resize(a.gate.rows(), a.gate.cols());
    nibble::detail::for_chunks(options_.pool, x.cols(), [&](Eigen::Index t, Eigen::Index n, std::size_t) {
      a.gated.middleCols(t, n) = a.gate.middleCols(t, n);
      nibble::silu_multiply(a.gated.middleCols(t, n), a.up.middleCols(t, n));
    });
    add_branch(block[BlockMatrix::down], a.gated, a.hidden, y, dropout, 1);
  }

  /// Gradients of a loss whose gradient with respect to the output of forward(block, x, a, y, dropout) is dy: added to
  /// those of the layers.
  /// @param dx      set to the gradient with respect to x; nullptr: not asked for, nor are those of attention_norm
  /// @param deeper  false: those of query, key and value are not asked for either
  void backward(const BlockLayers& block, const Matrix& x, const BlockActivations& a, const Matrix& dy, Matrix* dx,
                const ResidualDropout& dropout = {}, bool deeper = true) {
    nibble::detail::require_shape(x, a.hidden.rows(), a.hidden.cols(), "x");
    nibble::detail::require_shape(dy, a.hidden.rows(), a.hidden.cols(), "dy");
    constexpr nibble::Gradient set = nibble::Gradient::set, add = nibble::Gradient::add;
    train_.first_column = dropout.key.first_column;

    backward(block[BlockMatrix::down], a.gated, branch(dy, dropout, 1), &dgate_, set);
    dup_.resize(dgate_.rows(), dgate_.cols());
    nibble::silu_multiply_backward(a.gate, a.up, dgate_, dgate_, dup_, train_);
    backward(block[BlockMatrix::gate], a.ffn_norm, dgate_, &dhidden_, set);
    backward(block[BlockMatrix::up], a.ffn_norm, dup_, &dhidden_, add);
    norm_backward(block.ffn_norm, a.hidden, dhidden_, dy);

    backward(block[BlockMatrix::output], a.attended, branch(dhidden_, dropout, 0), deeper ? &dattended_ : nullptr,
             set);
    if (!deeper) return;
    dquery_.resize(a.query.rows(), a.query.cols());
    dkey_.resize(a.key.rows(), a.key.cols());
    dvalue_.resize(a.value.rows(), a.value.cols());
    nibble::causal_attention_backward(shape_, a.query, a.key, a.value, dattended_, dquery_, dkey_, dvalue_,
                                      train_);
    const float scale = 1.0F / std::sqrt(static_cast<float>(h_.head_size));
    turn(x.cols(), [&](std::size_t position, Eigen::Index t) {
      rope_.apply_inverse(dquery_.col(t).data(), h_.heads, h_.head_size, position, scale);
      rope_.apply_inverse(dkey_.col(t).data(), h_.kv_heads, h_.head_size, position);
    });
    backward(block[BlockMatrix::query], a.attention_norm, dquery_, dx, set);
    backward(block[BlockMatrix::key], a.attention_norm, dkey_, dx, add);
    backward(block[BlockMatrix::value], a.attention_norm, dvalue_, dx, add);
    if (dx != nullptr) norm_backward(block.attention_norm, x, *dx, dhidden_);
  }

  /// The same for plain matrices. y is valid until the next call, and x must live until backward().
  const Matrix& forward(const FloatBlock& block, const Matrix& x) {
    check(block, h_);
    Borrowed layers(block, nullptr, {});
    forward(layers.block, x, own_, output_);
    return output_;
  }

  /// Sets gradients of a loss whose gradient with respect to the output of the last forward(block, x) is dy.
  /// @param wanted  matrices whose gradients are computed; the others of `out` stay as they are
  /// @param dx      the gradient with respect to x and, with it, those of the norms; nullptr: not asked for
  void backward(const FloatBlock& block, const Matrix& x, const Matrix& dy, BlockGradients& out,
                const std::array<bool, 7>& wanted, Matrix* dx = nullptr) {
    Borrowed layers(block, &out, wanted);
    if (dx != nullptr) {
      const auto dim = static_cast<Eigen::Index>(h_.dim);
      out.attention_norm = Eigen::VectorXf::Zero(dim);
      out.ffn_norm = Eigen::VectorXf::Zero(dim);
      layers.block.attention_norm.gradient = &out.attention_norm;
      layers.block.ffn_norm.gradient = &out.ffn_norm;
    }
    backward(layers.block, x, own_, dy, dx, {}, dx != nullptr || wanted[0] || wanted[1] || wanted[2]);
  }

 private:
  /// A matrix of a FloatBlock as a layer.
  class BorrowedLinear : public nibble::LinearLayer {
   public:
    void assign(const WeightMatrix& w, WeightMatrix* gradient) { w_ = &w, gradient_ = gradient; }
    Eigen::Index rows() const override { return w_->rows(); }
    Eigen::Index cols() const override { return w_->cols(); }
    void forward(const nibble::ConstMatrixRef& x, nibble::MatrixRef y, const nibble::TrainOptions& options,
                 const nibble::Epilogue& epilogue) override {
      nibble::gemm(*w_, x, y, nibble::detail::product_options(options, epilogue));
    }
    void backward(const nibble::ConstMatrixRef& x, const nibble::ConstMatrixRef& dy, nibble::MatrixRef* dx,
                  nibble::Gradient how, const nibble::TrainOptions& options) override {
      if (gradient_ != nullptr) {
        gradient_->resize(w_->rows(), w_->cols());
        nibble::linear_backward_weight(dy, x, nibble::RowMajorRef(*gradient_), options);
      }
      if (dx != nullptr) nibble::linear_backward_input(*w_, dy, *dx, options, how);
    }
    void append_parameters(const std::string&, nibble::Parameters&) override {}

   private:
    const WeightMatrix* w_ = nullptr;
    WeightMatrix* gradient_ = nullptr;
  };
  struct Borrowed {
    std::array<BorrowedLinear, 7> linears;
    BlockLayers block;
    Borrowed(const FloatBlock& b, BlockGradients* out, const std::array<bool, 7>& wanted) {
      for (std::size_t m = 0; m < 7; ++m) {
        linears[m].assign(b.matrices[m], out != nullptr && wanted[m] ? &out->matrices[m] : nullptr);
        block.matrices[m] = &linears[m];
      }
      block.attention_norm.weight = &b.attention_norm;
      block.ffn_norm.weight = &b.ffn_norm;
    }
  };

  void norm(const Matrix& x, const Eigen::VectorXf& weight, Matrix& out) {
    out.resize(x.rows(), x.cols());
    nibble::detail::for_chunks(options_.pool, x.cols(), [&](Eigen::Index t, Eigen::Index n, std::size_t) {
      nibble::rms_norm(x.middleCols(t, n), weight, h_.rms_epsilon, out.middleCols(t, n));
    });
  }
  /// d becomes the gradient with respect to the norm's input, and `through` on top.
  void norm_backward(const NormLayer& layer, const Matrix& x, Matrix& d, const Matrix& through) {
    const nibble::ConstMatrixRef add(through);
    nibble::rms_norm_backward(x, *layer.weight, h_.rms_epsilon, d, d,
                              layer.gradient != nullptr ? &dweight_ : nullptr, &add, train_);
    if (layer.gradient != nullptr) *layer.gradient += dweight_;
  }
  void multiply(nibble::LinearLayer& w, const Matrix& x, Matrix& y, const nibble::Epilogue& epilogue = {}) {
    y.resize(w.rows(), x.cols());
    w.forward(x, y, train_, epilogue);
  }
  static nibble::DropoutKey key_of(const ResidualDropout& dropout, std::uint64_t which) {
    nibble::DropoutKey key = dropout.key;
    key.stream += which;
    return key;
  }
  /// y = base + dropped(w x).
  void add_branch(nibble::LinearLayer& w, const Matrix& x, const Matrix& base, Matrix& y,
                  const ResidualDropout& dropout, std::uint64_t which) {
    if (dropout.rate == 0.0) return multiply(w, x, y, nibble::Epilogue().add(base));
    multiply(w, x, branch_);
    y = base;
    nibble::dropout(branch_, y, dropout.rate, key_of(dropout, which), train_, nibble::Gradient::add);
  }
  const Matrix& branch(const Matrix& d, const ResidualDropout& dropout, std::uint64_t which) {
    if (dropout.rate == 0.0) return d;
    branch_.resize(d.rows(), d.cols());
    nibble::dropout_backward(d, branch_, dropout.rate, key_of(dropout, which), train_);
    return branch_;
  }
  void backward(nibble::LinearLayer& w, const Matrix& x, const Matrix& dy, Matrix* dx, nibble::Gradient how) {
    if (dx == nullptr) return w.backward(x, dy, nullptr, how, train_);
    dx->resize(w.cols(), dy.cols());
    nibble::MatrixRef to(*dx);
    w.backward(x, dy, &to, how, train_);
  }
  /// f(position, column) for all tokens.
  template <class F>
  void turn(Eigen::Index tokens, F&& f) {
    nibble::detail::for_chunks(options_.pool, tokens, [&](Eigen::Index first, Eigen::Index n, std::size_t) {
      for (Eigen::Index t = first; t < first + n; ++t) f(static_cast<std::size_t>(t) % options_.window, t);
    });
  }

  const Hparams h_;
  BlockOptions options_;
  nibble::Rope rope_;
  nibble::Workspace workspace_;
  nibble::TrainOptions train_;
  nibble::AttentionShape shape_;
  BlockActivations own_;  // of plain matrices
  Matrix output_, branch_;
  Matrix dgate_, dup_, dhidden_, dattended_, dquery_, dkey_, dvalue_;
  Eigen::VectorXf dweight_;
};

}  // namespace llm
