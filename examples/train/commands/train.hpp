// nibble train: a small Llama from scratch on a text.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../../llm/commands/common.hpp"
#include "../../llm/progress.hpp"
#include "../../llm/sampler.hpp"
#include "../../llm/svg_plot.hpp"
#include "../bpe_trainer.hpp"
#include "../data.hpp"
#include "../llama_trainer.hpp"
#include "../model_export.hpp"
#include "nibble/train/parameters.hpp"

namespace llm {
namespace commands {

struct TrainArguments {
  std::string text, out, test, csv, svg, name = "nibble-trained", products = "fp32", type = "f16";
  std::size_t vocabulary = 2048, layers = 6, dim = 256, ffn = 768, heads = 8, kv_heads = 8, window = 256;
  std::size_t batch = 16, windows_at_once = 8, steps = 2000, warmup = 100, evaluate_every = 250,
              evaluate_windows = 128;
  double minutes = 0.0, lr = 2e-3, final_lr = 0.05, decay = 0.1, clip = 1.0, beta2 = 0.95;
  float dropout = 0.1F;
  std::uint64_t seed = 1;
  bool checkpointing = false, untied = false;
};

namespace train_detail {

/// AdamW (Loshchilov 2019, algorithm 2).
class Adam {
 public:
  Adam(nibble::Parameters ps, double beta2, double decay) : ps_(std::move(ps)), beta2_(beta2), decay_(decay) {
    for (const nibble::Parameter& p : ps_) m_.emplace_back(p.size, 0.0F), v_.emplace_back(p.size, 0.0F);
  }
  void step(std::uint64_t t, double lr, nibble::ThreadPool* pool) {
    const double c1 = 1.0 / (1.0 - std::pow(beta1_, static_cast<double>(t)));
    const double c2 = 1.0 / (1.0 - std::pow(beta2_, static_cast<double>(t)));
    nibble::detail::ParameterChunks(ps_).run(
        pool, [&](std::size_t k, std::size_t first, std::size_t n, std::size_t) {
          const nibble::Parameter& p = ps_[k];
          const auto b1 = static_cast<float>(beta1_), b2 = static_cast<float>(beta2_);
          const float shrink = p.decay ? static_cast<float>(1.0 - lr * decay_) : 1.0F;
          const auto rate = static_cast<float>(lr * c1), root = static_cast<float>(std::sqrt(c2));
          using Array = Eigen::Map<Eigen::ArrayXf>;
          const auto size = static_cast<Eigen::Index>(n);
          Array w(p.value + first, size), g(p.gradient + first, size), m(m_[k].data() + first, size),
              v(v_[k].data() + first, size);
          m = b1 * m + (1.0F - b1) * g;
          v = b2 * v + (1.0F - b2) * g.square();
          w = shrink * w - rate * m / (v.sqrt() * root + 1e-8F);
        });
  }

 private:
  nibble::Parameters ps_;
  double beta1_ = 0.9, beta2_, decay_;
  std::vector<std::vector<float>> m_, v_;
};

inline std::string format(const char* pattern, double a, double b = 0.0, double c = 0.0, double d = 0.0) {
  char text[160];
  std::snprintf(text, sizeof text, pattern, a, b, c, d);
  return text;
}

}  // namespace train_detail

inline void train(const Common& c, const TrainArguments& a) {
  using nibble::detail::require;
  using train_detail::format;
  require(a.heads > 0 && a.dim % a.heads == 0 && a.dim / a.heads % 2 == 0, "--dim ", a.dim, " and --heads ",
          a.heads, ": expected heads of an even size");
  nibble::ThreadPool pool(c.threads);
  const std::string text = read_text(a.text), test = a.test.empty() ? std::string() : read_text(a.test);
  BpeOptions bpe;
  bpe.vocabulary = a.vocabulary;
  const Tokenizer tokenizer{Vocabulary(train_bpe(text, bpe))};
  const Vocabulary& v = tokenizer.vocabulary();
  const std::vector<Token> tokens = tokenizer.encode(text), test_tokens = tokenizer.encode(test);

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
  train_detail::Adam adam(parameters, a.beta2, a.decay);
  TextWindows windows(tokens, a.window, a.seed, v.bos, tokenizer.encode("\n").at(0));

  const double peak = measure_limits(pool).float_gops;
  const std::size_t matmul_weights =
      nibble::count(parameters) + (a.untied ? std::size_t{0} - h.vocabulary * h.dim : 0);
  const double operations_a_token =
      6.0 * static_cast<double>(matmul_weights) + 6.0 * static_cast<double>(h.layers * h.q_size() * a.window);
  std::fprintf(
      stderr,
      "nibble: %zu parameters; %zu training tokens (%.2f bytes each), %zu windows of %zu an epoch, %zu a step\n",
      nibble::count(parameters), tokens.size(),
      static_cast<double>(text.size()) / static_cast<double>(tokens.size()), windows.windows_per_epoch(), a.window,
      a.batch);

  std::string csv =
      "step,epoch,loss,learning_rate,gradient_norm,tokens_per_second,percent_of_peak,test_bits_per_byte\n";
  std::vector<PlotPoint> curve;
  const auto bits = [&](std::size_t most) {
    const TextCost cost = text_cost(trainer, test_tokens, v.bos, most);
    if (most == 0) return cost.bits(test.size());
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < cost.tokens; ++i) bytes += tokenizer.piece(test_tokens[i]).size();
    return cost.bits(bytes);
  };
  const nibble::GgufType type = a.type == "f32" ? nibble::GgufType::f32 : nibble::GgufType::f16;
  const double begin = limits_detail::seconds_now();
  double best = 1e30, mean = 0.0, spent = 0.0;
  std::size_t steps = a.steps, done = 0;
  const std::size_t a_step = a.batch * a.window;
  {
    Progress progress("train", steps);
    for (; done < steps; ++done) {
      const double start = limits_detail::seconds_now();
      const std::uint64_t step = done + 1;
      const double warm = static_cast<double>(step) / static_cast<double>(std::max<std::size_t>(a.warmup, 1));
      double through = static_cast<double>(done) / static_cast<double>(steps);
      if (a.minutes > 0.0) through = std::min(1.0, std::max(0.0, (start - begin) / (60.0 * a.minutes)));
      const double cosine = a.final_lr + (1.0 - a.final_lr) * 0.5 * (1.0 + std::cos(3.141592653589793 * through));
      const double lr = a.lr * std::min(warm, cosine);
      nibble::zero_gradients(parameters, options.pool);
      trainer.begin_step(step);
      const double loss = trainer.gradients(windows.batch(done, a.batch));
      const double norm = nibble::clip_gradients(parameters, a.clip, options.pool, "step " + std::to_string(step));
      adam.step(step, lr, options.pool);
      spent += limits_detail::seconds_now() - start;
      mean = done == 0 ? loss : 0.98 * mean + 0.02 * loss;
      const double rate = static_cast<double>(a_step * (done + 1)) / spent;
      const double share = 100.0 * rate * operations_a_token / (peak * 1e9);
      const bool last = done + 1 == steps || (a.minutes > 0.0 && through >= 1.0);
      std::string note;
      if (!test.empty() && (step % a.evaluate_every == 0) && !last) {
        const double b = bits(a.evaluate_windows);
        best = std::min(best, b);
        note = format("%.4f", b);
        std::fprintf(
            stderr, "nibble: step %zu, loss %.4f, test %.4f bits a byte, %.0f tokens/s, %.0f %% of peak, %.0f s\n",
            done + 1, mean, b, rate, share, limits_detail::seconds_now() - begin);
        curve.push_back({static_cast<double>(step), b, ""});
        write_gguf(a.out, h, v, parameters, type);
      }
      csv += std::to_string(step) +
             format(",%.4f,%.6f,%.8f",
                    static_cast<double>(step * a.batch) / static_cast<double>(windows.windows_per_epoch()), loss,
                    lr) +
             format(",%.5f,%.1f,%.2f,", norm, rate, share) + note + "\n";
      progress.step(format("loss %.4f, %.0f tokens/s, %.0f %% of peak", mean, rate, share));
      if (!a.csv.empty() && step % 50 == 0) write_file(a.csv, csv);
      if (last) break;
    }
  }
  write_gguf(a.out, h, v, parameters, type);
  if (!a.csv.empty()) write_file(a.csv, csv);
  if (!test.empty()) {
    const double b = bits(0);
    std::printf("test: %.4f bits a byte over all of %zu bytes\n", b, test.size());
    curve.push_back({static_cast<double>(done + 1), b, "all of the test text"});
  }
  if (!a.svg.empty()) write_file(a.svg, scatter_svg("Training", "step", "bits a byte, test", curve, curve));
  std::printf("train: loss %.4f, %zu steps, %.1f s\n", mean, done + 1, limits_detail::seconds_now() - begin);
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
  const auto number = [&](const char* name, double& to, const char* what) {
    command->add_option(name, to, what)->check(CLI::Range(0.0, 1e9))->capture_default_str();
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
  number("--final-lr", a->final_lr, "What the cosine ends with, of --lr");
  number("--weight-decay", a->decay, "AdamW's");
  number("--clip", a->clip, "Largest norm of the gradients");
  number("--beta2", a->beta2, "AdamW's second moment");
  command->add_option("--dropout", a->dropout, "Of the embedding and the residual branches")
      ->check(CLI::Range(0.0, 0.9))
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
}

}  // namespace commands
}  // namespace llm
