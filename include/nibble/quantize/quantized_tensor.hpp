// The erased middle: codes and parameters of a tensor whose scheme is a run-time value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/quantize/line_codec.hpp"
#include "nibble/quantize/scheme.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// A quantized tensor of any rank, stored in C order whatever the order of the input was. Immutable; copies share
/// the memory.
///
/// A line is a run along the last dimension (a tensor of rank 0 is one line of one element). Lines follow each other
/// in C order, line_bytes() apart:
///
/// | format     | a line's codes                                                              |
/// |------------|-----------------------------------------------------------------------------|
/// | fp32       | 4 bytes an element                                                          |
/// | fp16, bf16 | 2 bytes an element                                                          |
/// | int8       | 1 byte, -128..127                                                           |
/// | int4, nf4  | 4 bits, 0..15; even index in the low half; each line starts at a new byte   |
///
/// Parameters are stored in C order of param_shape(): the scale in scheme().scale_type; beside it an int8_t zero
/// point where asymmetric (0..15 for int4), or a float offset in scale_type where float_offset.
class QuantizedTensor {
 public:
  /// An fp32 tensor of shape (0).
  QuantizedTensor() : shape_{0}, line_count_(1) {}

  /// Puts a tensor together from its parts, e.g. out of a file; the buffers may be borrowed and of any alignment.
  /// Sizes in bytes must be exactly line_count * line_bytes, param_count * bytes_of(scale_type), and for zeros
  /// 0, param_count, or as scales. fp32, fp16 and bf16 have no parameters.
  /// Throws InvalidArgument: invalid scheme, a shape whose size overflows, a wrong buffer size, a scale or offset that
  /// is not finite (negative scales are fine), an int4 zero point beyond 0..15.
  static QuantizedTensor from_parts(const Scheme& scheme, Shape shape, Buffer codes, Buffer scales = {},
                                    Buffer zeros = {}) {
    QuantizedTensor t = describe(scheme, std::move(shape));
    t.codes_ = std::move(codes);
    t.scales_ = std::move(scales);
    t.zeros_ = std::move(zeros);
    t.validate();
    return t;
  }

  /// Canonical: the axis counts from the front, and the formats without scales are per_tensor and symmetric.
  const Scheme& scheme() const noexcept { return scheme_; }
  Format format() const noexcept { return scheme_.format; }
  const Shape& shape() const noexcept { return shape_; }
  std::size_t rank() const noexcept { return shape_.size(); }
  /// Number of elements.
  std::size_t size() const noexcept { return line_count_ * line_length(); }
  bool empty() const noexcept { return size() == 0; }

  std::size_t line_count() const noexcept { return line_count_; }
  /// Elements of a line.
  std::size_t line_length() const noexcept { return shape_.empty() ? 1 : shape_.back(); }
  /// Bytes from one line's codes to the next's.
  std::size_t line_bytes() const noexcept { return line_bytes_; }

  /// Number of scales; 0 for the formats without.
  std::size_t param_count() const noexcept { return has_scales(format()) ? layout_.count() : 0; }
  /// Empty for per_tensor; (channels) for per_channel; for per_group the tensor's shape with the axis' length replaced
  /// by the number of groups.
  const Shape& param_shape() const noexcept { return layout_.shape(); }
  /// The parameter that element i of line l uses.
  std::size_t param_index(std::size_t l, std::size_t i) const noexcept { return layout_.line(l).index(i); }
  /// The same for a whole line.
  detail::LineParams line_params(std::size_t l) const noexcept { return layout_.line(l); }

  const Buffer& codes() const noexcept { return codes_; }
  const Buffer& scales() const noexcept { return scales_; }
  const Buffer& zeros() const noexcept { return zeros_; }
  /// Bytes of codes and parameters together.
  std::size_t byte_size() const noexcept { return codes_.size() + scales_.size() + zeros_.size(); }

  /// Parameter p < param_count() in fp32.
  Grid grid(std::size_t p) const noexcept { return params().grid(p); }
  float scale(std::size_t p) const noexcept { return grid(p).scale; }
  /// Integer zero point: 8 for symmetric int4, otherwise 0 unless asymmetric.
  std::int32_t zero_point(std::size_t p) const noexcept { return grid(p).zero; }
  /// Float offset; 0 unless float_offset.
  float offset(std::size_t p) const noexcept { return grid(p).offset; }

  /// Code of element i of line l as stored: int8 -128..127, int4 and nf4 0..15. For fp32, fp16 and bf16 its bits.
  std::int64_t code(std::size_t l, std::size_t i) const noexcept {
    const std::uint8_t* line = line_data(l);
    switch (format()) {
      case Format::fp32: return detail::scalar::load<std::uint32_t>(line, i);
      case Format::fp16:
      case Format::bf16: return detail::scalar::load<std::uint16_t>(line, i);
      case Format::int8: return static_cast<std::int8_t>(line[i]);
      case Format::int4:
      case Format::nf4: return detail::nibble_at(line, i);
    }
    return 0;
  }

  /// First byte of line l's codes.
  const std::uint8_t* line_data(std::size_t l) const noexcept { return codes_.data() + l * line_bytes_; }

  /// Values of elements [begin, begin + n) of line l, to `out`. begin is even for the 4-bit formats.
  void dequantize_line(std::size_t l, std::size_t begin, std::size_t n, float* out) const {
    const detail::FpEnvironment environment;
    const std::uint8_t* line = line_data(l);
    const detail::LineParams where = layout_.line(l);
    switch (format()) {
      case Format::fp32: std::memcpy(out, line + begin * 4, n * 4); return;
      case Format::fp16:
      case Format::bf16:
        for (std::size_t i = 0; i < n; ++i) {
          const auto bits = detail::scalar::load<std::uint16_t>(line, begin + i);
          out[i] = format() == Format::fp16 ? float_from_fp16(bits) : float_from_bf16(bits);
        }
        return;
      case Format::int8:
        detail::decode_run(params(), where, begin, reinterpret_cast<const std::int8_t*>(line) + begin, n, out);
        return;
      case Format::int4:
      case Format::nf4: {
        std::uint8_t unpacked[chunk];
        for (std::size_t i = 0; i < n; i += chunk) {
          const std::size_t count = std::min(n - i, chunk);
          detail::unpack_nibbles(line + (begin + i) / 2, count, unpacked);
          detail::decode_run(params(), where, begin + i, reinterpret_cast<const std::int8_t*>(unpacked), count, out + i);
        }
        return;
      }
    }
  }

  /// Values of row r < shape()[0] of a matrix, shape()[1] floats to `out`.
  void dequantize_row(std::size_t r, float* out) const {
    detail::require(rank() == 2, "dequantize_row: tensor has ", rank(), " dimensions, expected 2");
    detail::require(r < shape_[0], "dequantize_row: row ", r, " of ", shape_[0]);
    dequantize_line(r, 0, line_length(), out);
  }

  /// All values in C order: size() floats to `out`.
  void dequantize(float* out) const {
    for (std::size_t l = 0; l < line_count_; ++l, out += line_length()) dequantize_line(l, 0, line_length(), out);
  }

  /// All values to out[i0 * strides[0] + i1 * strides[1] + ...], strides in floats, one a dimension.
  void dequantize(float* out, const std::vector<std::ptrdiff_t>& strides) const;

 private:
  static constexpr std::size_t chunk = 512;  // codes of a 4-bit line that are unpacked at a time

  /// Everything but the buffers.
  static QuantizedTensor describe(const Scheme& scheme, Shape shape) {
    QuantizedTensor t;
    t.scheme_ = detail::resolve(scheme, shape);
    t.shape_ = std::move(shape);
    detail::checked_mul(detail::element_count(t.shape_), 4, "shape");
    t.line_count_ = 1;
    for (std::size_t d = 0; d + 1 < t.shape_.size(); ++d)
      t.line_count_ = detail::checked_mul(t.line_count_, t.shape_[d], "shape");
    const std::size_t length = t.line_length();
    const unsigned bits = bits_of(t.format());
    t.line_bytes_ = bits == 4 ? detail::ceil_div(length, 2) : detail::checked_mul(length, bits / 8, "shape");
    t.layout_ = detail::ParamLayout(t.scheme_.granularity, t.shape_);
    detail::checked_mul(t.layout_.count(), 4, "number of scales");
    return t;
  }

  std::size_t scale_bytes() const noexcept { return param_count() * bytes_of(scheme_.scale_type); }
  std::size_t zero_bytes() const noexcept {
    if (scheme_.symmetry == Symmetry::asymmetric) return param_count();
    return scheme_.symmetry == Symmetry::float_offset ? scale_bytes() : 0;
  }

  void validate() const {
    const auto check_size = [this](std::string_view what, std::size_t actual, std::size_t expected) {
      detail::require(actual == expected, what, " of a ", name_of(format()), " tensor of shape ",
                      detail::shape_text(shape_), " take ", expected, " bytes, the buffer has ", actual);
    };
    check_size("codes", codes_.size(), detail::checked_mul(line_count_, line_bytes_, "shape"));
    check_size("scales", scales_.size(), scale_bytes());
    check_size("zeros", zeros_.size(), zero_bytes());
    for (std::size_t p = 0; p < param_count(); ++p) {
      const Grid g = grid(p);
      detail::require(detail::scalar::is_finite(g.scale), "scale ", p, " is not finite");
      detail::require(detail::scalar::is_finite(g.offset), "offset ", p, " is not finite");
      detail::require(format() != Format::int4 || (g.zero >= 0 && g.zero <= 15), "zero point ", p, " is ", g.zero,
                      ", expected 0..15");
    }
  }

  detail::ParamStorage params() const noexcept {
    return {scheme_.format, scheme_.symmetry, scheme_.scale_type, scales_.data(), zeros_.data()};
  }

  Scheme scheme_;
  Shape shape_;
  detail::ParamLayout layout_;
  std::size_t line_count_ = 0;
  std::size_t line_bytes_ = 0;
  Buffer codes_;
  Buffer scales_;
  Buffer zeros_;
};

inline void QuantizedTensor::dequantize(float* out, const std::vector<std::ptrdiff_t>& strides) const {
  detail::require(strides.size() == rank(), "dequantize: ", strides.size(), " strides for a tensor of ", rank(),
                  " dimensions");
  Shape index(rank(), 0);
  std::vector<float> line(line_length());
  const std::ptrdiff_t step = strides.empty() ? 1 : strides.back();
  for (std::size_t l = 0; l < line_count_; ++l) {
    float* target = out;
    for (std::size_t d = 0; d + 1 < rank(); ++d) target += static_cast<std::ptrdiff_t>(index[d]) * strides[d];
    dequantize_line(l, 0, line.size(), line.data());
    for (std::size_t i = 0; i < line.size(); ++i) target[static_cast<std::ptrdiff_t>(i) * step] = line[i];
    for (std::size_t d = rank() - 1; d-- > 0;) {
      if (++index[d] < shape_[d]) break;
      index[d] = 0;
    }
  }
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
