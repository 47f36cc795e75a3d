// The tuner on a whole model: what is measured, what is chosen, and recipes that come back.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "llm/ptq/calibration.hpp"
#include "llm/ptq/recipes.hpp"
#include "llm/ptq/tuner.hpp"
#include "llm/runner.hpp"
#include "llm_support.hpp"

namespace {

class Tune : public ::testing::Test {
 protected:
  void SetUp() override {
    const llm_test::RandomModel r = llm_test::random_model(llm_test::scheme_of(nibble::Format::fp32));
    const llm::Vocabulary vocabulary(llm_test::bpe_vocabulary({}));
    nibble::PackedFileWriter out(folder_ / "model.safetensors");
    llm::add_model_data(out, r.model.hparams, vocabulary);
    for (const auto& [name, value] : r.values)
      if (value.cols() == 1)
        out.add_tensor(name, std::vector<float>(value.data(), value.data() + value.size()));
      else
        out.add(name, nibble::pack(nibble::DynamicQuantizer(nibble::Scheme{}).quantize(value)));
    out.commit();
    model_ = llm::open_model(folder_ / "model.safetensors");
    windows_ = llm::calibration_windows(llm_test::some_tokens(400, 101), 6, 24, 0);
    options_.formats = {"int2-g16", "int4-g16", "int8-g16-sym"};
    options_.reference = "int4-g16";
    options_.embedding_formats = {"int4-g16", "int8-g16-sym"};
    options_.embedding_reference = "int4-g16";
    options_.windows = 3;
  }

  llm_test::TempFolder folder_;
  std::unique_ptr<llm::ModelFile> model_;
  std::vector<std::vector<llm::Token>> windows_;
  llm::TunerOptions options_;
};

TEST_F(Tune, MeasuresEveryMatrix) {
  options_.embedding = true;
  const std::vector<llm::Sensitivity> measured = llm::Tuner(*model_, windows_, options_).measure();
  ASSERT_EQ(measured.size(), 15U);
  std::size_t embeddings = 0;
  for (const llm::Sensitivity& s : measured) {
    EXPECT_GT(s.divergence, 0.0) << s.name;
    EXPECT_LT(s.divergence, 1.0) << s.name;  // one matrix in four bits
    ASSERT_EQ(s.errors.size(), s.may_stay ? 2U : 3U);
    for (std::size_t j = 1; j < s.errors.size(); ++j) EXPECT_LT(s.errors[j], s.errors[j - 1]) << s.name;
    EXPECT_EQ(s.reference_error, s.errors[s.may_stay ? 0 : 1]) << s.name;
    embeddings += s.may_stay ? 1 : 0;
  }
  EXPECT_EQ(embeddings, 1U);
  nibble::ThreadPool pool(3);
  options_.pool = &pool;
  const std::vector<llm::Sensitivity> threaded = llm::Tuner(*model_, windows_, options_).measure();
  for (std::size_t i = 0; i < measured.size(); ++i) {
    EXPECT_EQ(threaded[i].divergence, measured[i].divergence) << measured[i].name;
    EXPECT_EQ(threaded[i].errors, measured[i].errors) << measured[i].name;
  }
}

/// KL(float || changed) by the runner, for one matrix in four bits.
TEST_F(Tune, DivergenceIsWhatTheRunnerSays) {
  options_.stride = 1;
  options_.windows = windows_.size();
  const std::vector<llm::Sensitivity> measured = llm::Tuner(*model_, windows_, options_).measure();
  for (const char* name : {"blk.0.ffn_down.weight", "blk.1.attn_q.weight"}) {
    llm::QuantizePlan plan;
    plan.keep.push_back(llm::parse_keep(std::string(name) + "=" + options_.reference));
    plan.keep.push_back(llm::parse_keep(".*=same"));
    llm::quantize_to_packed(*model_, folder_ / "changed.safetensors", plan, nullptr, [](const std::string&) {});
    const llm::Model a = llm::load_model(*model_);
    const llm::Model b = llm::load_model(*llm::open_model(folder_ / "changed.safetensors"));
    llm::RunnerOptions o;
    o.context = 24;
    o.activations = nibble::Activations::fp32;
    o.kv_format = nibble::KvFormat::fp32;
    double kl = 0.0;
    for (const std::vector<llm::Token>& window : windows_) {
      std::vector<Eigen::VectorXd> p;
      for (const llm::Model* m : {&a, &b}) {
        llm::Runner runner(*m, o);
        auto cache = runner.new_cache();
        std::size_t n = 0;
        runner.append(cache, window.data(), window.size(), 0, [&](std::size_t, const auto& logits) {
          for (Eigen::Index c = 0; c < logits.cols(); ++c) {
            Eigen::VectorXd l = logits.col(c).template cast<double>();
            l.array() -= std::log((l.array() - l.maxCoeff()).exp().sum()) + l.maxCoeff();
            if (m == &a) {
              p.push_back(l);
              continue;
            }
            kl += (p[n].array().exp() * (p[n] - l).array()).sum();
            ++n;
          }
        });
      }
    }
    kl /= static_cast<double>(windows_.size() * windows_.front().size());
    for (const llm::Sensitivity& s : measured)
      // Logits that differ by their roundings, 1e-6, change a divergence of 1e-4 and more (differences of 1e-2) by less
      // than a thousandth.
      if (s.name == name) {
        EXPECT_NEAR(s.divergence, kl, 1e-3 * kl) << name;
      }
  }
}

TEST_F(Tune, ChoicesKeepTheBudget) {
  const std::vector<llm::Sensitivity> measured = llm::Tuner(*model_, windows_, options_).measure();
  double last = 1e30;
  for (const double bits : {3.5, 4.5, 6.0, 9.0}) {
    llm::TuneGoal goal;
    goal.bits = bits;
    const llm::TunePlan plan = llm::choose(measured, goal, 0);
    EXPECT_LE(plan.bits, bits);
    EXPECT_LT(plan.result.loss, last);
    last = plan.result.loss;
  }
  llm::TuneGoal loss;
  loss.max_loss = 0.01;
  EXPECT_LE(llm::choose(measured, loss, 0).result.loss, std::log(1.01));
  llm::TuneGoal impossible;
  impossible.bits = 1.0;
  EXPECT_THROW(llm::choose(measured, impossible, 0), nibble::InvalidArgument);
}

TEST_F(Tune, RecipesComeBack) {
  llm::PtqOptions o;
  o.method = llm::parse_method("rotate+awq+gptq+autoround");
  o.seed = 5;
  o.rounding.residual = 0.5;
  o.rounding.grids = "mse";
  o.transforms.awq_grid = 7;
  o.autoround.iterations = 9;
  const llm::Method method = o.method;
  o.plan_of = [method](const llm::TensorInfo& t) {
    llm::MatrixPlan p;
    p.method = method;
    if (t.name.find("ffn") != std::string::npos) p.scheme = llm::scheme_of(llm::parse_format("int4-g16"));
    return p;
  };
  const nibble::Recipe recipe = llm::recipe_of(*model_, o, {3, 24});
  const nibble::Recipe read = nibble::parse_recipe(nibble::recipe_text(recipe));
  llm::PtqOptions back;
  llm::WindowOptions windows;
  llm::follow(read, *model_, back, windows);
  EXPECT_EQ(windows.windows, 3U);
  EXPECT_EQ(windows.context, 24U);
  EXPECT_EQ(back.rounding.to_json(), o.rounding.to_json());
  EXPECT_EQ(back.transforms.to_json(), o.transforms.to_json());
  EXPECT_TRUE(back.method.rotate && back.method.awq && back.method.autoround && !back.method.equalize);
  EXPECT_EQ(llm::recipe_of(*model_, back, windows), recipe);
  nibble::Recipe odd = recipe;
  odd.parameters["magic"] = 1.0;
  EXPECT_THROW(llm::follow(odd, *model_, back, windows), nibble::InvalidArgument);
  odd = recipe;
  odd.tensors.pop_back();
  EXPECT_THROW(llm::follow(odd, *model_, back, windows), nibble::InvalidArgument);
}

/// The program: tune, replay, compare with methods.
TEST_F(Tune, TheProgramTunesReplaysAndCompares) {
#if defined(NIBBLE_CLI)
  const std::string program = NIBBLE_CLI;
#else
  const std::string program;
#endif
  const std::string stories = llm_test::data_file("stories260K.gguf");
  const std::string text = llm_test::data_file("austen.train.txt");
  if (program.empty() || stories.empty() || text.empty()) GTEST_SKIP() << "NIBBLE_DATA is not set";
  const auto run = [&](const std::string& arguments) {
    const int status =
        std::system(("'" + program + "' " + arguments + " > '" + (folder_ / "log") + "' 2>&1").c_str());
    EXPECT_EQ(status, 0) << arguments << "\n" << llm_test::read_file(folder_ / "log");
  };
  const std::string calibration = " --calibration '" + text + "'";
  run("quantize " + stories + " " + (folder_ / "t.safetensors") +
      " --method tune --size-mib 0.25 --windows 4 --context 64 " + "--tune-windows 2 --recipe-out " +
      (folder_ / "r.json") + " --json " + (folder_ / "j.json") + calibration);
  const nlohmann::json json = nlohmann::json::parse(llm_test::read_file(folder_ / "j.json"));
  EXPECT_LE(json.at("tune").at("bytes").get<double>(), 0.25 * 1048576.0);
  run("quantize " + stories + " " + (folder_ / "u.safetensors") + " --recipe " + (folder_ / "r.json") +
      " --threads 1" + calibration);
  EXPECT_TRUE(llm_test::read_file(folder_ / "t.safetensors") == llm_test::read_file(folder_ / "u.safetensors"));
  run("compare " + stories + " " + llm_test::data_file("stories260K.greedy.txt") +
      " --formats fp32,int4-g64-asym,int4-g64-asym:gptq --context 64 --windows 1 --prompt 16 --decode 4 "
      "--calibration-windows 4 --svg " +
      (folder_ / "p.svg") + " --json " + (folder_ / "c.json") + calibration);
  const nlohmann::json rows = nlohmann::json::parse(llm_test::read_file(folder_ / "c.json")).at("formats");
  ASSERT_EQ(rows.size(), 3U);
  EXPECT_EQ(rows[2].at("file_bytes"), rows[1].at("file_bytes"));
  EXPECT_NE(rows[2].at("perplexity"), rows[1].at("perplexity"));
  EXPECT_NE(llm_test::read_file(folder_ / "p.svg").find("int4-g64-asym:gptq"), std::string::npos);
}

}  // namespace
