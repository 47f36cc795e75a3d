// Cross-entropy of next tokens, with its gradient; and fused with the output layer, so that the logits of all tokens are
// never held.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/gemm/workspace.hpp"
#include "nibble/nn/softmax.hpp"
#include "nibble/train/linear.hpp"
#include "nibble/train/options.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

struct CrossEntropyOptions {
  std::int32_t ignore = -100;  ///< a target that says: this token does not count
  /// What the sum over tokens is divided by, in the loss and in its gradient: 1 for a plain sum, all the counted tokens of a
  /// step where gradients of several batches are accumulated. 0: the counted tokens of this call, a mean.
  double divisor = 0.0;
  Eigen::Index chunk = 0;  ///< tokens whose logits are held at once by the fused function; 0: about 8 MiB of them
  Workspace* logits =
      nullptr;  ///< where the fused function holds them, not TrainOptions::workspace; nullptr: memory of the call's own
};

struct CrossEntropy {
  double loss = 0.0;        ///< in nats, sum over tokens divided by the divisor
  std::size_t counted = 0;  ///< tokens whose target was not ignored
};

namespace detail {

/// Checks all targets before anything is computed; returns how many count.
inline std::size_t counted_targets(const std::vector<std::int32_t>& targets, Eigen::Index tokens,
                                   Eigen::Index vocabulary, const CrossEntropyOptions& options) {
  require(targets.size() == static_cast<std::size_t>(tokens), "there are ", targets.size(), " targets for ",
          tokens, " tokens");
  require(options.divisor >= 0.0 && std::isfinite(options.divisor), "divisor is ", options.divisor,
          ", expected 0 (the counted tokens) or a number above it");
  std::size_t counted = 0;
  for (std::size_t t = 0; t < targets.size(); ++t) {
    if (targets[t] == options.ignore) continue;
    require(targets[t] >= 0 && targets[t] < vocabulary, "target of token ", t, " is ", targets[t],
            ", expected 0 to ", vocabulary - 1, " or ", options.ignore);
    ++counted;
  }
  return counted;
}

/// The column's loss. `gradient`: it becomes (softmax(x) - [target]) * scale, else something else. NaN where x is not finite.
inline double cross_entropy_column(float* x, Eigen::Index n, Eigen::Index target, bool gradient, double scale,
                                   const KernelTable& kernels) {
  Eigen::Map<Eigen::ArrayXf> column(x, n);
  // 0 * v is 0 or, for NaN and Inf, NaN.
  if (!((column * 0.0F).sum() == 0.0F)) return std::numeric_limits<double>::quiet_NaN();
  const auto below_max = static_cast<double>(x[target]) - static_cast<double>(column.maxCoeff());
  const auto sum = static_cast<double>(exp_minus_max(x, static_cast<std::size_t>(n), kernels));
  if (gradient) {
    const double share = static_cast<double>(x[target]) / sum;
    column *= static_cast<float>(scale / sum);
    x[target] = static_cast<float>((share - 1.0) * scale);
  }
  return std::log(sum) - below_max;
}

/// Losses of tokens [first, first + logits.cols()) into `losses`; logits become their gradients where wanted.
inline void cross_entropy_chunk(MatrixRef logits, const std::vector<std::int32_t>& targets, Eigen::Index first,
                                std::int32_t ignore, bool gradient, double scale, std::vector<double>& losses,
                                const TrainOptions& options) {
  const KernelTable& kernels = kernels_of(options);
  for_chunks(options.pool, logits.cols(), [&](Eigen::Index begin, Eigen::Index tokens, std::size_t) {
    const FpEnvironment environment;
    for (Eigen::Index t = begin; t < begin + tokens; ++t) {
      const auto token = static_cast<std::size_t>(first + t);
      if (targets[token] == ignore) {
        if (gradient) logits.col(t).setZero();
        continue;
      }
      losses[token] =
          cross_entropy_column(logits.col(t).data(), logits.rows(), targets[token], gradient, scale, kernels);
    }
  });
  for (Eigen::Index t = 0; t < logits.cols(); ++t)
    require(std::isfinite(losses[static_cast<std::size_t>(first + t)]), "logits of token ", first + t,
            " are not all finite");
}

inline CrossEntropy summed(const std::vector<double>& losses, std::size_t counted, double divisor) {
  double sum = 0.0;
  for (const double l : losses) sum += l;
  return {counted == 0 ? 0.0 : sum / divisor, counted};
}

inline double cross_entropy_divisor(const CrossEntropyOptions& options, std::size_t counted) {
  return options.divisor > 0.0 ? options.divisor : static_cast<double>(counted);
}

}  // namespace detail

/// loss = sum over counted tokens t of (log(sum over v of exp(x_vt)) - x_(target t)t) / divisor, for logits x, vocabulary x T;
/// they become their gradients, (softmax(x_t) - [v = target t]) / divisor, 0 for ignored tokens. Exponentials are of
/// x - max, in float; logarithms and the sum over tokens in double, in order. Ignored columns are not looked at.
/// Throws InvalidArgument, naming the token, for targets out of range (before anything is changed) and for logits that are
/// not finite.
inline CrossEntropy cross_entropy(MatrixRef logits, const std::vector<std::int32_t>& targets,
                                  const CrossEntropyOptions& how = {}, const TrainOptions& options = {}) {
  const detail::FpEnvironment environment;
  const std::size_t counted = detail::counted_targets(targets, logits.cols(), logits.rows(), how);
  const double divisor = detail::cross_entropy_divisor(how, counted);
  std::vector<double> losses(targets.size());
  detail::cross_entropy_chunk(logits, targets, 0, how.ignore, true, 1.0 / divisor, losses, options);
  return detail::summed(losses, counted, divisor);
}

/// cross_entropy() of the logits E h, chunk by chunk of tokens: of the logits only `chunk` columns are held at a time.
/// @param h        dim x T, hidden states after the last norm
/// @param output   E, vocabulary x dim: the output layer, which may be the embedding too (tied)
/// @param dh       dim x T: E^T dlogits, set; nullptr: not wanted
/// @param doutput  vocabulary x dim: dlogits h^T is added, chunk by chunk in order; nullptr: not wanted
/// With neither it is the loss alone. The same bits for any number of threads; doutput's depend on the chunk.
/// Throws InvalidArgument as cross_entropy() does; then dh and doutput may have been changed.
inline CrossEntropy linear_cross_entropy(const ConstMatrixRef& h, const ConstWeightsRef& output,
                                         const std::vector<std::int32_t>& targets, MatrixRef* dh,
                                         RowMajorRef* doutput, const CrossEntropyOptions& how = {},
                                         const TrainOptions& options = {}) {
  const detail::FpEnvironment environment;
  const Eigen::Index vocabulary = output.rows(), tokens = h.cols();
  detail::require_shape(h, output.cols(), tokens, "h");
  if (dh != nullptr) detail::require_shape(*dh, h.rows(), tokens, "dh");
  if (doutput != nullptr) detail::require_shape(*doutput, vocabulary, h.rows(), "doutput");
  detail::require(how.chunk >= 0, "chunk is ", how.chunk, ", expected 0 (chosen) or tokens");
  const std::size_t counted = detail::counted_targets(targets, tokens, vocabulary, how);
  if (dh != nullptr) dh->setZero();
  if (counted == 0) return {};
  const double divisor = detail::cross_entropy_divisor(how, counted);
  const bool gradient = dh != nullptr || doutput != nullptr;
  // Products like some hundreds of tokens at a time; a large vocabulary leaves room for fewer.
  const Eigen::Index chosen =
      how.chunk > 0 ? how.chunk : std::min<Eigen::Index>(512, std::max<Eigen::Index>(64, (1 << 21) / vocabulary));
  const Eigen::Index chunk = std::min(chosen, tokens);
  Workspace own;
  Workspace& memory = how.logits != nullptr ? *how.logits : own;
  auto* scratch = reinterpret_cast<float*>(
      memory.take(static_cast<std::size_t>(vocabulary) * static_cast<std::size_t>(chunk) * sizeof(float)));
  std::vector<double> losses(targets.size());
  for (Eigen::Index first = 0; first < tokens; first += chunk) {
    const Eigen::Index n = std::min(chunk, tokens - first);
    if (std::all_of(targets.begin() + first, targets.begin() + first + n,
                    [&](std::int32_t target) { return target == how.ignore; }))
      continue;
    Eigen::Map<Eigen::MatrixXf, 0, Eigen::OuterStride<>> map(scratch, vocabulary, n,
                                                             Eigen::OuterStride<>(vocabulary));
    MatrixRef logits(map);
    gemm(output, h.middleCols(first, n), logits, detail::product_options(options));
    detail::cross_entropy_chunk(logits, targets, first, how.ignore, gradient, 1.0 / divisor, losses, options);
    if (doutput != nullptr)
      linear_backward_weight(logits, h.middleCols(first, n), *doutput, options, Gradient::add);
    if (dh != nullptr) linear_backward_input(output, logits, dh->middleCols(first, n), options);
  }
  return detail::summed(losses, counted, divisor);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
