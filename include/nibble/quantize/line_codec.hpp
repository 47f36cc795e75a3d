// Values to codes and back, a run at a time: the one place where a scheme meets the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "nibble/core/fp_env.hpp"
#include "nibble/formats/int4.hpp"
#include "nibble/formats/nf4.hpp"
#include "nibble/kernels/dispatch.hpp"
#include "nibble/quantize/scheme.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// One set of parameters. Integers: real = scale * (q - zero), with a float offset fma(scale, q, offset);
/// nf4: scale * level[q].
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
    else if (format == Format::int4)
      g.zero = Int4::symmetric_zero;
    return g;
  }
};

inline float decode(const ParamStorage& params, const Grid& g, int code) noexcept {
  if (params.format == Format::nf4) return rounded(g.scale * float_from_nf4(static_cast<std::uint8_t>(code)));
  if (params.symmetry == Symmetry::float_offset) return std::fma(g.scale, static_cast<float>(code), g.offset);
  return rounded(g.scale * static_cast<float>(code - g.zero));
}

inline std::int8_t encode(const ParamStorage& params, const Grid& g, float x) noexcept {
  if (params.format == Format::nf4) return static_cast<std::int8_t>(nf4_from_float(rounded(x / g.scale)));
  const float ratio = rounded(rounded(x - g.offset) / g.scale);
  return static_cast<std::int8_t>(scalar::to_code(ratio, g.zero, params.codes.min, params.codes.max));
}

/// Elements from `i` on, up to n, that share element i's parameter.
inline std::size_t run_length(const LineParams& line, std::size_t i, std::size_t n) noexcept {
  return line.step == 0 ? n - i : std::min(n - i, line.div - i % line.div);
}

/// Codes of elements [begin, end) of a line, one code a byte, from x[0 .. end - begin).
inline void encode_line(const ParamStorage& params, const LineParams& line, std::size_t begin, std::size_t end,
                        const float* x, std::int8_t* codes) {
  for (std::size_t i = begin, run; i < end; i += run, x += run, codes += run) {
    const Grid g = params.grid(line.index(i));
    run = run_length(line, i, end);
    if (params.format == Format::nf4 || run == 1) {
      for (std::size_t j = 0; j < run; ++j) codes[j] = encode(params, g, x[j]);
    } else {
      QuantizeLineArgs args;
      args.x = x;
      args.n = run;
      args.scale = g.scale;
      args.offset = g.offset;
      args.zero = g.zero;
      args.qmin = params.codes.min;
      args.qmax = params.codes.max;
      args.q = codes;
      kernels().quantize_line(args);
    }
  }
}

/// Values of elements [begin, end) of a line, from codes[0 .. end - begin), one code a byte, to out[0 .. end - begin).
inline void decode_line(const ParamStorage& params, const LineParams& line, std::size_t begin, std::size_t end,
                        const std::int8_t* codes, float* out) {
  for (std::size_t i = begin, run; i < end; i += run, codes += run, out += run) {
    const Grid g = params.grid(line.index(i));
    run = run_length(line, i, end);
    if (params.format == Format::nf4 || run == 1) {
      for (std::size_t j = 0; j < run; ++j) out[j] = decode(params, g, codes[j]);
    } else {
      DequantizeLineArgs args;
      args.q = codes;
      args.n = run;
      args.scale = g.scale;
      args.has_offset = params.symmetry == Symmetry::float_offset;
      args.offset = g.offset;
      args.zero = g.zero;
      args.x = out;
      kernels().dequantize_line(args);
    }
  }
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
