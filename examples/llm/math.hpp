// What a perplexity needs of a vocabulary's worth of logits. Sums run over 16 fixed lanes, never over what happens to be
// aligned or left over.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>

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

/// log(sum of exp(x)): the sum in double, as a vocabulary's worth of terms would cost a float several bits.
inline double log_sum_exp(const float* x, std::size_t n) {
  Lanes highest = Lanes::Constant(x[0]);
  for_lanes(x, n, x[0], [&](const Lanes& v, std::size_t) { highest = highest.max(v); });
  const float top = highest.maxCoeff();
  double sum = 0.0;
  for_lanes(x, n, -1e30F, [&](const Lanes& v, std::size_t) { sum += static_cast<double>((v - top).exp().sum()); });
  return static_cast<double>(top) + std::log(sum);
}

}  // namespace llm
