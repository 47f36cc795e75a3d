// Hugging Face folders: against those that a NumPy script makes out of GGUFs, tokenizers by hand, and what is refused.
#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <cstring>
#include <string>
#include <vector>

#include "io_test_support.hpp"
#include "llm/hf_model.hpp"
#include "llm/quantize_model.hpp"
#include "llm/runner.hpp"
#include "llm_support.hpp"

namespace {

using io_test::expect_error;
using llm::Token;
using nibble::FormatError;
using nibble::Unsupported;
using Json = nlohmann::json;

std::string hf_script() {
  std::string path = io_test::golden_script();
  return path.replace(path.find("io_golden.py"), 12, "llm_hf_golden.py");
}

/// Runs the script; the folder's name.
std::string make_folder(const std::string& python, const std::string& gguf, const std::string& folder,
                        const std::string& options = "") {
  int status = 0;
  const std::string output =
      io_test::run(python + " " + hf_script() + " '" + gguf + "' '" + folder + "' " + options + " 2>&1", status);
  EXPECT_EQ(status, 0) << output;
  return folder;
}

void write_text(const std::string& path, const std::string& text) {
  io_test::write_file(path, io_test::Bytes(text.begin(), text.end()));
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

/// Every tensor of `a` has the same values in `b`.
void expect_same_tensors(const llm::ModelFile& a, const llm::ModelFile& b) {
  for (const llm::TensorInfo& t : a.tensors()) {
    const std::vector<float> x = values_of(a, t), y = values_of(b, t);
    ASSERT_EQ(x.size(), y.size()) << t.name;
    for (std::size_t i = 0; i < x.size(); ++i) ASSERT_EQ(x[i], y[i]) << t.name << " " << i;
  }
}

Eigen::MatrixXf logits_of(const llm::ModelFile& file) {
  const llm::Model model = llm::load_model(file);
  const std::vector<Token> tokens = llm_test::some_tokens(20, model.hparams.vocabulary);
  llm::RunnerOptions options;
  options.context = 32;
  options.activations = nibble::Activations::fp32;
  llm::Runner runner(model, options);
  auto cache = runner.new_cache();
  Eigen::MatrixXf out;
  runner.append(cache, tokens.data(), tokens.size(), 0, [&](std::size_t, const auto& logits) { out = logits; });
  return out;
}

/// A GGUF of random fp32 weights; sizes are multiples of 32, so that every layer can be quantized.
void write_gguf(const std::string& path) {
  llm::Hparams h = llm_test::small_hparams(262);
  h.dim = 64;
  h.ffn = 96;
  h.heads = 8;
  h.kv_heads = 4;
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(nibble::Format::fp32), h);
  nibble::GgufWriter out(path);
  llm::quantize_detail::add_metadata(out, h,
                                     llm_test::bpe_vocabulary({"a b", "\xC4\xA0 a", "ab ab", "c d"}, "smollm"));
  for (const auto& entry : m.values) {
    const Eigen::MatrixXf& values = entry.second;
    std::vector<std::uint64_t> dims = {static_cast<std::uint64_t>(values.rows())};
    if (values.cols() != 1) dims.insert(dims.begin(), static_cast<std::uint64_t>(values.cols()));
    out.declare(entry.first, nibble::GgufType::f32, dims);
  }
  for (const auto& entry : m.values) {
    const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> rows = entry.second;
    out.write_tensor(entry.first, rows.data(), static_cast<std::size_t>(rows.size()) * 4);
  }
  out.commit();
}

TEST(HfFolder, RunsAsTheGgufThatItWasMadeOf) {
  NIBBLE_SKIP_WITHOUT_GGUF_PYTHON(python);
  const llm_test::TempFolder folder;
  write_gguf(folder / "m.gguf");
  const auto gguf = llm::open_model(folder / "m.gguf");
  const Eigen::MatrixXf expected = logits_of(*gguf);
  for (const std::string options : {"", "shards=4 pairs"}) {
    const auto hf = llm::open_model(make_folder(python, folder / "m.gguf", folder / ("m" + options), options));
    EXPECT_EQ(hf->kind(), "Hugging Face folder");
    Json a = llm::to_json(gguf->hparams()), b = llm::to_json(hf->hparams());
    a.erase("name");
    b.erase("name");
    EXPECT_EQ(a, b);
    EXPECT_EQ(hf->tensors().size(), gguf->tensors().size());
    expect_same_tensors(*gguf, *hf);
    // The same matrices in the same format: the same bits.
    const Eigen::MatrixXf logits = logits_of(*hf);
    EXPECT_EQ(std::memcmp(logits.data(), expected.data(), static_cast<std::size_t>(logits.size()) * 4), 0);
    const llm::Tokenizer ours(hf->vocabulary()), theirs(gguf->vocabulary());
    const std::string text = "abab c d 12 abc \xC3\xA9<|end|>cd";
    EXPECT_EQ(ours.encode(text), theirs.encode(text));
    EXPECT_EQ(ours.encode(text, true), theirs.encode(text, true));
    EXPECT_EQ(ours.vocabulary().pre, "smollm");
    EXPECT_EQ(ours.vocabulary().eos, theirs.vocabulary().eos);
  }
  // Sixteen bits: each value is the rounding of the GGUF's (bf16 here cuts off).
  const auto half = llm::open_model(make_folder(python, folder / "m.gguf", folder / "f16", "type=f16"));
  const auto brain = llm::open_model(make_folder(python, folder / "m.gguf", folder / "bf16", "type=bf16"));
  for (const llm::TensorInfo& t : gguf->tensors()) {
    const std::vector<float> x = values_of(*gguf, t), h = values_of(*half, t), b = values_of(*brain, t);
    for (std::size_t i = 0; i < x.size(); ++i) {
      ASSERT_EQ(h[i], nibble::float_from_fp16(nibble::fp16_from_float(x[i]))) << t.name;
      std::uint32_t bits = 0;
      std::memcpy(&bits, &x[i], 4);
      bits &= 0xFFFF0000U;
      ASSERT_EQ(std::memcmp(&b[i], &bits, 4), 0) << t.name;
    }
  }
  // On to other files of ours.
  llm::QuantizePlan plan;
  plan.format = llm::parse_format("int4-g32");
  llm::quantize_to_packed(*half, folder / "q.safetensors", plan, nullptr, [](const std::string&) {});
  EXPECT_TRUE(logits_of(*llm::open_model(folder / "q.safetensors")).allFinite());
}

TEST(HfFolder, CheckpointsDecodeToTheValuesThatNumPyNames) {
  NIBBLE_SKIP_WITHOUT_GGUF_PYTHON(python);
  const llm_test::TempFolder folder;
  write_gguf(folder / "m.gguf");
  for (const std::string quant : {"gptq1", "gptq2", "gptq1act", "gptq1sym", "gptq2sym", "awq"}) {
    const std::string path = make_folder(python, folder / "m.gguf", folder / quant, "quant=" + quant);
    const auto checkpoint = llm::open_model(path);
    const auto decoded = llm::open_model(path + "-decoded");
    EXPECT_NE(checkpoint->kind().find(quant == "awq" ? "AWQ" : "GPTQ v" + quant.substr(4, 1)), std::string::npos);
    expect_same_tensors(*decoded, *checkpoint);
    const nibble::Scheme scheme = checkpoint->scheme("blk.0.attn_q.weight");
    if (quant.find("act") == std::string::npos) {
      EXPECT_EQ(scheme.format, nibble::Format::int4);
      EXPECT_EQ(scheme.symmetry == nibble::Symmetry::symmetric, quant.find("sym") != std::string::npos);
    }
    // The same weights through kernels that sum in another order. Logits are sums over 64 channels of products of values
    // of about 1: they agree to 1e-4 where the values are the same, and differ by more than 0.1 where a row is misplaced.
    EXPECT_LT((logits_of(*checkpoint) - logits_of(*decoded)).cwiseAbs().maxCoeff(), 1e-3F) << quant;
  }
}

TEST(HfFolder, RealModels) {
  NIBBLE_SKIP_WITHOUT_GGUF_PYTHON(python);
  const std::string stories = llm_test::data_file("stories260K.gguf");
  const std::string text = llm_test::data_file("wiki.valid.tokens");
  if (stories.empty() || text.empty()) GTEST_SKIP() << "SKIPPED: needs NIBBLE_DATA";
  const llm_test::TempFolder folder;
  const std::string sample = llm_test::read_file(text).substr(0, 100000);
  const auto compare = [&](const std::string& gguf_path, const std::string& hf_path) {
    const auto gguf = llm::open_model(gguf_path);
    const auto hf = llm::open_model(hf_path);
    const llm::Tokenizer ours(hf->vocabulary()), theirs(gguf->vocabulary());
    EXPECT_EQ(ours.encode(sample), theirs.encode(sample));
    EXPECT_EQ(ours.vocabulary().add_bos, theirs.vocabulary().add_bos);
    EXPECT_EQ(ours.vocabulary().bos, theirs.vocabulary().bos);
    EXPECT_EQ(ours.vocabulary().eos, theirs.vocabulary().eos);
    EXPECT_EQ(ours.vocabulary().chat_template, theirs.vocabulary().chat_template);
    for (Token t = 0; theirs.vocabulary().has(t); ++t) ASSERT_EQ(ours.piece(t), theirs.piece(t)) << t;
    expect_same_tensors(*hf, *gguf);
    EXPECT_GE(hf->tensors().size(), 20U);
  };
  const std::string hf = make_folder(python, stories, folder / "stories", "shards=2");
  compare(stories, hf);
  const Eigen::MatrixXf a = logits_of(*llm::open_model(stories)), b = logits_of(*llm::open_model(hf));
  EXPECT_EQ(std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * 4), 0);
  const std::string smollm = llm_test::model_file();
  if (smollm.empty()) GTEST_SKIP() << "SKIPPED: the second half needs NIBBLE_MODEL";
  compare(smollm, make_folder(python, smollm, folder / "smollm", "layers=2 pairs"));
}

// Permuted rows under adjacent pairs turn as rows in place do under halves: RoPE by its definition.
TEST(HfLayout, RowsTurnAlike) {
  llm::Hparams h;
  h.heads = 3;
  h.kv_heads = 1;
  h.head_size = 8;
  const std::vector<std::size_t> rows = llm::hf_rows_of("blk.7.attn_q.weight", h);
  ASSERT_EQ(rows.size(), 24U);
  EXPECT_EQ(llm::hf_rows_of("blk.7.attn_k.weight", h).size(), 8U);
  EXPECT_TRUE(llm::hf_rows_of("blk.7.attn_v.weight", h).empty());
  std::vector<double> theirs(24), ours(24);
  for (std::size_t i = 0; i < 24; ++i) theirs[i] = std::sin(static_cast<double>(i * i));
  for (std::size_t i = 0; i < 24; ++i) ours[i] = theirs[rows[i]];
  for (std::size_t head = 0; head < 3; ++head)
    for (std::size_t i = 0; i < 4; ++i) {
      const std::complex<double> turn = std::polar(1.0, 0.3 * static_cast<double>(i + 1));
      std::complex<double> x(theirs[head * 8 + i], theirs[head * 8 + i + 4]);
      std::complex<double> y(ours[head * 8 + 2 * i], ours[head * 8 + 2 * i + 1]);
      EXPECT_EQ(x * turn, y * turn);
    }
  const std::vector<std::size_t> back = llm::inverse_of(rows);
  for (std::size_t i = 0; i < 24; ++i) EXPECT_EQ(back[rows[i]], i);
  EXPECT_EQ(llm::hf_module_of("blk.12.ffn_down.weight"), "model.layers.12.mlp.down_proj");
  for (const char* name : {"", "blk.", "blk.1", "blk.1.x.weight", "rope_freqs.weight", "blk.1.attn_q.bias"})
    EXPECT_EQ(llm::hf_module_of(name), "") << name;
}

TEST(HfLayout, RowsMoveWithTheirScalesAndZeroPoints) {
  std::mt19937 random(1);
  const Eigen::MatrixXf w = llm_test::random_matrix(random, 6, 48, 1.0F);
  const std::vector<std::size_t> rows = {5, 0, 3, 1, 4, 2};
  for (const char* format : {"fp32", "fp16", "int8", "int8-g16-asym", "int4-g32-asym", "int3-g16", "nf4-g16"}) {
    const auto t = nibble::DynamicQuantizer(llm::scheme_of(llm::parse_format(format))).quantize(w);
    const auto moved = llm::with_rows(t, rows);
    std::vector<float> a(48), b(48);
    for (std::size_t r = 0; r < rows.size(); ++r) {
      moved.dequantize_row(r, a.data());
      t.dequantize_row(rows[r], b.data());
      EXPECT_EQ(a, b) << format;
    }
  }
  EXPECT_THROW(
      llm::with_rows(nibble::DynamicQuantizer(llm::scheme_of(llm::parse_format("fp32"))).quantize(w), {0, 1}),
      FormatError);
}

Json small_config() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 64},
          {"intermediate_size", 96},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 8},
          {"vocab_size", 100},
          {"rms_norm_eps", 1e-5}};
}

TEST(HfConfig, ReadsAndRefuses) {
  const auto config = [](const Json& change) {
    Json json = small_config();
    json.update(change);
    return llm::hf_config_of(json, "name");
  };
  const llm::HfConfig c = config(Json::object());
  EXPECT_EQ(c.hparams.name, "name");
  EXPECT_EQ(c.hparams.kv_heads, 8U);
  EXPECT_EQ(c.hparams.head_size, 8U);
  EXPECT_EQ(c.hparams.rope_base, 10000.0);
  EXPECT_FALSE(c.tied);
  EXPECT_EQ(config({{"head_dim", 16}}).hparams.head_size, 16U);
  EXPECT_EQ(config({{"rope_theta", 5e5}}).hparams.rope_base, 5e5);
  EXPECT_EQ(config({{"rope_parameters", {{"rope_theta", 3e4}, {"rope_type", "default"}}}}).hparams.rope_base, 3e4);
  EXPECT_EQ(config({{"rope_scaling", {{"type", "linear"}, {"factor", 4.0}}}}).hparams.rope_scale, 4.0);
  EXPECT_TRUE(config({{"tie_word_embeddings", true}}).tied);

  // Llama 3.1: the shortest waves stay, the longest are divided, and divisors ascend between.
  const auto llama3 = config({{"head_dim", 128},
                              {"rope_theta", 5e5},
                              {"rope_scaling",
                               {{"rope_type", "llama3"},
                                {"factor", 8.0},
                                {"low_freq_factor", 1.0},
                                {"high_freq_factor", 4.0},
                                {"original_max_position_embeddings", 8192}}}});
  ASSERT_EQ(llama3.rope_divisors.size(), 64U);
  EXPECT_EQ(llama3.rope_divisors.front(), 1.0F);
  EXPECT_EQ(llama3.rope_divisors.back(), 8.0F);
  for (std::size_t i = 0; i < 64; ++i) {
    const double frequency = std::pow(5e5, -static_cast<double>(i) / 64.0);
    const double turns = 8192.0 * frequency / (2.0 * 3.141592653589793);  // within the original context
    const double mix = std::min(1.0, std::max(0.0, (turns - 1.0) / 3.0));
    EXPECT_NEAR(llama3.rope_divisors[i], 1.0 / ((1.0 - mix) / 8.0 + mix), 1e-5) << i;
  }

  const auto unsupported = [&](const Json& change, const std::string& name) {
    expect_error<Unsupported>([&] { config(change); }, {name});
  };
  unsupported({{"architectures", {"MixtralForCausalLM"}}}, "MixtralForCausalLM");
  unsupported({{"rope_scaling", {{"rope_type", "yarn"}}}}, "yarn");
  unsupported({{"hidden_act", "gelu"}}, "gelu");
  unsupported({{"attention_bias", true}}, "attention_bias");
  unsupported({{"mlp_bias", true}}, "mlp_bias");
  unsupported({{"partial_rotary_factor", 0.5}}, "partial_rotary_factor");
  for (const Json& change : {Json{{"hidden_size", "64"}}, Json{{"hidden_size", 0}}, Json{{"hidden_size", nullptr}},
                             Json{{"hidden_size", -64}}, Json{{"num_attention_heads", 1ULL << 63}},
                             Json{{"num_hidden_layers", 1000000}}, Json{{"num_key_value_heads", 3}},
                             Json{{"head_dim", 7}}, Json{{"rope_theta", 0}}, Json{{"rope_scaling", "linear"}},
                             Json{{"rope_scaling", {{"rope_type", "llama3"}}}}, Json{{"rms_norm_eps", "x"}}})
    EXPECT_THROW(config(change), FormatError) << change;
}

Json byte_level(const std::string& pre = "") {
  Json level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
  Json vocab = Json::object();
  std::uint32_t next = 0x100;
  for (std::uint32_t b = 0; b < 256; ++b) {
    const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    std::string text;
    llm::append_utf8(text, printable ? b : next++);
    vocab[text] = b;
  }
  vocab["ab"] = 256;
  vocab["12"] = 257;
  if (pre == "smollm")
    level = {{"type", "Sequence"}, {"pretokenizers", {{{"type", "Digits"}, {"individual_digits", true}}, level}}};
  if (pre == "llama-bpe" || pre == "qwen2") {
    level["use_regex"] = false;
    const std::string regex = std::string("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}") +
                              (pre == "qwen2" ? "" : "{1,3}") +
                              "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    level = {{"type", "Sequence"},
             {"pretokenizers",
              {{{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", "Isolated"}, {"invert", false}},
               level}}};
  }
  return {
      {"added_tokens",
       {{{"id", 300}, {"content", "<|im_end|>"}, {"special", true}},
        {{"id", 301}, {"content", "<tool>"}, {"special", false}}}},
      {"normalizer", nullptr},
      {"pre_tokenizer", level},
      {"model",
       {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"a b", "1 2"}}, {"ignore_merges", pre == "llama-bpe"}}}};
}

llm::VocabularyLists vocabulary_of(const Json& tokenizer, const Json& config = nullptr,
                                   const Json& generation = nullptr, std::size_t most = 400) {
  // Through text, as files come.
  const auto text = [](const Json& json) { return Json::parse(json.dump()); };
  return llm::hf_vocabulary_of(text(tokenizer), text(config), text(generation), nullptr, most);
}

TEST(HfTokenizer, ByteLevel) {
  for (const char* pre : {"smollm", "llama-bpe", "qwen2", ""}) {
    const llm::VocabularyLists v = vocabulary_of(byte_level(pre));
    EXPECT_EQ(v.pre, *pre == 0 ? "gpt-2" : pre);
    const llm::Tokenizer t{llm::Vocabulary(v)};
    const bool digits_apart = v.pre == "smollm" || v.pre == "qwen2";
    std::vector<Token> expected = {256, digits_apart ? 49 : 257};
    if (digits_apart) expected.push_back(50);
    expected.push_back(301);
    EXPECT_EQ(t.encode("ab12<tool>"), expected) << pre;
    EXPECT_EQ(t.encode("<|im_end|>", true), std::vector<Token>{300});
    EXPECT_GT(t.encode("<|im_end|>").size(), 1U);
    EXPECT_EQ(v.tokens.size(), 302U);
    EXPECT_EQ(v.types[299], llm::TokenType::unused);
  }
  Json pairs = byte_level();
  pairs["model"]["merges"] = Json::array({Json::array({"a", "b"}), Json::array({"1", "2"})});
  EXPECT_EQ(llm::Tokenizer{llm::Vocabulary(vocabulary_of(pairs))}.encode("ab"), std::vector<Token>{256});
}

TEST(HfTokenizer, BeginAndEnd) {
  const Json t = byte_level();
  EXPECT_EQ(vocabulary_of(t).eos, llm::no_token);
  EXPECT_EQ(vocabulary_of(t, {{"eos_token", "<|im_end|>"}}).eos, 300);
  EXPECT_EQ(vocabulary_of(t, {{"eos_token", {{"content", "<|im_end|>"}}}}).eos, 300);
  const auto both =
      vocabulary_of(t, {{"eos_token", "<|im_end|>"}, {"bos_token", nullptr}, {"add_bos_token", true}},
                    {{"eos_token_id", {300, 301, 99999}}, {"bos_token_id", 5}});
  EXPECT_EQ(both.eos, 300);
  EXPECT_EQ(both.eot, 301);
  EXPECT_EQ(both.bos, 5);
  EXPECT_TRUE(both.add_bos);
  EXPECT_EQ(vocabulary_of(t, {{"chat_template", "x"}}).chat_template, "x");
  EXPECT_EQ(vocabulary_of(t, {{"chat_template", {{{"name", "default"}, {"template", "y"}}}}}).chat_template, "y");
  EXPECT_THROW(vocabulary_of(t, {{"eos_token", 3}}), FormatError);
}

TEST(HfTokenizer, RefusesByName) {
  const auto unsupported = [](const std::function<void(Json&)>& change, const std::string& name) {
    Json t = byte_level();
    change(t);
    expect_error<Unsupported>([&] { vocabulary_of(t); }, {name});
  };
  unsupported([](Json& t) { t["model"]["type"] = "Unigram"; }, "Unigram");
  unsupported([](Json& t) { t["model"]["type"] = "WordPiece"; }, "WordPiece");
  unsupported([](Json& t) { t["normalizer"] = {{"type", "NFC"}}; }, "NFC");
  unsupported([](Json& t) { t["pre_tokenizer"] = {{"type", "BertPreTokenizer"}}; }, "BertPreTokenizer");
  unsupported([](Json& t) { t["pre_tokenizer"] = nullptr; }, "pre_tokenizer");
  unsupported([](Json& t) { t["pre_tokenizer"]["add_prefix_space"] = true; }, "add_prefix_space");
  unsupported([](Json& t) { t["pre_tokenizer"]["use_regex"] = false; }, "bytes");
  unsupported([](Json& t) { t["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", "\\d"}}}}; }, "Split");
  unsupported([](Json& t) { t["model"]["ignore_merges"] = true; }, "ignore_merges");
  unsupported([](Json& t) { t["model"]["dropout"] = 0.1; }, "dropout");
  unsupported([](Json& t) { t["model"]["continuing_subword_prefix"] = "##"; }, "continuing_subword_prefix");
  unsupported([](Json& t) { t["added_tokens"][0]["lstrip"] = true; }, "lstrip");

  const auto broken = [](const std::function<void(Json&)>& change) {
    Json t = byte_level();
    change(t);
    EXPECT_THROW(vocabulary_of(t), FormatError) << t["added_tokens"];
  };
  broken([](Json& t) { t.erase("model"); });
  broken([](Json& t) { t["model"] = 3; });
  broken([](Json& t) { t["model"].erase("vocab"); });
  broken([](Json& t) { t["model"]["vocab"]["x"] = -1; });
  broken([](Json& t) { t["model"]["vocab"]["x"] = 1.5; });
  broken([](Json& t) { t["model"]["vocab"]["x"] = 400; });
  broken([](Json& t) { t["model"]["vocab"]["x"] = 1ULL << 63; });
  broken([](Json& t) { t["model"]["vocab"]["xy"] = 256; });
  broken([](Json& t) { t["model"]["merges"] = "a b"; });
  broken([](Json& t) { t["model"]["merges"] = {"ab"}; });
  broken([](Json& t) { t["model"]["merges"] = {"a b c"}; });
  broken([](Json& t) { t["model"]["merges"] = {1}; });
  broken([](Json& t) { t["model"]["merges"] = Json::array({Json::array({"a"})}); });
  broken([](Json& t) { t["model"]["merges"] = {"a c"}; });
  broken([](Json& t) { t["added_tokens"] = 1; });
  broken([](Json& t) { t["added_tokens"] = {1}; });
  broken([](Json& t) { t["added_tokens"][0]["id"] = 256; });
  broken([](Json& t) { t["added_tokens"][0]["content"] = ""; });
}

Json sentencepiece() {
  Json vocab = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}};
  int next = 3;
  for (int b = 0; b < 256; ++b) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", static_cast<unsigned>(b));
    vocab[text] = next++;
  }
  for (const char* t : {"\xE2\x96\x81", "a", "b", "c", "bc", "ab", "abc",
                        "\xE2\x96\x81"
                        "a"})
    vocab[t] = next++;
  return {{"added_tokens",
           {{{"id", 0}, {"content", "<unk>"}, {"special", true}},
            {{"id", 1}, {"content", "<s>"}, {"special", true}},
            {{"id", 2}, {"content", "</s>"}, {"special", true}}}},
          {"normalizer",
           {{"type", "Sequence"},
            {"normalizers",
             {{{"type", "Prepend"}, {"prepend", "\xE2\x96\x81"}},
              {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\xE2\x96\x81"}}}}}},
          {"pre_tokenizer", nullptr},
          {"post_processor",
           {{"type", "TemplateProcessing"},
            {"single", {{{"SpecialToken", {{"id", "<s>"}}}}, {{"Sequence", {{"id", "A"}}}}}}}},
          {"model",
           {{"type", "BPE"},
            {"unk_token", "<unk>"},
            {"byte_fallback", true},
            {"fuse_unk", true},
            {"vocab", vocab},
            {"merges", {"b c", "a b", "a bc", "ab c", "\xE2\x96\x81 a"}}}}};
}

TEST(HfTokenizer, SentencePiece) {
  const auto v = vocabulary_of(sentencepiece(), {{"bos_token", "<s>"}});
  EXPECT_EQ(v.model, "llama");
  EXPECT_TRUE(v.add_space_prefix && v.add_bos);
  EXPECT_EQ(v.types[0], llm::TokenType::unknown);
  EXPECT_EQ(v.types[3], llm::TokenType::byte);
  const llm::Tokenizer t{llm::Vocabulary(v)};
  // bc before ab; then a + bc; the mark stays alone.
  EXPECT_EQ(t.encode("abc"), (std::vector<Token>{259, 265}));
  EXPECT_EQ(t.encode("a\n"), (std::vector<Token>{266, 3 + 10}));
  Json first = sentencepiece();
  first["normalizer"] = nullptr;
  first["pre_tokenizer"] = {
      {"type", "Metaspace"}, {"replacement", "\xE2\x96\x81"}, {"prepend_scheme", "first"}, {"split", false}};
  EXPECT_TRUE(vocabulary_of(first).add_space_prefix);
  first["pre_tokenizer"]["prepend_scheme"] = "never";
  EXPECT_FALSE(vocabulary_of(first).add_space_prefix);
  first["pre_tokenizer"]["split"] = true;
  EXPECT_THROW(vocabulary_of(first), Unsupported);
  // Merges that no list of scores gives: one of a token's missing, and a token's apart.
  Json merges = sentencepiece();
  merges["model"]["merges"] = {"b c", "a b", "a bc", "\xE2\x96\x81 a"};
  expect_error<Unsupported>([&] { vocabulary_of(merges); }, {"SentencePiece", "abc"});
  merges["model"]["merges"] = {"b c", "a bc", "a b", "ab c", "\xE2\x96\x81 a"};
  expect_error<Unsupported>([&] { vocabulary_of(merges); }, {"SentencePiece"});
  merges = sentencepiece();
  merges["normalizer"] = {{"type", "Lowercase"}};
  expect_error<Unsupported>([&] { vocabulary_of(merges); }, {"Lowercase"});
}

TEST(HfFolder, MissingAndUnknown) {
  const llm_test::TempFolder folder;
  const std::string path = folder / "m";
  std::filesystem::create_directory(path);
  EXPECT_THROW(llm::open_model(path), nibble::IoError);
  write_text(path + "/config.json", "{");
  EXPECT_THROW(llm::open_model(path), FormatError);
  Json config = small_config();
  config["num_hidden_layers"] = 1;
  config["tie_word_embeddings"] = true;
  write_text(path + "/config.json", config.dump());
  EXPECT_THROW(llm::open_model(path), FormatError);  // no weights
  std::vector<std::pair<std::string, std::vector<std::size_t>>> tensors = {{"model.embed_tokens", {100, 64}},
                                                                           {"model.norm", {64}}};
  for (const char* n : {"input_layernorm", "post_attention_layernorm"})
    tensors.push_back({std::string("model.layers.0.") + n, {64}});
  for (const char* n : {"q", "k", "v", "o"})
    tensors.push_back({std::string("model.layers.0.self_attn.") + n + "_proj", {64, 64}});
  for (const char* n : {"gate", "up"})
    tensors.push_back({std::string("model.layers.0.mlp.") + n + "_proj", {96, 64}});
  tensors.push_back({"model.layers.0.mlp.down_proj", {64, 96}});
  const auto write = [&](const std::string& leave_out, const std::string& add, float value = 0.0F,
                         nibble::SafetensorsType type = nibble::SafetensorsType::f32) {
    nibble::SafetensorsWriter out(path + "/model.safetensors");
    for (const auto& t : tensors)
      if (t.first != leave_out) out.declare(t.first + ".weight", type, t.second);
    if (!add.empty()) out.declare(add, nibble::SafetensorsType::f32, {64});
    const std::vector<float> zeros(20000, 0.0F), values(64, value);
    for (const auto& t : tensors)
      if (t.first != leave_out)
        out.write(t.first + ".weight", zeros.data(), nibble::safetensors_bytes(type, t.second));
    if (!add.empty()) out.write(add, values.data(), 256);
    out.commit();
  };
  write("", "");
  EXPECT_EQ(llm::open_model(path)->tensors().size(), tensors.size());
  EXPECT_THROW(llm::open_model(path)->quantized("blk.1.attn_q.weight"), FormatError);
  EXPECT_THROW(llm::open_model(path)->quantized("nonsense"), FormatError);
  expect_error<Unsupported>([&] { llm::open_model(path)->vocabulary(); }, {"tokenizer.json"});
  for (const auto& t : tensors) {
    write(t.first, "");
    expect_error<FormatError>([&] { llm::open_model(path); }, {t.first});
  }
  write("", "model.layers.0.self_attn.q_norm.weight");
  expect_error<Unsupported>([&] { llm::open_model(path); }, {"q_norm"});
  write("", "model.layers.0.self_attn.rotary_emb.inv_freq");
  EXPECT_NO_THROW(llm::open_model(path));
  write("", "lm_head.weight");  // tied: the embedding is what counts
  EXPECT_NO_THROW(llm::open_model(path));
  write("", "model.layers.0.self_attn.q_proj.bias", 0.0F);
  EXPECT_NO_THROW(llm::open_model(path));
  write("", "model.layers.0.self_attn.q_proj.bias", 1.0F);
  expect_error<Unsupported>([&] { llm::open_model(path); }, {"q_proj.bias"});
  write("", "", 0.0F, nibble::SafetensorsType::i32);
  expect_error<Unsupported>([&] { llm::load_model(*llm::open_model(path)); }, {"I32"});
  config["tie_word_embeddings"] = false;
  write_text(path + "/config.json", config.dump());
  write("", "");
  expect_error<FormatError>([&] { llm::open_model(path); }, {"lm_head"});
  config["tie_word_embeddings"] = true;
  config["vocab_size"] = 101;
  write_text(path + "/config.json", config.dump());
  expect_error<FormatError>([&] { llm::open_model(path); }, {"101"});
  config["vocab_size"] = 100;
  config["quantization_config"] = {{"quant_method", "bitsandbytes"}};
  write_text(path + "/config.json", config.dump());
  expect_error<Unsupported>([&] { llm::open_model(path); }, {"bitsandbytes"});
  // A truncated file of weights.
  config.erase("quantization_config");
  write_text(path + "/config.json", config.dump());
  const io_test::Bytes whole = io_test::read_file(path + "/model.safetensors");
  for (std::size_t size = 0; size < whole.size(); size += size < 1500 ? 5 : 19973) {
    io_test::write_file(path + "/model.safetensors",
                        io_test::Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)));
    EXPECT_THROW(llm::open_model(path), FormatError) << size;
  }
}

}  // namespace
