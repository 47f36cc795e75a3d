// How a Llama is laid out in a Hugging Face folder: its configuration, the names of its tensors, the order of the rows of
// q and k.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "hparams.hpp"
#include "nibble/core/buffer.hpp"
#include "nibble/io/gptq_checkpoint.hpp"
#include "nibble/quantize/quantized_tensor.hpp"

namespace llm {

/// "model.layers.3.self_attn.q_proj" of "blk.3.attn_q.weight": the module whose weight a tensor of ours is, or "" for what
/// no Llama has.
inline std::string hf_module_of(const std::string& name) {
  if (name == "token_embd.weight") return "model.embed_tokens";
  if (name == "output_norm.weight") return "model.norm";
  if (name == "output.weight") return "lm_head";
  static constexpr std::array<std::pair<const char*, const char*>, 9> parts = {
      {{"attn_norm", "input_layernorm"},
       {"attn_q", "self_attn.q_proj"},
       {"attn_k", "self_attn.k_proj"},
       {"attn_v", "self_attn.v_proj"},
       {"attn_output", "self_attn.o_proj"},
       {"ffn_norm", "post_attention_layernorm"},
       {"ffn_gate", "mlp.gate_proj"},
       {"ffn_up", "mlp.up_proj"},
       {"ffn_down", "mlp.down_proj"}}};
  if (name.compare(0, 4, "blk.") != 0) return "";
  const std::size_t dot = name.find('.', 4);
  if (dot == std::string::npos) return "";
  for (const auto& part : parts)
    if (name.substr(dot + 1) == std::string(part.first) + ".weight")
      return "model.layers." + name.substr(4, dot - 4) + "." + part.second;
  return "";
}

/// For every row of our q or k the row of a Hugging Face folder's. There RoPE turns row i of a head with row i + size / 2,
/// in GGUF and here row 2i with row 2i + 1. Empty for the other tensors, whose rows are the same.
inline std::vector<std::size_t> hf_rows_of(const std::string& name, const Hparams& h) {
  const auto ends_with = [&](const std::string& end) {
    return name.size() > end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
  };
  const std::size_t heads = ends_with(".attn_q.weight") ? h.heads : ends_with(".attn_k.weight") ? h.kv_heads : 0;
  std::vector<std::size_t> rows;
  for (std::size_t head = 0; head < heads; ++head)
    for (std::size_t i = 0; i < h.head_size; ++i)
      rows.push_back(head * h.head_size + i % 2 * (h.head_size / 2) + i / 2);
  return rows;
}

inline std::vector<std::size_t> inverse_of(const std::vector<std::size_t>& order) {
  std::vector<std::size_t> inverse(order.size());
  for (std::size_t i = 0; i < order.size(); ++i) inverse[order[i]] = i;
  return inverse;
}

/// Row r of the result is row rows[r] of `t`, with its scales and zero points. Throws FormatError where `t` has another
/// number of rows, InvalidArgument where scales do not belong to rows.
inline nibble::QuantizedTensor with_rows(const nibble::QuantizedTensor& t, const std::vector<std::size_t>& rows) {
  if (rows.empty()) return t;
  nibble::detail::require<nibble::FormatError>(t.rank() == 2 && t.shape()[0] == rows.size(), "a matrix has ",
                                               t.rank() == 2 ? t.shape()[0] : 0, " rows, expected ", rows.size());
  const nibble::Granularity& g = t.scheme().granularity;
  using Kind = nibble::Granularity::Kind;
  const bool shared = g.kind == Kind::per_tensor;
  nibble::detail::require(
      shared || (g.kind == Kind::per_channel && g.axis == 0) || (g.kind == Kind::per_group && g.axis == 1),
      "a matrix whose scales do not belong to rows cannot have its rows exchanged");
  const auto exchange = [&](const nibble::Buffer& from, std::size_t row_bytes) {
    nibble::Buffer to(from.size());
    for (std::size_t r = 0; r < rows.size(); ++r)
      nibble::detail::copy_bytes(to.mutable_data() + r * row_bytes, from.data() + rows[r] * row_bytes, row_bytes);
    return to;
  };
  return nibble::QuantizedTensor::from_parts(
      t.scheme(), t.shape(), exchange(t.codes(), t.line_bytes()),
      shared ? t.scales() : exchange(t.scales(), t.scales().size() / rows.size()),
      shared ? t.zeros() : exchange(t.zeros(), t.zeros().size() / rows.size()));
}

/// What config.json says.
struct HfConfig {
  Hparams hparams;  // the vocabulary's size included
  bool tied = false;
  std::vector<float> rope_divisors;  // rope_type "llama3"; else empty
  nlohmann::json quantization;       // quantization_config, or null
};

namespace hf_detail {

inline const std::string config_name = "config.json";

/// "rope_type": "llama3" (Llama 3.1): what each frequency is divided by. Long waves are stretched by `factor`, short ones
/// stay, between them it goes over.
inline std::vector<float> llama3_divisors(const nlohmann::json& rope, const Hparams& h) {
  using nibble::detail::json_member;
  const auto number = [&](const char* key) {
    const auto value = json_member<double>(rope, key, config_name);
    nibble::detail::require<nibble::FormatError>(value && std::isfinite(*value) && *value > 0.0, config_name,
                                                 ": rope scaling lacks a positive '", key, "'");
    return *value;
  };
  const double factor = number("factor"), low = number("low_freq_factor"), high = number("high_freq_factor");
  const double context = number("original_max_position_embeddings");
  nibble::detail::require<nibble::FormatError>(high > low, config_name, ": rope scaling's high_freq_factor is ",
                                               high, ", expected more than low_freq_factor, ", low);
  std::vector<float> divisors;
  for (std::size_t i = 0; i < h.rope_size / 2; ++i) {
    const double frequency =
        std::pow(h.rope_base, -2.0 * static_cast<double>(i) / static_cast<double>(h.rope_size));
    const double wave = 6.283185307179586 / frequency;
    const double smooth = (context / wave - low) / (high - low);
    const double divisor = wave > context / low    ? factor
                           : wave < context / high ? 1.0
                                                   : 1.0 / ((1.0 - smooth) / factor + smooth);
    divisors.push_back(static_cast<float>(divisor));
  }
  return divisors;
}

}  // namespace hf_detail

/// Reads config.json. Throws FormatError; Unsupported, by name, for what this runner would not compute.
inline HfConfig hf_config_of(const nlohmann::json& json, const std::string& name) {
  using nibble::FormatError;
  using nibble::Unsupported;
  using nibble::detail::json_member;
  using nibble::detail::printable;
  using nibble::detail::require;
  const std::string& where = hf_detail::config_name;
  const auto architectures = json.find("architectures");
  std::string architecture = json_member<std::string>(json, "model_type", where).value_or("");
  bool known = architecture == "llama";
  if (architectures != json.end() && architectures->is_array() && !architectures->empty()) {
    architecture = (*architectures)[0].is_string() ? (*architectures)[0].get<std::string>() : "?";
    known = architecture == "LlamaForCausalLM";
  }
  require<Unsupported>(known, where, ": the architecture is '", printable(architecture),
                       "'; this program runs LlamaForCausalLM");
  const auto size = [&](const char* key, std::int64_t otherwise) {
    const std::int64_t value = json_member<std::int64_t>(json, key, where).value_or(otherwise);
    require<FormatError>(value >= 1, where, ": '", key, "' is ", value == -1 ? "missing" : std::to_string(value),
                         ", expected a positive number");
    return static_cast<std::size_t>(value);
  };
  HfConfig c;
  Hparams& h = c.hparams;
  h.name = json_member<std::string>(json, "_name_or_path", where).value_or("");
  if (h.name.empty()) h.name = name;
  h.layers = size("num_hidden_layers", -1);
  h.dim = size("hidden_size", -1);
  h.ffn = size("intermediate_size", -1);
  h.heads = size("num_attention_heads", -1);
  h.kv_heads = size("num_key_value_heads", static_cast<std::int64_t>(h.heads));
  h.head_size = size("head_dim", static_cast<std::int64_t>(h.dim / h.heads));
  h.rope_size = h.head_size;
  h.context = size("max_position_embeddings", 2048);
  h.vocabulary = size("vocab_size", -1);
  h.rms_epsilon = static_cast<float>(json_member<double>(json, "rms_norm_eps", where).value_or(1e-6));
  // Newer files keep what belongs to RoPE in one object.
  nlohmann::json rope = nlohmann::json::object();
  for (const char* key : {"rope_scaling", "rope_parameters"})
    if (const auto at = json.find(key); at != json.end() && !at->is_null()) {
      require<FormatError>(at->is_object(), where, ": '", key, "' is no object");
      rope = *at;
    }
  h.rope_base = json_member<double>(rope, "rope_theta", where)
                    .value_or(json_member<double>(json, "rope_theta", where).value_or(10000.0));
  const std::string type = json_member<std::string>(rope, "rope_type", where)
                               .value_or(json_member<std::string>(rope, "type", where).value_or("default"));
  if (type == "linear")
    h.rope_scale = json_member<double>(rope, "factor", where).value_or(1.0);
  else
    require<Unsupported>(type == "default" || type == "llama3", where, ": rope scaling '", printable(type),
                         "' is not supported (linear and llama3 are)");
  check(h);
  require<FormatError>(h.head_size % 2 == 0, where, ": heads of ", h.head_size,
                       " dimensions, expected an even number");
  if (type == "llama3") c.rope_divisors = hf_detail::llama3_divisors(rope, h);
  c.tied = json_member<bool>(json, "tie_word_embeddings", where).value_or(false);

  const std::string gate = json_member<std::string>(json, "hidden_act", where).value_or("silu");
  require<Unsupported>(gate == "silu", where, ": hidden_act '", printable(gate), "' is not supported (silu is)");
  for (const char* key : {"attention_bias", "mlp_bias"})
    require<Unsupported>(!json_member<bool>(json, key, where).value_or(false), where, ": ", key,
                         " is not supported");
  require<Unsupported>(json_member<double>(json, "partial_rotary_factor", where).value_or(1.0) == 1.0, where,
                       ": partial_rotary_factor is not supported");
  if (const auto q = json.find("quantization_config"); q != json.end()) c.quantization = *q;
  return c;
}

}  // namespace llm
