// Threads change no bit of what quantizing, dequantizing and unpacking give; the kernel that fits grids agrees with the
// fitter wherever it claims to.
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "kernels_lines_checks.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/quantize/quantizer.hpp"
#include "nibble/quantize/range.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace
using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

bool same(const Buffer& a, const Buffer& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

std::vector<Scheme> schemes() {
  std::vector<Scheme> all = {{Format::fp32, Symmetry::symmetric, {}, ScaleType::fp32, false},
                             {Format::fp16, Symmetry::symmetric, {}, ScaleType::fp32, false},
                             {Format::bf16, Symmetry::symmetric, {}, ScaleType::fp32, false}};
  for (const Granularity& g : {Granularity::per_tensor(), Granularity::per_channel(0), Granularity::per_channel(1),
                               Granularity::per_group(32), Granularity::per_group(64, 0)})
    for (const Format f : {Format::int8, Format::int4, Format::nf4, Format::int3, Format::int6, Format::fp4})
      for (const Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
        if (!nibble::is_codebook(f) || s == Symmetry::symmetric) all.push_back({f, s, g, ScaleType::fp16, false});
  return all;
}

TEST(QuantizeThreads, ChangeNothing) {
  ThreadPool pool(3);
  const QuantizeOptions threads{&pool};
  const Eigen::MatrixXf columns = Eigen::MatrixXf::Random(333, 171);
  const RowMajor rows = columns;
  for (const Scheme& scheme : schemes()) {
    SCOPED_TRACE(std::string(name_of(scheme.format)) + " " + std::string(name_of(scheme.symmetry)));
    const DynamicQuantizer quantizer(scheme);
    const QuantizedTensor alone = quantizer.quantize(rows);
    for (const QuantizedTensor& q : {quantizer.quantize(rows, threads), quantizer.quantize(columns, threads)}) {
      EXPECT_TRUE(same(q.codes(), alone.codes()));
      EXPECT_TRUE(same(q.scales(), alone.scales()));
      EXPECT_TRUE(same(q.zeros(), alone.zeros()));
    }
    const Eigen::MatrixXf values = dequantize(alone);
    EXPECT_EQ(dequantize(alone, threads), values);
    EXPECT_EQ(quantizer.fake_quantize(columns, threads), values);
    RowMajor into(333, 171);
    dequantize_into(alone, into, threads);
    EXPECT_EQ(into, values);
    std::vector<float> flat(alone.size());
    alone.dequantize(flat.data(), &pool);
    EXPECT_EQ(std::memcmp(flat.data(), into.data(), flat.size() * sizeof(float)), 0);
    if (scheme.granularity.axis != (scheme.granularity.kind == Granularity::Kind::per_group ? -1 : 0)) continue;
    const PackedMatrix packed = pack(alone);
    EXPECT_EQ(packed.dequantize(&pool), values);
    const QuantizedTensor back = packed.unpack(&pool);
    EXPECT_TRUE(same(back.codes(), alone.codes()));
    EXPECT_TRUE(same(back.scales(), alone.scales()));
    EXPECT_TRUE(same(back.zeros(), alone.zeros()));
  }
}

TEST(QuantizeThreads, ErrorsComeOut) {
  ThreadPool pool(3);
  RowMajor rows = RowMajor::Random(333, 171);
  rows(321, 7) = std::numeric_limits<float>::quiet_NaN();
  for (const Scheme& scheme : schemes())
    EXPECT_THROW(DynamicQuantizer(scheme).quantize(rows, QuantizeOptions{&pool}), InvalidArgument);
}

TEST(FitRanges, AgreesWithTheFitter) {
  kernels_float::Random random(5);
  constexpr std::size_t n = 20000;
  std::vector<float> lows(n);
  std::vector<float> highs(n);
  std::vector<float> scales(n);
  std::vector<float> offsets(n);
  std::vector<std::int8_t> zeros(n);
  std::vector<std::uint8_t> irregular(n);
  for (std::size_t i = 0; i < n; ++i) kernels_float::random_range(random, lows[i], highs[i]);
  for (const kernels_float::FitCase& c : kernels_float::fit_cases())
    for (const ScaleType type : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16}) {
      const Scheme scheme{
          c.format,
          c.symmetry,
          {},
          type,
          c.symmetry == Symmetry::symmetric && is_integer(c.format) && c.qmin != 1 && c.qmin != -127};
      const detail::CodeRange codes = detail::code_range(scheme);
      ASSERT_EQ(codes.min, c.qmin);
      ASSERT_EQ(codes.max, c.qmax);
      detail::FitRangesArgs a;
      a.lows = lows.data();
      a.highs = highs.data();
      a.n = n;
      a.format = c.format;
      a.symmetry = c.symmetry;
      a.scale_type = type;
      a.zero = c.zero;
      a.qmin = c.qmin;
      a.qmax = c.qmax;
      a.scales = scales.data();
      a.offsets = offsets.data();
      a.zeros = zeros.data();
      a.irregular = irregular.data();
      detail::kernels().fit_ranges(a);
      const detail::GridFitter fitter(scheme);
      std::size_t regular = 0;
      for (std::size_t i = 0; i < n; ++i) {
        if (irregular[i] != 0) continue;
        ++regular;
        const Grid g = fitter.fit({lows[i], highs[i]}, i);
        ASSERT_EQ(g.scale, scales[i]) << lows[i] << " " << highs[i] << " " << name_of(type);
        ASSERT_TRUE(c.symmetry != Symmetry::float_offset || g.offset == offsets[i]) << lows[i] << " " << highs[i];
        ASSERT_TRUE(c.symmetry != Symmetry::asymmetric || g.zero == zeros[i]) << lows[i] << " " << highs[i];
      }
      EXPECT_GT(regular, n / 2);
    }
}

}  // namespace
