// Weight formats by name: int8, int4-g32, int4-g128-sym, nf4, fp16 ...
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "nibble/core/error.hpp"
#include "nibble/quantize/scheme.hpp"

namespace llm {

/// What a user asks for; what was left open has the format's default.
struct FormatSpec {
  nibble::Format format = nibble::Format::fp32;
  std::optional<std::size_t> group;  // inputs that share a scale; 0: one scale a row
  std::optional<nibble::Symmetry> symmetry;
  std::optional<nibble::ScaleType> scales;
};

inline const char* format_spec_help() {
  return "fp32, fp16, bf16, int8, int6, int5, int4, int3, int2, nf4 or fp4, with any of -gN (groups of N inputs, "
         "a multiple of 16), -row (a "
         "scale a "
         "row), -sym, -asym (integer zero point), -offset (float offset, as GGUF's Q4_1), -s32, -s16, -sbf16 "
         "(type of "
         "the scales). int8 means int8-row-sym, int6 and below mean -g64-asym, nf4 and fp4 -g64";
}

/// Reads "int4-g128-sym". Throws InvalidArgument for what is no format.
inline FormatSpec parse_format(std::string_view text) {
  using nibble::detail::require;
  const auto bad = [&](std::string_view why) {
    nibble::detail::raise<nibble::InvalidArgument>(
        nibble::detail::concat("format '", text, "': ", why, "; expected ", format_spec_help()));
  };
  FormatSpec spec;
  std::size_t begin = 0;
  for (bool first = true; begin <= text.size(); first = false) {
    const std::size_t end = std::min(text.find('-', begin), text.size());
    const std::string_view word = text.substr(begin, end - begin);
    begin = end + 1;
    if (first) {
      spec.format = nibble::format_from_name(word);
    } else if (word == "sym") {
      spec.symmetry = nibble::Symmetry::symmetric;
    } else if (word == "asym") {
      spec.symmetry = nibble::Symmetry::asymmetric;
    } else if (word == "offset") {
      spec.symmetry = nibble::Symmetry::float_offset;
    } else if (word == "row") {
      spec.group = 0;
    } else if (word == "s32") {
      spec.scales = nibble::ScaleType::fp32;
    } else if (word == "s16") {
      spec.scales = nibble::ScaleType::fp16;
    } else if (word == "sbf16") {
      spec.scales = nibble::ScaleType::bf16;
    } else if (word.size() >= 2 && word.size() <= 7 && word[0] == 'g' &&
               word.find_first_not_of("0123456789", 1) == std::string_view::npos) {
      std::size_t group = 0;
      for (const char c : word.substr(1)) group = group * 10 + static_cast<std::size_t>(c - '0');
      spec.group = group;
    } else {
      bad("'" + std::string(word) + "' is not known");
    }
  }
  if (spec.group && *spec.group % 16 != 0) bad("the group is no multiple of 16");
  if (!nibble::has_scales(spec.format) && (spec.group || spec.symmetry || spec.scales))
    bad("floats have no groups");
  if (nibble::is_codebook(spec.format) && spec.symmetry && *spec.symmetry != nibble::Symmetry::symmetric)
    bad(nibble::detail::concat(nibble::name_of(spec.format), " is symmetric"));
  return spec;
}

/// The library's scheme. Scales are fp16 where many share the memory (a group each), fp32 where there is one a row;
/// GGUF has fp16 only.
inline nibble::Scheme scheme_of(const FormatSpec& spec, bool for_gguf = false) {
  nibble::Scheme scheme;
  scheme.format = spec.format;
  if (!nibble::has_scales(spec.format)) return scheme;
  const bool int8 = spec.format == nibble::Format::int8;
  const std::size_t group = spec.group.value_or(int8 ? 0 : 64);
  scheme.granularity = group == 0 ? nibble::Granularity::per_channel(0) : nibble::Granularity::per_group(group, 1);
  scheme.symmetry = spec.symmetry.value_or(nibble::is_integer(spec.format) && !int8 ? nibble::Symmetry::asymmetric
                                                                                    : nibble::Symmetry::symmetric);
  scheme.scale_type =
      spec.scales.value_or(group == 0 && !for_gguf ? nibble::ScaleType::fp32 : nibble::ScaleType::fp16);
  return scheme;
}

/// "int4-g64-asym-s16": the scheme in parse_format's words.
inline std::string name_of(const nibble::Scheme& scheme) {
  std::string name(nibble::name_of(scheme.format));
  if (!nibble::has_scales(scheme.format)) return name;
  switch (scheme.granularity.kind) {
    case nibble::Granularity::Kind::per_tensor: name += "-tensor"; break;
    case nibble::Granularity::Kind::per_channel: name += "-row"; break;
    case nibble::Granularity::Kind::per_group: name += "-g" + std::to_string(scheme.granularity.group_size); break;
  }
  if (nibble::is_integer(scheme.format))
    name += scheme.symmetry == nibble::Symmetry::symmetric    ? "-sym"
            : scheme.symmetry == nibble::Symmetry::asymmetric ? "-asym"
                                                              : "-offset";
  return name + (scheme.scale_type == nibble::ScaleType::fp32   ? "-s32"
                 : scheme.scale_type == nibble::ScaleType::fp16 ? "-s16"
                                                                : "-sbf16");
}

}  // namespace llm
