// The gate of a SwiGLU feed-forward block.
#pragma once

#include <Eigen/Core>
#include <cstddef>

#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// gate = silu(gate) * up, element by element, the bits of Epilogue().silu().multiply(up).
inline void silu_multiply(MatrixRef gate, const ConstMatrixRef& up,
                          const detail::KernelTable& kernels = detail::kernels()) {
  detail::require(gate.rows() == up.rows() && gate.cols() == up.cols(), "gate is ", gate.rows(), " x ",
                  gate.cols(), " and up is ", up.rows(), " x ", up.cols(), ", expected the same shape");
  if (gate.size() == 0) return;
  const detail::FpEnvironment environment;
  const detail::EpilogueOp ops[2] = {
      {detail::EpilogueOpKind::silu, nullptr, 0},
      {detail::EpilogueOpKind::multiply, up.data(), static_cast<std::size_t>(up.outerStride())}};
  detail::EpilogueArgs args;
  args.acc = gate.data();
  args.acc_stride = static_cast<std::size_t>(gate.outerStride());
  args.rows = static_cast<std::size_t>(gate.cols());
  args.cols = static_cast<std::size_t>(gate.rows());
  args.ops = ops;
  args.op_count = 2;
  args.out = gate.data();
  args.out_stride = args.acc_stride;
  kernels.epilogue(args);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
