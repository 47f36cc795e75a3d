// Quantization-aware training: gradients of the surrogates, and the promise that the forward pass is the deployed product.
#include "nibble/train/qat_linear.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <unistd.h>

#include "gemm_support.hpp"
#include "nibble/io/packed_file.hpp"

namespace {

using Eigen::Index;
using Eigen::MatrixXf;
using nibble::Activations;
using nibble::Format;
using nibble::Gradient;
using nibble::Granularity;
using nibble::Grid;
using nibble::GridStart;
using nibble::InvalidArgument;
using nibble::Isa;
using nibble::LearnedActivationOptions;
using nibble::LearnedActivations;
using nibble::LearnedWeightGrids;
using nibble::MatrixRef;
using nibble::PackedMatrix;
using nibble::Parameters;
using nibble::QatLinear;
using nibble::QatOptions;
using nibble::QuantizedTensor;
using nibble::RowMajorMatrix;
using nibble::RowMajorRef;
using nibble::Scheme;
using nibble::Symmetry;
using nibble::ThreadPool;

std::vector<std::uint32_t> bits(const MatrixXf& m) { return gemm_test::bits(m); }
RowMajorMatrix random_weights(Index rows, Index cols, unsigned seed, float size = 0.1F) {
  return size * gemm_test::random_floats(rows, cols, seed);
}
Scheme scheme_of(Format f, Symmetry s, Granularity g, bool full = false,
                 nibble::ScaleType type = nibble::ScaleType::fp32) {
  Scheme scheme = gemm_test::scheme_of(f, s, g, type);
  scheme.full_range = full;
  return scheme;
}

std::vector<Scheme> learned_schemes() {
  std::vector<Scheme> all;
  for (const Format f : {Format::int8, Format::int4, Format::int3, Format::int2})
    for (const Granularity g :
         {Granularity::per_tensor(), Granularity::per_channel(0), Granularity::per_group(32, 1)}) {
      all.push_back(scheme_of(f, Symmetry::symmetric, g));
      all.push_back(scheme_of(f, Symmetry::symmetric, g, true));
      all.push_back(scheme_of(f, Symmetry::asymmetric, g));
      all.push_back(scheme_of(f, Symmetry::float_offset, g));
    }
  return all;
}

// ---- fake quantization ----

TEST(FakeQuantize, ForwardIsTheQuantizersAndBackwardIsClipped) {
  const MatrixXf x = gemm_test::random_floats(9, 70, 1);
  const MatrixXf dy = gemm_test::random_floats(9, 70, 2);
  for (const Format f : {Format::int8, Format::int4, Format::int2, Format::nf4})
    for (const Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
      for (const Granularity g : {Granularity::per_tensor(), Granularity::per_channel(0),
                                  Granularity::per_channel(1), Granularity::per_group(32, 1)}) {
        if (f == Format::nf4 && s != Symmetry::symmetric) continue;
        const Scheme scheme = scheme_of(f, s, g);
        const nibble::Ranges ranges = {{-0.7F, 1.1F}};  // many are clipped
        nibble::FakeQuantize fake(scheme);
        fake.disable_observer();
        fake.set_ranges(ranges);
        MatrixXf out(9, 70);
        fake.forward(x, out);
        const QuantizedTensor q = nibble::DynamicQuantizer(scheme, ranges).quantize(x);
        EXPECT_EQ(bits(out), bits(nibble::dequantize(q)));
        // What is clipped lies more than half a step beyond the end of the grid, exactly: by the values of the codes.
        MatrixXf expected(9, 70);
        const nibble::detail::CodeRange codes = nibble::detail::code_range(q.scheme());
        std::size_t clipped = 0;
        for (Index r = 0; r < 9; ++r)
          for (Index k = 0; k < 70; ++k) {
            const Grid grid = q.grid(q.param_index(static_cast<std::size_t>(r), static_cast<std::size_t>(k)));
            const double step = static_cast<double>(grid.scale), o = static_cast<double>(grid.offset);
            double low = step * (codes.min - grid.zero - 0.5) + o, high = step * (codes.max - grid.zero + 0.5) + o;
            if (f == Format::nf4) low = -step, high = step;
            const bool inside = x(r, k) >= low && x(r, k) <= high;
            clipped += inside ? 0 : 1;
            expected(r, k) = inside ? dy(r, k) : 0.0F;
          }
        EXPECT_GT(clipped, 50U);
        MatrixXf dx(9, 70);
        fake.backward(x, dy, dx);
        EXPECT_EQ(bits(dx), bits(expected));
        // Another storage order, and adding.
        const RowMajorMatrix rows = x;
        RowMajorMatrix dx_rows = RowMajorMatrix::Ones(9, 70);
        ThreadPool pool(2);
        nibble::QuantizeOptions options;
        options.pool = &pool;
        fake.backward(rows, dy, dx_rows, Gradient::add, options);
        EXPECT_EQ(bits(dx_rows), bits((expected.array() + 1.0F).matrix()));
      }
}

TEST(FakeQuantize, Controls) {
  const MatrixXf x = gemm_test::random_floats(4, 8, 1);
  const MatrixXf wide = 3.0F * x;
  nibble::FakeQuantize fake(scheme_of(Format::int4, Symmetry::asymmetric, Granularity::per_tensor()));
  MatrixXf out(4, 8);
  fake.disable_observer();
  EXPECT_THROW(fake.forward(x, out), InvalidArgument);
  fake.enable_observer();
  fake.disable_fake_quant();
  fake.forward(x, out);
  EXPECT_EQ(bits(out), bits(x));
  const nibble::Ranges seen = fake.ranges();
  ASSERT_EQ(seen.size(), 1U);
  EXPECT_EQ(seen[0].hi, x.maxCoeff());
  MatrixXf dx(4, 8);
  fake.backward(x, wide, dx);
  EXPECT_EQ(bits(dx), bits(wide));
  fake.enable_fake_quant();
  fake.disable_observer();
  fake.forward(wide, out);
  EXPECT_EQ(fake.ranges()[0].hi, seen[0].hi);
  EXPECT_NE(bits(out), bits(wide));

  nibble::QatSchedule schedule;
  schedule.fake_quant_start = 3;
  schedule.observer_stop = 5;
  fake.set_schedule(schedule);
  const bool expected[][2] = {{false, true}, {false, true}, {false, true},
                              {true, true},  {true, true},  {true, false}};
  for (std::uint64_t step = 0; step < 6; ++step) {
    fake.begin_step(step);
    EXPECT_EQ(fake.fake_quant_enabled(), expected[step][0]) << step;
    EXPECT_EQ(fake.observer_enabled(), expected[step][1]) << step;
  }
  MatrixXf wrong(3, 8);
  EXPECT_THROW(fake.backward(x, wrong, dx), InvalidArgument);
}

// ---- LSQ ----

/// The surrogate of lsq.hpp in double, rounding's effects frozen where they are for (scale, c) = (s0, c0).
struct Surrogate {
  Symmetry symmetry = Symmetry::symmetric;
  double qmin = 0, qmax = 0;
  double s0 = 1, c0 = 0, z0 = 0;  // z0: the zero point in use, -offset / s0 where it is a float

  double middle() const { return 0.5 * (qmin + qmax); }
  double zero(double s, double c) const {
    return symmetry == Symmetry::symmetric ? z0 : middle() - c / s + (z0 - (middle() - c0 / s0));
  }
  double clamp(double u) const { return std::min(qmax, std::max(qmin, u)); }
  double operator()(double v, double v0, double s, double c) const {
    const double u0 = clamp(v0 / s0 + z0);
    const double rest = std::nearbyint(u0) - u0;
    const double z = zero(s, c);
    return s * (clamp(v / s + z) + rest - z);
  }
};

/// Central differences of `f`, which is piecewise linear or 1/s in its argument.
double slope(const std::function<double(double)>& f, double at, double h) {
  return (f(at + h) - f(at - h)) / (2 * h);
}

TEST(Lsq, WeightGradientsAreThoseOfTheSurrogate) {
  constexpr Index rows = 5, cols = 75;
  unsigned seed = 10;
  std::size_t clipped = 0, all = 0;
  for (const Scheme& scheme : learned_schemes()) {
    RowMajorMatrix w = random_weights(rows, cols, ++seed);
    w.array() += scheme.symmetry == Symmetry::symmetric ? 0.0F : 0.03F;
    const RowMajorMatrix d = random_weights(rows, cols, ++seed, 1.0F);
    LearnedWeightGrids grids(scheme, rows, cols);
    grids.start(w, GridStart::mse);
    Parameters ps;
    grids.append_parameters("w.", ps);
    ASSERT_EQ(ps.size(), grids.has_centre() ? 2U : 1U);
    // Grids too narrow, so that some weights are clipped.
    for (std::size_t p = 0; p < ps[0].size; ++p) ps[0].value[p] -= 0.4F;
    const QuantizedTensor q = grids.quantize(w);
    const nibble::detail::CodeRange codes = nibble::detail::code_range(q.scheme());
    RowMajorMatrix dw = RowMajorMatrix::Zero(rows, cols);
    grids.backward(w, d, RowMajorRef(dw));
    ThreadPool pool(3);
    LearnedWeightGrids again(scheme, rows, cols);
    again.start(q);
    for (std::size_t p = 0; p < q.param_count(); ++p) {
      Surrogate f;
      f.symmetry = scheme.symmetry;
      f.qmin = codes.min;
      f.qmax = codes.max;
      const Grid grid = q.grid(p);
      f.s0 = static_cast<double>(grid.scale);
      f.c0 = grids.has_centre() ? static_cast<double>(ps[1].value[p]) : 0.0;
      f.z0 = scheme.symmetry == Symmetry::float_offset ? -static_cast<double>(grid.offset) / f.s0 : grid.zero;
      // The scale comes back.
      EXPECT_NEAR(again.grid(p).scale / grid.scale, 1.0F, 1e-6F);
      double of_scale = 0.0, of_centre = 0.0, size = 0.0;
      for (Index r = 0; r < rows; ++r)
        for (Index k = 0; k < cols; ++k) {
          if (q.param_index(static_cast<std::size_t>(r), static_cast<std::size_t>(k)) != p) continue;
          const double v = static_cast<double>(w(r, k)), g = static_cast<double>(d(r, k));
          size += 1.0;
          // Forward: the surrogate's value is what is deployed, to float's rounding.
          EXPECT_NEAR(f(v, v, f.s0, f.c0),
                      static_cast<double>(nibble::detail::decode(
                          {scheme.format, scheme.symmetry, nibble::ScaleType::fp32, nullptr, nullptr, codes}, grid,
                          static_cast<int>(q.code(static_cast<std::size_t>(r), static_cast<std::size_t>(k))))),
                      1e-6);
          const double h = 1e-7;
          const double dv = slope([&](double at) { return f(at, v, f.s0, f.c0); }, v, h * f.s0);
          EXPECT_NEAR(static_cast<double>(dw(r, k)), g * dv, 1e-6) << r << " " << k;
          clipped += std::fabs(dv) < 0.5 ? 1 : 0;
          ++all;
          of_scale += g * slope([&](double s) { return f(v, v, s, f.c0); }, f.s0, h * f.s0);
          of_centre += g * slope([&](double c) { return f(v, v, f.s0, c); }, f.c0, h * f.s0);
        }
      const double positive = scheme.symmetry != Symmetry::symmetric
                                  ? static_cast<double>((codes.max - codes.min) / 2)
                                  : std::max(1.0, std::min(f.z0 - f.qmin, f.qmax - f.z0));
      const double lsq = 1.0 / std::sqrt(size * positive);
      // Differences of 1e-7 s cost 1e-8 of a term of up to 256 codes; u near 128 is exact to 2^-17 in float, and there are
      // up to 375 terms of size 1: 3e-3. In units of ln s all is multiplied by s.
      EXPECT_NEAR(static_cast<double>(ps[0].gradient[p]) / (lsq * f.s0), of_scale, 5e-3);
      if (grids.has_centre()) {
        EXPECT_NEAR(static_cast<double>(ps[1].gradient[p]) / lsq, of_centre, 1e-4);
      }
    }
    // Threads change nothing; gradients add.
    RowMajorMatrix twice = dw;
    std::vector<float> once(ps[0].gradient, ps[0].gradient + ps[0].size);
    grids.backward(w, d, RowMajorRef(twice), &pool);
    EXPECT_EQ(bits(twice), bits(2.0F * dw));
    for (std::size_t p = 0; p < once.size(); ++p) EXPECT_EQ(ps[0].gradient[p], 2.0F * once[p]);
  }
  EXPECT_GT(clipped, all / 50);
  EXPECT_LT(clipped, all / 2);
}

TEST(Lsq, StartsAreThePapers) {
  const RowMajorMatrix w = random_weights(3, 64, 5);
  LearnedWeightGrids grids(scheme_of(Format::int4, Symmetry::symmetric, Granularity::per_channel(0)), 3, 64);
  grids.start(w, GridStart::lsq);
  for (Index r = 0; r < 3; ++r) {
    double mean = 0.0;
    for (Index k = 0; k < 64; ++k) mean += std::fabs(static_cast<double>(w(r, k))) / 64.0;
    EXPECT_NEAR(static_cast<double>(grids.grid(static_cast<std::size_t>(r)).scale), 2.0 * mean / std::sqrt(7.0),
                1e-7);
  }
  // The least squares start is no worse than the two others, for any scheme.
  for (const Scheme& scheme : learned_schemes()) {
    const auto error = [&](GridStart how) {
      LearnedWeightGrids g(scheme, 3, 64);
      g.start(w, how);
      return static_cast<double>((nibble::dequantize(g.quantize(w)) - MatrixXf(w)).squaredNorm());
    };
    EXPECT_LE(error(GridStart::mse), error(GridStart::min_max) * 1.001);
  }
  // Zeros and constants.
  for (const Scheme& scheme : learned_schemes())
    for (const float value : {0.0F, 0.25F, -3.0F}) {
      const RowMajorMatrix flat = RowMajorMatrix::Constant(3, 64, value);
      for (const GridStart how : {GridStart::mse, GridStart::min_max, GridStart::lsq}) {
        LearnedWeightGrids g(scheme, 3, 64);
        g.start(flat, how);
        const MatrixXf back = nibble::dequantize(g.quantize(flat));
        EXPECT_TRUE(back.allFinite());
        if (how == GridStart::min_max) {
          EXPECT_LE((back.array() - value).abs().maxCoeff(), 1e-6F * std::fabs(value) + 1e-30F);
        }
      }
    }
}

TEST(Lsq, ScalesStayPositiveAndBadOnesAreNamed) {
  const RowMajorMatrix w = random_weights(2, 32, 5);
  LearnedWeightGrids grids(
      scheme_of(Format::int4, Symmetry::symmetric, Granularity::per_channel(0), false, nibble::ScaleType::fp16), 2,
      32);
  grids.start(w);
  Parameters ps;
  grids.append_parameters("w.", ps);
  ps[0].value[0] = -1000.0F;  // a step far too long
  EXPECT_GT(grids.grid(0).scale, 0.0F);
  ps[0].value[0] = 1000.0F;
  EXPECT_THROW(grids.grid(0), InvalidArgument);
  ps[0].value[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(grids.quantize(w), InvalidArgument);
  ps[0].value[0] = -3.0F;
  RowMajorMatrix bad = w;
  bad(1, 3) = std::numeric_limits<float>::infinity();
  EXPECT_THROW(grids.quantize(bad), InvalidArgument);
  EXPECT_THROW(grids.quantize(random_weights(2, 31, 1)), InvalidArgument);
  EXPECT_THROW(LearnedWeightGrids(scheme_of(Format::nf4, Symmetry::symmetric, Granularity::per_channel(0)), 2, 32),
               InvalidArgument);
  EXPECT_THROW(
      LearnedWeightGrids(scheme_of(Format::int4, Symmetry::symmetric, Granularity::per_channel(1)), 2, 32),
      InvalidArgument);
}

TEST(Lsq, ActivationGradientsAreThoseOfTheSurrogate) {
  constexpr Index inputs = 72, tokens = 41;
  MatrixXf x = gemm_test::random_floats(inputs, tokens, 3);
  x.array() += 0.4F;
  const MatrixXf d = gemm_test::random_floats(inputs, tokens, 4);
  using Kind = LearnedActivationOptions::Kind;
  for (const Kind kind : {Kind::lsq, Kind::lsq_plus})
    for (const unsigned b : {2U, 4U, 8U})
      for (const std::size_t group : {std::size_t{0}, std::size_t{32}}) {
        if (group != 0 && kind != Kind::lsq) continue;
        LearnedActivationOptions options;
        options.kind = kind;
        options.bits = b;
        options.group_size = group;
        LearnedActivations learned(options, inputs);
        learned.start(x);
        Parameters ps;
        learned.append_parameters("a.", ps);
        for (std::size_t p = 0; p < ps[0].size; ++p) ps[0].value[p] -= 0.5F;
        MatrixXf dx = MatrixXf::Ones(inputs, tokens);
        learned.backward(x, d, dx, Gradient::add);
        const nibble::StaticGrid grid = learned.grid();
        const std::size_t length = group == 0 ? inputs : group;
        for (std::size_t p = 0; p < grid.count; ++p) {
          Surrogate f;
          f.symmetry = kind == Kind::lsq ? Symmetry::symmetric : Symmetry::asymmetric;
          f.qmax = std::ldexp(1.0, static_cast<int>(b) - 1) - 1.0;
          f.qmin = kind == Kind::lsq ? -f.qmax : -f.qmax - 1.0;
          f.s0 = static_cast<double>(grid.scales[p]);
          f.z0 = grid.zero_point;
          f.c0 = kind == Kind::lsq ? 0.0 : static_cast<double>(*ps[1].value);
          double of_scale = 0.0, of_centre = 0.0;
          const std::size_t end = std::min<std::size_t>(inputs, (p + 1) * length);
          for (std::size_t k = p * length; k < end; ++k)
            for (Index t = 0; t < tokens; ++t) {
              const auto i = static_cast<Index>(k);
              const double v = static_cast<double>(x(i, t)), g = static_cast<double>(d(i, t)), h = 1e-7 * f.s0;
              of_scale += g * slope([&](double s) { return f(v, v, s, f.c0); }, f.s0, h);
              of_centre += g * slope([&](double c) { return f(v, v, f.s0, c); }, f.c0, h);
              EXPECT_NEAR(static_cast<double>(dx(i, t)) - 1.0,
                          g * slope([&](double at) { return f(at, v, f.s0, f.c0); }, v, h), 2e-6);
            }
          const double lsq = 1.0 / std::sqrt(static_cast<double>(end - p * length) * f.qmax);
          // 2952 terms of size 1, each exact to 2^-17 (u up to 128 in float).
          EXPECT_NEAR(static_cast<double>(ps[0].gradient[p]) / (lsq * f.s0), of_scale, 2e-2);
          if (kind == Kind::lsq_plus) {
            EXPECT_NEAR(static_cast<double>(*ps[1].gradient) / lsq, of_centre, 1e-3);
          }
        }
      }
}

TEST(Pact, ClipsAtAlphaAndLearnsIt) {
  MatrixXf x = gemm_test::random_floats(40, 35, 8);
  const MatrixXf d = gemm_test::random_floats(40, 35, 9);
  LearnedActivationOptions options;
  options.kind = LearnedActivationOptions::Kind::pact;
  options.bits = 4;
  LearnedActivations pact(options, 40);
  pact.start(x);
  Parameters ps;
  pact.append_parameters("a.", ps);
  ASSERT_EQ(ps.size(), 1U);
  const nibble::StaticGrid grid = pact.grid();
  const float alpha = 15.0F * grid.scales[0];
  EXPECT_LT(alpha, x.maxCoeff());
  // Forward: clip(x, 0, alpha) to 15 steps (Choi 2018, equations 1 and 2).
  nibble::QuantizedActivations codes;
  codes.assign_static(x, grid);
  MatrixXf back(40, 35);
  nibble::detail::dequantize_activations(codes, back, nullptr);
  for (Index i = 0; i < x.size(); ++i) {
    const float y = std::min(alpha, std::max(0.0F, x.data()[i]));
    EXPECT_EQ(back.data()[i], std::nearbyint(std::min(15.0F, y / grid.scales[0])) * grid.scales[0]);
  }
  MatrixXf dx(40, 35);
  pact.backward(x, d, dx, Gradient::set);
  double of_alpha = 0.0;
  for (Index i = 0; i < x.size(); ++i) {
    const float v = x.data()[i];
    if (v >= alpha) of_alpha += static_cast<double>(d.data()[i]);
    EXPECT_EQ(dx.data()[i], v >= 0.0F && v < alpha ? d.data()[i] : 0.0F);
  }
  EXPECT_NE(of_alpha, 0.0);
  EXPECT_NEAR(static_cast<double>(ps[0].gradient[0]), of_alpha * static_cast<double>(alpha), 1e-5);
}

// ---- the layer ----

struct ActivationCase {
  const char* name;
  Activations kind;
  unsigned bits;
  std::optional<LearnedActivationOptions> learned;
};
std::vector<ActivationCase> activation_cases() {
  LearnedActivationOptions lsq4, plus4, grouped8;
  lsq4.bits = plus4.bits = 4;
  plus4.kind = LearnedActivationOptions::Kind::lsq_plus;
  grouped8.group_size = 32;
  return {{"int8", Activations::int8, 8, {}},
          {"int8_grouped", Activations::int8_grouped, 8, {}},
          {"int4", Activations::int8, 4, {}},
          {"int4_grouped", Activations::int8_grouped, 4, {}},
          {"int4_asymmetric", Activations::int8_asymmetric, 4, {}},
          {"fp32", Activations::fp32, 8, {}},
          {"lsq4", Activations::automatic, 8, lsq4},
          {"lsq_plus4", Activations::automatic, 8, plus4},
          {"lsq8 in groups", Activations::automatic, 8, grouped8}};
}
std::vector<Scheme> layer_schemes() {
  std::vector<Scheme> all;
  for (const Format f : {Format::int8, Format::int4, Format::int3, Format::int2}) {
    all.push_back(scheme_of(f, Symmetry::symmetric, Granularity::per_channel(0)));
    all.push_back(scheme_of(f, Symmetry::float_offset, Granularity::per_channel(0)));
    all.push_back(
        scheme_of(f, Symmetry::asymmetric, Granularity::per_group(32, 1), false, nibble::ScaleType::fp16));
  }
  return all;
}

TEST(QatLinear, ForwardIsTheDeployedProductBitForBit) {
  constexpr Index n = 37, k = 96, m = 7;
  const MatrixXf x = gemm_test::random_floats(k, m, 40);
  ThreadPool pool(3);
  const std::string path = testing::TempDir() + "nibble-qat-" + std::to_string(getpid()) + ".safetensors";
  unsigned seed = 50;
  for (const Scheme& scheme : layer_schemes())
    for (const ActivationCase& a : activation_cases()) {
      QatOptions options;
      options.scheme = scheme;
      options.activations = a.kind;
      options.activation_bits = a.bits;
      options.learned_activations = a.learned;
      QatLinear layer(random_weights(n, k, ++seed), options);
      MatrixXf y(n, m);
      layer.forward(x, y, {});
      // A step of training, so that nothing is where it started.
      Parameters ps;
      layer.append_parameters("l.", ps);
      check(ps);
      const MatrixXf dy = gemm_test::random_floats(n, m, ++seed);
      layer.backward(x, dy, nullptr, Gradient::set, {});
      for (const nibble::Parameter& p : ps)
        for (std::size_t i = 0; i < p.size; ++i) p.value[i] -= 1e-3F * p.gradient[i];
      layer.begin_step(1);
      layer.forward(x, y, {});
      MatrixXf twice(n, m);
      layer.forward(x, twice, {});
      EXPECT_EQ(bits(twice), bits(y));

      // Deployed: packed, saved and loaded.
      const QuantizedTensor exported = layer.quantized();
      EXPECT_EQ(bits(nibble::dequantize(exported)), bits(nibble::dequantize(layer.packed().unpack())));
      nibble::PackedFileWriter writer(path);
      writer.add("w", nibble::pack(exported));
      writer.commit();
      const nibble::PackedFile file = nibble::PackedFile::open(path);
      const PackedMatrix& w = file.matrix("w");
      for (const Isa isa : gemm_test::available_isas())
        for (ThreadPool* threads : {static_cast<ThreadPool*>(nullptr), &pool}) {
          nibble::MatmulOptions product;
          product.isa = isa;
          product.pool = threads;
          product.activations = a.kind;
          product.activation_bits = a.bits;
          MatrixXf deployed(n, m);
          if (a.learned) {
            nibble::QuantizedActivations codes;
            codes.assign_static(x, layer.learned_activations()->grid());
            nibble::matmul(w, codes, deployed, product);
          } else {
            nibble::matmul(w, x, deployed, product);
          }
          ASSERT_EQ(bits(deployed), bits(y)) << a.name << " " << name_of(isa) << " " << name_of(scheme.format);
          nibble::TrainOptions train;
          train.isa = isa;
          train.pool = threads;
          train.products = Activations::bf16;  // of the backward pass only
          MatrixXf again(n, m);
          layer.forward(x, again, train);
          ASSERT_EQ(bits(again), bits(y)) << a.name << " " << name_of(isa);
        }
    }
  std::remove(path.c_str());
}

TEST(QatLinear, BackwardGoesThroughWhatTheCodesStandFor) {
  constexpr Index n = 19, k = 64, m = 33;
  const MatrixXf x = gemm_test::random_floats(k, m, 60);
  const MatrixXf dy = gemm_test::random_floats(n, m, 61);
  ThreadPool pool(2);
  for (const Scheme& scheme : layer_schemes())
    for (const ActivationCase& a : activation_cases())
      for (const bool learn : {true, false}) {
        QatOptions options;
        options.scheme = scheme;
        options.activations = a.kind;
        options.activation_bits = a.bits;
        options.learned_activations = a.learned;
        options.learn_scales = learn;
        QatLinear layer(random_weights(n, k, 62), options);
        MatrixXf y(n, m);
        layer.forward(x, y, {});
        MatrixXf dx = MatrixXf::Zero(k, m);
        MatrixRef to(dx);
        layer.backward(x, dy, &to, Gradient::add, {});

        // x^ from codes of an object of our own, in double.
        nibble::QuantizedActivations codes;
        Eigen::MatrixXd x_hat = x.cast<double>();
        if (a.learned)
          codes.assign_static(x, layer.learned_activations()->grid());
        else if (a.kind != Activations::fp32)
          codes.assign(x, a.kind, nullptr, 32, a.bits);
        if (codes.inputs() != 0)
          for (Index t = 0; t < m; ++t)
            for (Index i = 0; i < k; ++i)
              x_hat(i, t) =
                  static_cast<double>(codes.scale(
                      t, codes.group_size() == 0 ? 0 : static_cast<std::size_t>(i) / codes.group_size())) *
                  (codes.codes(t)[i] - codes.zero_point(t));
        const Eigen::MatrixXd w_hat = nibble::dequantize(layer.quantized()).cast<double>();
        EXPECT_LT((w_hat * x_hat - y.cast<double>()).cwiseAbs().maxCoeff(), 2e-5);
        const Eigen::MatrixXd dw_hat = dy.cast<double>() * x_hat.transpose();
        const Eigen::MatrixXd dx_hat = w_hat.transpose() * dy.cast<double>();
        // Each element passes whole, or not at all where it was clipped. 33 and 19 products of size 1: 1e-5.
        std::size_t passed = 0;
        for (Index r = 0; r < n; ++r)
          for (Index i = 0; i < k; ++i) {
            const double got = static_cast<double>(layer.gradient()(r, i));
            if (got != 0.0) {
              EXPECT_NEAR(got, dw_hat(r, i), 3e-5);
              ++passed;
            }
          }
        EXPECT_GT(passed, static_cast<std::size_t>(n * k) / 4);
        // Nothing is clipped but on learned grids.
        std::size_t stopped = 0;
        for (Index i = 0; i < dx.size(); ++i) {
          if (a.learned && dx.data()[i] == 0.0F) {
            ++stopped;
            continue;
          }
          EXPECT_NEAR(static_cast<double>(dx.data()[i]), dx_hat.data()[i], 3e-5);
        }
        EXPECT_LT(stopped, static_cast<std::size_t>(dx.size()) / 4);

        // Threads change no bit, nor does whether dx is asked for.
        QatLinear other(random_weights(n, k, 62), options);
        Parameters ps, qs;
        layer.append_parameters("", ps);
        other.append_parameters("", qs);
        nibble::TrainOptions train;
        train.pool = &pool;
        other.forward(x, y, train);
        other.backward(x, dy, nullptr, Gradient::set, train);
        for (std::size_t p = 0; p < ps.size(); ++p)
          for (std::size_t i = 0; i < ps[p].size; ++i)
            ASSERT_EQ(ps[p].gradient[i], qs[p].gradient[i]) << ps[p].name << " " << a.name;
      }
}

TEST(QatLinear, DelayedStartAndFrozenScales) {
  const MatrixXf x = gemm_test::random_floats(32, 5, 70);
  const MatrixXf dy = gemm_test::random_floats(8, 5, 71);
  QatOptions options;
  options.scheme = scheme_of(Format::int2, Symmetry::float_offset, Granularity::per_channel(0));
  nibble::QatSchedule schedule;
  schedule.fake_quant_start = 2;
  schedule.scale_freeze = 4;
  options.schedule = schedule;
  QatLinear layer(random_weights(8, 32, 72), options);
  nibble::DenseLinear dense(random_weights(8, 32, 72));
  Parameters ps;
  layer.append_parameters("", ps);
  ASSERT_EQ(ps.size(), 3U);
  std::vector<float> frozen;
  for (std::uint64_t step = 0; step < 6; ++step) {
    layer.begin_step(step);
    MatrixXf y(8, 5), expected(8, 5);
    layer.forward(x, y, {});
    EXPECT_EQ(layer.fake_quant_enabled(), step >= 2);
    if (step < 2) {
      dense.weight() = layer.weight();
      dense.forward(x, expected, {});
      EXPECT_EQ(bits(y), bits(expected));
    } else {
      nibble::MatmulOptions product;
      nibble::matmul(nibble::pack(layer.quantized()), x, expected, product);
      EXPECT_EQ(bits(y), bits(expected));
    }
    if (step == 2) {
      // From the weights as they are at that step.
      LearnedWeightGrids fresh(options.scheme, 8, 32);
      fresh.start(layer.weight());
      for (std::size_t p = 0; p < 8; ++p) EXPECT_EQ(layer.grids().grid(p).scale, fresh.grid(p).scale);
    }
    if (step == 4)
      for (std::size_t p = 0; p < 8; ++p) frozen.push_back(layer.grids().grid(p).scale);
    for (std::size_t p = 0; p < frozen.size(); ++p) EXPECT_EQ(layer.grids().grid(p).scale, frozen[p]);
    layer.backward(x, dy, nullptr, Gradient::set, {});
    if (step >= 4) {
      for (std::size_t p = 0; p < 8; ++p) EXPECT_EQ(ps[1].gradient[p], 0.0F);
    }
    for (const nibble::Parameter& p : ps)
      for (std::size_t i = 0; i < p.size; ++i) {
        p.value[i] -= 1e-2F * p.gradient[i] + (&p != &ps[0] ? 1e-3F : 0.0F);  // momentum of sorts
        p.gradient[i] = 0.0F;
      }
    layer.end_step();
    if (step < 4) continue;
    // Who goes on with these parameters, from a checkpoint say, goes on with the frozen grids.
    QatLinear resumed(random_weights(8, 32, 72), options);
    Parameters qs;
    resumed.append_parameters("", qs);
    for (std::size_t p = 0; p < ps.size(); ++p) std::copy_n(ps[p].value, ps[p].size, qs[p].value);
    resumed.begin_step(step + 1);
    for (std::size_t p = 0; p < 8; ++p) {
      EXPECT_EQ(resumed.grids().grid(p).scale, frozen[p]);
      EXPECT_EQ(resumed.grids().grid(p).offset, layer.grids().grid(p).offset);
    }
  }
}

TEST(QatLinear, LearnsWhatRoundingLoses) {
  // A layer of 2 bits is trained towards the outputs of a float one.
  constexpr Index n = 16, k = 32, m = 256;
  const RowMajorMatrix target = random_weights(n, k, 80);
  // Inputs are correlated: errors of weights can make up for each other, which rounding them one by one does not.
  const MatrixXf x = 0.3F * gemm_test::random_floats(k, 6, 81) * gemm_test::random_floats(6, m, 82) +
                     0.05F * gemm_test::random_floats(k, m, 83);
  const MatrixXf wanted = target * x;
  for (const ActivationCase& a : activation_cases()) {
    QatOptions options;
    options.scheme = scheme_of(Format::int2, Symmetry::float_offset, Granularity::per_channel(0));
    options.activations = a.kind;
    options.activation_bits = a.bits;
    options.learned_activations = a.learned;
    QatLinear layer(target, options);
    Parameters ps;
    layer.append_parameters("", ps);
    double first = 0.0, best = 0.0;
    MatrixXf y(n, m);
    for (std::uint64_t step = 0; step < 60; ++step) {
      layer.begin_step(step);
      nibble::zero_gradients(ps);
      layer.forward(x, y, {});
      const MatrixXf error = y - wanted;
      const auto loss = static_cast<double>(error.squaredNorm());
      if (step == 0) first = best = loss;
      best = std::min(best, loss);
      layer.backward(x, error / static_cast<float>(m), nullptr, Gradient::set, {});
      for (const nibble::Parameter& p : ps)
        for (std::size_t i = 0; i < p.size; ++i) p.value[i] -= (&p == &ps[0] ? 0.05F : 0.02F) * p.gradient[i];
    }
    EXPECT_LT(best, 0.6 * first) << a.name << " " << best << " " << first;
  }
}

TEST(QatLinear, BadInputsAreRefused) {
  QatOptions options;
  options.scheme = scheme_of(Format::int4, Symmetry::symmetric, Granularity::per_channel(0));
  options.activation_bits = 9;
  EXPECT_THROW(QatLinear(random_weights(4, 16, 1), options), InvalidArgument);
  options.activation_bits = 4;
  options.activations = Activations::bf16;
  EXPECT_THROW(QatLinear(random_weights(4, 16, 1), options), InvalidArgument);
  options.activations = Activations::int8;
  RowMajorMatrix bad = random_weights(4, 16, 1);
  bad(2, 2) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(QatLinear(bad, options), InvalidArgument);
  QatLinear layer(random_weights(4, 16, 1), options);
  MatrixXf y(4, 3);
  EXPECT_THROW(layer.forward(MatrixXf::Zero(15, 3), y, {}), InvalidArgument);
  EXPECT_THROW(layer.backward(MatrixXf::Zero(16, 3), MatrixXf::Zero(4, 2), nullptr, Gradient::set, {}),
               InvalidArgument);
  // A token that is not finite: NaN comes out, in its column alone.
  MatrixXf x = MatrixXf::Ones(16, 3);
  x(3, 1) = std::numeric_limits<float>::infinity();
  layer.forward(x, y, {});
  EXPECT_TRUE(std::isnan(y(0, 1)));
  EXPECT_TRUE(y.col(0).allFinite());
  // Zero tokens.
  layer.backward(MatrixXf::Zero(16, 0), MatrixXf::Zero(4, 0), nullptr, Gradient::set, {});
  EXPECT_TRUE((layer.gradient().array() == 0.0F).all());
  LearnedActivationOptions learned;
  learned.kind = LearnedActivationOptions::Kind::lsq_plus;
  learned.group_size = 16;
  EXPECT_THROW(LearnedActivations(learned, 32), InvalidArgument);
}

}  // namespace
