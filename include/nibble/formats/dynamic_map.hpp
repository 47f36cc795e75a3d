// bitsandbytes' 8-bit dynamic maps: 256 values in [-1, 1] or [0, 1], fine around 0.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "nibble/formats/float_bits.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// The dynamic map of 7 exponents: for e = 0..6 the interval (0.1, 1) * 10^(e - 6) is cut into 2^e parts (unsigned: 2^(e + 1)),
/// whose middles are its values, signed: of either sign; and 0, and 1. Ascending. Source: Dettmers 2016, "8-bit
/// approximations for parallelism in deep learning", as bitsandbytes' create_dynamic_map has it. In double, rounded once.
constexpr std::array<float, 256> make_dynamic_map(bool with_sign = true) noexcept {
  constexpr double decades[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  std::array<float, 256> map{};
  std::size_t at = with_sign ? 128 : 1;  // the first above 0
  for (int e = 0; e < 7; ++e) {
    const int parts = with_sign ? 1 << e : 2 << e;
    for (int i = 0; i < parts; ++i) {
      const double middle = 0.1 + 0.9 * (2 * i + 1) / (2 * parts);
      map[at] = static_cast<float>(decades[e] * middle);
      if (with_sign) map[254 - at] = -map[at];
      ++at;
    }
  }
  map[255] = 1.0F;
  return map;
}

/// The nearest of 256 ascending values; a tie takes the lower.
inline std::uint8_t nearest_in_map(const std::array<float, 256>& map, float x) noexcept {
  const auto above = std::lower_bound(map.begin(), map.end(), x);
  if (above == map.begin()) return 0;
  const auto i = static_cast<std::size_t>(above - map.begin());
  if (above == map.end()) return 255;
  const double up = static_cast<double>(map[i]) - static_cast<double>(x);
  const double down = static_cast<double>(x) - static_cast<double>(map[i - 1]);
  return static_cast<std::uint8_t>(down <= up ? i - 1 : i);
}

/// nearest_in_map() of a dynamic map for x in [-1, 1] without a search: sign, exponent and 7 bits of the mantissa give a code
/// that is right or one too low, for no two midpoints are as near to each other as that.
class DynamicEncoder {
 public:
  explicit DynamicEncoder(bool with_sign) : map_(make_dynamic_map(with_sign)) {
    for (std::size_t c = 0; c < 255; ++c) {
      // Exact in double. The last float that is not above it still takes c.
      const double middle = (static_cast<double>(map_[c]) + static_cast<double>(map_[c + 1])) / 2.0;
      const auto near = static_cast<float>(middle);
      last_[c] = static_cast<double>(near) <= middle
                     ? near
                     : std::nextafter(near, -std::numeric_limits<float>::infinity());
    }
    last_[255] = std::numeric_limits<float>::infinity();
    for (std::uint32_t i = 0; i < buckets; ++i) {
      const std::uint32_t low = (first_bucket + i) << 16;
      lowest_[i] = nearest_in_map(map_, i == 0 ? 0.0F : float_from_bits(low));
      lowest_[buckets + i] = nearest_in_map(map_, -float_from_bits(low | 0xFFFFU));
    }
  }

  const std::array<float, 256>& map() const noexcept { return map_; }

  std::uint8_t operator()(float x) const noexcept {
    const std::uint32_t bits = bits_from_float(x);
    const std::uint32_t bucket = std::min(std::max((bits & 0x7FFFFFFFU) >> 16, first_bucket), last_bucket);
    const std::uint8_t code = lowest_[bucket - first_bucket + (bits >> 31) * buckets];
    return static_cast<std::uint8_t>(code + (x > last_[code] ? 1 : 0));
  }

 private:
  static constexpr std::uint32_t first_bucket = 0x3380;  // 2^-24: below the least midpoint
  static constexpr std::uint32_t last_bucket = 0x3F80;   // 1
  static constexpr std::uint32_t buckets = last_bucket - first_bucket + 1;

  std::array<float, 256> map_;
  std::array<float, 256> last_{};
  std::array<std::uint8_t, 2 * buckets> lowest_{};
};

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
