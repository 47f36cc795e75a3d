// nibble finetune: a model goes on learning from a text: low-rank adapters over quantized or float weights, or all of it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../../llm/commands/common.hpp"
#include "../../llm/ptq/report.hpp"
#include "../../llm/tokenizer.hpp"
#include "../adapter_base.hpp"
#include "../data.hpp"
#include "../llama_trainer.hpp"
#include "../model_export.hpp"
#include "../training_loop.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/train/dropout.hpp"
#include "nibble/train/lora.hpp"

namespace llm {
namespace commands {

struct FinetuneArguments {
  std::string text, out, test, csv, svg, targets = "q,k,v,o,gate,up,down", base = "nf4-g64", values = "fp32",
                                         schedule = "cosine";
  bool qlora = false, lora = false, full = false;
  bool double_quant = false, rank_stabilized = false, eight_bit = false, resume = false, checkpointing = false;
  int loftq = 0;
  std::size_t rank = 16, window = 256, batch = 8, windows_at_once = 8, steps = 200, tokens = 0, warmup = 10,
              evaluate_every = 0, evaluate_windows = 16, checkpoint_every = 200;
  double alpha = 32.0, lr = 0.0, final_lr = 0.1, decay = 0.0, clip = 1.0, beta2 = 0.999;
  float dropout = 0.0F;
  std::uint64_t seed = 1;
};

namespace finetune_detail {

/// Which of a block's matrices "q,k,v,o,gate,up,down" names; PEFT's names ("q_proj") are known too.
inline std::array<bool, 7> targets_of(const std::string& text) {
  static constexpr std::array<const char*, 7> names = {"q", "k", "v", "o", "gate", "up", "down"};
  std::array<bool, 7> wanted{};
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    std::string word = text.substr(begin, end - begin);
    begin = end + 1;
    if (word.size() > 5 && word.compare(word.size() - 5, 5, "_proj") == 0) word.resize(word.size() - 5);
    const auto at = std::find(names.begin(), names.end(), word);
    nibble::detail::require(at != names.end(), "--targets: '", word, "' is none of q, k, v, o, gate, up and down");
    wanted[static_cast<std::size_t>(at - names.begin())] = true;
  }
  return wanted;
}

}  // namespace finetune_detail

inline void finetune(const Common& c, const FinetuneArguments& a) {
  using nibble::detail::require;
  require(static_cast<int>(a.qlora) + static_cast<int>(a.lora) + static_cast<int>(a.full) == 1,
          "expected one of --qlora, --lora and --full");
  const std::string gguf = ".gguf";
  require(
      !a.full || (a.out.size() > gguf.size() && a.out.compare(a.out.size() - gguf.size(), gguf.size(), gguf) == 0),
      "output '", a.out, "': --full writes a model, expected a name in .gguf");
  std::string stem = a.out;
  while (stem.size() > 1 && stem.back() == '/') stem.pop_back();
  require(a.full || !std::filesystem::exists(a.out) || std::filesystem::is_directory(a.out), "output '", a.out,
          "' is a file, expected an adapter's folder or a new name");
  require_writable(a.full ? a.out : stem + ".checkpoint");
  require_writable(c.json);
  nibble::ThreadPool pool(c.threads);
  const auto file = open_model(c.model);
  const Hparams& h = file->hparams();
  const Tokenizer tokenizer(file->vocabulary());
  const std::string text = read_text(a.text), test = a.test.empty() ? std::string() : read_text(a.test);
  const std::vector<Token> tokens = tokenizer.encode(text), test_tokens = tokenizer.encode(test);
  require(a.test.empty() || test_tokens.size() > 1, "'", a.test, "' has ", test_tokens.size(),
          " tokens, expected at least 2");
  const Token bos = tokenizer.vocabulary().add_bos ? tokenizer.vocabulary().bos : no_token;
  TextWindows windows(tokens, a.window, a.seed);

  LlamaTrainerOptions options;
  options.window = a.window;
  options.windows_at_once = a.windows_at_once;
  options.checkpointing = a.checkpointing;
  options.seed = a.seed;
  options.train_embedding = options.train_norms = a.full;
  options.pool = pool.threads() > 1 ? &pool : nullptr;

  AdapterBase base;
  if (a.qlora) {
    base.scheme = scheme_of(parse_format(a.base));
    require(nibble::has_scales(base.scheme->format), "--base ", a.base, ": expected a quantized format");
    base.double_quantized = a.double_quant;
    base.loftq = a.loftq;
  }
  require(a.qlora || (a.loftq == 0 && !a.double_quant), "--loftq and --double-quant are for --qlora");
  const std::array<bool, 7> wanted = finetune_detail::targets_of(a.targets);
  nibble::LoraOptions lora;
  lora.rank = static_cast<Eigen::Index>(a.rank);
  lora.alpha = a.alpha;
  lora.rank_stabilized = a.rank_stabilized;
  lora.dropout = a.dropout;
  lora.seed = a.seed;
  lora.values = a.values == "bf16" ? nibble::Format::bf16 : nibble::Format::fp32;
  std::vector<std::pair<std::string, nibble::LoraLinear*>> adapted;
  std::size_t frozen_bytes = 0;
  const LayerFactory factory = [&](const LayerSource& source) -> std::unique_ptr<nibble::LinearLayer> {
    if (a.full) return dense_layer(source);
    const bool target = wanted[static_cast<std::size_t>(source.matrix)];
    std::unique_ptr<nibble::LoraLinear> layer;
    if (!a.qlora) {
      if (!target) return std::make_unique<nibble::DenseLinear>(source.values(), false);
      layer = std::make_unique<nibble::LoraLinear>(source.name, source.values(), lora);
    } else {
      nibble::PackOptions pack;
      pack.pool = options.pool;
      pack.channel_sums = false;
      AdapterBase own = base;
      if (!target) own.loftq = 0;
      const FrozenWeights f = frozen_weights(source.values(), own, lora.rank, options.pool);
      nibble::PackedMatrix packed = nibble::pack(f.weights, pack);
      if (!target) return std::make_unique<FrozenLinear>(std::move(packed));
      layer = std::make_unique<nibble::LoraLinear>(source.name, std::move(packed), lora);
      if (!f.start.empty()) layer->set_low_rank(f.start);
    }
    frozen_bytes += layer->base_bytes();
    adapted.emplace_back(source.name + ".weight", layer.get());
    return layer;
  };
  LlamaTrainer trainer(*file, options, factory);
  const nibble::Parameters parameters = trainer.parameters();

  LoopOptions loop;
  loop.tokens_a_step = a.batch * a.window;
  const std::size_t steps = a.tokens == 0 ? a.steps : nibble::detail::ceil_div(a.tokens, loop.tokens_a_step);
  const double lr = a.lr > 0.0 ? a.lr : a.full ? 2e-5 : 2e-4;
  loop.schedule.kind = a.schedule == "linear"     ? nibble::ScheduleKind::linear
                       : a.schedule == "constant" ? nibble::ScheduleKind::constant
                                                  : nibble::ScheduleKind::cosine;
  loop.schedule.peak = lr;
  loop.schedule.floor = a.final_lr;
  loop.schedule.steps = steps;
  loop.schedule.warmup = std::min<std::uint64_t>(a.warmup, steps);
  loop.adamw.beta2 = a.beta2;
  loop.adamw.weight_decay = a.decay;
  loop.adamw.eight_bit = a.eight_bit;
  loop.clip = a.clip;
  loop.evaluate_every = test.empty() ? 0 : a.evaluate_every;
  loop.checkpoint = stem + ".checkpoint";
  loop.checkpoint_every = a.checkpoint_every;
  loop.resume = a.resume;
  loop.csv = a.csv;
  loop.svg = a.svg;
  loop.pool = options.pool;
  loop.peak_gflops = measure_products(pool).float_gops;
  // Frozen weights are multiplied forward and transposed, trained ones a third time.
  std::size_t block_weights = 0;
  for (const BlockMatrix m : block_matrices) {
    const MatrixShape shape = shape_of(h, m);
    block_weights += h.layers * static_cast<std::size_t>(shape.rows * shape.cols);
  }
  const std::size_t all = block_weights + h.vocabulary * h.dim;
  const auto attention = 6.0 * static_cast<double>(h.layers * h.q_size() * a.window);
  loop.operations_a_token =
      attention + (a.full ? 6.0 * static_cast<double>(all)
                          : 4.0 * static_cast<double>(all) + 6.0 * static_cast<double>(nibble::count(parameters)));
  loop.settings = {{"model", c.model},
                   {"text", nibble::stream_of(text)},
                   {"mode", a.full    ? "full"
                            : a.qlora ? "qlora"
                                      : "lora"},
                   {"base", base.to_metadata()},
                   {"targets", a.targets},
                   {"rank", a.rank},
                   {"alpha", a.alpha},
                   {"rank_stabilized", a.rank_stabilized},
                   {"dropout", a.dropout},
                   {"values", a.values},
                   {"context", a.window},
                   {"batch", a.batch},
                   {"windows_at_once", a.windows_at_once},
                   {"steps", steps},
                   {"warmup", a.warmup},
                   {"schedule", a.schedule},
                   {"lr", lr},
                   {"final_lr", a.final_lr},
                   {"weight_decay", a.decay},
                   {"clip", a.clip},
                   {"beta2", a.beta2},
                   {"eight_bit", a.eight_bit},
                   {"seed", a.seed}};
  std::fprintf(
      stderr,
      "nibble: %zu trained parameters of %zu; frozen weights under adapters %.1f MiB; %zu steps of %zu tokens\n",
      nibble::count(parameters), all, mib(frozen_bytes), steps, loop.tokens_a_step);

  /// As it is deployed: no dropout.
  const auto measure = [&](std::size_t most) {
    for (const auto& entry : adapted) entry.second->set_dropout(false);
    const TextCost cost = text_cost(trainer, test_tokens, bos, most);
    for (const auto& entry : adapted) entry.second->set_dropout(true);
    std::size_t bytes = 0;
    const std::size_t first = bos == no_token ? 1 : 0;
    for (std::size_t i = first; i < first + cost.tokens; ++i) bytes += tokenizer.piece(test_tokens[i]).size();
    return std::make_pair(std::exp(cost.per_token()), cost.bits(bytes));
  };
  std::pair<double, double> before;
  if (!test.empty()) {
    before = measure(a.evaluate_windows);
    std::printf("before: perplexity %.4f, %.4f bits a byte on %s\n", before.first, before.second, a.test.c_str());
    std::fflush(stdout);
  }
  LoopHooks hooks;
  hooks.batch = [&](std::uint64_t step) { return windows.batch(step, a.batch); };
  hooks.evaluate = [&] { return measure(a.evaluate_windows).second; };
  const LoopReport report = run_training(trainer, loop, hooks);
  if (a.full) {
    write_gguf(a.out, h, tokenizer.vocabulary(), parameters, nibble::GgufType::f32);
  } else {
    LlamaAdapter adapter;
    adapter.config.rank = a.rank;
    adapter.config.alpha = a.alpha;
    adapter.config.dropout = static_cast<double>(a.dropout);
    adapter.config.rank_stabilized = a.rank_stabilized;
    adapter.config.base_model = h.name;
    adapter.metadata = base.to_metadata();
    for (const auto& entry : adapted) adapter.matrices.emplace(entry.first, entry.second->low_rank());
    write_llama_adapter(a.out, adapter, h, lora.values);
  }
  std::error_code ignored;
  std::filesystem::remove(loop.checkpoint, ignored);
  std::printf(
      "%s: %zu steps, loss of the last 50 %.4f; %.0f s, %.0f tokens/s, %.1f %% of %.0f GFLOP/s; peak memory %.0f "
      "MiB\n",
      a.full    ? "full"
      : a.qlora ? "qlora"
                : "lora",
      report.steps, report.loss, report.seconds, report.tokens_per_second, report.percent_of_peak,
      loop.peak_gflops, mib(peak_memory()));
  nlohmann::json json = {{"settings", loop.settings},
                         {"trained", nibble::count(parameters)},
                         {"steps", report.steps},
                         {"loss", report.loss},
                         {"seconds", report.seconds},
                         {"tokens_per_second", report.tokens_per_second},
                         {"percent_of_peak", report.percent_of_peak},
                         {"peak_bytes", peak_memory()},
                         {"threads", pool.threads()}};
  if (!test.empty()) {
    const auto after = measure(a.evaluate_windows);
    std::printf("after: perplexity %.4f, %.4f bits a byte\n", after.first, after.second);
    json["perplexity_before"] = before.first;
    json["perplexity"] = after.first;
    json["bits_per_byte_before"] = before.second;
    json["bits_per_byte"] = after.second;
  }
  write_json(c, json);
}

inline void add_finetune(CLI::App& app, Common& c, std::function<void()>& action) {
  const auto a = std::make_shared<FinetuneArguments>();
  CLI::App* command =
      add_command(app, "finetune", "Fine-tune a model on a text: QLoRA, LoRA, or all of its weights", action,
                  [&c, a] { finetune(c, *a); });
  add_model(command, c);
  command->add_option("text", a->text, "The text to learn")->required()->check(CLI::ExistingFile);
  command->add_option("out", a->out, "The adapter's folder (PEFT's layout), or with --full the GGUF to write")
      ->required();
  command->add_flag("--qlora", a->qlora, "Low ranks over frozen quantized weights");
  command->add_flag("--lora", a->lora, "Low ranks over frozen float weights");
  command->add_flag("--full", a->full, "All weights, in floats");
  const auto size = [&](const char* name, std::size_t& to, const char* what, std::size_t least = 1) {
    command->add_option(name, to, what)->check(CLI::Range(least, std::size_t{1} << 40))->capture_default_str();
  };
  const auto number = [&](const char* name, double& to, const char* what,
                          const CLI::Validator& check = number_in(0.0, 1e9)) {
    command->add_option(name, to, what)->check(check)->capture_default_str();
  };
  const auto flag = [&](const char* name, bool& to, const char* what) { command->add_flag(name, to, what); };
  size("--rank", a->rank, "Of the low-rank terms");
  number("--alpha", a->alpha, "Their scale is alpha / rank");
  flag("--rslora", a->rank_stabilized, "Their scale is alpha / sqrt(rank)");
  command->add_option("--dropout", a->dropout, "Of the low-rank terms' inputs")
      ->check(number_in(0.0, 0.9))
      ->capture_default_str();
  command->add_option("--targets", a->targets, "Matrices with a low-rank term")->capture_default_str();
  command->add_option("--base", a->base, "Format of the frozen weights, for --qlora")->capture_default_str();
  flag("--double-quant", a->double_quant, "Their scales in 8 bits");
  command->add_option("--loftq", a->loftq, "Iterations of LoftQ's start; 0: none")
      ->check(CLI::Range(0, 100))
      ->capture_default_str();
  command->add_option("--values", a->values, "What products and the adapter's file see: fp32 or bf16")
      ->check(CLI::IsMember({"fp32", "bf16"}))
      ->capture_default_str();
  size("--steps", a->steps, "Steps of the optimizer");
  size("--tokens", a->tokens, "Instead: as many steps as take in so many tokens", 0);
  size("--batch", a->batch, "Windows of a step");
  size("--windows-at-once", a->windows_at_once, "Windows computed together; memory grows with it");
  size("--context", a->window, "Tokens of a window", 4);
  number("--lr", a->lr, "Learning rate; 0: 2e-4, with --full 2e-5");
  number("--final-lr", a->final_lr, "What the schedule ends with, of --lr", number_in(0.0, 1.0));
  size("--warmup", a->warmup, "Steps over which the learning rate rises", 0);
  command->add_option("--schedule", a->schedule, "How the learning rate falls: cosine, linear or constant")
      ->check(CLI::IsMember({"cosine", "linear", "constant"}))
      ->capture_default_str();
  number("--weight-decay", a->decay, "AdamW's");
  number("--beta2", a->beta2, "AdamW's second moment", forgetting());
  number("--clip", a->clip, "Largest norm of the gradients; 0: any");
  flag("--eight-bit", a->eight_bit, "AdamW's moments in 8 bits");
  flag("--checkpointing", a->checkpointing, "Keep only what goes into blocks, and compute the rest again");
  command->add_option("--seed", a->seed, "The same seed trains the same adapter")->capture_default_str();
  flag("--resume", a->resume, "Go on from OUT.checkpoint, if it is there: to the same bits");
  size("--checkpoint-every", a->checkpoint_every, "Steps between checkpoints");
  command->add_option("--test", a->test, "A text that is never learned: perplexity on it, before and after")
      ->check(CLI::ExistingFile);
  size("--test-windows", a->evaluate_windows, "Half-overlapping windows of it; 0: all of the text", 0);
  size("--evaluate-every", a->evaluate_every, "Steps between looks at it; 0: none", 0);
  command->add_option("--csv", a->csv, "Write every step's figures to this file");
  command->add_option("--svg", a->svg, "Plot the looks at the test text to this file");
  add_threads(command, c);
  add_common(command, c, false);
}

}  // namespace commands
}  // namespace llm
