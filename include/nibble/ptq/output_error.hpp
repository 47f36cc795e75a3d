// What an error of weights does to a linear's output, from the Hessian of its input alone.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/ptq/weight_grids.hpp"
#include "nibble/quantize/quantize_view.hpp"
#include "nibble/quantize/tensor_view.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// A Hessian as the methods here take it: square, of `inputs` rows, finite, no negative diagonal.
inline void check_hessian(const ConstMatrixRef& h, Eigen::Index inputs) {
  require(h.rows() == inputs && h.cols() == inputs, "hessian is ", h.rows(), " x ", h.cols(), ", expected ",
          inputs, " x ", inputs, ", the weights' inputs");
  for (Eigen::Index c = 0; c < h.cols(); ++c)
    for (Eigen::Index r = 0; r < h.rows(); ++r)
      require(std::isfinite(h(r, c)) && (r != c || h(r, c) >= 0.0F), "hessian(", r, ", ", c, ") is ", h(r, c),
              ", expected a finite number, not negative on the diagonal");
}

/// w := dequantize(quantize(w)).
inline void fake_quantize_in_place(const Scheme& scheme, RowMajorMatrix& w, ThreadPool* pool) {
  const auto input = make_input(Front{}, w);
  fake_quantize_view(input.view(), scheme, {}, MatrixKind::output(w), pool);
}

/// tr(e h e^T), e being N x K. Same bits for any number of threads.
inline double quadratic_error(const RowMajorMatrix& e, const ConstMatrixRef& h, ThreadPool* pool) {
  Eigen::MatrixXf he(e.cols(), e.rows());  // h e^T: lies in memory as e does
  MatmulOptions options;
  options.pool = pool;
  gemm(h, e.transpose(), he, options);
  std::vector<double> rows(static_cast<std::size_t>(e.rows()));
  for_tasks(pool, rows.size(), [&](std::size_t row, std::size_t) {
    const auto r = static_cast<Eigen::Index>(row);
    const float* a = e.data() + r * e.cols();
    const float* b = he.data() + r * e.cols();
    double sum = 0.0;
    for (Eigen::Index k = 0; k < e.cols(); ++k)
      sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);  // exact
    rows[row] = sum;
  });
  double sum = 0.0;
  for (const double row : rows) sum += row;
  return sum;
}

}  // namespace detail

/// Squared error of the outputs where a linear's weights w (N x K) are replaced by `approximation`: tr(E H E^T) with
/// E = approximation - w. With H = (2 / n) sum x x^T it is twice the mean of |E x|^2 over the n tokens, exact without
/// the tokens. Throws InvalidArgument where shapes do not fit or the Hessian is not finite.
inline double output_error(const ConstWeightsRef& approximation, const ConstWeightsRef& w,
                           const ConstMatrixRef& hessian, ThreadPool* pool = nullptr) {
  const detail::FpEnvironment environment;
  detail::require(approximation.rows() == w.rows() && approximation.cols() == w.cols(), "approximation is ",
                  approximation.rows(), " x ", approximation.cols(), ", w is ", w.rows(), " x ", w.cols());
  detail::check_hessian(hessian, w.cols());
  if (w.size() == 0) return 0.0;
  return detail::quadratic_error(approximation - w, hessian, pool);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
