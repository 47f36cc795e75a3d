// Elementwise work on lines of numbers, the oracle.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "nibble/core/fp_env.hpp"
#include "nibble/formats/bf16.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/kernels/args.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::scalar {

inline bool is_finite(float v) noexcept {
  // By bits: -ffast-math would fold std::isfinite to true.
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return (bits & 0x7F800000U) != 0x7F800000U;
}

/// clamp(rne(ratio) + zero, qmin, qmax), in float throughout so that no conversion overflows.
inline std::int32_t to_code(float ratio, std::int32_t zero, std::int32_t qmin, std::int32_t qmax) noexcept {
  const float q = rounded(std::nearbyint(ratio) + static_cast<float>(zero));
  const float lo = static_cast<float>(qmin);
  const float hi = static_cast<float>(qmax);
  return static_cast<std::int32_t>(q < lo ? lo : q > hi ? hi : q);
}

inline LineRange line_range(const float* x, std::size_t n) noexcept {
  LineRange range;
  if (n == 0) return range;
  range.min = std::numeric_limits<float>::infinity();
  range.max = -range.min;
  for (std::size_t i = 0; i < n; ++i) {
    range.finite = range.finite && is_finite(x[i]);
    range.min = x[i] < range.min ? x[i] : range.min;
    range.max = x[i] > range.max ? x[i] : range.max;
  }
  if (!range.finite) range.min = range.max = 0.0F;
  // A zero is the positive one, whichever sign was met first: vectors meet them in another order.
  range.min += 0.0F;
  range.max += 0.0F;
  return range;
}

inline void quantize_line(const QuantizeLineArgs& a) noexcept {
  for (std::size_t i = 0; i < a.n; ++i)
    a.q[i] =
        static_cast<std::int8_t>(to_code(rounded(rounded(a.x[i] - a.offset) / a.scale), a.zero, a.qmin, a.qmax));
}

inline void dequantize_line(const DequantizeLineArgs& a) noexcept {
  for (std::size_t i = 0; i < a.n; ++i)
    a.x[i] = a.has_offset ? std::fma(a.scale, static_cast<float>(a.q[i]), a.offset)
                          : rounded(a.scale * static_cast<float>(a.q[i] - a.zero));
}

inline void fp16_from_float(const float* x, std::size_t n, std::uint16_t* out) noexcept {
  for (std::size_t i = 0; i < n; ++i) out[i] = nibble::fp16_from_float(x[i]);
}
inline void float_from_fp16(const std::uint16_t* x, std::size_t n, float* out) noexcept {
  for (std::size_t i = 0; i < n; ++i) out[i] = nibble::float_from_fp16(x[i]);
}
inline void bf16_from_float(const float* x, std::size_t n, std::uint16_t* out) noexcept {
  for (std::size_t i = 0; i < n; ++i) out[i] = nibble::bf16_from_float(x[i]);
}
inline void float_from_bf16(const std::uint16_t* x, std::size_t n, float* out) noexcept {
  for (std::size_t i = 0; i < n; ++i) out[i] = nibble::float_from_bf16(x[i]);
}

inline void block_sums(const std::int8_t* q, std::size_t n, std::int32_t* out) noexcept {
  for (std::size_t i = 0; i < n; i += 16) {
    std::int32_t sum = 0;
    for (std::size_t j = 0; j < 16; ++j) sum += q[i + j];
    out[i / 16] = sum;
  }
}

inline void quantize_rows(const QuantizeRowsArgs& a) noexcept {
  const std::int32_t qmin = -(std::int32_t{1} << (a.bits - 1));
  const std::int32_t qmax = -qmin - 1;
  const float steps = static_cast<float>(qmax - qmin);
  for (std::size_t r = 0; r < a.rows; ++r) {
    const float* x = a.x + r * a.x_stride;
    std::int8_t* q = a.q + r * a.q_stride;
    std::memset(q, 0, a.q_stride);
    const LineRange range = line_range(x, a.k);
    std::int32_t zero = 0;
    float scale = 1.0F;
    if (!range.finite) {
      scale = std::numeric_limits<float>::quiet_NaN();
    } else if (a.symmetric) {
      const float absmax = -range.min > range.max ? -range.min : range.max;
      if (absmax > 0.0F) scale = rounded(absmax / static_cast<float>(qmax));
      if (scale < std::numeric_limits<float>::min()) scale = std::numeric_limits<float>::min();
      for (std::size_t k = 0; k < a.k; ++k)
        q[k] = static_cast<std::int8_t>(to_code(rounded(x[k] / scale), 0, -qmax, qmax));
    } else {
      const float lo = range.min < 0.0F ? range.min : 0.0F;
      const float hi = range.max > 0.0F ? range.max : 0.0F;
      if (lo < 0.0F || hi > 0.0F) scale = rounded(rounded(hi / steps) - rounded(lo / steps));
      if (scale < std::numeric_limits<float>::min()) scale = std::numeric_limits<float>::min();
      // rne(qmin - lo / scale): the difference is rounded to float before it is rounded to an integer.
      zero = to_code(rounded(static_cast<float>(qmin) - rounded(lo / scale)), 0, qmin, qmax);
      for (std::size_t k = 0; k < a.k; ++k)
        q[k] = static_cast<std::int8_t>(to_code(rounded(x[k] / scale), zero, qmin, qmax));
    }
    a.scales[r] = scale;
    if (a.zeros != nullptr) a.zeros[r] = zero;
  }
}

}  // namespace detail::scalar
}  // namespace NIBBLE_ABI
}  // namespace nibble
