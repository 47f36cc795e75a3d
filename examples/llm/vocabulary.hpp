// What a tokenizer is made of, however the file stores it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace llm {

using Token = std::int32_t;
inline constexpr Token no_token = -1;

/// Numbers as in GGUF's tokenizer.ggml.token_type.
enum class TokenType : std::uint8_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

struct Vocabulary {
  std::string model;  // "gpt2": byte-level BPE; "llama": SentencePiece-style
  std::string pre;    // how byte-level BPE cuts text into words before merging
  std::vector<std::string> tokens;
  std::vector<TokenType> types;
  std::vector<float> scores;             // llama
  std::vector<std::string> merges;       // gpt2: "left right", best first
  Token bos = no_token;
  Token eos = no_token;
  Token eot = no_token;                  // end of a chat turn, where it is not eos
  Token unknown = no_token;
  bool add_bos = false;
  bool add_space_prefix = false;         // llama: text starts as if a space stood before it
  std::string chat_template;             // Jinja, see chat.hpp

  std::size_t size() const { return tokens.size(); }
  TokenType type(Token t) const {
    const auto i = static_cast<std::size_t>(t);
    return i < types.size() ? types[i] : TokenType::normal;
  }
};

}  // namespace llm
