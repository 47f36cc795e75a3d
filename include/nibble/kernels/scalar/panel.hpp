// Reading one element of a packed matrix: the panel16 layout in executable form.
#pragma once

#include <cmath>
#include <cstring>

#include "nibble/core/fp_env.hpp"
#include "nibble/formats/bf16.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/scalar/bit_planes.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// Bytes of one panel's codes; those of the formats in planes begin at multiples of 64, as all others do by themselves.
constexpr std::size_t panel_bytes_of(Format format, std::size_t k_padded) noexcept {
  const std::size_t bytes = panel_width * k_padded * bits_of(format) / 8;
  return is_bit_stream(format) ? (bytes + 63) / 64 * 64 : bytes;
}

namespace scalar {

/// Loads a T from memory of any alignment.
template <class T>
T load(const void* base, std::size_t index) noexcept {
  T value;
  std::memcpy(&value, static_cast<const std::uint8_t*>(base) + index * sizeof(T), sizeof(T));
  return value;
}

/// Code as a quantized tensor stores it.
inline std::int32_t code_at(const PanelView& w, std::size_t panel, std::size_t lane, std::size_t k) noexcept {
  const std::uint8_t* codes = w.codes + panel * w.panel_bytes;
  if (w.format == Format::int8)
    return static_cast<std::int32_t>(codes[(k / 4 * panel_width + lane) * 4 + k % 4]) - 128;
  if (is_bit_stream(w.format)) {
    const std::uint8_t* unit = codes + k / bits_k_unit * bits_unit_bytes(w.format);
    return static_cast<std::int32_t>(lane_code(bits_of(w.format), unit, lane, k % bits_k_unit));
  }
  const std::uint8_t byte = codes[(k / 8 * panel_width + lane) * 4 + k % 4];
  return k % 8 < 4 ? byte & 15 : byte >> 4;
}

inline float storage_to_float(const void* base, ScaleType type, std::size_t index) noexcept {
  if (type == ScaleType::fp32) return load<float>(base, index);
  const auto bits = load<std::uint16_t>(base, index);
  return type == ScaleType::fp16 ? float_from_fp16(bits) : float_from_bf16(bits);
}

/// `param` is (panel * groups + group) * 16 + lane.
inline float scale_at(const PanelView& w, std::size_t param) noexcept {
  return storage_to_float(w.scales, w.scale_type, param);
}
inline float offset_at(const PanelView& w, std::size_t param) noexcept {
  return storage_to_float(w.zeros, w.scale_type, param);
}
inline std::int32_t integer_zero(const PanelView& w, std::size_t param) noexcept {
  if (w.symmetry == Symmetry::asymmetric) return static_cast<const std::int8_t*>(w.zeros)[param];
  return w.symmetry == Symmetry::symmetric ? symmetric_zero_of(w.format) : 0;
}

/// The real value of one element: what dequantize gives.
inline float value_at(const PanelView& w, std::size_t panel, std::size_t lane, std::size_t k) noexcept {
  const std::uint8_t* codes = w.codes + panel * w.panel_bytes;
  switch (w.format) {
    case Format::fp32: return load<float>(codes, k * panel_width + lane);
    case Format::fp16: return float_from_fp16(load<std::uint16_t>(codes, k * panel_width + lane));
    case Format::bf16:
      return float_from_bf16(load<std::uint16_t>(codes, (k / 2 * panel_width + lane) * 2 + k % 2));
    default: break;
  }
  const std::size_t param = (panel * w.groups + k / w.group_size) * panel_width + lane;
  const std::int32_t q = code_at(w, panel, lane, k);
  const float scale = scale_at(w, param);
  if (is_codebook(w.format)) return rounded(scale * w.codebook[q]);
  if (w.symmetry == Symmetry::float_offset) return std::fma(scale, static_cast<float>(q), offset_at(w, param));
  return rounded(scale * static_cast<float>(q - integer_zero(w, param)));
}

}  // namespace scalar
}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
