// Codes to values and back, a line at a time: the one place where a scheme meets the kernels.
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

/// Values of codes [begin, begin + n) of a line, one code a byte at `codes`, to `out`.
inline void decode_run(const ParamStorage& params, const LineParams& line, std::size_t begin, const std::int8_t* codes,
                       std::size_t n, float* out) {
  for (std::size_t i = 0; i < n;) {
    const Grid g = params.grid(line.index(begin + i));
    if (line.per_element()) {
      out[i] = decode(params, g, codes[i]);
      ++i;
      continue;
    }
    const std::size_t run = line.step == 0 ? n - i : std::min(n - i, line.div - (begin + i) % line.div);
    if (params.format == Format::nf4) {
      for (std::size_t j = i; j < i + run; ++j) out[j] = decode(params, g, codes[j]);
    } else {
      DequantizeLineArgs args;
      args.q = codes + i;
      args.n = run;
      args.scale = g.scale;
      args.has_offset = params.symmetry == Symmetry::float_offset;
      args.offset = g.offset;
      args.zero = g.zero;
      args.x = out + i;
      kernels().dequantize_line(args);
    }
    i += run;
  }
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
