// SmoothQuant: moves the spread of activations into the weights, where it is easier to round.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/ptq/fold.hpp"
#include "nibble/ptq/output_error.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Largest magnitude of each input's weights over all linears that read it: K values.
inline Eigen::VectorXf input_absmax(const WeightList& weights) {
  const Eigen::Index inputs = detail::shared_inputs(weights);
  Eigen::VectorXf absmax = Eigen::VectorXf::Zero(inputs);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    detail::require_finite(*weights[i], detail::concat("weights[", i, "]"));
    for (Eigen::Index r = 0; r < weights[i]->rows(); ++r)
      absmax = absmax.cwiseMax(weights[i]->row(r).transpose().cwiseAbs());
  }
  return absmax;
}

/// s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), no less than 1e-5, as is max|W_j|: activations are to be divided by s,
/// the weights' inputs multiplied (Xiao et al. 2022, equation 4). A channel that was never active keeps s = 1.
/// @param activation_absmax  K values, max|X_j| over the calibration tokens
/// @param alpha              how much of the spread moves, 0 .. 1; 0.5 in the paper, about 0.85 for Llama
/// Throws InvalidArgument: sizes that do not fit, alpha outside of 0..1, a value that is not finite or negative.
inline Eigen::VectorXf smooth_scales(const Eigen::Ref<const Eigen::VectorXf>& activation_absmax,
                                     const Eigen::Ref<const Eigen::VectorXf>& weight_absmax, double alpha) {
  const detail::FpEnvironment environment;
  detail::require(alpha >= 0.0 && alpha <= 1.0, "alpha is ", alpha, ", expected 0 to 1");
  detail::require(activation_absmax.size() == weight_absmax.size(), "activation_absmax has ",
                  activation_absmax.size(), " elements, the weights have ", weight_absmax.size(), " inputs");
  constexpr double least = 1e-5;
  Eigen::VectorXf s(activation_absmax.size());
  for (Eigen::Index j = 0; j < s.size(); ++j) {
    const auto x = static_cast<double>(activation_absmax[j]);
    const auto w = static_cast<double>(weight_absmax[j]);
    detail::require(std::isfinite(x) && x >= 0.0, "activation_absmax[", j, "] is ", x,
                    ", expected a finite number, not negative");
    detail::require(std::isfinite(w) && w >= 0.0, "weight_absmax[", j, "] is ", w,
                    ", expected a finite number, not negative");
    const double v = std::pow(x, alpha) / std::pow(std::max(w, least), 1.0 - alpha);
    s[j] = x == 0.0 ? 1.0F : static_cast<float>(std::max(v, least));
  }
  return s;
}

/// The same with the weights themselves, of all linears that read these activations.
inline Eigen::VectorXf smooth_scales(const Eigen::Ref<const Eigen::VectorXf>& activation_absmax,
                                     const WeightList& weights, double alpha) {
  return smooth_scales(activation_absmax, input_absmax(weights), alpha);
}

/// The same for o, which reads attention over grouped queries: one scale a kv channel (the first argument of
/// unscale_outputs(v, ...)), the largest magnitudes taken over the query heads that share it. expand_to_queries() makes
/// them o's.
inline Eigen::VectorXf smooth_scales(const Eigen::Ref<const Eigen::VectorXf>& activation_absmax,
                                     const WeightList& weights, double alpha, const HeadLayout& heads) {
  return smooth_scales(max_over_queries(activation_absmax, heads), max_over_queries(input_absmax(weights), heads),
                       alpha);
}

struct SmoothSearchOptions {
  int grid = 20;               ///< alphas 0, 1 / grid .. 1
  HeadLayout heads{0, 0, 0};   ///< given for o: ties the scales of grouped queries
  ThreadPool* pool = nullptr;  ///< changes no bit
};

/// What a search over alphas found.
struct SmoothSearch {
  double alpha = 0.0;
  Eigen::VectorXf scales;      ///< K, one an input
  Eigen::VectorXf kv_scales;   ///< kv channels, where SmoothSearchOptions::heads was given
  double error = 0.0;          ///< mean squared error of an output value with these scales
  double plain_error = 0.0;    ///< and without any
  std::vector<double> errors;  ///< of each alpha
};

/// The alpha whose quantized product comes nearest to the float one, sum over the linears of
/// |Q(W diag(s)) Qa(diag(1/s) X) - W X|^2. No alpha is taken (scales of 1) where none is better than that.
/// @param x                 K x T calibration activations
/// @param weight_scheme     of Q
/// @param activation_scheme of Qa: int8 per_channel(1) for a scale a token, per_tensor for one static scale
inline SmoothSearch search_smooth_alpha(const ConstMatrixRef& x, const WeightList& weights,
                                        const Scheme& weight_scheme, const Scheme& activation_scheme,
                                        const SmoothSearchOptions& options = {}) {
  const detail::FpEnvironment environment;
  const Eigen::Index inputs = detail::shared_inputs(weights);
  detail::require(x.rows() == inputs && x.cols() >= 1, "x is ", x.rows(), " x ", x.cols(), ", expected ", inputs,
                  " rows and at least one token");
  detail::require(options.grid >= 1, "grid is ", options.grid, ", expected at least 1");
  detail::require_finite(x, "x");
  const bool tied = options.heads.heads != 0;
  const Eigen::VectorXf absmax = x.cwiseAbs().rowwise().maxCoeff();
  const Eigen::VectorXf weight_absmax = input_absmax(weights);
  MatmulOptions product;
  product.pool = options.pool;
  const QuantizeOptions threads{options.pool};
  std::vector<Eigen::MatrixXf> expected;
  double count = 0.0;
  for (const RowMajorMatrix* w : weights) {
    expected.emplace_back(w->rows(), x.cols());
    gemm(*w, x, expected.back(), product);
    count += static_cast<double>(expected.back().size());
  }
  const DynamicQuantizer activation_quantizer(activation_scheme);
  const auto error_of = [&](const Eigen::VectorXf& s) {
    Eigen::MatrixXf scaled = x;
    unscale_outputs(scaled, s);
    const Eigen::MatrixXf q = activation_quantizer.fake_quantize(scaled, threads);
    double sum = 0.0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      RowMajorMatrix w = *weights[i];
      scale_inputs(w, s);
      detail::fake_quantize_in_place(weight_scheme, w, options.pool);
      Eigen::MatrixXf y(w.rows(), x.cols());
      gemm(w, q, y, product);
      for (Eigen::Index c = 0; c < y.cols(); ++c)
        for (Eigen::Index r = 0; r < y.rows(); ++r) {
          const double e = static_cast<double>(y(r, c)) - static_cast<double>(expected[i](r, c));
          sum += detail::rounded(e * e);
        }
    }
    return count > 0.0 ? sum / count : 0.0;
  };
  SmoothSearch best;
  best.scales = Eigen::VectorXf::Ones(inputs);
  if (tied) best.kv_scales = Eigen::VectorXf::Ones(max_over_queries(absmax, options.heads).size());
  best.error = best.plain_error = error_of(best.scales);
  for (int i = 0; i <= options.grid; ++i) {
    const double alpha = static_cast<double>(i) / options.grid;
    Eigen::VectorXf kv;
    Eigen::VectorXf s;
    if (tied) {
      kv = smooth_scales(max_over_queries(absmax, options.heads), max_over_queries(weight_absmax, options.heads),
                         alpha);
      s = expand_to_queries(kv, options.heads);
    } else {
      s = smooth_scales(absmax, weight_absmax, alpha);
    }
    best.errors.push_back(error_of(s));
    if (best.errors.back() >= best.error) continue;
    best.error = best.errors.back();
    best.alpha = alpha;
    best.scales = s;
    best.kv_scales = kv;
  }
  return best;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
