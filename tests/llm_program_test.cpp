// The program `nibble` from outside: exit statuses, one line of error, JSON, streams.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "llm_program_support.hpp"

namespace {

using llm_test::lines;

class Program : public llm_test::ProgramTest {
 protected:
  std::string stories() const { return llm_test::data_file("stories260K.gguf"); }
};

TEST_F(Program, BadArgumentsGetOneLineAndStatus2) {
  std::ofstream(file("x.gguf")) << "not a model";
  const std::string model = file("x.gguf");
  for (const std::string& arguments :
       std::vector<std::string>{std::string(),
                                std::string("dance"),
                                std::string("inspect"),
                                std::string("inspect /no/such/file"),
                                std::string("--frobnicate"),
                                "inspect " + model + " --frobnicate",
                                "generate " + model + " --temperature hot",
                                "generate " + model + " --temperature -1",
                                "generate " + model + " --top-p 2",
                                "generate " + model + " --tokens -5",
                                "bench " + model + " --threads 1,x",
                                "bench " + model + " --threads -1",
                                "bench " + model + " --repeats 0",
                                "perplexity " + model,
                                "perplexity " + model + " /no/such/text",
                                "perplexity " + model + " " + model + " --context 1",
                                "quantize " + model + " out.bin --format int4",
                                "quantize " + model + " out.gguf",
                                "quantize " + model + " out.safetensors --format int9",
                                "quantize " + model + " out.safetensors --format int4 --group 17",
                                "quantize " + model + " out.safetensors --format int4 --keep '['",
                                "quantize " + model + " out.safetensors --format int4 --method magic",
                                "quantize " + model + " out.safetensors --format int4 --symmetric --float-offset",
                                "generate " + model + " --activations int5",
                                "generate " + model + " --prompts /no/such/file",
                                "generate " + model + " --prompts " + model + " --prompt x",
                                "generate " + model + " --sequences 0",
                                "bench " + model + " --batch 0"}) {
    const Result r = run(arguments);
    EXPECT_EQ(r.status, 2) << arguments;
    EXPECT_EQ(lines(r.err), 1U) << arguments << "\n" << r.err;
    EXPECT_EQ(r.out, "") << arguments;
  }
}

TEST_F(Program, BrokenFilesGetOneLineAndStatus1) {
  std::ofstream(file("x.gguf")) << "GGUF but nothing else";
  for (const std::string command : {"inspect ", "generate ", "bench "}) {
    const Result r = run(command + file("x.gguf"));
    EXPECT_EQ(r.status, 1);
    EXPECT_EQ(lines(r.err), 1U) << r.err;
  }
}

TEST_F(Program, HelpIsWorthReading) {
  const Result all = run("--help");
  EXPECT_EQ(all.status, 0);
  for (const char* command : {"inspect", "quantize", "perplexity", "generate", "bench", "compare"}) {
    EXPECT_NE(all.out.find(command), std::string::npos) << command;
    const Result one = run(std::string(command) + " --help");
    EXPECT_EQ(one.status, 0);
    EXPECT_NE(one.out.find("--json"), std::string::npos) << command;
    EXPECT_EQ(one.err, "");
  }
  EXPECT_EQ(run("--version").status, 0);
}

TEST_F(Program, GenerateStreamsTheTextAlone) {
  const std::string golden = llm_test::data_file("stories260K.greedy.txt");
  if (stories().empty() || golden.empty()) GTEST_SKIP() << "NIBBLE_DATA is not set";
  const Result r =
      run("generate " + stories() + " --prompt '' --tokens 256 --temperature 0 --json " + file("j.json"));
  EXPECT_EQ(r.status, 0);
  EXPECT_EQ(r.out, llm_test::read_file(golden));
  EXPECT_EQ(json().value("text", "") + "\n", r.out);
  EXPECT_GT(json().value("decode_tokens_per_second", 0.0), 0.0);
  const Result sampled = run("generate " + stories() + " --tokens 30 --temperature 1 --top-p 0.9 --seed 3");
  EXPECT_EQ(run("generate " + stories() + " --tokens 30 --temperature 1 --top-p 0.9 --seed 3").out, sampled.out);
  EXPECT_NE(run("generate " + stories() + " --tokens 30 --temperature 1 --top-p 0.9 --seed 4").out, sampled.out);
}

TEST_F(Program, PromptsOfAFileAreAnsweredAsAlone) {
  if (stories().empty()) GTEST_SKIP() << "NIBBLE_DATA is not set";
  const std::vector<std::string> prompts = {
      "Once upon a time", "The dog", "", "Lily and Tom went to the park. They", "One day, a bird", "A", "The end"};
  std::ofstream list(file("prompts.txt"));
  for (const std::string& p : prompts) list << p << "\n";
  list.close();
  for (const std::string options : {"", " --temperature 1 --top-p 0.9 --seed 3"}) {
    const Result all = run("generate " + stories() + " --prompts " + file("prompts.txt") +
                           " --tokens 40 --sequences 3 --json " + file("j.json") + options);
    ASSERT_EQ(all.status, 0) << all.err;
    EXPECT_EQ(lines(all.out), prompts.size());
    const nlohmann::json answers = json().at("answers");
    ASSERT_EQ(answers.size(), prompts.size());
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      ASSERT_EQ(run("generate " + stories() + " --prompt '" + prompts[i] + "' --tokens 40 --json " +
                    file("j.json") + options)
                    .status,
                0);
      EXPECT_EQ(answers[i].value("text", ""), json().value("text", "-")) << prompts[i];
    }
  }
}

TEST_F(Program, SaysWhereTheTimeGoes) {
  if (stories().empty()) GTEST_SKIP() << "NIBBLE_DATA is not set";
  const Result start = run("generate " + stories() + " --tokens 2 --verbose");
  EXPECT_NE(start.err.find("first token"), std::string::npos);
  const Result r =
      run("bench " + stories() + " --prompt 16 --decode 4 --repeats 1 --threads 2 --profile --batch 1,3 --json " +
          file("j.json"));
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_NE(r.out.find("gate, up"), std::string::npos);
  const nlohmann::json first = json().at("runs").at(0);
  for (const char* part : {"prompt", "decode"}) {
    const nlohmann::json& profile = first.at("profile").at(part);
    double share = 0.0;
    for (const nlohmann::json& line : profile) share += line.value("share", 0.0);
    EXPECT_NEAR(share, 1.0, 1e-9) << part;
    EXPECT_EQ(profile.size(), 10U);  // all operations but the quantization: the weights are floats
  }
  ASSERT_EQ(first.at("batches").size(), 2U);
  EXPECT_EQ(first.at("batches")[1].value("sequences", 0), 3);
  EXPECT_GT(first.at("batches")[1].value("tokens_per_second", 0.0), 0.0);
}

TEST_F(Program, QuantizeInspectPerplexityBench) {
  const std::string text = llm_test::data_file("stories260K.greedy.txt");
  if (stories().empty() || text.empty()) GTEST_SKIP() << "NIBBLE_DATA is not set";
  const std::string packed = file("q.safetensors");
  ASSERT_EQ(
      run("quantize " + stories() + " " + packed + " --format int8 --group 32 --json " + file("j.json")).status,
      0);
  EXPECT_EQ(json().value("quantized", 0), 35);
  ASSERT_EQ(run("inspect " + packed + " --json " + file("j.json")).status, 0);
  EXPECT_EQ(json().at("formats").at("int8-g32-sym-s16").value("tensors", 0), 35);
  ASSERT_EQ(
      run("perplexity " + stories() + " " + text + " --context 64 --windows 2 --json " + file("j.json")).status,
      0);
  const double exact = json().value("perplexity", 0.0);
  EXPECT_GT(exact, 1.0);
  ASSERT_EQ(run("perplexity " + packed + " " + text + " --context 64 --windows 2 --json " + file("j.json")).status,
            0);
  // 8 bits twice cost about a hundredth here; far more or nothing at all would be a mistake.
  EXPECT_NEAR(json().value("perplexity", 0.0), exact, 0.1 * exact);
  EXPECT_NE(json().value("perplexity", 0.0), exact);
  // Static activations, from a calibration text to a perplexity.
  const std::string fixed = file("s.safetensors");
  ASSERT_EQ(
      run("perplexity " + packed + " " + text + " --context 64 --windows 2 --activations int8-static").status, 2);
  ASSERT_EQ(run("quantize " + stories() + " " + fixed +
                " --format int8 --group 32 --activations int8-static --calibration " + text +
                " --windows 2 --context 32")
                .status,
            0);
  ASSERT_EQ(run("perplexity " + fixed + " " + text +
                " --context 64 --windows 2 --activations int8-static --json " + file("j.json"))
                .status,
            0);
  EXPECT_NEAR(json().value("perplexity", 0.0), exact, 0.1 * exact);
  EXPECT_NE(json().value("perplexity", 0.0), exact);
  EXPECT_GT(json().value("outlier_share", 0.0), 0.0);
  EXPECT_LT(json().value("outlier_share", 1.0), 0.1);
  ASSERT_EQ(
      run("bench " + packed + " --prompt 16 --decode 4 --repeats 1 --threads 1,2 --json " + file("j.json")).status,
      0);
  EXPECT_GT(json().value("prompt_tokens_per_second", 0.0), 0.0);
  EXPECT_GT(json().value("decode_tokens_per_second", 0.0), 0.0);
  EXPECT_EQ(json().at("runs").size(), 2U);
}

TEST_F(Program, CompareMakesTableAndPlot) {
  const std::string text = llm_test::data_file("stories260K.greedy.txt");
  if (stories().empty() || text.empty()) GTEST_SKIP() << "NIBBLE_DATA is not set";
  const Result r =
      run("compare " + stories() + " " + text +
          " --formats fp32,int8,int4-g32,same --context 64 --windows 1 --prompt 16 --decode 4 --csv " +
          file("t.csv") + " --svg " + file("t.svg") + " --json " + file("j.json"));
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_EQ(lines(r.out), 5U);
  EXPECT_EQ(lines(llm_test::read_file(file("t.csv"))), 5U);
  EXPECT_NE(llm_test::read_file(file("t.svg")).find("int4-g32"), std::string::npos);
  const nlohmann::json rows = json().at("formats");
  ASSERT_EQ(rows.size(), 4U);
  EXPECT_EQ(rows[0].value("perplexity", 0.0), rows[3].value("perplexity", 1.0));  // it was fp32
  EXPECT_EQ(rows[0].value("change_percent", 1.0), 0.0);
  EXPECT_LT(rows[2].value("file_bytes", 0.0), rows[1].value("file_bytes", 0.0));
}

TEST_F(Program, NothingIsLeftOfARefusedFile) {
  if (stories().empty()) GTEST_SKIP() << "NIBBLE_DATA is not set";
  const Result r = run("quantize " + stories() + " " + file("q.gguf") + " --format int4 --group 32 --symmetric");
  EXPECT_EQ(r.status, 2);
  EXPECT_NE(r.err.find("nearest"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(file("q.gguf")));
}

}  // namespace
