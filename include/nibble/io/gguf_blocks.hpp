// GGUF's tensor types: block sizes, decoding of every type that Nibble reads, encoding of those that it writes.
//
// Layouts and roundings are those of ggml (ggml-common.h, ggml-quants.c) and of its NumPy twin, the PyPI package
// `gguf`: encoders keep GGUF's own rounding, whatever Nibble's quantizers do, and agree with that package bit for
// bit.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string_view>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/formats/bf16.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/io/bytes.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// A GGUF tensor type, with the number that files store. A file may hold numbers that are not named here.
enum class GgufType : std::uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q8_1 = 9,
  q2_k = 10,
  q3_k = 11,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  q8_k = 15,
  iq2_xxs = 16,
  iq2_xs = 17,
  iq3_xxs = 18,
  iq1_s = 19,
  iq4_nl = 20,
  iq3_s = 21,
  iq2_s = 22,
  iq4_xs = 23,
  i8 = 24,
  i16 = 25,
  i32 = 26,
  i64 = 27,
  f64 = 28,
  iq1_m = 29,
  bf16 = 30,
  tq1_0 = 34,
  tq2_0 = 35,
  mxfp4 = 39,
};

/// What is known of a tensor type. A row (the first dimension) holds a whole number of blocks.
struct GgufTypeInfo {
  GgufType type = GgufType::f32;
  std::string_view name;           ///< as ggml prints it, e.g. "Q4_K"
  std::size_t block_elements = 0;  ///< weights in one block
  std::size_t block_bytes = 0;     ///< bytes of one block
  bool decodes = false;            ///< gguf_dequantize takes it
  bool encodes = false;            ///< gguf_quantize makes it
};

namespace detail {

inline constexpr GgufTypeInfo gguf_types[] = {
    {GgufType::f32, "F32", 1, 4, true, true},
    {GgufType::f16, "F16", 1, 2, true, true},
    {GgufType::bf16, "BF16", 1, 2, true, true},
    {GgufType::q4_0, "Q4_0", 32, 18, true, true},
    {GgufType::q4_1, "Q4_1", 32, 20, true, true},
    {GgufType::q5_0, "Q5_0", 32, 22, true, false},
    {GgufType::q5_1, "Q5_1", 32, 24, true, false},
    {GgufType::q8_0, "Q8_0", 32, 34, true, true},
    {GgufType::q4_k, "Q4_K", 256, 144, true, false},
    {GgufType::q5_k, "Q5_K", 256, 176, true, false},
    {GgufType::q6_k, "Q6_K", 256, 210, true, false},
    {GgufType::q8_1, "Q8_1", 32, 36, false, false},
    {GgufType::q2_k, "Q2_K", 256, 84, false, false},
    {GgufType::q3_k, "Q3_K", 256, 110, false, false},
    {GgufType::q8_k, "Q8_K", 256, 292, false, false},
    {GgufType::iq2_xxs, "IQ2_XXS", 256, 66, false, false},
    {GgufType::iq2_xs, "IQ2_XS", 256, 74, false, false},
    {GgufType::iq3_xxs, "IQ3_XXS", 256, 98, false, false},
    {GgufType::iq1_s, "IQ1_S", 256, 50, false, false},
    {GgufType::iq4_nl, "IQ4_NL", 32, 18, false, false},
    {GgufType::iq3_s, "IQ3_S", 256, 110, false, false},
    {GgufType::iq2_s, "IQ2_S", 256, 82, false, false},
    {GgufType::iq4_xs, "IQ4_XS", 256, 136, false, false},
    {GgufType::i8, "I8", 1, 1, false, false},
    {GgufType::i16, "I16", 1, 2, false, false},
    {GgufType::i32, "I32", 1, 4, false, false},
    {GgufType::i64, "I64", 1, 8, false, false},
    {GgufType::f64, "F64", 1, 8, false, false},
    {GgufType::iq1_m, "IQ1_M", 256, 56, false, false},
    {GgufType::tq1_0, "TQ1_0", 256, 54, false, false},
    {GgufType::tq2_0, "TQ2_0", 256, 66, false, false},
    {GgufType::mxfp4, "MXFP4", 32, 17, false, false},
};

}  // namespace detail

/// What is known of a type, or nullptr for a number that Nibble does not know.
constexpr const GgufTypeInfo* gguf_type_info(GgufType type) noexcept {
  for (const GgufTypeInfo& info : detail::gguf_types)
    if (info.type == type) return &info;
  return nullptr;
}

/// "Q4_1", or "?" for a number that Nibble does not know.
constexpr std::string_view name_of(GgufType type) noexcept {
  const GgufTypeInfo* info = gguf_type_info(type);
  return info != nullptr ? info->name : "?";
}

namespace detail {

inline float gguf_half_at(const std::uint8_t* p) noexcept {
  return float_from_fp16(load_unaligned<std::uint16_t>(p));
}

/// The 6-bit scale and minimum of sub-block j (0..7) in the 12 bytes of a Q4_K or Q5_K block.
inline void gguf_k_scale_min(const std::uint8_t* s, std::size_t j, unsigned& scale, unsigned& minimum) noexcept {
  if (j < 4) {
    scale = s[j] & 63U;
    minimum = s[j + 4] & 63U;
  } else {
    scale = (s[j + 4] & 15U) | (static_cast<unsigned>(s[j - 4] >> 6) << 4);
    minimum = (s[j + 4] >> 4) | (static_cast<unsigned>(s[j] >> 6) << 4);
  }
}

/// One decoded block, before scales meet codes: value i = scale[i / group] * code[i] + offset[i / group].
/// Products of all of these types are exact in fp32 (at most 11 + 7 + 5 bits), so that one rounding, or two, or
/// none gives the same bits.
struct GgufBlock {
  std::size_t elements = 0;
  std::size_t group = 0;  // codes that share a scale
  bool has_offset = false;
  float scale[16];
  float offset[8];
  std::int8_t code[256];
};

/// Takes a block of a quantized type apart. `type` is one of those that decode, and not a float.
inline void gguf_unpack_block(GgufType type, const std::uint8_t* p, GgufBlock& b) noexcept {
  const auto nibbles = [&b](const std::uint8_t* qs, int bias) {
    for (std::size_t j = 0; j < 16; ++j) {
      b.code[j] = static_cast<std::int8_t>((qs[j] & 15) - bias);
      b.code[j + 16] = static_cast<std::int8_t>((qs[j] >> 4) - bias);
    }
  };
  const auto fifth_bits = [&b](const std::uint8_t* qh, const std::uint8_t* qs, int bias) {
    const auto high = load_unaligned<std::uint32_t>(qh);
    for (std::size_t j = 0; j < 16; ++j) {
      b.code[j] = static_cast<std::int8_t>(static_cast<int>((qs[j] & 15U) | (((high >> j) & 1U) << 4)) - bias);
      b.code[j + 16] =
          static_cast<std::int8_t>(static_cast<int>((qs[j] >> 4) | (((high >> (j + 16)) & 1U) << 4)) - bias);
    }
  };
  b.elements = 32;
  b.group = 32;
  b.has_offset = false;
  switch (type) {
    case GgufType::q4_0:
      b.scale[0] = gguf_half_at(p);
      nibbles(p + 2, 8);
      break;
    case GgufType::q4_1:
      b.has_offset = true;
      b.scale[0] = gguf_half_at(p);
      b.offset[0] = gguf_half_at(p + 2);
      nibbles(p + 4, 0);
      break;
    case GgufType::q5_0:
      b.scale[0] = gguf_half_at(p);
      fifth_bits(p + 2, p + 6, 16);
      break;
    case GgufType::q5_1:
      b.has_offset = true;
      b.scale[0] = gguf_half_at(p);
      b.offset[0] = gguf_half_at(p + 2);
      fifth_bits(p + 4, p + 8, 0);
      break;
    case GgufType::q8_0:
      b.scale[0] = gguf_half_at(p);
      std::memcpy(b.code, p + 2, 32);
      break;
    case GgufType::q4_k:
    case GgufType::q5_k: {
      const bool five = type == GgufType::q5_k;
      const float d = gguf_half_at(p);
      const float dmin = gguf_half_at(p + 2);
      const std::uint8_t* qh = p + 16;
      const std::uint8_t* qs = five ? p + 48 : p + 16;
      b.elements = 256;
      b.has_offset = true;
      for (std::size_t j = 0; j < 8; ++j) {
        unsigned scale = 0, minimum = 0;
        gguf_k_scale_min(p + 4, j, scale, minimum);
        b.scale[j] = d * static_cast<float>(scale);
        b.offset[j] = -(dmin * static_cast<float>(minimum));
        for (std::size_t i = 0; i < 32; ++i) {
          const unsigned pair = qs[j / 2 * 32 + i];
          unsigned code = j % 2 == 0 ? pair & 15U : pair >> 4;
          if (five) code |= ((static_cast<unsigned>(qh[i]) >> j) & 1U) << 4;
          b.code[j * 32 + i] = static_cast<std::int8_t>(code);
        }
      }
      break;
    }
    case GgufType::q6_k: {
      const std::uint8_t* ql = p;
      const std::uint8_t* qh = p + 128;
      const float d = gguf_half_at(p + 208);
      b.elements = 256;
      b.group = 16;
      for (std::size_t j = 0; j < 16; ++j)
        b.scale[j] = d * static_cast<float>(static_cast<std::int8_t>(p[192 + j]));
      for (std::size_t i = 0; i < 256; ++i) {
        // Per 128 values: 64 bytes of low nibbles (first 64 values low, next 64 high), 32 bytes of 2-bit tops.
        const std::size_t half = i / 128, quarter = i % 128 / 32, lane = i % 32;
        const unsigned low = ql[half * 64 + quarter % 2 * 32 + lane] >> (quarter / 2 * 4) & 15U;
        const unsigned high = static_cast<unsigned>(qh[half * 32 + lane]) >> (2 * quarter) & 3U;
        b.code[i] = static_cast<std::int8_t>(static_cast<int>(low | (high << 4)) - 32);
      }
      break;
    }
    default: break;
  }
}

/// Float to integer as NumPy's cast gives on x86 once 1/d has overflowed (d is 0 in fp16 then, the code has no
/// meaning).
inline int gguf_to_int(float value) noexcept {
  return std::fabs(value) < 2147483648.0F ? static_cast<int>(value) : 0;
}

inline std::uint16_t gguf_checked_half(float value, const char* what, std::string_view type, std::size_t block) {
  const std::uint16_t bits = fp16_from_float(value);
  if ((bits & 0x7C00U) == 0x7C00U)
    raise<InvalidArgument>(concat("gguf_quantize: the ", what, " of block ", block, " is ", value,
                                  ", beyond what fp16 holds; ", type, " cannot store it"));
  return bits;
}

inline void gguf_pack_nibbles(const int* q, std::uint8_t* out) noexcept {
  for (std::size_t j = 0; j < 16; ++j) {
    const auto clip = [](int v) { return static_cast<unsigned>(v < 0 ? 0 : v > 15 ? 15 : v); };
    out[j] = static_cast<std::uint8_t>(clip(q[j]) | (clip(q[j + 16]) << 4));
  }
}

inline void gguf_pack_block(GgufType type, const float* x, std::uint8_t* out, std::size_t block) {
  int q[32];
  if (type == GgufType::q4_1) {
    float low = x[0], high = x[0];
    for (std::size_t i = 1; i < 32; ++i) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
    const float d = (high - low) / 15.0F;
    const float inverse = d == 0.0F ? 0.0F : 1.0F / d;
    store_unaligned(out, gguf_checked_half(d, "scale", "Q4_1", block));
    store_unaligned(out + 2, gguf_checked_half(low, "minimum", "Q4_1", block));
    for (std::size_t i = 0; i < 32; ++i) {
      const float scaled = rounded(rounded(x[i] - low) * inverse);
      q[i] = gguf_to_int(scaled + 0.5F);
    }
    gguf_pack_nibbles(q, out + 4);
    return;
  }
  float peak = 0.0F, signed_peak = x[0];
  for (std::size_t i = 0; i < 32; ++i) {
    if (std::fabs(x[i]) > peak) {
      peak = std::fabs(x[i]);
      signed_peak = x[i];
    }
  }
  if (type == GgufType::q4_0) {
    const float d = signed_peak / -8.0F;
    const float inverse = d == 0.0F ? 0.0F : 1.0F / d;
    store_unaligned(out, gguf_checked_half(d, "scale", "Q4_0", block));
    for (std::size_t i = 0; i < 32; ++i) q[i] = gguf_to_int(rounded(x[i] * inverse) + 8.5F);
    gguf_pack_nibbles(q, out + 2);
  } else {
    const float d = peak / 127.0F;
    const float inverse = d == 0.0F ? 0.0F : 1.0F / d;
    store_unaligned(out, gguf_checked_half(d, "scale", "Q8_0", block));
    for (std::size_t i = 0; i < 32; ++i) {
      const float scaled = rounded(x[i] * inverse);
      const float magnitude = std::fabs(scaled);
      const float whole = std::floor(magnitude);
      const int nearest = gguf_to_int(whole) + (magnitude - whole >= 0.5F ? 1 : 0);  // half away from zero
      out[2 + i] = static_cast<std::uint8_t>(scaled < 0.0F ? -nearest : nearest);
    }
  }
}

inline const GgufTypeInfo& gguf_require_type(GgufType type, bool GgufTypeInfo::*able, std::string_view function) {
  const GgufTypeInfo* info = gguf_type_info(type);
  if (info == nullptr || !(info->*able))
    raise<Unsupported>(concat(function, ": GGUF type ", static_cast<std::uint32_t>(type), " (", name_of(type),
                              ") is not one that Nibble can ",
                              able == &GgufTypeInfo::decodes ? "decode" : "encode"));
  return *info;
}

}  // namespace detail

/// Bytes of `elements` weights of a type. Throws InvalidArgument where they are no whole number of blocks or the
/// size overflows, Unsupported for a type that is not known.
inline std::size_t gguf_bytes(GgufType type, std::size_t elements) {
  const GgufTypeInfo* info = gguf_type_info(type);
  if (info == nullptr)
    detail::raise<Unsupported>(
        detail::concat("gguf_bytes: GGUF type ", static_cast<std::uint32_t>(type), " is not known"));
  detail::require(elements % info->block_elements == 0, "gguf_bytes: ", elements, " elements of ", info->name,
                  " are no whole number of blocks of ", info->block_elements);
  return detail::checked_mul(elements / info->block_elements, info->block_bytes, "gguf_bytes");
}

/// Decodes `elements` weights (a whole number of blocks) from `bytes` (of any alignment) to fp32, bit-equal to
/// gguf.quants.dequantize. Any bytes are valid input; scales of NaN or Inf give NaN or Inf.
/// Throws Unsupported for a type that does not decode, InvalidArgument for a count that is no multiple of the
/// block.
inline void gguf_dequantize(GgufType type, const void* bytes, std::size_t elements, float* out) {
  const GgufTypeInfo& info = detail::gguf_require_type(type, &GgufTypeInfo::decodes, "gguf_dequantize");
  detail::require(elements % info.block_elements == 0, "gguf_dequantize: ", elements, " elements of ", info.name,
                  " are no whole number of blocks of ", info.block_elements);
  const detail::FpEnvironment environment;
  const auto* p = static_cast<const std::uint8_t*>(bytes);
  if (type == GgufType::f32) {
    detail::copy_bytes(out, p, elements * 4);
  } else if (type == GgufType::f16) {
    for (std::size_t i = 0; i < elements; ++i) out[i] = detail::gguf_half_at(p + 2 * i);
  } else if (type == GgufType::bf16) {
    for (std::size_t i = 0; i < elements; ++i)
      out[i] = float_from_bf16(detail::load_unaligned<std::uint16_t>(p + 2 * i));
  } else {
    detail::GgufBlock block;
    for (std::size_t done = 0; done < elements; done += info.block_elements, p += info.block_bytes) {
      detail::gguf_unpack_block(type, p, block);
      for (std::size_t begin = 0, g = 0; begin < block.elements; begin += block.group, ++g) {
        const float scale = block.scale[g];
        float* to = out + done + begin;
        const std::int8_t* code = block.code + begin;
        if (block.has_offset) {
          const float offset = block.offset[g];
          // The product is exact (22 bits at most), so it does not matter whether the sum is fused with it.
          for (std::size_t i = 0; i < block.group; ++i) to[i] = scale * static_cast<float>(code[i]) + offset;
        } else {
          for (std::size_t i = 0; i < block.group; ++i) to[i] = scale * static_cast<float>(code[i]);
        }
      }
    }
  }
}

/// Encodes `elements` fp32 weights (a whole number of blocks) to F32, F16, BF16, Q8_0, Q4_0 or Q4_1, bit-equal to
/// gguf.quants.quantize (product and sum in fp32, each rounded). Writes gguf_bytes(type, elements) bytes.
/// F16 and BF16 round to nearest even; beyond the range F16 becomes Inf. The block types refuse NaN and Inf,
/// naming the index, and blocks whose scale or minimum exceeds fp16 (the package would write Inf):
/// InvalidArgument.
inline void gguf_quantize(GgufType type, const float* x, std::size_t elements, void* bytes) {
  const GgufTypeInfo& info = detail::gguf_require_type(type, &GgufTypeInfo::encodes, "gguf_quantize");
  detail::require(elements % info.block_elements == 0, "gguf_quantize: ", elements, " elements of ", info.name,
                  " are no whole number of blocks of ", info.block_elements);
  const detail::FpEnvironment environment;
  auto* p = static_cast<std::uint8_t*>(bytes);
  if (type == GgufType::f32) {
    detail::copy_bytes(p, x, elements * 4);
  } else if (type == GgufType::f16) {
    for (std::size_t i = 0; i < elements; ++i) detail::store_unaligned(p + 2 * i, fp16_from_float(x[i]));
  } else if (type == GgufType::bf16) {
    for (std::size_t i = 0; i < elements; ++i) detail::store_unaligned(p + 2 * i, bf16_from_float(x[i]));
  } else {
    for (std::size_t i = 0; i < elements; ++i)
      detail::require(std::fabs(x[i]) <= std::numeric_limits<float>::max(), "gguf_quantize: element ", i, " is ",
                      x[i], ", expected a finite number");
    for (std::size_t done = 0; done < elements; done += info.block_elements, p += info.block_bytes)
      detail::gguf_pack_block(type, x + done, p, done / info.block_elements);
  }
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
