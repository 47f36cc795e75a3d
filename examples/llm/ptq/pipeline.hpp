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
#include "nibble/io/packed_file.hpp"
#include "report.hpp"
#include "resume.hpp"
#include "rounding.hpp"

namespace llm {

/// What a matrix becomes.
struct MatrixPlan {
  std::optional<nibble::Scheme> scheme;  // nothing: it stays as the file has it
  Method method;
};

struct PtqOptions {
  Method method;                                         // of the whole run: its transforms
  std::function<MatrixPlan(const TensorInfo&)> plan_of;  // of every matrix of the model
  RoundingOptions rounding;
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
        tokens_(options.windows.empty() ? 0 : options.windows.front().size()) {
    BlockOptions block;
    block.rope_divisors = rope_divisors_of(in);
    block.pool = options.pool;
    if (tokens_ > 0) {
      block.window = tokens_;
      forward_ = std::make_unique<BlockRunner>(h_, block);
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
            {"text", std::to_string(text)}};
  }

  bool two_streams() const { return options_.rounding.correction > 0.0F; }
  std::vector<HiddenStates*> streams() {
    if (two_streams()) return {&quantized_, &float_};
    return {&quantized_};
  }

  void embed() {
    const MatrixPlan& plan = plan_of("token_embd.weight");
    const nibble::QuantizedTensor embedding = in_.quantized("token_embd.weight");
    const nibble::QuantizedTensor written = plan.scheme ? plain(embedding, *plan.scheme) : embedding;
    const auto look_up = [&](const nibble::QuantizedTensor& table, HiddenStates& x) {
      x.assign(options_.windows.size(), Eigen::MatrixXf(index(h_.dim), index(tokens_)));
      for (std::size_t w = 0; w < x.size(); ++w)
        for (std::size_t t = 0; t < tokens_; ++t)
          table.dequantize_row(static_cast<std::size_t>(options_.windows[w][t]), x[w].col(index(t)).data());
    };
    look_up(written, quantized_);
    if (two_streams()) look_up(embedding, float_);
  }

  /// Rounded to nearest, with no calibration.
  nibble::QuantizedTensor plain(const nibble::QuantizedTensor& stored, const nibble::Scheme& scheme) const {
    nibble::QuantizeOptions options;
    options.pool = options_.pool;
    using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    Rows values(index(stored.shape()[0]), index(stored.shape()[1]));
    stored.dequantize(values.data(), options_.pool);
    return nibble::DynamicQuantizer(scheme).quantize(values, options);
  }

  void quantize_block(std::size_t block, const ResumeFolder& folder, PhaseTimer& phases) {
    const FloatBlock w = load_block(in_, block, options_.pool);
    FloatBlock q = w;
    std::array<nibble::QuantizedTensor, block_matrices.size()> tensors{};
    nlohmann::json reports = nlohmann::json::array();
    phases.mark("load");
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
        report.format = name_of(*plan.scheme);
        tensor = round_matrix(w[m], *plan.scheme, plan.method, statistics.get(), options_.rounding, options_.pool,
                              report);
        reports.push_back(report.to_json());
        if (tokens_ > 0) tensor.dequantize(q[m].data(), options_.pool);
      }
      phases.mark("round");
      leave(stage, w, q, inputs, float_inputs);
      phases.mark("forward");
      options_.done("block " + std::to_string(block));
    }
    nibble::PackedFileWriter out(folder.block_path(block));
    out.add_metadata("report", reports.dump());
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

  /// Inputs that cost more than a norm are kept until the stage ends.
  static bool is_kept(BlockInput stage) { return stage == BlockInput::attention || stage == BlockInput::gated; }

  /// Runs both streams up to the inputs of a stage, and sums these up.
  std::unique_ptr<InputStatistics> look(BlockInput stage, const FloatBlock& w, const FloatBlock& q,
                                        HiddenStates& inputs, HiddenStates& float_inputs) {
    if (tokens_ == 0) return nullptr;
    const std::size_t windows = options_.windows.size();
    auto statistics = std::make_unique<InputStatistics>(two_streams(), options_.pool);
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
      if (kept && options_.rounding.residual > 0.0F) statistics->add_residual(float_[i] - quantized_[i], in);
    }
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
    for (std::size_t i = 0; i < h_.layers; ++i) {
      blocks.push_back(nibble::PackedFile::open(folder.block_path(i)));
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
    add_model_data(out, h_, in_.vocabulary());
    for (const TensorInfo& t : in_.tensors()) {
      if (!t.is_matrix()) {
        out.declare_tensor(t.name, nibble::SafetensorsType::f32, t.shape);
        continue;
      }
      const nibble::PackedFile* from = block_of(t.name);
      const MatrixPlan& plan = plan_of(t.name);
      const nibble::Scheme scheme = from != nullptr ? from->matrix(t.name).scheme()
                                    : plan.scheme   ? *plan.scheme
                                                    : nibble::detail::resolve(in_.scheme(t.name), t.shape);
      out.declare(t.name, {scheme, t.shape[0], t.shape[1]}, false);
    }
    for (const TensorInfo& t : in_.tensors()) {
      const nibble::PackedFile* from = block_of(t.name);
      if (t.is_matrix()) {
        if (from != nullptr) {
          out.write(t.name, from->matrix(t.name));
          continue;
        }
        const MatrixPlan& plan = plan_of(t.name);
        const nibble::QuantizedTensor stored = in_.quantized(t.name);
        out.write(t.name, nibble::pack(plan.scheme ? plain(stored, *plan.scheme) : stored, pack));
      } else if (from != nullptr) {
        out.write_tensor(t.name, from->tensor(t.name).data.data(), from->tensor(t.name).data.size());
      } else {
        const Eigen::VectorXf v = in_.vector(t.name);
        out.write_tensor(t.name, v.data(), static_cast<std::size_t>(v.size()) * sizeof(float));
      }
    }
    out.commit();
  }

  const ModelFile& in_;
  const PtqOptions& options_;
  const Hparams h_;
  std::size_t tokens_;
  std::unique_ptr<BlockRunner> forward_;
  std::vector<std::pair<std::string, MatrixPlan>> plans_;
  HiddenStates quantized_;
  HiddenStates float_;
};

}  // namespace llm
