// GGUF tensors as quantized tensors and back: nothing may change, to the bit.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "io_test_support.hpp"
#include "nibble/io/gguf_quantized.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace {

using namespace io_test;
using nibble::Format;
using nibble::GgufTensor;
using nibble::GgufType;
using nibble::Granularity;
using nibble::QuantizedTensor;
using nibble::ScaleType;
using nibble::Scheme;
using nibble::Symmetry;
using nibble::Unsupported;

std::uint32_t bits(float v) {
  std::uint32_t b;
  std::memcpy(&b, &v, sizeof b);
  return b;
}

// Where a block keeps its fp16 numbers, which must not be Inf or NaN here.
std::vector<std::size_t> halves(GgufType type) {
  switch (type) {
    case GgufType::q4_1:
    case GgufType::q5_1:
    case GgufType::q4_k:
    case GgufType::q5_k: return {0, 2};
    case GgufType::q6_k: return {208};
    case GgufType::f16: return {0};
    default: return {0};
  }
}

GgufTensor random_tensor(GgufType type, std::uint64_t k, std::uint64_t n, std::uint64_t outer = 0) {
  const nibble::GgufTypeInfo& info = *nibble::gguf_type_info(type);
  GgufTensor tensor;
  tensor.name = "t";
  tensor.type = type;
  tensor.rank = outer == 0 ? 2 : 3;
  tensor.dims = {k, n, outer == 0 ? 1 : outer, 1};
  tensor.elements = k * n * tensor.dims[2];
  nibble::Buffer data(nibble::gguf_bytes(type, static_cast<std::size_t>(tensor.elements)));
  std::mt19937 random(static_cast<unsigned>(type) + 1);
  for (std::size_t i = 0; i < data.size(); ++i) data.mutable_data()[i] = static_cast<std::uint8_t>(random());
  // Clearing one exponent bit makes every fp16 finite; they stay of both signs, subnormals included.
  if (info.block_elements > 1)
    for (std::size_t b = 0; b < data.size(); b += info.block_bytes)
      for (const std::size_t at : halves(type)) data.mutable_data()[b + at + 1] &= 0xBF;
  tensor.data = data;
  return tensor;
}

void expect_values(const QuantizedTensor& quantized, const GgufTensor& tensor) {
  const std::vector<float> expected = tensor.dequantize();
  ASSERT_EQ(quantized.size(), expected.size());
  std::vector<float> line(quantized.line_length());
  for (std::size_t l = 0; l < quantized.line_count(); ++l) {
    quantized.dequantize_line(l, 0, line.size(), line.data());
    for (std::size_t i = 0; i < line.size(); ++i) {
      const float other = expected[l * line.size() + i];
      if (std::isnan(line[i]) && std::isnan(other)) continue;
      ASSERT_EQ(bits(line[i]), bits(other)) << name_of(tensor.type) << " line " << l << " element " << i;
    }
  }
}

TEST(GgufQuantized, EveryTypeKeepsItsValues) {
  for (const GgufType type :
       {GgufType::f32, GgufType::f16, GgufType::bf16, GgufType::q4_0, GgufType::q4_1, GgufType::q5_0,
        GgufType::q5_1, GgufType::q8_0, GgufType::q4_k, GgufType::q5_k, GgufType::q6_k}) {
    const GgufTensor tensor = random_tensor(type, 512, 7);
    const QuantizedTensor quantized = to_quantized(tensor);
    EXPECT_EQ(quantized.shape(), (nibble::Shape{7, 512}));  // outputs x inputs
    EXPECT_EQ(quantized.scheme(), nibble::detail::resolve(nibble::gguf_scheme(type), quantized.shape()));
    expect_values(quantized, tensor);
    const GgufTensor cube = random_tensor(type, 256, 3, 2);
    EXPECT_EQ(to_quantized(cube).shape(), (nibble::Shape{2, 3, 256}));
    expect_values(to_quantized(cube), cube);
  }
  for (const GgufType type : {GgufType::f32, GgufType::q4_1, GgufType::q6_k}) {
    EXPECT_EQ(to_quantized(random_tensor(type, 0, 5)).shape(), (nibble::Shape{5, 0}));
    EXPECT_TRUE(to_quantized(random_tensor(type, 256, 0)).empty());
  }
  GgufTensor scalar = random_tensor(GgufType::f32, 1, 1);
  scalar.rank = 0;
  EXPECT_EQ(to_quantized(scalar).rank(), 0U);
  expect_values(to_quantized(scalar), scalar);
  // At their own size.
  EXPECT_EQ(to_quantized(random_tensor(GgufType::q5_1, 512, 7)).codes().size(), 7U * 512 * 5 / 8);
  EXPECT_EQ(to_quantized(random_tensor(GgufType::q6_k, 512, 7)).codes().size(), 7U * 512 * 6 / 8);
  expect_error<Unsupported>([] { nibble::gguf_scheme(GgufType::q2_k); }, {"Q2_K"});
  expect_error<Unsupported>([] { nibble::gguf_scheme(GgufType{99}); }, {"99"});
}

TEST(GgufQuantized, WritableTypesComeBackByteByByte) {
  for (const GgufType type :
       {GgufType::f32, GgufType::f16, GgufType::bf16, GgufType::q4_0, GgufType::q4_1, GgufType::q8_0}) {
    const GgufTensor tensor = random_tensor(type, 96, 5);
    const QuantizedTensor quantized = to_quantized(tensor);
    EXPECT_EQ(nibble::gguf_type_for(quantized), type) << name_of(type);
    const nibble::Buffer back = to_gguf(quantized, type);
    ASSERT_EQ(back.size(), tensor.data.size());
    EXPECT_EQ(std::memcmp(back.data(), tensor.data.data(), back.size()), 0) << name_of(type);
  }
}

// Q5 and K-quants are read but not written: what holds them exactly is named, and does hold them.
TEST(GgufQuantized, ReadOnlyTypesFindAWritableOne) {
  const std::vector<std::pair<GgufType, GgufType>> cases = {{GgufType::q5_0, GgufType::q8_0},
                                                            {GgufType::q5_1, GgufType::f32},
                                                            {GgufType::q4_k, GgufType::f32},
                                                            {GgufType::q6_k, GgufType::f32}};
  for (const auto& [from, to] : cases) {
    GgufTensor tensor = random_tensor(from, 256, 3);
    const QuantizedTensor quantized = to_quantized(tensor);
    EXPECT_EQ(nibble::gguf_type_for(quantized), to) << name_of(from);
    GgufTensor written = tensor;
    written.type = to;
    written.data = to_gguf(quantized, to);
    expect_values(quantized, written);
  }
}

TEST(GgufQuantized, ScalesThatAreNotFiniteAreRefused) {
  GgufTensor tensor = random_tensor(GgufType::q4_1, 64, 2);
  nibble::Buffer bad(tensor.data.size());
  for (const std::size_t at : {std::size_t{41}, std::size_t{43}}) {  // block 2: scale, minimum
    std::memcpy(bad.mutable_data(), tensor.data.data(), bad.size());
    bad.mutable_data()[at] = 0x7C;
    tensor.data = bad;
    expect_error<nibble::FormatError>([&] { to_quantized(tensor); }, {"'t'", "block 2"});
    tensor = random_tensor(GgufType::q4_1, 64, 2);
  }
}

// A tensor with given codes and scales. int4: codes are 0..15; int8: -128..127.
QuantizedTensor make(Scheme scheme, std::size_t n, std::size_t k, const std::vector<int>& codes,
                     const std::vector<float>& scales, const std::vector<int>& zeros = {}) {
  const bool four = scheme.format == Format::int4 || scheme.format == Format::nf4;
  nibble::Buffer code_bytes(four ? n * ((k + 1) / 2) : n * k);
  for (std::size_t r = 0; r < n; ++r)
    for (std::size_t c = 0; c < k; ++c) {
      const int code = codes[(r * k + c) % codes.size()];
      if (four)
        code_bytes.mutable_data()[r * ((k + 1) / 2) + c / 2] |= static_cast<std::uint8_t>(code << (c % 2 * 4));
      else
        code_bytes.mutable_data()[r * k + c] = static_cast<std::uint8_t>(code);
    }
  const std::size_t params =
      nibble::detail::ParamLayout(nibble::detail::resolve(scheme, {n, k}).granularity, {n, k}).count();
  nibble::Buffer scale_bytes(params * bytes_of(scheme.scale_type));
  for (std::size_t p = 0; p < params; ++p) {
    const float s = scales[p % scales.size()];
    if (scheme.scale_type == ScaleType::fp32)
      nibble::detail::store_unaligned(scale_bytes.mutable_data() + 4 * p, s);
    else
      nibble::detail::store_unaligned(scale_bytes.mutable_data() + 2 * p, scheme.scale_type == ScaleType::fp16
                                                                              ? nibble::fp16_from_float(s)
                                                                              : nibble::bf16_from_float(s));
  }
  nibble::Buffer zero_bytes(scheme.symmetry == Symmetry::asymmetric ? params : 0);
  for (std::size_t p = 0; p < zero_bytes.size(); ++p)
    zero_bytes.mutable_data()[p] = static_cast<std::uint8_t>(zeros[p % zeros.size()]);
  return QuantizedTensor::from_parts(scheme, {n, k}, code_bytes, scale_bytes, zero_bytes);
}

void expect_exact(const QuantizedTensor& t, GgufType type) {
  EXPECT_EQ(nibble::gguf_type_for(t), type);
  GgufTensor written;
  written.name = "t";
  written.type = type;
  written.rank = 2;
  written.dims = {t.shape()[1], t.shape()[0], 1, 1};
  written.elements = t.size();
  written.data = to_gguf(t, type);
  expect_values(t, written);
}

TEST(GgufQuantized, SchemesThatAreNotGgufsOwnAreExactOrRefused) {
  const std::vector<int> nibbles = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 3};
  const std::vector<int> octets = {-128, -1, 0, 1, 127, 55, -77};
  const std::vector<float> good = {0.5F, -0.25F, 0.0996704102F};  // all fp16
  const std::vector<float> odd = {0.1F};
  const auto int4 = [](Symmetry s, Granularity g, ScaleType t) { return Scheme{Format::int4, s, g, t, false}; };
  const auto int8 = [](Symmetry s, Granularity g, ScaleType t) { return Scheme{Format::int8, s, g, t, false}; };
  using G = Granularity;
  // One scale may serve several blocks: groups of 64, a row, the tensor.
  for (const G g : {G::per_group(32), G::per_group(64), G::per_group(1024), G::per_channel(0), G::per_tensor()}) {
    for (const ScaleType t : {ScaleType::fp16, ScaleType::fp32}) {
      expect_exact(make(int4(Symmetry::symmetric, g, t), 3, 96, nibbles, good), GgufType::q4_0);
      expect_exact(make(int8(Symmetry::symmetric, g, t), 3, 96, octets, good), GgufType::q8_0);
      // One scale with the zero point 0 is a Q4_1 of offset 0; 0.0996704102 * 7 is no fp16 number.
      expect_exact(make(int4(Symmetry::asymmetric, g, t), 3, 96, nibbles, good, {0, 15, 7}),
                   g == G::per_tensor() ? GgufType::q4_1 : GgufType::q8_0);
      expect_exact(make(int4(Symmetry::asymmetric, g, t), 3, 96, nibbles, good, {8}), GgufType::q4_0);
      expect_exact(make(int8(Symmetry::asymmetric, g, t), 3, 96, {0, 50, 100}, good, {20}), GgufType::q8_0);
      expect_exact(make(int8(Symmetry::asymmetric, g, t), 3, 96, octets, good, {-3}), GgufType::f32);
    }
  }
  expect_exact(make(int4(Symmetry::symmetric, G::per_group(32), ScaleType::bf16), 3, 96, nibbles, {0.5F}),
               GgufType::q4_0);
  expect_exact(make(int4(Symmetry::symmetric, G::per_group(32), ScaleType::fp32), 3, 96, nibbles, odd),
               GgufType::f32);
  expect_exact(make(int4(Symmetry::symmetric, G::per_group(48), ScaleType::fp16), 3, 96, nibbles, good),
               GgufType::f32);
  expect_exact(make(int4(Symmetry::symmetric, G::per_channel(1), ScaleType::fp16), 3, 96, nibbles, good),
               GgufType::f32);
  expect_exact(make(int4(Symmetry::symmetric, G::per_group(16, 0), ScaleType::fp16), 32, 32, nibbles, good),
               GgufType::f32);
  expect_exact(make(int4(Symmetry::symmetric, G::per_group(32), ScaleType::fp16), 3, 44, nibbles, good),
               GgufType::f32);
  expect_exact(
      make({Format::nf4, Symmetry::symmetric, G::per_group(64), ScaleType::fp16, false}, 3, 64, nibbles, good),
      GgufType::f32);

  // Fewer bits: what their codes fit into.
  const auto fewer = [&](Format f, Symmetry s) {
    nibble::Scheme scheme{f, s, G::per_group(32), ScaleType::fp16, false};
    const Eigen::MatrixXf w = Eigen::MatrixXf::Random(3, 96);
    return nibble::DynamicQuantizer(scheme).quantize(w);
  };
  for (const Format f : {Format::int2, Format::int3}) {
    expect_exact(fewer(f, Symmetry::symmetric), GgufType::q4_0);
    expect_exact(fewer(f, Symmetry::asymmetric), GgufType::q4_0);
    expect_exact(fewer(f, Symmetry::float_offset), GgufType::q4_1);
  }
  for (const Format f : {Format::int5, Format::int6}) {
    expect_exact(fewer(f, Symmetry::symmetric), GgufType::q8_0);
    expect_exact(fewer(f, Symmetry::float_offset), GgufType::f32);
  }

  const QuantizedTensor t =
      make(int4(Symmetry::symmetric, G::per_group(32), ScaleType::fp32), 3, 96, nibbles, odd);
  expect_error<Unsupported>([&] { to_gguf(t, GgufType::q4_0); }, {"int4", "Q4_0", "scales are not fp16", "F32"});
  const QuantizedTensor a =
      make(int4(Symmetry::asymmetric, G::per_group(32), ScaleType::fp16), 3, 96, nibbles, good, {5});
  expect_error<Unsupported>([&] { to_gguf(a, GgufType::q4_1); }, {"asymmetric", "Q4_1", "Q8_0"});
  expect_error<Unsupported>([&] { to_gguf(a, GgufType::q4_0); }, {"-8..7", "Q8_0"});
  expect_error<Unsupported>([&] { to_gguf(a, GgufType::q6_k); }, {"Q6_K"});
}

TEST(GgufQuantized, TheModelComesBackWhole) {
  const char* path = std::getenv("NIBBLE_MODEL");
  if (path == nullptr || *path == '\0') GTEST_SKIP() << "NIBBLE_MODEL names no GGUF file";
  const nibble::GgufFile file = nibble::GgufFile::open(path);
  std::size_t quantized = 0;
  for (const GgufTensor& tensor : file.tensors()) {
    const nibble::GgufTypeInfo* info = nibble::gguf_type_info(tensor.type);
    if (info == nullptr || !info->encodes) continue;
    const nibble::Buffer back = to_gguf(to_quantized(tensor), tensor.type);
    ASSERT_EQ(back.size(), tensor.data.size());
    ASSERT_EQ(std::memcmp(back.data(), tensor.data.data(), back.size()), 0) << tensor.name;
    ++quantized;
  }
  EXPECT_GT(quantized, 0U);
}

}  // namespace
