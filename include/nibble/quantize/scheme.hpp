// What a quantized tensor is: format, symmetry, granularity and the type of its scales, as run-time values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Which elements share a scale.
struct Granularity {
  enum class Kind : std::uint8_t {
    per_tensor = 0,   ///< all of them
    per_channel = 1,  ///< those with the same index along `axis`
    per_group = 2,    ///< runs of `group_size` along `axis`, everything else fixed; the last run may be shorter
  };
  Kind kind = Kind::per_tensor;
  int axis = 0;  ///< negative counts from the end: -1 is the last dimension, the contraction axis of weights
  std::size_t group_size = 0;  ///< elements; a multiple of 16 where kind is per_group, else 0

  static constexpr Granularity per_tensor() noexcept { return {}; }
  static constexpr Granularity per_channel(int axis = 0) noexcept { return {Kind::per_channel, axis, 0}; }
  static constexpr Granularity per_group(std::size_t size, int axis = -1) noexcept {
    return {Kind::per_group, axis, size};
  }

  friend constexpr bool operator==(const Granularity& a, const Granularity& b) noexcept {
    return a.kind == b.kind && a.axis == b.axis && a.group_size == b.group_size;
  }
  friend constexpr bool operator!=(const Granularity& a, const Granularity& b) noexcept { return !(a == b); }
};

/// The run-time twin of the Quantizer type.
struct Scheme {
  Format format = Format::fp32;
  Symmetry symmetry = Symmetry::symmetric;
  Granularity granularity;
  ScaleType scale_type = ScaleType::fp32;
  /// Symmetric integers only. With h = 2^(bits - 1), i.e. 128 for int8 and 8 for int4, false: the grid ends at
  /// +-(h - 1), scale = absmax / (h - 1); int2 then has -1, 0 and 1. true: it uses the lowest code as well, -h..h - 1,
  /// scale = max(-min / h, max / (h - 1)): finer where the largest magnitude is negative. Only quantizing differs; codes
  /// and equations are the same.
  bool full_range = false;

  friend constexpr bool operator==(const Scheme& a, const Scheme& b) noexcept {
    return a.format == b.format && a.symmetry == b.symmetry && a.granularity == b.granularity &&
           a.scale_type == b.scale_type && a.full_range == b.full_range;
  }
  friend constexpr bool operator!=(const Scheme& a, const Scheme& b) noexcept { return !(a == b); }
};

/// Lengths of a tensor's dimensions, outermost first; the last one is contiguous in storage (C order).
using Shape = std::vector<std::size_t>;

/// Most dimensions that a tensor may have.
inline constexpr std::size_t max_rank = 8;

namespace detail {

constexpr std::string_view name_of(Granularity::Kind kind) noexcept {
  return kind == Granularity::Kind::per_tensor    ? "per_tensor"
         : kind == Granularity::Kind::per_channel ? "per_channel"
                                                  : "per_group";
}

/// Lowest and highest code as stored, symmetric_zero_of() being zero where the format is symmetric.
struct CodeRange {
  int min = 0;
  int max = 0;
};

constexpr CodeRange code_range(const Scheme& s) noexcept {
  if (!has_scales(s.format)) return {};
  const int codes = 1 << bits_of(s.format);
  const int lowest = s.format == Format::int8 ? -codes / 2 : 0;
  const bool without_lowest = is_integer(s.format) && s.symmetry == Symmetry::symmetric && !s.full_range;
  return {lowest + (without_lowest ? 1 : 0), lowest + codes - 1};
}

inline std::string shape_text(const Shape& shape) {
  std::string text = "(";
  for (std::size_t d = 0; d < shape.size(); ++d) text += (d != 0 ? ", " : "") + std::to_string(shape[d]);
  return text + ")";
}

inline std::size_t element_count(const Shape& shape) {
  std::size_t count = 1;
  for (std::size_t length : shape) count = checked_mul(count, length, "shape");
  return count;
}

/// Checks `scheme` against `shape` and gives its canonical form: axis counted from the front, and whatever does not
/// matter set to its default, so that equal schemes compare equal.
inline Scheme resolve(const Scheme& scheme, const Shape& shape) {
  using Kind = Granularity::Kind;
  require(scheme.format <= all_formats.back(), "scheme: unknown format ", static_cast<int>(scheme.format));
  require(scheme.symmetry <= Symmetry::float_offset, "scheme: unknown symmetry ",
          static_cast<int>(scheme.symmetry));
  require(scheme.scale_type <= ScaleType::bf16, "scheme: unknown scale type ",
          static_cast<int>(scheme.scale_type));
  require(scheme.granularity.kind <= Kind::per_group, "scheme: unknown granularity ",
          static_cast<int>(scheme.granularity.kind));
  require(shape.size() <= max_rank, "tensor has ", shape.size(), " dimensions, at most ", max_rank,
          " are possible");
  if (!has_scales(scheme.format)) return {scheme.format, Symmetry::symmetric, {}, ScaleType::fp32, false};

  require(is_integer(scheme.format) || scheme.symmetry == Symmetry::symmetric, "scheme: ", name_of(scheme.format),
          " is symmetric only, not ", name_of(scheme.symmetry));
  Scheme r = scheme;
  r.full_range = scheme.full_range && is_integer(scheme.format) && scheme.symmetry == Symmetry::symmetric;
  Granularity& g = r.granularity;
  if (g.kind == Kind::per_tensor) {
    g = {};
    return r;
  }
  const int rank = static_cast<int>(shape.size());
  require(g.axis >= -rank && g.axis < rank, "scheme: axis ", g.axis, " does not exist in shape ",
          shape_text(shape));
  if (g.axis < 0) g.axis += rank;
  if (g.kind == Kind::per_channel) {
    g.group_size = 0;
  } else {
    require(g.group_size != 0 && g.group_size % 16 == 0, "scheme: group size is ", g.group_size,
            ", expected a multiple of 16");
  }
  return r;
}

/// Where the elements of one line find their parameters: element i uses parameter index(i).
/// step 0: all use `base`. div > 1: runs of div along the line. step 1, div 1: each has its own.
struct LineParams {
  std::size_t base = 0;
  std::size_t div = 1;
  std::size_t step = 0;
  constexpr std::size_t index(std::size_t i) const noexcept { return base + i / div * step; }
  constexpr bool per_element() const noexcept { return step != 0 && div == 1; }
};

/// Where the parameters of a tensor lie: its shape with the quantized axis replaced by the number of groups (for
/// channels: by the channels, all else dropped), C order. A line is a run along the last dimension; lines are
/// numbered in C order.
class ParamLayout {
 public:
  ParamLayout() = default;

  /// `granularity` must be resolved.
  ParamLayout(const Granularity& granularity, const Shape& shape) : g_(granularity) {
    using Kind = Granularity::Kind;
    if (g_.kind == Kind::per_tensor) return;
    const auto axis = static_cast<std::size_t>(g_.axis);
    const std::size_t last = shape.size() - 1;
    axis_length_ = shape[axis];
    along_line_ = axis == last;
    if (g_.kind == Kind::per_channel) {
      shape_ = {axis_length_};
    } else {
      shape_ = shape;
      shape_[axis] = groups_ = ceil_div(axis_length_, g_.group_size);
    }
    count_ = element_count(shape_);
    if (along_line_) return;
    for (std::size_t d = axis + 1; d < last; ++d) inner_lines_ = checked_mul(inner_lines_, shape[d], "shape");
    last_length_ = shape[last];
  }

  std::size_t count() const noexcept { return count_; }
  const Shape& shape() const noexcept { return shape_; }

  LineParams line(std::size_t l) const noexcept {
    using Kind = Granularity::Kind;
    if (g_.kind == Kind::per_tensor) return {};
    if (along_line_) {
      if (g_.kind == Kind::per_channel) return {0, 1, 1};
      return {l * groups_, g_.group_size, 1};
    }
    const std::size_t a = l / inner_lines_ % axis_length_;
    if (g_.kind == Kind::per_channel) return {a, 1, 0};
    const std::size_t outer = l / inner_lines_ / axis_length_;
    return {((outer * groups_ + a / g_.group_size) * inner_lines_ + l % inner_lines_) * last_length_, 1, 1};
  }

 private:
  Granularity g_;
  Shape shape_;
  std::size_t count_ = 1;
  std::size_t axis_length_ = 1;
  std::size_t groups_ = 1;
  std::size_t inner_lines_ = 1;
  std::size_t last_length_ = 1;
  bool along_line_ = false;
};

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
