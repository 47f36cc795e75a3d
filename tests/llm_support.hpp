// What the tests of examples/llm share: small models and vocabularies made on the spot, and the real ones if given.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <Eigen/Core>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "llm/model.hpp"
#include "llm/tokenizer.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace llm_test {

/// A fresh folder, removed at the end of the test.
class TempFolder {
 public:
  TempFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "nibble-llm-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) std::abort();
    path_ = pattern;
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

/// $NIBBLE_DATA/name, or "" where the variable is not set or the file not there.
inline std::string data_file(const std::string& name) {
  const char* folder = std::getenv("NIBBLE_DATA");
  if (folder == nullptr) return "";
  const std::string path = std::string(folder) + "/" + name;
  return std::filesystem::exists(path) ? path : "";
}

/// A file of examples/models/; CTest says where the source is.
inline std::string shipped_file(const std::string& name) {
  const char* source = std::getenv("NIBBLE_SOURCE_DIR");
  return std::string(source == nullptr ? "." : source) + "/examples/models/" + name;
}

/// The SmolLM2 GGUF that $NIBBLE_MODEL names, or "".
inline std::string model_file() {
  const char* path = std::getenv("NIBBLE_MODEL");
  return path != nullptr && std::filesystem::exists(path) ? path : "";
}

/// Byte-level BPE over all 256 bytes and the given merges, each "left right" in GPT-2's printable characters.
inline llm::VocabularyLists bpe_vocabulary(const std::vector<std::string>& merges,
                                           const std::string& pre = "gpt-2") {
  llm::VocabularyLists v;
  v.model = "gpt2";
  v.pre = pre;
  for (const char* special : {"<|end|>", "<|user|>"}) {
    v.tokens.emplace_back(special);
    v.types.push_back(llm::TokenType::control);
  }
  v.bos = v.eos = 0;
  std::uint32_t next = 0x100;
  for (std::uint32_t b = 0; b < 256; ++b) {
    const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    std::string text;
    llm::append_utf8(text, printable ? b : next++);
    v.tokens.push_back(text);
    v.types.push_back(llm::TokenType::normal);
  }
  for (const std::string& merge : merges) {
    const std::size_t space = merge.find(' ');
    v.tokens.push_back(merge.substr(0, space) + merge.substr(space + 1));
    v.types.push_back(llm::TokenType::normal);
  }
  v.merges = llm::merge_rules(v.tokens, merges);
  return v;
}

inline Eigen::MatrixXf random_matrix(std::mt19937& random, Eigen::Index rows, Eigen::Index cols, float size) {
  std::normal_distribution<float> normal(0.0F, size);
  Eigen::MatrixXf m(rows, cols);
  for (Eigen::Index c = 0; c < cols; ++c)
    for (Eigen::Index r = 0; r < rows; ++r) m(r, c) = normal(random);
  return m;
}

inline llm::Hparams small_hparams(std::size_t vocabulary = 101) {
  llm::Hparams h;
  h.name = "small";
  h.layers = 2;
  h.dim = 48;
  h.ffn = 80;
  h.heads = 6;
  h.kv_heads = 2;
  h.head_size = 8;
  h.rope_size = 8;
  h.context = 64;
  h.vocabulary = vocabulary;
  return h;
}

/// A model of random weights in one format; the float weights behind it are `values` by GGUF name.
struct RandomModel {
  llm::Model model;
  std::vector<std::pair<std::string, Eigen::MatrixXf>> values;

  const Eigen::MatrixXf& value(const std::string& name) const {
    for (const auto& [n, m] : values)
      if (n == name) return m;
    ADD_FAILURE() << name;
    return values.front().second;
  }
};

inline RandomModel random_model(const nibble::Scheme& scheme, const llm::Hparams& h = small_hparams()) {
  std::mt19937 random(7);
  RandomModel r;
  r.model.hparams = h;
  const auto index = [](std::size_t n) { return static_cast<Eigen::Index>(n); };
  const auto matrix = [&](const std::string& name, std::size_t rows, std::size_t cols) {
    r.values.emplace_back(
        name, random_matrix(random, index(rows), index(cols), 1.0F / std::sqrt(static_cast<float>(cols))));
    return nibble::pack(nibble::DynamicQuantizer(scheme).quantize(r.values.back().second));
  };
  const auto vector = [&](const std::string& name, std::size_t size) {
    r.values.emplace_back(name, random_matrix(random, index(size), 1, 0.1F).array() + 1.0F);
    return Eigen::VectorXf(r.values.back().second.col(0));
  };
  r.model.embedding = matrix("token_embd.weight", h.vocabulary, h.dim);
  r.model.output = r.model.embedding;
  r.model.output_norm = vector("output_norm.weight", h.dim);
  for (std::size_t i = 0; i < h.layers; ++i) {
    const std::string b = "blk." + std::to_string(i) + ".";
    llm::Layer l;
    l.attention_norm = vector(b + "attn_norm.weight", h.dim);
    l.query = matrix(b + "attn_q.weight", h.q_size(), h.dim);
    l.key = matrix(b + "attn_k.weight", h.kv_size(), h.dim);
    l.value = matrix(b + "attn_v.weight", h.kv_size(), h.dim);
    l.output = matrix(b + "attn_output.weight", h.dim, h.q_size());
    l.ffn_norm = vector(b + "ffn_norm.weight", h.dim);
    l.gate = matrix(b + "ffn_gate.weight", h.ffn, h.dim);
    l.up = matrix(b + "ffn_up.weight", h.ffn, h.dim);
    l.down = matrix(b + "ffn_down.weight", h.dim, h.ffn);
    r.model.layers.push_back(std::move(l));
  }
  return r;
}

inline std::vector<llm::Token> some_tokens(std::size_t n, std::size_t vocabulary) {
  std::mt19937 random(11);
  std::vector<llm::Token> tokens(n);
  for (llm::Token& t : tokens) t = static_cast<llm::Token>(random() % vocabulary);
  return tokens;
}

inline nibble::Scheme scheme_of(nibble::Format format, nibble::Symmetry symmetry = nibble::Symmetry::symmetric) {
  nibble::Scheme s;
  s.format = format;
  s.symmetry = symmetry;
  if (nibble::has_scales(format)) s.granularity = nibble::Granularity::per_group(16, 1);
  return s;
}

}  // namespace llm_test
