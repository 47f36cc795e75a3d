// One block of a model in floats, run in stages, so that what feeds each of its matrices can be looked at before the
// matrix is quantized.
#pragma once

#include <Eigen/Core>
#include <array>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "../hparams.hpp"
#include "../model_file.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/nn/attention.hpp"
#include "nibble/nn/kv_cache.hpp"
#include "nibble/nn/norm.hpp"
#include "nibble/nn/rope.hpp"

namespace llm {

/// The matrices of a block, in the order in which they are quantized.
struct BlockMatrix {
  enum : std::size_t { query, key, value, output, gate, up, down, count };
};

inline constexpr std::array<const char*, BlockMatrix::count> block_matrix_names = {
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"};

inline std::string block_tensor(std::size_t block, const char* what) {
  return "blk." + std::to_string(block) + "." + what + ".weight";
}
inline std::string block_tensor(std::size_t block, std::size_t matrix) {
  return block_tensor(block, block_matrix_names[matrix]);
}

/// Weights of one block as floats, outputs x inputs.
struct FloatBlock {
  Eigen::VectorXf attention_norm;
  Eigen::VectorXf ffn_norm;
  std::array<Eigen::MatrixXf, BlockMatrix::count> w;
};

inline Eigen::MatrixXf float_matrix(const nibble::QuantizedTensor& q, nibble::ThreadPool* pool) {
  nibble::QuantizeOptions options;
  options.pool = pool;
  return nibble::dequantize(q, options);
}

inline FloatBlock load_block(const ModelFile& file, std::size_t block, nibble::ThreadPool* pool) {
  FloatBlock b;
  b.attention_norm = file.vector(block_tensor(block, "attn_norm"));
  b.ffn_norm = file.vector(block_tensor(block, "ffn_norm"));
  for (std::size_t m = 0; m < BlockMatrix::count; ++m)
    b.w[m] = float_matrix(file.quantized(block_tensor(block, m)), pool);
  return b;
}

/// The stages of a block on one window of tokens, a token a column. Results depend on no thread count.
class BlockForward {
 public:
  BlockForward(const Hparams& h, const Eigen::VectorXf& rope_divisors, std::size_t tokens, nibble::ThreadPool* pool)
      : h_(h), pool_(pool), rope_(rope_options(h, rope_divisors, tokens)), cache_(cache_options(h, tokens)) {
    rope_.prepare(tokens);
    options_.pool = pool;
    options_.workspace = &workspace_;
  }

  void norm(const Eigen::MatrixXf& x, const Eigen::VectorXf& weight, Eigen::MatrixXf& out) {
    out.resize(x.rows(), x.cols());
    constexpr Eigen::Index chunk = 64;
    nibble::detail::for_tasks(pool_, static_cast<std::size_t>((x.cols() + chunk - 1) / chunk),
                              [&](std::size_t task, std::size_t) {
                                const Eigen::Index first = static_cast<Eigen::Index>(task) * chunk;
                                const Eigen::Index n = std::min(chunk, x.cols() - first);
                                nibble::rms_norm(x.middleCols(first, n), weight, h_.rms_epsilon,
                                                 out.middleCols(first, n));
                              });
  }

  /// Causal self-attention over the window: what the output matrix multiplies.
  void attend(const FloatBlock& b, const Eigen::MatrixXf& normed, Eigen::MatrixXf& attended) {
    product(b.w[BlockMatrix::query], normed, q_);
    product(b.w[BlockMatrix::key], normed, k_);
    product(b.w[BlockMatrix::value], normed, v_);
    cache_.clear();
    const auto tokens = static_cast<std::size_t>(normed.cols());
    const float scale = 1.0F / std::sqrt(static_cast<float>(h_.head_size));
    for (std::size_t t = 0; t < tokens; ++t) {
      const auto c = static_cast<Eigen::Index>(t);
      rope_.apply(q_.col(c).data(), h_.heads, h_.head_size, t, scale);
      rope_.apply(k_.col(c).data(), h_.kv_heads, h_.head_size, t);
      cache_.store(0, t, k_.col(c).data(), v_.col(c).data());
    }
    nibble::AttentionSpan span;
    span.cache = &cache_;
    span.tokens = tokens;
    nibble::AttentionOptions options;
    options.pool = pool_;
    options.workspace = &workspace_;
    attended.resize(q_.rows(), q_.cols());
    nibble::attention(&span, 1, 0, q_, attended, options);
  }

  /// hidden = silu(gate normed) * (up normed).
  void gated(const FloatBlock& b, const Eigen::MatrixXf& normed, Eigen::MatrixXf& hidden) {
    product(b.w[BlockMatrix::up], normed, up_);
    hidden.resize(b.w[BlockMatrix::gate].rows(), normed.cols());
    options_.epilogue = nibble::Epilogue().silu().multiply(up_);
    nibble::gemm(b.w[BlockMatrix::gate], normed, hidden, options_);
  }

  /// x += w in.
  void add_product(const Eigen::MatrixXf& w, const Eigen::MatrixXf& in, Eigen::MatrixXf& x) {
    options_.epilogue = nibble::Epilogue().add(x);
    nibble::gemm(w, in, x, options_);
  }

  /// The whole block: x becomes its output.
  void block(const FloatBlock& b, Eigen::MatrixXf& x) {
    norm(x, b.attention_norm, normed_);
    attend(b, normed_, in_);
    add_product(b.w[BlockMatrix::output], in_, x);
    norm(x, b.ffn_norm, normed_);
    gated(b, normed_, in_);
    add_product(b.w[BlockMatrix::down], in_, x);
  }

 private:
  static nibble::RopeOptions rope_options(const Hparams& h, const Eigen::VectorXf& divisors, std::size_t tokens) {
    nibble::RopeOptions o;
    o.dimensions = h.rope_size;
    o.positions = tokens;
    o.base = h.rope_base;
    o.linear_scale = h.rope_scale;
    o.divisors.assign(divisors.data(), divisors.data() + divisors.size());
    return o;
  }
  static nibble::KvCacheOptions cache_options(const Hparams& h, std::size_t tokens) {
    nibble::KvCacheOptions o;
    o.layers = 1;
    o.kv_heads = h.kv_heads;
    o.head_size = h.head_size;
    o.capacity = tokens;
    o.format = nibble::KvFormat::fp32;
    return o;
  }

  void product(const Eigen::MatrixXf& w, const Eigen::MatrixXf& in, Eigen::MatrixXf& out) {
    out.resize(w.rows(), in.cols());
    options_.epilogue = {};
    nibble::gemm(w, in, out, options_);
  }

  const Hparams h_;
  nibble::ThreadPool* pool_;
  nibble::Rope rope_;
  nibble::KvCache cache_;
  nibble::Workspace workspace_;
  nibble::MatmulOptions options_;
  Eigen::MatrixXf q_, k_, v_, up_, normed_, in_;
};

}  // namespace llm
