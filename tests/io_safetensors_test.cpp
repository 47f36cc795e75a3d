// safetensors by the format's rules: each rule broken on its own, every truncation, every flipped byte.
#include "nibble/io/safetensors.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "io_test_support.hpp"

namespace {

using namespace io_test;
using nibble::FormatError;
using nibble::InvalidArgument;
using nibble::SafetensorsFile;
using nibble::SafetensorsType;
using nibble::SafetensorsWriter;

/// A file of this header text and `data` bytes of data.
Bytes make(const std::string& header, std::size_t data = 0) {
  Bytes bytes;
  append(bytes, static_cast<std::uint64_t>(header.size()));
  append_text(bytes, header);
  for (std::size_t i = 0; i < data; ++i) bytes.push_back(static_cast<std::uint8_t>(i + 1));
  return bytes;
}
SafetensorsFile parse(const Bytes& bytes) { return SafetensorsFile::parse(exact_buffer(bytes), "test"); }
void refuse(const std::string& header, std::size_t data, const std::string& part) {
  expect_error<FormatError>([&] { parse(make(header, data)); }, {"test", part});
}
std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}
unsigned consume(const SafetensorsFile& file) {
  unsigned sum = 0;
  for (const auto& [key, value] : file.metadata()) sum += static_cast<unsigned>(key.size() + value.size());
  for (const auto& tensor : file.tensors())
    for (std::size_t i = 0; i < tensor.data.size(); ++i) sum += tensor.data.data()[i];
  return sum;
}

const std::string small = "{\"__metadata__\":{\"k\":\"v\"}," + entry("a", "F32", "[2,1]", "[0,8]") + "," +
                          entry("b", "U8", "[3]", "[8,11]") + "," + entry("c", "I64", "[0,9]", "[11,11]") + "}  ";

TEST(SafetensorsFile, ReadsASmallFile) {
  const SafetensorsFile file = parse(make(small, 11));
  ASSERT_EQ(file.tensors().size(), 3U);
  EXPECT_EQ(*file.find_metadata("k"), "v");
  EXPECT_EQ(file.find_metadata("v"), nullptr);
  EXPECT_EQ(file.tensor("a").shape, (std::vector<std::size_t>{2, 1}));
  EXPECT_EQ(file.tensor("a").data.size(), 8U);
  EXPECT_EQ(file.tensor("b").values<std::uint8_t>(), (std::vector<std::uint8_t>{9, 10, 11}));
  EXPECT_EQ(file.tensor("a").values<std::uint32_t>(), (std::vector<std::uint32_t>{0x04030201, 0x08070605}));
  EXPECT_EQ(file.tensor("c").elements(), 0U);
  EXPECT_TRUE(file.tensor("c").values<std::int64_t>().empty());
  EXPECT_EQ(file.find_tensor("d"), nullptr);
  expect_error<FormatError>([&] { file.tensor("d"); }, {"'d'"});
  expect_error<InvalidArgument>([&] { file.tensor("a").values<double>(); }, {"F32"});
}

TEST(SafetensorsFile, AcceptsWhatTheRulesAllow) {
  EXPECT_TRUE(parse(make("{}")).tensors().empty());
  EXPECT_TRUE(parse(make("{ \n}\t ")).tensors().empty());
  EXPECT_TRUE(parse(make("{\"__metadata__\":{}}")).metadata().empty());
  // Any order of entries and keys, rank 0, a header of odd length and so misaligned data, escapes in names.
  const SafetensorsFile file =
      parse(make("{" + entry("z", "F64", "[]", "[2,10]") +
                     ",\"\\u00e9\\\"\":{\"data_offsets\":[0,2],\"shape\":[1],\"dtype\":\"BF16\"}}",
                 10));
  EXPECT_EQ(file.tensors()[0].name, "\xC3\xA9\"");
  EXPECT_EQ(file.tensor("z").elements(), 1U);
  EXPECT_EQ(file.tensor("z").values<double>().size(), 1U);
  // Keys that the format does not know are skipped, whatever they hold.
  EXPECT_EQ(parse(make("{\"a\":{\"dtype\":\"U8\",\"note\":[{\"x\":[1,2.5,null,true,\"s\"]},-1],\"shape\":[1],"
                       "\"data_offsets\":[0,1],\"more\":1e9}}",
                       1))
                .tensors()
                .size(),
            1U);
  // Sub-byte types that fill whole bytes.
  EXPECT_EQ(parse(make("{" + entry("a", "F4", "[6]", "[0,3]") + "}", 3)).tensors().size(), 1U);
  EXPECT_EQ(parse(make("{" + entry("a", "F6_E2M3", "[4]", "[0,3]") + "}", 3)).tensors().size(), 1U);
}

TEST(SafetensorsFile, EveryDtypeHasItsSize) {
  const std::vector<std::pair<std::string, std::size_t>> types = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},   {"F8_E5M2", 1},     {"F8_E4M3", 1},    {"F8_E8M0", 1}, {"I16", 2},
      {"U16", 2},  {"F16", 2}, {"BF16", 2}, {"I32", 4},         {"U32", 4},        {"F32", 4},     {"C64", 8},
      {"F64", 8},  {"I64", 8}, {"U64", 8},  {"F8_E4M3FNUZ", 1}, {"F8_E5M2FNUZ", 1}};
  for (const auto& [name, bytes] : types) {
    const std::size_t size = 3 * bytes;
    const std::string offsets = "[0," + std::to_string(size) + "]";
    const SafetensorsFile file = parse(make("{" + entry("t", name, "[3]", offsets) + "}", size));
    EXPECT_EQ(name_of(file.tensor("t").type), name);
    refuse("{" + entry("t", name, "[3]", "[0," + std::to_string(size + 1) + "]") + "}", size + 1, "by its shape");
  }
}

TEST(SafetensorsFile, RefusesBadLengths) {
  for (std::size_t n = 0; n < 8; ++n) expect_error<FormatError>([&] { parse(Bytes(n)); }, {"8 bytes"});
  expect_error<FormatError>([] { parse(Bytes(8)); }, {"'{'"});
  for (const std::uint64_t length : {std::uint64_t{3}, std::uint64_t{1000}, std::uint64_t{100000000}}) {
    Bytes bytes = make("{}");
    std::memcpy(bytes.data(), &length, 8);
    expect_error<FormatError>([&] { parse(bytes); }, {"only 2 follow"});
  }
  for (const std::uint64_t length :
       {std::uint64_t{100000001}, std::uint64_t{1} << 63, UINT64_MAX, UINT64_MAX - 7}) {
    Bytes bytes = make("{}");
    std::memcpy(bytes.data(), &length, 8);
    expect_error<FormatError>([&] { parse(bytes); }, {"at most 100000000"});
  }
}

TEST(SafetensorsFile, RefusesHolesOverlapsAndTrailingBytes) {
  const std::string a = entry("a", "U8", "[4]", "[0,4]");
  refuse("{" + a + "}", 5, "data section has 5");
  refuse("{" + a + "}", 3, "beyond the data");
  refuse("{}", 1, "data section has 1");
  refuse("{" + a + "," + entry("b", "U8", "[4]", "[5,9]") + "}", 9, "'b'");  // hole
  refuse("{" + a + "," + entry("b", "U8", "[4]", "[3,7]") + "}", 7, "'b'");  // overlap
  refuse("{" + a + "," + entry("b", "U8", "[4]", "[0,4]") + "}", 4, "'b'");  // the same bytes twice
  refuse("{" + entry("a", "U8", "[4]", "[1,5]") + "}", 5, "begin at 0");
  refuse("{" + entry("a", "U8", "[4]", "[4,0]") + "}", 4, "'a'");  // reversed
  refuse("{" + a + "," + entry("b", "U8", "[4]", "[4,0]") + "}", 4, "'b'");
  refuse("{" + entry("a", "U8", "[18446744073709551615]", "[0,18446744073709551615]") + "}", 4, "beyond the data");
  refuse("{" + a + "," + entry("b", "U8", "[0]", "[2,2]") + "}", 4, "'");
  EXPECT_NO_THROW(parse(
      make("{" + a + "," + entry("b", "U8", "[0]", "[4,4]") + "," + entry("c", "U8", "[0]", "[0,0]") + "}", 4)));
}

TEST(SafetensorsFile, RefusesSizesThatOverflowOrDisagree) {
  refuse("{" + entry("a", "F32", "[9223372036854775808,4]", "[0,0]") + "}", 0, "overflows");
  refuse("{" + entry("a", "F32", "[4611686018427387904]", "[0,0]") + "}", 0, "overflows");  // times bits
  refuse("{" + entry("a", "U8", "[2305843009213693952]", "[0,0]") + "}", 0, "overflows");   // 2^61 x 8 bits
  refuse("{" + entry("a", "F32", "[4294967296,4294967296]", "[0,0]") + "}", 0, "overflows");
  refuse("{" + entry("a", "F32", "[4294967296,4294967296,0]", "[0,0]") + "}", 0, "overflows");
  EXPECT_NO_THROW(parse(make("{" + entry("a", "F32", "[0,4294967296,4294967296]", "[0,0]") + "}")));
  refuse("{" + entry("a", "F32", "[2]", "[0,7]") + "}", 7, "8 bytes by its shape");
  refuse("{" + entry("a", "F32", "[2]", "[0,9]") + "}", 9, "8 bytes by its shape");
  refuse("{" + entry("a", "F4", "[3]", "[0,2]") + "}", 2, "whole number of bytes");
  refuse("{" + entry("a", "F6_E3M2", "[3]", "[0,3]") + "}", 3, "whole number of bytes");
}

TEST(SafetensorsFile, RefusesBadHeaders) {
  const std::string good = entry("a", "U8", "[1]", "[0,1]");
  refuse(" {" + good + "}", 1, "'{'");
  refuse("\xEF\xBB\xBF{" + good + "}", 1, "'{'");
  refuse("[]", 0, "'{'");
  refuse("{" + good, 1, "JSON");
  refuse("{" + good + "}}", 1, "JSON");
  refuse("{" + good + "}x", 1, "JSON");
  refuse("{" + good + "}" + std::string(1, '\0'), 1, "JSON");
  refuse("{" + good + ",}", 1, "JSON");
  refuse("{/* c */" + good + "}", 1, "JSON");
  refuse("{" + good + "," + good + "}", 1, "");  // the same key
  refuse("{" + good + "," + entry("a", "U8", "[0]", "[1,1]") + "}", 1, "two tensors");
  refuse("{" + good + "," + entry("\\u0061", "U8", "[0]", "[1,1]") + "}", 1, "two tensors");
  refuse("{\"__metadata__\":{},\"__metadata__\":{}}", 0, "two '__metadata__'");
  refuse("{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}", 0, "'k' twice");
  refuse("{\"__metadata__\":{\"k\":1}}", 0, "number");
  refuse("{\"__metadata__\":{\"k\":null}}", 0, "null");
  refuse("{\"__metadata__\":{\"k\":{}}}", 0, "object");
  refuse("{\"__metadata__\":{\"k\":[]}}", 0, "array");
  refuse("{\"__metadata__\":null}", 0, "null");
  refuse("{\"__metadata__\":[]}", 0, "array");
  refuse("{\"a\":1}", 0, "number");
  refuse("{\"a\":[]}", 0, "array");
  refuse("{\"a\":\"s\"}", 0, "string");
  refuse("{\"a\":{}}", 0, "without dtype");
  refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "without dtype");
  refuse("{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, "without dtype");
  refuse("{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "without dtype");
  refuse("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "'dtype' twice");
  refuse("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "'shape' twice");
  refuse("{" + entry("a", "u8", "[1]", "[0,1]") + "}", 1, "unknown dtype 'u8'");
  refuse("{" + entry("a", "", "[1]", "[0,1]") + "}", 1, "unknown dtype");
  refuse("{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "number");
  for (const char* shape : {"[-1]", "[1.0]", "[1e0]", "[\"1\"]", "[null]", "[true]", "[[1]]", "[{}]", "{}", "1",
                            "\"1\"", "[18446744073709551616]", "[-0]"})
    refuse("{" + entry("a", "U8", shape, "[0,1]") + "}", 1, "");
  for (const char* offsets : {"[0]", "[]", "[0,1,1]", "[-1,0]", "[0,1.0]", "[\"0\",1]", "0", "{}", "[[0,1]]",
                              "[0,18446744073709551617]"})
    refuse("{" + entry("a", "U8", "[1]", offsets) + "}", 1, "");
  // UTF-8: broken, overlong, a surrogate, beyond U+10FFFF, a lone escaped surrogate.
  for (const char* name : {"\xFF", "\xC0\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE2\x82", "\\ud800"})
    refuse("{" + entry(name, "U8", "[1]", "[0,1]") + "}", 1, "JSON");
  std::string ones = "[1";
  for (int i = 0; i < 64; ++i) ones += ",1";
  refuse("{" + entry("a", "U8", ones + "]", "[0,1]") + "}", 1, "64 dimensions");
}

TEST(SafetensorsFile, DeepNestingEndsAtOnce) {
  const std::size_t depth = 5000000;
  refuse("{\"a\":" + std::string(depth, '['), 0, "array");
  std::string objects = "{\"a\":{\"note\":";
  for (std::size_t i = 0; i < 100000; ++i) objects += "{\"x\":";
  refuse(objects, 0, "too deeply");
  refuse("{\"a\":{\"note\":" + std::string(depth, '['), 0, "too deeply");
}

TEST(SafetensorsFile, EveryTruncationIsAnError) {
  const Bytes whole = make(small, 11);
  for (std::size_t n = 0; n < whole.size(); ++n)
    expect_error<FormatError>(
        [&] { parse(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(n))); });
}

TEST(SafetensorsFile, EveryFlippedByteOfTheHeaderIsAnErrorOrValid) {
  const Bytes whole = make(small, 11);
  int valid = 0, refused = 0;
  for (std::size_t at = 0; at < whole.size() - 11; ++at) {
    for (int value = 0; value < 256; ++value) {
      Bytes bytes = whole;
      if (bytes[at] == value) continue;
      bytes[at] = static_cast<std::uint8_t>(value);
      try {
        consume(parse(bytes));
        ++valid;
      } catch (const FormatError&) {
        ++refused;
      }
    }
  }
  EXPECT_GT(valid, 100);
  EXPECT_GT(refused, 10000);
}

TEST(SafetensorsFile, AMillionTensorsInBoundedTime) {
  std::string header = "{";
  for (int i = 0; i < 1000000; ++i) {
    if (i != 0) header += ",";
    header += entry("name." + std::to_string(i), "U8", "[1]",
                    "[" + std::to_string(i) + "," + std::to_string(i + 1) + "]");
  }
  ASSERT_LT(header.size(), 100000000U);
  const SafetensorsFile file = parse(make(header + "}", 1000000));
  EXPECT_EQ(file.tensors().size(), 1000000U);
  EXPECT_EQ(file.tensor("name.765432").data.data()[0], static_cast<std::uint8_t>(765433));
}

TEST(SafetensorsWriter, RoundTripsInAnyOrderAndAligns) {
  const TempFolder folder;
  const std::string path = folder.file("model.safetensors");
  for (const std::size_t alignment : {std::size_t{8}, std::size_t{64}}) {
    {
      SafetensorsWriter w(path, alignment);
      w.add_metadata("who", "line\n\"quoted\" \xC3\xA9");
      w.declare("odd", SafetensorsType::u8, {3});
      w.declare("float", SafetensorsType::f32, {5});
      w.declare("none", SafetensorsType::f32, {0, 7});
      w.declare("big", SafetensorsType::u8, {2, 64});
      w.declare("scalar", SafetensorsType::f64, {});
      w.declare("name \"\\\xE2\x82\xAC", SafetensorsType::f16, {16});
      const Bytes zeros(32, 7);
      const std::vector<float> x = {1, 2, 3, 4, 5};
      const double pi = 3.25;
      Bytes big(128);
      for (std::size_t i = 0; i < big.size(); ++i) big[i] = static_cast<std::uint8_t>(i);
      w.write("big", big.data(), 100);
      w.write("odd", "abc", 3);
      w.write("float", x.data(), 20);
      w.write("name \"\\\xE2\x82\xAC", zeros.data(), 32);
      w.write("big", big.data() + 100, 28);
      w.write("scalar", &pi, 8);
      w.write("none", nullptr, 0);
      w.commit();
    }
    const Bytes bytes = read_file(path);
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), 8);
    EXPECT_EQ((length + 8) % alignment, 0U);
    const SafetensorsFile file = SafetensorsFile::open(path);
    EXPECT_EQ(*file.find_metadata("who"), "line\n\"quoted\" \xC3\xA9");
    EXPECT_EQ(file.tensors().size(), 6U);
    EXPECT_EQ(file.tensor("float").values<float>(), (std::vector<float>{1, 2, 3, 4, 5}));
    EXPECT_EQ(file.tensor("odd").values<char>(), (std::vector<char>{'a', 'b', 'c'}));
    EXPECT_EQ(file.tensor("scalar").values<double>(), (std::vector<double>{3.25}));
    EXPECT_EQ(file.tensor("none").shape, (std::vector<std::size_t>{0, 7}));
    EXPECT_EQ(file.tensor("big").values<std::uint8_t>()[127], 127);
    EXPECT_EQ(file.tensor("name \"\\\xE2\x82\xAC").data.data()[31], 7);
    for (const auto& tensor : file.tensors())
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor.data.data()) % (bits_of(tensor.type) / 8), 0U)
          << tensor.name;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(file.tensor("big").data.data()) % alignment, 0U);
  }
}

TEST(SafetensorsWriter, RefusesMisuseAndLeavesNothing) {
  const TempFolder folder;
  const std::string path = folder.file("w.safetensors");
  for (const std::size_t alignment : {0U, 4U, 24U, 8192U})
    expect_error<InvalidArgument>([&] { SafetensorsWriter(path, alignment); }, {"alignment"});
  {
    SafetensorsWriter w(path);
    w.add_metadata("k", "v");
    expect_error<InvalidArgument>([&] { w.add_metadata("k", "v"); }, {"'k'"});
    expect_error<InvalidArgument>([&] { w.add_metadata("l", "\xFF"); }, {"UTF-8"});
    w.declare("t", SafetensorsType::u8, {4});
    expect_error<InvalidArgument>([&] { w.declare("t", SafetensorsType::u8, {4}); }, {"'t'"});
    expect_error<InvalidArgument>([&] { w.declare("__metadata__", SafetensorsType::u8, {4}); });
    expect_error<InvalidArgument>([&] { w.declare("\xFF", SafetensorsType::u8, {4}); });
    expect_error<InvalidArgument>([&] { w.declare("f", SafetensorsType::f4, {3}); }, {"12 bits"});
    expect_error<InvalidArgument>([&] { w.declare("f", SafetensorsType::f32, {SIZE_MAX, 2}); }, {"overflows"});
    expect_error<InvalidArgument>([&] { w.write("u", "abcd", 4); }, {"'u'"});
    expect_error<InvalidArgument>([&] { w.write("t", "abcde", 5); }, {"'t'", "5"});
    w.write("t", "ab", 2);
    expect_error<InvalidArgument>([&] { w.declare("late", SafetensorsType::u8, {4}); }, {"after"});
    expect_error<InvalidArgument>([&] { w.add_metadata("late", ""); }, {"after"});
    expect_error<InvalidArgument>([&] { w.commit(); }, {"only 2"});
    EXPECT_FALSE(std::filesystem::exists(path));
    w.write("t", "cd", 2);
    w.commit();
  }
  EXPECT_EQ(SafetensorsFile::open(path).tensor("t").values<char>(), (std::vector<char>{'a', 'b', 'c', 'd'}));
  EXPECT_EQ(folder.count(), 1U);
  {
    SafetensorsWriter empty(folder.file("empty.safetensors"));
    empty.commit();
  }
  EXPECT_TRUE(SafetensorsFile::open(folder.file("empty.safetensors")).tensors().empty());
}

}  // namespace
