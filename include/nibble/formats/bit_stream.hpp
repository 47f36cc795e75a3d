// Lines of codes of 2, 3, 5 or 6 bits: a little-endian stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

// Code i of a line has the bits [i * b, i * b + b), bit 0 being the lowest of the first byte: eight codes fill b bytes, and
// every line starts at a new byte. Eight at a time go through one 64-bit word, whose bytes are pushed together in three
// steps: pairs, fours, eights.

/// The low `width` bits of every `step` bits.
constexpr std::uint64_t repeated_ones(unsigned width, unsigned step) noexcept {
  std::uint64_t ones = 0;
  for (unsigned at = 0; at < 64; at += step) ones |= ((std::uint64_t{1} << width) - 1) << at;
  return ones;
}

/// Eight codes, one a byte, to Bits * 8 bits.
template <unsigned Bits>
constexpr std::uint64_t gather_codes(std::uint64_t x) noexcept {
  constexpr std::uint64_t ones = repeated_ones(Bits, 16);
  constexpr std::uint64_t pairs = repeated_ones(2 * Bits, 32);
  constexpr std::uint64_t fours = repeated_ones(4 * Bits, 64);
  x = (x & ones) | (x >> (8 - Bits) & ones << Bits);
  x = (x & pairs) | (x >> (16 - 2 * Bits) & pairs << (2 * Bits));
  return (x & fours) | (x >> (32 - 4 * Bits) & fours << (4 * Bits));
}
/// The inverse of gather_codes; higher bits do not matter.
template <unsigned Bits>
constexpr std::uint64_t spread_codes(std::uint64_t x) noexcept {
  constexpr std::uint64_t ones = repeated_ones(Bits, 16);
  constexpr std::uint64_t pairs = repeated_ones(2 * Bits, 32);
  constexpr std::uint64_t fours = repeated_ones(4 * Bits, 64);
  x = (x & fours) | (x << (32 - 4 * Bits) & fours << 32);
  x = (x & pairs) | (x << (16 - 2 * Bits) & pairs << 16);
  return (x & ones) | (x << (8 - Bits) & ones << 8);
}

template <unsigned Bits>
void pack_bits(const std::uint8_t* codes, std::size_t n, std::uint8_t* line) noexcept {
  for (std::size_t i = 0; i < n; i += 8, line += Bits) {
    const std::size_t count = n - i < 8 ? n - i : 8;
    std::uint64_t x = 0;
    for (std::size_t j = 0; j < count; ++j) x |= std::uint64_t{codes[i + j]} << (8 * j);
    x = gather_codes<Bits>(x);
    const std::size_t bytes = (count * Bits + 7) / 8;
    for (std::size_t j = 0; j < bytes; ++j) line[j] = static_cast<std::uint8_t>(x >> (8 * j));
  }
}
template <unsigned Bits>
void unpack_bits(const std::uint8_t* line, std::size_t n, std::uint8_t* codes) noexcept {
  for (std::size_t i = 0; i < n; i += 8, line += Bits) {
    const std::size_t count = n - i < 8 ? n - i : 8;
    const std::size_t bytes = (count * Bits + 7) / 8;
    std::uint64_t x = 0;
    for (std::size_t j = 0; j < bytes; ++j) x |= std::uint64_t{line[j]} << (8 * j);
    x = spread_codes<Bits>(x);
    for (std::size_t j = 0; j < count; ++j) codes[i + j] = static_cast<std::uint8_t>(x >> (8 * j));
  }
}

/// Packs n codes, one a byte, into ceil(n * bits / 8) bytes; the bits beyond the last code are 0. bits: 2, 3, 5 or 6.
inline void pack_bits(unsigned bits, const std::uint8_t* codes, std::size_t n, std::uint8_t* line) noexcept {
  switch (bits) {
    case 2: return pack_bits<2>(codes, n, line);
    case 3: return pack_bits<3>(codes, n, line);
    case 5: return pack_bits<5>(codes, n, line);
    default: return pack_bits<6>(codes, n, line);
  }
}
/// The inverse of pack_bits.
inline void unpack_bits(unsigned bits, const std::uint8_t* line, std::size_t n, std::uint8_t* codes) noexcept {
  switch (bits) {
    case 2: return unpack_bits<2>(line, n, codes);
    case 3: return unpack_bits<3>(line, n, codes);
    case 5: return unpack_bits<5>(line, n, codes);
    default: return unpack_bits<6>(line, n, codes);
  }
}

/// Code i of such a line.
inline std::uint8_t bits_at(unsigned bits, const std::uint8_t* line, std::size_t i) noexcept {
  const std::size_t at = i * bits;
  unsigned two = line[at / 8];
  if (at % 8 + bits > 8) two |= unsigned{line[at / 8 + 1]} << 8;
  return static_cast<std::uint8_t>(two >> (at % 8) & ((1U << bits) - 1U));
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
