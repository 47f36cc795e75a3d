// What the integer kernels of all ISAs know about a packed matrix: groups, parameters, the float steps. Written
// over int_ops, whose registers hold int_ops::lanes channels. Included by the ISAs' table.hpp, in their regions.
//
// D = sum (q - zero) * x is had as sum u * x - (zero + bias) * S, where u is the byte that the multiplier sees and
// S the group's sum of x. Everything is modulo 2^32, so only D itself has to fit.

namespace int_params {

using int_ops::Float;
using int_ops::Int;

/// 8 k of 16 channels of int8: 128 bytes, codes stored + 128.
struct Codes8 {
  static constexpr std::size_t unit_bytes = 128;
  static constexpr std::int32_t bias = 128;
  static constexpr std::int32_t symmetric_shift = 7;
  static constexpr std::int32_t plain_shift = 7;
};
/// 8 k of 16 channels of int4: 64 bytes, low nibbles the first 4 k, codes 0..15.
struct Codes4 {
  static constexpr std::size_t unit_bytes = 64;
  static constexpr std::int32_t bias = 0;
  static constexpr std::int32_t symmetric_shift = 3;
  static constexpr std::int32_t plain_shift = 32;
};

/// One panel: where its codes and its first group's parameters are.
struct Panel {
  const std::uint8_t* codes = nullptr;
  std::size_t param = 0;  // index into scales and zeros
};

NIBBLE_ALWAYS_INLINE Panel panel_at(const IntGemmArgs& a, std::size_t panel) noexcept {
  return {a.w.codes + panel * a.w.panel_bytes, panel * scale_groups(a.w.groups, a.group_shift) * panel_width};
}

/// Group g's parameters, from the panel's first.
NIBBLE_ALWAYS_INLINE std::size_t param_offset(const IntGemmArgs& a, std::size_t g) noexcept {
  return (g >> a.group_shift) * panel_width;
}

/// Units of 8 k that group g has.
NIBBLE_ALWAYS_INLINE std::size_t group_units(const PanelView& w, std::size_t g) noexcept {
  const std::size_t begin = g * w.group_size;
  const std::size_t end = begin + w.group_size < w.k_padded ? begin + w.group_size : w.k_padded;
  return (end - begin) / k_unit;
}

/// Values of the weights' scale type, fp32.
NIBBLE_ALWAYS_INLINE Float load_param(const PanelView& w, const void* base, std::size_t index) noexcept {
  if (w.scale_type == ScaleType::fp32) return int_ops::load_float(static_cast<const float*>(base) + index);
  return int_ops::load_half(static_cast<const std::uint16_t*>(base) + index);
}
NIBBLE_ALWAYS_INLINE Float load_scale(const PanelView& w, std::size_t index) noexcept {
  return load_param(w, w.scales, index);
}
/// 0 where there are no offsets.
NIBBLE_ALWAYS_INLINE Float load_offset(const PanelView& w, std::size_t index) noexcept {
  return w.symmetry == Symmetry::float_offset ? load_param(w, w.zeros, index) : int_ops::zero_float();
}

/// log2 of what every code is too large by, or 32 (which shifts everything out) where that is nothing.
template <class Codes>
NIBBLE_ALWAYS_INLINE Int bias_shift(Symmetry symmetry) noexcept {
  return int_ops::set_int(symmetry == Symmetry::symmetric ? Codes::symmetric_shift : Codes::plain_shift);
}

/// zero + bias of asymmetric weights.
template <class Codes>
NIBBLE_ALWAYS_INLINE Int total_zero(const PanelView& w, std::size_t index) noexcept {
  return int_ops::add(int_ops::widen_s8(static_cast<const std::int8_t*>(w.zeros) + index),
                      int_ops::set_int(Codes::bias));
}

/// -2^shift * S.
NIBBLE_ALWAYS_INLINE Int start_shifted(const std::int32_t* sum, Int shift) noexcept {
  return int_ops::sub(int_ops::zero_int(), int_ops::shift_left(int_ops::broadcast4(sum), shift));
}
/// -zero * S.
NIBBLE_ALWAYS_INLINE Int start_multiplied(const std::int32_t* sum, Int zero) noexcept {
  return int_ops::sub(int_ops::zero_int(), int_ops::mul(zero, int_ops::broadcast4(sum)));
}

/// acc = fma(scale, D, acc), and the float offset's term: IntGemmArgs' steps, all variants. sum_index is the row's
/// and group's place in x_sums and x_scales.
NIBBLE_ALWAYS_INLINE Float finish(const IntGemmArgs& a, Float scale, Float offset, Int d, std::size_t sum_index,
                                  Float acc) noexcept {
  const bool has_offset = a.w.symmetry == Symmetry::float_offset;
  if (a.x_scales == nullptr) {
    acc = int_ops::fma(scale, int_ops::to_float(d), acc);
    if (has_offset) acc = int_ops::fma(offset, int_ops::to_float(int_ops::broadcast4(a.x_sums + sum_index)), acc);
    return acc;
  }
  Float t = int_ops::mul(scale, int_ops::to_float(d));
  if (has_offset) t = int_ops::fma(offset, int_ops::to_float(int_ops::broadcast4(a.x_sums + sum_index)), t);
  return int_ops::fma(int_ops::set_float(a.x_scales[sum_index]), t, acc);
}

}  // namespace int_params
