// Importance-weighted rounding: scales and zero points that lose least where the inputs are large, which is what
// llama.cpp does with an importance matrix.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <Eigen/Core>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/ptq/weight_grids.hpp"
#include "nibble/quantize/quantized_tensor.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

struct ImportanceOptions {
  /// Scales that are tried for a group, evenly between these parts of the one that covers its range; >= 1.
  int candidates = 40;
  double smallest = 0.5;
  double largest = 1.1;
  /// Rounds of "scale for these codes, codes for this scale" that the best candidate goes through; >= 0.
  int refinements = 3;
  /// Multiplies a weight's importance by sqrt(mean of its row's squares + its square): large weights count for more.
  bool magnitude = true;
  /// Threads to work with; nullptr: the calling one. Changes no bit.
  ThreadPool* pool = nullptr;
};

namespace detail {

/// The search for one group's grid at a time, with its room.
class ImportanceSearch {
 public:
  ImportanceSearch(const WeightGrids& grids, const ImportanceOptions& options)
      : grids_(grids), options_(options), symmetry_(grids.scheme().symmetry) {
    const auto n = static_cast<std::size_t>(grids.group_size());
    for (std::vector<float>* v : {&weights_, &products_, &values_}) v->resize(n);
    codes_.resize(n);
  }

  /// The grid of n weights x of importance w (which is what sums up to 1 or so).
  Grid find(const float* x, const float* importance, double mean_square, const Range& range, std::size_t n) {
    x_ = x;
    n_ = n;
    weigh(importance, mean_square);
    Grid best = grids_.fit(range);
    if (!(range.lo < 0.0F || range.hi > 0.0F)) return best;
    double least = error(best);
    Grid found = best;
    double lowest = std::numeric_limits<double>::infinity();
    const Grid whole = best;
    // Symmetric with the lowest code in use: the side that has one code more may be either.
    const int signs = grids_.scheme().full_range ? 2 : 1;
    for (int i = 0; i < options_.candidates; ++i) {
      const double part =
          options_.largest - rounded((options_.largest - options_.smallest) * static_cast<double>(i) /
                                     std::max(1, options_.candidates - 1));
      for (int sign = 0; sign < signs; ++sign) {
        Grid g = whole;
        g.scale =
            static_cast<float>(rounded(static_cast<double>(whole.scale) * part)) * (sign == 0 ? 1.0F : -1.0F);
        if (!(std::fabs(g.scale) >= std::numeric_limits<float>::min())) continue;
        if (symmetry_ != Symmetry::asymmetric) {
          if (symmetry_ == Symmetry::float_offset) g.offset = centred(range, g.scale);
          consider(g, found, lowest);
          continue;
        }
        const auto lo = static_cast<double>(std::min(range.lo, 0.0F));
        const int zero = static_cast<int>(
            std::lround(static_cast<double>(grids_.min_code()) - rounded(lo / static_cast<double>(g.scale))));
        for (int z = zero - 1; z <= zero + 1; ++z) {
          g.zero = std::clamp(z, grids_.min_code(), grids_.max_code());
          consider(g, found, lowest);
        }
      }
    }
    for (int i = 0; i <= options_.refinements; ++i) {
      if (!grids_.storable(found)) break;
      const Grid stored = grids_.stored(found);
      const double now = error(stored);
      if (now < least) {
        least = now;
        best = stored;
      }
      found = stored;
      lowest = std::numeric_limits<double>::infinity();
      consider(stored, found, lowest);
    }
    return best;
  }

 private:
  void weigh(const float* importance, double mean_square) {
    float most = 0.0F;
    for (std::size_t k = 0; k < n_ && importance != nullptr; ++k) most = std::max(most, importance[k]);
    squares_ = 0.0;
    first_ = 0.0;
    total_ = 0.0;
    for (std::size_t k = 0; k < n_; ++k) {
      // Where none matters, all matter alike.
      double w = most > 0.0F ? static_cast<double>(importance[k]) : 1.0;
      const auto x = static_cast<double>(x_[k]);
      if (options_.magnitude) w *= std::sqrt(mean_square + x * x);
      weights_[k] = static_cast<float>(w);
      products_[k] = static_cast<float>(static_cast<double>(weights_[k]) * x);
      total_ += static_cast<double>(weights_[k]);
      first_ += static_cast<double>(products_[k]);
      squares_ += static_cast<double>(products_[k]) * x;  // two floats: exact, and so is each product below
    }
  }

  /// The offset that puts the middle of a smaller or larger grid onto the middle of the range.
  float centred(const Range& range, float scale) const {
    const double middle = rounded((static_cast<double>(range.lo) + static_cast<double>(range.hi)) * 0.5);
    const double half =
        rounded(static_cast<double>(grids_.max_code() + grids_.min_code()) * 0.5 * static_cast<double>(scale));
    return static_cast<float>(middle - half);
  }

  /// sum_k w_k (x_k - value_k)^2.
  double error(const Grid& g) {
    grids_.encode_run(g, x_, n_, codes_.data());
    grids_.decode_run(g, codes_.data(), n_, values_.data());
    double sum = 0.0;
    for (std::size_t k = 0; k < n_; ++k) {
      const float e = values_[k] - x_[k];
      const auto we = static_cast<float>(static_cast<double>(weights_[k]) * static_cast<double>(e));
      sum += static_cast<double>(we) * static_cast<double>(e);
    }
    return sum;
  }

  /// The codes of g, and the scale (and offset) that is best for them: found takes it where its error is below `lowest`.
  /// With c = q - zero or a level: scale = sum w x c / sum w c^2; with an offset, the line through (c, x).
  void consider(const Grid& g, Grid& found, double& lowest) {
    grids_.encode_run(g, x_, n_, codes_.data());
    Grid unit = g;
    unit.scale = 1.0F;
    unit.offset = 0.0F;
    grids_.decode_run(unit, codes_.data(), n_, values_.data());
    double xc = 0.0;
    double cc = 0.0;
    double c1 = 0.0;
    for (std::size_t k = 0; k < n_; ++k) {
      const auto c = static_cast<double>(values_[k]);
      const auto wc = static_cast<float>(static_cast<double>(weights_[k]) * c);
      xc += static_cast<double>(products_[k]) * c;
      cc += static_cast<double>(wc) * c;
      c1 += static_cast<double>(wc);
    }
    Grid better = g;
    double rest;
    if (symmetry_ == Symmetry::float_offset) {
      const double spread = rounded(total_ * cc) - rounded(c1 * c1);
      if (!(spread > 1e-12 * rounded(total_ * cc))) return;
      const double scale = (rounded(total_ * xc) - rounded(c1 * first_)) / spread;
      const double offset = (first_ - rounded(scale * c1)) / total_;
      rest = squares_ - rounded(scale * xc) - rounded(offset * first_);
      better.scale = static_cast<float>(scale);
      better.offset = static_cast<float>(offset);
    } else {
      if (!(cc > 0.0)) return;
      const double scale = xc / cc;
      rest = squares_ - rounded(scale * xc);
      better.scale = static_cast<float>(scale);
    }
    if (better.scale == 0.0F || !(rest < lowest)) return;
    lowest = rest;
    found = better;
  }

  const WeightGrids& grids_;
  const ImportanceOptions& options_;
  Symmetry symmetry_;
  const float* x_ = nullptr;
  std::size_t n_ = 0;
  std::vector<float> weights_;
  std::vector<float> products_;  // weight times x
  std::vector<float> values_;
  std::vector<std::int8_t> codes_;
  double squares_ = 0.0;  // sum w x^2
  double first_ = 0.0;    // sum w x
  double total_ = 0.0;    // sum w
};

}  // namespace detail

/// Grids that lose little of
///
///   sum_k w_k (x_k - dequantize(quantize(x_k)))^2,  w_k = importance_k sqrt(mean of the row's squares + x_k^2)
///
/// in each group (the root: options.magnitude). importance: one value an input, >= 0; mean x_k^2 of the calibration inputs
/// (Hessian::mean_square) makes the sum without the root the error of the outputs if inputs were not correlated. Empty: 1.
///
/// Candidates of the scale (asymmetric: with three zero points each) give codes, codes give the scale that is best for them
/// in closed form, and the best candidate is refined in turns; never worse than min and max. The codes that belong to the
/// grids are the nearest: WeightGrids::encode. Source: llama.cpp, ggml-quants.c, make_qx_quants and make_qkx3_quants,
/// re-derived for all schemes.
///
/// Throws InvalidArgument: a scheme that WeightGrids refuses, a weight that is not finite (named), an importance of another
/// length, negative or not finite.
inline WeightGrids fit_importance(const Scheme& scheme, const ConstWeightsRef& w,
                                  const Eigen::Ref<const Eigen::VectorXf>& importance,
                                  const ImportanceOptions& options = {}) {
  const detail::FpEnvironment environment;
  detail::check_importance(importance, w.cols());
  detail::require(options.candidates >= 1 && options.candidates <= 100000, "candidates is ", options.candidates,
                  ", expected 1 to 100000");
  detail::require(options.refinements >= 0 && options.refinements <= 1000, "refinements is ", options.refinements,
                  ", expected 0 to 1000");
  detail::require(options.smallest > 0.0 && options.smallest <= options.largest && options.largest <= 4.0,
                  "smallest is ", options.smallest, " and largest ", options.largest,
                  ", expected 0 < smallest <= largest <= 4");
  WeightGrids grids(scheme, w.rows(), w.cols());
  // A power of two off everything changes nothing but keeps products within float.
  Eigen::VectorXf scaled = importance;
  const float most = scaled.size() == 0 ? 0.0F : scaled.maxCoeff();
  if (most > 0.0F) {
    const int exponent = -std::ilogb(most);
    for (Eigen::Index k = 0; k < scaled.size(); ++k) scaled[k] = std::ldexp(scaled[k], exponent);
  }
  const std::size_t threads = options.pool == nullptr ? 1 : static_cast<std::size_t>(options.pool->threads());
  std::vector<detail::ImportanceSearch> searches(threads, detail::ImportanceSearch(grids, options));
  detail::for_tasks(options.pool, static_cast<std::size_t>(w.rows()), [&](std::size_t task, std::size_t thread) {
    const auto row = static_cast<Eigen::Index>(task);
    const float* x = w.data() + row * w.outerStride();
    detail::range_of(x, row, 0, static_cast<std::size_t>(w.cols()));
    double squares = 0.0;
    for (Eigen::Index k = 0; k < w.cols(); ++k) squares += static_cast<double>(x[k]) * static_cast<double>(x[k]);
    const double mean_square = squares / static_cast<double>(std::max<Eigen::Index>(1, w.cols()));
    for (Eigen::Index g = 0; g < grids.groups(); ++g) {
      const auto [begin, end] = grids.inputs_of(g);
      const auto n = static_cast<std::size_t>(end - begin);
      const Range range = detail::range_of(x + begin, row, begin, n);
      grids.set(row, g,
                searches[thread].find(x + begin, scaled.size() == 0 ? nullptr : scaled.data() + begin, mean_square,
                                      range, n));
    }
  });
  return grids;
}

/// w under such grids. Throws as fit_importance does.
inline QuantizedTensor quantize_importance(const Scheme& scheme, const ConstWeightsRef& w,
                                           const Eigen::Ref<const Eigen::VectorXf>& importance,
                                           const ImportanceOptions& options = {}) {
  const WeightGrids grids = fit_importance(scheme, w, importance, options);
  return grids.assemble(grids.encode(w, options.pool));
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
