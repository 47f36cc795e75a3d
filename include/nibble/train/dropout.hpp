// Dropout without a mask in memory: whether an element stays is a function of (seed, step, stream, row, column).
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/formats/float_bits.hpp"
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
  Eigen::Index first_column =
      0;  ///< of the matrix given, in the whole batch of the step: parts have the masks of the whole
};

namespace detail {

/// SplitMix64's finalizer (Steele, Lea, Flood 2014): every bit of x changes every other.
constexpr std::uint64_t mix64(std::uint64_t x) noexcept {
  x += 0x9E3779B97F4A7C15U;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9U;
  x = (x ^ x >> 27) * 0x94D049BB133111EBU;
  return x ^ x >> 31;
}

/// keep[r] = all ones where row r of a column stays, else 0; room for rows rounded up to 8. 16 random bits an element.
inline void dropout_mask(std::uint32_t threshold, const DropoutKey& key, Eigen::Index column, Eigen::Index rows,
                         std::uint32_t* keep) noexcept {
  const std::uint64_t mixed = mix64(key.seed ^ mix64(key.stream));
  const std::array<std::uint32_t, 2> k = {static_cast<std::uint32_t>(mixed),
                                          static_cast<std::uint32_t>(mixed >> 32)};
  for (Eigen::Index r = 0; r < rows; r += 8) {
    const auto words = philox({static_cast<std::uint32_t>(r / 8), static_cast<std::uint32_t>(column),
                               static_cast<std::uint32_t>(key.step), static_cast<std::uint32_t>(key.step >> 32)},
                              k);
    for (std::size_t i = 0; i < 4; ++i) {
      keep[r + static_cast<Eigen::Index>(2 * i)] = (words[i] & 0xFFFFU) >= threshold ? ~0U : 0U;
      keep[r + static_cast<Eigen::Index>(2 * i) + 1] = (words[i] >> 16) >= threshold ? ~0U : 0U;
    }
  }
}

/// `rate` in units of 2^-16: what an element's 16 bits are compared with.
inline std::uint32_t dropout_threshold(double rate) {
  require(rate >= 0.0 && rate < 1.0, "dropout rate is ", rate, ", expected 0 to less than 1");
  return static_cast<std::uint32_t>(std::min(std::lround(rate * 65536.0), 65535L));
}

}  // namespace detail

/// y = x / (1 - rate) where the element stays, else 0, for x and y of n x T; y may be x. The rate counts as the multiple of
/// 2^-16 that is next to it. Inverted dropout: nothing is to be done where a model runs (Srivastava et al. 2014, section
/// 10). An element's fate depends on the key, its row and its column alone. Gradient::add: what would be set is added.
/// Throws InvalidArgument for a rate outside [0, 1) and where shapes do not fit.
inline void dropout(const ConstMatrixRef& x, MatrixRef y, double rate, const DropoutKey& key,
                    const TrainOptions& options = {}, Gradient how = Gradient::set) {
  const std::uint32_t threshold = detail::dropout_threshold(rate);
  detail::require_shape(y, x.rows(), x.cols(), "y");
  const auto scale = static_cast<float>(65536.0 / (65536.0 - static_cast<double>(threshold)));
  const Eigen::Index rows = x.rows();
  detail::for_chunks(options.pool, x.cols(), [&](Eigen::Index first, Eigen::Index n, std::size_t) {
    const detail::FpEnvironment environment;
    std::vector<std::uint32_t> keep(detail::round_up(static_cast<std::size_t>(rows), 8));
    for (Eigen::Index c = first; c < first + n; ++c) {
      detail::dropout_mask(threshold, key, key.first_column + c, rows, keep.data());
      const float* from = x.col(c).data();
      float* to = y.col(c).data();
      const auto kept = [&](Eigen::Index r) {
        const float scaled = from[r] * scale;
        return detail::float_from_bits(detail::bits_from_float(scaled) & keep[static_cast<std::size_t>(r)]);
      };
      if (how == Gradient::set)
        for (Eigen::Index r = 0; r < rows; ++r) to[r] = kept(r);
      else
        for (Eigen::Index r = 0; r < rows; ++r) to[r] += kept(r);
    }
  });
}

/// The gradient of dropout() of the same rate and key: dx = dy / (1 - rate) where the element stayed, else 0; or that added.
inline void dropout_backward(const ConstMatrixRef& dy, MatrixRef dx, double rate, const DropoutKey& key,
                             const TrainOptions& options = {}, Gradient how = Gradient::set) {
  dropout(dy, dx, rate, key, options, how);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
