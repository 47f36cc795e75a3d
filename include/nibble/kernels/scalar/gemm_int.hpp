// Integer product, the oracle: IntGemmArgs' definition written down as loops.
#pragma once

#include <cmath>

#include "nibble/core/fp_env.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/scalar/panel.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::scalar {

inline void gemm_int(const IntGemmArgs& a) noexcept {
  const PanelView& w = a.w;
  for (std::size_t p = a.panel_begin; p < a.panel_end; ++p)
    for (std::size_t r = 0; r < a.rows; ++r)
      for (std::size_t lane = 0; lane < panel_width; ++lane) {
        const std::int8_t* x = a.x + r * a.x_stride;
        const std::size_t out = (p - a.panel_begin) * panel_width + lane;
        float acc = 0.0F;
        for (std::size_t g = 0; g < w.groups; ++g) {
          const std::size_t begin = g * w.group_size;
          const std::size_t end = begin + w.group_size < w.k ? begin + w.group_size : w.k;
          const std::size_t param =
              (p * scale_groups(w.groups, a.group_shift) + (g >> a.group_shift)) * panel_width + lane;
          const std::int32_t zero = integer_zero(w, param);
          std::int32_t dot = 0;
          for (std::size_t k = begin; k < end; ++k) dot += (code_at(w, p, lane, k) - zero) * x[k];
          if (a.raw != nullptr) {
            a.raw[r * a.acc_stride + out] = dot;
            continue;
          }
          const float scale = scale_at(w, param);
          const bool has_offset = w.symmetry == Symmetry::float_offset;
          const float offset = has_offset ? offset_at(w, param) : 0.0F;
          const float sum = static_cast<float>(a.x_sums[r * a.sums_stride + g]);
          if (a.x_scales == nullptr) {
            acc = std::fma(scale, static_cast<float>(dot), acc);
            if (has_offset) acc = std::fma(offset, sum, acc);
          } else {
            float t = rounded(scale * static_cast<float>(dot));
            if (has_offset) t = std::fma(offset, sum, t);
            acc = std::fma(a.x_scales[r * a.sums_stride + g], t, acc);
          }
        }
        if (a.raw == nullptr) a.acc[r * a.acc_stride + out] = acc;
      }
}

}  // namespace detail::scalar
}  // namespace NIBBLE_ABI
}  // namespace nibble
