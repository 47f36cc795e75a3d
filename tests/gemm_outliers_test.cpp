// LLM.int8(): exact against its definition; a token's bits do not depend on its batch.
#include "nibble/gemm/outliers.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "gemm_support.hpp"

namespace {

using namespace gemm_test;
using Eigen::Index;
using Eigen::MatrixXf;
using nibble::Activations;
using nibble::Epilogue;
using nibble::InvalidArgument;
using nibble::Isa;
using nibble::MatmulOptions;
using nibble::OutlierActivations;
using nibble::OutlierMatrix;
using nibble::OutlierOptions;
using nibble::OutlierShare;
using nibble::OutlierStatistics;
using nibble::PackedMatrix;
using nibble::ThreadPool;

/// One token by the definition: outliers out, absmax codes of the rest, exact integer sums; then the outliers one fma
/// each in ascending order. `kept`: weights of column k where kept[k] is not empty.
Eigen::VectorXf naive_token(const QuantizedTensor& q, std::size_t kernel_group, const Eigen::VectorXf& x,
                            const OutlierOptions& options, const std::vector<Eigen::VectorXf>& kept = {}) {
  const Index n = static_cast<Index>(q.shape()[0]);
  if (!x.array().isFinite().all()) return Eigen::VectorXf::Constant(n, std::nanf(""));
  std::vector<Index> outliers;
  float absmax = 0.0F;
  for (Index k = 0; k < x.size(); ++k) {
    const bool fixed = std::count(options.columns.begin(), options.columns.end(), k) != 0;
    if (fixed || std::abs(x[k]) >= options.threshold)
      outliers.push_back(k);
    else
      absmax = std::max(absmax, std::abs(x[k]));
  }
  const float scale = absmax > 0.0F ? std::max(absmax / 127.0F, std::numeric_limits<float>::min()) : 1.0F;
  std::vector<std::int32_t> codes;
  for (Index k = 0; k < x.size(); ++k) {
    const bool out = std::count(outliers.begin(), outliers.end(), k) != 0;
    const float r = out ? 0.0F : x[k];
    codes.push_back(static_cast<std::int32_t>(std::min(127.0F, std::max(-127.0F, std::nearbyint(r / scale)))));
  }
  const MatrixXf w = nibble::dequantize(q);
  Eigen::VectorXf y(n);
  for (Index c = 0; c < n; ++c) {
    y[c] = naive_int(q, static_cast<std::size_t>(c), codes, kernel_group) * scale;
    float sum = 0.0F;
    for (const Index k : outliers) {
      const auto i = static_cast<std::size_t>(k);
      const float weight = i < kept.size() && kept[i].size() != 0 ? kept[i][c] : w(c, k);
      sum = std::fma(weight, x[k], sum);
    }
    if (!outliers.empty()) y[c] = y[c] + (sum + 0.0F);
  }
  return y;
}

/// Values around 1 with some of 6 and more: a column of them, and single ones.
MatrixXf with_outliers(Index k, Index m, unsigned seed) {
  MatrixXf x = random_floats(k, m, seed);
  std::mt19937 random(seed);
  for (Index t = 0; t < m; t += 2)
    if (k > 3) x(3, t) = t % 4 == 0 ? -31.0F : 6.0F;  // the threshold itself is an outlier
  for (Index i = 0; i < (k * m + 40) / 41; ++i)
    x(static_cast<Index>(random() % static_cast<unsigned>(k)),
      static_cast<Index>(random() % static_cast<unsigned>(m))) *= 20.0F;
  return x;
}

MatrixXf product(const PackedMatrix& w, const MatrixXf& x, const OutlierOptions& outliers = {},
                 const MatmulOptions& options = {}) {
  OutlierActivations a;
  a.assign(x, outliers, options.pool, nibble::detail::kernels_of(options));
  MatrixXf y(w.rows(), x.cols());
  matmul(w, a, y, options);
  return y;
}

TEST(Outliers, EqualTheDefinition) {
  const struct {
    std::size_t n, k;
    Index m;
  } shapes[] = {{1, 1, 1}, {5, 7, 2}, {17, 33, 3}, {31, 172, 5}, {300, 96, 4}, {35, 211, 19}};
  const Scheme schemes[] = {
      scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)),
      scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_group(64), ScaleType::fp16),
      scheme_of(Format::int8, Symmetry::asymmetric, Granularity::per_group(32)),
      scheme_of(Format::int4, Symmetry::float_offset, Granularity::per_group(32))};
  unsigned seed = 0;
  ThreadPool pool(3);
  for (const Scheme& scheme : schemes)
    for (const auto& shape : shapes) {
      const QuantizedTensor q = random_quantized(scheme, shape.n, shape.k, ++seed);
      const PackedMatrix w = pack(q);
      const MatrixXf x = with_outliers(static_cast<Index>(shape.k), shape.m, ++seed);
      OutlierOptions fixed;
      if (shape.k > 5) fixed.columns = {0, 5};
      for (const OutlierOptions& options : {OutlierOptions(), fixed}) {
        MatrixXf expected(static_cast<Index>(shape.n), shape.m);
        for (Index t = 0; t < shape.m; ++t) expected.col(t) = naive_token(q, w.group_size(), x.col(t), options);
        for (const Isa isa : available_isas()) {
          MatmulOptions run;
          run.isa = isa;
          EXPECT_EQ(bits(product(w, x, options, run)), bits(expected)) << name_of(isa) << " " << shape.k;
        }
        MatmulOptions threads;
        threads.pool = &pool;
        EXPECT_EQ(bits(product(w, x, options, threads)), bits(expected)) << shape.k;
      }
    }
}

TEST(Outliers, ATokenAloneHasTheBitsItHasInABatch) {
  const QuantizedTensor q =
      random_quantized(scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_group(64)), 50, 200, 3);
  const PackedMatrix w = pack(q);
  const MatrixXf x = with_outliers(200, 37, 4);
  for (const Activations kind : {Activations::int8, Activations::int8_grouped, Activations::int8_asymmetric}) {
    OutlierOptions options;
    options.activations = kind;
    const MatrixXf all = product(w, x, options);
    for (Index t = 0; t < x.cols(); ++t)
      EXPECT_EQ(bits(product(w, x.col(t), options)), bits(all.col(t))) << "token " << t;
    EXPECT_EQ(bits(product(w, x.middleCols(5, 11), options)), bits(all.middleCols(5, 11)));
  }
}

/// One token on fixed scales by the definition: what no code reaches is multiplied as it is, in ascending order.
Eigen::VectorXf naive_static(const QuantizedTensor& q, const PackedMatrix& packed, const Eigen::VectorXf& x,
                             const std::vector<float>& scales, std::size_t group) {
  const auto n = static_cast<Index>(q.shape()[0]);
  if (!x.array().isFinite().all()) return Eigen::VectorXf::Constant(n, std::nanf(""));
  const auto scale_of = [&](Index k) { return scales[group == 0 ? 0 : static_cast<std::size_t>(k) / group]; };
  MatrixXf inside = x;
  std::vector<Index> outliers;
  for (Index k = 0; k < x.size(); ++k)
    if (std::abs(x[k]) >= 127.5F * scale_of(k)) outliers.push_back(k), inside(k, 0) = 0.0F;
  // The codes' own sum is tested where assign_static() is.
  nibble::QuantizedActivations codes;
  codes.assign_static(inside, scales.data(), scales.size(), group);
  MatrixXf y(n, 1);
  matmul(packed, codes, y);
  const MatrixXf w = nibble::dequantize(q);
  for (Index c = 0; c < n && !outliers.empty(); ++c) {
    float sum = 0.0F;
    for (const Index k : outliers) sum = std::fma(w(c, k), x[k], sum);
    y(c, 0) = y(c, 0) + (sum + 0.0F);
  }
  return y.col(0);
}

TEST(Outliers, OfFixedScalesEqualTheDefinition) {
  ThreadPool pool(3);
  unsigned seed = 40;
  for (const std::size_t group : {std::size_t{0}, std::size_t{32}})
    for (const Index k : {1, 31, 64, 200}) {
      const QuantizedTensor q =
          random_quantized(scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_group(64)), 37,
                           static_cast<std::size_t>(k), ++seed);
      const PackedMatrix w = pack(q);
      MatrixXf x = random_floats(k, 19, ++seed);
      std::vector<float> scales;
      const std::size_t groups = group == 0 ? 1 : (static_cast<std::size_t>(k) + group - 1) / group;
      for (std::size_t g = 0; g < groups; ++g) scales.push_back(0x1p-8F * static_cast<float>(g + 1));
      x.col(7).setZero();
      x(0, 0) = 127.5F * scales[0];  // the first value that is out
      x(0, 1) = -0x1.fdfffep-2F;     // the last that is in, with the code -127
      x(0, 2) = 1e30F;
      x(k - 1, 5) = std::numeric_limits<float>::quiet_NaN();
      OutlierActivations a;
      a.assign_static(x, scales.data(), scales.size(), group, &pool);
      const auto& tokens = a.outlier_tokens();
      EXPECT_EQ(std::count(tokens.begin(), tokens.end(), Index{0}), 1);
      EXPECT_EQ(std::count(tokens.begin(), tokens.end(), Index{7}), 0);
      EXPECT_EQ(std::count(tokens.begin(), tokens.end(), Index{5}), 0);
      EXPECT_EQ(a.codes().codes(0)[0], 0);
      EXPECT_EQ(a.codes().codes(1)[0], -127);
      MatrixXf y(37, x.cols());
      matmul(w, a, y);
      for (Index t = 0; t < x.cols(); ++t) {
        if (t == 5) {
          EXPECT_TRUE(y.col(t).array().isNaN().all());
          continue;
        }
        EXPECT_EQ(bits(y.col(t)), bits(naive_static(q, w, x.col(t), scales, group))) << k << " token " << t;
        OutlierActivations alone;
        alone.assign_static(x.col(t), scales.data(), scales.size(), group);
        MatrixXf one(37, 1);
        matmul(w, alone, one);
        EXPECT_EQ(bits(one), bits(y.col(t))) << "token " << t;
      }
      MatrixXf threaded(37, x.cols());
      MatmulOptions run;
      run.pool = &pool;
      matmul(w, a, threaded, run);
      EXPECT_EQ(bits(threaded), bits(y));
    }
  OutlierActivations a;
  const MatrixXf x = MatrixXf::Ones(32, 1);
  const float bad[2] = {1.0F, 0.0F}, good[2] = {1.0F, 1.0F};
  EXPECT_THROW(a.assign_static(x, bad, 2, 16), InvalidArgument);
  EXPECT_THROW(a.assign_static(x, good, 2, 0), InvalidArgument);
  EXPECT_THROW(a.assign_static(x, good, 2, 17), InvalidArgument);
  // Groups of one scale reach all: the plain codes.
  a.assign_static(x, good, 2, 16);
  EXPECT_TRUE(a.outlier_tokens().empty());
}

// Taking values out never makes the rest coarser: the error of a product falls, on scales a token and on scales a group.
TEST(Outliers, LowerTheErrorOfAProduct) {
  const QuantizedTensor q =
      random_quantized(scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_group(64)), 64, 256, 8);
  const PackedMatrix w = pack(q);
  MatrixXf x = random_floats(256, 24, 9);
  for (Index t = 0; t < x.cols(); ++t) x((7 * t) % 256, t) *= 100.0F;
  const MatrixXf exact = nibble::dequantize(q) * x;
  for (const Activations kind : {Activations::int8, Activations::int8_grouped}) {
    OutlierOptions options;
    options.activations = kind;
    nibble::QuantizedActivations plain;
    plain.assign(x, kind);
    MatrixXf y(64, x.cols());
    matmul(w, plain, y);
    EXPECT_LT((product(w, x, options) - exact).squaredNorm(), 0.5F * (y - exact).squaredNorm());
  }
}

TEST(Outliers, UnderflowingOutliersDoNotDependOnTheBatch) {
  // Products that underflow to -0, between zeros of columns that only the other token has.
  Buffer codes(3);
  for (int i = 0; i < 3; ++i) codes.mutable_data()[i] = 1;
  Buffer scale(4);
  scale.as_mutable<float>()[0] = 0x1p-149F;
  const QuantizedTensor q = QuantizedTensor::from_parts(
      scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_tensor()), {1, 3}, codes, scale);
  MatrixXf x(3, 2);
  x << -0.25F, 0.25F, 0.0F, 0.25F, 0.0F, 0.25F;
  OutlierOptions options;
  options.threshold = 0.2F;
  const PackedMatrix w = pack(q);
  EXPECT_EQ(bits(product(w, x.col(0), options)), bits(product(w, x, options).col(0)));
}

TEST(Outliers, WithoutOutliersIsThePlainProduct) {
  const QuantizedTensor q =
      random_quantized(scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)), 20, 64, 3);
  const PackedMatrix w = pack(q);
  const MatrixXf x = random_floats(64, 5, 7);
  ASSERT_LT(x.cwiseAbs().maxCoeff(), 6.0F);
  EXPECT_EQ(bits(product(w, x)), bits(w * x));
}

TEST(Outliers, APlantedColumnKeepsTheRestFine) {
  // One input 1000 times as large as the others, with weights of usual size: W8A8 drowns the others in its grid,
  // LLM.int8() has the error that it has without that column.
  const Index n = 64;
  const Index k = 128;
  const MatrixXf w = random_floats(n, k, 1);
  const QuantizedTensor q =
      nibble::DynamicQuantizer(scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)))
          .quantize(w);
  const PackedMatrix packed = pack(q);
  MatrixXf x = random_floats(k, 16, 2);
  x.row(77) *= 1000.0F;
  const MatrixXf exact = nibble::dequantize(q) * x;
  const double plain = static_cast<double>((packed * x - exact).norm());
  OutlierActivations a;
  OutlierOptions options;
  a.assign(x, options);
  const double divided = static_cast<double>((product(packed, x) - exact).norm());
  // Steps of the grids: absmax / 127 of about 2000 and of about 3.
  EXPECT_LT(divided, plain / 100.0);
  EXPECT_GE(a.columns().size(), 1U);
  EXPECT_EQ(a.outlier_tokens().size(), 16U);
}

TEST(Outliers, KeptColumnsAreMultipliedInSixteenBits) {
  const Index n = 37;
  const Index k = 100;
  const MatrixXf w = random_floats(n, k, 1);
  const QuantizedTensor q =
      nibble::DynamicQuantizer(scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_group(32)))
          .quantize(w);
  const std::vector<Index> columns = {2, 8, 9, 99};
  MatrixXf values(n, 4);
  std::vector<Eigen::VectorXf> kept(static_cast<std::size_t>(k));
  for (Index i = 0; i < 4; ++i) {
    const Index column = columns[static_cast<std::size_t>(i)];
    values.col(i) = w.col(column);
    kept[static_cast<std::size_t>(column)] =
        w.col(column).unaryExpr([](float v) { return nibble::float_from_fp16(nibble::fp16_from_float(v)); });
  }
  const OutlierMatrix m(pack(q), columns, values);
  EXPECT_EQ(m.byte_size(), pack(q).byte_size() + 4U * 37U * 2U);
  const MatrixXf x = with_outliers(k, 6, 9);
  OutlierOptions options;
  options.columns = m.columns();
  OutlierActivations a;
  a.assign(x, options);
  MatrixXf y(n, 6);
  matmul(m, a, y);
  for (Index t = 0; t < 6; ++t)
    EXPECT_EQ(bits(y.col(t)), bits(naive_token(q, m.weights().group_size(), x.col(t), options, kept))) << t;
}

TEST(Outliers, EpilogueRunsOnTheWholeSum) {
  const QuantizedTensor q =
      random_quantized(scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)), 40, 64, 3);
  const PackedMatrix w = pack(q);
  const MatrixXf x = with_outliers(64, 21, 5);
  const MatrixXf plain = product(w, x);
  const MatrixXf residual = random_floats(40, 21, 6);
  const Eigen::VectorXf bias = random_floats(40, 1, 7);
  const MatrixXf expected = ((plain.colwise() + bias) + residual).cwiseMax(0.0F);
  ThreadPool pool(2);
  OutlierActivations a;
  a.assign(x);
  for (ThreadPool* threads : {static_cast<ThreadPool*>(nullptr), &pool}) {
    MatrixXf y = residual;
    MatmulOptions options;
    options.pool = threads;
    options.epilogue.bias(bias).add(y).relu();  // adds to y in place
    matmul(w, a, y, options);
    EXPECT_EQ(bits(y), bits(expected));
  }
  // Into a block of a larger matrix, whose other rows stay.
  MatrixXf large = MatrixXf::Constant(50, 21, 7.0F);
  matmul(w, a, large.middleRows(3, 40));
  EXPECT_EQ(bits(large.middleRows(3, 40)), bits(plain));
  EXPECT_TRUE((large.topRows(3).array() == 7.0F).all() && (large.bottomRows(7).array() == 7.0F).all());
}

TEST(Outliers, ATokenThatIsNotFiniteIsNaNAlone) {
  const QuantizedTensor q =
      random_quantized(scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)), 20, 64, 3);
  const PackedMatrix w = pack(q);
  MatrixXf x = with_outliers(64, 5, 5);
  const MatrixXf before = product(w, x);
  x(7, 1) = std::numeric_limits<float>::infinity();
  x(8, 3) = std::numeric_limits<float>::quiet_NaN();
  const MatrixXf y = product(w, x);
  for (const Index t : {Index{0}, Index{2}, Index{4}}) EXPECT_EQ(bits(y.col(t)), bits(before.col(t)));
  for (const Index t : {Index{1}, Index{3}}) EXPECT_TRUE(y.col(t).array().isNaN().all());
}

TEST(Outliers, TheShareIsCounted) {
  MatrixXf x = MatrixXf::Ones(10, 8);
  x.row(4).setConstant(-9.0F);
  x(6, 2) = 6.0F;
  x(6, 3) = 5.99F;
  OutlierActivations a;
  a.assign(x);
  EXPECT_EQ(a.columns(), (std::vector<Index>{4, 6}));
  EXPECT_EQ(a.column_counts(), (std::vector<std::size_t>{8, 1}));
  EXPECT_DOUBLE_EQ(a.share().column_share(), 0.2);
  EXPECT_DOUBLE_EQ(a.share().value_share(), 9.0 / 80.0);

  OutlierStatistics one;
  one.add(a);
  OutlierStatistics parts;
  for (const Index t : {0, 1, 2, 3}) {
    OutlierActivations part;
    part.assign(x.middleCols(2 * t, 2));
    parts.add(part);
  }
  EXPECT_EQ(parts.share().values, 9U);
  EXPECT_EQ(parts.share().columns, one.share().columns);
  EXPECT_EQ(parts.columns(), (std::vector<Index>{4, 6}));
  EXPECT_EQ(parts.columns(0.5), (std::vector<Index>{4}));
  EXPECT_EQ(OutlierStatistics().share().value_share(), 0.0);
  OutlierActivations other;
  other.assign(MatrixXf::Ones(3, 1));
  EXPECT_THROW(parts.add(other), InvalidArgument);
}

TEST(Outliers, EmptyShapes) {
  const PackedMatrix w =
      pack(random_quantized(scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)), 4, 64, 3));
  EXPECT_EQ(product(w, MatrixXf(64, 0)).cols(), 0);
  OutlierActivations a;
  EXPECT_EQ(a.share().value_share(), 0.0);
}

TEST(Outliers, BadInputsAreNamed) {
  const PackedMatrix w =
      pack(random_quantized(scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)), 4, 64, 3));
  const MatrixXf x = with_outliers(64, 4, 1);
  OutlierOptions options;
  OutlierActivations a;
  for (const float threshold : {0.0F, -1.0F, std::nanf("")}) {
    options.threshold = threshold;
    EXPECT_THROW(a.assign(x, options), InvalidArgument);
  }
  options.threshold = 6.0F;
  for (const std::vector<Index>& columns : {std::vector<Index>{64}, {-1}, {3, 3}, {4, 2}}) {
    options.columns = columns;
    EXPECT_THROW(a.assign(x, options), InvalidArgument);
  }
  a.assign(x);
  MatrixXf y(4, 4);
  MatrixXf wrong(5, 4);
  EXPECT_THROW(matmul(w, a, wrong), InvalidArgument);
  OutlierActivations narrow;
  narrow.assign(with_outliers(32, 4, 1));
  EXPECT_THROW(matmul(w, narrow, y), InvalidArgument);
  EXPECT_THROW(matmul(nibble::pack(random_floats(4, 64, 1)), a, y), InvalidArgument);
  EXPECT_THROW(OutlierMatrix(w, {1, 2}, MatrixXf::Zero(4, 1)), InvalidArgument);
  EXPECT_THROW(OutlierMatrix(w, {64}, MatrixXf::Zero(4, 1)), InvalidArgument);
  EXPECT_THROW(OutlierMatrix(w, {2, 1}, MatrixXf::Zero(4, 2)), InvalidArgument);
  EXPECT_THROW(OutlierMatrix(w, {1}, MatrixXf::Constant(4, 1, 1e6F)), InvalidArgument);
}

}  // namespace
