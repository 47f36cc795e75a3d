// Gradients of SwiGLU's gate.
#pragma once

#include <Eigen/Core>

#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/train/options.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Gradients of y = silu(gate) * up, all n x T, with s = 1 / (1 + exp(-gate)):
///   dup = dy * gate s
///   dgate = dy * up * s (1 + gate (1 - s))
/// dgate and dup may be any of the inputs. Throws InvalidArgument where shapes do not fit.
inline void silu_multiply_backward(const ConstMatrixRef& gate, const ConstMatrixRef& up, const ConstMatrixRef& dy,
                                   MatrixRef dgate, MatrixRef dup, const TrainOptions& options = {}) {
  detail::require_shape(up, gate.rows(), gate.cols(), "up");
  detail::require_shape(dy, gate.rows(), gate.cols(), "dy");
  detail::require_shape(dgate, gate.rows(), gate.cols(), "dgate");
  detail::require_shape(dup, gate.rows(), gate.cols(), "dup");
  detail::for_chunks(options.pool, gate.cols(), [&](Eigen::Index first, Eigen::Index tokens, std::size_t) {
    const detail::FpEnvironment environment;
    using Lanes = Eigen::Array<float, 16, 1>;
    const Eigen::Index n = gate.rows();
    for (Eigen::Index t = first; t < first + tokens; ++t) {
      const auto step = [&](const Lanes& g, const Lanes& u, const Lanes& d, Lanes& dg, Lanes& du) {
        // Eigen's exp stays finite.
        const Lanes s = (1.0F + (-g).exp()).inverse();
        const Lanes gs = g * s;
        du = d * gs;
        dg = d * u * (s + gs * (1.0F - s));
      };
      Lanes dg, du;
      Eigen::Index i = 0;
      for (; i + 16 <= n; i += 16) {
        step(gate.col(t).segment<16>(i).array(), up.col(t).segment<16>(i).array(),
             dy.col(t).segment<16>(i).array(), dg, du);
        dgate.col(t).segment<16>(i) = dg;
        dup.col(t).segment<16>(i) = du;
      }
      if (i == n) continue;
      const Eigen::Index rest = n - i;
      const auto padded = [&](const ConstMatrixRef& m) {
        Lanes lanes = Lanes::Zero();
        lanes.head(rest) = m.col(t).tail(rest).array();
        return lanes;
      };
      step(padded(gate), padded(up), padded(dy), dg, du);
      dgate.col(t).tail(rest) = dg.head(rest);
      dup.col(t).tail(rest) = du.head(rest);
    }
  });
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
