// Linear layers with more than weights: orders, rotations, static scales, outliers, biases; in the runner and in files.
#include <gtest/gtest.h>

#include <Eigen/Cholesky>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "llm/block.hpp"
#include "llm/calibrate.hpp"
#include "llm/linear.hpp"
#include "llm/model_file.hpp"
#include "llm/quantize_model.hpp"
#include "llm/runner.hpp"
#include "llm_support.hpp"

namespace {

using llm::Linear;
using llm::LinearExtras;
using llm::Token;
using nibble::Activations;
using nibble::Format;

bool same_bits(const Eigen::MatrixXf& a, const Eigen::MatrixXf& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * 4) == 0;
}

std::vector<std::uint32_t> some_order(std::size_t n, unsigned seed) {
  std::vector<std::uint32_t> order(n);
  std::iota(order.begin(), order.end(), 0U);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

nibble::PackedMatrix pack(const Eigen::MatrixXf& w, const nibble::Scheme& scheme) {
  return nibble::pack(nibble::DynamicQuantizer(scheme).quantize(w));
}

Eigen::MatrixXf logits(const llm::Model& model, const std::vector<std::size_t>& pieces, nibble::ThreadPool* pool,
                       const llm::RunnerOptions& with = {}) {
  const std::vector<Token> tokens = llm_test::some_tokens(70, model.hparams.vocabulary);
  llm::RunnerOptions options = with;
  options.context = 128;
  options.pool = pool;
  llm::Runner runner(model, options);
  auto cache = runner.new_cache();
  Eigen::MatrixXf out(static_cast<Eigen::Index>(model.hparams.vocabulary), 70);
  for (std::size_t begin = 0, p = 0; begin < tokens.size(); ++p) {
    const std::size_t n = std::min(pieces[std::min(p, pieces.size() - 1)], tokens.size() - begin);
    runner.append(cache, tokens.data() + begin, n, 0, [&](std::size_t i, const auto& l) {
      out.middleCols(static_cast<Eigen::Index>(begin + i), l.cols()) = l;
    });
    begin += n;
  }
  return out;
}

/// The model with its linears replaced: change(layer, name, weights) gives each.
template <class Change>
llm::Model changed(const llm_test::RandomModel& m, const Change& change) {
  llm::Model out = m.model;
  for (std::size_t i = 0; i < out.layers.size(); ++i) {
    llm::Layer& l = out.layers[i];
    const char* names[] = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"};
    Linear* linears[] = {&l.query, &l.key, &l.value, &l.output, &l.gate, &l.up, &l.down};
    for (std::size_t j = 0; j < 7; ++j)
      *linears[j] =
          change(i, std::string(names[j]), m.value("blk." + std::to_string(i) + "." + names[j] + ".weight"));
  }
  return out;
}

// Sums of the same products in another order: as Runner.EqualsTheTextbook, 1600 roundings.
constexpr float close = 1600.0F * 0x1p-24F;

TEST(Linear, OrdersOfInputsAreUndone) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::fp32));
  const llm::Model ordered = changed(m, [&](std::size_t i, const std::string& name, const Eigen::MatrixXf& w) {
    LinearExtras e;
    // q, k and v share an order, gate and up do not.
    e.input_order =
        some_order(static_cast<std::size_t>(w.cols()), static_cast<unsigned>(i * 10 + (name == "ffn_up" ? 1 : 0)));
    Eigen::MatrixXf stored(w.rows(), w.cols());
    for (std::size_t k = 0; k < e.input_order.size(); ++k)
      stored.col(static_cast<Eigen::Index>(k)) = w.col(static_cast<Eigen::Index>(e.input_order[k]));
    Eigen::MatrixXf undone = stored;
    undo_input_transform(e, undone);
    EXPECT_TRUE(same_bits(undone, w));
    return Linear(pack(stored, llm_test::scheme_of(Format::fp32)), e);
  });
  const Eigen::MatrixXf expected = logits(m.model, {70}, nullptr), got = logits(ordered, {70}, nullptr);
  EXPECT_FALSE(same_bits(expected, got));
  EXPECT_LT((expected - got).cwiseAbs().maxCoeff(), close);
}

TEST(Linear, RotationsOfInputsAndTheResidualStreamKeepTheFunction) {
  llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::fp32));
  for (auto& named : m.values)  // norms that commute with a rotation
    if (named.first.find("norm") != std::string::npos && named.first.compare(0, 4, "blk.") == 0)
      named.second.setOnes();
  for (llm::Layer& l : m.model.layers) l.attention_norm.setOnes(), l.ffn_norm.setOnes();
  const llm::HadamardSpec residual{48, 5};
  const auto r = llm::rotation_of(residual, 48);
  llm::Model rotated = changed(m, [&](std::size_t i, const std::string& name, const Eigen::MatrixXf& w) {
    LinearExtras e;
    Eigen::MatrixXf stored = w;
    if (name == "attn_output" || name == "ffn_down") {
      e.hadamard = {static_cast<std::size_t>(name == "ffn_down" ? 80 : 8), i};
      llm::rotation_of(e.hadamard, w.cols())->rotate_inputs(stored);
      if (name == "ffn_down") {
        e.input_order = some_order(80, 3);
        Eigen::MatrixXf order = stored;
        for (Eigen::Index k = 0; k < 80; ++k)
          stored.col(k) = order.col(static_cast<Eigen::Index>(e.input_order[static_cast<std::size_t>(k)]));
      }
      Eigen::MatrixXf undone = stored;
      undo_input_transform(e, undone);
      // Each value is rounded to float twice, from sums in double of at most 80 terms of about w's size.
      EXPECT_LT((undone - w).cwiseAbs().maxCoeff(), 16.0F * 0x1p-24F * w.cwiseAbs().maxCoeff());
      r->rotate_outputs(stored);
    } else {
      r->rotate_inputs(stored);
    }
    return Linear(pack(stored, llm_test::scheme_of(Format::fp32)), e);
  });
  rotated.hparams.rotation = residual;
  const Eigen::MatrixXf expected = logits(m.model, {70}, nullptr);
  EXPECT_LT((expected - logits(rotated, {70}, nullptr)).cwiseAbs().maxCoeff(), 2.0F * close);
  nibble::ThreadPool pool(2);
  EXPECT_TRUE(same_bits(logits(rotated, {70}, nullptr), logits(rotated, {1, 33, 7}, &pool)));
  rotated.hparams.rotation = {};
  EXPECT_GT((expected - logits(rotated, {70}, nullptr)).cwiseAbs().maxCoeff(), 0.1F) << "the test sees nothing";
}

TEST(Linear, BiasesAreAdded) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::fp32));
  Eigen::VectorXf bias = Eigen::VectorXf::LinSpaced(48, -1.0F, 1.0F);
  const llm::Model biased = changed(m, [&](std::size_t i, const std::string& name, const Eigen::MatrixXf& w) {
    LinearExtras e;
    if (i == 1 && name == "ffn_down") e.bias = bias;
    return Linear(pack(w, llm_test::scheme_of(Format::fp32)), e);
  });
  // The last block's output: the hidden state moves by the bias, everything behind is the output norm and layer.
  const std::vector<Token> tokens = {7};
  llm::RunnerOptions options;
  llm::Runner plain(m.model, options), with(biased, options);
  const auto last = [&](llm::Runner& runner) {
    auto cache = runner.new_cache();
    return Eigen::VectorXf(Eigen::Map<const Eigen::VectorXf>(
        runner.append(cache, tokens.data(), 1), static_cast<Eigen::Index>(m.model.hparams.vocabulary)));
  };
  const Eigen::VectorXf a = last(plain), b = last(with);
  // logits = E (norm(x) * w): solve for norm(x) * w by least squares, undo the weight, compare directions of x + bias.
  const Eigen::MatrixXd e = m.value("token_embd.weight").cast<double>();
  const auto hidden = [&](const Eigen::VectorXf& l) {
    const Eigen::VectorXd nw = (e.transpose() * e).ldlt().solve(e.transpose() * l.cast<double>());
    return Eigen::VectorXd(nw.cwiseQuotient(m.model.output_norm.cast<double>()));
  };
  const Eigen::VectorXd ha = hidden(a), hb = hidden(b);
  // hb is parallel to s * ha + bias for the norm s of the hidden state: fit s and the factor.
  Eigen::MatrixXd basis(48, 2);
  basis.col(0) = ha;
  basis.col(1) = bias.cast<double>();
  const Eigen::Vector2d fit = (basis.transpose() * basis).ldlt().solve(basis.transpose() * hb);
  EXPECT_LT((basis * fit - hb).norm(), 1e-3 * hb.norm());
  EXPECT_GT(fit[1], 0.01);
}

class Modes : public ::testing::TestWithParam<int> {};

/// Extras of mode p for a matrix of k inputs.
LinearExtras extras_of(int p, std::size_t k) {
  LinearExtras e;
  if (p == 0) e.activation_scales = {0.03F};
  if (p == 1) {
    e.activation_group = 16;
    for (std::size_t g = 0; g < (k + 15) / 16; ++g)
      e.activation_scales.push_back(0.02F + 0.001F * static_cast<float>(g));
  }
  if (p == 2) e.outlier_threshold = 1.5F;
  if (p == 3) {
    e.input_order = some_order(k, 4);
    e.activation_scales = {0.03F};
    e.hadamard = {k == 80 ? std::size_t{80} : std::size_t{8}, 1};
  }
  if (p == 4) {  // scales that many values exceed
    e = extras_of(1, k);
    for (float& s : e.activation_scales) s *= 0.3F;
    e.activation_outliers = true;
  }
  return e;
}

TEST_P(Modes, BitsDoNotDependOnPiecesOrThreads) {
  for (const Format format : {Format::int8, Format::int4}) {
    const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(format));
    const llm::Model model = changed(m, [&](std::size_t, const std::string&, const Eigen::MatrixXf& w) {
      return Linear(pack(w, llm_test::scheme_of(format)),
                    extras_of(GetParam(), static_cast<std::size_t>(w.cols())));
    });
    nibble::ThreadPool pool(2);
    const Eigen::MatrixXf expected = logits(model, {70}, nullptr);
    ASSERT_TRUE(expected.allFinite());
    EXPECT_FALSE(same_bits(expected, logits(m.model, {70}, nullptr)));
    EXPECT_TRUE(same_bits(expected, logits(model, {1}, nullptr)));
    EXPECT_TRUE(same_bits(expected, logits(model, {40, 1, 20, 3}, &pool)));
    if (GetParam() == 3) continue;
    // Asked for floats, or for groups, a model is what it is without scales and thresholds.
    for (const Activations a : {Activations::fp32, Activations::int8_grouped}) {
      llm::RunnerOptions options;
      options.activations = a;
      EXPECT_TRUE(same_bits(logits(model, {70}, nullptr, options), logits(m.model, {70}, nullptr, options)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Modes, ::testing::Range(0, 5));

TEST(Linear, OneScaleATokenAndOutliersByTheRunnersOptions) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::int8));
  llm::RunnerOptions exact, groups, token, apart;
  exact.activations = Activations::fp32;
  groups.activations = Activations::automatic;
  token.activations = Activations::int8;
  apart.activations = Activations::int8;
  apart.outlier_threshold = 1e-6F;  // nearly all activations are outliers: floats
  const Eigen::MatrixXf reference = logits(m.model, {70}, nullptr, exact);
  const auto error = [&](const llm::RunnerOptions& o) {
    return (logits(m.model, {70}, nullptr, o) - reference).norm() / reference.norm();
  };
  const float of_groups = error(groups), of_tokens = error(token), of_outliers = error(apart);
  EXPECT_LT(of_groups, of_tokens);
  EXPECT_LT(of_outliers, 0.7F * of_groups);  // the output layer's stay in groups
  EXPECT_LT(of_tokens, 0.05F);
}

TEST(Linear, StaticOutliersAreCloserThanClampedOnes) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::int8));
  llm::RunnerOptions exact;
  exact.activations = Activations::fp32;
  const Eigen::MatrixXf reference = logits(m.model, {70}, nullptr, exact);
  llm::OutlierCounts counts;
  const auto error = [&](bool keep) {
    const llm::Model model = changed(m, [&](std::size_t, const std::string&, const Eigen::MatrixXf& w) {
      LinearExtras e = extras_of(4, static_cast<std::size_t>(w.cols()));
      e.activation_outliers = keep;
      return Linear(pack(w, llm_test::scheme_of(Format::int8)), e);
    });
    counts = {};
    llm::RunnerOptions options;
    options.outliers = &counts;
    return (logits(model, {70}, nullptr, options) - reference).norm() / reference.norm();
  };
  const float clamped = error(false);
  EXPECT_EQ(counts.outliers, 0U);
  EXPECT_GT(counts.values, 0U);
  EXPECT_LT(error(true), 0.3F * clamped);
  EXPECT_GT(counts.share(), 0.01);
  EXPECT_LT(counts.share(), 0.9);
}

TEST(QuantizedActivations, StaticScalesEqualTheDefinition) {
  std::mt19937 random(2);
  for (const std::size_t group : {std::size_t{0}, std::size_t{16}, std::size_t{48}})
    for (const Eigen::Index k : {1, 16, 47, 100}) {
      Eigen::MatrixXf x = llm_test::random_matrix(random, k, 5, 2.0F);
      x(0, 1) = 1e9F;
      x(k - 1, 2) = std::numeric_limits<float>::quiet_NaN();
      std::vector<float> scales;
      const std::size_t groups = group == 0 ? 1 : (static_cast<std::size_t>(k) + group - 1) / group;
      for (std::size_t g = 0; g < groups; ++g) scales.push_back(0.01F * static_cast<float>(g + 1));
      nibble::QuantizedActivations q;
      q.assign_static(x, scales.data(), scales.size(), group);
      for (Eigen::Index t = 0; t < 5; ++t)
        for (Eigen::Index i = 0; i < k; ++i) {
          const std::size_t g = group == 0 ? 0 : static_cast<std::size_t>(i) / group;
          if (t == 2) {
            EXPECT_TRUE(std::isnan(q.scale(t, g)));
            continue;
          }
          EXPECT_EQ(q.scale(t, g), scales[g]);
          const float expected = std::min(127.0F, std::max(-127.0F, std::nearbyint(x(i, t) / scales[g])));
          EXPECT_EQ(static_cast<float>(q.codes(t)[i]), expected) << k << " " << group << " " << i;
        }
      // Sums of codes are right: a product with a zero point in the weights needs them.
      nibble::Scheme scheme = llm_test::scheme_of(Format::int8, nibble::Symmetry::asymmetric);
      if (group != 0) scheme.granularity = nibble::Granularity::per_group(group, 1);
      const Eigen::MatrixXf w = llm_test::random_matrix(random, 3, k, 1.0F).array() + 0.5F;
      const nibble::QuantizedTensor wq = nibble::DynamicQuantizer(scheme).quantize(w);
      Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> wd(3, k);
      wq.dequantize(wd.data());
      Eigen::MatrixXf y(3, 5);
      nibble::matmul(nibble::pack(wq), q, y);
      for (Eigen::Index t = 0; t < 5; ++t) {
        if (t == 2) {
          EXPECT_TRUE(std::isnan(y(0, 2)));
          continue;
        }
        Eigen::VectorXd xd(k);
        for (Eigen::Index i = 0; i < k; ++i)
          xd[i] = static_cast<double>(q.codes(t)[i]) *
                  static_cast<double>(scales[group == 0 ? 0 : static_cast<std::size_t>(i) / group]);
        const Eigen::VectorXd expected = wd.cast<double>() * xd;
        // Some ten roundings to float of sums no larger than the sum of magnitudes.
        const double size = (wd.cast<double>().cwiseAbs() * xd.cwiseAbs()).maxCoeff();
        EXPECT_LT((expected - y.col(t).cast<double>()).cwiseAbs().maxCoeff(), 64.0 * 0x1p-24 * (size + 1e-30));
      }
    }
  nibble::QuantizedActivations q;
  const Eigen::MatrixXf x = Eigen::MatrixXf::Ones(32, 1);
  const float bad[2] = {1.0F, 0.0F}, good[2] = {1.0F, 1.0F};
  EXPECT_THROW(q.assign_static(x, bad, 2, 16), nibble::InvalidArgument);
  EXPECT_THROW(q.assign_static(x, good, 2, 0), nibble::InvalidArgument);
  EXPECT_THROW(q.assign_static(x, good, 2, 17), nibble::InvalidArgument);
  EXPECT_NO_THROW(q.assign_static(x, good, 2, 16));
}

// The scales are those of the inputs that a naive look finds: x'' of every layer, all tokens of all windows.
TEST(Calibrate, FindsTheLargestInputs) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::int8));
  const llm::Model model = changed(m, [&](std::size_t, const std::string& name, const Eigen::MatrixXf& w) {
    LinearExtras e;
    if (name == "ffn_down") e.input_order = some_order(80, 2);
    return Linear(pack(w, llm_test::scheme_of(Format::int8)), e);
  });
  std::vector<std::vector<Token>> windows;
  for (const std::size_t n : {20, 1, 33}) windows.push_back(llm_test::some_tokens(n, 101));
  struct Look : llm::InputObserver {
    std::map<const Linear*, Eigen::VectorXf> largest;
    void see(const Linear& w, const Eigen::Ref<const Eigen::MatrixXf>& x) override {
      Eigen::VectorXf& to = largest[&w];
      if (to.size() == 0) to = Eigen::VectorXf::Zero(x.rows());
      to = to.cwiseMax(x.cwiseAbs().rowwise().maxCoeff());
    }
  } look;
  llm::RunnerOptions running;
  running.activations = Activations::fp32;
  running.observer = &look;
  llm::Runner runner(model, running);
  for (const std::vector<Token>& window : windows) {  // token by token
    auto cache = runner.new_cache();
    for (const Token& t : window) runner.append(cache, &t, 1);
  }
  nibble::ThreadPool pool(2);
  for (const std::size_t group : {0, 32}) {
    llm::CalibrateOptions options;
    options.group = group;
    options.pool = &pool;
    const std::map<std::string, LinearExtras> all = llm::calibrate(model, windows, options);
    ASSERT_EQ(all.size(), 14U);
    const auto check = [&](const std::string& name, const Linear& w) {
      const LinearExtras& e = all.at(name);
      const Eigen::VectorXf& largest = look.largest.at(&w);
      EXPECT_EQ(e.activation_group, group);
      const Eigen::Index length = group == 0 ? largest.size() : static_cast<Eigen::Index>(group);
      for (Eigen::Index k = 0, g = 0; k < largest.size(); k += length, ++g)
        EXPECT_EQ(e.activation_scales.at(static_cast<std::size_t>(g)),
                  largest.segment(k, std::min(length, largest.size() - k)).maxCoeff() / 127.0F)
            << name;
    };
    check("blk.0.attn_v.weight", model.layers[0].value);
    check("blk.1.attn_output.weight", model.layers[1].output);
    check("blk.1.ffn_down.weight", model.layers[1].down);
    EXPECT_EQ(all.at("blk.1.ffn_down.weight").input_order, some_order(80, 2));
  }
  // A percentile: that share of the magnitudes lies within, all of them counted by hand, but for one bin's width.
  struct Keep : llm::InputObserver {
    std::map<const Linear*, std::vector<float>> values;
    void see(const Linear& w, const Eigen::Ref<const Eigen::MatrixXf>& x) override {
      for (Eigen::Index t = 0; t < x.cols(); ++t)
        for (Eigen::Index k = 0; k < x.rows(); ++k) values[&w].push_back(std::fabs(x(k, t)));
    }
  } keep;
  running.observer = &keep;
  llm::Runner again(model, running);
  for (const std::vector<Token>& window : windows) {
    auto cache = again.new_cache();
    again.append(cache, window.data(), window.size());
  }
  llm::CalibrateOptions clipped;
  clipped.percentile = 95.0;
  const std::map<std::string, LinearExtras> of_share = llm::calibrate(model, windows, clipped);
  clipped.pool = &pool;
  const std::map<std::string, LinearExtras> with_threads = llm::calibrate(model, windows, clipped);
  const auto check_share = [&](const std::string& name, const Linear& w) {
    const LinearExtras& e = of_share.at(name);
    EXPECT_TRUE(e.activation_outliers);
    EXPECT_TRUE(e.same_scales(with_threads.at(name)));
    std::vector<float> all = keep.values.at(&w);
    std::sort(all.begin(), all.end());
    const float limit = 127.0F * e.activation_scales.at(0);
    const float wanted = all[static_cast<std::size_t>(0.95 * static_cast<double>(all.size() - 1))];
    // Bins are no wider than 1/2048 of the largest power of two above; two of them and a rounding.
    EXPECT_NEAR(limit, wanted, 3.0F / 1024.0F * all.back()) << name;
  };
  check_share("blk.0.attn_v.weight", model.layers[0].value);
  check_share("blk.0.attn_k.weight", model.layers[0].key);
  check_share("blk.1.ffn_up.weight", model.layers[1].up);
  check_share("blk.1.ffn_down.weight", model.layers[1].down);
  for (const double percentile : {0.0, 100.5}) {
    clipped.percentile = percentile;
    EXPECT_THROW(llm::calibrate(model, windows, clipped), nibble::InvalidArgument);
  }
  EXPECT_THROW(llm::calibrate(model, {}), nibble::InvalidArgument);
  EXPECT_THROW(llm::calibrate(model, {{1}, {}}), nibble::InvalidArgument);
  llm::CalibrateOptions odd;
  odd.group = 5;
  EXPECT_THROW(llm::calibrate(model, windows, odd), nibble::InvalidArgument);
  llm::Model broken = model;
  broken.layers[0].attention_norm[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(llm::calibrate(broken, windows), nibble::InvalidArgument);
}

// ---- Files ----

llm::Hparams file_hparams() {
  llm::Hparams h = llm_test::small_hparams(262);
  h.rotation = {16, 9};
  return h;
}

/// All kinds of extras, somewhere.
std::map<std::string, LinearExtras> some_extras() {
  std::map<std::string, LinearExtras> all;
  all["blk.0.attn_q.weight"] = extras_of(3, 48);
  all["blk.0.ffn_down.weight"] = extras_of(1, 80);
  all["blk.1.ffn_up.weight"] = extras_of(2, 48);
  all["blk.1.ffn_gate.weight"] = extras_of(4, 48);
  all["blk.1.attn_output.weight"].bias = Eigen::VectorXf::LinSpaced(48, -1.0F, 1.0F);
  all["blk.1.attn_k.weight"];  // none: not written
  return all;
}

void write(const std::string& path, const llm_test::RandomModel& m,
           const std::map<std::string, LinearExtras>& extras) {
  nibble::PackedFileWriter out(path);
  llm::add_model_data(out, m.model.hparams, llm::Vocabulary(llm_test::bpe_vocabulary({"a b", "c d"})));
  llm::add_linear_extras(out, m.model.hparams, extras);
  for (const auto& [name, w] : m.values) {
    if (w.cols() == 1)
      out.add_tensor(name, std::vector<float>(w.data(), w.data() + w.size()));
    else
      out.add(name, pack(w, llm_test::scheme_of(Format::int8)));
  }
  out.commit();
}

TEST(Files, KeepExtras) {
  const llm_test::TempFolder folder;
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(Format::int8), file_hparams());
  write(folder / "a.safetensors", m, some_extras());
  llm::Model expected = m.model;
  const auto all = some_extras();
  const auto with = [&](const Linear& l, const std::string& name) { return Linear(l.weights(), all.at(name)); };
  expected.layers[0].query = with(expected.layers[0].query, "blk.0.attn_q.weight");
  expected.layers[0].down = with(expected.layers[0].down, "blk.0.ffn_down.weight");
  expected.layers[1].up = with(expected.layers[1].up, "blk.1.ffn_up.weight");
  expected.layers[1].output = with(expected.layers[1].output, "blk.1.attn_output.weight");
  expected.layers[1].gate = with(expected.layers[1].gate, "blk.1.ffn_gate.weight");
  const Eigen::MatrixXf want = logits(expected, {70}, nullptr);
  const auto file = llm::open_model(folder / "a.safetensors");
  EXPECT_TRUE(file->has_extras());
  EXPECT_EQ(file->extras("blk.1.attn_k.weight"), nullptr);
  EXPECT_EQ(file->hparams().rotation, file_hparams().rotation);
  EXPECT_TRUE(same_bits(logits(llm::load_model(*file), {70}, nullptr), want));

  // Written again, they are still there; a GGUF is refused.
  llm::QuantizePlan same;
  same.format = llm::parse_format("int8-g16-sym");
  same.keep.push_back(llm::parse_keep("blk=same"));
  llm::quantize_to_packed(*file, folder / "b.safetensors", same, nullptr, [](const std::string&) {});
  EXPECT_TRUE(same_bits(logits(llm::load_model(*llm::open_model(folder / "b.safetensors")), {70}, nullptr), want));
  // Static scales from a calibration, into a file and back.
  const std::map<std::string, LinearExtras> scales =
      llm::calibrate(expected, {llm_test::some_tokens(30, 101)}, llm::CalibrateOptions());
  llm::quantize_to_packed(
      *file, folder / "c.safetensors", same, nullptr, [](const std::string&) {}, scales);
  const auto with_scales = llm::open_model(folder / "c.safetensors");
  for (const auto& named : scales) {
    ASSERT_NE(with_scales->extras(named.first), nullptr) << named.first;
    EXPECT_EQ(with_scales->extras(named.first)->activation_scales, named.second.activation_scales);
    EXPECT_TRUE(with_scales->extras(named.first)->same_input(named.second));
  }
  EXPECT_TRUE(
      with_scales->extras("blk.1.attn_output.weight")->bias.isApprox(all.at("blk.1.attn_output.weight").bias));
  EXPECT_THROW(llm::quantize_to_gguf(*file, folder / "b.gguf", same, [](const std::string&) {}),
               nibble::InvalidArgument);
}

// A block of floats meets inputs as they come, whatever the order or rotation that its file stores it in.
TEST(Files, BlocksOfFloatsHaveTheirInputsUndone) {
  const llm_test::TempFolder folder;
  const llm_test::RandomModel m =
      llm_test::random_model(llm_test::scheme_of(Format::fp32), llm_test::small_hparams(262));
  nibble::PackedFileWriter out(folder / "a.safetensors");
  llm::add_model_data(out, m.model.hparams, llm::Vocabulary(llm_test::bpe_vocabulary({"a b", "c d"})));
  std::map<std::string, LinearExtras> extras;
  extras["blk.0.ffn_down.weight"].input_order = some_order(80, 6);
  extras["blk.0.attn_q.weight"].hadamard = {16, 3};
  extras["blk.1.ffn_up.weight"] = extras_of(3, 48);
  llm::add_linear_extras(out, m.model.hparams, extras);
  for (const auto& [name, w] : m.values) {
    if (w.cols() == 1) {
      out.add_tensor(name, std::vector<float>(w.data(), w.data() + w.size()));
      continue;
    }
    Eigen::MatrixXf stored = w;
    const auto e = extras.find(name);
    if (e != extras.end() && e->second.hadamard.block != 0)
      llm::rotation_of(e->second.hadamard, w.cols())->rotate_inputs(stored);
    if (e != extras.end() && !e->second.input_order.empty()) {
      const Eigen::MatrixXf rotated = stored;
      for (std::size_t k = 0; k < e->second.input_order.size(); ++k)
        stored.col(static_cast<Eigen::Index>(k)) =
            rotated.col(static_cast<Eigen::Index>(e->second.input_order[k]));
    }
    out.add(name, pack(stored, llm_test::scheme_of(Format::fp32)));
  }
  out.commit();
  const auto file = llm::open_model(folder / "a.safetensors");
  for (std::size_t layer = 0; layer < 2; ++layer) {
    const llm::FloatBlock block = llm::load_block(*file, layer);
    for (const llm::BlockMatrix b : llm::block_matrices) {
      const std::string name = llm::tensor_name(layer, b);
      const Eigen::MatrixXf& w = m.value(name);
      // As RotationsOfInputsAndTheResidualStreamKeepTheFunction; without a rotation exact.
      const auto e = extras.find(name);
      const float tolerance =
          e != extras.end() && e->second.hadamard.block != 0 ? 16.0F * 0x1p-24F * w.cwiseAbs().maxCoeff() : 0.0F;
      EXPECT_LE((block[b] - w).cwiseAbs().maxCoeff(), tolerance) << name;
    }
  }
}

TEST(Files, WithoutExtrasAreAsBefore) {
  const llm_test::TempFolder folder;
  const llm_test::RandomModel m =
      llm_test::random_model(llm_test::scheme_of(Format::int8), llm_test::small_hparams(262));
  write(folder / "a.safetensors", m, {});
  const nibble::PackedFile file = nibble::PackedFile::open(folder / "a.safetensors");
  EXPECT_EQ(file.find_metadata("linear"), nullptr);
  EXPECT_EQ(file.find_tensor("linear.version"), nullptr);
  EXPECT_FALSE(llm::open_model(folder / "a.safetensors")->has_extras());
}

TEST(Files, RefuseBrokenExtras) {
  const llm_test::TempFolder folder;
  llm_test::RandomModel m =
      llm_test::random_model(llm_test::scheme_of(Format::int8), llm_test::small_hparams(262));
  const auto try_extras = [&](const LinearExtras& e) {
    write(folder / "a.safetensors", m, {{"blk.0.attn_q.weight", e}});
    llm::load_model(*llm::open_model(folder / "a.safetensors"));
  };
  LinearExtras good = extras_of(1, 48);
  EXPECT_NO_THROW(try_extras(good));
  LinearExtras e = good;
  e.activation_scales[1] = 0.0F;
  EXPECT_THROW(try_extras(e), nibble::FormatError);
  e.activation_scales[1] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(try_extras(e), nibble::FormatError);
  e = good;
  e.activation_scales.pop_back();
  EXPECT_THROW(try_extras(e), nibble::FormatError);
  e = good;
  e.activation_group = 17;
  EXPECT_THROW(try_extras(e), nibble::FormatError);
  e = {};
  e.input_order = some_order(48, 1);
  EXPECT_NO_THROW(try_extras(e));
  e.input_order[3] = e.input_order[4];
  EXPECT_THROW(try_extras(e), nibble::FormatError);
  e.input_order[3] = 48;
  EXPECT_THROW(try_extras(e), nibble::FormatError);
  e = {};
  e.bias = Eigen::VectorXf::Zero(47);
  EXPECT_THROW(try_extras(e), nibble::FormatError);
  e = {};
  e.hadamard.block = 5;
  EXPECT_THROW(try_extras(e), nibble::FormatError);
  e = {};
  e.outlier_threshold = -1.0F;
  EXPECT_THROW(try_extras(e), nibble::FormatError);

  const auto with_metadata = [&](const std::string& text, bool mark = true) {
    nibble::PackedFileWriter out(folder / "b.safetensors");
    out.add("w", m.model.layers[0].query.weights());
    out.add_metadata("linear", text);
    const std::vector<std::uint32_t> version = {mark ? 1U : 2U};
    nibble::Buffer bytes(4);
    std::memcpy(bytes.mutable_data(), version.data(), 4);
    out.add_tensor("linear.version", nibble::SafetensorsType::u32, {1}, std::move(bytes));
    out.commit();
    return llm::linear_extras_of(nibble::PackedFile::open(folder / "b.safetensors"));
  };
  EXPECT_EQ(with_metadata(R"({"version": 1, "linears": {"w": {"outlier_threshold": 6}}})").size(), 1U);
  for (const char* bad :
       {"", "[]", R"({"version": 1})", R"({"version": 1, "linears": {"x": {}}})",
        R"({"version": 1, "linears": {"w": 1}})", R"({"version": 1, "linears": {"w": {"bias": true}}})",
        R"({"version": 1, "linears": {"w": {"outlier_threshold": "6"}}})",
        R"({"version": 1, "linears": {"w": {"static": 3}}})",
        R"({"version": 1, "linears": {"w": {"hadamard": {"block": 0}}}})",
        R"({"version": 1, "linears": {"w": {"hadamard": {"block": -16}}}})"})
    EXPECT_THROW(with_metadata(bad), nibble::FormatError) << bad;
  for (const char* newer : {R"({"version": 2, "linears": {}})", R"({"linears": {}})",
                            R"({"version": 1, "linears": {"w": {"new": 1}}})",
                            R"({"version": 1, "linears": {"w": {"hadamard": {"block": 16, "new": 1}}}})"})
    EXPECT_THROW(with_metadata(newer), nibble::Unsupported) << newer;
  EXPECT_THROW(with_metadata(R"({"version": 1, "linears": {}})", false), nibble::Unsupported);
}

}  // namespace
