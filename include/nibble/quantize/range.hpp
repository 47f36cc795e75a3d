// Ranges of values, the grids that cover them, and the interface of whatever finds ranges in data.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/quantize/line_codec.hpp"
#include "nibble/quantize/scheme.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Values lo..hi that a grid is to cover; what lies outside is clamped. lo > hi means "nothing seen": zeros.
struct Range {
  float lo = std::numeric_limits<float>::infinity();
  float hi = -std::numeric_limits<float>::infinity();

  void include(float value) noexcept {
    lo = value < lo ? value : lo;
    hi = value > hi ? value : hi;
  }
};

/// One range a parameter, in the order of QuantizedTensor::param_shape().
using Ranges = std::vector<Range>;

/// Finds ranges in data; calibrators derive from it. All data that it is shown is finite.
class RangeObserver {
 public:
  RangeObserver() = default;
  RangeObserver(const RangeObserver&) = default;
  RangeObserver& operator=(const RangeObserver&) = default;
  virtual ~RangeObserver() = default;

  /// Before each tensor: how many parameters its scheme has.
  virtual void begin(std::size_t params) = 0;
  /// n more values that share parameter `param`; any number of calls of any n >= 1.
  virtual void observe(std::size_t param, const float* x, std::size_t n) = 0;
  /// The range of `param`, from all tensors so far.
  virtual Range range(std::size_t param) const = 0;
};

/// Smallest and largest value of all tensors observed.
class MinMaxObserver final : public RangeObserver {
 public:
  void begin(std::size_t params) override {
    detail::require(ranges_.empty() || ranges_.size() == params, "observer has seen tensors of ", ranges_.size(),
                    " parameters, this one has ", params);
    ranges_.resize(params);
  }
  void observe(std::size_t param, const float* x, std::size_t n) override {
    if (n == 1) return ranges_[param].include(*x);
    const detail::LineRange r = detail::kernels().line_range(x, n);
    ranges_[param].include(r.min);
    ranges_[param].include(r.max);
  }
  Range range(std::size_t param) const override { return ranges_[param]; }

 private:
  Ranges ranges_;
};

namespace detail {

/// The nearest value that the storage type holds; Inf beyond its largest.
inline float round_to(ScaleType type, float v) noexcept {
  switch (type) {
    case ScaleType::fp32: return v;
    case ScaleType::fp16: return float_from_fp16(fp16_from_float(v));
    case ScaleType::bf16: return float_from_bf16(bf16_from_float(v));
  }
  return v;
}

/// The next larger (steps = 1) or smaller (-1) value of the storage type. v is one of its values and positive: the
/// bits of positive floats ascend with them.
inline float step_to(ScaleType type, float v, int steps) noexcept {
  const auto delta = static_cast<std::uint32_t>(steps);
  switch (type) {
    case ScaleType::fp32: return float_from_bits(bits_from_float(v) + delta);
    case ScaleType::fp16: return float_from_fp16(static_cast<std::uint16_t>(fp16_from_float(v) + delta));
    case ScaleType::bf16: return float_from_bf16(static_cast<std::uint16_t>(bf16_from_float(v) + delta));
  }
  return v;
}

/// Smallest scale: the smallest normal number, so that x / scale cannot overflow and scale * code is exact enough;
/// fp16's range is so short that its subnormals are used.
constexpr float smallest_scale(ScaleType type) noexcept {
  return type == ScaleType::fp16 ? 0x1p-24F : std::numeric_limits<float>::min();
}

/// Grids for ranges under one scheme. All in float with the roundings that KernelTable::quantize_rows documents;
/// with 16-bit scales the stored value comes first and everything else is fitted to it.
class GridFitter {
 public:
  explicit GridFitter(const Scheme& scheme) : scheme_(scheme), codes_(code_range(scheme)) {}

  /// Throws InvalidArgument, naming parameter p, where a scale or offset would not fit its storage type.
  Grid fit(Range r, std::size_t p) const {
    if (r.lo > r.hi) r = {0.0F, 0.0F};
    require(scalar::is_finite(r.lo) && scalar::is_finite(r.hi), "range ", p, " is not finite");
    Grid g;
    switch (scheme_.symmetry) {
      case Symmetry::symmetric: g = symmetric(r); break;
      case Symmetry::asymmetric: g = asymmetric(r); break;
      case Symmetry::float_offset: g = float_offset(r, p); break;
    }
    require(scalar::is_finite(g.scale) && scalar::is_finite(g.offset), "range ", p, " is [", r.lo, ", ", r.hi,
            "]: its scale or offset does not fit ", name_of(scheme_.scale_type), ", use a wider scale type");
    // Rounding may put the outermost code just beyond the largest float.
    if (!ends_finite(g)) g.scale = step_to(scheme_.scale_type, g.scale, -1);
    require(ends_finite(g), "range ", p, " is [", r.lo, ", ", r.hi, "]: its outermost code would overflow");
    return g;
  }

 private:
  bool narrow() const noexcept { return scheme_.scale_type != ScaleType::fp32; }
  float stored(float v) const noexcept { return round_to(scheme_.scale_type, v); }
  float stored_scale(float v) const noexcept { return std::max(stored(v), smallest_scale(scheme_.scale_type)); }
  float next(float scale) const noexcept { return step_to(scheme_.scale_type, scale, 1); }

  /// Steps of scale s that the grid must reach to come within half a step of both ends, per step that it has: more
  /// than 1 where it falls short. In double: exact enough to decide.
  double shortfall(const Grid& g, const Range& r) const noexcept {
    const double zero = static_cast<double>(g.zero);
    const double above = (static_cast<double>(r.hi) - static_cast<double>(g.offset)) / (codes_.max - zero + 0.5);
    const double below = (static_cast<double>(g.offset) - static_cast<double>(r.lo)) / (zero - codes_.min + 0.5);
    return std::max(above, below) / static_cast<double>(g.scale);
  }

  Grid symmetric(const Range& r) const noexcept {
    Grid g;
    g.zero = symmetric_zero_of(scheme_.format);
    if (is_codebook(scheme_.format)) {
      const float absmax = std::max(-r.lo, r.hi);
      if (absmax > 0.0F) g.scale = stored_scale(absmax);
      // Only among fp16's subnormals is a stored scale so coarse.
      const double reach = 1.0 + static_cast<double>(widest_half_gap_of(scheme_.format));
      if (narrow() && static_cast<double>(absmax) > reach * static_cast<double>(g.scale)) g.scale = next(g.scale);
      return g;
    }
    // Both divisors are the same unless the lowest code is in use: then this is absmax / 127 or / 7.
    const float below = rounded(-r.lo / static_cast<float>(g.zero - codes_.min));
    const float above = rounded(r.hi / static_cast<float>(codes_.max - g.zero));
    if (r.lo != 0.0F || r.hi != 0.0F) g.scale = stored_scale(std::max(below, above));
    if (narrow() && shortfall(g, r) > 1.0) g.scale = next(g.scale);
    return g;
  }

  Grid asymmetric(Range r) const noexcept {
    r.lo = std::min(r.lo, 0.0F);
    r.hi = std::max(r.hi, 0.0F);
    const float steps = static_cast<float>(codes_.max - codes_.min);
    Grid g;
    if (r.lo < 0.0F || r.hi > 0.0F) g.scale = stored_scale(rounded(rounded(r.hi / steps) - rounded(r.lo / steps)));
    for (int attempt = 0;; ++attempt) {
      const float lowest = rounded(static_cast<float>(codes_.min) - rounded(r.lo / g.scale));
      g.zero = scalar::to_code(lowest, 0, codes_.min, codes_.max);
      if (!narrow() || attempt == 2 || shortfall(g, r) <= 1.0) return g;
      g.scale = next(g.scale);
    }
  }

  Grid float_offset(const Range& r, std::size_t p) const {
    const float width = rounded(r.hi - r.lo);
    require(scalar::is_finite(width), "range ", p, " is [", r.lo, ", ", r.hi, "]: its width overflows");
    const float steps = static_cast<float>(codes_.max - codes_.min);
    Grid g;
    // A constant that is not zero keeps a tiny scale: a large one would drown it in the offset.
    if (r.lo != 0.0F || r.hi != 0.0F) g.scale = stored_scale(rounded(width / steps));
    // The offset is rounded too. Where values are large beside their spread, its error e exceeds half a step and the
    // end of the data drops off the grid: widen to 2e. That moves an int8 offset and so makes another e; a step of an
    // ulp of the offset is enough for any.
    for (int attempt = 0;; ++attempt) {
      const double exact = static_cast<double>(r.lo) - codes_.min * static_cast<double>(g.scale);
      g.offset = stored(std::fma(static_cast<float>(-codes_.min), g.scale, r.lo));
      if (!(shortfall(g, r) > 1.0) || attempt == 8 || !scalar::is_finite(g.offset)) return g;
      const float magnitude = std::fabs(g.offset);
      const float ulp = rounded(step_to(scheme_.scale_type, magnitude, 1) - magnitude);
      const auto error = static_cast<float>(std::fabs(static_cast<double>(g.offset) - exact));
      g.scale = std::max(next(g.scale), stored(attempt < 4 ? 2.0F * error : ulp));
    }
  }

  bool ends_finite(const Grid& g) const noexcept {
    const ParamStorage params{scheme_.format, scheme_.symmetry, scheme_.scale_type, nullptr, nullptr, codes_};
    return scalar::is_finite(decode(params, g, codes_.min)) && scalar::is_finite(decode(params, g, codes_.max));
  }

  Scheme scheme_;
  CodeRange codes_;
};

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
