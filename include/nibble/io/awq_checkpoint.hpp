// AWQ checkpoints (AutoAWQ, "gemm" layout): quantized linear layers in safetensors files, read and written bit by bit.
//
// A layer of K inputs and N outputs in 4 bits is stored as the tensors
//
//   <name>.qweight  I32 [K, N / 8]       bits 4i .. 4i + 3 of word c: output 8c + {0, 2, 4, 6, 1, 3, 5, 7}[i]
//   <name>.qzeros   I32 [groups, N / 8]  alike
//   <name>.scales   F16 [groups, N]
//
// and means weight(n, k) = scales[k / group, n] * (code[k, n] - zero[k / group, n]).
//
// This header needs nlohmann/json and is not a part of <nibble/nibble.hpp>.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "nibble/io/checkpoint_linear.hpp"
#include "nibble/io/gptq_checkpoint.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// What a checkpoint says of itself.
struct AwqConfig {
  std::size_t group_size = 128;  ///< 0: one group, all inputs
  bool zero_point = true;        ///< false: symmetric (tools that read it may not look at qzeros)
  /// Layers whose name contains one of these are not quantized.
  std::vector<std::string> not_converted;
};

/// Reads the quantization_config of a config.json, or a quant_config.json. Throws FormatError; Unsupported for other
/// bits than 4 and other layouts than gemm.
inline AwqConfig parse_awq_config(const nlohmann::json& json, const std::string& where = "quantization config") {
  using detail::json_member;
  const auto refuse = [&](const std::string& what) { detail::raise<Unsupported>(where + ": " + what); };
  detail::require<FormatError>(json.is_object(), where, " is no JSON object");
  const std::string method = json_member<std::string>(json, "quant_method", where).value_or("awq");
  if (method != "awq") refuse("quant_method '" + detail::printable(method) + "' is not awq");
  // AutoAWQ writes "bits" into config.json and "w_bit", "q_group_size" into quant_config.json.
  const auto bits = json_member<std::int64_t>(json, json.contains("bits") ? "bits" : "w_bit", where).value_or(4);
  if (bits != 4) refuse(detail::concat("'bits' is ", bits, ", expected 4"));
  std::string layout = json_member<std::string>(json, "version", where).value_or("gemm");
  for (char& c : layout) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (layout != "gemm") refuse("the layout '" + detail::printable(layout) + "' is not supported (gemm is)");
  AwqConfig config;
  nlohmann::json group = nlohmann::json::object();
  const char* const key = json.contains("group_size") ? "group_size" : "q_group_size";
  if (json.contains(key)) group["group_size"] = json.at(key);
  config.group_size = detail::json_group_size(group, 128, where);
  config.zero_point = json_member<bool>(json, "zero_point", where).value_or(true);
  const auto skipped = json.find("modules_to_not_convert");
  if (skipped != json.end() && !skipped->is_null()) {
    detail::require<FormatError>(skipped->is_array(), where, ": 'modules_to_not_convert' is no array");
    for (const nlohmann::json& name : *skipped) {
      detail::require<FormatError>(name.is_string(), where, ": 'modules_to_not_convert' holds what is no name");
      config.not_converted.push_back(name.get<std::string>());
    }
  }
  return config;
}

/// The same as JSON, for a config.json.
inline nlohmann::json to_json(const AwqConfig& config) {
  nlohmann::json json = {
      {"quant_method", "awq"},
      {"bits", 4},
      {"group_size", config.group_size == 0 ? std::int64_t{-1} : static_cast<std::int64_t>(config.group_size)},
      {"zero_point", config.zero_point},
      {"version", "gemm"},
      {"modules_to_not_convert", nullptr}};
  if (!config.not_converted.empty()) json["modules_to_not_convert"] = config.not_converted;
  return json;
}

namespace detail {

/// In which nibble of its word an output's code lies: the reverse of {0, 2, 4, 6, 1, 3, 5, 7}.
inline constexpr unsigned awq_nibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

inline unsigned awq_code(const std::uint8_t* words, std::size_t n) noexcept {
  return load_unaligned<std::uint32_t>(words + n / 8 * 4) >> (awq_nibble[n % 8] * 4) & 15U;
}
inline void put_awq_code(std::uint8_t* words, std::size_t n, unsigned code) noexcept {
  std::uint8_t* p = words + n / 8 * 4;
  store_unaligned(p, load_unaligned<std::uint32_t>(p) | code << (awq_nibble[n % 8] * 4));
}

}  // namespace detail

/// Reads a layer. Source: a SafetensorsFile or a SafetensorsFolder. Codes, zero points and scales are those of the file;
/// zero points that are all 8 make it symmetric. Throws FormatError for tensors that are missing, have other shapes or
/// types than above, or hold a scale that is not finite; Unsupported for groups of no multiple of 16 inputs.
template <class Source>
CheckpointLinear read_awq(const Source& source, const std::string& name, const AwqConfig& config) {
  const SafetensorsTensor& words = detail::checkpoint_matrix(source, name + ".qweight", SafetensorsType::i32);
  const SafetensorsTensor& zeros = detail::checkpoint_matrix(source, name + ".qzeros", SafetensorsType::i32);
  ScaleType scale_type = ScaleType::fp16;
  const SafetensorsTensor& scales = detail::checkpoint_scales(source, name + ".scales", scale_type);
  const std::size_t cols = words.shape[0], row_bytes = words.shape[1] * 4, rows = words.shape[1] * 8;
  const std::size_t group = config.group_size == 0 ? cols : std::min(config.group_size, cols);
  const std::size_t groups = detail::ceil_div(cols, group);
  detail::require<Unsupported>(groups == 1 || group % 16 == 0, "'", detail::printable(name), "' has groups of ",
                               group, " inputs, expected a multiple of 16");
  detail::require_shape(zeros, {groups, words.shape[1]});
  detail::require_shape(scales, {groups, rows});
  const std::uint8_t* const word_bytes = words.data.data();
  const std::uint8_t* const zero_bytes = zeros.data.data();
  CheckpointLinear linear;
  linear.weight = detail::assemble_linear(
      Format::int4, 4, rows, cols, group, scale_type, scales,
      [&](std::size_t k, std::size_t n) { return detail::awq_code(word_bytes + k * row_bytes, n); },
      [&](std::size_t g, std::size_t n) { return detail::awq_code(zero_bytes + g * row_bytes, n); });
  return linear;
}

/// A layer as a checkpoint's tensors <name>.qweight, .qzeros and .scales; read back they give the same layer, and a
/// layer that was read gives the bytes that it was read from. `weight`: int4 in groups along the rows or with a scale a
/// row, symmetric or with integer zero points, a multiple of 8 outputs, inputs as they come. Throws Unsupported for
/// another one.
inline std::vector<SafetensorsTensor> to_awq(const std::string& name, const CheckpointLinear& linear) {
  const detail::LinearParts parts(linear.weight, name);
  detail::require<Unsupported>(parts.bits == 4 && linear.input_order.empty() && parts.rows % 8 == 0, "'",
                               detail::printable(name), "' has ", parts.bits, " bits and ", parts.rows, " outputs",
                               linear.input_order.empty() ? "" : ", its inputs in another order",
                               "; AWQ has 4 bits, a multiple of 8 outputs, and inputs as they come");
  SafetensorsTensor words = detail::word_matrix(name + ".qweight", parts.cols, parts.rows / 8);
  SafetensorsTensor zeros = detail::word_matrix(name + ".qzeros", parts.groups, parts.rows / 8);
  const std::size_t row_bytes = parts.rows / 2;
  for (std::size_t begin = 0; begin < parts.rows; begin += 16)
    for (std::size_t k = 0; k < parts.cols; ++k)
      for (std::size_t n = begin; n < std::min(parts.rows, begin + 16); ++n)
        detail::put_awq_code(words.data.mutable_data() + k * row_bytes, n, parts.code(n, k));
  for (std::size_t g = 0; g < parts.groups; ++g)
    for (std::size_t n = 0; n < parts.rows; ++n)
      detail::put_awq_code(zeros.data.mutable_data() + g * row_bytes, n, parts.zero(n, g));
  return {std::move(words), std::move(zeros), parts.scales(name + ".scales")};
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
