// NF4 (4-bit NormalFloat): 16 levels at the quantiles of a normal distribution, QLoRA (Dettmers et al. 2023).
#pragma once

#include <cstdint>

#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Format tag. A code is the index 0..15 of a level; real = scale * level, scale = absmax of the block.
struct Nf4 {
  static constexpr Format format = Format::nf4;
};

/// The levels in ascending order, as bitsandbytes defines them.
inline constexpr float nf4_levels[16] = {
    -1.0F,
    -0.6961928009986877F,
    -0.5250730514526367F,
    -0.39491748809814453F,
    -0.28444138169288635F,
    -0.18477343022823334F,
    -0.09105003625154495F,
    0.0F,
    0.07958029955625534F,
    0.16093020141124725F,
    0.24611230194568634F,
    0.33791524171829224F,
    0.44070982933044434F,
    0.5626170039176941F,
    0.7229568362236023F,
    1.0F,
};

/// Half of the widest gap, between -1 and the next level: the worst error in units of the scale.
inline constexpr float nf4_widest_half_gap = (1.0F - 0.6961928009986877F) / 2.0F;

namespace detail {
/// Midpoint of levels i and i + 1. Exact: the sum of two such floats fits a double.
constexpr double nf4_midpoint(int i) noexcept {
  return (static_cast<double>(nf4_levels[i]) + static_cast<double>(nf4_levels[i + 1])) * 0.5;
}
inline constexpr double nf4_midpoints[15] = {
    nf4_midpoint(0),  nf4_midpoint(1),  nf4_midpoint(2),  nf4_midpoint(3),  nf4_midpoint(4),
    nf4_midpoint(5),  nf4_midpoint(6),  nf4_midpoint(7),  nf4_midpoint(8),  nf4_midpoint(9),
    nf4_midpoint(10), nf4_midpoint(11), nf4_midpoint(12), nf4_midpoint(13), nf4_midpoint(14),
};

/// The largest float that is not above m, |m| in [2^-126, 1].
constexpr float float_below(double m) noexcept {
  const auto nearest = static_cast<float>(m);
  double binade = 1.0;
  while (binade > (m < 0.0 ? -m : m)) binade *= 0.5;
  return static_cast<double>(nearest) > m ? static_cast<float>(static_cast<double>(nearest) - binade * 0x1p-23)
                                          : nearest;
}
}  // namespace detail

/// The code of the level nearest to x (x = weight / scale); a tie takes the lower code. Values beyond +-1 take the
/// end levels; a NaN takes code 0.
inline std::uint8_t nf4_from_float(float x) noexcept {
  const double v = static_cast<double>(x);
  unsigned code = 0;  // binary search for the number of midpoints below v, without branches
  code += v > detail::nf4_midpoints[code + 7] ? 8U : 0U;
  code += v > detail::nf4_midpoints[code + 3] ? 4U : 0U;
  code += v > detail::nf4_midpoints[code + 1] ? 2U : 0U;
  code += v > detail::nf4_midpoints[code] ? 1U : 0U;
  return static_cast<std::uint8_t>(code);
}

/// The level of a code; only the low four bits count.
constexpr float float_from_nf4(std::uint8_t code) noexcept { return nf4_levels[code & 0xF]; }

}  // namespace NIBBLE_ABI
}  // namespace nibble
