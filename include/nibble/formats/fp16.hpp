// FP16: IEEE 754 binary16, 1 sign, 5 exponent and 10 fraction bits.
#pragma once

#include <cstdint>

#include "nibble/formats/float_bits.hpp"
#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Format tag. One value is the 16 bits of a binary16.
struct Fp16 {
  static constexpr Format format = Format::fp16;
  static constexpr float max_value = 65504.0F;
};

/// Nearest binary16, ties to even. Subnormals are kept; magnitudes of 65520 and more become Inf; a NaN stays a NaN
/// (quiet, sign and upper payload bits kept, as F16C does). Integer code: MXCSR plays no part.
inline std::uint16_t fp16_from_float(float x) noexcept {
  const std::uint32_t bits = detail::bits_from_float(x);
  const std::uint32_t sign = bits >> 16 & 0x8000U;
  const std::uint32_t a = bits & 0x7FFFFFFFU;
  std::uint32_t code;
  if (a > 0x7F800000U) {
    code = 0x7E00U | (a >> 13 & 0x1FFU);
  } else if (a >= 0x477FF000U) {  // 65520: halfway between the largest finite value and 2^16
    code = 0x7C00U;
  } else if (a >= 0x38800000U) {  // 2^-14: normal; a carry out of the fraction moves into the exponent
    code = (a + 0xFFFU + (a >> 13 & 1U) - 0x38000000U) >> 13;
  } else if (a > 0x33000000U) {  // above 2^-25: subnormal, a multiple of 2^-24
    const std::uint32_t m = (a & 0x7FFFFFU) | 0x800000U;
    const std::uint32_t shift = 126U - (a >> 23);
    code = (m + (1U << (shift - 1)) - 1U + (m >> shift & 1U)) >> shift;
  } else {
    code = 0;
  }
  return static_cast<std::uint16_t>(sign | code);
}

/// As fp16_from_float, in one rounding: the detour over float loses nothing.
inline std::uint16_t fp16_from_double(double x) noexcept {
  return fp16_from_float(detail::float_from_double_to_odd(x));
}

/// The value of a binary16: exact. A signalling NaN becomes quiet.
inline float float_from_fp16(std::uint16_t code) noexcept {
  const std::uint32_t sign = (code & 0x8000U) << 16;
  const std::uint32_t exponent = code >> 10 & 0x1FU;
  std::uint32_t fraction = code & 0x3FFU;
  if (exponent == 0x1F) {
    return detail::float_from_bits(sign | 0x7F800000U | (fraction == 0 ? 0 : 0x400000U | fraction << 13));
  }
  if (exponent != 0) return detail::float_from_bits(sign | (exponent + 112U) << 23 | fraction << 13);
  if (fraction == 0) return detail::float_from_bits(sign);
  std::uint32_t e = 113;  // subnormal: shift the leading one into place
  while ((fraction & 0x400U) == 0) {
    fraction <<= 1;
    --e;
  }
  return detail::float_from_bits(sign | e << 23 | (fraction & 0x3FFU) << 13);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
