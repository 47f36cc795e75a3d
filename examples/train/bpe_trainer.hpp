// Byte-level byte-pair encoding, learned from a text: a vocabulary as GGUF (tokenizer.ggml.model = gpt2) and Hugging Face
// hold it, which Tokenizer reads back.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <queue>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../llm/tokenizer.hpp"
#include "nibble/core/error.hpp"

namespace llm {

struct BpeOptions {
  std::size_t vocabulary = 2048;              // tokens in all: at least 257, the bytes and end_of_text
  std::string end_of_text = "<|endoftext|>";  // token 0; also what a text begins with
  std::size_t min_count = 2;                  // pairs that are rarer are not joined
};

namespace bpe_detail {

/// A word of the text: its symbols so far, and how often it is there.
struct Word {
  std::vector<Token> symbols;
  std::int64_t count = 0;
};

inline std::uint64_t key_of(Token left, Token right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
}

/// How often two symbols are neighbours, and in which words they were ever.
struct Pair {
  std::int64_t count = 0;
  std::vector<std::uint32_t> words;
};

struct Candidate {
  std::int64_t count;
  std::uint64_t key;
  bool operator<(const Candidate& o) const { return std::tie(count, o.key) < std::tie(o.count, key); }
};

}  // namespace bpe_detail

/// Joins, again and again, the two neighbours that are most often side by side within a word (GPT-2's words; Sennrich 2016,
/// algorithm 1), the earliest tokens of those that are equally often; until the vocabulary is full or nothing is left that
/// comes min_count times. Tokens: end_of_text, the bytes in their order, then what was joined, in the order of the rules.
/// The same for a text on every platform. Throws InvalidArgument for a vocabulary that has no room for the bytes.
inline VocabularyLists train_bpe(std::string_view text, const BpeOptions& options = {}) {
  using bpe_detail::Candidate;
  using bpe_detail::key_of;
  nibble::detail::require(options.vocabulary >= 257 && options.vocabulary <= (1U << 24), "the vocabulary has ",
                          options.vocabulary,
                          " tokens, expected 257 (the bytes, and the end of the text) to 2^24");
  VocabularyLists v;
  v.model = "gpt2";
  v.pre = "gpt-2";
  v.tokens.push_back(options.end_of_text);
  v.types.push_back(TokenType::control);
  v.bos = v.eos = 0;
  for (const std::uint32_t c : byte_level_characters()) {
    v.tokens.emplace_back();
    append_utf8(v.tokens.back(), c);
    v.types.push_back(TokenType::normal);
  }

  std::vector<bpe_detail::Word> words;
  {
    std::unordered_map<std::string_view, std::size_t> index;
    split_words(text, WordPattern::gpt2, [&](std::string_view word) {
      const auto [at, fresh] = index.try_emplace(word, words.size());
      if (fresh) {
        words.emplace_back();
        for (const char c : word)
          words.back().symbols.push_back(1 + static_cast<Token>(static_cast<unsigned char>(c)));
      }
      ++words[at->second].count;
    });
  }
  std::unordered_map<std::uint64_t, bpe_detail::Pair> pairs;
  for (std::size_t w = 0; w < words.size(); ++w)
    for (std::size_t i = 1; i < words[w].symbols.size(); ++i) {
      bpe_detail::Pair& pair = pairs[key_of(words[w].symbols[i - 1], words[w].symbols[i])];
      pair.count += words[w].count;
      pair.words.push_back(static_cast<std::uint32_t>(w));
    }
  // Entries whose count has changed since are found out when they come up.
  std::priority_queue<Candidate> queue;
  for (const auto& entry : pairs) queue.push({entry.second.count, entry.first});

  const auto least = static_cast<std::int64_t>(std::max<std::size_t>(options.min_count, 1));
  std::vector<std::uint64_t> changed;
  while (v.tokens.size() < options.vocabulary && !queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    if (best.count < least) break;
    bpe_detail::Pair& pair = pairs[best.key];
    if (pair.count != best.count) continue;
    const auto left = static_cast<Token>(best.key >> 32), right = static_cast<Token>(best.key & 0xFFFFFFFFU);
    const std::string joined =
        v.tokens[static_cast<std::size_t>(left)] + v.tokens[static_cast<std::size_t>(right)];
    // Two rules may spell one token ("a" + "bc" and "ab" + "c"): a spelling has one number.
    Token token = no_token;
    for (std::size_t i = 257; i < v.tokens.size() && token == no_token; ++i)
      if (v.tokens[i] == joined) token = static_cast<Token>(i);
    if (token == no_token) {
      token = static_cast<Token>(v.tokens.size());
      v.tokens.push_back(joined);
      v.types.push_back(TokenType::normal);
    }
    v.merges.push_back({left, right, token});

    std::vector<std::uint32_t> where;
    where.swap(pair.words);
    std::sort(where.begin(), where.end());
    where.erase(std::unique(where.begin(), where.end()), where.end());
    changed.clear();
    for (const std::uint32_t w : where) {
      bpe_detail::Word& word = words[w];
      const auto count_pairs = [&](std::int64_t count, bool adds) {
        for (std::size_t i = 1; i < word.symbols.size(); ++i) {
          const std::uint64_t key = key_of(word.symbols[i - 1], word.symbols[i]);
          bpe_detail::Pair& p = pairs[key];
          p.count += count;
          if (adds && (word.symbols[i - 1] == token || word.symbols[i] == token)) p.words.push_back(w);
          changed.push_back(key);
        }
      };
      count_pairs(-word.count, false);
      std::size_t kept = 0;
      for (std::size_t i = 0; i < word.symbols.size(); ++i) {
        const bool joins = i + 1 < word.symbols.size() && word.symbols[i] == left && word.symbols[i + 1] == right;
        word.symbols[kept++] = joins ? token : word.symbols[i];
        if (joins) ++i;
      }
      word.symbols.resize(kept);
      count_pairs(word.count, true);
    }
    std::sort(changed.begin(), changed.end());
    changed.erase(std::unique(changed.begin(), changed.end()), changed.end());
    for (const std::uint64_t key : changed)
      if (const std::int64_t count = pairs[key].count; count > 0) queue.push({count, key});
  }
  return v;
}

}  // namespace llm
