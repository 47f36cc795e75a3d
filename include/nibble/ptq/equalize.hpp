// Cross-layer equalization: two linears share out the spread of the channels between them.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <cstddef>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/ptq/fold.hpp"
#include "nibble/ptq/smooth_quant.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Factors of the channels between a linear `first` (N x K) and the linears `second` (M_i x N) that read it: s_i =
/// sqrt(r1_i r2_i) / r2_i, r1 and r2 the largest magnitudes of a channel's weights in the one and the others (Nagel et
/// al. 2019, equation 11). unscale_outputs(first, s) and scale_inputs(second, s) make both sqrt(r1_i r2_i). A channel
/// without weights on one side keeps s = 1.
///
/// What lies between must be linear or positively homogeneous: v -> o, up -> down (the gate's factor is in between),
/// ReLU. Quantized with one scale a row, or with groups along the inputs, `first` does not care; `second` does.
/// Throws InvalidArgument where shapes do not fit or a weight is not finite.
inline Eigen::VectorXf equalizing_scales(const ConstWeightsRef& first, const WeightList& second) {
  const detail::FpEnvironment environment;
  const Eigen::VectorXf r2 = input_absmax(second);
  detail::require(first.rows() == r2.size(), "first has ", first.rows(), " rows, second ", r2.size(), " columns");
  detail::require_finite(first, "first");
  Eigen::VectorXf s = Eigen::VectorXf::Ones(first.rows());
  for (Eigen::Index i = 0; i < s.size() && first.cols() != 0; ++i) {
    const auto a = static_cast<double>(first.row(i).cwiseAbs().maxCoeff());
    const auto b = static_cast<double>(r2[i]);
    const auto v = static_cast<float>(std::sqrt(a * b) / b);
    if (a > 0.0 && b > 0.0 && std::isnormal(v)) s[i] = v;
  }
  return s;
}

/// The same for v -> o with grouped queries: one factor a row of v, o's largest magnitudes taken over the query heads
/// that share it. o is M x (heads * head_size); its factors are expand_to_queries(s, heads).
inline Eigen::VectorXf equalizing_scales(const ConstWeightsRef& v, const RowMajorMatrix& o,
                                         const HeadLayout& heads) {
  const Eigen::VectorXf r2 = max_over_queries(input_absmax({&o}), heads);
  const RowMajorMatrix folded = r2.transpose();
  return equalizing_scales(v, {&folded});
}

/// Applies equalizing_scales() and returns them. bias: first's (N), or null.
inline Eigen::VectorXf equalize(RowMajorMatrix& first, RowMajorMatrix& second, Eigen::VectorXf* bias = nullptr) {
  const Eigen::VectorXf s = equalizing_scales(first, {&second});
  detail::require(bias == nullptr || bias->size() == s.size(), "bias has ", bias == nullptr ? 0 : bias->size(),
                  " elements, first has ", s.size(), " rows");
  unscale_outputs(first, s);
  if (bias != nullptr) unscale_outputs(*bias, s);
  scale_inputs(second, s);
  return s;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
