// LoRA adapters in the layout of Hugging Face's PEFT: a folder with
//
//   adapter_config.json         rank, alpha, target modules ...
//   adapter_model.safetensors   base_model.model.<module>.lora_A.weight [r, K] and .lora_B.weight [N, r] of every module
//
// and weight' = weight + scale B A, scale = lora_alpha / r, or lora_alpha / sqrt(r) where use_rslora is true. Rows and
// columns are those of the Hugging Face model that the adapter belongs to.
//
// This header needs nlohmann/json and is not a part of <nibble/nibble.hpp>.
#pragma once

#include <Eigen/Core>
#include <cctype>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/formats/bf16.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/io/atomic_file.hpp"
#include "nibble/io/gptq_checkpoint.hpp"
#include "nibble/io/mapped_file.hpp"
#include "nibble/io/safetensors.hpp"
#include "nibble/train/low_rank.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// What adapter_config.json says.
struct PeftConfig {
  std::size_t rank = 8;
  double alpha = 8.0;
  double dropout = 0.0;
  bool rank_stabilized = false;             ///< use_rslora
  std::vector<std::string> target_modules;  ///< "q_proj" ...; one regular expression where it is a string there
  std::string base_model;                   ///< base_model_name_or_path
  std::string task_type = "CAUSAL_LM";
  std::map<std::string, std::size_t> rank_pattern;  ///< module, or what its name ends with, to its rank
  std::map<std::string, double> alpha_pattern;

  double scale() const noexcept { return scale_of(""); }
  /// Of a module "model.layers.0.self_attn.q_proj".
  double scale_of(const std::string& module) const noexcept {
    const auto r = static_cast<double>(of(rank_pattern, module, rank));
    const double a = of(alpha_pattern, module, alpha);
    return a / (rank_stabilized ? std::sqrt(r) : r);
  }
  std::size_t rank_of(const std::string& module) const noexcept { return of(rank_pattern, module, rank); }

 private:
  /// PEFT takes a key for the whole name or for an end of it behind a dot.
  template <class T>
  static T of(const std::map<std::string, T>& pattern, const std::string& module, T otherwise) noexcept {
    for (const auto& entry : pattern) {
      const std::string& key = entry.first;
      if (module.size() < key.size() || module.compare(module.size() - key.size(), key.size(), key) != 0) continue;
      if (module.size() == key.size() || module[module.size() - key.size() - 1] == '.') return entry.second;
    }
    return otherwise;
  }
};

/// An adapter: its configuration, and by the name of the module ("model.layers.0.self_attn.q_proj") its matrices with their
/// scale.
struct PeftAdapter {
  PeftConfig config;
  std::map<std::string, LowRank> modules;
  /// "__metadata__" of the tensors' file: free text by key, which PEFT passes over.
  std::map<std::string, std::string> metadata;
};

namespace detail {

inline constexpr std::size_t peft_max_config_bytes = std::size_t{1} << 20;
inline constexpr std::size_t peft_max_rank = 65536;

template <class T>
std::map<std::string, T> peft_pattern(const nlohmann::json& json, const char* key, const std::string& where) {
  std::map<std::string, T> pattern;
  const auto at = json.find(key);
  if (at == json.end() || at->is_null()) return pattern;
  require<FormatError>(at->is_object(), where, ": '", key, "' is no object");
  for (const auto& entry : at->items()) {
    for (const char c : entry.key())
      require<Unsupported>(std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '.', where, ": '",
                           key, "' has the regular expression '", printable(entry.key()),
                           "'; plain names of modules are supported");
    require<FormatError>(entry.value().is_number(), where, ": '", key, "' has '", printable(entry.key()),
                         "', which is no number");
    const double value = entry.value().template get<double>();
    require<FormatError>(value >= (std::is_integral_v<T> ? 1.0 : -1e30) &&
                             value <= (std::is_integral_v<T> ? static_cast<double>(peft_max_rank) : 1e30),
                         where, ": '", key, "' has ", value, " for '", printable(entry.key()), "'");
    pattern[entry.key()] = static_cast<T>(value);
  }
  return pattern;
}

/// A file's whole text as JSON, at most `deepest` deep.
inline nlohmann::json peft_json(const std::string& path) {
  const MappedFile file = MappedFile::open(path);
  const Buffer text = file.buffer();
  require<FormatError>(text.size() <= peft_max_config_bytes, "'", path, "' has ", text.size(),
                       " bytes, expected at most ", peft_max_config_bytes);
  bool deep = false;
  const auto watch = [&deep](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    deep = deep || depth > 16;
    return !deep;
  };
  const auto* begin = reinterpret_cast<const char*>(text.data());
  nlohmann::json json = nlohmann::json::parse(begin, begin + text.size(), watch, false);
  require<FormatError>(!deep, "'", path, "' is nested deeper than a configuration");
  require<FormatError>(json.is_object(), "'", path, "' is no JSON object");
  return json;
}

}  // namespace detail

/// Reads what adapter_config.json holds. Throws FormatError; Unsupported, by name, for what would make another sum of it
/// than W + scale B A (DoRA, other methods than LoRA, biases, whole modules).
inline PeftConfig parse_peft_config(const nlohmann::json& json, const std::string& where = "adapter_config.json") {
  using detail::json_member;
  using detail::printable;
  using detail::require;
  require<FormatError>(json.is_object(), where, " is no JSON object");
  const std::string type = json_member<std::string>(json, "peft_type", where).value_or("LORA");
  require<Unsupported>(type == "LORA", where, ": peft_type '", printable(type), "' is not supported (LORA is)");
  for (const char* key : {"use_dora", "fan_in_fan_out", "use_qalora", "lora_bias"})
    require<Unsupported>(!json_member<bool>(json, key, where).value_or(false), where, ": '", key,
                         "' is not supported");
  const std::string bias = json_member<std::string>(json, "bias", where).value_or("none");
  require<Unsupported>(bias == "none", where, ": bias '", printable(bias), "' is not supported (none is)");
  for (const char* key : {"modules_to_save", "trainable_token_indices", "target_parameters"})
    if (const auto at = json.find(key); at != json.end())
      require<Unsupported>(at->is_null() || at->empty(), where, ": '", key, "' is not supported");
  PeftConfig c;
  const std::int64_t rank = json_member<std::int64_t>(json, "r", where).value_or(8);
  require<FormatError>(rank >= 1 && rank <= static_cast<std::int64_t>(detail::peft_max_rank), where, ": 'r' is ",
                       rank, ", expected 1 to ", detail::peft_max_rank);
  c.rank = static_cast<std::size_t>(rank);
  c.alpha = json_member<double>(json, "lora_alpha", where).value_or(8.0);
  c.dropout = json_member<double>(json, "lora_dropout", where).value_or(0.0);
  require<FormatError>(std::isfinite(c.alpha), where, ": 'lora_alpha' is no finite number");
  require<FormatError>(c.dropout >= 0.0 && c.dropout < 1.0, where, ": 'lora_dropout' is ", c.dropout,
                       ", expected 0 to below 1");
  c.rank_stabilized = json_member<bool>(json, "use_rslora", where).value_or(false);
  c.base_model = json_member<std::string>(json, "base_model_name_or_path", where).value_or("");
  c.task_type = json_member<std::string>(json, "task_type", where).value_or("");
  if (const auto at = json.find("target_modules"); at != json.end() && !at->is_null()) {
    require<FormatError>(at->is_array() || at->is_string(), where,
                         ": 'target_modules' is neither a list nor a string");
    if (at->is_string()) c.target_modules.push_back(at->get<std::string>());
    if (at->is_array())
      for (const nlohmann::json& name : *at) {
        require<FormatError>(name.is_string(), where, ": 'target_modules' holds what is no name");
        c.target_modules.push_back(name.get<std::string>());
      }
  }
  c.rank_pattern = detail::peft_pattern<std::size_t>(json, "rank_pattern", where);
  c.alpha_pattern = detail::peft_pattern<double>(json, "alpha_pattern", where);
  return c;
}

/// The same as JSON, with every field that PEFT's readers look for.
inline nlohmann::json to_json(const PeftConfig& c) {
  nlohmann::json ranks = nlohmann::json::object(), alphas = nlohmann::json::object();
  for (const auto& entry : c.rank_pattern) ranks[entry.first] = entry.second;
  for (const auto& entry : c.alpha_pattern) alphas[entry.first] = entry.second;
  // PEFT expects an integer where it is one.
  nlohmann::json alpha = c.alpha;
  if (c.alpha == std::floor(c.alpha) && std::fabs(c.alpha) < 1e15) alpha = static_cast<std::int64_t>(c.alpha);
  return {{"peft_type", "LORA"},
          {"task_type", c.task_type},
          {"base_model_name_or_path", c.base_model},
          {"r", c.rank},
          {"lora_alpha", alpha},
          {"lora_dropout", c.dropout},
          {"use_rslora", c.rank_stabilized},
          {"use_dora", false},
          {"target_modules", c.target_modules},
          {"rank_pattern", ranks},
          {"alpha_pattern", alphas},
          {"bias", "none"},
          {"fan_in_fan_out", false},
          {"modules_to_save", nullptr},
          {"layers_to_transform", nullptr},
          {"layers_pattern", nullptr},
          {"init_lora_weights", true},
          {"inference_mode", true},
          {"revision", nullptr},
          {"auto_mapping", nullptr}};
}

/// Reads an adapter. Throws IoError for files that cannot be read, FormatError for broken ones (a half of a pair, ranks that
/// contradict the configuration, values that are not finite), Unsupported as parse_peft_config(), and for tensors that are
/// neither lora_A nor lora_B of a module or not F32, F16 or BF16.
inline PeftAdapter read_peft_adapter(const std::string& folder) {
  using detail::printable;
  using detail::require;
  PeftAdapter adapter;
  adapter.config = parse_peft_config(detail::peft_json(folder + "/adapter_config.json"));
  const SafetensorsFile file = SafetensorsFile::open(folder + "/adapter_model.safetensors");
  const std::string where = "adapter_model.safetensors";
  for (const auto& entry : file.metadata()) adapter.metadata[entry.first] = entry.second;
  const auto read = [&](const SafetensorsTensor& t) {
    require<FormatError>(t.shape.size() == 2, where, ": '", printable(t.name), "' has ", t.shape.size(),
                         " dimensions, expected 2");
    RowMajorMatrix m(static_cast<Eigen::Index>(t.shape[0]), static_cast<Eigen::Index>(t.shape[1]));
    const auto count = static_cast<std::size_t>(m.size());
    if (t.type == SafetensorsType::f32) {
      detail::copy_bytes(m.data(), t.data.data(), t.data.size());
    } else {
      const bool half = t.type == SafetensorsType::f16;
      require<Unsupported>(half || t.type == SafetensorsType::bf16, where, ": '", printable(t.name), "' is ",
                           name_of(t.type), ", expected F32, F16 or BF16");
      const std::vector<std::uint16_t> bits = t.values<std::uint16_t>();
      for (std::size_t i = 0; i < count; ++i)
        m.data()[i] = half ? float_from_fp16(bits[i]) : float_from_bf16(bits[i]);
    }
    for (Eigen::Index i = 0; i < m.size(); ++i)
      require<FormatError>(std::isfinite(m.data()[i]), where, ": '", printable(t.name), "' is ", m.data()[i],
                           " at element ", i);
    return m;
  };
  const std::string prefix = "base_model.model.";
  std::map<std::string, std::pair<const SafetensorsTensor*, const SafetensorsTensor*>> pairs;
  for (const SafetensorsTensor& t : file.tensors()) {
    bool known = false;
    for (const bool first : {true, false}) {
      const std::string end = first ? ".lora_A.weight" : ".lora_B.weight";
      if (t.name.size() <= prefix.size() + end.size() || t.name.compare(0, prefix.size(), prefix) != 0 ||
          t.name.compare(t.name.size() - end.size(), end.size(), end) != 0)
        continue;
      auto& pair = pairs[t.name.substr(prefix.size(), t.name.size() - prefix.size() - end.size())];
      (first ? pair.first : pair.second) = &t;
      known = true;
    }
    require<Unsupported>(known, where, ": '", printable(t.name),
                         "' is no lora_A or lora_B of a module of base_model.model");
  }
  require<FormatError>(!pairs.empty(), where, " holds no module");
  for (const auto& entry : pairs) {
    const std::string& module = entry.first;
    require<FormatError>(entry.second.first != nullptr && entry.second.second != nullptr, where, ": '",
                         printable(module), "' has no ", entry.second.first == nullptr ? "lora_A" : "lora_B");
    LowRank l;
    l.a = read(*entry.second.first);
    l.b = read(*entry.second.second);
    l.scale = adapter.config.scale_of(module);
    const std::size_t rank = adapter.config.rank_of(module);
    require<FormatError>(
        static_cast<std::size_t>(l.a.rows()) == rank && static_cast<std::size_t>(l.b.cols()) == rank, where, ": '",
        printable(module), "' has lora_A of ", l.a.rows(), " rows and lora_B of ", l.b.cols(),
        " columns, expected the rank ", rank);
    adapter.modules.emplace(module, std::move(l));
  }
  return adapter;
}

/// Writes an adapter to `folder`, which is made; values in `format`: fp32, fp16 or bf16. Both files are complete on the disk
/// before either replaces what was there. Scales, ranks and alpha come from adapter.config: a module of another rank or
/// scale must be in its patterns. Throws InvalidArgument where they contradict each other or a value is not finite in
/// `format`, IoError where the system refuses.
inline void write_peft_adapter(const std::string& folder, const PeftAdapter& adapter,
                               Format format = Format::fp32) {
  using detail::require;
  require(!adapter.modules.empty(), "the adapter has no module");
  const SafetensorsType type = format == Format::fp16   ? SafetensorsType::f16
                               : format == Format::bf16 ? SafetensorsType::bf16
                                                        : SafetensorsType::f32;
  for (const auto& entry : adapter.modules) {
    const LowRank& l = entry.second;
    detail::check_low_rank(l, l.rows(), l.cols());
    const double scale = adapter.config.scale_of(entry.first);
    require(static_cast<std::size_t>(l.rank()) == adapter.config.rank_of(entry.first), "'", entry.first,
            "' has rank ", l.rank(), ", its configuration says ", adapter.config.rank_of(entry.first));
    require(std::fabs(l.scale - scale) <= 1e-12 * std::fabs(scale), "'", entry.first, "' has scale ", l.scale,
            ", its configuration says ", scale);
  }
  std::error_code failed;
  // A folder that was made and stays empty, for lack of space, goes again.
  struct Made {
    const std::string& folder;
    bool made = false;
    ~Made() {
      std::error_code not_empty;
      if (made) std::filesystem::remove(folder, not_empty);
    }
  } made{folder};
  made.made = std::filesystem::create_directories(folder, failed);
  if (failed) detail::raise<IoError>("cannot make the folder '" + folder + "': " + failed.message());
  SafetensorsWriter tensors(folder + "/adapter_model.safetensors");
  tensors.add_metadata("format", "pt");
  for (const auto& entry : adapter.metadata)
    if (entry.first != "format") tensors.add_metadata(entry.first, entry.second);
  const auto each = [&](auto&& f) {
    for (const auto& entry : adapter.modules) {
      f("base_model.model." + entry.first + ".lora_A.weight", entry.second.a);
      f("base_model.model." + entry.first + ".lora_B.weight", entry.second.b);
    }
  };
  each([&](const std::string& name, const RowMajorMatrix& m) {
    tensors.declare(name, type, {static_cast<std::size_t>(m.rows()), static_cast<std::size_t>(m.cols())});
  });
  LowRank room;
  each([&](const std::string& name, const RowMajorMatrix& m) {
    room.a = m;
    round_low_rank(room, format);
    const auto count = static_cast<std::size_t>(m.size());
    if (format == Format::fp32) {
      tensors.write(name, room.a.data(), count * sizeof(float));
      return;
    }
    std::vector<std::uint16_t> bits(count);
    for (std::size_t i = 0; i < count; ++i)
      bits[i] = format == Format::fp16 ? fp16_from_float(room.a.data()[i]) : bf16_from_float(room.a.data()[i]);
    tensors.write(name, bits.data(), count * 2);
  });
  AtomicFile config(folder + "/adapter_config.json");
  config.write(to_json(adapter.config).dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  tensors.commit();
  config.commit();
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
