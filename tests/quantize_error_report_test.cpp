// Error reports: figures by hand, per channel along any axis, and as text.
#include <gtest/gtest.h>

#include <sstream>

#include "nibble/quantize/error_report.hpp"
#include "nibble/quantize/tensor.hpp"
#include "quantize_support.hpp"

namespace {

using namespace nibble_test;

TEST(ErrorStats, FiguresByHand) {
  nibble::ErrorStats s;
  s.add(3.0F, 4.0F);
  s.add(-4.0F, -4.0F);
  EXPECT_EQ(s.count(), 2U);
  EXPECT_DOUBLE_EQ(s.mse(), 0.5);
  EXPECT_DOUBLE_EQ(s.max_abs_error(), 1.0);
  EXPECT_DOUBLE_EQ(s.sqnr_db(), 10.0 * std::log10(25.0));
  EXPECT_DOUBLE_EQ(s.cosine(), 28.0 / (5.0 * std::sqrt(32.0)));
}

TEST(ErrorStats, NothingZerosAndNan) {
  nibble::ErrorStats s;
  EXPECT_EQ(s.mse(), 0.0);
  EXPECT_TRUE(std::isinf(s.sqnr_db()));
  EXPECT_EQ(s.cosine(), 1.0);
  s.add(0.0F, 0.0F);
  EXPECT_EQ(s.cosine(), 1.0);
  s.add(0.0F, 1.0F);
  EXPECT_EQ(s.cosine(), 0.0);
  s.add(std::numeric_limits<float>::quiet_NaN(), 1.0F);
  s.add(0.0F, 0.0F);
  EXPECT_TRUE(std::isnan(s.max_abs_error()));
  EXPECT_TRUE(std::isnan(s.mse()));
}

TEST(ErrorReport, EqualsANaiveSumPerChannelAndInAll) {
  const Values v = random_values({6, 5, 40}, 3);
  const nibble::QuantizedTensor q =
      quantize(v, {Format::int4, Symmetry::symmetric, Granularity::per_group(16), ScaleType::fp32, false});
  const std::vector<float> y = values_of(q);
  for (int axis = -3; axis < 3; ++axis) {
    const nibble::ErrorReport report = nibble::detail::error_report_view(view_of(v), q, axis);
    const auto a = static_cast<std::size_t>(axis < 0 ? axis + 3 : axis);
    EXPECT_EQ(report.axis, a);
    ASSERT_EQ(report.channels.size(), v.shape[a]);
    for (std::size_t c = 0; c <= v.shape[a]; ++c) {  // the last turn: the whole tensor
      const bool whole = c == v.shape[a];
      double xx = 0, yy = 0, xy = 0, ee = 0, most = 0;
      std::size_t n = 0;
      for (std::size_t i = 0; i < v.x.size(); ++i) {
        if (!whole && index_of(v.shape, i)[a] != c) continue;
        const double e = wide(y[i]) - wide(v.x[i]);
        xx += wide(v.x[i]) * wide(v.x[i]);
        yy += wide(y[i]) * wide(y[i]);
        xy += wide(v.x[i]) * wide(y[i]);
        ee += e * e;
        most = std::max(most, std::fabs(e));
        ++n;
      }
      const nibble::ErrorStats& s = whole ? report.tensor : report.channels[c];
      EXPECT_EQ(s.count(), n);
      EXPECT_EQ(s.max_abs_error(), most);
      // Sums of at most 1200 terms in another order: 1200 * 2^-53 = 1.4e-13, relative.
      EXPECT_NEAR(s.mse(), ee / static_cast<double>(n), 1e-12 * ee);
      EXPECT_NEAR(s.sqnr_db(), 10 * std::log10(xx / ee), 1e-10);
      EXPECT_NEAR(s.cosine(), xy / std::sqrt(xx * yy), 1e-12);
    }
  }
}

TEST(ErrorReport, OfMatricesAndTensorsAndItsText) {
  Eigen::MatrixXf w = Eigen::MatrixXf::Random(4, 64);
  w.row(2) *= 0.01F;  // drowns in a per-tensor scale
  const auto q = nibble::quantize<nibble::Quantizer<nibble::Int4>>(w);
  const nibble::ErrorReport report = nibble::error_report(w, q);
  EXPECT_EQ(report.worst_channel(), 2U);
  EXPECT_LE(report.tensor.max_abs_error(), 0.5 * wide(q.erased().scale(0)) * (1 + 1e-5));
  std::ostringstream text;
  text << report;
  EXPECT_NE(text.str().find("SQNR"), std::string::npos);
  EXPECT_NE(text.str().find("worst channel, 2 of axis 0"), std::string::npos);
  EXPECT_EQ(nibble::error_report(w, q, 1).channels.size(), 64U);
  EXPECT_THROW(nibble::error_report(w, q, 2), nibble::InvalidArgument);
  EXPECT_THROW(nibble::error_report(w.leftCols(3), q), nibble::InvalidArgument);

  const Eigen::Tensor<float, 3> t = Eigen::Tensor<float, 3>(3, 4, 20).setRandom();
  const auto qt = nibble::quantize<nibble::Quantizer<nibble::Bf16>>(t);
  EXPECT_EQ(nibble::error_report(t, qt, -1).channels.size(), 20U);
  // Half an ulp of 8 bits: at least 6.02 * 8 dB.
  EXPECT_GT(nibble::error_report(t, qt).tensor.sqnr_db(), 48.0);
  const Eigen::MatrixXf none(0, 3);
  EXPECT_EQ(nibble::error_report(none, nibble::quantize<nibble::Quantizer<nibble::Int8>>(none)).worst_channel(),
            0U);
}

TEST(ErrorReport, SixDecibelsABit) {
  // Uniform noise of scale / sqrt(12) against uniform values: 20 log10(2 absmax / scale) = 20 log10(254) = 48.1 dB.
  const Eigen::MatrixXf w = Eigen::MatrixXf::Random(100, 100);
  const auto q = nibble::quantize<nibble::Quantizer<nibble::Int8>>(w);
  EXPECT_NEAR(nibble::error_report(w, q).tensor.sqnr_db(), 48.1, 0.5);
}

}  // namespace
