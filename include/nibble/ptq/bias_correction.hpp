// Bias correction: what rounding weights adds to the mean of a linear's output is taken off again.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/ptq/fold.hpp"
#include "nibble/ptq/weight_grids.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// What is to be added to a linear's output, N values: W E[x] - Wq E[xq] (Nagel et al. 2019, section 4.2), sums in double.
/// It goes into the bias where there is one, else it is one.
/// @param quantized     N x K, the dequantized weights
/// @param w             N x K, the float weights
/// @param mean          E[x], K values, of the float model's activations
/// @param quantized_mean E[xq], of what the quantized linear really gets: `mean`, or the quantized model's
/// Throws InvalidArgument where sizes do not fit or a value is not finite.
inline Eigen::VectorXf bias_correction(const ConstWeightsRef& quantized, const ConstWeightsRef& w,
                                       const Eigen::Ref<const Eigen::VectorXf>& mean,
                                       const Eigen::Ref<const Eigen::VectorXf>& quantized_mean,
                                       ThreadPool* pool = nullptr) {
  const detail::FpEnvironment environment;
  detail::require(quantized.rows() == w.rows() && quantized.cols() == w.cols(), "quantized is ", quantized.rows(),
                  " x ", quantized.cols(), ", w is ", w.rows(), " x ", w.cols());
  detail::require(mean.size() == w.cols() && quantized_mean.size() == w.cols(), "mean has ", mean.size(),
                  " elements, quantized_mean ", quantized_mean.size(), ", expected ", w.cols(), " each");
  detail::require_finite(mean, "mean");
  detail::require_finite(quantized_mean, "quantized_mean");
  detail::require_finite(w, "w");
  detail::require_finite(quantized, "quantized");
  Eigen::VectorXf b(w.rows());
  detail::for_tasks(pool, static_cast<std::size_t>(w.rows()), [&](std::size_t row, std::size_t) {
    const auto r = static_cast<Eigen::Index>(row);
    double sum = 0.0;
    for (Eigen::Index k = 0; k < w.cols(); ++k) {  // products of two floats are exact in double
      sum += static_cast<double>(w(r, k)) * static_cast<double>(mean[k]);
      sum -= static_cast<double>(quantized(r, k)) * static_cast<double>(quantized_mean[k]);
    }
    b[r] = static_cast<float>(sum);
  });
  return b;
}

/// The same where both meet the same activations: -(Wq - W) E[x].
inline Eigen::VectorXf bias_correction(const ConstWeightsRef& quantized, const ConstWeightsRef& w,
                                       const Eigen::Ref<const Eigen::VectorXf>& mean, ThreadPool* pool = nullptr) {
  return bias_correction(quantized, w, mean, mean, pool);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
