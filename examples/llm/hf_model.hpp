// A Llama as a Hugging Face folder: config.json, safetensors (one file or several), tokenizer.json; weights in F32, F16 or
// BF16, or linear layers of a GPTQ or AWQ checkpoint.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "hf_layout.hpp"
#include "hf_tokenizer.hpp"
#include "model_file.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/io/awq_checkpoint.hpp"
#include "nibble/io/gptq_checkpoint.hpp"
#include "nibble/io/safetensors_folder.hpp"

namespace llm {

/// Weights of float types stay where they are mapped, but for q and k, whose rows come in another order there
/// (hf_rows_of). Layers whose inputs are sorted by group (act-order) are decoded to fp32: same values, more bytes.
class HfModelFile : public ModelFile {
 public:
  /// Throws IoError; FormatError; Unsupported, by name, for what this runner would not compute.
  explicit HfModelFile(const std::string& folder)
      : folder_(folder),
        config_(hf_config_of(nibble::read_json_object(folder + "/config.json"), name_of_folder(folder))),
        files_(nibble::SafetensorsFolder::open(folder)) {
    read_quantization();
    list_tensors();
  }

  std::string kind() const override {
    std::string kind = "Hugging Face folder";
    if (gptq_) kind += gptq_version_ == nibble::GptqVersion::v1 ? ", GPTQ v1" : ", GPTQ v2";
    if (awq_) kind += ", AWQ";
    return kind;
  }
  std::size_t bytes() const override { return files_.bytes(); }
  const Hparams& hparams() const override { return config_.hparams; }
  Vocabulary vocabulary() const override {
    const auto optional = [&](const char* name) {
      const std::string path = folder_ + "/" + name;
      std::error_code ignored;
      return std::filesystem::exists(path, ignored) ? nibble::read_json_object(path) : nlohmann::json();
    };
    const std::string path = folder_ + "/tokenizer.json";
    std::error_code ignored;
    nibble::detail::require<nibble::Unsupported>(
        std::filesystem::exists(path, ignored), "'", folder_,
        "' has no tokenizer.json; other files of tokenizers (tokenizer.model, vocab.json) are not read");
    VocabularyLists v =
        hf_vocabulary_of(nibble::read_json_object(path), optional("tokenizer_config.json"),
                         optional("generation_config.json"), optional("config.json"), config_.hparams.vocabulary);
    if (v.chat_template.empty() && std::filesystem::exists(folder_ + "/chat_template.jinja", ignored)) {
      const nibble::MappedFile file = nibble::MappedFile::open(folder_ + "/chat_template.jinja");
      v.chat_template.assign(reinterpret_cast<const char*>(file.data()), file.size());
    }
    return v;
  }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  nibble::PackedMatrix matrix(const std::string& name, nibble::ThreadPool* pool) const override {
    nibble::PackOptions options;
    options.pool = pool;
    options.channel_sums = false;
    return nibble::pack(quantized(name), options);
  }
  nibble::QuantizedTensor quantized(const std::string& name) const override {
    const std::string module = module_of(name);
    const std::vector<std::size_t> rows = hf_rows_of(name, config_.hparams);
    if (!is_quantized(module)) return with_rows(float_tensor(module + ".weight"), rows);
    const nibble::CheckpointLinear linear = checkpoint_linear(module);
    if (linear.input_order.empty()) return with_rows(linear.weight, rows);
    return with_rows(in_order_of_inputs(linear), rows);
  }
  nibble::Scheme scheme(const std::string& name) const override {
    const std::string module = module_of(name);
    return is_quantized(module) ? quantized(name).scheme() : float_tensor(module + ".weight").scheme();
  }
  Eigen::VectorXf vector(const std::string& name) const override {
    if (name == rope_name)
      return Eigen::Map<const Eigen::VectorXf>(config_.rope_divisors.data(),
                                               static_cast<Eigen::Index>(config_.rope_divisors.size()));
    const nibble::QuantizedTensor t = float_tensor(module_of(name) + ".weight");
    nibble::detail::require<nibble::FormatError>(t.rank() == 1, "tensor '", name, "' is no vector");
    Eigen::VectorXf values(static_cast<Eigen::Index>(t.size()));
    t.dequantize(values.data());
    return values;
  }

 private:
  static constexpr const char* rope_name = "rope_freqs.weight";

  static std::string name_of_folder(const std::string& folder) {
    std::filesystem::path path = std::filesystem::path(folder).lexically_normal();
    if (!path.has_filename()) path = path.parent_path();
    return path.filename().string();
  }

  static std::string module_of(const std::string& name) {
    const std::string module = hf_module_of(name);
    nibble::detail::require<nibble::FormatError>(!module.empty(), "tensor '", nibble::detail::printable(name),
                                                 "' is missing");
    return module;
  }
  bool is_quantized(const std::string& module) const {
    return (gptq_ || awq_) && files_.find_tensor(module + ".qweight") != nullptr;
  }

  nibble::QuantizedTensor float_tensor(const std::string& name) const {
    const nibble::SafetensorsTensor& t = files_.tensor(name);
    nibble::Scheme scheme;
    switch (t.type) {
      case nibble::SafetensorsType::f32: scheme.format = nibble::Format::fp32; break;
      case nibble::SafetensorsType::f16: scheme.format = nibble::Format::fp16; break;
      case nibble::SafetensorsType::bf16: scheme.format = nibble::Format::bf16; break;
      default:
        nibble::detail::raise<nibble::Unsupported>("tensor '" + nibble::detail::printable(name) + "' is " +
                                                   std::string(nibble::name_of(t.type)) +
                                                   ", expected F32, F16 or BF16");
    }
    return nibble::QuantizedTensor::from_parts(scheme, t.shape, t.data);
  }

  nibble::CheckpointLinear checkpoint_linear(const std::string& module) const {
    return gptq_ ? nibble::read_gptq(files_, module, *gptq_, gptq_version_)
                 : nibble::read_awq(files_, module, *awq_);
  }

  static nibble::QuantizedTensor in_order_of_inputs(const nibble::CheckpointLinear& linear) {
    const std::size_t rows = linear.weight.shape()[0], cols = linear.weight.shape()[1];
    nibble::Buffer values(nibble::detail::checked_mul(rows * cols, 4, "weights"));
    std::vector<float> line(cols);
    for (std::size_t r = 0; r < rows; ++r) {
      linear.weight.dequantize_row(r, line.data());
      float* const out = values.as_mutable<float>() + r * cols;
      for (std::size_t k = 0; k < cols; ++k) out[linear.input_order[k]] = line[k];
    }
    return nibble::QuantizedTensor::from_parts({}, {rows, cols}, std::move(values));
  }

  /// quantization_config of config.json, or a quantize_config.json beside it (older GPTQ checkpoints).
  void read_quantization() {
    using nibble::Unsupported;
    nlohmann::json config = config_.quantization;
    std::string where = "config.json: quantization_config";
    const std::string beside = folder_ + "/quantize_config.json";
    std::error_code ignored;
    const bool has_beside = std::filesystem::exists(beside, ignored);
    if (config.is_null() && has_beside) {
      where = "quantize_config.json";
      config = nibble::read_json_object(beside);
    }
    if (config.is_null()) return;
    const std::string method =
        nibble::detail::json_member<std::string>(config, "quant_method", where).value_or("gptq");
    if (method == "awq") {
      awq_ = nibble::parse_awq_config(config, where);
      return;
    }
    nibble::detail::require<Unsupported>(method == "gptq", where, ": quant_method '",
                                         nibble::detail::printable(method),
                                         "' is not supported (gptq and awq are)");
    gptq_ = nibble::parse_gptq_config(config, where);
    // config.json may leave out what quantize_config.json says.
    if (!gptq_->version && has_beside)
      gptq_->version = nibble::parse_gptq_config(nibble::read_json_object(beside), beside).version;
    std::vector<std::string> layers;
    for (const std::string& name : files_.names())
      if (name.size() > 7 && name.compare(name.size() - 7, 7, ".qzeros") == 0)
        layers.push_back(name.substr(0, name.size() - 7));
    gptq_version_ = nibble::find_gptq_version(files_, layers, *gptq_);
  }

  void list_tensors() {
    const Hparams& h = config_.hparams;
    std::set<std::string> used;
    add("token_embd.weight", used);
    nibble::detail::require<nibble::FormatError>(
        tensors_[0].is_matrix() && tensors_[0].shape[0] == h.vocabulary, "the embedding has ",
        tensors_[0].shape.empty() ? 0 : tensors_[0].shape[0], " rows, config.json's vocab_size is ", h.vocabulary);
    add("output_norm.weight", used);
    if (config_.tied)
      used.insert("lm_head.weight");  // the embedding's once more, where it is there at all
    else
      add("output.weight", used);
    if (!config_.rope_divisors.empty())
      tensors_.push_back({rope_name, {config_.rope_divisors.size()}, "config.json", 0});
    for (std::size_t i = 0; i < h.layers; ++i) {
      const std::string block = "blk." + std::to_string(i) + ".";
      for (const char* part : {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate",
                               "ffn_up", "ffn_down"})
        add(block + part + ".weight", used);
    }
    for (const std::string& name : files_.names()) {
      // Tables that older versions stored, made from rope_theta.
      const std::string table = ".rotary_emb.inv_freq";
      if (name.size() > table.size() && name.compare(name.size() - table.size(), table.size(), table) == 0)
        continue;
      nibble::detail::require<nibble::Unsupported>(used.count(name) != 0, "the folder holds the tensor '",
                                                   nibble::detail::printable(name),
                                                   "', which this runner does not know");
    }
  }

  /// Lists a tensor, which must be there, and marks what it consists of as used.
  void add(const std::string& name, std::set<std::string>& used) {
    const std::string module = module_of(name);
    TensorInfo info;
    info.name = name;
    if (!is_quantized(module)) {
      const nibble::SafetensorsTensor& t = files_.tensor(module + ".weight");
      used.insert(t.name);
      info.shape = t.shape;
      info.format = nibble::name_of(t.type);
      info.bytes = t.data.size();
    } else {
      const nibble::SafetensorsTensor& words =
          nibble::detail::checkpoint_matrix(files_, module + ".qweight", nibble::SafetensorsType::i32);
      const unsigned bits = gptq_ ? gptq_->bits : 4;
      info.shape = gptq_ ? std::vector<std::size_t>{words.shape[1], words.shape[0] * 32 / bits}
                         : std::vector<std::size_t>{words.shape[1] * 8, words.shape[0]};
      const std::size_t group = gptq_ ? gptq_->group_size : awq_->group_size;
      info.format = std::string(gptq_ ? "GPTQ" : "AWQ") + " int" + std::to_string(bits) +
                    (group == 0 ? "-row" : "-g" + std::to_string(group));
      for (const char* part : {".qweight", ".qzeros", ".scales", ".g_idx"})
        if (const nibble::SafetensorsTensor* t = files_.find_tensor(module + part)) {
          used.insert(t->name);
          info.bytes += t->data.size();
        }
    }
    // Some tools write a bias of zeros to every layer.
    if (const nibble::SafetensorsTensor* bias = files_.find_tensor(module + ".bias")) {
      const nibble::QuantizedTensor values = float_tensor(bias->name);
      std::vector<float> v(values.size());
      values.dequantize(v.data());
      nibble::detail::require<nibble::Unsupported>(
          std::all_of(v.begin(), v.end(), [](float x) { return x == 0.0F; }), "the bias '",
          nibble::detail::printable(bias->name), "' is not supported");
      used.insert(bias->name);
    }
    tensors_.push_back(std::move(info));
  }

  std::string folder_;
  HfConfig config_;
  nibble::SafetensorsFolder files_;
  std::optional<nibble::GptqConfig> gptq_;
  nibble::GptqVersion gptq_version_ = nibble::GptqVersion::v1;
  std::optional<nibble::AwqConfig> awq_;
  std::vector<TensorInfo> tensors_;
};

inline std::unique_ptr<ModelFile> open_hf_model(const std::string& folder) {
  return std::make_unique<HfModelFile>(folder);
}

}  // namespace llm
