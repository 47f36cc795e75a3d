// One block on float matrices: the bits of the runner, whatever the windows and threads.
// NIBBLE_THREADED_TEST
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "llm/block.hpp"
#include "llm/model_file.hpp"
#include "llm/runner.hpp"
#include "llm_support.hpp"

namespace {

using namespace llm;
using llm_test::data_file;
using llm_test::random_model;
using llm_test::scheme_of;
using llm_test::small_hparams;
using llm_test::some_tokens;

FloatBlock block_of(const llm_test::RandomModel& model, std::size_t layer) {
  FloatBlock block;
  for (const BlockMatrix m : block_matrices) block[m] = model.value(tensor_name(layer, m));
  block.attention_norm = model.value(attention_norm_name(layer)).col(0);
  block.ffn_norm = model.value(ffn_norm_name(layer)).col(0);
  return block;
}

/// Logits of all tokens of each window, by the runner.
Eigen::MatrixXf runner_logits(const Model& model, const std::vector<Token>& tokens, std::size_t window) {
  RunnerOptions options;
  options.context = window;
  options.activations = nibble::Activations::fp32;
  options.kv_format = nibble::KvFormat::fp32;
  Runner runner(model, options);
  Eigen::MatrixXf logits(static_cast<Eigen::Index>(model.hparams.vocabulary),
                         static_cast<Eigen::Index>(tokens.size()));
  for (std::size_t begin = 0; begin < tokens.size(); begin += window) {
    Runner::Cache cache = runner.new_cache();
    runner.append(cache, tokens.data() + begin, std::min(window, tokens.size() - begin), 0,
                  [&](std::size_t i, const auto& columns) {
                    logits.middleCols(static_cast<Eigen::Index>(begin + i), columns.cols()) = columns;
                  });
  }
  return logits;
}

/// The same from hidden states after the last block.
Eigen::MatrixXf head(const Model& model, const Eigen::MatrixXf& hidden) {
  Eigen::MatrixXf normed(hidden.rows(), hidden.cols());
  nibble::rms_norm(hidden, model.output_norm, model.hparams.rms_epsilon, normed);
  Eigen::MatrixXf logits(static_cast<Eigen::Index>(model.hparams.vocabulary), hidden.cols());
  nibble::MatmulOptions options;
  options.activations = nibble::Activations::fp32;
  nibble::matmul(model.output.weights(), normed, logits, options);
  return logits;
}

TEST(Block, BitsOfTheRunner) {
  for (const std::size_t rope_size : {8U, 4U}) {
    Hparams h = small_hparams();
    h.rope_size = rope_size;
    const auto model = random_model(scheme_of(nibble::Format::fp32), h);
    const std::vector<Token> tokens = some_tokens(100, h.vocabulary);
    nibble::ThreadPool pool(3);
    for (nibble::ThreadPool* threads : {static_cast<nibble::ThreadPool*>(nullptr), &pool})
      for (const std::size_t window : {1U, 7U, 32U, 100U}) {
        Eigen::MatrixXf x(static_cast<Eigen::Index>(h.dim), static_cast<Eigen::Index>(tokens.size()));
        for (std::size_t t = 0; t < tokens.size(); ++t)
          model.model.embedding.dequantize_row(static_cast<std::size_t>(tokens[t]),
                                               x.col(static_cast<Eigen::Index>(t)).data());
        BlockOptions options;
        options.window = window;
        options.pool = threads;
        BlockRunner runner(h, options);
        for (std::size_t layer = 0; layer < h.layers; ++layer) runner.forward(block_of(model, layer), x, x);
        EXPECT_EQ(head(model.model, x), runner_logits(model.model, tokens, window))
            << "window " << window << ", rope " << rope_size;
      }
  }
}

TEST(Block, InputsAreWhatTheMatricesMultiply) {
  const Hparams h = small_hparams();
  const auto model = random_model(scheme_of(nibble::Format::fp32), h);
  const FloatBlock block = block_of(model, 0);
  std::mt19937 random(3);
  const Eigen::MatrixXf x = llm_test::random_matrix(random, static_cast<Eigen::Index>(h.dim), 40, 1.0F);
  BlockOptions options;
  options.window = 16;
  BlockRunner runner(h, options);
  Eigen::MatrixXf y(x.rows(), x.cols());
  runner.forward(block, x, y);
  const auto product = [&](BlockMatrix m, const nibble::Epilogue& epilogue = {}) {
    nibble::MatmulOptions o;
    o.epilogue = epilogue;
    Eigen::MatrixXf out(block[m].rows(), x.cols());
    nibble::gemm(block[m], runner.input(m), out, o);
    return out;
  };
  Eigen::MatrixXf normed(x.rows(), x.cols());
  nibble::rms_norm(x, block.attention_norm, h.rms_epsilon, normed);
  EXPECT_EQ(runner.input(BlockInput::attention_norm), normed);
  EXPECT_EQ(runner.input(BlockInput::attention).rows(), static_cast<Eigen::Index>(h.q_size()));
  const Eigen::MatrixXf hidden = product(BlockMatrix::output, nibble::Epilogue().add(x));
  nibble::rms_norm(hidden, block.ffn_norm, h.rms_epsilon, normed);
  EXPECT_EQ(runner.input(BlockInput::ffn_norm), normed);
  const Eigen::MatrixXf up = product(BlockMatrix::up);
  EXPECT_EQ(runner.input(BlockInput::gated), product(BlockMatrix::gate, nibble::Epilogue().silu().multiply(up)));
  EXPECT_EQ(y, product(BlockMatrix::down, nibble::Epilogue().add(hidden)));
}

TEST(Block, WrongShapesAreRefused) {
  const Hparams h = small_hparams();
  const auto model = random_model(scheme_of(nibble::Format::fp32), h);
  FloatBlock block = block_of(model, 0);
  BlockRunner runner(h, BlockOptions{});
  Eigen::MatrixXf x = Eigen::MatrixXf::Ones(static_cast<Eigen::Index>(h.dim), 3);
  Eigen::MatrixXf fewer(x.rows(), 2), shorter(x.rows() - 1, 3);
  EXPECT_THROW(runner.forward(block, x, fewer), nibble::InvalidArgument);
  EXPECT_THROW(runner.forward(block, shorter, shorter), nibble::InvalidArgument);
  block[BlockMatrix::down].resize(3, 3);
  EXPECT_THROW(runner.forward(block, x, x), nibble::FormatError);
  BlockOptions none;
  none.window = 0;
  EXPECT_THROW(BlockRunner(h, none), nibble::InvalidArgument);
}

TEST(Block, StoriesBitsOfTheRunner) {
  const std::string path = data_file("stories260K.gguf");
  if (path.empty()) GTEST_SKIP() << "SKIPPED: NIBBLE_DATA names no folder with stories260K.gguf";
  const auto file = open_model(path);
  const Model model = load_model(*file);
  const std::vector<Token> tokens = some_tokens(96, model.hparams.vocabulary);
  BlockOptions options;
  options.window = 48;
  options.rope_divisors = rope_divisors_of(*file);
  BlockRunner runner(file->hparams(), options);
  Eigen::MatrixXf x = embed(*file, tokens);
  for (std::size_t layer = 0; layer < file->hparams().layers; ++layer)
    runner.forward(load_block(*file, layer), x, x);
  EXPECT_EQ(head(model, x), runner_logits(model, tokens, 48));
}

}  // namespace
