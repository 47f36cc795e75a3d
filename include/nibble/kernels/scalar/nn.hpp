// Norm, softmax and rotary embedding, the oracle.
#pragma once

#include <cmath>
#include <limits>

#include "nibble/core/fp_env.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/scalar/exp.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::scalar {

/// The sum of 16 lanes as args.hpp orders it; overwrites them.
inline float sum_lanes(float (&lane)[16]) noexcept {
  for (std::size_t step = 8; step != 0; step /= 2)
    for (std::size_t l = 0; l < step; ++l) lane[l] = rounded(lane[l] + lane[l + step]);
  return lane[0];
}

inline void rms_norm(const RmsNormArgs& a) noexcept {
  for (std::size_t r = 0; r < a.rows; ++r) {
    const float* x = a.x + r * a.x_stride;
    float* out = a.out + r * a.out_stride;
    float lane[16] = {};
    for (std::size_t i = 0; i < a.n; ++i) lane[i % 16] = std::fma(x[i], x[i], lane[i % 16]);
    const float mean = rounded(sum_lanes(lane) / static_cast<float>(a.n));
    const float factor = 1.0F / rounded(std::sqrt(rounded(mean + a.epsilon)));
    for (std::size_t i = 0; i < a.n; ++i) out[i] = rounded(x[i] * factor) * a.weight[i];
  }
}

inline void softmax(const SoftmaxArgs& a) noexcept {
  for (std::size_t r = 0; r < a.rows; ++r) {
    float* x = a.x + r * a.x_stride;
    const std::size_t visible = a.first_visible + r / a.rows_a_step;
    float top = -std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < visible; ++i) top = x[i] > top ? x[i] : top;
    float lane[16] = {};
    for (std::size_t i = 0; i < visible; ++i) {
      x[i] = exp_reference(rounded(x[i] - top));
      lane[i % 16] = rounded(lane[i % 16] + x[i]);
    }
    a.sums[r] = sum_lanes(lane);
    if (a.factors != nullptr)
      for (std::size_t i = 0; i < visible; ++i) x[i] = rounded(x[i] * a.factors[i]);
    for (std::size_t i = visible; i < a.n; ++i) x[i] = 0.0F;
  }
}

inline void softmax_codes(const SoftmaxCodesArgs& a) noexcept {
  constexpr float reciprocal = 1.0F / 127.0F;
  for (std::size_t r = 0; r < a.rows; ++r) {
    const float* x = a.x + r * a.x_stride;
    const std::size_t visible = a.first_visible + r / a.rows_a_step;
    float top = -std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < visible; ++i) top = x[i] > top ? x[i] : top;
    float lane[16] = {};
    for (std::size_t g = 0; g < a.n / 32; ++g) {
      float w[32] = {};
      float highest = 0.0F;
      for (std::size_t j = 0; j < 32 && 32 * g + j < visible; ++j) {
        const std::size_t i = 32 * g + j;
        const float e = exp_reference(rounded(x[i] - top));
        lane[i % 16] = rounded(lane[i % 16] + e);
        w[j] = rounded(e * a.factors[i]);
        if (!(w[j] == w[j])) w[j] = 0.0F;
        highest = w[j] > highest ? w[j] : highest;
      }
      if (highest < 0x1p-100F) highest = 0.0F;
      const float inverse = highest == 0.0F ? 0.0F : 127.0F / highest;
      std::int32_t sum = 0;
      for (std::size_t j = 0; j < 32; ++j) {
        const auto code = static_cast<std::int8_t>(std::nearbyint(rounded(w[j] * inverse)));
        a.codes[r * a.n + 32 * g + j] = code;
        sum += code;
      }
      a.scales[r * (a.n / 32) + g] = highest * reciprocal;
      a.code_sums[r * (a.n / 32) + g] = sum;
    }
    a.sums[r] = sum_lanes(lane);
  }
}

inline void rope(const RopeArgs& a) noexcept {
  for (std::size_t h = 0; h < a.heads; ++h) {
    float* x = a.x + h * a.head_size;
    for (std::size_t i = 0; i < 2 * a.pairs; i += 2) {
      const float first = x[i];
      const float second = x[i + 1];
      x[i] = rounded(std::fma(first, a.cosines[i], rounded(second * a.sines[i])) * a.scale);
      x[i + 1] = rounded(std::fma(second, a.cosines[i + 1], rounded(first * a.sines[i + 1])) * a.scale);
    }
    for (std::size_t i = 2 * a.pairs; i < a.head_size; ++i) x[i] = rounded(x[i] * a.scale);
  }
}

}  // namespace detail::scalar
}  // namespace NIBBLE_ABI
}  // namespace nibble
