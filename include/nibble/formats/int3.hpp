// INT3: unsigned codes 0..7, a little-endian stream of 3 bits each (bit_stream.hpp).
#pragma once

#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Format tag. A code is 0..7; symmetric grids store q + 4, so that 4 is zero.
struct Int3 {
  static constexpr Format format = Format::int3;
  static constexpr int min_code = 0;
  static constexpr int max_code = 7;
  static constexpr int symmetric_zero = 4;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
