// nibble generate: a prompt continued.
#pragma once

#include <algorithm>
#include <cstdio>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "../batch.hpp"
#include "../chat.hpp"
#include "../runner.hpp"
#include "../sampler.hpp"
#include "common.hpp"

namespace llm {
namespace commands {

struct GenerateArguments {
  std::string prompt;
  std::string prompts;  // a file of them
  std::size_t sequences = 16;
  std::string system;
  std::size_t tokens = 128;
  SamplerOptions sampler;
  bool chat = false;
  bool echo = false;
  bool verbose = false;
};

inline std::vector<Token> prompt_tokens(const Tokenizer& tokenizer, const GenerateArguments& a,
                                        const std::string& prompt) {
  const Vocabulary& v = tokenizer.vocabulary();
  std::vector<Token> tokens;
  if (v.add_bos && v.bos != no_token) tokens.push_back(v.bos);
  const auto add = [&](const std::string& text, bool special) {
    const std::vector<Token> more = tokenizer.encode(text, special);
    tokens.insert(tokens.end(), more.begin(), more.end());
  };
  if (a.chat) {
    const ChatPrompt p = chat_prompt(v.chat_template, a.system, prompt);
    add(p.before, true);
    add(p.user, false);
    add(p.after, true);
  } else {
    add(prompt, false);
  }
  // A model cannot begin from nothing.
  if (tokens.empty() && v.bos != no_token) tokens.push_back(v.bos);
  if (tokens.empty() && v.eos != no_token) tokens.push_back(v.eos);
  nibble::detail::require(!tokens.empty(), "the prompt is empty and the model has no token to begin a text with");
  return tokens;
}

inline void warn_of_length(std::size_t tokens, std::size_t context) {
  if (tokens > context)
    std::fprintf(stderr, "nibble: %zu tokens reach beyond the context of %zu that the model was trained for\n",
                 tokens, context);
}

/// Text in one line: a line break becomes \n, a backslash two.
inline std::string escaped(const std::string& text) {
  std::string out;
  for (const char ch : text) {
    if (ch == '\n')
      out += "\\n";
    else if (ch == '\\')
      out += "\\\\";
    else
      out += ch;
  }
  return out;
}

/// Every line of a file is a prompt; the answers come in their order, a line each.
inline void generate_all(const Common& c, const GenerateArguments& a) {
  std::vector<std::string> prompts;
  std::istringstream lines(read_text(a.prompts));
  for (std::string line; std::getline(lines, line);) prompts.push_back(line);
  Session s(c);
  RunnerOptions options = runner_options(c, s.model);
  options.context = 1;
  options.pool = s.workers();
  std::vector<BatchRequest> requests;
  for (const std::string& prompt : prompts) {
    requests.push_back({prompt_tokens(*s.tokenizer, a, prompt), a.tokens, a.sampler});
    options.context = std::max(options.context, requests.back().prompt.size() + a.tokens);
  }
  warn_of_length(options.context, s.model.hparams.context);
  Runner runner(s.model, options);
  BatchOptions batch_options;
  batch_options.sequences = std::min(a.sequences, std::max<std::size_t>(requests.size(), 1));
  Batch batch(
      runner, s.tokenizer->vocabulary().size(), [&](Token t) { return s.tokenizer->ends_text(t); }, batch_options);
  for (BatchRequest& r : requests) batch.submit(std::move(r));
  const double start = limits_detail::seconds_now();
  std::size_t said = 0, generated = 0;
  nlohmann::json answers = nlohmann::json::array();
  for (bool more = true; more;) {
    more = batch.step();
    for (; said < prompts.size() && batch.done(said); ++said) {
      const std::string text = decode(*s.tokenizer, batch.tokens(said), prompts[said].empty() && !a.chat);
      std::printf("%s%s\n", a.echo ? escaped(prompts[said]).c_str() : "", escaped(text).c_str());
      std::fflush(stdout);
      generated += batch.tokens(said).size();
      answers.push_back(
          {{"generated_tokens", batch.tokens(said).size()}, {"end_of_text", batch.ended(said)}, {"text", text}});
    }
  }
  const double seconds = limits_detail::seconds_now() - start;
  write_json(c, {{"model", c.model},
                 {"answers", answers},
                 {"sequences", batch_options.sequences},
                 {"generated_tokens", generated},
                 {"seconds", seconds},
                 {"tokens_per_second", static_cast<double>(generated) / std::max(seconds, 1e-9)},
                 {"threads", s.pool.threads()}});
}

inline void generate(const Common& c, const GenerateArguments& a) {
  const double start = limits_detail::seconds_now();
  Session s(c);
  const std::vector<Token> prompt = prompt_tokens(*s.tokenizer, a, a.prompt);
  RunnerOptions options = runner_options(c, s.model);
  options.context = prompt.size() + a.tokens;
  options.block = std::min<std::size_t>(options.block, prompt.size());
  options.pool = s.workers();
  warn_of_length(options.context, s.model.hparams.context);
  Runner runner(s.model, options);
  auto cache = runner.new_cache();
  Sampler sampler(a.sampler);
  StreamDecoder decoder(*s.tokenizer, a.prompt.empty() && !a.chat);
  if (a.echo) std::fputs(a.prompt.c_str(), stdout);

  std::string text;
  const auto say = [&](const std::string& piece) {
    if (piece.empty()) return;
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
    text += piece;
  };
  s.phases.mark("runner");
  const double loaded = limits_detail::seconds_now();
  const std::size_t vocabulary = s.tokenizer->vocabulary().size();
  double first = 0.0;
  std::size_t generated = 0;
  bool ended = false;
  const float* logits = a.tokens > 0 ? runner.append(cache, prompt.data(), prompt.size()) : nullptr;
  while (generated < a.tokens) {
    const Token token = sampler.sample(logits, vocabulary);
    if (generated == 0) {
      first = limits_detail::seconds_now();
      s.phases.mark("first token");
      if (a.verbose) std::fprintf(stderr, "nibble: %s\n", s.phases.text().c_str());
    }
    ended = s.tokenizer->ends_text(token);
    if (ended) break;
    say(decoder.push(token));
    if (++generated < a.tokens) logits = runner.append(cache, &token, 1);
  }
  say(decoder.finish());
  const double end = limits_detail::seconds_now();
  if (text.empty() || text.back() != '\n') std::fputc('\n', stdout);
  write_json(c, {{"model", c.model},
                 {"prompt_tokens", prompt.size()},
                 {"generated_tokens", generated},
                 {"end_of_text", ended},
                 {"text", text},
                 {"load_seconds", loaded - start},
                 {"phases_seconds", s.phases.to_json()},
                 {"time_to_first_token_seconds", generated > 0 ? first - start : 0.0},
                 {"decode_tokens_per_second",
                  generated > 1 ? static_cast<double>(generated - 1) / std::max(end - first, 1e-9) : 0.0},
                 {"threads", s.pool.threads()}});
}

inline void add_generate(CLI::App& app, Common& c, std::function<void()>& action) {
  const auto a = std::make_shared<GenerateArguments>();
  CLI::App* command = add_command(app, "generate", "Continue a prompt; only the new text goes to stdout", action,
                                  [&c, a] { a->prompts.empty() ? generate(c, *a) : generate_all(c, *a); });
  add_model(command, c);
  CLI::Option* prompt =
      command->add_option("--prompt", a->prompt, "The text to continue, or with --chat what the user says");
  command
      ->add_option(
          "--prompts", a->prompts,
          "A file with a prompt a line. They are continued together, each as it would be alone; the answers come "
          "in the prompts' order, a line each (line breaks as \\n, backslashes doubled)")
      ->check(CLI::ExistingFile)
      ->excludes(prompt);
  command->add_option("--sequences", a->sequences, "How many of --prompts are continued at once")
      ->check(CLI::Range(std::size_t{1}, std::size_t{512}))
      ->capture_default_str();
  command->add_option("--tokens", a->tokens, "Most tokens to generate")
      ->check(CLI::Range(std::size_t{0}, std::size_t{1} << 20))
      ->capture_default_str();
  command->add_option("--temperature", a->sampler.temperature, "0: always the likeliest token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command->add_option("--top-p", a->sampler.top_p, "Sample among the likeliest tokens that hold this probability")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--seed", a->sampler.seed, "The same seed says the same text")->capture_default_str();
  command->add_flag("--chat", a->chat, "Use the model's chat template");
  command->add_option("--system", a->system, "System message for --chat");
  command->add_flag("--echo", a->echo, "Print the prompt first");
  command->add_flag("--verbose", a->verbose, "Say on stderr how long each phase took up to the first token");
  add_threads(command, c);
  add_common(command, c, true);
}

}  // namespace commands
}  // namespace llm
