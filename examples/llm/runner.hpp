// The forward pass: tokens in, logits out.
//
// A token's logits are the same bits whether it came alone, in a prompt, in pieces of one, or in a batch with other
// sequences, and for any number of threads: every product sums in one order, and everything else works on one token at a
// time.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.hpp"
#include "nibble/gemm/matmul.hpp"
#include "nibble/gemm/outliers.hpp"
#include "nibble/nn/attention.hpp"
#include "nibble/nn/gate.hpp"
#include "nibble/nn/kv_cache.hpp"
#include "nibble/nn/norm.hpp"
#include "nibble/nn/rope.hpp"
#include "profile.hpp"
#include "vocabulary.hpp"

namespace llm {

/// Sees what every linear layer multiplies, as the layer wants it (rotated, reordered), before it is quantized.
class InputObserver {
 public:
  InputObserver() = default;
  InputObserver(const InputObserver&) = delete;
  InputObserver& operator=(const InputObserver&) = delete;
  virtual ~InputObserver() = default;
  /// `w` is one of the model's own; x has a token a column.
  virtual void see(const Linear& w, const Eigen::Ref<const Eigen::MatrixXf>& x) = 0;
};

/// Activations that went through products of integers, and those of them that were outliers.
struct OutlierCounts {
  std::uint64_t values = 0;
  std::uint64_t outliers = 0;
  double share() const { return values == 0 ? 0.0 : static_cast<double>(outliers) / static_cast<double>(values); }
};

struct RunnerOptions {
  std::size_t context = 2048;  // positions that a sequence may reach
  std::size_t block = 512;     // tokens computed at once
  /// What integer weights are multiplied with. fp32: floats. automatic: INT8 codes as the linear layer says - on its
  /// static scales, or apart from its outliers - or else as int8_grouped. int8_grouped: INT8 codes, a scale a token and
  /// group of inputs. int8: a scale a token.
  nibble::Activations activations = nibble::Activations::automatic;
  /// Of codes in the blocks, 2 to 8, where activations is int8_grouped or int8.
  unsigned activation_bits = 8;
  /// Above 0: LLM.int8() in all blocks, what activations says but for those from here on, which stay floats.
  float outlier_threshold = 0.0F;
  /// Of the output layer, where those of the blocks are no floats: fp32, or automatic, a scale a token and group.
  nibble::Activations output_activations = nibble::Activations::automatic;
  nibble::KvFormat kv_format = nibble::KvFormat::fp16;
  OutlierCounts* outliers = nullptr;   // counts activations that stay floats beside INT8, if anybody does
  nibble::ThreadPool* pool = nullptr;  // nullptr: the calling thread alone
  Profile* profile = nullptr;          // where time is written down, if anywhere
  InputObserver* observer = nullptr;   // who looks at the blocks' inputs, if anybody
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
    if (h_.rotation.block != 0) rotation_ = rotation_of(h_.rotation, index(h_.dim));
    bool transforms = model.output.transforms_input();
    for (const Layer& l : model.layers)
      for (const Linear* w : l.linears()) transforms = transforms || w->transforms_input();
    Eigen::Index side_rank = 0, side_rows = 0;
    for (const Layer& l : model.layers)
      for (const Linear* w : l.linears())
        if (w->side() != nullptr) {
          side_rank = std::max(side_rank, w->side()->a.rows());
          side_rows = std::max(side_rows, w->rows());
        }
    if (side_rank > 0) {
      side_input_.resize(side_rank * block);
      for (Eigen::VectorXf& side : sides_) side.resize(side_rows * block);
    }
    if (transforms) transformed_.resize(index(std::max({h_.dim, h_.q_size(), h_.ffn})), block);
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
    o.step = std::max<std::size_t>(options_.block, 1);
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

  /// What is done with a product before it is stored.
  enum class Then {
    nothing,
    add,   // the residual stream, in place
    gate,  // silu of it, times up_
  };
  struct Product {
    const Linear& w;
    Matrix& y;
    Then then = Then::nothing;
  };

  /// What a linear layer's input becomes; several layers with the same one share it.
  struct Form {
    enum class Kind { floats, grouped, token, fixed, outliers, fixed_outliers };
    Kind kind = Kind::floats;
    std::size_t group = 0;                               // grouped; the rest beside outliers
    unsigned bits = 8;                                   // grouped, token
    float threshold = 0.0F;                              // outliers
    const LinearExtras* transform = nullptr;             // nullptr: as it came
    const nibble::HadamardRotation* rotation = nullptr;  // transform's
    const LinearExtras* scales = nullptr;                // fixed, fixed_outliers

    bool has_outliers() const { return kind == Kind::outliers || kind == Kind::fixed_outliers; }

    bool same_input(const Form& o) const {
      return transform == o.transform ||
             (transform != nullptr && o.transform != nullptr && transform->same_input(*o.transform));
    }
    bool same(const Form& o) const {
      return kind == o.kind && group == o.group && bits == o.bits && threshold == o.threshold && same_input(o) &&
             (scales == o.scales || (scales != nullptr && o.scales != nullptr && scales->same_scales(*o.scales)));
    }
  };

  Form form_of(const Linear& w, bool block) const {
    using nibble::Activations;
    Form form;
    const LinearExtras* e = w.extras();
    if (e != nullptr && e->transforms_input()) form.transform = e, form.rotation = w.rotation();
    if (options_.activations == Activations::fp32 || !nibble::is_integer(w.format())) return form;
    if (!block && options_.output_activations == Activations::fp32) return form;
    const bool automatic = options_.activations == Activations::automatic;
    bool token = block && options_.activations == Activations::int8;
    if (block && !automatic) form.bits = options_.activation_bits;
    float threshold = block ? options_.outlier_threshold : 0.0F;
    if (automatic && threshold == 0.0F && e != nullptr) {
      threshold = e->outlier_threshold;
      if (threshold == 0.0F && !e->activation_scales.empty()) {
        form.kind = e->activation_outliers ? Form::Kind::fixed_outliers : Form::Kind::fixed;
        form.scales = e;
        return form;
      }
      if (e->activation_bits != 0 && threshold == 0.0F) {
        form.bits = e->activation_bits;
        token = e->activation_token;
      }
    }
    // A scale for each group of inputs. With one a token, this size of model loses 4 % of its perplexity.
    form.group = token ? 0 : nibble::activation_group(w.weights());
    form.threshold = threshold;
    form.kind = threshold > 0.0F ? Form::Kind::outliers : token ? Form::Kind::token : Form::Kind::grouped;
    return form;
  }

  /// Several products of the same n columns of x. They are quantized once, and only if some weight wants integers.
  class Input {
   public:
    Input(Runner& runner, ProfileClock& clock, const Matrix& x, std::size_t n, bool block = true)
        : runner_(runner), clock_(clock), x_(x), n_(index(n)), block_(block) {}

    /// At most four products that do not need each other; those of integers run as one parallel region.
    void multiply(Operation what, std::initializer_list<Product> products) {
      using Kind = typename Form::Kind;
      nibble::MatmulOptions options;
      options.pool = runner_.options_.pool;
      options.workspace = &runner_.workspace_;
      nibble::GroupedProduct grouped[4];
      std::size_t count = 0, side = 0;
      Work work;
      const auto flush = [&] {
        nibble::matmul_grouped(grouped, count, options);
        count = 0;
      };
      for (const Product& p : products) {
        const Form form = runner_.form_of(p.w, block_);
        work += work_of(p.w, form.kind != Kind::floats);
        if (block_ && runner_.options_.observer != nullptr) runner_.options_.observer->see(p.w, transformed(form));
        nibble::Epilogue epilogue;
        if (p.w.side() != nullptr) epilogue.add(runner_.multiply_side(*p.w.side(), x_, n_, side++));
        epilogue.append(runner_.epilogue_of(p, n_));
        // Codes that other products have yet to read stay until then.
        if (form.kind != Kind::floats && !(ready_ && form.same(form_))) {
          flush();
          clock_.lap(what);
          quantize(form);
          clock_.lap(Operation::quantize);
        }
        if (form.kind == Kind::floats || form.has_outliers()) {
          options.epilogue = epilogue;
          options.activations = nibble::Activations::fp32;
          if (form.kind == Kind::floats)
            nibble::matmul(p.w.weights(), transformed(form), p.y.leftCols(n_), options);
          else
            nibble::matmul(p.w.weights(), runner_.outliers_, p.y.leftCols(n_), options);
          options.epilogue = {};
          continue;
        }
        grouped[count++] = {&p.w.weights(), &runner_.quantized_, p.y.data(), p.y.outerStride(), epilogue};
      }
      flush();
      clock_.lap(what, work);
    }

   private:
    Work work_of(const Linear& w, bool integers) const {
      const double operations = 2.0 * static_cast<double>(w.rows()) * static_cast<double>(w.cols() * n_);
      return {static_cast<double>(w.byte_size()), integers ? operations : 0.0, integers ? 0.0 : operations};
    }

    /// x as the layer wants it, in floats.
    Eigen::Ref<const Matrix> transformed(const Form& form) {
      if (form.transform == nullptr) return x_.leftCols(n_);
      auto to = runner_.transformed_.topLeftCorner(x_.rows(), n_);
      if (transform_ != nullptr && transform_->same_input(*form.transform)) return to;
      transform_ = form.transform;
      const std::vector<std::uint32_t>& order = form.transform->input_order;
      if (form.transform->hadamard.block != 0) {
        to = x_.leftCols(n_);
        form.rotation->rotate(to, runner_.options_.pool);
      }
      if (order.empty()) return to;
      const bool in_place = form.transform->hadamard.block != 0;
      if (in_place) runner_.ordered_.resize(x_.rows());
      for (Eigen::Index t = 0; t < n_; ++t) {
        const float* from = x_.col(t).data();
        if (in_place) {
          runner_.ordered_ = to.col(t);
          from = runner_.ordered_.data();
        }
        for (Eigen::Index k = 0; k < x_.rows(); ++k) to(k, t) = from[order[static_cast<std::size_t>(k)]];
      }
      return to;
    }

    void quantize(const Form& form) {
      using Kind = typename Form::Kind;
      using nibble::Activations;
      nibble::ThreadPool* pool = runner_.options_.pool;
      const Eigen::Ref<const Matrix> x = transformed(form);
      const Activations kind = form.group != 0 ? Activations::int8_grouped : Activations::int8;
      if (form.kind == Kind::outliers) {
        nibble::OutlierOptions outliers;
        outliers.threshold = form.threshold;
        outliers.activations = kind;
        outliers.group_size = form.group;
        runner_.outliers_.assign(x, outliers, pool);
      } else if (form.kind == Kind::fixed_outliers) {
        const std::vector<float>& scales = form.scales->activation_scales;
        runner_.outliers_.assign_static(x, scales.data(), scales.size(), form.scales->activation_group, pool);
      } else if (form.kind == Kind::fixed) {
        const std::vector<float>& scales = form.scales->activation_scales;
        runner_.quantized_.assign_static(x, scales.data(), scales.size(), form.scales->activation_group, pool);
      } else {
        runner_.quantized_.assign(x, kind, pool, form.group, form.bits);
      }
      if (OutlierCounts* counts = runner_.options_.outliers) {
        counts->values += static_cast<std::uint64_t>(x.size());
        if (form.has_outliers()) counts->outliers += runner_.outliers_.share().values;
      }
      form_ = form;
      ready_ = true;
    }

    Runner& runner_;
    ProfileClock& clock_;
    const Matrix& x_;
    Eigen::Index n_;
    bool block_;
    bool ready_ = false;  // runner_.quantized_ or outliers_ hold x as form_ says
    Form form_;
    const LinearExtras* transform_ = nullptr;  // whose input runner_.transformed_ holds, if any
  };

  nibble::Epilogue epilogue_of(const Product& p, Eigen::Index n) const {
    nibble::Epilogue epilogue;
    if (p.w.extras() != nullptr && p.w.extras()->bias.size() != 0) epilogue.bias(p.w.extras()->bias);
    if (p.then == Then::add) epilogue.add(x_.leftCols(n));
    if (p.then == Then::gate) epilogue.silu().multiply(up_.leftCols(n));
    return epilogue;
  }

  /// The `which`-th of a group's side terms times x, rows x n, valid until the next group.
  Eigen::Map<const Matrix> multiply_side(const PackedSide& side, const Matrix& x, Eigen::Index n,
                                         std::size_t which) {
    nibble::MatmulOptions options;
    options.activations = nibble::Activations::fp32;
    options.pool = options_.pool;
    options.workspace = &workspace_;
    Eigen::Map<Matrix> u(side_input_.data(), side.a.rows(), n), y(sides_[which].data(), side.b.rows(), n);
    nibble::matmul(side.a, x.leftCols(n), u, options);
    nibble::matmul(side.b, u, y, options);
    return {y.data(), y.rows(), y.cols()};
  }

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
    if (rotation_) rotation_->rotate(x_.leftCols(index(n)), options_.pool);
    clock.lap(Operation::embedding);
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
      Input(*this, clock, attended_, n).multiply(Operation::attention_output, {{l.output, x_, Then::add}});

      norm(l.ffn_norm, n);
      clock.lap(Operation::norm);
      Input ffn(*this, clock, normed_, n);
      if (n <= chunk) {  // one parallel region instead of two
        ffn.multiply(Operation::gate_up, {{l.gate, gate_}, {l.up, up_}});
        nibble::silu_multiply(gate_.leftCols(index(n)), up_.leftCols(index(n)));
        clock.lap(Operation::gate_up);
      } else {
        ffn.multiply(Operation::gate_up, {{l.up, up_}});
        ffn.multiply(Operation::gate_up, {{l.gate, gate_, Then::gate}});
      }
      Input(*this, clock, gate_, n).multiply(Operation::down, {{l.down, x_, Then::add}});
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
    for (std::size_t t = 0; t < m; ++t) normed_.col(index(t)) = x_.col(index(column_of(t)));
    auto last = normed_.leftCols(index(m));
    if (rotation_) rotation_->unrotate(last, options_.pool);
    nibble::rms_norm(last, model_.output_norm, h_.rms_epsilon, last);
    clock.lap(Operation::norm);
    if (m > 0)
      Input(*this, clock, normed_, m, false).multiply(Operation::output_layer, {{model_.output, logits_}});
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
  std::shared_ptr<const nibble::HadamardRotation> rotation_;  // of the residual stream
  nibble::QuantizedActivations quantized_;
  nibble::OutlierActivations outliers_;
  Matrix x_;  // the residual stream
  Matrix normed_;
  Matrix query_;
  Matrix key_;
  Matrix value_;
  Matrix attended_;
  Matrix gate_;
  Matrix up_;
  Matrix logits_;
  Matrix transformed_;                    // an input rotated or reordered, if some layer wants that
  Eigen::VectorXf ordered_;               // a token of it
  Eigen::VectorXf side_input_;            // a side term's a x, if some layer has one
  std::array<Eigen::VectorXf, 4> sides_;  // and what they add to the products of a group
  std::vector<Position> positions_;       // of the tokens in this forward pass
  std::vector<nibble::AttentionSpan> spans_;
};

}  // namespace llm
