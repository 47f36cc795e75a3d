// AWQ: scales of input channels that protect what large activations multiply, and clipped ranges, both chosen by the
// error of the outputs (Lin et al. 2023).
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/ptq/fold.hpp"
#include "nibble/ptq/output_error.hpp"
#include "nibble/ptq/weight_grids.hpp"
#include "nibble/quantize/quantize_view.hpp"
#include "nibble/quantize/scheme.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Which errors of a group of inputs a clipped range is judged by.
enum class ClipLoss : std::uint8_t {
  diagonal,  ///< sum_k H_kk e_k^2: no correlations
  group,     ///< e_g H_gg e_g^T: the error of the group's part of the output, as AWQ has it
  row,       ///< the whole output's error, given what the row's other groups do: groups are gone through in turn
};

/// Which ranges are tried, each for i = 0 .. max_shrink * grid - 1 and p = 1 - i / grid.
enum class ClipEnds : std::uint8_t {
  magnitude,   ///< lo and hi clamped to [-p m, p m], m the largest magnitude: AWQ's clamp of the weights
  together,    ///< [p lo, p hi]
  either,      ///< [p lo, p hi], [p lo, hi] and [lo, p hi]
  separately,  ///< [p lo, p' hi] for all pairs p, p'; symmetric schemes need `together` only
};

/// The defaults suit whatever rounding follows. AWQ's own search is ClipEnds::magnitude. Where rounding to nearest follows,
/// ClipLoss::row is better. INT4 groups of 64 with a zero point, errors of the outputs relative to the whole ranges', over
/// the inputs of the first blocks of a Llama of 135 M weights (those of q k v, o, gate and up, down):
///
/// | loss, ends        | q k v | o    | gate, up | down |
/// |-------------------|-------|------|----------|------|
/// | group, magnitude  | 0.45  | 0.56 | 0.70     | 0.75 |
/// | diagonal, either  | 0.38  | 0.74 | 0.73     | 0.74 |
/// | group, either     | 0.34  | 0.47 | 0.65     | 0.70 |
/// | group, separately | 0.33  | 0.45 | 0.63     | 0.69 |
/// | row, either       | 0.26  | 0.36 | 0.49     | 0.52 |
/// | row, separately   | 0.26  | 0.35 | 0.48     | 0.51 |
///
/// On other text of the same kind all are within 0.05 of that.
struct ClipOptions {
  int grid = 20;            ///< steps of the whole range
  double max_shrink = 0.5;  ///< share of it that is tried to take away, 0 .. 1
  ClipLoss loss = ClipLoss::group;
  ClipEnds ends = ClipEnds::either;
  int passes = 2;              ///< ClipLoss::row: times that all groups are gone through, at least 1
  ThreadPool* pool = nullptr;  ///< changes no bit
};

namespace detail {

/// p and p' of every range that is tried, that of the data first.
inline std::vector<std::pair<float, float>> clip_candidates(const ClipOptions& o) {
  require(o.grid >= 1 && o.grid <= 10000, "grid is ", o.grid, ", expected 1 to 10000");
  require(o.max_shrink >= 0.0 && o.max_shrink <= 1.0, "max_shrink is ", o.max_shrink, ", expected 0 to 1");
  require(o.passes >= 1, "passes is ", o.passes, ", expected at least 1");
  const int steps = std::max(1, static_cast<int>(std::lround(o.max_shrink * o.grid)));
  const auto shrunk = [&](int i) { return static_cast<float>(1.0 - static_cast<double>(i) / o.grid); };
  std::vector<std::pair<float, float>> all;
  for (int i = 0; i < steps; ++i) {
    const float p = shrunk(i);
    all.emplace_back(p, p);
    if (o.ends == ClipEnds::either && i != 0) {
      all.emplace_back(p, 1.0F);
      all.emplace_back(1.0F, p);
    }
    for (int j = 0; o.ends == ClipEnds::separately && j < steps; ++j)
      if (j != i) all.emplace_back(p, shrunk(j));
  }
  return all;
}

inline Range clipped(const Range& r, const std::pair<float, float>& p, ClipEnds ends) noexcept {
  if (ends != ClipEnds::magnitude) return {rounded(r.lo * p.first), rounded(r.hi * p.second)};
  const float most = rounded(std::max(std::fabs(r.lo), std::fabs(r.hi)) * p.first);
  return {std::clamp(r.lo, -most, most), std::clamp(r.hi, -most, most)};
}

/// Clipped ranges of some rows of a matrix: w, grids, and what is found out about them.
class ClipSearch {
 public:
  ClipSearch(WeightGrids& grids, const ConstWeightsRef& w, const ConstMatrixRef& h, const ClipOptions& options)
      : grids_(grids), w_(w), h_(h), options_(options), candidates_(clip_candidates(options)) {}

  void rows(Eigen::Index first, Eigen::Index count) const {
    RowMajorMatrix error(count, w_.cols());
    Eigen::MatrixXf others;  // h e^T of the rows, all groups
    for (Eigen::Index r = 0; r < count; ++r)
      for (Eigen::Index g = 0; g < grids_.groups(); ++g) {
        const auto [begin, end] = grids_.inputs_of(g);
        const float* w = at(first + r, begin);
        const auto n = static_cast<std::size_t>(end - begin);
        grids_.set(first + r, g, range_of(w, first + r, begin, n));
        round(grids_.at(first + r, g), w, n, error.data() + r * w_.cols() + begin);
      }
    const bool joint = options_.loss == ClipLoss::row;
    const int passes = joint ? options_.passes : 1;
    if (joint) {
      others.resize(w_.cols(), count);
      gemm(h_, error.transpose(), others);
    }
    for (int pass = 0; pass < passes; ++pass)
      for (Eigen::Index g = 0; g < grids_.groups(); ++g) group(first, count, g, error, others);
  }

 private:
  const float* at(Eigen::Index row, Eigen::Index k) const { return w_.data() + row * w_.outerStride() + k; }

  /// error := decode(encode(w)) - w.
  void round(const Grid& grid, const float* w, std::size_t n, float* error) const {
    std::int8_t codes[chunk];
    for (std::size_t i = 0; i < n; i += chunk) {
      const std::size_t m = std::min(chunk, n - i);
      grids_.encode_run(grid, w + i, m, codes);
      grids_.decode_run(grid, codes, m, error + i);
    }
    for (std::size_t i = 0; i < n; ++i) error[i] -= w[i];
  }

  void group(Eigen::Index first, Eigen::Index count, Eigen::Index g, RowMajorMatrix& error,
             Eigen::MatrixXf& others) const {
    const auto [begin, end] = grids_.inputs_of(g);
    const Eigen::Index n = end - begin;
    const auto tried = static_cast<Eigen::Index>(candidates_.size());
    std::vector<Grid> grids(static_cast<std::size_t>(tried * count));
    RowMajorMatrix errors(tried * count, n);
    for (Eigen::Index r = 0; r < count; ++r) {
      const Range range = range_of(at(first + r, begin), first + r, begin, static_cast<std::size_t>(n));
      for (Eigen::Index c = 0; c < tried; ++c) {
        const Eigen::Index i = r * tried + c;
        Grid& grid = grids[static_cast<std::size_t>(i)];
        grid = grids_.fit(clipped(range, candidates_[static_cast<std::size_t>(c)], options_.ends));
        round(grid, at(first + r, begin), static_cast<std::size_t>(n), errors.data() + i * n);
      }
    }
    const auto h = h_.block(begin, begin, n, n);
    Eigen::MatrixXf products(n, options_.loss == ClipLoss::diagonal ? 0 : tried * count);
    if (products.size() != 0) gemm(h, errors.transpose(), products);
    // The part of h e^T that the row's other groups make.
    const bool joint = options_.loss == ClipLoss::row;
    Eigen::MatrixXf rest;
    RowMajorMatrix change;
    if (joint) {
      rest.resize(n, count);
      change = error.middleCols(begin, n);
      gemm(h, change.transpose(), rest);
      rest = others.middleRows(begin, n) - rest;
    }
    for (Eigen::Index r = 0; r < count; ++r) {
      Eigen::Index best = 0;
      double least = 0.0;
      for (Eigen::Index c = 0; c < tried; ++c) {
        const Eigen::Index i = r * tried + c;
        const float* e = errors.data() + i * n;
        double loss = 0.0;
        for (Eigen::Index k = 0; k < n; ++k) {
          const auto ek = static_cast<double>(e[k]);
          double slope = options_.loss == ClipLoss::diagonal ? rounded(static_cast<double>(h(k, k)) * ek)
                                                             : static_cast<double>(products(k, i));
          if (joint) slope += 2.0 * static_cast<double>(rest(k, r));
          loss += rounded(slope * ek);
        }
        if (c != 0 && !(loss < least)) continue;
        least = loss;
        best = c;
      }
      const Eigen::Index i = r * tried + best;
      grids_.set(first + r, g, grids[static_cast<std::size_t>(i)]);
      error.row(r).segment(begin, n) = errors.row(i);
    }
    if (!joint) return;
    change = error.middleCols(begin, n) - change;
    Eigen::MatrixXf moved(w_.cols(), count);
    gemm(h_.middleCols(begin, n), change.transpose(), moved);
    others += moved;
  }

  static constexpr std::size_t chunk = 512;

  WeightGrids& grids_;
  const ConstWeightsRef& w_;
  const ConstMatrixRef& h_;
  const ClipOptions& options_;
  std::vector<std::pair<float, float>> candidates_;
};

}  // namespace detail

/// Clipped ranges for every row and group of w (N x K, after scale_inputs), each the one of those tried whose rounding
/// to nearest costs the output least, the first of equals. What comes out are grids that rounding of any kind can go on
/// with: encode() rounds to nearest, GPTQ and AutoRound take them as they are.
/// @param hessian  K x K, of the inputs as w meets them (unscale_hessian)
/// AWQ leaves q and k as they are: their outputs' error is not what attention sees.
/// Throws InvalidArgument: a scheme that WeightGrids refuses, shapes that do not fit, values that are not finite.
inline WeightGrids awq_clip(const Scheme& scheme, const ConstWeightsRef& w, const ConstMatrixRef& hessian,
                            const ClipOptions& options = {}) {
  const detail::FpEnvironment environment;
  WeightGrids grids(scheme, w.rows(), w.cols());
  detail::check_hessian(hessian, w.cols());
  const detail::ClipSearch search(grids, w, hessian, options);
  if (w.size() == 0) return grids;
  // Rows that are tried at once: their candidates for one group take about a megabyte.
  const auto steps = static_cast<Eigen::Index>(detail::clip_candidates(options).size());
  const Eigen::Index at_once = std::clamp<Eigen::Index>(262144 / (steps * grids.group_size()), 1, 64);
  const Eigen::Index tasks = (w.rows() + at_once - 1) / at_once;
  detail::for_tasks(options.pool, static_cast<std::size_t>(tasks), [&](std::size_t task, std::size_t) {
    const Eigen::Index first = static_cast<Eigen::Index>(task) * at_once;
    search.rows(first, std::min(at_once, w.rows() - first));
  });
  return grids;
}

/// Rounds a matrix as the search is to judge it: gets the weights, number i of the list, with their inputs multiplied by
/// `scales`, and gives their dequantized values.
using WeightRounding =
    std::function<RowMajorMatrix(std::size_t i, const RowMajorMatrix& scaled, const Eigen::VectorXf& scales)>;
/// Loss of a choice: gets the weights that the float activations would meet, Q(W diag(s)) diag(1 / s) of every linear of
/// the list, and gives what is to be small, e.g. the squared error of the block's output.
using WeightLoss = std::function<double(const std::vector<RowMajorMatrix>& effective)>;

struct AwqOptions {
  int grid = 20;  ///< alphas 0, 1 / grid .. 1 - 1 / grid
  /// Powers b of the weights: s = x^alpha / w^b is tried for all of them, where w is the mean over the rows of |W|
  /// relative to the largest magnitude of its group. {0}: the paper. Empty: b = 1 - alpha ("duo scaling", AutoAWQ).
  std::vector<double> weight_powers = {0.0};
  HeadLayout heads{0, 0, 0};  ///< given for o: ties the scales of grouped queries
  /// Judge scales by what is left after awq_clip() with these options, which costs that much for every alpha; their pool
  /// is this one. Empty: ranges from smallest and largest, as AWQ.
  std::optional<ClipOptions> clip = {};
  WeightRounding rounding = {};  ///< instead of both
  WeightLoss loss = {};          ///< empty: output_error() with the Hessian, summed over the linears
  ThreadPool* pool = nullptr;    ///< changes no bit
};

/// What awq_scales() found.
struct AwqScales {
  Eigen::VectorXf scales;     ///< K: weights are to be multiplied (scale_inputs), activations divided
  Eigen::VectorXf kv_scales;  ///< one a kv channel, where AwqOptions::heads was given: for unscale_outputs(v, ...)
  double alpha = 0.0;
  double weight_power = 0.0;
  double loss = 0.0;           ///< with these scales
  double plain_loss = 0.0;     ///< with scales of 1
  std::vector<double> losses;  ///< of each alpha and, for each, of each power
};

namespace detail {

/// Mean over all rows of |w| / (largest magnitude of its group): K values in 0 .. 1. AutoAWQ's weight statistic.
inline Eigen::VectorXd relative_magnitudes(const WeightList& weights, Eigen::Index group_size) {
  const Eigen::Index inputs = shared_inputs(weights);
  Eigen::VectorXd sum = Eigen::VectorXd::Zero(inputs);
  double rows = 0.0;
  for (const RowMajorMatrix* w : weights) {
    rows += static_cast<double>(w->rows());
    for (Eigen::Index r = 0; r < w->rows(); ++r)
      for (Eigen::Index begin = 0; begin < inputs; begin += group_size) {
        const Eigen::Index n = std::min(group_size, inputs - begin);
        const auto group = w->row(r).segment(begin, n).cwiseAbs();
        const double largest = static_cast<double>(group.maxCoeff()) + 1e-6;
        for (Eigen::Index k = 0; k < n; ++k) sum[begin + k] += static_cast<double>(group[k]) / largest;
      }
  }
  return sum / std::max(rows, 1.0);
}

/// x^alpha / w^power, no less than 1e-4, divided by sqrt(largest * smallest).
inline Eigen::VectorXf awq_candidate(const Eigen::VectorXd& x, const Eigen::VectorXd& w, double alpha,
                                     double power) {
  Eigen::VectorXd s(x.size());
  for (Eigen::Index k = 0; k < s.size(); ++k) {
    s[k] = std::pow(x[k], alpha);
    if (power != 0.0) s[k] /= std::pow(w[k], power) + 1e-4;
    s[k] = std::max(s[k], 1e-4);
  }
  if (s.size() != 0) s /= std::sqrt(s.maxCoeff() * s.minCoeff());
  return s.cast<float>();
}

}  // namespace detail

/// Searches the scales s of the inputs that `weights` share: weights times s are rounded, activations are divided by s
/// where they are made (unscale_norm, unscale_outputs). s = mean|x|^alpha, clamped at 1e-4, divided by
/// sqrt(max s * min s); the alpha with the least loss is taken, the first of equals, so that no gain means alpha = 0.
/// The loss is exact for all calibration tokens without a pass over them: tr(E H E^T), E = Q(W s) / s - W.
///
/// With GPTQ behind it, scale down's inputs and leave the others: measured as ClipOptions', errors relative to rounding to
/// nearest went from 0.67 to 0.33 for down, but from 0.081 to 0.103 for q k v, 0.15 to 0.17 for o, 0.31 to 0.33 for gate
/// and up.
/// @param scheme   any with scales, groups along the inputs or one a row
/// @param mean_abs K values, the mean of |x| over the calibration tokens
/// @param hessian  K x K, (2 / n) sum x x^T of them (any factor will do); not used where AwqOptions::loss is given and clip is not
/// Throws InvalidArgument: sizes that do not fit, values that are not finite, a negative mean.
inline AwqScales awq_scales(const Scheme& scheme, const WeightList& weights,
                            const Eigen::Ref<const Eigen::VectorXf>& mean_abs, const ConstMatrixRef& hessian,
                            const AwqOptions& options = {}) {
  const detail::FpEnvironment environment;
  const Eigen::Index inputs = detail::shared_inputs(weights);
  detail::require(mean_abs.size() == inputs, "mean_abs has ", mean_abs.size(), " elements, expected ", inputs);
  detail::require(options.grid >= 1 && options.grid <= 10000, "grid is ", options.grid, ", expected 1 to 10000");
  for (Eigen::Index k = 0; k < inputs; ++k)
    detail::require(std::isfinite(mean_abs[k]) && mean_abs[k] >= 0.0F, "mean_abs[", k, "] is ", mean_abs[k],
                    ", expected a finite number, not negative");
  for (const double power : options.weight_powers)
    detail::require(power >= 0.0 && power <= 1.0, "weight_powers has ", power, ", expected 0 to 1");
  if (!options.loss || options.clip) detail::check_hessian(hessian, inputs);
  const Eigen::Index group_size = WeightGrids(scheme, 1, inputs).group_size();
  const bool tied = options.heads.heads != 0;
  const auto tie = [&](const Eigen::VectorXd& v) -> Eigen::VectorXd {
    return tied ? mean_over_queries(v.cast<float>(), options.heads).cast<double>() : v;
  };
  const Eigen::VectorXd x = tie(mean_abs.cast<double>());
  const Eigen::VectorXd w = tie(detail::relative_magnitudes(weights, group_size));

  ClipOptions clip = options.clip.value_or(ClipOptions{});
  clip.pool = options.pool;
  std::vector<RowMajorMatrix> effective(weights.size());
  const auto loss_of = [&](const Eigen::VectorXf& s) {
    double sum = 0.0;
    const Eigen::MatrixXf scaled_hessian = options.clip ? unscale_hessian(hessian, s) : Eigen::MatrixXf();
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const RowMajorMatrix& original = *weights[i];
      RowMajorMatrix& q = effective[i];
      q = original.array().rowwise() * s.transpose().array();
      if (options.rounding) {
        const RowMajorMatrix scaled = q;
        q = options.rounding(i, scaled, s);
        detail::require(q.rows() == original.rows() && q.cols() == inputs, "rounding gave a matrix of ", q.rows(),
                        " x ", q.cols(), ", expected ", original.rows(), " x ", inputs);
      } else if (options.clip) {
        const WeightGrids grids = awq_clip(scheme, q, scaled_hessian, clip);
        q = grids.decode(grids.encode(q, options.pool), options.pool);
      } else {
        detail::fake_quantize_in_place(scheme, q, options.pool);
      }
      q.array().rowwise() /= s.transpose().array();
      if (options.loss || q.size() == 0) continue;
      q -= original;
      sum += detail::quadratic_error(q, hessian, options.pool);
    }
    const double loss = options.loss ? options.loss(effective) : sum;
    detail::require(std::isfinite(loss), "the loss of AWQ's scales is ", loss, ", expected a finite number");
    return loss;
  };
  const auto widen = [&](const Eigen::VectorXf& s) -> Eigen::VectorXf {
    return tied ? expand_to_queries(s, options.heads) : s;
  };

  AwqScales best;
  best.scales = Eigen::VectorXf::Ones(inputs);
  if (tied) best.kv_scales = Eigen::VectorXf::Ones(x.size());
  best.loss = best.plain_loss = loss_of(best.scales);
  for (int i = 0; i < options.grid; ++i) {
    const double alpha = static_cast<double>(i) / options.grid;
    std::vector<double> powers = options.weight_powers;
    if (powers.empty()) powers = {1.0 - alpha};
    for (const double power : powers) {
      const Eigen::VectorXf s = detail::awq_candidate(x, w, alpha, power);
      const bool plain = alpha == 0.0 && power == 0.0;  // scales of 1
      const double loss = plain ? best.plain_loss : loss_of(widen(s));
      best.losses.push_back(loss);
      if (!(loss < best.loss)) continue;
      best.loss = loss;
      best.alpha = alpha;
      best.weight_power = power;
      best.scales = widen(s);
      if (tied) best.kv_scales = s;
    }
  }
  return best;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
