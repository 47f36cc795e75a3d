// Parameters and the dense linear layer.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "nibble/core/thread_pool.hpp"
#include "nibble/train/linear_layer.hpp"
#include "nibble/train/parameters.hpp"

namespace {

using namespace nibble;

std::vector<float> random_floats(unsigned seed, std::size_t n) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

template <class F>
void expect_error(F&& f, const std::string& part) {
  try {
    f();
    ADD_FAILURE() << "no error with '" << part << "'";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

/// Blocks whose sizes lie on both sides of a chunk's.
struct Blocks {
  std::vector<std::vector<float>> values, gradients;
  Parameters parameters;

  explicit Blocks(const std::vector<std::size_t>& sizes) {
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      values.push_back(random_floats(static_cast<unsigned>(2 * i), sizes[i]));
      gradients.push_back(random_floats(static_cast<unsigned>(2 * i + 1), sizes[i]));
    }
    for (std::size_t i = 0; i < sizes.size(); ++i)
      parameters.push_back({"block." + std::to_string(i), values[i].data(), gradients[i].data(), sizes[i]});
  }
};

const std::vector<std::size_t> sizes = {0, 1, 7, 16383, 16384, 16385, 50001};

TEST(Parameters, NormIsTheNaiveOneForAnyThreads) {
  Blocks b(sizes);
  long double want = 0;
  for (const auto& g : b.gradients)
    for (const float x : g) want += static_cast<long double>(x) * static_cast<long double>(x);
  const double norm = gradient_norm(b.parameters);
  // 1e5 positive terms, each sum of at most 2^13 of them and their partial sums: a relative error below 2^13 2^-53.
  EXPECT_NEAR(norm, std::sqrt(static_cast<double>(want)), norm * 0x1p-40);
  for (const int threads : {2, 3, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(gradient_norm(b.parameters, &pool), norm);
  }
  EXPECT_EQ(count(b.parameters), 0U + 1 + 7 + 16383 + 16384 + 16385 + 50001);
  ThreadPool pool(2);
  zero_gradients(b.parameters, &pool);
  EXPECT_EQ(gradient_norm(b.parameters), 0.0);
  EXPECT_EQ(gradient_norm({}), 0.0);
}

TEST(Parameters, NormOfHugeAndTinyGradients) {
  Blocks b({3, 2});
  for (auto& g : b.gradients) std::fill(g.begin(), g.end(), 3e38F);
  EXPECT_NEAR(gradient_norm(b.parameters), 3e38 * std::sqrt(5.0), 3e38 * 1e-6);
  for (auto& g : b.gradients) std::fill(g.begin(), g.end(), 1e-44F);
  EXPECT_GT(gradient_norm(b.parameters), 2e-44);
}

TEST(Parameters, Clip) {
  Blocks b(sizes), kept(sizes);
  const double norm = gradient_norm(b.parameters);
  EXPECT_EQ(clip_gradients(b.parameters, norm), norm);
  EXPECT_EQ(b.gradients, kept.gradients);
  ThreadPool pool(3);
  EXPECT_EQ(clip_gradients(b.parameters, 0.5, &pool), norm);
  // The factor and every product are rounded once.
  EXPECT_NEAR(gradient_norm(b.parameters), 0.5, 0.5 * 0x1p-22);
  EXPECT_EQ(b.values, kept.values);
  for (const double bad : {0.0, -1.0, std::nan("")})
    expect_error([&] { clip_gradients(b.parameters, bad); }, "max_norm");
}

TEST(Parameters, WhatIsNotFiniteIsNamed) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {std::nanf(""), inf, -inf}) {
    Blocks b(sizes);
    require_finite(b.parameters, ParameterPart::gradient);
    require_finite(b.parameters, ParameterPart::value);
    b.gradients[5][16384] = bad;
    const auto before = b.gradients[6];
    require_finite(b.parameters, ParameterPart::value);
    const char* text = "gradient of 'block.5' is ";
    expect_error([&] { require_finite(b.parameters, ParameterPart::gradient, "step 12"); }, text);
    expect_error([&] { require_finite(b.parameters, ParameterPart::gradient, "step 12"); },
                 " at element 16384 (step 12)");
    expect_error([&] { clip_gradients(b.parameters, 1.0, nullptr, "step 3"); }, " at element 16384 (step 3)");
    EXPECT_EQ(b.gradients[6], before);
    b.values[1][0] = bad;
    expect_error([&] { require_finite(b.parameters, ParameterPart::value); }, "value of 'block.1' is ");
  }
}

TEST(Parameters, Check) {
  Blocks b({4, 5});
  check(b.parameters);
  Parameters ps = b.parameters;
  ps[1].name = ps[0].name;
  expect_error([&] { check(ps); }, "two parameters are called 'block.0'");
  ps = b.parameters;
  ps[1].name.clear();
  expect_error([&] { check(ps); }, "no name");
  ps = b.parameters;
  ps[1].gradient = nullptr;
  expect_error([&] { check(ps); }, "'block.1' has no gradient");
  ps = b.parameters;
  ps[0].rate = -1.0F;
  expect_error([&] { check(ps); }, "'block.0' has rate -1");
}

// Its products are linear.hpp's, whose gradients are tested; here, that it adds, sets and leaves alone what it says.
TEST(DenseLinear, AddsItsGradients) {
  const RowMajorMatrix w = Eigen::Map<const RowMajorMatrix>(random_floats(1, 12).data(), 3, 4);
  DenseLinear layer(w);
  LinearLayer& base = layer;
  EXPECT_EQ(base.rows(), 3);
  EXPECT_EQ(base.cols(), 4);
  Parameters ps;
  base.append_parameters("up.", ps);
  ASSERT_EQ(ps.size(), 1U);
  EXPECT_EQ(ps[0].name, "up.weight");
  EXPECT_EQ(ps[0].size, 12U);
  EXPECT_EQ(ps[0].value, layer.weight().data());
  EXPECT_EQ(gradient_norm(ps), 0.0);

  const Eigen::MatrixXf x = Eigen::MatrixXf::Random(4, 20), dy = Eigen::MatrixXf::Random(3, 20);
  const Eigen::MatrixXf residual = Eigen::MatrixXf::Random(3, 20);
  Eigen::MatrixXf y(3, 20), dx = Eigen::MatrixXf::Ones(4, 20);
  base.forward(x, y, {}, Epilogue().add(residual));
  // Sums of 4 products of size about 1.
  EXPECT_TRUE(y.isApprox(w * x + residual, 1e-5F));
  MatrixRef to(dx);
  base.backward(x, dy, &to, Gradient::add, {});
  const Eigen::MatrixXf want = w.transpose() * dy;
  EXPECT_LE((dx - want - Eigen::MatrixXf::Ones(4, 20)).cwiseAbs().maxCoeff(), 1e-5F);
  base.backward(x, dy, &to, Gradient::set, {});
  EXPECT_LE((dx - want).cwiseAbs().maxCoeff(), 1e-5F);
  base.backward(x, dy, nullptr, Gradient::set, {});
  EXPECT_LE((layer.gradient() - 3.0F * dy * x.transpose()).cwiseAbs().maxCoeff(), 1e-4F);

  const Eigen::MatrixXf odd = Eigen::MatrixXf::Zero(5, 20);
  expect_error([&] { base.backward(odd, dy, nullptr, Gradient::set, {}); }, "x is 5 x 20, expected 4 x 20");
  expect_error([&] { base.backward(x, odd, nullptr, Gradient::set, {}); }, "dy is 5 x 20, expected 3 x 20");
}

TEST(DenseLinear, Frozen) {
  DenseLinear layer(RowMajorMatrix::Identity(3, 3), false);
  Parameters ps;
  layer.append_parameters("w.", ps);
  EXPECT_TRUE(ps.empty());
  EXPECT_EQ(layer.gradient().size(), 0);
  const Eigen::MatrixXf x = Eigen::MatrixXf::Random(3, 5);
  Eigen::MatrixXf dx(3, 5);
  MatrixRef to(dx);
  layer.backward(x, x, &to, Gradient::set, {});
  EXPECT_EQ(dx, x);
}

}  // namespace
