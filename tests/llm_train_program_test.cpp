// The program `nibble` in training, from outside: train, qat, finetune and merge refuse what makes no sense, survive kills
// and full disks, name what is not a number, and work one after the other.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "llm/model_file.hpp"
#include "llm_program_support.hpp"
#include "nibble/io/safetensors.hpp"
#include "train/llama_trainer.hpp"
#include "train/model_export.hpp"

namespace {

using llm_test::lines;
using llm_test::read_file;

/// Sentences of a few words each; those of another seed are about something else.
std::string text_of(unsigned seed, std::size_t sentences) {
  const std::vector<std::string> words = {"the", "cat", "dog",  "saw",   "a",    "big",  "red",   "house",
                                          "and", "ran", "to",   "small", "tree", "near", "river", "with",
                                          "old", "man", "sang", "song",  "of",   "sun",  "moon",  "wind"};
  std::mt19937 random(seed);
  std::string text;
  for (std::size_t i = 0; i < sentences; ++i) {
    std::size_t word = random() % words.size();
    for (std::size_t n = 4 + random() % 5; n > 0; --n) {
      // Two of three words follow from the one before, by a rule of the seed's.
      word = random() % 3 != 0 ? (word * 5 + seed) % words.size() : random() % words.size();
      text += words[word] + (n == 1 ? ".\n" : " ");
    }
  }
  return text;
}

class TrainProgram : public llm_test::ProgramTest {
 protected:
  void SetUp() override {
    ProgramTest::SetUp();
    write("text", text_of(1, 400));
    write("test", text_of(1, 30));
  }

  void write(const std::string& name, const std::string& text) const { std::ofstream(file(name)) << text; }
  std::string at(const std::string& name) const { return " '" + file(name) + "'"; }

  /// A model of these tests as m.gguf.
  void make_model(const std::string& options) const {
    const Result r = run("train" + at("text") + at("m.gguf") + options);
    ASSERT_EQ(r.status, 0) << r.err;
    std::filesystem::remove(file("m.best.gguf"));
  }

  /// "train", "qat" or "finetune" of `steps` steps, writing `out` and `out`.csv.
  std::string training(const std::string& command, const std::string& out, int steps) const {
    const std::string figures = " --csv" + at(out + ".csv") + " --steps " + std::to_string(steps) +
                                " --warmup 2 --context 8 --batch 3 --windows-at-once 2 --checkpoint-every 2";
    const std::string looks = " --evaluate-every 1 --test" + at("test");
    if (command == "train")
      return "train" + at("text") + at(out) + tiny_ + figures + looks + " --evaluate-windows 1 --eight-bit";
    if (command == "qat")
      return "qat" + at("m.gguf") + at("text") + at(out) + figures + looks +
             " --test-windows 1 --format int3-g16 --dropout 0.1 --lr 0.01 --delay 2 --freeze-scales 5";
    return "finetune" + at("m.gguf") + at("text") + at(out) + figures + looks +
           " --test-windows 1 --qlora --base nf4-g16 --double-quant --loftq 1 --rank 2 --dropout 0.2 --lr 0.01";
  }
  static std::string output_of(const std::string& command, const std::string& stem) {
    return stem + (command == "train" ? ".gguf" : command == "qat" ? ".safetensors" : "");
  }
  /// The bytes of what a training wrote.
  std::string result(const std::string& command, const std::string& out) const {
    if (command != "finetune") return read_file(file(out));
    return read_file(file(out + "/adapter_model.safetensors")) + read_file(file(out + "/adapter_config.json"));
  }
  /// Step, loss, learning rate, norm of the gradients and the look at the test text; the others are of the clock.
  std::string figures(const std::string& out) const {
    std::istringstream csv(read_file(file(out + ".csv")));
    std::string kept;
    for (std::string line; std::getline(csv, line);) {
      std::istringstream cells(line);
      std::size_t column = 0;
      for (std::string cell; std::getline(cells, cell, ','); ++column)
        if (column != 4 && column != 5) kept += cell + ",";
      kept += "\n";
    }
    return kept;
  }

  double perplexity(const std::string& model, const std::string& text, const std::string& more = {}) const {
    const Result r =
        run("perplexity" + at(model) + at(text) + " --context 16 --kv fp32 --json" + at("j.json") + more);
    EXPECT_EQ(r.status, 0) << model << more << ": " << r.err;
    const double p = json().value("perplexity", 0.0);
    EXPECT_TRUE(std::isfinite(p)) << model;
    EXPECT_GT(p, 1.0) << model;
    return p;
  }

  const std::string tiny_ = " --vocabulary 270 --layers 2 --dim 16 --ffn 32 --heads 2 --kv-heads 1";
};

TEST_F(TrainProgram, BadArgumentsGetOneLineAndStatus2AndWriteNothing) {
  write("short", "hi");
  write("empty", "");
  make_model(tiny_ + " --context 8 --batch 2 --steps 1 --type f32");
  ASSERT_EQ(
      run("finetune" + at("m.gguf") + at("text") + at("a") + " --lora --rank 2 --context 8 --batch 2 --steps 1")
          .status,
      0);
  const std::string train = "train" + at("text") + at("o.gguf") + tiny_ + " --context 8 --batch 2 --steps 1";
  const std::string model = at("m.gguf") + at("text");
  const std::string few = " --context 8 --batch 2 --steps 1";
  const std::string qat = "qat" + model + at("o.safetensors") + few;
  const std::string finetune = "finetune" + model + at("o") + few;
  const std::string merge = "merge" + at("m.gguf") + at("a");
  const std::string calibrated = " --calibration" + at("text");
  const std::set<std::string> before = files();
  for (const std::string& arguments : std::vector<std::string>{
           "train",
           "train" + at("text"),
           "train" + at("none") + at("o.gguf"),
           "train" + at("text") + at("o.bin"),
           "train" + at("text") + at("o.safetensors"),
           "train" + at("short") + at("o.gguf"),
           "train" + at("empty") + at("o.gguf"),
           train + " --frobnicate",
           train + " --dim 15",
           train + " --heads 0",
           train + " --heads 8 --kv-heads 3",
           train + " --context 100000",
           train + " --vocabulary 256",
           train + " --warmup 0",
           train + " --lr nan",
           train + " --lr -1",
           train + " --clip inf",
           train + " --final-lr 2",
           train + " --beta2 1",
           train + " --dropout nan",
           train + " --schedule steps",
           train + " --type int8",
           train + " --products fp8",
           train + " --checkpoint-every 0",
           train + " --threads -1",
           train + " --test" + at("none"),
           train + " --test" + at("empty"),
           "qat",
           "qat" + model,
           "qat" + at("none") + at("text") + at("o.safetensors"),
           "qat" + at("m.gguf") + at("short") + at("o.safetensors"),
           "qat" + model + at("o.gguf"),
           "qat" + model + at("o"),
           qat + " --format nf4",
           qat + " --format int9",
           qat + " --format int4-g7",
           qat + " --format w4a4-g7",
           qat + " --start best",
           qat + " --context 100000",
           qat + " --test" + at("short"),
           qat + " --test" + at("empty"),
           qat + " --lr nan",
           qat + " --final-lr 1.5",
           qat + " --scale-rate -1",
           qat + " --dropout 1",
           qat + " --checkpoint-every 0",
           qat + " --kv int7",
           "finetune",
           finetune,
           finetune + " --qlora --lora",
           finetune + " --full",
           "finetune" + model + at("text") + few + " --qlora",
           "finetune" + at("m.gguf") + at("short") + at("o") + few + " --qlora",
           finetune + " --qlora --base fp16",
           finetune + " --qlora --base nf5",
           finetune + " --lora --loftq 2",
           finetune + " --lora --double-quant",
           finetune + " --qlora --targets q,z",
           finetune + " --qlora --targets ''",
           finetune + " --qlora --rank 0",
           finetune + " --qlora --rank 100000",
           finetune + " --qlora --alpha nan",
           finetune + " --qlora --dropout 1",
           finetune + " --qlora --lr nan",
           finetune + " --qlora --beta2 1",
           finetune + " --qlora --final-lr 2",
           finetune + " --qlora --values int8",
           finetune + " --qlora --test" + at("empty"),
           finetune + " --qlora --checkpoint-every 0",
           "merge" + at("m.gguf"),
           merge,
           "merge" + at("m.gguf") + at("none") + at("o.gguf"),
           "merge" + at("none") + at("a") + at("o.gguf"),
           merge + at("o.bin"),
           merge + at("o.gguf") + " --format int9",
           merge + at("o.gguf") + " --format int4-g16" + calibrated,
           merge + at("o.safetensors") + " --format int4-g16",
           merge + at("o.safetensors") + " --format int4-g16 --calibration" + at("empty"),
           merge + at("o.safetensors") + " --format int4-g16 --calibration-length 1" + calibrated,
           merge + at("o.safetensors") + " --format int4-g16 --calibration-windows 100000" + calibrated,
           merge + at("o.safetensors") + " --format int4-g16 --side-term 2" + calibrated,
           merge + at("o.safetensors") + " --format int4-g16 --side-term nan" + calibrated,
           merge + at("o.safetensors") + calibrated,
           merge + at("o.safetensors") + " --side-term 0.1",
           merge + at("o.safetensors") + " --onto both"}) {
    const Result r = run(arguments);
    EXPECT_EQ(r.status, 2) << arguments << "\n" << r.err;
    EXPECT_EQ(lines(r.err), 1U) << arguments << "\n" << r.err;
    EXPECT_EQ(r.out, "") << arguments;
    ASSERT_EQ(files(), before) << arguments;
  }
}

TEST_F(TrainProgram, WhatCannotBeWrittenIsSaidBeforeTheFirstStep) {
  make_model(tiny_ + " --context 8 --batch 2 --steps 1");
  const std::set<std::string> before = files();
  for (const std::string& arguments :
       {training("train", "none/o.gguf", 3), training("qat", "none/o.safetensors", 3),
        training("finetune", "none/o", 3), training("train", "o.gguf", 3) + " --json" + at("none/j.json"),
        training("train", "o.gguf", 3) + " --svg" + at("none/o.svg")}) {
    const Result r = run(arguments);
    EXPECT_EQ(r.status, 1) << arguments;
    EXPECT_NE(r.err.find("cannot write"), std::string::npos) << r.err;
    EXPECT_EQ(r.err.find("step 1 of"), std::string::npos) << r.err;
    EXPECT_EQ(files(), before) << arguments;
  }
}

/// A command of training.
class TrainingCommand : public TrainProgram, public ::testing::WithParamInterface<const char*> {};

TEST_P(TrainingCommand, KilledAtAnyStepEndsInTheSameLossesAndTheSameFile) {
  const std::string command = GetParam();
  if (command != "train") make_model(tiny_ + " --context 8 --batch 2 --steps 20 --type f32");
  const std::string whole = output_of(command, "whole"), out = output_of(command, "out");
  constexpr int steps = 14;
  const Result straight = run(training(command, whole, steps));
  ASSERT_EQ(straight.status, 0) << straight.err;
  const std::string resumed = training(command, out, steps) + " --resume --threads ";
  // A kill may come a step late and leave the checkpoint of that step, from which the next run goes on: if the last one does
  // after step 10, it is killed when it tells of step 11, at the latest before it can tell of 13.
  for (int step = 1; step <= 9; ++step) {
    // From one kill to the next, with other numbers of threads.
    const Result r = run_and_kill(resumed + std::to_string(1 + step % 2), step);
    ASSERT_EQ(r.status, -1) << step << "\n" << r.err;
    // Who has told of step 3 has a checkpoint of step 2.
    if (step > 3) {
      EXPECT_NE(r.err.find("goes on after step"), std::string::npos) << step << "\n" << r.err;
    }
    EXPECT_FALSE(std::filesystem::exists(file(out)));
  }
  const Result r = run(resumed + "2");
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_EQ(lines(figures(out)), static_cast<std::size_t>(steps) + 1);
  EXPECT_EQ(figures(out), figures(whole));
  EXPECT_FALSE(result(command, out).empty());
  EXPECT_TRUE(result(command, out) == result(command, whole));
  EXPECT_FALSE(std::filesystem::exists(file(out + ".checkpoint")));
}

TEST_P(TrainingCommand, AFullDiskLeavesTheLastCheckpoint) {
  const std::string command = GetParam();
  if (command != "train") make_model(tiny_ + " --context 8 --batch 2 --steps 1 --type f32");
  const std::string whole = output_of(command, "whole"), out = output_of(command, "out");
  ASSERT_EQ(run(training(command, whole, 9)).status, 0);
  const std::string resumed = training(command, out, 9) + " --resume";
  ASSERT_EQ(run_and_kill(resumed, 4).status, -1);
  for (const std::string& name : files())
    if (name.find(".tmp") != std::string::npos) std::filesystem::remove(file(name));  // of the kill
  const std::string checkpoint = read_file(file(out + ".checkpoint"));
  ASSERT_FALSE(checkpoint.empty());
  const std::set<std::string> before = files();
  const Result full = run_with_disk(resumed, 1000);
  EXPECT_EQ(full.status, 1) << full.err;
  EXPECT_NE(full.err.find("nibble: cannot write '"), std::string::npos) << full.err;
  EXPECT_EQ(files(), before);
  EXPECT_TRUE(read_file(file(out + ".checkpoint")) == checkpoint);
  const Result r = run(resumed);
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(result(command, out) == result(command, whole));
  // Without a checkpoint it is the result that finds the disk full.
  const std::set<std::string> done = files();
  const std::string other = output_of(command, "other");
  std::string at_once = training(command, other, 1);
  at_once.erase(at_once.find(" --evaluate-every"), std::string(" --evaluate-every 1").size());
  EXPECT_EQ(run_with_disk(at_once, 1000).status, 1);
  std::set<std::string> now = files();
  now.erase(other + ".csv");
  EXPECT_EQ(now, done);
}

INSTANTIATE_TEST_SUITE_P(All, TrainingCommand, ::testing::Values("train", "qat", "finetune"),
                         [](const ::testing::TestParamInfo<const char*>& command) { return command.param; });

TEST_F(TrainProgram, WeightsThatAreNoNumbersAreNamed) {
  make_model(tiny_ + " --context 8 --batch 2 --steps 1 --type f32");
  const auto file_in = llm::open_model(file("m.gguf"));
  for (const char* tensor : {"blk.1.ffn_up.weight", "blk.0.attn_norm.weight", "token_embd.weight"})
    for (const float bad : {std::nanf(""), HUGE_VALF}) {
      llm::LlamaTrainer trainer(*file_in, llm::LlamaTrainerOptions{});
      const nibble::Parameters ps = trainer.parameters();
      for (const nibble::Parameter& p : ps)
        if (p.name == tensor) p.value[3] = bad;
      llm::write_gguf(file("bad.gguf"), file_in->hparams(), file_in->vocabulary(), ps, nibble::GgufType::f32);
      const std::set<std::string> before = files();
      const std::string few = " --context 8 --batch 2 --steps 2";
      for (const std::string& arguments :
           {"qat" + at("bad.gguf") + at("text") + at("o.safetensors") + few,
            "finetune" + at("bad.gguf") + at("text") + at("o.gguf") + few + " --full",
            "finetune" + at("bad.gguf") + at("text") + at("o") + few + " --qlora --base nf4-g16",
            "finetune" + at("bad.gguf") + at("text") + at("o") + few + " --lora"}) {
        const Result r = run(arguments);
        EXPECT_EQ(r.status, 1) << arguments;
        EXPECT_NE(r.err.find("step 1"), std::string::npos) << r.err;
        EXPECT_NE(r.err.find(std::string("'") + tensor + "'"), std::string::npos) << r.err;
        EXPECT_EQ(r.out, "");
        EXPECT_EQ(files(), before) << arguments;
      }
    }
}

TEST_F(TrainProgram, NumbersThatExplodeLeaveTheLastGoodCheckpoint) {
  make_model(tiny_ + " --context 8 --batch 2 --steps 20 --type f32");
  const std::string wild = " --lr 1e9 --clip 0 --context 8 --batch 2 --steps 20 --warmup 20 --checkpoint-every 1";
  const std::vector<std::pair<std::string, std::string>> runs = {
      {"o.gguf", "train" + at("text") + at("o.gguf") + tiny_ + wild},
      {"o.safetensors", "qat" + at("m.gguf") + at("text") + at("o.safetensors") + wild + " --format int4"},
      {"full.gguf", "finetune" + at("m.gguf") + at("text") + at("full.gguf") + wild + " --full"},
      {"o", "finetune" + at("m.gguf") + at("text") + at("o") + wild + " --qlora --base nf4-g16 --alpha 1e9"}};
  for (const auto& [out, arguments] : runs) {
    const Result r = run(arguments);
    EXPECT_EQ(r.status, 1) << arguments << "\n" << r.err;
    EXPECT_FALSE(std::filesystem::exists(file(out)));
    const std::size_t place = r.err.find("nibble: step ");
    ASSERT_NE(place, std::string::npos) << r.err;
    const int step = std::stoi(r.err.substr(place + 13));
    ASSERT_GT(step, 1) << r.err;
    const auto checkpoint = nibble::SafetensorsFile::open(file(out + ".checkpoint"));
    const std::string* steps = checkpoint.find_metadata("steps");
    ASSERT_NE(steps, nullptr);
    EXPECT_EQ(*steps, std::to_string(step - 1)) << r.err;
    // What it holds is good: the same run goes on from it, into the same error.
    const Result again = run(arguments + " --resume");
    EXPECT_NE(again.err.find("goes on after step " + *steps + "\n"), std::string::npos) << again.err;
    EXPECT_EQ(again.err.substr(again.err.find("nibble: step ")), r.err.substr(place));
  }
}

TEST_F(TrainProgram, TrainedQuantizedFineTunedMerged) {
  write("other", text_of(2, 200));
  write("other_test", text_of(2, 30));
  const std::string steps = " --context 16 --batch 8 --lr 0.01 --warmup 5";
  make_model(" --vocabulary 300 --layers 2 --dim 32 --ffn 48 --heads 4 --kv-heads 2 --type f32 --steps 120" +
             steps);
  const double floats = perplexity("m.gguf", "test"), unread = perplexity("m.gguf", "other_test");
  // 300 would be of a model that knows nothing, 4.2 is what it comes to: the rule goes for two of three words.
  EXPECT_LT(floats, 6.0);
  EXPECT_GT(unread, 1.3 * floats);

  // What training measures, the runner measures of the file.
  for (const std::string format : {"int3-g16", "w4a4"}) {
    const std::string out = format + ".safetensors";
    const Result r = run("qat" + at("m.gguf") + at("text") + at(out) + " --format " + format +
                         " --steps 30 --kv fp32" + steps + " --test" + at("test") + " --json" + at("j.json"));
    ASSERT_EQ(r.status, 0) << r.err;
    const double exported = json().value("perplexity_exported", 0.0);
    EXPECT_EQ(perplexity(out, "test"), exported) << format;
    EXPECT_LT(exported, 1.1 * floats) << format;
  }

  const Result tuned = run("finetune" + at("m.gguf") + at("other") + at("adapter") +
                           " --qlora --base nf4-g16 --rank 4" + " --steps 60" + steps);
  ASSERT_EQ(tuned.status, 0) << tuned.err;
  // The adapter beside the model.
  const double beside = perplexity("m.gguf", "other_test", " --activations float --adapter" + at("adapter"));
  EXPECT_LT(beside, 0.7 * unread);
  const std::string merge = "merge" + at("m.gguf") + at("adapter");
  const std::string calibrated =
      " --format int4-g16 --calibration" + at("other") + " --calibration-windows 16 --calibration-length 16";
  std::vector<double> errors;  // of outputs; none of floats
  for (const std::string& arguments :
       {merge + at("float.gguf") + " --format fp32", merge + at("float.safetensors"),
        merge + at("int4.safetensors") + calibrated,
        merge + at("side.safetensors") + calibrated + " --side-term 0.5"}) {
    const Result r = run(arguments + " --json" + at("j.json"));
    ASSERT_EQ(r.status, 0) << arguments << "\n" << r.err;
    errors.push_back(json().value("mean_square_error", 0.0));
  }
  EXPECT_GT(errors[2], 0.0);
  EXPECT_GT(errors[3], 0.0);
  EXPECT_LT(errors[3], 0.8 * errors[2]);  // 0.63: the side terms have two fifths of the bytes
  EXPECT_GT(std::filesystem::file_size(file("side.safetensors")),
            std::filesystem::file_size(file("int4.safetensors")));
  // W + B A rounded to floats once: 2^-24 of each weight, grown by two blocks; in fp16 2^-11.
  EXPECT_NEAR(perplexity("float.gguf", "other_test"), beside, 1e-4 * beside);
  EXPECT_NEAR(perplexity("float.safetensors", "other_test"), beside, 1e-2 * beside);
  // The errors are a thousandth of the outputs' squares: logits move by some percent.
  EXPECT_NEAR(perplexity("int4.safetensors", "other_test", " --activations float"), beside, 0.05 * beside);
  EXPECT_NEAR(perplexity("side.safetensors", "other_test", " --activations float"), beside, 0.05 * beside);
}

}  // namespace
