// Quantized models as Hugging Face folders, and integer zero points as GGUF's offsets.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "io_test_support.hpp"
#include "llm/hf_export.hpp"
#include "llm/quantize_model.hpp"
#include "llm/tokenizer.hpp"
#include "llm_support.hpp"

namespace {

using io_test::expect_error;
using llm::HfExport;
using llm::Token;
using nibble::Unsupported;

const auto ignore = [](const std::string&) {};

/// A packed model of random weights in `format`; `move(name, tensor)` may change what is written.
template <class Vocabulary>
void write_packed(const std::string& path, const std::string& format, const Vocabulary& vocabulary,
                  const std::string& keep = "") {
  llm::Hparams h = llm_test::small_hparams(262);
  h.dim = 64;
  h.ffn = 96;
  h.heads = 8;
  h.kv_heads = 4;
  h.context = 77;
  h.rope_base = 50000.0;
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(nibble::Format::fp32), h);
  nibble::PackedFileWriter out(path);
  llm::add_model_data(out, h, vocabulary);
  for (const auto& entry : m.values) {
    const Eigen::MatrixXf& w = entry.second;
    if (w.cols() == 1) {
      out.add_tensor(entry.first, std::vector<float>(w.data(), w.data() + w.size()));
      continue;
    }
    const bool block =
        entry.first.compare(0, 4, "blk.") == 0 && (keep.empty() || entry.first.find(keep) == std::string::npos);
    const auto scheme = llm::scheme_of(llm::parse_format(block ? format : "fp16"));
    nibble::PackOptions options;
    options.channel_sums = false;
    out.add(entry.first, nibble::pack(nibble::DynamicQuantizer(scheme).quantize(w), options));
  }
  out.commit();
}

llm::VocabularyLists byte_level(const std::string& pre) {
  llm::VocabularyLists v = llm_test::bpe_vocabulary({"a b", "\xC4\xA0 a", "ab ab", "c d"}, pre);
  v.chat_template = "{{ '<|im_start|>' }}";
  return v;
}

llm::VocabularyLists sentencepiece() {
  llm::VocabularyLists v;
  v.model = "llama";
  v.tokens = {"<unk>", "<s>", "</s>"};
  v.types = {llm::TokenType::unknown, llm::TokenType::control, llm::TokenType::control};
  for (int b = 0; b < 256; ++b) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", static_cast<unsigned>(b));
    v.tokens.emplace_back(text);
    v.types.push_back(llm::TokenType::byte);
  }
  v.scores.assign(v.tokens.size(), 0.0F);
  for (const char* t : {"a", "b", "ab"}) {
    v.tokens.emplace_back(t);
    v.types.push_back(llm::TokenType::normal);
    v.scores.push_back(-static_cast<float>(v.tokens.size()));
  }
  v.unknown = 0;
  v.bos = 1;
  v.eos = 2;
  v.add_bos = v.add_space_prefix = true;
  return v;
}

std::vector<float> values_of(const llm::ModelFile& file, const llm::TensorInfo& t) {
  if (!t.is_matrix()) {
    const Eigen::VectorXf v = file.vector(t.name);
    return {v.data(), v.data() + v.size()};
  }
  const nibble::QuantizedTensor q = file.quantized(t.name);
  std::vector<float> out(q.size());
  q.dequantize(out.data());
  return out;
}

// The readers are checked against files that NumPy packed; what they read here must be what was exported.
TEST(HfExport, ComesBack) {
  const llm_test::TempFolder folder;
  struct Case {
    const char* format;
    HfExport kind;
    const char* name;
  };
  for (const Case& c :
       {Case{"int4-g32-asym", HfExport::gptq_v1, "GPTQ v1"}, Case{"int4-g32-asym", HfExport::awq, "AWQ"},
        Case{"int4-g16-sym", HfExport::gptq_v2, "GPTQ v2"}, Case{"int4-g16-sym", HfExport::awq, "AWQ"},
        Case{"int8-g32-asym", HfExport::gptq_v2, "GPTQ v2"}, Case{"int8-row-sym", HfExport::gptq_v1, "GPTQ v1"},
        Case{"int3-g32", HfExport::gptq_v1, "GPTQ v1"}, Case{"int2-g32", HfExport::gptq_v2, "GPTQ v2"}}) {
    write_packed(folder / "m.safetensors", c.format, llm::Vocabulary(byte_level("smollm")));
    const auto from = llm::open_model(folder / "m.safetensors");
    llm::write_hf_folder(*from, folder / "hf", c.kind, ignore);
    const auto to = llm::open_model(folder / "hf");
    EXPECT_NE(to->kind().find(c.name), std::string::npos) << to->kind();
    EXPECT_EQ(llm::to_json(to->hparams()), llm::to_json(from->hparams()));
    ASSERT_EQ(to->tensors().size(), from->tensors().size());
    for (const llm::TensorInfo& t : from->tensors()) {
      EXPECT_EQ(values_of(*to, t), values_of(*from, t)) << c.format << " " << t.name;
      if (!t.is_matrix() || t.name.compare(0, 4, "blk.") != 0) continue;
      EXPECT_EQ(to->scheme(t.name).format, from->scheme(t.name).format);
      EXPECT_EQ(to->scheme(t.name).symmetry, from->scheme(t.name).symmetry);
    }
  }
}

TEST(HfExport, TokenizersComeBack) {
  const llm_test::TempFolder folder;
  std::vector<llm::VocabularyLists> all = {sentencepiece()};
  for (const char* pre : {"smollm", "gpt-2", "llama-bpe", "qwen2"}) all.push_back(byte_level(pre));
  for (const llm::VocabularyLists& lists : all) {
    const llm::Vocabulary from(lists);
    write_packed(folder / "m.safetensors", "int4", from);
    llm::write_hf_folder(*llm::open_model(folder / "m.safetensors"), folder / "hf", HfExport::awq, ignore);
    const llm::Vocabulary to = llm::open_model(folder / "hf")->vocabulary();
    EXPECT_EQ(to.pre, from.pre);
    EXPECT_EQ(to.model, from.model);
    EXPECT_EQ(to.eos, from.eos);
    EXPECT_EQ(to.bos, from.bos);
    EXPECT_EQ(to.unknown, from.unknown);
    EXPECT_EQ(to.add_bos, from.add_bos);
    EXPECT_EQ(to.add_space_prefix, from.add_space_prefix);
    EXPECT_EQ(to.chat_template, from.chat_template);
    ASSERT_EQ(to.size(), from.size());
    for (Token t = 0; from.has(t); ++t) {
      EXPECT_EQ(to.token(t), from.token(t));
      EXPECT_EQ(to.type(t), from.type(t)) << from.token(t);
    }
    const std::string text = "abab c d 123 a'b \n\xC3\xA9 <|end|> x";
    EXPECT_EQ(llm::Tokenizer(to).encode(text, true), llm::Tokenizer(from).encode(text, true)) << from.pre;
  }
}

TEST(HfExport, WhatACheckpointCannotHold) {
  const llm_test::TempFolder folder;
  const auto refused = [&](const std::string& format, HfExport kind, const std::string& why,
                           const std::string& keep = "") {
    write_packed(folder / "m.safetensors", format, llm::Vocabulary(byte_level("smollm")), keep);
    const auto from = llm::open_model(folder / "m.safetensors");
    expect_error<Unsupported>([&] { llm::write_hf_folder(*from, folder / "none", kind, ignore); }, {"blk.", why});
  };
  refused("nf4", HfExport::gptq_v1, "nf4");
  refused("fp16", HfExport::gptq_v1, "fp16");
  refused("int4", HfExport::gptq_v1, "fp16", "ffn_down");
  // These are found while the tensors are taken apart, before the file is put in place.
  const auto not_written = [&](const std::string& format, HfExport kind) {
    write_packed(folder / "m.safetensors", format, llm::Vocabulary(byte_level("smollm")));
    const auto from = llm::open_model(folder / "m.safetensors");
    EXPECT_THROW(llm::write_hf_folder(*from, folder / "none", kind, ignore), Unsupported) << format;
    EXPECT_FALSE(std::filesystem::exists(folder / "none/model.safetensors"));
  };
  not_written("int8", HfExport::awq);
  not_written("int4-offset", HfExport::gptq_v1);
  not_written("int6-g32", HfExport::gptq_v1);
  EXPECT_EQ(llm::parse_hf_export("gptq-v2"), HfExport::gptq_v2);
  EXPECT_THROW(llm::parse_hf_export("gguf"), nibble::InvalidArgument);
}

/// int4 in groups of 32 with these scales and zero points, and every code.
nibble::QuantizedTensor with_zeros(const std::vector<float>& scales, const std::vector<int>& zeros) {
  nibble::Scheme scheme;
  scheme.format = nibble::Format::int4;
  scheme.symmetry = nibble::Symmetry::asymmetric;
  scheme.scale_type = nibble::ScaleType::fp16;
  scheme.granularity = nibble::Granularity::per_group(32, 1);
  nibble::Buffer codes(scales.size() * 16), scale(scales.size() * 2), zero(zeros.size());
  for (std::size_t i = 0; i < codes.size(); ++i) codes.mutable_data()[i] = static_cast<std::uint8_t>(i * 37 + 16);
  for (std::size_t i = 0; i < scales.size(); ++i) {
    scale.as_mutable<std::uint16_t>()[i] = nibble::fp16_from_float(scales[i]);
    zero.mutable_data()[i] = static_cast<std::uint8_t>(zeros[i]);
  }
  return nibble::QuantizedTensor::from_parts(scheme, {1, scales.size() * 32}, codes, scale, zero);
}

TEST(GgufExport, ZeroPointsAsOffsetsWhereTheyAreExact) {
  // 0.25 * 13 and 0.09997559 (an odd mantissa of 11 bits) * 8 are fp16 numbers; 0.09997559 * 3 is not.
  const auto exact = with_zeros({0.25F, 0.1F, 0.1F, 3.0F}, {13, 8, 0, 15});
  ASSERT_EQ(nibble::gguf_type_for(exact), nibble::GgufType::q4_1);
  const nibble::Buffer bytes = nibble::to_gguf(exact, nibble::GgufType::q4_1);
  std::vector<float> theirs(128), ours(128);
  nibble::gguf_dequantize(nibble::GgufType::q4_1, bytes.data(), 128, theirs.data());
  exact.dequantize(ours.data());
  EXPECT_EQ(std::memcmp(ours.data(), theirs.data(), 128 * 4), 0);
  expect_error<Unsupported>(
      [&] {
        nibble::to_gguf(with_zeros({0.25F, 0.1F}, {13, 3}), nibble::GgufType::q4_1);
      },
      {"scale 1", "zero point 3", "Q4_1"});
  expect_error<Unsupported>([&] { nibble::to_gguf(with_zeros({-0.25F}, {13}), nibble::GgufType::q4_1); },
                            {"negative"});
  EXPECT_EQ(nibble::gguf_type_for(with_zeros({0.1F}, {3})), nibble::GgufType::q8_0);
}

TEST(GgufExport, NamesTheTensorThatDoesNotFit) {
  const llm_test::TempFolder folder;
  write_packed(folder / "m.safetensors", "int4-g32-asym", llm::Vocabulary(byte_level("smollm")));
  llm::QuantizePlan plan;
  plan.format = llm::parse_format("int4-g32-offset");
  plan.keep.push_back(llm::parse_keep(".*=same"));
  expect_error<nibble::InvalidArgument>(
      [&] { llm::quantize_to_gguf(*llm::open_model(folder / "m.safetensors"), folder / "m.gguf", plan, ignore); },
      {"blk.0.attn_k.weight", "Q4_1", "zero point"});
  EXPECT_FALSE(std::filesystem::exists(folder / "m.gguf"));
}

}  // namespace
