// One matrix of a block by one method.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../block.hpp"
#include "method.hpp"
#include "nibble/ptq/awq.hpp"
#include "nibble/ptq/cholesky.hpp"
#include "nibble/ptq/double_quant.hpp"
#include "nibble/ptq/gptq.hpp"
#include "nibble/ptq/hessian.hpp"
#include "nibble/ptq/hqq.hpp"
#include "nibble/ptq/weight_grids.hpp"
#include "nibble/quantize/quantizer.hpp"
#include "report.hpp"

namespace llm {

struct RoundingOptions {
  double correction = 1.0;  // how much of earlier layers' error a matrix makes up for, 0..1
  double residual = 1.0;    // the same for the error of the residual stream that a matrix adds to
  double max_change = 4.0;  // most that these two may change a matrix, a share of its norm
  double damp = 0.05;
  bool act_order = true;
  bool static_groups = true;
  std::string grids = "weighted-mse";  // min-max, mse, weighted-mse or clip: the ranges that GPTQ rounds in

  nlohmann::json to_json() const {
    return {{"correction", correction},
            {"residual", residual},
            {"max_change", max_change},
            {"damp", damp},
            {"act_order", act_order},
            {"static_groups", static_groups},
            {"grids", grids}};
  }
};

/// Sums over the calibration tokens of what feeds a matrix: x~ from the quantized model, x from the float one.
class InputStatistics {
 public:
  InputStatistics(Eigen::Index inputs, nibble::ThreadPool* pool) : hessian_(inputs, pool), pool_(pool) {}
  void add(const Eigen::MatrixXf& xq) { hessian_.add(xq); }
  void add(const Eigen::MatrixXf& xq, const Eigen::MatrixXf& x) { hessian_.add(x, xq); }
  /// The difference of the residual streams that the matrix' outputs are added to, float less quantized.
  void add_residual(const Eigen::MatrixXf& difference, const Eigen::MatrixXf& xq) {
    if (residual_.size() == 0) residual_ = Eigen::MatrixXf::Zero(difference.rows(), xq.rows());
    nibble::MatmulOptions options;
    options.pool = pool_;
    options.epilogue = nibble::Epilogue().add(residual_);
    nibble::gemm(difference, xq.transpose(), residual_, options);
  }
  /// No more tokens come.
  void finish() {
    matrix_ = hessian_.matrix();
    if (residual_.size() != 0) residual_ *= 2.0F / static_cast<float>(hessian_.tokens());
  }

  const nibble::Hessian& sums() const { return hessian_; }
  const Eigen::MatrixXf& matrix() const { return matrix_; }

  /// tr(e H e^T).
  double energy(const WeightMatrix& e) const { return nibble::quadratic_error(e, matrix_, pool_); }

  /// The weights that bring the quantized stream's output nearest to the float stream's: with R = (2 / n) sum r x~^T of
  /// the residual's difference r, and D of Hessian, W + (correction W D + residual R) (H + damp)^-1. A correction beyond
  /// max_change of W is no correction any more (a token of huge activations that the quantized model has lost asks for
  /// one without bound): then it is damped more. W itself where there are not two streams, or nothing helps.
  WeightMatrix target(const WeightMatrix& w, const RoundingOptions& options) {
    if (!hessian_.two_streams()) return w;
    if (difference_.size() == 0) difference_ = hessian_.difference();
    nibble::MatmulOptions product;
    product.pool = pool_;
    Eigen::MatrixXf wanted = Eigen::MatrixXf::Zero(w.rows(), w.cols());
    if (options.correction > 0.0) {
      nibble::gemm(w, difference_, wanted, product);
      wanted *= static_cast<float>(options.correction);
    }
    if (residual_.size() != 0) wanted += residual_ * static_cast<float>(options.residual);
    Eigen::MatrixXf half(w.rows(), w.cols()), change(w.rows(), w.cols());
    double damp = options.damp;
    for (std::size_t step = 0; damp <= 100.0; ++step, damp = std::max(4.0 * damp, 0.001)) {
      const Eigen::MatrixXf& u = factor(step, damp);
      if (u.size() == 0) continue;
      nibble::gemm(wanted, u.transpose(), half, product);
      nibble::gemm(half, u, change, product);
      const double size = std::sqrt(static_cast<double>(change.squaredNorm()));
      if (size <= options.max_change * std::sqrt(static_cast<double>(w.squaredNorm()))) return w + change;
    }
    return w;
  }

 private:
  /// U with U^T U = (H + damp)^-1, the one of attempt `step`; empty where there is none.
  const Eigen::MatrixXf& factor(std::size_t step, double damp) {
    if (step < factors_.size()) return factors_[step];
    Eigen::MatrixXf u = matrix_;
    u.diagonal().array() += static_cast<float>(damp * matrix_.diagonal().cast<double>().mean());
    if (nibble::inverse_cholesky(u, pool_).ok)
      u.triangularView<Eigen::StrictlyLower>().setZero();
    else
      u.resize(0, 0);
    factors_.push_back(std::move(u));
    return factors_.back();
  }

  nibble::Hessian hessian_;
  nibble::ThreadPool* pool_;
  Eigen::MatrixXf matrix_;
  Eigen::MatrixXf difference_;
  Eigen::MatrixXf residual_;
  std::vector<Eigen::MatrixXf> factors_;
};

/// What a matrix becomes.
struct MatrixPlan {
  std::optional<nibble::Scheme> scheme;  // nothing: it stays as the file has it
  Method method;
  std::size_t double_quant_block =
      0;  // scales in a block of double quantization; 0: scales as the scheme has them
};

/// w (outputs x inputs, after the run's transforms) as `plan` says. statistics: of its inputs, where there are any.
inline nibble::QuantizedTensor round_matrix(const WeightMatrix& w, const MatrixPlan& plan,
                                            InputStatistics* statistics, const RoundingOptions& options,
                                            nibble::ThreadPool* pool, TensorReport& report) {
  const nibble::Scheme& scheme = *plan.scheme;
  nibble::QuantizeOptions threads;
  threads.pool = pool;
  nibble::MseOptions mse;
  mse.pool = pool;
  Rounding rounding = nibble::has_scales(scheme.format) ? plan.method.rounding : Rounding::rtn;
  if (rounding == Rounding::hqq && scheme.symmetry == nibble::Symmetry::symmetric) {
    rounding = Rounding::mse;
    report.note = "HQQ moves zero points, of which the format has none: mse";
  }
  report.method = std::string(name_of(rounding));
  report.format = name_of(scheme);
  nibble::QuantizedTensor q;
  const auto with = [&](const nibble::WeightGrids& grids) { return grids.assemble(grids.encode(w, pool)); };
  const auto clipped = [&](const nibble::ConstWeightsRef& of) {
    nibble::ClipOptions clip;
    clip.loss = nibble::ClipLoss::row;
    clip.pool = pool;
    return nibble::awq_clip(scheme, of, statistics->matrix(), clip);
  };
  std::optional<double> output_error;
  switch (rounding) {
    case Rounding::rtn: q = nibble::DynamicQuantizer(scheme).quantize(w, threads); break;
    case Rounding::mse: q = with(nibble::fit_mse(scheme, w, mse)); break;
    case Rounding::importance:
      mse.norm = 2.0;
      q = with(nibble::fit_mse(scheme, w, mse, statistics->sums().mean_square()));
      break;
    case Rounding::clip: q = with(clipped(w)); break;
    case Rounding::hqq: {
      nibble::HqqOptions hqq;
      hqq.pool = pool;
      q = with(nibble::fit_hqq(nibble::fit_min_max(scheme, w, pool), w, hqq));
      break;
    }
    case Rounding::gptq: {
      nibble::GptqOptions gptq;
      gptq.damp = options.damp;
      gptq.act_order = options.act_order;
      gptq.static_groups = options.static_groups;
      gptq.fit_grids = [&](const nibble::RowMajorMatrix& target) {
        if (options.grids == "min-max") return nibble::fit_min_max(scheme, target, pool);
        if (options.grids == "mse") return nibble::fit_mse(scheme, target, mse);
        if (options.grids == "clip") return clipped(target);
        mse.norm = 2.0;
        return nibble::fit_mse(scheme, target, mse, statistics->sums().mean_square());
      };
      gptq.correction = 0.0;  // the target has it, beside the residual's
      gptq.pool = pool;
      const WeightMatrix target = statistics->target(w, options);
      nibble::GptqResult result = nibble::gptq(target, statistics->sums(), scheme, gptq);
      nibble::detail::require<nibble::Unsupported>(result.permutation.empty(),
                                                   "GPTQ in descending order needs static groups here");
      q = std::move(result.weights);
      report.note = result.report;
      output_error = result.error / std::max(statistics->energy(target), 1e-30);
      break;
    }
  }
  if (plan.double_quant_block != 0 && nibble::has_scales(scheme.format)) {
    nibble::DoubleQuantOptions twice;
    twice.block = plan.double_quant_block;
    nibble::DoubleQuantizedTensor compact = nibble::double_quantize(q, twice);
    report.bytes = compact.byte_size();
    q = std::move(compact.tensor);
  } else {
    report.bytes = q.byte_size();
  }
  WeightMatrix error(w.rows(), w.cols());
  q.dequantize(error.data(), pool);
  error -= w;
  report.weight_error =
      static_cast<double>(error.squaredNorm()) / std::max(static_cast<double>(w.squaredNorm()), 1e-30);
  if (output_error)
    report.output_error = *output_error;
  else if (statistics != nullptr)
    report.output_error = statistics->energy(error) / std::max(statistics->energy(w), 1e-30);
  return q;
}

}  // namespace llm
