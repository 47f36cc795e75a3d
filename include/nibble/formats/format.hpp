// The formats that a number can be stored in, as a run-time value.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "nibble/core/error.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// How one weight is stored. The integer formats and the codebooks (NF4, FP4) carry scales beside their codes; the floats
/// do not. The numbers are in files: new formats go to the end.
enum class Format : std::uint8_t {
  fp32 = 0,
  fp16 = 1,
  bf16 = 2,
  int8 = 3,  ///< codes -128..127 (symmetric: -127..127)
  int4 = 4,  ///< codes 0..15; symmetric is stored around an implied zero point of 8
  nf4 = 5,   ///< index into the 16 NormalFloat levels
  int2 = 6,  ///< codes 0..3; symmetric around 2
  int3 = 7,  ///< codes 0..7; symmetric around 4
  int5 = 8,  ///< codes 0..31; symmetric around 16
  int6 = 9,  ///< codes 0..63; symmetric around 32
  fp4 = 10,  ///< index into the 16 levels of bitsandbytes' FP4, ascending
};

/// All of them, in the order of their numbers.
inline constexpr std::array<Format, 11> all_formats = {Format::fp32, Format::fp16, Format::bf16, Format::int8,
                                                       Format::int4, Format::nf4,  Format::int2, Format::int3,
                                                       Format::int5, Format::int6, Format::fp4};

/// Bits of one code.
constexpr unsigned bits_of(Format f) noexcept {
  switch (f) {
    case Format::fp32: return 32;
    case Format::fp16:
    case Format::bf16: return 16;
    case Format::int8: return 8;
    case Format::int6: return 6;
    case Format::int5: return 5;
    case Format::int4:
    case Format::nf4:
    case Format::fp4: return 4;
    case Format::int3: return 3;
    case Format::int2: return 2;
  }
  return 0;
}
/// True for the formats whose codes are indices of levels between -1 and 1.
constexpr bool is_codebook(Format f) noexcept { return f == Format::nf4 || f == Format::fp4; }
/// True for the formats whose values need a scale: all of at most 8 bits.
constexpr bool has_scales(Format f) noexcept { return bits_of(f) <= 8; }
/// True for the formats whose codes are integers on an even grid.
constexpr bool is_integer(Format f) noexcept { return has_scales(f) && !is_codebook(f); }
/// True for int2, int3, int5 and int6, whose codes fill neither a byte nor half of one.
constexpr bool is_bit_stream(Format f) noexcept { return is_integer(f) && bits_of(f) != 8 && bits_of(f) != 4; }
/// The code that stands for 0 where an integer format is symmetric: int8 0, the others half of their codes' number. 0
/// for all else.
constexpr int symmetric_zero_of(Format f) noexcept {
  return is_integer(f) && f != Format::int8 ? 1 << (bits_of(f) - 1) : 0;
}

constexpr std::string_view name_of(Format f) noexcept {
  switch (f) {
    case Format::fp32: return "fp32";
    case Format::fp16: return "fp16";
    case Format::bf16: return "bf16";
    case Format::int8: return "int8";
    case Format::int6: return "int6";
    case Format::int5: return "int5";
    case Format::int4: return "int4";
    case Format::int3: return "int3";
    case Format::int2: return "int2";
    case Format::nf4: return "nf4";
    case Format::fp4: return "fp4";
  }
  return "?";
}

/// The inverse of name_of. Throws InvalidArgument for a name that is none.
inline Format format_from_name(std::string_view name) {
  std::string names;
  for (const Format f : all_formats) {
    if (name == name_of(f)) return f;
    names += (f == all_formats.front() ? "" : f == all_formats.back() ? " or " : ", ") + std::string(name_of(f));
  }
  detail::raise<InvalidArgument>(detail::concat("unknown format '", name, "', expected ", names));
}

/// How scales (and float offsets) are stored. They are fp32 in every computation.
enum class ScaleType : std::uint8_t { fp32 = 0, fp16 = 1, bf16 = 2 };

constexpr std::size_t bytes_of(ScaleType t) noexcept { return t == ScaleType::fp32 ? 4 : 2; }
constexpr std::string_view name_of(ScaleType t) noexcept {
  return t == ScaleType::fp32 ? "fp32" : t == ScaleType::fp16 ? "fp16" : "bf16";
}

/// Where zero lies on the grid.
enum class Symmetry : std::uint8_t {
  symmetric = 0,     ///< real = scale * (q - symmetric_zero_of(format)); nf4, fp4: scale * level[q]
  asymmetric = 1,    ///< real = scale * (q - zero_point), integer zero point
  float_offset = 2,  ///< real = fma(scale, q, offset), as GGUF's Q4_1
};

constexpr std::string_view name_of(Symmetry s) noexcept {
  return s == Symmetry::symmetric ? "symmetric" : s == Symmetry::asymmetric ? "asymmetric" : "float_offset";
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
