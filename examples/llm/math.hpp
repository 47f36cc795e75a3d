// The small float operations of a Llama block. Every one gives a token the same bits whichever others are computed with
// it: sums run over 16 fixed lanes, never over what happens to be aligned or left over.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace llm {

using Lanes = Eigen::Array<float, 16, 1>;
inline constexpr std::size_t lanes = 16;

/// Calls f(lanes of x, first index) over x[0, n); the last call's missing lanes hold `fill`.
template <class F>
void for_lanes(const float* x, std::size_t n, float fill, F&& f) {
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) f(Lanes(Eigen::Map<const Lanes>(x + i)), i);
  if (i == n) return;
  Lanes rest = Lanes::Constant(fill);
  std::copy(x + i, x + n, rest.data());
  f(rest, i);
}

/// out = x / rms(x) * weight.
inline void rms_norm(const float* x, const float* weight, std::size_t n, float epsilon, float* out) {
  Lanes squares = Lanes::Zero();
  for_lanes(x, n, 0.0F, [&](const Lanes& v, std::size_t) { squares += v * v; });
  const float factor = 1.0F / std::sqrt(squares.sum() / static_cast<float>(n) + epsilon);
  const auto size = static_cast<Eigen::Index>(n);
  using Array = Eigen::Map<const Eigen::ArrayXf>;
  Eigen::Map<Eigen::ArrayXf>(out, size) = Array(x, size) * factor * Array(weight, size);
}

/// x[i] = exp(x[i] - max) for i < n; returns their sum.
inline float exp_minus_max(float* x, std::size_t n) {
  Lanes highest = Lanes::Constant(x[0]);
  for_lanes(x, n, x[0], [&](const Lanes& v, std::size_t) { highest = highest.max(v); });
  const float top = highest.maxCoeff();
  Lanes sum = Lanes::Zero();
  for_lanes(x, n, top, [&](const Lanes& v, std::size_t i) {
    const Lanes e = (v - top).exp();
    const std::size_t count = std::min(lanes, n - i);
    if (count == lanes) {
      Eigen::Map<Lanes>(x + i) = e;
      sum += e;
    } else {
      for (std::size_t j = 0; j < count; ++j) {
        x[i + j] = e[static_cast<Eigen::Index>(j)];
        sum[static_cast<Eigen::Index>(j)] += x[i + j];
      }
    }
  });
  return sum.sum();
}

/// log(sum of exp(x)): the sum in double, as a vocabulary's worth of terms would cost a float several bits.
inline double log_sum_exp(const float* x, std::size_t n) {
  Lanes highest = Lanes::Constant(x[0]);
  for_lanes(x, n, x[0], [&](const Lanes& v, std::size_t) { highest = highest.max(v); });
  const float top = highest.maxCoeff();
  double sum = 0.0;
  for_lanes(x, n, -1e30F, [&](const Lanes& v, std::size_t) { sum += static_cast<double>((v - top).exp().sum()); });
  return static_cast<double>(top) + std::log(sum);
}

/// Rotary position embedding over adjacent pairs, as GGUF's Llama files have their rows (Su 2021, equation 34).
class Rope {
 public:
  /// `divisors`: one a pair, or none; Llama 3's long-context scaling divides the frequencies by them.
  Rope(std::size_t dimensions, std::size_t positions, double base, double linear_scale,
       const std::vector<float>& divisors)
      : half_(dimensions / 2), cos_(half_ * positions), sin_(half_ * positions) {
    for (std::size_t i = 0; i < half_; ++i) {
      double frequency = std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(dimensions));
      if (i < divisors.size()) frequency /= static_cast<double>(divisors[i]);
      for (std::size_t p = 0; p < positions; ++p) {
        const double angle = static_cast<double>(p) / linear_scale * frequency;
        cos_[p * half_ + i] = static_cast<float>(std::cos(angle));
        sin_[p * half_ + i] = static_cast<float>(std::sin(angle));
      }
    }
  }

  /// Turns the first pairs of each of `heads` heads at x, then multiplies all of the head by `scale`.
  void apply(float* x, std::size_t heads, std::size_t head_size, std::size_t position, float scale) const {
    const float* c = cos_.data() + position * half_;
    const float* s = sin_.data() + position * half_;
    for (std::size_t h = 0; h < heads; ++h, x += head_size) {
      for (std::size_t i = 0; i < half_; ++i) {
        const float a = x[2 * i];
        const float b = x[2 * i + 1];
        x[2 * i] = a * c[i] - b * s[i];
        x[2 * i + 1] = a * s[i] + b * c[i];
      }
      if (scale != 1.0F)
        for (std::size_t i = 0; i < head_size; ++i) x[i] *= scale;
    }
  }

 private:
  std::size_t half_;
  std::vector<float> cos_;
  std::vector<float> sin_;
};

}  // namespace llm
