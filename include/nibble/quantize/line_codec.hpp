// Values to codes and back, a run at a time: the one place where a scheme meets the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/core/fp_env.hpp"
#include "nibble/formats/bit_stream.hpp"
#include "nibble/formats/codebook.hpp"
#include "nibble/kernels/dispatch.hpp"
#include "nibble/quantize/scheme.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// One set of parameters. Integers: real = scale * (q - zero), with a float offset fma(scale, q, offset);
/// nf4 and fp4: scale * level[q].
struct Grid {
  float scale = 1.0F;
  float offset = 0.0F;
  std::int32_t zero = 0;
};

namespace detail {

/// Parameters as they are stored: scales, and zero points or offsets, of any alignment.
struct ParamStorage {
  Format format = Format::fp32;
  Symmetry symmetry = Symmetry::symmetric;
  ScaleType scale_type = ScaleType::fp32;
  const void* scales = nullptr;
  const void* zeros = nullptr;
  CodeRange codes;  // for encoding

  Grid grid(std::size_t p) const noexcept {
    Grid g;
    g.scale = scalar::storage_to_float(scales, scale_type, p);
    if (symmetry == Symmetry::asymmetric)
      g.zero = static_cast<const std::int8_t*>(zeros)[p];
    else if (symmetry == Symmetry::float_offset)
      g.offset = scalar::storage_to_float(zeros, scale_type, p);
    else
      g.zero = symmetric_zero_of(format);
    return g;
  }
};

inline float decode(const ParamStorage& params, const Grid& g, int code) noexcept {
  if (is_codebook(params.format)) return rounded(g.scale * codebook_of(params.format)[code & 0xF]);
  if (params.symmetry == Symmetry::float_offset) return std::fma(g.scale, static_cast<float>(code), g.offset);
  return rounded(g.scale * static_cast<float>(code - g.zero));
}

/// True where all n values of a buffer of scales or offsets are finite: 8 bytes a step, for every load of a model comes
/// through here.
inline bool all_finite(const void* values, ScaleType type, std::size_t n) noexcept {
  // A value whose exponent bits are all set carries into the bit above when one is added to its exponent.
  const std::uint64_t exponents = type == ScaleType::fp32   ? 0x7F8000007F800000U
                                  : type == ScaleType::fp16 ? 0x7C007C007C007C00U
                                                            : 0x7F807F807F807F80U;
  const std::uint64_t ones = type == ScaleType::fp32   ? 0x0080000000800000U
                             : type == ScaleType::fp16 ? 0x0400040004000400U
                                                       : 0x0080008000800080U;
  const std::uint64_t carries = type == ScaleType::fp32 ? 0x8000000080000000U : 0x8000800080008000U;
  const std::size_t bytes = n * bytes_of(type);
  const auto* at = static_cast<const std::uint8_t*>(values);
  std::uint64_t found = 0;
  std::size_t i = 0;
  for (; i + 32 <= bytes; i += 32) {
    std::uint64_t words[4];
    std::memcpy(words, at + i, 32);
    for (const std::uint64_t word : words) found |= (word & exponents) + ones;
  }
  for (; i < bytes; i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, at + i, std::min<std::size_t>(8, bytes - i));
    found |= (word & exponents) + ones;
  }
  return (found & carries) == 0;
}

/// True where all n zero points of unsigned codes of `bits` bits, fewer than 8, are codes.
inline bool zeros_fit(unsigned bits, const void* zeros, std::size_t n) noexcept {
  const auto* at = static_cast<const std::uint8_t*>(zeros);
  std::uint64_t found = 0;
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, at + i, 8);
    found |= word;
  }
  for (; i < n; ++i) found |= at[i];
  return (found & ~(0x0101010101010101U * ((1U << bits) - 1U))) == 0;
}

/// Elements from `i` on, up to n, that share element i's parameter.
inline std::size_t run_length(const LineParams& line, std::size_t i, std::size_t n) noexcept {
  return line.step == 0 ? n - i : std::min(n - i, line.div - i % line.div);
}

/// A part of a line that one call of a kernel takes, and its parameters as floats.
struct LineStretch {
  static constexpr std::size_t max_params = 256;
  std::size_t n = 0;
  std::size_t group = 0;  // as the kernels have it
  std::size_t first_param = 0;
  std::size_t params = 0;
  float scales[max_params];
  float offsets[max_params];

  /// The longest stretch from element i on, up to end. Does not load the parameters.
  void place(const LineParams& line, std::size_t i, std::size_t end) noexcept {
    first_param = line.index(i);
    if (line.per_element()) {
      n = params = std::min(end - i, max_params);
      group = 1;
    } else if (line.step == 0 || i % line.div != 0) {
      n = run_length(line, i, end);
      params = 1;
      group = round_up(n, 16);
    } else {
      n = std::min(end - i, checked_groups(line.div));
      params = ceil_div(n, line.div);
      group = line.div;
    }
  }
  void load(const ParamStorage& p) noexcept {
    load_floats(p.scales, p.scale_type, scales);
    if (p.symmetry == Symmetry::float_offset) load_floats(p.zeros, p.scale_type, offsets);
  }

 private:
  static std::size_t checked_groups(std::size_t div) noexcept {
    constexpr auto most = static_cast<std::size_t>(-1) / 2;
    return div > most / max_params ? most : div * max_params;
  }
  void load_floats(const void* from, ScaleType type, float* to) const noexcept {
    if (params == 1) {
      *to = scalar::storage_to_float(from, type, first_param);
    } else if (type == ScaleType::fp32) {
      std::memcpy(to, static_cast<const std::uint8_t*>(from) + first_param * 4, params * 4);
    } else {
      std::uint16_t bits[max_params];  // storage may lie at odd addresses
      std::memcpy(bits, static_cast<const std::uint8_t*>(from) + first_param * 2, params * 2);
      (type == ScaleType::fp16 ? kernels().float_from_fp16 : kernels().float_from_bf16)(bits, params, to);
    }
  }
};

/// Fills what codes and values have in common.
template <class Args>
void set_parameters(Args& args, const ParamStorage& params, const LineStretch& stretch) noexcept {
  args.format = params.format;
  args.n = stretch.n;
  args.group = stretch.group;
  args.scales = stretch.scales;
  if (params.symmetry == Symmetry::float_offset) args.offsets = stretch.offsets;
  if (params.symmetry == Symmetry::asymmetric)
    args.zeros = static_cast<const std::int8_t*>(params.zeros) + stretch.first_param;
  else if (params.symmetry == Symmetry::symmetric)
    args.zero = symmetric_zero_of(params.format);
}

/// Bytes that lie before element i of a line of codes; i is even for 4 bits and a multiple of 8 for 2, 3, 5 and 6.
inline std::size_t code_offset(Format format, std::size_t i) noexcept {
  switch (bits_of(format)) {
    case 8: return i;
    case 4: return i / 2;
    default: return i / 8 * bits_of(format);
  }
}

/// Calls f(args of a part, its first element) for parts of a line of groups that room for `most` codes holds: whole
/// groups, or multiples of 16 of one that is longer. What the parts share is f's business.
template <class Args, class F>
void for_parts(const Args& all, std::size_t most, F&& f) noexcept {
  for (std::size_t i = 0; i < all.n;) {
    Args part = all;
    const std::size_t g = i / all.group;
    if (all.group <= most) {
      part.n = std::min(all.n - i, most / all.group * all.group);
    } else {
      part.n = std::min({all.n - i, most, (g + 1) * all.group - i});
      part.group = most;
    }
    part.scales += g;
    if (part.offsets != nullptr) part.offsets += g;
    if (part.zeros != nullptr) part.zeros += g;
    part.x += i;
    f(part, i);
    i += part.n;
  }
}

/// KernelTable::quantize_groups for every format: codes of 2, 3, 5 and 6 bits are made as bytes and then packed.
inline void quantize_groups(const QuantizeGroupsArgs& args) noexcept {
  if (!is_bit_stream(args.format)) return kernels().quantize_groups(args);
  constexpr std::size_t most = 1024;
  alignas(64) std::uint8_t codes[most];
  for_parts(args, most, [&](QuantizeGroupsArgs& part, std::size_t begin) {
    part.format = Format::int8;
    part.q = codes;
    kernels().quantize_groups(part);
    pack_bits(bits_of(args.format), codes, part.n, args.q + code_offset(args.format, begin));
  });
}

/// KernelTable::dequantize_groups for every format.
inline void dequantize_groups(const DequantizeGroupsArgs& args) noexcept {
  if (!is_bit_stream(args.format)) return kernels().dequantize_groups(args);
  constexpr std::size_t most = 1024;
  alignas(64) std::uint8_t codes[most];
  for_parts(args, most, [&](DequantizeGroupsArgs& part, std::size_t begin) {
    unpack_bits(bits_of(args.format), args.q + code_offset(args.format, begin), part.n, codes);
    part.format = Format::int8;
    part.q = codes;
    kernels().dequantize_groups(part);
  });
}

/// Codes of a line's n elements, as they are stored.
inline void encode_line(const ParamStorage& params, const LineParams& line, std::size_t n, const float* x,
                        std::uint8_t* codes) noexcept {
  LineStretch stretch;
  for (std::size_t i = 0; i < n; i += stretch.n) {
    stretch.place(line, i, n);
    stretch.load(params);
    QuantizeGroupsArgs args;
    set_parameters(args, params, stretch);
    args.x = x + i;
    args.qmin = params.codes.min;
    args.qmax = params.codes.max;
    args.q = codes + code_offset(params.format, i);
    quantize_groups(args);
  }
}

/// Values of elements [begin, end) of a line, from the line's codes, to out[0 .. end - begin). begin is as in
/// code_offset().
inline void decode_line(const ParamStorage& params, const LineParams& line, std::size_t begin, std::size_t end,
                        const std::uint8_t* codes, float* out) noexcept {
  LineStretch stretch;
  for (std::size_t i = begin; i < end; i += stretch.n) {
    stretch.place(line, i, end);
    stretch.load(params);
    DequantizeGroupsArgs args;
    set_parameters(args, params, stretch);
    args.q = codes + code_offset(params.format, i);
    args.codebook = codebook_of(params.format);
    args.x = out + (i - begin);
    dequantize_groups(args);
  }
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
