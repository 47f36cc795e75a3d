// From a quantized matrix to the kernels' layout, and back.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "nibble/formats/bf16.hpp"
#include "nibble/formats/bit_stream.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/gemm/expand.hpp"
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

/// What a row of codes consists of for the kernels that transpose it.
inline LaneElement lane_element(Format format) noexcept {
  switch (format) {
    case Format::fp32: return LaneElement::words;
    case Format::fp16: return LaneElement::halves;
    case Format::bf16: return LaneElement::words;  // two k
    case Format::int8: return LaneElement::int8_codes;
    default: break;
  }
  return LaneElement::int4_codes;
}

/// move_codes of the formats in planes, whose units of 16 k are 2 * bits bytes of a row.
template <bool to_lanes>
void move_bit_codes(Format format, std::uint8_t* rows, std::size_t line_bytes, std::size_t row_count,
                    std::uint8_t* panel) noexcept {
  if (line_bytes == 0) return;  // null pointers may come with no bytes, and memset takes none
  const unsigned bits = bits_of(format);
  const std::size_t step = bits_unit_bytes(format);
  if (to_lanes) std::memset(panel, 0, ceil_div(line_bytes, 2 * bits) * step);
  for (std::size_t at = 0; at < line_bytes; at += 2 * bits, panel += step)
    for (std::size_t r = 0; r < row_count; ++r) {
      const std::size_t bytes = std::min<std::size_t>(2 * bits, line_bytes - at);
      std::uint8_t* const from = rows + r * line_bytes + at;
      std::uint8_t stream[12] = {};
      std::uint8_t codes[bits_k_unit];
      if (to_lanes) {
        std::memcpy(stream, from, bytes);
        unpack_bits(bits, stream, bits_k_unit, codes);
        scalar::put_lane_codes(bits, codes, r, panel);
      } else {
        scalar::get_lane_codes(bits, panel, r, codes);
        pack_bits(bits, codes, bits_k_unit, stream);
        std::memcpy(from, stream, bytes);
      }
    }
}

/// Codes of a panel's rows, or the way back.
template <bool to_lanes>
void move_codes(Format format, std::uint8_t* rows, std::size_t line_bytes, std::size_t row_count,
                std::uint8_t* panel) noexcept {
  if (is_bit_stream(format)) return move_bit_codes<to_lanes>(format, rows, line_bytes, row_count, panel);
  LanesArgs args;
  args.element = lane_element(format);
  args.rows = rows;
  args.row_stride = line_bytes;
  args.row_count = row_count;
  args.bytes = line_bytes;
  args.lanes = panel;
  args.step = panel_width * bytes_of(args.element);
  if (args.bytes == 0) return;
  (to_lanes ? kernels().rows_to_lanes : kernels().lanes_to_rows)(args);
}

/// Scales, offsets (of 4 or 2 bytes) or zero points (1) of a panel's rows, or the way back. In the quantized matrix they
/// are [row][group], [row], or one; in the panel [group][16].
template <bool to_lanes>
void move_params(const Granularity& granularity, std::size_t size, std::uint8_t* all, std::size_t first_row,
                 std::size_t row_count, std::size_t groups, std::uint8_t* panel) noexcept {
  LanesArgs args;
  args.element = size == 4 ? LaneElement::words : size == 2 ? LaneElement::halves : LaneElement::bytes;
  args.row_count = row_count;
  args.lanes = panel;
  args.step = panel_width * size;
  if (granularity.kind == Granularity::Kind::per_group) {
    args.row_stride = args.bytes = groups * size;
    args.rows = all + first_row * args.row_stride;
    (to_lanes ? kernels().rows_to_lanes : kernels().lanes_to_rows)(args);
    return;
  }
  // One a row, or one for all; repeated where the kernels split a group that is too long for them.
  const bool per_row = granularity.kind == Granularity::Kind::per_channel;
  args.bytes = size;
  args.row_stride = per_row ? size : 0;
  args.rows = per_row ? all + first_row * size : all;
  if (!to_lanes) {
    if (!per_row) args.row_count = 1;
    if (per_row || first_row == 0) kernels().lanes_to_rows(args);
    return;
  }
  for (std::size_t g = 0; g < groups; ++g, args.lanes += args.step) kernels().rows_to_lanes(args);
}

/// Groups a row has in the quantized matrix (a kernel's may be more where one was split).
inline std::size_t quantized_groups(const PackedHeader& h) noexcept {
  return h.scheme.granularity.kind == Granularity::Kind::per_group
             ? ceil_div(h.cols, h.scheme.granularity.group_size)
             : 1;
}

/// Sums of each row's values, in the order that a product with a token of ones has.
class ChannelSums {
 public:
  explicit ChannelSums(const PanelView& w)
      : w_(w), ones_(w.k_padded, 0), group_sums_(w.groups), sums_(round_up(w.n, panel_width) * sizeof(float)) {
    std::fill_n(ones_.begin(), w.k, std::int8_t{1});
    for (std::size_t g = 0; g < w.groups; ++g)
      group_sums_[g] = static_cast<std::int32_t>(std::min(w.group_size, w.k - g * w.group_size));
  }
  /// Those of panels [begin, end).
  void add(std::size_t begin, std::size_t end) {
    IntGemmArgs args;
    args.w = w_;
    args.panel_begin = begin;
    args.panel_end = end;
    args.x = ones_.data();
    args.x_stride = w_.k_padded;
    args.x_sums = group_sums_.data();
    args.sums_stride = w_.groups;
    args.rows = 1;
    args.acc = sums_.as_mutable<float>() + begin * panel_width;
    args.acc_stride = (end - begin) * panel_width;
    const KernelTable& k = kernels();
    if (needs_expansion(k, w_.format, 1)) {
      std::vector<std::uint8_t> room((end - begin) * expanded_panel_bytes(w_));
      expand_panels(k, w_, begin, end, room.data());
      args = on_expanded(args, room.data());
      int_kernel(k, args.w.format)(args);
      return;
    }
    (is_bit_stream(w_.format) ? k.gemm_bits : int_kernel(k, w_.format))(args);
  }
  Buffer take() { return std::move(sums_); }

 private:
  PanelView w_;
  std::vector<std::int8_t> ones_;
  std::vector<std::int32_t> group_sums_;
  Buffer sums_;
};

}  // namespace detail

/// Packs a quantized n x k matrix for the kernels. Its scales lie along k: per tensor, per channel of axis 0, or per
/// group of axis 1. Throws InvalidArgument for a tensor of another rank, Unsupported for another granularity.
inline PackedMatrix pack(const QuantizedTensor& q, const PackOptions& options = {}) {
  const detail::FpEnvironment environment;
  detail::require(q.rank() == 2, "pack takes a matrix; the tensor has rank ", q.rank());
  const PackedHeader header{q.scheme(), q.shape()[0], q.shape()[1]};
  const Granularity& granularity = header.scheme.granularity;
  const detail::PackedShape shape = detail::shape_of(header);
  Buffer codes = Buffer::uninitialized(shape.codes_bytes);
  Buffer scales = Buffer::uninitialized(shape.scales_bytes);
  Buffer zeros = Buffer::uninitialized(shape.zeros_bytes);
  std::uint8_t* codes_out = codes.mutable_data();
  std::uint8_t* scales_out = scales.mutable_data();
  std::uint8_t* zeros_out = zeros.mutable_data();
  const Format format = header.scheme.format;
  const ScaleType scale_type = header.scheme.scale_type;
  const std::size_t packed_size = bytes_of(shape.scale_type);
  const std::size_t panel_bytes = detail::panel_bytes_of(format, shape.k_padded);
  const std::size_t line_bytes = q.line_bytes();
  const std::size_t lane_bytes =
      is_bit_stream(format) ? 2 * bits_of(format) : bytes_of(detail::lane_element(format));
  const std::size_t used_bytes = detail::round_up(line_bytes, lane_bytes) * detail::panel_width;
  const bool with_sums = options.channel_sums && is_integer(format) && shape.params != 0;
  detail::ChannelSums sums(with_sums ? detail::panel_view(header, shape, codes_out, scales_out, zeros_out)
                                     : detail::PanelView{});

  // Parameters of `count` rows. Rows are only read on their way to the lanes. A bfloat16 becomes the float of the same
  // value.
  const auto place = [&](const Buffer& from, std::uint8_t* to, std::size_t row, std::size_t count) {
    auto* all = const_cast<std::uint8_t*>(from.data());
    if (scale_type != ScaleType::bf16) {
      detail::move_params<true>(granularity, packed_size, all, row, count, shape.groups, to);
      return;
    }
    const bool one = granularity.kind == Granularity::Kind::per_tensor;
    const std::size_t each = granularity.kind == Granularity::Kind::per_group ? shape.groups : 1;
    std::vector<std::uint16_t> bits((one ? 1 : count) * each);
    std::vector<float> wide(bits.size());
    std::memcpy(bits.data(), all + (one ? 0 : row) * each * 2, bits.size() * 2);
    detail::kernels().float_from_bf16(bits.data(), bits.size(), wide.data());
    detail::move_params<true>(granularity, packed_size, reinterpret_cast<std::uint8_t*>(wide.data()), 0, count,
                              shape.groups, to);
  };
  constexpr std::size_t panels_a_task = 4;
  const auto pack_panels = [&](std::size_t task, std::size_t) {
    const std::size_t end = std::min((task + 1) * panels_a_task, shape.panels);
    for (std::size_t panel = task * panels_a_task; panel < end; ++panel) {
      const std::size_t row = panel * detail::panel_width;
      const std::size_t count = std::min(detail::panel_width, header.rows - row);
      std::uint8_t* to = codes_out + panel * panel_bytes;
      auto* from = const_cast<std::uint8_t*>(q.codes().data()) + row * line_bytes;
      detail::move_codes<true>(format, from, line_bytes, count, to);
      if (panel_bytes > used_bytes) std::memset(to + used_bytes, 0, panel_bytes - used_bytes);
      if (shape.params == 0) continue;
      const std::size_t param = panel * shape.groups * detail::panel_width;
      place(q.scales(), scales_out + param * packed_size, row, count);
      if (header.scheme.symmetry == Symmetry::float_offset)
        place(q.zeros(), zeros_out + param * packed_size, row, count);
      if (header.scheme.symmetry == Symmetry::asymmetric)
        detail::move_params<true>(granularity, 1, const_cast<std::uint8_t*>(q.zeros().data()), row, count,
                                  shape.groups, zeros_out + param);
    }
    // While the codes are in the cache.
    if (with_sums) sums.add(task * panels_a_task, end);
  };
  detail::for_tasks(options.pool, detail::ceil_div(shape.panels, panels_a_task), pack_panels);
  return PackedMatrix::from_parts(header, std::move(codes), std::move(scales), std::move(zeros),
                                  with_sums ? sums.take() : Buffer());
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

inline QuantizedTensor PackedMatrix::unpack(ThreadPool* pool) const {
  const Granularity& granularity = header_.scheme.granularity;
  const bool one = granularity.kind == Granularity::Kind::per_tensor;
  const bool grouped = granularity.kind == Granularity::Kind::per_group;
  const std::size_t line_bits = detail::checked_mul(header_.cols, bits_of(format()), "line");
  const std::size_t line_bytes = detail::ceil_div(line_bits, 8);
  std::size_t params = 0;
  if (has_scales(format())) {
    params = one ? 1 : header_.rows * detail::quantized_groups(header_);
    if (shape_.params == 0 && grouped) params = 0;
  }
  const ScaleType type = scheme().scale_type;
  const std::size_t zero_bytes = symmetry() == Symmetry::symmetric    ? 0
                                 : symmetry() == Symmetry::asymmetric ? 1
                                                                      : bytes_of(type);
  Buffer codes = Buffer::uninitialized(header_.rows * line_bytes);
  Buffer scales(params * bytes_of(type));
  Buffer zeros(params * zero_bytes);
  const std::size_t panel_bytes = detail::panel_bytes_of(format(), shape_.k_padded);
  std::uint8_t* const codes_out = codes.mutable_data();
  // Lanes are only read on their way to the rows. Packed bfloat16 scales are floats of the same value.
  const auto place = [&](const Buffer& from, std::uint8_t* to, std::size_t row, std::size_t count) {
    const std::size_t size = bytes_of(shape_.scale_type);
    auto* lanes = const_cast<std::uint8_t*>(from.data()) + row * shape_.groups * size;
    if (type != ScaleType::bf16) {
      detail::move_params<false>(granularity, size, to, row, count, shape_.groups, lanes);
      return;
    }
    if (one && row != 0) return;
    const std::size_t each = grouped ? shape_.groups : 1;
    std::vector<float> wide((one ? 1 : count) * each);
    detail::move_params<false>(granularity, size, reinterpret_cast<std::uint8_t*>(wide.data()), 0, count,
                               shape_.groups, lanes);
    detail::kernels().bf16_from_float(wide.data(), wide.size(), reinterpret_cast<std::uint16_t*>(to) + row * each);
  };
  detail::for_tasks(pool, shape_.panels, [&](std::size_t panel, std::size_t) {
    const std::size_t row = panel * detail::panel_width;
    const std::size_t count = std::min(detail::panel_width, header_.rows - row);
    detail::move_codes<false>(format(), codes_out + row * line_bytes, line_bytes, count,
                              const_cast<std::uint8_t*>(codes_.data()) + panel * panel_bytes);
    if (shape_.params == 0) return;
    place(scales_, scales.mutable_data(), row, count);
    if (symmetry() == Symmetry::float_offset) place(zeros_, zeros.mutable_data(), row, count);
    if (symmetry() == Symmetry::asymmetric)
      detail::move_params<false>(granularity, 1, zeros.mutable_data(), row, count, shape_.groups,
                                 const_cast<std::uint8_t*>(zeros_.data()) + row * shape_.groups);
  });
  return QuantizedTensor::from_parts(scheme(), {header_.rows, header_.cols}, std::move(codes), std::move(scales),
                                     std::move(zeros));
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
