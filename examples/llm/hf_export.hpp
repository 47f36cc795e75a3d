// A quantized model as a Hugging Face folder with a GPTQ or AWQ checkpoint: config.json, model.safetensors, tokenizer.json.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "hf_layout.hpp"
#include "model_file.hpp"
#include "nibble/io/atomic_file.hpp"
#include "nibble/io/awq_checkpoint.hpp"
#include "nibble/io/gptq_checkpoint.hpp"
#include "words.hpp"

namespace llm {

enum class HfExport { gptq_v1, gptq_v2, awq };

/// "gptq", "gptq-v2" or "awq". Throws InvalidArgument.
inline HfExport parse_hf_export(const std::string& text) {
  if (text == "gptq") return HfExport::gptq_v1;
  if (text == "gptq-v2") return HfExport::gptq_v2;
  nibble::detail::require(text == "awq", "export '", text, "' is not known, expected gptq, gptq-v2 or awq");
  return HfExport::awq;
}

namespace hf_detail {

inline std::string regex_of_words(bool three_digits) {
  return std::string("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}") +
         (three_digits ? "{1,3}" : "") + "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
}

/// The pre-tokenizer that tokenizer.ggml.pre names; the reverse of TokenizerReader.
inline nlohmann::json pre_tokenizer_of(const std::string& pre) {
  Json level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  const WordPattern pattern = word_pattern(pre);
  if (pattern == WordPattern::gpt2) return level;
  Json first = {{"type", "Digits"}, {"individual_digits", true}};
  if (pattern != WordPattern::smollm) {
    level["use_regex"] = false;
    first = {{"type", "Split"},
             {"pattern", {{"Regex", regex_of_words(pattern == WordPattern::llama3)}}},
             {"behavior", "Isolated"},
             {"invert", false}};
  }
  return {{"type", "Sequence"}, {"pretokenizers", Json::array({first, level})}};
}

/// tokenizer.json of a vocabulary.
inline nlohmann::json tokenizer_json_of(const Vocabulary& v) {
  const std::string mark = "\xE2\x96\x81";
  const auto text = [&](Token t) { return std::string(v.token(t)); };
  Json added = Json::array(), vocab = Json::object(), merges = Json::array();
  for (Token t = 0; v.has(t); ++t) {
    const TokenType type = v.type(t);
    if (type == TokenType::unused || v.find(v.token(t)) != t) continue;
    const bool special = type == TokenType::control || type == TokenType::unknown;
    if (special || type == TokenType::user_defined)
      added.push_back({{"id", t},
                       {"content", text(t)},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false},
                       {"special", special}});
    vocab[text(t)] = t;
  }
  Json json = {{"version", "1.0"},         {"truncation", nullptr}, {"padding", nullptr},
               {"added_tokens", added},    {"normalizer", nullptr}, {"pre_tokenizer", nullptr},
               {"post_processor", nullptr}};
  Json model = {{"type", "BPE"},
                {"dropout", nullptr},
                {"unk_token", nullptr},
                {"continuing_subword_prefix", nullptr},
                {"end_of_word_suffix", nullptr},
                {"fuse_unk", false},
                {"byte_fallback", false}};
  if (v.unknown != no_token) model["unk_token"] = text(v.unknown);
  if (v.model == "gpt2") {
    json["pre_tokenizer"] = pre_tokenizer_of(v.pre);
    json["decoder"] = {
        {"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}};
    model["ignore_merges"] = word_pattern(v.pre) == WordPattern::llama3;
    for (const MergeRule& m : v.merges()) merges.push_back(Json::array({text(m.left), text(m.right)}));
  } else {
    // A rule for every way to cut a token in two, the best token's first.
    std::vector<Token> order;
    for (Token t = 0; v.has(t); ++t)
      if (vocab.contains(text(t))) order.push_back(t);
    std::stable_sort(order.begin(), order.end(), [&](Token a, Token b) { return v.score(a) > v.score(b); });
    for (const Token t : order)
      for (std::size_t cut = 1; cut < text(t).size(); ++cut)
        if (vocab.contains(text(t).substr(0, cut)) && vocab.contains(text(t).substr(cut)))
          merges.push_back(Json::array({text(t).substr(0, cut), text(t).substr(cut)}));
    model["byte_fallback"] = true;
    model["fuse_unk"] = true;
    Json steps = Json::array();
    if (v.add_space_prefix) steps.push_back({{"type", "Prepend"}, {"prepend", mark}});
    steps.push_back({{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", mark}});
    json["normalizer"] = {{"type", "Sequence"}, {"normalizers", steps}};
    steps = {{{"type", "Replace"}, {"pattern", {{"String", mark}}}, {"content", " "}},
             {{"type", "ByteFallback"}},
             {{"type", "Fuse"}}};
    if (v.add_space_prefix) steps.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
    json["decoder"] = {{"type", "Sequence"}, {"decoders", steps}};
  }
  model["vocab"] = vocab;
  model["merges"] = merges;
  json["model"] = model;
  if (v.add_bos && v.bos != no_token) {
    const Json begin = {{"SpecialToken", {{"id", text(v.bos)}, {"type_id", 0}}}};
    const auto sequence = [](const char* id, int type) {
      return Json{{"Sequence", {{"id", id}, {"type_id", type}}}};
    };
    json["post_processor"] = {
        {"type", "TemplateProcessing"},
        {"single", Json::array({begin, sequence("A", 0)})},
        {"pair", Json::array({begin, sequence("A", 0), begin, sequence("B", 1)})},
        {"special_tokens", {{text(v.bos), {{"id", text(v.bos)}, {"ids", {v.bos}}, {"tokens", {text(v.bos)}}}}}}};
  }
  return json;
}

inline nlohmann::json config_json_of(const Hparams& h, const Vocabulary& v, bool tied) {
  nlohmann::json json = {{"architectures", {"LlamaForCausalLM"}},
                         {"model_type", "llama"},
                         {"hidden_act", "silu"},
                         {"attention_bias", false},
                         {"mlp_bias", false},
                         {"hidden_size", h.dim},
                         {"intermediate_size", h.ffn},
                         {"num_hidden_layers", h.layers},
                         {"num_attention_heads", h.heads},
                         {"num_key_value_heads", h.kv_heads},
                         {"head_dim", h.head_size},
                         {"max_position_embeddings", h.context},
                         {"vocab_size", h.vocabulary},
                         {"rms_norm_eps", static_cast<double>(h.rms_epsilon)},
                         {"rope_theta", h.rope_base},
                         {"rope_scaling", nullptr},
                         {"tie_word_embeddings", tied},
                         {"torch_dtype", "float16"},
                         {"_name_or_path", h.name}};
  if (h.rope_scale != 1.0) json["rope_scaling"] = {{"type", "linear"}, {"factor", h.rope_scale}};
  if (v.bos != no_token) json["bos_token_id"] = v.bos;
  if (v.eos != no_token) json["eos_token_id"] = v.eos;
  return json;
}

inline void write_json_file(const std::string& path, const nlohmann::json& json) {
  nibble::AtomicFile file(path);
  file.write(json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  file.commit();
}

}  // namespace hf_detail

/// Writes `in` to the folder `out`, which is made. The matrices of the blocks become layers of the checkpoint, with the
/// codes, zero points and scales that they have; the others floats, F16 and BF16 as they are and all else as F32. Throws
/// Unsupported, with the tensor's name, where the checkpoint cannot hold them: GPTQ takes integers of 2, 3, 4 or 8 bits,
/// AWQ of 4, in groups along the rows or a scale a row, the same for all, symmetric or with integer zero points; neither
/// takes rotated models. Calls done(tensor name) after each tensor.
template <class Done>
void write_hf_folder(const ModelFile& in, const std::string& out, HfExport kind, Done&& done) {
  using nibble::SafetensorsTensor;
  using nibble::SafetensorsType;
  using nibble::Unsupported;
  using nibble::detail::require;
  const Hparams& h = in.hparams();
  const auto is_layer = [](const TensorInfo& t) { return t.is_matrix() && t.name.compare(0, 4, "blk.") == 0; };
  const auto layer_parts = [&](const TensorInfo& t) {
    nibble::CheckpointLinear linear;
    if (const LinearExtras* e = in.extras(t.name)) {
      LinearExtras other = *e;
      other.input_order.clear();
      require<Unsupported>(other.empty(), "'", t.name,
                           "' has a rotation, activation scales, outliers or a bias: no ",
                           "checkpoint can say so");
      for (const std::uint32_t k : e->input_order) linear.input_order.push_back(static_cast<std::int32_t>(k));
    }
    linear.weight = with_rows(in.quantized(t.name), inverse_of(hf_rows_of(t.name, h)));
    const std::string module = hf_module_of(t.name);
    return kind == HfExport::awq
               ? nibble::to_awq(module, linear)
               : nibble::to_gptq(module, linear,
                                 kind == HfExport::gptq_v1 ? nibble::GptqVersion::v1 : nibble::GptqVersion::v2);
  };
  // What all layers have in common, before anything is written.
  std::optional<std::pair<unsigned, std::size_t>> common;
  bool symmetric = true, ordered = false;
  for (const TensorInfo& t : in.tensors()) {
    require<Unsupported>(!hf_module_of(t.name).empty(), "tensor '", t.name,
                         "' has no place in a Hugging Face Llama");
    if (!is_layer(t)) continue;
    const nibble::Scheme s = in.scheme(t.name);
    require<Unsupported>(nibble::is_integer(s.format), "'", t.name, "' is ", name_of(s),
                         ", no integers: quantize it first");
    const bool row = s.granularity.kind == nibble::Granularity::Kind::per_channel;
    const std::pair<unsigned, std::size_t> own(nibble::bits_of(s.format), row ? 0 : s.granularity.group_size);
    if (!common) common = own;
    require<Unsupported>(own == *common, "'", t.name, "' is ", name_of(s), ", other layers have ", common->first,
                         " bits in groups of ", common->second, ": a checkpoint has the same for all");
    symmetric = symmetric && s.symmetry == nibble::Symmetry::symmetric;
    const LinearExtras* e = in.extras(t.name);
    ordered = ordered || (e != nullptr && !e->input_order.empty());
  }
  require<Unsupported>(common.has_value(), "the model has no layers to export");
  require<Unsupported>(h.rotation.block == 0, "the model's residual stream is rotated: no checkpoint can say so");

  const Vocabulary vocabulary = in.vocabulary();
  nlohmann::json config = hf_detail::config_json_of(h, vocabulary, !in.has("output.weight"));
  nibble::GptqConfig gptq;
  if (kind == HfExport::awq) {
    nibble::AwqConfig awq;
    awq.group_size = common->second;
    config["quantization_config"] = nibble::to_json(awq);
  } else {
    gptq.bits = common->first;
    gptq.group_size = common->second;
    gptq.symmetric = symmetric;
    gptq.act_order = ordered;
    gptq.version = kind == HfExport::gptq_v1 ? nibble::GptqVersion::v1 : nibble::GptqVersion::v2;
    config["quantization_config"] = nibble::to_json(gptq);
  }

  std::error_code failed;
  std::filesystem::create_directories(out, failed);
  if (failed) nibble::detail::raise<nibble::IoError>("cannot make the folder '" + out + "': " + failed.message());
  nibble::SafetensorsWriter file(out + "/model.safetensors");
  file.add_metadata("format", "pt");
  const auto float_type = [&](const TensorInfo& t) {
    if (!t.is_matrix()) return SafetensorsType::f32;
    const nibble::Format f = in.scheme(t.name).format;
    return f == nibble::Format::fp16   ? SafetensorsType::f16
           : f == nibble::Format::bf16 ? SafetensorsType::bf16
                                       : SafetensorsType::f32;
  };
  for (const TensorInfo& t : in.tensors()) {
    if (!is_layer(t)) {
      file.declare(hf_module_of(t.name) + ".weight", float_type(t), t.shape);
      continue;
    }
    for (const SafetensorsTensor& part : layer_parts(t)) file.declare(part.name, part.type, part.shape);
  }
  for (const TensorInfo& t : in.tensors()) {
    const std::string name = hf_module_of(t.name) + ".weight";
    if (is_layer(t)) {
      for (const SafetensorsTensor& part : layer_parts(t))
        file.write(part.name, part.data.data(), part.data.size());
    } else if (!t.is_matrix()) {
      const Eigen::VectorXf values = in.vector(t.name);
      file.write(name, values.data(), static_cast<std::size_t>(values.size()) * sizeof(float));
    } else {
      const nibble::QuantizedTensor q = in.quantized(t.name);
      if (float_type(t) != SafetensorsType::f32) {
        file.write(name, q.codes().data(), q.codes().size());
      } else {
        std::vector<float> row(q.line_length());
        for (std::size_t r = 0; r < q.line_count(); ++r) {
          q.dequantize_line(r, 0, row.size(), row.data());
          file.write(name, row.data(), row.size() * sizeof(float));
        }
      }
    }
    done(t.name);
  }
  file.commit();

  nlohmann::json about = {{"add_bos_token", vocabulary.add_bos}, {"tokenizer_class", "PreTrainedTokenizerFast"}};
  nlohmann::json generation = nlohmann::json::object();
  if (vocabulary.bos != no_token) about["bos_token"] = std::string(vocabulary.token(vocabulary.bos));
  if (vocabulary.eos != no_token) about["eos_token"] = std::string(vocabulary.token(vocabulary.eos));
  if (!vocabulary.chat_template.empty()) about["chat_template"] = vocabulary.chat_template;
  if (vocabulary.eos != no_token) generation["eos_token_id"] = nlohmann::json::array({vocabulary.eos});
  if (vocabulary.eot != no_token) generation["eos_token_id"].push_back(vocabulary.eot);
  hf_detail::write_json_file(out + "/tokenizer.json", hf_detail::tokenizer_json_of(vocabulary));
  hf_detail::write_json_file(out + "/tokenizer_config.json", about);
  hf_detail::write_json_file(out + "/generation_config.json", generation);
  if (kind != HfExport::awq) hf_detail::write_json_file(out + "/quantize_config.json", nibble::to_json(gptq));
  hf_detail::write_json_file(out + "/config.json", config);
}

}  // namespace llm
