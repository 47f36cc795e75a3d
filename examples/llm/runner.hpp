// The forward pass: tokens in, logits out.
//
// A token's logits are the same bits whether it came alone, in a prompt, in pieces of one, or in a batch with other
// sequences, and for any number of threads: every product sums in one order, and everything else works on one token at a
// time.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.hpp"
#include "nibble/gemm/matmul.hpp"
#include "nibble/nn/attention.hpp"
#include "nibble/nn/gate.hpp"
#include "nibble/nn/kv_cache.hpp"
#include "nibble/nn/norm.hpp"
#include "nibble/nn/rope.hpp"
#include "profile.hpp"
#include "vocabulary.hpp"

namespace llm {

struct RunnerOptions {
  std::size_t context = 2048;                                        // positions that a sequence may reach
  std::size_t block = 512;                                           // tokens computed at once
  nibble::Activations activations = nibble::Activations::automatic;  // fp32: exact; automatic: int8 where it can
  nibble::KvFormat kv_format = nibble::KvFormat::fp16;
  nibble::ThreadPool* pool = nullptr;  // nullptr: the calling thread alone
  Profile* profile = nullptr;          // where time is written down, if anywhere
};

/// Tokens that one sequence of a batch goes on with.
struct Piece {
  nibble::KvCache* cache = nullptr;
  const Token* tokens = nullptr;
  std::size_t count = 0;
  bool wants_logits = true;  // the last token's
};

/// Runs one model. All scratch memory is allocated by the constructor; generating a token allocates nothing.
/// One thread at a time may use a runner; several runners may share a model.
class Runner {
 public:
  using Cache = nibble::KvCache;
  using Matrix = Eigen::MatrixXf;
  using Logits = Matrix::ColsBlockXpr;  // vocabulary x tokens

  Runner(const Model& model, const RunnerOptions& options)
      : model_(model), h_(model.hparams), options_(options), rope_(rope_options(model, options.context)) {
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
    positions_.resize(static_cast<std::size_t>(block));
    spans_.reserve(static_cast<std::size_t>(block));
  }

  const Hparams& hparams() const { return h_; }
  const RunnerOptions& options() const { return options_; }
  Cache new_cache() const {
    nibble::KvCacheOptions o;
    o.layers = h_.layers;
    o.kv_heads = h_.kv_heads;
    o.head_size = h_.head_size;
    o.capacity = options_.context;
    o.format = options_.kv_format;
    return Cache(o);
  }

  /// Appends `count` tokens to the sequence in `cache` and calls emit(i, logits) for the tokens i >= `first_wanted`, in
  /// blocks: logits has a column for each of the tokens i, i + 1, ...
  template <class Emit>
  void append(Cache& cache, const Token* tokens, std::size_t count, std::size_t first_wanted, Emit&& emit) {
    const Piece all{&cache, tokens, count};
    check(&all, 1);
    for (std::size_t begin = 0; begin < count;) {
      const std::size_t n = std::min(options_.block, count - begin);
      const Piece piece{&cache, tokens + begin, n};
      forward(&piece, 1);
      for (std::size_t i = std::max(begin, first_wanted); i < begin + n;) {
        const std::size_t m = std::min<std::size_t>(begin + n - i, static_cast<std::size_t>(logits_.cols()));
        emit(i, output(m, [&](std::size_t t) { return i - begin + t; }));
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

  /// Appends to several sequences at once, each in a cache of its own, options.block tokens in all at most, and returns
  /// the logits of the last tokens of the pieces that want them, a column each (valid until the next call; at most
  /// max_pieces() may). Every logit is what it would be alone.
  Logits append(const Piece* pieces, std::size_t count) {
    std::size_t tokens = 0, wanted = 0;
    for (std::size_t p = 0; p < count; ++p) {
      tokens += pieces[p].count;
      wanted += pieces[p].wants_logits ? 1 : 0;
      if (pieces[p].count == 0) throw std::runtime_error("piece " + std::to_string(p) + " has no tokens");
      for (std::size_t other = 0; other < p; ++other)
        if (pieces[other].cache == pieces[p].cache)
          throw std::runtime_error("two pieces of a batch belong to one sequence");
    }
    if (tokens > options_.block || wanted > max_pieces())
      throw std::runtime_error("a batch has " + std::to_string(tokens) + " tokens and wants " +
                               std::to_string(wanted) + " logits, expected at most " +
                               std::to_string(options_.block) + " and " + std::to_string(max_pieces()));
    check(pieces, count);
    if (count > 0) forward(pieces, count);
    std::size_t end = 0;
    const Piece* piece = pieces;
    return output(wanted, [&](std::size_t) {
      for (;; ++piece) {
        end += piece->count;
        if (piece->wants_logits) break;
      }
      ++piece;
      return end - 1;
    });
  }
  std::size_t max_pieces() const { return static_cast<std::size_t>(logits_.cols()); }

 private:
  // Logits of a vocabulary are large: few tokens at once.
  static constexpr Eigen::Index logits_block = 64;
  // Tokens of one task of what works token by token; fewer than this run on the calling thread.
  static constexpr std::size_t chunk = 16;

  static Eigen::Index index(std::size_t n) { return static_cast<Eigen::Index>(n); }
  static nibble::RopeOptions rope_options(const Model& model, std::size_t context) {
    nibble::RopeOptions o;
    o.dimensions = model.hparams.rope_size;
    o.positions = context;
    o.base = model.hparams.rope_base;
    o.linear_scale = model.hparams.rope_scale;
    o.divisors = model.rope_divisors;
    return o;
  }

  void check(const Piece* pieces, std::size_t count) const {
    for (std::size_t p = 0; p < count; ++p) {
      const Piece& piece = pieces[p];
      if (piece.count > piece.cache->capacity() - piece.cache->size())
        throw std::runtime_error("the text is longer than the context of " +
                                 std::to_string(piece.cache->capacity()) + " tokens");
      for (std::size_t t = 0; t < piece.count; ++t)
        if (piece.tokens[t] < 0 || static_cast<std::size_t>(piece.tokens[t]) >= h_.vocabulary)
          throw std::runtime_error("token " + std::to_string(piece.tokens[t]) + " is not in the vocabulary");
    }
  }

  /// f(first token, tokens) for all of n tokens, several to a task.
  template <class F>
  void for_tokens(std::size_t n, F&& f) {
    nibble::detail::for_tasks(options_.pool, (n + chunk - 1) / chunk, [&](std::size_t task, std::size_t) {
      f(task * chunk, std::min(chunk, n - task * chunk));
    });
  }

  void norm(const Eigen::VectorXf& weight, std::size_t n) {
    for_tokens(n, [&](std::size_t t, std::size_t count) {
      nibble::rms_norm(x_.middleCols(index(t), index(count)), weight, h_.rms_epsilon,
                       normed_.middleCols(index(t), index(count)));
    });
  }

  struct Product {
    const nibble::PackedMatrix& w;
    Matrix& y;
    nibble::Epilogue epilogue = {};
  };

  /// Several products of the same n columns of x. They are quantized once, and only if some weight wants integers.
  class Input {
   public:
    Input(Runner& runner, ProfileClock& clock, const Matrix& x, std::size_t n)
        : runner_(runner), clock_(clock), x_(x), n_(index(n)) {}

    /// At most four products that do not need each other; those of integers run as one parallel region.
    void multiply(Operation what, std::initializer_list<Product> products) {
      nibble::MatmulOptions options;
      options.pool = runner_.options_.pool;
      options.workspace = &runner_.workspace_;
      nibble::GroupedProduct grouped[4];
      std::size_t count = 0;
      Work work;
      for (const Product& p : products) {
        const bool integers =
            runner_.options_.activations != nibble::Activations::fp32 && nibble::is_integer(p.w.format());
        work += work_of(p.w, integers);
        if (!integers) {
          options.activations = nibble::Activations::fp32;
          options.epilogue = p.epilogue;
          nibble::matmul(p.w, x_.leftCols(n_), p.y.leftCols(n_), options);
          continue;
        }
        // A scale for each group of inputs: with one a token, this size of model loses 4 % of its perplexity.
        if (const std::size_t group = nibble::activation_group(p.w); quantized_ != group) {
          nibble::matmul_grouped(grouped, count, options);
          count = 0;
          clock_.lap(what);
          runner_.quantized_.assign(x_.leftCols(n_), nibble::Activations::int8_grouped, options.pool, group);
          clock_.lap(Operation::quantize);
          quantized_ = group;
        }
        grouped[count++] = {&p.w, &runner_.quantized_, p.y.data(), p.y.outerStride(), p.epilogue};
      }
      nibble::matmul_grouped(grouped, count, options);
      clock_.lap(what, work);
    }

   private:
    Work work_of(const nibble::PackedMatrix& w, bool integers) const {
      const double operations = 2.0 * static_cast<double>(w.rows()) * static_cast<double>(w.cols() * n_);
      return {static_cast<double>(w.byte_size()), integers ? operations : 0.0, integers ? 0.0 : operations};
    }

    Runner& runner_;
    ProfileClock& clock_;
    const Matrix& x_;
    Eigen::Index n_;
    std::size_t quantized_ = 0;  // the group size of runner_.quantized_, once it holds x
  };

  /// The pieces' tokens through all layers: x_ holds their hidden states after the last, piece after piece.
  void forward(const Piece* pieces, std::size_t count) {
    spans_.clear();
    std::size_t n = 0;
    std::size_t reach = 0;
    for (std::size_t p = 0; p < count; ++p) {
      const Piece& piece = pieces[p];
      nibble::AttentionSpan span;
      span.cache = piece.cache;
      span.column = n;
      span.tokens = piece.count;
      span.past = piece.cache->size();
      spans_.push_back(span);
      for (std::size_t t = 0; t < piece.count; ++t)
        positions_[n++] = {piece.cache, span.past + t, piece.tokens[t]};
      reach = std::max(reach, span.past + span.tokens);
    }
    ProfileClock clock(options_.profile);
    rope_.prepare(reach);
    clock.lap(Operation::rope);
    for_tokens(n, [&](std::size_t first, std::size_t tokens) {
      for (std::size_t t = first; t < first + tokens; ++t)
        model_.embedding.dequantize_row(positions_[t].token, x_.col(index(t)).data());
    });
    clock.lap(Operation::embedding);
    const auto columns = x_.leftCols(index(n));
    const float scale = 1.0F / std::sqrt(static_cast<float>(h_.head_size));
    const Work attention_work = clock.runs() ? work_of_attention() : Work();
    nibble::AttentionOptions attention;
    attention.pool = options_.pool;
    attention.workspace = &workspace_;
    for (std::size_t i = 0; i < model_.layers.size(); ++i) {
      const Layer& l = model_.layers[i];
      norm(l.attention_norm, n);
      clock.lap(Operation::norm);
      Input(*this, clock, normed_, n)
          .multiply(Operation::qkv, {{l.query, query_}, {l.key, key_}, {l.value, value_}});
      for_tokens(n, [&](std::size_t first, std::size_t tokens) {
        for (std::size_t t = first; t < first + tokens; ++t) {
          const Position& p = positions_[t];
          float* key = key_.col(index(t)).data();
          rope_.apply(query_.col(index(t)).data(), h_.heads, h_.head_size, p.position, scale);
          rope_.apply(key, h_.kv_heads, h_.head_size, p.position);
          p.cache->store(i, p.position, key, value_.col(index(t)).data());
        }
      });
      clock.lap(Operation::rope);
      nibble::attention(spans_.data(), spans_.size(), i, query_.leftCols(index(n)), attended_.leftCols(index(n)),
                        attention);
      clock.lap(Operation::attention, attention_work);
      Input(*this, clock, attended_, n)
          .multiply(Operation::attention_output, {{l.output, x_, nibble::Epilogue().add(columns)}});

      norm(l.ffn_norm, n);
      clock.lap(Operation::norm);
      Input ffn(*this, clock, normed_, n);
      if (n <= chunk) {  // one parallel region instead of two
        ffn.multiply(Operation::gate_up, {{l.gate, gate_}, {l.up, up_}});
        nibble::silu_multiply(gate_.leftCols(index(n)), up_.leftCols(index(n)));
        clock.lap(Operation::gate_up);
      } else {
        ffn.multiply(Operation::gate_up, {{l.up, up_}});
        ffn.multiply(Operation::gate_up,
                     {{l.gate, gate_, nibble::Epilogue().silu().multiply(up_.leftCols(index(n)))}});
      }
      Input(*this, clock, gate_, n).multiply(Operation::down, {{l.down, x_, nibble::Epilogue().add(columns)}});
    }
    for (std::size_t p = 0; p < count; ++p) pieces[p].cache->advance(pieces[p].count);
  }

  /// One layer's: the keys and values that the spans see, and two products with each of them.
  Work work_of_attention() const {
    double bytes = 0.0, seen = 0.0;
    bool integers = false;
    for (const nibble::AttentionSpan& s : spans_) {
      const auto past = static_cast<double>(s.past), tokens = static_cast<double>(s.tokens);
      bytes +=
          (past + tokens) * static_cast<double>(s.cache->bytes_per_position()) / static_cast<double>(h_.layers);
      seen += tokens * past + tokens * (tokens + 1.0) / 2.0;
      integers = s.cache->format() == nibble::KvFormat::int8;
    }
    const double operations = 4.0 * seen * static_cast<double>(h_.q_size());
    return {bytes, integers ? operations : 0.0, integers ? 0.0 : operations};
  }

  /// Logits of m tokens, of which the t-th (in ascending order) is column column_of(t) of the last forward().
  template <class ColumnOf>
  Logits output(std::size_t m, ColumnOf&& column_of) {
    ProfileClock clock(options_.profile);
    for (std::size_t t = 0; t < m; ++t)
      nibble::rms_norm(x_.col(index(column_of(t))), model_.output_norm, h_.rms_epsilon, normed_.col(index(t)));
    clock.lap(Operation::norm);
    if (m > 0) Input(*this, clock, normed_, m).multiply(Operation::output_layer, {{model_.output, logits_}});
    return logits_.leftCols(index(m));
  }

  struct Position {
    Cache* cache = nullptr;
    std::size_t position = 0;
    Token token = 0;
  };

  const Model& model_;
  const Hparams h_;
  RunnerOptions options_;
  nibble::Rope rope_;
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
  std::vector<Position> positions_;  // of the tokens in this forward pass
  std::vector<nibble::AttentionSpan> spans_;
};

}  // namespace llm
