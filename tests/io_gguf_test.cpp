// GGUF files that lie: every truncation, every flipped byte of a header, false counts, sizes and offsets. And the
// writer: what it refuses, and that what it wrote comes back.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "io_test_support.hpp"
#include "nibble/io/gguf.hpp"

namespace {

using namespace io_test;
using nibble::FormatError;
using nibble::GgufArray;
using nibble::GgufFile;
using nibble::GgufType;
using nibble::GgufWriter;
using nibble::InvalidArgument;
using nibble::Unsupported;

/// A GGUF file put together by hand, so that any part of it can be wrong.
struct Raw {
  std::uint32_t version = 3;
  std::uint64_t tensor_count = 0;
  std::uint64_t entry_count = 0;
  Bytes entries;
  Bytes tensors;
  Bytes data;
  std::size_t alignment = 32;

  static void put_text(Bytes& to, const std::string& text) {
    append(to, static_cast<std::uint64_t>(text.size()));
    append_text(to, text);
  }
  template <class T>
  Raw& entry(const std::string& key, std::uint32_t type, T value) {
    put_text(entries, key);
    append(entries, type);
    append(entries, value);
    ++entry_count;
    return *this;
  }
  Raw& entry_bytes(const std::string& key, std::uint32_t type, const Bytes& value) {
    put_text(entries, key);
    append(entries, type);
    entries.insert(entries.end(), value.begin(), value.end());
    ++entry_count;
    return *this;
  }
  Raw& tensor(const std::string& name, const std::vector<std::uint64_t>& dims, std::uint32_t type,
              std::uint64_t offset) {
    put_text(tensors, name);
    append(tensors, static_cast<std::uint32_t>(dims.size()));
    for (const std::uint64_t d : dims) append(tensors, d);
    append(tensors, type);
    append(tensors, offset);
    ++tensor_count;
    return *this;
  }
  Bytes bytes() const {
    Bytes out;
    append_text(out, "GGUF");
    append(out, version);
    append(out, tensor_count);
    append(out, entry_count);
    out.insert(out.end(), entries.begin(), entries.end());
    out.insert(out.end(), tensors.begin(), tensors.end());
    while (out.size() % alignment != 0) out.push_back(0);
    out.insert(out.end(), data.begin(), data.end());
    return out;
  }
};

GgufFile parse(const Bytes& bytes) { return GgufFile::parse(exact_buffer(bytes), "test"); }
void refuse(const Raw& raw, const std::string& part) {
  expect_error<FormatError>([&] { parse(raw.bytes()); }, {"test", part});
}

// Uses everything that a parsed file offers; a lie that slipped through would be a bad access here.
double consume(const GgufFile& file) {
  double sum = 0;
  for (const nibble::GgufEntry& entry : file.metadata()) {
    GgufArray array;
    std::string text;
    double number = 0;
    bool flag = false;
    if (entry.value.get(array)) {
      if (array.element_type() == nibble::GgufValueType::string)
        array.for_each_string([&](std::string_view s) { sum += s.empty() ? 0 : s.front() + s.back(); });
      else if (array.element_type() == nibble::GgufValueType::array)
        for (const GgufArray& inner : array.arrays()) sum += static_cast<double>(inner.raw_bytes());
      else if (array.element_type() == nibble::GgufValueType::boolean)
        sum += static_cast<double>(array.as<bool>().size());
      for (std::size_t i = 0; i < array.raw_bytes(); ++i) sum += array.raw()[i];
    } else if (entry.value.get(text)) {
      for (const char c : text) sum += c;
    } else if (entry.value.get(number)) {
      sum += std::isfinite(number) ? number : 0;
    } else if (entry.value.get(flag)) {
      sum += flag ? 1 : 0;
    }
  }
  for (const nibble::GgufTensor& tensor : file.tensors()) {
    for (std::size_t i = 0; i < tensor.data.size(); ++i) sum += tensor.data.data()[i];
    const nibble::GgufTypeInfo* info = nibble::gguf_type_info(tensor.type);
    if (info != nullptr && info->decodes) sum += static_cast<double>(tensor.dequantize().size());
  }
  return sum;
}

Raw small() {
  Raw raw;
  Bytes words;
  append(words, std::uint32_t{8});
  append(words, std::uint64_t{2});
  Raw::put_text(words, "ab");
  Raw::put_text(words, "");
  Bytes nested;  // [[1, 2], []]
  append(nested, std::uint32_t{9});
  append(nested, std::uint64_t{2});
  append(nested, std::uint32_t{0});
  append(nested, std::uint64_t{2});
  append(nested, std::uint16_t{0x0201});
  append(nested, std::uint32_t{12});
  append(nested, std::uint64_t{0});
  raw.entry("u", 4, std::uint32_t{7}).entry_bytes("w", 9, words).entry_bytes("n", 9, nested);
  raw.entry("b", 7, std::uint8_t{1}).entry("d", 12, 0.5);
  raw.tensor("a", {32, 2}, 8, 0).tensor("f", {3}, 0, 96).tensor("x", {5}, 99, 128);
  raw.data.resize(160);
  for (std::size_t i = 0; i < raw.data.size(); ++i) raw.data[i] = static_cast<std::uint8_t>(i);
  return raw;
}

TEST(GgufFile, ReadsASmallFileOfEitherVersion) {
  for (const std::uint32_t version : {2U, 3U}) {
    Raw raw = small();
    raw.version = version;
    const GgufFile file = parse(raw.bytes());
    EXPECT_EQ(file.version(), version);
    EXPECT_EQ(file.metadata().size(), 5U);
    EXPECT_EQ(file.get<int>("u"), 7);
    EXPECT_EQ(file.get<float>("u"), 7.0F);
    EXPECT_EQ(file.get_or<int>("missing", -1), -1);
    EXPECT_EQ(file.get_or<std::string>("missing", "none"), "none");
    expect_error<FormatError>([&] { file.get<int>("missing"); }, {"missing"});
    expect_error<FormatError>([&] { file.get<int>("d"); }, {"'d'", "float64"});
    expect_error<FormatError>([&] { file.get<std::string>("u"); }, {"'u'", "uint32"});
    expect_error<FormatError>([&] { file.get<bool>("u"); });
    expect_error<FormatError>([&] { file.get<int>("b"); });
    expect_error<FormatError>([&] { file.get_or<int>("d", 3); });
    EXPECT_EQ(file.get<GgufArray>("w").as<std::string_view>(), (std::vector<std::string_view>{"ab", ""}));
    expect_error<FormatError>([&] { file.get<GgufArray>("w").as<int>(); }, {"string"});
    const std::vector<GgufArray> nested = file.get<GgufArray>("n").arrays();
    ASSERT_EQ(nested.size(), 2U);
    EXPECT_EQ(nested[0].as<int>(), (std::vector<int>{1, 2}));
    EXPECT_TRUE(nested[1].as<double>().empty());
    expect_error<FormatError>([&] { nested[0].arrays(); });
    expect_error<FormatError>([&] { nested[0].as<std::string>(); });
    expect_error<FormatError>([&] { nested[0].as<bool>(); });

    EXPECT_EQ(file.tensors().size(), 3U);
    EXPECT_EQ(file.tensor("f").dequantize().size(), 3U);
    EXPECT_EQ(file.tensor("a").rows(), 2U);
    std::vector<float> row(32);
    file.tensor("a").dequantize_rows(1, 1, row.data());
    const std::vector<float> all = file.tensor("a").dequantize();
    EXPECT_TRUE(std::equal(row.begin(), row.end(), all.begin() + 32));
    expect_error<InvalidArgument>([&] { file.tensor("a").dequantize_rows(2, 1, row.data()); });
    // A type that nobody knows is listed, and refused when read.
    EXPECT_FALSE(file.tensor("x").known());
    EXPECT_TRUE(file.tensor("x").data.empty());
    expect_error<Unsupported>([&] { file.tensor("x").dequantize(); }, {"'x'", "99"});
    expect_error<FormatError>([&] { file.tensor("y"); }, {"'y'"});
    EXPECT_EQ(file.find_tensor("y"), nullptr);
  }
}

TEST(GgufFile, TensorsOutliveTheFile) {
  nibble::GgufTensor kept;
  {
    const GgufFile file = parse(small().bytes());
    kept = file.tensor("f");
  }
  EXPECT_EQ(kept.name, "f");
  EXPECT_EQ(kept.data.data()[0], 96);
}

TEST(GgufFile, EveryTruncationIsAnErrorOrValid) {
  const Bytes whole = small().bytes();
  for (std::size_t n = 0; n < whole.size(); ++n) {
    const Bytes cut(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(n));
    bool refused = false;
    try {
      consume(parse(cut));
    } catch (const FormatError&) {
      refused = true;
    }
    // The last tensor is of an unknown type: bytes beyond its offset are not missed. Nothing else may be cut.
    EXPECT_EQ(refused, n < whole.size() - 32) << n;
  }
}

TEST(GgufFile, EveryFlippedByteOfTheHeaderIsAnErrorOrValid) {
  const Bytes whole = small().bytes();
  const std::size_t header = whole.size() - 160;
  int valid = 0, refused = 0;
  for (std::size_t at = 0; at < header; ++at) {
    for (int value = 0; value < 256; ++value) {
      Bytes bytes = whole;
      if (bytes[at] == value) continue;
      bytes[at] = static_cast<std::uint8_t>(value);
      try {
        consume(parse(bytes));
        ++valid;
      } catch (const FormatError&) {
        ++refused;
      } catch (const Unsupported&) {
        ++refused;
      }
    }
  }
  EXPECT_GT(valid, 1000);
  EXPECT_GT(refused, 1000);
}

TEST(GgufFile, RefusesOtherFilesAndVersions) {
  expect_error<FormatError>([] { parse({}); }, {"test", "4 bytes", "0"});
  expect_error<FormatError>([] { parse({'G', 'G', 'M', 'L', 3, 0, 0, 0}); }, {"not a GGUF file"});
  Raw raw = small();
  for (const std::uint32_t version : {0U, 4U, 1000U}) {
    raw.version = version;
    refuse(raw, "version");
  }
  raw.version = 1;
  expect_error<Unsupported>([&] { parse(raw.bytes()); }, {"version 1"});
  raw.version = 0x03000000;
  expect_error<Unsupported>([&] { parse(raw.bytes()); }, {"big-endian"});
}

TEST(GgufFile, FalseCountsAllocateNothing) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  for (const std::uint64_t count : {std::uint64_t{1} << 32, std::uint64_t{1} << 63, UINT64_MAX}) {
    Raw raw = small();
    raw.tensor_count = count;
    refuse(raw, "tensors");
    raw = small();
    raw.entry_count = count;
    refuse(raw, "metadata");
    for (const std::uint32_t type : {0U, 4U, 7U, 8U, 9U, 12U}) {
      Raw array;
      Bytes value;
      append(value, type);
      append(value, count);
      array.entry_bytes("k", 9, value);
      refuse(array, "");
    }
    Raw text;
    text.entry("k", 8, count);
    refuse(text, "needs");
    Raw key;
    append(key.entries, count);
    append(key.entries, std::uint32_t{0});
    append(key.entries, std::uint64_t{0});
    key.entry_count = 1;
    refuse(key, "");
  }
  // Not a measurement: a loop over 2^32 would take hours under a sanitizer.
  EXPECT_LT(std::chrono::duration<double>(Clock::now() - begin).count(), 60.0);
}

TEST(GgufFile, RefusesBadMetadata) {
  refuse(small().entry("t", 13, std::uint32_t{0}), "unknown value type 13");
  refuse(small().entry("t", 0xFFFFFFFF, std::uint32_t{0}), "unknown value type");
  refuse(small().entry("q", 7, std::uint8_t{2}), "boolean");
  refuse(small().entry("u", 4, std::uint32_t{7}), "'u'");  // a second time
  refuse(small().entry("\xFF\xFE", 4, std::uint32_t{7}), "UTF-8");
  refuse(small().entry("\xC0\x80", 4, std::uint32_t{7}), "UTF-8");          // overlong
  refuse(small().entry("\xED\xA0\x80", 4, std::uint32_t{7}), "UTF-8");      // surrogate
  refuse(small().entry("\xF4\x90\x80\x80", 4, std::uint32_t{7}), "UTF-8");  // beyond U+10FFFF
  refuse(small().entry("\xE2\x82", 4, std::uint32_t{7}), "UTF-8");          // cut
  refuse(small().entry(std::string(65536, 'k'), 4, std::uint32_t{7}), "65536");
  EXPECT_NO_THROW(parse(small().entry(std::string(65535, 'k'), 4, std::uint32_t{7}).bytes()));
  EXPECT_NO_THROW(parse(small().entry("\xF4\x8F\xBF\xBF\xE2\x82\xAC", 4, std::uint32_t{7}).bytes()));
  Bytes bools;
  append(bools, std::uint32_t{7});
  append(bools, std::uint64_t{2});
  append(bools, std::uint16_t{0x0301});
  refuse(small().entry_bytes("q", 9, bools), "boolean");

  for (const int depth : {8, 9, 100000}) {
    Bytes deep;
    for (int i = 1; i < depth; ++i) {
      append(deep, std::uint32_t{9});
      append(deep, std::uint64_t{1});
    }
    append(deep, std::uint32_t{0});
    append(deep, std::uint64_t{0});
    if (depth == 8)
      EXPECT_NO_THROW(consume(parse(small().entry_bytes("deep", 9, deep).bytes())));
    else
      refuse(small().entry_bytes("deep", 9, deep), "deeper");
  }
}

TEST(GgufFile, RefusesBadAlignments) {
  for (const std::uint32_t alignment : {0U, 3U, 33U, 0x80000000U, 0xFFFFFFFFU})
    refuse(small().entry("general.alignment", 4, alignment), "alignment");
  refuse(small().entry("general.alignment", 10, std::uint64_t{32}), "alignment");
  Raw raw = small().entry("general.alignment", 4, std::uint32_t{16});
  raw.alignment = 16;
  EXPECT_EQ(parse(raw.bytes()).alignment(), 16U);
  // Beyond the file: there is no data section, so there can be no tensor.
  refuse(small().entry("general.alignment", 4, std::uint32_t{1} << 30), "beyond the end");
}

TEST(GgufFile, RefusesBadTensors) {
  const auto big = std::uint64_t{1} << 62;
  refuse(small().tensor("a", {1}, 0, 128), "'a'");  // twice
  refuse(small().tensor("\xFF", {1}, 0, 128), "UTF-8");
  refuse(small().tensor("t", {1, 1, 1, 1, 1}, 0, 128), "5 dimensions");
  refuse(small().tensor("t", {2, big, 2}, 0, 128), "elements");
  refuse(small().tensor("t", {big, 4}, 0, 128), "elements");
  refuse(small().tensor("t", {big, 4, 0}, 0, 128), "elements");  // before the 0 makes it small
  refuse(small().tensor("t", {0, big, 4}, 0, 128), "elements");
  refuse(small().tensor("t", {UINT64_MAX}, 24, 128), "elements");
  refuse(small().tensor("t", {big}, 0, 128), "2^64");
  refuse(small().tensor("t", {big + 1}, 0, 128), "");                        // 2^64 + 4
  refuse(small().tensor("t", {(std::uint64_t{1} << 61) + 1}, 28, 128), "");  // 2^64 + 8
  refuse(small().tensor("t", {31}, 8, 128), "multiple");
  refuse(small().tensor("t", {32 * 8}, 8, 128), "beyond the end");
  refuse(small().tensor("t", {16, 2}, 8, 128), "multiple");  // a row is no whole block
  refuse(small().tensor("t", {128}, 12, 128), "multiple");
  refuse(small().tensor("t", {1}, 0, 160), "beyond the end");
  refuse(small().tensor("t", {1}, 0, 129), "alignment");
  refuse(small().tensor("t", {1}, 0, UINT64_MAX - 31), "beyond the end");
  refuse(small().tensor("t", {1}, 0, std::uint64_t{1} << 63), "beyond the end");
  refuse(small().tensor("t", {1}, 77, 192), "beyond the end");  // unknown types too
  refuse(small().tensor("t", {9}, 0, 128), "beyond the end");
  refuse(small().tensor("t", {1}, 0, 64), "overlap");  // in the middle of a
  refuse(small().tensor("t", {1}, 0, 0), "overlap");
  refuse(small().tensor("t", {8}, 0, 96), "overlap");
  EXPECT_NO_THROW(consume(parse(small().tensor("t", {8}, 0, 128).bytes())));
  EXPECT_NO_THROW(consume(parse(small().tensor("t", {}, 0, 128).bytes())));     // a scalar
  EXPECT_NO_THROW(consume(parse(small().tensor("t", {0, 5}, 8, 64).bytes())));  // nothing, anywhere
  // Hostile names appear in messages without their control characters.
  expect_error<FormatError>([] { parse(small().tensor("\x1B[31mred", {31}, 8, 128).bytes()); }, {"'?[31mred'"});
}

TEST(GgufFile, TypesWithoutADecoderAreReadable) {
  Raw raw;
  raw.tensor("t", {256}, 10, 0);
  raw.data.resize(84);
  const GgufFile file = parse(raw.bytes());
  EXPECT_EQ(file.tensor("t").data.size(), 84U);
  expect_error<Unsupported>([&] { file.tensor("t").dequantize(); }, {"Q2_K"});
}

TEST(GgufFile, AMillionTensorsInBoundedTimeAndMemory) {
  Raw raw;
  const std::string prefix(20, 'n');  // names that share what a comparison sees first
  for (int i = 0; i < 1000000; ++i) raw.tensor(prefix + std::to_string(i), {0}, 0, 0);
  const GgufFile file = parse(raw.bytes());
  EXPECT_EQ(file.tensors().size(), 1000000U);
  EXPECT_NE(file.find_tensor(prefix + "999999"), nullptr);
  raw.tensor(prefix + "500000", {0}, 0, 0);
  refuse(raw, "500000");
}

TEST(GgufValues, ConvertExactlyOrNotAtAll) {
  const auto fits = [](auto stored, auto wanted) { return nibble::GgufValue(stored).get(wanted); };
  EXPECT_TRUE(fits(std::uint64_t{255}, std::uint8_t{}));
  EXPECT_FALSE(fits(std::uint64_t{256}, std::uint8_t{}));
  EXPECT_FALSE(fits(std::int8_t{-1}, std::uint64_t{}));
  EXPECT_TRUE(fits(std::int64_t{-128}, std::int8_t{}));
  EXPECT_FALSE(fits(std::int64_t{-129}, std::int8_t{}));
  EXPECT_FALSE(fits(std::uint64_t{1} << 63, std::int64_t{}));
  EXPECT_TRUE(fits(INT64_MIN, std::int64_t{}));
  EXPECT_TRUE(fits(std::uint64_t{1} << 24, float{}));
  EXPECT_FALSE(fits((std::uint64_t{1} << 24) + 1, float{}));
  EXPECT_TRUE(fits(-(std::int64_t{1} << 53), double{}));
  EXPECT_FALSE(fits(-(std::int64_t{1} << 53) - 1, double{}));
  EXPECT_FALSE(fits(INT64_MIN, float{}));
  EXPECT_TRUE(fits(0.1, float{}));
  EXPECT_FALSE(fits(1e300, float{}));
  EXPECT_TRUE(fits(std::numeric_limits<double>::infinity(), float{}));
  EXPECT_TRUE(fits(1.5F, double{}));
  EXPECT_FALSE(fits(1.0F, int{}));
  EXPECT_FALSE(fits(true, int{}));
  EXPECT_FALSE(fits(std::uint8_t{1}, bool{}));
}

TEST(GgufBlocks, RefuseWhatTheyCannotHold) {
  std::vector<float> x(64, 1.0F);
  Bytes out(1024);
  for (const GgufType type : {GgufType::q4_0, GgufType::q4_1, GgufType::q8_0}) {
    expect_error<InvalidArgument>([&] { nibble::gguf_quantize(type, x.data(), 33, out.data()); }, {"33"});
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      x[37] = bad;
      expect_error<InvalidArgument>([&] { nibble::gguf_quantize(type, x.data(), 64, out.data()); },
                                    {"element 37"});
    }
    x[37] = 3e38F;
    x[38] = -3e38F;  // the range of Q4_1 overflows fp32, the scales of the others fp16
    expect_error<InvalidArgument>([&] { nibble::gguf_quantize(type, x.data(), 64, out.data()); },
                                  {"block 1", "fp16"});
    x[37] = x[38] = 1.0F;
  }
  x[40] = 65520.0F * 8;  // rounds to Inf as an fp16 scale
  expect_error<InvalidArgument>([&] { nibble::gguf_quantize(GgufType::q4_0, x.data(), 64, out.data()); },
                                {"block 1"});
  for (const GgufType type : {GgufType::q4_k, GgufType::q5_0, GgufType::q6_k, GgufType::q2_k, GgufType::i8})
    expect_error<Unsupported>([&] { nibble::gguf_quantize(type, x.data(), 0, out.data()); },
                              {std::string(nibble::name_of(type))});
  expect_error<Unsupported>([&] { nibble::gguf_dequantize(GgufType{77}, out.data(), 0, x.data()); }, {"77"});
  expect_error<InvalidArgument>([&] { nibble::gguf_dequantize(GgufType::q4_k, out.data(), 32, x.data()); },
                                {"256"});
  expect_error<InvalidArgument>([] { nibble::gguf_bytes(GgufType::f32, SIZE_MAX / 2); }, {"overflows"});
}

TEST(GgufWriter, RoundTripsAndCopiesMetadata) {
  const TempFolder folder;
  const GgufFile source = parse(small().bytes());
  {
    GgufWriter writer(folder.file("a.gguf"));
    writer.add_metadata(source);
    writer.add("extra", std::vector<std::string_view>{"x", "yy"});
    writer.declare(source.tensor("a"));
    writer.declare("empty", GgufType::f32, {0});
    writer.declare(source.tensor("f"));
    writer.declare("last", GgufType::q8_0, {0, 4});
    const nibble::Buffer a = source.tensor("a").data;
    writer.write(a.data(), 50);
    writer.write(a.data() + 50, 0);
    writer.write(a.data() + 50, a.size() - 50);
    writer.write_tensor("empty", nullptr, 0);
    writer.write_tensor("f", source.tensor("f").data.data(), 12);
    writer.commit();
  }
  const GgufFile file = GgufFile::open(folder.file("a.gguf"));
  ASSERT_EQ(file.metadata().size(), 6U);
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(file.metadata()[i].key, source.metadata()[i].key);
    EXPECT_EQ(file.metadata()[i].value.type(), source.metadata()[i].value.type());
  }
  EXPECT_EQ(file.get<GgufArray>("n").arrays()[0].as<int>(), (std::vector<int>{1, 2}));
  for (const char* name : {"a", "f"}) {
    const nibble::Buffer &ours = file.tensor(name).data, &theirs = source.tensor(name).data;
    ASSERT_EQ(ours.size(), theirs.size());
    EXPECT_EQ(std::memcmp(ours.data(), theirs.data(), ours.size()), 0);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(ours.data()) % 32, 0U);
  }
  EXPECT_EQ(file.tensor("last").elements, 0U);
}

TEST(GgufWriter, RefusesMisuseAndLeavesNothing) {
  const TempFolder folder;
  const std::string path = folder.file("b.gguf");
  {
    GgufWriter w(path);
    w.add("k", 1);
    expect_error<InvalidArgument>([&] { w.add("k", 2); }, {"'k'"});
    expect_error<InvalidArgument>([&] { w.add("", 2); });
    expect_error<InvalidArgument>([&] { w.add("\xFF", 2); }, {"UTF-8"});
    expect_error<InvalidArgument>([&] { w.add("general.alignment", 32); }, {"uint32"});
    w.declare("t", GgufType::q8_0, {32, 2});
    expect_error<InvalidArgument>([&] { w.declare("t", GgufType::f32, {1}); }, {"'t'"});
    expect_error<InvalidArgument>([&] { w.declare(std::string(64, 'n'), GgufType::f32, {1}); }, {"63"});
    expect_error<InvalidArgument>([&] { w.declare("u", GgufType::q8_0, {16, 4}); }, {"multiple of 32"});
    expect_error<InvalidArgument>([&] { w.declare("u", GgufType::f32, {SIZE_MAX, 2}); }, {"overflows"});
    expect_error<InvalidArgument>([&] { w.declare("u", GgufType::f32, {1, 1, 1, 1, 1}); }, {"5"});
    expect_error<InvalidArgument>([&] { w.declare("u", GgufType{50}, {1}); }, {"50"});
    const Bytes data(200);
    expect_error<InvalidArgument>([&] { w.write(data.data(), 69); }, {"'t'", "68"});
    expect_error<InvalidArgument>([&] { w.write_tensor("u", data.data(), 68); }, {"'u'", "'t'"});
    expect_error<InvalidArgument>([&] { w.write_tensor("t", data.data(), 67); }, {"68", "67"});
    w.write(data.data(), 34);
    expect_error<InvalidArgument>([&] { w.add("late", 1); }, {"after"});
    expect_error<InvalidArgument>([&] { w.declare("late", GgufType::f32, {1}); }, {"after"});
    expect_error<InvalidArgument>([&] { w.commit(); }, {"'t'"});
    const std::vector<float> x(64, 1.0F);
    expect_error<InvalidArgument>([&] { w.write_floats(x.data(), 64); }, {"'t'"});
    w.write_floats(x.data(), 32);
    expect_error<InvalidArgument>([&] { w.write(data.data(), 1); }, {"last"});
    EXPECT_FALSE(std::filesystem::exists(path));
    w.commit();
    EXPECT_NEAR(GgufFile::open(path).tensor("t").dequantize()[63], 1.0F, 0x1p-11);  // an fp16 scale
  }
  EXPECT_EQ(folder.count(), 1U);
  { GgufWriter dropped(folder.file("c.gguf")); }
  EXPECT_EQ(folder.count(), 1U);
}

}  // namespace
