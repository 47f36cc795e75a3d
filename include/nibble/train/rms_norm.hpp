// Gradients of RMS normalisation.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <vector>

#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/train/options.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Gradients of y = f x * weight, f = 1 / sqrt(mean of x^2 + epsilon), for every column (a token) of x, n x T:
///   dx_i = f (weight_i dy_i) - f^3 x_i / n * sum over j of weight_j dy_j x_j
///   dweight_i = sum over tokens of dy_i x_i f
/// Sums over n are in double. dx may be dy. dweight, n floats, is left alone where nullptr; else it is set.
/// add: T columns that dx gets on top (a residual's gradient), or nullptr.
/// Throws InvalidArgument where shapes do not fit.
inline void rms_norm_backward(const ConstMatrixRef& x, const Eigen::Ref<const Eigen::VectorXf>& weight,
                              float epsilon, const ConstMatrixRef& dy, MatrixRef dx,
                              Eigen::VectorXf* dweight = nullptr, const ConstMatrixRef* add = nullptr,
                              const TrainOptions& options = {}) {
  const Eigen::Index n = x.rows();
  detail::require(weight.size() == n, "weight has ", weight.size(), " elements, expected ", n);
  detail::require_shape(dy, n, x.cols(), "dy");
  detail::require_shape(dx, n, x.cols(), "dx");
  if (add != nullptr) detail::require_shape(*add, n, x.cols(), "add");
  if (dweight != nullptr) *dweight = Eigen::VectorXf::Zero(n);
  if (x.size() == 0) return;
  const detail::FpEnvironment environment;
  const auto chunks =
      detail::ceil_div(static_cast<std::size_t>(x.cols()), static_cast<std::size_t>(detail::train_chunk));
  Eigen::MatrixXf partial(dweight != nullptr ? n : 0, static_cast<Eigen::Index>(chunks));
  partial.setZero();
  detail::for_chunks(options.pool, x.cols(), [&](Eigen::Index first, Eigen::Index tokens, std::size_t task) {
    const detail::FpEnvironment here;
    for (Eigen::Index t = first; t < first + tokens; ++t) {
      const auto xt = x.col(t).array();
      const auto dyt = dy.col(t).array();
      const double squares = xt.cast<double>().square().sum();
      const double inner = (xt * dyt * weight.array()).cast<double>().sum();
      const double f = 1.0 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(epsilon));
      const auto scale = static_cast<float>(f);
      const auto pull = static_cast<float>(f * f * f * inner / static_cast<double>(n));
      if (dweight != nullptr) partial.col(static_cast<Eigen::Index>(task)).array() += dyt * xt * scale;
      if (add != nullptr)
        dx.col(t).array() = add->col(t).array() + (dyt * weight.array() * scale - xt * pull);
      else
        dx.col(t).array() = dyt * weight.array() * scale - xt * pull;
    }
  });
  if (dweight != nullptr)
    for (Eigen::Index c = 0; c < partial.cols(); ++c) *dweight += partial.col(c);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
