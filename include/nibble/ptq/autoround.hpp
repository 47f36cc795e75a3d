// AutoRound: which way each weight is rounded, and each group's range, learned by signed gradient descent on a loss of
// the caller's (a block's output error). Source: Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient
// Descent for the Quantization of LLMs", equations 3 to 5.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/ptq/weight_grids.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// One N x K matrix under optimisation. With scale s and zero point z of a group, the weight that the model sees is
///
///     s * c,  c = clamp(rne(w / s + v), min_code - z, max_code - z)
///
/// exactly what the final tensor dequantizes to: s is rounded to its storage, z an integer. v in [-0.5, 0.5] is learned
/// for each weight; s and z come, as the quantizers fit them, from the group's range [low * min w, high * max w] (both
/// with 0), whose factors low and high in [0, 1] are learned too. Symmetric schemes have one factor for both ends.
/// Gradients go straight through the roundings (of s, too):
///
///     dv = s * dw;   ds = sum of dw * (c - w / s);  where rne(w / s + v) is clamped dv = 0, ds has dw * c, and dz = -s * dw
class AutoRoundMatrix {
 public:
  /// Starts at the nearest codes of w under `start`, e.g. fit_min_max() or fit_mse() of it. Integer formats, symmetric or
  /// with an integer zero point. Throws InvalidArgument for other schemes, where shapes differ, and for a weight that is
  /// not finite.
  AutoRoundMatrix(const ConstWeightsRef& w, const WeightGrids& start, ThreadPool* pool = nullptr)
      : AutoRoundMatrix(w, start, nullptr, pool) {}

  /// Starts at given codes (of GPTQ, say): each weight begins where w lies, or where that does not round to its code at
  /// the nearest place that does.
  AutoRoundMatrix(const ConstWeightsRef& w, const WeightGrids& start, const CodeMatrix& codes,
                  ThreadPool* pool = nullptr)
      : AutoRoundMatrix(w, start, &codes, pool) {}

  /// What the model sees now. The reference stays valid; step() changes what it refers to.
  const RowMajorMatrix& weights() const noexcept { return weights_; }
  const WeightGrids& grids() const noexcept { return grids_; }
  /// The offsets v, N x K.
  const RowMajorMatrix& offsets() const noexcept { return v_; }

  /// One step of signed descent: v by lr against the sign of its gradient, factors of ranges by scale_lr (0: ranges
  /// stay). dw: the loss' gradient with respect to weights(), N x K. The same bits for any number of threads.
  void step(const RowMajorMatrix& dw, float lr, float scale_lr, ThreadPool* pool = nullptr) {
    detail::require(dw.rows() == weights_.rows() && dw.cols() == weights_.cols(), "dw is ", dw.rows(), " x ",
                    dw.cols(), ", expected ", weights_.rows(), " x ", weights_.cols());
    each_row(pool, [&](Eigen::Index row) {
      for (Eigen::Index g = 0; g < grids_.groups(); ++g) {
        step_group(row, g, dw.data() + row * dw.cols(), lr, scale_lr);
        write_weights(row, g);
      }
    });
  }

  /// Remembers the present codes and grids for result().
  void keep_best(ThreadPool* pool = nullptr) {
    best_ = codes(pool);
    best_grids_ = grids_;
  }

  /// The codes now, as stored.
  CodeMatrix codes(ThreadPool* pool = nullptr) const {
    CodeMatrix out(weights_.rows(), weights_.cols());
    each_row(pool, [&](Eigen::Index row) {
      for (Eigen::Index g = 0; g < grids_.groups(); ++g) {
        const GroupGrid grid = grid_of(row, g);
        const auto [begin, end] = grids_.inputs_of(g);
        for (Eigen::Index k = begin; k < end; k += lanes) {
          const Eigen::Index n = std::min(lanes, end - k);
          const Lanes c = code(grid, position(grid, row, k, n)) + grid.zero;
          for (Eigen::Index i = 0; i < n; ++i) out(row, k + i) = static_cast<std::int8_t>(c[i]);
        }
      }
    });
    return out;
  }

  /// The matrix of the last keep_best(), or the present one where there was none.
  QuantizedTensor result() const {
    return best_.size() == 0 ? grids_.assemble(codes()) : best_grids_.assemble(best_);
  }

 private:
  static constexpr Eigen::Index lanes = 16;
  using Lanes = Eigen::Array<float, 16, 1>;

  struct GroupGrid {
    float scale;
    float zero;
    float lowest;  // codes less the zero point
    float highest;
  };
  /// Factors of a group's range, and the range that they multiply.
  struct GroupRange {
    float low = 1.0F;
    float high = 1.0F;
    float min = 0.0F;
    float max = 0.0F;
  };

  AutoRoundMatrix(const ConstWeightsRef& w, const WeightGrids& start, const CodeMatrix* codes, ThreadPool* pool)
      : w_(w), grids_(start), best_grids_(start) {
    const Scheme& scheme = grids_.scheme();
    detail::require(is_integer(scheme.format) && scheme.symmetry != Symmetry::float_offset,
                    "AutoRound: scheme is ", name_of(scheme.format), ", ", name_of(scheme.symmetry),
                    ", expected an integer format, symmetric or with an integer zero point");
    detail::require(w.rows() == start.rows() && w.cols() == start.cols(), "w is ", w.rows(), " x ", w.cols(),
                    ", the grids are for ", start.rows(), " x ", start.cols());
    if (codes != nullptr)
      detail::require(codes->rows() == w.rows() && codes->cols() == w.cols(), "codes are ", codes->rows(), " x ",
                      codes->cols(), ", expected ", w.rows(), " x ", w.cols());
    v_ = RowMajorMatrix::Zero(w_.rows(), w_.cols());
    weights_.resize(w_.rows(), w_.cols());
    ranges_.resize(static_cast<std::size_t>(w_.rows() * grids_.groups()));
    each_row(pool, [&](Eigen::Index row) {
      for (Eigen::Index g = 0; g < grids_.groups(); ++g) {
        start_range(row, g);
        if (codes != nullptr) move_to(row, g, *codes);
        write_weights(row, g);
      }
    });
  }

  template <class F>
  void each_row(ThreadPool* pool, F&& f) const {
    const auto rows = static_cast<std::size_t>(w_.rows());
    const std::size_t at_once = std::max<std::size_t>(
        1, 16384 / std::max<std::size_t>(w_.cols() == 0 ? 1 : static_cast<std::size_t>(w_.cols()), 1));
    detail::for_tasks(pool, detail::ceil_div(rows, at_once), [&](std::size_t task, std::size_t) {
      const detail::FpEnvironment environment;
      for (std::size_t r = task * at_once; r < std::min(rows, (task + 1) * at_once); ++r)
        f(static_cast<Eigen::Index>(r));
    });
  }

  GroupRange& range_of(Eigen::Index row, Eigen::Index g) {
    return ranges_[static_cast<std::size_t>(row * grids_.groups() + g)];
  }
  GroupGrid grid_of(Eigen::Index row, Eigen::Index g) const {
    const Grid grid = grids_.at(row, g);
    return {grid.scale, static_cast<float>(grid.zero), static_cast<float>(grids_.min_code() - grid.zero),
            static_cast<float>(grids_.max_code() - grid.zero)};
  }

  /// n <= 16 floats; those beyond are 0.
  static Lanes load(const float* x, Eigen::Index n) {
    if (n == lanes) return Eigen::Map<const Lanes>{x};
    Lanes out = Lanes::Zero();
    std::copy(x, x + n, out.data());
    return out;
  }
  static void store(const Lanes& values, float* x, Eigen::Index n) {
    if (n == lanes)
      Eigen::Map<Lanes>{x} = values;
    else
      std::copy(values.data(), values.data() + n, x);
  }
  Lanes position(const GroupGrid& grid, Eigen::Index row, Eigen::Index k, Eigen::Index n) const {
    const Eigen::Index at = row * w_.cols() + k;
    return load(w_.data() + at, n) / grid.scale + load(v_.data() + at, n);
  }
  /// To the nearest whole number, ties to even: adding 1.5 * 2^23 leaves no bits below 1.
  static Lanes whole(const Lanes& x) { return (x + 12582912.0F) - 12582912.0F; }
  /// The code less the zero point.
  static Lanes code(const GroupGrid& grid, const Lanes& position) {
    return whole(position.max(grid.lowest).min(grid.highest));
  }

  void start_range(Eigen::Index row, Eigen::Index g) {
    const auto [begin, end] = grids_.inputs_of(g);
    const Range seen =
        detail::range_of(w_.data() + row * w_.cols() + begin, row, begin, static_cast<std::size_t>(end - begin));
    GroupRange& r = range_of(row, g);
    r.min = std::min(seen.lo, 0.0F);
    r.max = std::max(seen.hi, 0.0F);
    // What the start grid reaches, as factors; a grid that reaches farther than the weights keeps its reach.
    const GroupGrid grid = grid_of(row, g);
    if (grids_.scheme().symmetry == Symmetry::symmetric) {
      const float full = grids_.fit({r.min, r.max}).scale;
      r.low = r.high = r.min < r.max ? grid.scale / full : 1.0F;
      return;
    }
    if (!(r.min < r.max)) return;
    // One factor for both ends, as all searches by shrinking have it; else what the codes reach, which differs by what
    // the zero point was rounded by.
    r.low = r.high = grid.scale * (grid.highest - grid.lowest) / (r.max - r.min);
    if (static_cast<float>(grids_.fit({r.low * r.min, r.high * r.max}).zero) == grid.zero) return;
    if (r.min < 0.0F) r.low = grid.scale * grid.lowest / r.min;
    if (r.max > 0.0F) r.high = grid.scale * grid.highest / r.max;
  }

  void move_to(Eigen::Index row, Eigen::Index g, const CodeMatrix& codes) {
    const GroupGrid grid = grid_of(row, g);
    const auto [begin, end] = grids_.inputs_of(g);
    for (Eigen::Index k = begin; k < end; ++k) {
      const float c = static_cast<float>(codes(row, k)) - grid.zero;
      detail::require(c >= grid.lowest && c <= grid.highest, "code (", row, ", ", k, ") is ",
                      static_cast<int>(codes(row, k)), ", expected ", grids_.min_code(), " to ",
                      grids_.max_code());
      // 0.499, lest the division round to the neighbour.
      constexpr float reach = 0.499F;
      float at = w_(row, k) / grid.scale;
      if (c < grid.highest) at = std::min(at, c + reach);
      if (c > grid.lowest) at = std::max(at, c - reach);
      w_(row, k) = at * grid.scale;
    }
  }

  void write_weights(Eigen::Index row, Eigen::Index g) {
    const GroupGrid grid = grid_of(row, g);
    const auto [begin, end] = grids_.inputs_of(g);
    for (Eigen::Index k = begin; k < end; k += lanes) {
      const Eigen::Index n = std::min(lanes, end - k);
      store(code(grid, position(grid, row, k, n)) * grid.scale, weights_.data() + row * w_.cols() + k, n);
    }
  }

  void step_group(Eigen::Index row, Eigen::Index g, const float* dw, float lr, float scale_lr) {
    // Larger than any gradient that counts is small: sign(x) = clamp(x * huge, -1, 1), in vectors.
    constexpr float huge = 1e30F;
    const GroupGrid grid = grid_of(row, g);
    const auto [begin, end] = grids_.inputs_of(g);
    Lanes by_scale = Lanes::Zero(), clamped = Lanes::Zero();
    for (Eigen::Index k = begin; k < end; k += lanes) {
      const Eigen::Index n = std::min(lanes, end - k);
      const Eigen::Index at = row * w_.cols() + k;
      const Lanes gradient = load(dw + k, n);
      const Lanes v = load(v_.data() + at, n);
      const Lanes w = load(w_.data() + at, n) / grid.scale;
      const Lanes p = w + v;
      const Lanes c = code(grid, p);
      // 1 where the rounded position lies beyond the codes, else 0: a whole step at least.
      const Lanes out = (whole(p.max(grid.lowest - 1.0F).min(grid.highest + 1.0F)) - c).abs();
      const Lanes in = 1.0F - out;
      by_scale += gradient * (c - in * w);
      clamped += gradient * out;
      const Lanes sign = (gradient * in * huge).max(-1.0F).min(1.0F);
      store((v - sign * lr).max(-0.5F).min(0.5F), v_.data() + at, n);
    }
    if (scale_lr > 0.0F) step_range(row, g, grid, sum(by_scale), -grid.scale * sum(clamped), scale_lr);
  }

  /// ds and dz are the gradients with respect to scale and zero point.
  void step_range(Eigen::Index row, Eigen::Index g, const GroupGrid& grid, float ds, float dz, float lr) {
    GroupRange& r = range_of(row, g);
    if (!(r.min < r.max)) return;
    const auto sign = [](float x) { return x > 0.0F ? 1.0F : x < 0.0F ? -1.0F : 0.0F; };
    // Most that a factor may become: 1, or where it began if that was more.
    const auto moved = [&](float factor, float gradient) {
      return std::max(smallest_factor, std::min(std::max(1.0F, factor), factor - lr * sign(gradient)));
    };
    if (grids_.scheme().symmetry == Symmetry::symmetric) {
      r.low = r.high = moved(r.high, ds);
    } else {
      // scale = (high max - low min) / steps, zero = min_code - low min / scale
      const float s = grid.scale;
      const float low = r.low * r.min;
      const float through_scale = ds + dz * (low / (s * s));
      const auto steps = static_cast<float>(grids_.max_code() - grids_.min_code());
      const float dhigh = through_scale / steps * r.max;
      const float dlow = (-through_scale / steps - dz / s) * r.min;
      r.high = moved(r.high, dhigh);
      r.low = moved(r.low, dlow);
    }
    grids_.set(row, g, Range{r.low * r.min, r.high * r.max});
  }
  static float sum(const Lanes& x) {
    float total = 0.0F;
    for (Eigen::Index i = 0; i < lanes; ++i) total += x[i];
    return total;
  }

  // A range of nothing has no gradient: there would be no way back.
  static constexpr float smallest_factor = 1e-3F;

  RowMajorMatrix w_;
  WeightGrids grids_;
  RowMajorMatrix v_;
  RowMajorMatrix weights_;
  std::vector<GroupRange> ranges_;  // [rows][groups]
  CodeMatrix best_;
  WeightGrids best_grids_;
};

/// How auto_round() works. Source of the defaults: the paper, section 4.1.
struct AutoRoundOptions {
  int iterations = 200;
  float lr = 0.0F;         ///< of the first step, falling linearly to 0; 0: 1 / iterations
  float scale_lr = -1.0F;  ///< the same of the factors of ranges; negative: as lr; 0: ranges stay
  int evaluations = 4;  ///< of the loss on all data, after the one of the start; at least 1, the last at the end
  ThreadPool* pool = nullptr;
};

struct AutoRoundReport {
  double start_loss = 0.0;  ///< on all data
  double best_loss = 0.0;
  int best_iteration = 0;            ///< steps that the result has seen; 0: the start was best
  std::vector<double> batch_losses;  ///< of each iteration, before its step
};

/// Optimises matrices together. The loss is the caller's:
///   gradients(iteration, dw) -> double: a batch's loss at the matrices' weights(); dw[i] (N x K, already of that size) is
///     set to its gradient with respect to matrices[i].weights()
///   loss() -> double: the loss at weights() on the same data each time. What result() gives is the best of the iterates
///     that it has seen, the start among them.
/// Throws InvalidArgument for options that make no sense, and where a loss is not finite, naming the iteration.
template <class Gradients, class Loss>
AutoRoundReport auto_round(std::vector<AutoRoundMatrix>& matrices, const AutoRoundOptions& options,
                           Gradients&& gradients, Loss&& loss) {
  detail::require(options.iterations >= 0 && options.evaluations >= 1, "AutoRound: ", options.iterations,
                  " iterations and ", options.evaluations, " evaluations, expected at least 0 and 1");
  detail::require(options.lr >= 0.0F && std::isfinite(options.lr) && std::isfinite(options.scale_lr),
                  "AutoRound: lr is ", options.lr, ", expected a finite value that is not negative");
  const auto finite = [](double value, int iteration) {
    detail::require(std::isfinite(value), "AutoRound: the loss of iteration ", iteration, " is ", value,
                    ", expected a finite value");
    return value;
  };
  std::vector<RowMajorMatrix> dw;
  for (const AutoRoundMatrix& m : matrices) dw.emplace_back(m.weights().rows(), m.weights().cols());
  const auto keep = [&] {
    for (AutoRoundMatrix& m : matrices) m.keep_best(options.pool);
  };
  AutoRoundReport report;
  report.start_loss = report.best_loss = finite(loss(), 0);
  keep();
  const int n = options.iterations;
  const float lr = options.lr > 0.0F || n == 0 ? options.lr : 1.0F / static_cast<float>(n);
  const float scale_lr = options.scale_lr < 0.0F ? lr : options.scale_lr;
  for (int i = 0; i < n; ++i) {
    report.batch_losses.push_back(finite(gradients(i, dw), i));
    const float left = static_cast<float>(n - i) / static_cast<float>(n);
    for (std::size_t m = 0; m < matrices.size(); ++m)
      matrices[m].step(dw[m], lr * left, scale_lr * left, options.pool);
    // In the second half, evenly: before, steps are too long for an iterate to be worth anything.
    const int first = n / 2, steps = options.evaluations;
    bool evaluate = i + 1 == n;
    for (int e = 1; e < steps; ++e) evaluate = evaluate || i + 1 == first + (n - first) * e / steps;
    if (!evaluate) continue;
    const double now = finite(loss(), i + 1);
    if (now >= report.best_loss) continue;
    report.best_loss = now;
    report.best_iteration = i + 1;
    keep();
  }
  return report;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
