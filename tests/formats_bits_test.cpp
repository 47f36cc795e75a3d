// Codes of 2, 3, 5 and 6 bits as a stream, FP4's levels and nearest codes, and what a format says about itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "nibble/formats/bit_stream.hpp"
#include "nibble/formats/fp4.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace {

using nibble::Format;

TEST(Formats, NumbersInFilesDoNotChange) {
  EXPECT_EQ(static_cast<int>(Format::nf4), 5);
  EXPECT_EQ(static_cast<int>(Format::int2), 6);
  EXPECT_EQ(static_cast<int>(Format::int3), 7);
  EXPECT_EQ(static_cast<int>(Format::int5), 8);
  EXPECT_EQ(static_cast<int>(Format::int6), 9);
  EXPECT_EQ(static_cast<int>(Format::fp4), 10);
  for (std::size_t i = 0; i < nibble::all_formats.size(); ++i)
    EXPECT_EQ(static_cast<std::size_t>(nibble::all_formats[i]), i);
}

TEST(Formats, NamesAndBack) {
  for (const Format f : nibble::all_formats) EXPECT_EQ(nibble::format_from_name(nibble::name_of(f)), f);
  EXPECT_EQ(nibble::name_of(Format::int3), "int3");
  EXPECT_THROW(nibble::format_from_name("int7"), nibble::InvalidArgument);
}

TEST(Formats, RangesOfCodes) {
  using nibble::Symmetry;
  const auto range = [](Format f, Symmetry s, bool full = false) {
    const nibble::detail::CodeRange r = nibble::detail::code_range({f, s, {}, nibble::ScaleType::fp32, full});
    return std::pair(r.min, r.max);
  };
  // Around zero: int2 -1..1, int3 -3..3, int5 -15..15, int6 -31..31.
  const std::pair<Format, int> halves[] = {
      {Format::int2, 2}, {Format::int3, 4}, {Format::int4, 8}, {Format::int5, 16}, {Format::int6, 32}};
  for (const auto& [format, half] : halves) {
    EXPECT_EQ(nibble::symmetric_zero_of(format), half);
    EXPECT_EQ(range(format, Symmetry::symmetric), std::pair(1, 2 * half - 1));
    EXPECT_EQ(range(format, Symmetry::symmetric, true), std::pair(0, 2 * half - 1));
    EXPECT_EQ(range(format, Symmetry::asymmetric), std::pair(0, 2 * half - 1));
    EXPECT_EQ(range(format, Symmetry::float_offset), std::pair(0, 2 * half - 1));
  }
  EXPECT_EQ(range(Format::int8, Symmetry::symmetric), std::pair(-127, 127));
  EXPECT_EQ(range(Format::int8, Symmetry::symmetric, true), std::pair(-128, 127));
  EXPECT_EQ(range(Format::fp4, Symmetry::symmetric), std::pair(0, 15));
  EXPECT_EQ(range(Format::nf4, Symmetry::symmetric), std::pair(0, 15));
  EXPECT_EQ(range(Format::fp16, Symmetry::symmetric), std::pair(0, 0));
}

TEST(Int2, SymmetricHasThreeValuesOrFour) {
  Eigen::MatrixXf w(1, 6);
  w << -4.0F, -1.9F, 0.0F, 1.9F, 2.1F, 3.0F;
  const Eigen::MatrixXf three = nibble::dequantize(nibble::quantize<nibble::Quantizer<nibble::Int2>>(w));
  // scale = absmax: +-4 and 0; half of it rounds to zero.
  EXPECT_EQ(three, (Eigen::MatrixXf(1, 6) << -4.0F, 0.0F, 0.0F, 0.0F, 4.0F, 4.0F).finished());
  using Full = nibble::Quantizer<nibble::Int2, nibble::SymmetricFull>;
  const Eigen::MatrixXf four = nibble::dequantize(nibble::quantize<Full>(w));
  // scale = max(4 / 2, 3 / 1) = 3: -6, -3, 0, 3.
  EXPECT_EQ(four, (Eigen::MatrixXf(1, 6) << -3.0F, -3.0F, 0.0F, 3.0F, 3.0F, 3.0F).finished());
  w(0, 5) = 2.0F;
  w(0, 4) = 2.0F;
  // scale = 2: -4, -2, 0, 2.
  EXPECT_EQ(nibble::dequantize(nibble::quantize<Full>(w)),
            (Eigen::MatrixXf(1, 6) << -4.0F, -2.0F, 0.0F, 2.0F, 2.0F, 2.0F).finished());
}

TEST(BitStream, LittleEndianAndBack) {
  // Codes 1, 2, 3, 4, 5 of 3 bits: 001 010 011 100 101 from the lowest bit up.
  const std::uint8_t codes[5] = {1, 2, 3, 4, 5};
  std::uint8_t line[2] = {0xFF, 0xFF};
  nibble::detail::pack_bits(3, codes, 5, line);
  EXPECT_EQ(line[0], 0b11'010'001);
  EXPECT_EQ(line[1], 0b0'101'100'0) << "the bit beyond the last code is zero";

  std::mt19937 random(1);
  for (const unsigned bits : {2U, 3U, 5U, 6U})
    for (std::size_t n = 0; n < 70; ++n) {
      std::vector<std::uint8_t> in(n), out(n), bytes((n * bits + 7) / 8 + 1, 0xAA), expected(bytes.size(), 0);
      for (auto& c : in) c = static_cast<std::uint8_t>(random() % (1U << bits));
      for (std::size_t i = 0; i < n * bits; ++i)
        if ((in[i / bits] >> (i % bits) & 1) != 0)
          expected[i / 8] = static_cast<std::uint8_t>(expected[i / 8] | 1 << (i % 8));
      expected.back() = 0xAA;  // not touched
      nibble::detail::pack_bits(bits, in.data(), n, bytes.data());
      ASSERT_EQ(bytes, expected) << bits << " bits, " << n;
      nibble::detail::unpack_bits(bits, bytes.data(), n, out.data());
      ASSERT_EQ(out, in);
      for (std::size_t i = 0; i < n; ++i) ASSERT_EQ(nibble::detail::bits_at(bits, bytes.data(), i), in[i]);
    }
}

TEST(Fp4, LevelsAreThoseOfBitsandbytes) {
  // Sign, then what its tree of bits gives.
  const float magnitudes[8] = {0.0F, 5.208333333e-03F, 0.66666667F, 1.0F, 0.33333333F, 0.5F, 0.16666667F, 0.25F};
  for (unsigned c = 0; c < 16; ++c) {
    const float value = nibble::float_from_fp4(nibble::fp4_from_bitsandbytes[c]);
    EXPECT_EQ(value, c < 8 ? magnitudes[c] : -magnitudes[c - 8]);
    EXPECT_EQ(std::signbit(value), c >= 8);
  }
  for (unsigned c = 1; c < 16; ++c) EXPECT_LE(nibble::fp4_levels[c - 1], nibble::fp4_levels[c]);
}

TEST(Fp4, NearestLevelTiesDownZeroBySign) {
  const float inf = std::numeric_limits<float>::infinity();
  const float tiny = std::numeric_limits<float>::denorm_min();
  for (unsigned c = 0; c + 1 < 16; ++c) {
    if (c == 7) continue;
    const double mid =
        (static_cast<double>(nibble::fp4_levels[c]) + static_cast<double>(nibble::fp4_levels[c + 1])) / 2;
    float below = static_cast<float>(mid);  // the largest float that is not above the midpoint
    if (static_cast<double>(below) > mid) below = std::nextafter(below, -2.0F);
    EXPECT_EQ(nibble::fp4_from_float(below), c) << "a tie goes to the lower code";
    EXPECT_EQ(nibble::fp4_from_float(std::nextafter(below, 2.0F)), c + 1);
  }
  EXPECT_EQ(nibble::fp4_from_float(0.0F), 8);
  EXPECT_EQ(nibble::fp4_from_float(-0.0F), 8);
  EXPECT_EQ(nibble::fp4_from_float(-tiny), 7);
  EXPECT_EQ(nibble::fp4_from_float(tiny), 8);
  for (unsigned c = 0; c < 16; ++c)
    if (c != 7) {
      EXPECT_EQ(nibble::fp4_from_float(nibble::fp4_levels[c]), c);
    }
  EXPECT_EQ(nibble::fp4_from_float(inf), 15);
  EXPECT_EQ(nibble::fp4_from_float(-inf), 0);
  EXPECT_EQ(nibble::fp4_from_float(std::numeric_limits<float>::quiet_NaN()), 0);
  float widest = 0;
  for (int c = 0; c + 1 < 16; ++c)
    widest = std::max(widest, (nibble::fp4_levels[c + 1] - nibble::fp4_levels[c]) / 2);
  EXPECT_EQ(nibble::fp4_widest_half_gap, widest);
}

}  // namespace
