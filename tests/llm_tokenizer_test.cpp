// Tokenizers of examples/llm: words, merges, SentencePiece, special tokens, decoding; SmolLM2's if it is there.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "llm/chat.hpp"
#include "llm_support.hpp"

namespace {

using llm::Token;
using llm::WordPattern;
using Words = std::vector<std::string>;

Words words(const std::string& text, WordPattern pattern) {
  Words out;
  llm::split_words(text, pattern, [&](std::string_view w) { out.emplace_back(w); });
  return out;
}

TEST(Utf8, RefusesWhatIsNone) {
  for (const std::string bad : {"\x80", "\xC0\xAF", "\xC1\x81", "\xE0\x80\xAF", "\xED\xA0\x80", "\xF4\x90\x80\x80",
                                "\xF8\x88\x80\x80", "\xFF", "\xE2\x82", "\xF0\x9F\x98"}) {
    const llm::CodePoint p = llm::decode_utf8(bad, 0);
    EXPECT_FALSE(p.valid);
    EXPECT_EQ(p.bytes, 1U);
    EXPECT_EQ(p.value, 0xFFFDU);
  }
}

TEST(Utf8, EveryCodePointThereAndBack) {
  for (std::uint32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    std::string text;
    llm::append_utf8(text, c);
    const llm::CodePoint p = llm::decode_utf8(text, 0);
    ASSERT_TRUE(p.valid && p.value == c && p.bytes == text.size()) << c;
  }
}

TEST(Utf8, Classes) {
  using C = llm::CharClass;
  const std::map<std::uint32_t, C> expected = {
      {'a', C::letter},    {'Z', C::letter},     {0xAA, C::letter},  {0xDF, C::letter}, {0x3A9, C::letter},
      {0x4E2D, C::letter}, {0x1D400, C::letter}, {'0', C::number},   {0xB2, C::number}, {0xBD, C::number},
      {0x2167, C::number}, {0x664, C::number},   {' ', C::space},    {'\n', C::space},  {0x85, C::space},
      {0xA0, C::space},    {0x3000, C::space},   {0x200B, C::other}, {'_', C::other},   {0x301, C::other},
      {0x1F600, C::other}, {0x10FFFF, C::other}, {0xD7, C::other},   {0x1C, C::other}};
  for (const auto& [c, kind] : expected) EXPECT_EQ(llm::char_class(c), kind) << std::hex << c;
}

TEST(Words, Gpt2) {
  EXPECT_EQ(words("Hello world's 123, ok?!  x", WordPattern::gpt2),
            (Words{"Hello", " world", "'s", " 123", ",", " ok", "?!", " ", " x"}));
  EXPECT_EQ(words("a\n\n b  ", WordPattern::gpt2), (Words{"a", "\n\n", " b", "  "}));
  EXPECT_EQ(words("it'S we'll 'd", WordPattern::gpt2), (Words{"it", "'", "S", " we", "'ll", " '", "d"}));
  EXPECT_EQ(words("'d x", WordPattern::gpt2), (Words{"'d", " x"}));
}

TEST(Words, SmollmTakesDigitsOneByOne) {
  EXPECT_EQ(words("in 1999.  42", WordPattern::smollm),
            (Words{"in", " ", "1", "9", "9", "9", ".", "  ", "4", "2"}));
  EXPECT_EQ(words("\xC2\xBDx", WordPattern::smollm), (Words{"\xC2\xBD", "x"}));
}

TEST(Words, Llama3) {
  EXPECT_EQ(words("Hello, 12345 IT'S\n\n  end", WordPattern::llama3),
            (Words{"Hello", ",", " ", "123", "45", " IT", "'S", "\n\n", " ", " end"}));
  EXPECT_EQ(words("(word)!\n", WordPattern::llama3), (Words{"(word", ")!\n"}));
  EXPECT_EQ(words("12345", WordPattern::qwen2), (Words{"1", "2", "3", "4", "5"}));
}

std::string hostile_text(std::mt19937& random, std::size_t pieces) {
  static const std::vector<std::string> pool = {" ",
                                                "  ",
                                                "\n",
                                                "\r\n",
                                                "\t",
                                                "\xC2\xA0",
                                                "\xE3\x80\x80",
                                                "'s",
                                                "'S",
                                                "'ll",
                                                "'",
                                                "x",
                                                "ab",
                                                "Zz",
                                                "\xC3\x9F",
                                                "\xE6\xBC\xA2",
                                                "7",
                                                "12",
                                                "\xE2\x85\xA7",
                                                "!",
                                                "...",
                                                "\xF0\x9F\x98\x80",
                                                "\xCC\x81",
                                                "\x80",
                                                "\xE2\x82",
                                                "\xFF",
                                                "aa",
                                                "aaa",
                                                "_",
                                                "<|end|>"};
  std::string text;
  for (std::size_t i = 0; i < pieces; ++i) text += pool[random() % pool.size()];
  return text;
}

TEST(Words, JoinedAreTheText) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    const std::string text = hostile_text(random, 40);
    for (const WordPattern p : {WordPattern::gpt2, WordPattern::smollm, WordPattern::llama3, WordPattern::qwen2}) {
      std::string joined;
      for (const std::string& w : words(text, p)) {
        ASSERT_FALSE(w.empty());
        joined += w;
      }
      ASSERT_EQ(joined, text);
    }
  }
}

// The definition: join the pair of lowest rank, leftmost first, until none is left.
std::vector<Token> naive_bpe(const llm::VocabularyLists& v, const llm::Tokenizer& t, const std::string& text) {
  std::vector<Token> out;
  llm::split_words(text, llm::word_pattern(v.pre), [&](std::string_view word) {
    std::vector<Token> ids;
    for (const char c : word) ids.push_back(static_cast<Token>(2 + static_cast<unsigned char>(c)));
    for (;;) {
      std::size_t best_rank = v.merges.size(), best_at = 0;
      for (std::size_t i = 0; i + 1 < ids.size(); ++i)
        for (std::size_t r = 0; r < best_rank; ++r)
          if (v.merges[r].left == ids[i] && v.merges[r].right == ids[i + 1]) {
            best_rank = r;
            best_at = i;
          }
      if (best_rank == v.merges.size()) break;
      ids[best_at] = v.merges[best_rank].result;
      ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best_at) + 1);
    }
    out.insert(out.end(), ids.begin(), ids.end());
  });
  (void)t;
  return out;
}

TEST(BytePairs, EqualTheDefinition) {
  const std::vector<std::string> merges = {"a a",   "aa a", "a b", "b a",  "aa aa",      "\xC4\xA0 a", "x 7",
                                           "ab ab", "z z",  "Z z", "aa b", "\xC4\xA0 x", ". .",        ".. ."};
  for (const char* pre : {"gpt-2", "smollm"}) {
    const llm::VocabularyLists v = llm_test::bpe_vocabulary(merges, pre);
    ASSERT_EQ(v.merges.size(), merges.size());
    const llm::Tokenizer t(v);
    std::mt19937 random(2);
    for (int round = 0; round < 300; ++round) {
      std::string text = hostile_text(random, 30);
      if (round == 0) text = std::string(400, 'a') + "b";
      ASSERT_EQ(t.encode(text), naive_bpe(v, t, text)) << text;
    }
  }
}

TEST(BytePairs, AnyBytesComeBack) {
  const llm::Tokenizer t(llm_test::bpe_vocabulary({"a b"}));
  std::string all;
  for (int b = 0; b < 256; ++b) all.push_back(static_cast<char>(b));
  std::string back;
  for (const Token id : t.encode(all)) back += t.piece(id);
  EXPECT_EQ(back, all);
  EXPECT_TRUE(t.encode("").empty());
}

TEST(BytePairs, LongWordsTakeNoSquareOfTime) {
  const llm::Tokenizer t(llm_test::bpe_vocabulary({"a a", "aa aa"}));
  // One word of a million letters: quadratic merging would take hours.
  EXPECT_EQ(t.encode(std::string(1000000, 'a')).size(), 250000U);
}

TEST(SpecialTokens, OnlyWhereAskedFor) {
  const llm::Tokenizer t(llm_test::bpe_vocabulary({}));
  EXPECT_EQ(t.encode("a<|end|>b", true), (std::vector<Token>{2 + 'a', 0, 2 + 'b'}));
  EXPECT_EQ(t.encode("a<|end|>b").size(), 9U);
  EXPECT_EQ(t.piece(0), "");
  EXPECT_TRUE(t.ends_text(0));
  EXPECT_FALSE(t.ends_text(1));
}

TEST(SpecialTokens, TheLongestWins) {
  llm::VocabularyLists v = llm_test::bpe_vocabulary({});
  v.tokens.insert(v.tokens.end(), {"<a>", "<a>>"});
  v.types.insert(v.types.end(), {llm::TokenType::user_defined, llm::TokenType::user_defined});
  const llm::Tokenizer t(v);
  EXPECT_EQ(t.encode("<a>><a>"), (std::vector<Token>{259, 258}));
  EXPECT_EQ(t.piece(259), "<a>>");
}

llm::VocabularyLists sentencepiece_vocabulary() {
  llm::VocabularyLists v;
  v.model = "llama";
  v.tokens = {"<unk>", "<s>", "</s>"};
  v.types = {llm::TokenType::unknown, llm::TokenType::control, llm::TokenType::control};
  for (int b = 0; b < 256; ++b) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(b));
    v.tokens.emplace_back(name);
    v.types.push_back(llm::TokenType::byte);
  }
  v.scores.assign(v.tokens.size(), 0.0F);
  const std::string mark = "\xE2\x96\x81";
  float score = 0.0F;
  for (const std::string& piece :
       {mark + "t", std::string("he"), mark + "the", mark, std::string("t"), std::string("h"), std::string("e"),
        std::string("th"), std::string("hee"), std::string("ee")}) {
    v.tokens.push_back(piece);
    v.types.push_back(llm::TokenType::normal);
    v.scores.push_back(score -= 1.0F);
  }
  v.bos = 1;
  v.eos = 2;
  v.unknown = 0;
  v.add_bos = v.add_space_prefix = true;
  return v;
}

TEST(SentencePiece, JoinsTheBestScoreFirst) {
  const llm::Tokenizer t(sentencepiece_vocabulary());
  const auto names = [&](const std::string& text) {
    Words out;
    for (const Token id : t.encode(text)) out.emplace_back(t.vocabulary().token(id));
    return out;
  };
  const std::string mark = "\xE2\x96\x81";
  EXPECT_EQ(names("the"), (Words{mark + "the"}));        // _t first, he next, then both
  EXPECT_EQ(names("thee"), (Words{mark + "the", "e"}));  // _the before hee
  EXPECT_EQ(names("e e"), (Words{mark, "e", mark, "e"}));
  EXPECT_EQ(names(""), Words{});
  EXPECT_EQ(names("\xC3\xA9"
                  "e"),
            (Words{mark, "<0xC3>", "<0xA9>", "e"}));
}

TEST(SentencePiece, DecodesToTheText) {
  const llm::Tokenizer t(sentencepiece_vocabulary());
  for (const std::string text : {"the  thee", " t", "\n\xF0\x9F\x98\x80 he", "hehe\xE6\xBC\xA2"})
    EXPECT_EQ(llm::decode(t, t.encode(text)), text);
}

TEST(StreamDecoder, GivesOutWholeCharacters) {
  const llm::Tokenizer t(llm_test::bpe_vocabulary({}));
  llm::StreamDecoder d(t, true);
  const auto byte = [](int b) { return static_cast<Token>(2 + b); };
  EXPECT_EQ(d.push(byte(0xF0)), "");
  EXPECT_EQ(d.push(byte(0x9F)), "");
  EXPECT_EQ(d.push(byte(0x98)), "");
  EXPECT_EQ(d.push(byte(0x80)), "\xF0\x9F\x98\x80");
  EXPECT_EQ(d.push(byte(0xE2)), "");
  EXPECT_EQ(d.push(byte('a')),
            "\xEF\xBF\xBD"
            "a");  // the character never came
  EXPECT_EQ(d.push(byte(0x80)), "\xEF\xBF\xBD");
  EXPECT_EQ(d.push(byte(0xC3)), "");
  EXPECT_EQ(d.finish(), "\xEF\xBF\xBD");
  EXPECT_EQ(d.finish(), "");
}

TEST(Chat, ChatMlWithItsOwnSystemMessage) {
  const std::string jinja =
      "{% if x %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role']}}";
  const llm::ChatPrompt p = llm::chat_prompt(jinja, "", "hi <|im_end|>");
  EXPECT_EQ(p.before, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n");
  EXPECT_EQ(p.user, "hi <|im_end|>");
  EXPECT_EQ(p.after, "<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(llm::chat_prompt(jinja, "Other", "x").before,
            "<|im_start|>system\nOther<|im_end|>\n<|im_start|>user\n");
  EXPECT_THROW(llm::chat_prompt("", "", "x"), std::runtime_error);
}

TEST(Tokenizer, RefusesWhatItDoesNotKnow) {
  llm::VocabularyLists v = llm_test::bpe_vocabulary({});
  v.model = "wordpiece";
  EXPECT_THROW(llm::Tokenizer{v}, std::runtime_error);
  v.model = "gpt2";
  v.pre = "klingon";
  EXPECT_THROW(llm::Tokenizer{v}, std::runtime_error);
  EXPECT_THROW(llm::Tokenizer{llm::Vocabulary{}}, std::runtime_error);
}

TEST(SmolLM2, WikiTextHas303415Tokens) {
  const std::string model = llm_test::model_file(), text_file = llm_test::data_file("wiki.test.raw");
  if (model.empty() || text_file.empty()) GTEST_SKIP() << "NIBBLE_MODEL or NIBBLE_DATA is not set";
  const llm::Tokenizer t(llm::vocabulary_of(nibble::GgufFile::open(model)));
  const std::string text = llm_test::read_file(text_file);
  const std::vector<Token> tokens = t.encode(text);
  EXPECT_EQ(tokens.size(), 303415U);
  EXPECT_EQ(llm::decode(t, tokens), text);
}

}  // namespace
