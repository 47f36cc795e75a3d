// Bits of floats, and the one rounding that makes double -> 16 bits exact.
#pragma once

#include <cstdint>
#include <cstring>

#include "nibble/core/abi.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

inline std::uint32_t bits_from_float(float x) noexcept {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_from_bits(std::uint32_t bits) noexcept {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

/// Truncates a double to float and, where anything was lost, sets the last bit ("round to odd"). Rounding the
/// result to nearest in a format of at most 22 significant bits gives what rounding the double itself would: the
/// odd last bit remembers on which side of every midpoint the value lay. Finite values never become Inf.
inline float float_from_double_to_odd(double x) noexcept {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const auto sign = static_cast<std::uint32_t>(bits >> 32) & 0x80000000U;
  const auto exponent = static_cast<int>(bits >> 52 & 0x7FF);
  const std::uint64_t fraction = bits & 0xFFFFFFFFFFFFFU;
  if (exponent == 0x7FF) {  // Inf, or NaN made quiet
    const std::uint32_t quiet = fraction == 0 ? 0 : 0x400000U | static_cast<std::uint32_t>(fraction >> 29);
    return float_from_bits(sign | 0x7F800000U | quiet);
  }
  const int e = exponent - 1023 + 127;
  if (e >= 255) return float_from_bits(sign | 0x7F7FFFFFU);
  const std::uint64_t m = exponent == 0 ? fraction : fraction | 0x10000000000000U;
  if (e > 0) {
    const std::uint32_t kept = static_cast<std::uint32_t>(e) << 23 | static_cast<std::uint32_t>(fraction >> 29);
    return float_from_bits(sign | kept | ((fraction & 0x1FFFFFFF) != 0));
  }
  const int shift = 30 - e < 63 ? 30 - e : 63;  // subnormal float
  const auto kept = static_cast<std::uint32_t>(m >> shift);
  return float_from_bits(sign | kept | ((m & ((std::uint64_t{1} << shift) - 1)) != 0));
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
