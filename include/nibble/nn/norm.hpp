// Root-mean-square normalisation.
#pragma once

#include <Eigen/Core>
#include <cstddef>

#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// out = x / sqrt(mean of x^2 + epsilon) * weight for every column (a token), n x m; `out` may be x. A token's bits
/// depend on nothing but its own values (RmsNormArgs in kernels/args.hpp has the order of its sum).
/// @param weight  n floats
/// Throws InvalidArgument where shapes do not fit.
inline void rms_norm(const ConstMatrixRef& x, const Eigen::Ref<const Eigen::VectorXf>& weight, float epsilon,
                     MatrixRef out, const detail::KernelTable& kernels = detail::kernels()) {
  detail::require(weight.size() == x.rows(), "weight has ", weight.size(), " elements, expected ", x.rows());
  detail::require(out.rows() == x.rows() && out.cols() == x.cols(), "out is ", out.rows(), " x ", out.cols(),
                  ", expected ", x.rows(), " x ", x.cols());
  if (x.size() == 0) return;
  const detail::FpEnvironment environment;
  detail::RmsNormArgs args;
  args.x = x.data();
  args.x_stride = static_cast<std::size_t>(x.outerStride());
  args.weight = weight.data();
  args.rows = static_cast<std::size_t>(x.cols());
  args.n = static_cast<std::size_t>(x.rows());
  args.epsilon = epsilon;
  args.out = out.data();
  args.out_stride = static_cast<std::size_t>(out.outerStride());
  kernels.rms_norm(args);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
