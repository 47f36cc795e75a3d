// INT2: unsigned codes 0..3, a little-endian stream of 2 bits each (bit_stream.hpp).
#pragma once

#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Format tag. A code is 0..3; symmetric grids store q + 2, so that 2 is zero. Without full_range a symmetric
/// grid has three values, -scale, 0 and scale; with it four, from -2 * scale up.
struct Int2 {
  static constexpr Format format = Format::int2;
  static constexpr int min_code = 0;
  static constexpr int max_code = 3;
  static constexpr int symmetric_zero = 2;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
