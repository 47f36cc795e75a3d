// The tuner's solver against trying everything, and its bound.
#include "nibble/ptq/tune.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "gemm_support.hpp"

namespace {

using namespace nibble;

std::vector<TuneLayer> random_layers(std::size_t layers, std::size_t candidates, unsigned seed,
                                     unsigned byte_unit = 1, int loss_steps = 100000) {
  std::mt19937 random(seed);
  std::vector<TuneLayer> all;
  for (std::size_t i = 0; i < layers; ++i) {
    TuneLayer layer;
    layer.name = "layer " + std::to_string(i);
    const std::size_t count = 1 + random() % candidates;
    for (std::size_t j = 0; j < count; ++j) {
      TuneCandidate c;
      c.bytes = (1 + random() % 50) * byte_unit;
      // Losses that are exact in sums of any order.
      c.loss = std::ldexp(
          static_cast<double>(static_cast<int>(random() % static_cast<unsigned>(loss_steps)) - 100), -10);
      c.label = std::to_string(j);
      layer.candidates.push_back(c);
    }
    all.push_back(layer);
  }
  return all;
}

struct Totals {
  double loss = 0.0;
  std::size_t bytes = 0;
};

/// Every choice, in lexicographic order.
template <class F>
void each_choice(const std::vector<TuneLayer>& layers, F&& f) {
  std::vector<std::size_t> choice(layers.size(), 0);
  for (;;) {
    Totals t;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      t.loss += layers[i].candidates[choice[i]].loss;
      t.bytes += layers[i].candidates[choice[i]].bytes;
    }
    f(t);
    std::size_t i = layers.size();
    while (i-- > 0) {
      if (++choice[i] < layers[i].candidates.size()) break;
      choice[i] = 0;
      if (i == 0) return;
    }
    if (layers.empty()) return;
  }
}

TEST(Tune, IsTheBestOfAllChoices) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    // Few different losses in every third: ties.
    const std::vector<TuneLayer> layers =
        random_layers(1 + seed % 7, 5, seed, 1 + seed % 3, seed % 3 == 0 ? 4 : 5000);
    std::size_t least = std::numeric_limits<std::size_t>::max();
    std::size_t most = 0;
    each_choice(layers, [&](const Totals& t) {
      least = std::min(least, t.bytes);
      most = std::max(most, t.bytes);
    });
    for (const std::size_t budget :
         {least, least + (most - least) / 4, least + (most - least) / 2, most, most + 9}) {
      Totals best{std::numeric_limits<double>::infinity(), 0};
      each_choice(layers, [&](const Totals& t) {
        if (t.bytes <= budget && (t.loss < best.loss || (t.loss == best.loss && t.bytes < best.bytes))) best = t;
      });
      const TuneResult r = minimize_loss(layers, budget);
      EXPECT_EQ(r.loss, best.loss) << seed;
      EXPECT_EQ(r.bytes, best.bytes) << seed;
      EXPECT_TRUE(r.proven);
      EXPECT_LE(r.bound, r.loss + 1e-9 * (1.0 + std::fabs(r.loss)));  // a sum of at most 40 doubles
      EXPECT_EQ(minimize_loss(layers, budget).choice, r.choice);

      Totals smallest{0.0, std::numeric_limits<std::size_t>::max()};
      each_choice(layers, [&](const Totals& t) {
        if (t.loss <= r.loss &&
            (t.bytes < smallest.bytes || (t.bytes == smallest.bytes && t.loss < smallest.loss)))
          smallest = t;
      });
      const TuneResult s = minimize_bytes(layers, r.loss);
      EXPECT_EQ(s.bytes, smallest.bytes) << seed;
      EXPECT_EQ(s.loss, smallest.loss) << seed;
    }
  }
}

TEST(Tune, OneByteLessThanTheSmallestIsRefused) {
  const std::vector<TuneLayer> layers = random_layers(5, 4, 3);
  std::size_t least = 0;
  for (const TuneLayer& layer : layers)
    least += std::min_element(layer.candidates.begin(), layer.candidates.end(), [](const auto& a, const auto& b) {
               return a.bytes < b.bytes;
             })->bytes;
  EXPECT_EQ(minimize_loss(layers, least).bytes, least);
  try {
    minimize_loss(layers, least - 1);
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find(std::to_string(least)), std::string::npos) << error.what();
  }
}

TEST(Tune, ALargeModelIsSolvedExactly) {
  // As a model has them: 30 blocks of 7 matrices, bytes by bits per weight, losses that fall by about 4 a bit.
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform(0.5, 2.0);
  std::vector<TuneLayer> layers;
  std::size_t weights = 0;
  for (int i = 0; i < 210; ++i) {
    const std::size_t n = i % 7 < 4 ? 576 * 576 : 576 * 1536;
    weights += n;
    TuneLayer layer;
    const double sensitivity = uniform(random) * uniform(random) * uniform(random);
    for (const int bits : {2, 3, 4, 5, 6, 8})
      for (const std::size_t group : {32U, 64U, 128U}) {
        TuneCandidate c;
        c.bytes = n * static_cast<std::size_t>(bits) / 8 + n / group * 3;
        c.loss = sensitivity * std::pow(4.0, -bits) * (1.0 + static_cast<double>(group) / 200.0) * uniform(random);
        layer.candidates.push_back(c);
      }
    layers.push_back(layer);
  }
  const std::size_t budget = weights * 9 / 16;  // 4.5 bits a weight
  const TuneResult r = minimize_loss(layers, budget);
  EXPECT_TRUE(r.proven);
  EXPECT_LE(r.bytes, budget);
  // The relaxation differs from a choice in one layer at most.
  EXPECT_LT(r.loss - r.bound, 0.001 * r.loss);
  EXPECT_GE(r.loss, r.bound * (1.0 - 1e-12));
  for (std::size_t j = 0; j < 18; ++j) {  // better than every uniform choice of that size
    double loss = 0.0;
    std::size_t bytes = 0;
    for (const TuneLayer& layer : layers) {
      loss += layer.candidates[j].loss;
      bytes += layer.candidates[j].bytes;
    }
    if (bytes <= budget) {
      EXPECT_LT(r.loss, loss);
    }
  }
  // Room for a few states only: not proven, but within its budget, and the bound is the same.
  TuneOptions few;
  few.max_states = 8;
  const TuneResult thin = minimize_loss(layers, budget, few);
  EXPECT_LE(thin.bytes, budget);
  EXPECT_EQ(thin.bound, r.bound);
  EXPECT_GE(thin.loss, r.loss);
  EXPECT_LT(thin.loss - thin.bound, 0.01 * thin.loss);
  EXPECT_FALSE(thin.proven);
}

TEST(Tune, TiesTakeTheSmallerThenTheEarlier) {
  std::vector<TuneLayer> layers(2);
  layers[0].candidates = {{10, 1.0, "a"}, {8, 1.0, "b"}, {8, 1.0, "c"}};
  layers[1].candidates = {{5, 2.0, "a"}};
  const TuneResult r = minimize_loss(layers, 100);
  EXPECT_EQ(r.choice, (std::vector<std::size_t>{1, 0}));
  EXPECT_EQ(r.bytes, 13U);
}

TEST(Tune, NoLayers) {
  const TuneResult r = minimize_loss({}, 0);
  EXPECT_TRUE(r.choice.empty());
  EXPECT_EQ(r.bytes, 0U);
}

TEST(Tune, BadInputsAreNamed) {
  std::vector<TuneLayer> layers = random_layers(3, 3, 1);
  layers[1].candidates.clear();
  EXPECT_THROW(minimize_loss(layers, 1000), InvalidArgument);
  layers = random_layers(3, 3, 1);
  layers[2].candidates[0].loss = std::nan("");
  EXPECT_THROW(minimize_loss(layers, 1000), InvalidArgument);
  layers = random_layers(3, 3, 1);
  EXPECT_THROW(minimize_bytes(layers, std::nan("")), InvalidArgument);
  EXPECT_THROW(minimize_bytes(layers, -1e9), InvalidArgument);
  layers[0].candidates[0].bytes = std::numeric_limits<std::size_t>::max();
  EXPECT_THROW(minimize_loss(layers, 1000), InvalidArgument);
}

TEST(Tune, PredictedLossScalesTheMeasurement) {
  EXPECT_DOUBLE_EQ(predicted_loss(0.1, 4.0, 1.0), 0.025);
  EXPECT_EQ(predicted_loss(-0.1, 4.0, 1.0), 0.0);
  EXPECT_EQ(predicted_loss(0.1, 0.0, 1.0), 0.0);
  EXPECT_THROW(predicted_loss(std::nan(""), 1.0, 1.0), InvalidArgument);
  EXPECT_THROW(predicted_loss(0.1, 1.0, -1.0), InvalidArgument);
}

TEST(Tune, BytesAreExact) {
  using gemm_test::scheme_of;
  for (const Scheme& s :
       {scheme_of(Format::int4, Symmetry::asymmetric, Granularity::per_group(64), ScaleType::fp16),
        scheme_of(Format::int8, Symmetry::symmetric, Granularity::per_channel(0)),
        scheme_of(Format::nf4, Symmetry::symmetric, Granularity::per_group(64)),
        scheme_of(Format::fp16, Symmetry::symmetric, {})}) {
    const QuantizedTensor q = gemm_test::random_quantized(s, 37, 100, 1);
    EXPECT_EQ(quantized_bytes(s, 37, 100), q.byte_size());
    PackOptions options;
    options.channel_sums = false;
    EXPECT_EQ(packed_bytes(s, 37, 100), pack(q, options).byte_size());
  }
}

}  // namespace
