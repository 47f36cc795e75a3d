// nibble qat: trains a model on with its quantized matrices in the forward pass, and writes what the kernels run.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../../llm/commands/common.hpp"
#include "../../llm/perplexity.hpp"
#include "../../llm/quantize_model.hpp"
#include "../data.hpp"
#include "../llama_trainer.hpp"
#include "../qat.hpp"
#include "../training_loop.hpp"
#include "nibble/train/dropout.hpp"

namespace llm {
namespace commands {

struct QatArguments {
  std::string text, out, format = "int4", test, csv, svg, start = "mse", products = "fp32";
  std::size_t steps = 300, warmup = 20, batch = 16, window = 256, windows_at_once = 8;
  std::size_t delay = 0, freeze_scales = 0, evaluate_every = 0, test_windows = 0, checkpoint_every = 200;
  double lr = 5e-4, final_lr = 0.05, decay = 0.0, clip = 1.0, scale_rate = 1.0;
  float dropout = 0.0F;
  std::uint64_t seed = 1;
  bool fixed_scales = false, freeze_embedding = false, checkpointing = false, float_model = false, resume = false;
};

inline void qat(const Common& c, const QatArguments& a) {
  using nibble::detail::require;
  require(!wants_gguf(a.out), "output '", a.out, "': expected a name in .safetensors");
  require_writable(a.out);
  require_writable(c.json);
  nibble::ThreadPool pool(c.threads);
  nibble::ThreadPool* workers = pool.threads() > 1 ? &pool : nullptr;
  const auto file = open_model(c.model);
  const Tokenizer tokenizer{file->vocabulary()};
  QatPlan plan = qat_plan(a.float_model ? "float" : a.format);
  if (plan) {
    plan->learn_scales = !a.fixed_scales;
    plan->start = a.start == "lsq"       ? nibble::GridStart::lsq
                  : a.start == "min-max" ? nibble::GridStart::min_max
                                         : nibble::GridStart::mse;
    plan->scale_rate = static_cast<float>(a.scale_rate);
    nibble::QatSchedule schedule;
    // Steps count from 1 on there.
    if (a.delay != 0) schedule.fake_quant_start = a.delay + 1;
    if (a.freeze_scales != 0) schedule.scale_freeze = a.freeze_scales + 1;
    plan->schedule = schedule;
  }
  LlamaTrainerOptions options;
  options.window = a.window;
  options.windows_at_once = a.windows_at_once;
  options.checkpointing = a.checkpointing;
  options.dropout = a.dropout;
  options.seed = a.seed;
  options.products = a.products == "bf16" ? nibble::Activations::bf16 : nibble::Activations::fp32;
  options.train_embedding = !a.freeze_embedding;
  options.pool = workers;
  const std::string text = read_text(a.text);
  TextWindows windows(tokenizer.encode(text), a.window, a.seed);
  const std::vector<Token> test = a.test.empty() ? std::vector<Token>() : tokenizer.encode(read_text(a.test));
  require(a.test.empty() || test.size() >= a.window, "'", a.test, "' has ", test.size(),
          " tokens, a window takes ", a.window);
  const std::size_t fit = test.size() / a.window;
  const std::size_t test_windows = a.test_windows == 0 ? fit : std::min(a.test_windows, fit);
  LlamaTrainer trainer(*file, options, qat_layers(plan, workers));
  const nibble::Parameters parameters = trainer.parameters();
  const auto score = [&](const Model& model) {
    RunnerOptions runner_options;
    runner_options.kv_format = kv_format_of(c);
    runner_options.context = a.window;
    runner_options.pool = workers;
    Runner runner(model, runner_options);
    return perplexity(runner, test, a.window, test_windows, workers, [](const PerplexityResult&) {}).perplexity();
  };
  std::fprintf(stderr, "nibble: %s, %zu parameters, %zu tokens of text, %zu windows of %zu a step\n",
               plan ? name_of(plan->scheme).c_str() : "floats", nibble::count(parameters), windows.tokens(),
               a.batch, a.window);
  if (!test.empty())
    std::printf("before training: perplexity %.4f\n", score(qat_model(trainer, *file, plan, workers)));

  LoopOptions loop;
  loop.schedule.peak = a.lr;
  loop.schedule.floor = a.final_lr;
  loop.schedule.steps = a.steps;
  loop.schedule.warmup = std::min(a.warmup, a.steps);
  loop.adamw.beta2 = 0.95;
  loop.adamw.weight_decay = a.decay;
  loop.clip = a.clip;
  loop.evaluate_every = test.empty() ? 0 : a.evaluate_every;
  loop.evaluate_last = !test.empty();
  loop.checkpoint = a.out + ".checkpoint";
  loop.checkpoint_every = a.checkpoint_every;
  loop.resume = a.resume;
  loop.csv = a.csv;
  loop.svg = a.svg;
  loop.tokens_a_step = a.batch * a.window;
  loop.pool = workers;
  loop.settings = {{"model", c.model},
                   {"text", nibble::stream_of(text)},
                   {"format", plan ? name_of(plan->scheme) : "float"},
                   {"activation_bits", plan ? plan->activation_bits : 32},
                   {"start", a.start},
                   {"fixed_scales", a.fixed_scales},
                   {"scale_rate", a.scale_rate},
                   {"delay", a.delay},
                   {"freeze_scales", a.freeze_scales},
                   {"freeze_embedding", a.freeze_embedding},
                   {"context", a.window},
                   {"batch", a.batch},
                   {"windows_at_once", a.windows_at_once},
                   {"steps", a.steps},
                   {"warmup", a.warmup},
                   {"lr", a.lr},
                   {"final_lr", a.final_lr},
                   {"weight_decay", a.decay},
                   {"clip", a.clip},
                   {"dropout", a.dropout},
                   {"seed", a.seed},
                   {"products", a.products}};
  double last = 0.0;  // perplexity of the weights as they are; 0: not measured
  LoopHooks hooks;
  hooks.batch = [&](std::uint64_t step) {
    last = 0.0;
    return windows.batch(step, a.batch);
  };
  hooks.evaluate = [&] { return last = score(qat_model(trainer, *file, plan, workers)); };
  hooks.figure = "perplexity";
  LoopReport report;
  if (a.steps != 0) report = run_training(trainer, loop, hooks);
  const Model deployed = qat_model(trainer, *file, plan, workers);
  // A run that was killed after its last step.
  if (!test.empty() && last == 0.0) last = score(deployed);
  write_qat_model(a.out, deployed, *file);
  std::error_code ignored;
  if (a.steps != 0) std::filesystem::remove(loop.checkpoint, ignored);
  std::printf("qat: loss %.4f, %zu steps, %.1f s\n", report.loss, a.steps, report.seconds);
  double exported = 0.0;
  if (!test.empty()) {
    const auto written = open_model(a.out);
    exported = score(load_model(*written, workers));
    std::printf("while training: perplexity %.10g\nafter export:   perplexity %.10g over %zu windows of %zu\n",
                last, exported, test_windows, a.window);
    require<nibble::Error>(exported == last, "the exported model has a perplexity of ", exported,
                           ", in training it was ", last);
  }
  write_json(c, {{"model", c.model},
                 {"format", plan ? name_of(plan->scheme) : "float"},
                 {"activation_bits", plan ? plan->activation_bits : 32},
                 {"steps", a.steps},
                 {"loss", report.loss},
                 {"perplexity_training", last},
                 {"perplexity_exported", exported},
                 {"windows", test_windows},
                 {"context", a.window},
                 {"seconds", report.seconds}});
}

inline void add_qat(CLI::App& app, Common& c, std::function<void()>& action) {
  const auto a = std::make_shared<QatArguments>();
  CLI::App* command = add_command(
      app, "qat", "Quantization-aware training: trains a model on as it will be run, and writes it packed", action,
      [&c, a] { qat(c, *a); });
  add_model(command, c);
  command->add_option("text", a->text, "The text to train on")->required()->check(CLI::ExistingFile);
  command->add_option("out", a->out, "The packed .safetensors to write")->required();
  command
      ->add_option(
          "--format", a->format,
          "Of the blocks' matrices: int8, int6, int5, int4, int3 or int2, a scale a row unless -gN says "
          "otherwise (int4-g64), with INT8 activations; or w4a4: int4 with 4-bit activations, a scale a token")
      ->capture_default_str();
  command->add_flag("--float", a->float_model, "Train the floats on instead: the reference to compare with");
  command->add_option("--test", a->test, "A text to measure perplexity on, as nibble perplexity does")
      ->check(CLI::ExistingFile);
  const auto size = [&](const char* name, std::size_t& to, const char* what, std::size_t least = 0) {
    command->add_option(name, to, what)->check(CLI::Range(least, std::size_t{1} << 24))->capture_default_str();
  };
  const auto number = [&](const char* name, double& to, const char* what,
                          const CLI::Validator& check = number_in(0.0, 1e9)) {
    command->add_option(name, to, what)->check(check)->capture_default_str();
  };
  size("--steps", a->steps, "Steps of the optimizer");
  size("--warmup", a->warmup, "Steps over which the learning rate rises");
  size("--batch", a->batch, "Windows of a step", 1);
  size("--context", a->window, "Tokens of a window", 4);
  size("--windows-at-once", a->windows_at_once, "Windows computed together; memory grows with it", 1);
  size("--delay", a->delay, "Steps in floats before quantization starts");
  size("--freeze-scales", a->freeze_scales, "The step from which on scales and offsets stay; 0: they never do");
  size("--evaluate-every", a->evaluate_every, "Steps between looks at the test text; 0: at the end alone");
  size("--test-windows", a->test_windows, "Windows of the test text; 0: all");
  number("--lr", a->lr, "Learning rate, the highest");
  number("--final-lr", a->final_lr, "What the cosine ends with, of --lr", number_in(0.0, 1.0));
  number("--weight-decay", a->decay, "AdamW's");
  number("--clip", a->clip, "Largest norm of the gradients");
  number("--scale-rate", a->scale_rate, "Multiplies the learning rate of scales and offsets");
  command->add_option("--start", a->start, "Where scales start from")
      ->check(CLI::IsMember({"mse", "lsq", "min-max"}))
      ->capture_default_str();
  command->add_flag("--fixed-scales", a->fixed_scales,
                    "Scales are not learned: they cover the weights of every step (clipped STE)");
  command->add_flag("--freeze-embedding", a->freeze_embedding, "Embedding and output layer stay as they are");
  command->add_flag("--checkpointing", a->checkpointing,
                    "Keep only what goes into blocks, and compute the rest again");
  command->add_option("--dropout", a->dropout, "Of the embedding and the residual branches")
      ->check(number_in(0.0, 0.9))
      ->capture_default_str();
  command->add_option("--products", a->products, "Of the backward pass: fp32, or bf16, about twice as fast")
      ->check(CLI::IsMember({"fp32", "bf16"}))
      ->capture_default_str();
  command->add_option("--seed", a->seed, "The same seed trains the same model")->capture_default_str();
  command->add_flag("--resume", a->resume, "Go on from OUT.checkpoint, if it is there: to the same bits");
  size("--checkpoint-every", a->checkpoint_every, "Steps between checkpoints", 1);
  command->add_option("--csv", a->csv, "Write every step's figures to this file");
  command->add_option("--svg", a->svg, "Plot the perplexity to this file");
  command->add_option("--json", c.json, "Write every figure to this file as JSON");
  command->add_option("--kv", c.kv, "Keys and values while perplexity is measured: fp32, fp16, int8 or int4")
      ->check(CLI::IsMember({"fp32", "fp16", "int8", "int4"}))
      ->capture_default_str();
  add_threads(command, c);
}

}  // namespace commands
}  // namespace llm
