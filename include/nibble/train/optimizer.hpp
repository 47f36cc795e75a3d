// AdamW, with moments in fp32 or in 8 bits.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "nibble/core/abi.hpp"
#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/formats/dynamic_map.hpp"
#include "nibble/train/parameters.hpp"

#if NIBBLE_X86
#include <xmmintrin.h>
#endif

namespace nibble {
inline namespace NIBBLE_ABI {

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0.01;
  /// Moments in 8 bits: blocks of 256 consecutive elements share an fp32 absmax; a moment is absmax times a value of the
  /// dynamic map (formats/dynamic_map.hpp), signed for the first moment, unsigned for the second; the nearest one, but what is
  /// above 0 never becomes 0 in the second: a step divides by its root. 2.03 bytes a parameter instead of 8. Source: Dettmers,
  /// Lewis, Shleifer, Zettlemoyer 2022, "8-bit optimizers via block-wise quantization".
  bool eight_bit = false;
  /// Parameters with fewer elements keep fp32 moments, as in bitsandbytes.
  std::size_t eight_bit_min_size = 4096;
};

/// The moments of one parameter: in fp32, or as codes and one absmax a block.
struct AdamWState {
  static constexpr std::size_t block = 256;
  bool eight_bit = false;
  std::vector<float> first, second;                     ///< fp32: one an element; 8 bits: one absmax a block
  std::vector<std::uint8_t> first_codes, second_codes;  ///< 8 bits: one an element; fp32: empty

  std::size_t byte_size() const noexcept {
    return (first.size() + second.size()) * sizeof(float) + first_codes.size() + second_codes.size();
  }
};

namespace detail {

inline const DynamicEncoder& first_moment_encoder() {
  static const DynamicEncoder encoder(true);
  return encoder;
}
inline const DynamicEncoder& second_moment_encoder() {
  static const DynamicEncoder encoder(false);
  return encoder;
}

/// A step's numbers for one parameter.
struct AdamWCoefficients {
  float scale;         // of the gradient: clipping
  float beta1, rest1;  // rest = 1 - beta
  float beta2, rest2;
  float step;  // rate / (1 - beta1^t)
  float root;  // 1 / sqrt(1 - beta2^t)
  float epsilon;
  float decay;  // rate * weight decay
};

using AdamWLanes = Eigen::Array<float, 16, 1>;

/// Rounded to nearest: Eigen's own may be an approximation that differs from CPU to CPU.
inline AdamWLanes sqrt_lanes(const AdamWLanes& x) noexcept {
  AdamWLanes y;
#if NIBBLE_X86
  for (Eigen::Index i = 0; i < 16; i += 4) _mm_storeu_ps(y.data() + i, _mm_sqrt_ps(_mm_loadu_ps(x.data() + i)));
#else
  for (Eigen::Index i = 0; i < 16; ++i) y[i] = std::sqrt(x[i]);
#endif
  return y;
}

inline void adamw_lanes(float* value, const float* gradient, float* first, float* second,
                        const AdamWCoefficients& c) noexcept {
  Eigen::Map<AdamWLanes> p(value), m(first), v(second);
  const AdamWLanes g = Eigen::Map<const AdamWLanes>(gradient) * c.scale;
  const AdamWLanes m1 = m * c.beta1 + g * c.rest1;
  const AdamWLanes v1 = v * c.beta2 + g * g * c.rest2;
  m = m1;
  v = v1;
  const AdamWLanes root = sqrt_lanes(v1);
  p -= m1 * c.step / (root * c.root + c.epsilon) + p * c.decay;
}

/// n elements.
inline void adamw_update(float* value, const float* gradient, float* first, float* second, std::size_t n,
                         const AdamWCoefficients& c) noexcept {
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) adamw_lanes(value + i, gradient + i, first + i, second + i, c);
  if (i == n) return;
  float p[16] = {}, g[16] = {}, m[16] = {}, v[16] = {};
  std::copy_n(value + i, n - i, p);
  std::copy_n(gradient + i, n - i, g);
  std::copy_n(first + i, n - i, m);
  std::copy_n(second + i, n - i, v);
  adamw_lanes(p, g, m, v, c);
  std::copy_n(p, n - i, value + i);
  std::copy_n(m, n - i, first + i);
  std::copy_n(v, n - i, second + i);
}

/// One block of at most 256 elements.
inline void adamw_update_block(float* value, const float* gradient, std::uint8_t* first, std::uint8_t* second,
                               float& first_absmax, float& second_absmax, std::size_t n,
                               const AdamWCoefficients& c, const DynamicEncoder& encode_first,
                               const DynamicEncoder& encode_second) noexcept {
  alignas(64) float m[AdamWState::block];
  alignas(64) float v[AdamWState::block];
  const float* map1 = encode_first.map().data();
  const float* map2 = encode_second.map().data();
  for (std::size_t i = 0; i < n; ++i) {
    m[i] = map1[first[i]] * first_absmax;
    v[i] = map2[second[i]] * second_absmax;
  }
  adamw_update(value, gradient, m, v, n, c);
  Eigen::Map<Eigen::ArrayXf> ms(m, static_cast<Eigen::Index>(n)), vs(v, static_cast<Eigen::Index>(n));
  first_absmax = ms.abs().maxCoeff();
  second_absmax = vs.maxCoeff();
  if (first_absmax > 0.0F) ms /= first_absmax;
  if (second_absmax > 0.0F) vs /= second_absmax;
  for (std::size_t i = 0; i < n; ++i) {
    first[i] = encode_first(m[i]);
    const std::uint8_t code = encode_second(v[i]);
    second[i] = static_cast<std::uint8_t>(code + (code == 0 && v[i] > 0.0F ? 1 : 0));
  }
}

}  // namespace detail

/// AdamW: for every parameter, with g its gradient and t = 1, 2, ... the step,
///   m = beta1 m + (1 - beta1) g
///   v = beta2 v + (1 - beta2) g^2
///   p = p - rate (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon) + weight_decay p)
/// with rate multiplied by the parameter's own, and without decay where it says so. Moments start at 0. Source: Loshchilov
/// and Hutter 2019, algorithm 2. A step has the same bits for any number of threads.
class AdamW {
 public:
  /// Throws InvalidArgument for parameters that check() refuses and for options out of range.
  explicit AdamW(Parameters parameters, const AdamWOptions& options = {})
      : parameters_(std::move(parameters)), options_(options), chunks_(parameters_) {
    check(parameters_);
    const auto beta = [](double b, const char* name) {
      detail::require(b >= 0.0 && b < 1.0, name, " is ", b, ", expected 0 to less than 1");
    };
    beta(options.beta1, "beta1");
    beta(options.beta2, "beta2");
    // As a float it must stay above 0, for it is what a step divides by where v is 0.
    detail::require(options.epsilon >= 1e-30 && std::isfinite(options.epsilon), "epsilon is ", options.epsilon,
                    ", expected a number from 1e-30 on");
    detail::require(options.weight_decay >= 0.0 && std::isfinite(options.weight_decay), "weight_decay is ",
                    options.weight_decay, ", expected a number from 0 on");
    states_.resize(parameters_.size());
    for (std::size_t i = 0; i < states_.size(); ++i) {
      AdamWState& s = states_[i];
      const std::size_t n = parameters_[i].size;
      s.eight_bit = options.eight_bit && n >= options.eight_bit_min_size;
      const std::size_t floats = s.eight_bit ? detail::ceil_div(n, AdamWState::block) : n;
      s.first.assign(floats, 0.0F);
      s.second.assign(floats, 0.0F);
      if (!s.eight_bit) continue;
      s.first_codes.assign(n, detail::first_moment_encoder()(0.0F));
      s.second_codes.assign(n, detail::second_moment_encoder()(0.0F));
    }
  }

  /// One step with the gradients that the parameters have; they stay as they are.
  /// @param rate      the learning rate
  /// @param max_norm  gradients whose norm (all together) is above it count as scaled down to it; 0: never
  /// @return the gradients' norm
  /// Throws InvalidArgument, before anything is changed, for a gradient that is not finite (the message has the parameter's
  /// name and the step), for a norm above 1e18, whose square is none for floats, and for a rate that is not from 0 on.
  double step(double rate, double max_norm = 0.0, ThreadPool* pool = nullptr) {
    const detail::FpEnvironment environment;
    const std::uint64_t t = steps_ + 1;
    detail::require(rate >= 0.0 && std::isfinite(rate), "rate is ", rate, " at step ", t,
                    ", expected a number from 0 on");
    detail::require(max_norm >= 0.0, "max_norm is ", max_norm, ", expected 0 (none) or a number above");
    const double norm = gradient_norm(parameters_, pool);
    if (!std::isfinite(norm))
      require_finite(parameters_, ParameterPart::gradient, detail::concat("step ", t), pool);
    const double scale = max_norm > 0.0 && norm > max_norm ? max_norm / norm : 1.0;
    detail::require(norm * scale <= 1e18, "the gradients' norm is ", norm, " at step ", t,
                    ", expected at most 1e18");
    std::vector<detail::AdamWCoefficients> coefficients(parameters_.size());
    const auto n = static_cast<double>(t);
    for (std::size_t i = 0; i < coefficients.size(); ++i) {
      const double own = rate * static_cast<double>(parameters_[i].rate);
      detail::AdamWCoefficients& c = coefficients[i];
      c.scale = static_cast<float>(scale);
      c.beta1 = static_cast<float>(options_.beta1);
      c.rest1 = static_cast<float>(1.0 - options_.beta1);
      c.beta2 = static_cast<float>(options_.beta2);
      c.rest2 = static_cast<float>(1.0 - options_.beta2);
      c.step = static_cast<float>(own / (1.0 - std::pow(options_.beta1, n)));
      c.root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(options_.beta2, n)));
      c.epsilon = static_cast<float>(options_.epsilon);
      c.decay = static_cast<float>(parameters_[i].decay ? own * options_.weight_decay : 0.0);
    }
    const detail::DynamicEncoder& encode_first = detail::first_moment_encoder();
    const detail::DynamicEncoder& encode_second = detail::second_moment_encoder();
    chunks_.run(pool, [&](std::size_t i, std::size_t first, std::size_t count, std::size_t) {
      const Parameter& p = parameters_[i];
      AdamWState& s = states_[i];
      if (!s.eight_bit) {
        detail::adamw_update(p.value + first, p.gradient + first, s.first.data() + first, s.second.data() + first,
                             count, coefficients[i]);
        return;
      }
      static_assert(detail::parameter_chunk % AdamWState::block == 0, "a block lies in one chunk");
      for (std::size_t at = first; at < first + count; at += AdamWState::block)
        detail::adamw_update_block(
            p.value + at, p.gradient + at, s.first_codes.data() + at, s.second_codes.data() + at,
            s.first[at / AdamWState::block], s.second[at / AdamWState::block],
            std::min(AdamWState::block, first + count - at), coefficients[i], encode_first, encode_second);
    });
    steps_ = t;
    return norm;
  }

  const Parameters& parameters() const noexcept { return parameters_; }
  const AdamWOptions& options() const noexcept { return options_; }
  /// Steps done.
  std::uint64_t steps() const noexcept { return steps_; }
  /// One a parameter, in their order.
  const std::vector<AdamWState>& states() const noexcept { return states_; }
  /// Bytes of all moments.
  std::size_t state_bytes() const noexcept {
    std::size_t bytes = 0;
    for (const AdamWState& s : states_) bytes += s.byte_size();
    return bytes;
  }

  /// Goes on from a checkpoint. Throws InvalidArgument, and changes nothing, unless the states are shaped as these are.
  void restore(std::uint64_t steps, std::vector<AdamWState> states) {
    detail::require(states.size() == states_.size(), "there are ", states.size(), " states for ", states_.size(),
                    " parameters");
    for (std::size_t i = 0; i < states.size(); ++i) {
      const AdamWState &now = states_[i], &next = states[i];
      detail::require(next.eight_bit == now.eight_bit, "the moments of '", parameters_[i].name, "' are in ",
                      next.eight_bit ? "8 bits" : "fp32", ", expected ", now.eight_bit ? "8 bits" : "fp32");
      detail::require(next.first.size() == now.first.size() && next.second.size() == now.second.size() &&
                          next.first_codes.size() == now.first_codes.size() &&
                          next.second_codes.size() == now.second_codes.size(),
                      "the moments of '", parameters_[i].name, "' do not have its ", parameters_[i].size,
                      " elements");
    }
    states_ = std::move(states);
    steps_ = steps;
  }

 private:
  Parameters parameters_;
  AdamWOptions options_;
  detail::ParameterChunks chunks_;
  std::vector<AdamWState> states_;
  std::uint64_t steps_ = 0;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
