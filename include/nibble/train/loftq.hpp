// LoftQ: quantized weights and a low-rank start that together are near the weights (Li et al. 2023, "LoftQ:
// LoRA-Fine-Tuning-Aware Quantization for Large Language Models").
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <utility>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/ptq/double_quant.hpp"
#include "nibble/ptq/weight_grids.hpp"
#include "nibble/train/low_rank.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

struct LoftqOptions {
  int iterations = 5;             ///< alternations, at least 1; the paper's T
  bool double_quantized = false;  ///< scales in 8 bits (DoubleQuantOptions' defaults)
  LowRankOptions low_rank;        ///< how singular vectors are found; its pool works for all
};

struct LoftqResult {
  QuantizedTensor base;
  LowRank start;               ///< scale 1: what trains with alpha / r starts from b / (alpha / r)
  double error = 0.0;          ///< |w - base - b a|, Frobenius
  double error_without = 0.0;  ///< |w - quantized(w)|, Frobenius: what there is without a start
};

/// Alternates, from b a = 0 (algorithm 1):
///   base_t = quantized(w - b_(t-1) a_(t-1));  b_t a_t = truncated SVD of w - base_t
/// and gives the best of them. scheme: as WeightGrids, ranges by min and max. Throws InvalidArgument for a weight that is
/// not finite, a rank below 1, iterations below 1.
inline LoftqResult loftq(const ConstWeightsRef& w, const Scheme& scheme, Eigen::Index rank,
                         const LoftqOptions& options = {}) {
  const detail::FpEnvironment environment;
  detail::require(rank >= 1, "rank is ", rank, ", expected at least 1");
  detail::require(options.iterations >= 1, "iterations is ", options.iterations, ", expected at least 1");
  ThreadPool* const pool = options.low_rank.pool;
  LoftqResult best;
  RowMajorMatrix rest = w;
  for (int t = 0; t < options.iterations; ++t) {
    const WeightGrids grids = fit_min_max(scheme, rest, pool);
    QuantizedTensor base = grids.assemble(grids.encode(rest, pool));
    if (options.double_quantized) base = double_quantize(base).tensor;
    RowMajorMatrix residual = w;
    RowMajorMatrix values(w.rows(), w.cols());
    for (Eigen::Index r = 0; r < w.rows(); ++r)
      base.dequantize_line(static_cast<std::size_t>(r), 0, static_cast<std::size_t>(w.cols()),
                           values.data() + r * w.cols());
    residual -= values;
    if (t == 0) best.error_without = std::sqrt(residual.cast<double>().squaredNorm());
    LowRank start = best_low_rank(residual, rank, Eigen::MatrixXf(), options.low_rank);
    LowRank minus = start;
    minus.scale = -1.0;
    rest = residual;
    merge_low_rank(minus, rest, pool);
    const double error = std::sqrt(rest.cast<double>().squaredNorm());
    if (t == 0 || error < best.error) {
      best.base = std::move(base);
      best.start = start;
      best.error = error;
    }
    rest = w;
    merge_low_rank(minus, rest, pool);
  }
  return best;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
