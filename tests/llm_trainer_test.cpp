// Whole models in training: gradients against differences, losses against the runner's, the same bits whatever the threads,
// checkpointing and kills; vocabularies that are learned; what is written is read back.
// NIBBLE_THREADED_TEST
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <vector>

#include "llm/model_file.hpp"
#include "llm/perplexity.hpp"
#include "llm/runner.hpp"
#include "llm_support.hpp"
#include "nibble/train/lora.hpp"
#include "train/bpe_trainer.hpp"
#include "train/data.hpp"
#include "train/llama_trainer.hpp"
#include "train/model_export.hpp"
#include "train/training_loop.hpp"

namespace {

using namespace llm;
using llm_test::data_file;
using llm_test::some_tokens;

Hparams tiny() {
  Hparams h = llm_test::small_hparams(37);
  h.dim = 16;
  h.ffn = 24;
  h.heads = 4;
  h.kv_heads = 2;
  h.head_size = h.rope_size = 4;
  return h;
}
LlamaTrainerOptions options_of(std::size_t window = 8) {
  LlamaTrainerOptions o;
  o.window = window;
  o.windows_at_once = 2;
  o.seed = 3;
  return o;
}
TokenBatch batch_of(std::size_t windows, std::size_t window, std::size_t vocabulary) {
  const std::vector<Token> tokens = some_tokens(windows * window + 1, vocabulary);
  TokenBatch b;
  b.inputs.assign(tokens.begin(), tokens.end() - 1);
  b.targets.assign(tokens.begin() + 1, tokens.end());
  b.targets[3] = no_token;
  return b;
}
/// Larger weights than fresh ones, so that every part matters.
void stir(const nibble::Parameters& ps) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0.0F, 0.3F);
  for (const nibble::Parameter& p : ps)
    for (std::size_t i = 0; i < p.size; ++i) p.value[i] += normal(random);
}
/// Low ranks with a dropout of their own.
std::unique_ptr<nibble::LinearLayer> lora_layer(const LayerSource& source) {
  nibble::LoraOptions o;
  o.rank = 2;
  o.alpha = 2.0;
  o.dropout = 0.3F;
  return std::make_unique<nibble::LoraLinear>(source.name, source.values(), o);
}
std::vector<float> all_gradients(const nibble::Parameters& ps) {
  std::vector<float> all;
  for (const nibble::Parameter& p : ps) all.insert(all.end(), p.gradient, p.gradient + p.size);
  return all;
}

TEST(LlamaTrainer, GradientsAreDifferences) {
  for (const bool tied : {true, false})
    for (const float dropout : {tied ? 0.3F : 0.0F}) {
      LlamaTrainerOptions o = options_of();
      o.dropout = dropout;
      LlamaTrainer trainer(tiny(), o, dense_layer, tied);
      const nibble::Parameters ps = trainer.parameters();
      stir(ps);
      const TokenBatch batch = batch_of(3, o.window, 37);
      const auto loss = [&] {
        trainer.begin_step(4);
        return trainer.gradients(batch);
      };
      nibble::zero_gradients(ps);
      (void)loss();
      const std::vector<float> g = all_gradients(ps);
      // The loss, of order 4, is right to about 1e-6 (float chains of some 30 roundings of values of order 1). Differences
      // over 2h and 4h, h = 2^-7, are combined so that the third derivative (up to some hundreds, of keys) falls out:
      // noise of 1e-6 * 18 / (12h) = 2e-4 is left, and h^4 / 30 times a fifth derivative of order 1e5, 1e-5. Five times
      // their sum.
      const float h = 0x1p-7F;
      std::size_t at = 0;
      for (const nibble::Parameter& p : ps) {
        for (std::size_t i = 0; i < p.size; i += std::max<std::size_t>(1, p.size / 3)) {
          const float was = p.value[i];
          const auto difference = [&](float step) {
            p.value[i] = was + step;
            const double up = loss();
            p.value[i] = was - step;
            const double down = loss();
            p.value[i] = was;
            return up - down;
          };
          const double expected = (8.0 * difference(h) - difference(2.0F * h)) / (12.0 * static_cast<double>(h));
          EXPECT_NEAR(static_cast<double>(g[at + i]), expected, 1e-3)
              << p.name << " " << i << ", tied " << tied << ", dropout " << dropout;
        }
        at += p.size;
      }
    }
}

TEST(LlamaTrainer, ThreadsAndCheckpointingChangeNoBits) {
  nibble::ThreadPool pool(3);
  for (const LayerFactory& factory : {LayerFactory(dense_layer), LayerFactory(lora_layer)}) {
    std::vector<float> expected;
    double loss = 0.0;
    for (const bool checkpointing : {false, true})
      for (nibble::ThreadPool* threads : {static_cast<nibble::ThreadPool*>(nullptr), &pool}) {
        LlamaTrainerOptions o = options_of(16);
        o.dropout = 0.2F;
        o.checkpointing = checkpointing;
        o.pool = threads;
        LlamaTrainer trainer(tiny(), o, factory);
        const nibble::Parameters ps = trainer.parameters();
        stir(ps);
        nibble::zero_gradients(ps);
        trainer.begin_step(1);
        const double l = trainer.gradients(batch_of(5, o.window, 37));
        if (expected.empty()) expected = all_gradients(ps), loss = l;
        EXPECT_EQ(l, loss);
        EXPECT_EQ(all_gradients(ps), expected);
      }
  }
}

TEST(LlamaTrainer, PiecesOfABatchAddUp) {
  // Same dropout, same sums but for their order: 5 windows of 16, gradients of order 0.1, each a sum of 80 products.
  for (const LayerFactory& factory : {LayerFactory(dense_layer), LayerFactory(lora_layer)}) {
    std::vector<std::vector<float>> found;
    for (const std::size_t at_once : {1U, 2U, 5U}) {
      LlamaTrainerOptions o = options_of(16);
      o.dropout = 0.2F;
      o.windows_at_once = at_once;
      LlamaTrainer trainer(tiny(), o, factory);
      const nibble::Parameters ps = trainer.parameters();
      stir(ps);
      nibble::zero_gradients(ps);
      trainer.begin_step(1);
      (void)trainer.gradients(batch_of(5, o.window, 37));
      found.push_back(all_gradients(ps));
    }
    for (std::size_t k = 1; k < found.size(); ++k)
      for (std::size_t i = 0; i < found[0].size(); ++i) ASSERT_NEAR(found[k][i], found[0][i], 2e-5F) << i;
  }
}

TEST(LlamaTrainer, WrongBatchesAndNumbersAreRefused) {
  LlamaTrainer trainer(tiny(), options_of());
  TokenBatch batch = batch_of(2, 8, 37);
  batch.inputs[5] = 37;
  EXPECT_THROW(trainer.gradients(batch), nibble::InvalidArgument);
  batch = batch_of(2, 8, 37);
  batch.inputs.pop_back();
  EXPECT_THROW(trainer.gradients(batch), nibble::InvalidArgument);
  batch = batch_of(2, 8, 37);
  batch.targets.assign(batch.targets.size(), no_token);
  EXPECT_THROW(trainer.gradients(batch), nibble::InvalidArgument);
  EXPECT_THROW(LlamaTrainer(tiny(),
                            [] {
                              LlamaTrainerOptions o = options_of();
                              o.dropout = 1.0F;
                              return o;
                            }()),
               nibble::InvalidArgument);
  batch = batch_of(2, 8, 37);
  trainer.begin_step(7);
  for (const nibble::Parameter& p : trainer.parameters())
    if (p.name == "blk.1.ffn_down.weight") p.value[3] = std::nanf("");
  try {
    (void)trainer.gradients(batch);
    FAIL() << "NaN passed";
  } catch (const nibble::Error& e) {
    EXPECT_NE(std::string(e.what()).find("step 7"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("block 1"), std::string::npos) << e.what();
  }
}

TEST(LlamaTrainer, LossOfStoriesIsTheRunners) {
  const std::string path = data_file("stories260K.gguf");
  if (path.empty()) GTEST_SKIP() << "SKIPPED: NIBBLE_DATA names no folder with stories260K.gguf";
  const auto file = open_model(path);
  const Model model = load_model(*file);
  const std::size_t window = 64;
  const std::vector<Token> tokens = some_tokens(2 * window + 1, model.hparams.vocabulary);
  RunnerOptions ro;
  ro.context = window;
  ro.activations = nibble::Activations::fp32;
  ro.kv_format = nibble::KvFormat::fp32;
  Runner runner(model, ro);
  const PerplexityResult expected = perplexity(runner, tokens, window, 2, nullptr, [](const PerplexityResult&) {});
  for (const bool frozen : {false, true}) {
    LlamaTrainerOptions o = options_of(window);
    o.train_embedding = !frozen;
    LlamaTrainer trainer(*file, o);
    TokenBatch batch;
    for (std::size_t i = 0; i < 2 * window; ++i) {
      batch.inputs.push_back(tokens[i]);
      const std::size_t place = i % window;
      batch.targets.push_back(place >= window / 2 && place + 1 < window ? tokens[i + 1] : no_token);
    }
    // Of the same float weights; attention's sums have another order: 1e-6 of a loss of order 10.
    EXPECT_NEAR(trainer.gradients(batch),
                expected.negative_log_likelihood / static_cast<double>(expected.predictions), 1e-4);
    EXPECT_EQ(trainer.parameters().front().name, frozen ? "blk.0.attn_norm.weight" : "token_embd.weight");
  }
}

TEST(TextWindows, EveryTokenOnceAnEpochAndTheSameForAStep) {
  std::vector<Token> tokens(1003);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<Token>(i);
  TextWindows a(tokens, 10, 4), b(tokens, 10, 4);
  const std::size_t n = a.windows_per_epoch();
  EXPECT_EQ(n, 99U);
  std::map<Token, int> seen;
  for (std::size_t step = 0; step < n; ++step) {
    const TokenBatch batch = a.batch(step, 1);
    for (std::size_t i = 0; i < 10; ++i) {
      ++seen[batch.inputs[i]];
      EXPECT_EQ(batch.targets[i], batch.inputs[i] + 1);
    }
  }
  EXPECT_EQ(seen.size(), 990U);
  (void)b.batch(3 * n, 1);
  EXPECT_EQ(b.batch(17, 1).inputs, a.batch(17, 1).inputs);  // steps in any order
  EXPECT_NE(a.batch(17, 1).inputs, a.batch(17 + n, 1).inputs);
  // Windows that begin after a 7 (modulo nothing: token 500) begin with 1000.
  TextWindows c(tokens, 10, 4, 1000, 500);
  bool begun = false;
  for (std::size_t step = 0; step < 40 * n && !begun; ++step) {
    const TokenBatch batch = c.batch(step, 1);
    if (batch.inputs[0] != 1000) continue;
    begun = batch.targets[0] == 501 && batch.inputs[1] == 501;
    EXPECT_TRUE(begun);
  }
  EXPECT_TRUE(begun);
  EXPECT_THROW(TextWindows(std::vector<Token>(20, 1), 10, 0), nibble::InvalidArgument);
}

TEST(TextCost, EveryTokenIsPaidOnce) {
  // A model whose weights are 0 says log(37) nats for every token, whatever the windows.
  for (const std::size_t n : {2U, 7U, 8U, 9U, 30U, 61U}) {
    LlamaTrainer trainer(tiny(), options_of());
    for (const nibble::Parameter& p : trainer.parameters()) std::fill_n(p.value, p.size, 0.0F);
    const TextCost all = text_cost(trainer, some_tokens(n, 37), 0);
    EXPECT_EQ(all.tokens, n);
    EXPECT_NEAR(all.nats, static_cast<double>(n) * std::log(37.0), 1e-5 * static_cast<double>(n));
    EXPECT_EQ(text_cost(trainer, some_tokens(n, 37), no_token).tokens, n - 1);
  }
}

/// Counts all pairs anew for every rule.
std::vector<std::string> naive_merges(const std::string& text, std::size_t rules) {
  std::vector<std::vector<std::string>> words;
  const auto characters = byte_level_characters();
  std::map<std::string, int> rank;  // a token's number
  for (int b = 0; b < 256; ++b) {
    std::string s;
    append_utf8(s, characters[static_cast<std::size_t>(b)]);
    rank[s] = b;
  }
  split_words(text, WordPattern::gpt2, [&](std::string_view w) {
    words.emplace_back();
    for (const char c : w) {
      std::string s;
      append_utf8(s, characters[static_cast<unsigned char>(c)]);
      words.back().push_back(s);
    }
  });
  std::vector<std::string> merges;
  while (merges.size() < rules) {
    std::map<std::pair<int, int>, int> counts;
    std::map<int, std::string> name;
    for (const auto& [s, r] : rank) name[r] = s;
    for (const auto& w : words)
      for (std::size_t i = 1; i < w.size(); ++i) ++counts[{rank[w[i - 1]], rank[w[i]]}];
    std::pair<int, int> best{-1, -1};
    int most = 1;
    for (const auto& entry : counts)
      if (entry.second > most) most = entry.second, best = entry.first;
    if (best.first < 0) break;
    const std::string left = name[best.first], right = name[best.second];
    merges.push_back(left + " " + right);
    const int next = 256 + static_cast<int>(merges.size());
    rank.emplace(left + right, next);
    for (auto& w : words) {
      std::vector<std::string> joined;
      for (std::size_t i = 0; i < w.size(); ++i) {
        if (i + 1 < w.size() && w[i] == left && w[i + 1] == right)
          joined.push_back(left + right), ++i;
        else
          joined.push_back(w[i]);
      }
      w = joined;
    }
  }
  return merges;
}

TEST(TrainBpe, RulesOfTheNaiveAlgorithm) {
  const std::string text =
      "She sells sea shells, she said; and the shells she sells are sea-shells, I'm sure: aaaa aaaaa bbb\n"
      "Caf\xC3\xA9 na\xC3\xAFve caf\xC3\xA9 \xE2\x80\x94 na\xC3\xAFve. She'll sell 1811 shells in 1812.\n";
  BpeOptions o;
  o.vocabulary = 300;
  const VocabularyLists v = train_bpe(text, o);
  std::vector<std::string> merges;
  for (const MergeRule& m : v.merges)
    merges.push_back(v.tokens[static_cast<std::size_t>(m.left)] + " " +
                     v.tokens[static_cast<std::size_t>(m.right)]);
  const std::vector<std::string> expected = naive_merges(text, merges.size() + 1);
  ASSERT_GE(merges.size(), 20U);
  EXPECT_EQ(merges, std::vector<std::string>(expected.begin(),
                                             expected.begin() + static_cast<std::ptrdiff_t>(merges.size())));
  if (v.tokens.size() < 300) {
    EXPECT_EQ(merges.size(), expected.size());
  }

  const Tokenizer tokenizer{Vocabulary(v)};
  for (const std::string& s : {text, std::string("\xFF\x00 zebra \xF0\x9F\x98\x80", 13)})
    EXPECT_EQ(decode(tokenizer, tokenizer.encode(s)), decode(tokenizer, tokenizer.encode(s), false));
  std::string back;
  for (const Token t : tokenizer.encode(text)) back += tokenizer.piece(t);
  EXPECT_EQ(back, text);
  o.vocabulary = 256;
  EXPECT_THROW(train_bpe(text, o), nibble::InvalidArgument);
  EXPECT_EQ(train_bpe("", BpeOptions()).tokens.size(), 257U);
}

TEST(ModelExport, WhatIsWrittenIsReadBack) {
  const llm_test::TempFolder folder;
  const std::string text = "It is a truth universally acknowledged, that a truth is a truth.\n";
  BpeOptions bpe;
  bpe.vocabulary = 270;
  const Tokenizer tokenizer{Vocabulary(train_bpe(text, bpe))};
  Hparams h = tiny();
  h.vocabulary = tokenizer.vocabulary().size();
  for (const bool tied : {true, false}) {
    LlamaTrainer trainer(h, options_of(), dense_layer, tied);
    stir(trainer.parameters());
    write_gguf(folder / "m.gguf", h, tokenizer.vocabulary(), trainer.parameters(), nibble::GgufType::f32);
    const auto file = open_model(folder / "m.gguf");
    EXPECT_EQ(Tokenizer(file->vocabulary()).encode(text), tokenizer.encode(text));
    LlamaTrainer again(*file, options_of());
    EXPECT_EQ(again.tied(), tied);
    const TokenBatch batch = batch_of(2, 8, h.vocabulary);
    EXPECT_EQ(again.losses(batch), trainer.losses(batch));
    nibble::Parameters some = trainer.parameters();
    some.erase(some.begin() + 2);
    EXPECT_THROW(write_gguf(folder / "m.gguf", h, tokenizer.vocabulary(), some, nibble::GgufType::f32),
                 nibble::InvalidArgument);
  }
}

/// The columns step and loss of a run's figures.
std::string losses_of(const std::string& csv) {
  std::istringstream lines(csv);
  std::string out;
  for (std::string line; std::getline(lines, line);)
    out += line.substr(0, line.find(',', line.find(',') + 1)) + "\n";
  return out;
}

struct SmallRun {
  LoopOptions loop;
  std::size_t kill_at = 0;  // a step that is never done
  LoopReport operator()() const {
    LlamaTrainerOptions o = options_of();
    o.dropout = 0.1F;
    LlamaTrainer trainer(tiny(), o);
    TextWindows windows(some_tokens(300, 37), o.window, 1);
    LoopHooks hooks;
    hooks.batch = [&](std::uint64_t step) {
      if (kill_at != 0 && step + 1 == kill_at) (void)::raise(SIGKILL);
      return windows.batch(step, 4);
    };
    hooks.evaluate = [&] { return trainer.evaluate(some_tokens(50, 37)); };
    return run_training(trainer, loop, hooks);
  }
};

TEST(TrainingLoop, KilledAndResumedToTheSameLosses) {
  for (const bool eight_bit : {false, true}) {
    const llm_test::TempFolder folder;
    SmallRun whole;
    whole.loop.schedule.steps = 23;
    whole.loop.schedule.warmup = 4;
    whole.loop.schedule.peak = 0.01;
    whole.loop.adamw.eight_bit = eight_bit;
    whole.loop.adamw.eight_bit_min_size = 64;
    whole.loop.evaluate_every = 5;
    whole.loop.tokens_a_step = 32;
    whole.loop.csv = folder / "whole.csv";
    whole.loop.svg = folder / "whole.svg";
    const LoopReport expected = whole();
    EXPECT_EQ(expected.steps, 23U);
    EXPECT_NE(llm_test::read_file(folder / "whole.svg").find("<svg"), std::string::npos);
    SmallRun run = whole;
    run.loop.csv = folder / "run.csv";
    run.loop.checkpoint = folder / "checkpoint";
    run.loop.checkpoint_every = 3;
    run.loop.resume = true;
    run.loop.settings = {{"seed", 3}};
    for (const std::size_t kill_at : {2U, 8U, 13U, 22U}) {  // before the first checkpoint, and after others
      const pid_t child = ::fork();
      ASSERT_GE(child, 0);
      if (child == 0) {
        run.kill_at = kill_at;
        (void)run();
        ::_exit(0);
      }
      int status = 0;
      ASSERT_EQ(::waitpid(child, &status, 0), child);
      ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << status;
    }
    const LoopReport report = run();
    EXPECT_EQ(report.best, expected.best);
    EXPECT_EQ(report.best_step, expected.best_step);
    EXPECT_EQ(report.loss, expected.loss);
    EXPECT_EQ(losses_of(llm_test::read_file(folder / "run.csv")),
              losses_of(llm_test::read_file(folder / "whole.csv")));
    SmallRun other = run;
    other.loop.settings = {{"seed", 4}};
    EXPECT_THROW(other(), nibble::FormatError);
  }
}

TEST(TrainingLoop, NumbersThatExplodeLeaveTheCheckpoint) {
  const llm_test::TempFolder folder;
  SmallRun run;
  run.loop.schedule.steps = 40;
  run.loop.schedule.peak = 1e30;
  run.loop.schedule.warmup = 40;
  run.loop.checkpoint = folder / "checkpoint";
  run.loop.checkpoint_every = 1;
  try {
    (void)run();
    FAIL() << "a learning rate of 1e30 passed";
  } catch (const std::runtime_error& e) {
    EXPECT_NE(std::string(e.what()).find("step "), std::string::npos) << e.what();
  }
  const std::string kept = llm_test::read_file(folder / "checkpoint");
  EXPECT_FALSE(kept.empty());
  // The last step's parameters are nobody's input any more, but are what would be written.
  SmallRun last;
  last.loop.schedule.steps = 1;
  last.loop.schedule.peak = 1e39;
  try {
    (void)last();
    FAIL() << "a model of Inf passed";
  } catch (const std::runtime_error& e) {
    EXPECT_NE(std::string(e.what()).find("step 1: value of 'token_embd.weight'"), std::string::npos) << e.what();
  }
}

}  // namespace
