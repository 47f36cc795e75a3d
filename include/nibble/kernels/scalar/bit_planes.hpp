// Codes of 2, 3, 5 and 6 bits in a panel, the oracle: sixteen k of one lane in a unit's planes (args.hpp draws them).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/kernels/args.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::scalar {

/// Where the planes of a unit lie. A lane's four bytes of a plane are one 32-bit word; four k share it.
struct BitPlanes {
  std::size_t nibbles;  // words of 4-bit planes: 0 or 2, 64 bytes apart
  std::size_t pairs;    // 0 or 1 word of a 2-bit plane
  std::size_t singles;  // 0 or 1 half of a word of a 1-bit plane
};
constexpr BitPlanes bit_planes(unsigned bits) noexcept {
  return {bits > 4 ? std::size_t{2} : 0, bits % 4 == 2 || bits == 3 ? std::size_t{1} : 0, bits % 2};
}

/// Every byte's low `bits` bits.
constexpr std::uint32_t low_of_bytes(unsigned bits) noexcept { return 0x01010101U * ((1U << bits) - 1U); }

/// Puts codes[0 .. 15], one a byte, into a lane of a unit that has held zeros.
inline void put_lane_codes(unsigned bits, const std::uint8_t* codes, std::size_t lane,
                           std::uint8_t* unit) noexcept {
  std::uint32_t w[4];
  std::memcpy(w, codes, sizeof w);
  const BitPlanes planes = bit_planes(bits);
  unsigned shift = 0;  // bits of a code that are placed
  for (std::size_t n = 0; n < planes.nibbles; ++n, unit += 64) {
    const std::uint32_t word = (w[2 * n] & low_of_bytes(4)) | (w[2 * n + 1] & low_of_bytes(4)) << 4;
    std::memcpy(unit + 4 * lane, &word, 4);
    shift = 4;
  }
  if (planes.pairs != 0) {
    std::uint32_t word = 0;
    for (unsigned m = 0; m < 4; ++m) word |= (w[m] >> shift & low_of_bytes(2)) << (2 * m);
    std::memcpy(unit + 4 * lane, &word, 4);
    unit += 64;
    shift += 2;
  }
  if (planes.singles != 0) {
    std::uint32_t word;
    std::memcpy(&word, unit + 4 * (lane % 8), 4);
    for (unsigned m = 0; m < 4; ++m) word |= (w[m] >> shift & low_of_bytes(1)) << (lane / 8 * 4 + m);
    std::memcpy(unit + 4 * (lane % 8), &word, 4);
  }
}

/// The inverse of put_lane_codes.
inline void get_lane_codes(unsigned bits, const std::uint8_t* unit, std::size_t lane,
                           std::uint8_t* codes) noexcept {
  std::uint32_t w[4] = {};
  const BitPlanes planes = bit_planes(bits);
  unsigned shift = 0;
  std::uint32_t word;
  for (std::size_t n = 0; n < planes.nibbles; ++n, unit += 64) {
    std::memcpy(&word, unit + 4 * lane, 4);
    w[2 * n] = word & low_of_bytes(4);
    w[2 * n + 1] = word >> 4 & low_of_bytes(4);
    shift = 4;
  }
  if (planes.pairs != 0) {
    std::memcpy(&word, unit + 4 * lane, 4);
    for (unsigned m = 0; m < 4; ++m) w[m] |= (word >> (2 * m) & low_of_bytes(2)) << shift;
    unit += 64;
    shift += 2;
  }
  if (planes.singles != 0) {
    std::memcpy(&word, unit + 4 * (lane % 8), 4);
    for (unsigned m = 0; m < 4; ++m) w[m] |= (word >> (lane / 8 * 4 + m) & low_of_bytes(1)) << shift;
  }
  std::memcpy(codes, w, sizeof w);
}

/// One of those codes.
inline unsigned lane_code(unsigned bits, const std::uint8_t* unit, std::size_t lane, std::size_t k) noexcept {
  const BitPlanes planes = bit_planes(bits);
  const auto m = static_cast<unsigned>(k / 4);
  const std::size_t at = 4 * lane + k % 4;
  unsigned code = 0;
  unsigned shift = 0;
  if (planes.nibbles != 0) {
    code = unit[m / 2 * 64 + at] >> (m % 2 * 4) & 15U;
    unit += 128;
    shift = 4;
  }
  if (planes.pairs != 0) {
    code |= (unit[at] >> (2 * m) & 3U) << shift;
    unit += 64;
    shift += 2;
  }
  if (planes.singles != 0) code |= (unit[4 * (lane % 8) + k % 4] >> (lane / 8 * 4 + m) & 1U) << shift;
  return code;
}

inline void expand(const ExpandArgs& a) noexcept {
  const unsigned bits = bits_of(a.w.format);
  const bool nibbles = expanded_format(a.w.format) == Format::int4;
  const auto bias = static_cast<std::uint8_t>(expanded_bias(a.w));
  for (std::size_t p = a.panel_begin; p < a.panel_end; ++p) {
    std::uint8_t* out = a.out + (p - a.panel_begin) * a.out_panel_stride;
    for (std::size_t k = 0; k < a.w.k_padded; k += 16)
      for (std::size_t lane = 0; lane < panel_width; ++lane) {
        std::uint8_t codes[16];
        get_lane_codes(bits, a.w.codes + p * a.w.panel_bytes + k / bits_k_unit * bits_unit_bytes(a.w.format), lane,
                       codes);
        for (std::size_t i = 0; i < 16; ++i) {
          const auto code = static_cast<std::uint8_t>(codes[i] + bias);
          if (!nibbles) {
            out[((k + i) / 4 * panel_width + lane) * 4 + i % 4] = code;
            continue;
          }
          std::uint8_t& byte = out[((k + i) / 8 * panel_width + lane) * 4 + i % 4];
          byte = i % 8 < 4 ? code : static_cast<std::uint8_t>(byte | code << 4);
        }
      }
  }
}

}  // namespace detail::scalar
}  // namespace NIBBLE_ABI
}  // namespace nibble
