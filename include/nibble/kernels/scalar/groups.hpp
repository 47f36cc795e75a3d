// Lines whose groups of elements have grids of their own, the oracle.
#pragma once

#include <cmath>

#include "nibble/core/fp_env.hpp"
#include "nibble/formats/bf16.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/formats/codebook.hpp"
#include "nibble/formats/int4.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/scalar/lines.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::scalar {

inline bool group_ranges(const GroupRangesArgs& a) noexcept {
  bool finite = true;
  for (std::size_t i = 0, g = 0; i < a.n; i += a.group, ++g) {
    const LineRange r = line_range(a.x + i, a.n - i < a.group ? a.n - i : a.group);
    finite = finite && r.finite;
    a.lows[g] = r.min;
    a.highs[g] = r.max;
  }
  return finite;
}

inline void widen_ranges(const WidenRangesArgs& a) noexcept {
  for (std::size_t i = 0; i < a.n; ++i) {
    a.lows[i] = rounded((a.x[i] < a.lows[i] ? a.x[i] : a.lows[i]) + 0.0F);
    a.highs[i] = rounded((a.x[i] > a.highs[i] ? a.x[i] : a.highs[i]) + 0.0F);
  }
}

/// stored() of FitRangesArgs.
inline float stored_as(ScaleType type, float v) noexcept {
  switch (type) {
    case ScaleType::fp32: return v;
    case ScaleType::fp16: return nibble::float_from_fp16(nibble::fp16_from_float(v));
    case ScaleType::bf16: return nibble::float_from_bf16(nibble::bf16_from_float(v));
  }
  return v;
}

inline void fit_ranges(const FitRangesArgs& a) noexcept {
  const auto zero = static_cast<float>(a.zero);
  const auto qmin = static_cast<float>(a.qmin);
  const auto qmax = static_cast<float>(a.qmax);
  const float steps = qmax - qmin;
  const bool narrow = a.scale_type != ScaleType::fp32;
  const float smallest = a.scale_type == ScaleType::fp16 ? 0x1p-24F : 0x1p-126F;
  const float largest = a.scale_type == ScaleType::fp16 ? 65504.0F : 0x1p90F;
  for (std::size_t g = 0; g < a.n; ++g) {
    float lo = a.lows[g];
    float hi = a.highs[g];
    bool irregular = false;
    float s = 0.0F;
    switch (a.symmetry) {
      case Symmetry::symmetric:
        if (is_codebook(a.format)) {
          s = -lo > hi ? -lo : hi;
        } else {
          const float below = rounded(-lo / (zero - qmin));
          const float above = rounded(hi / (qmax - zero));
          s = below > above ? below : above;
        }
        break;
      case Symmetry::asymmetric:
        lo = lo < 0.0F ? lo : 0.0F;
        hi = hi > 0.0F ? hi : 0.0F;
        s = rounded(rounded(hi / steps) - rounded(lo / steps));
        break;
      case Symmetry::float_offset: s = rounded(rounded(hi - lo) / steps); break;
    }
    float scale = stored_as(a.scale_type, s);
    scale = scale > smallest ? scale : smallest;
    if (lo == 0.0F && hi == 0.0F) scale = 1.0F;
    if (a.symmetry == Symmetry::symmetric && narrow) {
      // Products of 11 or 8 by 8 bits: exact. A codebook's reach is a little more than 1.1.
      const float reach_above = is_codebook(a.format) ? 1.1F : qmax - zero + 0.5F;
      const float reach_below = is_codebook(a.format) ? 1.1F : zero - qmin + 0.5F;
      irregular = hi > rounded(reach_above * scale) || -lo > rounded(reach_below * scale);
    }
    if (a.symmetry == Symmetry::asymmetric) {
      for (int attempt = 0;; ++attempt) {
        float q = std::nearbyint(rounded(qmin - rounded(lo / scale)));
        q = q < qmin ? qmin : q > qmax ? qmax : q;
        a.zeros[g] = static_cast<std::int8_t>(q);
        // Exact as well: 11 or 8 by 9 bits.
        const bool misses = hi > rounded((qmax - q + 0.5F) * scale) || -lo > rounded((q - qmin + 0.5F) * scale);
        if (!narrow || attempt == 2 || !misses) break;
        irregular = irregular || scale < 0x1p-14F;
        scale = float_from_bits(bits_from_float(scale) + (a.scale_type == ScaleType::fp16 ? 0x2000U : 0x10000U));
      }
    }
    if (a.symmetry == Symmetry::float_offset) {
      const float offset = stored_as(a.scale_type, std::fma(-qmin, scale, lo));
      a.offsets[g] = offset;
      constexpr float margin = 1.0F + 0x1p-16F;
      irregular = irregular || !(std::fabs(offset) <= 0x1p90F) ||
                  rounded(rounded(hi - offset) * margin) > rounded((qmax + 0.5F) * scale) ||
                  rounded(rounded(offset - lo) * margin) > rounded((0.5F - qmin) * scale);
    }
    a.scales[g] = scale;
    a.irregular[g] = irregular || !(scale >= 0x1p-90F && scale <= largest) ? 1 : 0;
  }
}

inline void quantize_groups(const QuantizeGroupsArgs& a) noexcept {
  for (std::size_t i = 0; i < a.n; ++i) {
    const std::size_t g = i / a.group;
    std::uint8_t code;
    if (is_codebook(a.format)) {
      code = codebook_code(a.format, rounded(a.x[i] / a.scales[g]));
    } else {
      const float x = a.offsets == nullptr ? a.x[i] : rounded(a.x[i] - a.offsets[g]);
      const std::int32_t zero = a.zeros == nullptr ? a.zero : a.zeros[g];
      code = static_cast<std::uint8_t>(to_code(rounded(x / a.scales[g]), zero, a.qmin, a.qmax));
    }
    if (a.format == Format::int8)
      a.q[i] = code;
    else if (i % 2 == 0)
      a.q[i / 2] = code;
    else
      a.q[i / 2] = static_cast<std::uint8_t>(a.q[i / 2] | code << 4);
  }
}

inline void dequantize_groups(const DequantizeGroupsArgs& a) noexcept {
  for (std::size_t i = 0; i < a.n; ++i) {
    const std::size_t g = i / a.group;
    const std::int32_t q = a.format == Format::int8 ? static_cast<std::int8_t>(a.q[i]) : nibble_at(a.q, i);
    if (is_codebook(a.format))
      a.x[i] = rounded(a.scales[g] * a.codebook[q]);
    else if (a.offsets != nullptr)
      a.x[i] = std::fma(a.scales[g], static_cast<float>(q), a.offsets[g]);
    else
      a.x[i] = rounded(a.scales[g] * static_cast<float>(q - (a.zeros == nullptr ? a.zero : a.zeros[g])));
  }
}

}  // namespace detail::scalar
}  // namespace NIBBLE_ABI
}  // namespace nibble
