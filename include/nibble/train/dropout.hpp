// Dropout without a mask in memory: whether an element stays is a function of (seed, step, stream, row, column).
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/train/linear.hpp"
#include "nibble/train/options.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Four random words of a counter and a key: Philox4x32-10. Any two differing inputs give independent words, so that random
/// numbers need neither state nor order. Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as
/// 1, 2, 3", section 3.3.
inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                           std::array<std::uint32_t, 2> key) noexcept {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9U;
    key[1] += 0xBB67AE85U;
  }
  return counter;
}

/// A number of a layer's name: FNV-1a in 64 bits.
constexpr std::uint64_t stream_of(std::string_view name) noexcept {
  std::uint64_t hash = 0xCBF29CE484222325U;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3U;
  return hash;
}

/// Which random numbers: those of a layer (`stream`) in a step of a run. Running a step's forward again gives them again.
struct DropoutKey {
  std::uint64_t seed = 0;
  std::uint64_t step = 0;
  std::uint64_t stream = 0;
};

namespace detail {

/// SplitMix64's finalizer (Steele, Lea, Flood 2014): every bit of x changes every other.
constexpr std::uint64_t mix64(std::uint64_t x) noexcept {
  x += 0x9E3779B97F4A7C15U;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9U;
  x = (x ^ x >> 27) * 0x94D049BB133111EBU;
  return x ^ x >> 31;
}

/// f(row, column, whether the element stays) for columns [first, first + n) of `rows` rows; it stays with 1 - rate.
template <class F>
void for_kept(double rate, const DropoutKey& key, Eigen::Index rows, Eigen::Index first, Eigen::Index n, F&& f) {
  const std::uint64_t mixed = mix64(key.seed ^ mix64(key.stream));
  const std::array<std::uint32_t, 2> k = {static_cast<std::uint32_t>(mixed),
                                          static_cast<std::uint32_t>(mixed >> 32)};
  const auto threshold = static_cast<std::uint64_t>(std::llround(rate * 0x1p32));
  for (Eigen::Index c = first; c < first + n; ++c)
    for (Eigen::Index r = 0; r < rows; r += 4) {
      const auto words = philox({static_cast<std::uint32_t>(r / 4), static_cast<std::uint32_t>(c),
                                 static_cast<std::uint32_t>(key.step), static_cast<std::uint32_t>(key.step >> 32)},
                                k);
      const Eigen::Index count = std::min<Eigen::Index>(4, rows - r);
      for (Eigen::Index i = 0; i < count; ++i) f(r + i, c, words[static_cast<std::size_t>(i)] >= threshold);
    }
}

}  // namespace detail

/// y = x / (1 - rate) where the element stays, else 0, for x and y of n x T; y may be x. Inverted dropout: nothing is to be
/// done where a model runs (Srivastava et al. 2014, section 10). An element's fate depends on the key, its row and its column
/// alone. Throws InvalidArgument for a rate outside [0, 1) and where shapes do not fit.
inline void dropout(const ConstMatrixRef& x, MatrixRef y, double rate, const DropoutKey& key,
                    const TrainOptions& options = {}, Gradient how = Gradient::set) {
  detail::require(rate >= 0.0 && rate < 1.0, "dropout rate is ", rate, ", expected 0 to less than 1");
  detail::require_shape(y, x.rows(), x.cols(), "y");
  const auto scale = static_cast<float>(1.0 / (1.0 - rate));
  detail::for_chunks(options.pool, x.cols(), [&](Eigen::Index first, Eigen::Index n, std::size_t) {
    const detail::FpEnvironment environment;
    if (how == Gradient::set)
      detail::for_kept(rate, key, x.rows(), first, n, [&](Eigen::Index r, Eigen::Index c, bool stays) {
        y(r, c) = stays ? x(r, c) * scale : 0.0F;
      });
    else
      detail::for_kept(rate, key, x.rows(), first, n, [&](Eigen::Index r, Eigen::Index c, bool stays) {
        if (stays) y(r, c) += detail::rounded(x(r, c) * scale);
      });
  });
}

/// The gradient of dropout() of the same rate and key: dx = dy / (1 - rate) where the element stayed, else 0; or that added.
inline void dropout_backward(const ConstMatrixRef& dy, MatrixRef dx, double rate, const DropoutKey& key,
                             const TrainOptions& options = {}, Gradient how = Gradient::set) {
  dropout(dy, dx, rate, key, options, how);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
