// nibble train: a small Llama from scratch on a text.
#pragma once

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../../llm/commands/common.hpp"
#include "../../llm/sampler.hpp"
#include "../../llm/tokenizer.hpp"
#include "../bpe_trainer.hpp"
#include "../data.hpp"
#include "../llama_trainer.hpp"
#include "../model_export.hpp"
#include "../training_loop.hpp"
#include "nibble/train/parameters.hpp"

namespace llm {
namespace commands {

struct TrainArguments {
  std::string text, out, test, csv, svg, name = "nibble-trained", products = "fp32", type = "f16",
                                         schedule = "cosine", prompt;
  std::size_t vocabulary = 2048, layers = 6, dim = 256, ffn = 768, heads = 8, kv_heads = 8, window = 256;
  std::size_t batch = 16, windows_at_once = 4, steps = 2000, warmup = 100, evaluate_every = 250,
              evaluate_windows = 128, checkpoint_every = 200;
  double minutes = 0.0, lr = 2e-3, final_lr = 0.05, decay = 0.1, clip = 1.0, beta2 = 0.95;
  float dropout = 0.1F;
  std::uint64_t seed = 1;
  bool checkpointing = false, untied = false, eight_bit = false, resume = false;
};

/// Some of what the model that was written has to say.
inline void say_sample(const std::string& path, const std::string& prompt, nibble::ThreadPool* pool) {
  const auto file = open_model(path);
  const Tokenizer tokenizer(file->vocabulary());
  const Model model = load_model(*file, pool);
  std::vector<Token> tokens = tokenizer.encode(prompt);
  if (tokens.empty()) tokens.push_back(tokenizer.vocabulary().bos);
  RunnerOptions options;
  options.context = model.hparams.context;
  options.pool = pool;
  if (tokens.size() >= options.context) return;
  Runner runner(model, options);
  auto cache = runner.new_cache();
  SamplerOptions how;
  how.temperature = 0.8F;
  how.top_p = 0.95F;
  how.seed = 1;
  Sampler sampler(how);
  StreamDecoder decoder(tokenizer, prompt.empty());
  std::string text = prompt;
  const float* logits = runner.append(cache, tokens.data(), tokens.size());
  for (std::size_t n = tokens.size(); n < options.context; ++n) {
    const Token token = sampler.sample(logits, tokenizer.vocabulary().size());
    if (tokenizer.ends_text(token)) break;
    text += decoder.push(token);
    if (n + 1 < options.context) logits = runner.append(cache, &token, 1);
  }
  std::printf("\n%s%s\n", text.c_str(), decoder.finish().c_str());
}

inline void train(const Common& c, const TrainArguments& a) {
  using nibble::detail::require;
  require(a.heads > 0 && a.dim % a.heads == 0 && a.dim / a.heads % 2 == 0, "--dim ", a.dim, " and --heads ",
          a.heads, ": expected heads of an even size");
  require(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "--heads ", a.heads, " and --kv-heads ", a.kv_heads,
          ": expected heads that share key-value heads evenly");
  require(wants_gguf(a.out), "output '", a.out, "': expected a name in .gguf");
  require_writable(a.out);
  require_writable(c.json);
  nibble::ThreadPool pool(c.threads);
  const std::string text = read_text(a.text), test = a.test.empty() ? std::string() : read_text(a.test);
  BpeOptions bpe;
  bpe.vocabulary = a.vocabulary;
  const Tokenizer tokenizer{Vocabulary(train_bpe(text, bpe))};
  const Vocabulary& v = tokenizer.vocabulary();
  const std::vector<Token> tokens = tokenizer.encode(text), test_tokens = tokenizer.encode(test);
  require(a.test.empty() || test_tokens.size() > 1, "'", a.test, "' has ", test_tokens.size(),
          " tokens, expected at least 2");

  Hparams h;
  h.name = a.name;
  h.layers = a.layers;
  h.dim = a.dim;
  h.ffn = a.ffn;
  h.heads = a.heads;
  h.kv_heads = a.kv_heads;
  h.head_size = h.rope_size = a.dim / a.heads;
  h.context = a.window;
  h.vocabulary = v.size();
  LlamaTrainerOptions options;
  options.window = a.window;
  options.windows_at_once = a.windows_at_once;
  options.checkpointing = a.checkpointing;
  options.dropout = a.dropout;
  options.seed = a.seed;
  options.products = a.products == "bf16" ? nibble::Activations::bf16 : nibble::Activations::fp32;
  options.pool = pool.threads() > 1 ? &pool : nullptr;
  LlamaTrainer trainer(h, options, dense_layer, !a.untied);
  const nibble::Parameters parameters = trainer.parameters();
  TextWindows windows(tokens, a.window, a.seed, v.bos, tokenizer.encode("\n").at(0));
  std::fprintf(stderr,
               "nibble: %zu parameters; %zu training tokens (%.2f bytes each), %zu windows of %zu an epoch, %zu a "
               "step\n",
               nibble::count(parameters), tokens.size(),
               static_cast<double>(text.size()) / static_cast<double>(tokens.size()), windows.windows_per_epoch(),
               a.window, a.batch);

  /// Bits per byte of the test text: of its first windows, or of all of it.
  const auto bits = [&](std::size_t most) {
    const TextCost cost = text_cost(trainer, test_tokens, v.bos, most);
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < cost.tokens; ++i) bytes += tokenizer.piece(test_tokens[i]).size();
    return cost.bits(bytes);
  };
  const nibble::GgufType type = a.type == "f32" ? nibble::GgufType::f32 : nibble::GgufType::f16;
  LoopOptions loop;
  loop.schedule.kind = a.schedule == "linear"     ? nibble::ScheduleKind::linear
                       : a.schedule == "constant" ? nibble::ScheduleKind::constant
                                                  : nibble::ScheduleKind::cosine;
  loop.schedule.peak = a.lr;
  loop.schedule.floor = a.final_lr;
  loop.schedule.steps = a.steps;
  loop.schedule.warmup = std::min<std::uint64_t>(a.warmup, a.steps);
  loop.adamw.beta2 = a.beta2;
  loop.adamw.weight_decay = a.decay;
  loop.adamw.eight_bit = a.eight_bit;
  loop.clip = a.clip;
  loop.minutes = a.minutes;
  loop.evaluate_every = test.empty() ? 0 : a.evaluate_every;
  loop.checkpoint = a.out + ".checkpoint";
  loop.checkpoint_every = a.checkpoint_every;
  loop.resume = a.resume;
  loop.csv = a.csv;
  loop.svg = a.svg;
  loop.peak_gflops = measure_products(pool).float_gops;
  loop.tokens_a_step = a.batch * a.window;
  // A tied embedding is multiplied as the output layer; one of its own is only looked up.
  const std::size_t multiplied = nibble::count(parameters) - (a.untied ? h.vocabulary * h.dim : 0);
  // Of attention's two products, a query meets half of the keys on average.
  loop.operations_a_token =
      6.0 * static_cast<double>(multiplied) + 6.0 * static_cast<double>(h.layers * h.q_size() * a.window);
  loop.pool = options.pool;
  loop.settings = {{"text", nibble::stream_of(text)},
                   {"vocabulary", h.vocabulary},
                   {"layers", h.layers},
                   {"dim", h.dim},
                   {"ffn", h.ffn},
                   {"heads", h.heads},
                   {"kv_heads", h.kv_heads},
                   {"context", a.window},
                   {"batch", a.batch},
                   {"windows_at_once", a.windows_at_once},
                   {"steps", a.steps},
                   {"minutes", a.minutes},
                   {"warmup", a.warmup},
                   {"schedule", a.schedule},
                   {"lr", a.lr},
                   {"final_lr", a.final_lr},
                   {"weight_decay", a.decay},
                   {"clip", a.clip},
                   {"beta2", a.beta2},
                   {"dropout", a.dropout},
                   {"seed", a.seed},
                   {"products", a.products},
                   {"eight_bit", a.eight_bit},
                   {"untied", a.untied}};
  LoopHooks hooks;
  hooks.batch = [&](std::uint64_t step) { return windows.batch(step, a.batch); };
  hooks.evaluate = [&] { return bits(a.evaluate_windows); };
  const std::string best = (a.out.size() > 5 ? a.out.substr(0, a.out.size() - 5) : a.out) + ".best.gguf";
  hooks.best = [&](std::size_t) { write_gguf(best, h, v, parameters, type); };
  const LoopReport report = run_training(trainer, loop, hooks);
  write_gguf(a.out, h, v, parameters, type);
  std::error_code ignored;
  std::filesystem::remove(loop.checkpoint, ignored);

  nlohmann::json json = {{"model", a.out},
                         {"text", a.text},
                         {"settings", loop.settings},
                         {"parameters", nibble::count(parameters)},
                         {"training_tokens", tokens.size()},
                         {"steps", report.steps},
                         {"loss", report.loss},
                         {"seconds", report.seconds},
                         {"tokens_per_second", report.tokens_per_second},
                         {"percent_of_peak", report.percent_of_peak},
                         {"threads", pool.threads()}};
  std::printf(
      "%zu steps, %.1f epochs; loss of the last 50 steps %.4f; %.0f s, %.0f tokens/s, %.1f %% of %.0f GFLOP/s\n",
      report.steps, static_cast<double>(report.steps * a.batch) / static_cast<double>(windows.windows_per_epoch()),
      report.loss, report.seconds, report.tokens_per_second, report.percent_of_peak, loop.peak_gflops);
  if (!test.empty()) {
    // Every byte of the text counts; windows overlap by half.
    const double b = bits(0);
    std::printf("%s: %.4f bits a byte, over all of its %zu bytes\n", a.test.c_str(), b, test.size());
    if (report.best_step != 0)
      std::printf("the best look at its beginning was after step %zu: %.4f (%s)\n", report.best_step, report.best,
                  best.c_str());
    json["test_bits_per_byte"] = b;
    json["best_step"] = report.best_step;
  }
  write_json(c, json);
  say_sample(a.out, a.prompt, options.pool);
}

inline void add_train(CLI::App& app, Common& c, std::function<void()>& action) {
  const auto a = std::make_shared<TrainArguments>();
  CLI::App* command =
      add_command(app, "train", "Train a small Llama from scratch on a text", action, [&c, a] { train(c, *a); });
  command->add_option("text", a->text, "The text to learn")->required()->check(CLI::ExistingFile);
  command->add_option("out", a->out, "The GGUF to write")->required();
  command->add_option("--test", a->test, "A text that is never learned: bits per byte on it are told")
      ->check(CLI::ExistingFile);
  const auto size = [&](const char* name, std::size_t& to, const char* what, std::size_t least = 1) {
    command->add_option(name, to, what)->check(CLI::Range(least, std::size_t{1} << 24))->capture_default_str();
  };
  const auto number = [&](const char* name, double& to, const char* what,
                          const CLI::Validator& check = number_in(0.0, 1e9)) {
    command->add_option(name, to, what)->check(check)->capture_default_str();
  };
  size("--vocabulary", a->vocabulary, "Tokens of the byte-level BPE vocabulary", 257);
  size("--layers", a->layers, "Blocks");
  size("--dim", a->dim, "Width of the residual stream");
  size("--ffn", a->ffn, "Width of the feed-forward networks");
  size("--heads", a->heads, "Attention heads");
  size("--kv-heads", a->kv_heads, "Key-value heads");
  size("--context", a->window, "Tokens of a window", 4);
  size("--batch", a->batch, "Windows of a step");
  size("--windows-at-once", a->windows_at_once, "Windows computed together; memory grows with it");
  size("--steps", a->steps, "Steps of the optimizer");
  number("--minutes", a->minutes, "End after so many minutes, the learning rate with it; 0: after --steps");
  size("--warmup", a->warmup, "Steps over which the learning rate rises");
  number("--lr", a->lr, "Learning rate");
  number("--final-lr", a->final_lr, "What the cosine ends with, of --lr", number_in(0.0, 1.0));
  number("--weight-decay", a->decay, "AdamW's");
  number("--clip", a->clip, "Largest norm of the gradients");
  command->add_option("--schedule", a->schedule, "How the learning rate falls: cosine, linear or constant")
      ->check(CLI::IsMember({"cosine", "linear", "constant"}))
      ->capture_default_str();
  command->add_flag("--eight-bit", a->eight_bit, "AdamW's moments in 8 bits");
  command->add_flag("--resume", a->resume, "Go on from OUT.checkpoint, if it is there: to the same bits");
  size("--checkpoint-every", a->checkpoint_every, "Steps between checkpoints");
  command->add_option("--sample", a->prompt, "What the sample of text at the end begins with");
  number("--beta2", a->beta2, "AdamW's second moment", forgetting());
  command->add_option("--dropout", a->dropout, "Of the embedding and the residual branches")
      ->check(number_in(0.0, 0.9))
      ->capture_default_str();
  command->add_option("--seed", a->seed, "The same seed trains the same model")->capture_default_str();
  command
      ->add_option("--products", a->products, "fp32, or bf16: about twice as fast where the CPU has AVX512-BF16")
      ->check(CLI::IsMember({"fp32", "bf16"}))
      ->capture_default_str();
  command->add_option("--type", a->type, "Of the matrices in the GGUF: f16 or f32")
      ->check(CLI::IsMember({"f16", "f32"}))
      ->capture_default_str();
  command->add_option("--name", a->name, "The model's name")->capture_default_str();
  command->add_flag("--untied", a->untied, "An output layer of its own");
  command->add_flag("--checkpointing", a->checkpointing,
                    "Keep only what goes into blocks, and compute the rest again");
  size("--evaluate-every", a->evaluate_every, "Steps between looks at the test text");
  command->add_option("--evaluate-windows", a->evaluate_windows, "Windows of those looks; 0: all of the text")
      ->capture_default_str();
  command->add_option("--csv", a->csv, "Write every step's figures to this file");
  command->add_option("--svg", a->svg, "Plot the bits per byte to this file");
  add_threads(command, c);
  add_common(command, c, false);
}

}  // namespace commands
}  // namespace llm
