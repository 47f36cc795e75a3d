// FP16 and BF16: every code, every midpoint and the floats around it, against values taken from the definition.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "fp_modes.hpp"
#include "nibble/formats/bf16.hpp"
#include "nibble/formats/fp16.hpp"

namespace {

struct Half {
  static constexpr int fraction_bits = 10;
  static constexpr int bias = 15;
  static constexpr unsigned infinity = 0x7C00;
  static std::uint16_t from_float(float x) { return nibble::fp16_from_float(x); }
  static std::uint16_t from_double(double x) { return nibble::fp16_from_double(x); }
  static float to_float(std::uint16_t c) { return nibble::float_from_fp16(c); }
};

struct Brain {
  static constexpr int fraction_bits = 7;
  static constexpr int bias = 127;
  static constexpr unsigned infinity = 0x7F80;
  static std::uint16_t from_float(float x) { return nibble::bf16_from_float(x); }
  static std::uint16_t from_double(double x) { return nibble::bf16_from_double(x); }
  static float to_float(std::uint16_t c) { return nibble::float_from_bf16(c); }
};

std::uint32_t bits(float x) {
  std::uint32_t b;
  std::memcpy(&b, &x, sizeof b);
  return b;
}

/// The value of a finite non-negative code by IEEE 754's definition; one code past the largest counts as 2^emax+1.
template <class F>
double value_of(unsigned code) {
  const int exponent = static_cast<int>(code >> F::fraction_bits);
  const int fraction = static_cast<int>(code & ((1U << F::fraction_bits) - 1U));
  if (exponent == 0) return std::ldexp(fraction, 1 - F::bias - F::fraction_bits);
  return std::ldexp(fraction + (1 << F::fraction_bits), exponent - F::bias - F::fraction_bits);
}

template <class F>
class Float16 : public testing::Test {};
using Formats = testing::Types<Half, Brain>;
TYPED_TEST_SUITE(Float16, Formats);

TYPED_TEST(Float16, EveryCodeHasItsValueAndComesBack) {
  for (unsigned code = 0; code < TypeParam::infinity; ++code) {
    const auto c = static_cast<std::uint16_t>(code);
    const auto negative = static_cast<std::uint16_t>(code | 0x8000U);
    const auto value = static_cast<float>(value_of<TypeParam>(code));
    ASSERT_EQ(bits(TypeParam::to_float(c)), bits(value)) << code;
    ASSERT_EQ(bits(TypeParam::to_float(negative)), bits(-value)) << code;
    ASSERT_EQ(TypeParam::from_float(value), c);
    ASSERT_EQ(TypeParam::from_float(-value), negative);
    ASSERT_EQ(TypeParam::from_double(static_cast<double>(value)), c);
    ASSERT_EQ(TypeParam::from_double(-static_cast<double>(value)), negative);
  }
}

TYPED_TEST(Float16, MidpointsGoToEvenAndTheirNeighboursToTheNearest) {
  // The last midpoint, between the largest value and 2^(emax + 1), is the overflow threshold.
  for (unsigned code = 0; code < TypeParam::infinity; ++code) {
    const double exact = (value_of<TypeParam>(code) + value_of<TypeParam>(code + 1)) / 2;
    const auto mid = static_cast<float>(exact);
    ASSERT_EQ(static_cast<double>(mid), exact);
    const unsigned even = code % 2 == 0 ? code : code + 1;
    const float inf = std::numeric_limits<float>::infinity();
    for (unsigned sign : {0U, 0x8000U}) {
      const float s = sign == 0 ? 1.0F : -1.0F;
      const double d = static_cast<double>(s);
      ASSERT_EQ(TypeParam::from_float(s * mid), sign | even) << code;
      ASSERT_EQ(TypeParam::from_float(s * std::nextafter(mid, 0.0F)), sign | code) << code;
      ASSERT_EQ(TypeParam::from_float(s * std::nextafter(mid, inf)), sign | (code + 1)) << code;
      // Doubles so close to the midpoint that rounding to float first would make ties of them.
      ASSERT_EQ(TypeParam::from_double(d * exact), sign | even) << code;
      ASSERT_EQ(TypeParam::from_double(d * std::nextafter(exact, 0.0)), sign | code) << code;
      ASSERT_EQ(TypeParam::from_double(d * std::nextafter(exact, 1e308)), sign | (code + 1)) << code;
    }
  }
}

TYPED_TEST(Float16, RandomFloatsAndDoublesGoToTheNearest) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 300000; ++i) {
    std::uint64_t word = random();
    double x;
    if (i % 2 == 0) {
      const auto half = static_cast<std::uint32_t>(word);
      float f;
      std::memcpy(&f, &half, sizeof f);
      x = static_cast<double>(f);
    } else {
      // Exponents around the format's own range: 2^-160 .. 2^160.
      word = (word & 0x800FFFFFFFFFFFFFU) | (863 + word % 320) << 52;
      std::memcpy(&x, &word, sizeof x);
    }
    if (std::isnan(x)) continue;
    const unsigned code = TypeParam::from_double(x);
    if (i % 2 == 0) {
      ASSERT_EQ(TypeParam::from_float(static_cast<float>(x)), code) << x;
    }
    const double a = std::fabs(x);
    ASSERT_EQ(code >> 15, std::signbit(x) ? 1U : 0U);
    const unsigned c = code & 0x7FFFU;
    ASSERT_LE(c, TypeParam::infinity);
    // Inside the half gaps on both sides; on their ends only where even.
    if (c > 0) {
      const double below = (value_of<TypeParam>(c - 1) + value_of<TypeParam>(c)) / 2;
      ASSERT_TRUE(a > below || (a == below && c % 2 == 0)) << x;
    }
    if (c < TypeParam::infinity) {
      const double above = (value_of<TypeParam>(c) + value_of<TypeParam>(c + 1)) / 2;
      ASSERT_TRUE(a < above || (a == above && c % 2 == 0)) << x;
    }
  }
}

TYPED_TEST(Float16, InfinityAndOverflow) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(TypeParam::from_float(inf), TypeParam::infinity);
  EXPECT_EQ(TypeParam::from_float(-inf), TypeParam::infinity | 0x8000U);
  EXPECT_EQ(TypeParam::from_float(std::numeric_limits<float>::max()), TypeParam::infinity);
  EXPECT_EQ(TypeParam::from_double(1e300), TypeParam::infinity);
  EXPECT_EQ(TypeParam::from_double(-1e300), TypeParam::infinity | 0x8000U);
  EXPECT_EQ(TypeParam::from_double(std::numeric_limits<double>::infinity()), TypeParam::infinity);
  EXPECT_EQ(TypeParam::to_float(static_cast<std::uint16_t>(TypeParam::infinity)), inf);
  EXPECT_EQ(TypeParam::to_float(static_cast<std::uint16_t>(TypeParam::infinity | 0x8000U)), -inf);
}

TYPED_TEST(Float16, NanStaysNanWithSignAndPayload) {
  for (std::uint32_t sign : {0U, 0x80000000U}) {
    for (std::uint32_t payload : {0x1U, 0x1FFFU, 0x2000U, 0x10000U, 0x3FFFFFU, 0x400000U, 0x7FFFFFU, 0x555555U}) {
      const std::uint32_t word = sign | 0x7F800000U | payload;
      float x;
      std::memcpy(&x, &word, sizeof x);
      const unsigned quiet = 1U << (TypeParam::fraction_bits - 1);
      const unsigned kept = payload >> (23 - TypeParam::fraction_bits);
      EXPECT_EQ(TypeParam::from_float(x), sign >> 16 | TypeParam::infinity | quiet | kept);
      const std::uint64_t wide = std::uint64_t{sign} << 32 | 0x7FF0000000000000U | std::uint64_t{payload} << 29;
      double d;
      std::memcpy(&d, &wide, sizeof d);
      EXPECT_EQ(TypeParam::from_double(d), sign >> 16 | TypeParam::infinity | quiet | kept);
    }
  }
  for (unsigned code = TypeParam::infinity + 1; code < 0x8000U; ++code) {
    const float x = TypeParam::to_float(static_cast<std::uint16_t>(code));
    ASSERT_TRUE(std::isnan(x));
    ASSERT_EQ(TypeParam::from_float(x), code | 1U << (TypeParam::fraction_bits - 1));
  }
}

TEST(Fp16, KnownValues) {
  EXPECT_EQ(nibble::fp16_from_float(1.0F), 0x3C00);
  EXPECT_EQ(nibble::fp16_from_float(65504.0F), 0x7BFF);
  EXPECT_EQ(nibble::fp16_from_float(65519.996F), 0x7BFF);
  EXPECT_EQ(nibble::fp16_from_float(65520.0F), 0x7C00);
  EXPECT_EQ(nibble::fp16_from_float(0x1p-24F), 0x0001);
  EXPECT_EQ(nibble::fp16_from_float(0x1p-25F), 0x0000);
  EXPECT_EQ(nibble::fp16_from_float(0x1.000002p-25F), 0x0001);
  EXPECT_EQ(nibble::fp16_from_float(-0.0F), 0x8000);
}

TEST(Bf16, KnownValues) {
  EXPECT_EQ(nibble::bf16_from_float(1.0F), 0x3F80);
  EXPECT_EQ(nibble::bf16_from_float(nibble::Bf16::max_value), 0x7F7F);
  EXPECT_EQ(nibble::bf16_from_float(0x1p-133F), 0x0001);
  EXPECT_EQ(nibble::bf16_from_float(0x1p-134F), 0x0000);
  EXPECT_EQ(nibble::bf16_from_float(-0.0F), 0x8000);
}

#if NIBBLE_TEST_FP_MODES
TYPED_TEST(Float16, TheControlWordPlaysNoPart) {
  const std::vector<double> values = {1.0 + 0x1p-11, 1.0 + 0x1p-8, 0x1p-24,  0x1.8p-25, 0x1p-133, 0x1p-140, 1e-40,
                                      65519.0,       65520.0,      -3.14159, -1e-7,     1e300,    -1e-300};
  std::vector<std::uint16_t> expected;
  for (double x : values) {
    expected.push_back(TypeParam::from_float(static_cast<float>(x)));
    expected.push_back(TypeParam::from_double(x));
  }
  std::vector<float> floats;
  for (double x : values) floats.push_back(static_cast<float>(x));
  const auto saved = fp_modes::get();
  for (const auto mode : fp_modes::hostile) {
    std::vector<std::uint16_t> actual;
    std::vector<std::uint32_t> back;
    fp_modes::set(mode);
    for (std::size_t i = 0; i < values.size(); ++i) {
      actual.push_back(TypeParam::from_float(floats[i]));
      actual.push_back(TypeParam::from_double(values[i]));
    }
    for (unsigned code = 0; code < TypeParam::infinity; code += 37)
      back.push_back(bits(TypeParam::to_float(static_cast<std::uint16_t>(code))));
    fp_modes::set(saved);
    EXPECT_EQ(actual, expected) << std::hex << mode;
    for (unsigned code = 0, i = 0; code < TypeParam::infinity; code += 37, ++i)
      ASSERT_EQ(back[i], bits(static_cast<float>(value_of<TypeParam>(code))));
  }
}
#endif

}  // namespace
