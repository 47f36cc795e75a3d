// Weights of 2, 3, 5 and 6 bits on the integer kernels of 4 and 8.
#pragma once

#include <cstddef>
#include <cstdint>

#include "nibble/kernels/table.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// The integer kernel of a format that has one of its own.
inline auto int_kernel(const KernelTable& kernels, Format format) noexcept {
  return format == Format::int8 ? kernels.gemm_w8a8 : kernels.gemm_w4a8;
}

/// Whether a product of `rows` tokens has to be expanded before an integer kernel takes it.
inline bool needs_expansion(const KernelTable& kernels, Format format, std::size_t rows) noexcept {
  return is_bit_stream(format) && rows > kernels.gemm_bits_rows;
}

/// Bytes of a panel that is expanded.
inline std::size_t expanded_panel_bytes(const PanelView& w) noexcept {
  return panel_width * w.k_padded * bits_of(expanded_format(w.format)) / 8;
}

/// `a` over its panels expanded into `room` (expanded_panel_bytes() for each of them): the same sums, bit for bit. What
/// lies in the room serves any other tokens of the same panels: expand_panels() once, then on_expanded() for each call.
inline void expand_panels(const KernelTable& kernels, const PanelView& w, std::size_t begin, std::size_t end,
                          std::uint8_t* room) noexcept {
  kernels.expand({w, begin, end, room, expanded_panel_bytes(w)});
}
inline IntGemmArgs on_expanded(const IntGemmArgs& a, const std::uint8_t* room) noexcept {
  IntGemmArgs e = a;
  const std::size_t params = a.panel_begin * scale_groups(a.w.groups, a.group_shift) * panel_width;
  e.w.format = expanded_format(a.w.format);
  e.w.codes = room;
  e.w.panel_bytes = expanded_panel_bytes(a.w);
  e.w.n = (a.panel_end - a.panel_begin) * panel_width;
  e.w.scales = static_cast<const std::uint8_t*>(a.w.scales) + params * bytes_of(a.w.scale_type);
  if (a.w.zeros != nullptr)
    e.w.zeros = static_cast<const std::uint8_t*>(a.w.zeros) +
                params * (a.w.symmetry == Symmetry::asymmetric ? 1 : bytes_of(a.w.scale_type));
  e.panel_begin = 0;
  e.panel_end = a.panel_end - a.panel_begin;
  return e;
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
