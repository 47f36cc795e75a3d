// INT6: unsigned codes 0..63, a little-endian stream of 6 bits each (bit_stream.hpp).
#pragma once

#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Format tag. A code is 0..63; symmetric grids store q + 32, so that 32 is zero.
struct Int6 {
  static constexpr Format format = Format::int6;
  static constexpr int min_code = 0;
  static constexpr int max_code = 63;
  static constexpr int symmetric_zero = 32;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
