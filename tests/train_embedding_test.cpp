// Embedding and dropout.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "nibble/core/thread_pool.hpp"
#include "nibble/train/dropout.hpp"
#include "nibble/train/embedding.hpp"

namespace {

using namespace nibble;
using Matrix = Eigen::MatrixXf;

template <class F>
void expect_error(F&& f, const std::string& part) {
  try {
    f();
    ADD_FAILURE() << "no error with '" << part << "'";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(Embedding, GathersAndScatters) {
  std::mt19937 random(1);
  for (const Eigen::Index dim : {1, 64, 150})
    for (const std::size_t tokens : {0U, 1U, 33U, 100U}) {
      const RowMajorMatrix table = RowMajorMatrix::Random(7, dim);
      std::vector<std::int32_t> ids(tokens);
      for (auto& id : ids) id = static_cast<std::int32_t>(random() % 6);  // row 6 is nobody's
      const auto columns = static_cast<Eigen::Index>(tokens);
      Matrix y(dim, columns);
      const Matrix dy = Matrix::Random(dim, columns);
      RowMajorMatrix want = RowMajorMatrix::Random(7, dim);
      const RowMajorMatrix before = want;
      for (std::size_t t = 0; t < tokens; ++t)
        for (Eigen::Index d = 0; d < dim; ++d) want(ids[t], d) += dy(d, static_cast<Eigen::Index>(t));
      for (const int threads : {1, 2, 3}) {
        ThreadPool pool(threads);
        TrainOptions options;
        options.pool = &pool;
        y.setConstant(9.0F);
        embedding(table, ids, y, options);
        for (std::size_t t = 0; t < tokens; ++t)
          EXPECT_EQ(y.col(static_cast<Eigen::Index>(t)).transpose(), table.row(ids[t]));
        RowMajorMatrix got = before;
        embedding_backward(ids, dy, got, options);
        EXPECT_EQ(got, want);
        EXPECT_EQ(got.row(6), before.row(6));
      }
    }
}

TEST(Embedding, WrongInputsAreNamed) {
  RowMajorMatrix table = RowMajorMatrix::Zero(7, 3);
  Matrix y(3, 4);
  for (const std::int32_t bad : {-1, 7}) {
    expect_error(
        [&] {
          embedding(table, {0, 1, bad, 2}, y);
        },
        "token 2 is " + std::to_string(bad) + ", expected 0 to 6");
    expect_error([&] { embedding_backward({0, 1, bad, 2}, y, table); }, "token 2 is ");
  }
  expect_error([&] { embedding(table, {0, 1}, y); }, "y is 3 x 4, expected 3 x 2");
  expect_error([&] { embedding_backward({0, 1}, y, table); }, "dy is 3 x 4, expected 3 x 2");
}

// The known answers that its authors publish with it.
TEST(Philox, KnownAnswers) {
  using Words = std::array<std::uint32_t, 4>;
  EXPECT_EQ(philox({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr std::uint32_t f = 0xffffffff;
  EXPECT_EQ(philox({f, f, f, f}, {f, f}), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Dropout, KeepsItsShareAndItsMean) {
  const Matrix x = Matrix::Ones(101, 307);
  const auto n = static_cast<double>(x.size());
  for (const double rate : {0.05, 0.5, 0.9}) {
    Matrix y(101, 307);
    dropout(x, y, rate, {1, 2, stream_of("q")});
    const auto scale = static_cast<float>(1.0 / (1.0 - std::round(rate * 65536.0) / 65536.0));
    double kept = 0.0;
    for (Eigen::Index i = 0; i < y.size(); ++i) {
      EXPECT_TRUE(y.data()[i] == 0.0F || y.data()[i] == scale);
      kept += y.data()[i] != 0.0F ? 1.0 : 0.0;
    }
    // Five standard deviations of a binomial; of every row and column eight, for there are 408.
    EXPECT_NEAR(kept / n, 1.0 - rate, 5.0 * std::sqrt(rate * (1.0 - rate) / n));
    const double deviation = std::sqrt(rate / (1.0 - rate));
    EXPECT_LE((y.rowwise().mean().array() - 1.0F).abs().maxCoeff(), 8.0 * deviation / std::sqrt(307.0));
    EXPECT_LE((y.colwise().mean().array() - 1.0F).abs().maxCoeff(), 8.0 * deviation / std::sqrt(101.0));
  }
}

TEST(Dropout, BackwardHasTheMaskOfForwardWhateverTheThreads) {
  const Matrix x = Matrix::Random(53, 100), dy = Matrix::Random(53, 100);
  const DropoutKey key{11, 3, stream_of("layers.0.q")};
  Matrix y(53, 100), dx(53, 100);
  dropout(x, y, 0.3, key);
  dropout_backward(dy, dx, 0.3, key);
  // y is linear in x: its gradient is dy times y / x.
  const auto scale = static_cast<float>(1.0 / (1.0 - std::round(0.3 * 65536.0) / 65536.0));
  for (Eigen::Index i = 0; i < x.size(); ++i) {
    EXPECT_EQ(dx.data()[i], y.data()[i] == 0.0F ? 0.0F : dy.data()[i] * scale);
  }
  for (const int threads : {2, 3}) {
    ThreadPool pool(threads);
    TrainOptions options;
    options.pool = &pool;
    Matrix again = x;
    dropout(again, again, 0.3, key, options);
    EXPECT_EQ(again, y);
    Matrix sum = Matrix::Ones(53, 100);
    dropout_backward(dy, sum, 0.3, key, options, Gradient::add);
    EXPECT_EQ(sum, Matrix(dx.array() + 1.0F));
  }
  // A token's fate is its own: the same in a wider matrix.
  Matrix part(53, 40);
  dropout(x.leftCols(40), part, 0.3, key);
  EXPECT_EQ(part, y.leftCols(40));
  DropoutKey later = key;
  later.first_column = 60;
  dropout(x.rightCols(40), part, 0.3, later);
  EXPECT_EQ(part, y.rightCols(40));
}

TEST(Dropout, EveryKeyIsAnother) {
  const Matrix x = Matrix::Ones(64, 64);
  std::vector<Matrix> masks;
  for (const DropoutKey key : {DropoutKey{0, 0, 0}, DropoutKey{1, 0, 0}, DropoutKey{0, 1, 0}, DropoutKey{0, 0, 1},
                               DropoutKey{0, std::uint64_t{1} << 32, 0}, DropoutKey{1, 1, 1}}) {
    Matrix y(64, 64);
    dropout(x, y, 0.5, key);
    masks.push_back(y);
  }
  // Of 4096 elements two independent masks agree on 2048 with a deviation of 32.
  for (std::size_t i = 0; i < masks.size(); ++i)
    for (std::size_t j = 0; j < i; ++j)
      EXPECT_NEAR(static_cast<double>((masks[i].array() == masks[j].array()).count()), 2048.0, 200.0)
          << i << " " << j;
}

TEST(Dropout, NoneAndWrongRates) {
  const Matrix x = Matrix::Random(5, 6);
  Matrix y(5, 6), odd(5, 5);
  dropout(x, y, 0.0, {});
  EXPECT_EQ(x, y);
  for (const double bad : {-0.1, 1.0, std::nan("")})
    expect_error([&] { dropout(x, y, bad, {}); }, "dropout rate is ");
  expect_error([&] { dropout(x, odd, 0.5, {}); }, "y is 5 x 5, expected 5 x 6");
}

}  // namespace
