// Measured sensitivities of a model's matrices, and the recipe that a budget makes of them (nibble/ptq/tune.hpp has the
// objective and the solver).
//
// Sensitivity of a matrix: the divergence KL(float || changed) of the next token's distribution, averaged over positions
// of a few calibration windows, with that matrix alone rounded to a reference format. A window is run from the changed
// block on, so that it costs half a model on average. What a candidate format costs follows from it by the error at the
// matrix' outputs, tr(E H E^T), of rounding to nearest in either format.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../block.hpp"
#include "../format_spec.hpp"
#include "../math.hpp"
#include "../model_file.hpp"
#include "nibble/gemm/matmul.hpp"
#include "nibble/ptq/hessian.hpp"
#include "nibble/ptq/tune.hpp"
#include "nibble/quantize/quantizer.hpp"
#include "resume.hpp"

namespace llm {

struct TunerOptions {
  std::vector<std::string> formats = {"int2-g64", "int3-g128",     "int3-g64",     "int4-g128",
                                      "int4-g64", "int5-g128",     "int5-g64",     "int6-g128",
                                      "int6-g64", "int8-g128-sym", "int8-g64-sym", "int8-row-sym"};
  std::string reference = "int3-g64";
  /// Of the embedding (and with it a tied output layer), beside what the file has.
  std::vector<std::string> embedding_formats = {"int4-g64", "int5-g64", "int6-g64", "int8-g64-sym"};
  std::string embedding_reference = "int4-g64";
  bool embedding = false;   // whether the embedding may change
  std::size_t windows = 4;  // that divergences are measured on
  std::size_t stride = 4;   // every so many positions
  nibble::ThreadPool* pool = nullptr;
  std::function<void(const std::string&)> done = [](const std::string&) {};  // a matrix is measured
};

/// One matrix, as measured.
struct Sensitivity {
  std::string name;
  std::size_t rows = 0;
  std::size_t cols = 0;
  double divergence = 0.0;  // KL with the matrix at the reference format
  double reference_error = 0.0;
  std::vector<nibble::Scheme> schemes;  // candidates
  std::vector<double> errors;           // tr(E H E^T) of each
  bool may_stay = false;                // also as the file has it
  std::size_t stored_bytes = 0;
};

/// Measures all block matrices, and the embedding if asked to.
class Tuner {
 public:
  Tuner(const ModelFile& file, const std::vector<std::vector<Token>>& windows, const TunerOptions& options)
      : file_(file), h_(file.hparams()), options_(options), windows_(windows) {
    nibble::detail::require(!windows.empty(), "the tuner needs calibration windows");
    BlockOptions block;
    block.window = windows.front().size();
    block.rope_divisors = rope_divisors_of(file);
    block.pool = options.pool;
    forward_ = std::make_unique<BlockRunner>(h_, block);
    norm_ = file.vector("output_norm.weight");
    const bool untied = file.has("output.weight");
    nibble::detail::require<nibble::Unsupported>(!file.has_extras(), "the tuner needs a model without extras");
    head_ = file.matrix(untied ? "output.weight" : "token_embd.weight", options.pool);
    measured_ = std::min(std::max<std::size_t>(options.windows, 1), windows.size());
  }

  std::vector<Sensitivity> measure() {
    std::vector<Sensitivity> all;
    // The float model once over all windows: Hessians, the candidates' errors, and the states of the measured windows.
    HiddenStates x = embedded(file_.quantized("token_embd.weight"), windows_.size());
    std::vector<HiddenStates> before;  // of each block, the measured windows
    for (std::size_t b = 0; b < h_.layers; ++b) {
      const FloatBlock w = load_block(file_, b, options_.pool);
      before.emplace_back();
      for (std::size_t i = 0; i < measured_; ++i) before.back().push_back(x[at(i)]);
      std::vector<nibble::Hessian> hessians;
      for (const BlockInput in : block_inputs) hessians.emplace_back(inputs_of(in), options_.pool);
      for (Eigen::MatrixXf& window : x) {
        forward_->forward(w, window, window);
        for (const BlockInput in : block_inputs) hessians[static_cast<std::size_t>(in)].add(forward_->input(in));
      }
      for (const BlockInput in : block_inputs) {
        const Eigen::MatrixXf h = hessians[static_cast<std::size_t>(in)].matrix();
        for (const BlockMatrix m : block_matrices)
          if (input_of(m) == in)
            all.push_back(candidates(tensor_name(b, m), w[m], h, options_.formats, options_.reference));
      }
    }
    HiddenStates last;
    for (std::size_t i = 0; i < measured_; ++i) last.push_back(x[at(i)]);
    const std::vector<Eigen::MatrixXf> reference = logits(last, head_);
    if (options_.embedding) all.push_back(measure_embedding(x, reference));

    const nibble::Scheme scheme = scheme_of(parse_format(options_.reference));
    for (std::size_t b = 0; b < h_.layers; ++b) {
      const FloatBlock w = load_block(file_, b, options_.pool);
      std::vector<HiddenStates> changed(block_matrices.size(), before[b]);
      for (const BlockMatrix m : block_matrices) {
        FloatBlock q = w;
        q[m] = rounded_to(scheme, w[m]);
        for (Eigen::MatrixXf& window : changed[static_cast<std::size_t>(m)]) forward_->forward(q, window, window);
      }
      before[b].clear();
      for (std::size_t later = b + 1; later < h_.layers; ++later) {
        const FloatBlock next = load_block(file_, later, options_.pool);
        for (HiddenStates& states : changed)
          for (Eigen::MatrixXf& window : states) forward_->forward(next, window, window);
      }
      for (const BlockMatrix m : block_matrices) {
        const double kl = divergence(reference, logits(changed[static_cast<std::size_t>(m)], head_));
        for (Sensitivity& s : all)
          if (s.name == tensor_name(b, m)) s.divergence = kl;
        options_.done(tensor_name(b, m));
      }
    }
    return all;
  }

 private:
  static Eigen::Index index(std::size_t n) { return static_cast<Eigen::Index>(n); }
  /// The window that is measured as number i.
  std::size_t at(std::size_t i) const { return i * windows_.size() / measured_; }

  Eigen::Index inputs_of(BlockInput stage) const {
    for (const BlockMatrix m : block_matrices)
      if (input_of(m) == stage) return shape_of(h_, m).cols;
    return 0;
  }

  HiddenStates embedded(const nibble::QuantizedTensor& table, std::size_t count) const {
    HiddenStates x;
    for (std::size_t i = 0; i < count; ++i) {
      const std::vector<Token>& tokens = windows_[count == windows_.size() ? i : at(i)];
      x.emplace_back(index(h_.dim), index(tokens.size()));
      for (std::size_t t = 0; t < tokens.size(); ++t)
        table.dequantize_row(static_cast<std::size_t>(tokens[t]), x.back().col(index(t)).data());
    }
    return x;
  }

  WeightMatrix rounded_to(const nibble::Scheme& scheme, const WeightMatrix& w) const {
    nibble::QuantizeOptions options;
    options.pool = options_.pool;
    return nibble::DynamicQuantizer(scheme).fake_quantize(w, options);
  }

  Sensitivity candidates(const std::string& name, const WeightMatrix& w, const Eigen::MatrixXf& h,
                         const std::vector<std::string>& formats, const std::string& reference) const {
    Sensitivity s;
    s.name = name;
    s.rows = static_cast<std::size_t>(w.rows());
    s.cols = static_cast<std::size_t>(w.cols());
    const auto error = [&](const nibble::Scheme& scheme) {
      const WeightMatrix e = rounded_to(scheme, w) - w;
      return std::max(nibble::quadratic_error(e, h, options_.pool), 0.0);
    };
    s.reference_error = error(scheme_of(parse_format(reference)));
    for (const std::string& f : formats) {
      s.schemes.push_back(nibble::detail::resolve(scheme_of(parse_format(f)), {s.rows, s.cols}));
      s.errors.push_back(f == reference ? s.reference_error : error(s.schemes.back()));
    }
    return s;
  }

  /// The last norm's output at the positions that count, one matrix of all windows.
  Eigen::MatrixXf normed(const HiddenStates& x) const {
    std::vector<Eigen::Index> positions;
    for (Eigen::Index t = index(options_.stride) - 1; t < x.front().cols(); t += index(options_.stride))
      positions.push_back(t);
    if (positions.empty()) positions.push_back(x.front().cols() - 1);
    Eigen::MatrixXf out(x.front().rows(), index(positions.size() * x.size()));
    Eigen::Index column = 0;
    for (const Eigen::MatrixXf& window : x)
      for (const Eigen::Index t : positions) out.col(column++) = window.col(t);
    nibble::rms_norm(out, norm_, h_.rms_epsilon, out);
    return out;
  }

  /// Logits, vocabulary x 64 at most in a matrix.
  std::vector<Eigen::MatrixXf> logits(const HiddenStates& x, const nibble::PackedMatrix& head) {
    const Eigen::MatrixXf in = normed(x);
    std::vector<Eigen::MatrixXf> out;
    nibble::MatmulOptions options;
    options.pool = options_.pool;
    options.activations = nibble::Activations::fp32;
    options.workspace = &workspace_;
    for (Eigen::Index t = 0; t < in.cols(); t += 64) {
      const Eigen::Index n = std::min<Eigen::Index>(64, in.cols() - t);
      out.emplace_back(head.rows(), n);
      nibble::matmul(head, in.middleCols(t, n), out.back(), options);
    }
    return out;
  }

  /// The mean over all columns of KL(softmax(p) || softmax(q)).
  double divergence(const std::vector<Eigen::MatrixXf>& p, const std::vector<Eigen::MatrixXf>& q) const {
    double sum = 0.0;
    double columns = 0.0;
    for (std::size_t i = 0; i < p.size(); ++i) {
      std::vector<double> kl(static_cast<std::size_t>(p[i].cols()));
      nibble::detail::for_tasks(options_.pool, kl.size(), [&](std::size_t c, std::size_t) {
        const float* a = p[i].col(index(c)).data();
        const float* b = q[i].col(index(c)).data();
        const auto n = static_cast<std::size_t>(p[i].rows());
        const double za = log_sum_exp(a, n);
        const double zb = log_sum_exp(b, n);
        double total = 0.0;
        for (std::size_t v = 0; v < n; ++v) {
          const double la = static_cast<double>(a[v]) - za;
          if (la > -40.0) total += std::exp(la) * (la - (static_cast<double>(b[v]) - zb));
        }
        kl[c] = total;
      });
      for (const double v : kl) sum += v;
      columns += static_cast<double>(kl.size());
    }
    return sum / columns;
  }

  Sensitivity measure_embedding(const HiddenStates& last, const std::vector<Eigen::MatrixXf>& reference) {
    const std::string name = "token_embd.weight";
    const nibble::QuantizedTensor stored = file_.quantized(name);
    WeightMatrix w(index(stored.shape()[0]), index(stored.shape()[1]));
    stored.dequantize(w.data(), options_.pool);
    nibble::Hessian hessian(w.cols(), options_.pool);
    hessian.add(normed(last));
    Sensitivity s =
        candidates(name, w, hessian.matrix(), options_.embedding_formats, options_.embedding_reference);
    s.may_stay = true;
    s.stored_bytes = nibble::quantized_bytes(file_.scheme(name), s.rows, s.cols);
    nibble::QuantizeOptions threads;
    threads.pool = options_.pool;
    const nibble::QuantizedTensor q =
        nibble::DynamicQuantizer(scheme_of(parse_format(options_.embedding_reference))).quantize(w, threads);
    HiddenStates x = embedded(q, measured_);
    for (std::size_t b = 0; b < h_.layers; ++b) {
      const FloatBlock block = load_block(file_, b, options_.pool);
      for (Eigen::MatrixXf& window : x) forward_->forward(block, window, window);
    }
    nibble::PackOptions pack;
    pack.pool = options_.pool;
    pack.channel_sums = false;
    const bool tied = !file_.has("output.weight");
    s.divergence = divergence(reference, logits(x, tied ? nibble::pack(q, pack) : head_));
    options_.done(name);
    return s;
  }

  const ModelFile& file_;
  const Hparams h_;
  TunerOptions options_;
  const std::vector<std::vector<Token>>& windows_;
  std::unique_ptr<BlockRunner> forward_;
  nibble::Workspace workspace_;
  Eigen::VectorXf norm_;
  nibble::PackedMatrix head_;
  std::size_t measured_ = 1;
};

/// What is asked of a tuner; one of them is given.
struct TuneGoal {
  double bits = 0.0;      // of a block weight, scales and zero points included
  double size_mib = 0.0;  // of all tensors
  double max_loss = 0.0;  // growth of the perplexity, 0.01: one percent
};

struct TunePlan {
  nibble::TuneResult result;
  std::vector<std::pair<std::string, std::optional<nibble::Scheme>>> schemes;  // nothing: as the file has it
  double bits = 0.0;                                                           // of a block weight
};

/// Chooses a candidate for every matrix. other_bytes: of the tensors that are not among `measured`.
inline TunePlan choose(const std::vector<Sensitivity>& measured, const TuneGoal& goal, std::size_t other_bytes) {
  std::vector<nibble::TuneLayer> layers;
  double weights = 0.0;
  for (const Sensitivity& s : measured) {
    nibble::TuneLayer layer;
    layer.name = s.name;
    for (std::size_t j = 0; j < s.schemes.size(); ++j)
      layer.candidates.push_back({nibble::quantized_bytes(s.schemes[j], s.rows, s.cols),
                                  nibble::predicted_loss(s.divergence, s.reference_error, s.errors[j]),
                                  name_of(s.schemes[j])});
    if (s.may_stay) layer.candidates.push_back({s.stored_bytes, 0.0, "same"});
    layers.push_back(std::move(layer));
    weights += static_cast<double>(s.rows * s.cols);
  }
  TunePlan plan;
  if (goal.max_loss > 0.0) {
    plan.result = nibble::minimize_bytes(layers, std::log1p(goal.max_loss));
  } else {
    const double bytes =
        goal.bits > 0.0 ? goal.bits * weights / 8.0 : goal.size_mib * 1048576.0 - static_cast<double>(other_bytes);
    nibble::detail::require(bytes > 0.0, "a budget of ", goal.size_mib,
                            " MiB is less than what is not quantized, ", other_bytes, " bytes");
    plan.result = nibble::minimize_loss(layers, static_cast<std::size_t>(bytes));
  }
  double block_bytes = 0.0, block_weights = 0.0;
  for (std::size_t i = 0; i < measured.size(); ++i) {
    const std::size_t j = plan.result.choice[i];
    const bool stays = j >= measured[i].schemes.size();
    plan.schemes.emplace_back(measured[i].name,
                              stays ? std::nullopt : std::optional<nibble::Scheme>(measured[i].schemes[j]));
    if (measured[i].may_stay) continue;
    block_bytes += static_cast<double>(layers[i].candidates[j].bytes);
    block_weights += static_cast<double>(measured[i].rows * measured[i].cols);
  }
  plan.bits = block_weights > 0.0 ? 8.0 * block_bytes / block_weights : 0.0;
  return plan;
}

}  // namespace llm
