// LoRA over dense and packed weights: against products in double of the dequantized matrix, and finite differences.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "nibble/gemm/pack.hpp"
#include "nibble/ptq/double_quant.hpp"
#include "nibble/train/lora.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace

Eigen::MatrixXf random_matrix(Eigen::Index n, Eigen::Index k, unsigned seed, float deviation = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, deviation);
  Eigen::MatrixXf m(n, k);
  for (Eigen::Index i = 0; i < m.size(); ++i) m.data()[i] = normal(random);
  return m;
}
PackedMatrix nf4(const RowMajorMatrix& w) {
  Scheme s;
  s.format = Format::nf4;
  s.granularity = Granularity::per_group(64, 1);
  const WeightGrids grids = fit_min_max(s, w);
  return pack(double_quantize(grids.assemble(grids.encode(w))).tensor);
}
LowRank random_low_rank(Eigen::Index n, Eigen::Index k, Eigen::Index r, double scale) {
  LowRank l;
  l.a = random_matrix(r, k, 21, 0.2F);
  l.b = random_matrix(n, r, 22, 0.2F);
  l.scale = scale;
  return l;
}
/// One token is a product for which there is a kernel of its own, 300 more than a block.
constexpr Eigen::Index n = 43, k = 70, rank = 5;

LoraLinear layer_of(bool packed, const LoraOptions& options) {
  const RowMajorMatrix w = random_matrix(n, k, 1, 0.1F);
  return packed ? LoraLinear("layer", nf4(w), options) : LoraLinear("layer", w, options);
}
Eigen::MatrixXd weights_of(const LoraLinear& layer) {
  return layer.is_packed() ? Eigen::MatrixXd(layer.packed().dequantize().cast<double>())
                           : Eigen::MatrixXd(layer.dense().cast<double>());
}
struct Gradients {
  Eigen::Map<RowMajorMatrix> a, da;
  Eigen::Map<Eigen::MatrixXf> b, db;
};
Gradients gradients_of(LoraLinear& layer) {
  Parameters p;
  layer.append_parameters("x.", p);
  EXPECT_EQ(p.size(), 2U);
  EXPECT_EQ(p[0].name, "x.lora_A");
  EXPECT_EQ(p[1].name, "x.lora_B");
  EXPECT_EQ(count(p), static_cast<std::size_t>((n + k) * rank));
  return {{p[0].value, rank, k}, {p[0].gradient, rank, k}, {p[1].value, n, rank}, {p[1].gradient, n, rank}};
}
LoraOptions options_of(float dropout = 0.0F) {
  LoraOptions o;
  o.rank = rank;
  o.alpha = 7.0;
  o.dropout = dropout;
  return o;
}

TEST(TrainLora, ForwardAndBackwardAreTheNaiveOnes) {
  for (const bool packed : {false, true})
    for (const Eigen::Index tokens : {1, 17, 300})
      for (const bool stabilized : {false, true}) {
        LoraOptions options = options_of();
        options.rank_stabilized = stabilized;
        LoraLinear layer = layer_of(packed, options);
        layer.set_low_rank(random_low_rank(n, k, rank, options.scale()));
        const double scale = stabilized ? 7.0 / std::sqrt(5.0) : 7.0 / 5.0;
        const Eigen::MatrixXd w = weights_of(layer);
        const Eigen::MatrixXf x = random_matrix(k, tokens, 3), dy = random_matrix(n, tokens, 4);
        const Eigen::MatrixXf residual = random_matrix(n, tokens, 5);
        Eigen::MatrixXf y(n, tokens), dx(k, tokens);
        layer.forward(x, y, {}, Epilogue().add(residual));
        const Gradients g = gradients_of(layer);
        const Eigen::MatrixXd a = g.a.cast<double>(), b = g.b.cast<double>(), xd = x.cast<double>(),
                              dyd = dy.cast<double>();
        const Eigen::MatrixXd whole = w + scale * b * a;
        // Sums of at most 300 products of size about 1 in floats: 300 * 2^-24 of the terms' sizes.
        const double tolerance = 1e-3;
        EXPECT_LE((y.cast<double>() - whole * xd - residual.cast<double>()).cwiseAbs().maxCoeff(), tolerance);
        MatrixRef out(dx);
        layer.backward(x, dy, &out, Gradient::set, {});
        EXPECT_LE((dx.cast<double>() - whole.transpose() * dyd).cwiseAbs().maxCoeff(), tolerance);
        EXPECT_LE((g.db.cast<double>() - scale * dyd * (a * xd).transpose()).cwiseAbs().maxCoeff(), tolerance);
        EXPECT_LE((g.da.cast<double>() - scale * (b.transpose() * dyd) * xd.transpose()).cwiseAbs().maxCoeff(),
                  tolerance);
        // Added, of all three.
        const Eigen::MatrixXf da = g.da, db = g.db, once = dx;
        layer.backward(x, dy, &out, Gradient::add, {});
        EXPECT_LE((dx - 2.0F * once).cwiseAbs().maxCoeff(), 1e-3F);
        EXPECT_LE((Eigen::MatrixXf(g.da) - 2.0F * da).cwiseAbs().maxCoeff(), 1e-3F);
        EXPECT_LE((Eigen::MatrixXf(g.db) - 2.0F * db).cwiseAbs().maxCoeff(), 1e-3F);
        layer.backward(x, dy, nullptr, Gradient::set, {});
      }
}

TEST(TrainLora, GradientsAreFiniteDifferencesWithDropoutToo) {
  for (const bool packed : {false, true})
    for (const float dropout : {0.0F, 0.25F}) {
      LoraLinear layer = layer_of(packed, options_of(dropout));
      layer.set_low_rank(random_low_rank(n, k, rank, layer.options().scale()));
      layer.begin_step(9);
      const Eigen::Index tokens = 6;
      Eigen::MatrixXf x = random_matrix(k, tokens, 3);
      const Eigen::MatrixXf dy = random_matrix(n, tokens, 4);
      const auto loss = [&] {
        Eigen::MatrixXf y(n, tokens);
        layer.forward(x, y, {});
        return (y.cast<double>().array() * dy.cast<double>().array()).sum();
      };
      Eigen::MatrixXf dx(k, tokens);
      MatrixRef out(dx);
      layer.backward(x, dy, &out, Gradient::set, {});
      const Gradients g = gradients_of(layer);
      // The loss is linear in each element, so a large step is exact but for the rounding of y, about 2e-7 * sqrt(300).
      const auto check = [&](float* value, float gradient, const char* what) {
        const float kept = *value, step = 1.0F;
        *value = kept + step;
        const double above = loss();
        *value = kept - step;
        const double below = loss();
        *value = kept;
        EXPECT_NEAR(static_cast<double>(gradient), (above - below) / 2.0, 1e-4 + 1e-4 * std::fabs(above)) << what;
      };
      for (Eigen::Index i = 0; i < 40; ++i) {
        const Eigen::Index at = i * 7919;
        check(x.data() + at % x.size(), dx.data()[at % x.size()], "x");
        Gradients m = g;
        check(m.a.data() + at % m.a.size(), g.da.data()[at % m.a.size()], "A");
        check(m.b.data() + at % m.b.size(), g.db.data()[at % m.b.size()], "B");
      }
    }
}

TEST(TrainLora, DropoutIsDrawnByStepAndNameAndScalesWhatItKeeps) {
  LoraOptions options = options_of(0.25F);
  options.alpha = static_cast<double>(rank);
  options.rank = rank;
  // y = B A dropout(x) with x = 1, A's row 0 a selector of one input: y shows that input's mask.
  LoraLinear layer("layer", RowMajorMatrix(RowMajorMatrix::Zero(n, k)), options);
  LoraLinear other("other", RowMajorMatrix(RowMajorMatrix::Zero(n, k)), options);
  LowRank l;
  l.a = RowMajorMatrix::Zero(rank, k);
  l.a(0, 11) = 1.0F;
  l.b = RowMajorMatrix::Zero(n, rank);
  l.b(0, 0) = 1.0F;
  layer.set_low_rank(l);
  other.set_low_rank(l);
  const Eigen::Index tokens = 4000;
  const Eigen::MatrixXf x = Eigen::MatrixXf::Ones(k, tokens);
  Eigen::MatrixXf first(n, tokens), second(n, tokens);
  layer.begin_step(1);
  layer.forward(x, first, {});
  ThreadPool pool(3);
  TrainOptions threads;
  threads.pool = &pool;
  layer.forward(x, second, threads);
  EXPECT_EQ(first, second);
  // Each kept value is 1 / 0.75; their number is binomial: 3000 +- 5 standard deviations of 27.
  const auto kept = (first.row(0).array() != 0.0F).count();
  EXPECT_NEAR(static_cast<double>(kept), 3000.0, 140.0);
  EXPECT_EQ((first.row(0).array() == 65536.0F / 49152.0F).count(), kept);
  layer.begin_step(2);
  layer.forward(x, second, {});
  EXPECT_NE(first, second);
  other.begin_step(1);
  other.forward(x, second, {});
  EXPECT_NE(first, second);
  layer.set_dropout(false);
  layer.forward(x, second, {});
  EXPECT_TRUE((second.row(0).array() == 1.0F).all());
}

TEST(TrainLora, PartsOfABatchHaveTheMasksOfTheWhole) {
  LoraLinear layer = layer_of(true, options_of(0.25F));
  layer.set_low_rank(random_low_rank(n, k, rank, layer.options().scale()));
  layer.begin_step(3);
  // The same tokens twice: what differs between the halves are the masks.
  Eigen::MatrixXf x(k, 80), dy(n, 80);
  x << random_matrix(k, 40, 3), random_matrix(k, 40, 3);
  dy << random_matrix(n, 40, 4), random_matrix(n, 40, 4);
  Eigen::MatrixXf whole(n, 80), whole_dx(k, 80);
  layer.forward(x, whole, {});
  MatrixRef to(whole_dx);
  layer.backward(x, dy, &to, Gradient::set, {});
  EXPECT_NE(Eigen::MatrixXf(whole.leftCols(40)), Eigen::MatrixXf(whole.rightCols(40)));
  EXPECT_NE(Eigen::MatrixXf(whole_dx.leftCols(40)), Eigen::MatrixXf(whole_dx.rightCols(40)));
  for (const Eigen::Index first : {0, 40}) {
    TrainOptions part;
    part.first_column = first;
    Eigen::MatrixXf y(n, 40), dx(k, 40);
    layer.forward(x.middleCols(first, 40), y, part);
    MatrixRef part_to(dx);
    layer.backward(x.middleCols(first, 40), dy.middleCols(first, 40), &part_to, Gradient::set, part);
    EXPECT_EQ(y, Eigen::MatrixXf(whole.middleCols(first, 40)));
    EXPECT_EQ(dx, Eigen::MatrixXf(whole_dx.middleCols(first, 40)));
  }
}

TEST(TrainLora, StartsAsTheFrozenWeightsAndRoundsToBfloat16) {
  LoraOptions options = options_of();
  options.values = Format::bf16;
  LoraLinear layer = layer_of(true, options);
  const Eigen::MatrixXf x = random_matrix(k, 20, 3);
  Eigen::MatrixXf y(n, 20), plain(n, 20);
  layer.forward(x, y, {});
  matmul(layer.packed(), x, plain);
  EXPECT_EQ(y, plain);
  const Gradients g = gradients_of(layer);
  EXPECT_TRUE((g.b.array() == 0.0F).all());
  const float bound = 1.0F / std::sqrt(static_cast<float>(k));
  EXPECT_LE(g.a.cwiseAbs().maxCoeff(), bound);
  EXPECT_GE(g.a.cwiseAbs().maxCoeff(), 0.9F * bound);
  // Trained on what a bf16 file holds.
  layer.set_low_rank(random_low_rank(n, k, rank, options.scale()));
  layer.forward(x, y, {});
  LoraOptions plain_options = options;
  plain_options.values = Format::fp32;
  LoraLinear stored = layer_of(true, plain_options);
  const LowRank l = layer.low_rank();
  stored.set_low_rank(l);
  stored.forward(x, plain, {});
  EXPECT_EQ(y, plain);
  for (Eigen::Index i = 0; i < l.a.size(); ++i)
    EXPECT_EQ(l.a.data()[i], float_from_bf16(bf16_from_float(l.a.data()[i])));
  // Another scale in, the same product out.
  LowRank rescaled = l;
  rescaled.scale = 2.0 * options.scale();
  stored.set_low_rank(rescaled);
  EXPECT_EQ(stored.low_rank().b, RowMajorMatrix(2.0F * l.b));
}

TEST(TrainLora, BitsDoNotDependOnThreadsAndBadInputsAreNamed) {
  LoraLinear layer = layer_of(true, options_of(0.1F));
  layer.set_low_rank(random_low_rank(n, k, rank, layer.options().scale()));
  const Eigen::MatrixXf x = random_matrix(k, 300, 3), dy = random_matrix(n, 300, 4);
  Eigen::MatrixXf dx(k, 300), again(k, 300);
  MatrixRef first(dx), second(again);
  layer.backward(x, dy, &first, Gradient::set, {});
  const Gradients g = gradients_of(layer);
  const Eigen::MatrixXf da = g.da, db = g.db;
  Parameters p;
  layer.append_parameters("", p);
  zero_gradients(p);
  ThreadPool pool(3);
  TrainOptions threads;
  threads.pool = &pool;
  layer.backward(x, dy, &second, Gradient::set, threads);
  EXPECT_EQ(dx, again);
  EXPECT_EQ(Eigen::MatrixXf(g.da), da);
  EXPECT_EQ(Eigen::MatrixXf(g.db), db);

  Eigen::MatrixXf y(n, 300), wrong(n, 299);
  EXPECT_THROW(layer.forward(x, wrong, {}), InvalidArgument);
  EXPECT_THROW(layer.forward(dy, y, {}), InvalidArgument);
  EXPECT_THROW(layer.backward(x, wrong, nullptr, Gradient::set, {}), InvalidArgument);
  MatrixRef bad(wrong);
  EXPECT_THROW(layer.backward(x, dy, &bad, Gradient::set, {}), InvalidArgument);
  EXPECT_THROW(layer.set_low_rank(random_low_rank(n, k, rank + 1, 1.0)), InvalidArgument);
  EXPECT_THROW(layer.set_low_rank(random_low_rank(n + 1, k, rank, 1.0)), InvalidArgument);
  LowRank nan = random_low_rank(n, k, rank, 1.0);
  nan.a(0, 0) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(layer.set_low_rank(nan), InvalidArgument);
  for (const auto& change : {+[](LoraOptions& o) { o.rank = 0; }, +[](LoraOptions& o) { o.dropout = 1.0F; },
                             +[](LoraOptions& o) { o.dropout = -0.1F; },
                             +[](LoraOptions& o) { o.alpha = std::numeric_limits<double>::infinity(); },
                             +[](LoraOptions& o) { o.values = Format::int8; }}) {
    LoraOptions o = options_of();
    change(o);
    EXPECT_THROW(layer_of(false, o), InvalidArgument);
  }
}

}  // namespace
