// Learned grids: LSQ (Esser et al. 2019, "Learned Step Size Quantization"), LSQ+ (Bhalgat et al. 2020) and PACT (Choi et
// al. 2018), of weights per tensor, channel and group, and of activations.
//
// The forward pass is what is deployed: scales and offsets rounded to how they are stored, codes of the library's
// quantizers. Backward is the gradient of a surrogate in which rounding adds a constant. For a value v, scale s and zero
// point z (a real number where the grid has a float offset o: z = -o / s), with u = v / s + z:
//
//   v^ = s (clamp(u, qmin, qmax) + r - z),  r = rne(clamp(u)) - clamp(u), and what rounds s, o and z, held constant
//
// so that, with d the gradient with respect to v^,
//
//   qmin < u < qmax:  dv = d,  ds = d (rne(u) - u),  dc = 0
//   outside:          dv = 0,  ds = d (q - z - c / s), q the end it was clipped to,  dc = d
//
// Grids with an offset are learned as scale and centre c, the value in the middle of the grid: o = c - s (qmin + qmax) / 2,
// z = rne((qmin + qmax) / 2 - c / s) where zero points are integers. (LSQ+ learns o itself; with c a change of the scale
// does not move the grid.) Symmetric grids have c = 0: the equations are LSQ's.
//
// What is learned of a scale is its logarithm, so that it stays positive whatever a step does, and a step of an optimizer
// such as AdamW is a relative one: d ln s = s ds. Gradients of scales and centres are multiplied by LSQ's
// 1 / sqrt(N Q): N values share the grid, Q = min(|lowest|, |highest|) code, at least 1 (half the number of steps, rounded
// down, where there is an offset).
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/activations.hpp"
#include "nibble/ptq/weight_grids.hpp"
#include "nibble/quantize/line_codec.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/quantize/range.hpp"
#include "nibble/quantize/scheme.hpp"
#include "nibble/train/linear.hpp"
#include "nibble/train/options.hpp"
#include "nibble/train/parameters.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Where learned grids start from.
enum class GridStart : std::uint8_t {
  lsq,      ///< s = 2 mean|v - c| / sqrt(Qp), c the mean where there is an offset: Esser 2019
  min_max,  ///< smallest and largest value: the quantizers' grids
  mse,      ///< of the shrunk ranges the one with the least squared error (MseOptions): LSQ+
};

namespace detail {

/// One grid as the surrogate sees it; codes count from the zero point.
struct LsqGrid {
  float scale = 1.0F;
  float offset = 0.0F;   // float_offset's
  float lowest = 0.0F;   // qmin - zero, zero 0 where there is a float offset
  float highest = 0.0F;  // qmax - zero
  float shift = 0.0F;    // what q - z - c / s is less than `lowest` and `highest`
};

/// What LSQ divides by under its root, beside the number of values.
inline float lsq_levels(const Scheme& scheme) noexcept {
  const CodeRange codes = code_range(scheme);
  if (scheme.symmetry != Symmetry::symmetric) {
    const int half = (codes.max - codes.min) / 2;
    return static_cast<float>(half);
  }
  const int zero = symmetric_zero_of(scheme.format);
  return static_cast<float>(std::max(1, std::min(zero - codes.min, codes.max - zero)));
}

struct LsqSums {
  double scale = 0.0;
  double centre = 0.0;
};

/// Adds a run's values to the sums, and the gradients of the values to dv (or puts them there).
inline void lsq_backward(const LsqGrid& g, const float* v, const float* d, std::size_t n, float* dv, Gradient how,
                         LsqSums& sums) noexcept {
  double scale = 0.0, centre = 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    const float u = rounded(rounded(v[i] - g.offset) / g.scale);
    const bool below = u <= g.lowest, above = u >= g.highest;
    const bool inside = !below && !above;
    const float factor = inside ? std::nearbyint(u) - u : (below ? g.lowest : g.highest) - g.shift;
    scale += static_cast<double>(rounded(d[i] * factor));
    centre += inside ? 0.0 : static_cast<double>(d[i]);
    const float pass = inside ? d[i] : 0.0F;
    if (dv != nullptr) dv[i] = how == Gradient::add ? rounded(dv[i] + pass) : pass;
  }
  sums.scale += scale;
  sums.centre += centre;
}

/// exp in double, rounded: what a learned logarithm stands for.
inline float learned_exp(float logarithm) noexcept {
  return static_cast<float>(std::exp(static_cast<double>(logarithm)));
}
inline float learned_log(float scale) noexcept {
  return static_cast<float>(std::log(static_cast<double>(std::fabs(scale))));
}

/// LSQ's start: c and s from the values' mean and mean deviation.
inline Grid lsq_start(const Scheme& scheme, const float* v, std::size_t n, float& centre) {
  double sum = 0.0, deviation = 0.0;
  for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(v[i]);
  const bool symmetric = scheme.symmetry == Symmetry::symmetric;
  const double c = symmetric || n == 0 ? 0.0 : sum / static_cast<double>(n);
  for (std::size_t i = 0; i < n; ++i) deviation += std::fabs(static_cast<double>(v[i]) - c);
  const double mean = n == 0 ? 0.0 : deviation / static_cast<double>(n);
  Grid g;
  centre = static_cast<float>(c);
  g.scale = static_cast<float>(2.0 * mean / std::sqrt(static_cast<double>(lsq_levels(scheme))));
  return g;
}

}  // namespace detail

/// The learned grids of an N x K weight matrix: per tensor, per channel of axis 0, or per group of axis 1; any integer
/// format and symmetry. One thread at a time may use it.
class LearnedWeightGrids {
 public:
  /// All scales are 1 until start(). Throws InvalidArgument for a scheme that weights cannot have.
  LearnedWeightGrids(const Scheme& scheme, Eigen::Index rows, Eigen::Index cols)
      : layout_(checked(scheme), {static_cast<std::size_t>(rows), static_cast<std::size_t>(cols)}),
        rows_(static_cast<std::size_t>(rows)),
        cols_(static_cast<std::size_t>(cols)) {
    const Granularity& g = layout_.scheme.granularity;
    using Kind = Granularity::Kind;
    detail::require(g.kind == Kind::per_tensor || g.axis == (g.kind == Kind::per_group ? 1 : 0),
                    "scheme of learned weights: expected one grid for all, per_channel(0) or per_group(size, 1)");
    group_ = g.kind == Kind::per_group ? g.group_size : std::max<std::size_t>(cols_, 1);
    groups_ = g.kind == Kind::per_group ? detail::ceil_div(cols_, group_) : 1;
    const std::size_t count = layout_.param_count();
    log_scale_.assign(count, 0.0F);
    log_scale_gradient_.assign(count, 0.0F);
    if (has_centre()) {
      centre_.assign(count, 0.0F);
      centre_gradient_.assign(count, 0.0F);
    }
  }

  /// Canonical, as QuantizedTensor's.
  const Scheme& scheme() const noexcept { return layout_.scheme; }
  std::size_t count() const noexcept { return log_scale_.size(); }
  bool has_centre() const noexcept { return layout_.scheme.symmetry != Symmetry::symmetric; }

  /// Grids for these weights. Throws InvalidArgument, naming the index, for a weight that is not finite.
  void start(const ConstWeightsRef& w, GridStart how = GridStart::mse, ThreadPool* pool = nullptr) {
    check_shape(w, "w");
    const detail::FpEnvironment environment;
    const bool one = layout_.scheme.granularity.kind == Granularity::Kind::per_tensor;
    if (one && w.outerStride() != w.cols()) {
      const RowMajorMatrix copy = w;
      return start(copy, how, pool);
    }
    // One grid for all: a matrix of one row.
    Scheme scheme = layout_.scheme;
    if (one) scheme.granularity = Granularity::per_channel(0);
    const Eigen::Map<const RowMajorMatrix, 0, Eigen::OuterStride<>> view(
        w.data(), one ? 1 : w.rows(), one ? w.size() : w.cols(),
        Eigen::OuterStride<>(one ? w.size() : w.outerStride()));
    MseOptions mse;
    mse.norm = 2.0;
    mse.pool = pool;
    const WeightGrids grids = how == GridStart::mse ? fit_mse(scheme, view, mse) : fit_min_max(scheme, view, pool);
    for (Eigen::Index r = 0; r < grids.rows(); ++r)
      for (Eigen::Index g = 0; g < grids.groups(); ++g) {
        const std::size_t p = static_cast<std::size_t>(r * grids.groups() + g);
        Grid grid = grids.at(r, g);
        if (how == GridStart::lsq) {
          const std::pair<Eigen::Index, Eigen::Index> k = grids.inputs_of(g);
          float centre = 0.0F;
          const float scale = detail::lsq_start(scheme, view.data() + r * view.outerStride() + k.first,
                                                static_cast<std::size_t>(k.second - k.first), centre)
                                  .scale;
          if (scale > 0.0F) {
            log_scale_[p] = detail::learned_log(scale);
            if (has_centre()) centre_[p] = centre;
            continue;
          }
        }
        put(p, grid);
      }
    keep();
  }

  /// The grids of a tensor that was quantized before, by GPTQ for example. Throws InvalidArgument for another scheme or
  /// shape. A scale comes back within a few units of its last place; its sign is dropped.
  void start(const QuantizedTensor& q) {
    detail::require(q.scheme() == scheme() && q.shape() == layout_.shape, "tensor has shape ",
                    detail::shape_text(q.shape()), " and perhaps another scheme, the learned grids are for ",
                    detail::shape_text(layout_.shape));
    for (std::size_t p = 0; p < count(); ++p) put(p, q.grid(p));
    keep();
  }

  /// Scales and centres stay what they are from now on, whatever an optimizer does to the parameters.
  void freeze(bool frozen = true) {
    if (frozen && !frozen_) keep();
    frozen_ = frozen;
  }
  bool frozen() const noexcept { return frozen_; }
  /// The parameters of frozen grids become what they were frozen at, so that a checkpoint has the grids in use.
  void restore_frozen() {
    if (!frozen_) return;
    std::copy(kept_log_scale_.begin(), kept_log_scale_.end(), log_scale_.begin());
    std::copy(kept_centre_.begin(), kept_centre_.end(), centre_.begin());
  }

  /// The grid of parameter p as it is stored. Throws InvalidArgument where it is not finite there.
  Grid grid(std::size_t p) const {
    const ScaleType type = layout_.scheme.scale_type;
    const std::vector<float>& logs = frozen_ ? kept_log_scale_ : log_scale_;
    Grid g;
    g.scale = std::max(detail::round_to(type, detail::learned_exp(logs[p])), detail::smallest_scale(type));
    g.zero = layout_.scheme.symmetry == Symmetry::symmetric ? symmetric_zero_of(layout_.scheme.format) : 0;
    if (has_centre()) {
      const float c = centre(p);
      const detail::CodeRange codes = detail::code_range(layout_.scheme);
      const float middle = 0.5F * static_cast<float>(codes.min + codes.max);
      if (layout_.scheme.symmetry == Symmetry::float_offset)
        g.offset = detail::round_to(type, std::fma(-middle, g.scale, c));
      else
        g.zero = detail::scalar::to_code(detail::rounded(middle - detail::rounded(c / g.scale)), 0, codes.min,
                                         codes.max);
      detail::require(detail::scalar::is_finite(c), "learned centre ", p, " is ", c);
    }
    detail::require(detail::scalar::is_finite(g.scale) && detail::scalar::is_finite(g.offset), "learned grid ", p,
                    " has the scale ", g.scale, " and the offset ", g.offset, ", expected finite ones");
    return g;
  }

  /// The weights' nearest codes on these grids: the tensor that is deployed. Throws InvalidArgument, naming the index, for
  /// a weight that is not finite.
  QuantizedTensor quantize(const ConstWeightsRef& w, ThreadPool* pool = nullptr) const {
    check_shape(w, "w");
    const detail::FpEnvironment environment;
    Buffer codes = Buffer::uninitialized(layout_.code_bytes());
    Buffer scales = Buffer::uninitialized(layout_.scale_bytes());
    Buffer zeros = Buffer::uninitialized(layout_.zero_bytes());
    for (std::size_t p = 0; p < count(); ++p) {
      const Grid g = grid(p);
      store(scales, p, g.scale);
      if (layout_.scheme.symmetry == Symmetry::float_offset) store(zeros, p, g.offset);
      if (layout_.scheme.symmetry == Symmetry::asymmetric)
        zeros.as_mutable<std::int8_t>()[p] = static_cast<std::int8_t>(g.zero);
    }
    const detail::ParamStorage params = layout_.storage(scales.data(), zeros.data());
    std::uint8_t* const base = codes.mutable_data();
    each_rows(pool, [&](std::size_t r) {
      const float* row = w.data() + r * static_cast<std::size_t>(w.outerStride());
      detail::range_of(row, static_cast<Eigen::Index>(r), 0, cols_);  // refuses what is not finite
      detail::encode_line(params, layout_.params.line(r), cols_, row, base + r * layout_.line_bytes);
    });
    return QuantizedTensor::from_parts(layout_.scheme, layout_.shape, std::move(codes), std::move(scales),
                                       std::move(zeros));
  }

  /// d: the gradient of a loss with respect to the dequantized weights. Adds to dw that with respect to w, 0 where a weight
  /// was clipped, and to the parameters' gradients theirs. Bits do not depend on the threads.
  void backward(const ConstWeightsRef& w, const ConstWeightsRef& d, RowMajorRef dw, ThreadPool* pool = nullptr) {
    check_shape(w, "w");
    check_shape(d, "d");
    check_shape(dw, "dw");
    const detail::FpEnvironment environment;
    const bool one = layout_.scheme.granularity.kind == Granularity::Kind::per_tensor;
    std::vector<detail::LsqSums> sums(rows_ * groups_);
    each_rows(pool, [&](std::size_t r) {
      const float* values = w.data() + r * static_cast<std::size_t>(w.outerStride());
      const float* gradients = d.data() + r * static_cast<std::size_t>(d.outerStride());
      float* out = dw.data() + r * static_cast<std::size_t>(dw.outerStride());
      for (std::size_t g = 0; g < groups_; ++g) {
        const std::size_t begin = g * group_, n = std::min(group_, cols_ - begin);
        detail::lsq_backward(lsq_grid(one ? 0 : r * groups_ + g), values + begin, gradients + begin, n,
                             out + begin, Gradient::add, sums[r * groups_ + g]);
      }
    });
    if (frozen_) return;
    if (one) {
      for (std::size_t r = 1; r < rows_; ++r) {
        sums[0].scale += sums[r].scale;
        sums[0].centre += sums[r].centre;
      }
    }
    for (std::size_t p = 0; p < count(); ++p) {
      const double factor = gradient_scale(p);
      log_scale_gradient_[p] += static_cast<float>(factor * sums[p].scale * static_cast<double>(grid(p).scale));
      if (has_centre()) centre_gradient_[p] += static_cast<float>(factor * sums[p].centre);
    }
  }

  /// 1 / sqrt(N Q) of parameter p.
  double gradient_scale(std::size_t p) const noexcept {
    std::size_t n = cols_;
    if (layout_.scheme.granularity.kind == Granularity::Kind::per_tensor) n = rows_ * cols_;
    if (layout_.scheme.granularity.kind == Granularity::Kind::per_group)
      n = std::min(group_, cols_ - p % groups_ * group_);
    return 1.0 / std::sqrt(static_cast<double>(std::max<std::size_t>(n, 1)) *
                           static_cast<double>(detail::lsq_levels(layout_.scheme)));
  }

  /// `prefix` + "log_scale", and + "centre" where there is an offset; neither decays. `rate`: of the scales.
  void append_parameters(const std::string& prefix, Parameters& out, float rate = 1.0F) {
    out.push_back(
        {prefix + "log_scale", log_scale_.data(), log_scale_gradient_.data(), log_scale_.size(), false, rate});
    if (has_centre())
      out.push_back({prefix + "centre", centre_.data(), centre_gradient_.data(), centre_.size(), false, rate});
  }

 private:
  static const Scheme& checked(const Scheme& scheme) {
    detail::require(is_integer(scheme.format), "learned grids are of integer formats, not ",
                    name_of(scheme.format));
    return scheme;
  }

  float centre(std::size_t p) const noexcept { return frozen_ ? kept_centre_[p] : centre_[p]; }

  void put(std::size_t p, const Grid& g) {
    log_scale_[p] = detail::learned_log(g.scale);
    if (!has_centre()) return;
    const detail::CodeRange codes = detail::code_range(layout_.scheme);
    const float middle = 0.5F * static_cast<float>(codes.min + codes.max);
    centre_[p] = layout_.scheme.symmetry == Symmetry::float_offset
                     ? std::fma(middle, g.scale, g.offset)
                     : detail::rounded(g.scale * (middle - static_cast<float>(g.zero)));
  }
  void keep() {
    kept_log_scale_ = log_scale_;
    kept_centre_ = centre_;
  }

  void store(Buffer& to, std::size_t p, float value) const {
    switch (layout_.scheme.scale_type) {
      case ScaleType::fp32: to.as_mutable<float>()[p] = value; return;
      case ScaleType::fp16: to.as_mutable<std::uint16_t>()[p] = fp16_from_float(value); return;
      case ScaleType::bf16: to.as_mutable<std::uint16_t>()[p] = bf16_from_float(value); return;
    }
  }

  detail::LsqGrid lsq_grid(std::size_t p) const {
    const Grid g = grid(p);
    const detail::CodeRange codes = detail::code_range(layout_.scheme);
    detail::LsqGrid out;
    out.scale = g.scale;
    out.offset = g.offset;
    out.lowest = static_cast<float>(codes.min - g.zero);
    out.highest = static_cast<float>(codes.max - g.zero);
    if (layout_.scheme.symmetry == Symmetry::float_offset)
      out.shift = 0.5F * static_cast<float>(codes.min + codes.max);
    if (layout_.scheme.symmetry == Symmetry::asymmetric) out.shift = detail::rounded(centre(p) / g.scale);
    return out;
  }

  template <class M>
  void check_shape(const M& m, const char* name) const {
    detail::require_shape(m, static_cast<Eigen::Index>(rows_), static_cast<Eigen::Index>(cols_), name);
  }
  template <class F>
  void each_rows(ThreadPool* pool, F&& f) const {
    const std::size_t at_once = std::max<std::size_t>(1, 16384 / std::max<std::size_t>(cols_, 1));
    detail::for_tasks(pool, detail::ceil_div(rows_, at_once), [&](std::size_t task, std::size_t) {
      for (std::size_t r = task * at_once; r < std::min(rows_, (task + 1) * at_once); ++r) f(r);
    });
  }

  detail::CodeLayout layout_;
  std::size_t rows_;
  std::size_t cols_;
  std::size_t group_ = 1;
  std::size_t groups_ = 1;
  std::vector<float> log_scale_, log_scale_gradient_;
  std::vector<float> centre_, centre_gradient_;
  std::vector<float> kept_log_scale_, kept_centre_;
  bool frozen_ = false;
};

/// How a layer's input is quantized on grids that are learned and then fixed.
struct LearnedActivationOptions {
  enum class Kind : std::uint8_t {
    lsq,       ///< symmetric: codes within +-(2^(bits - 1) - 1)
    lsq_plus,  ///< with a zero point; one grid for all inputs
    pact,      ///< 0 .. alpha in 2^bits - 1 steps: clips below 0 and above alpha, which is learned; one grid
  };
  Kind kind = Kind::lsq;
  unsigned bits = 8;           ///< 2 to 8
  std::size_t group_size = 0;  ///< lsq: inputs that share a scale, a multiple of 16; 0: all
  GridStart start = GridStart::mse;
};

/// The learned grids of a layer's input, K x T with a token a column. What grid() says goes into
/// QuantizedActivations::assign_static, in training as after it. One thread at a time may use it.
///
/// PACT: y = clip(x, 0, alpha), then codes of scale alpha / (2^bits - 1): d alpha = sum of d where x >= alpha, dx = d where
/// 0 <= x < alpha (the paper's equations; ln alpha is learned). Its L2 penalty on alpha is the optimizer's business.
class LearnedActivations {
 public:
  LearnedActivations(const LearnedActivationOptions& options, Eigen::Index inputs)
      : options_(options), inputs_(static_cast<std::size_t>(inputs)) {
    QuantizedActivations::check_bits(options.bits);
    detail::require(options.group_size % 16 == 0, "learned activations in groups of ", options.group_size,
                    ", expected a multiple of 16");
    detail::require(options.group_size == 0 || options.kind == LearnedActivationOptions::Kind::lsq,
                    "learned activations with a zero point have one grid, not one for each ", options.group_size,
                    " inputs");
    group_ = options.group_size == 0 ? std::max<std::size_t>(inputs_, 1) : options.group_size;
    const std::size_t count = options.group_size == 0 ? 1 : detail::ceil_div(inputs_, group_);
    log_scale_.assign(count, 0.0F);
    log_scale_gradient_.assign(count, 0.0F);
    scales_.assign(count, 1.0F);
    highest_ = (std::int32_t{1} << (options.bits - 1)) - 1;
    lowest_ = symmetric() ? -highest_ : -highest_ - 1;
  }

  const LearnedActivationOptions& options() const noexcept { return options_; }
  bool symmetric() const noexcept { return options_.kind == LearnedActivationOptions::Kind::lsq; }
  bool started() const noexcept { return started_; }
  /// Parameters were put there by somebody else, e.g. out of a checkpoint.
  void set_started() noexcept { started_ = true; }

  /// Grids for these activations. Throws InvalidArgument where one is not finite.
  void start(const ConstMatrixRef& x) {
    check_inputs(x);
    const detail::FpEnvironment environment;
    for (std::size_t g = 0; g < log_scale_.size(); ++g) {
      const std::size_t begin = g * group_, n = std::min(group_, inputs_ - begin);
      // One row of all that share a grid.
      RowMajorMatrix values(1, static_cast<Eigen::Index>(n) * x.cols());
      for (Eigen::Index t = 0; t < x.cols(); ++t)
        std::copy_n(x.col(t).data() + begin, n, values.data() + static_cast<std::size_t>(t) * n);
      if (options_.kind == LearnedActivationOptions::Kind::pact) values = values.cwiseMax(0.0F);
      Scheme scheme;  // of the nearest width; the ranges are scaled to ours
      scheme.format = format();
      scheme.symmetry = symmetric() ? Symmetry::symmetric : Symmetry::asymmetric;
      scheme.granularity = Granularity::per_channel(0);
      MseOptions mse;
      mse.norm = 2.0;
      const WeightGrids grids =
          options_.start == GridStart::mse ? fit_mse(scheme, values, mse) : fit_min_max(scheme, values);
      Grid grid = grids.at(0, 0);
      const detail::CodeRange codes = detail::code_range(scheme);
      const auto steps = [](const auto& low, const auto& high) { return static_cast<float>(high - low); };
      const float ratio = steps(codes.min, codes.max) / steps(lowest_, highest_);
      float centre =
          symmetric()
              ? 0.0F
              : grid.scale * (0.5F * static_cast<float>(codes.min + codes.max) - static_cast<float>(grid.zero));
      float scale = grid.scale * ratio;
      if (options_.start == GridStart::lsq && options_.kind != LearnedActivationOptions::Kind::pact) {
        const float wanted =
            detail::lsq_start(scheme, values.data(), static_cast<std::size_t>(values.size()), centre).scale;
        if (wanted > 0.0F) scale = wanted * std::sqrt(detail::lsq_levels(scheme) / static_cast<float>(highest_));
      }
      log_scale_[g] = detail::learned_log(scale);
      centre_ = centre;
    }
    started_ = true;
    keep();
  }

  void freeze(bool frozen = true) {
    if (frozen && !frozen_) keep();
    frozen_ = frozen;
  }
  bool frozen() const noexcept { return frozen_; }
  /// As LearnedWeightGrids::restore_frozen().
  void restore_frozen() {
    if (!frozen_) return;
    std::copy(kept_log_scale_.begin(), kept_log_scale_.end(), log_scale_.begin());
    centre_ = kept_centre_;
  }

  /// The grid as it is now; its scales stay here until the next call.
  StaticGrid grid() {
    const detail::FpEnvironment environment;
    const std::vector<float>& logs = frozen_ ? kept_log_scale_ : log_scale_;
    for (std::size_t g = 0; g < scales_.size(); ++g)
      scales_[g] = std::max(detail::learned_exp(logs[g]), std::numeric_limits<float>::min());
    StaticGrid grid;
    grid.scales = scales_.data();
    grid.count = scales_.size();
    grid.group_size = options_.group_size;
    grid.bits = options_.bits;
    grid.symmetric = symmetric();
    if (options_.kind == LearnedActivationOptions::Kind::pact) grid.zero_point = lowest_;
    if (options_.kind == LearnedActivationOptions::Kind::lsq_plus) {
      const float middle = 0.5F * static_cast<float>(lowest_ + highest_);
      const float c = frozen_ ? kept_centre_ : centre_;
      detail::require(detail::scalar::is_finite(c), "learned centre of activations is ", c);
      grid.zero_point =
          detail::scalar::to_code(detail::rounded(middle - detail::rounded(c / scales_[0])), 0, lowest_, highest_);
    }
    return grid;
  }

  /// d: the gradient with respect to the quantized activations, K x T. dx = (or +=) that with respect to x; the gradients of
  /// the parameters are added to theirs. Bits do not depend on the threads.
  void backward(const ConstMatrixRef& x, const ConstMatrixRef& d, MatrixRef dx, Gradient how,
                ThreadPool* pool = nullptr) {
    check_inputs(x);
    detail::require_shape(d, x.rows(), x.cols(), "d");
    detail::require_shape(dx, x.rows(), x.cols(), "dx");
    const detail::FpEnvironment environment;
    const StaticGrid now = grid();
    const std::size_t groups = scales_.size();
    const bool pact = options_.kind == LearnedActivationOptions::Kind::pact;
    const auto chunks =
        detail::ceil_div(static_cast<std::size_t>(x.cols()), static_cast<std::size_t>(detail::train_chunk));
    std::vector<detail::LsqSums> sums(chunks * groups);
    detail::for_chunks(pool, x.cols(), [&](Eigen::Index first, Eigen::Index count, std::size_t task) {
      for (Eigen::Index t = first; t < first + count; ++t)
        for (std::size_t g = 0; g < groups; ++g) {
          const std::size_t begin = g * group_, n = std::min(group_, inputs_ - begin);
          detail::LsqSums& to = sums[task * groups + g];
          const float* values = x.data() + t * x.outerStride() + begin;
          const float* gradients = d.data() + t * d.outerStride() + begin;
          float* out = dx.data() + t * dx.outerStride() + begin;
          if (pact) {
            pact_backward(values, gradients, n, out, how, to);
            continue;
          }
          detail::LsqGrid lsq;
          lsq.scale = scales_[g];
          lsq.lowest = static_cast<float>(lowest_ - now.zero_point);
          lsq.highest = static_cast<float>(highest_ - now.zero_point);
          if (!symmetric()) lsq.shift = detail::rounded((frozen_ ? kept_centre_ : centre_) / scales_[0]);
          detail::lsq_backward(lsq, values, gradients, n, out, how, to);
        }
    });
    if (frozen_) return;
    for (std::size_t g = 0; g < groups; ++g) {
      detail::LsqSums all;
      for (std::size_t task = 0; task < chunks; ++task) {
        all.scale += sums[task * groups + g].scale;
        all.centre += sums[task * groups + g].centre;
      }
      const double factor = gradient_scale(g);
      log_scale_gradient_[g] +=
          static_cast<float>(factor * all.scale * static_cast<double>(pact ? alpha() : scales_[g]));
      if (options_.kind == LearnedActivationOptions::Kind::lsq_plus)
        centre_gradient_ += static_cast<float>(factor * all.centre);
    }
  }

  /// PACT's clipping level.
  float alpha() const noexcept { return detail::rounded(scales_[0] * static_cast<float>(highest_ - lowest_)); }

  /// LSQ's 1 / sqrt(N Q), N the inputs that share the grid; 1 for PACT, which has none.
  double gradient_scale(std::size_t g) const noexcept {
    if (options_.kind == LearnedActivationOptions::Kind::pact) return 1.0;
    const std::size_t n = std::max<std::size_t>(std::min(group_, inputs_ - g * group_), 1);
    return 1.0 / std::sqrt(static_cast<double>(n) * static_cast<double>(highest_));
  }

  /// `prefix` + "log_scale" (PACT: of alpha but for a constant), and + "centre" for lsq_plus; neither decays.
  void append_parameters(const std::string& prefix, Parameters& out, float rate = 1.0F) {
    out.push_back(
        {prefix + "log_scale", log_scale_.data(), log_scale_gradient_.data(), log_scale_.size(), false, rate});
    if (options_.kind == LearnedActivationOptions::Kind::lsq_plus)
      out.push_back({prefix + "centre", &centre_, &centre_gradient_, 1, false, rate});
  }

 private:
  Format format() const noexcept {
    switch (options_.bits) {
      case 2: return Format::int2;
      case 3: return Format::int3;
      case 4: return Format::int4;
      case 5: return Format::int5;
      case 6: return Format::int6;
      default: return Format::int8;
    }
  }
  void check_inputs(const ConstMatrixRef& x) const {
    detail::require(static_cast<std::size_t>(x.rows()) == inputs_, "x has ", x.rows(), " rows, expected ",
                    inputs_);
  }
  void keep() {
    kept_log_scale_ = log_scale_;
    kept_centre_ = centre_;
  }
  void pact_backward(const float* v, const float* d, std::size_t n, float* dv, Gradient how,
                     detail::LsqSums& sums) const noexcept {
    const float a = alpha();
    for (std::size_t i = 0; i < n; ++i) {
      if (v[i] >= a) sums.scale += static_cast<double>(d[i]);
      const float pass = v[i] >= 0.0F && v[i] < a ? d[i] : 0.0F;
      dv[i] = how == Gradient::add ? detail::rounded(dv[i] + pass) : pass;
    }
  }

  LearnedActivationOptions options_;
  std::size_t inputs_;
  std::size_t group_ = 1;
  std::int32_t lowest_ = 0;
  std::int32_t highest_ = 0;
  bool started_ = false;
  bool frozen_ = false;
  std::vector<float> log_scale_, log_scale_gradient_, kept_log_scale_;
  float centre_ = 0.0F, centre_gradient_ = 0.0F, kept_centre_ = 0.0F;
  std::vector<float> scales_;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
