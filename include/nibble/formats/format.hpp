// The formats that a number can be stored in, as a run-time value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "nibble/core/error.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// How one weight is stored. The integer formats and NF4 carry scales beside their codes; the floats do not.
enum class Format : std::uint8_t {
  fp32 = 0,
  fp16 = 1,
  bf16 = 2,
  int8 = 3,  ///< codes -128..127 (symmetric: -127..127)
  int4 = 4,  ///< codes 0..15; symmetric is stored around an implied zero point of 8
  nf4 = 5,   ///< index into the 16 NormalFloat levels
};

/// True for the formats whose values need a scale.
constexpr bool has_scales(Format f) noexcept { return f == Format::int8 || f == Format::int4 || f == Format::nf4; }
/// True for the formats whose codes are integers on an even grid.
constexpr bool is_integer(Format f) noexcept { return f == Format::int8 || f == Format::int4; }
/// Bits of one code.
constexpr unsigned bits_of(Format f) noexcept {
  switch (f) {
    case Format::fp32: return 32;
    case Format::fp16:
    case Format::bf16: return 16;
    case Format::int8: return 8;
    case Format::int4:
    case Format::nf4: return 4;
  }
  return 0;
}

constexpr std::string_view name_of(Format f) noexcept {
  switch (f) {
    case Format::fp32: return "fp32";
    case Format::fp16: return "fp16";
    case Format::bf16: return "bf16";
    case Format::int8: return "int8";
    case Format::int4: return "int4";
    case Format::nf4: return "nf4";
  }
  return "?";
}

/// The inverse of name_of. Throws InvalidArgument for a name that is none.
inline Format format_from_name(std::string_view name) {
  for (Format f : {Format::fp32, Format::fp16, Format::bf16, Format::int8, Format::int4, Format::nf4})
    if (name == name_of(f)) return f;
  detail::raise<InvalidArgument>(
      detail::concat("unknown format '", name, "', expected fp32, fp16, bf16, int8, int4 or nf4"));
}

/// How scales (and float offsets) are stored. They are fp32 in every computation.
enum class ScaleType : std::uint8_t { fp32 = 0, fp16 = 1, bf16 = 2 };

constexpr std::size_t bytes_of(ScaleType t) noexcept { return t == ScaleType::fp32 ? 4 : 2; }
constexpr std::string_view name_of(ScaleType t) noexcept {
  return t == ScaleType::fp32 ? "fp32" : t == ScaleType::fp16 ? "fp16" : "bf16";
}

/// Where zero lies on the grid.
enum class Symmetry : std::uint8_t {
  symmetric = 0,     ///< real = scale * q (int4: scale * (q - 8); nf4: scale * level[q])
  asymmetric = 1,    ///< real = scale * (q - zero_point), integer zero point
  float_offset = 2,  ///< real = fma(scale, q, offset), as GGUF's Q4_1
};

constexpr std::string_view name_of(Symmetry s) noexcept {
  return s == Symmetry::symmetric ? "symmetric" : s == Symmetry::asymmetric ? "asymmetric" : "float_offset";
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
