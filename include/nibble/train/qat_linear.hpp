// A linear layer in quantization-aware training (QAT): its forward pass is the deployed product itself.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/activations.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/gemm/matmul.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/train/fake_quantize.hpp"
#include "nibble/train/linear_layer.hpp"
#include "nibble/train/lsq.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

struct QatOptions {
  Scheme scheme;  ///< of the weights: an integer format; per tensor, per channel of axis 0 or per group of axis 1
  /// true: scales and offsets are learned (LSQ, LSQ+) from `start` on. false: they cover each step's smallest and largest
  /// weight, and gradients are the clipped STE's.
  bool learn_scales = true;
  GridStart start = GridStart::mse;
  float scale_rate = 1.0F;  ///< multiplies the learning rate of scales and offsets
  /// What the packed weights are multiplied with, as MatmulOptions has it: fp32, or codes made from each token.
  Activations activations = Activations::automatic;
  unsigned activation_bits = 8;
  /// Learned grids of the input in their place. They start from the first input of the first quantized step.
  std::optional<LearnedActivationOptions> learned_activations = {};
  /// From when on a step quantizes, and until when scales change. observer_stop is of no use here.
  std::optional<QatSchedule> schedule = {};
};

namespace detail {

/// Room of a thread for float matrices of one layer's backward pass.
inline float* qat_room(std::size_t which, std::size_t floats) {
  thread_local Workspace rooms[2];
  return reinterpret_cast<float*>(rooms[which].take(floats * sizeof(float)));
}

/// x^ = what the codes stand for, inputs x tokens.
inline void dequantize_activations(const QuantizedActivations& q, MatrixRef out, ThreadPool* pool) {
  const ActivationView& v = q.view();
  const std::size_t length = v.group_size == 0 ? std::max<std::size_t>(v.inputs, 1) : v.group_size;
  for_chunks(pool, out.cols(), [&](Eigen::Index first, Eigen::Index n, std::size_t) {
    const FpEnvironment environment;
    for (Eigen::Index t = first; t < first + n; ++t)
      for (std::size_t g = 0; g < v.groups; ++g) {
        const std::size_t begin = g * length;
        DequantizeLineArgs args;
        args.q = q.codes(t) + begin;
        args.n = std::min(length, v.inputs - begin);
        args.scale = q.scale(t, g);
        args.zero = q.zero_point(t);
        args.x = out.data() + t * out.outerStride() + static_cast<Eigen::Index>(begin);
        if (v.zeros == nullptr) args.zero = 0;
        kernels().dequantize_line(args);
      }
  });
}

}  // namespace detail

/// y = W^ x^ with float master weights W: once a step they are quantized on the grids as they are then and packed, and
/// forward() is matmul() of that. So its bits are those of quantized(), packed, saved, loaded and multiplied with the same
/// activations, on every ISA, for any number of threads.
///
/// Backward goes through the float values of codes: dW^ = dy x^^T and dx^ = W^^T dy, then through rounding - of weights and
/// of learned activations as lsq.hpp or fake_quantize.hpp say, of activations quantized token by token as if it were the
/// identity (they are never clipped). Those products follow TrainOptions::products; the forward product of codes does not.
///
/// Controls, by the names of torch.ao.quantization: enable_fake_quant() and disable_fake_quant(); beside them
/// freeze_scales(). A schedule does the same by the step.
class QatLinear : public LinearLayer {
 public:
  /// @param weight  N x K, what training starts from. Throws InvalidArgument for a scheme that it cannot have and a weight
  ///                that is not finite.
  QatLinear(RowMajorMatrix weight, const QatOptions& options, ThreadPool* pool = nullptr)
      : weight_(std::move(weight)),
        gradient_(RowMajorMatrix::Zero(weight_.rows(), weight_.cols())),
        options_(options),
        grids_(options.scheme, weight_.rows(), weight_.cols()) {
    QuantizedActivations::check_bits(options.activation_bits);
    detail::require(options.activations != Activations::bf16, "activations are bf16 but the weights are ",
                    name_of(options.scheme.format), ", expected fp32 or int8 ones");
    if (options.learned_activations)
      learned_ = std::make_unique<LearnedActivations>(*options.learned_activations, weight_.cols());
    grids_.start(weight_, options.start, pool);
    if (options.schedule) fake_quant_ = options.schedule->fake_quant_start == 0;
  }

  Eigen::Index rows() const override { return weight_.rows(); }
  Eigen::Index cols() const override { return weight_.cols(); }
  const QatOptions& options() const noexcept { return options_; }

  /// The float weights; call refresh() after changing them outside of a step.
  RowMajorMatrix& weight() noexcept { return weight_; }
  const RowMajorMatrix& weight() const noexcept { return weight_; }
  const RowMajorMatrix& gradient() const noexcept { return gradient_; }
  LearnedWeightGrids& grids() noexcept { return grids_; }
  /// nullptr where activations are not learned.
  LearnedActivations* learned_activations() noexcept { return learned_.get(); }

  void enable_fake_quant(bool enabled = true) noexcept { fake_quant_ = enabled; }
  void disable_fake_quant() noexcept { fake_quant_ = false; }
  bool fake_quant_enabled() const noexcept { return fake_quant_; }
  /// Scales and offsets of weights and activations stay what they are, whatever an optimizer does to the parameters.
  void freeze_scales(bool frozen = true) {
    grids_.freeze(frozen);
    if (learned_) learned_->freeze(frozen);
  }

  /// Weights or scales have changed: the next product quantizes them anew.
  void refresh() noexcept { stale_ = true; }

  /// As refresh(), and what the schedule says. At the step where fake quantization starts the grids start from the weights
  /// as they are then.
  void begin_step(std::uint64_t step) override {
    refresh();
    if (!options_.schedule) return;
    const QatSchedule& s = *options_.schedule;
    fake_quant_ = step >= s.fake_quant_start;
    if (step == s.fake_quant_start && step != 0) grids_.start(weight_, options_.start);
    if (step > s.fake_quant_start && learned_ && !learned_->started()) learned_->set_started();
    if ((step >= s.scale_freeze) != grids_.frozen()) freeze_scales(step >= s.scale_freeze);
  }

  /// Frozen scales stay what they are in the parameters, too, whatever momentum an optimizer had.
  void end_step() override {
    grids_.restore_frozen();
    if (learned_) learned_->restore_frozen();
  }

  /// The weights as they are deployed.
  QuantizedTensor quantized(ThreadPool* pool = nullptr) const {
    return options_.learn_scales ? grids_.quantize(weight_, pool)
                                 : DynamicQuantizer(options_.scheme).quantize(weight_, quantize_options(pool));
  }
  /// The same packed: what the last forward() of this step multiplied by.
  const PackedMatrix& packed(ThreadPool* pool = nullptr) {
    if (stale_) {
      PackOptions options;
      options.pool = pool;
      packed_ = pack(quantized(pool), options);
      stale_ = false;
    }
    return packed_;
  }

  void forward(const ConstMatrixRef& x, MatrixRef y, const TrainOptions& options,
               const Epilogue& epilogue = {}) override {
    if (!fake_quant_) return gemm(weight_, x, y, detail::product_options(options, epilogue));
    const PackedMatrix& w = packed(options.pool);
    const MatmulOptions product = product_options(options, epilogue);
    if (learned_) {
      if (!learned_->started()) learned_->start(x);
      assign(x, options);
      matmul(w, codes_, y, product);
    } else {
      matmul(w, x, y, product);
    }
  }

  void backward(const ConstMatrixRef& x, const ConstMatrixRef& dy, MatrixRef* dx, Gradient how,
                const TrainOptions& options) override {
    detail::require_shape(x, cols(), dy.cols(), "x");
    detail::require_shape(dy, rows(), dy.cols(), "dy");
    if (!fake_quant_) {
      linear_backward_weight(dy, x, RowMajorRef(gradient_), options, Gradient::add);
      if (dx != nullptr) linear_backward_input(weight_, dy, *dx, options, how);
      return;
    }
    using Columns = Eigen::Map<Eigen::MatrixXf, 0, Eigen::OuterStride<>>;
    using Rows = Eigen::Map<RowMajorMatrix, 0, Eigen::OuterStride<>>;
    const auto tokens = static_cast<std::size_t>(x.cols());
    Columns activations(detail::qat_room(0, static_cast<std::size_t>(cols()) * tokens), cols(), x.cols(),
                        Eigen::OuterStride<>(cols()));
    Rows weights(detail::qat_room(1, static_cast<std::size_t>(weight_.size())), rows(), cols(),
                 Eigen::OuterStride<>(cols()));
    if (dx != nullptr) {
      dequantize_into(packed(options.pool).unpack(options.pool), weights, quantize_options(options.pool));
      if (learned_) {
        linear_backward_input(weights, dy, activations, options);
        learned_->backward(x, activations, *dx, how, options.pool);
      } else {
        linear_backward_input(weights, dy, *dx, options, how);
      }
    } else if (learned_) {
      // Nobody asks for dx, but the scales' gradients need the one with respect to the codes' values.
      dequantize_into(packed(options.pool).unpack(options.pool), weights, quantize_options(options.pool));
      linear_backward_input(weights, dy, activations, options);
      learned_->backward(x, activations, activations, Gradient::set, options.pool);
    }
    const bool floats = !learned_ && options_.activations == Activations::fp32;
    if (!floats) {
      assign(x, options);
      detail::dequantize_activations(codes_, activations, options.pool);
    }
    linear_backward_weight(dy, floats ? x : ConstMatrixRef(activations), RowMajorRef(weights), options);
    if (options_.learn_scales)
      grids_.backward(weight_, weights, RowMajorRef(gradient_), options.pool);
    else
      fake_quantize_backward(weight_, options_.scheme, {}, weights, gradient_, Gradient::add,
                             quantize_options(options.pool));
  }

  /// `prefix` + "weight"; the learned ones + "log_scale" and "centre", of activations + "activation.log_scale" and
  /// "activation.centre".
  void append_parameters(const std::string& prefix, Parameters& out) override {
    Parameter p;
    p.name = prefix + "weight";
    p.value = weight_.data();
    p.gradient = gradient_.data();
    p.size = static_cast<std::size_t>(weight_.size());
    out.push_back(std::move(p));
    if (options_.learn_scales) grids_.append_parameters(prefix, out, options_.scale_rate);
    if (learned_) learned_->append_parameters(prefix + "activation.", out, options_.scale_rate);
  }

 private:
  static QuantizeOptions quantize_options(ThreadPool* pool) {
    QuantizeOptions options;
    options.pool = pool;
    return options;
  }
  MatmulOptions product_options(const TrainOptions& options, const Epilogue& epilogue) const {
    MatmulOptions product = detail::product_options(options, epilogue);
    product.activations = options_.activations;
    product.activation_bits = options_.activation_bits;
    return product;
  }
  /// codes_ of x, as forward() has them.
  void assign(const ConstMatrixRef& x, const TrainOptions& options) {
    const detail::KernelTable& kernels = detail::kernels_of(options);
    if (learned_)
      codes_.assign_static(x, learned_->grid(), options.pool, kernels);
    else
      codes_.assign(x, options_.activations, options.pool, activation_group(packed(options.pool)),
                    options_.activation_bits, kernels);
  }

  RowMajorMatrix weight_;
  RowMajorMatrix gradient_;
  QatOptions options_;
  LearnedWeightGrids grids_;
  std::unique_ptr<LearnedActivations> learned_;
  QuantizedActivations codes_;
  PackedMatrix packed_;
  bool stale_ = true;
  bool fake_quant_ = true;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
