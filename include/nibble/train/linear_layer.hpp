// Linear layers in training, whatever holds their weights.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "nibble/core/error.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/gemm/epilogue.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/train/linear.hpp"
#include "nibble/train/options.hpp"
#include "nibble/train/parameters.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// y = W x in training: W as dense floats, quantization-aware, or frozen and quantized with a trained low-rank term.
/// rows() are outputs, cols() inputs; activations are cols() x T, a token a column. forward() may run twice in a step
/// (activation checkpointing) and gives the same bits both times. One thread at a time may use a layer.
class LinearLayer {
 public:
  virtual ~LinearLayer() = default;

  virtual Eigen::Index rows() const = 0;
  virtual Eigen::Index cols() const = 0;

  /// y = epilogue(W x). Throws InvalidArgument where shapes do not fit.
  virtual void forward(const ConstMatrixRef& x, MatrixRef y, const TrainOptions& options,
                       const Epilogue& epilogue = {}) = 0;

  /// With the x of the last forward() and the gradient dy of its product: gradients of the parameters are added to theirs.
  /// @param dx   set or added to, as `how` says; nullptr: not wanted
  virtual void backward(const ConstMatrixRef& x, const ConstMatrixRef& dy, MatrixRef* dx, Gradient how,
                        const TrainOptions& options) = 0;

  /// Appends what is trained, names starting with `prefix`. The pointers stay valid as long as the layer does.
  virtual void append_parameters(const std::string& prefix, Parameters& out) = 0;

  /// Before the first forward() of a step, after the parameters have changed: what is done once a step.
  virtual void begin_step(std::uint64_t /*step*/) {}
  /// After the parameters have changed, before they are kept anywhere: what was not to change is put back.
  virtual void end_step() {}

 protected:
  LinearLayer() = default;
  LinearLayer(const LinearLayer&) = default;
  LinearLayer& operator=(const LinearLayer&) = default;
};

/// Dense floats.
class DenseLinear : public LinearLayer {
 public:
  /// @param weight   N x K
  /// @param trained  false: frozen; then no gradient is held and there are no parameters
  explicit DenseLinear(RowMajorMatrix weight, bool trained = true)
      : weight_(std::move(weight)), trained_(trained) {
    if (trained_) gradient_ = RowMajorMatrix::Zero(weight_.rows(), weight_.cols());
  }

  Eigen::Index rows() const override { return weight_.rows(); }
  Eigen::Index cols() const override { return weight_.cols(); }
  bool trained() const noexcept { return trained_; }

  RowMajorMatrix& weight() noexcept { return weight_; }
  const RowMajorMatrix& weight() const noexcept { return weight_; }
  /// Empty where the layer is frozen.
  RowMajorMatrix& gradient() noexcept { return gradient_; }
  const RowMajorMatrix& gradient() const noexcept { return gradient_; }

  void forward(const ConstMatrixRef& x, MatrixRef y, const TrainOptions& options,
               const Epilogue& epilogue = {}) override {
    gemm(weight_, x, y, detail::product_options(options, epilogue));
  }

  void backward(const ConstMatrixRef& x, const ConstMatrixRef& dy, MatrixRef* dx, Gradient how,
                const TrainOptions& options) override {
    detail::require_shape(x, cols(), dy.cols(), "x");
    detail::require_shape(dy, rows(), dy.cols(), "dy");
    if (trained_) linear_backward_weight(dy, x, RowMajorRef(gradient_), options, Gradient::add);
    if (dx != nullptr) linear_backward_input(weight_, dy, *dx, options, how);
  }

  /// One parameter, `prefix` + "weight".
  void append_parameters(const std::string& prefix, Parameters& out) override {
    if (!trained_) return;
    Parameter p;
    p.name = prefix + "weight";
    p.value = weight_.data();
    p.gradient = gradient_.data();
    p.size = static_cast<std::size_t>(weight_.size());
    out.push_back(std::move(p));
  }

 private:
  RowMajorMatrix weight_;
  RowMajorMatrix gradient_;
  bool trained_;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
