// nibble perplexity: how well a model predicts a text.
#pragma once

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "../perplexity.hpp"
#include "../progress.hpp"
#include "../../train/merge_model.hpp"
#include "../runner.hpp"
#include "common.hpp"

namespace llm {
namespace commands {

struct PerplexityArguments {
  std::string text;
  std::string adapter;
  std::size_t context = 512;
  std::size_t windows = 0;  // 0: all
};

inline void perplexity(const Common& c, const PerplexityArguments& a) {
  const std::string text = read_text(a.text);
  Session s(c);
  if (!a.adapter.empty()) {
    const auto file = open_model(c.model);
    const LlamaAdapter adapter = read_llama_adapter(a.adapter, file->hparams());
    attach_adapter(s.model, *file, adapter, adapter_base_of(adapter), s.workers());
  }
  const std::vector<Token> tokens = s.tokenizer->encode(text);
  const std::size_t available = tokens.size() / a.context;
  nibble::detail::require(available > 0, "'", a.text, "' has ", tokens.size(), " tokens, a window takes ",
                          a.context);
  const std::size_t windows = a.windows == 0 ? available : a.windows;
  nibble::detail::require(windows <= available, "'", a.text, "' has ", tokens.size(), " tokens: ", available,
                          " windows of ", a.context, ", not ", windows);
  RunnerOptions options = runner_options(c, s.model);
  options.context = a.context;
  options.pool = s.workers();
  OutlierCounts outliers;
  options.outliers = &outliers;
  Runner runner(s.model, options);
  const double start = limits_detail::seconds_now();
  PerplexityResult result;
  {
    Progress progress("perplexity", windows);
    result = llm::perplexity(runner, tokens, a.context, windows, s.workers(), [&](const PerplexityResult& r) {
      char note[32];
      std::snprintf(note, sizeof note, "%.4f", r.perplexity());
      progress.step(note);
    });
  }
  const double seconds = limits_detail::seconds_now() - start;
  std::printf("perplexity %.4f over %zu windows of %zu (%zu tokens in the text), %.1f s\n", result.perplexity(),
              result.windows, a.context, tokens.size(), seconds);
  if (outliers.outliers != 0)
    std::printf("%.4f %% of the INT8 products' activations were outliers and stayed floats\n",
                100.0 * outliers.share());
  write_json(c, {{"model", c.model},
                 {"text", a.text},
                 {"adapter", a.adapter},
                 {"activations", c.activations},
                 {"kv", c.kv},
                 {"perplexity", result.perplexity()},
                 {"negative_log_likelihood", result.negative_log_likelihood},
                 {"predictions", result.predictions},
                 {"windows", result.windows},
                 {"outlier_share", outliers.share()},
                 {"context", a.context},
                 {"tokens", tokens.size()},
                 {"threads", s.pool.threads()},
                 {"load_seconds", s.load_seconds},
                 {"seconds", seconds}});
}

inline void add_perplexity(CLI::App& app, Common& c, std::function<void()>& action) {
  const auto a = std::make_shared<PerplexityArguments>();
  CLI::App* command = add_command(
      app, "perplexity", "Perplexity of a text: windows side by side, the second half of each is predicted",
      action, [&c, a] { perplexity(c, *a); });
  add_model(command, c);
  command->add_option("text", a->text, "A text file")->required()->check(CLI::ExistingFile);
  command
      ->add_option(
          "--adapter", a->adapter,
          "A LoRA adapter beside the weights, unmerged: a folder in PEFT's layout. Weights are quantized as it "
          "says")
      ->check(CLI::ExistingDirectory);
  command->add_option("--context", a->context, "Tokens of a window")
      ->check(CLI::Range(std::size_t{4}, std::size_t{1} << 20))
      ->capture_default_str();
  command->add_option("--windows", a->windows, "Windows, from the start of the text; 0: all")
      ->capture_default_str();
  add_threads(command, c);
  add_common(command, c, true);
}

}  // namespace commands
}  // namespace llm
