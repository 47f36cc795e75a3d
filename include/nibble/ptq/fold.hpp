// Moving factors from one matrix into its neighbours so that the float function stays the same.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/ptq/weight_grids.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// The weights of linears that share one input, N_i x K each; none may be null.
using WeightList = std::vector<const RowMajorMatrix*>;

namespace detail {

/// Throws InvalidArgument, naming `name`, for the first value that is not finite.
template <class D>
void require_finite(const Eigen::DenseBase<D>& m, std::string_view name) {
  for (Eigen::Index c = 0; c < m.cols(); ++c)
    for (Eigen::Index r = 0; r < m.rows(); ++r)
      require(std::isfinite(m.derived().coeff(r, c)), name, "(", r, ", ", c, ") is ", m.derived().coeff(r, c),
              ", expected a finite number");
}

inline void require_positive(const Eigen::Ref<const Eigen::VectorXf>& s, std::string_view name) {
  for (Eigen::Index i = 0; i < s.size(); ++i)
    require(std::isfinite(s[i]) && s[i] > 0.0F, name, "[", i, "] is ", s[i],
            ", expected a positive finite number");
}

/// The K that all matrices of the list share.
inline Eigen::Index shared_inputs(const WeightList& weights) {
  require(!weights.empty(), "weights is empty, expected one matrix or more");
  for (std::size_t i = 0; i < weights.size(); ++i) {
    require(weights[i] != nullptr, "weights[", i, "] is null");
    require(weights[i]->cols() == weights[0]->cols(), "weights[", i, "] has ", weights[i]->cols(),
            " columns, weights[0] has ", weights[0]->cols(), ": linears that share an input are expected");
  }
  return weights[0]->cols();
}

}  // namespace detail

/// Heads of attention, for what is tied by grouped queries: channel c of key/value head h is read by the query heads
/// h * heads / kv_heads to (h + 1) * heads / kv_heads - 1, so factors of o's inputs come one a kv channel.
struct HeadLayout {
  Eigen::Index heads = 1;
  Eigen::Index kv_heads = 1;  ///< a divisor of heads
  Eigen::Index head_size = 1;

  Eigen::Index channels() const noexcept { return heads * head_size; }
  Eigen::Index kv_channels() const noexcept { return kv_heads * head_size; }
  /// The kv channel behind input c of o.
  Eigen::Index kv_channel(Eigen::Index c) const noexcept {
    return c / head_size / (heads / kv_heads) * head_size + c % head_size;
  }
  void check() const {
    detail::require(heads >= 1 && kv_heads >= 1 && head_size >= 1 && heads % kv_heads == 0, "heads is ", heads,
                    ", kv_heads ", kv_heads, ", head_size ", head_size,
                    ": expected positive numbers, heads a multiple of kv_heads");
  }
};

/// One value a kv channel, out of one an input of o: the largest over the query heads that read it.
inline Eigen::VectorXf max_over_queries(const Eigen::Ref<const Eigen::VectorXf>& values,
                                        const HeadLayout& layout) {
  layout.check();
  detail::require(values.size() == layout.channels(), "values has ", values.size(), " elements, expected ",
                  layout.channels(), " (heads * head_size)");
  Eigen::VectorXf out(layout.kv_channels());
  std::vector<bool> seen(static_cast<std::size_t>(out.size()), false);
  for (Eigen::Index c = 0; c < values.size(); ++c) {
    const Eigen::Index k = layout.kv_channel(c);
    const auto i = static_cast<std::size_t>(k);
    out[k] = seen[i] ? std::max(out[k], values[c]) : values[c];
    seen[i] = true;
  }
  return out;
}

/// The mean instead of the largest.
inline Eigen::VectorXf mean_over_queries(const Eigen::Ref<const Eigen::VectorXf>& values,
                                         const HeadLayout& layout) {
  layout.check();
  detail::require(values.size() == layout.channels(), "values has ", values.size(), " elements, expected ",
                  layout.channels(), " (heads * head_size)");
  Eigen::VectorXd sum = Eigen::VectorXd::Zero(layout.kv_channels());
  for (Eigen::Index c = 0; c < values.size(); ++c) sum[layout.kv_channel(c)] += static_cast<double>(values[c]);
  const auto shared = layout.heads / layout.kv_heads;  // heads of queries a head of keys
  return (sum / static_cast<double>(shared)).cast<float>();
}

/// The way back: each kv channel's value for all inputs of o that read it.
inline Eigen::VectorXf expand_to_queries(const Eigen::Ref<const Eigen::VectorXf>& kv, const HeadLayout& layout) {
  layout.check();
  detail::require(kv.size() == layout.kv_channels(), "kv has ", kv.size(), " elements, expected ",
                  layout.kv_channels(), " (kv_heads * head_size)");
  Eigen::VectorXf out(layout.channels());
  for (Eigen::Index c = 0; c < out.size(); ++c) out[c] = kv[layout.kv_channel(c)];
  return out;
}

/// w := w diag(s): what a linear becomes whose input is divided by s (K). s need not be positive. w, here and below, is
/// any float matrix that can be written to, of either storage order.
template <class W>
void scale_inputs(W&& w, const Eigen::Ref<const Eigen::VectorXf>& s) {
  const detail::FpEnvironment environment;
  detail::require(s.size() == w.cols(), "s has ", s.size(), " elements, w has ", w.cols(), " columns");
  detail::require_finite(s, "s");
  w.array().rowwise() *= s.transpose().array();
}

/// w := diag(1 / s) w: the linear that writes x / s (N) instead of x; where it has a bias, that is a matrix of one column.
/// Between the two may stand what commutes with positive factors: nothing, ReLU, a gate's product, attention's mean.
template <class W>
void unscale_outputs(W&& w, const Eigen::Ref<const Eigen::VectorXf>& s) {
  const detail::FpEnvironment environment;
  detail::require(s.size() == w.rows(), "s has ", s.size(), " elements, w has ", w.rows(), " rows");
  detail::require_positive(s, "s");
  w.array().colwise() /= s.array();
}

/// norm := norm / s: the weights of an RMS norm that gives x / s instead of x.
inline void unscale_norm(Eigen::Ref<Eigen::VectorXf> norm, const Eigen::Ref<const Eigen::VectorXf>& s) {
  const detail::FpEnvironment environment;
  detail::require(s.size() == norm.size(), "s has ", s.size(), " elements, norm has ", norm.size());
  detail::require_positive(s, "s");
  norm.array() /= s.array();
}

/// Folds an RMS norm's weight g into the linears that read it, w := w diag(g) and g := 1, so that the norm commutes with
/// rotations (QuaRot, section 3.1; SliceGPT, equation 2).
template <class... W>
void fold_norm(Eigen::Ref<Eigen::VectorXf> norm, W&&... readers) {
  ((detail::require(readers.cols() == norm.size(), "a reader of the norm has ", readers.cols(),
                    " columns, norm has ", norm.size(), " elements")),
   ...);
  (scale_inputs(readers, norm), ...);
  norm.setOnes();
}

/// The Hessian (sums of x x^T) of inputs divided by s: diag(1 / s) h diag(1 / s).
inline Eigen::MatrixXf unscale_hessian(const ConstMatrixRef& h, const Eigen::Ref<const Eigen::VectorXf>& s) {
  const detail::FpEnvironment environment;
  detail::require(h.rows() == h.cols() && h.rows() == s.size(), "h is ", h.rows(), " x ", h.cols(), ", s has ",
                  s.size(), " elements: expected a square matrix of s's size");
  detail::require_positive(s, "s");
  Eigen::MatrixXf out(h.rows(), h.cols());
  for (Eigen::Index c = 0; c < h.cols(); ++c)
    for (Eigen::Index r = 0; r < h.rows(); ++r)  // symmetric to the bit where h is
      out(r, c) = static_cast<float>(static_cast<double>(h(r, c)) /
                                     (static_cast<double>(s[r]) * static_cast<double>(s[c])));
  return out;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
