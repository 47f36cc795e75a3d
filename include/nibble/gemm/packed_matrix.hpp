// Weights in the layout that kernels read.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/formats/nf4.hpp"
#include "nibble/kernels/dispatch.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/kernels/scalar/panel.hpp"
#include "nibble/quantize/quantized_tensor.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Name of the only layout so far; scalar, AVX2 and AVX-512 kernels all run it. args.hpp draws it.
inline constexpr std::string_view panel16_layout = "panel16";

/// What describes a packed matrix besides its bytes.
struct PackedHeader {
  Scheme scheme;         ///< format, symmetry, granularity and the scales' type as quantized
  std::size_t rows = 0;  ///< output channels, n
  std::size_t cols = 0;  ///< inputs, k
};

namespace detail {

/// Longest group that a kernel sums in one int32; one scale for more inputs than that is repeated for each piece.
inline constexpr std::size_t split_group = 32768;
static_assert(split_group <= max_exact_group);

/// Sizes that follow from a header.
struct PackedShape {
  std::size_t k_padded = 0;
  std::size_t panels = 0;
  std::size_t group_size = 0;  // the kernel's
  std::size_t groups = 0;
  ScaleType scale_type = ScaleType::fp32;  // as packed
  std::size_t codes_bytes = 0;
  std::size_t scales_bytes = 0;
  std::size_t zeros_bytes = 0;
  std::size_t params = 0;
};

/// Sizes of a header whose scheme is resolved. Throws InvalidArgument where they overflow, Unsupported for scales that
/// do not lie along k (a scale per input cannot leave the sum over inputs: fold it into the activations).
inline PackedShape shape_of(const PackedHeader& h) {
  using Kind = Granularity::Kind;
  const Scheme& s = h.scheme;
  const Granularity& granularity = s.granularity;
  require<Unsupported>(granularity.kind != Kind::per_channel || granularity.axis == 0,
                       "packed per-channel scales are of axis 0 (outputs), not of axis ", granularity.axis);
  require<Unsupported>(granularity.kind != Kind::per_group || granularity.axis == 1,
                       "packed groups run along axis 1 (inputs), not along axis ", granularity.axis);
  PackedShape shape;
  shape.k_padded = checked_add(h.cols, k_unit - 1, "packed columns") / k_unit * k_unit;
  shape.panels = ceil_div(h.rows, panel_width);
  const std::size_t lanes = checked_mul(shape.panels, panel_width, "packed rows");
  const std::size_t elements = checked_mul(lanes, shape.k_padded, "packed size");
  shape.codes_bytes = checked_mul(elements, bits_of(s.format), "packed size") / 8;
  if (!has_scales(s.format)) {
    shape.group_size = shape.k_padded;
    shape.groups = 1;
    return shape;
  }
  // Packed bfloat16 scales become fp32: kernels then meet two types, and the values stay the same.
  shape.scale_type = s.scale_type == ScaleType::fp16 ? ScaleType::fp16 : ScaleType::fp32;
  shape.group_size = shape.k_padded;
  if (granularity.kind == Kind::per_group && granularity.group_size < shape.group_size)
    shape.group_size = granularity.group_size;
  if (shape.group_size > max_exact_group) {
    require<Unsupported>(granularity.kind != Kind::per_group || granularity.group_size >= h.cols, "group_size is ",
                         granularity.group_size, ", expected at most ", max_exact_group);
    shape.group_size = split_group;
  }
  shape.groups = shape.group_size == 0 ? 0 : ceil_div(h.cols, shape.group_size);
  shape.params = checked_mul(lanes, shape.groups, "packed scales");
  shape.scales_bytes = checked_mul(shape.params, bytes_of(shape.scale_type), "packed scales");
  if (s.symmetry == Symmetry::asymmetric) shape.zeros_bytes = shape.params;
  if (s.symmetry == Symmetry::float_offset) shape.zeros_bytes = shape.scales_bytes;
  return shape;
}

}  // namespace detail

/// An n x k weight matrix (output channels x inputs) in the layout that kernels read: what pack() makes, what products
/// take, what packed files hold. Immutable and cheap to copy (the bytes are shared); any number of threads may use one.
///
/// Nothing of the original is needed again: rows are gathered with dequantize_row(), the whole comes back, to the
/// bit, with unpack().
class PackedMatrix {
 public:
  PackedMatrix() = default;

  /// Puts a matrix together from its parts, as a file holds them; borrowed buffers stay where they are.
  /// Throws InvalidArgument where a size, a scale (NaN, Inf) or a zero point does not fit the header.
  /// @param codes         panels x panel bytes
  /// @param scales        panels x groups x 16, fp16 where the scheme says so, else fp32; empty for float formats
  /// @param zeros         int8 or the scales' type, shaped as scales; empty for symmetric
  /// @param channel_sums  16 * panels floats (sums of each row's values) or empty
  static PackedMatrix from_parts(const PackedHeader& header, Buffer codes, Buffer scales, Buffer zeros,
                                 Buffer channel_sums = {}) {
    PackedMatrix m;
    m.header_ = {detail::resolve(header.scheme, {header.rows, header.cols}), header.rows, header.cols};
    const detail::PackedShape shape = detail::shape_of(m.header_);
    detail::require(codes.size() == shape.codes_bytes, "packed codes have ", codes.size(), " bytes, expected ",
                    shape.codes_bytes);
    detail::require(scales.size() == shape.scales_bytes, "packed scales have ", scales.size(), " bytes, expected ",
                    shape.scales_bytes);
    detail::require(zeros.size() == shape.zeros_bytes, "packed zeros have ", zeros.size(), " bytes, expected ",
                    shape.zeros_bytes);
    const std::size_t sums_bytes = shape.panels * detail::panel_width * sizeof(float);
    detail::require(channel_sums.empty() || channel_sums.size() == sums_bytes, "packed channel_sums have ",
                    channel_sums.size(), " bytes, expected ", sums_bytes, " or none");
    m.shape_ = shape;
    m.codes_ = std::move(codes);
    m.scales_ = std::move(scales);
    m.zeros_ = std::move(zeros);
    m.channel_sums_ = std::move(channel_sums);
    m.check_parameters();
    return m;
  }

  Eigen::Index rows() const noexcept { return static_cast<Eigen::Index>(header_.rows); }
  Eigen::Index cols() const noexcept { return static_cast<Eigen::Index>(header_.cols); }
  const PackedHeader& header() const noexcept { return header_; }
  const Scheme& scheme() const noexcept { return header_.scheme; }
  Format format() const noexcept { return header_.scheme.format; }
  Symmetry symmetry() const noexcept { return header_.scheme.symmetry; }
  /// Type of the packed scales: fp16 or fp32.
  ScaleType scale_type() const noexcept { return shape_.scale_type; }
  /// Inputs that share a scale in the kernels; cols() rounded up where there is one group.
  std::size_t group_size() const noexcept { return shape_.group_size; }
  std::size_t groups() const noexcept { return shape_.groups; }
  std::string_view layout() const noexcept { return panel16_layout; }

  const Buffer& codes() const noexcept { return codes_; }
  const Buffer& scales() const noexcept { return scales_; }
  const Buffer& zeros() const noexcept { return zeros_; }
  const Buffer& channel_sums() const noexcept { return channel_sums_; }
  std::size_t byte_size() const noexcept {
    return codes_.size() + scales_.size() + zeros_.size() + channel_sums_.size();
  }

  /// Writes row r's cols() values to `out`. Allocates nothing.
  void dequantize_row(Eigen::Index r, float* out) const {
    detail::require(r >= 0 && r < rows(), "row is ", r, ", expected 0 to ", rows() - 1);
    const detail::FpEnvironment environment;
    const detail::PanelView w = view();
    const auto panel = static_cast<std::size_t>(r) / detail::panel_width;
    const auto lane = static_cast<std::size_t>(r) % detail::panel_width;
    for (std::size_t k = 0; k < w.k; ++k) out[k] = detail::scalar::value_at(w, panel, lane, k);
  }

  /// All values, n x k.
  Eigen::MatrixXf dequantize() const {
    const detail::FpEnvironment environment;
    Eigen::MatrixXf values(rows(), cols());
    const detail::PanelView w = view();
    std::vector<float> panel(detail::panel_width * w.k);
    for (std::size_t p = 0; p < shape_.panels; ++p) {
      detail::kernels().unpack({w, p, p + 1, 0, w.k, panel.data(), panel.size()});
      const Eigen::Index row = static_cast<Eigen::Index>(p * detail::panel_width);
      const Eigen::Index height = std::min<Eigen::Index>(detail::panel_width, rows() - row);
      values.middleRows(row, height) =
          Eigen::Map<const Eigen::MatrixXf>(panel.data(), detail::panel_width, cols()).topRows(height);
    }
    return values;
  }

  /// The quantized matrix that was packed, code by code and scale by scale.
  QuantizedTensor unpack() const;

  /// The matrix as kernels see it; valid as long as this object or a copy of it.
  detail::PanelView view() const noexcept {
    detail::PanelView w;
    w.format = format();
    w.symmetry = symmetry();
    w.scale_type = shape_.scale_type;
    w.n = header_.rows;
    w.k = header_.cols;
    w.k_padded = shape_.k_padded;
    w.group_size = shape_.group_size;
    w.groups = shape_.groups;
    w.codes = codes_.data();
    w.panel_bytes = detail::panel_bytes_of(format(), shape_.k_padded);
    w.scales = scales_.data();
    w.zeros = zeros_.data();
    w.codebook = nf4_levels;
    return w;
  }
  std::size_t panels() const noexcept { return shape_.panels; }

 private:
  /// Throws unless all `params` scales or offsets are finite: no exponent is all ones. Every load of a model comes
  /// through here, so they are looked at 64 bytes at a time: adding one to the exponents, their signs masked, carries into
  /// the sign of those that are all ones.
  void check_finite(const Buffer& buffer, const char* what) const {
    const bool wide = shape_.scale_type == ScaleType::fp32;
    const std::uint64_t exponent = wide ? 0x7F8000007F800000U : 0x7C007C007C007C00U;
    const std::uint64_t one = wide ? 0x0080000000800000U : 0x0400040004000400U;
    const std::uint64_t carry = wide ? 0x8000000080000000U : 0x8000800080008000U;
    constexpr std::size_t words = 8;
    const std::size_t lines = buffer.size() / (words * sizeof(std::uint64_t));
    std::size_t line = 0;
    for (; line < lines; ++line) {
      std::uint64_t sums = 0;
      for (std::size_t i = 0; i < words; ++i)
        sums |= (detail::scalar::load<std::uint64_t>(buffer.data(), line * words + i) & exponent) + one;
      if ((sums & carry) != 0) break;
    }
    const auto bad = [&](std::size_t i) {
      return wide ? (detail::scalar::load<std::uint32_t>(buffer.data(), i) & 0x7F800000U) == 0x7F800000U
                  : (detail::scalar::load<std::uint16_t>(buffer.data(), i) & 0x7C00U) == 0x7C00U;
    };
    std::size_t first = line * words * sizeof(std::uint64_t) / bytes_of(shape_.scale_type);
    while (first < shape_.params && !bad(first)) ++first;
    detail::require(first == shape_.params, "packed ", what, " ", first, " is not finite");
  }

  void check_parameters() const {
    check_finite(scales_, "scale");
    if (symmetry() == Symmetry::float_offset) check_finite(zeros_, "offset");
    if (symmetry() == Symmetry::asymmetric && format() == Format::int4)
      for (std::size_t i = 0; i < shape_.params; ++i) {
        const int zero = zeros_.as<std::int8_t>()[i];
        detail::require(zero >= 0 && zero <= 15, "packed zero point ", i, " is ", zero, ", expected 0 to 15");
      }
  }

  PackedHeader header_;
  detail::PackedShape shape_;
  Buffer codes_;
  Buffer scales_;
  Buffer zeros_;
  Buffer channel_sums_;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
