// Sequences that are decoded together say what they say alone, whoever joins and leaves beside them.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "llm/batch.hpp"
#include "llm/runner.hpp"
#include "llm/sampler.hpp"
#include "llm_support.hpp"

namespace {

using llm::BatchRequest;
using llm::Token;
using nibble::Format;
using nibble::Symmetry;

constexpr std::size_t vocabulary = 101;
bool ends(Token t) { return t % 19 == 7; }
bool never(Token) { return false; }

llm::RunnerOptions runner_options(nibble::ThreadPool* pool = nullptr, std::size_t block = 64) {
  llm::RunnerOptions o;
  o.context = 96;
  o.block = block;
  o.pool = pool;
  return o;
}

/// Every third samples, the others are greedy; prompts of 1 to 60 tokens.
std::vector<BatchRequest> requests(std::size_t n) {
  std::mt19937 random(5);
  std::vector<BatchRequest> all(n);
  for (std::size_t i = 0; i < n; ++i) {
    all[i].prompt.resize(i % 4 == 0 ? 1 + random() % 60 : 1 + random() % 8);
    for (Token& t : all[i].prompt) t = static_cast<Token>(random() % vocabulary);
    all[i].tokens = random() % 30;
    if (i % 3 == 0) all[i].sampler = {0.8F, 0.9F, i};
  }
  return all;
}

std::vector<Token> alone(const llm::Model& model, const BatchRequest& r, bool (*end)(Token)) {
  llm::Runner runner(model, runner_options());
  auto cache = runner.new_cache();
  llm::Sampler sampler(r.sampler);
  std::vector<Token> said;
  if (r.tokens == 0) return said;
  const float* logits = runner.append(cache, r.prompt.data(), r.prompt.size());
  for (;;) {
    const Token t = sampler.sample(logits, vocabulary);
    if (end(t)) return said;
    said.push_back(t);
    if (said.size() == r.tokens) return said;
    logits = runner.append(cache, &t, 1);
  }
}

class Batches : public ::testing::TestWithParam<std::pair<Format, Symmetry>> {};

TEST_P(Batches, SayWhatEachSaysAlone) {
  const auto [format, symmetry] = GetParam();
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(format, symmetry));
  const std::vector<BatchRequest> all = requests(40);
  std::vector<std::vector<Token>> expected;
  std::size_t ended = 0, full = 0;
  for (const BatchRequest& r : all) {
    expected.push_back(alone(m.model, r, ends));
    (expected.back().size() < r.tokens ? ended : full) += 1;
  }
  ASSERT_GT(ended, 3U);
  ASSERT_GT(full, 3U);
  std::size_t cancels = 0;
  for (const int threads : {1, 2, 3})
    for (const std::size_t sequences : {1U, 2U, 5U, 33U})
      for (const std::size_t block : {40U, 64U}) {
        nibble::ThreadPool pool(threads);
        llm::Runner runner(m.model, runner_options(threads > 1 ? &pool : nullptr, block));
        llm::BatchOptions options;
        options.sequences = sequences;
        options.prompt_tokens = 1 + 7 * sequences % 13;
        llm::Batch batch(runner, vocabulary, ends, options);
        // Requests come while others run; some leave early.
        std::mt19937 random(static_cast<unsigned>(sequences) + 100 * static_cast<unsigned>(threads));
        std::vector<bool> cancelled(all.size());
        std::size_t submitted = 0;
        for (bool more = true; more || submitted < all.size();) {
          for (std::size_t n = random() % 4; n > 0 && submitted < all.size(); --n) {
            ASSERT_EQ(batch.submit(all[submitted]), submitted);
            ++submitted;
          }
          if (submitted > 0 && random() % 8 == 0) {
            const std::size_t victim = random() % submitted;
            if (!batch.done(victim)) {
              batch.cancel(victim);
              cancelled[victim] = true;
              ++cancels;
            }
          }
          more = batch.step();
          ASSERT_LE(batch.running(), sequences);
        }
        for (std::size_t i = 0; i < all.size(); ++i) {
          ASSERT_TRUE(batch.done(i));
          std::vector<Token> want = expected[i];
          if (cancelled[i]) {
            ASSERT_LE(batch.tokens(i).size(), want.size());
            want.resize(batch.tokens(i).size());
          } else {
            ASSERT_EQ(batch.ended(i), expected[i].size() < all[i].tokens);
          }
          ASSERT_EQ(batch.tokens(i), want)
              << "sequence " << i << ", " << sequences << " at once, " << threads << " threads";
        }
      }
  EXPECT_GT(cancels, 20U);
}

INSTANTIATE_TEST_SUITE_P(Formats, Batches,
                         ::testing::Values(std::pair{Format::fp32, Symmetry::symmetric},
                                           std::pair{Format::int8, Symmetry::symmetric},
                                           std::pair{Format::int4, Symmetry::symmetric},
                                           std::pair{Format::int4, Symmetry::float_offset}));

TEST(Pieces, LogitsAreTheBitsOfEachAlone) {
  const llm_test::RandomModel m =
      llm_test::random_model(llm_test::scheme_of(Format::int4, Symmetry::float_offset));
  const std::vector<Token> tokens = llm_test::some_tokens(90, vocabulary);
  for (const nibble::KvFormat kv :
       {nibble::KvFormat::fp32, nibble::KvFormat::fp16, nibble::KvFormat::int8, nibble::KvFormat::int4}) {
    llm::RunnerOptions options = runner_options(nullptr, 128);
    options.kv_format = kv;
    llm::Runner runner(m.model, options), single(m.model, options);
    std::vector<nibble::KvCache> caches;
    for (std::size_t i = 0; i < 70; ++i) caches.push_back(runner.new_cache());
    std::vector<llm::Piece> pieces;
    for (std::size_t i = 0; i < caches.size(); ++i)
      pieces.push_back({&caches[i], tokens.data() + i % 20, i % 10 == 3 ? std::size_t{4} : 1, i % 8 != 5});
    pieces[0].wants_logits = pieces.back().wants_logits = false;
    for (int round = 0; round < 2; ++round) {
      const llm::Runner::Logits logits = runner.append(pieces.data(), pieces.size());
      Eigen::Index column = 0;
      for (const llm::Piece& piece : pieces) {
        if (!piece.wants_logits) continue;
        auto cache = single.new_cache();
        for (int r = 0; r < round; ++r) single.append(cache, piece.tokens, piece.count);
        const float* expected = single.append(cache, piece.tokens, piece.count);
        ASSERT_LT(column, logits.cols());
        EXPECT_EQ(std::memcmp(logits.col(column++).data(), expected, vocabulary * sizeof(float)), 0) << column;
      }
      EXPECT_EQ(column, logits.cols());
    }
  }
}

TEST(Pieces, RefuseWhatDoesNotFit) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::fp32));
  const std::vector<Token> tokens = llm_test::some_tokens(90, vocabulary);
  llm::Runner runner(m.model, runner_options());
  auto a = runner.new_cache(), b = runner.new_cache();
  const auto step = [&](std::vector<llm::Piece> pieces) {
    return runner.append(pieces.data(), pieces.size()).cols();
  };
  EXPECT_THROW(step({{&a, tokens.data(), 40, true}, {&b, tokens.data(), 25, true}}), std::runtime_error);
  EXPECT_THROW(step({{&a, tokens.data(), 1, true}, {&a, tokens.data(), 1, true}}), std::runtime_error);
  const Token bad = 101;
  EXPECT_THROW(step({{&a, tokens.data(), 1, true}, {&b, &bad, 1, true}}), std::runtime_error);
  EXPECT_EQ(a.size() + b.size(), 0U);
  EXPECT_THROW(step({{&a, tokens.data(), 0, true}}), std::runtime_error);
  EXPECT_EQ(step({}), 0);
  EXPECT_EQ(step({{&a, tokens.data(), 60, false}}), 0);
  EXPECT_THROW(step({{&a, tokens.data(), 40, true}}), std::runtime_error);
  EXPECT_EQ(a.size(), 60U);
}

TEST(Batch, RefusesWhatDoesNotFit) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::fp32));
  llm::Runner runner(m.model, runner_options());
  const auto batch = [&](std::size_t sequences) {
    llm::BatchOptions options;
    options.sequences = sequences;
    return llm::Batch(runner, vocabulary, never, options);
  };
  EXPECT_THROW(batch(0), std::runtime_error);
  EXPECT_THROW(batch(65), std::runtime_error);
  llm::BatchOptions options;
  options.sequences = 2;
  llm::Batch b(runner, vocabulary, never, options);
  EXPECT_FALSE(b.step());
  BatchRequest request;
  EXPECT_THROW(b.submit(request), std::runtime_error);
  request.prompt.assign(90, 1);
  request.tokens = 7;
  EXPECT_THROW(b.submit(request), std::runtime_error);
  EXPECT_THROW(b.done(0), std::runtime_error);
  request.tokens = 6;
  const std::size_t id = b.submit(request);
  while (b.step()) EXPECT_EQ(b.running(), 1U);
  EXPECT_EQ(b.tokens(id).size(), 6U);
}

}  // namespace
