// INT8: one signed byte a code.
#pragma once

#include <cstdint>

#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Format tag. The grid's equations stand at Symmetry; a code is an int8_t.
struct Int8 {
  static constexpr Format format = Format::int8;
  static constexpr int min_code = -128;
  static constexpr int max_code = 127;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
