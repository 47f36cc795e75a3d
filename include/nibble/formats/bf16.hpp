// BF16: the upper half of a binary32, 1 sign, 8 exponent and 7 fraction bits.
#pragma once

#include <cstdint>

#include "nibble/formats/float_bits.hpp"
#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Format tag. One value is the 16 bits of a bfloat16.
struct Bf16 {
  static constexpr Format format = Format::bf16;
  static constexpr float max_value = 3.38953139e38F;
};

/// Nearest bfloat16, ties to even. Subnormals are kept; what lies halfway to 2^128 or above becomes Inf; a NaN stays
/// a NaN (quiet, sign and upper payload bits kept). Integer code: MXCSR plays no part.
inline std::uint16_t bf16_from_float(float x) noexcept {
  const std::uint32_t bits = detail::bits_from_float(x);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<std::uint16_t>(bits >> 16 | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

/// As bf16_from_float, in one rounding: the detour over float loses nothing.
inline std::uint16_t bf16_from_double(double x) noexcept {
  return bf16_from_float(detail::float_from_double_to_odd(x));
}

/// The value of a bfloat16: exact.
inline float float_from_bf16(std::uint16_t code) noexcept {
  return detail::float_from_bits(static_cast<std::uint32_t>(code) << 16);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
