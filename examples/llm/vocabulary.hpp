// What a tokenizer is made of, however the file stores it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "flat_index.hpp"
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

/// How a vocabulary is used.
struct VocabularySettings {
  std::string model;  // "gpt2": byte-level BPE; "llama": SentencePiece-style
  std::string pre;    // how byte-level BPE cuts text into words before merging
  Token bos = no_token;
  Token eos = no_token;
  Token eot = no_token;  // end of a chat turn, where it is not eos
  Token unknown = no_token;
  bool add_bos = false;
  bool add_space_prefix = false;  // llama: text starts as if a space stood before it
  std::string chat_template;      // Jinja, see chat.hpp
};

/// A vocabulary as lists, to make one from.
struct VocabularyLists : VocabularySettings {
  std::vector<std::string> tokens;
  std::vector<TokenType> types;
  std::vector<float> scores;      // llama
  std::vector<MergeRule> merges;  // gpt2: best first
};

/// A vocabulary as the tokenizer needs it: a few flat arrays, which a packed file holds and lends as they are mapped.
/// Copies share them.
class Vocabulary : public VocabularySettings {
 public:
  struct Arrays {
    FlatArray<char> text;           // all tokens, one after the other
    FlatArray<std::uint32_t> ends;  // where each token ends in it
    FlatArray<std::uint8_t> types;  // TokenType; what is missing or out of its range is normal
    FlatArray<float> scores;        // llama
    FlatArray<MergeRule> merges;    // gpt2: best first
    FlatIndex token_index;          // tokens by hash_of(text)
    FlatIndex merge_index;          // merges by hash_of(left, right)
  };

  Vocabulary() = default;
  Vocabulary(const VocabularyLists& lists)  // NOLINT(google-explicit-constructor): one thing in another form
      : VocabularySettings(lists) {
    std::vector<char> text;
    std::vector<std::uint32_t> ends;
    for (const std::string& token : lists.tokens) {
      text.insert(text.end(), token.begin(), token.end());
      ends.push_back(static_cast<std::uint32_t>(text.size()));
    }
    std::vector<std::uint8_t> types;
    for (const TokenType t : lists.types) types.push_back(static_cast<std::uint8_t>(t));
    arrays_.text = FlatArray<char>(text);
    arrays_.ends = FlatArray<std::uint32_t>(ends);
    arrays_.types = FlatArray<std::uint8_t>(types);
    arrays_.scores = FlatArray<float>(lists.scores);
    arrays_.merges = FlatArray<MergeRule>(lists.merges);
    complete();
  }
  /// Indices that are missing are made. Throws FormatError where the arrays contradict each other.
  Vocabulary(VocabularySettings settings, Arrays arrays)
      : VocabularySettings(std::move(settings)), arrays_(std::move(arrays)) {
    complete();
  }

  std::size_t size() const { return arrays_.ends.size(); }
  bool has(Token t) const { return t >= 0 && static_cast<std::size_t>(t) < size(); }

  /// The spelling of a token that there is.
  std::string_view token(Token t) const { return token_at(static_cast<std::size_t>(t)); }
  TokenType type(Token t) const {
    const auto i = static_cast<std::size_t>(t);
    const std::uint8_t type = i < arrays_.types.size() ? arrays_.types[i] : std::uint8_t{1};
    return type >= 1 && type <= 6 ? static_cast<TokenType>(type) : TokenType::normal;
  }
  float score(Token t) const {
    const auto i = static_cast<std::size_t>(t);
    return i < arrays_.scores.size() ? arrays_.scores[i] : 0.0F;
  }
  const FlatArray<MergeRule>& merges() const { return arrays_.merges; }
  const Arrays& arrays() const { return arrays_; }

  /// The token that is spelled `text`, or no_token.
  Token find(std::string_view text) const {
    const std::uint32_t t =
        arrays_.token_index.find(hash_of(text), [&](std::size_t i) { return token_at(i) == text; });
    return t == FlatIndex::none ? no_token : static_cast<Token>(t);
  }
  /// The number of the rule that joins the two, or FlatIndex::none.
  std::uint32_t find_merge(Token left, Token right) const {
    return arrays_.merge_index.find(hash_of(left, right), [&](std::size_t i) {
      return arrays_.merges[i].left == left && arrays_.merges[i].right == right;
    });
  }

 private:
  std::string_view token_at(std::size_t i) const {
    const std::uint32_t begin = i == 0 ? 0 : arrays_.ends[i - 1];
    return {arrays_.text.data() + begin, arrays_.ends[i] - begin};
  }

  /// Checks what a file may have wrong, in one pass over numbers, and makes the indices that it does not have.
  void complete() {
    using nibble::FormatError;
    using nibble::detail::require;
    require<FormatError>(size() <= static_cast<std::size_t>(std::numeric_limits<Token>::max()) &&
                             arrays_.merges.size() < FlatIndex::none,
                         "the vocabulary has ", size(), " tokens");
    bool ascends = true;
    std::uint32_t last = 0;
    for (const std::uint32_t end : arrays_.ends) {
      ascends &= end >= last;
      last = end;
    }
    require<FormatError>(ascends && last <= arrays_.text.size(),
                         "the vocabulary's ends of tokens do not ascend within its text");
    bool known = true;
    for (const MergeRule& rule : arrays_.merges)
      known = known && has(rule.left) && has(rule.right) && has(rule.result);
    require<FormatError>(known, "the vocabulary's merges name a token that does not exist");
    for (Token* t : {&bos, &eos, &eot, &unknown})
      if (!has(*t)) *t = no_token;
    if (arrays_.token_index.empty())
      arrays_.token_index = FlatIndex::build(
          size(), [&](std::size_t i) { return hash_of(token_at(i)); },
          [&](std::size_t i, std::size_t j) { return token_at(i) == token_at(j); });
    if (arrays_.merge_index.empty())
      arrays_.merge_index = FlatIndex::build(
          arrays_.merges.size(),
          [&](std::size_t i) { return hash_of(arrays_.merges[i].left, arrays_.merges[i].right); },
          [&](std::size_t i, std::size_t j) {
            return arrays_.merges[i].left == arrays_.merges[j].left &&
                   arrays_.merges[i].right == arrays_.merges[j].right;
          });
  }

  Arrays arrays_;
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
  VocabularyLists v;
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
