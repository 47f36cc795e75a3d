// Softmax.
#pragma once

#include <Eigen/Core>
#include <cstddef>

#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

namespace detail {

/// x = exp(x - max(x)) for one column of n > 0 floats; returns the sum.
inline float exp_minus_max(float* x, std::size_t n, const KernelTable& table) noexcept {
  float sum = 0.0F;
  SoftmaxArgs args;
  args.x = x;
  args.rows = 1;
  args.n = n;
  args.first_visible = n;
  args.sums = &sum;
  table.softmax(args);
  return sum;
}

}  // namespace detail

/// x = exp(x) / sum of exp(x) for every column, with the column's maximum taken off first. A column with a NaN or +Inf
/// becomes NaN. A column's bits depend on nothing but its own values.
inline void softmax(MatrixRef x, const detail::KernelTable& kernels = detail::kernels()) {
  if (x.size() == 0) return;
  const detail::FpEnvironment environment;
  for (Eigen::Index c = 0; c < x.cols(); ++c) {
    const float sum = detail::exp_minus_max(x.col(c).data(), static_cast<std::size_t>(x.rows()), kernels);
    x.col(c) *= 1.0F / sum;
  }
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
