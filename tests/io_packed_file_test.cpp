// Packed models: written, mapped and used in place; and refused, never misread, when anything in them is wrong.
#include "nibble/io/packed_file.hpp"

#include <gtest/gtest.h>

#include <Eigen/Core>
#include <cstring>
#include <string>
#include <vector>

#include "io_test_support.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace {

using namespace io_test;
using nibble::Format;
using nibble::FormatError;
using nibble::Granularity;
using nibble::InvalidArgument;
using nibble::PackedFile;
using nibble::PackedFileWriter;
using nibble::PackedMatrix;
using nibble::SafetensorsType;
using nibble::ScaleType;
using nibble::Scheme;
using nibble::Symmetry;
using nibble::Unsupported;

Eigen::MatrixXf random_matrix(Eigen::Index n, Eigen::Index k, unsigned seed) {
  Eigen::MatrixXf m(n, k);
  std::uint32_t state = seed;
  for (Eigen::Index i = 0; i < m.size(); ++i)
    m.data()[i] = static_cast<float>(static_cast<std::int32_t>(state = state * 1664525 + 1013904223)) * 0x1p-31F;
  return m;
}

std::vector<Scheme> schemes() {
  std::vector<Scheme> all;
  using G = Granularity;
  for (const Format f : {Format::fp32, Format::fp16, Format::bf16})
    all.push_back({f, Symmetry::symmetric, {}, {}, false});
  for (const Format f : {Format::int8, Format::int4, Format::int2, Format::int3, Format::int5, Format::int6})
    for (const Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
      for (const ScaleType t : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16})
        for (const G g : {G::per_tensor(), G::per_channel(0), G::per_group(32), G::per_group(48)})
          all.push_back({f, s, g, t, s == Symmetry::symmetric && g.kind == G::Kind::per_channel});
  for (const Format f : {Format::nf4, Format::fp4})
    all.push_back({f, Symmetry::symmetric, G::per_group(64), ScaleType::fp16, false});
  return all;
}

PackedMatrix packed(const Scheme& scheme, Eigen::Index n, Eigen::Index k, unsigned seed = 1) {
  return nibble::pack(nibble::DynamicQuantizer(scheme).quantize(random_matrix(n, k, seed)));
}

bool same(const nibble::Buffer& a, const nibble::Buffer& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}
void expect_same(const PackedMatrix& a, const PackedMatrix& b, const std::string& what) {
  EXPECT_EQ(a.scheme(), b.scheme()) << what;
  EXPECT_EQ(a.rows(), b.rows()) << what;
  EXPECT_EQ(a.cols(), b.cols()) << what;
  EXPECT_TRUE(same(a.codes(), b.codes())) << what;
  EXPECT_TRUE(same(a.scales(), b.scales())) << what;
  EXPECT_TRUE(same(a.zeros(), b.zeros())) << what;
  EXPECT_TRUE(same(a.channel_sums(), b.channel_sums())) << what;
  EXPECT_EQ(a.dequantize(), b.dequantize()) << what;
}

bool inside(const nibble::Buffer& part, const nibble::SafetensorsTensor& tensor) {
  return part.data() == tensor.data.data() && part.size() == tensor.data.size();
}

TEST(PackedFile, EverySchemeComesBackFromTheMapUncopied) {
  const TempFolder folder;
  const std::string path = folder.file("model.safetensors");
  std::vector<PackedMatrix> matrices;
  {
    PackedFileWriter writer(path);
    writer.add_metadata("architecture", "test");
    for (const Scheme& scheme : schemes()) {
      matrices.push_back(packed(scheme, 37, 100, static_cast<unsigned>(matrices.size()) + 1));
      writer.add("m" + std::to_string(matrices.size()), matrices.back());
    }
    writer.add_tensor("norm", {1.0F, 2.5F, -3.0F});
    nibble::Buffer words(5);
    std::memcpy(words.mutable_data(), "abcde", 5);
    writer.add_tensor("vocabulary", SafetensorsType::u8, {5}, words);
    writer.commit();
  }
  std::vector<PackedMatrix> outlive;
  {
    const PackedFile file = PackedFile::open(path);
    ASSERT_EQ(file.matrices().size(), matrices.size());
    EXPECT_EQ(*file.find_metadata("architecture"), "test");
    EXPECT_EQ(file.tensor("norm").values<float>(), (std::vector<float>{1.0F, 2.5F, -3.0F}));
    EXPECT_EQ(file.tensor("vocabulary").values<char>().back(), 'e');
    for (std::size_t i = 0; i < matrices.size(); ++i) {
      const std::string name = "m" + std::to_string(i + 1);
      const PackedMatrix& m = file.matrix(name);
      expect_same(m, matrices[i], name);
      EXPECT_TRUE(m.codes().borrowed() && inside(m.codes(), file.tensor(name + ".codes"))) << name;
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(m.codes().data()) % 64, 0U) << name;
      outlive.push_back(m);
    }
    EXPECT_EQ(file.find_matrix("m0"), nullptr);
    expect_error<FormatError>([&] { file.matrix("m0"); }, {"'m0'"});
  }
  std::filesystem::remove(path);
  for (std::size_t i = 0; i < matrices.size(); ++i) expect_same(outlive[i], matrices[i], std::to_string(i));
}

TEST(PackedFile, StreamsMatrixByMatrix) {
  const TempFolder folder;
  const PackedMatrix a =
      packed({Format::int4, Symmetry::symmetric, Granularity::per_group(32), ScaleType::fp16, false}, 40, 64);
  const PackedMatrix b =
      packed({Format::int8, Symmetry::asymmetric, Granularity::per_channel(0), ScaleType::fp32, false}, 16, 64);
  {
    PackedFileWriter writer(folder.file("s"));
    writer.declare("a", a.header(), !a.channel_sums().empty());
    writer.declare("b", b.header(), !b.channel_sums().empty());
    writer.declare_tensor("v", SafetensorsType::f32, {2});
    expect_error<InvalidArgument>([&] { writer.write("c", a); }, {"'c'"});
    expect_error<InvalidArgument>([&] { writer.write("a", b); }, {"'a'"});
    writer.write("b", b);
    expect_error<InvalidArgument>([&] { writer.commit(); }, {"a."});
    writer.write("a", a);
    expect_error<InvalidArgument>([&] { writer.write("a", a); }, {"a.codes"});
    const float v[2] = {1, 2};
    writer.write_tensor("v", v, 8);
    writer.commit();
  }
  const PackedFile file = PackedFile::open(folder.file("s"));
  expect_same(file.matrix("a"), a, "a");
  expect_same(file.matrix("b"), b, "b");
}

nibble::DoubleQuantizedTensor double_quantized(const Scheme& scheme, Eigen::Index n, Eigen::Index k,
                                               nibble::ScaleMap map) {
  nibble::DoubleQuantOptions options;
  options.map = map;
  options.block = 100;
  return nibble::double_quantize(nibble::DynamicQuantizer(scheme).quantize(random_matrix(n, k, 3)), options);
}

TEST(PackedFile, DoubleQuantizedScales) {
  using G = Granularity;
  const TempFolder folder;
  for (const Scheme& scheme :
       {Scheme{Format::nf4, Symmetry::symmetric, G::per_group(64), ScaleType::fp32, false},
        Scheme{Format::int4, Symmetry::asymmetric, G::per_group(32), ScaleType::fp16, false},
        Scheme{Format::int4, Symmetry::float_offset, G::per_group(48), ScaleType::bf16, false},
        Scheme{Format::int8, Symmetry::symmetric, G::per_channel(0), ScaleType::fp32, false},
        Scheme{Format::int8, Symmetry::symmetric, G::per_tensor(), ScaleType::fp32, false}})
    for (const nibble::ScaleMap map : {nibble::ScaleMap::dynamic, nibble::ScaleMap::linear})
      for (const Eigen::Index n : {0, 5, 37}) {
        const nibble::DoubleQuantizedTensor q = double_quantized(scheme, n, 1000, map);
        const PackedMatrix m = nibble::pack(q.tensor);
        const PackedMatrix plain = packed({Format::fp32, Symmetry::symmetric, {}, {}, false}, 3, 4);
        PackedFileWriter writer(folder.file("added"));
        writer.add("m", m, q.scales);
        writer.add("plain", plain);
        writer.commit();
        PackedFileWriter streamed(folder.file("streamed"));
        streamed.declare("m", m.header(), !m.channel_sums().empty(), nibble::DoubleQuantOptions{100, map});
        streamed.declare("plain", plain.header(), !plain.channel_sums().empty());
        streamed.write("m", m, q.scales);
        streamed.write("plain", plain);
        streamed.commit();
        EXPECT_EQ(read_file(folder.file("added")), read_file(folder.file("streamed")));

        const PackedFile file = PackedFile::open(folder.file("added"));
        expect_same(file.matrix("m"), m, "m");
        expect_same(file.matrix("plain"), plain, "plain");
        EXPECT_EQ(file.find_tensor("m.scales"), nullptr);
        EXPECT_EQ(file.double_quantized_scales("plain"), nullptr);
        ASSERT_NE(file.double_quantized_scales("m"), nullptr);
        EXPECT_EQ(file.double_quantized_scales("m")->decode(), q.scales.decode());
        EXPECT_EQ(file.double_quantized_scales("m")->byte_size(), q.scales.byte_size());
        if (n != 0) {
          EXPECT_TRUE(inside(file.matrix("m").codes(), file.tensor("m.codes")));
        }
      }
}

TEST(PackedFile, DoubleQuantizedScalesMustBeTheMatrix) {
  const TempFolder folder;
  const Scheme scheme{Format::nf4, Symmetry::symmetric, Granularity::per_group(64), ScaleType::fp32, false};
  const nibble::DoubleQuantizedTensor q = double_quantized(scheme, 20, 640, nibble::ScaleMap::dynamic);
  const PackedMatrix m = nibble::pack(q.tensor);
  PackedFileWriter writer(folder.file("x"));
  nibble::DoubleQuantizedScales other = q.scales;
  other.codes[7] ^= 1;
  writer.add("m", m, other);
  expect_error<InvalidArgument>([&] { writer.commit(); }, {"'m'", "do not decode"});
  PackedFileWriter second(folder.file("x"));
  second.declare("m", m.header(), !m.channel_sums().empty(),
                 nibble::DoubleQuantOptions{100, nibble::ScaleMap::dynamic});
  expect_error<InvalidArgument>([&] { second.write("m", m); }, {"'m'", "declaration"});
  other = q.scales;
  other.absmax.push_back(1.0F);
  expect_error<InvalidArgument>([&] { second.write("m", m, other); }, {"'m'", "than were declared"});
  const PackedMatrix halves =
      packed({Format::nf4, Symmetry::symmetric, Granularity::per_group(64), ScaleType::fp16, false}, 20, 640);
  expect_error<InvalidArgument>([&] { second.declare("h", halves.header(), true, nibble::DoubleQuantOptions{}); },
                                {"'h'", "fp32"});
}

TEST(PackedFile, EmptyMatrices) {
  const TempFolder folder;
  {
    PackedFileWriter writer(folder.file("e"));
    writer.add("none", PackedMatrix());
    writer.add("rows", nibble::pack(Eigen::MatrixXf(0, 5)));
    writer.add("cols", nibble::pack(Eigen::MatrixXf(5, 0)));
    writer.commit();
  }
  const PackedFile file = PackedFile::open(folder.file("e"));
  EXPECT_EQ(file.matrix("rows").cols(), 5);
  EXPECT_EQ(file.matrix("cols").rows(), 5);
  EXPECT_EQ(file.matrix("none").rows(), 0);
}

TEST(PackedFile, WriterRefusesNamesThatAreTaken) {
  const TempFolder folder;
  PackedFileWriter writer(folder.file("x"));
  expect_error<InvalidArgument>([&] { writer.add_metadata("format", "x"); }, {"format"});
  expect_error<InvalidArgument>([&] { writer.add_metadata("version", "x"); }, {"version"});
  expect_error<InvalidArgument>([&] { writer.add_metadata("layout", "x"); }, {"layout"});
  expect_error<InvalidArgument>([&] { writer.add_metadata("matrix:a", "x"); }, {"matrix:"});
  writer.add("a", nibble::pack(Eigen::MatrixXf::Ones(3, 3)));
  expect_error<InvalidArgument>([&] { writer.add("a", nibble::pack(Eigen::MatrixXf::Ones(3, 3))); }, {"a"});
  expect_error<InvalidArgument>([&] { writer.add_tensor("a.codes", {1.0F}); }, {"a.codes"});
  expect_error<InvalidArgument>([&] { writer.add_tensor("t", SafetensorsType::f32, {2}, nibble::Buffer(4)); },
                                {"'t'"});
}

/// A small valid file, as header text and data, whose text can be changed.
struct Parts {
  std::string header;
  Bytes data;
  Bytes join(const std::string& text) const {
    Bytes bytes;
    append(bytes, static_cast<std::uint64_t>(text.size()));
    append_text(bytes, text);
    bytes.insert(bytes.end(), data.begin(), data.end());
    return bytes;
  }
  std::string replaced(const std::string& from, const std::string& to) const {
    std::string text = header;
    const std::size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    if (at != std::string::npos) text.replace(at, from.size(), to);
    return text;
  }
};

Parts small_file(const Scheme& scheme) {
  const TempFolder folder;
  {
    PackedFileWriter writer(folder.file("p"));
    writer.add("w", packed(scheme, 20, 64));
    writer.commit();
  }
  const Bytes bytes = read_file(folder.file("p"));
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  const auto data = bytes.begin() + 8 + static_cast<std::ptrdiff_t>(length);
  return {std::string(bytes.begin() + 8, data), Bytes(data, bytes.end())};
}

const Scheme int4_asymmetric{Format::int4, Symmetry::asymmetric, Granularity::per_group(32), ScaleType::fp16,
                             false};

PackedFile parse(const Bytes& bytes) { return PackedFile::parse(exact_buffer(bytes), "test"); }

TEST(PackedFile, RefusesOtherFilesVersionsAndLayouts) {
  const Parts parts = small_file(int4_asymmetric);
  EXPECT_NO_THROW(parse(parts.join(parts.header)));
  expect_error<FormatError>([&] { parse(parts.join(parts.replaced("nibble-packed", "nibble-pickle"))); },
                            {"test", "no packed model"});
  expect_error<FormatError>([&] { parse(parts.join(parts.replaced("\"format\":", "\"formal\":"))); },
                            {"no packed model"});
  for (const char* version : {"2", "10", "", "1.0", " 1"})
    expect_error<Unsupported>(
        [&] {
          parse(parts.join(parts.replaced("\"version\":\"1\"", std::string("\"version\":\"") + version + "\"")));
        },
        {"test", "version"});
  expect_error<Unsupported>(
      [&] { parse(parts.join(parts.replaced("\"layout\":\"panel16\"", "\"layout\":\"panel32\""))); }, {"panel32"});
  expect_error<Unsupported>(
      [&] { parse(parts.join(parts.replaced("\\\"layout\\\":\\\"panel16\\\"", "\\\"layout\\\":\\\"amx\\\""))); },
      {"'w'", "amx"});
}

TEST(PackedFile, RefusesHeadersThatLie) {
  const Parts parts = small_file(int4_asymmetric);
  const std::vector<std::pair<std::string, std::string>> lies = {
      {"\\\"rows\\\":20", "\\\"rows\\\":40"},
      {"\\\"rows\\\":20", "\\\"rows\\\":16"},
      {"\\\"rows\\\":20", "\\\"rows\\\":18446744073709551615"},
      {"\\\"rows\\\":20", "\\\"rows\\\":-20"},
      {"\\\"rows\\\":20", "\\\"rows\\\":20.0"},
      {"\\\"rows\\\":20", "\\\"rows\\\":\\\"20\\\""},
      {"\\\"rows\\\":20", "\\\"lines\\\":20"},
      {"\\\"rows\\\":20", "\\\"rows\\\":20,\\\"rows\\\":20"},
      {"\\\"rows\\\":20", "\\\"rows\\\":20,\\\"extra\\\":1"},
      {"\\\"rows\\\":20", "\\\"rows\\\":[20]"},
      {"\\\"rows\\\":20", "\\\"rows\\\":{}"},
      {"\\\"cols\\\":64", "\\\"cols\\\":65"},
      {"\\\"cols\\\":64", "\\\"cols\\\":0"},
      {"\\\"cols\\\":64", "\\\"cols\\\":4611686018427387904"},
      {"\\\"group_size\\\":32", "\\\"group_size\\\":16"},
      {"\\\"group_size\\\":32", "\\\"group_size\\\":33"},
      {"\\\"group_size\\\":32", "\\\"group_size\\\":0"},
      {"\\\"axis\\\":1", "\\\"axis\\\":2"},
      {"\\\"axis\\\":1", "\\\"axis\\\":-1"},
      {"\\\"full_range\\\":false", "\\\"full_range\\\":true"},
      {"\\\"full_range\\\":false", "\\\"full_range\\\":0"},
      {"\\\"format\\\":\\\"int4\\\"", "\\\"format\\\":\\\"int8\\\""},
      {"\\\"format\\\":\\\"int4\\\"", "\\\"format\\\":\\\"int3\\\""},
      {"\\\"format\\\":\\\"int4\\\"", "\\\"format\\\":\\\"nf4\\\""},
      {"\\\"format\\\":\\\"int4\\\"", "\\\"format\\\":\\\"fp32\\\""},
      {"\\\"symmetry\\\":\\\"asymmetric\\\"", "\\\"symmetry\\\":\\\"float_offset\\\""},
      {"\\\"symmetry\\\":\\\"asymmetric\\\"", "\\\"symmetry\\\":\\\"asymmetry\\\""},
      {"\\\"scale_type\\\":\\\"fp16\\\"", "\\\"scale_type\\\":\\\"fp32\\\""},
      {"\\\"scale_type\\\":\\\"fp16\\\"", "\\\"scale_type\\\":\\\"bf16\\\""},
      {"\\\"granularity\\\":\\\"per_group\\\"", "\\\"granularity\\\":\\\"per_channel\\\""},
      {"\\\"granularity\\\":\\\"per_group\\\"", "\\\"granularity\\\":\\\"per_block\\\""},
      {"\\\"layout\\\":\\\"panel16\\\"", "\\\"layout\\\":1"},
      {"\"{\\\"axis\\\"", "\"[{\\\"axis\\\""},
      {"\"{\\\"axis\\\"", "\"\\u0000{\\\"axis\\\""},
      {"\"matrix:w\":\"{", "\"matrix:w\":\""},
      {"\"matrix:w\"", "\"matrix:v\""},
      {"\"w.codes\"", "\"w.code\""},
      {"\"w.scales\"", "\"w.scale\""},
      {"\"w.zeros\"", "\"w.zero\""},
      {"\"dtype\":\"I8\"", "\"dtype\":\"U8\""},
      {"\"dtype\":\"F16\"", "\"dtype\":\"BF16\""},
      {"\"shape\":[2,2,16]", "\"shape\":[2,1,32]"},
  };
  for (const auto& [from, to] : lies) {
    const std::string text = parts.replaced(from, to);
    SCOPED_TRACE(to);
    expect_error<FormatError>([&] { parse(parts.join(text)); }, {"test"});
  }
  const std::string across = parts.replaced("\\\"axis\\\":1", "\\\"axis\\\":0");
  expect_error<Unsupported>([&] { parse(parts.join(across)); }, {"test", "'w'", "axis 0"});
}

TEST(PackedFile, RefusesDoubleQuantizedScalesThatLie) {
  const TempFolder folder;
  const Scheme scheme{Format::nf4, Symmetry::symmetric, Granularity::per_group(32), ScaleType::fp32, false};
  const nibble::DoubleQuantizedTensor q = double_quantized(scheme, 20, 640, nibble::ScaleMap::dynamic);
  {
    PackedFileWriter writer(folder.file("p"));
    writer.add("w", nibble::pack(q.tensor), q.scales);
    writer.commit();
  }
  const Bytes bytes = read_file(folder.file("p"));
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  const auto data = bytes.begin() + 8 + static_cast<std::ptrdiff_t>(length);
  const Parts parts{std::string(bytes.begin() + 8, data), Bytes(data, bytes.end())};
  EXPECT_NO_THROW(parse(parts.join(parts.header)));
  const std::vector<std::pair<std::string, std::string>> lies = {
      {"\\\"double8\\\"", "\\\"double4\\\""},
      {"\\\"scale_coding\\\"", "\\\"scale_codes\\\""},
      {"\\\"dynamic\\\"", "\\\"dinamic\\\""},
      {"\\\"scale_block\\\":100", "\\\"scale_block\\\":0"},
      {"\\\"scale_block\\\":100", "\\\"scale_block\\\":50"},
      {"\\\"scale_block\\\":100", "\\\"scale_block\\\":-100"},
      {"\\\"scale_block\\\":100", "\\\"block\\\":100"},
      {"\\\"scale_type\\\":\\\"fp32\\\"", "\\\"scale_type\\\":\\\"fp16\\\""},
      {"\\\"group_size\\\":32", "\\\"group_size\\\":64"},
      {"\"w.scale_codes\"", "\"w.scales\""},
      {"\"w.scale_absmax\"", "\"w.scale_absmin\""},
      {"\"w.scale_offset\"", "\"w.scale_set\""},
      {"\"shape\":[400]", "\"shape\":[20,20]"},
  };
  for (const auto& [from, to] : lies) {
    const std::string text = parts.replaced(from, to);
    SCOPED_TRACE(to);
    expect_error<FormatError>([&] { parse(parts.join(text)); }, {"test", "'w'"});
  }
  // What is no number.
  const auto file = nibble::SafetensorsFile::parse(exact_buffer(bytes));
  for (const char* name : {"w.scale_absmax", "w.scale_offset"})
    for (const std::uint32_t bad : {0x7FC00000U, 0xFF800000U}) {
      Bytes broken = bytes;
      const auto at =
          static_cast<std::size_t>(file.find_tensor(name)->data.data() - file.tensors()[0].data.data()) +
          (bytes.size() - parts.data.size());
      std::memcpy(broken.data() + at, &bad, 4);
      expect_error<FormatError>([&] { parse(broken); }, {"test", "'w'", "double-quantized"});
    }
  for (std::size_t n = 0; n < bytes.size(); n += 7)
    expect_error<FormatError>(
        [&] { parse(Bytes(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n))); });
}

TEST(PackedFile, RefusesParametersThatAreNoNumbers) {
  struct Case {
    Scheme scheme;
    std::string tensor;
    Bytes value;
  };
  const Scheme symmetric{Format::int4, Symmetry::symmetric, Granularity::per_group(32), ScaleType::fp32, false};
  const Scheme int3{Format::int3, Symmetry::asymmetric, Granularity::per_group(32), ScaleType::fp16, false};
  const Scheme int6{Format::int6, Symmetry::asymmetric, Granularity::per_group(32), ScaleType::fp16, false};
  const Scheme offset{Format::int8, Symmetry::float_offset, Granularity::per_group(32), ScaleType::fp16, false};
  for (const Case& c :
       {Case{int4_asymmetric, "w.scales", {0x00, 0x7C}}, Case{int4_asymmetric, "w.scales", {0x01, 0xFC}},
        Case{int4_asymmetric, "w.zeros", {16}}, Case{int3, "w.zeros", {8}}, Case{int6, "w.zeros", {64}},
        Case{int3, "w.scales", {0x00, 0x7C}}, Case{int4_asymmetric, "w.zeros", {0xFF}},
        Case{symmetric, "w.scales", {0x00, 0x00, 0xC0, 0x7F}}, Case{offset, "w.zeros", {0x00, 0xFC}},
        Case{symmetric, "w.channel_sums", {0x00, 0x00, 0x80, 0x7F}}}) {
    const Parts parts = small_file(c.scheme);
    Bytes bytes = parts.join(parts.header);
    const auto file = nibble::SafetensorsFile::parse(exact_buffer(bytes));
    const auto* tensor = file.find_tensor(c.tensor);
    ASSERT_NE(tensor, nullptr) << c.tensor;
    const auto at = static_cast<std::size_t>(tensor->data.data() - file.tensors()[0].data.data()) +
                    (bytes.size() - parts.data.size());
    for (std::size_t i = 0; i < c.value.size(); ++i) bytes[at + c.value.size() + i] = c.value[i];
    expect_error<FormatError>([&] { parse(bytes); }, {"test", "'w'"});
  }
}

TEST(PackedFile, MisalignedFilesAreCopiedAndWork) {
  const Parts parts = small_file(int4_asymmetric);
  const PackedMatrix good = parse(parts.join(parts.header)).matrix("w");
  for (const std::size_t spaces : {1U, 2U, 8U, 33U}) {
    const PackedFile file = parse(parts.join(parts.header + std::string(spaces, ' ')));
    expect_same(file.matrix("w"), good, std::to_string(spaces));
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(file.matrix("w").codes().data()) % 64, 0U);
  }
}

TEST(PackedFile, TruncationsAndFlippedBitsOfTheHeaderAreErrorsOrValid) {
  const Parts parts = small_file(int4_asymmetric);
  const Bytes whole = parts.join(parts.header);
  for (std::size_t n = 0; n < whole.size(); ++n)
    expect_error<FormatError>(
        [&] { parse(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(n))); });
  int valid = 0, refused = 0;
  for (std::size_t at = 0; at < whole.size() - parts.data.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      Bytes bytes = whole;
      bytes[at] = static_cast<std::uint8_t>(bytes[at] ^ (1 << bit));
      try {
        const PackedFile file = parse(bytes);
        for (const auto& [name, matrix] : file.matrices())
          ASSERT_EQ(matrix.dequantize().size(), matrix.rows() * matrix.cols());
        ++valid;
      } catch (const FormatError&) {
        ++refused;
      } catch (const Unsupported&) {
        ++refused;
      }
    }
  }
  EXPECT_GT(valid, 50);
  EXPECT_GT(refused, 1000);
}

}  // namespace
