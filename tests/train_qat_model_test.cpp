// Quantization-aware training of whole models: what is trained is what is deployed, layer by layer and to the last bit.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "llm/perplexity.hpp"
#include "llm_support.hpp"
#include "nibble/train/optimizer.hpp"
#include "train/qat.hpp"

namespace {

using Eigen::Index;
using Eigen::MatrixXf;
using llm::BlockMatrix;
using llm::Token;

std::vector<std::uint32_t> bits(const MatrixXf& m) {
  std::vector<std::uint32_t> out(static_cast<std::size_t>(m.size()));
  if (m.size() != 0) std::memcpy(out.data(), m.data(), out.size() * 4);
  return out;
}

std::vector<Token> random_tokens(std::size_t n, std::size_t vocabulary, unsigned seed) {
  std::mt19937 rng(seed);
  std::vector<Token> tokens;
  for (std::size_t i = 0; i < n; ++i) tokens.push_back(static_cast<Token>(rng() % vocabulary));
  return tokens;
}

llm::TokenBatch batch_of(const std::vector<Token>& tokens, std::size_t n) {
  llm::TokenBatch b;
  b.inputs.assign(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(n));
  b.targets.assign(tokens.begin() + 1, tokens.begin() + static_cast<std::ptrdiff_t>(n) + 1);
  return b;
}

/// Trains a little, exports, loads, and compares.
void check_model(const std::string& path, const std::string& format, bool embedding) {
  const auto file = llm::open_model(path);
  const llm::QatPlan plan = llm::qat_plan(format);
  nibble::ThreadPool pool(2);
  constexpr std::size_t window = 12;
  llm::LlamaTrainerOptions options;
  options.window = window;
  options.windows_at_once = 2;
  options.train_embedding = embedding;
  options.pool = &pool;
  llm::LlamaTrainer trainer(*file, options, llm::qat_layers(plan));
  const std::vector<Token> tokens = random_tokens(4 * window + 1, trainer.hparams().vocabulary, 5);
  const nibble::Parameters parameters = trainer.parameters();
  check(parameters);
  nibble::AdamW adam(parameters);
  const llm::TokenBatch batch = batch_of(tokens, 4 * window);
  for (std::uint64_t step = 0; step < 2; ++step) {
    nibble::zero_gradients(parameters);
    trainer.begin_step(step);
    trainer.gradients(batch);
    adam.step(3e-3);
  }
  trainer.begin_step(2);
  const std::vector<double> losses = trainer.losses(batch);

  const llm_test::TempFolder folder;
  const std::string out = folder / "qat.safetensors";
  llm::write_qat_model(out, llm::qat_model(trainer, *file, plan), *file);
  const auto written = llm::open_model(out);
  const llm::Model deployed = llm::load_model(*written);

  // Every layer of the trained model: its forward pass is the loaded matrix's product.
  if (plan) {
    for (std::size_t l = 0; l < trainer.hparams().layers; ++l)
      for (const BlockMatrix m : llm::block_matrices) {
        auto& layer = static_cast<nibble::QatLinear&>(trainer.layer(l, m));
        const nibble::PackedMatrix& w = deployed.layers[l].linears()[static_cast<std::size_t>(m)]->weights();
        std::mt19937 rng(7);
        std::normal_distribution<float> normal;
        MatrixXf x(layer.cols(), 5), y(layer.rows(), 5), expected(layer.rows(), 5);
        for (Index i = 0; i < x.size(); ++i) x.data()[i] = normal(rng);
        layer.forward(x, y, {});
        nibble::MatmulOptions product;
        product.activations = plan->activations;
        product.activation_bits = plan->activation_bits;
        nibble::matmul(w, x, expected, product);
        ASSERT_EQ(bits(y), bits(expected)) << format << " " << llm::tensor_name(l, m);
        ASSERT_EQ(bits(nibble::dequantize(w.unpack())), bits(nibble::dequantize(layer.quantized())));
      }
  }
  // The whole: the runner's losses are the trainer's, every one of them.
  llm::RunnerOptions run;
  run.kv_format = nibble::KvFormat::fp32;
  run.context = window;
  llm::Runner runner(deployed, run);
  for (std::size_t w = 0; w < 4; ++w) {
    auto cache = runner.new_cache();
    runner.append(cache, tokens.data() + w * window, window, 0, [&](std::size_t first, const auto& logits) {
      for (Index c = 0; c < logits.cols(); ++c) {
        const std::size_t i = w * window + first + static_cast<std::size_t>(c);
        const float* column = logits.col(c).data();
        const double loss = llm::log_sum_exp(column, static_cast<std::size_t>(logits.rows())) -
                            static_cast<double>(column[tokens[i + 1]]);
        ASSERT_EQ(loss, losses[i]) << format << " token " << i;
      }
    });
  }
}

TEST(QatModel, TrainingComputesWhatIsDeployed) {
  const std::string stories = llm_test::data_file("stories260K.gguf");
  if (stories.empty()) GTEST_SKIP() << "SKIPPED: NIBBLE_DATA names no folder with stories260K.gguf";
  for (const char* format : {"int8", "int3", "int2", "w4a4", "int4-g32-asym", "float"})
    check_model(stories, format, true);
  check_model(stories, "int3", false);
}

// A second model, which is always there.
TEST(QatModel, TrainingTheShippedModelComputesWhatIsDeployed) {
  for (const char* format : {"int3", "w4a4"})
    check_model(llm_test::shipped_file("nibble-austen.gguf"), format, true);
}

TEST(QatModel, FormatsByName) {
  EXPECT_FALSE(llm::qat_plan("float"));
  const llm::QatPlan w4a4 = llm::qat_plan("w4a4");
  EXPECT_EQ(w4a4->scheme.format, nibble::Format::int4);
  EXPECT_EQ(w4a4->activation_bits, 4U);
  EXPECT_EQ(llm::qat_extras(w4a4).activation_bits, 4U);
  EXPECT_TRUE(llm::qat_extras(w4a4).activation_token);
  EXPECT_TRUE(llm::qat_extras(llm::qat_plan("int4")).empty());
  EXPECT_EQ(llm::qat_plan("int8")->scheme.symmetry, nibble::Symmetry::symmetric);
  EXPECT_EQ(llm::qat_plan("int3-g64-asym")->scheme.granularity, nibble::Granularity::per_group(64, 1));
  for (const char* bad : {"nf4", "fp16", "w4a8", "int7", ""})
    EXPECT_THROW(llm::qat_plan(bad), nibble::InvalidArgument) << bad;
}

}  // namespace
