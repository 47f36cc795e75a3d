// GGUF against the PyPI package gguf, bit for bit: its encoders and decoders, its reader and its writer.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "io_test_support.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/io/gguf.hpp"

namespace {

using namespace io_test;
using nibble::GgufType;

std::uint32_t bits(float v) {
  std::uint32_t b;
  std::memcpy(&b, &v, sizeof b);
  return b;
}

// Equal bits; of a NaN only that it is one (its payload differs between NumPy's builds).
void expect_same(const std::vector<float>& ours, const std::vector<float>& theirs, const std::string& what) {
  ASSERT_EQ(ours.size(), theirs.size()) << what;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    if (std::isnan(ours[i]) && std::isnan(theirs[i])) continue;
    ASSERT_EQ(bits(ours[i]), bits(theirs[i])) << what << " element " << i << ": " << ours[i] << ", " << theirs[i];
  }
}

const std::map<std::string, GgufType> decoded_types = {
    {"F32", GgufType::f32},   {"F16", GgufType::f16},   {"BF16", GgufType::bf16}, {"Q4_0", GgufType::q4_0},
    {"Q4_1", GgufType::q4_1}, {"Q5_0", GgufType::q5_0}, {"Q5_1", GgufType::q5_1}, {"Q8_0", GgufType::q8_0},
    {"Q4_K", GgufType::q4_k}, {"Q5_K", GgufType::q5_k}, {"Q6_K", GgufType::q6_k}};

TEST(GgufGolden, BlocksDecodeAndEncodeAsThePythonPackage) {
  NIBBLE_SKIP_WITHOUT_GGUF_PYTHON(python);
  const TempFolder folder;
  int status = 0;
  run(python + " " + golden_script() + " blocks '" + folder.path() + "'", status);
  ASSERT_EQ(status, 0);

  for (const auto& [name, type] : decoded_types) {
    const Bytes raw = read_file(folder.file(name + ".raw"));
    const auto golden = read_values<float>(folder.file(name + ".decoded"));
    ASSERT_EQ(nibble::gguf_bytes(type, golden.size()), raw.size()) << name;
    std::vector<float> ours(golden.size());
    nibble::gguf_dequantize(type, raw.data(), ours.size(), ours.data());
    expect_same(ours, golden, name);
  }

  const auto input = read_values<float>(folder.file("input.f32"));
  const auto wide = read_values<float>(folder.file("wide.f32"));
  ASSERT_GT(input.size(), 100000U);
  for (const std::string name : {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"}) {
    const GgufType type = decoded_types.at(name);
    const Bytes golden = read_file(folder.file(name + ".encoded"));
    Bytes ours(nibble::gguf_bytes(type, input.size()));
    nibble::gguf_quantize(type, input.data(), input.size(), ours.data());
    ASSERT_EQ(ours.size(), golden.size());
    const std::size_t block = nibble::gguf_type_info(type)->block_bytes;
    for (std::size_t i = 0; i < ours.size(); ++i)
      ASSERT_EQ(ours[i], golden[i]) << name << " block " << i / block << " byte " << i % block;
  }
  // Any float at all, for the types without blocks. NaN payloads are compared after decoding.
  for (const std::string name : {"F32", "F16", "BF16"}) {
    const GgufType type = decoded_types.at(name);
    const Bytes golden = read_file(folder.file(name + ".wide"));
    Bytes ours(nibble::gguf_bytes(type, wide.size()));
    nibble::gguf_quantize(type, wide.data(), wide.size(), ours.data());
    ASSERT_EQ(ours.size(), golden.size());
    std::vector<float> a(wide.size()), b(wide.size());
    nibble::gguf_dequantize(type, ours.data(), a.size(), a.data());
    nibble::gguf_dequantize(type, golden.data(), b.size(), b.data());
    expect_same(a, b, name);
  }
}

TEST(GgufGolden, ReadsWhatThePythonPackageWrites) {
  NIBBLE_SKIP_WITHOUT_GGUF_PYTHON(python);
  const TempFolder folder;
  const std::string path = folder.file("theirs.gguf");
  int status = 0;
  run(python + " " + golden_script() + " write '" + path + "'", status);
  ASSERT_EQ(status, 0);
  const std::string listing =
      run(python + " " + golden_script() + " read '" + path + "' '" + folder.path() + "'", status);
  ASSERT_EQ(status, 0) << listing;

  const auto file = nibble::GgufFile::open(path);
  EXPECT_EQ(file.version(), 3U);
  EXPECT_EQ(file.alignment(), 64U);
  EXPECT_EQ(file.get<std::string>("general.architecture"), "test");
  EXPECT_EQ(file.get<std::uint8_t>("a.u8"), 255);
  EXPECT_EQ(file.get<std::int8_t>("a.i8"), -128);
  EXPECT_EQ(file.get<std::uint16_t>("a.u16"), 65535);
  EXPECT_EQ(file.get<std::int16_t>("a.i16"), -32768);
  EXPECT_EQ(file.get<std::uint32_t>("a.u32"), 4294967295U);
  EXPECT_EQ(file.get<std::int32_t>("a.i32"), INT32_MIN);
  EXPECT_EQ(file.get<std::uint64_t>("a.u64"), UINT64_MAX);
  EXPECT_EQ(file.get<std::int64_t>("a.i64"), INT64_MIN);
  EXPECT_EQ(file.get<float>("a.f32"), 1.25F);
  EXPECT_EQ(file.get<double>("a.f64"), -1e300);
  EXPECT_TRUE(file.get<bool>("a.yes"));
  EXPECT_FALSE(file.get<bool>("a.no"));
  EXPECT_EQ(file.get<std::string_view>("a.text"), "gr\xC3\xBC\xC3\x9F dich \xF0\x9F\x91\x8B");
  using Strings = std::vector<std::string>;
  EXPECT_EQ(file.get<nibble::GgufArray>("a.words").as<std::string>(), (Strings{"one", "", "dr\xC3\xA9i"}));
  EXPECT_EQ(file.get<nibble::GgufArray>("a.ints").as<int>(), (std::vector<int>{1, -2, 3}));
  EXPECT_EQ(file.get<nibble::GgufArray>("a.floats").as<float>(), (std::vector<float>{0.5F, -0.25F}));
  EXPECT_EQ(file.get<nibble::GgufArray>("a.bools").as<bool>(), (std::vector<bool>{true, false, true}));

  ASSERT_EQ(file.tensors().size(), 8U);
  for (std::size_t i = 0; i < file.tensors().size(); ++i)
    expect_same(file.tensors()[i].dequantize(), read_values<float>(folder.file(std::to_string(i) + ".f32")),
                std::string(file.tensors()[i].name));
  const nibble::GgufTensor& cube = file.tensor("cube");
  EXPECT_EQ(cube.rank, 3U);
  EXPECT_EQ(cube.dims, (std::array<std::uint64_t, 4>{4, 3, 2, 1}));
  EXPECT_EQ(file.tensor("vector").dims[0], 5U);
}

TEST(GgufGolden, ThePythonPackageReadsWhatWeWrite) {
  NIBBLE_SKIP_WITHOUT_GGUF_PYTHON(python);
  const TempFolder folder;
  const std::string path = folder.file("ours.gguf");
  std::vector<std::string> expected;
  std::vector<std::vector<float>> values;
  {
    nibble::GgufWriter writer(path);
    const auto add = [&](const std::string& key, const auto& value, const std::string& line) {
      writer.add(key, value);
      expected.push_back(key + "|" + line);
    };
    add("general.architecture", "test", "string|test");
    add("b.u8", std::uint8_t{200}, "uint8|200");
    add("b.i8", std::int8_t{-100}, "int8|-100");
    add("b.u16", std::uint16_t{60000}, "uint16|60000");
    add("b.i16", std::int16_t{-30000}, "int16|-30000");
    add("b.u32", std::uint32_t{4000000000}, "uint32|4000000000");
    add("b.i32", -2000000000, "int32|-2000000000");
    add("b.f32", 0.75F, "float32|0x1.8000000000000p-1");
    add("b.yes", true, "bool|1");
    add("b.text", std::string("\xC3\xA9t\xC3\xA9"), "string|\xC3\xA9t\xC3\xA9");
    add("b.u64", UINT64_MAX, "uint64|18446744073709551615");
    add("b.i64", INT64_MIN, "int64|-9223372036854775808");
    add("b.f64", -0.5, "float64|-0x1.0000000000000p-1");
    add("b.words", std::vector<std::string>{"a", "", "b c"}, "array,string|a//b c");
    add("b.ints", std::vector<int>{5, -6}, "array,int32|5/-6");
    add("b.bools", std::vector<bool>{true, false}, "array,bool|1/0");
    add("general.alignment", std::uint32_t{128}, "uint32|128");

    const std::vector<std::pair<std::string, std::vector<std::uint64_t>>> shapes = {
        {"F32", {3}},         {"F16", {5, 3}}, {"BF16", {7, 2, 2}}, {"Q8_0", {64, 3}},
        {"Q4_0", {96, 2, 2}}, {"Q4_1", {32}},  {"F32", {1}}};
    std::uint32_t state = 1;
    std::size_t index = 0;
    for (const auto& [type, dims] : shapes) {
      const std::string name = "t" + std::to_string(index++) + ".weight";
      writer.declare(name, decoded_types.at(type), dims);
      std::size_t elements = 1;
      std::string text;
      for (const std::uint64_t d : dims) {
        elements *= d;
        text += (text.empty() ? "" : "x") + std::to_string(d);
      }
      expected.push_back("tensor " + name + "|" + type + "|" + text);
      std::vector<float> x(elements);
      for (float& v : x)
        v = static_cast<float>(static_cast<std::int32_t>(state = state * 1664525 + 1013904223)) * 1e-9F;
      values.push_back(x);
    }
    for (const auto& x : values) {
      // In two pieces, the first a whole number of blocks.
      const std::size_t first = x.size() / 64 * 32;
      writer.write_floats(x.data(), first);
      writer.write_floats(x.data() + first, x.size() - first);
    }
    writer.commit();
  }
  int status = 0;
  const std::string listing =
      run(python + " " + golden_script() + " read '" + path + "' '" + folder.path() + "'", status);
  ASSERT_EQ(status, 0) << listing;
  std::vector<std::string> lines;
  std::istringstream stream(listing);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  EXPECT_EQ(lines, expected);

  const auto file = nibble::GgufFile::open(path);
  ASSERT_EQ(file.tensors().size(), values.size());
  for (std::size_t i = 0; i < values.size(); ++i)
    expect_same(file.tensors()[i].dequantize(), read_values<float>(folder.file(std::to_string(i) + ".f32")),
                std::string(file.tensors()[i].name));
  EXPECT_EQ(file.tensors()[0].dequantize(), values[0]);  // F32: what went in
}

}  // namespace
