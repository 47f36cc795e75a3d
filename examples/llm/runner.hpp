// The forward pass: tokens in, logits out.
//
// A token's logits are the same bits whether it came alone, in a prompt, or in pieces of one, and for any number of
// threads: every product sums in one order, and everything else works on one token at a time.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "kv_cache.hpp"
#include "math.hpp"
#include "model.hpp"
#include "nibble/gemm/dense.hpp"
#include "vocabulary.hpp"

namespace llm {

struct RunnerOptions {
  std::size_t context = 2048;                                        // positions that a sequence may reach
  std::size_t block = 512;                                           // tokens of a prompt computed at once
  nibble::Activations activations = nibble::Activations::automatic;  // fp32: exact; automatic: int8 where it can
  nibble::ThreadPool* pool = nullptr;                                // nullptr: the calling thread alone
};

/// Runs one model. All scratch memory is allocated by the constructor; generating a token allocates nothing.
/// One thread at a time may use a runner; several runners may share a model.
template <class KvElement = float>
class BasicRunner {
 public:
  using Cache = KvCache<KvElement>;
  using Matrix = Eigen::MatrixXf;

  BasicRunner(const Model& model, const RunnerOptions& options)
      : model_(model),
        h_(model.hparams),
        options_(options),
        rope_(h_.rope_size, options.context, h_.rope_base, h_.rope_scale, model.rope_divisors) {
    const Eigen::Index block = index(std::max<std::size_t>(options_.block, 1));
    x_.resize(index(h_.dim), block);
    normed_.resize(index(h_.dim), block);
    query_.resize(index(h_.q_size()), block);
    key_.resize(index(h_.kv_size()), block);
    value_.resize(index(h_.kv_size()), block);
    attended_.resize(index(h_.q_size()), block);
    gate_.resize(index(h_.ffn), block);
    up_.resize(index(h_.ffn), block);
    logits_.resize(index(h_.vocabulary), std::min<Eigen::Index>(block, logits_block));
    scratch_.resize(options_.pool == nullptr ? 1 : static_cast<std::size_t>(options_.pool->threads()));
    const Eigen::Index columns = index(std::min<std::size_t>(query_block, options_.block) * queries_per_key());
    for (AttentionScratch& s : scratch_) {
      s.query.resize(index(h_.head_size), columns);
      s.scores.resize(index((options_.context + lanes - 1) / lanes * lanes), columns);
      s.out.resize(index(h_.head_size), columns);
      s.inverse.resize(columns);
      warm_up(s);
    }
  }

  const Hparams& hparams() const { return h_; }
  Cache new_cache() const { return Cache(h_.layers, h_.kv_heads, h_.head_size, options_.context); }

  /// Appends `count` tokens to the sequence in `cache` and calls emit(i, logits) for the tokens i >= `first_wanted`, in
  /// blocks: logits has a column for each of the tokens i, i + 1, ...
  template <class Emit>
  void append(Cache& cache, const Token* tokens, std::size_t count, std::size_t first_wanted, Emit&& emit) {
    if (count > cache.capacity() - cache.size())
      throw std::runtime_error("the text is longer than the context of " + std::to_string(cache.capacity()) +
                               " tokens");
    for (std::size_t begin = 0; begin < count;) {
      const std::size_t n = std::min(options_.block, count - begin);
      forward(cache, tokens + begin, n);
      for (std::size_t i = std::max(begin, first_wanted); i < begin + n;) {
        const std::size_t m = std::min<std::size_t>(begin + n - i, static_cast<std::size_t>(logits_.cols()));
        emit(i, output(i - begin, m));
        i += m;
      }
      begin += n;
    }
  }

  /// Appends tokens and returns the last one's logits (hparams().vocabulary floats, valid until the next call).
  const float* append(Cache& cache, const Token* tokens, std::size_t count) {
    append(cache, tokens, count, count - 1, [](std::size_t, const auto&) {});
    return logits_.data();
  }

 private:
  // Logits of a vocabulary are large: few tokens at once.
  static constexpr Eigen::Index logits_block = 64;
  // Queries that one attention task takes: their scores against a few hundred keys stay in the L2 cache.
  static constexpr std::size_t query_block = 32;

  struct AttentionScratch {
    Matrix query;   // head_size x (token, head)
    Matrix scores;  // positions x (token, head)
    Matrix out;     // head_size x (token, head)
    Eigen::VectorXf inverse;
    nibble::Workspace workspace;
    Matrix keys;  // where the cache is not of floats
    Matrix values;
  };

  /// One token's products at the full context, so that a thread's workspace has its size before the first real task.
  void warm_up(AttentionScratch& s) {
    const Matrix cache = Matrix::Zero(index(options_.context), index(h_.head_size));
    const Eigen::Index columns = index(queries_per_key());
    nibble::MatmulOptions options;
    options.workspace = &s.workspace;
    s.query.setZero();
    auto scores = s.scores.topLeftCorner(cache.rows(), columns);
    nibble::gemm(cache, s.query.leftCols(columns), scores, options);
    nibble::gemm(Eigen::Map<const Matrix>(cache.data(), cache.cols(), cache.rows()), scores,
                 s.out.leftCols(columns), options);
  }

  static Eigen::Index index(std::size_t n) { return static_cast<Eigen::Index>(n); }
  std::size_t queries_per_key() const { return h_.heads / h_.kv_heads; }

  /// f(task, thread) for all tasks, on the pool where there is one.
  template <class F>
  void parallel(std::size_t tasks, F&& f) {
    if (options_.pool != nullptr && tasks > 1)
      options_.pool->run(tasks, f);
    else
      for (std::size_t t = 0; t < tasks; ++t) f(t, std::size_t{0});
  }
  /// f(token) for all tokens, several to a task.
  template <class F>
  void for_tokens(std::size_t n, F&& f) {
    constexpr std::size_t chunk = 16;
    parallel((n + chunk - 1) / chunk, [&](std::size_t task, std::size_t) {
      for (std::size_t t = task * chunk; t < std::min(n, (task + 1) * chunk); ++t) f(t);
    });
  }

  void norm(const Eigen::VectorXf& weight, std::size_t n) {
    for_tokens(n, [&](std::size_t t) {
      rms_norm(x_.col(index(t)).data(), weight.data(), h_.dim, h_.rms_epsilon, normed_.col(index(t)).data());
    });
  }

  /// Several products of the same n columns of x. They are quantized once, and only if some weight wants integers.
  class Input {
   public:
    Input(BasicRunner& runner, const Matrix& x, std::size_t n) : runner_(runner), x_(x), n_(index(n)) {}

    void multiply(const nibble::PackedMatrix& w, Matrix& y, const nibble::Epilogue& epilogue = {}) {
      nibble::MatmulOptions options;
      options.activations = nibble::Activations::fp32;
      options.epilogue = epilogue;
      options.pool = runner_.options_.pool;
      options.workspace = &runner_.workspace_;
      if (runner_.options_.activations == nibble::Activations::fp32 || !nibble::is_integer(w.format()))
        return nibble::matmul(w, x_.leftCols(n_), y.leftCols(n_), options);
      // A scale for each group of inputs: with one a token, this size of model loses 4 % of its perplexity.
      if (const std::size_t group = nibble::activation_group(w); quantized_ != group) {
        runner_.quantized_.assign(x_.leftCols(n_), nibble::Activations::int8_grouped, options.pool, group);
        quantized_ = group;
      }
      nibble::matmul(w, runner_.quantized_, y.leftCols(n_), options);
    }

   private:
    BasicRunner& runner_;
    const Matrix& x_;
    Eigen::Index n_;
    std::size_t quantized_ = 0;  // the group size of runner_.quantized_, once it holds x
  };

  /// n tokens through all layers: x_ holds their hidden states after the last.
  void forward(Cache& cache, const Token* tokens, std::size_t n) {
    for (std::size_t t = 0; t < n; ++t)
      if (tokens[t] < 0 || static_cast<std::size_t>(tokens[t]) >= h_.vocabulary)
        throw std::runtime_error("token " + std::to_string(tokens[t]) + " is not in the vocabulary");
    for_tokens(n, [&](std::size_t t) { model_.embedding.dequantize_row(tokens[t], x_.col(index(t)).data()); });
    const std::size_t past = cache.size();
    const Eigen::Index m = index(n);
    for (std::size_t i = 0; i < model_.layers.size(); ++i) {
      const Layer& l = model_.layers[i];
      norm(l.attention_norm, n);
      Input normed(*this, normed_, n);
      normed.multiply(l.query, query_);
      normed.multiply(l.key, key_);
      normed.multiply(l.value, value_);
      const float scale = 1.0F / std::sqrt(static_cast<float>(h_.head_size));
      for_tokens(n, [&](std::size_t t) {
        const Eigen::Index c = index(t);
        rope_.apply(query_.col(c).data(), h_.heads, h_.head_size, past + t, scale);
        rope_.apply(key_.col(c).data(), h_.kv_heads, h_.head_size, past + t, 1.0F);
        cache.store(i, past + t, key_.col(c).data(), value_.col(c).data());
      });
      attention(cache, i, past, n);
      Input(*this, attended_, n).multiply(l.output, x_, nibble::Epilogue().add(x_.leftCols(m)));

      norm(l.ffn_norm, n);
      Input ffn(*this, normed_, n);
      ffn.multiply(l.up, up_);
      ffn.multiply(l.gate, gate_, nibble::Epilogue().silu().multiply(up_.leftCols(m)));
      Input(*this, gate_, n).multiply(l.down, x_, nibble::Epilogue().add(x_.leftCols(m)));
    }
    cache.advance(n);
  }

  /// attended_ = softmax(K^T q) V for the n queries in query_, each seeing the positions up to its own.
  void attention(const Cache& cache, std::size_t layer, std::size_t past, std::size_t n) {
    const std::size_t blocks = (n + query_block - 1) / query_block;
    parallel(blocks * h_.kv_heads, [&](std::size_t task, std::size_t thread) {
      // The longest tasks first, so that threads end together.
      const std::size_t begin = (blocks - 1 - task / h_.kv_heads) * query_block;
      const std::size_t end = std::min(begin + query_block, n);
      attend(scratch_[thread], cache, layer, task % h_.kv_heads, past, begin, end);
    });
  }

  /// Queries [begin, end) of the heads that share key-value head `head`, as the columns of two products: the keys and
  /// values are then read once for all of them. Positions beyond the last query's are not computed.
  void attend(AttentionScratch& s, const Cache& cache, std::size_t layer, std::size_t head, std::size_t past,
              std::size_t begin, std::size_t end) {
    const std::size_t shared = queries_per_key();
    const std::size_t rows = shared * h_.head_size;  // of query_ and attended_ that belong to this head
    const std::size_t positions = past + end;
    const Eigen::Index columns = index((end - begin) * shared);
    for (std::size_t t = begin; t < end; ++t) {
      const float* from = query_.col(index(t)).data() + head * rows;
      std::copy(from, from + rows, s.query.col(index((t - begin) * shared)).data());
    }
    nibble::MatmulOptions options;
    options.workspace = &s.workspace;
    auto scores = s.scores.topLeftCorner(index(positions), columns);
    nibble::gemm(floats(cache.keys(layer, head, positions), s.keys), s.query.leftCols(columns), scores, options);
    for (Eigen::Index c = 0; c < columns; ++c) {
      const std::size_t visible = past + begin + static_cast<std::size_t>(c) / shared + 1;
      float* column = s.scores.col(c).data();
      s.inverse[c] = 1.0F / exp_minus_max(column, visible);
      std::fill(column + visible, column + positions, 0.0F);  // what comes later adds exactly nothing
    }
    auto out = s.out.leftCols(columns);
    nibble::gemm(floats(cache.values(layer, head, positions), s.values), scores, out, options);
    for (std::size_t t = begin; t < end; ++t) {
      float* to = attended_.col(index(t)).data() + head * rows;
      for (std::size_t q = 0; q < shared; ++q) {
        const Eigen::Index c = index((t - begin) * shared + q);
        for (std::size_t d = 0; d < h_.head_size; ++d) to[q * h_.head_size + d] = out(index(d), c) * s.inverse[c];
      }
    }
  }

  /// A cache's view as floats: itself, or converted into `copy`.
  template <class View>
  static auto floats(const View& view, Matrix& copy) {
    if constexpr (std::is_same_v<KvElement, float>) {
      (void)copy;
      return view;
    } else {
      copy = view.template cast<float>();
      return Eigen::Map<const Matrix>(copy.data(), copy.rows(), copy.cols());
    }
  }

  /// Logits of tokens [begin, begin + m) of the last block.
  auto output(std::size_t begin, std::size_t m) {
    for_tokens(m, [&](std::size_t t) {
      rms_norm(x_.col(index(begin + t)).data(), model_.output_norm.data(), h_.dim, h_.rms_epsilon,
               normed_.col(index(t)).data());
    });
    Input(*this, normed_, m).multiply(model_.output, logits_);
    return logits_.leftCols(index(m));
  }

  const Model& model_;
  const Hparams h_;
  RunnerOptions options_;
  Rope rope_;
  nibble::Workspace workspace_;
  nibble::QuantizedActivations quantized_;
  Matrix x_;  // the residual stream
  Matrix normed_;
  Matrix query_;
  Matrix key_;
  Matrix value_;
  Matrix attended_;
  Matrix gate_;
  Matrix up_;
  Matrix logits_;
  std::vector<AttentionScratch> scratch_;  // one a thread
};

using Runner = BasicRunner<float>;

}  // namespace llm
