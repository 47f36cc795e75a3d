// HQQ against a naive version of its equations.
#include "nibble/ptq/hqq.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>

namespace {

using namespace nibble;
using Eigen::Index;

RowMajorMatrix random_weights(Index rows, Index cols, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.003F, 0.05F);
  RowMajorMatrix w(rows, cols);
  for (Index i = 0; i < w.size(); ++i) {
    w.data()[i] = normal(random);
    if (random() % 97 == 0) w.data()[i] *= 8.0F;
  }
  return w;
}

Scheme scheme_of(Format format, Symmetry symmetry, std::size_t group, ScaleType type = ScaleType::fp32) {
  return {format, symmetry, group == 0 ? Granularity::per_channel(0) : Granularity::per_group(group, 1), type,
          false};
}

double lp_error(const RowMajorMatrix& a, const RowMajorMatrix& b, double p) {
  return (a - b).cast<double>().array().abs().pow(p).sum();
}

bool same_grid(const Grid& a, const Grid& b) {
  return a.scale == b.scale && a.offset == b.offset && a.zero == b.zero;
}

/// All z of the iteration for one group, from z0: one line an equation of the paper, s its inverse scale.
std::vector<double> naive_iterates(const std::vector<double>& w, double scale, double z, int lowest, int highest,
                                   const HqqOptions& o) {
  std::vector<double> all;
  double beta = o.beta;
  for (int i = 0; i < o.iterations; ++i) {
    std::vector<double> q;
    for (const double x : w)
      q.push_back(
          std::clamp(std::nearbyint(x / scale + z), static_cast<double>(lowest), static_cast<double>(highest)));
    double sum = 0.0;
    for (std::size_t k = 0; k < w.size(); ++k) {
      const double unit = o.in_steps ? scale : 1.0;
      const double error = (w[k] - scale * (q[k] - z)) / unit;
      const double shrunk = std::max(std::fabs(error) - std::pow(std::fabs(error), o.p - 1.0) / beta, 0.0);
      const double e = error == 0.0 ? 0.0 : (error < 0.0 ? -shrunk : shrunk) * unit;
      sum += q[k] - (w[k] - e) / scale;
    }
    z = sum / static_cast<double>(w.size());
    if (o.round_each_step) z = std::nearbyint(z);
    all.push_back(z);
    beta *= o.kappa;
  }
  return all;
}

/// fit_hqq by definition: of the start and all iterates, as stored, the first with the least error.
Grid naive_group(const WeightGrids& start, const RowMajorMatrix& w, Index row, Index group, const HqqOptions& o) {
  const auto range = start.inputs_of(group);
  std::vector<double> x;
  for (Index k = range.first; k < range.second; ++k) x.push_back(static_cast<double>(w(row, k)));
  const Grid g0 = start.at(row, group);
  const bool floats = start.scheme().symmetry == Symmetry::float_offset;
  const double scale = static_cast<double>(g0.scale);
  const double z0 = floats ? -static_cast<double>(g0.offset) / scale : g0.zero;
  std::vector<Grid> candidates = {g0};
  HqqOptions inner = o;
  inner.round_each_step = o.round_each_step && !floats;
  for (const double z : naive_iterates(x, scale, z0, start.min_code(), start.max_code(), inner)) {
    WeightGrids stored = start;
    Grid g = g0;
    if (floats)
      g.offset = static_cast<float>(-scale * z);
    else
      g.zero = static_cast<std::int32_t>(std::clamp(std::nearbyint(z), static_cast<double>(start.min_code()),
                                                    static_cast<double>(start.max_code())));
    stored.set(row, group, g);
    candidates.push_back(stored.at(row, group));
  }
  double least = std::numeric_limits<double>::infinity();
  Grid best;
  for (const Grid& g : candidates) {
    double sum = 0.0;
    for (const double v : x) {
      const int code = start.encode(g, static_cast<float>(v));
      sum += std::pow(std::fabs(static_cast<double>(start.decode(g, code)) - v), o.p);
    }
    if (sum < least) {
      least = sum;
      best = g;
    }
  }
  return best;
}

TEST(Hqq, IsTheNaiveOne) {
  // Both compute in double, in an order that differs in the last place only: a code could differ where w / scale + z
  // lies within 1e-15 of a half, which these numbers do not. Offsets are then the same floats.
  const RowMajorMatrix w = random_weights(7, 150, 1);
  for (const Symmetry symmetry : {Symmetry::float_offset, Symmetry::asymmetric})
    for (const Format format : {Format::int4, Format::int8, Format::int3})
      for (const std::size_t group : {0U, 64U})
        for (const ScaleType type : {ScaleType::fp32, ScaleType::fp16})
          for (const int variant : {0, 1, 2}) {
            HqqOptions options;
            options.in_steps = variant == 1;
            options.round_each_step = variant == 2;
            options.p = variant == 1 ? 0.5 : 0.7;
            const Scheme scheme = scheme_of(format, symmetry, group, type);
            const WeightGrids start = fit_min_max(scheme, w);
            const WeightGrids grids = fit_hqq(scheme, w, options);
            for (Index r = 0; r < grids.rows(); ++r)
              for (Index g = 0; g < grids.groups(); ++g)
                EXPECT_TRUE(same_grid(grids.at(r, g), naive_group(start, w, r, g, options)))
                    << r << " " << g << " variant " << variant;
          }
}

TEST(Hqq, LowersTheErrorOfFloatOffsets) {
  const RowMajorMatrix w = random_weights(64, 512, 2);
  const Scheme scheme = scheme_of(Format::int4, Symmetry::float_offset, 64);
  const WeightGrids start = fit_min_max(scheme, w);
  const double before = lp_error(start.decode(start.encode(w)), w, 0.7);
  for (const bool in_steps : {false, true}) {
    HqqOptions options;
    options.in_steps = in_steps;
    const WeightGrids grids = fit_hqq(scheme, w, options);
    EXPECT_LT(lp_error(grids.decode(grids.encode(w)), w, 0.7), 0.99 * before);
  }
  // From better scales it gets better still.
  const WeightGrids searched = fit_mse(scheme, w);
  const WeightGrids both = fit_hqq(searched, w);
  EXPECT_LE(lp_error(both.decode(both.encode(w)), w, 0.7), lp_error(searched.decode(searched.encode(w)), w, 0.7));
  EXPECT_EQ(both.assemble(both.encode(w)).size(), 64U * 512U);
}

TEST(Hqq, IsNeverWorseThanItsStartInAnyGroup) {
  const RowMajorMatrix w = random_weights(16, 256, 3);
  for (const Symmetry symmetry : {Symmetry::float_offset, Symmetry::asymmetric}) {
    const WeightGrids start = fit_mse(scheme_of(Format::int4, symmetry, 32, ScaleType::fp16), w);
    const WeightGrids grids = fit_hqq(start, w);
    const RowMajorMatrix a = start.decode(start.encode(w));
    const RowMajorMatrix b = grids.decode(grids.encode(w));
    for (Index r = 0; r < w.rows(); ++r)
      for (Index g = 0; g < start.groups(); ++g) {
        const auto error = [&](const RowMajorMatrix& m) {
          return lp_error(m.block(r, 32 * g, 1, 32), w.block(r, 32 * g, 1, 32), 0.7);
        };
        // The sums run in another order here: 32 roundings of doubles.
        EXPECT_LE(error(b), error(a) * (1.0 + 1e-13));
        EXPECT_EQ(grids.at(r, g).scale, start.at(r, g).scale);
      }
  }
}

TEST(Hqq, ThreadsDoNotMatter) {
  const RowMajorMatrix w = random_weights(33, 100, 4);
  const Scheme scheme = scheme_of(Format::int4, Symmetry::float_offset, 64);
  const WeightGrids serial = fit_hqq(scheme, w);
  ThreadPool pool(3);
  HqqOptions options;
  options.pool = &pool;
  const WeightGrids parallel = fit_hqq(scheme, w, options);
  for (Index r = 0; r < w.rows(); ++r)
    for (Index g = 0; g < serial.groups(); ++g) EXPECT_TRUE(same_grid(serial.at(r, g), parallel.at(r, g)));
}

TEST(Hqq, PlantedCases) {
  const Scheme scheme = scheme_of(Format::int4, Symmetry::float_offset, 16);
  RowMajorMatrix w = random_weights(4, 32, 5);
  w.row(1).setConstant(0.3F);
  w.row(2).setZero();
  w(3, 4) = 1000.0F;
  const WeightGrids grids = fit_hqq(scheme, w);
  const RowMajorMatrix back = grids.decode(grids.encode(w));
  EXPECT_TRUE(back.allFinite());
  EXPECT_TRUE((back.row(2).array() == 0.0F).all());
  // A constant c lies within an ulp of its offset.
  EXPECT_LE((back.row(1) - w.row(1)).cwiseAbs().maxCoeff(), 0.3F * 2.4e-7F);
  const RowMajorMatrix one = RowMajorMatrix::Constant(1, 1, -2.5F);
  const WeightGrids single = fit_hqq(scheme, one);
  EXPECT_NEAR(single.decode(single.encode(one))(0, 0), -2.5F, 1e-6F);
  EXPECT_EQ(fit_hqq(scheme, RowMajorMatrix(0, 8)).rows(), 0);
}

TEST(Hqq, BadInputsAreNamed) {
  RowMajorMatrix w = random_weights(2, 32, 6);
  EXPECT_THROW(fit_hqq(scheme_of(Format::int4, Symmetry::symmetric, 16), w), InvalidArgument);
  EXPECT_THROW(fit_hqq(scheme_of(Format::nf4, Symmetry::symmetric, 16), w), InvalidArgument);
  const Scheme scheme = scheme_of(Format::int4, Symmetry::float_offset, 16);
  EXPECT_THROW(fit_hqq(fit_min_max(scheme, w), RowMajorMatrix(2, 16)), InvalidArgument);
  const auto with = [&](auto change) {
    HqqOptions options;
    change(options);
    return options;
  };
  for (const HqqOptions& options :
       {with([](HqqOptions& o) { o.p = 0.0; }), with([](HqqOptions& o) { o.p = 1.5; }),
        with([](HqqOptions& o) { o.beta = 0.0; }), with([](HqqOptions& o) { o.beta = std::nan(""); }),
        with([](HqqOptions& o) { o.kappa = 0.9; }), with([](HqqOptions& o) { o.iterations = -1; })})
    EXPECT_THROW(fit_hqq(scheme, w, options), InvalidArgument);
  w(1, 3) = std::nanf("");
  EXPECT_THROW(fit_hqq(scheme, w), InvalidArgument);
}

}  // namespace
