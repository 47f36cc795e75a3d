// AutoRound of a block: all its matrices together, on the block's output.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "../block.hpp"
#include "../block_training.hpp"
#include "nibble/ptq/autoround.hpp"
#include "nibble/ptq/weight_grids.hpp"

namespace llm {

struct AutoRoundStepOptions {
  int iterations = 200;
  std::size_t batch = 8;   // windows of an iteration
  std::uint64_t seed = 0;  // which ones
  float lr = 0.0F;         // of the first step; 0: 1 / iterations
  float scale_lr = -1.0F;  // of ranges; negative: as lr
  int evaluations = 3;     // of the loss on all windows, after the first
  bool bf16 = true;        // products of the descent, but not those of the loss on all windows
  /// Each token's squared error is divided by the mean square of its target: the norm that follows makes all tokens of
  /// one size. Measured on SmolLM2 as what one block's error does to the last hidden states: 2 % less of it than without.
  bool relative = true;
  std::function<void(int)> done = [](int) {};  // an iteration is
};

/// Windows in random order, each as often as the others: the same for a seed on every platform.
class WindowSampler {
 public:
  WindowSampler(std::size_t windows, std::uint64_t seed) : order_(windows), next_(windows), state_(seed) {
    std::iota(order_.begin(), order_.end(), std::size_t{0});
  }
  std::size_t next() {
    if (next_ == order_.size()) {
      for (std::size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[draw() % i]);
      next_ = 0;
    }
    return order_[next_++];
  }

 private:
  /// SplitMix64 (Steele 2014).
  std::uint64_t draw() {
    state_ += 0x9E3779B97F4A7C15U;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }

  std::vector<std::size_t> order_;
  std::size_t next_;
  std::uint64_t state_;
};

/// Improves a block's quantized matrices so that the mean square of
///     block(x~; quantized weights) - y
/// (each token's relative to its target, see AutoRoundStepOptions) falls: x~ the hidden states that the model quantized
/// so far has before the block, y what the float model has after it, one dim x tokens matrix a window, all of one size.
/// @param w        the float weights (and the norms that the quantized block will have); what matrices start from is
///                 their place between two codes
/// @param tensors  the start, by any method: replaced by the best found, which is never worse on these windows. Matrices
///                 of formats that AutoRound does not take (floats, codebooks) are used as they are.
/// Deterministic for a seed, whatever the threads. Throws InvalidArgument where windows do not fit each other.
inline nibble::AutoRoundReport autoround_block(BlockTrainer& trainer, const FloatBlock& w,
                                               std::array<nibble::QuantizedTensor, 7>& tensors,
                                               const std::vector<Eigen::MatrixXf>& inputs,
                                               const std::vector<Eigen::MatrixXf>& targets,
                                               const AutoRoundStepOptions& options) {
  using nibble::detail::require;
  require(!inputs.empty() && inputs.size() == targets.size() && options.batch > 0, "AutoRound has ", inputs.size(),
          " windows of inputs, ", targets.size(), " of targets and batches of ", options.batch,
          ", expected as many targets as inputs, and at least 1 of each");
  for (std::size_t i = 0; i < inputs.size(); ++i)
    require(inputs[i].rows() == targets[i].rows() && inputs[i].cols() == targets[i].cols() &&
                inputs[i].cols() == inputs[0].cols() &&
                static_cast<std::size_t>(inputs[i].cols()) == trainer.options().window,
            "window ", i, " is ", inputs[i].rows(), " x ", inputs[i].cols(), " and its target ", targets[i].rows(),
            " x ", targets[i].cols(), ", expected ", inputs[0].rows(), " x ", trainer.options().window);
  nibble::ThreadPool* pool = trainer.options().pool;

  FloatBlock block = w;
  std::array<bool, 7> wanted{};
  std::vector<nibble::AutoRoundMatrix> matrices;
  std::vector<BlockMatrix> which;
  for (const BlockMatrix m : block_matrices) {
    const nibble::QuantizedTensor& t = tensors[static_cast<std::size_t>(m)];
    const nibble::Scheme& s = t.scheme();
    if (!nibble::is_integer(s.format) || s.symmetry == nibble::Symmetry::float_offset) {
      t.dequantize(block[m].data(), pool);
      continue;
    }
    matrices.emplace_back(w[m], nibble::WeightGrids::of(t), nibble::codes_of(t), pool);
    which.push_back(m);
    wanted[static_cast<std::size_t>(m)] = true;
  }
  if (matrices.empty()) return {};

  const std::size_t batch = std::min(options.batch, inputs.size());
  const Eigen::Index dim = inputs[0].rows(), window = inputs[0].cols();
  Eigen::MatrixXf x, error;
  /// The loss of some windows; `error` is then its gradient.
  const auto loss_of = [&](const std::vector<std::size_t>& windows) {
    const Eigen::Index columns = static_cast<Eigen::Index>(windows.size()) * window;
    x.resize(dim, columns);
    error.resize(dim, columns);
    nibble::detail::for_tasks(pool, windows.size(), [&](std::size_t i, std::size_t) {
      x.middleCols(static_cast<Eigen::Index>(i) * window, window) = inputs[windows[i]];
    });
    const Eigen::MatrixXf& y = trainer.forward(block, x);
    std::vector<double> sums(windows.size());
    const float scale = 2.0F / static_cast<float>(dim * columns);
    nibble::detail::for_tasks(pool, windows.size(), [&](std::size_t i, std::size_t) {
      const Eigen::MatrixXf& target = targets[windows[i]];
      for (Eigen::Index t = 0; t < window; ++t) {
        const Eigen::Index c = static_cast<Eigen::Index>(i) * window + t;
        const auto difference = y.col(c) - target.col(t);
        const float square = target.col(t).squaredNorm();
        const float weight = options.relative && square > 0.0F ? static_cast<float>(dim) / square : 1.0F;
        sums[i] += static_cast<double>(difference.squaredNorm()) * static_cast<double>(weight);
        error.col(c) = difference * (scale * weight);
      }
    });
    return std::accumulate(sums.begin(), sums.end(), 0.0) / static_cast<double>(dim * columns);
  };
  const auto take_weights = [&] {
    for (std::size_t i = 0; i < matrices.size(); ++i) block[which[i]] = matrices[i].weights();
  };

  WindowSampler sampler(inputs.size(), options.seed);
  std::vector<std::size_t> windows(batch);
  BlockGradients gradients;
  nibble::AutoRoundOptions descent;
  descent.iterations = options.iterations;
  descent.lr = options.lr;
  descent.scale_lr = options.scale_lr;
  descent.evaluations = options.evaluations;
  descent.pool = pool;
  const nibble::AutoRoundReport report = nibble::auto_round(
      matrices, descent,
      [&](int iteration, std::vector<nibble::RowMajorMatrix>& dw) {
        take_weights();
        for (std::size_t& i : windows) i = sampler.next();
        trainer.set_products(options.bf16 ? nibble::Activations::bf16 : nibble::Activations::fp32);
        const double loss = loss_of(windows);
        for (std::size_t i = 0; i < matrices.size(); ++i) gradients[which[i]].swap(dw[i]);
        trainer.backward(block, x, error, gradients, wanted);
        trainer.set_products(nibble::Activations::fp32);
        for (std::size_t i = 0; i < matrices.size(); ++i) gradients[which[i]].swap(dw[i]);
        options.done(iteration);
        return loss;
      },
      [&] {
        take_weights();
        double sum = 0.0;
        std::vector<std::size_t> some;
        for (std::size_t first = 0; first < inputs.size(); first += batch) {
          some.resize(std::min(batch, inputs.size() - first));
          std::iota(some.begin(), some.end(), first);
          sum += loss_of(some) * static_cast<double>(some.size());
        }
        return sum / static_cast<double>(inputs.size());
      });
  for (std::size_t i = 0; i < matrices.size(); ++i)
    tensors[static_cast<std::size_t>(which[i])] = matrices[i].result();
  return report;
}

}  // namespace llm
