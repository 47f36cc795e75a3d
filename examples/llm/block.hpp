// One block of a Llama-family model on float matrices, for what looks at a model a block at a time: calibration data go
// in, hidden states and the inputs of every linear layer come out.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "hparams.hpp"
#include "model_file.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/nn/attention.hpp"
#include "nibble/nn/kv_cache.hpp"
#include "nibble/nn/norm.hpp"
#include "nibble/nn/rope.hpp"

namespace llm {

/// The weight matrices of a block, in the order in which they are used.
enum class BlockMatrix : std::size_t { query, key, value, output, gate, up, down };
inline constexpr std::array<BlockMatrix, 7> block_matrices = {
    BlockMatrix::query, BlockMatrix::key, BlockMatrix::value, BlockMatrix::output,
    BlockMatrix::gate,  BlockMatrix::up,  BlockMatrix::down};

/// What the matrices of a block multiply.
enum class BlockInput : std::size_t {
  attention_norm,  // query, key, value
  attention,       // output
  ffn_norm,        // gate, up
  gated            // down: silu(gate) * up
};
inline constexpr std::array<BlockInput, 4> block_inputs = {BlockInput::attention_norm, BlockInput::attention,
                                                           BlockInput::ffn_norm, BlockInput::gated};

constexpr BlockInput input_of(BlockMatrix m) {
  if (m <= BlockMatrix::value) return BlockInput::attention_norm;
  if (m == BlockMatrix::output) return BlockInput::attention;
  return m == BlockMatrix::down ? BlockInput::gated : BlockInput::ffn_norm;
}

/// "attn_q" ...: what GGUF calls a matrix, between "blk.N." and ".weight".
constexpr const char* name_of(BlockMatrix m) {
  constexpr const char* names[] = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"};
  return names[static_cast<std::size_t>(m)];
}
/// "blk.3.attn_q.weight".
inline std::string tensor_name(std::size_t layer, BlockMatrix m) {
  return "blk." + std::to_string(layer) + "." + name_of(m) + ".weight";
}
inline std::string attention_norm_name(std::size_t layer) {
  return "blk." + std::to_string(layer) + ".attn_norm.weight";
}
inline std::string ffn_norm_name(std::size_t layer) { return "blk." + std::to_string(layer) + ".ffn_norm.weight"; }

/// Outputs and inputs of a matrix.
struct MatrixShape {
  Eigen::Index rows = 0;
  Eigen::Index cols = 0;
};
inline MatrixShape shape_of(const Hparams& h, BlockMatrix m) {
  const auto shape = [](std::size_t rows, std::size_t cols) {
    return MatrixShape{static_cast<Eigen::Index>(rows), static_cast<Eigen::Index>(cols)};
  };
  switch (m) {
    case BlockMatrix::query: return shape(h.q_size(), h.dim);
    case BlockMatrix::key:
    case BlockMatrix::value: return shape(h.kv_size(), h.dim);
    case BlockMatrix::output: return shape(h.dim, h.q_size());
    case BlockMatrix::gate:
    case BlockMatrix::up: return shape(h.ffn, h.dim);
    case BlockMatrix::down: return shape(h.dim, h.ffn);
  }
  return {};
}

/// Row-major, as quantized tensors have their codes.
using WeightMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// One block's weights in float.
struct FloatBlock {
  std::array<WeightMatrix, 7> matrices;
  Eigen::VectorXf attention_norm;
  Eigen::VectorXf ffn_norm;

  WeightMatrix& operator[](BlockMatrix m) { return matrices[static_cast<std::size_t>(m)]; }
  const WeightMatrix& operator[](BlockMatrix m) const { return matrices[static_cast<std::size_t>(m)]; }
};

/// Throws FormatError where a matrix or norm does not have the shape that the hyperparameters say.
inline void check(const FloatBlock& block, const Hparams& h) {
  for (const BlockMatrix m : block_matrices) {
    const MatrixShape shape = shape_of(h, m);
    nibble::detail::require<nibble::FormatError>(block[m].rows() == shape.rows && block[m].cols() == shape.cols,
                                                 name_of(m), " is ", block[m].rows(), " x ", block[m].cols(),
                                                 ", expected ", shape.rows, " x ", shape.cols);
  }
  for (const Eigen::VectorXf* norm : {&block.attention_norm, &block.ffn_norm})
    nibble::detail::require<nibble::FormatError>(static_cast<std::size_t>(norm->size()) == h.dim, "a norm has ",
                                                 norm->size(), " elements, expected ", h.dim);
}

/// The values of block `layer` of a file, whatever they are stored as.
inline FloatBlock load_block(const ModelFile& file, std::size_t layer, nibble::ThreadPool* pool = nullptr) {
  FloatBlock block;
  for (const BlockMatrix m : block_matrices) {
    const nibble::QuantizedTensor t = file.quantized(tensor_name(layer, m));
    nibble::detail::require<nibble::FormatError>(t.rank() == 2, "'", tensor_name(layer, m), "' has ", t.rank(),
                                                 " dimensions, expected 2");
    block[m].resize(static_cast<Eigen::Index>(t.shape()[0]), static_cast<Eigen::Index>(t.shape()[1]));
    t.dequantize(block[m].data(), pool);
    if (const LinearExtras* e = file.extras(tensor_name(layer, m))) {
      check(*e, tensor_name(layer, m), t.shape()[0], t.shape()[1]);
      undo_input_transform(*e, block[m]);
    }
  }
  block.attention_norm = file.vector(attention_norm_name(layer));
  block.ffn_norm = file.vector(ffn_norm_name(layer));
  check(block, file.hparams());
  return block;
}

/// The factors by which a model divides its rotary frequencies, or none.
inline std::vector<float> rope_divisors_of(const ModelFile& file) {
  if (!file.has("rope_freqs.weight")) return {};
  const Eigen::VectorXf divisors = file.vector("rope_freqs.weight");
  return {divisors.data(), divisors.data() + divisors.size()};
}

/// Embeddings of tokens, a column each.
inline Eigen::MatrixXf embed(const ModelFile& file, const std::vector<Token>& tokens) {
  const nibble::QuantizedTensor table = file.quantized("token_embd.weight");
  Eigen::MatrixXf x(static_cast<Eigen::Index>(file.hparams().dim), static_cast<Eigen::Index>(tokens.size()));
  for (std::size_t t = 0; t < tokens.size(); ++t)
    table.dequantize_row(static_cast<std::size_t>(tokens[t]), x.col(static_cast<Eigen::Index>(t)).data());
  return x;
}

struct BlockOptions {
  std::size_t window = 512;            // tokens that see each other; a sequence of its own each
  std::vector<float> rope_divisors{};  // as in Model
  nibble::ThreadPool* pool = nullptr;  // nullptr: the calling thread alone
};

/// The turns of a window's positions. Throws InvalidArgument for an empty window.
inline nibble::Rope block_rope(const Hparams& h, const BlockOptions& options) {
  nibble::detail::require(options.window > 0, "a window has 0 tokens, expected at least 1");
  nibble::RopeOptions rope;
  rope.dimensions = h.rope_size;
  rope.positions = options.window;
  rope.base = h.rope_base;
  rope.linear_scale = h.rope_scale;
  rope.divisors = options.rope_divisors;
  nibble::Rope prepared(rope);
  prepared.prepare(options.window);
  return prepared;
}

/// Runs blocks of one model. Hidden states are dim x T: windows side by side, the last may be shorter. What comes out
/// has the bits that Runner computes for fp32 weights, activations and KV cache, for any number of threads and windows.
/// One thread at a time may use it.
class BlockRunner {
 public:
  using Matrix = Eigen::MatrixXf;

  BlockRunner(const Hparams& h, const BlockOptions& options) : h_(h), options_(options) {
    rope_ = block_rope(h, options);
  }

  const Hparams& hparams() const { return h_; }
  const BlockOptions& options() const { return options_; }
  const nibble::Rope& rope() const { return rope_; }

  /// y = block(x); y may be x. The input of every linear layer is at input() until the next call.
  void forward(const FloatBlock& block, const nibble::ConstMatrixRef& x, nibble::MatrixRef y) {
    check(block, h_);
    nibble::detail::require(
        static_cast<std::size_t>(x.rows()) == h_.dim && y.rows() == x.rows() && y.cols() == x.cols(),
        "hidden states are ", x.rows(), " x ", x.cols(), " and go to ", y.rows(), " x ", y.cols(), ", expected ",
        h_.dim, " rows and as many columns");
    if (x.cols() == 0) return;
    Matrix& normed = at(BlockInput::attention_norm);
    norm(x, block.attention_norm, normed);
    gemm(block[BlockMatrix::query], normed, query_);
    gemm(block[BlockMatrix::key], normed, key_);
    gemm(block[BlockMatrix::value], normed, value_);
    attend(x.cols());
    hidden_.resize(x.rows(), x.cols());
    gemm(block[BlockMatrix::output], at(BlockInput::attention), hidden_, nibble::Epilogue().add(x));
    norm(hidden_, block.ffn_norm, at(BlockInput::ffn_norm));
    gemm(block[BlockMatrix::up], at(BlockInput::ffn_norm), up_);
    gemm(block[BlockMatrix::gate], at(BlockInput::ffn_norm), at(BlockInput::gated),
         nibble::Epilogue().silu().multiply(up_));
    nibble::gemm(block[BlockMatrix::down], at(BlockInput::gated), y, product(nibble::Epilogue().add(hidden_)));
  }

  /// One stage of forward() alone: what `which` is for the hidden states x, those after attention for ffn_norm and gated.
  void input(const FloatBlock& block, BlockInput which, const nibble::ConstMatrixRef& x, Matrix& out) {
    const bool attention = which <= BlockInput::attention;
    Matrix& normed = at(attention ? BlockInput::attention_norm : BlockInput::ffn_norm);
    norm(x, attention ? block.attention_norm : block.ffn_norm, normed);
    if (which == BlockInput::attention) {
      gemm(block[BlockMatrix::query], normed, query_);
      gemm(block[BlockMatrix::key], normed, key_);
      gemm(block[BlockMatrix::value], normed, value_);
      attend(x.cols());
    } else if (which == BlockInput::gated) {
      gemm(block[BlockMatrix::up], normed, up_);
      gemm(block[BlockMatrix::gate], normed, at(which), nibble::Epilogue().silu().multiply(up_));
    }
    out.swap(at(which));
  }
  /// The other: x += w in, which ends attention (w: output) and the block (w: down).
  void add_product(const WeightMatrix& w, const Matrix& in, Matrix& x) {
    nibble::gemm(w, in, x, product(nibble::Epilogue().add(x)));
  }

  /// inputs x T, as the last forward() had them.
  const Matrix& input(BlockInput which) const { return inputs_[static_cast<std::size_t>(which)]; }
  const Matrix& input(BlockMatrix m) const { return input(input_of(m)); }

 private:
  // Tokens of one task of what works token by token.
  static constexpr std::size_t chunk = 16;

  Matrix& at(BlockInput which) { return inputs_[static_cast<std::size_t>(which)]; }

  template <class F>
  void for_tokens(std::size_t n, F&& f) {
    nibble::detail::for_tasks(options_.pool, (n + chunk - 1) / chunk, [&](std::size_t task, std::size_t) {
      f(task * chunk, std::min(chunk, n - task * chunk));
    });
  }

  void norm(const nibble::ConstMatrixRef& x, const Eigen::VectorXf& weight, Matrix& out) {
    out.resize(x.rows(), x.cols());
    for_tokens(static_cast<std::size_t>(x.cols()), [&](std::size_t first, std::size_t count) {
      const auto begin = static_cast<Eigen::Index>(first);
      const auto n = static_cast<Eigen::Index>(count);
      nibble::rms_norm(x.middleCols(begin, n), weight, h_.rms_epsilon, out.middleCols(begin, n));
    });
  }

  nibble::MatmulOptions product(const nibble::Epilogue& epilogue) {
    nibble::MatmulOptions options;
    options.epilogue = epilogue;
    options.pool = options_.pool;
    options.workspace = &workspace_;
    return options;
  }
  void gemm(const WeightMatrix& w, const Matrix& x, Matrix& y, const nibble::Epilogue& epilogue = {}) {
    y.resize(w.rows(), x.cols());
    nibble::gemm(w, x, y, product(epilogue));
  }

  /// Attention of every window over itself.
  void attend(Eigen::Index columns) {
    const auto n = static_cast<std::size_t>(columns);
    const std::size_t windows = nibble::detail::ceil_div(n, options_.window);
    nibble::KvCacheOptions cache;
    cache.layers = 1;
    cache.kv_heads = h_.kv_heads;
    cache.head_size = h_.head_size;
    cache.capacity = options_.window;
    cache.format = nibble::KvFormat::fp32;
    while (caches_.size() < windows) caches_.emplace_back(cache);
    spans_.clear();
    for (std::size_t w = 0; w < windows; ++w) {
      caches_[w].clear();
      nibble::AttentionSpan span;
      span.cache = &caches_[w];
      span.column = w * options_.window;
      span.tokens = std::min(options_.window, n - span.column);
      spans_.push_back(span);
    }
    const float scale = 1.0F / std::sqrt(static_cast<float>(h_.head_size));
    for_tokens(n, [&](std::size_t first, std::size_t count) {
      for (std::size_t t = first; t < first + count; ++t) {
        const auto column = static_cast<Eigen::Index>(t);
        const std::size_t position = t % options_.window;
        float* key = key_.col(column).data();
        rope_.apply(query_.col(column).data(), h_.heads, h_.head_size, position, scale);
        rope_.apply(key, h_.kv_heads, h_.head_size, position);
        caches_[t / options_.window].store(0, position, key, value_.col(column).data());
      }
    });
    nibble::AttentionOptions options;
    options.pool = options_.pool;
    options.workspace = &workspace_;
    Matrix& out = at(BlockInput::attention);
    out.resize(query_.rows(), columns);
    nibble::attention(spans_.data(), spans_.size(), 0, query_, out, options);
  }

  const Hparams h_;
  BlockOptions options_;
  nibble::Rope rope_;
  nibble::Workspace workspace_;
  std::vector<nibble::KvCache> caches_;  // one a window
  std::vector<nibble::AttentionSpan> spans_;
  std::array<Matrix, 4> inputs_;
  Matrix query_, key_, value_, hidden_, up_;
};

}  // namespace llm
