// AdamW against its equations in double, its 8-bit moments against plain quantization, and schedules.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "nibble/core/thread_pool.hpp"
#include "nibble/train/optimizer.hpp"
#include "nibble/train/schedule.hpp"

namespace {

using namespace nibble;

template <class F>
void expect_error(F&& f, const std::string& part) {
  try {
    f();
    ADD_FAILURE() << "no error with '" << part << "'";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

std::vector<float> random_floats(std::mt19937& random, std::size_t n, float size = 1.0F) {
  std::normal_distribution<float> normal(0.0F, size);
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

struct Blocks {
  std::vector<std::vector<float>> values, gradients;
  Parameters parameters;

  explicit Blocks(const std::vector<std::size_t>& sizes) {
    std::mt19937 random(1);
    for (const std::size_t n : sizes) {
      values.push_back(random_floats(random, n));
      gradients.emplace_back(n);
    }
    for (std::size_t i = 0; i < sizes.size(); ++i)
      parameters.push_back({"block." + std::to_string(i), values[i].data(), gradients[i].data(), sizes[i]});
  }
  /// Gradients of a step: sizes differ by powers of ten from element to element.
  void draw(unsigned step) {
    std::mt19937 random(1000 + step);
    std::normal_distribution<float> normal;
    for (auto& block : gradients)
      for (std::size_t i = 0; i < block.size(); ++i)
        block[i] = normal(random) * std::pow(10.0F, -static_cast<float>(i % 5));
  }
};

TEST(DynamicMap, LookupIsTheSearch) {
  for (const bool with_sign : {true, false}) {
    const detail::DynamicEncoder encode(with_sign);
    const auto& map = encode.map();
    const auto same = [&](float x) {
      if (x >= (with_sign ? -1.0F : 0.0F) && x <= 1.0F) {
        ASSERT_EQ(encode(x), detail::nearest_in_map(map, x)) << x;
      }
    };
    // All 2^16 leading bits, at both ends of what shares them; every value and every midpoint with its neighbours.
    for (std::uint32_t high = 0; high < 0x10000; ++high)
      for (const std::uint32_t low : {0U, 1U, 0x7FFFU, 0xFFFFU}) same(detail::float_from_bits(high << 16 | low));
    for (std::size_t c = 0; c < 256; ++c) {
      EXPECT_EQ(encode(map[c]), c);
      if (c == 255) break;
      EXPECT_LT(map[c], map[c + 1]);
      float x = static_cast<float>((static_cast<double>(map[c]) + static_cast<double>(map[c + 1])) / 2.0);
      for (int i = 0; i < 3; ++i) x = std::nextafter(x, -2.0F);
      for (int i = 0; i < 7; ++i, x = std::nextafter(x, 2.0F)) same(x);
    }
  }
  // The unsigned map by its definition: middles of 2^(e + 1) equal parts of (0.1, 1) 10^(e - 6).
  const detail::DynamicEncoder encode(false);
  std::vector<double> want = {0.0, 1.0};
  for (int e = 0; e < 7; ++e)
    for (int i = 0, parts = 2 << e; i < parts; ++i)
      want.push_back((0.1 + 0.9 * (i + 0.5) / parts) * std::pow(10.0, e - 6));
  std::sort(want.begin(), want.end());
  ASSERT_EQ(want.size(), 256U);
  for (std::size_t c = 0; c < 256; ++c)
    EXPECT_NEAR(static_cast<double>(encode.map()[c]), want[c], want[c] * 0x1p-23);
}

/// Algorithm 2 in double.
struct Naive {
  std::vector<double> p, m, v;
  void step(const std::vector<float>& gradient, int t, double rate, double decay, double scale,
            const AdamWOptions& o) {
    for (std::size_t i = 0; i < p.size(); ++i) {
      const double g = static_cast<double>(gradient[i]) * scale;
      m[i] = o.beta1 * m[i] + (1.0 - o.beta1) * g;
      v[i] = o.beta2 * v[i] + (1.0 - o.beta2) * g * g;
      const double mh = m[i] / (1.0 - std::pow(o.beta1, t)), vh = v[i] / (1.0 - std::pow(o.beta2, t));
      p[i] -= rate * (mh / (std::sqrt(vh) + o.epsilon) + decay * p[i]);
    }
  }
};

TEST(AdamW, IsItsEquations) {
  Blocks b({1, 15, 16, 37, 20000});
  b.parameters[1].decay = false;
  b.parameters[3].rate = 0.25F;
  AdamWOptions o;
  o.beta2 = 0.95;
  o.weight_decay = 0.1;
  AdamW adam(b.parameters, o);
  std::vector<Naive> naive;
  for (const auto& v : b.values)
    naive.push_back({{v.begin(), v.end()}, std::vector<double>(v.size()), std::vector<double>(v.size())});
  constexpr int steps = 20;
  ThreadPool pool(2);
  for (int t = 1; t <= steps; ++t) {
    b.draw(static_cast<unsigned>(t));
    double squares = 0.0;
    for (const auto& g : b.gradients)
      for (const float x : g) squares += static_cast<double>(x) * static_cast<double>(x);
    const double norm = std::sqrt(squares), max_norm = t % 2 == 0 ? 1.0 : 0.0;
    for (std::size_t i = 0; i < naive.size(); ++i)
      naive[i].step(b.gradients[i], t, i == 3 ? 0.0025 : 0.01, i == 1 ? 0.0 : 0.1,
                    max_norm == 0.0 ? 1.0 : 1.0 / norm, o);
    EXPECT_NEAR(adam.step(0.01, max_norm, &pool), norm, norm * 1e-12);
  }
  EXPECT_EQ(adam.steps(), 20U);
  // A step changes p by at most 0.01 / sqrt(0.05): its relative error of 10 ulp, grown by what cancels in m (taken as tenfold),
  // and p's own rounding of 2^-24 at size 4, twenty times.
  const double tolerance = steps * (100.0 * 0.045 * 0x1p-24 + 4.0 * 0x1p-24);
  ASSERT_LT(tolerance, 1e-4);
  for (std::size_t i = 0; i < naive.size(); ++i)
    for (std::size_t e = 0; e < naive[i].p.size(); ++e)
      ASSERT_NEAR(static_cast<double>(b.values[i][e]), naive[i].p[e], tolerance) << i << " " << e;
}

TEST(AdamW, SameBitsForAnyThreads) {
  for (const bool eight_bit : {false, true}) {
    AdamWOptions o;
    o.eight_bit = eight_bit;
    std::vector<std::vector<float>> want;
    for (const int threads : {1, 2, 3}) {
      Blocks b({5, 4096, 70001});
      AdamW adam(b.parameters, o);
      ThreadPool pool(threads);
      for (unsigned t = 0; t < 3; ++t) {
        b.draw(t);
        adam.step(0.01, 1.0, threads == 1 ? nullptr : &pool);
      }
      if (threads == 1) want = b.values;
      EXPECT_EQ(b.values, want);
    }
  }
}

/// One step of a block with moments in 8 bits, from the definition.
void naive_eight_bit(std::vector<double>& p, const std::vector<float>& g, std::vector<std::uint8_t>& c1,
                     std::vector<std::uint8_t>& c2, std::vector<double>& a1, std::vector<double>& a2, int t,
                     double rate, const AdamWOptions& o) {
  static const std::array<float, 256> map1 = detail::make_dynamic_map(true),
                                      map2 = detail::make_dynamic_map(false);
  const auto nearest = [](const std::array<float, 256>& map, double x) {
    std::size_t best = 0;
    for (std::size_t c = 1; c < 256; ++c)
      if (std::fabs(static_cast<double>(map[c]) - x) < std::fabs(static_cast<double>(map[best]) - x)) best = c;
    return static_cast<std::uint8_t>(best);
  };
  for (std::size_t b = 0; b * 256 < p.size(); ++b) {
    const std::size_t begin = b * 256, end = std::min(begin + 256, p.size());
    std::vector<double> m, v;
    double largest1 = 0.0, largest2 = 0.0;
    for (std::size_t i = begin; i < end; ++i) {
      const auto x = static_cast<double>(g[i]);
      m.push_back(o.beta1 * static_cast<double>(map1[c1[i]]) * a1[b] + (1.0 - o.beta1) * x);
      v.push_back(o.beta2 * static_cast<double>(map2[c2[i]]) * a2[b] + (1.0 - o.beta2) * x * x);
      largest1 = std::max(largest1, std::fabs(m.back()));
      largest2 = std::max(largest2, v.back());
      p[i] -= rate * (m.back() / (1.0 - std::pow(o.beta1, t)) /
                          (std::sqrt(v.back() / (1.0 - std::pow(o.beta2, t))) + o.epsilon) +
                      o.weight_decay * p[i]);
    }
    a1[b] = largest1;
    a2[b] = largest2;
    for (std::size_t i = begin; i < end; ++i) {
      c1[i] = nearest(map1, largest1 == 0.0 ? 0.0 : m[i - begin] / largest1);
      c2[i] = nearest(map2, largest2 == 0.0 ? 0.0 : v[i - begin] / largest2);
      if (c2[i] == 0 && v[i - begin] > 0.0) c2[i] = 1;
    }
  }
}

TEST(AdamW, EightBitMomentsAreQuantizedOnes) {
  Blocks b({4096 + 300, 100});
  AdamWOptions o;
  o.eight_bit = true;
  AdamW adam(b.parameters, o);
  EXPECT_TRUE(adam.states()[0].eight_bit);
  EXPECT_FALSE(adam.states()[1].eight_bit);
  const std::size_t n = b.values[0].size();
  std::vector<double> p(b.values[0].begin(), b.values[0].end()), a1(18), a2(18);
  std::vector<std::uint8_t> c1(n, 127), c2(n, 0);
  std::size_t different = 0;
  for (int t = 1; t <= 5; ++t) {
    b.draw(static_cast<unsigned>(t));
    for (std::size_t i = 512; i < 768; ++i) b.gradients[0][i] = 0.0F;  // a block of zeros
    adam.step(0.01);
    naive_eight_bit(p, b.gradients[0], c1, c2, a1, a2, t, 0.01, o);
    const AdamWState& s = adam.states()[0];
    for (std::size_t i = 0; i < n; ++i) {
      // Float and double may lie on two sides of a midpoint, rarely; a code further never.
      EXPECT_LE(std::abs(s.first_codes[i] - c1[i]), 1);
      EXPECT_LE(std::abs(s.second_codes[i] - c2[i]), 1);
      different += s.first_codes[i] != c1[i] || s.second_codes[i] != c2[i] ? 1U : 0U;
      EXPECT_NEAR(static_cast<double>(b.values[0][i]), p[i], 1e-3);
    }
    for (std::size_t k = 0; k < 18; ++k) {
      EXPECT_NEAR(static_cast<double>(s.first[k]), a1[k], 1e-2 * a1[k]);
      EXPECT_NEAR(static_cast<double>(s.second[k]), a2[k], 1e-2 * a2[k]);
    }
    for (std::size_t i = 512; i < 768; ++i) EXPECT_TRUE(s.first_codes[i] == 127 && s.second_codes[i] == 0);
  }
  EXPECT_LT(different, n / 100);
  // What was never quantized: one step in float.
  Naive fp32{{}, std::vector<double>(100), std::vector<double>(100)};
  Blocks again({4096 + 300, 100});
  fp32.p.assign(again.values[1].begin(), again.values[1].end());
  for (int t = 1; t <= 5; ++t) {
    again.draw(static_cast<unsigned>(t));
    fp32.step(again.gradients[1], t, 0.01, o.weight_decay, 1.0, o);
  }
  for (std::size_t i = 0; i < 100; ++i) EXPECT_NEAR(static_cast<double>(b.values[1][i]), fp32.p[i], 1e-5);
}

// A gradient that comes once, small beside its block's: its second moment would be 0 in the map, and a step divided by epsilon.
TEST(AdamW, EightBitStepsStayBounded) {
  Blocks b({4096});
  for (auto& v : b.values[0]) v = 0.0F;
  AdamWOptions o;
  o.eight_bit = true;
  AdamW adam(b.parameters, o);
  for (int t = 1; t <= 50; ++t) {
    for (std::size_t i = 0; i < 4096; ++i) b.gradients[0][i] = i % 256 == 0 ? 1.0F : t == 1 ? 3e-4F : 0.0F;
    adam.step(0.01);
  }
  // 0.01 for each of the first some ten steps is what fp32 would make at most.
  for (std::size_t i = 0; i < 4096; ++i)
    ASSERT_TRUE(i % 256 == 0 || std::fabs(b.values[0][i]) < 0.2F) << b.values[0][i];
}

TEST(AdamW, EightBitStatesAreAQuarter) {
  Blocks b({320 * 320, 320});
  AdamWOptions o;
  const std::size_t fp32 = AdamW(b.parameters, o).state_bytes();
  o.eight_bit = true;
  const std::size_t eight = AdamW(b.parameters, o).state_bytes();
  EXPECT_EQ(fp32, 8U * (320 * 320 + 320));
  EXPECT_EQ(eight, 2U * 320 * 320 + 8 * 400 + 8 * 320);
  EXPECT_LT(static_cast<double>(eight) / static_cast<double>(fp32), 0.26);
}

/// Logistic regression of 16 classes on 288 noisy inputs, batch by batch: the loss over all samples at the end.
double classification_loss(bool eight_bit) {
  constexpr Eigen::Index inputs = 288, classes = 16, samples = 512, batch = 64;
  using Matrix = Eigen::MatrixXd;
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  const Matrix centers = Matrix::NullaryExpr(inputs, classes, [&] { return normal(random); });
  Matrix x = Matrix::NullaryExpr(inputs, samples, [&] { return 8.0 * normal(random); });
  for (Eigen::Index s = 0; s < samples; ++s) x.col(s) += centers.col(s % classes);
  std::vector<float> w(static_cast<std::size_t>(inputs * classes)), g(w.size());
  AdamWOptions o;
  o.eight_bit = eight_bit;
  AdamW adam({{"w", w.data(), g.data(), w.size()}}, o);
  EXPECT_EQ(adam.states()[0].eight_bit, eight_bit);
  const auto evaluate = [&](Eigen::Index first, Eigen::Index n, bool gradient) {
    const Matrix weights = Eigen::Map<const Eigen::MatrixXf>(w.data(), classes, inputs).cast<double>();
    Matrix p = weights * x.middleCols(first, n);
    double loss = 0.0;
    for (Eigen::Index s = 0; s < n; ++s) {
      const double sum = p.col(s).array().exp().sum();
      loss += std::log(sum) - p((first + s) % classes, s);
      p.col(s) = p.col(s).array().exp() / sum;
      p((first + s) % classes, s) -= 1.0;
    }
    if (gradient)
      Eigen::Map<Eigen::MatrixXf>(g.data(), classes, inputs) =
          (p * x.middleCols(first, n).transpose() / static_cast<double>(n)).cast<float>();
    return loss / static_cast<double>(n);
  };
  for (int t = 0; t < 60; ++t) {
    evaluate(t * batch % samples, batch, true);
    adam.step(1e-3);
  }
  return evaluate(0, samples, false);
}

TEST(AdamW, EightBitTrainsAsFp32) {
  const double fp32 = classification_loss(false), eight = classification_loss(true);
  EXPECT_LT(fp32, 0.75 * std::log(16.0));
  EXPECT_NEAR(eight, fp32, 0.01 * fp32);
}

TEST(AdamW, WrongGradientsChangeNothing) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const bool eight_bit : {false, true})
    for (const float bad : {std::nanf(""), inf, 1e25F}) {
      Blocks b({10, 5000});
      AdamWOptions o;
      o.eight_bit = eight_bit;
      AdamW adam(b.parameters, o);
      b.draw(1);
      adam.step(0.01);
      const auto values = b.values;
      const auto codes = adam.states()[1].first_codes;
      const auto first = adam.states()[1].first;
      b.gradients[1][4321] = bad;
      if (bad == 1e25F) {
        expect_error([&] { adam.step(0.01); }, " at step 2, expected at most 1e18");
      } else {
        expect_error([&] { adam.step(0.01); }, "gradient of 'block.1' is ");
        expect_error([&] { adam.step(0.01, 1.0); }, " at element 4321 (step 2)");
      }
      EXPECT_EQ(b.values, values);
      EXPECT_EQ(adam.states()[1].first_codes, codes);
      EXPECT_EQ(adam.states()[1].first, first);
      EXPECT_EQ(adam.steps(), 1U);
      if (bad == 1e25F) {
        adam.step(0.01, 1.0);  // clipped, it is a number like others
        for (const float v : b.values[1]) ASSERT_TRUE(std::isfinite(v));
      }
    }
}

TEST(AdamW, WrongInputs) {
  Blocks b({10, 20});
  AdamWOptions o;
  o.beta1 = 1.0;
  expect_error([&] { AdamW(b.parameters, o); }, "beta1 is 1");
  o = {};
  o.beta2 = -0.5;
  expect_error([&] { AdamW(b.parameters, o); }, "beta2 is -0.5");
  o = {};
  o.epsilon = 0.0;
  expect_error([&] { AdamW(b.parameters, o); }, "epsilon is 0");
  o = {};
  o.weight_decay = std::nan("");
  expect_error([&] { AdamW(b.parameters, o); }, "weight_decay is nan");
  Parameters twice = b.parameters;
  twice[1].name = twice[0].name;
  expect_error([&] { AdamW{twice}; }, "two parameters are called");
  AdamW adam(b.parameters);
  for (const double bad : {-1.0, std::nan("")}) {
    expect_error([&] { adam.step(bad); }, "rate is ");
    expect_error([&] { adam.step(0.1, bad); }, "max_norm is ");
  }
  auto states = adam.states();
  states.pop_back();
  expect_error([&] { adam.restore(1, states); }, "1 states for 2 parameters");
  states = adam.states();
  states[1].second.pop_back();
  expect_error([&] { adam.restore(1, states); }, "'block.1'");
  states = adam.states();
  states[0].eight_bit = true;
  expect_error([&] { adam.restore(1, states); }, "'block.0' are in 8 bits, expected fp32");
  EXPECT_EQ(adam.steps(), 0U);
}

TEST(Schedule, Kinds) {
  Schedule s;
  s.peak = 2.0;
  s.floor = 0.1;
  s.steps = 110;
  s.warmup = 10;
  s.decay = 20;
  for (const auto kind : {ScheduleKind::constant, ScheduleKind::linear, ScheduleKind::cosine, ScheduleKind::wsd}) {
    s.kind = kind;
    s.check();
    EXPECT_DOUBLE_EQ(s.rate(0), 0.2);
    EXPECT_DOUBLE_EQ(s.rate(4), 1.0);
    EXPECT_DOUBLE_EQ(s.rate(9), 2.0);
    EXPECT_DOUBLE_EQ(s.rate(10), 2.0);
    EXPECT_DOUBLE_EQ(s.rate(110), kind == ScheduleKind::constant ? 2.0 : 0.2);
    EXPECT_DOUBLE_EQ(s.rate(1000), s.rate(110));
    for (std::uint64_t i = 10; i < 110; ++i) EXPECT_LE(s.rate(i + 1), s.rate(i));
  }
  s.kind = ScheduleKind::linear;
  EXPECT_DOUBLE_EQ(s.rate(60), 1.1);
  s.kind = ScheduleKind::cosine;
  EXPECT_DOUBLE_EQ(s.rate(60), 1.1);
  EXPECT_NEAR(s.rate(35), 0.2 + 1.8 * (1.0 + std::sqrt(0.5)) / 2.0, 1e-12);
  s.kind = ScheduleKind::wsd;
  EXPECT_DOUBLE_EQ(s.rate(90), 2.0);
  EXPECT_DOUBLE_EQ(s.rate(100), 1.1);
  s.decay = 0;
  EXPECT_DOUBLE_EQ(s.rate(109), 2.0);
}

TEST(Schedule, WrongOnes) {
  Schedule s;
  s.steps = 10;
  const auto with = [&](auto change, const char* text) {
    Schedule wrong = s;
    change(wrong);
    expect_error([&] { wrong.check(); }, text);
  };
  with([](Schedule& w) { w.warmup = 11; }, "warmup is 11, expected at most 10");
  with([](Schedule& w) { w.steps = 0; }, "steps is 0");
  with([](Schedule& w) { w.floor = 1.5; }, "floor is 1.5");
  with([](Schedule& w) { w.peak = -1.0; }, "peak is -1");
  with(
      [](Schedule& w) {
        w.kind = ScheduleKind::wsd;
        w.warmup = 4;
        w.decay = 7;
      },
      "decay is 7, expected at most 6");
}

}  // namespace
