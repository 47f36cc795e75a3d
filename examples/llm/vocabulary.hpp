// What a tokenizer is made of, however the file stores it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "nibble/io/gguf.hpp"

namespace llm {

using Token = std::int32_t;
inline constexpr Token no_token = -1;

/// Numbers as in GGUF's tokenizer.ggml.token_type.
enum class TokenType : std::uint8_t {
  normal = 1,
  unknown = 2,
  control = 3,
  user_defined = 4,
  unused = 5,
  byte = 6
};

/// Byte-level BPE joins `left` and `right` into `result`.
struct MergeRule {
  Token left = no_token;
  Token right = no_token;
  Token result = no_token;
};

struct Vocabulary {
  std::string model;  // "gpt2": byte-level BPE; "llama": SentencePiece-style
  std::string pre;    // how byte-level BPE cuts text into words before merging
  std::vector<std::string> tokens;
  std::vector<TokenType> types;
  std::vector<float> scores;      // llama
  std::vector<MergeRule> merges;  // gpt2: best first
  Token bos = no_token;
  Token eos = no_token;
  Token eot = no_token;  // end of a chat turn, where it is not eos
  Token unknown = no_token;
  bool add_bos = false;
  bool add_space_prefix = false;  // llama: text starts as if a space stood before it
  std::string chat_template;      // Jinja, see chat.hpp

  std::size_t size() const { return tokens.size(); }
  TokenType type(Token t) const {
    const auto i = static_cast<std::size_t>(t);
    return i < types.size() ? types[i] : TokenType::normal;
  }
};

/// GGUF's merges, "left right" as text, by token ids. Rules that speak of no token of the vocabulary can never apply
/// and are left out.
inline std::vector<MergeRule> merge_rules(const std::vector<std::string>& tokens,
                                          const std::vector<std::string>& merges) {
  std::unordered_map<std::string_view, Token> ids;
  ids.reserve(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) ids.emplace(tokens[i], static_cast<Token>(i));
  const auto find = [&](std::string_view text) {
    const auto it = ids.find(text);
    return it == ids.end() ? no_token : it->second;
  };
  std::vector<MergeRule> rules;
  rules.reserve(merges.size());
  std::string joined;
  for (const std::string& merge : merges) {
    const std::size_t space = merge.find(' ', 1);
    if (space == std::string::npos) continue;
    const std::string_view left = std::string_view(merge).substr(0, space);
    const std::string_view right = std::string_view(merge).substr(space + 1);
    joined.assign(left).append(right);
    const MergeRule rule{find(left), find(right), find(joined)};
    if (rule.left != no_token && rule.right != no_token && rule.result != no_token) rules.push_back(rule);
  }
  return rules;
}

/// Reads the vocabulary that a GGUF carries under tokenizer.*. Throws FormatError where it is broken.
inline Vocabulary vocabulary_of(const nibble::GgufFile& file) {
  Vocabulary v;
  v.model = file.get<std::string>("tokenizer.ggml.model");
  v.pre = file.get_or<std::string>("tokenizer.ggml.pre", "default");
  v.tokens = file.get<nibble::GgufArray>("tokenizer.ggml.tokens").as<std::string>();
  const auto types = file.get_or<nibble::GgufArray>("tokenizer.ggml.token_type", {}).as<std::int32_t>();
  v.types.reserve(types.size());
  for (const std::int32_t t : types)
    v.types.push_back(t >= 1 && t <= 6 ? static_cast<TokenType>(t) : TokenType::normal);
  v.scores = file.get_or<nibble::GgufArray>("tokenizer.ggml.scores", {}).as<float>();
  const auto merges = file.get_or<nibble::GgufArray>("tokenizer.ggml.merges", {});
  if (!merges.empty()) v.merges = merge_rules(v.tokens, merges.as<std::string>());
  const auto token = [&](const char* key) {
    const auto id = file.get_or<std::uint64_t>(key, v.tokens.size());
    return id < v.tokens.size() ? static_cast<Token>(id) : no_token;  // files write -1 for "none"
  };
  v.bos = token("tokenizer.ggml.bos_token_id");
  v.eos = token("tokenizer.ggml.eos_token_id");
  v.eot = token("tokenizer.ggml.eot_token_id");
  v.unknown = token("tokenizer.ggml.unknown_token_id");
  const bool sentencepiece = v.model == "llama";
  v.add_bos = file.get_or<bool>("tokenizer.ggml.add_bos_token", sentencepiece || v.pre == "llama-bpe");
  v.add_space_prefix = file.get_or<bool>("tokenizer.ggml.add_space_prefix", sentencepiece) && sentencepiece;
  v.chat_template = file.get_or<std::string>("tokenizer.chat_template", "");
  return v;
}

}  // namespace llm
