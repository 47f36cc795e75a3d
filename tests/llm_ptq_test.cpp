// Quantizing a model block by block: what the frame promises whatever the method - the same bits for any number of
// threads and after a kill -, and the methods end to end.
#include <gtest/gtest.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "llm/ptq/calibration.hpp"
#include "llm/ptq/pipeline.hpp"
#include "llm_support.hpp"
#include "nibble/core/thread_pool.hpp"

namespace {

using llm::Method;
using llm::PtqOptions;
using llm::PtqPipeline;
using llm::PtqResult;
using llm::Token;

/// The random model of llm_support.hpp as a file of fp32 weights.
void write_model(const std::string& path) {
  const llm_test::RandomModel r = llm_test::random_model(llm_test::scheme_of(nibble::Format::fp32));
  const llm::Vocabulary vocabulary(llm_test::bpe_vocabulary({}));
  nibble::PackedFileWriter out(path);
  llm::add_model_data(out, r.model.hparams, vocabulary);
  for (const auto& [name, value] : r.values)
    if (value.cols() == 1)
      out.add_tensor(name, std::vector<float>(value.data(), value.data() + value.size()));
    else
      out.add(name, nibble::pack(nibble::DynamicQuantizer(nibble::Scheme{}).quantize(value)));
  out.commit();
}

std::vector<std::vector<Token>> some_windows(std::size_t count, std::size_t length) {
  return llm::calibration_windows(llm_test::some_tokens(2 * count * length, 101), count, length, 0);
}

class Ptq : public ::testing::Test {
 protected:
  void SetUp() override {
    write_model(folder_ / "model.safetensors");
    model_ = llm::open_model(folder_ / "model.safetensors");
  }

  PtqOptions options(const std::string& method, const std::string& format = "int4-g32-asym") const {
    PtqOptions o;
    o.method = llm::parse_method(method);
    const llm::FormatSpec spec = llm::parse_format(format);
    o.plan_of = [o, spec](const llm::TensorInfo& t) {
      llm::MatrixPlan p;
      p.method = o.method;
      if (t.name.compare(0, 4, "blk.") == 0) p.scheme = llm::scheme_of(spec);
      return p;
    };
    o.windows = some_windows(4, 24);
    o.resume = folder_ / "resume";
    o.state_seconds = 0.0;
    o.rounding.correction = 1.0;
    o.rounding.residual = 0.5;
    o.autoround.iterations = 4;
    o.autoround.batch = 2;
    return o;
  }

  /// The bytes of the file that a run writes.
  std::string run(const PtqOptions& o, PtqResult* result = nullptr) const {
    const std::string path = folder_ / "out.safetensors";
    std::filesystem::remove(path);
    const PtqResult r = PtqPipeline(*model_, o).run(path);
    if (result != nullptr) *result = r;
    EXPECT_FALSE(std::filesystem::exists(o.resume));
    return llm_test::read_file(path);
  }

  llm_test::TempFolder folder_;
  std::unique_ptr<llm::ModelFile> model_;
};

TEST(PtqMethod, ReadsSteps) {
  const Method m = llm::parse_method("rotate+awq+gptq+autoround");
  EXPECT_TRUE(m.rotate && m.awq && m.autoround);
  EXPECT_FALSE(m.equalize || m.smoothquant || m.tune || m.llm_int8 || m.bias);
  EXPECT_EQ(m.rounding, llm::Rounding::gptq);
  EXPECT_TRUE(llm::parse_method("rtn").is_plain());
  EXPECT_FALSE(llm::parse_method("hqq").needs_calibration());
  EXPECT_TRUE(llm::parse_method("awq").needs_calibration());
  EXPECT_EQ(llm::parse_method("awq").rounding, llm::Rounding::clip);
  EXPECT_EQ(llm::parse_method("awq+rtn").rounding, llm::Rounding::rtn);
  for (const char* bad : {"", "magic", "gptq+", "+gptq", "gptq+awq", "gptq+gptq", "gptq+hqq", "tune+gptq",
                          "gptq+tune", "autoround+gptq", "gptq+bias+autoround", "GPTQ"})
    EXPECT_THROW(llm::parse_method(bad), nibble::InvalidArgument) << bad;
}

TEST(PtqCalibration, WindowsLieApartAndAreTheSeeds) {
  std::vector<Token> tokens(1000);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<Token>(i);
  const auto even = llm::calibration_windows(tokens, 9, 100, 0);
  ASSERT_EQ(even.size(), 9U);
  for (std::size_t i = 0; i < even.size(); ++i) {
    ASSERT_EQ(even[i].size(), 100U);
    EXPECT_EQ(even[i].front(), static_cast<Token>(i * 111));
    EXPECT_EQ(even[i].back(), even[i].front() + 99);
  }
  const auto drawn = llm::calibration_windows(tokens, 9, 100, 5);
  EXPECT_EQ(drawn, llm::calibration_windows(tokens, 9, 100, 5));
  EXPECT_NE(drawn, llm::calibration_windows(tokens, 9, 100, 6));
  for (std::size_t i = 0; i < drawn.size(); ++i) {
    EXPECT_GE(drawn[i].front(), static_cast<Token>(i * 111));
    EXPECT_LE(drawn[i].back(), static_cast<Token>((i + 1) * 111 - 1));
  }
  EXPECT_EQ(llm::calibration_windows(tokens, 1, 1000, 7).front(), tokens);
  EXPECT_THROW(llm::calibration_windows(tokens, 11, 100, 0), nibble::InvalidArgument);
  EXPECT_THROW(llm::calibration_windows(tokens, 0, 100, 0), nibble::InvalidArgument);
  EXPECT_THROW(llm::calibration_windows({}, 1, 100, 0), nibble::InvalidArgument);
}

TEST_F(Ptq, RoundToNearestIsWhatItIsTensorByTensor) {
  llm::QuantizePlan plan;
  plan.format = llm::parse_format("int4-g32-asym");
  llm::quantize_to_packed(*model_, folder_ / "plain.safetensors", plan, nullptr, [](const std::string&) {});
  const std::string plain = llm_test::read_file(folder_ / "plain.safetensors");
  EXPECT_EQ(run(options("rtn")), plain);
  PtqOptions without = options("rtn");
  without.windows.clear();
  EXPECT_EQ(run(without), plain);
}

TEST_F(Ptq, StaticScalesAreThoseOfTheResultAndThreadsDoNotMatter) {
  PtqOptions o = options("smoothquant", "int8-g32-sym");
  o.static_group = 32;
  o.static_percentile = 95.0;
  const std::string alone = run(o);
  nibble::ThreadPool pool(3);
  o.pool = &pool;
  EXPECT_TRUE(run(o) == alone);
  const auto file = llm::open_model(folder_ / "out.safetensors");
  llm::CalibrateOptions calibration;
  calibration.group = 32;
  calibration.percentile = 95.0;
  // Scales do not change what floats are multiplied with: a second look finds the same.
  const auto extras = llm::calibrate(llm::load_model(*file), o.windows, calibration);
  ASSERT_EQ(extras.size(), 14U);
  for (const auto& entry : extras) {
    ASSERT_NE(file->extras(entry.first), nullptr) << entry.first;
    EXPECT_TRUE(file->extras(entry.first)->same_scales(entry.second)) << entry.first;
    EXPECT_TRUE(file->extras(entry.first)->activation_outliers);
  }
}

class PtqMethods : public Ptq, public ::testing::WithParamInterface<const char*> {};

TEST_P(PtqMethods, ThreadsDoNotMatter) {
  const std::string alone = run(options(GetParam()));
  ASSERT_FALSE(alone.empty());
  for (const int threads : {2, 3}) {
    nibble::ThreadPool pool(threads);
    PtqOptions o = options(GetParam());
    o.pool = &pool;
    EXPECT_TRUE(run(o) == alone) << threads;
  }
}

TEST_P(PtqMethods, AKilledRunEndsInTheSameBits) {
  PtqResult result;
  const std::string whole = run(options(GetParam()), &result);
  EXPECT_EQ(result.first_block, 0U);
  EXPECT_EQ(result.tensors.size(), 14U);
  for (const bool state : {true, false})
    for (std::size_t kill_at = 1; kill_at <= 8; ++kill_at) {
      PtqOptions o = options(GetParam());
      if (!state) o.state_seconds = 1e9;
      std::size_t steps = 0;
      o.done = [&](const std::string&) {
        if (++steps == kill_at) throw std::runtime_error("killed");
      };
      EXPECT_THROW(PtqPipeline(*model_, o).run(folder_ / "killed.safetensors"), std::runtime_error);
      EXPECT_FALSE(std::filesystem::exists(folder_ / "killed.safetensors"));
      o.done = [](const std::string&) {};
      EXPECT_TRUE(run(o, &result) == whole) << kill_at;
      EXPECT_EQ(result.first_block, state && kill_at > 4 ? 1U : 0U) << kill_at;
      EXPECT_EQ(result.tensors.size(), 14U);
    }
}

INSTANTIATE_TEST_SUITE_P(All, PtqMethods,
                         ::testing::Values("mse", "importance", "hqq", "gptq", "equalize+rtn", "smoothquant+mse",
                                           "awq", "awq+gptq", "rtn+autoround", "gptq+autoround"),
                         [](const ::testing::TestParamInfo<const char*>& method) {
                           std::string name = method.param;
                           for (char& c : name)
                             if (c == '+' || c == '-') c = '_';
                           return name;
                         });

TEST_F(Ptq, AFolderOfAnotherRunIsRefused) {
  PtqOptions o = options("rtn");
  o.done = [](const std::string&) { throw std::runtime_error("killed"); };
  EXPECT_THROW(run(o), std::runtime_error);
  EXPECT_THROW(run(options("mse")), nibble::InvalidArgument);
  EXPECT_THROW(run(options("rtn", "int4-g16-asym")), nibble::InvalidArgument);
  PtqOptions other_text = options("rtn");
  other_text.windows.front().front() += 1;
  EXPECT_THROW(run(other_text), nibble::InvalidArgument);
  EXPECT_FALSE(run(options("rtn")).empty());
}

TEST_F(Ptq, ABrokenStateIsRefused) {
  PtqOptions o = options("rtn");
  std::size_t steps = 0;
  o.done = [&](const std::string&) {
    if (++steps == 5) throw std::runtime_error("killed");
  };
  EXPECT_THROW(run(o), std::runtime_error);
  const std::string state = o.resume + "/state.bin";
  ASSERT_TRUE(std::filesystem::exists(state));
  std::filesystem::resize_file(state, std::filesystem::file_size(state) - 1);
  o.done = [](const std::string&) {};
  EXPECT_THROW(PtqPipeline(*model_, o).run(folder_ / "out.safetensors"), nibble::FormatError);
}

}  // namespace
