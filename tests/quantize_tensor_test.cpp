// The erased tensor: storage layout, parts from files, refusal of bad ones.
#include <gtest/gtest.h>

#include <memory>

#include "nibble/quantize/quantized_tensor.hpp"
#include "quantize_support.hpp"

namespace {

using namespace nibble_test;
using nibble::Buffer;
using nibble::QuantizedTensor;

Scheme scheme(Format f, Symmetry s, Granularity g, ScaleType t = ScaleType::fp32) { return {f, s, g, t, false}; }

template <class T>
Buffer buffer_of(const std::vector<T>& items) {
  Buffer b(items.size() * sizeof(T));
  if (!items.empty()) std::memcpy(b.mutable_data(), items.data(), b.size());
  return b;
}

template <class Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const nibble::InvalidArgument& e) {
    return e.what();
  }
  return "no error";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST(QuantizedTensor, DefaultIsEmpty) {
  const QuantizedTensor t;
  EXPECT_TRUE(t.empty());
  EXPECT_EQ(t.shape(), Shape{0});
  EXPECT_EQ(t.byte_size(), 0U);
  EXPECT_TRUE(values_of(t).empty());
}

TEST(QuantizedTensor, Int4LayoutByHand) {
  // 2 x 3 in groups of 16: each line takes two bytes and has a scale; -8 is legal on input.
  const auto t = QuantizedTensor::from_parts(scheme(Format::int4, Symmetry::symmetric, Granularity::per_group(16)),
                                             {2, 3}, buffer_of<std::uint8_t>({0x90, 0x0F, 0x87, 0xF8}),
                                             buffer_of<float>({2.0F, -0.5F}));
  EXPECT_EQ(t.line_count(), 2U);
  EXPECT_EQ(t.line_bytes(), 2U);
  EXPECT_EQ(t.param_shape(), (Shape{2, 1}));
  EXPECT_EQ(codes_of(t), (std::vector<int>{0, 9, 15, 7, 8, 8}));
  EXPECT_EQ(values_of(t), (std::vector<float>{-16, 2, 14, 0.5F, -0.0F, -0.0F}));
  EXPECT_EQ(t.zero_point(1), 8);
  EXPECT_EQ(t.byte_size(), 12U);
  float row[3];
  t.dequantize_row(1, row);
  EXPECT_EQ(row[0], 0.5F);
  EXPECT_THROW(t.dequantize_row(2, row), nibble::InvalidArgument);
}

TEST(QuantizedTensor, ParameterShapes) {
  const Shape shape = {2, 40, 3};
  struct Case {
    Granularity g;
    Shape expected;
  };
  for (const Case& c :
       {Case{Granularity::per_tensor(), {}}, Case{Granularity::per_channel(1), {40}},
        Case{Granularity::per_channel(-1), {3}}, Case{Granularity::per_group(16, 1), {2, 3, 3}},
        Case{Granularity::per_group(16), {2, 40, 1}}, Case{Granularity::per_group(16, 0), {1, 40, 3}}}) {
    const std::size_t params = count(c.expected);
    const auto t = QuantizedTensor::from_parts(scheme(Format::int8, Symmetry::asymmetric, c.g), shape, Buffer(240),
                                               Buffer(4 * params), Buffer(params));
    EXPECT_EQ(t.param_shape(), c.expected);
    EXPECT_EQ(t.param_count(), params);
    EXPECT_GE(t.scheme().granularity.axis, 0);
  }
}

TEST(QuantizedTensor, Asymmetric) {
  const auto t =
      QuantizedTensor::from_parts(scheme(Format::int8, Symmetry::asymmetric, Granularity::per_channel(0)), {2, 2},
                                  buffer_of<std::int8_t>({-128, 127, 5, -5}), buffer_of<float>({0.5F, 2.0F}),
                                  buffer_of<std::int8_t>({-128, 5}));
  EXPECT_EQ(values_of(t), (std::vector<float>{0, 127.5F, 0, -20}));
}

TEST(QuantizedTensor, FloatOffsetInHalf) {
  const auto t = QuantizedTensor::from_parts(
      scheme(Format::int4, Symmetry::float_offset, Granularity::per_group(16), ScaleType::fp16), {1, 2},
      buffer_of<std::uint8_t>({0xF0}), buffer_of<std::uint16_t>({0x3800}), buffer_of<std::uint16_t>({0xC000}));
  EXPECT_EQ(t.scale(0), 0.5F);
  EXPECT_EQ(t.offset(0), -2.0F);
  EXPECT_EQ(values_of(t), (std::vector<float>{-2, 5.5F}));
}

TEST(QuantizedTensor, BorrowedPartsAtOddAddresses) {
  const Values v = random_values({5, 71}, 1);
  for (Format f : nibble::all_formats) {
    for (Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset}) {
      if (nibble::is_codebook(f) && s != Symmetry::symmetric) continue;
      for (ScaleType type : {ScaleType::fp32, ScaleType::fp16}) {
        const QuantizedTensor q = quantize(v, scheme(f, s, Granularity::per_group(16), type));
        const auto shift = [](const Buffer& b) {
          auto bytes = std::make_shared<std::vector<std::uint8_t>>(b.size() + 1);
          if (!b.empty()) std::memcpy(bytes->data() + 1, b.data(), b.size());
          return Buffer::borrow(bytes->data() + 1, b.size(), bytes);
        };
        const auto odd = QuantizedTensor::from_parts(q.scheme(), q.shape(), shift(q.codes()), shift(q.scales()),
                                                     shift(q.zeros()));
        EXPECT_TRUE(same_bits(values_of(odd), values_of(q)));
        EXPECT_EQ(codes_of(odd), codes_of(q));
      }
    }
  }
}

TEST(QuantizedTensor, PartsOfALine) {
  const Values v = random_values({3, 1300}, 1);
  for (Format f : {Format::fp16, Format::int8, Format::int4, Format::nf4, Format::int2, Format::int3, Format::int5,
                   Format::int6}) {
    const QuantizedTensor q = quantize(v, scheme(f, Symmetry::symmetric, Granularity::per_group(48)));
    const std::vector<float> all = values_of(q);
    for (std::size_t begin : {0U, 2U, 46U, 64U, 200U, 700U}) {
      if (nibble::is_bit_stream(f) && begin % 8 != 0) continue;
      for (std::size_t end : {700U, 701U, 1299U, 1300U}) {
        std::vector<float> part(end - begin);
        q.dequantize_line(2, begin, end, part.data());
        EXPECT_TRUE(std::equal(part.begin(), part.end(), all.begin() + static_cast<std::ptrdiff_t>(2600 + begin)));
      }
    }
  }
}

TEST(QuantizedTensor, WrongSizesAreRefused) {
  const Scheme s = scheme(Format::int4, Symmetry::asymmetric, Granularity::per_group(16), ScaleType::fp16);
  // 3 x 33: 17 bytes a line, 3 groups each.
  EXPECT_NO_THROW(QuantizedTensor::from_parts(s, {3, 33}, Buffer(51), Buffer(18), Buffer(9)));
  for (std::size_t codes : {0U, 50U, 52U, 99U})
    EXPECT_TRUE(contains(error_of([&] {
                           QuantizedTensor::from_parts(s, {3, 33}, Buffer(codes), Buffer(18), Buffer(9));
                         }),
                         "codes"));
  for (std::size_t scales : {0U, 16U, 17U, 19U, 36U})
    EXPECT_TRUE(contains(error_of([&] {
                           QuantizedTensor::from_parts(s, {3, 33}, Buffer(51), Buffer(scales), Buffer(9));
                         }),
                         "scales"));
  for (std::size_t zeros : {0U, 8U, 10U, 18U})
    EXPECT_TRUE(contains(error_of([&] {
                           QuantizedTensor::from_parts(s, {3, 33}, Buffer(51), Buffer(18), Buffer(zeros));
                         }),
                         "zeros"));
  const Scheme plain = scheme(Format::fp16, Symmetry::symmetric, {});
  EXPECT_NO_THROW(QuantizedTensor::from_parts(plain, {3, 33}, Buffer(198)));
  EXPECT_THROW(QuantizedTensor::from_parts(plain, {3, 33}, Buffer(198), Buffer(4)), nibble::InvalidArgument);
}

TEST(QuantizedTensor, BadParametersAreRefused) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const Scheme s = scheme(Format::int8, Symmetry::float_offset, Granularity::per_channel(0));
  for (float bad : {nan, inf, -inf}) {
    EXPECT_TRUE(
        contains(error_of([&] {
                   QuantizedTensor::from_parts(s, {2, 2}, Buffer(4), buffer_of<float>({1, bad}), Buffer(8));
                 }),
                 "scale 1"));
    EXPECT_TRUE(
        contains(error_of([&] {
                   QuantizedTensor::from_parts(s, {2, 2}, Buffer(4), Buffer(8), buffer_of<float>({bad, 1}));
                 }),
                 "offset 0"));
  }
  EXPECT_NO_THROW(QuantizedTensor::from_parts(s, {2, 2}, Buffer(4), buffer_of<float>({-1, 0}), Buffer(8)));
  const Scheme half = scheme(Format::int8, Symmetry::symmetric, {}, ScaleType::fp16);
  EXPECT_THROW(QuantizedTensor::from_parts(half, {4}, Buffer(4), buffer_of<std::uint16_t>({0x7C00})),
               nibble::InvalidArgument);
  const Scheme four = scheme(Format::int4, Symmetry::asymmetric, {});
  for (int zero : {-128, -1, 16, 127}) {
    const std::string message = error_of([&] {
      QuantizedTensor::from_parts(four, {4}, Buffer(2), Buffer(4),
                                  buffer_of<std::int8_t>({static_cast<std::int8_t>(zero)}));
    });
    EXPECT_TRUE(contains(message, "zero point 0 is " + std::to_string(zero))) << message;
  }
}

TEST(QuantizedTensor, SizesThatOverflowAreRefusedBeforeAnythingIsAllocated) {
  const std::size_t huge = std::size_t{1} << 33;
  const std::size_t most = std::numeric_limits<std::size_t>::max();
  for (Format f : {Format::fp32, Format::int8, Format::int4}) {
    for (const Shape& shape :
         {Shape{huge, huge}, Shape{most, 2}, Shape{2, most}, Shape{most}, Shape{huge, 1, huge, 0}}) {
      EXPECT_THROW(QuantizedTensor::from_parts(scheme(f, Symmetry::symmetric, {}), shape, {}, {}),
                   nibble::InvalidArgument);
      EXPECT_THROW(
          QuantizedTensor::from_parts(scheme(f, Symmetry::symmetric, Granularity::per_group(16)), shape, {}, {}),
          nibble::InvalidArgument);
    }
  }
  EXPECT_THROW(QuantizedTensor::from_parts(scheme(Format::fp32, Symmetry::symmetric, {}), Shape(9, 1), Buffer(4)),
               nibble::InvalidArgument);
  EXPECT_NO_THROW(
      QuantizedTensor::from_parts(scheme(Format::fp32, Symmetry::symmetric, {}), Shape(8, 1), Buffer(4)));
}

TEST(QuantizedTensor, BadSchemesAreRefused) {
  const auto attempt = [](Scheme s) {
    return error_of([&] { QuantizedTensor::from_parts(s, {2, 2}, Buffer(4), Buffer(4)); });
  };
  EXPECT_TRUE(contains(attempt(scheme(static_cast<Format>(6), Symmetry::symmetric, {})), "format"));
  EXPECT_TRUE(contains(attempt(scheme(Format::int8, static_cast<Symmetry>(3), {})), "symmetry"));
  EXPECT_TRUE(
      contains(attempt(scheme(Format::int8, Symmetry::symmetric, {}, static_cast<ScaleType>(3))), "scale type"));
  EXPECT_TRUE(
      contains(attempt(scheme(Format::int8, Symmetry::symmetric, {static_cast<Granularity::Kind>(3), 0, 0})),
               "granularity"));
  EXPECT_TRUE(contains(attempt(scheme(Format::int8, Symmetry::symmetric, Granularity::per_group(15))), "15"));
  EXPECT_TRUE(contains(attempt(scheme(Format::int8, Symmetry::symmetric, Granularity::per_channel(2))), "axis 2"));
}

TEST(QuantizedTensor, SchemesComeOutCanonical) {
  const auto t = QuantizedTensor::from_parts(
      {Format::int8, Symmetry::asymmetric, Granularity::per_group(16, -1), ScaleType::fp32, true}, {2, 16},
      Buffer(32), Buffer(8), Buffer(2));
  EXPECT_EQ(t.scheme().granularity, Granularity::per_group(16, 1));
  EXPECT_FALSE(t.scheme().full_range) << "means nothing unless symmetric";
}

}  // namespace
