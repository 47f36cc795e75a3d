// GPTQ and AWQ checkpoints: against files that a NumPy script packs, written back to the same bytes, and hostile ones.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "io_test_support.hpp"
#include "nibble/io/awq_checkpoint.hpp"
#include "nibble/io/gptq_checkpoint.hpp"
#include "nibble/io/safetensors_folder.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace {

using namespace io_test;
using nibble::CheckpointLinear;
using nibble::FormatError;
using nibble::GptqConfig;
using nibble::GptqVersion;
using nibble::SafetensorsTensor;
using nibble::SafetensorsType;
using nibble::Unsupported;
using Json = nlohmann::json;

std::string checkpoint_script() {
  std::string path = golden_script();
  return path.replace(path.find("io_golden.py"), 12, "io_checkpoint_golden.py");
}

/// The tensors of a checkpoint, in memory.
struct Tensors {
  std::map<std::string, SafetensorsTensor, std::less<>> all;

  const SafetensorsTensor* find_tensor(const std::string& name) const {
    const auto at = all.find(name);
    return at == all.end() ? nullptr : &at->second;
  }
  const SafetensorsTensor& tensor(const std::string& name) const {
    const SafetensorsTensor* t = find_tensor(name);
    if (t == nullptr) throw FormatError("tensor '" + name + "' is missing");
    return *t;
  }
};

Tensors tensors_of(std::vector<SafetensorsTensor> list) {
  Tensors t;
  for (SafetensorsTensor& tensor : list) t.all[tensor.name] = std::move(tensor);
  return t;
}

/// Values with the inputs where they belong, outputs x inputs.
std::vector<float> values_of(const CheckpointLinear& linear) {
  std::vector<float> sorted(linear.weight.size());
  linear.weight.dequantize(sorted.data());
  if (linear.input_order.empty()) return sorted;
  std::vector<float> out(sorted.size());
  const std::size_t cols = linear.weight.shape()[1];
  for (std::size_t n = 0; n < linear.weight.shape()[0]; ++n)
    for (std::size_t k = 0; k < cols; ++k)
      out[n * cols + static_cast<std::size_t>(linear.input_order[k])] = sorted[n * cols + k];
  return out;
}

void expect_same_bytes(const SafetensorsTensor& ours, const SafetensorsTensor& theirs, const std::string& what) {
  EXPECT_EQ(ours.type, theirs.type) << what << " " << ours.name;
  EXPECT_EQ(ours.shape, theirs.shape) << what << " " << ours.name;
  ASSERT_EQ(ours.data.size(), theirs.data.size()) << what << " " << ours.name;
  EXPECT_EQ(std::memcmp(ours.data.data(), theirs.data.data(), ours.data.size()), 0) << what << " " << ours.name;
}

TEST(Checkpoint, EqualsWhatNumPyPacked) {
  NIBBLE_SKIP_WITHOUT_GGUF_PYTHON(python);
  const TempFolder folder;
  int status = 0;
  const std::string output = run(python + " " + checkpoint_script() + " '" + folder.path() + "' 2>&1", status);
  ASSERT_EQ(status, 0) << output;
  const Bytes names = read_file(folder.file("cases.txt"));
  std::istringstream cases(std::string(names.begin(), names.end()));
  std::size_t seen = 0;
  for (std::string name; cases >> name;) {
    const auto file = nibble::SafetensorsFile::open(folder.file(name + ".safetensors"));
    const Json json = nibble::read_json_object(folder.file(name + ".json"));
    CheckpointLinear linear;
    std::vector<SafetensorsTensor> written;
    bool symmetric = false;
    if (name.compare(0, 3, "awq") == 0) {
      const auto config = nibble::parse_awq_config(json);
      symmetric = !config.zero_point;
      linear = nibble::read_awq(file, "layer", config);
      written = nibble::to_awq("layer", linear);
    } else {
      GptqConfig config = nibble::parse_gptq_config(json);
      symmetric = config.symmetric.value();
      const GptqVersion version = nibble::find_gptq_version(file, {"layer"}, config);
      EXPECT_EQ(version, config.version.value()) << name;
      // Without the tag, the values of symmetric files tell; those of others do not.
      config.version.reset();
      config.symmetric.reset();
      if (symmetric)
        EXPECT_EQ(nibble::find_gptq_version(file, {"layer"}, config), version) << name;
      else
        expect_error<FormatError>([&] { nibble::find_gptq_version(file, {"layer"}, config); },
                                  {"checkpoint_format"});
      linear = nibble::read_gptq(file, "layer", config, version);
      EXPECT_EQ(linear.input_order.empty(), !config.act_order) << name;
      written = nibble::to_gptq("layer", linear, version);
    }
    ++seen;
    EXPECT_EQ(linear.weight.scheme().symmetry == nibble::Symmetry::symmetric, symmetric) << name;
    const auto golden = read_values<float>(folder.file(name + ".values"));
    const std::vector<float> ours = values_of(linear);
    ASSERT_EQ(ours.size(), golden.size()) << name;
    // One product of two numbers that both hold exactly: the same rounding. (0 * -scale: the sign of 0 is free.)
    for (std::size_t i = 0; i < ours.size(); ++i) ASSERT_EQ(ours[i], golden[i]) << name << " element " << i;
    ASSERT_EQ(written.size(), file.tensors().size()) << name;
    for (const SafetensorsTensor& t : written) expect_same_bytes(t, file.tensor(t.name), name);
  }
  EXPECT_EQ(seen, 38U);
}

/// A layer of random codes in groups.
CheckpointLinear random_layer(nibble::Format format, nibble::Symmetry symmetry, std::size_t rows, std::size_t cols,
                              std::size_t group) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  Eigen::MatrixXf w(static_cast<Eigen::Index>(rows), static_cast<Eigen::Index>(cols));
  for (Eigen::Index i = 0; i < w.size(); ++i) w.data()[i] = normal(random);
  nibble::Scheme scheme;
  scheme.format = format;
  scheme.symmetry = symmetry;
  scheme.scale_type = nibble::ScaleType::fp16;
  scheme.granularity = nibble::Granularity::per_group(group, 1);
  return {nibble::DynamicQuantizer(scheme).quantize(w), {}};
}

const auto int4 = nibble::Format::int4;
const auto asymmetric = nibble::Symmetry::asymmetric;

GptqConfig config_of(unsigned bits = 4, std::size_t group = 32) {
  GptqConfig c;
  c.bits = bits;
  c.group_size = group;
  return c;
}

TEST(Checkpoint, OurLayersComeBack) {
  for (const auto format : {int4, nibble::Format::int8, nibble::Format::int2, nibble::Format::int3})
    for (const auto symmetry : {nibble::Symmetry::symmetric, asymmetric})
      for (const auto version : {GptqVersion::v1, GptqVersion::v2}) {
        CheckpointLinear layer = random_layer(format, symmetry, 32, 96, 32);
        for (int k = 0; k < 96; ++k) layer.input_order.push_back((k * 7 + 5) % 96);
        const GptqConfig config = config_of(nibble::bits_of(format));
        const auto back =
            nibble::read_gptq(tensors_of(nibble::to_gptq("x", layer, version)), "x", config, version);
        EXPECT_EQ(values_of(back), values_of(layer));
        EXPECT_EQ(back.weight.scheme().symmetry, symmetry);
        if (format != int4) continue;
        layer.input_order.clear();
        const auto again = nibble::read_awq(tensors_of(nibble::to_awq("x", layer)), "x",
                                            nibble::parse_awq_config(Json{{"group_size", 32}}));
        EXPECT_EQ(values_of(again), values_of(layer));
      }
}

TEST(Checkpoint, VersionByValuesWhereTheTagIsWrong) {
  const CheckpointLinear symmetric = random_layer(int4, nibble::Symmetry::symmetric, 16, 64, 32);
  GptqConfig config = config_of();
  config.symmetric = true;
  config.version = GptqVersion::v1;  // what the file calls itself
  EXPECT_EQ(nibble::find_gptq_version(tensors_of(nibble::to_gptq("x", symmetric, GptqVersion::v2)), {"x"}, config),
            GptqVersion::v2);
  config.version = GptqVersion::v2;
  EXPECT_EQ(nibble::find_gptq_version(tensors_of(nibble::to_gptq("x", symmetric, GptqVersion::v1)), {"x"}, config),
            GptqVersion::v1);
  // Of an asymmetric checkpoint the values say nothing, whatever they are.
  config.symmetric = false;
  EXPECT_EQ(nibble::find_gptq_version(tensors_of(nibble::to_gptq("x", symmetric, GptqVersion::v1)), {"x"}, config),
            GptqVersion::v2);
  config.version.reset();
  expect_error<FormatError>(
      [&] {
        nibble::find_gptq_version(tensors_of(nibble::to_gptq("x", symmetric, GptqVersion::v1)), {"x"}, config);
      },
      {"checkpoint_format", "gptq_v2"});
  // One layer of another opinion, and a checkpoint without layers.
  config.symmetric.reset();
  Tensors two = tensors_of(nibble::to_gptq("x", symmetric, GptqVersion::v1));
  for (SafetensorsTensor& t : nibble::to_gptq("y", symmetric, GptqVersion::v2)) two.all[t.name] = t;
  EXPECT_THROW(nibble::find_gptq_version(two, {"x", "y"}, config), FormatError);
  EXPECT_THROW(nibble::find_gptq_version(two, {}, config), FormatError);
}

template <class T>
SafetensorsTensor with_value(const SafetensorsTensor& t, std::size_t at, T value) {
  SafetensorsTensor out = t;
  out.data = nibble::Buffer(t.data.size());
  std::memcpy(out.data.mutable_data(), t.data.data(), t.data.size());
  std::memcpy(out.data.mutable_data() + at * sizeof(T), &value, sizeof(T));
  return out;
}

TEST(Checkpoint, HostileTensors) {
  const CheckpointLinear layer = random_layer(int4, asymmetric, 16, 64, 32);
  const Tensors good = tensors_of(nibble::to_gptq("x", layer, GptqVersion::v2));
  const auto read = [&](const Tensors& t, const GptqConfig& config) {
    return nibble::read_gptq(t, "x", config, GptqVersion::v2);
  };
  EXPECT_NO_THROW(read(good, config_of()));
  const auto changed = [&](const std::string& name, const std::function<void(SafetensorsTensor&)>& change) {
    Tensors t = good;
    change(t.all.at(name));
    return t;
  };
  const auto bad = [&](const std::string& name, const std::function<void(SafetensorsTensor&)>& change) {
    expect_error<FormatError>([&] { read(changed(name, change), config_of()); }, {"'x."});
  };
  for (const char* name : {"x.qweight", "x.qzeros", "x.scales"}) {
    Tensors t = good;
    t.all.erase(name);
    expect_error<FormatError>([&] { read(t, config_of()); }, {name});
  }
  for (const char* name : {"x.qweight", "x.qzeros", "x.g_idx"})
    bad(name, [](SafetensorsTensor& t) { t.type = SafetensorsType::f32; });
  bad("x.scales", [](SafetensorsTensor& t) { t.type = SafetensorsType::i16; });
  // Shapes of the same bytes.
  bad("x.qweight", [](SafetensorsTensor& t) { t.shape = {4, 32}; });
  bad("x.qweight", [](SafetensorsTensor& t) { t.shape = {128}; });
  bad("x.qweight", [](SafetensorsTensor& t) { t.shape = {8, 8, 2}; });
  bad("x.qweight", [](SafetensorsTensor& t) { t.shape = {std::numeric_limits<std::size_t>::max(), 0}; });
  bad("x.qweight", [](SafetensorsTensor& t) { t.shape = {128, 1}; });
  bad("x.qzeros", [](SafetensorsTensor& t) { t.shape = {1, 4}; });
  bad("x.qzeros", [](SafetensorsTensor& t) { t.shape = {4, 1}; });
  bad("x.scales", [](SafetensorsTensor& t) { t.shape = {16, 2}; });
  bad("x.scales", [](SafetensorsTensor& t) { t.shape = {32}; });
  bad("x.g_idx", [](SafetensorsTensor& t) { t.shape = {8, 8}; });
  bad("x.g_idx", [](SafetensorsTensor& t) {
    t.shape = {32};
    t.type = SafetensorsType::i64;
  });
  for (const std::int32_t group : {2, -1, std::numeric_limits<std::int32_t>::max(), INT32_MIN})
    bad("x.g_idx", [&](SafetensorsTensor& t) { t = with_value(t, 63, group); });
  for (const std::uint16_t scale : {std::uint16_t{0x7C00}, std::uint16_t{0xFC00}, std::uint16_t{0x7E01}})
    bad("x.scales", [&](SafetensorsTensor& t) { t = with_value(t, 31, scale); });
  // Well formed, but not for us.
  expect_error<Unsupported>(
      [&] {
        read(changed("x.g_idx", [](SafetensorsTensor& t) { t = with_value(t, 63, std::int32_t{0}); }),
             config_of());
      },
      {"g_idx", "33 inputs, expected 32"});
  expect_error<Unsupported>([&] { read(good, config_of(4, 8)); }, {"multiple of 16"});
  EXPECT_THROW(read(good, config_of(4, 16)), FormatError);
  EXPECT_THROW(read(good, config_of(8, 32)), FormatError);
  EXPECT_THROW(read(good, config_of(4, 0)), FormatError);
  EXPECT_THROW(nibble::read_gptq(good, "y", config_of(), GptqVersion::v2), FormatError);

  const Tensors awq = tensors_of(nibble::to_awq("x", random_layer(int4, asymmetric, 24, 64, 32)));
  nibble::AwqConfig awq_config;
  awq_config.group_size = 32;
  EXPECT_NO_THROW(nibble::read_awq(awq, "x", awq_config));
  for (const char* name : {"x.qweight", "x.qzeros", "x.scales"}) {
    Tensors t = awq;
    std::swap(t.all.at(name).shape[0], t.all.at(name).shape[1]);
    expect_error<FormatError>([&] { nibble::read_awq(t, "x", awq_config); }, {"'x."});
    t.all.at(name).type = SafetensorsType::u8;
    EXPECT_THROW(nibble::read_awq(t, "x", awq_config), FormatError);
    t.all.erase(name);
    expect_error<FormatError>([&] { nibble::read_awq(t, "x", awq_config); }, {name});
  }
  Tensors nan = awq;
  nan.all.at("x.scales") = with_value(nan.all.at("x.scales"), 25, std::uint16_t{0x7E00});
  expect_error<FormatError>([&] { nibble::read_awq(nan, "x", awq_config); }, {"group 1", "output 1", "finite"});
  awq_config.group_size = 8;
  EXPECT_THROW(nibble::read_awq(awq, "x", awq_config), Unsupported);
}

TEST(Checkpoint, EveryFlippedBitOfGroupsAndWordsIsAnErrorOrALayer) {
  const CheckpointLinear layer = random_layer(int4, asymmetric, 8, 32, 16);
  const Tensors good = tensors_of(nibble::to_gptq("x", layer, GptqVersion::v1));
  std::size_t read = 0, refused = 0;
  for (const auto& entry : good.all)
    for (std::size_t bit = 0; bit < entry.second.data.size() * 8; ++bit) {
      Tensors t = good;
      SafetensorsTensor& changed = t.all.at(entry.first);
      const std::uint8_t byte = static_cast<std::uint8_t>(changed.data.data()[bit / 8] ^ 1U << bit % 8);
      changed = with_value(changed, bit / 8, byte);
      try {
        const auto linear = nibble::read_gptq(t, "x", config_of(4, 16), GptqVersion::v1);
        // What is read at all is written back as it was: codes and zero points have no second spelling.
        for (const SafetensorsTensor& w : nibble::to_gptq("x", linear, GptqVersion::v1))
          expect_same_bytes(w, t.tensor(w.name), "bit " + std::to_string(bit));
        ++read;
      } catch (const nibble::Error&) {
        ++refused;
      }
    }
  EXPECT_GT(read, 0U);
  EXPECT_GT(refused, 0U);
}

TEST(Checkpoint, LayersThatCheckpointsCannotHold) {
  const auto refused = [](const CheckpointLinear& layer, const std::string& why) {
    expect_error<Unsupported>([&] { nibble::to_gptq("x", layer, GptqVersion::v2); }, {"x", why});
    expect_error<Unsupported>([&] { nibble::to_awq("x", layer); }, {"x"});
  };
  refused(random_layer(nibble::Format::nf4, nibble::Symmetry::symmetric, 16, 64, 32), "nf4");
  refused(random_layer(int4, nibble::Symmetry::float_offset, 16, 64, 32), "float offsets");
  refused(random_layer(int4, asymmetric, 9, 64, 32), "whole words");
  CheckpointLinear layer = random_layer(int4, asymmetric, 16, 64, 32);
  layer.input_order.assign(64, 0);
  EXPECT_THROW(nibble::to_gptq("x", layer, GptqVersion::v2), nibble::InvalidArgument);
  layer.input_order.assign(64, 64);
  EXPECT_THROW(nibble::to_gptq("x", layer, GptqVersion::v2), nibble::InvalidArgument);
  layer.input_order.assign(3, 0);
  EXPECT_THROW(nibble::to_gptq("x", layer, GptqVersion::v2), nibble::InvalidArgument);
  EXPECT_THROW(nibble::to_awq("x", layer), Unsupported);
  EXPECT_THROW(nibble::to_awq("x", random_layer(nibble::Format::int8, asymmetric, 16, 64, 32)), Unsupported);
}

TEST(Checkpoint, Configs) {
  const auto gptq = [](const char* text) { return nibble::parse_gptq_config(Json::parse(text)); };
  const GptqConfig c = gptq(R"({"bits": 4, "group_size": -1, "sym": true, "desc_act": true, "meta": {"a": 1}})");
  EXPECT_EQ(c.group_size, 0U);
  EXPECT_TRUE(c.symmetric.value() && c.act_order && !c.version);
  EXPECT_EQ(gptq(R"({"bits": 8, "checkpoint_format": "gptq_v2"})").version, GptqVersion::v2);
  EXPECT_EQ(gptq(R"({"bits": 8, "checkpoint_format": null, "dynamic": null})").version, std::nullopt);
  const GptqConfig again = nibble::parse_gptq_config(nibble::to_json(c));
  EXPECT_TRUE(again.group_size == 0 && again.symmetric == c.symmetric && again.act_order && !again.version);
  for (const char* text :
       {R"({"bits": "4"})", R"({"bits": 4.0})", R"({"bits": 4, "group_size": 0})", R"({"bits": 4, "sym": 1})",
        R"({"bits": 4, "group_size": -2})", R"({"bits": 4, "group_size": 18446744073709551615})", "[4]", "4",
        R"({"bits": 4, "checkpoint_format": 2})", R"({"bits": 4, "quant_method": {}})"})
    EXPECT_THROW(gptq(text), FormatError) << text;
  for (const char* text : {"{}", R"({"bits": 5})", R"({"bits": -4})", R"({"bits": 4, "quant_method": "awq"})",
                           R"({"bits": 4, "checkpoint_format": "marlin"})",
                           R"({"bits": 4, "dynamic": {"-:.*": {}}})", R"({"bits": 4, "pack_dtype": "int16"})"})
    EXPECT_THROW(gptq(text), Unsupported) << text;

  const auto awq = [](const char* text) { return nibble::parse_awq_config(Json::parse(text)); };
  EXPECT_EQ(awq(R"({"bits": 4, "group_size": 64, "version": "GEMM"})").group_size, 64U);
  EXPECT_EQ(awq(R"({"w_bit": 4, "q_group_size": -1, "zero_point": false})").group_size, 0U);
  EXPECT_EQ(awq(R"({"modules_to_not_convert": ["lm_head"]})").not_converted.size(), 1U);
  EXPECT_EQ(nibble::parse_awq_config(nibble::to_json(awq("{}"))).group_size, 128U);
  for (const char* text :
       {R"({"modules_to_not_convert": "lm_head"})", R"({"modules_to_not_convert": [1]})", R"({"group_size": 0})"})
    EXPECT_THROW(awq(text), FormatError) << text;
  for (const char* text : {R"({"bits": 3})", R"({"version": "gemv"})", R"({"quant_method": "gptq"})"})
    EXPECT_THROW(awq(text), Unsupported) << text;
}

// A checkpoint as a file: every truncation is an error.
TEST(Checkpoint, TruncatedAtEveryByte) {
  const TempFolder folder;
  const CheckpointLinear layer = random_layer(int4, asymmetric, 8, 32, 16);
  {
    nibble::SafetensorsWriter out(folder.file("a.safetensors"));
    const auto tensors = nibble::to_gptq("x", layer, GptqVersion::v2);
    for (const SafetensorsTensor& t : tensors) out.declare(t.name, t.type, t.shape);
    for (const SafetensorsTensor& t : tensors) out.write(t.name, t.data.data(), t.data.size());
    out.commit();
  }
  const Bytes whole = read_file(folder.file("a.safetensors"));
  const auto read = [](const Bytes& bytes) {
    return nibble::read_gptq(nibble::SafetensorsFile::parse(exact_buffer(bytes)), "x", config_of(4, 16),
                             GptqVersion::v2);
  };
  EXPECT_EQ(values_of(read(whole)), values_of(layer));
  for (std::size_t size = 0; size < whole.size(); ++size)
    EXPECT_THROW(read(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size))), FormatError)
        << size;
  // Every changed byte of the header: an error or a layer.
  const std::size_t header = 8 + static_cast<std::size_t>(whole[0]) + whole[1] * 256U;
  for (std::size_t at = 0; at < header; ++at)
    for (const int change : {1, 4, 16, 128}) {
      Bytes bytes = whole;
      bytes[at] = static_cast<std::uint8_t>(bytes[at] ^ change);
      try {
        read(bytes);
      } catch (const nibble::Error&) {
      }
    }
}

void write_one(const std::string& path, const std::vector<std::string>& names) {
  nibble::SafetensorsWriter out(path);
  const float value = 1.0F;
  for (const std::string& name : names) out.declare(name, SafetensorsType::f32, {1});
  for (const std::string& name : names) out.write(name, &value, 4);
  out.commit();
}

void write_text(const std::string& path, const std::string& text) {
  write_file(path, Bytes(text.begin(), text.end()));
}

TEST(SafetensorsFolder, OneFileOrThoseOfTheIndex) {
  const TempFolder folder;
  using Folder = nibble::SafetensorsFolder;
  EXPECT_THROW(Folder::open(folder.path()), FormatError);  // nothing there
  EXPECT_THROW(Folder::open(folder.file("no-such")), nibble::IoError);
  write_one(folder.file("some-4bit.safetensors"), {"a"});
  EXPECT_EQ(Folder::open(folder.path()).names(), std::vector<std::string>{"a"});
  write_one(folder.file("other.safetensors"), {"b", "c"});
  expect_error<FormatError>([&] { Folder::open(folder.path()); }, {"2 safetensors files", "index"});
  write_one(folder.file("model.safetensors"), {"d"});
  EXPECT_EQ(Folder::open(folder.path()).names(), std::vector<std::string>{"d"});

  const std::string index = folder.file("model.safetensors.index.json");
  write_text(index, R"({"metadata": {"total_size": 12}, "weight_map":
    {"b": "other.safetensors", "a": "some-4bit.safetensors", "c": "other.safetensors"}})");
  const Folder both = Folder::open(folder.path());
  EXPECT_EQ(both.names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(both.files().size(), 2U);
  EXPECT_EQ(both.bytes(), 12U);
  EXPECT_EQ(both.tensor("b").values<float>()[0], 1.0F);
  EXPECT_EQ(both.find_tensor("d"), nullptr);
  EXPECT_THROW(both.tensor("d"), FormatError);
  // Buffers outlive the folder.
  nibble::Buffer data;
  {
    const Folder gone = Folder::open(folder.path());
    data = gone.tensor("a").data;
  }
  EXPECT_EQ(nibble::detail::load_unaligned<float>(data.data()), 1.0F);

  for (const char* text :
       {"", "[]", "{", "{}", R"({"weight_map": []})", R"({"weight_map": {}})", R"({"weight_map": {"a": 1}})",
        R"({"weight_map": {"a": ""}})", R"({"weight_map": {"a": ".."}})",
        R"({"weight_map": {"a": "../some-4bit.safetensors"}})", R"({"weight_map": {"a": "/etc/passwd"}})",
        R"({"weight_map": {"b": "some-4bit.safetensors"}})", "{\"weight_map\": {\"a\": \"x\\u0000y\"}}"}) {
    write_text(index, text);
    EXPECT_THROW(Folder::open(folder.path()), FormatError) << text;
  }
  write_text(index, R"({"weight_map": {"a": "no-such.safetensors"}})");
  EXPECT_THROW(Folder::open(folder.path()), nibble::IoError);
  write_one(folder.file("again.safetensors"), {"b", "a"});
  write_text(index, R"({"weight_map": {"a": "some-4bit.safetensors", "b": "again.safetensors"}})");
  expect_error<FormatError>([&] { Folder::open(folder.path()); }, {"two files"});
}

}  // namespace
