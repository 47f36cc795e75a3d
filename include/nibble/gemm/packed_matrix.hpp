// Weights in the layout that kernels read.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/formats/codebook.hpp"
#include "nibble/kernels/dispatch.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/kernels/scalar/lanes.hpp"
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
  const std::size_t unit = k_unit_of(s.format);
  shape.k_padded = checked_add(h.cols, unit - 1, "packed columns") / unit * unit;
  shape.panels = ceil_div(h.rows, panel_width);
  const std::size_t lanes = checked_mul(shape.panels, panel_width, "packed rows");
  const std::size_t elements = checked_mul(lanes, shape.k_padded, "packed size");
  // Bits, and no less than the padding of a panel that is filled up.
  checked_mul(checked_add(elements, checked_mul(lanes, 64, "packed rows"), "packed size"), bits_of(s.format),
              "packed size");
  shape.codes_bytes = shape.panels * panel_bytes_of(s.format, shape.k_padded);
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

/// A packed matrix as kernels see it.
inline PanelView panel_view(const PackedHeader& header, const PackedShape& shape, const std::uint8_t* codes,
                            const void* scales, const void* zeros) noexcept {
  PanelView w;
  w.format = header.scheme.format;
  w.symmetry = header.scheme.symmetry;
  w.scale_type = shape.scale_type;
  w.n = header.rows;
  w.k = header.cols;
  w.k_padded = shape.k_padded;
  w.group_size = shape.group_size;
  w.groups = shape.groups;
  w.codes = codes;
  w.panel_bytes = panel_bytes_of(w.format, shape.k_padded);
  w.scales = scales;
  w.zeros = zeros;
  w.codebook = codebook_of(w.format);
  return w;
}

/// Values of one row out of its panel: the lane's codes and parameters are gathered, a stretch at a time, and decoded as
/// a line.
inline void dequantize_lane(const PanelView& w, std::size_t row, float* out) noexcept {
  const std::size_t panel = row / panel_width;
  const std::size_t lane = row % panel_width;
  const std::uint8_t* codes = w.codes + panel * w.panel_bytes;
  constexpr std::size_t chunk = 1024;
  if (!has_scales(w.format)) {
    std::uint16_t bits[chunk];
    for (std::size_t k = 0, n; k < w.k; k += n) {
      n = std::min(chunk, w.k - k);
      if (w.format == Format::fp32)
        for (std::size_t i = k; i < k + n; ++i) out[i] = scalar::load<float>(codes, i * panel_width + lane);
      else if (w.format == Format::fp16)
        for (std::size_t i = k; i < k + n; ++i)
          bits[i - k] = scalar::load<std::uint16_t>(codes, i * panel_width + lane);
      else
        for (std::size_t i = k; i < k + n; ++i)
          bits[i - k] = scalar::load<std::uint16_t>(codes, (i / 2 * panel_width + lane) * 2 + i % 2);
      if (w.format == Format::fp16) kernels().float_from_fp16(bits, n, out + k);
      if (w.format == Format::bf16) kernels().float_from_bf16(bits, n, out + k);
    }
    return;
  }
  std::uint32_t words[chunk / 4];
  float scales[chunk / 16];
  float offsets[chunk / 16];
  std::int8_t zeros[chunk / 16];
  const bool planes = is_bit_stream(w.format);  // their codes are gathered as bytes
  const bool bytes = w.format == Format::int8;
  const std::size_t codes_a_word = bytes ? 4 : 8;
  for (std::size_t k = 0, n; k < w.k; k += n) {
    // Whole groups, or a part of a long one; either begins with a word, or a unit of planes.
    const bool whole = w.group_size < chunk;
    n = std::min(w.k - k,
                 whole ? chunk / w.group_size * w.group_size : std::min(chunk, w.group_size - k % w.group_size));
    const std::size_t groups = whole ? ceil_div(n, w.group_size) : 1;
    for (std::size_t i = 0; planes && i < n; i += bits_k_unit)
      scalar::get_lane_codes(bits_of(w.format), codes + (k + i) / bits_k_unit * bits_unit_bytes(w.format), lane,
                             reinterpret_cast<std::uint8_t*>(words) + i);
    for (std::size_t i = 0; !planes && i < ceil_div(n, codes_a_word); ++i) {
      const auto word = scalar::load<std::uint32_t>(codes, (k / codes_a_word + i) * panel_width + lane);
      words[i] = bytes ? word ^ 0x80808080U : scalar::deinterleave_nibbles(word);
    }
    for (std::size_t g = 0; g < groups; ++g) {
      const std::size_t param = (panel * w.groups + k / w.group_size + g) * panel_width + lane;
      scales[g] = scalar::scale_at(w, param);
      if (w.symmetry == Symmetry::float_offset) offsets[g] = scalar::offset_at(w, param);
      if (w.symmetry == Symmetry::asymmetric) zeros[g] = static_cast<const std::int8_t*>(w.zeros)[param];
    }
    DequantizeGroupsArgs args;
    args.format = planes ? Format::int8 : w.format;
    args.q = reinterpret_cast<const std::uint8_t*>(words);
    args.n = n;
    args.group = whole ? w.group_size : chunk;
    args.scales = scales;
    if (w.symmetry == Symmetry::float_offset) args.offsets = offsets;
    if (w.symmetry == Symmetry::asymmetric) args.zeros = zeros;
    if (w.symmetry == Symmetry::symmetric) args.zero = symmetric_zero_of(w.format);
    args.codebook = w.codebook;
    args.x = out + k;
    kernels().dequantize_groups(args);
  }
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
    detail::dequantize_lane(view(), static_cast<std::size_t>(r), out);
  }

  /// All values, n x k. pool: threads to work with; nullptr: the calling one.
  Eigen::MatrixXf dequantize(ThreadPool* pool = nullptr) const {
    const detail::FpEnvironment environment;
    Eigen::MatrixXf values(rows(), cols());
    const detail::PanelView w = view();
    // Four panels are 256 bytes of a column; 256 columns of them stay in the second-level cache.
    constexpr std::size_t panels_a_task = 4;
    constexpr std::size_t depth = 256;
    constexpr std::size_t stride = depth * detail::panel_width;
    const std::size_t threads = pool == nullptr ? 1 : static_cast<std::size_t>(pool->threads());
    std::vector<float> rooms(threads * panels_a_task * stride);
    detail::for_tasks(
        pool, detail::ceil_div(shape_.panels, panels_a_task), [&](std::size_t task, std::size_t thread) {
          const std::size_t first = task * panels_a_task;
          const std::size_t end = std::min(first + panels_a_task, shape_.panels);
          const std::size_t height = std::min(end * detail::panel_width, w.n) - first * detail::panel_width;
          float* room = rooms.data() + thread * panels_a_task * stride;
          for (std::size_t k = 0; k < w.k; k += depth) {
            const std::size_t k_end = std::min(w.k, k + depth);
            detail::kernels().unpack({w, first, end, k, k_end, room, stride});
            for (std::size_t column = k; column < k_end; ++column) {
              const float* from = room + (column - k) * detail::panel_width;
              float* to = values.data() + column * w.n + first * detail::panel_width;
              std::size_t done = 0;
              for (; done + detail::panel_width <= height; done += detail::panel_width, from += stride)
                std::memcpy(to + done, from, detail::panel_width * sizeof(float));
              if (done < height) std::memcpy(to + done, from, (height - done) * sizeof(float));
            }
          }
        });
    return values;
  }

  /// The quantized matrix that was packed, code by code and scale by scale. pool: as above.
  QuantizedTensor unpack(ThreadPool* pool = nullptr) const;

  /// The matrix as kernels see it; valid as long as this object or a copy of it.
  detail::PanelView view() const noexcept {
    return detail::panel_view(header_, shape_, codes_.data(), scales_.data(), zeros_.data());
  }
  std::size_t panels() const noexcept { return shape_.panels; }

 private:
  /// Throws unless all `params` scales or offsets are finite.
  void check_finite(const Buffer& buffer, const char* what) const {
    if (detail::all_finite(buffer.data(), shape_.scale_type, shape_.params)) return;
    std::size_t first = 0;
    while (detail::scalar::is_finite(detail::scalar::storage_to_float(buffer.data(), shape_.scale_type, first)))
      ++first;
    detail::raise<InvalidArgument>(detail::concat("packed ", what, " ", first, " is not finite"));
  }

  void check_parameters() const {
    if (shape_.params == 0) return;
    check_finite(scales_, "scale");
    if (symmetry() == Symmetry::float_offset) check_finite(zeros_, "offset");
    const int highest = detail::code_range(scheme()).max;
    if (symmetry() == Symmetry::asymmetric && format() != Format::int8 &&
        !detail::zeros_fit(bits_of(format()), zeros_.data(), shape_.params))
      for (std::size_t i = 0; i < shape_.params; ++i) {
        const int zero = zeros_.as<std::int8_t>()[i];
        detail::require(zero >= 0 && zero <= highest, "packed zero point ", i, " is ", zero, ", expected 0 to ",
                        highest);
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
