// Windows of a text to calibrate on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../vocabulary.hpp"
#include "nibble/core/error.hpp"

namespace llm {

/// `count` windows of `length` tokens: the text is cut into `count` equal parts, and each gives the window at its start
/// (seed 0) or at a place that the seed draws. Throws InvalidArgument where the text is too short.
inline std::vector<std::vector<Token>> calibration_windows(const std::vector<Token>& tokens, std::size_t count,
                                                           std::size_t length, std::uint64_t seed) {
  nibble::detail::require(count > 0 && length > 1, "calibration takes ", count, " windows of ", length,
                          " tokens, expected at least one of two");
  nibble::detail::require(tokens.size() / count >= length, "the calibration text has ", tokens.size(), " tokens, ",
                          count, " windows of ", length, " take ", count * length);
  const std::size_t part = tokens.size() / count;
  std::vector<std::vector<Token>> windows;
  std::uint64_t state = seed;
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t begin = i * part;
    if (seed != 0) {
      // SplitMix64 (Steele 2014): the same places on every platform.
      state += 0x9E3779B97F4A7C15U;
      std::uint64_t z = state;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
      begin += static_cast<std::size_t>((z ^ (z >> 31)) % (part - length + 1));
    }
    const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(begin);
    windows.emplace_back(first, first + static_cast<std::ptrdiff_t>(length));
  }
  return windows;
}

}  // namespace llm
