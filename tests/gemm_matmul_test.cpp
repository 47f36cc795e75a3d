// Products of packed weights: exact against a naive definition, the same bits on every ISA, thread count and batch.
#include "nibble/gemm/matmul.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <tuple>

#include "gemm_support.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/gemm/explain.hpp"

namespace {

using namespace gemm_test;
using Eigen::Index;
using Eigen::MatrixXf;
using nibble::Activations;
using nibble::Epilogue;
using nibble::InvalidArgument;
using nibble::Isa;
using nibble::MatmulOptions;
using nibble::PackedMatrix;
using nibble::QuantizedActivations;
using nibble::ThreadPool;

std::size_t kernel_group(const PackedMatrix& w) { return w.group_size(); }

/// Symmetric codes of one token by the definition: rne(x / (absmax / 127)).
std::vector<std::int32_t> naive_codes(const Eigen::VectorXf& x, float& scale) {
  float absmax = 0.0F;
  for (Index i = 0; i < x.size(); ++i) absmax = std::max(absmax, std::abs(x[i]));
  scale = absmax > 0.0F ? std::max(absmax / 127.0F, std::numeric_limits<float>::min()) : 1.0F;
  std::vector<std::int32_t> q;
  for (Index i = 0; i < x.size(); ++i)
    q.push_back(static_cast<std::int32_t>(std::min(127.0F, std::max(-127.0F, std::nearbyint(x[i] / scale)))));
  return q;
}

struct Case {
  Scheme scheme;
  const char* name;
};

std::vector<Case> integer_cases() {
  std::vector<Case> cases;
  for (Format f : {Format::int8, Format::int4, Format::int2, Format::int3, Format::int5, Format::int6})
    for (Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
      for (ScaleType t : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16}) {
        if (t != ScaleType::fp16) cases.push_back({scheme_of(f, s, Granularity::per_channel(0), t), "channel"});
        cases.push_back({scheme_of(f, s, Granularity::per_group(32), t), "g32"});
        if (t == ScaleType::fp32) {
          cases.push_back({scheme_of(f, s, Granularity::per_tensor(), t), "tensor"});
          cases.push_back({scheme_of(f, s, Granularity::per_group(16), t), "g16"});
          cases.push_back({scheme_of(f, s, Granularity::per_group(48), t), "g48"});
          cases.push_back({scheme_of(f, s, Granularity::per_group(128), t), "g128"});
        }
      }
  return cases;
}

TEST(Matmul, IntegerActivationsEqualTheDefinition) {
  const struct {
    std::size_t n, k;
    Index m;
  } shapes[] = {{1, 1, 1}, {5, 7, 2}, {16, 32, 1}, {17, 33, 3}, {31, 172, 5}, {64, 100, 4}, {35, 211, 19}};
  unsigned seed = 1;
  for (const Case& c : integer_cases())
    for (const auto& shape : shapes) {
      const QuantizedTensor q = random_quantized(c.scheme, shape.n, shape.k, ++seed);
      const PackedMatrix w = pack(q);
      const MatrixXf x = random_floats(static_cast<Index>(shape.k), shape.m, ++seed);
      MatrixXf expected(static_cast<Index>(shape.n), shape.m);
      for (Index t = 0; t < shape.m; ++t) {
        float scale = 0.0F;
        const std::vector<std::int32_t> codes = naive_codes(x.col(t), scale);
        for (std::size_t r = 0; r < shape.n; ++r)
          expected(static_cast<Index>(r), t) = naive_int(q, r, codes, kernel_group(w)) * scale;
      }
      for (Isa isa : available_isas()) {
        MatmulOptions options;
        options.isa = isa;
        MatrixXf y = MatrixXf::Constant(static_cast<Index>(shape.n), shape.m, 7.0F);
        nibble::matmul(w, x, y, options);
        ASSERT_EQ(bits(y), bits(expected))
            << name_of(isa) << " " << name_of(c.scheme.format) << " " << name_of(c.scheme.symmetry) << " "
            << c.name << " n " << shape.n << " k " << shape.k << " m " << shape.m;
      }
    }
}

TEST(Matmul, FloatActivationsEqualTheDequantizedProduct) {
  std::vector<Scheme> schemes;
  for (Format f : {Format::fp32, Format::fp16, Format::bf16})
    schemes.push_back(scheme_of(f, Symmetry::symmetric, Granularity::per_tensor()));
  for (const Case& c : integer_cases()) schemes.push_back(c.scheme);
  for (ScaleType t : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16})
    for (Format f : {Format::nf4, Format::fp4})
      schemes.push_back(scheme_of(f, Symmetry::symmetric, Granularity::per_group(64), t));
  schemes.push_back(scheme_of(Format::nf4, Symmetry::symmetric, Granularity::per_channel(0)));
  unsigned seed = 1;
  for (const Scheme& scheme : schemes)
    for (const auto& [n, k] : {std::pair<std::size_t, std::size_t>{1, 1}, {17, 33}, {40, 300}})
      for (Index m : {1, 2, 5, 17}) {
        const QuantizedTensor q = random_quantized(scheme, n, k, ++seed);
        const PackedMatrix w = pack(q);
        const MatrixXf x = random_floats(static_cast<Index>(k), m, ++seed);
        std::vector<float> values(n * k);
        q.dequantize(values.data());
        MatrixXf expected(static_cast<Index>(n), m);
        for (std::size_t r = 0; r < n; ++r)
          for (Index t = 0; t < m; ++t) {
            float acc = 0.0F;
            for (std::size_t i = 0; i < k; ++i)
              acc = std::fma(values[r * k + i], x(static_cast<Index>(i), t), acc);
            expected(static_cast<Index>(r), t) = acc;
          }
        for (Isa isa : available_isas()) {
          MatmulOptions options;
          options.isa = isa;
          options.activations = Activations::fp32;
          MatrixXf y(static_cast<Index>(n), m);
          nibble::matmul(w, x, y, options);
          ASSERT_EQ(bits(y), bits(expected)) << name_of(isa) << " " << name_of(scheme.format) << " "
                                             << name_of(scheme.symmetry) << " n " << n << " k " << k << " m " << m;
        }
      }
}

// The sum of pairs, odd k first, of weights and activations in bfloat16. Values lie far from subnormals.
TEST(Matmul, Bf16Activations) {
  const Scheme scheme = scheme_of(Format::bf16, Symmetry::symmetric, Granularity::per_tensor());
  ThreadPool pool(2);
  unsigned seed = 50;
  for (const auto& shape : {std::pair<std::size_t, std::size_t>{1, 1}, {17, 33}, {150, 517}})
    for (Index m : {1, 2, 3, 7, 8, 11, 13, 25, 300}) {
      const std::size_t n = shape.first;
      const std::size_t k = shape.second;
      const QuantizedTensor q = random_quantized(scheme, n, k, ++seed);
      const PackedMatrix w = pack(q);
      const MatrixXf x = random_floats(static_cast<Index>(k), m, ++seed);
      std::vector<float> values(n * k);
      q.dequantize(values.data());
      MatrixXf expected(static_cast<Index>(n), m);
      for (std::size_t r = 0; r < n; ++r)
        for (Index t = 0; t < m; ++t) {
          const auto step = [&](std::size_t i, float acc) {
            if (i >= k) return acc;
            return std::fma(values[r * k + i],
                            nibble::float_from_bf16(nibble::bf16_from_float(x(static_cast<Index>(i), t))), acc);
          };
          float acc = 0.0F;
          for (std::size_t i = 0; i < k; i += 2) acc = step(i, step(i + 1, acc));
          expected(static_cast<Index>(r), t) = acc;
        }
      for (Isa isa : available_isas())
        for (ThreadPool* threads : {static_cast<ThreadPool*>(nullptr), &pool}) {
          MatmulOptions options;
          options.isa = isa;
          options.pool = threads;
          options.activations = Activations::bf16;
          MatrixXf y(static_cast<Index>(n), m);
          nibble::matmul(w, x, y, options);
          ASSERT_EQ(bits(y), bits(expected)) << name_of(isa) << " n " << n << " k " << k << " m " << m;
          // A token alone has the bits that it has in company.
          MatrixXf one(static_cast<Index>(n), 1);
          nibble::matmul(w, x.rightCols(1), one, options);
          ASSERT_EQ(bits(one), bits(expected.rightCols(1))) << name_of(isa);
        }
    }
  // Asked for, and for bf16 weights only; else these have fp32 activations.
  MatmulOptions options;
  options.activations = Activations::bf16;
  MatrixXf y(8, 1);
  const MatrixXf x = MatrixXf::Constant(8, 1, 1.00390625F);  // 1 + 2^-8: a tie, 1 in bfloat16
  const auto identity = [&](Format format) {
    const MatrixXf one = MatrixXf::Identity(8, 8);
    return pack(
        nibble::DynamicQuantizer(scheme_of(format, Symmetry::symmetric, Granularity::per_tensor())).quantize(one));
  };
  EXPECT_THROW(nibble::matmul(identity(Format::fp16), x, y, options), InvalidArgument);
  EXPECT_THROW(nibble::matmul(identity(Format::int8), x, y, options), InvalidArgument);
  nibble::matmul(identity(Format::bf16), x, y, options);
  EXPECT_EQ(y(7, 0), 1.0F);
  nibble::matmul(identity(Format::bf16), x, y);
  EXPECT_EQ(y(7, 0), 1.00390625F);
  EXPECT_THROW(nibble::QuantizedActivations().assign(x, Activations::bf16), InvalidArgument);
}

TEST(Matmul, SameBitsForEveryThreadCountAndBatch) {
  const Index n = 330;
  const Index k = 200;
  const Index m = 150;
  const MatrixXf x = random_floats(k, m, 3);
  for (const Scheme& scheme : {scheme_of(Format::int4, Symmetry::symmetric, Granularity::per_group(32)),
                               scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)),
                               scheme_of(Format::nf4, Symmetry::symmetric, Granularity::per_group(64)),
                               scheme_of(Format::int3, Symmetry::asymmetric, Granularity::per_group(64)),
                               scheme_of(Format::int6, Symmetry::float_offset, Granularity::per_group(16)),
                               scheme_of(Format::fp32, Symmetry::symmetric, Granularity::per_tensor())}) {
    const PackedMatrix w = pack(random_quantized(scheme, 330, 200, 9));
    MatrixXf whole(n, m);
    nibble::matmul(w, x, whole);
    for (int threads : {1, 2, 3, 8}) {
      ThreadPool pool(threads);
      MatmulOptions options;
      options.pool = &pool;
      for (Index batch : {Index{1}, Index{4}, Index{7}, Index{64}, m}) {
        MatrixXf y(n, m);
        for (Index t = 0; t < m; t += batch) {
          const Index count = std::min(batch, m - t);
          nibble::matmul(w, x.middleCols(t, count), y.middleCols(t, count), options);
        }
        ASSERT_EQ(bits(y), bits(whole)) << name_of(scheme.format) << " threads " << threads << " batch " << batch;
      }
    }
  }
}

TEST(Matmul, AsymmetricActivations) {
  const QuantizedTensor q =
      random_quantized(scheme_of(Format::int4, Symmetry::asymmetric, Granularity::per_group(32)), 20, 75, 4);
  const PackedMatrix w = pack(q);
  MatrixXf x = random_floats(75, 3, 5).array() + 2.0F;
  QuantizedActivations codes;
  codes.assign(x, Activations::int8_asymmetric);
  ASSERT_FALSE(codes.symmetric());
  const std::vector<std::int32_t> ones(75, 1);
  MatrixXf expected(20, 3);
  for (Index t = 0; t < 3; ++t) {
    const std::vector<std::int32_t> token(codes.codes(t), codes.codes(t) + 75);
    // The codes describe the token to half a step.
    for (Index i = 0; i < 75; ++i)
      EXPECT_NEAR(codes.scale(t) * static_cast<float>(token[static_cast<std::size_t>(i)] - codes.zero_point(t)),
                  x(i, t), codes.scale(t) * 0.5001F);
    for (std::size_t r = 0; r < 20; ++r) {
      const float acc = naive_int(q, r, token, w.group_size());
      const float sum = naive_int(q, r, ones, w.group_size());
      expected(static_cast<Index>(r), t) =
          std::fma(-static_cast<float>(codes.zero_point(t)), sum, acc) * codes.scale(t);
    }
  }
  for (Isa isa : available_isas()) {
    MatmulOptions options;
    options.isa = isa;
    options.activations = Activations::int8_asymmetric;
    MatrixXf y(20, 3);
    nibble::matmul(w, x, y, options);
    ASSERT_EQ(bits(y), bits(expected)) << name_of(isa);
  }
  nibble::PackOptions lean;
  lean.channel_sums = false;
  MatrixXf y(20, 3);
  EXPECT_THROW(nibble::matmul(pack(q, lean), codes, y), InvalidArgument);
}

TEST(Matmul, GroupedActivationsEqualTheDefinition) {
  unsigned seed = 77;
  for (const Case& c : integer_cases())
    for (const auto& [n, k, m] :
         {std::tuple<std::size_t, std::size_t, Index>{1, 1, 1}, {17, 40, 3}, {36, 172, 1}, {20, 211, 19}}) {
      const QuantizedTensor q = random_quantized(c.scheme, n, k, ++seed);
      const PackedMatrix w = pack(q);
      MatrixXf x = random_floats(static_cast<Index>(k), m, ++seed);
      const std::size_t group = nibble::activation_group(w);
      MatrixXf expected(static_cast<Index>(n), m);
      for (Index t = 0; t < m; ++t)
        for (std::size_t r = 0; r < n; ++r) {
          float acc = 0.0F;
          for (std::size_t begin = 0; begin < k; begin += group) {
            const std::size_t end = std::min(begin + group, k);
            float x_scale = 0.0F;
            const std::vector<std::int32_t> codes =
                naive_codes(x.col(t).segment(static_cast<Index>(begin), static_cast<Index>(end - begin)), x_scale);
            std::int64_t dot = 0;
            std::int64_t sum = 0;
            for (std::size_t i = begin; i < end; ++i) {
              dot += centred(q, r, i) * codes[i - begin];
              sum += codes[i - begin];
            }
            const std::size_t p = q.param_index(r, begin);
            float term = nibble::detail::rounded(q.scale(p) * static_cast<float>(dot));
            if (c.scheme.symmetry == Symmetry::float_offset)
              term = std::fma(q.offset(p), static_cast<float>(sum), term);
            acc = std::fma(x_scale, term, acc);
          }
          expected(static_cast<Index>(r), t) = acc;
        }
      for (Isa isa : available_isas()) {
        MatmulOptions options;
        options.isa = isa;
        options.activations = Activations::int8_grouped;
        MatrixXf y(static_cast<Index>(n), m);
        nibble::matmul(w, x, y, options);
        ASSERT_EQ(bits(y), bits(expected))
            << name_of(isa) << " " << name_of(c.scheme.format) << " " << name_of(c.scheme.symmetry) << " "
            << c.name << " n " << n << " k " << k;
      }
      x(static_cast<Index>(k) - 1, 0) = std::numeric_limits<float>::infinity();
      MatmulOptions options;
      options.activations = Activations::int8_grouped;
      MatrixXf y(static_cast<Index>(n), m);
      nibble::matmul(w, x, y, options);
      for (Index i = 0; i < y.rows(); ++i) ASSERT_TRUE(std::isnan(y(i, 0)));
      if (m > 1) {
        ASSERT_EQ(bits(y.rightCols(m - 1)), bits(expected.rightCols(m - 1)));
      }
    }
}

/// Codes of `bits` bits by the definition. Symmetric: zero is 0.
std::vector<std::int32_t> naive_narrow(const Eigen::VectorXf& x, unsigned bits, bool symmetric, float& scale,
                                       std::int32_t& zero) {
  const float h = std::ldexp(1.0F, static_cast<int>(bits) - 1);
  const float lo = std::min(0.0F, x.minCoeff());
  const float hi = std::max(0.0F, x.maxCoeff());
  scale = symmetric ? std::max(-lo, hi) / (h - 1.0F) : hi / (2.0F * h - 1.0F) - lo / (2.0F * h - 1.0F);
  const float bottom = symmetric ? 1.0F - h : -h;
  const float z = symmetric ? 0.0F : std::min(h - 1.0F, std::max(-h, std::nearbyint(-h - lo / scale)));
  zero = static_cast<std::int32_t>(z);
  std::vector<std::int32_t> q;
  for (Index i = 0; i < x.size(); ++i)
    q.push_back(static_cast<std::int32_t>(std::min(h - 1.0F, std::max(bottom, std::nearbyint(x[i] / scale) + z))));
  return q;
}

TEST(Matmul, ActivationsOfFewerBitsEqualTheDefinition) {
  constexpr Index k = 75, m = 5;
  constexpr std::size_t n = 19;
  unsigned seed = 900;
  ThreadPool pool(3);
  for (Format f : {Format::int8, Format::int4, Format::int3, Format::int2})
    for (unsigned b : {2U, 3U, 4U, 6U, 8U})
      for (Activations kind : {Activations::int8, Activations::int8_grouped, Activations::int8_asymmetric}) {
        const Scheme scheme = scheme_of(f, Symmetry::float_offset, Granularity::per_channel(0));
        const QuantizedTensor q = random_quantized(scheme, n, k, ++seed);
        const PackedMatrix w = pack(q);
        const MatrixXf x = random_floats(k, m, ++seed);
        const bool symmetric = kind != Activations::int8_asymmetric;
        const Index group = kind == Activations::int8_grouped ? 32 : k;
        const std::vector<std::int32_t> ones(static_cast<std::size_t>(k), 1);
        QuantizedActivations codes;
        codes.assign(x, kind, nullptr, 32, b);
        MatrixXf expected(static_cast<Index>(n), m);
        for (Index t = 0; t < m; ++t)
          for (Index begin = 0; begin < k; begin += group) {
            float scale = 0.0F;
            std::int32_t zero = 0;
            const Index length = std::min(group, k - begin);
            const std::vector<std::int32_t> token =
                naive_narrow(x.col(t).segment(begin, length), b, symmetric, scale, zero);
            ASSERT_EQ(codes.scale(t, static_cast<std::size_t>(begin / group)), scale);
            ASSERT_EQ(codes.zero_point(t), zero);
            for (Index i = 0; i < length; ++i)
              ASSERT_EQ(codes.codes(t)[begin + i], token[static_cast<std::size_t>(i)]) << b << " bits";
            if (kind == Activations::int8_grouped) {
              for (std::size_t r = 0; r < n; ++r) {
                float& y = expected(static_cast<Index>(r), t);
                if (begin == 0) y = 0.0F;
                std::int64_t dot = 0, sum = 0;
                for (Index i = 0; i < length; ++i) {
                  dot += centred(q, r, static_cast<std::size_t>(begin + i)) * token[static_cast<std::size_t>(i)];
                  sum += token[static_cast<std::size_t>(i)];
                }
                const float term = nibble::detail::rounded(q.scale(r) * static_cast<float>(dot));
                y = std::fma(scale, std::fma(q.offset(r), static_cast<float>(sum), term), y);
              }
              continue;
            }
            for (std::size_t r = 0; r < n; ++r) {
              const float acc = naive_int(q, r, token, w.group_size());
              const float of_zero =
                  symmetric ? acc
                            : std::fma(-static_cast<float>(zero), naive_int(q, r, ones, w.group_size()), acc);
              expected(static_cast<Index>(r), t) = of_zero * scale;
            }
          }
        for (Isa isa : available_isas())
          for (ThreadPool* threads : {static_cast<ThreadPool*>(nullptr), &pool}) {
            MatmulOptions options;
            options.isa = isa;
            options.pool = threads;
            options.activations = kind;
            options.activation_bits = b;
            MatrixXf y(static_cast<Index>(n), m);
            nibble::matmul(w, x, y, options);
            ASSERT_EQ(bits(y), bits(expected)) << name_of(isa) << " " << name_of(f) << " " << b << " bits";
          }
      }
  QuantizedActivations codes;
  const MatrixXf x = random_floats(k, 1, 1);
  EXPECT_THROW(codes.assign(x, Activations::int8, nullptr, 32, 1), InvalidArgument);
  EXPECT_THROW(codes.assign(x, Activations::int8, nullptr, 32, 9), InvalidArgument);
}

TEST(Matmul, StaticGridsOfAnyWidthAndZeroPointEqualTheDefinition) {
  constexpr Index k = 75, m = 3;
  const QuantizedTensor q =
      random_quantized(scheme_of(Format::int4, Symmetry::asymmetric, Granularity::per_group(32)), 20, 75, 4);
  const PackedMatrix w = pack(q);
  MatrixXf x = random_floats(k, m, 6);
  const std::vector<std::int32_t> ones(static_cast<std::size_t>(k), 1);
  for (unsigned b : {2U, 4U, 8U})
    for (const bool symmetric : {true, false}) {
      const float scale = 1.5F / std::ldexp(1.0F, static_cast<int>(b));
      const auto h = static_cast<std::int32_t>(1U << (b - 1));
      nibble::StaticGrid grid;
      grid.scales = &scale;
      grid.count = 1;
      grid.bits = b;
      grid.symmetric = symmetric;
      grid.zero_point = symmetric ? 0 : 1 - h;
      MatrixXf expected(20, m);
      for (Index t = 0; t < m; ++t) {
        std::vector<std::int32_t> token;
        for (Index i = 0; i < k; ++i) {
          const auto code = static_cast<std::int32_t>(std::nearbyint(x(i, t) / scale)) + grid.zero_point;
          token.push_back(std::min(h - 1, std::max(symmetric ? 1 - h : -h, code)));
        }
        for (std::size_t r = 0; r < 20; ++r) {
          float y = naive_int(q, r, token, w.group_size());
          if (!symmetric)
            y = std::fma(-static_cast<float>(grid.zero_point), naive_int(q, r, ones, w.group_size()), y);
          expected(static_cast<Index>(r), t) = y * scale;
        }
      }
      for (Isa isa : available_isas()) {
        QuantizedActivations codes;
        codes.assign_static(x, grid, nullptr, nibble::detail::kernels_for(isa));
        MatmulOptions options;
        options.isa = isa;
        MatrixXf y(20, m);
        nibble::matmul(w, codes, y, options);
        ASSERT_EQ(bits(y), bits(expected)) << name_of(isa) << " " << b << " bits";
        // A token that is not finite makes its own outputs NaN and no other's.
        MatrixXf broken = x;
        broken(k - 1, 1) = std::numeric_limits<float>::quiet_NaN();
        codes.assign_static(broken, grid, nullptr, nibble::detail::kernels_for(isa));
        nibble::matmul(w, codes, y, options);
        EXPECT_TRUE(std::isnan(y(0, 1)));
        EXPECT_EQ(bits(y.col(0)), bits(expected.col(0)));
        EXPECT_EQ(bits(y.col(2)), bits(expected.col(2)));
      }
    }
  const float scale = 1.0F;
  nibble::StaticGrid grid;
  grid.scales = &scale;
  grid.count = 1;
  QuantizedActivations codes;
  const auto refused = [&](auto&& change) {
    nibble::StaticGrid other = grid;
    change(other);
    EXPECT_THROW(codes.assign_static(x, other), InvalidArgument);
  };
  EXPECT_NO_THROW(codes.assign_static(x, grid));
  refused([](nibble::StaticGrid& g) { g.bits = 1; });
  refused([](nibble::StaticGrid& g) { g.zero_point = 1; });
  refused([](nibble::StaticGrid& g) { g.symmetric = false, g.bits = 4, g.zero_point = 8; });
  refused([](nibble::StaticGrid& g) { g.symmetric = false, g.group_size = 80; });
  refused([](nibble::StaticGrid& g) { g.count = 2; });
}

TEST(Matmul, GroupsThatDoNotFitAreRefused) {
  const Scheme scheme = scheme_of(Format::int4, Symmetry::symmetric, Granularity::per_group(64));
  const PackedMatrix w = pack(random_quantized(scheme, 8, 128, 1));
  const MatrixXf x = random_floats(128, 2, 1);
  QuantizedActivations codes;
  MatrixXf y(8, 2);
  codes.assign(x, Activations::int8_grouped, nullptr, 48);
  EXPECT_THROW(nibble::matmul(w, codes, y), InvalidArgument);
  codes.assign(x, Activations::int8_grouped, nullptr, 128);
  EXPECT_THROW(nibble::matmul(w, codes, y), InvalidArgument);
  EXPECT_THROW(codes.assign(x, Activations::int8_grouped, nullptr, 24), InvalidArgument);
  for (std::size_t group : {16, 32, 64}) {
    codes.assign(x, Activations::int8_grouped, nullptr, group);
    EXPECT_NO_THROW(nibble::matmul(w, codes, y));
  }
}

TEST(Matmul, RawAccumulatorsAreExactAtTheExtremes) {
  for (const auto& [code, x_code] : {std::pair<int, int>{127, 127}, {-128, -128}, {-128, 127}, {127, -128}}) {
    const std::size_t k = 4099;
    Buffer codes(3 * k);
    std::memset(codes.mutable_data(), code, 3 * k);
    Buffer scale(4);
    scale.as_mutable<float>()[0] = 1.0F;
    const PackedMatrix w = pack(QuantizedTensor::from_parts(
        scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_tensor()), {3, k}, codes, scale));
    nibble::Int8Matrix x =
        nibble::Int8Matrix::Constant(static_cast<Index>(k), 2, static_cast<std::int8_t>(x_code));
    QuantizedActivations activations;
    activations.assign_codes(x, 1.0F);
    for (Isa isa : available_isas()) {
      MatmulOptions options;
      options.isa = isa;
      nibble::Int32Matrix y(3, 2);
      nibble::matmul_raw(w, activations, y, options);
      for (Index i = 0; i < y.size(); ++i)
        ASSERT_EQ(y.data()[i], code * x_code * static_cast<int>(k)) << name_of(isa);
    }
  }
}

TEST(Matmul, LongRowsAreSplitWhereInt32WouldOverflow) {
  const std::size_t k = 140000;  // 140000 * 128 * 128 > 2^31
  Buffer codes(k);
  std::memset(codes.mutable_data(), 0x80, k);
  Buffer scale(4);
  scale.as_mutable<float>()[0] = 0.5F;
  const PackedMatrix w = pack(QuantizedTensor::from_parts(
      scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)), {1, k}, codes, scale));
  nibble::Int8Matrix x = nibble::Int8Matrix::Constant(static_cast<Index>(k), 1, std::int8_t{-128});
  QuantizedActivations activations;
  activations.assign_codes(x, 1.0F);
  for (Isa isa : available_isas()) {
    MatmulOptions options;
    options.isa = isa;
    MatrixXf y(1, 1);
    nibble::matmul(w, activations, y, options);
    // 0.5 * 2^14 * 140000 = 1146880000: each piece and each partial sum is a multiple of 2^13 below 2^37, exact.
    EXPECT_EQ(y(0, 0), 1146880000.0F) << name_of(isa);
  }
  EXPECT_EQ(w.unpack().scales().size(), 4U);
}

TEST(Matmul, Int8LayersChain) {
  const QuantizedTensor q1 =
      random_quantized(scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)), 40, 64, 6);
  const PackedMatrix w1 = pack(q1);
  nibble::Int8Matrix x(64, 5);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<std::int8_t>(i * 37);
  QuantizedActivations activations;
  activations.assign_codes(x, 0.03F, 5);
  MatrixXf floats(40, 5);
  nibble::matmul(w1, activations, floats);
  for (Isa isa : available_isas()) {
    MatmulOptions options;
    options.isa = isa;
    nibble::Int8Matrix y(40, 5);
    nibble::matmul(w1, activations, y, {0.25F, -3}, options);
    for (Index i = 0; i < y.size(); ++i) {
      const float code = std::nearbyint(floats.data()[i] / 0.25F) - 3.0F;
      ASSERT_EQ(y.data()[i], static_cast<int>(std::min(127.0F, std::max(-128.0F, code)))) << name_of(isa);
    }
  }
}

TEST(Matmul, EpilogueRunsInTheOrderOfItsCalls) {
  const PackedMatrix w =
      pack(random_quantized(scheme_of(Format::int4, Symmetry::symmetric, Granularity::per_group(32)), 37, 64, 8));
  const MatrixXf x = random_floats(64, 6, 1);
  const Eigen::VectorXf scale = random_floats(37, 1, 2);
  const Eigen::VectorXf bias = random_floats(37, 1, 3);
  const MatrixXf residual = random_floats(37, 6, 4);
  const MatrixXf factor = random_floats(37, 6, 5);
  MatrixXf plain(37, 6);
  nibble::matmul(w, x, plain);
  MatrixXf expected(37, 6);
  for (Index t = 0; t < 6; ++t)
    for (Index c = 0; c < 37; ++c) {
      float v = nibble::detail::rounded(plain(c, t) * scale[c]);
      v = nibble::detail::rounded(v + bias[c]);
      v = nibble::detail::rounded(v + residual(c, t));
      v = v <= 0.0F ? 0.0F : v;
      expected(c, t) = nibble::detail::rounded(nibble::detail::silu_reference(v) * factor(c, t));
    }
  for (Isa isa : available_isas()) {
    for (int threads : {1, 3}) {
      ThreadPool pool(threads);
      MatmulOptions options;
      options.isa = isa;
      options.pool = &pool;
      options.epilogue.scale(scale).bias(bias).add(residual).relu().silu().multiply(factor);
      MatrixXf y(37, 6);
      nibble::matmul(w, x, y, options);
      ASSERT_EQ(bits(y), bits(expected)) << name_of(isa);
      // The residual may be the output itself.
      MatmulOptions in_place;
      in_place.isa = isa;
      in_place.pool = &pool;
      y = residual;
      in_place.epilogue.add(y);
      nibble::matmul(w, x, y, in_place);
      EXPECT_EQ(bits(y), bits(plain + residual)) << name_of(isa);
    }
  }
}

TEST(Matmul, GeluIsItsTanhForm) {
  const PackedMatrix w = nibble::pack(MatrixXf::Identity(64, 64));
  const MatrixXf x = random_floats(64, 8, 1) * 3.0F;
  MatrixXf y(64, 8);
  MatmulOptions options;
  options.epilogue.gelu();
  nibble::matmul(w, x, y, options);
  for (Index i = 0; i < x.size(); ++i) {
    const double v = x.data()[i];
    const double u2 = 2.0 * 0.7978845608028654 * (v + 0.044715 * v * v * v);
    const double exact = v / (1.0 + std::exp(-u2));
    // Four roundings and two rounded constants make exp's argument, each worth 2^-24 of it; exp, sum and quotient add
    // less than 4 ulp. The last term is for results among the subnormals.
    EXPECT_NEAR(y.data()[i], exact, std::abs(exact) * (6.0 * std::abs(u2) + 8.0) * 0x1p-24 + 0x1p-148) << v;
  }
}

TEST(Matmul, NanAndInfStayInTheirToken) {
  for (Format f : {Format::int8, Format::int4, Format::int2, Format::int5}) {
    const PackedMatrix w =
        pack(random_quantized(scheme_of(f, Symmetry::symmetric, Granularity::per_group(32)), 33, 70, 2));
    const MatrixXf clean = random_floats(70, 4, 3);
    for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      MatrixXf x = clean;
      x(69, 2) = bad;
      for (Isa isa : available_isas()) {
        MatmulOptions options;
        options.isa = isa;
        MatrixXf y(33, 4);
        MatrixXf expected(33, 4);
        nibble::matmul(w, clean, expected, options);
        nibble::matmul(w, x, y, options);
        for (Index t : {0, 1, 3}) ASSERT_EQ(bits(y.col(t)), bits(expected.col(t)));
        for (Index c = 0; c < 33; ++c) ASSERT_TRUE(std::isnan(y(c, 2)));
      }
    }
  }
}

TEST(Matmul, GroupedProductsEqualSeparateOnes) {
  const Scheme s4 = scheme_of(Format::int4, Symmetry::float_offset, Granularity::per_group(32), ScaleType::fp16);
  const Scheme s8 = scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0));
  const PackedMatrix ws[] = {pack(random_quantized(s4, 48, 96, 1)), pack(random_quantized(s8, 16, 96, 2)),
                             pack(random_quantized(s4, 100, 96, 3))};
  const MatrixXf x = random_floats(96, 7, 4);
  QuantizedActivations codes;
  codes.assign(x);
  MatrixXf separate[3];
  MatrixXf together[3];
  nibble::GroupedProduct group[3];
  ThreadPool pool(2);
  MatmulOptions options;
  options.pool = &pool;
  for (int i = 0; i < 3; ++i) {
    separate[i].resize(ws[i].rows(), 7);
    together[i].resize(ws[i].rows(), 7);
    nibble::matmul(ws[i], x, separate[i]);
    group[i] = {&ws[i], &codes, together[i].data(), ws[i].rows(), {}};
  }
  nibble::matmul_grouped(group, 3, options);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(bits(together[i]), bits(separate[i]));
}

TEST(Matmul, BatchedProductsEqualSeparateOnes) {
  std::vector<PackedMatrix> ws;
  std::vector<MatrixXf> xs;
  std::vector<MatrixXf> expected;
  std::vector<MatrixXf> ys;
  for (unsigned i = 0; i < 9; ++i) {
    const Format format = i % 3 == 0   ? Format::fp32
                          : i % 3 == 1 ? Format::int4
                          : i == 2     ? Format::int3
                                       : Format::nf4;
    ws.push_back(
        pack(random_quantized(scheme_of(format, Symmetry::symmetric, Granularity::per_group(16)), 10 + i, 20, i)));
    xs.push_back(random_floats(20, 1 + i, i));
    expected.push_back(ws.back() * xs.back());
    ys.emplace_back(10 + i, 1 + i);
  }
  std::vector<nibble::BatchedProduct> batch;
  for (std::size_t i = 0; i < 9; ++i)
    batch.push_back({&ws[i], xs[i].data(), 20, ys[i].data(), ws[i].rows(), xs[i].cols(), {}});
  ThreadPool pool(2);
  MatmulOptions options;
  options.pool = &pool;
  nibble::matmul_batched(batch.data(), batch.size(), options);
  for (std::size_t i = 0; i < 9; ++i) EXPECT_EQ(bits(ys[i]), bits(expected[i]));
  batch[8].y_stride = 3;
  ys[0].setZero();
  EXPECT_THROW(nibble::matmul_batched(batch.data(), batch.size(), options), InvalidArgument);
  EXPECT_EQ(ys[0], MatrixXf::Zero(10, 1));
}

TEST(Matmul, TransposedEqualsTheDequantizedProduct) {
  unsigned seed = 5;
  for (const Scheme& scheme : {scheme_of(Format::int4, Symmetry::asymmetric, Granularity::per_group(32)),
                               scheme_of(Format::int3, Symmetry::asymmetric, Granularity::per_group(32)),
                               scheme_of(Format::int5, Symmetry::float_offset, Granularity::per_group(32)),
                               scheme_of(Format::nf4, Symmetry::symmetric, Granularity::per_group(64)),
                               scheme_of(Format::bf16, Symmetry::symmetric, Granularity::per_tensor())})
    for (const auto& [n, k] : {std::pair<std::size_t, std::size_t>{1, 1}, {19, 40}, {300, 77}}) {
      const PackedMatrix w = pack(random_quantized(scheme, n, k, ++seed));
      const MatrixXf values = w.dequantize();
      const MatrixXf x = random_floats(static_cast<Index>(n), 5, ++seed);
      MatrixXf expected(static_cast<Index>(k), 5);
      for (Index t = 0; t < 5; ++t)
        for (Index j = 0; j < expected.rows(); ++j) {
          float acc = 0.0F;
          for (Index i = 0; i < values.rows(); ++i) acc = std::fma(values(i, j), x(i, t), acc);
          expected(j, t) = acc;
        }
      for (Isa isa : available_isas()) {
        MatmulOptions options;
        options.isa = isa;
        MatrixXf y(static_cast<Index>(k), 5);
        nibble::matmul_transposed(w, x, y, options);
        ASSERT_EQ(bits(y), bits(expected)) << name_of(isa);
      }
    }
}

TEST(Gemm, DenseProductsInAnyOrder) {
  unsigned seed = 1;
  for (Index n : {1, 16, 37, 300})
    for (Index k : {1, 15, 300})
      for (Index m : {1, 2, 3, 4, 7, 13, 40, 103}) {
        const MatrixXf a = random_floats(n, k, ++seed);
        const MatrixXf b = random_floats(k, m, ++seed);
        const MatrixXf at = a.transpose();
        const MatrixXf bt = b.transpose();
        MatrixXf expected(n, m);
        for (Index t = 0; t < m; ++t)
          for (Index i = 0; i < n; ++i) {
            float acc = 0.0F;
            for (Index j = 0; j < k; ++j) acc = std::fma(a(i, j), b(j, t), acc);
            expected(i, t) = acc;
          }
        for (Isa isa : available_isas()) {
          MatmulOptions options;
          options.isa = isa;
          MatrixXf c(n, m);
          nibble::gemm(a, b, c, options);
          ASSERT_EQ(bits(c), bits(expected)) << name_of(isa) << " " << n << " " << k << " " << m;
          nibble::gemm(at.transpose(), bt.transpose(), c, options);
          ASSERT_EQ(bits(c), bits(expected)) << name_of(isa) << " transposed " << n << " " << k << " " << m;
        }
      }
}

TEST(Gemm, AddsToItself) {
  nibble::ThreadPool pool(3);
  for (const Eigen::Index n : {1, 5, 200})
    for (const Eigen::Index m : {1, 4, 6, 40}) {
      const MatrixXf a = MatrixXf::Random(n, 70);
      const MatrixXf b = MatrixXf::Random(70, m);
      const MatrixXf before = MatrixXf::Random(n, m);
      MatrixXf product(n, m);
      nibble::gemm(a, b, product);
      for (const bool rows : {false, true}) {
        MatrixXf c = before;
        nibble::MatmulOptions options;
        options.pool = &pool;
        options.epilogue.add(c);
        if (rows)
          nibble::gemm(MatrixXf(a.transpose()).transpose(), b, c, options);
        else
          nibble::gemm(a, b, c, options);
        EXPECT_EQ(c, MatrixXf(product + before)) << n << " x " << m;
      }
    }
}

TEST(Gemm, SumsOfNothing) {
  for (const nibble::Activations activations : {nibble::Activations::fp32, nibble::Activations::bf16})
    for (const Eigen::Index n : {1, 70, 300})
      for (const Eigen::Index tokens : {1, 3, 9}) {
        const MatrixXf a(n, 0), b(0, tokens);
        const Eigen::VectorXf bias = Eigen::VectorXf::LinSpaced(n, 1.0F, 2.0F);
        MatrixXf c = MatrixXf::Constant(n, tokens, 7.0F);
        nibble::MatmulOptions options;
        options.activations = activations;
        nibble::gemm(a, b, c, options);
        EXPECT_TRUE((c.array() == 0.0F).all()) << n << " x " << tokens;
        options.epilogue.bias(bias).add(c);
        c.setConstant(-1.0F);
        nibble::gemm(a, b, c, options);
        EXPECT_TRUE(c == ((bias.array() - 1.0F).matrix().replicate(1, tokens))) << n << " x " << tokens;
      }
}

TEST(Matmul, EmptyShapes) {
  const Scheme scheme = scheme_of(Format::int4, Symmetry::symmetric, Granularity::per_group(32));
  for (Activations kind : {Activations::int8, Activations::fp32}) {
    MatmulOptions options;
    options.activations = kind;
    MatrixXf none(0, 3);
    nibble::matmul(pack(random_quantized(scheme, 0, 5, 1)), random_floats(5, 3, 1), none, options);
    MatrixXf no_tokens(5, 0);
    nibble::matmul(pack(random_quantized(scheme, 5, 5, 1)), MatrixXf(5, 0), no_tokens, options);
    // No inputs: the sum is empty, the bias stays.
    const Eigen::VectorXf bias = Eigen::VectorXf::LinSpaced(5, 1, 5);
    MatrixXf y(5, 2);
    options.epilogue.bias(bias);
    nibble::matmul(pack(random_quantized(scheme, 5, 0, 1)), MatrixXf(0, 2), y, options);
    EXPECT_EQ(y.col(1), bias);
  }
}

TEST(Matmul, BadArgumentsAreNamed) {
  const PackedMatrix w =
      pack(random_quantized(scheme_of(Format::nf4, Symmetry::symmetric, Granularity::per_group(32)), 8, 32, 1));
  MatrixXf x = random_floats(33, 2, 1);
  MatrixXf y(8, 2);
  try {
    nibble::matmul(w, x, y);
    FAIL();
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("x is 33 x 2, expected 32 rows"), std::string::npos) << e.what();
  }
  MatrixXf good = random_floats(32, 2, 1);
  MatrixXf bad_y(7, 2);
  EXPECT_THROW(nibble::matmul(w, good, bad_y), InvalidArgument);
  MatmulOptions options;
  options.activations = Activations::int8;
  EXPECT_THROW(nibble::matmul(w, good, y, options), InvalidArgument);
  MatrixXf shared(40, 2);
  EXPECT_THROW(nibble::matmul(w, shared.topRows(32), shared.bottomRows(8)), InvalidArgument);
  const Eigen::VectorXf bias = Eigen::VectorXf::Zero(9);
  MatmulOptions with_bias;
  with_bias.epilogue.bias(bias);
  EXPECT_THROW(nibble::matmul(w, good, y, with_bias), InvalidArgument);
  EXPECT_THROW(ThreadPool(-1), InvalidArgument);
}

TEST(Matmul, ExplainNamesKernelAndReason) {
  const PackedMatrix w =
      pack(random_quantized(scheme_of(Format::int4, Symmetry::symmetric, Granularity::per_group(32)), 64, 64, 1));
  MatmulOptions options;
  options.isa = Isa::scalar;
  const std::string text = nibble::explain(w, 1, options);
  EXPECT_NE(text.find("gemm_w4a8"), std::string::npos);
  EXPECT_NE(text.find("isa: scalar (asked for by the caller)"), std::string::npos);
  EXPECT_NE(text.find("2 groups of 32"), std::string::npos);
}

}  // namespace
