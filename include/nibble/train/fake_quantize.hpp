// Fake quantization with the clipped straight-through estimator (STE), under the controls that practitioners know.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/quantize/fake_quantize.hpp"
#include "nibble/quantize/quantizer.hpp"
#include "nibble/quantize/range.hpp"
#include "nibble/train/linear.hpp"
#include "nibble/train/options.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// When a training run quantizes, by step numbers from 0. The same steps have the same state whatever the run was resumed
/// from.
struct QatSchedule {
  static constexpr std::uint64_t never = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t fake_quant_start = 0;   ///< steps before this one compute in floats
  std::uint64_t observer_stop = never;  ///< from this step on observers see nothing more: ranges stay
  std::uint64_t scale_freeze = never;   ///< from this step on learned scales and offsets stay
};

/// The gradient of fake_quantize with respect to x, rounding taken as the identity: dx = dy where the code that x has
/// before it is clamped is a code of the grid, 0 where it was clipped.
///
/// Surrogate: x^(x) = s (clamp(x / s + z + r, qmin, qmax) - z) with r = rne(x / s) - x / s held constant, (x - offset) / s
/// where the grid has an offset. The codebooks' (NF4, FP4) range is -s .. s. Grids are those of a quantizer with `scheme`
/// and `ranges`. x, dy and dx are matrices of one shape in any storage order; dx may be dy. Throws as the quantizer does.
template <class X, class Dy, class Dx>
void fake_quantize_backward(const Eigen::MatrixBase<X>& x, const Scheme& scheme, const Ranges& ranges,
                            const Eigen::MatrixBase<Dy>& dy, Dx&& dx, Gradient how = Gradient::set,
                            const QuantizeOptions& options = {}) {
  detail::require_shape(dy, x.rows(), x.cols(), "dy");
  detail::require_shape(dx, x.rows(), x.cols(), "dx");
  const QuantizedTensor q = DynamicQuantizer(scheme, ranges).quantize(x.derived(), options);
  const detail::FpEnvironment environment;
  const detail::CodeRange codes = detail::code_range(q.scheme());
  const bool integer = is_integer(q.format());
  const bool everything = q.param_count() == 0;
  const auto passes = [&](Eigen::Index r, Eigen::Index k) {
    if (everything) return true;
    const Grid g = q.grid(q.param_index(static_cast<std::size_t>(r), static_cast<std::size_t>(k)));
    const float v = x.derived().coeff(r, k);
    if (!integer) return std::fabs(v) <= std::fabs(g.scale);
    const float ratio = detail::rounded(detail::rounded(v - g.offset) / g.scale);
    const float code = detail::rounded(std::nearbyint(ratio) + static_cast<float>(g.zero));
    return code >= static_cast<float>(codes.min) && code <= static_cast<float>(codes.max);
  };
  // Eigen's order of storage: outer by outer.
  const bool row_major = X::IsRowMajor;
  const Eigen::Index outer = row_major ? x.rows() : x.cols();
  const Eigen::Index inner = row_major ? x.cols() : x.rows();
  detail::for_chunks(options.pool, outer, [&](Eigen::Index first, Eigen::Index n, std::size_t) {
    for (Eigen::Index o = first; o < first + n; ++o)
      for (Eigen::Index i = 0; i < inner; ++i) {
        const Eigen::Index r = row_major ? o : i, k = row_major ? i : o;
        const float d = passes(r, k) ? dy.derived().coeff(r, k) : 0.0F;
        dx(r, k) = how == Gradient::add ? detail::rounded(dx(r, k) + d) : d;
      }
  });
}

/// A quantizer within a training graph, as torch.ao.quantization.FakeQuantize is one: an observer finds ranges, forward()
/// rounds to the grids of these, backward() is the clipped STE. Per tensor, per channel and per group, of weights or
/// activations. One thread at a time may use it.
class FakeQuantize {
 public:
  /// observer: nullptr for smallest and largest of all that is seen (MinMaxObserver).
  explicit FakeQuantize(const Scheme& scheme, std::unique_ptr<RangeObserver> observer = nullptr)
      : scheme_(scheme),
        observer_(observer != nullptr ? std::move(observer) : std::make_unique<MinMaxObserver>()) {}

  void enable_fake_quant(bool enabled = true) noexcept { fake_quant_ = enabled; }
  void disable_fake_quant() noexcept { fake_quant_ = false; }
  void enable_observer(bool enabled = true) noexcept { observing_ = enabled; }
  void disable_observer() noexcept { observing_ = false; }
  bool fake_quant_enabled() const noexcept { return fake_quant_; }
  bool observer_enabled() const noexcept { return observing_; }

  /// From the next begin_step() on the schedule says what is enabled.
  void set_schedule(const QatSchedule& schedule) { schedule_ = schedule; }
  void begin_step(std::uint64_t step) noexcept {
    if (!schedule_) return;
    fake_quant_ = step >= schedule_->fake_quant_start;
    observing_ = step < schedule_->observer_stop;
  }

  const Scheme& scheme() const noexcept { return scheme_; }
  /// Empty until something was observed.
  const Ranges& ranges() const noexcept { return ranges_; }
  /// Ranges from elsewhere, e.g. of a checkpoint; one for all parameters or one a parameter.
  void set_ranges(Ranges ranges) { ranges_ = std::move(ranges); }

  /// out = x to the nearest codes of the ranges observed, this x included where the observer is enabled - bit for bit
  /// dequantize(quantize(x)) - or x where fake quantization is disabled. out may be x itself. Throws InvalidArgument where
  /// it is to quantize and nothing was observed.
  template <class X, class Out>
  void forward(const Eigen::MatrixBase<X>& x, Out&& out, const QuantizeOptions& options = {}) {
    if (observing_) ranges_ = DynamicQuantizer(scheme_).observe(x.derived(), *observer_);
    if (!fake_quant_) {
      out = x.derived();
      return;
    }
    require_ranges();
    const auto input = make_input(detail::Front{}, x.derived());
    detail::fake_quantize_view(input.view(), scheme_, ranges_,
                               decltype(kind_of(detail::Front{}, out))::output(out), options.pool);
  }

  /// dx = dy, 0 where the last forward() clipped this x; dy itself where fake quantization is disabled.
  template <class X, class Dy, class Dx>
  void backward(const Eigen::MatrixBase<X>& x, const Eigen::MatrixBase<Dy>& dy, Dx&& dx,
                Gradient how = Gradient::set, const QuantizeOptions& options = {}) const {
    if (fake_quant_) {
      require_ranges();
      fake_quantize_backward(x, scheme_, ranges_, dy, dx, how, options);
    } else if (how == Gradient::add) {
      dx += dy.derived();
    } else {
      dx = dy.derived();
    }
  }

 private:
  void require_ranges() const {
    detail::require(!ranges_.empty() || !has_scales(scheme_.format),
                    "fake quantization has no ranges: enable the observer first, or set them");
  }

  Scheme scheme_;
  std::unique_ptr<RangeObserver> observer_;
  Ranges ranges_;
  std::optional<QatSchedule> schedule_;
  bool fake_quant_ = true;
  bool observing_ = true;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
