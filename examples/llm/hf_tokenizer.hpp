// A Hugging Face folder's tokenizer: tokenizer.json, and what tokenizer_config.json and generation_config.json add.
//
// Byte-level BPE with the word patterns of words.hpp, and BPE over a SentencePiece vocabulary with byte_fallback. What
// another normalizer or pre-tokenizer would do is refused by its name, never ignored.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nibble/io/gptq_checkpoint.hpp"
#include "vocabulary.hpp"

namespace llm {

namespace hf_detail {

using Json = nlohmann::json;

/// Reads one tokenizer.json.
class TokenizerReader {
 public:
  TokenizerReader(const Json& json, std::size_t most_tokens) : json_(json), most_(most_tokens) {}

  VocabularyLists read() {
    const Json& model = object(json_, "model");
    // Old files leave the type out.
    const std::string type =
        text(model, "type").value_or(model.contains("merges") ? "BPE" : "a model without merges");
    if (type != "BPE") refuse("model '" + type + "' is not supported (BPE is)");
    if (flag(model, "fuse_unk").value_or(false) && !flag(model, "byte_fallback").value_or(false))
      refuse("fuse_unk without byte_fallback is not supported");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
      if (!text(model, key).value_or("").empty()) refuse(std::string(key) + " is not supported");
    if (const Json* d = find(model, "dropout"); d != nullptr && !(d->is_number() && d->get<double>() == 0.0))
      refuse("dropout is not supported");

    read_tokens(object(model, "vocab"));
    if (is_sentencepiece(model))
      read_sentencepiece(model);
    else
      read_byte_level(model);
    read_added();
    if (const auto unknown = text(model, "unk_token")) {
      v_.unknown = id_of(*unknown);
      if (v_.model == "llama" && v_.unknown != no_token) type_of(v_.unknown) = TokenType::unknown;
    }
    fill_holes();
    v_.add_bos = begins_with_token();
    return std::move(v_);
  }

  /// The number of a token, or no_token.
  Token id_of(const std::string& token) const {
    const auto at = ids_.find(token);
    return at == ids_.end() ? no_token : at->second;
  }

 private:
  [[noreturn]] static void refuse(const std::string& what) {
    std::string text;
    for (std::size_t i = 0; i < std::min<std::size_t>(what.size(), 300); i += 60)
      text += nibble::detail::printable(std::string_view(what).substr(i, 60));
    nibble::detail::raise<nibble::Unsupported>("tokenizer.json: " + text);
  }
  [[noreturn]] static void fail(const std::string& what) {
    nibble::detail::raise<nibble::FormatError>("tokenizer.json: " + what);
  }
  static const Json* find(const Json& json, const char* key) {
    if (!json.is_object()) return nullptr;
    const auto at = json.find(key);
    return at == json.end() || at->is_null() ? nullptr : &*at;
  }
  static const Json& object(const Json& json, const char* key) {
    const Json* at = find(json, key);
    if (at == nullptr || !at->is_object()) fail(std::string("'") + key + "' is missing or no object");
    return *at;
  }
  static const Json& array(const Json& json, const char* key) {
    const Json* at = find(json, key);
    if (at == nullptr || !at->is_array()) fail(std::string("'") + key + "' is missing or no array");
    return *at;
  }
  static std::optional<std::string> text(const Json& json, const char* key) {
    return nibble::detail::json_member<std::string>(json, key, "tokenizer.json");
  }
  static std::optional<bool> flag(const Json& json, const char* key) {
    return nibble::detail::json_member<bool>(json, key, "tokenizer.json");
  }

  /// Gives `token` its number.
  void put(const std::string& token, const Json& number) {
    if (!number.is_number_unsigned() || number.get<std::uint64_t>() >= most_)
      fail("the number of token '" + nibble::detail::printable(token) + "' is not below the model's " +
           std::to_string(most_) + " tokens");
    const auto id = number.get<std::size_t>();
    if (id >= v_.tokens.size()) {
      v_.tokens.resize(id + 1);
      v_.types.resize(id + 1, TokenType::unused);
    }
    if (v_.types[id] != TokenType::unused && v_.tokens[id] != token)
      fail("tokens '" + nibble::detail::printable(v_.tokens[id]) + "' and '" + nibble::detail::printable(token) +
           "' have the same number");
    const auto [at, fresh] = ids_.emplace(token, static_cast<Token>(id));
    if (!fresh && at->second != static_cast<Token>(id))
      fail("token '" + nibble::detail::printable(token) + "' has two numbers");
    v_.tokens[id] = token;
    if (v_.types[id] == TokenType::unused) v_.types[id] = TokenType::normal;
  }
  TokenType& type_of(Token t) { return v_.types[static_cast<std::size_t>(t)]; }

  void read_tokens(const Json& vocab) {
    for (auto it = vocab.begin(); it != vocab.end(); ++it) put(it.key(), it.value());
  }

  void read_added() {
    const Json* added = find(json_, "added_tokens");
    if (added == nullptr) return;
    if (!added->is_array()) fail("'added_tokens' is no array");
    for (const Json& token : *added) {
      const std::optional<std::string> content = token.is_object() ? text(token, "content") : std::nullopt;
      const Json* id = find(token, "id");
      if (!content || content->empty() || id == nullptr) fail("an added token lacks 'content' or 'id'");
      for (const char* key : {"lstrip", "rstrip", "single_word"})
        if (flag(token, key).value_or(false))
          refuse("added token '" + *content + "' with " + key + " is not supported");
      put(*content, *id);
      const bool special = flag(token, "special").value_or(false);
      type_of(id_of(*content)) = special ? TokenType::control : TokenType::user_defined;
    }
  }

  // A model may have more rows than its tokenizer has tokens; numbers that no token has get a name that no text has.
  void fill_holes() {
    for (std::size_t i = 0; i < v_.tokens.size(); ++i)
      if (v_.types[i] == TokenType::unused) v_.tokens[i] = "[PAD" + std::to_string(i) + "]";
    if (v_.tokens.empty()) fail("there are no tokens");
  }

  /// The merges as pairs of spellings: "left right", or ["left", "right"].
  std::vector<std::pair<std::string, std::string>> merges(const Json& model) const {
    std::vector<std::pair<std::string, std::string>> out;
    for (const Json& merge : array(model, "merges")) {
      if (merge.is_string()) {
        const auto& both = merge.get_ref<const std::string&>();
        const std::size_t space = both.find(' ', 1);
        if (space == std::string::npos || space + 1 == both.size() ||
            both.find(' ', space + 1) != std::string::npos)
          fail("the merge '" + nibble::detail::printable(both) + "' is not two tokens");
        out.emplace_back(both.substr(0, space), both.substr(space + 1));
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        out.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
      } else {
        fail("a merge is neither a text nor a pair of texts");
      }
    }
    return out;
  }
  std::vector<MergeRule> rules(const Json& model) const {
    std::vector<MergeRule> out;
    for (const auto& pair : merges(model)) {
      const MergeRule rule{id_of(pair.first), id_of(pair.second), id_of(pair.first + pair.second)};
      if (rule.left == no_token || rule.right == no_token || rule.result == no_token)
        fail("the merge of '" + nibble::detail::printable(pair.first) + "' and '" +
             nibble::detail::printable(pair.second) + "' names a token that does not exist");
      out.push_back(rule);
    }
    return out;
  }

  /// The members of a Sequence, or the thing itself; nothing for null.
  static std::vector<const Json*> steps_of(const Json& parent, const char* key, const char* members) {
    const Json* at = find(parent, key);
    if (at == nullptr) return {};
    if (text(*at, "type").value_or("") != "Sequence") return {at};
    std::vector<const Json*> out;
    for (const Json& step : array(*at, members)) out.push_back(&step);
    return out;
  }
  static std::string type_name(const Json& step) { return text(step, "type").value_or("?"); }

  bool is_sentencepiece(const Json& model) const { return flag(model, "byte_fallback").value_or(false); }

  void read_byte_level(const Json& model) {
    v_.model = "gpt2";
    if (const auto normalizers = steps_of(json_, "normalizer", "normalizers"); !normalizers.empty())
      refuse("normalizer '" + type_name(*normalizers[0]) + "' of byte-level BPE is not supported");
    const bool whole_words = flag(model, "ignore_merges").value_or(false);
    std::string shape;  // the pre-tokenizer in short
    for (const Json* step : steps_of(json_, "pre_tokenizer", "pretokenizers")) {
      const std::string type = type_name(*step);
      if (!shape.empty()) shape += "+";
      if (type == "ByteLevel") {
        if (flag(*step, "add_prefix_space").value_or(true))
          refuse("ByteLevel with add_prefix_space is not supported");
        shape += flag(*step, "use_regex").value_or(true) ? "gpt2" : "bytes";
      } else if (type == "Digits") {
        if (!flag(*step, "individual_digits").value_or(false))
          refuse("pre_tokenizer 'Digits' without individual_digits is not supported");
        shape += "digits";
      } else if (type == "Split") {
        const Json* pattern = find(*step, "pattern");
        const std::string regex = pattern == nullptr ? "" : text(*pattern, "Regex").value_or("");
        const std::string common_begin = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}";
        const std::string common_end = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
        const bool isolated =
            text(*step, "behavior").value_or("") == "Isolated" && !flag(*step, "invert").value_or(false);
        if (isolated && regex == nibble::detail::concat(common_begin, "{1,3}", common_end))
          shape += "llama3";
        else if (isolated && regex == common_begin + common_end)
          shape += "qwen2";
        else
          refuse("pre_tokenizer 'Split' by '" + regex + "' is not supported");
      } else {
        refuse("pre_tokenizer '" + type + "' is not supported");
      }
    }
    v_.pre = shape == "gpt2"           ? "gpt-2"
             : shape == "digits+gpt2"  ? "smollm"
             : shape == "llama3+bytes" ? "llama-bpe"
             : shape == "qwen2+bytes"  ? "qwen2"
                                       : "";
    if (v_.pre.empty())
      refuse(shape.empty() ? "BPE without byte_fallback and without a pre_tokenizer is not supported"
                           : "the pre_tokenizer is a sequence that is not supported (" + shape + ")");
    if (whole_words != (v_.pre == "llama-bpe"))
      refuse(std::string("ignore_merges = ") + (whole_words ? "true" : "false") + " with the words of '" + v_.pre +
             "' is not supported");
    v_.merges = rules(model);
  }

  // SentencePiece joins the pair whose result has the best score, the left one of equals. Converted to merges that is:
  // every way to cut a token in two has a rule, and a token's rules follow each other. Where that holds the scores come
  // back from the ranks; where not, merges say more than scores can.
  void read_sentencepiece(const Json& model) {
    v_.model = "llama";
    for (const Json* step : steps_of(json_, "normalizer", "normalizers")) {
      const std::string type = type_name(*step);
      if (type == "Prepend" && text(*step, "prepend").value_or("") == mark) {
        v_.add_space_prefix = true;
      } else if (type == "Replace") {
        const Json* pattern = find(*step, "pattern");
        if (pattern == nullptr || text(*pattern, "String").value_or("") != " " ||
            text(*step, "content").value_or("") != mark)
          refuse("a normalizer 'Replace' of anything but spaces is not supported");
      } else {
        refuse("normalizer '" + type + "' is not supported");
      }
    }
    for (const Json* step : steps_of(json_, "pre_tokenizer", "pretokenizers")) {
      if (type_name(*step) != "Metaspace") refuse("pre_tokenizer '" + type_name(*step) + "' is not supported");
      if (text(*step, "replacement").value_or(mark) != mark || flag(*step, "split").value_or(true))
        refuse("pre_tokenizer 'Metaspace' that splits, or with another mark, is not supported");
      // "first" puts the space before the beginning of the text alone, "always" before what follows a special token too,
      // as this tokenizer (and llama.cpp) does.
      const std::string scheme = text(*step, "prepend_scheme").value_or("always");
      v_.add_space_prefix = scheme != "never" && flag(*step, "add_prefix_space").value_or(true);
    }
    std::vector<std::int64_t> rank(v_.tokens.size(), -1);
    std::vector<std::size_t> count(v_.tokens.size(), 0);
    const std::vector<MergeRule> all = rules(model);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const auto t = static_cast<std::size_t>(all[i].result);
      if (rank[t] < 0) rank[t] = static_cast<std::int64_t>(i);
      if (rank[t] + static_cast<std::int64_t>(count[t]) != static_cast<std::int64_t>(i))
        refuse("merges that are not those of a SentencePiece vocabulary are not supported (those of '" +
               v_.tokens[t] + "' do not follow each other)");
      ++count[t];
    }
    for (std::size_t t = 0; t < v_.tokens.size(); ++t) {
      const std::string& token = v_.tokens[t];
      std::size_t ways = 0;
      for (std::size_t cut = 1; cut < token.size(); ++cut)
        ways += id_of(token.substr(0, cut)) != no_token && id_of(token.substr(cut)) != no_token ? 1 : 0;
      if (ways != count[t])
        refuse("merges that are not those of a SentencePiece vocabulary are not supported ('" + token + "' has " +
               std::to_string(count[t]) + " of its " + std::to_string(ways) + ")");
      v_.scores.push_back(rank[t] < 0 ? 0.0F : -static_cast<float>(rank[t]));
      if (token.size() == 6 && token.compare(0, 3, "<0x") == 0 && token[5] == '>') v_.types[t] = TokenType::byte;
    }
  }

  /// True where the post-processor puts a special token before a text.
  bool begins_with_token() const {
    for (const Json* step : steps_of(json_, "post_processor", "processors")) {
      if (type_name(*step) != "TemplateProcessing") continue;
      const Json* single = find(*step, "single");
      if (single != nullptr && single->is_array() && !single->empty() &&
          find((*single)[0], "SpecialToken") != nullptr)
        return true;
    }
    return false;
  }

  static constexpr const char* mark = "\xE2\x96\x81";  // U+2581, SentencePiece's space

  const Json& json_;
  std::size_t most_;
  VocabularyLists v_;
  std::unordered_map<std::string, Token> ids_;
};

/// "bos_token" and the like: a text, or an object with "content".
inline std::optional<std::string> token_text(const Json& config, const char* key) {
  const auto at = config.find(key);
  if (at == config.end() || at->is_null()) return {};
  if (at->is_string()) return at->get<std::string>();
  if (at->is_object() && at->contains("content") && at->at("content").is_string())
    return at->at("content").get<std::string>();
  nibble::detail::raise<nibble::FormatError>(std::string("tokenizer_config.json: '") + key + "' is no token");
}

/// "eos_token_id" and the like: a number or several.
inline std::vector<Token> token_ids(const Json& config, const char* key, std::size_t tokens) {
  std::vector<Token> out;
  const auto add = [&](const Json& id) {
    if (id.is_number_unsigned() && id.get<std::uint64_t>() < tokens) out.push_back(id.get<Token>());
  };
  const auto at = config.find(key);
  if (at == config.end()) return out;
  if (at->is_array())
    for (const Json& id : *at) add(id);
  else
    add(*at);
  return out;
}

}  // namespace hf_detail

/// A vocabulary from tokenizer.json; tokenizer_config.json, generation_config.json and config.json (null where there is
/// none) say which tokens begin and end a text, in this order of preference. `most_tokens`: rows of the embedding. Throws
/// FormatError, and Unsupported by name for a tokenizer of another kind.
inline VocabularyLists hf_vocabulary_of(const nlohmann::json& tokenizer, const nlohmann::json& tokenizer_config,
                                        const nlohmann::json& generation_config, const nlohmann::json& config,
                                        std::size_t most_tokens) {
  using nibble::detail::json_member;
  hf_detail::TokenizerReader reader(tokenizer, most_tokens);
  VocabularyLists v = reader.read();
  std::vector<Token> begins, ends;
  const auto add = [](std::vector<Token>& to, Token t) {
    if (t != no_token && std::find(to.begin(), to.end(), t) == to.end()) to.push_back(t);
  };
  if (tokenizer_config.is_object()) {
    if (const auto bos = hf_detail::token_text(tokenizer_config, "bos_token")) add(begins, reader.id_of(*bos));
    if (const auto eos = hf_detail::token_text(tokenizer_config, "eos_token")) add(ends, reader.id_of(*eos));
    v.add_bos = json_member<bool>(tokenizer_config, "add_bos_token", "tokenizer_config.json").value_or(v.add_bos);
    if (const auto at = tokenizer_config.find("chat_template"); at != tokenizer_config.end()) {
      if (at->is_string()) v.chat_template = at->get<std::string>();
      if (at->is_array())
        for (const nlohmann::json& t : *at)
          if (t.is_object() && t.value("name", nlohmann::json()) == "default" && t.contains("template") &&
              t.at("template").is_string())
            v.chat_template = t.at("template").get<std::string>();
    }
  }
  for (const nlohmann::json* j : {&generation_config, &config}) {
    if (!j->is_object()) continue;
    for (const Token t : hf_detail::token_ids(*j, "bos_token_id", v.tokens.size())) add(begins, t);
    for (const Token t : hf_detail::token_ids(*j, "eos_token_id", v.tokens.size())) add(ends, t);
  }
  if (!begins.empty()) v.bos = begins[0];
  if (!ends.empty()) v.eos = ends[0];
  if (ends.size() > 1) v.eot = ends[1];
  v.add_bos = v.add_bos && v.bos != no_token;
  return v;
}

}  // namespace llm
