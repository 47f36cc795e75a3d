// Float products, the oracle: one fma a k, k ascending.
#pragma once

#include <cfloat>
#include <cmath>

#include "nibble/kernels/args.hpp"
#include "nibble/kernels/scalar/panel.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::scalar {

inline constexpr std::size_t float_tile_rows = 4;

inline void unpack(const UnpackArgs& a) noexcept {
  for (std::size_t p = a.panel_begin; p < a.panel_end; ++p) {
    float* out = a.out + (p - a.panel_begin) * a.out_panel_stride;
    for (std::size_t k = a.k_begin; k < a.k_end; ++k)
      for (std::size_t lane = 0; lane < panel_width; ++lane)
        out[(k - a.k_begin) * panel_width + lane] = value_at(a.w, p, lane, k);
  }
}

inline void gemm_float(const FloatGemmArgs& a) noexcept {
  for (std::size_t r = 0; r < a.rows; ++r) {
    const std::size_t tile = r / float_tile_rows;
    const std::size_t left = a.rows - tile * float_tile_rows;
    const std::size_t height = left < float_tile_rows ? left : float_tile_rows;
    const float* x = a.x + tile * a.x_tile_stride + r % float_tile_rows;
    for (std::size_t p = 0; p < a.panels; ++p)
      for (std::size_t lane = 0; lane < panel_width; ++lane) {
        float& out = a.acc[r * a.acc_stride + p * panel_width + lane];
        float acc = a.accumulate ? out : 0.0F;
        for (std::size_t k = 0; k < a.depth; ++k)
          acc = std::fma(a.panels_data[p * a.panel_stride + k * panel_width + lane], x[k * height], acc);
        out = acc;
      }
  }
}

inline void gemv_float(const FloatGemvArgs& a) noexcept {
  for (std::size_t r = 0; r < a.rows; ++r)
    for (std::size_t p = a.panel_begin; p < a.panel_end; ++p)
      for (std::size_t lane = 0; lane < panel_width; ++lane) {
        float acc = 0.0F;
        for (std::size_t k = 0; k < a.w.k; ++k)
          acc = std::fma(value_at(a.w, p, lane, k), a.x[r * a.x_stride + k], acc);
        a.acc[r * a.acc_stride + (p - a.panel_begin) * panel_width + lane] = acc;
      }
}

/// v, or a zero of its sign where v is subnormal.
inline float flush_subnormal(float v) noexcept { return std::fabs(v) < FLT_MIN ? std::copysign(0.0F, v) : v; }

/// flush(fma(a, b, c)) of Bf16GemmArgs, for a and b that are bfloat16.
inline float fma_flushed(float a, float b, float c) noexcept {
  a = flush_subnormal(a);
  b = flush_subnormal(b);
  c = flush_subnormal(c);
  const float v = std::fma(a, b, c);
  if (std::fabs(v) > FLT_MIN || v != v) return v;
  if (std::fabs(v) < FLT_MIN) return std::copysign(0.0F, v);
  // 2^-126: as the exact sum, or rounded up from the subnormals' coarser grid? The product is exact in double; so is
  // the sum where it lies near the bound.
  const double exact = static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c);
  return std::fabs(exact) < 0x1.FFFFFFp-127 ? std::copysign(0.0F, v) : v;
}

inline void gemm_bf16(const Bf16GemmArgs& a) noexcept {
  for (std::size_t r = 0; r < a.rows; ++r) {
    const std::size_t tile = r / a.tile_rows;
    const std::size_t left = a.rows - tile * a.tile_rows;
    const std::size_t height = left < a.tile_rows ? left : a.tile_rows;
    const std::uint32_t* x = a.x + tile * a.x_tile_stride + r % a.tile_rows;
    for (std::size_t p = a.panel_begin; p < a.panel_end; ++p)
      for (std::size_t lane = 0; lane < panel_width; ++lane) {
        float& out = a.acc[r * a.acc_stride + (p - a.panel_begin) * panel_width + lane];
        float acc = a.accumulate ? out : 0.0F;
        for (std::size_t k = a.k_begin; k < a.k_end; k += 2) {
          const std::uint32_t pair = x[(k - a.k_begin) / 2 * height];
          acc = fma_flushed(value_at(a.w, p, lane, k + 1), float_from_bf16(static_cast<std::uint16_t>(pair >> 16)),
                            acc);
          acc = fma_flushed(value_at(a.w, p, lane, k), float_from_bf16(static_cast<std::uint16_t>(pair)), acc);
        }
        out = acc;
      }
  }
}

inline void gemv_dense(const DenseGemvArgs& a) noexcept {
  for (std::size_t t = 0; t < a.tokens; ++t)
    for (std::size_t i = 0; i < a.n; ++i) {
      float acc = 0.0F;
      for (std::size_t k = 0; k < a.k; ++k)
        acc = std::fma(a.a[k * a.lda + i], a.x[t * a.x_token_stride + k * a.x_stride], acc);
      a.y[t * a.y_stride + i] = acc;
    }
}

inline void gemv_rows(const RowsGemvArgs& a) noexcept {
  for (std::size_t t = 0; t < a.tokens; ++t)
    for (std::size_t i = 0; i < a.n; ++i) {
      float acc = 0.0F;
      for (std::size_t k = 0; k < a.k; ++k)
        acc = std::fma(a.a[i * a.lda + k], a.x[t * a.x_token_stride + k * a.x_stride], acc);
      a.y[t * a.y_stride + i] = acc;
    }
}

}  // namespace detail::scalar
}  // namespace NIBBLE_ABI
}  // namespace nibble
