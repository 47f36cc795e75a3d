// Rows of bytes to the lanes of a panel and back, the oracle.
#pragma once

#include <cstring>

#include "nibble/kernels/args.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::scalar {

/// Eight 4-bit codes, k ascending from the low nibble up -> one unit's four bytes (low nibbles 0..3, high 4..7).
constexpr std::uint32_t interleave_nibbles(std::uint32_t codes) noexcept {
  const auto spread = [](std::uint32_t half) {
    const std::uint32_t x = (half | half << 8) & 0x00FF00FFU;
    return (x | x << 4) & 0x0F0F0F0FU;
  };
  return spread(codes & 0xFFFFU) | spread(codes >> 16) << 4;
}

/// The inverse of interleave_nibbles.
constexpr std::uint32_t deinterleave_nibbles(std::uint32_t unit) noexcept {
  const auto gather = [](std::uint32_t x) {
    x &= 0x0F0F0F0FU;
    x = (x | x >> 4) & 0x00FF00FFU;
    return (x | x >> 8) & 0xFFFFU;
  };
  return gather(unit) | gather(unit >> 4) << 16;
}

/// One element between its row and its lane. `to_lanes`: from the row.
template <bool to_lanes>
void move_element(LaneElement element, std::uint8_t* row, std::uint8_t* lane, std::size_t bytes) noexcept {
  const std::size_t size = bytes_of(element);
  std::uint32_t value = 0;
  std::memcpy(&value, to_lanes ? row : lane, to_lanes ? bytes : size);
  if (element == LaneElement::int8_codes) value ^= 0x80808080U;
  if (element == LaneElement::int4_codes)
    value = to_lanes ? interleave_nibbles(value) : deinterleave_nibbles(value);
  std::memcpy(to_lanes ? lane : row, &value, to_lanes ? size : bytes);
}

template <bool to_lanes>
void move_lanes(const LanesArgs& a) noexcept {
  const std::size_t size = bytes_of(a.element);
  for (std::size_t at = 0, e = 0; at < a.bytes; at += size, ++e) {
    std::uint8_t* lanes = a.lanes + e * a.step;
    if (to_lanes) std::memset(lanes + a.row_count * size, 0, (panel_width - a.row_count) * size);
    for (std::size_t r = 0; r < a.row_count; ++r)
      move_element<to_lanes>(a.element, a.rows + r * a.row_stride + at, lanes + r * size,
                             a.bytes - at < size ? a.bytes - at : size);
  }
}

inline void rows_to_lanes(const LanesArgs& a) noexcept { move_lanes<true>(a); }
inline void lanes_to_rows(const LanesArgs& a) noexcept { move_lanes<false>(a); }

}  // namespace detail::scalar
}  // namespace NIBBLE_ABI
}  // namespace nibble
