// Gradients of y = W x.
#pragma once

#include <Eigen/Core>

#include "nibble/gemm/dense.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/train/options.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Whether a gradient replaces what is there or is added to it.
enum class Gradient : bool { set, add };

/// dx = W^T dy: w is n x k in memory of any order, dy n x T, dx k x T. Gradient::add: dx += W^T dy.
/// Throws InvalidArgument where shapes do not fit.
template <class W>
void linear_backward_input(const Eigen::MatrixBase<W>& w, const ConstMatrixRef& dy, MatrixRef dx,
                           const TrainOptions& options = {}, Gradient how = Gradient::set) {
  Epilogue epilogue;
  if (how == Gradient::add) epilogue.add(dx);
  gemm(w.derived().transpose(), dy, dx, detail::product_options(options, epilogue));
}

/// dw = dy x^T: dy n x T, x k x T, dw n x k. Every element is summed by one fma a token in ascending order, so neither
/// threads nor dw's order matter. Gradient::add: dw += dy x^T. Throws InvalidArgument where shapes do not fit.
inline void linear_backward_weight(const ConstMatrixRef& dy, const ConstMatrixRef& x, MatrixRef dw,
                                   const TrainOptions& options = {}, Gradient how = Gradient::set) {
  Epilogue epilogue;
  if (how == Gradient::add) epilogue.add(dw);
  gemm(dy, x.transpose(), dw, detail::product_options(options, epilogue));
}

/// The same for row-major weights.
inline void linear_backward_weight(const ConstMatrixRef& dy, const ConstMatrixRef& x, RowMajorRef dw,
                                   const TrainOptions& options = {}, Gradient how = Gradient::set) {
  MatrixRef transposed(Eigen::Map<Eigen::MatrixXf, 0, Eigen::OuterStride<>>(
      dw.data(), dw.cols(), dw.rows(), Eigen::OuterStride<>(dw.outerStride())));
  linear_backward_weight(x, dy, transposed, options, how);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
