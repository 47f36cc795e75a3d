// One matrix of a block by one method.
#pragma once

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>

#include "../block.hpp"
#include "method.hpp"
#include "nibble/ptq/weight_grids.hpp"
#include "nibble/quantize/quantizer.hpp"
#include "report.hpp"

namespace llm {

struct RoundingOptions {
  float correction = 1.0F;  // how much of earlier layers' error a matrix makes up for, 0..1
  float residual = 0.0F;    // the same for the error of the residual that a matrix' outputs are added to
  float damp = 0.01F;

  nlohmann::json to_json() const { return {{"correction", correction}, {"residual", residual}, {"damp", damp}}; }
};

/// Sums over the calibration tokens of what feeds a matrix: x~ from the quantized model, x from the float one.
class InputStatistics {
 public:
  InputStatistics(bool two_streams, nibble::ThreadPool* pool) : two_streams_(two_streams) { options_.pool = pool; }
  void add(const Eigen::MatrixXf& xq) {
    if (hessian_.size() == 0) {
      hessian_ = Eigen::MatrixXf::Zero(xq.rows(), xq.rows());
      if (two_streams_) cross_ = hessian_;
    }
    options_.epilogue = nibble::Epilogue().add(hessian_);
    nibble::gemm(xq, xq.transpose(), hessian_, options_);
    tokens_ += static_cast<std::size_t>(xq.cols());
  }
  void add(const Eigen::MatrixXf& xq, const Eigen::MatrixXf& x) {
    add(xq);
    options_.epilogue = nibble::Epilogue().add(cross_);
    nibble::gemm(x, xq.transpose(), cross_, options_);
  }
  /// The difference of the residual streams that the matrix' outputs are added to.
  void add_residual(const Eigen::MatrixXf& difference, const Eigen::MatrixXf& xq) {
    if (residual_.size() == 0) residual_ = Eigen::MatrixXf::Zero(difference.rows(), xq.rows());
    options_.epilogue = nibble::Epilogue().add(residual_);
    nibble::gemm(difference, xq.transpose(), residual_, options_);
  }

  const Eigen::MatrixXf& hessian() const { return hessian_; }
  const Eigen::MatrixXf& cross() const { return cross_; }
  const Eigen::MatrixXf& residual() const { return residual_; }
  std::size_t tokens() const { return tokens_; }

  /// |e X~|^2 / |w X~|^2.
  double output_error(const WeightMatrix& e, const WeightMatrix& w) {
    return energy(e) / std::max(energy(w), 1e-30);
  }

 private:
  double energy(const WeightMatrix& w) {
    Eigen::MatrixXf product(w.rows(), w.cols());
    options_.epilogue = {};
    nibble::gemm(w, hessian_, product, options_);
    return product.cwiseProduct(w).cast<double>().sum();
  }

  bool two_streams_;
  nibble::MatmulOptions options_;
  Eigen::MatrixXf hessian_;
  Eigen::MatrixXf cross_;
  Eigen::MatrixXf residual_;
  std::size_t tokens_ = 0;
};

inline nibble::QuantizedTensor round_matrix(const WeightMatrix& w, const nibble::Scheme& scheme,
                                            const Method& method, InputStatistics* statistics,
                                            const RoundingOptions&, nibble::ThreadPool* pool,
                                            TensorReport& report) {
  nibble::QuantizeOptions options;
  options.pool = pool;
  report.method = std::string(name_of(method.rounding));
  nibble::QuantizedTensor q;
  if (method.rounding == Rounding::rtn || !nibble::has_scales(scheme.format)) {
    q = nibble::DynamicQuantizer(scheme).quantize(w, options);
    report.method = "rtn";
  } else {
    nibble::MseOptions mse;
    mse.pool = pool;
    const nibble::WeightGrids grids = nibble::fit_mse(scheme, w, mse);
    q = grids.assemble(grids.encode(w, pool));
  }
  WeightMatrix error(w.rows(), w.cols());
  q.dequantize(error.data(), pool);
  error -= w;
  report.weight_error =
      static_cast<double>(error.squaredNorm()) / std::max(static_cast<double>(w.squaredNorm()), 1e-30);
  if (statistics != nullptr) report.output_error = statistics->output_error(error, w);
  return q;
}

}  // namespace llm
