// A model as a packed safetensors file: weights in the kernels' layout, and beside them all that a GGUF would be asked
// for, so that the file opens without one.
//
// Metadata: "hparams" and "tokenizer", JSON objects. Tensors: norms under their GGUF names, F32; the vocabulary as
//   tokenizer.text    U8 [bytes]   all tokens' bytes, one after the other
//   tokenizer.ends    U32 [n]      where each token's bytes end
//   tokenizer.types   U8 [n]       tokenizer.ggml.token_type
//   tokenizer.scores  F32 [n]      SentencePiece-style vocabularies only
//   tokenizer.merges  I32 [m, 3]   byte-level BPE only: left, right, result
//   tokenizer.token_index  U32 [slots]  tokens by the hash of their text (flat_index.hpp), so that nothing is built when
//   tokenizer.merge_index  U32 [slots]  a program starts; merges by the hash of left and right. Files without are older
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "hparams.hpp"
#include "nibble/io/packed_file.hpp"
#include "vocabulary.hpp"

namespace llm {

namespace packed_detail {

/// A plain tensor where it is mapped; an empty array where it may be missing and is.
template <class T>
FlatArray<T> array_of(const nibble::PackedFile& file, const char* name, nibble::SafetensorsType type,
                      bool needed) {
  const nibble::SafetensorsTensor* tensor = file.find_tensor(name);
  nibble::detail::require<nibble::FormatError>(tensor != nullptr || !needed, "packed model: tensor '", name,
                                               "' is missing");
  if (tensor == nullptr) return {};
  nibble::detail::require<nibble::FormatError>(tensor->type == type, "packed model: tensor '", name,
                                               "' is of type ", nibble::name_of(tensor->type), ", expected ",
                                               nibble::name_of(type));
  return FlatArray<T>(tensor->data);
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
  const Vocabulary::Arrays& a = v.arrays();
  const auto add = [&](const char* name, SafetensorsType type, const auto& array) {
    out.add_tensor(name, type, {array.size()}, array.buffer());
  };
  add("tokenizer.text", SafetensorsType::u8, a.text);
  add("tokenizer.ends", SafetensorsType::u32, a.ends);
  add("tokenizer.types", SafetensorsType::u8, a.types);
  add("tokenizer.token_index", SafetensorsType::u32, a.token_index.slots());
  if (!a.scores.empty()) add("tokenizer.scores", SafetensorsType::f32, a.scores);
  if (a.merges.empty()) return;
  out.add_tensor("tokenizer.merges", SafetensorsType::i32, {a.merges.size(), 3}, a.merges.buffer());
  add("tokenizer.merge_index", SafetensorsType::u32, a.merge_index.slots());
}

/// Throws FormatError where something is missing or contradicts itself.
inline Vocabulary vocabulary_of(const nibble::PackedFile& file) {
  using nibble::SafetensorsType;
  using packed_detail::array_of;
  const nlohmann::json json = packed_detail::json_of(file, "tokenizer");
  VocabularySettings settings;
  try {
    settings.model = json.at("model").get<std::string>();
    settings.pre = json.at("pre").get<std::string>();
    settings.bos = json.at("bos").get<Token>();
    settings.eos = json.at("eos").get<Token>();
    settings.eot = json.at("eot").get<Token>();
    settings.unknown = json.at("unknown").get<Token>();
    settings.add_bos = json.at("add_bos").get<bool>();
    settings.add_space_prefix = json.at("add_space_prefix").get<bool>();
    settings.chat_template = json.at("chat_template").get<std::string>();
  } catch (const nlohmann::json::exception& e) {
    throw nibble::FormatError(std::string("packed model: the tokenizer's settings are broken: ") + e.what());
  }
  Vocabulary::Arrays a;
  a.text = array_of<char>(file, "tokenizer.text", SafetensorsType::u8, true);
  a.ends = array_of<std::uint32_t>(file, "tokenizer.ends", SafetensorsType::u32, true);
  a.types = array_of<std::uint8_t>(file, "tokenizer.types", SafetensorsType::u8, true);
  a.scores = array_of<float>(file, "tokenizer.scores", SafetensorsType::f32, false);
  a.merges = array_of<MergeRule>(file, "tokenizer.merges", SafetensorsType::i32, false);
  const auto index = [&](const char* name, std::size_t entries) {
    const auto slots = array_of<std::uint32_t>(file, name, SafetensorsType::u32, false);
    return file.find_tensor(name) == nullptr ? FlatIndex() : FlatIndex(slots, entries);
  };
  a.token_index = index("tokenizer.token_index", a.ends.size());
  a.merge_index = index("tokenizer.merge_index", a.merges.size());
  return {std::move(settings), std::move(a)};
}

}  // namespace llm
