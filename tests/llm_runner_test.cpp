// The forward pass of examples/llm: the same bits however tokens come in, the values of a naive one, golden texts.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "llm/perplexity.hpp"
#include "llm/runner.hpp"
#include "llm/sampler.hpp"
#include "llm_support.hpp"

namespace {

using llm::Token;
using nibble::Format;
using nibble::Symmetry;

llm::RunnerOptions small_options(nibble::ThreadPool* pool = nullptr, std::size_t block = 512) {
  llm::RunnerOptions o;
  o.context = 128;
  o.block = block;
  o.pool = pool;
  return o;
}

/// Logits of every token, a column each; tokens come in pieces of the given sizes, the last size repeated.
template <class Runner>
Eigen::MatrixXf all_logits(Runner& runner, const std::vector<Token>& tokens,
                           const std::vector<std::size_t>& pieces) {
  const auto vocabulary = static_cast<Eigen::Index>(runner.hparams().vocabulary);
  Eigen::MatrixXf out(vocabulary, static_cast<Eigen::Index>(tokens.size()));
  auto cache = runner.new_cache();
  std::size_t begin = 0;
  for (std::size_t p = 0; begin < tokens.size(); ++p) {
    const std::size_t n = std::min(pieces[std::min(p, pieces.size() - 1)], tokens.size() - begin);
    runner.append(cache, tokens.data() + begin, n, 0, [&](std::size_t i, const auto& logits) {
      out.middleCols(static_cast<Eigen::Index>(begin + i), logits.cols()) = logits;
    });
    begin += n;
  }
  return out;
}

bool same_bits(const Eigen::MatrixXf& a, const Eigen::MatrixXf& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * 4) == 0;
}

class Invariance : public ::testing::TestWithParam<std::tuple<Format, Symmetry, nibble::KvFormat>> {};

TEST_P(Invariance, LogitsDoNotDependOnPiecesBlocksOrThreads) {
  const nibble::KvFormat kv_format = std::get<2>(GetParam());
  const llm_test::RandomModel m =
      llm_test::random_model(llm_test::scheme_of(std::get<0>(GetParam()), std::get<1>(GetParam())));
  // More than one block of logits (64) and of attention's queries, and an odd rest.
  const std::vector<Token> tokens = llm_test::some_tokens(103, m.model.hparams.vocabulary);
  const auto run = [&](nibble::ThreadPool* pool, std::size_t block, const std::vector<std::size_t>& pieces) {
    llm::RunnerOptions options = small_options(pool, block);
    options.kv_format = kv_format;
    llm::Runner runner(m.model, options);
    return all_logits(runner, tokens, pieces);
  };
  const Eigen::MatrixXf expected = run(nullptr, 512, {103});
  ASSERT_TRUE(expected.allFinite());
  EXPECT_TRUE(same_bits(run(nullptr, 512, {1}), expected)) << "one by one";
  EXPECT_TRUE(same_bits(run(nullptr, 512, {40, 1, 33, 2, 5}), expected)) << "in pieces";
  EXPECT_TRUE(same_bits(run(nullptr, 7, {103}), expected)) << "in blocks of 7";
  for (const int threads : {2, 3}) {
    nibble::ThreadPool pool(threads);
    EXPECT_TRUE(same_bits(run(&pool, 512, {103}), expected)) << threads << " threads";
    EXPECT_TRUE(same_bits(run(&pool, 512, {50, 1}), expected)) << threads << " threads, in pieces";
  }
}

// Sequences that join and leave, each piece of another length, say what they say alone.
TEST_P(Invariance, LogitsDoNotDependOnTheBatch) {
  const auto [format, symmetry, kv_format] = GetParam();
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(format, symmetry));
  const std::vector<Token> tokens = llm_test::some_tokens(120, m.model.hparams.vocabulary);
  llm::RunnerOptions options = small_options(nullptr, 64);
  options.kv_format = kv_format;
  nibble::ThreadPool pool(2);
  llm::RunnerOptions threaded = options;
  threaded.pool = &pool;
  llm::Runner alone(m.model, options), batch(m.model, threaded);
  constexpr std::size_t sequences = 4;
  std::vector<nibble::KvCache> caches, own;
  for (std::size_t s = 0; s < sequences; ++s) {
    caches.push_back(batch.new_cache());
    own.push_back(alone.new_cache());
  }
  const auto vocabulary = static_cast<Eigen::Index>(m.model.hparams.vocabulary);
  for (std::size_t round = 0; round < 12; ++round) {
    std::vector<llm::Piece> pieces;
    std::vector<std::size_t> members;
    for (std::size_t s = 0; s < sequences; ++s) {
      if (round < s || (round + s) % 4 == 3) continue;  // joins later, pauses
      const std::size_t count = round == s ? 5 + 7 * s : 1;
      if (caches[s].size() + count > 30 * (s + 1)) continue;
      pieces.push_back({&caches[s], tokens.data() + 13 * s + caches[s].size(), count});
      members.push_back(s);
    }
    if (pieces.empty()) continue;
    const Eigen::MatrixXf together = batch.append(pieces.data(), pieces.size());
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      const float* logits = alone.append(own[members[i]], pieces[i].tokens, pieces[i].count);
      EXPECT_TRUE(same_bits(together.col(static_cast<Eigen::Index>(i)),
                            Eigen::Map<const Eigen::VectorXf>(logits, vocabulary)))
          << "round " << round << ", sequence " << members[i];
    }
  }
}

using Kv = nibble::KvFormat;
INSTANTIATE_TEST_SUITE_P(Formats, Invariance,
                         ::testing::Values(std::tuple{Format::fp32, Symmetry::symmetric, Kv::fp16},
                                           std::tuple{Format::fp32, Symmetry::symmetric, Kv::fp32},
                                           std::tuple{Format::bf16, Symmetry::symmetric, Kv::int8},
                                           std::tuple{Format::int8, Symmetry::symmetric, Kv::fp16},
                                           std::tuple{Format::int4, Symmetry::symmetric, Kv::int8},
                                           std::tuple{Format::int4, Symmetry::float_offset, Kv::fp16},
                                           std::tuple{Format::int8, Symmetry::asymmetric, Kv::int4},
                                           std::tuple{Format::nf4, Symmetry::symmetric, Kv::fp32}));

/// A Llama block by block, token by token, in double, from the textbook.
Eigen::MatrixXd naive_logits(const llm_test::RandomModel& m, const std::vector<Token>& tokens) {
  using Matrix = Eigen::MatrixXd;
  const llm::Hparams& h = m.model.hparams;
  const auto n = static_cast<Eigen::Index>(tokens.size());
  const auto weight = [&](const std::string& name) -> Matrix { return m.value(name).cast<double>(); };
  const auto norm = [&](const Matrix& x, const std::string& name) -> Matrix {
    Matrix out = x;
    for (Eigen::Index t = 0; t < n; ++t) {
      const double rms =
          std::sqrt(x.col(t).squaredNorm() / static_cast<double>(x.rows()) + static_cast<double>(h.rms_epsilon));
      out.col(t) = (x.col(t) / rms).cwiseProduct(weight(name).col(0));
    }
    return out;
  };
  const auto head = static_cast<Eigen::Index>(h.head_size);
  const auto rope = [&](Matrix& x) {
    for (Eigen::Index t = 0; t < n; ++t)
      for (Eigen::Index r = 0; r < x.rows(); r += 2) {
        const double angle = static_cast<double>(t) *
                             std::pow(h.rope_base, -static_cast<double>(r % head) / static_cast<double>(head));
        const double a = x(r, t), b = x(r + 1, t);
        x(r, t) = a * std::cos(angle) - b * std::sin(angle);
        x(r + 1, t) = a * std::sin(angle) + b * std::cos(angle);
      }
  };
  Matrix x(static_cast<Eigen::Index>(h.dim), n);
  for (Eigen::Index t = 0; t < n; ++t)
    x.col(t) = weight("token_embd.weight").row(tokens[static_cast<std::size_t>(t)]).transpose();
  for (std::size_t i = 0; i < h.layers; ++i) {
    const std::string b = "blk." + std::to_string(i) + ".";
    const Matrix a = norm(x, b + "attn_norm.weight");
    Matrix q = weight(b + "attn_q.weight") * a, k = weight(b + "attn_k.weight") * a;
    const Matrix v = weight(b + "attn_v.weight") * a;
    rope(q);
    rope(k);
    Matrix out = Matrix::Zero(q.rows(), n);
    for (std::size_t hd = 0; hd < h.heads; ++hd) {
      const auto qr = static_cast<Eigen::Index>(hd) * head;
      const auto kr = static_cast<Eigen::Index>(hd / (h.heads / h.kv_heads)) * head;
      for (Eigen::Index t = 0; t < n; ++t) {
        Eigen::VectorXd s(t + 1);
        for (Eigen::Index p = 0; p <= t; ++p)
          s[p] = q.col(t).segment(qr, head).dot(k.col(p).segment(kr, head)) / std::sqrt(static_cast<double>(head));
        s = (s.array() - s.maxCoeff()).exp();
        s /= s.sum();
        for (Eigen::Index p = 0; p <= t; ++p) out.col(t).segment(qr, head) += s[p] * v.col(p).segment(kr, head);
      }
    }
    x += weight(b + "attn_output.weight") * out;
    const Matrix f = norm(x, b + "ffn_norm.weight");
    const Matrix gate = weight(b + "ffn_gate.weight") * f, up = weight(b + "ffn_up.weight") * f;
    const Matrix silu = gate.array() / (1.0 + (-gate.array()).exp());
    x += weight(b + "ffn_down.weight") * silu.cwiseProduct(up);
  }
  return weight("token_embd.weight") * norm(x, "output_norm.weight");
}

TEST(Runner, EqualsTheTextbook) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::fp32));
  const std::vector<Token> tokens = llm_test::some_tokens(70, m.model.hparams.vocabulary);
  llm::RunnerOptions options = small_options();
  options.kv_format = nibble::KvFormat::fp32;
  llm::Runner runner(m.model, options);
  const Eigen::MatrixXf logits = all_logits(runner, tokens, {70});
  // Two layers of sums of up to 80 products of numbers about 1: some 100 roundings of 2^-24 each, generously 16 times.
  EXPECT_LT((logits.cast<double>() - naive_logits(m, tokens)).cwiseAbs().maxCoeff(), 1600.0 * 0x1p-24);
}

TEST(Runner, HalfPrecisionCacheStaysNear) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::fp32));
  const std::vector<Token> tokens = llm_test::some_tokens(50, m.model.hparams.vocabulary);
  llm::RunnerOptions options = small_options();
  llm::Runner half(m.model, options);
  options.kv_format = nibble::KvFormat::fp32;
  llm::Runner full(m.model, options);
  const Eigen::MatrixXf a = all_logits(full, tokens, {50}), b = all_logits(half, tokens, {50});
  EXPECT_FALSE(same_bits(a, b));
  // fp16 keeps 11 bits; a factor of 16 for two layers' sums.
  EXPECT_LT((a - b).cwiseAbs().maxCoeff(), 16.0F * 0x1p-11F);
  EXPECT_TRUE(same_bits(all_logits(half, tokens, {1}), b));
}

TEST(Runner, CacheCanBeCutBack) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::int8));
  const std::vector<Token> tokens = llm_test::some_tokens(20, m.model.hparams.vocabulary);
  llm::Runner runner(m.model, small_options());
  auto cache = runner.new_cache();
  const auto vocabulary = static_cast<Eigen::Index>(m.model.hparams.vocabulary);
  const Eigen::VectorXf first =
      Eigen::Map<const Eigen::VectorXf>(runner.append(cache, tokens.data(), 20), vocabulary);
  cache.truncate(10);
  EXPECT_EQ(cache.size(), 10U);
  const Eigen::VectorXf again =
      Eigen::Map<const Eigen::VectorXf>(runner.append(cache, tokens.data() + 10, 10), vocabulary);
  EXPECT_TRUE(same_bits(first, again));
}

TEST(Runner, TwoSequencesDoNotMix) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::int4));
  const std::vector<Token> a = llm_test::some_tokens(30, 50), b(a.rbegin(), a.rend());
  llm::Runner runner(m.model, small_options());
  const Eigen::MatrixXf alone = all_logits(runner, a, {30});
  auto first = runner.new_cache(), second = runner.new_cache();
  const auto vocabulary = static_cast<Eigen::Index>(m.model.hparams.vocabulary);
  for (std::size_t i = 0; i < a.size(); ++i) {
    const Eigen::VectorXf logits = Eigen::Map<const Eigen::VectorXf>(runner.append(first, &a[i], 1), vocabulary);
    runner.append(second, &b[i], 1);
    ASSERT_TRUE(same_bits(logits, alone.col(static_cast<Eigen::Index>(i)))) << i;
  }
}

TEST(Runner, RefusesWhatDoesNotFit) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::fp32));
  llm::Runner runner(m.model, small_options());
  auto cache = runner.new_cache();
  const std::vector<Token> many(129, 1);
  EXPECT_THROW(runner.append(cache, many.data(), many.size()), std::runtime_error);
  EXPECT_EQ(cache.size(), 0U);
  for (const Token bad : {-1, 101}) EXPECT_THROW(runner.append(cache, &bad, 1), std::runtime_error);
}

TEST(Sampler, TemperatureZeroTakesTheFirstOfTheLargest) {
  const std::vector<float> logits = {0.5F, 2.0F, -1.0F, 2.0F};
  llm::Sampler s({});
  for (int i = 0; i < 5; ++i) EXPECT_EQ(s.sample(logits.data(), logits.size()), 1);
}

TEST(Sampler, ArgmaxIsTheFirstMaximumOfAnyLine) {
  std::mt19937 random(3);
  const float inf = std::numeric_limits<float>::infinity();
  for (std::size_t n = 1; n < 300; ++n)
    for (const float special : {0.0F, inf, -inf}) {
      std::vector<float> x(n);
      for (float& v : x) v = static_cast<float>(random() % 7) - 6.0F;
      if (special != 0.0F) x[random() % n] = special;
      const auto expected = static_cast<Token>(std::max_element(x.begin(), x.end()) - x.begin());
      ASSERT_EQ(llm::argmax(x.data(), n), expected) << n;
    }
}

TEST(Sampler, TopPTakesTheFewestThatHoldIt) {
  // 500 tokens; the nucleus by the definition: sorted, ties in the order of their numbers.
  std::mt19937 random(4);
  std::vector<float> logits(500);
  for (float& v : logits) v = static_cast<float>(random() % 50) * 0.1F;
  std::vector<Token> order(logits.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<Token>(i);
  const auto weight = [&](Token t) { return std::exp(static_cast<double>(logits[static_cast<std::size_t>(t)])); };
  std::stable_sort(order.begin(), order.end(), [&](Token a, Token b) { return weight(a) > weight(b); });
  double total = 0.0;
  for (const Token t : order) total += weight(t);
  for (const float p : {0.001F, 0.1F, 0.5F, 0.9F}) {
    std::vector<bool> kept(order.size());
    double mass = 0.0;
    for (std::size_t i = 0; i == 0 || mass < static_cast<double>(p) * total; ++i) {
      kept[static_cast<std::size_t>(order[i])] = true;
      mass += weight(order[i]);
    }
    llm::Sampler s({1.0F, p, 9});
    std::vector<bool> seen(order.size());
    for (int i = 0; i < 20000; ++i) seen[static_cast<std::size_t>(s.sample(logits.data(), logits.size()))] = true;
    EXPECT_EQ(seen, kept) << p;
  }
}

TEST(Sampler, FollowsTheProbabilities) {
  const std::vector<float> logits = {std::log(0.5F), std::log(0.3F), std::log(0.15F), std::log(0.05F)};
  constexpr int n = 20000;
  for (const float top_p : {1.0F, 0.79F, 0.75F}) {
    llm::Sampler s({1.0F, top_p, 5});
    std::vector<int> count(4);
    for (int i = 0; i < n; ++i) ++count[static_cast<std::size_t>(s.sample(logits.data(), 4))];
    const bool all = top_p == 1.0F;  // 0.79 and 0.75 both need the two likeliest
    const double total = all ? 1.0 : 0.8;
    const std::vector<double> p = {0.5 / total, 0.3 / total, all ? 0.15 : 0.0, all ? 0.05 : 0.0};
    for (std::size_t i = 0; i < 4; ++i)  // five standard deviations
      EXPECT_NEAR(count[i], n * p[i], 5.0 * std::sqrt(n * p[i] * (1.0 - p[i])) + 1e-9) << top_p << " " << i;
  }
}

TEST(Sampler, SeedsRepeat) {
  std::vector<float> logits(1000);
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 17) * 0.1F;
  const auto draw = [&](std::uint64_t seed) {
    llm::Sampler s({0.9F, 0.95F, seed});
    std::vector<Token> out;
    for (int i = 0; i < 50; ++i) out.push_back(s.sample(logits.data(), logits.size()));
    return out;
  };
  EXPECT_EQ(draw(3), draw(3));
  EXPECT_NE(draw(3), draw(4));
}

TEST(Perplexity, EqualsTheDefinition) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::fp32));
  const std::vector<Token> tokens = llm_test::some_tokens(3 * 32 + 5, m.model.hparams.vocabulary);
  nibble::ThreadPool pool(2);
  llm::Runner runner(m.model, small_options());
  std::size_t calls = 0;
  const auto result =
      llm::perplexity(runner, tokens, 32, 9, nullptr, [&](const llm::PerplexityResult&) { ++calls; });
  EXPECT_EQ(result.windows, 3U);  // as many as the text has
  EXPECT_EQ(calls, 3U);
  EXPECT_EQ(result.predictions, 3U * 15U);
  double loss = 0.0;
  for (std::size_t w = 0; w < 3; ++w) {
    const std::vector<Token> window(tokens.begin() + static_cast<std::ptrdiff_t>(32 * w),
                                    tokens.begin() + static_cast<std::ptrdiff_t>(32 * (w + 1)));
    const Eigen::MatrixXd logits = naive_logits(m, window);
    for (Eigen::Index t = 16; t < 31; ++t)
      loss += std::log(logits.col(t).array().exp().sum()) - logits(window[static_cast<std::size_t>(t) + 1], t);
  }
  EXPECT_NEAR(result.negative_log_likelihood, loss, 45 * 2 * 1600.0 * 0x1p-24);
  llm::Runner threaded(m.model, small_options(&pool));
  const auto again = llm::perplexity(threaded, tokens, 32, 9, &pool, [](const llm::PerplexityResult&) {});
  EXPECT_EQ(again.negative_log_likelihood, result.negative_log_likelihood);
}

TEST(Stories260K, SaysItsGoldenText) {
  const std::string model = llm_test::data_file("stories260K.gguf");
  const std::string golden_file = llm_test::data_file("stories260K.greedy.txt");
  if (model.empty() || golden_file.empty()) GTEST_SKIP() << "NIBBLE_DATA is not set";
  std::string golden = llm_test::read_file(golden_file);
  while (!golden.empty() && golden.back() == '\n') golden.pop_back();
  const auto file = llm::open_model(model);
  const llm::Tokenizer tokenizer(file->vocabulary());
  const llm::Model weights = llm::load_model(*file);
  llm::RunnerOptions options;
  options.context = 300;
  llm::Runner runner(weights, options);
  auto cache = runner.new_cache();
  llm::StreamDecoder decoder(tokenizer, true);
  Token token = tokenizer.vocabulary().bos;
  std::string text;
  while (text.size() < golden.size() && cache.size() < 300) {
    token = llm::argmax(runner.append(cache, &token, 1), weights.hparams.vocabulary);
    text += decoder.push(token);
  }
  EXPECT_EQ(text, golden);
}

// Trained here and always there. Its text has one form: products have the same bits on every ISA.
TEST(ShippedModel, SaysItsText) {
  const auto file = llm::open_model(llm_test::shipped_file("nibble-austen.gguf"));
  const llm::Tokenizer tokenizer(file->vocabulary());
  const llm::Model weights = llm::load_model(*file);
  llm::RunnerOptions options;
  options.context = 64;
  llm::Runner runner(weights, options);
  auto cache = runner.new_cache();
  llm::StreamDecoder decoder(tokenizer, false);
  const std::vector<Token> prompt = tokenizer.encode("Anne could not");
  const float* logits = runner.append(cache, prompt.data(), prompt.size());
  std::string text;
  for (int i = 0; i < 40; ++i) {
    const Token token = llm::argmax(logits, weights.hparams.vocabulary);
    text += decoder.push(token);
    logits = runner.append(cache, &token, 1);
  }
  EXPECT_EQ(
      text,
      " be in the habit of a crowd.\nTheir party were now in the drawing-room, and the two gentlemen were in the "
      "drawing-room, and the two");
}

TEST(ShippedModel, KnowsItsLanguage) {
  nibble::ThreadPool pool(2);
  const auto file = llm::open_model(llm_test::shipped_file("nibble-austen.gguf"));
  const llm::Tokenizer tokenizer(file->vocabulary());
  const llm::Model weights = llm::load_model(*file, &pool);
  const std::string text = llm_test::read_file(llm_test::shipped_file("persuasion.txt"));
  const std::vector<Token> tokens = tokenizer.encode(text);
  llm::RunnerOptions options;
  options.context = 256;
  options.pool = &pool;
  llm::Runner runner(weights, options);
  const auto result = llm::perplexity(runner, tokens, 256, 8, &pool, [](const llm::PerplexityResult&) {});
  ASSERT_EQ(result.windows, 8U);
  const double bytes_a_token = static_cast<double>(text.size()) / static_cast<double>(tokens.size());
  // What was promised of the whole novel; xz -9 needs 2.37.
  EXPECT_LT(std::log2(result.perplexity()) / bytes_a_token, 1.95);
}

TEST(SmolLM2, PerplexityIsTheReferenceOne) {
  const std::string model = llm_test::model_file(), text = llm_test::data_file("wiki.test.raw");
  if (model.empty() || text.empty()) GTEST_SKIP() << "NIBBLE_MODEL or NIBBLE_DATA is not set";
  nibble::ThreadPool pool(2);
  const auto file = llm::open_model(model);
  const llm::Tokenizer tokenizer(file->vocabulary());
  const llm::Model weights = llm::load_model(*file, &pool);
  const std::vector<Token> tokens = tokenizer.encode(llm_test::read_file(text).substr(0, 20000));
  llm::RunnerOptions options;
  options.context = 512;
  options.pool = &pool;
  options.activations = nibble::Activations::fp32;
  llm::Runner runner(weights, options);
  const auto result = llm::perplexity(runner, tokens, 512, 4, &pool, [](const llm::PerplexityResult&) {});
  ASSERT_EQ(result.windows, 4U);
  EXPECT_NEAR(result.perplexity(), 22.744, 22.744 * 0.001);  // an independent NumPy version's
}

}  // namespace
