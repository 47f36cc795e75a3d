// How far a quantized value may lie from the value that it stands for.
#pragma once

#include <algorithm>
#include <cmath>

#include "nibble/formats/codebook.hpp"
#include "nibble/quantize/line_codec.hpp"
#include "nibble/quantize/scheme.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Largest possible |dequantize(quantize(x)) - x|, for a finite float x within the range that `grid` was fitted to (the
/// range of its data; ranges given by hand must hold x). A double x adds its rounding to float, |x| * 2^-24, except for
/// fp16 and bf16.
///
/// With u = 2^-24, the relative error of one float operation, s the scale and L the steps of the grid (254 or 255 for
/// int8, 2 or 3 for int2):
/// - fp32: 0. fp16, bf16: half an ulp of x, no less than half the smallest subnormal.
/// - integers: s/2 from rounding to a code. Around it, in real units: the quotient x / s errs by u|x| (with an offset
///   o, difference and quotient by 2u|x - o| <= 2u(L + 1)s), the product or fma by u|x| + us; and at the ends of the
///   grid, where codes are clamped, scale and zero point come from the range by five roundings, 5uLs. That is
///   2u|x| + (7L + 3)us, at most 2u|x| + 8us max(L, 3). 16-bit scales are stored first and the rest is fitted to them: nothing is added.
/// - nf4, fp4: s times half the widest gap, 2u|x| for quotient and product, and 2us for a product among the subnormals.
inline double error_bound(const Scheme& scheme, const Grid& grid, float x) noexcept {
  const double magnitude = std::fabs(static_cast<double>(x));
  const double s = std::fabs(static_cast<double>(grid.scale));
  constexpr double u = 0x1p-24;
  const auto half_ulp = [magnitude](int fraction_bits, int smallest_exponent) {
    const int exponent = magnitude > 0 ? std::max(std::ilogb(magnitude), smallest_exponent) : smallest_exponent;
    return std::ldexp(0.5, exponent - fraction_bits);
  };
  switch (scheme.format) {
    case Format::fp32: return 0.0;
    case Format::fp16: return half_ulp(10, -14);
    case Format::bf16: return half_ulp(7, -126);
    default: break;
  }
  if (is_codebook(scheme.format))
    return s * (static_cast<double>(widest_half_gap_of(scheme.format)) + 2.0 * u) + 2.0 * u * magnitude;
  const detail::CodeRange codes = detail::code_range(scheme);
  return s * (0.5 + 8.0 * u * std::max(codes.max - codes.min, 3)) + 2.0 * u * magnitude;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
