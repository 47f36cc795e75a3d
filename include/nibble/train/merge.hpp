// Merging what was trained beside weights into quantized weights, with the layer's outputs kept.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <string>
#include <utility>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/ptq/gptq.hpp"
#include "nibble/ptq/hessian.hpp"
#include "nibble/ptq/output_error.hpp"
#include "nibble/train/low_rank.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

struct MergeOptions {
  /// How codes are chosen. Ranges are fitted to the target, each input's error weighted with its diagonal entry of H.
  GptqOptions gptq = weighted_ranges();
  /// Bytes of the side term, at most this share of the packed matrix's; 0: none.
  double side_share = 0.0;
  Format side_format = Format::fp16;  ///< fp16, bf16 or fp32
  int rounds = 4;                     ///< alternations of rounding and side term, at least 1; the best is kept
  LowRankOptions low_rank;

  static GptqOptions weighted_ranges() {
    GptqOptions o;
    o.grid_fit = GridFit::weighted_mse;
    return o;
  }
};

struct MergeResult {
  QuantizedTensor weights;
  LowRank side;              ///< empty: none; values of side_format
  double error = 0.0;        ///< mean square error of an output over the calibration tokens
  double naive_error = 0.0;  ///< the same where the target is rounded to nearest, ranges by min and max
  std::string report;        ///< GPTQ's, of the rounding that was kept
};

/// Rank of a side term for an n x k matrix of `packed_bytes`: the largest whose n + k values of `format` a rank take at
/// most `share` of them.
inline Eigen::Index side_rank(Eigen::Index n, Eigen::Index k, std::size_t packed_bytes, double share,
                              Format format) {
  detail::require(share >= 0.0 && share <= 1.0, "side_share is ", share, ", expected 0 to 1");
  const double each = static_cast<double>(n + k) * static_cast<double>(bits_of(format)) / 8.0;
  return each == 0.0 ? 0 : static_cast<Eigen::Index>(share * static_cast<double>(packed_bytes) / each);
}

/// Quantizes `target` (N x K: weights with what was trained beside them, see merge_low_rank()) so that its outputs on the
/// calibration tokens of `hessian` change little: GPTQ of the target instead of rounding to nearest, which loses what is
/// smaller than a step.
///
/// With a side term L: from the L that takes the most out of the naive residual on, codes of target - L by GPTQ, then the
/// best L for target - codes in the metric of H (best_low_rank), `rounds` times. So y = (codes + L) x.
///
/// The bits depend on the arguments alone. Throws InvalidArgument as gptq() does.
inline MergeResult merge_quantized(const ConstWeightsRef& target, const Hessian& hessian, const Scheme& scheme,
                                   const MergeOptions& options = {}) {
  const detail::FpEnvironment environment;
  detail::require(options.rounds >= 1, "rounds is ", options.rounds, ", expected at least 1");
  detail::require(options.gptq.act_order == false || options.gptq.static_groups,
                  "act_order without static_groups would permute the inputs, expected static_groups");
  ThreadPool* const pool = options.gptq.pool;
  const Eigen::MatrixXf h = hessian.matrix();
  const Eigen::Index n = target.rows(), k = target.cols();
  // H has the factor 2 of the loss's second derivative.
  const double mean = n == 0 ? 0.0 : 0.5 / static_cast<double>(n);
  const auto values_of = [&](const QuantizedTensor& q) {
    RowMajorMatrix values(n, k);
    for (Eigen::Index r = 0; r < n; ++r)
      q.dequantize_line(static_cast<std::size_t>(r), 0, static_cast<std::size_t>(k), values.data() + r * k);
    return values;
  };
  MergeResult best;
  RowMajorMatrix residual;
  std::size_t bytes = 0;
  {
    const WeightGrids grids = fit_min_max(scheme, target, pool);
    const QuantizedTensor naive = grids.assemble(grids.encode(target, pool));
    residual = target - values_of(naive);
    best.naive_error = mean * quadratic_error(residual, h, pool);
    bytes = naive.codes().size() + naive.scales().size() + naive.zeros().size();
  }
  const Eigen::Index rank = side_rank(n, k, bytes, options.side_share, options.side_format);
  LowRankOptions low_rank = options.low_rank;
  low_rank.pool = pool;
  LowRank side;
  bool found = false;
  const int rounds = rank == 0 ? 1 : options.rounds;
  for (int round = 0; round < rounds; ++round) {
    RowMajorMatrix rest = target;
    if (rank != 0) {
      side = best_low_rank(residual, rank, h, low_rank);
      round_low_rank(side, options.side_format);
      LowRank minus = side;
      minus.scale = -1.0;
      merge_low_rank(minus, rest, pool);
    }
    GptqResult rounded = gptq(rest, hessian, scheme, options.gptq);
    residual = target - values_of(rounded.weights);
    // The best side term for these codes; it is the next round's start as well.
    RowMajorMatrix error = residual;
    if (rank != 0) {
      side = best_low_rank(residual, rank, h, low_rank);
      round_low_rank(side, options.side_format);
      LowRank minus = side;
      minus.scale = -1.0;
      merge_low_rank(minus, error, pool);
    }
    const double square = mean * quadratic_error(error, h, pool);
    if (found && !(square < best.error)) continue;
    found = true;
    best.error = square;
    best.weights = std::move(rounded.weights);
    best.side = side;
    best.report = std::move(rounded.report);
  }
  return best;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
