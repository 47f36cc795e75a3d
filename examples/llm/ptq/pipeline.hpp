// Post-training quantization of a model, block by block: only one block's float weights are in memory, and what was done
// survives a kill.
//
// For each block two streams of hidden states are kept for all calibration windows: x, what the float model has there,
// and x~, what the model quantized so far has. A block goes in four stages - query, key and value; output; gate and up;
// down -, each on inputs that the stages before it, quantized, produce.
#pragma once

#include <Eigen/Core>
#include <array>
#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../block.hpp"
#include "../model_file.hpp"
#include "../quantize_model.hpp"
#include "method.hpp"
#include "autoround_step.hpp"
#include "nibble/io/packed_file.hpp"
#include "nibble/ptq/bias_correction.hpp"
#include "report.hpp"
#include "resume.hpp"
#include "rounding.hpp"
#include "static_activations.hpp"
#include "transforms.hpp"

namespace llm {

struct PtqOptions {
  Method method;                                         // of the whole run: its transforms
  std::function<MatrixPlan(const TensorInfo&)> plan_of;  // of every matrix of the model
  std::uint64_t seed = 0;                                // of random signs in rotations; 0: none
  std::optional<std::size_t> static_group = {};  // static INT8 activations: inputs that share a scale, 0: all
  double static_percentile = 99.9;  // of their magnitudes that the scales reach, the rest stays float; 100: all
  RoundingOptions rounding;
  TransformOptions transforms;
  AutoRoundStepOptions autoround;
  std::vector<std::vector<Token>> windows;  // calibration text; may be empty where no method needs one
  std::string resume;                       // folder
  double state_seconds = 20.0;              // work that a kill may cost
  nlohmann::json identity;                  // what else makes this run what it is
  nibble::ThreadPool* pool = nullptr;
  std::function<void(const std::string&)> done = [](const std::string&) {};  // a stage of a block is done
};

struct PtqResult {
  std::vector<TensorReport> tensors;
  PhaseTimer phases;
  std::size_t first_block = 0;  // blocks before it were found done
};

/// Quantizes one model. Deterministic: the same bits for any number of threads, and after any number of kills.
class PtqPipeline {
 public:
  PtqPipeline(const ModelFile& in, const PtqOptions& options)
      : in_(in),
        options_(options),
        h_(in.hparams()),
        written_(in.hparams()),
        tokens_(options.windows.empty() ? 0 : options.windows.front().size()) {
    if (options.method.rotate) {
      nibble::detail::require(h_.rotation.block == 0, "the model's residual stream is rotated already");
      written_.rotation = residual_rotation(h_, options.seed);
    }
    for (const TensorInfo& t : in.tensors())
      nibble::detail::require<nibble::Unsupported>(
          in.extras(t.name) == nullptr, "'", t.name,
          "' has an order, scales, a rotation or a bias of its own: quantize the model that it was made from");
    BlockOptions block;
    block.rope_divisors = rope_divisors_of(in);
    block.pool = options.pool;
    if (tokens_ > 0) {
      block.window = tokens_;
      forward_ = std::make_unique<BlockRunner>(h_, block);
      if (options.method.autoround) trainer_ = std::make_unique<BlockTrainer>(h_, block);
    }
    for (const TensorInfo& t : in.tensors())
      if (t.is_matrix()) plans_.emplace_back(t.name, resolved(t));
  }

  std::size_t steps() const { return h_.layers * block_inputs.size(); }

  /// Writes the packed file `path`.
  PtqResult run(const std::string& path) {
    const ResumeFolder folder(options_.resume, identity());
    PtqResult result;
    std::size_t block = 0;
    if (tokens_ > 0) {
      block = folder.load_state(streams(), options_.windows.size(), index(h_.dim), index(tokens_));
      if (block == 0) embed();
    } else {
      while (block < h_.layers && std::filesystem::exists(folder.block_path(block))) ++block;
    }
    result.first_block = block;
    for (std::size_t s = 0; s < block * block_inputs.size(); ++s) options_.done("resumed");
    result.phases.mark("start");
    double saved = limits_detail::seconds_now();
    for (; block < h_.layers; ++block) {
      quantize_block(block, folder, result.phases);
      const double now = limits_detail::seconds_now();
      if (tokens_ > 0 && block + 1 < h_.layers && now - saved >= options_.state_seconds) {
        folder.save_state(block + 1, streams());
        saved = now;
      }
      result.phases.mark("files");
    }
    assemble(path, folder, result);
    if (options_.static_group) {
      CalibrateOptions calibration;
      calibration.group = *options_.static_group;
      calibration.percentile = options_.static_percentile;
      calibration.pool = options_.pool;
      add_static_activations(path, options_.windows, calibration);
      result.phases.mark("static scales");
    }
    folder.remove(h_.layers);
    result.phases.mark("files");
    return result;
  }

 private:
  static Eigen::Index index(std::size_t n) { return static_cast<Eigen::Index>(n); }

  MatrixPlan resolved(const TensorInfo& t) const {
    MatrixPlan plan = options_.plan_of(t);
    if (plan.scheme) plan.scheme = nibble::detail::resolve(*plan.scheme, t.shape);
    return plan;
  }
  const MatrixPlan& plan_of(const std::string& name) const {
    for (const auto& entry : plans_)
      if (entry.first == name) return entry.second;
    nibble::detail::raise<nibble::FormatError>("the model has no matrix '" + name + "'");
  }

  nlohmann::json identity() const {
    nlohmann::json plans = nlohmann::json::object();
    for (const auto& entry : plans_)
      plans[entry.first] = entry.second.scheme ? name_of(*entry.second.scheme) + ":" +
                                                     std::string(name_of(entry.second.method.rounding))
                                               : "same";
    std::uint64_t text = options_.windows.size();
    for (const std::vector<Token>& w : options_.windows)
      text = text * 31 + fingerprint(w.data(), w.size() * sizeof(Token));
    return {{"run", options_.identity},
            {"matrices", plans},
            {"rounding", options_.rounding.to_json()},
            {"transforms", options_.transforms.to_json()},
            {"autoround",
             {{"iterations", options_.autoround.iterations},
              {"batch", options_.autoround.batch},
              {"seed", options_.autoround.seed},
              {"lr", options_.autoround.lr}}},
            {"steps",
             {options_.method.rotate, options_.method.equalize, options_.method.smoothquant, options_.method.awq,
              options_.method.autoround, options_.method.bias, options_.method.llm_int8}},
            {"seed", options_.seed},
            {"static_group", options_.static_group ? std::to_string(*options_.static_group) : "none"},
            {"text", std::to_string(text)}};
  }

  bool two_streams() const {
    if (options_.method.autoround) return true;
    bool gptq = false;
    for (const auto& entry : plans_) gptq = gptq || entry.second.method.rounding == Rounding::gptq;
    return gptq && (options_.rounding.correction > 0.0 || options_.rounding.residual > 0.0);
  }
  std::vector<HiddenStates*> streams() {
    if (two_streams()) return {&quantized_, &float_};
    return {&quantized_};
  }

  void embed() {
    const nibble::QuantizedTensor embedding = in_.quantized("token_embd.weight");
    const auto look_up = [&](const nibble::QuantizedTensor& table, HiddenStates& x) {
      const std::shared_ptr<const nibble::HadamardRotation> rotation =
          written_.rotation.block == 0 ? nullptr : rotation_of(written_.rotation, index(h_.dim));
      x.assign(options_.windows.size(), Eigen::MatrixXf(index(h_.dim), index(tokens_)));
      for (std::size_t w = 0; w < x.size(); ++w) {
        for (std::size_t t = 0; t < tokens_; ++t)
          table.dequantize_row(static_cast<std::size_t>(options_.windows[w][t]), x[w].col(index(t)).data());
        if (rotation != nullptr) rotation->rotate(x[w], options_.pool);
      }
    };
    look_up(outer("token_embd.weight"), quantized_);
    if (two_streams()) look_up(embedding, float_);
  }

  /// A matrix that belongs to no block, as the result has it: rounded with no calibration.
  const nibble::QuantizedTensor& outer(const std::string& name) {
    for (const auto& entry : outer_)
      if (entry.first == name) return entry.second;
    MatrixPlan plan = plan_of(name);
    nibble::QuantizedTensor stored = in_.quantized(name);
    if (plan.scheme) {
      WeightMatrix w(index(stored.shape()[0]), index(stored.shape()[1]));
      stored.dequantize(w.data(), options_.pool);
      const Rounding r = plan.method.rounding;
      plan.method.rounding = r == Rounding::rtn || r == Rounding::hqq ? r : Rounding::mse;
      TensorReport report;
      report.name = name;
      stored = round_matrix(w, plan, nullptr, options_.rounding, options_.pool, report);
      outer_reports_.push_back(report);
    }
    return outer_.emplace_back(name, std::move(stored)).second;
  }

  void quantize_block(std::size_t block, const ResumeFolder& folder, PhaseTimer& phases) {
    const FloatBlock w = prepared_block(block);
    FloatBlock q = w;
    std::array<nibble::QuantizedTensor, block_matrices.size()> tensors{};
    nlohmann::json reports = nlohmann::json::array();
    std::map<std::string, LinearExtras> extras;
    phases.mark("transform");
    HiddenStates before;  // what enters the block, for what looks at all of it
    if (options_.method.autoround) before = quantized_;
    HiddenStates inputs, float_inputs;  // of the stages whose inputs are costly
    for (const BlockInput stage : block_inputs) {
      std::unique_ptr<InputStatistics> statistics = look(stage, w, q, inputs, float_inputs);
      phases.mark("forward");
      for (const BlockMatrix m : block_matrices) {
        if (input_of(m) != stage) continue;
        const std::string name = tensor_name(block, m);
        nibble::QuantizedTensor& tensor = tensors[static_cast<std::size_t>(m)];
        const MatrixPlan& plan = plan_of(name);
        if (!plan.scheme) {
          tensor = in_.quantized(name);
          continue;
        }
        TensorReport report;
        report.name = name;
        tensor = round_matrix(w[m], plan, statistics.get(), options_.rounding, options_.pool, report);
        if (LinearExtras e = extras_of(w[m], tensor, statistics.get()); !e.empty()) extras[name] = std::move(e);
        if (options_.method.autoround) report.method += "+autoround";
        reports.push_back(report.to_json());
        if (tokens_ > 0) tensor.dequantize(q[m].data(), options_.pool);
      }
      phases.mark("round");
      leave(stage, w, q, inputs, float_inputs);
      phases.mark("forward");
      if (stage != BlockInput::gated) options_.done("block " + std::to_string(block));
    }
    if (options_.method.autoround) {
      autoround(w, q, tensors, before);
      phases.mark("autoround");
    }
    options_.done("block " + std::to_string(block));
    nibble::PackedFileWriter out(folder.block_path(block));
    out.add_metadata("report", reports.dump());
    add_linear_extras(out, Hparams(), extras);
    nibble::PackOptions pack;
    pack.pool = options_.pool;
    pack.channel_sums = false;
    for (const BlockMatrix m : block_matrices)
      out.add(tensor_name(block, m), nibble::pack(tensors[static_cast<std::size_t>(m)], pack));
    const auto vector = [&](const std::string& name, const Eigen::VectorXf& v) {
      out.add_tensor(name, std::vector<float>(v.data(), v.data() + v.size()));
    };
    vector(attention_norm_name(block), q.attention_norm);
    vector(ffn_norm_name(block), q.ffn_norm);
    out.commit();
    phases.mark("files");
  }

  /// What a matrix' product needs beside the codes.
  LinearExtras extras_of(const WeightMatrix& w, const nibble::QuantizedTensor& q,
                         const InputStatistics* statistics) const {
    LinearExtras e;
    if (options_.method.llm_int8) e.outlier_threshold = 6.0F;
    if (options_.method.bias) {
      WeightMatrix values(w.rows(), w.cols());
      q.dequantize(values.data(), options_.pool);
      e.bias = nibble::bias_correction(values, w, statistics->sums().mean(), options_.pool);
    }
    return e;
  }

  /// Improves the block's matrices together, and runs the quantized stream through what they have become.
  void autoround(const FloatBlock& w, FloatBlock& q,
                 std::array<nibble::QuantizedTensor, block_matrices.size()>& tensors, HiddenStates& before) {
    autoround_block(*trainer_, w, tensors, before, float_, options_.autoround);
    for (const BlockMatrix m : block_matrices)
      tensors[static_cast<std::size_t>(m)].dequantize(q[m].data(), options_.pool);
    for (std::size_t i = 0; i < before.size(); ++i) forward_->forward(q, before[i], quantized_[i]);
  }

  /// A block's float weights after the transforms of the run.
  FloatBlock prepared_block(std::size_t block) {
    FloatBlock w = load_block(in_, block, options_.pool);
    if (!options_.method.transforms()) return w;
    std::array<nibble::Scheme, block_matrices.size()> schemes;
    for (const BlockMatrix m : block_matrices) {
      const MatrixPlan& plan = plan_of(tensor_name(block, m));
      nibble::detail::require(
          plan.scheme.has_value(), "'", tensor_name(block, m),
          "' is to stay as it is, but the method changes its float values: name a format for it");
      schemes[static_cast<std::size_t>(m)] = *plan.scheme;
    }
    if (options_.method.rotate) rotate_block(w, h_, written_.rotation, options_.pool);
    if (!options_.method.moves_factors()) return w;
    BlockSums sums;
    if (tokens_ > 0) {
      std::vector<nibble::Hessian> hessians;
      for (const BlockInput in : block_inputs) hessians.emplace_back(inputs_of(in), options_.pool);
      const HiddenStates& x = two_streams() ? float_ : quantized_;
      const std::size_t windows = std::min(x.size(), options_.transforms.windows);
      Eigen::MatrixXf y(index(h_.dim), index(tokens_));
      for (std::size_t i = 0; i < windows; ++i) {
        forward_->forward(w, x[i * x.size() / windows], y);
        for (const BlockInput in : block_inputs) hessians[static_cast<std::size_t>(in)].add(forward_->input(in));
      }
      for (const BlockInput in : block_inputs)
        sums[static_cast<std::size_t>(in)] = InputSums(hessians[static_cast<std::size_t>(in)]);
    }
    transform_block(w, h_, options_.method, options_.transforms, schemes, sums, options_.pool);
    return w;
  }

  Eigen::Index inputs_of(BlockInput stage) const {
    for (const BlockMatrix m : block_matrices)
      if (input_of(m) == stage) return shape_of(h_, m).cols;
    return 0;
  }
  /// Inputs that cost more than a norm are kept until the stage ends.
  static bool is_kept(BlockInput stage) { return stage == BlockInput::attention || stage == BlockInput::gated; }

  /// Runs both streams up to the inputs of a stage, and sums these up.
  std::unique_ptr<InputStatistics> look(BlockInput stage, const FloatBlock& w, const FloatBlock& q,
                                        HiddenStates& inputs, HiddenStates& float_inputs) {
    if (tokens_ == 0) return nullptr;
    const std::size_t windows = options_.windows.size();
    auto statistics = std::make_unique<InputStatistics>(inputs_of(stage), options_.pool);
    const bool kept = is_kept(stage);
    if (kept) {
      inputs.resize(windows);
      if (two_streams()) float_inputs.resize(windows);
    }
    Eigen::MatrixXf shared, float_shared;
    for (std::size_t i = 0; i < windows; ++i) {
      Eigen::MatrixXf& in = kept ? inputs[i] : shared;
      forward_->input(q, stage, quantized_[i], in);
      if (!two_streams()) {
        statistics->add(in);
        continue;
      }
      Eigen::MatrixXf& float_in = kept ? float_inputs[i] : float_shared;
      forward_->input(w, stage, float_[i], float_in);
      statistics->add(in, float_in);
      if (kept && options_.rounding.residual > 0.0) statistics->add_residual(float_[i] - quantized_[i], in);
    }
    statistics->finish();
    return statistics;
  }

  /// Ends a stage: adds the products of output and down to the streams.
  void leave(BlockInput stage, const FloatBlock& w, const FloatBlock& q, HiddenStates& inputs,
             HiddenStates& float_inputs) {
    if (!is_kept(stage) || tokens_ == 0) return;
    const BlockMatrix m = stage == BlockInput::gated ? BlockMatrix::down : BlockMatrix::output;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      forward_->add_product(q[m], inputs[i], quantized_[i]);
      if (two_streams()) forward_->add_product(w[m], float_inputs[i], float_[i]);
    }
    inputs.clear();
    float_inputs.clear();
  }

  /// The packed model out of the blocks' files and what the model has beside them.
  void assemble(const std::string& path, const ResumeFolder& folder, PtqResult& result) {
    std::vector<nibble::PackedFile> blocks;
    std::map<std::string, LinearExtras> extras;
    for (std::size_t i = 0; i < h_.layers; ++i) {
      blocks.push_back(nibble::PackedFile::open(folder.block_path(i)));
      for (auto& entry : linear_extras_of(blocks.back())) extras.insert(std::move(entry));
      const std::string* text = blocks.back().find_metadata("report");
      if (text == nullptr) continue;
      for (const nlohmann::json& t : nlohmann::json::parse(*text)) result.tensors.push_back(TensorReport::of(t));
    }
    const auto block_of = [&](const std::string& name) -> const nibble::PackedFile* {
      for (std::size_t i = 0; i < h_.layers; ++i)
        if (blocks[i].find_matrix(name) != nullptr || blocks[i].find_tensor(name) != nullptr) return &blocks[i];
      return nullptr;
    };
    nibble::PackOptions pack;
    pack.pool = options_.pool;
    pack.channel_sums = false;
    nibble::PackedFileWriter out(path);
    add_model_data(out, written_, in_.vocabulary());
    add_linear_extras(out, written_, extras);
    for (const TensorInfo& t : in_.tensors()) {
      if (!t.is_matrix()) {
        out.declare_tensor(t.name, nibble::SafetensorsType::f32, t.shape);
        continue;
      }
      const nibble::PackedFile* from = block_of(t.name);
      const nibble::Scheme scheme = from != nullptr ? from->matrix(t.name).scheme() : outer(t.name).scheme();
      out.declare(t.name, {scheme, t.shape[0], t.shape[1]}, false);
    }
    for (const TensorInfo& t : in_.tensors()) {
      const nibble::PackedFile* from = block_of(t.name);
      if (t.is_matrix()) {
        out.write(t.name, from != nullptr ? from->matrix(t.name) : nibble::pack(outer(t.name), pack));
      } else if (from != nullptr) {
        out.write_tensor(t.name, from->tensor(t.name).data.data(), from->tensor(t.name).data.size());
      } else {
        const Eigen::VectorXf v = in_.vector(t.name);
        out.write_tensor(t.name, v.data(), static_cast<std::size_t>(v.size()) * sizeof(float));
      }
    }
    result.tensors.insert(result.tensors.end(), outer_reports_.begin(), outer_reports_.end());
    out.commit();
  }

  const ModelFile& in_;
  const PtqOptions& options_;
  const Hparams h_;
  Hparams written_;  // as the result has them
  std::size_t tokens_;
  std::unique_ptr<BlockRunner> forward_;
  std::unique_ptr<BlockTrainer> trainer_;
  std::vector<std::pair<std::string, MatrixPlan>> plans_;
  std::vector<std::pair<std::string, nibble::QuantizedTensor>> outer_;
  std::vector<TensorReport> outer_reports_;
  HiddenStates quantized_;
  HiddenStates float_;
};

}  // namespace llm
