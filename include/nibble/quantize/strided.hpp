// The erased middle's view of somebody else's numbers: pointer, scalar type, shape and strides.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/formats/bf16.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/kernels/dispatch.hpp"
#include "nibble/quantize/scheme.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// Shape and strides (in elements, of any sign) of up to max_rank dimensions.
struct StridedLayout {
  std::size_t rank = 0;
  std::size_t lengths[max_rank] = {};
  std::ptrdiff_t strides[max_rank] = {};

  void add(std::size_t length, std::ptrdiff_t stride) {
    require(rank < max_rank, "tensor has more than ", max_rank, " dimensions");
    lengths[rank] = length;
    strides[rank++] = stride;
  }
  Shape shape() const { return Shape(lengths, lengths + rank); }
  std::size_t line_length() const noexcept { return rank == 0 ? 1 : lengths[rank - 1]; }
  std::ptrdiff_t line_stride() const noexcept { return rank == 0 ? 1 : strides[rank - 1]; }
};

enum class ScalarType : std::uint8_t { fp32, fp64, fp16, bf16 };

/// Numbers to read.
struct InputView {
  const void* data = nullptr;
  ScalarType type = ScalarType::fp32;
  StridedLayout layout;
};

/// Floats to write.
struct OutputView {
  float* data = nullptr;
  StridedLayout layout;
};

/// How doubles become float: nearest even, or to odd where a second rounding to 16 bits follows.
enum class Narrowing : std::uint8_t { nearest, to_odd };

/// Lines `first`, `first + step`, ... (C-order numbers), `count` of them: a run along dimension `along`. In the layout
/// at hand their first elements lie at data + offset, data + offset + stride, ...
struct LineBlock {
  std::size_t first = 0;
  std::size_t step = 1;
  std::size_t count = 0;
  std::size_t along = 0;
  std::ptrdiff_t offset = 0;
  std::ptrdiff_t stride = 0;

  /// The same lines in another layout of the same shape.
  LineBlock in(const StridedLayout& layout) const noexcept {
    LineBlock b = *this;
    b.offset = 0;
    b.stride = layout.strides[along];
    if (layout.rank <= 1) return b;
    std::size_t l = first;
    for (std::size_t d = layout.rank - 1; d-- > 0; l /= layout.lengths[d])
      b.offset += static_cast<std::ptrdiff_t>(l % layout.lengths[d]) * layout.strides[d];
    return b;
  }
};

/// Lines a block. Every column of a column-major matrix that a block visits is another page: 64 lines make 256 bytes of
/// each visit (Zen 5, 8192 x 8192: 0.64 ns an element, 0.93 with 16 lines), and at most 2 MB keep the block in cache.
inline std::size_t lines_per_block(std::size_t line_length) noexcept {
  constexpr std::size_t budget = std::size_t{1} << 19;  // floats
  return std::clamp<std::size_t>(budget / std::max<std::size_t>(line_length, 1), 16, 64);
}

/// Calls f(LineBlock) for all lines. Blocks run along the dimension in which neighbouring lines are closest in memory,
/// so that each cache line is fetched once whatever the storage order.
template <class F>
void for_each_block(const StridedLayout& layout, F&& f) {
  for (std::size_t d = 0; d < layout.rank; ++d)
    if (layout.lengths[d] == 0) return;
  if (layout.rank <= 1) {
    LineBlock line;
    line.count = 1;
    f(static_cast<const LineBlock&>(line));
    return;
  }
  const std::size_t last = layout.rank - 1;
  std::size_t line_steps[max_rank];
  line_steps[last - 1] = 1;
  for (std::size_t d = last - 1; d-- > 0;) line_steps[d] = line_steps[d + 1] * layout.lengths[d + 1];
  std::size_t along = last - 1;
  if (std::abs(layout.strides[last]) != 1) {
    for (std::size_t d = 0; d < last; ++d) {
      const bool closer = std::abs(layout.strides[d]) < std::abs(layout.strides[along]);
      if (layout.lengths[d] > 1 && (closer || layout.lengths[along] == 1)) along = d;
    }
  }
  const std::size_t block = lines_per_block(layout.lengths[last]);
  std::size_t index[max_rank] = {};  // of every dimension but `along` and the last
  for (;;) {
    LineBlock b;
    b.step = line_steps[along];
    b.along = along;
    b.stride = layout.strides[along];
    for (std::size_t d = 0; d < last; ++d) {
      b.first += index[d] * line_steps[d];
      b.offset += static_cast<std::ptrdiff_t>(index[d]) * layout.strides[d];
    }
    for (std::size_t done = 0; done < layout.lengths[along]; done += b.count) {
      b.count = std::min(block, layout.lengths[along] - done);
      f(static_cast<const LineBlock&>(b));
      b.first += b.count * b.step;
      b.offset += static_cast<std::ptrdiff_t>(b.count) * b.stride;
    }
    std::size_t d = last;
    while (d-- > 0) {
      if (d == along) continue;
      if (++index[d] < layout.lengths[d]) break;
      index[d] = 0;
    }
    if (d == static_cast<std::size_t>(-1)) return;
  }
}

/// to[l * to_line + i * to_element] = convert(from[l * from_line + i * from_element]), in tiles of 16 elements so that
/// neither side walks through memory a cache line an element.
template <class From, class To, class Convert>
void copy_lines(const From* from, std::ptrdiff_t from_line, std::ptrdiff_t from_element, To* to,
                std::ptrdiff_t to_line, std::ptrdiff_t to_element, std::size_t lines, std::size_t length,
                Convert convert) {
  constexpr std::ptrdiff_t tile = 16;
  const auto n = static_cast<std::ptrdiff_t>(length);
  for (std::ptrdiff_t begin = 0; begin < n; begin += tile) {
    const std::ptrdiff_t end = std::min(n, begin + tile);
    for (std::ptrdiff_t l = 0; l < static_cast<std::ptrdiff_t>(lines); ++l) {
      for (std::ptrdiff_t i = begin; i < end; ++i)
        to[l * to_line + i * to_element] = convert(from[l * from_line + i * from_element]);
    }
  }
}

/// The same for floats whose lines are neighbours in memory, by transposing kernels: element i of all lines lies at
/// columns + i * column_stride, line l at lines + l * pitch, which is at least round_up(length, 16).
/// `to_lines`: from the columns; the other way the lines are only read.
template <bool to_lines>
void move_columns(float* columns, std::ptrdiff_t column_stride, float* lines, std::ptrdiff_t pitch,
                  std::size_t count, std::size_t length) noexcept {
  LanesArgs args;
  args.element = LaneElement::words;
  args.bytes = count * sizeof(float);
  args.step = static_cast<std::size_t>(pitch) * sizeof(float);
  if (column_stride < 0) {
    // Row by row: the kernels' strides are not negative.
    for (std::size_t i = 0; i < length; ++i)
      for (std::size_t l = 0; l < count; ++l) {
        float& line = lines[static_cast<std::ptrdiff_t>(l) * pitch + static_cast<std::ptrdiff_t>(i)];
        float& column = columns[static_cast<std::ptrdiff_t>(i) * column_stride + static_cast<std::ptrdiff_t>(l)];
        (to_lines ? line : column) = to_lines ? column : line;
      }
    return;
  }
  args.row_stride = static_cast<std::size_t>(column_stride) * sizeof(float);
  for (std::size_t i = 0; i < length; i += panel_width) {
    args.rows = reinterpret_cast<std::uint8_t*>(columns + static_cast<std::ptrdiff_t>(i) * column_stride);
    args.row_count = std::min(panel_width, length - i);
    args.lanes = reinterpret_cast<std::uint8_t*>(lines + i);
    (to_lines ? kernels().rows_to_lanes : kernels().lanes_to_rows)(args);
  }
}

/// A block's lines as contiguous floats: in place where they are that already, else gathered into a buffer.
class LineReader {
 public:
  LineReader(const InputView& x, Narrowing narrowing) : x_(x), narrowing_(narrowing) {
    const std::size_t length = x.layout.line_length();
    in_place_ = x.type == ScalarType::fp32 && (x.layout.line_stride() == 1 || length <= 1);
    // A pitch that is no power of two keeps the block's lines from falling into the same cache sets.
    pitch_ = in_place_ ? 0 : static_cast<std::ptrdiff_t>(round_up(length, 16) + 16);
    if (!in_place_) buffer_.resize(static_cast<std::size_t>(pitch_) * lines_per_block(length));
  }

  /// Calls f(line number, const float* line) for the lines of the block.
  template <class F>
  void read(const LineBlock& b, F&& f) {
    const float* line = buffer_.data();
    std::ptrdiff_t pitch = pitch_;
    if (in_place_) {
      line = static_cast<const float*>(x_.data) + b.offset;
      pitch = b.stride;
    } else {
      gather(b);
    }
    for (std::size_t l = 0; l < b.count; ++l)
      f(b.first + l * b.step, line + static_cast<std::ptrdiff_t>(l) * pitch);
  }

 private:
  void gather(const LineBlock& b) {
    switch (x_.type) {
      case ScalarType::fp32:
        if (b.stride == 1) {
          move_columns<true>(const_cast<float*>(static_cast<const float*>(x_.data)) + b.offset,
                             x_.layout.line_stride(), buffer_.data(), pitch_, b.count, x_.layout.line_length());
          return;
        }
        return gather_as<float>(b, [](float v) { return v; });
      case ScalarType::fp64:
        if (narrowing_ == Narrowing::to_odd) return gather_as<double>(b, float_from_double_to_odd);
        return gather_as<double>(b, [](double v) { return static_cast<float>(v); });
      case ScalarType::fp16:
        return gather_as<std::uint16_t>(b, [](std::uint16_t v) { return float_from_fp16(v); });
      case ScalarType::bf16:
        return gather_as<std::uint16_t>(b, [](std::uint16_t v) { return float_from_bf16(v); });
    }
  }

  template <class T, class Convert>
  void gather_as(const LineBlock& b, Convert convert) {
    // Eigen::half and bfloat16 are structs whose first member is the uint16_t that is read here.
    const T* from = static_cast<const T*>(x_.data) + b.offset;
    copy_lines(from, b.stride, x_.layout.line_stride(), buffer_.data(), pitch_, 1, b.count,
               x_.layout.line_length(), convert);
  }

  const InputView& x_;
  Narrowing narrowing_;
  bool in_place_ = false;
  std::ptrdiff_t pitch_ = 0;
  std::vector<float> buffer_;
};

/// The way back: lines are written into place, or into a buffer that is scattered when the block is complete.
class LineWriter {
 public:
  explicit LineWriter(const OutputView& out) : out_(out) {
    const std::size_t length = out.layout.line_length();
    in_place_ = out.layout.line_stride() == 1 || length <= 1;
    pitch_ = in_place_ ? 0 : static_cast<std::ptrdiff_t>(round_up(length, 16) + 16);
    if (!in_place_) buffer_.resize(static_cast<std::size_t>(pitch_) * lines_per_block(length));
  }

  /// Where line l < count of the block goes.
  float* line(const LineBlock& b, std::size_t l) {
    const auto i = static_cast<std::ptrdiff_t>(l);
    return in_place_ ? out_.data + b.offset + i * b.stride : buffer_.data() + i * pitch_;
  }

  void finish(const LineBlock& b) {
    if (in_place_) return;
    if (b.stride == 1) {
      move_columns<false>(out_.data + b.offset, out_.layout.line_stride(), buffer_.data(), pitch_, b.count,
                          out_.layout.line_length());
      return;
    }
    copy_lines(buffer_.data(), pitch_, 1, out_.data + b.offset, b.stride, out_.layout.line_stride(), b.count,
               out_.layout.line_length(), [](float v) { return v; });
  }

 private:
  const OutputView& out_;
  bool in_place_ = false;
  std::ptrdiff_t pitch_ = 0;
  std::vector<float> buffer_;
};

/// "(3, 17)" for element i of line l.
inline std::string index_text(const Shape& shape, std::size_t l, std::size_t i) {
  Shape index(shape.size());
  for (std::size_t d = shape.size(); d-- > 0;) {
    if (d + 1 == shape.size()) {
      index[d] = i;
    } else {
      index[d] = l % shape[d];
      l /= shape[d];
    }
  }
  return shape_text(index);
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
