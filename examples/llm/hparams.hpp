// A Llama-family model's sizes and constants.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "nibble/io/gguf.hpp"
#include "nibble/ptq/hadamard.hpp"

namespace llm {

/// A HadamardRotation of channels, as files tell of it.
struct HadamardSpec {
  std::size_t block = 0;              // channels that are mixed; 0: no rotation
  std::optional<std::uint64_t> seed;  // of random signs; empty: none

  bool operator==(const HadamardSpec& o) const { return block == o.block && seed == o.seed; }
};

/// The rotation of n channels. Throws as HadamardRotation does.
inline std::shared_ptr<const nibble::HadamardRotation> rotation_of(const HadamardSpec& spec, Eigen::Index n) {
  return std::make_shared<const nibble::HadamardRotation>(n, static_cast<Eigen::Index>(spec.block), spec.seed);
}

inline nlohmann::json to_json(const HadamardSpec& spec) {
  nlohmann::json json = {{"block", spec.block}};
  if (spec.seed) json["seed"] = *spec.seed;
  return json;
}
/// Throws FormatError for what is no rotation of `channels` channels.
inline HadamardSpec hadamard_spec_of(const nlohmann::json& json, std::size_t channels) {
  using nibble::FormatError;
  using nibble::detail::require;
  require<FormatError>(json.is_object(), "a rotation is no JSON object");
  HadamardSpec spec;
  for (const auto& item : json.items()) {
    const bool known = item.key() == "block" || item.key() == "seed";
    require<nibble::Unsupported>(known, "a rotation has the field '", item.key(),
                                 "', which this version does not know");
    require<FormatError>(item.value().is_number_unsigned(), "a rotation's '", item.key(),
                         "' is no unsigned integer");
    if (item.key() == "block")
      spec.block = item.value().get<std::size_t>();
    else
      spec.seed = item.value().get<std::uint64_t>();
  }
  require<FormatError>(spec.block >= 1 && spec.block <= channels && channels % spec.block == 0,
                       "a rotation has blocks of ", spec.block, ", expected a divisor of ", channels);
  require<FormatError>(nibble::detail::plan_hadamard(static_cast<Eigen::Index>(spec.block)).found(),
                       "a rotation has blocks of ", spec.block, ", for which there is no Hadamard matrix");
  return spec;
}

struct Hparams {
  std::string name;
  std::size_t layers = 0;
  std::size_t dim = 0;
  std::size_t ffn = 0;  // hidden size of the feed-forward network
  std::size_t heads = 0;
  std::size_t kv_heads = 0;  // grouped-query attention: heads / kv_heads queries share a key
  std::size_t head_size = 0;
  std::size_t rope_size = 0;  // dimensions of a head that RoPE turns
  std::size_t context = 0;    // tokens that the model was trained for
  std::size_t vocabulary = 0;
  float rms_epsilon = 1e-5F;
  double rope_base = 10000.0;
  double rope_scale = 1.0;  // positions are divided by it
  /// Of the residual stream (block 0: none): the blocks read and write R^T x. The embedding and the output layer with
  /// its norm are as they were, so that they may share their weights: the runner rotates after the one and back before
  /// the other.
  HadamardSpec rotation;

  std::size_t kv_size() const { return kv_heads * head_size; }
  std::size_t q_size() const { return heads * head_size; }
};

/// Throws FormatError for sizes that no model has: a file is not trusted to be sane.
inline void check(const Hparams& h) {
  const auto in_range = [](std::size_t value, std::size_t most, const char* what) {
    nibble::detail::require<nibble::FormatError>(value >= 1 && value <= most, "the model's ", what, " is ", value,
                                                 ", expected 1 to ", most);
  };
  in_range(h.layers, 4096, "number of layers");
  in_range(h.dim, 1U << 20, "embedding length");
  in_range(h.ffn, 1U << 22, "feed-forward length");
  in_range(h.heads, 4096, "number of heads");
  in_range(h.kv_heads, h.heads, "number of key-value heads");
  in_range(h.head_size, 1U << 14, "head size");
  in_range(h.vocabulary, 1U << 26, "vocabulary");
  in_range(h.context, 1U << 30, "context length");
  using nibble::detail::require;
  require<nibble::FormatError>(h.heads % h.kv_heads == 0, h.heads, " heads cannot share ", h.kv_heads,
                               " key-value heads evenly");
  require<nibble::FormatError>(h.rope_size % 2 == 0 && h.rope_size <= h.head_size, "rope dimension count is ",
                               h.rope_size, ", expected an even number up to ", h.head_size);
  require<nibble::FormatError>(
      h.rms_epsilon > 0.0F && h.rms_epsilon < 1.0F && h.rope_base > 0.0 && h.rope_scale > 0.0,
      "the model's epsilon or rope constants are out of range");
}

inline Hparams hparams_of(const nibble::GgufFile& file) {
  using nibble::FormatError;
  const auto architecture = file.get<std::string>("general.architecture");
  nibble::detail::require<nibble::Unsupported>(architecture == "llama", "the model's architecture is '",
                                               architecture, "'; this program runs 'llama'");
  Hparams h;
  h.name = file.get_or<std::string>("general.name", architecture);
  h.layers = file.get<std::size_t>("llama.block_count");
  h.dim = file.get<std::size_t>("llama.embedding_length");
  h.ffn = file.get<std::size_t>("llama.feed_forward_length");
  h.heads = file.get<std::size_t>("llama.attention.head_count");
  h.kv_heads = file.get_or<std::size_t>("llama.attention.head_count_kv", h.heads);
  h.context = file.get_or<std::size_t>("llama.context_length", 2048);
  h.rms_epsilon = file.get_or<float>("llama.attention.layer_norm_rms_epsilon", 1e-5F);
  h.rope_base = file.get_or<double>("llama.rope.freq_base", 10000.0);
  h.head_size = file.get_or<std::size_t>("llama.attention.key_length", h.heads == 0 ? 0 : h.dim / h.heads);
  nibble::detail::require<nibble::Unsupported>(
      file.get_or<std::size_t>("llama.attention.value_length", h.head_size) == h.head_size,
      "keys and values of different sizes are not supported");
  nibble::detail::require<nibble::Unsupported>(file.get_or<std::size_t>("llama.expert_count", 0) == 0,
                                               "mixtures of experts are not supported");
  h.rope_size = file.get_or<std::size_t>("llama.rope.dimension_count", h.head_size);
  const auto scaling = file.get_or<std::string>("llama.rope.scaling.type", "none");
  if (scaling == "linear")
    h.rope_scale = file.get_or<double>("llama.rope.scaling.factor", 1.0);
  else
    nibble::detail::require<nibble::Unsupported>(scaling == "none", "rope scaling '", scaling,
                                                 "' is not supported");
  const nibble::GgufTensor& embedding = file.tensor("token_embd.weight");
  h.vocabulary = embedding.rows();
  check(h);
  return h;
}

inline nlohmann::json to_json(const Hparams& h) {
  nlohmann::json json = {{"name", h.name},
                         {"layers", h.layers},
                         {"dim", h.dim},
                         {"ffn", h.ffn},
                         {"heads", h.heads},
                         {"kv_heads", h.kv_heads},
                         {"head_size", h.head_size},
                         {"rope_size", h.rope_size},
                         {"context", h.context},
                         {"vocabulary", h.vocabulary},
                         {"rms_epsilon", h.rms_epsilon},
                         {"rope_base", h.rope_base},
                         {"rope_scale", h.rope_scale}};
  if (h.rotation.block != 0) json["rotation"] = to_json(h.rotation);
  return json;
}

/// Throws FormatError where a member is missing or of a wrong type.
inline Hparams hparams_of(const nlohmann::json& j) {
  Hparams h;
  try {
    h.name = j.at("name").get<std::string>();
    const auto size = [&](const char* key) {
      const nlohmann::json& value = j.at(key);
      nibble::detail::require<nibble::FormatError>(value.is_number_unsigned(), "hyperparameter '", key,
                                                   "' is not a positive whole number");
      return value.get<std::size_t>();
    };
    h.layers = size("layers");
    h.dim = size("dim");
    h.ffn = size("ffn");
    h.heads = size("heads");
    h.kv_heads = size("kv_heads");
    h.head_size = size("head_size");
    h.rope_size = size("rope_size");
    h.context = size("context");
    h.vocabulary = size("vocabulary");
    h.rms_epsilon = j.at("rms_epsilon").get<float>();
    h.rope_base = j.at("rope_base").get<double>();
    h.rope_scale = j.at("rope_scale").get<double>();
  } catch (const nlohmann::json::exception& e) {
    throw nibble::FormatError(std::string("the hyperparameters are broken: ") + e.what());
  }
  check(h);
  if (j.contains("rotation")) h.rotation = hadamard_spec_of(j["rotation"], h.dim);
  return h;
}

}  // namespace llm
