// LoRA adapters in PEFT's layout: against folders that a NumPy script writes, back and forth, and hostile ones.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "io_test_support.hpp"
#include "nibble/io/peft_adapter.hpp"
#include "train/llama_adapter.hpp"

namespace {

using namespace io_test;
using nibble::Format;
using nibble::FormatError;
using nibble::InvalidArgument;
using nibble::LowRank;
using nibble::PeftAdapter;
using nibble::PeftConfig;
using nibble::RowMajorMatrix;
using nibble::Unsupported;
using Json = nlohmann::json;

RowMajorMatrix counted(Eigen::Index rows, Eigen::Index cols, float first) {
  RowMajorMatrix m(rows, cols);
  for (Eigen::Index i = 0; i < m.size(); ++i) m.data()[i] = first + static_cast<float>(i % 97) * 0.37F;
  return m;
}
PeftAdapter small_adapter() {
  PeftAdapter a;
  a.config.rank = 2;
  a.config.alpha = 3.0;
  a.config.dropout = 0.1;
  a.config.base_model = "some/model";
  a.config.target_modules = {"q_proj", "up_proj"};
  a.config.rank_pattern["up_proj"] = 4;
  a.metadata["origin"] = "a test";
  a.modules["model.layers.0.self_attn.q_proj"] = {counted(2, 6, -1.0F), counted(5, 2, 0.5F), 1.5};
  a.modules["model.layers.1.mlp.up_proj"] = {counted(4, 6, 2.0F), counted(7, 4, -3.0F), 0.75};
  return a;
}
std::string text_of(const std::string& path) {
  const Bytes bytes = read_file(path);
  return {bytes.begin(), bytes.end()};
}
void write_text(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
}

TEST(TrainPeft, ReadsWhatNumPyWritesInOurRowOrder) {
  NIBBLE_SKIP_WITHOUT_GGUF_PYTHON(python);
  TempFolder folder;
  std::string script = golden_script();
  script.replace(script.find("io_golden.py"), 12, "io_peft_golden.py");
  int status = 0;
  const std::string output = run(python + " " + script + " '" + folder.file("") + "' 2>&1", status);
  ASSERT_EQ(status, 0) << output;
  std::istringstream cases(text_of(folder.file("cases.txt")));
  std::string name;
  llm::Hparams h;
  std::size_t seen = 0;
  while (cases >> name >> h.heads >> h.kv_heads >> h.head_size) {
    h.layers = 1;
    h.dim = 24;
    h.ffn = 20;
    const std::string path = folder.file(name);
    const llm::LlamaAdapter adapter = llm::read_llama_adapter(path, h);
    ASSERT_EQ(adapter.matrices.size(), 4U);
    EXPECT_EQ(adapter.config.base_model, "somewhere/model");
    for (const auto& entry : adapter.matrices) {
      const std::string module = llm::hf_module_of(entry.first);
      const LowRank& l = entry.second;
      const auto load = [&](const char* letter, Eigen::Index rows, Eigen::Index cols) {
        const std::vector<float> values = read_values<float>(path + "/" + letter + "." + module);
        EXPECT_EQ(values.size(), static_cast<std::size_t>(rows * cols));
        return RowMajorMatrix(Eigen::Map<const RowMajorMatrix>(values.data(), rows, cols));
      };
      const RowMajorMatrix x = load("x", l.cols(), 3), w = load("w", l.rows(), l.cols()),
                           y = load("y", l.rows(), 3);
      // Weights and outputs of the folder in our order: row 2i of a head is its row i, row 2i + 1 its row i + size / 2.
      RowMajorMatrix ours = w, expected = y;
      if (module.find("q_proj") != std::string::npos || module.find("k_proj") != std::string::npos)
        for (Eigen::Index r = 0; r < w.rows(); ++r) {
          const Eigen::Index size = 6, head = r / size, i = r % size;
          const Eigen::Index from = head * size + (i % 2 == 0 ? i / 2 : size / 2 + i / 2);
          ours.row(r) = w.row(from);
          expected.row(r) = y.row(from);
        }
      nibble::merge_low_rank(l, ours);
      const Eigen::MatrixXd got = ours.cast<double>() * x.cast<double>();
      // 24 terms of merged weights about 10 that were rounded to floats once: 24 * 10 * 3 * 2^-24.
      EXPECT_LE((got - expected.cast<double>()).cwiseAbs().maxCoeff(), 1e-4) << name << " " << module;
    }
    // Written again: the same tensors in the same order of rows.
    const std::string again = folder.file(name + ".again");
    llm::write_llama_adapter(again, adapter, h);
    const PeftAdapter one = nibble::read_peft_adapter(path), two = nibble::read_peft_adapter(again);
    ASSERT_EQ(one.modules.size(), two.modules.size());
    for (const auto& entry : one.modules) {
      EXPECT_EQ(entry.second.a, two.modules.at(entry.first).a);
      EXPECT_EQ(entry.second.b, two.modules.at(entry.first).b);
      EXPECT_EQ(entry.second.scale, two.modules.at(entry.first).scale);
    }
    ++seen;
  }
  EXPECT_EQ(seen, 6U);
}

TEST(TrainPeft, WhatIsWrittenIsReadBack) {
  TempFolder folder;
  for (const Format format : {Format::fp32, Format::fp16, Format::bf16}) {
    const PeftAdapter in = small_adapter();
    const std::string path = folder.file("deep/") + std::string(nibble::name_of(format));
    nibble::write_peft_adapter(path, in, format);
    const PeftAdapter out = nibble::read_peft_adapter(path);
    EXPECT_EQ(out.config.rank, 2U);
    EXPECT_EQ(out.config.alpha, 3.0);
    EXPECT_EQ(out.config.dropout, 0.1);
    EXPECT_EQ(out.config.target_modules, in.config.target_modules);
    EXPECT_EQ(out.config.rank_pattern, in.config.rank_pattern);
    EXPECT_EQ(out.metadata.at("origin"), "a test");
    ASSERT_EQ(out.modules.size(), 2U);
    for (const auto& entry : in.modules) {
      LowRank expected = entry.second;
      nibble::round_low_rank(expected, format);
      const LowRank& got = out.modules.at(entry.first);
      EXPECT_EQ(got.a, expected.a);
      EXPECT_EQ(got.b, expected.b);
      EXPECT_EQ(got.scale, expected.scale);
    }
    const Json json = Json::parse(text_of(path + "/adapter_config.json"));
    EXPECT_EQ(json["peft_type"], "LORA");
    EXPECT_TRUE(json["lora_alpha"].is_number_integer());
  }
}

TEST(TrainPeft, WritesNothingThatContradictsItself) {
  TempFolder folder;
  const auto refuse = [&](const std::function<void(PeftAdapter&)>& change, Format format = Format::fp32) {
    PeftAdapter a = small_adapter();
    nibble::write_peft_adapter(folder.file("a"), a);
    const std::string before = text_of(folder.file("a/adapter_model.safetensors"));
    change(a);
    EXPECT_THROW(nibble::write_peft_adapter(folder.file("a"), a, format), InvalidArgument);
    EXPECT_EQ(text_of(folder.file("a/adapter_model.safetensors")), before);  // the old one is still there
  };
  refuse([](PeftAdapter& a) { a.modules.clear(); });
  refuse([](PeftAdapter& a) { a.config.rank = 3; });
  refuse([](PeftAdapter& a) { a.config.alpha = 4.0; });
  refuse([](PeftAdapter& a) { a.modules.begin()->second.b(0, 0) = std::numeric_limits<float>::quiet_NaN(); });
  refuse([](PeftAdapter& a) { a.modules.begin()->second.b(0, 0) = 1e6F; }, Format::fp16);
  refuse([](PeftAdapter&) {}, Format::int8);
  // A path where no folder can be.
  write_text(folder.file("file"), "x");
  EXPECT_THROW(nibble::write_peft_adapter(folder.file("file/adapter"), small_adapter()), nibble::IoError);
}

TEST(TrainPeft, HostileConfigurationsAreNamed) {
  const Json good = nibble::to_json(small_adapter().config);
  nibble::parse_peft_config(good);
  const auto with = [&](const char* key, const Json& value) {
    Json j = good;
    j[key] = value;
    return j;
  };
  for (const auto& [key, value] : std::vector<std::pair<const char*, Json>>{{"r", 0},
                                                                            {"r", -4},
                                                                            {"r", 1000000},
                                                                            {"r", "8"},
                                                                            {"r", 2.5},
                                                                            {"lora_alpha", "x"},
                                                                            {"lora_dropout", 1.0},
                                                                            {"lora_dropout", -1.0},
                                                                            {"use_rslora", 1},
                                                                            {"target_modules", 5},
                                                                            {"target_modules", Json::array({1})},
                                                                            {"rank_pattern", Json::array()},
                                                                            {"rank_pattern", {{"a", "b"}}},
                                                                            {"rank_pattern", {{"a", 0}}}}) {
    const Json broken = with(key, value);
    const std::string named = std::string("'") + key + "'";
    expect_error<FormatError>([&] { nibble::parse_peft_config(broken); }, {named});
  }
  for (const auto& [key, value] : std::vector<std::pair<const char*, Json>>{{"peft_type", "IA3"},
                                                                            {"use_dora", true},
                                                                            {"bias", "all"},
                                                                            {"fan_in_fan_out", true},
                                                                            {"modules_to_save", {"lm_head"}},
                                                                            {"alpha_pattern", {{"^a$", 2}}}}) {
    const Json broken = with(key, value);
    EXPECT_THROW(nibble::parse_peft_config(broken), Unsupported) << key;
  }
  EXPECT_THROW(nibble::parse_peft_config(Json::array()), FormatError);
}

TEST(TrainPeft, HostileFilesAreErrors) {
  TempFolder folder;
  const std::string path = folder.file("a");
  const std::string config = path + "/adapter_config.json", tensors = path + "/adapter_model.safetensors";
  nibble::write_peft_adapter(path, small_adapter());
  const std::string good = text_of(config), whole = text_of(tensors);
  const auto refuse = [&](const char* what) {
    try {
      nibble::read_peft_adapter(path);
      ADD_FAILURE() << what;
    } catch (const nibble::Error&) {
    }
  };
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string("null"), std::string(100000, '['),
        std::string(2000000, ' '), good.substr(0, good.size() / 2)}) {
    write_text(config, text);
    refuse("configuration");
  }
  write_text(config, good);
  // Truncated anywhere; every byte of the header flipped: an error or the same names.
  for (std::size_t n = 0; n < whole.size(); n += 41) {
    write_text(tensors, whole.substr(0, n));
    refuse("truncated");
  }
  const std::size_t header = 8 + static_cast<std::size_t>(static_cast<unsigned char>(whole[0])) +
                             256 * static_cast<std::size_t>(static_cast<unsigned char>(whole[1]));
  for (std::size_t i = 0; i < header; i += 3) {
    std::string flipped = whole;
    flipped[i] = static_cast<char>(flipped[i] ^ 0x15);
    write_text(tensors, flipped);
    try {
      nibble::read_peft_adapter(path);
    } catch (const nibble::Error&) {
    }
  }
  // A half of a pair, another dtype, another name, NaN.
  const auto with_tensors = [&](const std::function<void(nibble::SafetensorsWriter&)>& declare,
                                const std::vector<std::pair<std::string, std::size_t>>& data) {
    nibble::SafetensorsWriter out(tensors);
    declare(out);
    for (const auto& entry : data) {
      const std::vector<std::uint8_t> bytes(entry.second, 0xFF);  // NaN in every type
      out.write(entry.first, bytes.data(), bytes.size());
    }
    out.commit();
  };
  using T = nibble::SafetensorsType;
  const std::string a = "base_model.model.m.lora_A.weight", b = "base_model.model.m.lora_B.weight";
  with_tensors([&](auto& o) { o.declare(a, T::f32, {2, 3}); }, {{a, 24}});
  expect_error<FormatError>([&] { nibble::read_peft_adapter(path); }, {"lora_B"});
  with_tensors([&](auto& o) { o.declare(a, T::f32, {2, 3}), o.declare(b, T::f32, {4, 2}); }, {{a, 24}, {b, 32}});
  expect_error<FormatError>([&] { nibble::read_peft_adapter(path); }, {"nan"});
  with_tensors([&](auto& o) { o.declare(a, T::i32, {2, 3}), o.declare(b, T::f32, {4, 2}); }, {{a, 24}, {b, 32}});
  expect_error<Unsupported>([&] { nibble::read_peft_adapter(path); }, {"I32"});
  with_tensors([&](auto& o) { o.declare(a, T::f32, {6}), o.declare(b, T::f32, {4, 2}); }, {{a, 24}, {b, 32}});
  expect_error<FormatError>([&] { nibble::read_peft_adapter(path); }, {"dimensions"});
  with_tensors([&](auto& o) { o.declare("lm_head.weight", T::f32, {6}); }, {{"lm_head.weight", 24}});
  expect_error<Unsupported>([&] { nibble::read_peft_adapter(path); }, {"lm_head"});
  with_tensors([](auto&) {}, {});
  expect_error<FormatError>([&] { nibble::read_peft_adapter(path); }, {"no module"});
  std::filesystem::remove(tensors);
  EXPECT_THROW(nibble::read_peft_adapter(path), nibble::IoError);
}

TEST(TrainPeft, AdaptersOfOtherModelsAreRefused) {
  TempFolder folder;
  llm::Hparams h;
  h.layers = 1;
  h.dim = 8;
  h.heads = 2;
  h.kv_heads = 1;
  h.head_size = 4;
  h.ffn = 12;
  PeftAdapter a;
  a.config.rank = 2;
  a.config.alpha = 2.0;
  const auto write = [&](const std::string& module, Eigen::Index rows, Eigen::Index cols) {
    a.modules.clear();
    a.modules[module] = {counted(2, cols, 1.0F), counted(rows, 2, 1.0F), 1.0};
    nibble::write_peft_adapter(folder.file("a"), a);
  };
  write("model.layers.0.mlp.up_proj", 12, 8);
  EXPECT_EQ(llm::read_llama_adapter(folder.file("a"), h).matrices.size(), 1U);
  write("model.layers.0.mlp.up_proj", 12, 9);
  EXPECT_THROW(llm::read_llama_adapter(folder.file("a"), h), FormatError);
  write("model.layers.0.self_attn.q_proj", 4, 8);
  EXPECT_THROW(llm::read_llama_adapter(folder.file("a"), h), FormatError);
  write("model.layers.1.mlp.up_proj", 12, 8);
  expect_error<Unsupported>([&] { llm::read_llama_adapter(folder.file("a"), h); }, {"layers.1"});
}

}  // namespace
