// Calibrators: observers that stream batches of activations and find ranges that are narrower than the largest value.
//
// Give them to DynamicQuantizer::observe() once a batch, with a scheme per tensor, per channel or - a matrix has a token a
// column - per_channel(1), a token; then range(p) is what the quantizer takes. All but MovingAverageObserver give the
// same bits however the data is cut into batches and in whatever order these come.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/kernels/dispatch.hpp"
#include "nibble/quantize/line_codec.hpp"
#include "nibble/quantize/range.hpp"
#include "nibble/quantize/scheme.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Exponential moving average of each batch's smallest and largest value: lo += weight * (lo of the batch - lo), the first
/// batch as it is. A batch is a tensor (what lies between two begin()s): how data is cut is a part of the result.
class MovingAverageObserver final : public RangeObserver {
 public:
  /// weight: of the newest batch, in (0, 1].
  explicit MovingAverageObserver(float weight = 0.01F) : weight_(weight) {
    detail::require(weight > 0.0F && weight <= 1.0F, "moving average weight is ", weight, ", expected (0, 1]");
  }
  void begin(std::size_t params) override {
    batch_.begin(params);
    for (std::size_t p = 0; p < average_.size(); ++p) average_[p] = range(p);
    if (average_.empty()) average_.resize(params);
    batch_ = {};
    batch_.begin(params);
  }
  void observe(std::size_t param, const float* x, std::size_t n) override { batch_.observe(param, x, n); }
  Range range(std::size_t param) const override {
    const Range now = batch_.range(param);
    const Range before = average_[param];
    if (now.lo > now.hi) return before;
    if (before.lo > before.hi) return now;
    return {moved(before.lo, now.lo), moved(before.hi, now.hi)};
  }

 private:
  float moved(float from, float to) const noexcept { return std::fma(weight_, detail::rounded(to - from), from); }

  float weight_;
  MinMaxObserver batch_;
  Ranges average_;
};

/// Counts of values of either sign in bins of equal width, which is a power of two: a value beyond the last bin doubles
/// the width and merges bins in pairs, exactly. So the counts depend on the data alone, not on its order or batches.
class Histogram {
 public:
  /// `bins` is a power of two; that many up to twice as many lie between 0 and the largest magnitude.
  explicit Histogram(std::size_t bins) : capacity_(2 * bins) {}

  void add(const float* x, std::size_t n) {
    const detail::LineRange range = detail::kernels().line_range(x, n);
    detail::require(range.finite, "histogram: a value is NaN or Inf");
    if (n == 0) return;
    min_ = std::min(min_, range.min);
    max_ = std::max(max_, range.max);
    const float absmax = std::max(-range.min, range.max);
    if (absmax > 0.0F) grow(absmax);
    if (range.min < 0.0F && below_.empty()) below_.assign(capacity_, 0);
    const double per_unit = 1.0 / width_;
    for (std::size_t i = 0; i < n; ++i) {
      const float v = x[i];
      if (v == 0.0F)
        ++zeros_;
      else
        ++(v < 0.0F ? below_ : above_)[static_cast<std::size_t>(std::fabs(static_cast<double>(v)) * per_unit)];
    }
  }

  bool empty() const noexcept { return min_ > max_; }
  float min() const noexcept { return min_; }
  float max() const noexcept { return max_; }
  float absmax() const noexcept { return std::max(-min_, max_); }
  /// Width of a bin; bin i holds i * width <= |x| < (i + 1) * width.
  double width() const noexcept { return width_; }
  /// Bins up to that of the largest magnitude; 0 where all is 0.
  std::size_t used() const noexcept {
    return empty() || absmax() == 0.0F ? 0 : static_cast<std::size_t>(static_cast<double>(absmax()) / width_) + 1;
  }
  /// Values 0: they are in no bin.
  std::uint64_t zeros() const noexcept { return zeros_; }
  std::uint64_t above(std::size_t bin) const noexcept { return above_.empty() ? 0 : above_[bin]; }
  std::uint64_t below(std::size_t bin) const noexcept { return below_.empty() ? 0 : below_[bin]; }
  /// Of |x|, zeros in bin 0; used() of them.
  std::vector<std::uint64_t> magnitudes() const {
    std::vector<std::uint64_t> counts(used());
    for (std::size_t i = 0; i < counts.size(); ++i) counts[i] = above(i) + below(i);
    if (!counts.empty()) counts[0] += zeros_;
    return counts;
  }

 private:
  void grow(float absmax) {
    int exponent = 0;
    std::frexp(absmax, &exponent);  // absmax < 2^exponent
    if (above_.empty()) {
      above_.assign(capacity_, 0);
      exponent_ = exponent;
    }
    const int doublings = exponent - exponent_;
    if (doublings > 0) {
      merge(above_, doublings);
      merge(below_, doublings);
      exponent_ = exponent;
    }
    width_ = std::ldexp(1.0, exponent_) / static_cast<double>(capacity_);
  }

  static void merge(std::vector<std::uint64_t>& counts, int doublings) {
    for (std::size_t i = 1; i < counts.size(); ++i) {
      const std::size_t to = doublings < 64 ? i >> doublings : 0;
      if (to != i) counts[to] += std::exchange(counts[i], 0);
    }
  }

  std::size_t capacity_;
  int exponent_ = 0;
  double width_ = 1.0;
  float min_ = std::numeric_limits<float>::infinity();
  float max_ = -std::numeric_limits<float>::infinity();
  std::uint64_t zeros_ = 0;
  std::vector<std::uint64_t> above_;
  std::vector<std::uint64_t> below_;
};

/// What observers that choose a range from a histogram have in common. Memory: 32 bytes a bin and parameter at most.
class HistogramObserver : public RangeObserver {
 public:
  void begin(std::size_t params) override {
    detail::require(histograms_.empty() || histograms_.size() == params, "observer has seen tensors of ",
                    histograms_.size(), " parameters, this one has ", params);
    histograms_.resize(params, Histogram(bins_));
  }
  void observe(std::size_t param, const float* x, std::size_t n) override { histograms_[param].add(x, n); }
  Range range(std::size_t param) const override {
    const Histogram& h = histograms_[param];
    if (h.empty()) return {};
    if (h.used() == 0) return {0.0F, 0.0F};
    const detail::FpEnvironment environment;
    return choose(h);
  }
  const Histogram& histogram(std::size_t param) const { return histograms_[param]; }

 protected:
  explicit HistogramObserver(std::size_t bins) : bins_(bins) {
    detail::require(bins >= 128 && bins <= (std::size_t{1} << 24) && (bins & (bins - 1)) == 0, "bins is ", bins,
                    ", expected a power of two from 128 to 2^24");
  }
  /// h has at least one value that is not 0.
  virtual Range choose(const Histogram& h) const = 0;

  /// -limit..limit, but no more than what was seen.
  static Range within(const Histogram& h, double limit) noexcept {
    const auto t = static_cast<float>(limit);
    return {std::max(-t, std::min(h.min(), t)), std::min(t, std::max(h.max(), -t))};
  }

 private:
  std::size_t bins_;
  std::vector<Histogram> histograms_;
};

struct PercentileOptions {
  double percentile = 99.99;  ///< percent of values to cover, in (0, 100]: ModelOpt 99.99, ONNX Runtime 99.999
  bool both_ends =
      false;  ///< false: of |x|, one limit for both signs; true: half of the rest is cut at either end
  std::size_t bins = 2048;
};

/// The range that covers a percentage of all values, up to the width of a bin wider, cut to what was seen.
class PercentileObserver final : public HistogramObserver {
 public:
  explicit PercentileObserver(const PercentileOptions& options = {})
      : HistogramObserver(options.bins), options_(options) {
    detail::require(options.percentile > 0.0 && options.percentile <= 100.0, "percentile is ", options.percentile,
                    ", expected (0, 100]");
  }

 protected:
  Range choose(const Histogram& h) const override {
    const std::size_t used = h.used();
    const double share = options_.percentile / 100.0;
    if (!options_.both_ends) {
      const std::vector<std::uint64_t> counts = h.magnitudes();
      std::uint64_t all = 0;
      for (const std::uint64_t count : counts) all += count;
      const double wanted = share * static_cast<double>(all);
      std::uint64_t seen = 0;
      std::size_t i = 0;
      while (i < used && static_cast<double>(seen += counts[i]) < wanted) ++i;
      return within(h, static_cast<double>(i + 1) * h.width());
    }
    std::uint64_t all = h.zeros();
    for (std::size_t i = 0; i < used; ++i) all += h.above(i) + h.below(i);
    const double cut = (1.0 - share) / 2.0 * static_cast<double>(all);
    // Inwards from either end, as long as no more than `cut` values are left outside.
    return {-end_of([&](std::size_t i) { return h.below(i); }, [&](std::size_t i) { return h.above(i); }, h, cut,
                    -h.min()),
            end_of([&](std::size_t i) { return h.above(i); }, [&](std::size_t i) { return h.below(i); }, h, cut,
                   h.max())};
  }

 private:
  /// The limit at the end of side `near`, going inwards through 0 to side `far`; at most `seen`.
  template <class Near, class Far>
  static float end_of(const Near& near, const Far& far, const Histogram& h, double cut, float seen) {
    std::uint64_t outside = 0;
    for (std::size_t i = h.used(); i-- > 0;) {
      outside += near(i);
      if (static_cast<double>(outside) > cut)
        return std::min(seen, static_cast<float>(static_cast<double>(i + 1) * h.width()));
    }
    outside += h.zeros();
    if (static_cast<double>(outside) > cut) return std::min(seen, 0.0F);
    for (std::size_t i = 0; i < h.used(); ++i) {
      outside += far(i);
      if (static_cast<double>(outside) > cut)
        return std::min(seen, -static_cast<float>(static_cast<double>(i) * h.width()));
    }
    return seen;
  }

  PercentileOptions options_;
};

struct EntropyOptions {
  std::size_t levels = 128;     ///< magnitudes of the quantized type: 128 for int8 with a sign
  std::size_t start_bin = 128;  ///< the first candidate: this many bins; at least `levels`
  std::size_t stride = 1;       ///< bins from one candidate to the next
  std::size_t bins = 2048;
};

/// The symmetric limit whose quantized distribution diverges least from that of |x| (Kullback-Leibler), as TensorRT and
/// ModelOpt choose it. For every candidate of i bins, start_bin to all:
///   P = bins 0 .. i - 1, the last one with all that lies beyond; bins[0] = bins[1] before (zeros say nothing)
///   Q = the same bins without what lies beyond, divided into `levels` (bin j to level j * levels / i), each bin that is
///       not empty the mean of those of its level
///   divergence = sum of p log(p / q), P and Q normalized; infinite where a q is 0 and its p is not
/// and of equal ones the widest. The limit is i times a bin's width. (They lay 2048 bins over the first batch's range;
/// here, so that batches do not matter, a power of two wide, 2048 to 4096 are in use.)
class EntropyObserver final : public HistogramObserver {
 public:
  explicit EntropyObserver(const EntropyOptions& options = {})
      : HistogramObserver(options.bins), options_(options) {
    detail::require(options.levels >= 2 && options.start_bin >= options.levels &&
                        options.start_bin <= options.bins && options.stride >= 1,
                    "entropy calibration with ", options.levels, " levels, start_bin ", options.start_bin,
                    ", stride ", options.stride, " and ", options.bins,
                    " bins, expected 2 <= levels <= start_bin <= bins and a stride of at least 1");
  }

 protected:
  Range choose(const Histogram& h) const override {
    std::vector<std::uint64_t> bins = h.magnitudes();
    bins[0] = bins[1];
    const std::size_t n = bins.size();
    // Sums before each bin: of counts, of bins that are not empty, and of count * log(count).
    std::vector<std::uint64_t> mass(n + 1, 0);
    std::vector<std::uint64_t> filled(n + 1, 0);
    std::vector<double> weighted(n + 1, 0.0);
    for (std::size_t i = 0; i < n; ++i) {
      mass[i + 1] = mass[i] + bins[i];
      filled[i + 1] = filled[i] + (bins[i] != 0 ? 1 : 0);
      weighted[i + 1] = weighted[i] + x_log_x(bins[i]);
    }
    double least = std::numeric_limits<double>::infinity();
    std::size_t best = n;
    for (std::size_t i = options_.start_bin; i <= n; i += options_.stride) {
      const double d = divergence(bins, mass, filled, weighted, i);
      if (d <= least) {
        least = d;
        best = i;
      }
    }
    // Only one bin: everything.
    return mass[n] == 0 ? Range{h.min(), h.max()} : within(h, static_cast<double>(best) * h.width());
  }

 private:
  static double x_log_x(std::uint64_t x) noexcept {
    return x == 0 ? 0.0 : static_cast<double>(x) * std::log(static_cast<double>(x));
  }

  double divergence(const std::vector<std::uint64_t>& bins, const std::vector<std::uint64_t>& mass,
                    const std::vector<std::uint64_t>& filled, const std::vector<double>& weighted,
                    std::size_t i) const {
    const std::uint64_t all = mass.back();
    const std::uint64_t beyond = all - mass[i];
    constexpr double infinite = std::numeric_limits<double>::infinity();
    if (beyond != 0 && bins[i - 1] == 0) return infinite;
    if (mass[i] == 0) return infinite;
    // sum p log p - sum p log q, p and q as counts; a level's bins have one q.
    double sum = weighted[i - 1] + x_log_x(bins[i - 1] + beyond);
    std::size_t begin = 0;
    for (std::size_t level = 0; level < options_.levels; ++level) {
      const std::size_t end = ((level + 1) * i + options_.levels - 1) / options_.levels;
      const std::uint64_t q_mass = mass[end] - mass[begin];
      if (q_mass != 0) {
        const double q = static_cast<double>(q_mass) / static_cast<double>(filled[end] - filled[begin]);
        sum -= static_cast<double>(q_mass + (end == i ? beyond : 0)) * std::log(q);
      }
      begin = end;
    }
    const double p_all = static_cast<double>(all);
    return sum / p_all - std::log(p_all) + std::log(static_cast<double>(mass[i]));
  }

  EntropyOptions options_;
};

struct MseObserverOptions {
  int grid = 100;           ///< candidates divide the range into this many steps
  float max_shrink = 0.8F;  ///< the smallest is 1 - max_shrink of the whole; (0, 1)
  std::size_t bins = 2048;
};

/// Of the seen range shrunk by p = 1 - i / grid, i < max_shrink * grid, the one whose grid - that of the integer format
/// and symmetry of `scheme` - has the smallest squared error; of equal ones the widest. Values count as the centre of
/// their bin. (ModelOpt tries multipliers of 0.25 to 4: those beyond 1 have no use where the largest value is known.)
class MseObserver final : public HistogramObserver {
 public:
  explicit MseObserver(const Scheme& scheme, const MseObserverOptions& options = {})
      : HistogramObserver(options.bins), scheme_(scheme), options_(options) {
    detail::require(is_integer(scheme.format), "MSE calibration is for integer formats, not ",
                    name_of(scheme.format));
    detail::require(options.grid >= 1 && options.max_shrink > 0.0F && options.max_shrink < 1.0F,
                    "MSE calibration with grid ", options.grid, " and max_shrink ", options.max_shrink,
                    ", expected grid >= 1 and max_shrink in (0, 1)");
  }

 protected:
  Range choose(const Histogram& h) const override {
    const detail::GridFitter fitter(scheme_);
    double least = std::numeric_limits<double>::infinity();
    Range best{h.min(), h.max()};
    for (int i = 0; i == 0 || static_cast<double>(i) < static_cast<double>(options_.max_shrink) * options_.grid;
         ++i) {
      const double p = 1.0 - static_cast<double>(i) / options_.grid;
      const Range r{static_cast<float>(p * static_cast<double>(h.min())),
                    static_cast<float>(p * static_cast<double>(h.max()))};
      const double error = squared_error(h, fitter.fit(r, 0));
      if (error < least) {
        least = error;
        best = r;
      }
    }
    return best;
  }

 private:
  double squared_error(const Histogram& h, const Grid& grid) const noexcept {
    const detail::CodeRange codes = detail::code_range(scheme_);
    const double scale = static_cast<double>(grid.scale);
    const double offset = static_cast<double>(grid.offset);
    const auto error = [&](double x) {
      const double code = std::nearbyint(detail::rounded((x - offset) / scale)) + grid.zero;
      const double q = std::min(std::max(code, static_cast<double>(codes.min)), static_cast<double>(codes.max));
      const double e = detail::rounded(detail::rounded(scale * (q - grid.zero)) + offset) - x;
      return detail::rounded(e * e);
    };
    double sum = detail::rounded(static_cast<double>(h.zeros()) * error(0.0));
    const std::size_t used = h.used();
    for (std::size_t i = 0; i < used; ++i) {
      const double centre = (static_cast<double>(i) + 0.5) * h.width();
      if (h.above(i) != 0) sum += detail::rounded(static_cast<double>(h.above(i)) * error(centre));
      if (h.below(i) != 0) sum += detail::rounded(static_cast<double>(h.below(i)) * error(-centre));
    }
    return sum;
  }

  Scheme scheme_;
  MseObserverOptions options_;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
