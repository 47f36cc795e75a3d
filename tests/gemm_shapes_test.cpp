// Products over every small shape: all ISAs against the scalar one, bit for bit, and that one against the definition.
#include <gtest/gtest.h>

#include <vector>

#include "fp_modes.hpp"
#include "gemm_support.hpp"
#include "nibble/gemm/matmul.hpp"

namespace {

using namespace gemm_test;
using Eigen::Index;
using Eigen::MatrixXf;
using nibble::Activations;
using nibble::Isa;
using nibble::MatmulOptions;
using nibble::PackedMatrix;

MatrixXf product(const PackedMatrix& w, const MatrixXf& x, Isa isa, Activations activations) {
  MatmulOptions options;
  options.isa = isa;
  options.activations = activations;
  MatrixXf y(w.rows(), x.cols());
  nibble::matmul(w, x, y, options);
  return y;
}

/// One shape of one scheme, with the activations that it can have.
void check(const Scheme& scheme, std::size_t n, std::size_t k, Index m, unsigned seed) {
  const PackedMatrix w = pack(random_quantized(scheme, n, k, seed));
  const MatrixXf x = random_floats(static_cast<Index>(k), m, seed + 1);
  std::vector<Activations> kinds = {Activations::fp32};
  if (nibble::is_integer(scheme.format)) kinds = {Activations::int8, Activations::int8_grouped};
  if (scheme.format == Format::bf16) kinds.push_back(Activations::bf16);
  for (Activations kind : kinds) {
    const MatrixXf expected = product(w, x, Isa::scalar, kind);
    for (Isa isa : available_isas())
      ASSERT_EQ(bits(product(w, x, isa, kind)), bits(expected))
          << name_of(isa) << " " << name_of(scheme.format) << " n " << n << " k " << k << " m " << m;
  }
}

std::vector<Scheme> schemes() {
  return {scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)),
          scheme_of(Format::int4, Symmetry::symmetric, Granularity::per_group(32), ScaleType::fp16),
          scheme_of(Format::int4, Symmetry::asymmetric, Granularity::per_group(16)),
          scheme_of(Format::int3, Symmetry::asymmetric, Granularity::per_group(64), ScaleType::fp16),
          scheme_of(Format::int6, Symmetry::symmetric, Granularity::per_channel(0)),
          scheme_of(Format::fp16, Symmetry::symmetric, Granularity::per_tensor()),
          scheme_of(Format::bf16, Symmetry::symmetric, Granularity::per_tensor())};
}

TEST(Shapes, TheCubeOfOneToFifteen) {
  unsigned seed = 0;
  for (std::size_t n = 1; n <= 15; ++n)
    for (std::size_t k = 1; k <= 15; ++k)
      for (Index m = 1; m <= 15; ++m) {
        ++seed;
        check(schemes()[seed % 5], n, k, m, seed);
        if (HasFatalFailure()) return;
      }
}

TEST(Shapes, ChannelsByInputsOneToNinetyFive) {
  unsigned seed = 0;
  for (std::size_t n = 1; n <= 95; ++n)
    for (std::size_t k = 1; k <= 95; ++k) {
      ++seed;
      // 11 and 4 have no common divisor: every scheme meets every m.
      constexpr Index tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17};
      check(schemes()[seed % 5], n, k, tokens[seed % 11], seed);
      if (HasFatalFailure()) return;
    }
}

TEST(Shapes, PrimesBeyond) {
  unsigned seed = 0;
  for (std::size_t n : {97U, 131U, 257U})
    for (std::size_t k : {101U, 509U, 1031U})
      for (Index m : {1, 5, 67})
        for (const Scheme& scheme : schemes()) {
          check(scheme, n, k, m, ++seed);
          if (HasFatalFailure()) return;
        }
}

TEST(Shapes, EveryZeroPoint) {
  for (Format format : {Format::int4, Format::int8, Format::int2, Format::int3, Format::int5, Format::int6}) {
    const Scheme scheme = scheme_of(format, Symmetry::asymmetric, Granularity::per_channel(0));
    const int lowest = nibble::detail::code_range(scheme).min;
    const int highest = nibble::detail::code_range(scheme).max;
    const auto n = static_cast<std::size_t>(highest - lowest + 1);
    const QuantizedTensor drawn = random_quantized(scheme, n, 50, 3);
    Buffer zeros(n);
    for (std::size_t i = 0; i < n; ++i)
      zeros.mutable_data()[i] = static_cast<std::uint8_t>(lowest + static_cast<int>(i));
    const QuantizedTensor q =
        QuantizedTensor::from_parts(drawn.scheme(), drawn.shape(), drawn.codes(), drawn.scales(), zeros);
    const PackedMatrix w = pack(q);
    for (Index m : {1, 6}) {
      const MatrixXf x = random_floats(50, m, 5);
      const MatrixXf expected = product(w, x, Isa::scalar, Activations::int8);
      for (Isa isa : available_isas()) EXPECT_EQ(bits(product(w, x, isa, Activations::int8)), bits(expected));
      // Codes less their zero points are small integers, so the float product of the same codes is exact but for scales.
      const MatrixXf floats = product(w, x, Isa::scalar, Activations::fp32);
      EXPECT_LT((floats - expected).norm(), 0.02F * floats.norm());
    }
  }
}

TEST(Shapes, StridedColumnsLeaveTheirPaddingAlone) {
  const PackedMatrix w = pack(random_quantized(schemes()[1], 37, 75, 1));
  MatrixXf x_big = random_floats(80, 9, 2);
  MatrixXf y_big = MatrixXf::Constant(41, 9, 7.0F);
  const MatrixXf expected = w * x_big.topRows(75);
  for (Isa isa : available_isas()) {
    MatmulOptions options;
    options.isa = isa;
    y_big.setConstant(7.0F);
    nibble::matmul(w, x_big.topRows(75), y_big.middleRows(2, 37), options);
    EXPECT_EQ(bits(y_big.middleRows(2, 37)), bits(expected));
    EXPECT_TRUE((y_big.topRows(2).array() == 7.0F).all());
    EXPECT_TRUE((y_big.bottomRows(2).array() == 7.0F).all());
  }
}

#if NIBBLE_TEST_FP_MODES
TEST(Shapes, TheCallersRoundingModeDoesNotMatter) {
  nibble::ThreadPool pool(2);
  for (const Scheme& scheme : schemes()) {
    const PackedMatrix w = pack(random_quantized(scheme, 40, 75, 1));
    MatrixXf x = random_floats(75, 9, 2);
    x.col(3) *= 1e-39F;  // subnormals
    const MatrixXf expected = w * x;
    for (Isa isa : available_isas()) {
      MatmulOptions options;
      options.isa = isa;
      options.pool = &pool;
      const auto saved = fp_modes::get();
      for (const auto mode : fp_modes::hostile) {
        MatrixXf y(40, 9);
        fp_modes::set(mode);
        nibble::matmul(w, x, y, options);
        const auto after = fp_modes::get();
        fp_modes::set(saved);
        EXPECT_EQ(after, mode);
        EXPECT_EQ(bits(y), bits(expected)) << name_of(isa) << " " << name_of(scheme.format);
      }
    }
  }
}
#endif

}  // namespace
