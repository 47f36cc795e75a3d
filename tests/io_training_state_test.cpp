// Checkpoints of training: what goes on from one has the bits of what never stopped, and no failure costs the last one.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "io_test_support.hpp"
#include "nibble/io/training_state.hpp"
#include "nibble/train/dropout.hpp"
#include "nibble/train/linear_layer.hpp"
#include "nibble/train/schedule.hpp"

namespace {

using namespace nibble;
using io_test::Bytes;
using io_test::expect_error;
using io_test::TempFolder;

/// y = W2 dropout(W1 x), squared error, on data that the step number chooses.
struct Model {
  DenseLinear first{RowMajorMatrix::Constant(70, 60, 0.01F)}, second{RowMajorMatrix::Constant(3, 70, 0.02F)};
  std::vector<float> ranges = {1.0F, 2.0F};
  Schedule schedule;
  AdamW adam;

  explicit Model(bool eight_bit) : adam(parameters(), options(eight_bit)) {
    schedule.steps = 20;
    schedule.warmup = 3;
    schedule.peak = 0.01;
  }
  Parameters parameters() {
    Parameters ps;
    first.append_parameters("first.", ps);
    second.append_parameters("second.", ps);
    return ps;
  }
  static AdamWOptions options(bool eight_bit) {
    AdamWOptions o;
    o.eight_bit = eight_bit;
    return o;
  }
  std::vector<TrainingBuffer> buffers() { return {{"ranges", ranges.data(), ranges.size()}}; }

  double step(std::uint64_t position) {
    std::mt19937 random(static_cast<unsigned>(position));
    std::normal_distribution<float> normal;
    Eigen::MatrixXf x(60, 8), hidden(70, 8), y(3, 8), dhidden(70, 8);
    for (Eigen::Index i = 0; i < x.size(); ++i) x.data()[i] = normal(random);
    const DropoutKey key{7, adam.steps(), stream_of("hidden")};
    first.forward(x, hidden, {});
    dropout(hidden, hidden, 0.2, key);
    second.forward(hidden, y, {});
    const Eigen::MatrixXf dy = y - x.topRows(3);
    zero_gradients(adam.parameters());
    MatrixRef to(dhidden);
    second.backward(hidden, dy, &to, Gradient::set, {});
    dropout_backward(dhidden, dhidden, 0.2, key);
    first.backward(x, dhidden, nullptr, Gradient::set, {});
    adam.step(schedule.rate(adam.steps()), 1.0);
    ranges[0] += 0.1F;
    return dy.cast<double>().squaredNorm();
  }
};

TEST(TrainingState, GoesOnToTheSameBits) {
  const TempFolder folder;
  const std::string path = folder.file("state.safetensors");
  for (const bool eight_bit : {false, true}) {
    Model straight(eight_bit);
    EXPECT_EQ(straight.adam.states()[0].eight_bit, eight_bit);
    EXPECT_FALSE(straight.adam.states()[1].eight_bit);
    std::vector<double> losses;
    for (std::uint64_t i = 0; i < 12; ++i) losses.push_back(straight.step(100 + i));
    EXPECT_LT(losses.back(), losses.front());

    {
      Model stopped(eight_bit);
      for (std::uint64_t i = 0; i < 5; ++i) EXPECT_EQ(stopped.step(100 + i), losses[i]);
      save_training_state(path, stopped.adam, {{"position", 105}, {"seed", UINT64_MAX}, {"best", 0.1}},
                          stopped.buffers());
    }
    Model resumed(eight_bit);
    const nlohmann::json metadata = load_training_state(path, resumed.adam, resumed.buffers());
    EXPECT_EQ(metadata.at("seed").get<std::uint64_t>(), UINT64_MAX);
    EXPECT_EQ(metadata.at("best").get<double>(), 0.1);
    EXPECT_EQ(resumed.adam.steps(), 5U);
    const auto position = metadata.at("position").get<std::uint64_t>();
    for (std::uint64_t i = 0; i < 7; ++i) EXPECT_EQ(resumed.step(position + i), losses[5 + i]);
    EXPECT_EQ(resumed.first.weight(), straight.first.weight());
    EXPECT_EQ(resumed.second.weight(), straight.second.weight());
    EXPECT_EQ(resumed.ranges, straight.ranges);
    for (std::size_t p = 0; p < 2; ++p) {
      EXPECT_EQ(resumed.adam.states()[p].first, straight.adam.states()[p].first);
      EXPECT_EQ(resumed.adam.states()[p].first_codes, straight.adam.states()[p].first_codes);
      EXPECT_EQ(resumed.adam.states()[p].second_codes, straight.adam.states()[p].second_codes);
    }
  }
  EXPECT_EQ(folder.count(), 1U);
}

TEST(TrainingState, DamagedFilesAreRefusedAndChangeNothing) {
  const TempFolder folder;
  const std::string path = folder.file("good"), bad = folder.file("bad");
  std::vector<float> w(9, 1.5F), g(9, 0.25F), w2(9, 7.0F), g2(9);
  AdamW adam({{"w", w.data(), g.data(), 9}}), other({{"w", w2.data(), g2.data(), 9}});
  adam.step(0.1);
  save_training_state(path, adam, {{"position", 5}});
  const Bytes bytes = io_test::read_file(path);
  const auto untouched = [&] { return w2 == std::vector<float>(9, 7.0F) && other.steps() == 0; };
  for (std::size_t n = 0; n < bytes.size(); n += 17) {
    io_test::write_file(bad, Bytes(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n)));
    expect_error<Error>([&] { load_training_state(bad, other); }, {bad});
  }
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    Bytes flipped = bytes;
    flipped[i] = static_cast<std::uint8_t>(flipped[i] ^ (1U << (i % 8)));
    io_test::write_file(bad, flipped);
    expect_error<FormatError>([&] { load_training_state(bad, other); });
    ASSERT_TRUE(untouched()) << "byte " << i;
  }
  load_training_state(path, other);
  EXPECT_EQ(w2, w);
  EXPECT_EQ(other.steps(), 1U);
}

TEST(TrainingState, OfAnotherModel) {
  const TempFolder folder;
  const std::string path = folder.file("state");
  std::vector<float> w(5000, 1.0F), g(5000, 0.5F), extra(3);
  AdamW adam({{"w", w.data(), g.data(), 5000}});
  save_training_state(path, adam, {}, {{"ranges", extra.data(), 3}});
  const auto load = [&](const Parameters& ps, bool eight_bit, const std::vector<TrainingBuffer>& buffers) {
    AdamWOptions o;
    o.eight_bit = eight_bit;
    AdamW other(ps, o);
    load_training_state(path, other, buffers);
  };
  const std::vector<TrainingBuffer> ranges = {{"ranges", extra.data(), 3}};
  load({{"w", w.data(), g.data(), 5000}}, false, ranges);
  expect_error<FormatError>(
      [&] {
        load({{"v", w.data(), g.data(), 5000}}, false, ranges);
      },
      {"'value/v' is missing"});
  expect_error<FormatError>(
      [&] {
        load({{"w", w.data(), g.data(), 4999}}, false, ranges);
      },
      {"'value/w' has 5000 elements of F32, expected 4999 of F32"});
  expect_error<FormatError>(
      [&] {
        load({{"w", w.data(), g.data(), 5000}}, true, ranges);
      },
      {"'first/w' has 5000"});
  expect_error<FormatError>(
      [&] {
        load({{"w", w.data(), g.data(), 5000}}, false, {});
      },
      {"'buffer/ranges' is in the file, but not in the model"});
  {
    SafetensorsWriter writer(path);
    writer.commit();
  }
  expect_error<FormatError>(
      [&] {
        load({{"w", w.data(), g.data(), 5000}}, false, ranges);
      },
      {"no checkpoint of training"});
  expect_error<IoError>([&] { load_training_state(folder.file("none"), adam); });
  const Bytes before = io_test::read_file(path);
  w[77] = std::nanf("");
  expect_error<InvalidArgument>([&] { save_training_state(path, adam); },
                                {"value of 'w' is ", " at element 77 (checkpoint after step 0)"});
  EXPECT_EQ(io_test::read_file(path), before);
}

TEST(TrainingState, AFullDiskLeavesTheLastOne) {
  const TempFolder folder;
  const std::string path = folder.file("state");
  std::vector<float> w(40000, 1.0F), g(40000, 0.5F);
  AdamW adam({{"w", w.data(), g.data(), w.size()}});
  save_training_state(path, adam);
  const Bytes before = io_test::read_file(path);
  adam.step(0.1);
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{100000, 100000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    try {
      save_training_state(path, adam);
    } catch (const IoError&) {
      ::_exit(7);
    }
    ::_exit(1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 7);
  EXPECT_EQ(io_test::read_file(path), before);
  EXPECT_EQ(folder.count(), 1U);
}

// The child says when the first checkpoint is there; then it is killed wherever it is.
TEST(TrainingState, AKillLeavesAWholeOne) {
  const TempFolder folder;
  const std::string path = folder.file("state");
  for (int attempt = 0; attempt < 8; ++attempt) {
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    const pid_t child = ::fork();
    std::vector<float> w(20000, 1.0F), g(20000, 0.5F);
    AdamW adam({{"w", w.data(), g.data(), w.size()}});
    if (child == 0) {
      for (;;) {
        adam.step(0.1);
        save_training_state(path, adam, {{"first", w[0]}});
        if (adam.steps() == 1 && ::write(ends[1], "x", 1) != 1) ::_exit(1);
      }
    }
    ::close(ends[1]);
    char byte;
    ASSERT_EQ(::read(ends[0], &byte, 1), 1);
    ::close(ends[0]);
    ::usleep(static_cast<useconds_t>(1500 * attempt));
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status));
    const nlohmann::json metadata = load_training_state(path, adam);
    EXPECT_GE(adam.steps(), 1U);
    for (const float v : w) ASSERT_EQ(v, metadata.at("first").get<float>());
  }
}

}  // namespace
