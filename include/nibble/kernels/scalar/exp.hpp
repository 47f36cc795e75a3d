// The one exponential of the library, and the activations made of it. Every ISA repeats these operations lane by
// lane, so results agree bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "nibble/core/fp_env.hpp"
#include "nibble/formats/float_bits.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// Constants of exp_reference, shared by the vector kernels.
///
/// x = n * ln 2 + r with |r| <= 0.3467: ln 2 is split into 9 bits (n * ln2_hi is exact, and so is the difference) and
/// the rest. exp(r) = 1 + r + r^2 * (c2 + ... + c6 r^4), minimax for the relative error over that interval: 0.06 ulp.
struct ExpConstants {
  // exp(-104) < 2^-150 rounds to zero and exp(89) > FLT_MAX to Inf, so clamping changes no result.
  static constexpr float lowest = -104.0F;
  static constexpr float highest = 89.0F;
  static constexpr float log2_e = 0x1.715476p+0F;
  static constexpr float magic = 0x1.8p+23F;  // adding it rounds to an integer, in the low bits of the sum
  static constexpr std::int32_t magic_bits = 0x4B400000;
  static constexpr float minus_ln2_hi = -0x1.63p-1F;
  static constexpr float minus_ln2_lo = 0x1.bd0106p-13F;
  static constexpr float c2 = 0x1.fffffcp-2F;
  static constexpr float c3 = 0x1.555492p-3F;
  static constexpr float c4 = 0x1.5558f2p-5F;
  static constexpr float c5 = 0x1.123a2p-7F;
  static constexpr float c6 = 0x1.6a23dp-10F;
};

/// exp(x) within 1.1 ulp over all floats; NaN stays NaN, overflow is Inf, underflow goes through the subnormals
/// to 0.
inline float exp_reference(float x) noexcept {
  using C = ExpConstants;
  // Written so that NaN passes.
  x = x < C::lowest ? C::lowest : x;
  x = x > C::highest ? C::highest : x;
  const float shifted = std::fma(x, C::log2_e, C::magic);
  const float n = shifted - C::magic;
  float r = std::fma(n, C::minus_ln2_hi, x);
  r = std::fma(n, C::minus_ln2_lo, r);
  float p = std::fma(C::c6, r, C::c5);
  p = std::fma(p, r, C::c4);
  p = std::fma(p, r, C::c3);
  p = std::fma(p, r, C::c2);
  p = std::fma(p, r, 1.0F);
  p = std::fma(p, r, 1.0F);
  // 2^n in two factors, for n reaches from -150 to 128: the first product is exact, the second rounds once.
  const std::int32_t exponent =
      static_cast<std::int32_t>(bits_from_float(shifted) - static_cast<std::uint32_t>(C::magic_bits));
  const std::int32_t half = exponent >> 1;
  const auto power = [](std::int32_t e) { return float_from_bits((static_cast<std::uint32_t>(e) + 127U) << 23); };
  const auto rest =
      static_cast<std::int32_t>(static_cast<std::uint32_t>(exponent) - static_cast<std::uint32_t>(half));
  return rounded(rounded(p * power(half)) * power(rest));
}

/// v / (1 + exp(-v))
inline float silu_reference(float v) noexcept { return v / (1.0F + exp_reference(-v)); }

/// v / (1 + exp(-2u)), u = sqrt(2/pi) * (v + 0.044715 v^3): the tanh form of GELU. v^3 is (v * v) * v and the sum
/// one fma.
inline float gelu_reference(float v) noexcept {
  const float cube = rounded(rounded(v * v) * v);
  const float u = rounded(0.797884561F * std::fma(0.044715F, cube, v));
  return v / (1.0F + exp_reference(rounded(-2.0F * u)));
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
