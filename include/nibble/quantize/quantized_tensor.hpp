// The erased middle: codes and parameters of a tensor whose scheme is a run-time value.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/quantize/line_codec.hpp"
#include "nibble/quantize/scheme.hpp"
#include "nibble/quantize/strided.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

namespace detail {

/// Where codes and parameters of a tensor lie, and how many bytes they take.
struct CodeLayout {
  Scheme scheme;  // resolved
  Shape shape;
  ParamLayout params;
  std::size_t line_count = 1;
  std::size_t line_length = 1;
  std::size_t line_bytes = 0;

  CodeLayout() = default;

  /// Throws InvalidArgument for a scheme that does not fit the shape and for sizes that overflow.
  CodeLayout(const Scheme& wanted, Shape lengths) : scheme(resolve(wanted, lengths)), shape(std::move(lengths)) {
    checked_mul(element_count(shape), 4, "shape");
    for (std::size_t d = 0; d + 1 < shape.size(); ++d) line_count = checked_mul(line_count, shape[d], "shape");
    if (!shape.empty()) line_length = shape.back();
    const unsigned bits = bits_of(scheme.format);
    line_bytes = bits < 8 ? ceil_div(checked_mul(line_length, bits, "shape"), 8)
                          : checked_mul(line_length, bits / 8, "shape");
    checked_mul(line_count, line_bytes, "shape");
    params = ParamLayout(scheme.granularity, shape);
    checked_mul(params.count(), 4, "number of scales");
  }

  std::size_t param_count() const noexcept { return has_scales(scheme.format) ? params.count() : 0; }
  std::size_t code_bytes() const noexcept { return line_count * line_bytes; }
  std::size_t scale_bytes() const noexcept { return param_count() * bytes_of(scheme.scale_type); }
  std::size_t zero_bytes() const noexcept {
    if (scheme.symmetry == Symmetry::asymmetric) return param_count();
    return scheme.symmetry == Symmetry::float_offset ? scale_bytes() : 0;
  }

  ParamStorage storage(const void* scales, const void* zeros) const noexcept {
    return {scheme.format, scheme.symmetry, scheme.scale_type, scales, zeros, code_range(scheme)};
  }
};

}  // namespace detail

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
/// | int4, nf4, | 4 bits, 0..15; even index in the low half; each line starts at a new byte   |
/// | fp4        |                                                                             |
/// | int2, int3,| a little-endian stream: element i has bits [i * b, i * b + b) of the line,  |
/// | int5, int6 | b bits a code; bit 0 is the lowest of the first byte; each line starts at a |
/// |            | new byte                                                                    |
///
/// Parameters are stored in C order of param_shape(): the scale in scheme().scale_type; beside it an int8_t zero
/// point where asymmetric (a code), or a float offset in scale_type where float_offset.
class QuantizedTensor {
 public:
  /// An fp32 tensor of shape (0).
  QuantizedTensor() : layout_(Scheme{}, {0}) {}

  /// Puts a tensor together from its parts, e.g. out of a file; the buffers may be borrowed and of any alignment.
  /// Sizes in bytes must be exactly line_count * line_bytes, param_count * bytes_of(scale_type), and for zeros
  /// 0, param_count, or as scales. fp32, fp16 and bf16 have no parameters.
  /// Throws InvalidArgument: invalid scheme, a shape whose size overflows, a wrong buffer size, a scale or offset that
  /// is not finite (negative scales are fine), a zero point that is no code.
  static QuantizedTensor from_parts(const Scheme& scheme, Shape shape, Buffer codes, Buffer scales = {},
                                    Buffer zeros = {}) {
    QuantizedTensor t;
    t.layout_ = detail::CodeLayout(scheme, std::move(shape));
    t.codes_ = std::move(codes);
    t.scales_ = std::move(scales);
    t.zeros_ = std::move(zeros);
    t.validate();
    return t;
  }

  /// Canonical: the axis counts from the front, and the formats without scales are per_tensor and symmetric.
  const Scheme& scheme() const noexcept { return layout_.scheme; }
  Format format() const noexcept { return layout_.scheme.format; }
  const Shape& shape() const noexcept { return layout_.shape; }
  std::size_t rank() const noexcept { return layout_.shape.size(); }
  /// Number of elements.
  std::size_t size() const noexcept { return layout_.line_count * layout_.line_length; }
  bool empty() const noexcept { return size() == 0; }

  std::size_t line_count() const noexcept { return layout_.line_count; }
  /// Elements of a line.
  std::size_t line_length() const noexcept { return layout_.line_length; }
  /// Bytes from one line's codes to the next's.
  std::size_t line_bytes() const noexcept { return layout_.line_bytes; }

  /// Number of scales; 0 for the formats without.
  std::size_t param_count() const noexcept { return layout_.param_count(); }
  /// Empty for per_tensor; (channels) for per_channel; for per_group the tensor's shape with the axis' length replaced
  /// by the number of groups.
  const Shape& param_shape() const noexcept { return layout_.params.shape(); }
  /// The parameter that element i of line l uses.
  std::size_t param_index(std::size_t l, std::size_t i) const noexcept { return layout_.params.line(l).index(i); }
  /// The same for a whole line.
  detail::LineParams line_params(std::size_t l) const noexcept { return layout_.params.line(l); }

  const Buffer& codes() const noexcept { return codes_; }
  const Buffer& scales() const noexcept { return scales_; }
  const Buffer& zeros() const noexcept { return zeros_; }
  /// Bytes of codes and parameters together.
  std::size_t byte_size() const noexcept { return codes_.size() + scales_.size() + zeros_.size(); }

  /// Parameter p < param_count() in fp32.
  Grid grid(std::size_t p) const noexcept { return params().grid(p); }
  float scale(std::size_t p) const noexcept { return grid(p).scale; }
  /// Integer zero point; symmetric: symmetric_zero_of(format()), 8 for int4.
  std::int32_t zero_point(std::size_t p) const noexcept { return grid(p).zero; }
  /// Float offset; 0 unless float_offset.
  float offset(std::size_t p) const noexcept { return grid(p).offset; }

  /// Code of element i of line l as stored: int8 -128..127, the others from 0 up. For fp32, fp16 and bf16 its bits.
  std::int64_t code(std::size_t l, std::size_t i) const noexcept {
    const std::uint8_t* line = line_data(l);
    switch (format()) {
      case Format::fp32: return detail::scalar::load<std::uint32_t>(line, i);
      case Format::fp16:
      case Format::bf16: return detail::scalar::load<std::uint16_t>(line, i);
      case Format::int8: return static_cast<std::int8_t>(line[i]);
      default: return detail::bits_at(bits_of(format()), line, i);
    }
  }

  /// First byte of line l's codes.
  const std::uint8_t* line_data(std::size_t l) const noexcept { return codes_.data() + l * layout_.line_bytes; }

  /// Values of elements [begin, end) of line l, to out[0 .. end - begin). begin is even for the 4-bit formats
  /// and a multiple of 8 for those of 2, 3, 5 and 6 bits.
  void dequantize_line(std::size_t l, std::size_t begin, std::size_t end, float* out) const {
    if (begin == end) return;
    const detail::FpEnvironment environment;
    const std::uint8_t* line = line_data(l);
    const detail::LineParams where = layout_.params.line(l);
    switch (format()) {
      case Format::fp32: std::memcpy(out, line + begin * 4, (end - begin) * 4); return;
      case Format::fp16:
      case Format::bf16: {
        const auto convert =
            format() == Format::fp16 ? detail::kernels().float_from_fp16 : detail::kernels().float_from_bf16;
        std::uint16_t bits[chunk / 2];  // codes in a mapped file may lie at odd addresses
        for (std::size_t i = begin, n; i < end; i += n, out += n) {
          n = std::min(end - i, chunk / 2);
          std::memcpy(bits, line + i * 2, n * 2);
          convert(bits, n, out);
        }
        return;
      }
      default: detail::decode_line(params(), where, begin, end, line, out); return;
    }
  }

  /// Values of row r < shape()[0] of a matrix, shape()[1] floats to `out`.
  void dequantize_row(std::size_t r, float* out) const {
    detail::require(rank() == 2, "dequantize_row: tensor has ", rank(), " dimensions, expected 2");
    detail::require(r < shape()[0], "dequantize_row: row ", r, " of ", shape()[0]);
    dequantize_line(r, 0, line_length(), out);
  }

  /// All values in C order: size() floats to `out`. pool: threads to work with; nullptr: the calling one.
  void dequantize(float* out, ThreadPool* pool = nullptr) const {
    const std::size_t lines = lines_a_task();
    detail::for_tasks(pool, detail::ceil_div(line_count(), lines), [&](std::size_t task, std::size_t) {
      const std::size_t end = std::min(line_count(), (task + 1) * lines);
      for (std::size_t l = task * lines; l < end; ++l)
        dequantize_line(l, 0, line_length(), out + l * line_length());
    });
  }

  /// All values to floats of the same shape, in any order. Throws InvalidArgument where the shapes differ.
  void dequantize(const detail::OutputView& out, ThreadPool* pool = nullptr) const {
    const Shape target = out.layout.shape();
    detail::require(target == shape(), "dequantize: output has shape ", detail::shape_text(target),
                    ", the tensor ", detail::shape_text(shape()));
    std::vector<detail::LineBlock> blocks;
    detail::for_each_block(out.layout, [&](const detail::LineBlock& block) { blocks.push_back(block); });
    std::vector<std::unique_ptr<detail::LineWriter>> writers(
        pool == nullptr ? 1 : static_cast<std::size_t>(pool->threads()));
    detail::for_tasks(pool, blocks.size(), [&](std::size_t task, std::size_t thread) {
      const detail::LineBlock& block = blocks[task];
      if (!writers[thread]) writers[thread] = std::make_unique<detail::LineWriter>(out);
      detail::LineWriter& writer = *writers[thread];
      for (std::size_t l = 0; l < block.count; ++l)
        dequantize_line(block.first + l * block.step, 0, line_length(), writer.line(block, l));
      writer.finish(block);
    });
  }

 private:
  static constexpr std::size_t chunk = 512;  // 16-bit codes, in half of it, that are aligned at a time

  /// Lines of about a quarter of a megabyte of floats.
  std::size_t lines_a_task() const noexcept {
    return std::max<std::size_t>(1, 65536 / std::max<std::size_t>(1, line_length()));
  }

  void validate() const {
    const auto check_size = [this](std::string_view what, std::size_t actual, std::size_t expected) {
      detail::require(actual == expected, what, " of a tensor of format ", name_of(format()), " and shape ",
                      detail::shape_text(shape()), " take ", expected, " bytes, the buffer has ", actual);
    };
    check_size("codes", codes_.size(), layout_.code_bytes());
    check_size("scales", scales_.size(), layout_.scale_bytes());
    check_size("zeros", zeros_.size(), layout_.zero_bytes());
    const ScaleType type = scheme().scale_type;
    const bool offsets = scheme().symmetry == Symmetry::float_offset;
    const bool zero_points = scheme().symmetry == Symmetry::asymmetric && format() != Format::int8;
    const int highest = detail::code_range(scheme()).max;
    if (detail::all_finite(scales_.data(), type, param_count()) &&
        (!offsets || detail::all_finite(zeros_.data(), type, param_count())) &&
        (!zero_points || detail::zeros_fit(bits_of(format()), zeros_.data(), param_count())))
      return;
    for (std::size_t p = 0; p < param_count(); ++p) {
      const Grid g = grid(p);
      detail::require(detail::scalar::is_finite(g.scale), "scale ", p, " is not finite");
      detail::require(detail::scalar::is_finite(g.offset), "offset ", p, " is not finite");
      detail::require(!zero_points || (g.zero >= 0 && g.zero <= highest), "zero point ", p, " is ", g.zero,
                      ", expected 0..", highest);
    }
  }

  detail::ParamStorage params() const noexcept { return layout_.storage(scales_.data(), zeros_.data()); }

  detail::CodeLayout layout_;
  Buffer codes_;
  Buffer scales_;
  Buffer zeros_;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
