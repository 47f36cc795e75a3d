// From logits to the next token.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "nibble/kernels/dispatch.hpp"
#include "nibble/nn/softmax.hpp"
#include "vocabulary.hpp"

namespace llm {

struct SamplerOptions {
  float temperature = 0.0F;  // 0: always the likeliest token
  float top_p = 1.0F;        // keep the likeliest tokens that together hold this much
  std::uint64_t seed = 0;
};

/// The first of the largest of n > 0 logits.
inline Token argmax(const float* logits, std::size_t n) {
  // The largest of a block by the library's kernel, which takes many at once; then its place in the first such block.
  constexpr std::size_t block = 1024;
  const nibble::detail::KernelTable& kernels = nibble::detail::kernels();
  std::size_t best = 0;
  float highest = -std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < n; i += block) {
    const nibble::detail::LineRange range = kernels.line_range(logits + i, std::min(block, n - i));
    if (!range.finite) return static_cast<Token>(std::max_element(logits, logits + n) - logits);
    if (i == 0 || range.max > highest) {
      highest = range.max;
      best = i;
    }
  }
  return static_cast<Token>(std::find(logits + best, logits + n, highest) - logits);
}

class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options) : options_(options), state_(options.seed) {}

  Token sample(const float* logits, std::size_t n) {
    if (options_.temperature <= 0.0F) return argmax(logits, n);
    order_.resize(n);
    weight_.resize(n);
    for (std::size_t i = 0; i < n; ++i) weight_[i] = logits[i] / options_.temperature;
    double total =
        static_cast<double>(nibble::detail::exp_minus_max(weight_.data(), n, nibble::detail::kernels()));
    std::iota(order_.begin(), order_.end(), 0);
    const std::size_t kept = options_.top_p < 1.0F ? keep_nucleus(total) : n;
    double pick = uniform() * total;
    for (std::size_t i = 0; i < kept; ++i) {
      pick -= static_cast<double>(weight_of(order_[i]));
      if (pick < 0.0) return order_[i];
    }
    return order_[kept - 1];
  }

 private:
  float weight_of(Token t) const { return weight_[static_cast<std::size_t>(t)]; }

  /// Sorts the nucleus to the front of order_, cuts `total` to its mass and returns its size.
  std::size_t keep_nucleus(double& total) {
    // A token below (1 - p) / n can never be needed: together such tokens hold less than 1 - p. Sorting what is left
    // is sorting dozens, not the vocabulary.
    const double floor = total * (1.0 - static_cast<double>(options_.top_p)) / static_cast<double>(order_.size());
    const auto end = std::partition(order_.begin(), order_.end(),
                                    [&](Token t) { return static_cast<double>(weight_of(t)) >= floor; });
    std::sort(order_.begin(), end, [&](Token a, Token b) {
      return weight_of(a) > weight_of(b) || (weight_of(a) == weight_of(b) && a < b);
    });
    const auto candidates = static_cast<std::size_t>(end - order_.begin());
    const double wanted = total * static_cast<double>(options_.top_p);
    double mass = 0.0;
    std::size_t kept = 0;
    while (kept < candidates && (kept == 0 || mass < wanted))
      mass += static_cast<double>(weight_of(order_[kept++]));
    total = mass;
    return std::max<std::size_t>(kept, 1);
  }

  /// splitmix64 (Steele, Lea and Flood 2014): the standard library's distributions differ between implementations,
  /// and a seed should say the same everywhere.
  double uniform() {
    state_ += 0x9E3779B97F4A7C15U;
    std::uint64_t z = state_;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9U;
    z = (z ^ z >> 27) * 0x94D049BB133111EBU;
    z ^= z >> 31;
    return static_cast<double>(z >> 11) * 0x1p-53;
  }

  SamplerOptions options_;
  std::uint64_t state_;
  std::vector<Token> order_;
  std::vector<float> weight_;
};

}  // namespace llm
