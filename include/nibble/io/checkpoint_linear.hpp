// What GPTQ and AWQ checkpoints have in common: codes packed in 32-bit words, inputs x outputs, and the linear layer
// that they become.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/formats/format.hpp"
#include "nibble/io/bytes.hpp"
#include "nibble/io/safetensors.hpp"
#include "nibble/quantize/quantized_tensor.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// A linear layer's weight out of a checkpoint.
struct CheckpointLinear {
  QuantizedTensor weight;  ///< outputs x inputs
  /// Where the inputs are sorted by group (act-order): column j of `weight` belongs to input input_order[j]. Empty:
  /// column j belongs to input j.
  std::vector<std::int32_t> input_order;
};

namespace detail {

/// Which integer format has so many bits. Throws Unsupported.
inline Format checkpoint_format(unsigned bits, std::string_view what) {
  for (const Format f : {Format::int2, Format::int3, Format::int4, Format::int8})
    if (bits_of(f) == bits) return f;
  raise<Unsupported>(concat(what, ": ", bits, " bits a weight are not supported (2, 3, 4 and 8 are)"));
}

/// What is added to an unsigned code of a checkpoint to give ours: int8 is stored around 0.
constexpr int checkpoint_bias(Format format) noexcept { return format == Format::int8 ? -128 : 0; }

/// The tensor `name`; must be there, of `type`, of two dimensions that are not 0.
template <class Source>
const SafetensorsTensor& checkpoint_matrix(const Source& source, const std::string& name, SafetensorsType type) {
  const SafetensorsTensor& t = source.tensor(name);
  require<FormatError>(t.type == type && t.shape.size() == 2 && t.shape[0] != 0 && t.shape[1] != 0, "tensor '",
                       printable(name), "' is ", nibble::name_of(t.type), " ", shape_text(t.shape), ", expected ",
                       nibble::name_of(type), " of two dimensions that are not 0");
  return t;
}

/// The scales of a checkpoint: fp16, bf16 or fp32.
template <class Source>
const SafetensorsTensor& checkpoint_scales(const Source& source, const std::string& name, ScaleType& type) {
  const SafetensorsTensor& t = source.tensor(name);
  require<FormatError>(
      t.type == SafetensorsType::f16 || t.type == SafetensorsType::bf16 || t.type == SafetensorsType::f32,
      "tensor '", printable(name), "' is ", nibble::name_of(t.type), ", expected F16, BF16 or F32");
  type = t.type == SafetensorsType::f16    ? ScaleType::fp16
         : t.type == SafetensorsType::bf16 ? ScaleType::bf16
                                           : ScaleType::fp32;
  return t;
}

inline void require_shape(const SafetensorsTensor& t, const Shape& expected) {
  require<FormatError>(t.shape == expected, "tensor '", printable(t.name), "' has the shape ", shape_text(t.shape),
                       ", expected ", shape_text(expected));
}

/// The order that sorts inputs by group, as every group's columns follow each other; empty where they do already.
/// Throws FormatError for a group that there is not, Unsupported for groups of other sizes than `group`.
inline std::vector<std::int32_t> order_of_groups(const std::vector<std::int32_t>& group_of, std::size_t group,
                                                 std::size_t groups, const std::string& name) {
  std::vector<std::size_t> next(groups);  // where the next input of a group goes
  std::vector<std::size_t> count(groups);
  bool sorted = true;
  for (std::size_t k = 0; k < group_of.size(); ++k) {
    const std::int32_t g = group_of[k];
    require<FormatError>(g >= 0 && static_cast<std::size_t>(g) < groups, "tensor '", printable(name), "': input ",
                         k, " is in group ", g, " of ", groups);
    ++count[static_cast<std::size_t>(g)];
    sorted = sorted && static_cast<std::size_t>(g) == k / group;
  }
  for (std::size_t g = 0; g < groups; ++g) {
    const std::size_t expected = std::min(group, group_of.size() - std::min(group_of.size(), g * group));
    require<Unsupported>(count[g] == expected, "tensor '", printable(name), "': group ", g, " has ", count[g],
                         " inputs, expected ", expected);
    next[g] = g * group;
  }
  if (sorted) return {};
  std::vector<std::int32_t> order(group_of.size());
  for (std::size_t k = 0; k < group_of.size(); ++k)
    order[next[static_cast<std::size_t>(group_of[k])]++] = static_cast<std::int32_t>(k);
  return order;
}

/// Code i of a stream of little-endian words in which codes of `bits` follow each other; word w of the stream is
/// words[w * step].
inline unsigned code_of_words(const std::uint8_t* words, std::size_t step, unsigned bits, std::size_t i) noexcept {
  const std::size_t at = i * bits, w = at / 32, shift = at % 32;
  std::uint32_t value = load_unaligned<std::uint32_t>(words + w * step * 4) >> shift;
  if (shift + bits > 32) value |= load_unaligned<std::uint32_t>(words + (w + 1) * step * 4) << (32 - shift);
  return value & ((1U << bits) - 1U);
}

/// The reverse; the words are 0 before.
inline void put_code(std::uint8_t* words, std::size_t step, unsigned bits, std::size_t i, unsigned code) noexcept {
  const std::size_t at = i * bits, w = at / 32, shift = at % 32;
  const auto add = [&](std::size_t word, std::uint32_t value) {
    std::uint8_t* p = words + word * step * 4;
    store_unaligned(p, load_unaligned<std::uint32_t>(p) | value);
  };
  add(w, code << shift);
  if (shift + bits > 32) add(w + 1, code >> (32 - shift));
}

/// Puts a linear layer together. code(k, n) and zero(g, n): unsigned codes and zero points; scales: groups x outputs,
/// in C order. All zero points in the middle make it symmetric.
template <class Code, class Zero>
QuantizedTensor assemble_linear(Format format, unsigned bits, std::size_t rows, std::size_t cols,
                                std::size_t group, ScaleType scale_type, const SafetensorsTensor& scales,
                                const Code& code, const Zero& zero) {
  const std::size_t groups = ceil_div(cols, group);
  const unsigned middle = 1U << (bits - 1);
  bool symmetric = true;
  for (std::size_t g = 0; g < groups && symmetric; ++g)
    for (std::size_t n = 0; n < rows && symmetric; ++n) symmetric = zero(g, n) == middle;

  Scheme scheme;
  scheme.format = format;
  scheme.symmetry = symmetric ? Symmetry::symmetric : Symmetry::asymmetric;
  scheme.full_range = symmetric;
  scheme.scale_type = scale_type;
  scheme.granularity = groups == 1 ? Granularity::per_channel(0) : Granularity::per_group(group, 1);
  const CodeLayout layout(scheme, {rows, cols});

  const std::size_t size = bytes_of(scale_type);
  const int bias = checkpoint_bias(format);
  Buffer scale_buffer(layout.scale_bytes());
  Buffer zero_buffer(layout.zero_bytes());
  std::uint8_t* const scale_bytes = scale_buffer.mutable_data();
  std::uint8_t* const zero_bytes = zero_buffer.mutable_data();
  for (std::size_t g = 0; g < groups; ++g)
    for (std::size_t n = 0; n < rows; ++n) {
      const std::uint8_t* from = scales.data.data() + (g * rows + n) * size;
      require<FormatError>(all_finite(from, scale_type, 1), "tensor '", printable(scales.name),
                           "': the scale of group ", g, " and output ", n, " is not finite");
      std::memcpy(scale_bytes + (n * groups + g) * size, from, size);
      if (!symmetric) zero_bytes[n * groups + g] = static_cast<std::uint8_t>(static_cast<int>(zero(g, n)) + bias);
    }

  Buffer code_buffer(layout.code_bytes());
  std::uint8_t* const code_bytes = code_buffer.mutable_data();
  // Outputs by sixteen: a checkpoint's neighbours are outputs, ours are inputs.
  for (std::size_t begin = 0; begin < rows; begin += 16)
    for (std::size_t k = 0; k < cols; ++k)
      for (std::size_t n = begin; n < std::min(rows, begin + 16); ++n) {
        std::uint8_t* line = code_bytes + n * layout.line_bytes;
        const unsigned c = code(k, n);
        if (format == Format::int8) {
          line[k] = static_cast<std::uint8_t>(static_cast<int>(c) + bias);
          continue;
        }
        const std::size_t byte = k * bits / 8, shift = k * bits % 8;
        line[byte] = static_cast<std::uint8_t>(line[byte] | c << shift);
        if (shift + bits > 8) line[byte + 1] = static_cast<std::uint8_t>(line[byte + 1] | c >> (8 - shift));
      }
  return QuantizedTensor::from_parts(scheme, {rows, cols}, std::move(code_buffer), std::move(scale_buffer),
                                     std::move(zero_buffer));
}

/// A linear layer taken apart as checkpoints want it.
struct LinearParts {
  unsigned bits = 0;
  std::size_t rows = 0, cols = 0, group = 0, groups = 0;
  const QuantizedTensor* tensor = nullptr;

  /// Throws Unsupported for what a checkpoint cannot hold.
  LinearParts(const QuantizedTensor& t, const std::string& name) : tensor(&t) {
    const Scheme& s = t.scheme();
    const auto refuse = [&](const std::string& why) {
      raise<Unsupported>("'" + printable(name) + "' has no place in a checkpoint: " + why);
    };
    if (t.rank() != 2) refuse("it is no matrix");
    if (!is_integer(s.format)) refuse(concat("it is ", nibble::name_of(s.format), ", expected integers"));
    if (s.symmetry == Symmetry::float_offset) refuse("it has float offsets, expected integer zero points");
    bits = bits_of(s.format);
    rows = t.shape()[0];
    cols = t.shape()[1];
    if (rows == 0 || cols == 0) refuse("it is empty");
    using Kind = Granularity::Kind;
    const bool per_row = s.granularity.kind == Kind::per_channel && s.granularity.axis == 0;
    if (!per_row && !(s.granularity.kind == Kind::per_group && s.granularity.axis == 1))
      refuse("its scales are neither of rows nor of groups along them");
    group = per_row ? cols : s.granularity.group_size;
    groups = ceil_div(cols, group);
  }

  unsigned code(std::size_t n, std::size_t k) const noexcept {
    return static_cast<unsigned>(static_cast<int>(tensor->code(n, k)) - checkpoint_bias(tensor->format()));
  }
  unsigned zero(std::size_t n, std::size_t g) const noexcept {
    return static_cast<unsigned>(static_cast<int>(tensor->zero_point(n * groups + g)) -
                                 checkpoint_bias(tensor->format()));
  }
  /// scales, groups x outputs.
  SafetensorsTensor scales(const std::string& name) const {
    const ScaleType type = tensor->scheme().scale_type;
    SafetensorsTensor out{name,
                          type == ScaleType::fp16   ? SafetensorsType::f16
                          : type == ScaleType::bf16 ? SafetensorsType::bf16
                                                    : SafetensorsType::f32,
                          {groups, rows},
                          Buffer(tensor->scales().size())};
    const std::size_t size = bytes_of(type);
    for (std::size_t n = 0; n < rows; ++n)
      for (std::size_t g = 0; g < groups; ++g)
        std::memcpy(out.data.mutable_data() + (g * rows + n) * size,
                    tensor->scales().data() + (n * groups + g) * size, size);
    return out;
  }
};

/// An int32 matrix of zeros, to be filled.
inline SafetensorsTensor word_matrix(const std::string& name, std::size_t rows, std::size_t cols) {
  return {name, SafetensorsType::i32, {rows, cols}, Buffer(checked_mul(checked_mul(rows, cols, name), 4, name))};
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
