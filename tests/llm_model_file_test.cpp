// Models on disk: GGUF in, packed and GGUF out, formats by name, what is refused.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "llm/quantize_model.hpp"
#include "llm/runner.hpp"
#include "llm/svg_plot.hpp"
#include "llm_support.hpp"

namespace {

using llm::Token;
using nibble::Format;
using nibble::Symmetry;

llm::Hparams file_hparams() {
  llm::Hparams h = llm_test::small_hparams(262);
  h.dim = 64;  // GGUF's blocks need rows of a multiple of 32
  h.ffn = 96;
  h.heads = 8;
  return h;
}

/// A GGUF of random fp32 weights with a byte-level vocabulary; returns the weights as a model.
llm_test::RandomModel write_gguf(const std::string& path, const llm::Hparams& h = file_hparams(),
                                 const std::string& leave_out = "", const std::string& add = "") {
  llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::fp32), h);
  const llm::Vocabulary v = llm_test::bpe_vocabulary({"a b", "\xC4\xA0 a", "ab ab", "c d"}, "smollm");
  nibble::GgufWriter out(path);
  llm::quantize_detail::add_metadata(out, h, v);
  for (const auto& [name, values] : m.values) {
    if (name == leave_out) continue;
    if (values.cols() == 1)
      out.declare(name, nibble::GgufType::f32, {static_cast<std::uint64_t>(values.rows())});
    else
      out.declare(name, nibble::GgufType::f32,
                  {static_cast<std::uint64_t>(values.cols()), static_cast<std::uint64_t>(values.rows())});
  }
  if (!add.empty()) out.declare(add, nibble::GgufType::f32, {4});
  for (const auto& [name, values] : m.values) {
    if (name == leave_out) continue;
    const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> rows = values;
    out.write_tensor(name, rows.data(), static_cast<std::size_t>(rows.size()) * 4);
  }
  const float extra[4] = {1, 2, 3, 4};
  if (!add.empty()) out.write_tensor(add, extra, sizeof extra);
  out.commit();
  return m;
}

Eigen::MatrixXf logits_of(const std::string& path) {
  const auto file = llm::open_model(path);
  const llm::Model model = llm::load_model(*file);
  const std::vector<Token> tokens = llm_test::some_tokens(20, model.hparams.vocabulary);
  llm::RunnerOptions options;
  options.context = 32;
  llm::Runner runner(model, options);
  auto cache = runner.new_cache();
  Eigen::MatrixXf out;
  runner.append(cache, tokens.data(), tokens.size(), 0, [&](std::size_t, const auto& logits) { out = logits; });
  return out;
}

bool same_bits(const Eigen::MatrixXf& a, const Eigen::MatrixXf& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * 4) == 0;
}

llm::QuantizePlan plan(const std::string& format, const std::vector<std::string>& keep = {}) {
  llm::QuantizePlan p;
  p.format = llm::parse_format(format);
  for (const std::string& k : keep) p.keep.push_back(llm::parse_keep(k));
  return p;
}

const auto ignore = [](const std::string&) {};

bool same_vocabulary(const llm::Vocabulary& a, const llm::Vocabulary& b) {
  bool same = a.size() == b.size() && a.merges().size() == b.merges().size();
  for (Token t = 0; same && a.has(t); ++t)
    same = a.token(t) == b.token(t) && a.type(t) == b.type(t) && a.find(a.token(t)) == b.find(a.token(t)) &&
           a.score(t) == b.score(t);
  for (std::size_t i = 0; same && i < a.merges().size(); ++i) {
    const llm::MergeRule &m = a.merges()[i], &n = b.merges()[i];
    same = m.left == n.left && m.right == n.right && m.result == n.result &&
           a.find_merge(m.left, m.right) == b.find_merge(m.left, m.right);
  }
  return same;
}

TEST(FormatSpec, NamesAndDefaults) {
  const auto scheme = [](const char* text) { return llm::scheme_of(llm::parse_format(text)); };
  EXPECT_EQ(llm::name_of(scheme("fp16")), "fp16");
  EXPECT_EQ(llm::name_of(scheme("int8")), "int8-row-sym-s32");
  EXPECT_EQ(llm::name_of(scheme("int4")), "int4-g64-asym-s16");
  EXPECT_EQ(llm::name_of(scheme("int4-g128-sym")), "int4-g128-sym-s16");
  EXPECT_EQ(llm::name_of(scheme("int4-sym-g32-s32")), "int4-g32-sym-s32");
  EXPECT_EQ(llm::name_of(scheme("int4-row-offset-sbf16")), "int4-row-offset-sbf16");
  EXPECT_EQ(llm::name_of(scheme("nf4")), "nf4-g64-s16");
  EXPECT_EQ(llm::name_of(scheme("fp4-g128")), "fp4-g128-s16");
  EXPECT_EQ(llm::name_of(scheme("int3")), "int3-g64-asym-s16");
  EXPECT_EQ(llm::name_of(scheme("int2-g32-offset")), "int2-g32-offset-s16");
  EXPECT_EQ(llm::name_of(scheme("int6-row-sym")), "int6-row-sym-s32");
  for (const char* name : {"int8-row-sym-s32", "int4-g64-asym-s16", "int4-g32-offset-s32", "nf4-g64-s16", "bf16"})
    EXPECT_EQ(llm::name_of(scheme(name)), name);
}

TEST(FormatSpec, RefusesNonsense) {
  for (const char* bad : {"", "int7", "fp4-asym", "int4-", "int4-g", "int4-g17", "int4-g8", "int4-x", "fp16-g32",
                          "fp32-sym", "nf4-asym", "int4-g99999999", "int4-g-32", "INT4"})
    EXPECT_THROW(llm::parse_format(bad), nibble::InvalidArgument) << bad;
  for (const char* bad : {"", "int4", "=int4", "[=int4", "a=int7"})
    EXPECT_THROW(llm::parse_keep(bad), nibble::InvalidArgument) << bad;
}

TEST(Names, DecideTheKindOfFile) {
  EXPECT_TRUE(llm::wants_gguf("a/b.gguf"));
  EXPECT_FALSE(llm::wants_gguf("b.safetensors"));
  for (const char* bad : {"", "gguf", ".gguf", "x.bin"})
    EXPECT_THROW(llm::wants_gguf(bad), nibble::InvalidArgument);
}

TEST(ModelFile, GgufHoldsWhatWasWritten) {
  const llm_test::TempFolder folder;
  const llm_test::RandomModel m = write_gguf(folder / "m.gguf");
  const auto file = llm::open_model(folder / "m.gguf");
  EXPECT_EQ(llm::to_json(file->hparams()), llm::to_json(m.model.hparams));
  const llm::Vocabulary v = file->vocabulary();
  EXPECT_EQ(v.pre, "smollm");
  EXPECT_EQ(v.merges().size(), 4U);
  const std::vector<Token> tokens = llm_test::some_tokens(20, 262);
  llm::RunnerOptions options;
  options.context = 32;
  llm::Runner runner(m.model, options);
  auto cache = runner.new_cache();
  Eigen::MatrixXf expected;
  runner.append(cache, tokens.data(), tokens.size(), 0, [&](std::size_t, const auto& l) { expected = l; });
  EXPECT_TRUE(same_bits(logits_of(folder / "m.gguf"), expected));
}

TEST(ModelFile, PackedOpensWithoutTheGguf) {
  const llm_test::TempFolder folder;
  write_gguf(folder / "m.gguf");
  const auto source = llm::open_model(folder / "m.gguf");
  std::size_t steps = 0;
  const auto report = llm::quantize_to_packed(*source, folder / "m.safetensors", plan("int4", {".*=same"}),
                                              nullptr, [&](const std::string&) { ++steps; });
  EXPECT_EQ(report.quantized, 0U);
  EXPECT_EQ(steps, source->tensors().size());
  const auto packed = llm::open_model(folder / "m.safetensors");
  EXPECT_EQ(packed->tensors().size(), source->tensors().size());
  EXPECT_EQ(llm::to_json(packed->hparams()), llm::to_json(source->hparams()));
  const llm::Vocabulary a = source->vocabulary(), b = packed->vocabulary();
  EXPECT_TRUE(same_vocabulary(a, b));
  EXPECT_EQ(a.model, b.model);
  EXPECT_EQ(a.pre, b.pre);
  EXPECT_EQ(a.eos, b.eos);
  const std::string text = "abab c d 12 abc \xC3\xA9";
  EXPECT_EQ(llm::Tokenizer(a).encode(text), llm::Tokenizer(b).encode(text));
  EXPECT_TRUE(same_bits(logits_of(folder / "m.safetensors"), logits_of(folder / "m.gguf")));
}

TEST(QuantizeModel, EveryFormatEqualsTheQuantizer) {
  const llm_test::TempFolder folder;
  const llm_test::RandomModel m = write_gguf(folder / "m.gguf");
  const auto source = llm::open_model(folder / "m.gguf");
  nibble::ThreadPool pool(2);
  for (const char* format :
       {"fp32", "fp16", "bf16", "int8", "int8-g16-asym", "int4-g32", "int4-g48-sym", "int4-row-offset", "nf4"}) {
    llm::quantize_to_packed(*source, folder / "q.safetensors", plan(format), &pool, ignore);
    const auto packed = llm::open_model(folder / "q.safetensors");
    const nibble::DynamicQuantizer quantizer(llm::scheme_of(llm::parse_format(format)));
    for (const llm::TensorInfo& t : packed->tensors()) {
      if (!t.is_matrix()) continue;
      const Eigen::MatrixXf got = packed->matrix(t.name, nullptr).dequantize();
      const Eigen::MatrixXf& value = m.value(t.name);
      // The embedding stays as it is unless named.
      const Eigen::MatrixXf want =
          t.name == "token_embd.weight" ? value : Eigen::MatrixXf(quantizer.fake_quantize(value));
      ASSERT_TRUE(same_bits(got, want)) << format << " " << t.name;
    }
    EXPECT_TRUE(logits_of(folder / "q.safetensors").allFinite()) << format;
  }
}

TEST(QuantizeModel, KeepRulesTakeTheFirstMatch) {
  const llm_test::TempFolder folder;
  write_gguf(folder / "m.gguf");
  const auto source = llm::open_model(folder / "m.gguf");
  llm::quantize_to_packed(*source, folder / "q.safetensors",
                          plan("int4", {"ffn_down=same", "ffn_=int8", "token_embd=fp16"}), nullptr, ignore);
  const auto packed = llm::open_model(folder / "q.safetensors");
  const auto format = [&](const std::string& name) { return packed->scheme(name).format; };
  EXPECT_EQ(format("blk.0.attn_q.weight"), Format::int4);
  EXPECT_EQ(format("blk.1.ffn_down.weight"), Format::fp32);
  EXPECT_EQ(format("blk.1.ffn_up.weight"), Format::int8);
  EXPECT_EQ(format("token_embd.weight"), Format::fp16);
}

TEST(QuantizeModel, GgufDecodesToTheSameValues) {
  const llm_test::TempFolder folder;
  write_gguf(folder / "m.gguf");
  const auto source = llm::open_model(folder / "m.gguf");
  for (const char* format : {"fp16", "bf16", "int8-g32", "int8-row-s16", "int4-g32-sym", "int4-g64-sym",
                             "int4-g32-offset", "int4-row-sym-s16"}) {
    llm::quantize_to_gguf(*source, folder / "q.gguf", plan(format), ignore);
    // The packed file with GGUF's scale type is the reference.
    const std::string same_scales =
        std::string(format) + (std::string(format).find("-g") != std::string::npos ? "-s16" : "");
    llm::quantize_to_packed(*source, folder / "q.safetensors", plan(same_scales), nullptr, ignore);
    const auto gguf = llm::open_model(folder / "q.gguf");
    const auto packed = llm::open_model(folder / "q.safetensors");
    for (const llm::TensorInfo& t : gguf->tensors()) {
      if (!t.is_matrix()) continue;
      ASSERT_TRUE(
          same_bits(gguf->matrix(t.name, nullptr).dequantize(), packed->matrix(t.name, nullptr).dequantize()))
          << format << " " << t.name;
    }
    // And from a packed file back to a GGUF.
    llm::quantize_to_gguf(*packed, folder / "back.gguf", plan("int4", {".*=same"}), ignore);
    EXPECT_TRUE(same_bits(logits_of(folder / "back.gguf"), logits_of(folder / "q.gguf"))) << format;
  }
}

TEST(QuantizeModel, GgufRefusesWhatItCannotHold) {
  const llm_test::TempFolder folder;
  write_gguf(folder / "m.gguf");
  const auto source = llm::open_model(folder / "m.gguf");
  const std::vector<std::pair<const char*, const char*>> cases = {
      {"int4", "Q4_1"},          {"nf4", "Q4_1"},          {"int8-g16", "Q8_0"},
      {"int8-g32-asym", "Q8_0"}, {"int4-g48-sym", "Q4_0"}, {"int4-g32-sym-s32", "fp16"}};
  for (const auto& [format, nearest] : cases) {
    try {
      llm::quantize_to_gguf(*source, folder / "q.gguf", plan(format), ignore);
      ADD_FAILURE() << format << " was written";
    } catch (const nibble::InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(nearest), std::string::npos) << e.what();
    }
    EXPECT_FALSE(std::filesystem::exists(folder / "q.gguf"));
  }
  llm::Hparams odd = file_hparams();
  odd.ffn = 72;
  write_gguf(folder / "odd.gguf", odd);
  const auto file = llm::open_model(folder / "odd.gguf");
  EXPECT_THROW(llm::quantize_to_gguf(*file, folder / "q.gguf", plan("int4-g32-sym"), ignore),
               nibble::InvalidArgument);
  EXPECT_NO_THROW(
      llm::quantize_to_gguf(*file, folder / "q.gguf", plan("int4-g32-sym", {"ffn_down=fp16"}), ignore));
}

TEST(ModelFile, RefusesBrokenModels) {
  const llm_test::TempFolder folder;
  write_gguf(folder / "missing.gguf", file_hparams(), "blk.1.ffn_up.weight");
  EXPECT_THROW(llm::load_model(*llm::open_model(folder / "missing.gguf")), nibble::FormatError);
  write_gguf(folder / "extra.gguf", file_hparams(), "", "blk.0.attn_q.bias");
  EXPECT_THROW(llm::load_model(*llm::open_model(folder / "extra.gguf")), nibble::Unsupported);
  std::ofstream(folder / "text.gguf") << "what is this, some kind of text?";
  EXPECT_THROW(llm::open_model(folder / "text.gguf"), nibble::FormatError);
  std::ofstream(folder / "empty.gguf") << "";
  EXPECT_THROW(llm::open_model(folder / "empty.gguf"), nibble::Error);
  EXPECT_THROW(llm::open_model(folder / "none.gguf"), nibble::IoError);
}

TEST(ModelFile, RefusesBrokenHyperparameters) {
  const nlohmann::json good = llm::to_json(file_hparams());
  EXPECT_NO_THROW(llm::hparams_of(good));
  for (const char* key : {"layers", "dim", "ffn", "heads", "kv_heads", "head_size", "context", "vocabulary"}) {
    for (const nlohmann::json& bad : {nlohmann::json(0), nlohmann::json(-1), nlohmann::json(1e300),
                                      nlohmann::json("9"), nlohmann::json(1ULL << 60), nlohmann::json()}) {
      nlohmann::json j = good;
      j[key] = bad;
      EXPECT_THROW(llm::hparams_of(j), nibble::FormatError) << key << " " << bad;
      j.erase(key);
      EXPECT_THROW(llm::hparams_of(j), nibble::FormatError) << key;
    }
  }
  nlohmann::json j = good;
  j["kv_heads"] = 3;
  EXPECT_THROW(llm::hparams_of(j), nibble::FormatError);
  j = good;
  j["rope_size"] = 7;
  EXPECT_THROW(llm::hparams_of(j), nibble::FormatError);
}

/// A packed file that holds nothing but a vocabulary: "a", "b" and "ab" if `ends` say so.
struct VocabularyFile {
  std::vector<std::uint32_t> ends = {1, 2, 4};
  std::vector<std::int32_t> merges = {0, 1, 2};
  std::vector<std::uint32_t> token_index;  // none: a file of before there was one
  std::vector<std::uint32_t> merge_index;
  bool settings = true;

  llm::Vocabulary read() const {
    const llm_test::TempFolder folder;
    nibble::PackedFileWriter out(folder / "v.safetensors");
    out.add_metadata("hparams", llm::to_json(file_hparams()).dump());
    if (settings)
      out.add_metadata("tokenizer",
                       R"({"model":"gpt2","pre":"smollm","bos":0,"eos":99,"eot":-1,"unknown":-1,"add_bos":false,)"
                       R"("add_space_prefix":false,"chat_template":""})");
    nibble::Buffer text(4);
    std::memcpy(text.mutable_data(), "abab", 4);
    const auto add = [&](const char* name, const std::vector<std::uint32_t>& values) {
      out.add_tensor(name, nibble::SafetensorsType::u32, {values.size()}, llm::FlatArray(values).buffer());
    };
    out.add_tensor("tokenizer.text", nibble::SafetensorsType::u8, {4}, text);
    add("tokenizer.ends", ends);
    out.add_tensor("tokenizer.types", nibble::SafetensorsType::u8, {3}, nibble::Buffer(3));
    out.add_tensor("tokenizer.merges", nibble::SafetensorsType::i32, {merges.size() / 3, 3},
                   llm::FlatArray(merges).buffer());
    if (!token_index.empty()) add("tokenizer.token_index", token_index);
    if (!merge_index.empty()) add("tokenizer.merge_index", merge_index);
    out.commit();
    return llm::open_model(folder / "v.safetensors")->vocabulary();
  }
};

TEST(ModelFile, ReadsVocabulariesWithoutIndices) {
  const llm::Vocabulary v = VocabularyFile().read();
  ASSERT_EQ(v.size(), 3U);
  EXPECT_EQ(v.token(0), "a");
  EXPECT_EQ(v.token(2), "ab");
  EXPECT_EQ(v.find("ab"), 2);
  EXPECT_EQ(v.find("ba"), llm::no_token);
  EXPECT_EQ(v.find_merge(0, 1), 0U);
  EXPECT_EQ(v.find_merge(1, 0), llm::FlatIndex::none);
  EXPECT_EQ(v.eos, llm::no_token);  // 99 does not exist
}

TEST(ModelFile, RefusesBrokenVocabularies) {
  const auto refused = [](const std::vector<std::uint32_t>& ends, const std::vector<std::int32_t>& merges) {
    VocabularyFile file;
    file.ends = ends;
    file.merges = merges;
    EXPECT_THROW(file.read(), nibble::FormatError);
  };
  refused({1, 2, 5}, {0, 1, 2});
  refused({2, 1, 4}, {0, 1, 2});
  refused({1, 2, 4}, {0, 1, 3});
  refused({1, 2, 4}, {0, -1, 2});
  VocabularyFile bare;
  bare.settings = false;
  EXPECT_THROW(bare.read(), nibble::FormatError);
}

TEST(ModelFile, ChecksIndicesWhereTheyAreUsed) {
  constexpr std::uint32_t none = llm::FlatIndex::none;
  VocabularyFile file;
  file.token_index = {1, none, 1};  // no power of two
  EXPECT_THROW(file.read(), nibble::FormatError);
  const auto find = [&](const std::vector<std::uint32_t>& index) {
    file.token_index = index;
    return file.read().find("nowhere");
  };
  EXPECT_EQ(find({none, none, none, none}), llm::no_token);
  EXPECT_THROW(find({0, 1, 2, 2}), nibble::FormatError);  // no free slot: a search would not end
  EXPECT_THROW(find({3, 3, 3, 3}), nibble::FormatError);  // there is no entry 3
  file.token_index.clear();
  file.merge_index = {1, 1};
  EXPECT_THROW(file.read().find_merge(0, 1), nibble::FormatError);
  EXPECT_THROW(llm::Tokenizer(file.read()).encode("ab"), nibble::FormatError);
  file.merge_index = {none, none};
  EXPECT_EQ(file.read().find_merge(0, 1), none);
}

TEST(FlatIndex, FindsTheFirstOfEqualEntries) {
  std::vector<std::string> entries;
  for (int i = 0; i < 300; ++i) entries.push_back(std::to_string(i % 200));
  // All hashes alike: the longest searches that there are.
  for (const bool alike : {false, true}) {
    const auto hash = [&](const std::string& text) { return alike ? 7 : llm::hash_of(text); };
    const llm::FlatIndex index = llm::FlatIndex::build(
        entries.size(), [&](std::size_t i) { return hash(entries[i]); },
        [&](std::size_t i, std::size_t j) { return entries[i] == entries[j]; });
    EXPECT_EQ(index.slots().size(), 1024U);
    const auto find = [&](const std::string& text) {
      return index.find(hash(text), [&](std::size_t i) { return entries[i] == text; });
    };
    for (std::uint32_t i = 0; i < 200; ++i) EXPECT_EQ(find(std::to_string(i)), i);
    EXPECT_EQ(find("200"), llm::FlatIndex::none);
  }
}

TEST(FlatIndex, HashesAreTheFilesOwn) {
  EXPECT_EQ(llm::hash_of(""), 0xCBF29CE484222325U ^ 0xCBF29CE4U);
  EXPECT_EQ(llm::hash_of("foobar"), 0x85944171F73967E8U ^ 0x85944171U);  // FNV-1a's published value
  EXPECT_EQ(llm::hash_of(1, 2), 0x100000002U * 0x9E3779B97F4A7C15U >> 32);
}

TEST(Svg, IsWellFormedAndEscaped) {
  const std::string svg = llm::scatter_svg("a < b", "x", "y & z", {{1, 2, "<p>"}, {3, 2, "q"}, {NAN, 1, "lost"}});
  EXPECT_NE(svg.find("&lt;p&gt;"), std::string::npos);
  EXPECT_NE(svg.find("y &amp; z"), std::string::npos);
  EXPECT_EQ(svg.find("lost"), std::string::npos);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.substr(svg.size() - 7), "</svg>\n");
}

}  // namespace
