// Between GGUF tensors and quantized tensors, without requantizing: every value stays the same, to the bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/formats/bf16.hpp"
#include "nibble/formats/bit_stream.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/formats/int4.hpp"
#include "nibble/io/gguf.hpp"
#include "nibble/quantize/quantized_tensor.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// The scheme that a GGUF type's tensors get in to_quantized():
///
/// | GGUF           | format | symmetry     | groups of | scales |
/// |----------------|--------|--------------|-----------|--------|
/// | F32, F16, BF16 | same   |              |           |        |
/// | Q4_0           | int4   | symmetric    | 32        | fp16   |
/// | Q4_1           | int4   | float_offset | 32        | fp16   |
/// | Q4_K           | int4   | float_offset | 32        | fp32   |
/// | Q5_0           | int5   | symmetric    | 32        | fp16   |
/// | Q5_1           | int5   | float_offset | 32        | fp16   |
/// | Q5_K           | int5   | float_offset | 32        | fp32   |
/// | Q6_K           | int6   | symmetric    | 16        | fp32   |
/// | Q8_0           | int8   | symmetric    | 32        | fp16   |
///
/// Throws Unsupported for the other types.
inline Scheme gguf_scheme(GgufType type) {
  Scheme scheme;
  scheme.scale_type = ScaleType::fp16;
  scheme.granularity = Granularity::per_group(32);
  switch (type) {
    case GgufType::f32: return {Format::fp32, Symmetry::symmetric, {}, ScaleType::fp32};
    case GgufType::f16: return {Format::fp16, Symmetry::symmetric, {}, ScaleType::fp32};
    case GgufType::bf16: return {Format::bf16, Symmetry::symmetric, {}, ScaleType::fp32};
    case GgufType::q4_0: scheme.format = Format::int4; return scheme;
    case GgufType::q4_1:
      scheme.format = Format::int4;
      scheme.symmetry = Symmetry::float_offset;
      return scheme;
    case GgufType::q4_k:
      scheme.format = Format::int4;
      scheme.symmetry = Symmetry::float_offset;
      scheme.scale_type = ScaleType::fp32;
      return scheme;
    case GgufType::q5_0: scheme.format = Format::int5; return scheme;
    case GgufType::q8_0: scheme.format = Format::int8; return scheme;
    case GgufType::q5_1:
      scheme.format = Format::int5;
      scheme.symmetry = Symmetry::float_offset;
      return scheme;
    case GgufType::q5_k:
      scheme.format = Format::int5;
      scheme.symmetry = Symmetry::float_offset;
      scheme.scale_type = ScaleType::fp32;
      return scheme;
    case GgufType::q6_k:
      scheme.format = Format::int6;
      scheme.granularity = Granularity::per_group(16);
      scheme.scale_type = ScaleType::fp32;
      return scheme;
    default: break;
  }
  detail::raise<Unsupported>(detail::concat("GGUF type ", static_cast<std::uint32_t>(type), " (", name_of(type),
                                            ") has no equal among Nibble's formats"));
}

namespace detail {

inline void put_scale(std::uint8_t* to, ScaleType type, std::size_t index, float value) noexcept {
  if (type == ScaleType::fp32)
    store_unaligned(to + 4 * index, value);
  else
    store_unaligned(to + 2 * index, fp16_from_float(value));  // exact: it was one
}

}  // namespace detail

/// The same tensor with the codes and scales of the file, decoding to the same bits. The shape is GGUF's reversed,
/// so that dims {k, n} become n x k (outputs x inputs). F32, F16 and BF16 stay in the map; the others are
/// rearranged. Throws Unsupported (gguf_scheme), FormatError for a scale that is NaN or Inf.
inline QuantizedTensor to_quantized(const GgufTensor& tensor) {
  const Scheme scheme = gguf_scheme(tensor.type);
  Shape shape;
  for (std::size_t i = tensor.rank; i-- > 0;) shape.push_back(static_cast<std::size_t>(tensor.dims[i]));
  if (!has_scales(scheme.format)) return QuantizedTensor::from_parts(scheme, std::move(shape), tensor.data);

  const GgufTypeInfo& info = *gguf_type_info(tensor.type);
  const std::size_t elements = static_cast<std::size_t>(tensor.elements);
  const unsigned bits = bits_of(scheme.format);
  const bool offsets = scheme.symmetry == Symmetry::float_offset;
  const std::size_t params = elements / scheme.granularity.group_size;
  Buffer codes(elements / 8 * bits);  // blocks are multiples of 32: lines end with a byte
  Buffer scales(params * bytes_of(scheme.scale_type));
  Buffer zeros(offsets ? scales.size() : 0);
  std::uint8_t* const code_bytes = codes.mutable_data();
  std::uint8_t* const scale_bytes = scales.mutable_data();
  std::uint8_t* const zero_bytes = zeros.mutable_data();

  const detail::FpEnvironment environment;
  const int bias = offsets ? 0 : symmetric_zero_of(scheme.format);  // unpacked around zero
  detail::GgufBlock block;
  std::uint8_t unbiased[sizeof block.code];
  const std::uint8_t* p = tensor.data.data();
  for (std::size_t at = 0, param = 0; at < elements; at += info.block_elements, p += info.block_bytes) {
    detail::gguf_unpack_block(tensor.type, p, block);
    for (std::size_t i = 0; i < block.elements; ++i) unbiased[i] = static_cast<std::uint8_t>(block.code[i] + bias);
    std::uint8_t* const to = code_bytes + at / 8 * bits;
    if (bits == 8)
      std::memcpy(to, unbiased, block.elements);
    else if (bits == 4)
      detail::pack_nibbles(unbiased, block.elements, to);
    else
      detail::pack_bits(bits, unbiased, block.elements, to);
    for (std::size_t g = 0; g < block.elements / block.group; ++g, ++param) {
      if (!std::isfinite(block.scale[g]) || (offsets && !std::isfinite(block.offset[g])))
        detail::raise<FormatError>(detail::concat("tensor '", detail::printable(tensor.name),
                                                  "': the scale of block ", at / info.block_elements,
                                                  " is not finite"));
      detail::put_scale(scale_bytes, scheme.scale_type, param, block.scale[g]);
      if (offsets) detail::put_scale(zero_bytes, scheme.scale_type, param, block.offset[g]);
    }
  }
  return QuantizedTensor::from_parts(scheme, std::move(shape), std::move(codes), std::move(scales),
                                     std::move(zeros));
}

namespace detail {

/// Parameter p's offset as Q4_1 has it: what a code of 0 stands for.
inline float gguf_offset(const QuantizedTensor& t, std::size_t p) noexcept {
  if (t.scheme().symmetry == Symmetry::float_offset) return t.offset(p);
  const std::int32_t zero = t.zero_point(p);
  return zero == 0 ? 0.0F : -(t.scale(p) * static_cast<float>(zero));  // 11 bits times 4: exact
}

/// Why `type` cannot hold exactly the values of `t`, or empty where it can.
inline std::string gguf_obstacle(const QuantizedTensor& t, GgufType type) {
  const Scheme& scheme = t.scheme();
  if (t.rank() > gguf_max_rank) return "it has more than 4 dimensions";
  if (type == GgufType::f32) return "";
  if (type == GgufType::f16) return scheme.format == Format::fp16 ? "" : "it is not fp16";
  if (type == GgufType::bf16) return scheme.format == Format::bf16 ? "" : "it is not bf16";
  if (!is_integer(scheme.format)) return concat("it is ", name_of(scheme.format));
  // An integer zero point z is the float offset -d * z where that is an fp16 number: d * q - d * z has no rounding then.
  const bool by_zero = type == GgufType::q4_1 && scheme.symmetry == Symmetry::asymmetric;
  const bool offsets = scheme.symmetry == Symmetry::float_offset || by_zero;
  if (offsets != (type == GgufType::q4_1))
    return offsets ? "it has float offsets" : "its zero points are no float offsets";
  if (offsets && bits_of(scheme.format) > 4) return concat("its codes have ", bits_of(scheme.format), " bits");
  if (t.line_length() % 32 != 0) return concat("its rows of ", t.line_length(), " are no multiple of 32");

  const auto in_fp16 = [](float v) {
    return bits_from_float(float_from_fp16(fp16_from_float(v))) == bits_from_float(v);
  };
  for (std::size_t p = 0; p < t.param_count(); ++p) {
    if (!in_fp16(t.scale(p)) || (offsets && !in_fp16(t.offset(p)))) return "its scales are not fp16";
    if (!by_zero) continue;
    if (t.scale(p) < 0.0F) return concat("scale ", p, " is negative, and 0 would change its sign");
    if (!in_fp16(gguf_offset(t, p)))
      return concat("scale ", p, " times its zero point ", t.zero_point(p), " is no fp16 number");
  }

  const int lowest = type == GgufType::q8_0 ? -128 : -8, highest = type == GgufType::q8_0 ? 127 : 7;
  for (std::size_t l = 0; l < t.line_count(); ++l) {
    const LineParams where = t.line_params(l);
    if (where.step != 0 && where.div % 32 != 0 && where.div < t.line_length())
      return where.per_element() ? "its scales are not along the rows"
                                 : concat("its groups of ", where.div, " are no multiple of 32");
    if (offsets) continue;
    for (std::size_t begin = 0; begin < t.line_length(); begin += 32) {
      const int zero = t.zero_point(where.index(begin));
      for (std::size_t i = begin; i < begin + 32; ++i) {
        const int value = static_cast<int>(t.code(l, i)) - zero;
        if (value < lowest || value > highest)
          return concat("code minus zero point reaches ", value, ", outside ", lowest, "..", highest);
      }
    }
  }
  return "";
}

}  // namespace detail

/// The smallest type that GgufWriter's encoders know (Q4_0, Q4_1, Q8_0, F16, BF16, F32) and that holds exactly the
/// values of `t`. F32 always does. The block types ask for int codes, scales that are fp16 numbers, rows of a
/// multiple of 32, and groups of a multiple of 32 along the rows, a scale per row, or one scale.
inline GgufType gguf_type_for(const QuantizedTensor& t) {
  for (const GgufType type : {GgufType::q4_0, GgufType::q4_1, GgufType::q8_0, GgufType::f16, GgufType::bf16})
    if (detail::gguf_obstacle(t, type).empty()) return type;
  return GgufType::f32;
}

/// GGUF's dimensions of a tensor: its shape reversed.
inline std::vector<std::uint64_t> gguf_dims(const QuantizedTensor& t) {
  return {t.shape().rbegin(), t.shape().rend()};
}

/// The bytes of `t` as a tensor of `type`, for GgufWriter::write_tensor. Decoded by any reader they give the
/// values of `t`, to the bit. Throws Unsupported where the type cannot hold them, with the reason and the nearest
/// type that can.
inline Buffer to_gguf(const QuantizedTensor& t, GgufType type) {
  const std::string obstacle = detail::gguf_obstacle(t, type);
  if (!obstacle.empty())
    detail::raise<Unsupported>(detail::concat("a tensor of ", name_of(t.format()), " ",
                                              name_of(t.scheme().symmetry), " cannot be stored exactly as GGUF ",
                                              name_of(type), ": ", obstacle, "; the nearest type that can is ",
                                              name_of(gguf_type_for(t))));
  if ((type == GgufType::f32 && t.format() == Format::fp32) || type == GgufType::f16 || type == GgufType::bf16)
    return t.codes();
  Buffer out(gguf_bytes(type, t.size()));
  std::uint8_t* p = out.mutable_data();
  const std::size_t length = t.line_length();
  if (type == GgufType::f32) {
    std::vector<float> line(length);
    for (std::size_t l = 0; l < t.line_count(); ++l) {
      t.dequantize_line(l, 0, length, line.data());
      detail::copy_bytes(p + l * length * 4, line.data(), length * 4);
    }
    return out;
  }
  for (std::size_t l = 0; l < t.line_count(); ++l) {
    const detail::LineParams where = t.line_params(l);
    for (std::size_t begin = 0; begin < length; begin += 32) {
      const std::size_t param = where.index(begin);
      const int zero = type == GgufType::q4_1 ? 0 : t.zero_point(param);
      detail::store_unaligned(p, fp16_from_float(t.scale(param)));
      p += 2;
      if (type == GgufType::q4_1) {
        detail::store_unaligned(p, fp16_from_float(detail::gguf_offset(t, param)));
        p += 2;
      }
      int code[32];
      for (std::size_t i = 0; i < 32; ++i) code[i] = static_cast<int>(t.code(l, begin + i)) - zero;
      if (type == GgufType::q8_0) {
        for (std::size_t i = 0; i < 32; ++i) *p++ = static_cast<std::uint8_t>(code[i]);
      } else {
        for (int& c : code) c += type == GgufType::q4_0 ? 8 : 0;
        detail::gguf_pack_nibbles(code, p);
        p += 16;
      }
    }
  }
  return out;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
