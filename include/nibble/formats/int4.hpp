// INT4: unsigned codes 0..15, two a byte.
#pragma once

#include <cstddef>
#include <cstdint>

#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Format tag. A code is 0..15; symmetric grids store q + 8, so that 8 is zero.
struct Int4 {
  static constexpr Format format = Format::int4;
  static constexpr int min_code = 0;
  static constexpr int max_code = 15;
  static constexpr int symmetric_zero = 8;
};

namespace detail {

/// Code i of a line of nibbles: even i in the low half of byte i / 2, odd i in the high half.
inline std::uint8_t nibble_at(const std::uint8_t* line, std::size_t i) noexcept {
  return static_cast<std::uint8_t>(line[i / 2] >> (i % 2 * 4) & 0xF);
}

/// Packs n codes (0..15, one a byte) into (n + 1) / 2 bytes; the last high half of an odd n is 0.
inline void pack_nibbles(const std::uint8_t* codes, std::size_t n, std::uint8_t* line) noexcept {
  for (std::size_t i = 0; i + 1 < n; i += 2) line[i / 2] = static_cast<std::uint8_t>(codes[i] | codes[i + 1] << 4);
  if (n % 2 != 0) line[n / 2] = codes[n - 1];
}

/// The inverse of pack_nibbles.
inline void unpack_nibbles(const std::uint8_t* line, std::size_t n, std::uint8_t* codes) noexcept {
  for (std::size_t i = 0; i + 1 < n; i += 2) {
    codes[i] = line[i / 2] & 0xF;
    codes[i + 1] = static_cast<std::uint8_t>(line[i / 2] >> 4);
  }
  if (n % 2 != 0) codes[n - 1] = line[n / 2] & 0xF;
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
