// The KV cache and attention over it: values against double, and the same bits for any block, batch, pool and ISA.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "nibble/core/thread_pool.hpp"
#include "nibble/kernels/scalar/panel.hpp"
#include "nibble/nn/attention.hpp"
#include "nibble/nn/gate.hpp"
#include "nibble/nn/norm.hpp"
#include "nibble/nn/rope.hpp"
#include "nibble/nn/softmax.hpp"

namespace {

using namespace nibble;  // NOLINT: a test's own namespace
using Matrix = Eigen::MatrixXf;

constexpr KvFormat formats[] = {KvFormat::fp32, KvFormat::fp16, KvFormat::int8, KvFormat::int4};

Matrix random_matrix(std::uint32_t seed, std::size_t rows, std::size_t cols, float size = 1.0F) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0F, size);
  Matrix m(static_cast<Eigen::Index>(rows), static_cast<Eigen::Index>(cols));
  for (float& v : m.reshaped()) v = normal(engine);
  return m;
}
bool same_bits(const Matrix& a, const Matrix& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(float)) == 0;
}
Eigen::Index index(std::size_t n) { return static_cast<Eigen::Index>(n); }

/// Keys, values and queries of `tokens` tokens.
struct Sequence {
  KvCacheOptions shape;
  std::size_t heads;
  Matrix keys, values, queries;

  Sequence(KvFormat format, std::size_t heads_in, std::size_t kv_heads, std::size_t head_size, std::size_t tokens,
           std::uint32_t seed = 1)
      : heads(heads_in) {
    shape.layers = 2;
    shape.kv_heads = kv_heads;
    shape.head_size = head_size;
    shape.capacity = tokens + 3;
    shape.format = format;
    shape.step = tokens;
    keys = random_matrix(seed, kv_heads * head_size, tokens);
    values = random_matrix(seed + 1, kv_heads * head_size, tokens);
    queries = random_matrix(seed + 2, heads * head_size, tokens, 2.0F / std::sqrt(static_cast<float>(head_size)));
  }
  std::size_t tokens() const { return static_cast<std::size_t>(keys.cols()); }
  void store(KvCache& cache, std::size_t begin, std::size_t count, std::size_t layer = 1) const {
    for (std::size_t t = begin; t < begin + count; ++t)
      cache.store(layer, t, keys.col(index(t)).data(), values.col(index(t)).data());
  }
  /// Outputs of all tokens, which come in pieces of the given sizes, the last repeated.
  Matrix run(const std::vector<std::size_t>& pieces, const AttentionOptions& options = {}) const {
    KvCache cache(shape);
    Matrix out = Matrix::Constant(queries.rows(), queries.cols(), -9.0F);
    for (std::size_t begin = 0, p = 0; begin < tokens(); ++p) {
      const std::size_t n = std::min(pieces[std::min(p, pieces.size() - 1)], tokens() - begin);
      store(cache, begin, n);
      const AttentionSpan span{&cache, begin, n, begin};
      attention(&span, 1, 1, queries, out, options);
      cache.advance(n);
      begin += n;
    }
    return out;
  }
  /// The definition, in double.
  Eigen::MatrixXd exact() const {
    const auto head = index(shape.head_size);
    Eigen::MatrixXd out(queries.rows(), queries.cols());
    for (Eigen::Index t = 0; t < queries.cols(); ++t)
      for (Eigen::Index h = 0; h < index(heads); ++h) {
        const Eigen::Index kv = h / index(heads / shape.kv_heads) * head;
        const Eigen::MatrixXd k = keys.block(kv, 0, head, t + 1).cast<double>();
        const Eigen::MatrixXd v = values.block(kv, 0, head, t + 1).cast<double>();
        Eigen::VectorXd s = k.transpose() * queries.col(t).segment(h * head, head).cast<double>();
        s = (s.array() - s.maxCoeff()).exp();
        out.col(t).segment(h * head, head) = v * (s / s.sum());
      }
    return out;
  }
};

struct Shape {
  std::size_t heads, kv_heads, head_size, tokens;
};
const Shape shapes[] = {{9, 3, 64, 150}, {2, 2, 8, 70},  {8, 1, 20, 45},
                        {5, 1, 80, 40},  {32, 2, 16, 9}, {1, 1, 1, 5}};

TEST(Attention, EqualsTheDefinition) {
  for (const KvFormat format : formats)
    for (const Shape& s : shapes) {
      const Sequence q(format, s.heads, s.kv_heads, s.head_size, s.tokens);
      const double error = (q.run({s.tokens}).cast<double>() - q.exact()).cwiseAbs().maxCoeff();
      // Scores are sums of 2 * normal * normal, below 20 here. fp32: their error is below 80 * 2^-24 * 20 and moves a
      // weight by as much of itself; the outputs, below 4, by at most that much and the sum's own 150 roundings.
      // fp16: 2^-12 of each element of keys and values; errors add like the square root of their number, and a score's
      // moves the output by at most 4 times itself. int8: 1/254 of the largest of a head or group, twice in each product. int4: half a
      // step of a range of up to 6 in 15 steps, 0.2, in keys and values; errors add like the square root of the number,
      // times queries of 2 / sqrt(head).
      const double tolerance = format == KvFormat::fp32   ? 4.0 * (80.0 * 20.0 + 150.0) * 0x1p-24
                               : format == KvFormat::fp16 ? 4.0 * 20.0 * 0x1p-12
                               : format == KvFormat::int4 ? 4.0 * 2.0 * 0.2 + 0.2
                                                          : 4.0 * 20.0 / 254.0;
      EXPECT_LT(error, tolerance) << name_of(format) << " head " << s.head_size;
      EXPECT_GT(error, 0.0);
    }
}

TEST(Attention, BitsDependOnNothingElse) {
  ThreadPool two(2), three(3);
  for (const KvFormat format : formats)
    for (const Shape& s : shapes) {
      const Sequence q(format, s.heads, s.kv_heads, s.head_size, s.tokens);
      const std::string what = std::string(name_of(format)) + " head " + std::to_string(s.head_size);
      const Matrix expected = q.run({s.tokens});
      ASSERT_TRUE(expected.allFinite());
      EXPECT_TRUE(same_bits(q.run({1}), expected)) << what << ", one by one";
      EXPECT_TRUE(same_bits(q.run({2, 1, 30, 3, 17}), expected)) << what << ", in pieces";
      for (ThreadPool* pool : {&two, &three}) {
        AttentionOptions options;
        options.pool = pool;
        EXPECT_TRUE(same_bits(q.run({s.tokens}, options), expected)) << what << ", threads";
        EXPECT_TRUE(same_bits(q.run({20, 1}, options), expected)) << what << ", threads, one by one";
      }
      for (const Isa isa : {Isa::scalar, Isa::neon, Isa::avx2, Isa::avxvnni, Isa::avx512vnni}) {
        if (!isa_available(isa)) continue;
        AttentionOptions options;
        options.isa = isa;
        EXPECT_TRUE(same_bits(q.run({s.tokens}, options), expected)) << what << ", " << name_of(isa);
      }
    }
}

// One token far out in a context: tasks are cut by positions and dimensions, with a meeting between.
TEST(Attention, LongContextsAreCutWithoutATrace) {
  constexpr std::size_t tokens = 3000;
  for (const KvFormat format : formats) {
    const Sequence q(format, 9, 3, 64, tokens);
    KvCache cache(q.shape);
    q.store(cache, 0, tokens);
    const AttentionSpan span{&cache, tokens - 1, 1, tokens - 1};
    Matrix expected = Matrix::Zero(q.queries.rows(), q.queries.cols()), out = expected;
    attention(&span, 1, 1, q.queries, expected);
    EXPECT_FALSE(expected.isZero());
    EXPECT_TRUE(expected.leftCols(index(tokens - 1)).isZero());  // not its columns
    for (const int threads : {2, 3, 4, 5, 16}) {
      ThreadPool pool(threads);
      AttentionOptions options;
      options.pool = &pool;
      for (int round = 0; round < 3; ++round) {
        out.setZero();
        attention(&span, 1, 1, q.queries, out, options);
        ASSERT_TRUE(same_bits(out, expected)) << name_of(format) << " " << threads << " threads";
      }
    }
  }
}

// Sequences of several formats and lengths in one call say what each says alone.
TEST(Attention, BatchesDoNotMix) {
  ThreadPool pool(2);
  std::vector<Sequence> sequences;
  std::vector<KvCache> caches;
  std::vector<AttentionSpan> spans;
  std::size_t columns = 0;
  for (std::size_t i = 0; i < 9; ++i) {
    sequences.emplace_back(formats[i % 4], 6, 2, 24, 10 + 31 * i, static_cast<std::uint32_t>(10 * i));
    caches.emplace_back(sequences.back().shape);
  }
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = sequences[i];
    s.store(caches[i], 0, s.tokens());
    const std::size_t count = i % 4 == 0 ? 10 : 1;
    spans.push_back({&caches[i], columns, count, s.tokens() - count});
    columns += count;
  }
  Matrix queries(index(6 * 24), index(columns)), out(queries.rows(), queries.cols()), alone = out;
  for (std::size_t i = 0; i < spans.size(); ++i)
    queries.middleCols(index(spans[i].column), index(spans[i].tokens)) =
        sequences[i].queries.rightCols(index(spans[i].tokens));
  for (const AttentionSpan& span : spans) attention(&span, 1, 1, queries, alone);
  AttentionOptions options;
  options.pool = &pool;
  attention(spans.data(), spans.size(), 1, queries, out, options);
  EXPECT_TRUE(same_bits(out, alone));
  out.setZero();
  attention(spans.data(), spans.size(), 1, queries, out);
  EXPECT_TRUE(same_bits(out, alone));
}

// What is not finite spoils the tokens that see it, and no token before it, however they are computed.
TEST(Attention, NonFiniteValuesStayWhereTheyAre) {
  for (const KvFormat format : formats)
    for (const float bad :
         {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(), 1e30F})
      for (const bool in_values : {false, true}) {
        if (bad == 1e30F && format != KvFormat::fp16 && format != KvFormat::int4) continue;  // beyond fp16 alone
        Sequence q(format, 4, 2, 16, 40);
        const Matrix clean = q.run({40});
        (in_values ? q.values : q.keys)(5, 21) = bad;  // the first head's
        const Matrix out = q.run({40});
        EXPECT_TRUE(same_bits(out.leftCols(21), clean.leftCols(21))) << name_of(format) << bad << in_values;
        EXPECT_TRUE(same_bits(out.bottomRows(32), clean.bottomRows(32))) << "another head";
        EXPECT_FALSE(out.col(21).head(32).allFinite()) << name_of(format) << bad << in_values;
        const Matrix again = q.run({1});
        for (Eigen::Index i = 0; i < out.size(); ++i)
          ASSERT_TRUE(out(i) == again(i) || (out(i) != out(i) && again(i) != again(i))) << i;
      }
}

TEST(Attention, RefusesWhatDoesNotFit) {
  const Sequence q(KvFormat::fp16, 4, 2, 16, 20);
  KvCache cache(q.shape);
  Matrix out = q.queries;
  const auto call = [&](AttentionSpan span, std::size_t layer = 0) { attention(&span, 1, layer, q.queries, out); };
  EXPECT_NO_THROW(call({&cache, 0, 20, 0}));
  EXPECT_NO_THROW(call({&cache, 0, 0, 0}));
  EXPECT_THROW(call({nullptr, 0, 1, 0}), InvalidArgument);
  EXPECT_THROW(call({&cache, 1, 20, 0}), InvalidArgument);
  EXPECT_THROW(call({&cache, 0, 20, 4}), InvalidArgument);
  EXPECT_THROW(call({&cache, 0, 1, ~std::size_t{0}}), InvalidArgument);
  EXPECT_THROW(call({&cache, 0, 20, 0}, 2), InvalidArgument);
  const AttentionSpan span{&cache, 0, 1, 0};
  Matrix odd = Matrix::Zero(40, 20), same = q.queries;
  EXPECT_THROW(attention(&span, 1, 0, odd, odd), InvalidArgument);
  EXPECT_THROW(attention(&span, 1, 0, q.queries, odd), InvalidArgument);
  EXPECT_THROW(attention(&span, 1, 0, same, same), InvalidArgument);
  EXPECT_NO_THROW(attention(nullptr, 0, 0, q.queries, out));
}

TEST(KvCache, HoldsWhatWasStored) {
  for (const KvFormat format : {KvFormat::fp32, KvFormat::fp16, KvFormat::int8})
    for (const std::size_t head_size : {1, 8, 20, 64, 130}) {
      const Sequence q(format, 2, 2, head_size, 50);
      KvCache cache(q.shape);
      q.store(cache, 0, 50, 0);
      q.store(cache, 0, 50, 1);
      for (const std::size_t layer : {0, 1})
        for (std::size_t h = 0; h < 2; ++h)
          for (std::size_t p = 0; p < 50; ++p)
            for (std::size_t d = 0; d < head_size; ++d) {
              const detail::KvPlane keys = cache.keys(layer, h), values = cache.values(layer, h);
              const auto read = [&](const detail::KvPlane& plane, std::size_t channel, std::size_t k) {
                using namespace detail::scalar;  // NOLINT
                if (format != KvFormat::int8) return value_at(plane.panels, channel / 16, channel % 16, k);
                return plane.scales[p] * static_cast<float>(code_at(plane.panels, channel / 16, channel % 16, k));
              };
              const auto row = index(h * head_size + d), column = index(p);
              const auto check = [&](float got, const Matrix& from) {
                const float want = from(row, column);
                const float widest =
                    from.block(index(h * head_size), column, index(head_size), 1).cwiseAbs().maxCoeff();
                if (format == KvFormat::fp32)
                  ASSERT_EQ(got, want);
                else if (format == KvFormat::fp16)
                  ASSERT_EQ(got, float_from_fp16(fp16_from_float(want)));
                else
                  ASSERT_NEAR(got, want, widest / 254.0F * 1.0001F);
              };
              check(read(keys, p, d), q.keys);
              check(read(values, d, p), q.values);
            }
    }
}

/// What INT4 keys or values of one line become, by the definition: 16 levels from the least on, the scale and what code 8
/// stands for in fp16 if `half`.
std::vector<float> four_bits(const std::vector<float>& line, bool half) {
  const auto stored = [&](float x) { return half ? float_from_fp16(fp16_from_float(x)) : x; };
  const float low = *std::min_element(line.begin(), line.end());
  const float scale = stored((*std::max_element(line.begin(), line.end()) - low) / 15.0F);
  const float offset = stored(std::fma(8.0F, scale, low));
  std::vector<float> out;
  for (const float x : line) {
    const float code = std::min(7.0F, std::max(-8.0F, std::nearbyint((x - offset) / scale)));
    out.push_back(scale > 0.0F ? code * scale + offset : offset);
  }
  return out;
}

// INT4 against attention over matrices that hold, for every token, what it must see: blocks of 32 that are complete as
// codes, its own as fp16.
TEST(KvCache, Int4BlocksCloseWhereTheDefinitionSays) {
  for (const Shape& s : shapes) {
    const Sequence q(KvFormat::int4, s.heads, s.kv_heads, s.head_size, s.tokens);
    const Matrix out = q.run({s.tokens});
    const auto half = [](float x) { return float_from_fp16(fp16_from_float(x)); };
    const Matrix keys = q.keys.unaryExpr(half), values = q.values.unaryExpr(half);
    Matrix closed_keys = keys, closed_values = values;
    const auto head = index(s.head_size);
    for (Eigen::Index b = 0; b + 32 <= keys.cols(); b += 32)
      for (Eigen::Index d = 0; d < keys.rows(); ++d) {
        std::vector<float> line(32);
        for (Eigen::Index p = 0; p < 32; ++p) line[static_cast<std::size_t>(p)] = keys(d, b + p);
        line = four_bits(line, true);
        for (Eigen::Index p = 0; p < 32; ++p) closed_keys(d, b + p) = line[static_cast<std::size_t>(p)];
      }
    for (Eigen::Index p = 0; p < values.cols(); ++p)
      for (Eigen::Index h = 0; h < values.rows(); h += head)
        for (Eigen::Index d = 0; d < head; d += 64) {
          const Eigen::Index n = std::min<Eigen::Index>(64, head - d);
          std::vector<float> line(values.col(p).data() + h + d, values.col(p).data() + h + d + n);
          line = four_bits(line, false);
          for (Eigen::Index i = 0; i < n; ++i) closed_values(h + d + i, p) = line[static_cast<std::size_t>(i)];
        }
    for (Eigen::Index t = 0; t < q.queries.cols(); ++t) {
      const Eigen::Index open = (t + 1) / 32 * 32;
      for (Eigen::Index h = 0; h < index(s.heads); ++h) {
        const Eigen::Index kv = h / index(s.heads / s.kv_heads) * head;
        Eigen::MatrixXd k = keys.block(kv, 0, head, t + 1).cast<double>();
        Eigen::MatrixXd v = values.block(kv, 0, head, t + 1).cast<double>();
        k.leftCols(open) = closed_keys.block(kv, 0, head, open).cast<double>();
        v.leftCols(open) = closed_values.block(kv, 0, head, open).cast<double>();
        Eigen::VectorXd w = k.transpose() * q.queries.col(t).segment(h * head, head).cast<double>();
        w = (w.array() - w.maxCoeff()).exp();
        const Eigen::VectorXd want = v * (w / w.sum());
        // Floats' errors alone, as in EqualsTheDefinition; offsets and scaled codes are summed apart, each up to four
        // times their sum.
        EXPECT_LT((out.col(t).segment(h * head, head).cast<double>() - want).cwiseAbs().maxCoeff(),
                  16.0 * (80.0 * 20.0 + 150.0) * 0x1p-24)
            << "head " << s.head_size << " token " << t;
      }
    }
  }
}

// The ring of fp16 positions turns many times; cut back within it, or far beyond.
TEST(KvCache, Int4KeepsTheLastPositionsOnly) {
  Sequence q(KvFormat::int4, 4, 2, 16, 300);
  const Matrix expected = q.run({300});
  q.shape.step = 20;
  EXPECT_TRUE(same_bits(q.run({20}), expected));
  EXPECT_TRUE(same_bits(q.run({1, 19, 7}), expected));
  for (const std::size_t cut : {295, 288, 280, 64, 45}) {
    KvCache cache(q.shape);
    for (std::size_t t = 0; t < 300; ++t) {
      q.store(cache, t, 1);
      cache.advance(1);
    }
    cache.truncate(cut);
    Matrix out = Matrix::Zero(q.queries.rows(), q.queries.cols());
    for (std::size_t t = cut; t < 300; ++t) {
      q.store(cache, t, 1);
      const AttentionSpan span{&cache, t, 1, t};
      attention(&span, 1, 1, q.queries, out);
      cache.advance(1);
    }
    const auto tail = [&](const Matrix& m) -> Matrix { return m.rightCols(index(300 - cut)); };
    if (cut != 45)
      EXPECT_TRUE(same_bits(tail(out), tail(expected))) << cut;
    else  // a block that was codes already: as good as codes
      EXPECT_LT((tail(out) - tail(expected)).cwiseAbs().maxCoeff(), 0.5F);
  }
}

TEST(KvCache, CountsTruncatesAndClears) {
  for (const KvFormat format : formats) {
    const Sequence q(format, 2, 2, 16, 30);
    KvCache cache(q.shape);
    EXPECT_EQ(cache.size(), 0U);
    EXPECT_EQ(cache.capacity(), 33U);
    q.store(cache, 0, 30);
    cache.advance(30);
    cache.truncate(40);
    EXPECT_EQ(cache.size(), 30U);
    cache.truncate(12);
    EXPECT_EQ(cache.size(), 12U);
    // Other tokens over the old ones: as if those had never been.
    Sequence other(format, 2, 2, 16, 30, 77);
    KvCache fresh(q.shape);
    q.store(fresh, 0, 12);
    other.store(fresh, 12, 5);
    other.store(cache, 12, 5);
    Matrix a = Matrix::Zero(32, 30), b = a;
    const AttentionSpan old_span{&cache, 0, 5, 12}, new_span{&fresh, 0, 5, 12};
    attention(&old_span, 1, 1, q.queries, a);
    attention(&new_span, 1, 1, q.queries, b);
    EXPECT_TRUE(same_bits(a, b));
    const KvCache moved = std::move(cache);
    EXPECT_EQ(moved.size(), 12U);
    EXPECT_EQ(moved.bytes_per_position(), 2U * 2 * 2 *
                                              (format == KvFormat::fp32   ? 64
                                               : format == KvFormat::fp16 ? 32
                                               : format == KvFormat::int4 ? 13
                                                                          : 20));
  }
}

TEST(KvCache, RefusesWhatDoesNotFit) {
  KvCacheOptions o;
  o.layers = o.kv_heads = o.head_size = 2;
  EXPECT_THROW(KvCache{o}, InvalidArgument);  // no capacity
  o.capacity = 5;
  KvCache cache(o);
  const std::vector<float> x(4, 1.0F);
  EXPECT_NO_THROW(cache.store(1, 4, x.data(), x.data()));
  EXPECT_THROW(cache.store(1, 5, x.data(), x.data()), InvalidArgument);
  EXPECT_THROW(cache.store(2, 0, x.data(), x.data()), InvalidArgument);
  cache.advance(5);
  EXPECT_THROW(cache.advance(1), InvalidArgument);
  o.capacity = ~std::size_t{0} / 2;
  EXPECT_THROW(KvCache{o}, InvalidArgument);
  o.capacity = ~std::size_t{0} - 3;
  EXPECT_THROW(KvCache{o}, InvalidArgument);
}

TEST(Rope, TurnsPairsByTheirAngle) {
  RopeOptions o;
  o.dimensions = 12;
  o.positions = 40;
  o.base = 500.0;
  o.linear_scale = 2.0;
  o.divisors = {1.0F, 2.0F, 1.0F, 4.0F, 1.0F, 1.0F};
  Rope rope(o);
  rope.prepare(10);
  rope.prepare(40);
  const Matrix x = random_matrix(3, 3 * 16, 1);
  for (const std::size_t position : {0, 1, 9, 10, 39}) {
    Matrix y = x;
    rope.apply(y.data(), 3, 16, position, 0.5F);
    for (std::size_t h = 0; h < 3; ++h)
      for (std::size_t i = 0; i < 16; i += 2) {
        const auto at = index(h * 16 + i);
        const double angle = i < 12 ? static_cast<double>(position) / 2.0 *
                                          std::pow(500.0, -static_cast<double>(i) / 12.0) /
                                          static_cast<double>(o.divisors[i / 2])
                                    : 0.0;
        const double a = static_cast<double>(x(at)), b = static_cast<double>(x(at + 1));
        // Cosine, sine, a product and a sum, each rounded to 2^-24 of at most 2 * 4.
        EXPECT_NEAR(static_cast<double>(y(at)), 0.5 * (a * std::cos(angle) - b * std::sin(angle)), 8.0 * 0x1p-24);
        EXPECT_NEAR(static_cast<double>(y(at + 1)), 0.5 * (a * std::sin(angle) + b * std::cos(angle)),
                    8.0 * 0x1p-24);
      }
  }
  Matrix y = x;
  EXPECT_THROW(rope.prepare(41), InvalidArgument);
  EXPECT_THROW(rope.apply(y.data(), 3, 10, 0), InvalidArgument);
  EXPECT_THROW(rope.apply(y.data(), 3, 16, 40), InvalidArgument);
  o.divisors.pop_back();
  EXPECT_THROW(Rope{o}, InvalidArgument);
  o.dimensions = 11;
  EXPECT_THROW(Rope{o}, InvalidArgument);
}

TEST(Nn, MatricesInAndOut) {
  const Matrix x = random_matrix(5, 30, 7), up = random_matrix(6, 30, 7);
  const Eigen::VectorXf weight = random_matrix(7, 30, 1).col(0);
  Matrix normed(30, 7), gate = x, soft = x;
  rms_norm(x, weight, 1e-5F, normed);
  silu_multiply(gate, up);
  softmax(soft);
  for (Eigen::Index c = 0; c < 7; ++c) {
    const Eigen::ArrayXd v = x.col(c).cast<double>().array();
    const double rms = std::sqrt(v.square().mean() + 1e-5);
    const Eigen::ArrayXd e = (v - v.maxCoeff()).exp();
    for (Eigen::Index i = 0; i < 30; ++i) {  // a dozen roundings of numbers below 8
      EXPECT_NEAR(static_cast<double>(normed(i, c)), v[i] / rms * static_cast<double>(weight[i]), 96.0 * 0x1p-24);
      EXPECT_NEAR(static_cast<double>(gate(i, c)), v[i] / (1.0 + std::exp(-v[i])) * static_cast<double>(up(i, c)),
                  96.0 * 0x1p-24);
      EXPECT_NEAR(static_cast<double>(soft(i, c)), e[i] / e.sum(), 12.0 * 0x1p-24);
    }
  }
  EXPECT_THROW(rms_norm(x, weight.head(29), 1e-5F, normed), InvalidArgument);
  EXPECT_THROW(rms_norm(x, weight, 1e-5F, normed.leftCols(6)), InvalidArgument);
  EXPECT_THROW(silu_multiply(gate, up.leftCols(6)), InvalidArgument);
}

}  // namespace
