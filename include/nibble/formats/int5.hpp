// INT5: unsigned codes 0..31, a little-endian stream of 5 bits each (bit_stream.hpp).
#pragma once

#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Format tag. A code is 0..31; symmetric grids store q + 16, so that 16 is zero.
struct Int5 {
  static constexpr Format format = Format::int5;
  static constexpr int min_code = 0;
  static constexpr int max_code = 31;
  static constexpr int symmetric_zero = 16;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
