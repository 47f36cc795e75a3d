// NF4's levels and nearest codes, and the packing of nibbles.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "nibble/formats/int4.hpp"
#include "nibble/formats/nf4.hpp"

namespace {

TEST(Nf4, EveryLevelIsItsOwnCode) {
  for (unsigned c = 0; c < 16; ++c) {
    EXPECT_EQ(nibble::nf4_from_float(nibble::nf4_levels[c]), c);
    EXPECT_EQ(nibble::float_from_nf4(static_cast<std::uint8_t>(c)), nibble::nf4_levels[c]);
    if (c > 0) {
      EXPECT_LT(nibble::nf4_levels[c - 1], nibble::nf4_levels[c]);
    }
  }
  EXPECT_EQ(nibble::nf4_levels[0], -1.0F);
  EXPECT_EQ(nibble::nf4_levels[7], 0.0F);
  EXPECT_EQ(nibble::nf4_levels[15], 1.0F);
}

TEST(Nf4, MidpointsSplitTheCodes) {
  for (unsigned c = 0; c + 1 < 16; ++c) {
    const double mid =
        (static_cast<double>(nibble::nf4_levels[c]) + static_cast<double>(nibble::nf4_levels[c + 1])) / 2;
    float below = static_cast<float>(mid);  // the largest float that is not above the midpoint
    if (static_cast<double>(below) > mid) below = std::nextafter(below, -2.0F);
    EXPECT_EQ(nibble::nf4_from_float(below), c) << "a tie goes to the lower code";
    EXPECT_EQ(nibble::nf4_from_float(std::nextafter(below, 2.0F)), c + 1);
  }
}

TEST(Nf4, RandomValuesGoToTheNearestLevel) {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(-1.2F, 1.2F);
  for (int i = 0; i < 100000; ++i) {
    const double x = static_cast<double>(uniform(random));
    unsigned nearest = 0;
    for (unsigned c = 1; c < 16; ++c) {
      const double distance = std::fabs(x - static_cast<double>(nibble::nf4_levels[c]));
      if (distance < std::fabs(x - static_cast<double>(nibble::nf4_levels[nearest]))) nearest = c;
    }
    ASSERT_EQ(nibble::nf4_from_float(static_cast<float>(x)), nearest) << x;
  }
}

TEST(Nf4, ValuesBeyondTheEnds) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(nibble::nf4_from_float(7.0F), 15);
  EXPECT_EQ(nibble::nf4_from_float(inf), 15);
  EXPECT_EQ(nibble::nf4_from_float(-7.0F), 0);
  EXPECT_EQ(nibble::nf4_from_float(-inf), 0);
  EXPECT_EQ(nibble::nf4_from_float(std::numeric_limits<float>::quiet_NaN()), 0);
}

TEST(Nf4, WidestHalfGap) {
  float widest = 0;
  for (int c = 0; c + 1 < 16; ++c)
    widest = std::max(widest, (nibble::nf4_levels[c + 1] - nibble::nf4_levels[c]) / 2);
  EXPECT_EQ(nibble::nf4_widest_half_gap, widest);
}

TEST(Int4, NibblesLowHalfFirstAndBack) {
  const std::uint8_t codes[5] = {1, 2, 15, 0, 9};
  std::uint8_t packed[3] = {0xFF, 0xFF, 0xFF};
  nibble::detail::pack_nibbles(codes, 5, packed);
  EXPECT_EQ(packed[0], 0x21);
  EXPECT_EQ(packed[1], 0x0F);
  EXPECT_EQ(packed[2], 0x09) << "the unused half is zero";

  std::mt19937 random(1);
  for (std::size_t n = 0; n < 70; ++n) {
    std::vector<std::uint8_t> in(n), out(n), bytes((n + 1) / 2);
    for (auto& c : in) c = static_cast<std::uint8_t>(random() % 16);
    nibble::detail::pack_nibbles(in.data(), n, bytes.data());
    nibble::detail::unpack_nibbles(bytes.data(), n, out.data());
    EXPECT_EQ(out, in);
    for (std::size_t i = 0; i < n; ++i) EXPECT_EQ(nibble::detail::nibble_at(bytes.data(), i), in[i]);
  }
}

}  // namespace
