// Cuts text into the words that byte-level BPE merges in: the tokenizers' regular expressions, matched by hand.
//
// gpt2:   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// smollm: every \p{N} is a word; what lies between them is cut by gpt2's pattern, one piece at a time
// llama3: (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+
//         |\s+(?!\S)|\s+
// qwen2:  llama3 with \p{N} in place of \p{N}{1,3}
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

#include "unicode.hpp"

namespace llm {

enum class WordPattern { gpt2, smollm, llama3, qwen2 };

/// The pattern that a GGUF's tokenizer.ggml.pre names.
inline WordPattern word_pattern(const std::string& pre) {
  if (pre == "smollm") return WordPattern::smollm;
  if (pre == "gpt-2" || pre == "default" || pre.empty()) return WordPattern::gpt2;
  if (pre == "llama-bpe" || pre == "llama3" || pre == "llama-v3") return WordPattern::llama3;
  if (pre == "qwen2") return WordPattern::qwen2;
  throw std::runtime_error("tokenizer.ggml.pre '" + pre +
                           "' is not known (smollm, gpt-2, llama-bpe and qwen2 are)");
}

/// One piece of text being cut; every member function answers "where does the match that starts at `at` end?", with
/// `at` itself for "no match".
class WordScanner {
 public:
  explicit WordScanner(std::string_view text) : text_(text) {}

  std::size_t gpt2_word(std::size_t at) const {
    if (const std::size_t end = contraction(at, false); end > at) return end;
    const std::size_t body = text_[at] == ' ' ? at + 1 : at;
    if (body < text_.size()) {
      const CharClass c = class_at(body);
      if (c != CharClass::space) return run(body, c);
    }
    return spaces(at);
  }

  std::size_t llama3_word(std::size_t at, std::size_t digits) const {
    if (const std::size_t end = contraction(at, true); end > at) return end;
    const CodePoint first = decode_utf8(text_, at);
    const CharClass c = class_of(first);
    if (c == CharClass::letter) return run(at, c);
    if (c == CharClass::number) return run(at, c, digits);
    const std::size_t next = at + first.bytes;
    if (!newline(at) && next < text_.size() && class_at(next) == CharClass::letter)
      return run(next, CharClass::letter);
    const std::size_t body = text_[at] == ' ' ? next : at;
    if (body < text_.size() && class_at(body) == CharClass::other) {
      std::size_t end = run(body, CharClass::other);
      while (end < text_.size() && newline(end)) ++end;
      return end;
    }
    const std::size_t end = run(at, CharClass::space);
    for (std::size_t i = end; i > at; --i)
      if (newline(i - 1)) return i;
    return spaces(at);
  }

  CharClass class_at(std::size_t at) const { return class_of(decode_utf8(text_, at)); }

  /// End of the longest run of class `c` from `at`, at most `limit` characters.
  std::size_t run(std::size_t at, CharClass c, std::size_t limit = static_cast<std::size_t>(-1)) const {
    for (; at < text_.size() && limit > 0; --limit) {
      const CodePoint p = decode_utf8(text_, at);
      if (class_of(p) != c) break;
      at += p.bytes;
    }
    return at;
  }

 private:
  static CharClass class_of(const CodePoint& p) { return p.valid ? char_class(p.value) : CharClass::other; }
  bool newline(std::size_t at) const { return text_[at] == '\n' || text_[at] == '\r'; }

  std::size_t contraction(std::size_t at, bool any_case) const {
    if (text_[at] != '\'') return at;
    for (const std::string_view tail : {"s", "t", "re", "ve", "m", "ll", "d"}) {
      if (at + tail.size() >= text_.size()) continue;
      std::size_t same = 0;
      while (same < tail.size()) {
        char have = text_[at + 1 + same];
        if (any_case && have >= 'A' && have <= 'Z') have = static_cast<char>(have - 'A' + 'a');
        if (have != tail[same]) break;
        ++same;
      }
      if (same == tail.size()) return at + 1 + same;
    }
    return at;
  }

  // \s+(?!\S)|\s+ : a run before a word leaves that word its last space.
  std::size_t spaces(std::size_t at) const {
    std::size_t end = at;
    std::size_t last = at;
    while (end < text_.size()) {
      const CodePoint p = decode_utf8(text_, end);
      if (class_of(p) != CharClass::space) break;
      last = end;
      end += p.bytes;
    }
    return end < text_.size() && last > at ? last : end;
  }

  std::string_view text_;
};

/// Calls emit(word) for every word of `text`, in order; the words joined are the text.
template <class Emit>
void split_words(std::string_view text, WordPattern pattern, Emit&& emit) {
  const auto split_piece = [&](std::string_view piece) {
    const WordScanner scanner(piece);
    for (std::size_t at = 0; at < piece.size();) {
      const std::size_t end = pattern == WordPattern::llama3  ? scanner.llama3_word(at, 3)
                              : pattern == WordPattern::qwen2 ? scanner.llama3_word(at, 1)
                                                              : scanner.gpt2_word(at);
      emit(piece.substr(at, end - at));
      at = end;
    }
  };
  if (pattern != WordPattern::smollm) return split_piece(text);
  const WordScanner scanner(text);
  std::size_t begin = 0;  // of the piece between numbers
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t next = at + decode_utf8(text, at).bytes;
    if (scanner.class_at(at) == CharClass::number) {
      split_piece(text.substr(begin, at - begin));
      emit(text.substr(at, next - at));
      begin = next;
    }
    at = next;
  }
  split_piece(text.substr(begin));
}

}  // namespace llm
