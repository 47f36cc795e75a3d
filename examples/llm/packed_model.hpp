// A model as a packed safetensors file: weights in the kernels' layout, and beside them all that a GGUF would be asked
// for, so that the file opens without one.
//
// Metadata: "hparams" and "tokenizer", JSON objects. Tensors: norms under their GGUF names, F32; the vocabulary as
//   tokenizer.text    U8 [bytes]   all tokens' bytes, one after the other
//   tokenizer.ends    U32 [n]      where each token's bytes end
//   tokenizer.types   U8 [n]       tokenizer.ggml.token_type
//   tokenizer.scores  F32 [n]      SentencePiece-style vocabularies only
//   tokenizer.merges  I32 [m, 3]   byte-level BPE only: left, right, result
#pragma once

#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "hparams.hpp"
#include "nibble/io/packed_file.hpp"
#include "vocabulary.hpp"

namespace llm {

namespace packed_detail {

template <class T>
nibble::Buffer buffer_of(const std::vector<T>& values) {
  nibble::Buffer buffer(values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(buffer.mutable_data(), values.data(), buffer.size());
  return buffer;
}

template <class T>
std::vector<T> values_of(const nibble::PackedFile& file, const char* name, nibble::SafetensorsType type,
                         bool needed) {
  const nibble::SafetensorsTensor* tensor = file.find_tensor(name);
  nibble::detail::require<nibble::FormatError>(tensor != nullptr || !needed, "packed model: tensor '", name,
                                               "' is missing");
  if (tensor == nullptr) return {};
  nibble::detail::require<nibble::FormatError>(tensor->type == type, "packed model: tensor '", name,
                                               "' is of type ", nibble::name_of(tensor->type), ", expected ",
                                               nibble::name_of(type));
  std::vector<T> values(tensor->data.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), tensor->data.data(), values.size() * sizeof(T));
  return values;
}

inline nlohmann::json json_of(const nibble::PackedFile& file, const char* key) {
  const std::string* text = file.find_metadata(key);
  nibble::detail::require<nibble::FormatError>(text != nullptr, "packed model: its metadata lacks '", key, "'");
  nlohmann::json json = nlohmann::json::parse(*text, nullptr, false);
  nibble::detail::require<nibble::FormatError>(json.is_object(), "packed model: '", key, "' is no JSON object");
  return json;
}

}  // namespace packed_detail

/// True for the tensors that hold the vocabulary.
inline bool is_vocabulary_tensor(const std::string& name) { return name.compare(0, 10, "tokenizer.") == 0; }

/// Adds hyperparameters and vocabulary. All declarations come before the first data: call add_model_data, then declare
/// the weights, then write.
inline void add_model_data(nibble::PackedFileWriter& out, const Hparams& hparams, const Vocabulary& v) {
  using nibble::SafetensorsType;
  using packed_detail::buffer_of;
  out.add_metadata("hparams", to_json(hparams).dump());
  const nlohmann::json settings = {{"model", v.model},
                                   {"pre", v.pre},
                                   {"bos", v.bos},
                                   {"eos", v.eos},
                                   {"eot", v.eot},
                                   {"unknown", v.unknown},
                                   {"add_bos", v.add_bos},
                                   {"add_space_prefix", v.add_space_prefix},
                                   {"chat_template", v.chat_template}};
  out.add_metadata("tokenizer", settings.dump());
  std::vector<char> text;
  std::vector<std::uint32_t> ends;
  for (const std::string& token : v.tokens) {
    text.insert(text.end(), token.begin(), token.end());
    ends.push_back(static_cast<std::uint32_t>(text.size()));
  }
  out.add_tensor("tokenizer.text", SafetensorsType::u8, {text.size()}, buffer_of(text));
  out.add_tensor("tokenizer.ends", SafetensorsType::u32, {ends.size()}, buffer_of(ends));
  out.add_tensor("tokenizer.types", SafetensorsType::u8, {v.types.size()}, buffer_of(v.types));
  if (!v.scores.empty()) out.add_tensor("tokenizer.scores", v.scores);
  if (v.merges.empty()) return;
  std::vector<std::int32_t> merges;
  for (const MergeRule& m : v.merges) merges.insert(merges.end(), {m.left, m.right, m.result});
  out.add_tensor("tokenizer.merges", SafetensorsType::i32, {v.merges.size(), 3}, buffer_of(merges));
}

/// Throws FormatError where something is missing or contradicts itself.
inline Vocabulary vocabulary_of(const nibble::PackedFile& file) {
  using nibble::SafetensorsType;
  using nibble::detail::require;
  using packed_detail::values_of;
  Vocabulary v;
  const nlohmann::json settings = packed_detail::json_of(file, "tokenizer");
  const auto text = values_of<char>(file, "tokenizer.text", SafetensorsType::u8, true);
  const auto ends = values_of<std::uint32_t>(file, "tokenizer.ends", SafetensorsType::u32, true);
  v.tokens.reserve(ends.size());
  std::size_t begin = 0;
  for (const std::uint32_t end : ends) {
    require<nibble::FormatError>(end >= begin && end <= text.size(),
                                 "packed model: tokenizer.ends does not ascend");
    v.tokens.emplace_back(text.data() + begin, end - begin);
    begin = end;
  }
  for (const std::uint8_t t : values_of<std::uint8_t>(file, "tokenizer.types", SafetensorsType::u8, true))
    v.types.push_back(t >= 1 && t <= 6 ? static_cast<TokenType>(t) : TokenType::normal);
  v.scores = values_of<float>(file, "tokenizer.scores", SafetensorsType::f32, false);
  const auto merges = values_of<std::int32_t>(file, "tokenizer.merges", SafetensorsType::i32, false);
  const auto known = [&](std::int32_t t) { return t >= 0 && static_cast<std::size_t>(t) < v.tokens.size(); };
  v.merges.reserve(merges.size() / 3);
  for (std::size_t i = 0; i + 3 <= merges.size(); i += 3) {
    const MergeRule rule{merges[i], merges[i + 1], merges[i + 2]};
    require<nibble::FormatError>(known(rule.left) && known(rule.right) && known(rule.result),
                                 "packed model: tokenizer.merges names a token that does not exist");
    v.merges.push_back(rule);
  }
  try {
    v.model = settings.at("model").get<std::string>();
    v.pre = settings.at("pre").get<std::string>();
    const auto token = [&](const char* key) {
      const auto t = settings.at(key).get<Token>();
      return known(t) ? t : no_token;
    };
    v.bos = token("bos");
    v.eos = token("eos");
    v.eot = token("eot");
    v.unknown = token("unknown");
    v.add_bos = settings.at("add_bos").get<bool>();
    v.add_space_prefix = settings.at("add_space_prefix").get<bool>();
    v.chat_template = settings.at("chat_template").get<std::string>();
  } catch (const nlohmann::json::exception& e) {
    throw nibble::FormatError(std::string("packed model: the tokenizer's settings are broken: ") + e.what());
  }
  return v;
}

}  // namespace llm
