// From logits to the next token.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
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

namespace sampler_detail {

// Values that are looked at together: the compiler then compares vectors.
inline constexpr std::size_t block = 64;

/// True if one of `block` values is at least `least`.
inline bool any_reaches(const float* values, float least) {
  unsigned found = 0;
  for (std::size_t i = 0; i < block; ++i) found |= values[i] >= least ? 1U : 0U;
  return found != 0;
}

/// Calls f(i) for every i in [from, n) with values[i] >= least, in order, until it returns true; what it returned.
template <class F>
bool for_reaching(const float* values, std::size_t from, std::size_t n, float least, F&& f) {
  for (std::size_t i = from; i < n;) {
    const std::size_t end = std::min(i + block, n);
    if (end - i == block && !any_reaches(values + i, least)) {
      i = end;
      continue;
    }
    for (; i < end; ++i)
      if (values[i] >= least && f(i)) return true;
  }
  return false;
}

}  // namespace sampler_detail

/// The first of the largest logits.
inline Token argmax(const float* logits, std::size_t n) {
  const nibble::detail::LineRange range = nibble::detail::kernels().line_range(logits, n);
  std::size_t at = 0;
  if (!range.finite)
    at = static_cast<std::size_t>(std::max_element(logits, logits + n) - logits);
  else
    sampler_detail::for_reaching(logits, 0, n, range.max, [&](std::size_t i) {
      at = i;
      return true;
    });
  return static_cast<Token>(at);
}

class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options) : options_(options), state_(options.seed) {}

  Token sample(const float* logits, std::size_t n) {
    const Token likeliest = argmax(logits, n);
    if (options_.temperature <= 0.0F) return likeliest;
    weight_.resize(n);
    const float top = logits[static_cast<std::size_t>(likeliest)];
    for (std::size_t i = 0; i < n; ++i) weight_[i] = (logits[i] - top) / options_.temperature;
    nibble::detail::exp_minus_max(weight_.data(), n, nibble::detail::kernels());
    double total = sum(weight_);
    if (options_.top_p >= 1.0F) {
      double pick = uniform() * total;
      for (std::size_t i = 0; i < n; ++i) {
        pick -= static_cast<double>(weight_[i]);
        if (pick < 0.0) return static_cast<Token>(i);
      }
      return static_cast<Token>(n - 1);
    }
    keep_nucleus(total);
    double pick = uniform() * total;
    for (const Token t : order_) {
      pick -= static_cast<double>(weight_of(t));
      if (pick < 0.0) return t;
    }
    return order_.empty() ? likeliest : order_.back();
  }

 private:
  float weight_of(Token t) const { return weight_[static_cast<std::size_t>(t)]; }

  /// In eight sums, so that no addition waits for the one before.
  static double sum(const std::vector<float>& values) {
    double sums[8] = {};
    for (std::size_t i = 0; i < values.size(); ++i) sums[i % 8] += static_cast<double>(values[i]);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }

  /// Puts the nucleus into order_, likeliest first, and cuts `total` to its mass.
  void keep_nucleus(double& total) {
    // A token below (1 - p) / n can never be needed: together such tokens hold less than 1 - p. What is left is a heap,
    // which gives out the few that are needed in order.
    const double floor = total * (1.0 - static_cast<double>(options_.top_p)) / static_cast<double>(weight_.size());
    order_.clear();
    sampler_detail::for_reaching(weight_.data(), 0, weight_.size(), static_cast<float>(floor), [&](std::size_t i) {
      order_.push_back(static_cast<Token>(i));
      return false;
    });
    const auto less = [&](Token a, Token b) {
      return weight_of(a) < weight_of(b) || (weight_of(a) == weight_of(b) && a > b);
    };
    std::make_heap(order_.begin(), order_.end(), less);
    const double wanted = total * static_cast<double>(options_.top_p);
    double mass = 0.0;
    auto end = order_.end();
    while (end != order_.begin() && (end == order_.end() || mass < wanted)) {
      std::pop_heap(order_.begin(), end, less);
      mass += static_cast<double>(weight_of(*--end));
    }
    std::reverse(end, order_.end());
    order_.erase(order_.begin(), end);
    total = mass;
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
