// From a quantized matrix to the kernels' layout, and back.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "nibble/formats/bf16.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

struct PackOptions {
  /// Keep the sum of each channel's values beside integer weights (4 bytes a channel): products with asymmetric
  /// activations need them.
  bool channel_sums = true;
  /// Threads to pack with; nullptr: the calling one.
  ThreadPool* pool = nullptr;
};

namespace detail {

/// Eight 4-bit codes, k ascending from the low nibble up -> one unit's four bytes (low nibbles 0..3, high 4..7).
constexpr std::uint32_t interleave_nibbles(std::uint32_t codes) noexcept {
  const auto spread = [](std::uint32_t half) {
    const std::uint32_t x = (half | half << 8) & 0x00FF00FFU;
    return (x | x << 4) & 0x0F0F0F0FU;
  };
  return spread(codes & 0xFFFFU) | spread(codes >> 16) << 4;
}

/// The inverse of interleave_nibbles.
constexpr std::uint32_t deinterleave_nibbles(std::uint32_t unit) noexcept {
  const auto gather = [](std::uint32_t x) {
    x &= 0x0F0F0F0FU;
    x = (x | x >> 4) & 0x00FF00FFU;
    return (x | x >> 8) & 0xFFFFU;
  };
  return gather(unit) | gather(unit >> 4) << 16;
}

/// Moves `bytes` of a row, four at a time, to or from words that lie one unit of all lanes apart. The last word's
/// missing bytes count as zeros.
template <bool Forward, class F>
void move_words(std::uint8_t* row, std::uint8_t* words, std::size_t bytes, F&& convert) noexcept {
  constexpr std::size_t unit = 4 * panel_width;
  std::uint32_t word = 0;
  std::size_t i = 0;
  for (; i + 4 <= bytes; i += 4, words += unit) {
    std::memcpy(&word, Forward ? row + i : words, 4);
    word = convert(word);
    std::memcpy(Forward ? words : row + i, &word, 4);
  }
  if (i == bytes) return;
  word = 0;
  std::memcpy(&word, Forward ? row + i : words, Forward ? bytes - i : 4);
  word = convert(word);
  std::memcpy(Forward ? words : row + i, &word, Forward ? 4 : bytes - i);
}

/// Copies one row between its C-order codes and its lane of a panel. `Forward`: row -> panel.
template <bool Forward>
void move_row(Format format, std::uint8_t* row, std::uint8_t* panel, std::size_t lane, std::size_t k) noexcept {
  if (k == 0) return;  // there may be no memory to point into
  const auto copy = [](std::uint8_t* in_row, std::uint8_t* in_panel, std::size_t bytes) {
    Forward ? std::memcpy(in_panel, in_row, bytes) : std::memcpy(in_row, in_panel, bytes);
  };
  switch (format) {
    case Format::fp32:
      for (std::size_t i = 0; i < k; ++i) copy(row + 4 * i, panel + (i * panel_width + lane) * 4, 4);
      break;
    case Format::fp16:
      for (std::size_t i = 0; i < k; ++i) copy(row + 2 * i, panel + (i * panel_width + lane) * 2, 2);
      break;
    case Format::bf16:
      for (std::size_t i = 0; i < k; ++i)
        copy(row + 2 * i, panel + ((i / 2 * panel_width + lane) * 2 + i % 2) * 2, 2);
      break;
    case Format::int8:
      // code + 128 is the code with its top bit flipped, either way.
      move_words<Forward>(row, panel + lane * 4, k, [](std::uint32_t word) { return word ^ 0x80808080U; });
      break;
    case Format::int4:
    case Format::nf4:
      move_words<Forward>(row, panel + lane * 4, ceil_div(k, 2),
                          Forward ? interleave_nibbles : deinterleave_nibbles);
      break;
  }
}

/// Which of the quantized matrix's parameters serves group g of a row in the kernels' grouping.
inline std::size_t parameter_of(const Granularity& granularity, std::size_t groups, std::size_t row,
                                std::size_t g) noexcept {
  switch (granularity.kind) {
    case Granularity::Kind::per_tensor: return 0;
    case Granularity::Kind::per_channel: return row;
    case Granularity::Kind::per_group: break;
  }
  return granularity.group_size == 0 ? row : row * groups + g;
}

/// Groups a row has in the quantized matrix (a kernel's may be more where one was split).
inline std::size_t quantized_groups(const PackedHeader& h) noexcept {
  return h.scheme.granularity.kind == Granularity::Kind::per_group
             ? ceil_div(h.cols, h.scheme.granularity.group_size)
             : 1;
}

/// Sum of each row's values, in the order that a product with a token of ones has.
inline Buffer channel_sums_of(const PanelView& w, std::size_t panels) {
  Buffer sums(panels * panel_width * sizeof(float));
  std::vector<std::int8_t> ones(w.k_padded, 0);
  std::fill_n(ones.begin(), w.k, std::int8_t{1});
  std::vector<std::int32_t> group_sums(w.groups);
  for (std::size_t g = 0; g < w.groups; ++g)
    group_sums[g] = static_cast<std::int32_t>(std::min(w.group_size, w.k - g * w.group_size));
  IntGemmArgs args;
  args.w = w;
  args.panel_end = panels;
  args.x = ones.data();
  args.x_stride = w.k_padded;
  args.x_sums = group_sums.data();
  args.sums_stride = w.groups;
  args.rows = 1;
  args.acc = sums.as_mutable<float>();
  args.acc_stride = panels * panel_width;
  const KernelTable& kernels = detail::kernels();
  (w.format == Format::int8 ? kernels.gemm_w8a8 : kernels.gemm_w4a8)(args);
  return sums;
}

}  // namespace detail

/// Packs a quantized n x k matrix for the kernels. Its scales lie along k: per tensor, per channel of axis 0, or per
/// group of axis 1. Throws InvalidArgument for a tensor of another rank, Unsupported for another granularity.
inline PackedMatrix pack(const QuantizedTensor& q, const PackOptions& options = {}) {
  const detail::FpEnvironment environment;
  detail::require(q.rank() == 2, "pack takes a matrix; the tensor has rank ", q.rank());
  const PackedHeader header{q.scheme(), q.shape()[0], q.shape()[1]};
  const Granularity& granularity = header.scheme.granularity;
  const detail::PackedShape shape = detail::shape_of(header);
  Buffer codes(shape.codes_bytes);
  Buffer scales(shape.scales_bytes);
  Buffer zeros(shape.zeros_bytes);
  const std::size_t panel_bytes = detail::panel_bytes_of(header.scheme.format, shape.k_padded);
  const std::size_t quantized_groups = detail::quantized_groups(header);
  std::uint8_t* codes_out = codes.mutable_data();
  std::uint8_t* scales_out = scales.mutable_data();
  std::uint8_t* zeros_out = zeros.mutable_data();
  const std::size_t line_bytes = q.line_bytes();

  // One row's parameters into their lane; a bfloat16 becomes the float of the same value.
  const auto place = [&](const Buffer& from, std::uint8_t* to, auto type, auto convert, std::size_t panel,
                         std::size_t lane, std::size_t row) {
    auto* target =
        reinterpret_cast<decltype(convert(type))*>(to) + panel * shape.groups * detail::panel_width + lane;
    for (std::size_t g = 0; g < shape.groups; ++g)
      target[g * detail::panel_width] = convert(detail::scalar::load<decltype(type)>(
          from.data(), detail::parameter_of(granularity, quantized_groups, row, g)));
  };
  const auto same = [](auto value) { return value; };
  const auto place_scales = [&](const Buffer& from, std::uint8_t* to, std::size_t panel, std::size_t lane,
                                std::size_t row) {
    switch (header.scheme.scale_type) {
      case ScaleType::fp32: place(from, to, 0.0F, same, panel, lane, row); break;
      case ScaleType::fp16: place(from, to, std::uint16_t{}, same, panel, lane, row); break;
      case ScaleType::bf16: place(from, to, std::uint16_t{}, float_from_bf16, panel, lane, row); break;
    }
  };

  detail::for_tasks(options.pool, shape.panels, [&](std::size_t panel, std::size_t) {
    for (std::size_t lane = 0; lane < detail::panel_width; ++lane) {
      const std::size_t row = panel * detail::panel_width + lane;
      if (row >= header.rows) break;
      // The row is only read: Forward copies into the panel.
      auto* line = const_cast<std::uint8_t*>(q.codes().data()) + row * line_bytes;
      detail::move_row<true>(header.scheme.format, line, codes_out + panel * panel_bytes, lane, header.cols);
      if (shape.params == 0) continue;
      place_scales(q.scales(), scales_out, panel, lane, row);
      if (header.scheme.symmetry == Symmetry::asymmetric)
        place(q.zeros(), zeros_out, std::int8_t{}, same, panel, lane, row);
      if (header.scheme.symmetry == Symmetry::float_offset) place_scales(q.zeros(), zeros_out, panel, lane, row);
    }
  });

  PackedMatrix packed = PackedMatrix::from_parts(header, codes, scales, zeros);
  if (!options.channel_sums || !is_integer(header.scheme.format) || shape.params == 0) return packed;
  return PackedMatrix::from_parts(header, std::move(codes), std::move(scales), std::move(zeros),
                                  detail::channel_sums_of(packed.view(), shape.panels));
}

template <class Q, class Kind>
PackedMatrix pack(const Quantized<Q, Kind>& q, const PackOptions& options = {}) {
  return pack(q.erased(), options);
}

/// Packs a matrix as fp32 values, for the float products.
template <class Derived>
PackedMatrix pack(const Eigen::MatrixBase<Derived>& w, const PackOptions& options = {}) {
  const std::size_t rows = static_cast<std::size_t>(w.rows());
  const std::size_t cols = static_cast<std::size_t>(w.cols());
  Buffer codes(detail::checked_mul(detail::checked_mul(rows, cols, "w"), sizeof(float), "w"));
  using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Eigen::Map<RowMajor>(codes.as_mutable<float>(), w.rows(), w.cols()) = w.template cast<float>();
  return pack(QuantizedTensor::from_parts({}, {rows, cols}, std::move(codes)), options);
}

inline QuantizedTensor PackedMatrix::unpack() const {
  const std::size_t quantized_groups = detail::quantized_groups(header_);
  const Granularity& granularity = header_.scheme.granularity;
  const std::size_t line_bytes = detail::checked_mul(header_.cols, bits_of(format()), "line") / 8 +
                                 (header_.cols * bits_of(format()) % 8 != 0 ? 1 : 0);
  std::size_t params = 0;
  if (has_scales(format())) {
    params = granularity.kind == Granularity::Kind::per_tensor ? 1 : header_.rows * quantized_groups;
    if (shape_.params == 0 && granularity.kind == Granularity::Kind::per_group) params = 0;
  }
  const std::size_t size = bytes_of(scheme().scale_type);
  Buffer codes(header_.rows * line_bytes);
  Buffer scales(params * size);
  Buffer zeros(symmetry() == Symmetry::symmetric ? 0 : params * (symmetry() == Symmetry::asymmetric ? 1 : size));
  const std::size_t panel_bytes = detail::panel_bytes_of(format(), shape_.k_padded);
  const bool narrow = scheme().scale_type == ScaleType::bf16;
  const auto place = [&](const Buffer& from, std::uint8_t* to, std::size_t packed_size, bool narrowing,
                         std::size_t row) {
    for (std::size_t g = 0; g < shape_.groups; ++g) {
      const std::size_t panel = row / detail::panel_width;
      const std::size_t source = (panel * shape_.groups + g) * detail::panel_width + row % detail::panel_width;
      const std::size_t target = detail::parameter_of(granularity, quantized_groups, row, g);
      if (narrowing) {
        const std::uint16_t value = bf16_from_float(detail::scalar::load<float>(from.data(), source));
        std::memcpy(to + target * 2, &value, sizeof value);
      } else {
        std::memcpy(to + target * packed_size, from.data() + source * packed_size, packed_size);
      }
    }
  };
  for (std::size_t row = 0; row < header_.rows; ++row) {
    // The panel is only read: not Forward copies out of it.
    auto* panel = const_cast<std::uint8_t*>(codes_.data()) + row / detail::panel_width * panel_bytes;
    detail::move_row<false>(format(), codes.mutable_data() + row * line_bytes, panel, row % detail::panel_width,
                            header_.cols);
    if (params == 0) continue;
    const std::size_t packed_size = bytes_of(shape_.scale_type);
    place(scales_, scales.mutable_data(), packed_size, narrow, row);
    if (symmetry() == Symmetry::asymmetric) place(zeros_, zeros.mutable_data(), 1, false, row);
    if (symmetry() == Symmetry::float_offset) place(zeros_, zeros.mutable_data(), packed_size, narrow, row);
  }
  return QuantizedTensor::from_parts(scheme(), {header_.rows, header_.cols}, std::move(codes), std::move(scales),
                                     std::move(zeros));
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
