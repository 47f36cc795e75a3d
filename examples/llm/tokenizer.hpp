// Text to tokens and back: byte-level BPE (GPT-2's family) and SentencePiece-style vocabularies, as GGUF holds them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <queue>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "unicode.hpp"
#include "vocabulary.hpp"
#include "words.hpp"

namespace llm {

/// GPT-2 writes every byte as a printable character: those that print themselves as they are, the others as 0x100, 0x101,
/// ... in their order.
inline std::array<std::uint32_t, 256> byte_level_characters() {
  std::array<std::uint32_t, 256> characters{};
  std::uint32_t next = 0x100;
  for (std::uint32_t b = 0; b < 256; ++b) {
    const bool prints_itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    characters[b] = prints_itself ? b : next++;
  }
  return characters;
}

/// Immutable after construction; all member functions may be called from several threads.
class Tokenizer {
 public:
  explicit Tokenizer(Vocabulary vocabulary) : vocabulary_(std::move(vocabulary)) {
    byte_level_ = vocabulary_.model == "gpt2";
    if (!byte_level_ && vocabulary_.model != "llama")
      throw std::runtime_error("tokenizer model '" + vocabulary_.model + "' is not known (gpt2 and llama are)");
    if (vocabulary_.size() == 0) throw std::runtime_error("the vocabulary is empty");
    if (byte_level_)
      prepare_byte_level();
    else
      prepare_sentencepiece();
    prepare_special();
  }

  const Vocabulary& vocabulary() const { return vocabulary_; }

  /// Tokens of `text`. With `special`, what spells a control token becomes that token: for templates, never for text
  /// that somebody else wrote. No beginning-of-sequence token is added.
  std::vector<Token> encode(std::string_view text, bool special = false) const {
    std::vector<Token> out;
    WordCache cache;
    bool after_special = true;  // also true at the start of the text
    const auto plain = [&](std::string_view piece) {
      if (piece.empty()) return;
      if (byte_level_)
        split_words(piece, pattern_, [&](std::string_view word) { encode_word(word, cache, out); });
      else
        encode_sentencepiece(piece, after_special, out);
      after_special = false;
    };
    std::size_t begin = 0;
    for (std::size_t at = 0; at < text.size();) {
      const Token t = special_at(text, at, special);
      if (t == no_token) {
        ++at;
        continue;
      }
      plain(text.substr(begin, at - begin));
      out.push_back(t);
      at += vocabulary_.token(t).size();
      begin = at;
      after_special = true;
    }
    plain(text.substr(begin));
    return out;
  }

  /// The id of the token that is spelled `text` in the vocabulary, or no_token.
  Token find(std::string_view text) const { return vocabulary_.find(text); }

  /// The bytes that `token` stands for; nothing for control tokens. They may be a part of a character.
  std::string piece(Token token) const {
    if (!vocabulary_.has(token)) return {};
    const std::string_view text = vocabulary_.token(token);
    switch (vocabulary_.type(token)) {
      case TokenType::control:
      case TokenType::unused: return {};
      case TokenType::unknown: return "\xEF\xBF\xBD";
      case TokenType::user_defined: return std::string(text);
      case TokenType::byte: return std::string(1, static_cast<char>(byte_value(text)));
      case TokenType::normal: break;
    }
    return byte_level_ ? bytes_of_word(text) : spaces_of_marks(text);
  }

  /// True for the tokens after which a model has nothing more to say.
  bool ends_text(Token token) const { return ends_.count(token) != 0; }

 private:
  using WordCache = std::unordered_map<std::string, std::vector<Token>>;

  void prepare_byte_level() {
    pattern_ = word_pattern(vocabulary_.pre);
    // Llama 3's vocabulary holds words that its merges cannot build.
    whole_words_ = pattern_ == WordPattern::llama3;
    byte_of_char_.fill(-1);
    const std::array<std::uint32_t, 256> characters = byte_level_characters();
    for (unsigned b = 0; b < 256; ++b) {
      const std::uint32_t c = characters[b];
      append_utf8(byte_text_[b], c);
      byte_of_char_[c] = static_cast<std::int16_t>(b);
      byte_token_[b] = find(byte_text_[b]);
    }
  }

  void prepare_sentencepiece() {
    for (unsigned b = 0; b < 256; ++b) {
      static const char* const digits = "0123456789ABCDEF";
      byte_token_[b] = find(std::string("<0x") + digits[b >> 4] + digits[b & 15] + ">");
    }
  }

  void prepare_special() {
    for (std::size_t i = 0; i < vocabulary_.size(); ++i) {
      const auto t = static_cast<Token>(i);
      const TokenType type = vocabulary_.type(t);
      if (type != TokenType::control && type != TokenType::user_defined) continue;
      const std::string_view spelled = vocabulary_.token(t);
      if (!spelled.empty()) special_by_byte_[static_cast<unsigned char>(spelled[0])].push_back(t);
    }
    for (auto& list : special_by_byte_)
      std::sort(list.begin(), list.end(),
                [&](Token a, Token b) { return vocabulary_.token(a).size() > vocabulary_.token(b).size(); });
    for (const Token t : {vocabulary_.eos, vocabulary_.eot, vocabulary_.bos})
      if (t != no_token) ends_.insert(t);  // a new beginning ends the text as well
    for (const char* name : {"<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<|end|>", "</s>"})
      if (const Token t = find(name); t != no_token && vocabulary_.type(t) == TokenType::control) ends_.insert(t);
  }

  /// The longest special token that starts at text[at]; control tokens only where `control` allows them.
  Token special_at(std::string_view text, std::size_t at, bool control) const {
    for (const Token t : special_by_byte_[static_cast<unsigned char>(text[at])]) {
      if (!control && vocabulary_.type(t) == TokenType::control) continue;
      const std::string_view spelled = vocabulary_.token(t);
      if (text.compare(at, spelled.size(), spelled) == 0) return t;
    }
    return no_token;
  }

  // A word's symbols as a linked list, and the queue of neighbours that may be joined, best first. An entry is stale
  // when either side has changed since; that is found out when it comes up.
  struct Symbol {
    int previous = -1;
    int next = -1;
    Token id = no_token;
    std::string_view text;  // SentencePiece; empty: swallowed by its left neighbour
  };

  void encode_word(std::string_view word, WordCache& cache, std::vector<Token>& out) const {
    auto [it, fresh] = cache.try_emplace(std::string(word));
    if (fresh) merge_word(word, it->second);
    out.insert(out.end(), it->second.begin(), it->second.end());
  }

  void merge_word(std::string_view word, std::vector<Token>& out) const {
    if (whole_words_) {
      std::string text;
      for (const char c : word) text += byte_text_[static_cast<unsigned char>(c)];
      if (const Token t = find(text); t != no_token) return out.push_back(t);
    }
    std::vector<Symbol> symbols;
    for (const char c : word) {
      const Token t = byte_token_[static_cast<unsigned char>(c)];
      if (t == no_token) continue;  // a byte that the vocabulary cannot say
      const int i = static_cast<int>(symbols.size());
      symbols.push_back({i - 1, -1, t, {}});
      if (i > 0) symbols[static_cast<std::size_t>(i - 1)].next = i;
    }
    if (symbols.empty()) return;

    struct Candidate {
      std::uint32_t rank;  // the rule's number
      int left;
      int right;
      Token left_id;
      Token right_id;
      bool operator<(const Candidate& o) const { return std::tie(o.rank, o.left) < std::tie(rank, left); }
    };
    std::priority_queue<Candidate> queue;
    const auto at = [&](int i) -> Symbol& { return symbols[static_cast<std::size_t>(i)]; };
    const auto propose = [&](int left, int right) {
      if (left < 0 || right < 0) return;
      const std::uint32_t rule = vocabulary_.find_merge(at(left).id, at(right).id);
      if (rule != FlatIndex::none) queue.push({rule, left, right, at(left).id, at(right).id});
    };
    for (int i = 1; i < static_cast<int>(symbols.size()); ++i) propose(i - 1, i);
    while (!queue.empty()) {
      const Candidate c = queue.top();
      queue.pop();
      if (at(c.left).id != c.left_id || at(c.right).id != c.right_id || at(c.left).next != c.right) continue;
      at(c.left).id = vocabulary_.merges()[c.rank].result;
      at(c.left).next = at(c.right).next;
      if (at(c.right).next >= 0) at(at(c.right).next).previous = c.left;
      at(c.right).id = no_token;
      propose(at(c.left).previous, c.left);
      propose(c.left, at(c.left).next);
    }
    for (int i = 0; i >= 0; i = at(i).next) out.push_back(at(i).id);
  }

  void encode_sentencepiece(std::string_view piece, bool after_special, std::vector<Token>& out) const {
    std::string text;
    if (after_special && vocabulary_.add_space_prefix) text = mark;
    for (const char c : piece) {
      if (c == ' ')
        text += mark;
      else
        text += c;
    }
    std::vector<Symbol> symbols;
    for (std::size_t p = 0; p < text.size();) {
      const std::size_t bytes = decode_utf8(text, p).bytes;
      const int i = static_cast<int>(symbols.size());
      symbols.push_back({i - 1, -1, no_token, std::string_view(text).substr(p, bytes)});
      if (i > 0) symbols[static_cast<std::size_t>(i - 1)].next = i;
      p += bytes;
    }

    struct Candidate {
      float score;
      int left;
      int right;
      std::size_t bytes;  // of both together
      bool operator<(const Candidate& o) const { return score < o.score || (score == o.score && left > o.left); }
    };
    std::priority_queue<Candidate> queue;
    const auto at = [&](int i) -> Symbol& { return symbols[static_cast<std::size_t>(i)]; };
    const auto propose = [&](int left, int right) {
      if (left < 0 || right < 0) return;
      const std::size_t bytes = at(left).text.size() + at(right).text.size();
      const Token t = find(std::string_view(at(left).text.data(), bytes));
      if (t != no_token) queue.push({vocabulary_.score(t), left, right, bytes});
    };
    for (int i = 1; i < static_cast<int>(symbols.size()); ++i) propose(i - 1, i);
    while (!queue.empty()) {
      const Candidate c = queue.top();
      queue.pop();
      if (at(c.left).text.empty() || at(c.right).text.empty()) continue;
      if (at(c.left).text.size() + at(c.right).text.size() != c.bytes) continue;
      at(c.left).text = std::string_view(at(c.left).text.data(), c.bytes);
      at(c.right).text = {};
      at(c.left).next = at(c.right).next;
      if (at(c.right).next >= 0) at(at(c.right).next).previous = c.left;
      propose(at(c.left).previous, c.left);
      propose(c.left, at(c.left).next);
    }
    for (int i = 0; i >= 0; i = at(i).next) {
      if (const Token t = find(at(i).text); t != no_token) {
        out.push_back(t);
        continue;
      }
      for (const char c : at(i).text) {
        const Token t = byte_token_[static_cast<unsigned char>(c)];
        if (t != no_token)
          out.push_back(t);
        else if (vocabulary_.unknown != no_token)
          out.push_back(vocabulary_.unknown);
      }
    }
  }

  std::string bytes_of_word(std::string_view text) const {
    std::string bytes;
    for (std::size_t at = 0; at < text.size();) {
      const CodePoint p = decode_utf8(text, at);
      const int byte = p.value < byte_of_char_.size() ? byte_of_char_[p.value] : -1;
      if (p.valid && byte >= 0)
        bytes.push_back(static_cast<char>(byte));
      else
        bytes.append(text.substr(at, p.bytes));
      at += p.bytes;
    }
    return bytes;
  }

  static std::string spaces_of_marks(std::string_view text) {
    std::string out;
    for (std::size_t at = 0; at < text.size();) {
      if (text.compare(at, mark.size(), mark) == 0) {
        out.push_back(' ');
        at += mark.size();
      } else {
        out.push_back(text[at++]);
      }
    }
    return out;
  }

  static unsigned char byte_value(std::string_view text) {  // "<0xAB>"
    const auto digit = [](char c) {
      return static_cast<unsigned>(c <= '9' ? c - '0' : (c | 32) - 'a' + 10) & 15U;
    };
    return text.size() == 6 ? static_cast<unsigned char>(digit(text[3]) << 4 | digit(text[4])) : 0;
  }

  static constexpr std::string_view mark = "\xE2\x96\x81";  // U+2581, SentencePiece's space

  Vocabulary vocabulary_;
  bool byte_level_ = false;
  bool whole_words_ = false;
  WordPattern pattern_ = WordPattern::gpt2;
  std::array<std::string, 256> byte_text_;
  std::array<Token, 256> byte_token_{};
  std::array<std::int16_t, 0x144> byte_of_char_{};  // -1: no byte; 0x100 + 68 is the last that is one
  std::array<std::vector<Token>, 256> special_by_byte_;
  std::unordered_set<Token> ends_;
};

/// Tokens to text as they come: gives out whole UTF-8 characters only, with U+FFFD for bytes that are none.
class StreamDecoder {
 public:
  /// `start_of_text`: the first piece's leading space is the tokenizer's own and is dropped.
  StreamDecoder(const Tokenizer& tokenizer, bool start_of_text)
      : tokenizer_(tokenizer), strip_(start_of_text && tokenizer.vocabulary().add_space_prefix) {}

  std::string push(Token token) {
    std::string piece = tokenizer_.piece(token);
    if (strip_ && !piece.empty()) {
      if (piece[0] == ' ') piece.erase(0, 1);
      strip_ = false;
    }
    pending_ += piece;
    return take(false);
  }

  /// What is left when no more tokens come.
  std::string finish() { return take(true); }

 private:
  std::string take(bool all) {
    std::string out;
    std::size_t at = 0;
    while (at < pending_.size()) {
      const CodePoint p = decode_utf8(pending_, at);
      if (!p.valid && !all && may_continue(at)) break;
      append_utf8(out, p.value);
      at += p.bytes;
    }
    pending_.erase(0, at);
    return out;
  }

  // The bytes from `at` to the end are the beginning of a character.
  bool may_continue(std::size_t at) const {
    const std::size_t length = utf8_length(static_cast<unsigned char>(pending_[at]));
    if (at + length <= pending_.size()) return false;
    for (std::size_t i = at + 1; i < pending_.size(); ++i)
      if ((static_cast<unsigned char>(pending_[i]) & 0xC0U) != 0x80U) return false;
    return true;
  }

  const Tokenizer& tokenizer_;
  bool strip_;
  std::string pending_;
};

inline std::string decode(const Tokenizer& tokenizer, const std::vector<Token>& tokens,
                          bool start_of_text = true) {
  StreamDecoder decoder(tokenizer, start_of_text);
  std::string text;
  for (const Token t : tokens) text += decoder.push(t);
  return text + decoder.finish();
}

}  // namespace llm
