// FP4: bitsandbytes' 4-bit float (a sign and seven magnitudes around a subnormal), as a codebook of 16 levels.
#pragma once

#include <cstdint>

#include "nibble/formats/format.hpp"
#include "nibble/formats/nf4.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Format tag. A code is the index 0..15 of a level; real = scale * level, scale = absmax of the block.
struct Fp4 {
  static constexpr Format format = Format::fp4;
};

/// The levels in ascending order; bitsandbytes numbers the same values by sign and exponent (fp4_from_bitsandbytes). Zero
/// has two codes, as it has there: 7 is -0, 8 is +0.
/// Source: bitsandbytes, csrc/kernels.cu, dDequantizeFP4Tree, whose constants have eight digits.
inline constexpr float fp4_levels[16] = {
    -1.0F, -0.66666667F,     -0.5F,       -0.33333333F, -0.25F,      -0.16666667F, -5.208333333e-03F, -0.0F,
    0.0F,  5.208333333e-03F, 0.16666667F, 0.25F,        0.33333333F, 0.5F,         0.66666667F,       1.0F,
};

/// Half of the widest gap, between 2/3 and 1: the worst error in units of the scale.
inline constexpr float fp4_widest_half_gap = (1.0F - 0.66666667F) / 2.0F;

/// Our code of a code of bitsandbytes.
inline constexpr std::uint8_t fp4_from_bitsandbytes[16] = {8, 9, 14, 15, 12, 13, 10, 11, 7, 6, 1, 0, 3, 2, 5, 4};

namespace detail {
/// The largest float that still takes code i, up to 14: the midpoint of levels i and i + 1, rounded down. Between the
/// zeros it is the subnormal next to zero, so that zeros of either sign take +0, and -0 only what rounds to it from below.
inline constexpr float fp4_last_of[15] = {
    float_below((static_cast<double>(fp4_levels[0]) + static_cast<double>(fp4_levels[1])) * 0.5),
    float_below((static_cast<double>(fp4_levels[1]) + static_cast<double>(fp4_levels[2])) * 0.5),
    float_below((static_cast<double>(fp4_levels[2]) + static_cast<double>(fp4_levels[3])) * 0.5),
    float_below((static_cast<double>(fp4_levels[3]) + static_cast<double>(fp4_levels[4])) * 0.5),
    float_below((static_cast<double>(fp4_levels[4]) + static_cast<double>(fp4_levels[5])) * 0.5),
    float_below((static_cast<double>(fp4_levels[5]) + static_cast<double>(fp4_levels[6])) * 0.5),
    float_below((static_cast<double>(fp4_levels[6]) + static_cast<double>(fp4_levels[7])) * 0.5),
    -0x1p-149F,
    float_below((static_cast<double>(fp4_levels[8]) + static_cast<double>(fp4_levels[9])) * 0.5),
    float_below((static_cast<double>(fp4_levels[9]) + static_cast<double>(fp4_levels[10])) * 0.5),
    float_below((static_cast<double>(fp4_levels[10]) + static_cast<double>(fp4_levels[11])) * 0.5),
    float_below((static_cast<double>(fp4_levels[11]) + static_cast<double>(fp4_levels[12])) * 0.5),
    float_below((static_cast<double>(fp4_levels[12]) + static_cast<double>(fp4_levels[13])) * 0.5),
    float_below((static_cast<double>(fp4_levels[13]) + static_cast<double>(fp4_levels[14])) * 0.5),
    float_below((static_cast<double>(fp4_levels[14]) + static_cast<double>(fp4_levels[15])) * 0.5),
};
}  // namespace detail

/// The code of the level nearest to x (x = weight / scale); a tie takes the lower code. Values beyond +-1 take the
/// end levels; a NaN takes code 0.
inline std::uint8_t fp4_from_float(float x) noexcept {
  unsigned code = 0;
  for (const float last : detail::fp4_last_of) code += x > last ? 1U : 0U;
  return static_cast<std::uint8_t>(code);
}

/// The level of a code; only the low four bits count.
constexpr float float_from_fp4(std::uint8_t code) noexcept { return fp4_levels[code & 0xF]; }

}  // namespace NIBBLE_ABI
}  // namespace nibble
