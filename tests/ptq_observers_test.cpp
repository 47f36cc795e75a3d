// Calibrators against naive versions that keep all values, and against other ways to cut the same data into batches.
#include "nibble/ptq/observers.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "nibble/quantize/quantizer.hpp"

namespace {

using namespace nibble;

std::vector<float> heavy_tailed(std::size_t n, unsigned seed, float spread = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, spread);
  std::vector<float> x(n);
  for (float& v : x) {
    v = normal(random);
    if (random() % 500 == 0) v *= 12.0F;
    if (random() % 50 == 0) v = 0.0F;
  }
  return x;
}

Range ranged(HistogramObserver& observer, const std::vector<float>& x) {
  observer.begin(1);
  observer.observe(0, x.data(), x.size());
  return observer.range(0);
}

bool same(Range a, Range b) { return std::memcmp(&a, &b, sizeof a) == 0; }

/// The width of a histogram's bins by its definition.
double bin_width(const std::vector<float>& x, std::size_t bins) {
  double absmax = 0.0;
  for (const float v : x) absmax = std::max(absmax, std::fabs(static_cast<double>(v)));
  double top = std::ldexp(1.0, -200);
  while (top <= absmax) top *= 2.0;
  return top / static_cast<double>(2 * bins);
}

std::vector<std::unique_ptr<HistogramObserver>> all_histogram_observers() {
  std::vector<std::unique_ptr<HistogramObserver>> all;
  all.push_back(std::make_unique<PercentileObserver>());
  PercentileOptions both;
  both.percentile = 99.0;
  both.both_ends = true;
  all.push_back(std::make_unique<PercentileObserver>(both));
  all.push_back(std::make_unique<EntropyObserver>());
  all.push_back(
      std::make_unique<MseObserver>(Scheme{Format::int8, Symmetry::symmetric, {}, ScaleType::fp32, false}));
  all.push_back(
      std::make_unique<MseObserver>(Scheme{Format::int4, Symmetry::asymmetric, {}, ScaleType::fp16, false}));
  return all;
}

TEST(Histogram, CountsAreThoseOfTheFinalWidth) {
  std::vector<float> x = {0.0F, 1e-30F, -1e-30F, 0.25F, -0.75F, 3.0F, -1000.0F, 1024.0F, 1024.5F, 2.0F};
  Histogram h(128);
  for (const float v : x) h.add(&v, 1);  // doubles its width several times
  const double width = bin_width(x, 128);
  EXPECT_EQ(h.width(), width);
  std::vector<std::uint64_t> above(256, 0);
  std::vector<std::uint64_t> below(256, 0);
  for (const float v : x)
    if (v != 0.0F)
      ++(v < 0.0F ? below
                  : above)[static_cast<std::size_t>(std::floor(std::fabs(static_cast<double>(v)) / width))];
  for (std::size_t i = 0; i < 256; ++i) {
    EXPECT_EQ(h.above(i), above[i]) << i;
    EXPECT_EQ(h.below(i), below[i]) << i;
  }
  EXPECT_EQ(h.zeros(), 1U);
  EXPECT_EQ(h.used(), 129U);
  EXPECT_EQ(h.magnitudes()[0], below[0] + above[0] + 1);
}

TEST(Histogram, ExtremeMagnitudes) {
  const float tiny = std::numeric_limits<float>::denorm_min();
  const float huge = std::numeric_limits<float>::max();
  Histogram h(128);
  h.add(&tiny, 1);
  EXPECT_GE(h.used(), 128U);
  EXPECT_EQ(h.above(h.used() - 1), 1U);
  h.add(&huge, 1);
  EXPECT_EQ(h.above(0), 1U);
  EXPECT_EQ(h.above(h.used() - 1), 1U);
}

TEST(Observers, BatchesDoNotMatter) {
  const std::vector<float> x = heavy_tailed(20000, 1);
  std::vector<float> shuffled = x;
  std::shuffle(shuffled.begin(), shuffled.end(), std::mt19937(5));
  const auto whole = all_histogram_observers();
  const auto cut = all_histogram_observers();
  for (std::size_t o = 0; o < whole.size(); ++o) {
    const Range expected = ranged(*whole[o], x);
    for (std::size_t i = 0, n = 1; i < shuffled.size(); i += n, n = n * 3 + 1) {
      const std::size_t count = std::min(n, shuffled.size() - i);
      cut[o]->begin(1);
      cut[o]->observe(0, shuffled.data() + i, count);
    }
    EXPECT_TRUE(same(cut[o]->range(0), expected)) << o << ": " << expected.lo << " " << expected.hi;
    EXPECT_LT(expected.hi, *std::max_element(x.begin(), x.end())) << o;
  }
}

TEST(Observers, PercentileIsThatOfTheSortedValues) {
  const std::vector<float> x = heavy_tailed(30011, 2);
  for (const double percentile : {50.0, 99.0, 99.99, 99.999, 100.0}) {
    PercentileOptions options;
    options.percentile = percentile;
    PercentileObserver observer(options);
    const Range r = ranged(observer, x);
    std::vector<float> magnitudes;
    for (const float v : x) magnitudes.push_back(std::fabs(v));
    std::sort(magnitudes.begin(), magnitudes.end());
    const auto at = static_cast<std::size_t>(std::ceil(percentile / 100.0 * static_cast<double>(x.size()))) - 1;
    const double exact = static_cast<double>(magnitudes[at]);
    const double limit = static_cast<double>(std::max(-r.lo, r.hi));
    EXPECT_GE(limit, exact) << percentile;
    EXPECT_LE(limit, exact + bin_width(x, options.bins)) << percentile;
  }
}

TEST(Observers, PercentileOfBothEnds) {
  std::vector<float> x = heavy_tailed(10000, 3);
  for (const float shift : {0.0F, 100.0F, -100.0F}) {
    std::vector<float> moved = x;
    for (float& v : moved) v += shift;
    PercentileOptions options;
    options.percentile = 98.0;
    options.both_ends = true;
    PercentileObserver observer(options);
    const Range r = ranged(observer, moved);
    std::sort(moved.begin(), moved.end());
    const double width = bin_width(moved, options.bins);
    // 1 % = 100 values are left outside at either end at most; one bin further in there would be more.
    EXPECT_LE(static_cast<double>(r.lo), static_cast<double>(moved[100]));
    EXPECT_GE(static_cast<double>(r.lo), static_cast<double>(moved[100]) - width);
    EXPECT_GE(static_cast<double>(r.hi), static_cast<double>(moved[9899]));
    EXPECT_LE(static_cast<double>(r.hi), static_cast<double>(moved[9899]) + width);
  }
}

/// The entropy calibrator step by step, with explicit distributions.
double naive_entropy_limit(const std::vector<float>& x, std::size_t bin_count, std::size_t levels,
                           std::size_t start, std::size_t stride) {
  const double width = bin_width(x, bin_count);
  std::vector<double> bins;
  for (const float v : x) {
    const auto bin = static_cast<std::size_t>(std::floor(std::fabs(static_cast<double>(v)) / width));
    if (bin >= bins.size()) bins.resize(bin + 1, 0.0);
    bins[bin] += 1.0;
  }
  bins[0] = bins[1];
  std::vector<double> divergences;
  for (std::size_t i = start; i <= bins.size(); i += stride) {
    std::vector<double> p(bins.begin(), bins.begin() + static_cast<std::ptrdiff_t>(i));
    p.back() += std::accumulate(bins.begin() + static_cast<std::ptrdiff_t>(i), bins.end(), 0.0);
    std::vector<double> q(i, 0.0);
    for (std::size_t level = 0; level < levels; ++level) {
      double sum = 0.0;
      double filled = 0.0;
      for (std::size_t j = 0; j < i; ++j)
        if (j * levels / i == level && bins[j] != 0.0) {
          sum += bins[j];
          filled += 1.0;
        }
      for (std::size_t j = 0; j < i; ++j)
        if (j * levels / i == level && bins[j] != 0.0) q[j] = sum / filled;
    }
    const double p_sum = std::accumulate(p.begin(), p.end(), 0.0);
    const double q_sum = std::accumulate(q.begin(), q.end(), 0.0);
    double kl = 0.0;
    for (std::size_t j = 0; j < i; ++j)
      if (p[j] != 0.0) kl += p[j] / p_sum * std::log((p[j] / p_sum) / (q[j] / q_sum));
    divergences.push_back(kl);
  }
  std::size_t best = 0;
  for (std::size_t d = 1; d < divergences.size(); ++d)
    if (divergences[d] <= divergences[best]) best = d;
  return static_cast<double>(start + best * stride) * width;
}

TEST(Observers, EntropyIsTheNaiveOne) {
  // The divergences of different candidates differ by far more than the rounding of their sums (1e-13), so the same
  // candidate is best for both.
  for (const unsigned seed : {1U, 2U, 3U}) {
    const std::vector<float> x = heavy_tailed(20000, seed, std::ldexp(1.0F, static_cast<int>(seed)));
    for (const std::size_t levels : {16U, 128U}) {
      EntropyOptions options;
      options.bins = 512;
      options.levels = levels;
      options.stride = levels == 16 ? 1 : 7;
      EntropyObserver observer(options);
      const Range r = ranged(observer, x);
      const double limit = naive_entropy_limit(x, 512, levels, 128, options.stride);
      const float hi = std::min(static_cast<float>(limit), *std::max_element(x.begin(), x.end()));
      const float lo = std::max(-static_cast<float>(limit), *std::min_element(x.begin(), x.end()));
      EXPECT_EQ(r.hi, hi);
      EXPECT_EQ(r.lo, lo);
    }
  }
}

TEST(Observers, EntropyClipsAPlantedOutlier) {
  std::vector<float> x = heavy_tailed(50000, 4);
  for (float& v : x) v = std::clamp(v, -4.0F, 4.0F);
  x[77] = 60.0F;
  EntropyObserver observer;
  const Range r = ranged(observer, x);
  EXPECT_LT(r.hi, 10.0F);
  EXPECT_GT(r.hi, 1.0F);
}

TEST(Observers, MseIsTheNaiveOneUpToBins) {
  const std::vector<float> x = heavy_tailed(20000, 6);
  for (const Scheme& scheme : {Scheme{Format::int8, Symmetry::symmetric, {}, ScaleType::fp32, false},
                               Scheme{Format::int4, Symmetry::symmetric, {}, ScaleType::fp32, false},
                               Scheme{Format::int4, Symmetry::asymmetric, {}, ScaleType::fp32, false}}) {
    MseObserver observer(scheme);
    const Range r = ranged(observer, x);
    const auto error = [&](Range range) {
      const Eigen::Map<const Eigen::VectorXf> values(x.data(), static_cast<Eigen::Index>(x.size()));
      const Eigen::MatrixXf back = DynamicQuantizer(scheme, {range}).fake_quantize(Eigen::MatrixXf(values));
      return static_cast<double>((back - values).squaredNorm());
    };
    double least = std::numeric_limits<double>::infinity();
    const float lo = *std::min_element(x.begin(), x.end());
    const float hi = *std::max_element(x.begin(), x.end());
    for (int i = 0; i < 80; ++i) {
      const float p = 1.0F - static_cast<float>(i) / 100.0F;
      least = std::min(least, error({p * lo, p * hi}));
    }
    // A value is off its bin's centre by up to w/2 = 0.5 * 2^-6 (values reach 32 to 64 in 2048 to 4096 bins), which
    // moves the root of a candidate's mean error by at most that: small beside steps of about 0.2 and more.
    const double rms = std::sqrt(least / static_cast<double>(x.size()));
    EXPECT_LE(std::sqrt(error(r) / static_cast<double>(x.size())), rms + 2.0 * bin_width(x, 2048) / 2.0);
    EXPECT_LT(error(r), 0.95 * error({lo, hi}));
  }
}

TEST(Observers, MovingAverageFollowsItsRecurrence) {
  MovingAverageObserver observer(0.25F);
  double lo = 0.0;
  double hi = 0.0;
  for (unsigned batch = 0; batch < 6; ++batch) {
    const std::vector<float> x = heavy_tailed(100, batch);
    observer.begin(2);
    observer.observe(0, x.data(), 60);
    observer.observe(0, x.data() + 60, 40);
    const float half = 0.5F;
    observer.observe(1, &half, 1);
    const auto ends = std::minmax_element(x.begin(), x.end());
    const double low = static_cast<double>(*ends.first);
    const double high = static_cast<double>(*ends.second);
    lo = batch == 0 ? low : lo + 0.25 * (low - lo);
    hi = batch == 0 ? high : hi + 0.25 * (high - hi);
    const Range r = observer.range(0);
    // Two float roundings a batch of numbers below 64.
    EXPECT_NEAR(static_cast<double>(r.lo), lo, 64.0 * 12 * 6e-8);
    EXPECT_NEAR(static_cast<double>(r.hi), hi, 64.0 * 12 * 6e-8);
    EXPECT_EQ(observer.range(1).lo, 0.5F);
  }
  EXPECT_THROW(observer.begin(3), InvalidArgument);
}

TEST(Observers, PerChannelAndPerTokenThroughAQuantizer) {
  Eigen::MatrixXf x(6, 40);
  const std::vector<float> values = heavy_tailed(240, 9);
  std::copy(values.begin(), values.end(), x.data());
  x.row(2).setZero();  // a dead channel
  for (const int axis : {0, 1}) {
    const Scheme scheme{Format::int8, Symmetry::symmetric, Granularity::per_channel(axis), ScaleType::fp32, false};
    PercentileOptions options;
    options.percentile = 90.0;
    PercentileObserver observer(options);
    const Ranges ranges = DynamicQuantizer(scheme).observe(x, observer);
    ASSERT_EQ(ranges.size(), axis == 0 ? 6U : 40U);
    for (std::size_t p = 0; p < ranges.size(); ++p) {
      const Eigen::VectorXf line =
          axis == 0 ? Eigen::VectorXf(x.row(static_cast<Eigen::Index>(p))) : x.col(static_cast<Eigen::Index>(p));
      PercentileObserver one(options);
      EXPECT_TRUE(same(ranges[p], ranged(one, std::vector<float>(line.begin(), line.end())))) << p;
    }
    if (axis == 0) {
      EXPECT_TRUE(same(ranges[2], Range{0.0F, 0.0F}));
    }
    EXPECT_NO_THROW(DynamicQuantizer(scheme, ranges).quantize(x));
  }
}

TEST(Observers, ConstantsZerosAndNothing) {
  for (const auto& observer : all_histogram_observers()) {
    observer->begin(3);
    EXPECT_GT(observer->range(0).lo, observer->range(0).hi);  // nothing seen
    const std::vector<float> zeros(50, 0.0F);
    observer->observe(0, zeros.data(), zeros.size());
    EXPECT_TRUE(same(observer->range(0), Range{0.0F, 0.0F}));
    for (const float value : {3.0F, 1e-42F, 30000.0F}) {
      const auto fresh = all_histogram_observers();
      for (const auto& o : fresh) {
        const std::vector<float> constant(50, value);
        const Range r = ranged(*o, constant);
        EXPECT_TRUE(std::isfinite(r.lo) && std::isfinite(r.hi) && r.lo <= r.hi && r.hi <= value);
      }
    }
  }
}

TEST(Observers, BadInputsAreNamed) {
  for (const auto& observer : all_histogram_observers()) {
    observer->begin(1);
    for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()})
      EXPECT_THROW(observer->observe(0, &bad, 1), InvalidArgument);
    EXPECT_THROW(observer->begin(2), InvalidArgument);
  }
  EXPECT_THROW(MovingAverageObserver(0.0F), InvalidArgument);
  EXPECT_THROW(MovingAverageObserver(1.5F), InvalidArgument);
  for (const double percentile : {0.0, 100.1, std::nan("")}) {
    PercentileOptions options;
    options.percentile = percentile;
    EXPECT_THROW(PercentileObserver{options}, InvalidArgument);
  }
  for (const std::size_t bins : {0U, 64U, 1000U}) {
    PercentileOptions options;
    options.bins = bins;
    EXPECT_THROW(PercentileObserver{options}, InvalidArgument);
  }
  EntropyOptions entropy;
  entropy.start_bin = 100;  // fewer than the levels
  EXPECT_THROW(EntropyObserver{entropy}, InvalidArgument);
  EXPECT_THROW(MseObserver(Scheme{Format::nf4, Symmetry::symmetric, {}, ScaleType::fp32, false}), InvalidArgument);
}

}  // namespace
