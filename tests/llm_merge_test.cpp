// Adapters beside a model and merged into it: logits of all of them agree with those of W + scale B A.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "llm/model.hpp"
#include "llm/packed_model.hpp"
#include "llm/runner.hpp"
#include "llm_support.hpp"
#include "train/merge_model.hpp"

namespace {

using llm::Token;
using llm_test::TempFolder;

llm::Hparams hparams() { return llm_test::small_hparams(262); }

void write_model(const std::string& path) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(nibble::Format::fp32), hparams());
  nibble::PackedFileWriter out(path);
  llm::add_model_data(out, hparams(), llm::Vocabulary(llm_test::bpe_vocabulary({"a b", "c d"})));
  for (const auto& entry : m.values) {
    const Eigen::MatrixXf& w = entry.second;
    if (w.cols() == 1)
      out.add_tensor(entry.first, std::vector<float>(w.data(), w.data() + w.size()));
    else
      out.add(entry.first, nibble::pack(w));
  }
  out.commit();
}
/// Low ranks on some matrices of both blocks.
llm::LlamaAdapter adapter_over(const llm::AdapterBase& base) {
  std::mt19937 random(3);
  llm::LlamaAdapter a;
  a.config.rank = 3;
  a.config.alpha = 6.0;
  a.metadata = base.to_metadata();
  for (const char* name :
       {"blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.1.attn_v.weight", "blk.1.attn_output.weight",
        "blk.0.ffn_gate.weight", "blk.1.ffn_up.weight", "blk.1.ffn_down.weight"}) {
    const std::string n(name);
    const Eigen::Index rows = n.find("attn_k") != n.npos || n.find("attn_v") != n.npos ? 16
                              : n.find("gate") != n.npos || n.find("up") != n.npos     ? 80
                                                                                       : 48;
    const Eigen::Index cols = n.find("down") != n.npos ? 80 : 48;
    a.matrices[n] = {llm_test::random_matrix(random, 3, cols, 0.1F),
                     llm_test::random_matrix(random, rows, 3, 0.1F), 2.0};
  }
  return a;
}
Eigen::MatrixXf logits(const llm::Model& model, std::size_t tokens = 30) {
  const std::vector<Token> text = llm_test::some_tokens(tokens, 262);
  llm::RunnerOptions options;
  options.block = 16;  // in pieces, the last a shorter one
  options.kv_format = nibble::KvFormat::fp32;
  options.activations = nibble::Activations::fp32;
  llm::Runner runner(model, options);
  auto cache = runner.new_cache();
  Eigen::MatrixXf out(262, static_cast<Eigen::Index>(tokens));
  runner.append(cache, text.data(), text.size(), 0,
                [&](std::size_t i, const auto& l) { out.middleCols(static_cast<Eigen::Index>(i), l.cols()) = l; });
  return out;
}
double distance(const Eigen::MatrixXf& a, const Eigen::MatrixXf& b) {
  return static_cast<double>((a - b).norm()) / static_cast<double>(b.norm());
}

TEST(MergeModel, AttachedAndMergedInFloatsAreTheSameModel) {
  const TempFolder folder;
  write_model(folder / "model.safetensors");
  const auto file = llm::open_model(folder / "model.safetensors");
  const Eigen::MatrixXf plain = logits(llm::load_model(*file));
  for (const char* format : {"float", "nf4-g16"}) {
    llm::AdapterBase base;
    if (std::string(format) != "float") base.scheme = llm::scheme_of(llm::parse_format(format));
    base.double_quantized = base.scheme.has_value();
    for (const int loftq : {0, 2}) {
      base.loftq = base.scheme ? loftq : 0;
      llm::write_llama_adapter(folder / "adapter", adapter_over(base), hparams());
      const llm::LlamaAdapter adapter = llm::read_llama_adapter(folder / "adapter", hparams());
      const llm::AdapterBase found = llm::adapter_base_of(adapter);
      EXPECT_EQ(found.to_metadata(), base.to_metadata());
      llm::Model attached = llm::load_model(*file);
      llm::attach_adapter(attached, *file, adapter, found, nullptr);
      llm::MergeModelOptions options;
      options.base = found;
      options.scheme.format = nibble::Format::fp32;
      for (const char* out : {"merged.safetensors", "merged.gguf"}) {
        llm::merge_into_floats(*file, adapter, folder / out, options);
        const Eigen::MatrixXf merged = logits(llm::load_model(*llm::open_model(folder / out)));
        // One is W x + B (A x), the other rounds W + B A once: some 2^-24 a layer, grown by norms and softmax.
        EXPECT_LT(distance(logits(attached), merged), 1e-4) << format << " " << out;
        EXPECT_GT(distance(plain, merged), 1e-2);
      }
      // A token alone is the same as in a prompt.
      EXPECT_EQ(logits(attached, 1), logits(attached, 30).leftCols(1));
    }
  }
}

TEST(MergeModel, QuantizedMergesKeepOutputsAndTheirSideTerms) {
  const TempFolder folder;
  write_model(folder / "model.safetensors");
  const auto file = llm::open_model(folder / "model.safetensors");
  const llm::LlamaAdapter adapter = adapter_over({});
  llm::MergeModelOptions options;
  options.scheme.format = nibble::Format::fp32;
  llm::merge_into_floats(*file, adapter, folder / "float.safetensors", options);
  const Eigen::MatrixXf target = logits(llm::load_model(*llm::open_model(folder / "float.safetensors")));
  options.scheme = llm::scheme_of(llm::parse_format("int4-g16"));
  EXPECT_THROW(llm::QuantizedMerger(*file, adapter, options), nibble::InvalidArgument);
  options.windows.assign(8, llm_test::some_tokens(30, 262));
  double before = 0.0;
  for (const double share : {0.0, 0.4}) {
    options.side_share = share;
    const auto reports = llm::QuantizedMerger(*file, adapter, options).run(folder / "int4.safetensors");
    ASSERT_EQ(reports.size(), 14U);
    double error = 0.0, naive = 0.0;
    for (const llm::MergeReport& r : reports) {
      error += r.error;
      naive += r.naive_error;
      EXPECT_LE(static_cast<double>(r.side_bytes), share * static_cast<double>(r.bytes)) << r.name;
    }
    EXPECT_LT(error, 0.5 * naive);
    const auto merged = llm::open_model(folder / "int4.safetensors");
    EXPECT_EQ(merged->has_extras(), share > 0.0);
    const double away = distance(logits(llm::load_model(*merged)), target);
    if (share > 0.0) {
      EXPECT_LT(away, before);
      // Blocks of floats have the side term in them.
      const llm::LinearExtras* e = merged->extras("blk.0.ffn_up.weight");
      ASSERT_NE(e, nullptr);
      EXPECT_GT(e->side.rank(), 0);
      nibble::RowMajorMatrix w(80, 48);
      merged->quantized("blk.0.ffn_up.weight").dequantize(w.data());
      nibble::merge_low_rank(e->side, w);
      EXPECT_EQ(llm::load_block(*merged, 0)[llm::BlockMatrix::up], w);
      EXPECT_THROW(llm::merge_into_floats(*merged, adapter, folder / "no/where.gguf", options), nibble::Error);
    }
    before = away;
    EXPECT_LT(away, 0.2);
  }
}

TEST(MergeModel, BrokenSideTermsAndBasesAreErrors) {
  llm::LinearExtras e;
  e.side = {nibble::RowMajorMatrix::Ones(2, 8), nibble::RowMajorMatrix::Ones(6, 2), 1.0};
  llm::check(e, "w", 6, 8);
  EXPECT_THROW(llm::check(e, "w", 6, 9), nibble::FormatError);
  EXPECT_THROW(llm::check(e, "w", 5, 8), nibble::FormatError);
  e.side.a(0, 0) = std::numeric_limits<float>::infinity();
  EXPECT_THROW(llm::check(e, "w", 6, 8), nibble::FormatError);
  llm::LlamaAdapter a;
  EXPECT_FALSE(llm::adapter_base_of(a).scheme.has_value());
  a.metadata["nibble.base"] = "seven bits";
  EXPECT_THROW(llm::adapter_base_of(a), nibble::InvalidArgument);
  a.metadata["nibble.base"] = "nf4-g64";
  a.metadata["nibble.loftq"] = "-3";
  EXPECT_THROW(llm::adapter_base_of(a), nibble::FormatError);
}

}  // namespace
