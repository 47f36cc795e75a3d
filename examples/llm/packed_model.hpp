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

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "hparams.hpp"
#include "linear.hpp"
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

/// True for the tensors that hold what linear layers need beside their weights.
inline bool is_linear_tensor(const std::string& name) {
  return name.compare(0, 7, "linear:") == 0 || name == "linear.version";
}

inline constexpr std::uint32_t linear_extras_version = 1;

namespace packed_detail {

inline void add_side(nibble::PackedFileWriter& out, const std::string& name, const nibble::RowMajorMatrix& m) {
  const auto n = static_cast<std::size_t>(m.size());
  const std::vector<std::size_t> shape = {static_cast<std::size_t>(m.rows()), static_cast<std::size_t>(m.cols())};
  nibble::Buffer halves(2 * n);
  bool exact = true;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint16_t bits = nibble::fp16_from_float(m.data()[i]);
    exact = exact && nibble::float_from_fp16(bits) == m.data()[i];
    halves.as_mutable<std::uint16_t>()[i] = bits;
  }
  if (exact) {
    out.add_tensor(name, nibble::SafetensorsType::f16, shape, std::move(halves));
    return;
  }
  nibble::Buffer floats(4 * n);
  if (n != 0) std::memcpy(floats.mutable_data(), m.data(), 4 * n);
  out.add_tensor(name, nibble::SafetensorsType::f32, shape, std::move(floats));
}

/// What add_side() wrote, rows x cols.
inline nibble::RowMajorMatrix side_of(const nibble::PackedFile& file, const std::string& name, Eigen::Index rows,
                                      Eigen::Index cols) {
  const nibble::SafetensorsTensor* t = file.find_tensor(name);
  nibble::detail::require<nibble::FormatError>(
      t != nullptr && t->shape.size() == 2 && t->shape[0] == static_cast<std::size_t>(rows) &&
          t->shape[1] == static_cast<std::size_t>(cols) &&
          (t->type == nibble::SafetensorsType::f16 || t->type == nibble::SafetensorsType::f32),
      "packed model: '", name, "' is missing, or not F16 or F32 of ", rows, " x ", cols);
  nibble::RowMajorMatrix m(rows, cols);
  if (t->type == nibble::SafetensorsType::f32) {
    nibble::detail::copy_bytes(m.data(), t->data.data(), t->data.size());
    return m;
  }
  const std::vector<std::uint16_t> bits = t->values<std::uint16_t>();
  for (std::size_t i = 0; i < bits.size(); ++i) m.data()[i] = nibble::float_from_fp16(bits[i]);
  return m;
}

}  // namespace packed_detail

/// Adds what linear layers need beside their weights, by the name of the matrix; and the mark that a file with a
/// rotation needs. As add_model_data: before the first data.
inline void add_linear_extras(nibble::PackedFileWriter& out, const Hparams& hparams,
                              const std::map<std::string, LinearExtras>& extras) {
  using nibble::SafetensorsType;
  const auto add = [&](const std::string& name, SafetensorsType type, const void* data, std::size_t count) {
    nibble::Buffer bytes(4 * count);
    std::memcpy(bytes.mutable_data(), data, bytes.size());
    out.add_tensor(name, type, {count}, std::move(bytes));
  };
  nlohmann::json linears = nlohmann::json::object();
  for (const auto& [name, e] : extras) {
    if (e.empty()) continue;
    nlohmann::json json = nlohmann::json::object();
    if (e.hadamard.block != 0) json["hadamard"] = to_json(e.hadamard);
    if (!e.input_order.empty()) {
      json["input_order"] = true;
      add("linear:" + name + ".input_order", SafetensorsType::u32, e.input_order.data(), e.input_order.size());
    }
    if (!e.activation_scales.empty()) {
      json["static"] = {{"group", e.activation_group}};
      if (e.activation_outliers) json["static_outliers"] = true;
      add("linear:" + name + ".activation_scales", SafetensorsType::f32, e.activation_scales.data(),
          e.activation_scales.size());
    }
    if (e.activation_bits != 0) json["dynamic"] = {{"bits", e.activation_bits}, {"token", e.activation_token}};
    if (e.outlier_threshold != 0.0F) json["outlier_threshold"] = e.outlier_threshold;
    if (e.bias.size() != 0) {
      json["bias"] = true;
      add("linear:" + name + ".bias", SafetensorsType::f32, e.bias.data(),
          static_cast<std::size_t>(e.bias.size()));
    }
    if (!e.side.empty()) {
      // fp16 a value where that is exact, as merging makes them.
      json["side"] = {{"rank", e.side.rank()}, {"scale", e.side.scale}};
      packed_detail::add_side(out, "linear:" + name + ".side_a", e.side.a);
      packed_detail::add_side(out, "linear:" + name + ".side_b", e.side.b);
    }
    linears[name] = std::move(json);
  }
  if (linears.empty() && hparams.rotation.block == 0) return;
  add("linear.version", SafetensorsType::u32, &linear_extras_version, 1);
  if (linears.empty()) return;
  const nlohmann::json all = {{"version", linear_extras_version}, {"linears", std::move(linears)}};
  out.add_metadata("linear", all.dump());
}

/// What linear layers of a file need beside their weights. Throws FormatError where it is broken or fits no matrix,
/// Unsupported for a version or field that this reader does not know.
inline std::map<std::string, LinearExtras> linear_extras_of(const nibble::PackedFile& file) {
  using nibble::FormatError;
  using nibble::SafetensorsType;
  using nibble::Unsupported;
  using nibble::detail::require;
  std::map<std::string, LinearExtras> all;
  if (file.find_tensor("linear.version") != nullptr) {
    const auto version =
        packed_detail::array_of<std::uint32_t>(file, "linear.version", SafetensorsType::u32, true);
    require<Unsupported>(version.size() == 1 && version[0] == linear_extras_version,
                         "packed model: its linear layers are of a version that this program does not know");
  }
  if (file.find_metadata("linear") == nullptr) return all;
  const nlohmann::json json = packed_detail::json_of(file, "linear");
  require<Unsupported>(json.contains("version") && json["version"] == linear_extras_version,
                       "packed model: its linear layers are of a version that this program does not know");
  require<FormatError>(json.contains("linears") && json["linears"].is_object(),
                       "packed model: 'linear' has no 'linears'");
  for (const auto& entry : json["linears"].items()) {
    const std::string& name = entry.key();
    const nibble::PackedMatrix* matrix = file.find_matrix(name);
    require<FormatError>(matrix != nullptr && entry.value().is_object(), "packed model: 'linear' names '", name,
                         "', which is no matrix of the file or has no object");
    const auto inputs = static_cast<std::size_t>(matrix->cols());
    LinearExtras e;
    const auto read = [&](const char* what, SafetensorsType type, auto* to) {
      using T = typename std::decay_t<decltype(*to)>::value_type;
      const auto values = packed_detail::array_of<T>(file, ("linear:" + name + "." + what).c_str(), type, true);
      to->assign(values.begin(), values.end());
    };
    try {
      for (const auto& item : entry.value().items()) {
        const std::string& key = item.key();
        const nlohmann::json& value = item.value();
        if (key == "hadamard") {
          e.hadamard = hadamard_spec_of(value, inputs);
        } else if (key == "input_order") {
          read("input_order", SafetensorsType::u32, &e.input_order);
        } else if (key == "static") {
          e.activation_group = value.at("group").get<std::size_t>();
          read("activation_scales", SafetensorsType::f32, &e.activation_scales);
        } else if (key == "static_outliers") {
          e.activation_outliers = value.get<bool>();
        } else if (key == "dynamic") {
          e.activation_bits = value.at("bits").get<unsigned>();
          e.activation_token = value.at("token").get<bool>();
        } else if (key == "outlier_threshold") {
          e.outlier_threshold = value.get<float>();
        } else if (key == "bias") {
          std::vector<float> bias;
          read("bias", SafetensorsType::f32, &bias);
          e.bias = Eigen::Map<const Eigen::VectorXf>(bias.data(), static_cast<Eigen::Index>(bias.size()));
        } else if (key == "side") {
          const auto rank = value.at("rank").get<std::int64_t>();
          require<FormatError>(rank >= 1 && rank <= 65536, "packed model: '", name, "' has a side term of rank ",
                               rank);
          e.side.scale = value.at("scale").get<double>();
          e.side.a = packed_detail::side_of(file, "linear:" + name + ".side_a", rank, matrix->cols());
          e.side.b = packed_detail::side_of(file, "linear:" + name + ".side_b", matrix->rows(), rank);
        } else {
          nibble::detail::raise<Unsupported>(nibble::detail::concat("packed model: '", name, "' has the field '",
                                                                    key, "', which this program does not know"));
        }
      }
    } catch (const nlohmann::json::exception& error) {
      throw FormatError("packed model: the linear layer '" + name + "' is broken: " + error.what());
    }
    check(e, name, static_cast<std::size_t>(matrix->rows()), inputs);
    all.emplace(name, std::move(e));
  }
  return all;
}

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
