// HQQ, half-quadratic quantization (Badri and Shaji 2023): zero points that make few large errors and many small ones,
// from the weights alone.
//
// For each group the scale is fixed and the zero point z minimizes sum |w - scale * (q - z)|^p, p < 1, which leaves
// outliers their error instead of bending the grid to them. Half-quadratic splitting alternates, from i = 0:
//   q = clamp(rne(w / scale + z))
//   e = shrink(w - scale * (q - z)),  shrink(x) = sign(x) * max(|x| - |x|^(p - 1) / beta, 0)
//   z = mean(q - (w - e) / scale)
//   beta = beta * kappa
// (their scale is the inverse of ours). Every iterate is judged by the error of its grid as it would be stored, that of
// the start included, and the first of the least error is kept: the result is never worse than its start.
//
// HQQ is made for float offsets: on SmolLM2's weights in int4 with groups of 64 it lowers their squared error by 13 % (16 %
// with in_steps). Integer zero points leave it nothing to do: z stays real between the steps and its nearest integer is
// judged, which is the one it started from for all but a few groups (0.002 % less error from fit_mse's grids, none from
// fit_min_max's; rounding z in every step holds it where it starts, for one step moves it by less than a half).
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/ptq/weight_grids.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

struct HqqOptions {
  double p = 0.7;                ///< norm, in (0, 1]
  double beta = 10.0;            ///< > 0; the error that is shrunk to 0 is below about beta^(-1 / (2 - p))
  double kappa = 1.01;           ///< growth of beta, >= 1
  int iterations = 20;           ///< >= 0
  bool in_steps = false;         ///< errors are shrunk in units of the group's scale, not of the weights
  bool round_each_step = false;  ///< integer zero points are rounded in every step
  ThreadPool* pool = nullptr;    ///< threads to work with; nullptr: the calling one. Changes no bit.
};

namespace detail {

/// The proximal operator of beta's l_p norm, approximately: what of an error counts as an outlier's.
inline double shrink_lp(double x, double p, double beta) noexcept {
  const double magnitude = std::fabs(x);
  if (magnitude == 0.0) return 0.0;
  const double left = magnitude - rounded(std::pow(magnitude, p - 1.0) / beta);
  return left <= 0.0 ? 0.0 : std::copysign(left, x);
}

inline Grid hqq_grid(const WeightGrids& grids, Grid grid, double z) {
  if (grids.scheme().symmetry == Symmetry::float_offset) {
    grid.offset = round_to(grids.scheme().scale_type, static_cast<float>(-static_cast<double>(grid.scale) * z));
  } else {
    const double whole = std::nearbyint(z);
    grid.zero = static_cast<std::int32_t>(
        std::min(std::max(whole, static_cast<double>(grids.min_code())), static_cast<double>(grids.max_code())));
  }
  return grid;
}

/// The grid of one group.
inline Grid hqq_group(const WeightGrids& grids, const Grid& start, const float* w, std::size_t n,
                      const HqqOptions& options, std::int8_t* codes, float* values) {
  const double scale = static_cast<double>(start.scale);
  const bool floats = grids.scheme().symmetry == Symmetry::float_offset;
  double z = floats ? -static_cast<double>(start.offset) / scale : static_cast<double>(start.zero);
  const double unit = options.in_steps ? scale : 1.0;
  // Below it shrink() is 0: most errors need no power.
  const auto dead = [&](double beta) { return 0.999 * std::pow(beta, -1.0 / (2.0 - options.p)); };
  const double lowest = grids.min_code();
  const double highest = grids.max_code();
  Grid best = start;
  Grid last = start;
  double least = rounding_error(grids, best, w, nullptr, n, options.p, codes, values);
  double beta = options.beta;
  for (int i = 0; i < options.iterations; ++i, beta *= options.kappa) {
    double sum = 0.0;
    const double zero_below = dead(beta);
    for (std::size_t k = 0; k < n; ++k) {
      const double x = static_cast<double>(w[k]);
      const double ratio = x / scale;
      const double q = std::min(std::max(std::nearbyint(rounded(ratio + z)), lowest), highest);
      const double error = rounded(x - rounded(scale * (q - z))) / unit;
      const double e = std::fabs(error) < zero_below ? 0.0 : rounded(shrink_lp(error, options.p, beta) * unit);
      sum += rounded(q - rounded((x - e) / scale));
    }
    double next = sum / static_cast<double>(n);
    if (options.round_each_step && !floats) next = std::nearbyint(next);
    const bool stands = next == z;
    z = next;
    const Grid g = hqq_grid(grids, start, z);
    if (!scalar::is_finite(g.offset)) break;
    if (g.zero != last.zero || g.offset != last.offset) {
      const double error = rounding_error(grids, g, w, nullptr, n, options.p, codes, values);
      if (error < least) {
        least = error;
        best = g;
      }
      last = g;
    } else if (stands) {
      break;  // a fixed point, as far as beta's growth goes
    }
  }
  return best;
}

}  // namespace detail

/// Grids with HQQ's zero points or offsets, from `start`'s scales (those of fit_min_max, or of fit_mse). w is N x K; its
/// codes are the nearest: grids.encode(w). Throws InvalidArgument for symmetric grids, which have no zero point to move,
/// for shapes that do not fit, and for a weight that is not finite, naming its index.
inline WeightGrids fit_hqq(const WeightGrids& start, const ConstWeightsRef& w, const HqqOptions& options = {}) {
  const detail::FpEnvironment environment;
  detail::require(start.scheme().symmetry != Symmetry::symmetric, "HQQ moves zero points, but the scheme is ",
                  name_of(start.scheme().symmetry), ", expected asymmetric or float_offset");
  detail::require(start.rows() == w.rows() && start.cols() == w.cols(), "w is ", w.rows(), " x ", w.cols(),
                  ", the grids are for ", start.rows(), " x ", start.cols());
  detail::require(options.p > 0.0 && options.p <= 1.0, "HQQ: p is ", options.p, ", expected (0, 1]");
  detail::require(options.beta > 0.0 && options.beta < 1e12 && options.kappa >= 1.0 && options.kappa < 1e3,
                  "HQQ: beta is ", options.beta, " and kappa ", options.kappa, ", expected > 0 and >= 1");
  detail::require(options.iterations >= 0 && options.iterations <= 1000, "HQQ: iterations is ", options.iterations,
                  ", expected 0 to 1000");
  WeightGrids grids = start;
  const auto group_size = static_cast<std::size_t>(grids.group_size());
  const std::size_t threads = options.pool == nullptr ? 1 : static_cast<std::size_t>(options.pool->threads());
  struct Room {
    std::vector<std::int8_t> codes;
    std::vector<float> values;
  };
  std::vector<Room> rooms(threads);
  detail::for_tasks(options.pool, static_cast<std::size_t>(w.rows()), [&](std::size_t task, std::size_t thread) {
    Room& room = rooms[thread];
    room.codes.resize(group_size);
    room.values.resize(group_size);
    const auto row = static_cast<Eigen::Index>(task);
    const float* values = w.data() + row * w.outerStride();
    for (Eigen::Index g = 0; g < grids.groups(); ++g) {
      const auto [begin, end] = grids.inputs_of(g);
      const auto n = static_cast<std::size_t>(end - begin);
      const Range range = detail::range_of(values + begin, row, begin, n);
      if (!(range.lo < range.hi)) continue;  // a constant is met exactly as it is
      grids.set(row, g,
                detail::hqq_group(start, start.at(row, g), values + begin, n, options, room.codes.data(),
                                  room.values.data()));
    }
  });
  return grids;
}

/// The same from the smallest and largest weight of each group.
inline WeightGrids fit_hqq(const Scheme& scheme, const ConstWeightsRef& w, const HqqOptions& options = {}) {
  return fit_hqq(fit_min_max(scheme, w, options.pool), w, options);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
