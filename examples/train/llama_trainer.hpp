// A whole Llama-family model in training: tokens in, the gradients of its cross-entropy out. Every matrix of every block is
// any LinearLayer.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../llm/block.hpp"
#include "../llm/block_training.hpp"
#include "../llm/math.hpp"
#include "../llm/model_file.hpp"
#include "nibble/gemm/matmul.hpp"
#include "nibble/train/cross_entropy.hpp"
#include "nibble/train/dropout.hpp"
#include "nibble/train/embedding.hpp"
#include "nibble/train/linear_layer.hpp"
#include "nibble/train/parameters.hpp"

namespace llm {

/// A frozen matrix as a file has it: products come from its packed weights, and no float matrix or gradient is held.
class FrozenLinear : public nibble::LinearLayer {
 public:
  explicit FrozenLinear(nibble::PackedMatrix weights) : weights_(std::move(weights)) {}
  const nibble::PackedMatrix& weights() const { return weights_; }
  Eigen::Index rows() const override { return weights_.rows(); }
  Eigen::Index cols() const override { return weights_.cols(); }
  void forward(const nibble::ConstMatrixRef& x, nibble::MatrixRef y, const nibble::TrainOptions& options,
               const nibble::Epilogue& epilogue) override {
    nibble::matmul(weights_, x, y, fp32(options, epilogue));
  }
  void backward(const nibble::ConstMatrixRef&, const nibble::ConstMatrixRef& dy, nibble::MatrixRef* dx,
                nibble::Gradient how, const nibble::TrainOptions& options) override {
    if (dx == nullptr) return;
    nibble::Epilogue epilogue;
    if (how == nibble::Gradient::add) epilogue.add(*dx);
    nibble::matmul_transposed(weights_, dy, *dx, fp32(options, epilogue));
  }
  void append_parameters(const std::string&, nibble::Parameters&) override {}

 private:
  static nibble::MatmulOptions fp32(const nibble::TrainOptions& options, const nibble::Epilogue& epilogue) {
    nibble::MatmulOptions o = nibble::detail::product_options(options, epilogue);
    o.activations = nibble::Activations::fp32;
    return o;
  }
  nibble::PackedMatrix weights_;
};

/// A matrix that a layer is to be made of.
struct LayerSource {
  std::size_t layer = 0;
  BlockMatrix matrix = BlockMatrix::query;
  std::string name;  // "blk.3.attn_q"; its tensor has ".weight" behind
  MatrixShape shape;
  const ModelFile* file = nullptr;       // nullptr: a fresh model
  std::function<WeightMatrix()> values;  // its floats, made when asked for: those of the file, or fresh ones
};
using LayerFactory = std::function<std::unique_ptr<nibble::LinearLayer>(const LayerSource&)>;

/// All of a matrix is trained, in floats.
inline std::unique_ptr<nibble::LinearLayer> dense_layer(const LayerSource& source) {
  return std::make_unique<nibble::DenseLinear>(source.values());
}

struct LlamaTrainerOptions {
  std::size_t window = 256;         // tokens of a sequence
  std::size_t windows_at_once = 4;  // forward and backward together; gradients of more are added up in order
  bool checkpointing = false;       // keep only what goes into a block, and compute the rest again
  float dropout = 0.0F;             // of the embedding, and of what every block's two branches add
  std::uint64_t seed = 0;           // of dropout, and of fresh weights
  nibble::Activations products = nibble::Activations::fp32;
  bool train_embedding = true;  // and the output layer
  bool train_norms = true;
  nibble::ThreadPool* pool = nullptr;
};

/// Windows of tokens side by side, `window` each, and the token after every one; no_token: not predicted.
struct TokenBatch {
  std::vector<Token> inputs;
  std::vector<Token> targets;
};

class LlamaTrainer {
 public:
  using Matrix = Eigen::MatrixXf;

  /// A fresh model: matrices normal with a standard deviation of 0.02, those that add to the residual stream with that over
  /// sqrt(2 layers) (Radford 2019, section 2.3), norms 1. The same for a seed on a platform.
  LlamaTrainer(const Hparams& h, const LlamaTrainerOptions& options, const LayerFactory& factory = dense_layer,
               bool tied = true)
      : h_(h), options_(options), blocks_(h, block_options(options, {})) {
    check(h);
    begin();
    const auto fresh = [this](MatrixShape shape, std::uint64_t stream, double deviation) {
      WeightMatrix m(shape.rows, shape.cols);
      Normal normal(nibble::detail::mix64(options_.seed) + stream);
      for (Eigen::Index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<float>(deviation * normal());
      return m;
    };
    const MatrixShape table{static_cast<Eigen::Index>(h.vocabulary), static_cast<Eigen::Index>(h.dim)};
    table_ = std::make_unique<nibble::DenseLinear>(fresh(table, 1, 0.02));
    if (!tied) output_ = std::make_unique<nibble::DenseLinear>(fresh(table, 2, 0.02));
    const double into_residual = 0.02 / std::sqrt(2.0 * static_cast<double>(h.layers));
    for (std::size_t layer = 0; layer < h.layers; ++layer)
      for (const BlockMatrix m : block_matrices) {
        LayerSource source = source_of(layer, m, nullptr);
        const bool adds = m == BlockMatrix::output || m == BlockMatrix::down;
        const std::uint64_t stream = 16 + layer * 8 + static_cast<std::uint64_t>(m);
        source.values = [&fresh, shape = source.shape, stream, deviation = adds ? into_residual : 0.02] {
          return fresh(shape, stream, deviation);
        };
        add(factory(source), source);
      }
    const Eigen::VectorXf ones = Eigen::VectorXf::Ones(static_cast<Eigen::Index>(h.dim));
    for (std::size_t i = 0; i < 2 * h.layers + 1; ++i) norms_.push_back(ones);
    finish();
  }

  /// The weights of a file. Where the embedding is not trained, it and the output layer stay as packed as they are.
  /// Throws Unsupported for a model whose residual stream is rotated or whose layers have biases.
  LlamaTrainer(const ModelFile& file, const LlamaTrainerOptions& options,
               const LayerFactory& factory = dense_layer)
      : h_(file.hparams()), options_(options), blocks_(h_, block_options(options, rope_divisors_of(file))) {
    using nibble::detail::require;
    require<nibble::Unsupported>(h_.rotation.block == 0,
                                 "a model with a rotated residual stream cannot be trained");
    begin();
    const bool tied = !file.has("output.weight");
    const auto read = [&file, this](const std::string& name) {
      const LinearExtras* e = file.extras(name);
      require<nibble::Unsupported>(e == nullptr || e->bias.size() == 0, "'", name,
                                   "' has a bias, which is not trained");
      const nibble::QuantizedTensor t = file.quantized(name);
      require<nibble::FormatError>(t.rank() == 2, "'", name, "' has ", t.rank(), " dimensions, expected 2");
      WeightMatrix w(static_cast<Eigen::Index>(t.shape()[0]), static_cast<Eigen::Index>(t.shape()[1]));
      t.dequantize(w.data(), options_.pool);
      require_finite(w.data(), w.size(), name);
      if (e != nullptr) {
        check(*e, name, t.shape()[0], t.shape()[1]);
        undo_input_transform(*e, w);
      }
      return w;
    };
    if (options.train_embedding) {
      table_ = std::make_unique<nibble::DenseLinear>(read("token_embd.weight"));
      if (!tied) output_ = std::make_unique<nibble::DenseLinear>(read("output.weight"));
    } else {
      for (const char* name : {"token_embd.weight", "output.weight"})
        require<nibble::Unsupported>(file.extras(name) == nullptr, "'", name,
                                     "' has an order, scales or a rotation");
      const auto frozen = [&](const char* name) {
        auto layer = std::make_unique<FrozenLinear>(file.matrix(name, options.pool));
        require_finite(layer->weights(), name);
        return layer;
      };
      frozen_table_ = frozen("token_embd.weight");
      if (!tied) output_ = frozen("output.weight");
    }
    for (std::size_t layer = 0; layer < h_.layers; ++layer)
      for (const BlockMatrix m : block_matrices) {
        LayerSource source = source_of(layer, m, &file);
        source.values = [&read, name = source.name] { return read(name + ".weight"); };
        add(factory(source), source);
      }
    const auto norm = [&](const std::string& name) {
      norms_.push_back(file.vector(name));
      require_finite(norms_.back().data(), norms_.back().size(), name);
    };
    for (std::size_t layer = 0; layer < h_.layers; ++layer) {
      norm(attention_norm_name(layer));
      norm(ffn_norm_name(layer));
    }
    norm("output_norm.weight");
    finish();
  }
  LlamaTrainer(const LlamaTrainer&) = delete;
  LlamaTrainer& operator=(const LlamaTrainer&) = delete;

  const Hparams& hparams() const { return h_; }
  const LlamaTrainerOptions& options() const { return options_; }
  bool tied() const { return output_ == nullptr; }
  /// One of the blocks' layers, as the factory made it.
  nibble::LinearLayer& layer(std::size_t layer, BlockMatrix m) {
    return *layers_[layer * 7 + static_cast<std::size_t>(m)];
  }
  /// Of "token_embd.weight", or nullptr where it is frozen.
  nibble::DenseLinear* embedding() { return table_.get(); }
  nibble::DenseLinear* output() {
    return options_.train_embedding ? static_cast<nibble::DenseLinear*>(output_.get()) : nullptr;
  }
  const Eigen::VectorXf& attention_norm(std::size_t layer) const { return norms_[2 * layer]; }
  const Eigen::VectorXf& ffn_norm(std::size_t layer) const { return norms_[2 * layer + 1]; }
  const Eigen::VectorXf& output_norm() const { return norms_.back(); }

  /// All that is trained, with the names of GGUF's tensors: the embedding; block by block its attention norm, query, key,
  /// value, output, feed-forward norm, gate, up, down; the output norm; the output layer. Norms do not decay.
  nibble::Parameters parameters() {
    nibble::Parameters ps;
    if (table_) table_->append_parameters("token_embd.", ps);
    const auto norm = [&](std::size_t i, std::string name) {
      if (!options_.train_norms) return;
      nibble::Parameter p;
      p.name = std::move(name);
      p.value = norms_[i].data();
      p.gradient = norm_gradients_[i].data();
      p.size = static_cast<std::size_t>(norms_[i].size());
      p.decay = false;
      ps.push_back(p);
    };
    for (std::size_t l = 0; l < h_.layers; ++l)
      for (const BlockMatrix m : block_matrices) {
        if (m == BlockMatrix::query) norm(2 * l, attention_norm_name(l));
        if (m == BlockMatrix::gate) norm(2 * l + 1, ffn_norm_name(l));
        layer(l, m).append_parameters("blk." + std::to_string(l) + "." + name_of(m) + ".", ps);
      }
    norm(2 * h_.layers, "output_norm.weight");
    if (output_) output_->append_parameters("output.", ps);
    return ps;
  }

  /// Before the forward passes of a step: fresh dropout, and what layers do once a step.
  void begin_step(std::uint64_t step) {
    step_ = step;
    for (auto& l : layers_) l->begin_step(step);
  }

  /// After the optimizer's step, before a checkpoint.
  void end_step() {
    for (auto& l : layers_) l->end_step();
  }

  /// Adds the gradients of the batch's mean cross-entropy (natural logarithm) and returns it. The gradients are those of
  /// windows_at_once windows each, added in their order: their bits depend on it, and on neither threads nor checkpointing.
  /// Throws Error naming the tensor for hidden states that are not finite, InvalidArgument for tokens that do not fit.
  double gradients(const TokenBatch& batch) {
    const std::size_t predictions = check_batch(batch);
    const auto scale = static_cast<float>(1.0 / static_cast<double>(predictions));
    double sum = 0.0;
    for_pieces(batch, [&](std::size_t first, std::size_t n) {
      const bool keep = !options_.checkpointing;
      forward(batch, first, n, options_.dropout, keep);
      Matrix dy = head(batch, first, n, scale, &sum, nullptr);
      backward(batch, first, n, dy);
    });
    return sum / static_cast<double>(predictions);
  }

  /// Cross-entropy of every prediction (natural logarithm; 0 for those that are none), without dropout or gradients.
  std::vector<double> losses(const TokenBatch& batch) {
    check_batch(batch);
    std::vector<double> out(batch.inputs.size());
    for_pieces(batch, [&](std::size_t first, std::size_t n) {
      forward(batch, first, n, 0.0F, false);
      head(batch, first, n, 0.0F, nullptr, out.data() + first);
    });
    return out;
  }

  /// Mean cross-entropy of `count` windows side by side from the start of `tokens` (0: all that fit), every token from the
  /// second on predicted by those of its window before it.
  double evaluate(const std::vector<Token>& tokens, std::size_t count = 0) {
    const std::size_t w = options_.window;
    nibble::detail::require(tokens.size() > w, "the text has ", tokens.size(),
                            " tokens, expected more than a window of ", w);
    const std::size_t fit = (tokens.size() - 1) / w;
    const std::size_t n = (count == 0 ? fit : std::min(count, fit)) * w;
    TokenBatch batch;
    batch.inputs.assign(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(n));
    batch.targets.assign(tokens.begin() + 1, tokens.begin() + static_cast<std::ptrdiff_t>(n) + 1);
    double sum = 0.0;
    for (const double l : losses(batch)) sum += l;
    return sum / static_cast<double>(n);
  }

 private:
  /// Normal numbers (Box and Muller 1958).
  class Normal {
   public:
    explicit Normal(std::uint64_t seed) : state_(nibble::detail::mix64(seed)) {}
    double operator()() {
      const double radius = std::sqrt(-2.0 * std::log(uniform()));
      return radius * std::cos(6.283185307179586 * uniform());
    }

   private:
    double uniform() {  // above 0, up to 1
      return (static_cast<double>(nibble::detail::mix64(state_++) >> 11) + 1.0) * 0x1p-53;
    }
    std::uint64_t state_;
  };

  static BlockOptions block_options(const LlamaTrainerOptions& options, std::vector<float> divisors) {
    BlockOptions b;
    b.window = options.window;
    b.rope_divisors = std::move(divisors);
    b.pool = options.pool;
    return b;
  }
  void begin() {
    nibble::detail::require(options_.dropout >= 0.0F && options_.dropout < 1.0F, "dropout is ", options_.dropout,
                            ", expected 0 to below 1");
    nibble::detail::require(options_.windows_at_once > 0, "windows_at_once is 0, expected at least 1");
    blocks_.set_products(options_.products);
  }
  /// Of a file's weights: said before the first step, where it is still plain whose fault it is.
  static void require_finite(const float* values, Eigen::Index size, const std::string& name) {
    for (Eigen::Index i = 0; i < size; ++i)
      nibble::detail::require<nibble::FormatError>(std::isfinite(values[i]), "'", name, "' is ", values[i],
                                                   " at element ", i, " before step 1, expected finite weights");
  }
  void require_finite(const nibble::PackedMatrix& m, const std::string& name) const {
    std::vector<char> finite(static_cast<std::size_t>(m.rows()));
    nibble::detail::for_chunks(options_.pool, m.rows(), [&](Eigen::Index first, Eigen::Index n, std::size_t) {
      Eigen::VectorXf row(m.cols());
      for (Eigen::Index r = first; r < first + n; ++r) {
        m.dequantize_row(r, row.data());
        finite[static_cast<std::size_t>(r)] = row.allFinite() ? 1 : 0;
      }
    });
    const auto bad = std::find(finite.begin(), finite.end(), 0);
    nibble::detail::require<nibble::FormatError>(bad == finite.end(), "'", name, "' is not finite in row ",
                                                 bad - finite.begin(), " before step 1, expected finite weights");
  }
  LayerSource source_of(std::size_t layer, BlockMatrix m, const ModelFile* file) const {
    LayerSource source;
    source.layer = layer;
    source.matrix = m;
    source.name = "blk." + std::to_string(layer) + "." + name_of(m);
    source.shape = shape_of(h_, m);
    source.file = file;
    return source;
  }
  void add(std::unique_ptr<nibble::LinearLayer> layer, const LayerSource& source) {
    nibble::detail::require(layer->rows() == source.shape.rows && layer->cols() == source.shape.cols, "'",
                            source.name, "' is ", layer->rows(), " x ", layer->cols(), ", expected ",
                            source.shape.rows, " x ", source.shape.cols);
    layers_.push_back(std::move(layer));
  }
  void finish() {
    for (const Eigen::VectorXf& n : norms_) {
      nibble::detail::require<nibble::FormatError>(static_cast<std::size_t>(n.size()) == h_.dim, "a norm has ",
                                                   n.size(), " elements, expected ", h_.dim);
      norm_gradients_.push_back(Eigen::VectorXf::Zero(options_.train_norms ? n.size() : 0));
    }
    table_layer_ = table_ ? static_cast<nibble::LinearLayer*>(table_.get()) : frozen_table_.get();
    for (const nibble::LinearLayer* t : {table_layer_, output_ ? output_.get() : table_layer_})
      nibble::detail::require<nibble::FormatError>(
          static_cast<std::size_t>(t->rows()) == h_.vocabulary && static_cast<std::size_t>(t->cols()) == h_.dim,
          "the embedding or the output layer is ", t->rows(), " x ", t->cols(), ", expected ", h_.vocabulary,
          " x ", h_.dim);
    inputs_.resize(h_.layers + 1);
  }
  BlockLayers block(std::size_t l) {
    BlockLayers b;
    for (std::size_t m = 0; m < 7; ++m) b.matrices[m] = layers_[l * 7 + m].get();
    b.attention_norm = norm_layer(2 * l);
    b.ffn_norm = norm_layer(2 * l + 1);
    return b;
  }
  NormLayer norm_layer(std::size_t i) {
    return {&norms_[i], options_.train_norms ? &norm_gradients_[i] : nullptr};
  }

  std::size_t check_batch(const TokenBatch& batch) const {
    using nibble::detail::require;
    require(!batch.inputs.empty() && batch.inputs.size() == batch.targets.size() &&
                batch.inputs.size() % options_.window == 0,
            "a batch has ", batch.inputs.size(), " tokens and ", batch.targets.size(),
            " targets, expected as many, and whole windows of ", options_.window);
    std::size_t predictions = 0;
    const auto vocabulary = static_cast<Token>(h_.vocabulary);
    for (std::size_t i = 0; i < batch.inputs.size(); ++i) {
      require(batch.inputs[i] >= 0 && batch.inputs[i] < vocabulary && batch.targets[i] >= no_token &&
                  batch.targets[i] < vocabulary,
              "token ", i, " of a batch is ", batch.inputs[i], " and predicts ", batch.targets[i],
              ", expected 0 to below ", vocabulary);
      if (batch.targets[i] != no_token) ++predictions;
    }
    require(predictions > 0, "a batch has no token to predict");
    return predictions;
  }
  /// f(first token, tokens).
  template <class F>
  void for_pieces(const TokenBatch& batch, F&& f) {
    const std::size_t most = options_.window * options_.windows_at_once;
    for (std::size_t first = 0; first < batch.inputs.size(); first += most)
      f(first, std::min(most, batch.inputs.size() - first));
  }
  ResidualDropout dropout_of(std::size_t layer, std::size_t first, float rate) const {
    ResidualDropout d;
    d.rate = static_cast<double>(rate);
    d.key = {options_.seed, step_, 2 * layer, static_cast<Eigen::Index>(first)};
    return d;
  }
  /// Of the embedding forward, and of its gradient.
  void drop_embedding(Matrix& x, std::size_t first, float rate) const {
    const ResidualDropout d = dropout_of(h_.layers, first, rate);
    if (rate > 0.0F) nibble::dropout(x, x, d.rate, d.key, blocks_.train_options());
  }

  /// inputs_[l]: what goes into block l; the last: what comes out of the last block.
  void forward(const TokenBatch& batch, std::size_t first, std::size_t n, float rate, bool keep) {
    Matrix& x = inputs_[0];
    x.resize(static_cast<Eigen::Index>(h_.dim), static_cast<Eigen::Index>(n));
    nibble::detail::for_chunks(options_.pool, x.cols(), [&](Eigen::Index t, Eigen::Index count, std::size_t) {
      for (Eigen::Index i = t; i < t + count; ++i) {
        const Eigen::Index row = batch.inputs[first + static_cast<std::size_t>(i)];
        if (table_)
          x.col(i) = table_->weight().row(row).transpose();
        else
          frozen_table_->weights().dequantize_row(row, x.col(i).data());
      }
    });
    drop_embedding(x, first, rate);
    if (keep) activations_.resize(h_.layers);
    if (!keep && activations_.empty()) activations_.resize(1);
    for (std::size_t l = 0; l < h_.layers; ++l)
      blocks_.forward(block(l), inputs_[l], activations_[keep ? l : 0], inputs_[l + 1],
                      dropout_of(l, first, rate));
  }

  /// Throws Error naming the first that is not finite.
  void require_finite_hidden() const {
    // A NaN or Inf stays one on its way through the blocks: the last tells of all.
    const auto finite = [](const Matrix& m) { return std::isfinite(m.cwiseAbs().sum()); };
    if (finite(inputs_[h_.layers])) return;
    std::size_t l = 0;
    while (l < h_.layers && finite(inputs_[l])) ++l;
    nibble::detail::raise<nibble::Error>(
        nibble::detail::concat("step ", step_, ": ",
                               l == 0 ? std::string("the embedding ('token_embd.weight')")
                                      : "the output of block " + std::to_string(l - 1),
                               " is not finite"));
  }

  /// Logits and their cross-entropy, some tokens at a time: vocabularies are large. The gradient, times `scale`, with
  /// respect to what comes out of the last block is returned; scale 0: none.
  Matrix head(const TokenBatch& batch, std::size_t first, std::size_t n, float scale, double* sum,
              double* losses) {
    const Matrix& x = inputs_[h_.layers];
    nibble::LinearLayer& layer = output_ ? *output_ : *table_layer_;
    const nibble::TrainOptions& train = blocks_.train_options();
    const auto chunk =
        static_cast<Eigen::Index>(std::clamp<std::size_t>((std::size_t{1} << 22) / h_.vocabulary, 64, 2048));
    normed_.resize(x.rows(), x.cols());
    nibble::detail::for_chunks(options_.pool, x.cols(), [&](Eigen::Index t, Eigen::Index count, std::size_t) {
      nibble::rms_norm(x.middleCols(t, count), norms_.back(), h_.rms_epsilon, normed_.middleCols(t, count));
    });
    require_finite_hidden();
    Matrix dx(scale != 0.0F ? x.rows() : 0, scale != 0.0F ? x.cols() : 0);
    std::vector<double> loss(batch.targets.size());
    for (Eigen::Index begin = 0; begin < x.cols(); begin += chunk) {
      const Eigen::Index count = std::min(chunk, x.cols() - begin);
      logits_.resize(layer.rows(), count);
      layer.forward(normed_.middleCols(begin, count), logits_, train, {});
      if (scale == 0.0F) {
        evaluated(batch, first + static_cast<std::size_t>(begin), loss);
        continue;
      }
      nibble::detail::cross_entropy_chunk(logits_, batch.targets, static_cast<Eigen::Index>(first) + begin,
                                          no_token, true, static_cast<double>(scale), loss, train);
      nibble::MatrixRef d(dx.middleCols(begin, count));
      layer.backward(normed_.middleCols(begin, count), logits_, &d, nibble::Gradient::set, train);
    }
    for (std::size_t i = 0; i < n; ++i) {
      if (sum != nullptr) *sum += loss[first + i];
      if (losses != nullptr) losses[i] = loss[first + i];
    }
    if (scale == 0.0F) return dx;
    nibble::rms_norm_backward(x, norms_.back(), h_.rms_epsilon, dx, dx, options_.train_norms ? &dweight_ : nullptr,
                              nullptr, train);
    if (options_.train_norms) norm_gradients_.back() += dweight_;
    return dx;
  }

  /// The losses of the tokens from `first` on whose logits are there, as the runner's perplexity sums them.
  void evaluated(const TokenBatch& batch, std::size_t first, std::vector<double>& loss) {
    nibble::detail::for_chunks(options_.pool, logits_.cols(),
                               [&](Eigen::Index begin, Eigen::Index count, std::size_t) {
                                 for (Eigen::Index t = begin; t < begin + count; ++t) {
                                   const std::size_t token = first + static_cast<std::size_t>(t);
                                   if (batch.targets[token] == no_token) continue;
                                   const float* l = logits_.col(t).data();
                                   loss[token] = log_sum_exp(l, static_cast<std::size_t>(logits_.rows())) -
                                                 static_cast<double>(l[batch.targets[token]]);
                                 }
                               });
    for (std::size_t t = first; t < first + static_cast<std::size_t>(logits_.cols()); ++t)
      nibble::detail::require(std::isfinite(loss[t]), "logits of token ", t, " are not all finite");
  }

  void backward(const TokenBatch& batch, std::size_t first, std::size_t n, Matrix& dy) {
    for (std::size_t l = h_.layers; l-- > 0;) {
      const BlockLayers b = block(l);
      const ResidualDropout dropout = dropout_of(l, first, options_.dropout);
      BlockActivations& a = activations_[options_.checkpointing ? 0 : l];
      // The last block's are still there.
      if (options_.checkpointing && l + 1 < h_.layers) blocks_.forward(b, inputs_[l], a, again_, dropout);
      const bool last = l == 0 && !table_ && !options_.train_norms;
      blocks_.backward(b, inputs_[l], a, dy, last ? nullptr : &dx_, dropout);
      if (!last) dy.swap(dx_);
    }
    if (!table_) return;
    drop_embedding(dy, first, options_.dropout);
    const std::vector<Token> tokens(batch.inputs.begin() + static_cast<std::ptrdiff_t>(first),
                                    batch.inputs.begin() + static_cast<std::ptrdiff_t>(first + n));
    nibble::embedding_backward(tokens, dy, nibble::RowMajorRef(table_->gradient()), blocks_.train_options());
  }

  const Hparams h_;
  LlamaTrainerOptions options_;
  BlockTrainer blocks_;
  std::unique_ptr<nibble::DenseLinear> table_;   // the embedding in floats, or
  std::unique_ptr<FrozenLinear> frozen_table_;   // as it is in the file
  std::unique_ptr<nibble::LinearLayer> output_;  // nullptr: tied to the embedding
  nibble::LinearLayer* table_layer_ = nullptr;
  std::vector<std::unique_ptr<nibble::LinearLayer>> layers_;  // seven a block
  std::vector<Eigen::VectorXf> norms_, norm_gradients_;       // two a block, and the output's
  std::uint64_t step_ = 0;
  std::vector<Matrix> inputs_;
  std::vector<BlockActivations> activations_;
  Matrix normed_, logits_, dx_, again_;
  Eigen::VectorXf dweight_;
};

}  // namespace llm
