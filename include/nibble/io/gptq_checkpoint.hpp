// GPTQ checkpoints (AutoGPTQ, GPTQModel): quantized linear layers in safetensors files, read and written bit by bit.
//
// A layer of K inputs and N outputs in b bits is stored as the tensors
//
//   <name>.qweight  I32 [K * b / 32, N]   a column's codes are one stream of bits along K, lowest bits first
//   <name>.qzeros   I32 [groups, N * b / 32]  the same along N: zero points (v2), or zero points - 1 (v1)
//   <name>.scales   F16 [groups, N]
//   <name>.g_idx    I32 [K]               the group of each input
//
// and means weight(n, k) = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n]), zero = (stored + 1) mod 2^b in v1.
//
// This header needs nlohmann/json and is not a part of <nibble/nibble.hpp>.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/io/checkpoint_linear.hpp"
#include "nibble/io/safetensors.hpp"
#include "nibble/quantize/quantized_tensor.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// How zero points are stored.
enum class GptqVersion : std::uint8_t {
  v1 = 1,  ///< minus one, wrapping: 0 is stored as 2^bits - 1
  v2 = 2,  ///< as they are
};

/// What a checkpoint says of itself.
struct GptqConfig {
  unsigned bits = 4;
  std::size_t group_size = 128;        ///< 0: one group, all inputs
  std::optional<bool> symmetric;       ///< "sym"
  bool act_order = false;              ///< "desc_act"
  std::optional<GptqVersion> version;  ///< "checkpoint_format", where there is one
};

namespace detail {

/// A member that may be missing or null. Throws FormatError for one of another type.
template <class T>
std::optional<T> json_member(const nlohmann::json& json, const char* key, const std::string& where) {
  const auto at = json.find(key);
  if (at == json.end() || at->is_null()) return {};
  bool fits = false;
  if constexpr (std::is_same_v<T, bool>)
    fits = at->is_boolean();
  else if constexpr (std::is_same_v<T, std::string>)
    fits = at->is_string();
  else if constexpr (std::is_floating_point_v<T>)
    fits = at->is_number();
  else
    fits = at->is_number_integer() && (!at->is_number_unsigned() || at->get<std::uint64_t>() <= INT64_MAX);
  require<FormatError>(fits, where, ": '", key, "' is ",
                       printable(at->dump(-1, ' ', true, nlohmann::json::error_handler_t::replace)),
                       ", which is not of the expected type");
  if constexpr (std::is_same_v<T, bool> || std::is_same_v<T, std::string> || std::is_floating_point_v<T>)
    return at->get<T>();
  else
    return static_cast<T>(at->get<std::int64_t>());
}

/// "group_size": -1 stands for all inputs.
inline std::size_t json_group_size(const nlohmann::json& json, std::int64_t normal, const std::string& where) {
  const std::int64_t group = json_member<std::int64_t>(json, "group_size", where).value_or(normal);
  require<FormatError>(group == -1 || (group > 0 && group < (std::int64_t{1} << 31)), where, ": 'group_size' is ",
                       group, ", expected -1 or a positive number");
  return group == -1 ? 0 : static_cast<std::size_t>(group);
}

}  // namespace detail

/// Reads quantize_config.json, or the quantization_config of a config.json. Throws FormatError; Unsupported for what
/// would make another checkpoint of it than the one described above.
inline GptqConfig parse_gptq_config(const nlohmann::json& json, const std::string& where = "quantization config") {
  using detail::json_member;
  const auto refuse = [&](const std::string& what) { detail::raise<Unsupported>(where + ": " + what); };
  detail::require<FormatError>(json.is_object(), where, " is no JSON object");
  const std::string method = json_member<std::string>(json, "quant_method", where).value_or("gptq");
  if (method != "gptq") refuse("quant_method '" + detail::printable(method) + "' is not gptq");
  GptqConfig config;
  const std::int64_t bits = json_member<std::int64_t>(json, "bits", where).value_or(0);
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8)
    refuse(detail::concat("'bits' is ", bits, ", expected 2, 3, 4 or 8"));
  config.bits = static_cast<unsigned>(bits);
  config.group_size = detail::json_group_size(json, 128, where);
  config.symmetric = json_member<bool>(json, "sym", where);
  config.act_order = json_member<bool>(json, "desc_act", where).value_or(false);
  const std::string format = json_member<std::string>(json, "checkpoint_format", where)
                                 .value_or(json_member<std::string>(json, "format", where).value_or(""));
  if (format == "gptq")
    config.version = GptqVersion::v1;
  else if (format == "gptq_v2")
    config.version = GptqVersion::v2;
  else if (!format.empty())
    refuse("checkpoint_format '" + detail::printable(format) + "' is not supported (gptq and gptq_v2 are)");
  const auto dynamic = json.find("dynamic");
  if (dynamic != json.end() && !dynamic->is_null() && !dynamic->empty())
    refuse("'dynamic' (other formats for some layers) is not supported");
  const std::string words = json_member<std::string>(json, "pack_dtype", where).value_or("int32");
  if (words != "int32") refuse("pack_dtype '" + detail::printable(words) + "' is not int32");
  return config;
}

/// The same as JSON: the content of quantize_config.json.
inline nlohmann::json to_json(const GptqConfig& config) {
  nlohmann::json json = {
      {"quant_method", "gptq"},
      {"bits", config.bits},
      {"group_size", config.group_size == 0 ? std::int64_t{-1} : static_cast<std::int64_t>(config.group_size)},
      {"desc_act", config.act_order},
      {"sym", config.symmetric.value_or(false)}};
  if (config.version) json["checkpoint_format"] = *config.version == GptqVersion::v1 ? "gptq" : "gptq_v2";
  return json;
}

/// Finds out how the zero points of a checkpoint are stored, from what its config says and what the tensors
/// <name>.qzeros of `layers` hold. A symmetric checkpoint's zero points are all 2^(bits-1): stored as that they are v2,
/// stored as one less v1, whatever the config calls them (there are files called "gptq" with zero points of v2). Others
/// are what their checkpoint_format says. Throws FormatError where both leave it open.
template <class Source>
GptqVersion find_gptq_version(const Source& source, const std::vector<std::string>& layers,
                              const GptqConfig& config) {
  const unsigned middle = 1U << (config.bits - 1);
  if (config.symmetric.value_or(true)) {
    bool all_v1 = !layers.empty(), all_v2 = all_v1;
    for (const std::string& layer : layers) {
      const SafetensorsTensor& zeros = detail::checkpoint_matrix(source, layer + ".qzeros", SafetensorsType::i32);
      const std::size_t row = zeros.shape[1] * 32 / config.bits;
      for (std::size_t g = 0; g < zeros.shape[0] && (all_v1 || all_v2); ++g)
        for (std::size_t n = 0; n < row; ++n) {
          const unsigned stored =
              detail::code_of_words(zeros.data.data() + g * zeros.shape[1] * 4, 1, config.bits, n);
          all_v1 = all_v1 && stored == middle - 1;
          all_v2 = all_v2 && stored == middle;
        }
    }
    if (all_v1 != all_v2) return all_v1 ? GptqVersion::v1 : GptqVersion::v2;
  }
  detail::require<FormatError>(config.version.has_value(),
                               "the checkpoint's zero points may be those of version 1 (stored minus one) or of "
                               "version 2: its config has no checkpoint_format, and its values fit both; say "
                               "\"checkpoint_format\": \"gptq\" or \"gptq_v2\" in quantize_config.json");
  return *config.version;
}

/// Reads a layer. Source: a SafetensorsFile or a SafetensorsFolder. The codes, zero points and scales are those of the
/// file; groups whose inputs do not follow each other are regrouped (CheckpointLinear::input_order). Zero points that are
/// all in the middle make it symmetric. Throws FormatError for tensors that are missing, have other shapes or types than
/// above, or hold a group that there is not or a scale that is not finite; Unsupported for groups of different sizes or
/// of no multiple of 16 inputs.
template <class Source>
CheckpointLinear read_gptq(const Source& source, const std::string& name, const GptqConfig& config,
                           GptqVersion version) {
  using detail::require;
  const unsigned bits = config.bits;
  const Format format = detail::checkpoint_format(bits, name);
  const SafetensorsTensor& words = detail::checkpoint_matrix(source, name + ".qweight", SafetensorsType::i32);
  const SafetensorsTensor& zeros = detail::checkpoint_matrix(source, name + ".qzeros", SafetensorsType::i32);
  ScaleType scale_type = ScaleType::fp16;
  const SafetensorsTensor& scales = detail::checkpoint_scales(source, name + ".scales", scale_type);
  const std::size_t rows = words.shape[1], cols = words.shape[0] * 32 / bits;
  require<FormatError>(words.shape[0] * 32 % bits == 0 && rows * bits % 32 == 0, "tensor '",
                       detail::printable(words.name), "' of shape ", detail::shape_text(words.shape),
                       " holds no whole number of codes of ", bits,
                       " bits, or as many outputs as zero points do not");
  const std::size_t group = config.group_size == 0 ? cols : std::min(config.group_size, cols);
  const std::size_t groups = detail::ceil_div(cols, group);
  require<Unsupported>(groups == 1 || group % 16 == 0, "'", detail::printable(name), "' has groups of ", group,
                       " inputs, expected a multiple of 16");
  detail::require_shape(zeros, {groups, rows * bits / 32});
  detail::require_shape(scales, {groups, rows});
  CheckpointLinear linear;
  if (const SafetensorsTensor* index = source.find_tensor(name + ".g_idx")) {
    require<FormatError>(index->type == SafetensorsType::i32, "tensor '", detail::printable(index->name), "' is ",
                         nibble::name_of(index->type), ", expected I32");
    detail::require_shape(*index, {cols});
    linear.input_order =
        detail::order_of_groups(index->template values<std::int32_t>(), group, groups, index->name);
  }
  const std::uint8_t* const word_bytes = words.data.data();
  const std::uint8_t* const zero_bytes = zeros.data.data();
  const unsigned mask = (1U << bits) - 1U, add = version == GptqVersion::v1 ? 1U : 0U;
  const auto code = [&](std::size_t k, std::size_t n) {
    const std::size_t input = linear.input_order.empty() ? k : static_cast<std::size_t>(linear.input_order[k]);
    return detail::code_of_words(word_bytes + n * 4, rows, bits, input);
  };
  const auto zero = [&](std::size_t g, std::size_t n) {
    return (detail::code_of_words(zero_bytes + g * zeros.shape[1] * 4, 1, bits, n) + add) & mask;
  };
  linear.weight = detail::assemble_linear(format, bits, rows, cols, group, scale_type, scales, code, zero);
  return linear;
}

/// A layer as a checkpoint's tensors <name>.qweight, .qzeros, .scales and .g_idx; read back they give the same layer, and
/// a layer that was read gives the bytes that it was read from. `weight`: integers in groups along the rows or with a
/// scale a row, symmetric or with integer zero points; inputs and outputs a multiple of 32 / bits (of 32 in 3 bits).
/// Throws Unsupported for another one, InvalidArgument for an input_order that is no permutation.
inline std::vector<SafetensorsTensor> to_gptq(const std::string& name, const CheckpointLinear& linear,
                                              GptqVersion version) {
  const detail::LinearParts parts(linear.weight, name);
  const unsigned bits = parts.bits;
  detail::checkpoint_format(bits, name);
  detail::require<Unsupported>(parts.cols * bits % 32 == 0 && parts.rows * bits % 32 == 0, "'",
                               detail::printable(name), "' is ", parts.rows, " x ", parts.cols, ": codes of ",
                               bits, " bits do not fill whole words");
  const std::vector<std::int32_t>& order = linear.input_order;
  std::vector<std::int32_t> group_of(parts.cols, -1);
  detail::require(order.empty() || order.size() == parts.cols, "to_gptq: input_order has ", order.size(),
                  " elements, expected ", parts.cols);
  const auto input_of = [&](std::size_t k) {
    const std::size_t input = order.empty() ? k : static_cast<std::size_t>(order[k]);
    detail::require(order.empty() || (order[k] >= 0 && input < parts.cols), "to_gptq: input_order has ",
                    order.empty() ? 0 : order[k], " at ", k, " of ", parts.cols);
    return input;
  };
  for (std::size_t k = 0; k < parts.cols; ++k) {
    std::int32_t& g = group_of[input_of(k)];
    detail::require(g == -1, "to_gptq: input_order names an input twice, at ", k);
    g = static_cast<std::int32_t>(k / parts.group);
  }
  SafetensorsTensor words = detail::word_matrix(name + ".qweight", parts.cols * bits / 32, parts.rows);
  SafetensorsTensor zeros = detail::word_matrix(name + ".qzeros", parts.groups, parts.rows * bits / 32);
  for (std::size_t begin = 0; begin < parts.rows; begin += 16)
    for (std::size_t k = 0; k < parts.cols; ++k)
      for (std::size_t n = begin; n < std::min(parts.rows, begin + 16); ++n)
        detail::put_code(words.data.mutable_data() + n * 4, parts.rows, bits, input_of(k), parts.code(n, k));
  const unsigned mask = (1U << bits) - 1U, less = version == GptqVersion::v1 ? 1U : 0U;
  for (std::size_t g = 0; g < parts.groups; ++g)
    for (std::size_t n = 0; n < parts.rows; ++n)
      detail::put_code(zeros.data.mutable_data() + g * zeros.shape[1] * 4, 1, bits, n,
                       (parts.zero(n, g) - less) & mask);
  SafetensorsTensor index{name + ".g_idx", SafetensorsType::i32, {parts.cols}, Buffer(parts.cols * 4)};
  detail::copy_bytes(index.data.mutable_data(), group_of.data(), parts.cols * 4);
  return {std::move(words), std::move(zeros), parts.scales(name + ".scales"), std::move(index)};
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
