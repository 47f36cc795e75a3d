// The formats whose codes are indices of levels, by their run-time value.
#pragma once

#include <cstdint>

#include "nibble/formats/format.hpp"
#include "nibble/formats/fp4.hpp"
#include "nibble/formats/nf4.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// The 16 levels of a codebook format, ascending from -1 to 1; those of nf4 for any other.
constexpr const float* codebook_of(Format f) noexcept { return f == Format::fp4 ? fp4_levels : nf4_levels; }
/// The code of the level nearest to x.
inline std::uint8_t codebook_code(Format f, float x) noexcept {
  return f == Format::fp4 ? fp4_from_float(x) : nf4_from_float(x);
}
/// Half of the widest gap between levels.
constexpr float widest_half_gap_of(Format f) noexcept {
  return f == Format::fp4 ? fp4_widest_half_gap : nf4_widest_half_gap;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
