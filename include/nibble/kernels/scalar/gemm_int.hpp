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
          const std::size_t stored_groups = a.scale_group_stride == 0 ? 1 : w.groups;
          const std::size_t param = p * stored_groups * panel_width + g * a.scale_group_stride + lane;
          const std::int32_t zero = integer_zero(w, param);
          std::int32_t dot = 0;
          for (std::size_t k = begin; k < end; ++k) dot += (code_at(w, p, lane, k) - zero) * x[k];
          if (a.raw != nullptr) {
            a.raw[r * a.acc_stride + out] = dot;
            continue;
          }
          float scale = scale_at(w, param);
          const float x_scale = a.x_scales != nullptr ? a.x_scales[r * a.sums_stride + g] : 1.0F;
          if (a.x_scales != nullptr) scale = rounded(scale * x_scale);
          acc = std::fma(scale, static_cast<float>(dot), acc);
          if (w.symmetry == Symmetry::float_offset) {
            float offset = offset_at(w, param);
            if (a.x_scales != nullptr) offset = rounded(offset * x_scale);
            acc = std::fma(offset, static_cast<float>(a.x_sums[r * a.sums_stride + g]), acc);
          }
        }
        if (a.raw == nullptr) a.acc[r * a.acc_stride + out] = acc;
      }
}

}  // namespace detail::scalar
}  // namespace NIBBLE_ABI
}  // namespace nibble
