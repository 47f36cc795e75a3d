// LoRA over frozen weights (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), which may be quantized
// (Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs").
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/gemm/matmul.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/train/dropout.hpp"
#include "nibble/train/linear_layer.hpp"
#include "nibble/train/low_rank.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

struct LoraOptions {
  Eigen::Index rank = 16;
  double alpha = 32.0;
  bool rank_stabilized = false;  ///< scale alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)
  float dropout = 0.0F;          ///< of the low-rank term's input, 0 to below 1; taken in steps of 2^-16
  std::uint64_t seed = 1;        ///< of A's start and of dropout; layers differ by their names
  /// fp32; or bf16: products see A and B rounded to bfloat16, while the optimizer changes floats (as mixed-precision
  /// training does: a step is often smaller than half a bfloat16's ulp). A file of bf16 then holds what was trained with.
  Format values = Format::fp32;

  double scale() const noexcept {
    const auto r = static_cast<double>(rank);
    return alpha / (rank_stabilized ? std::sqrt(r) : r);
  }
};

namespace detail {

/// Scratch of a layer's own beside that of its products: one a thread, so that hundreds of layers share it.
inline Workspace& lora_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

}  // namespace detail

/// y = W x + scale B (A dropout(x)), W frozen: dense floats, or packed in any format (NF4 with double-quantized scales, say).
/// A packed W is never there as floats: products forward and transposed decode it a piece at a time, 4 panels by 128 inputs,
/// and sum in floats as gemm() does, so results are those of the dequantized matrix.
///
/// A (r x K) starts uniform in +-1 / sqrt(K), as PEFT's do (Kaiming with slope sqrt(5)); B (N x r) starts 0: y = W x. Dropout
/// is dropout()'s: it draws element (k, t) from (seed, name, step, k, TrainOptions::first_column + t) alone. So forward()
/// again in a step has the same bits, and so have parts of a batch and every number of threads. Packed weights are multiplied in fp32 whatever TrainOptions::products says.
class LoraLinear : public LinearLayer {
 public:
  /// name: makes layers of one seed differ. Throws InvalidArgument for options out of range.
  LoraLinear(std::string_view name, PackedMatrix base, const LoraOptions& options)
      : packed_(std::move(base)), is_packed_(true) {
    start(name, options);
  }
  LoraLinear(std::string_view name, RowMajorMatrix base, const LoraOptions& options)
      : dense_(std::move(base)), is_packed_(false) {
    start(name, options);
  }

  Eigen::Index rows() const override { return is_packed_ ? packed_.rows() : dense_.rows(); }
  Eigen::Index cols() const override { return is_packed_ ? packed_.cols() : dense_.cols(); }
  const LoraOptions& options() const noexcept { return options_; }
  /// Bytes of the frozen weights.
  std::size_t base_bytes() const noexcept {
    return is_packed_ ? packed_.byte_size() : static_cast<std::size_t>(dense_.size()) * sizeof(float);
  }
  bool is_packed() const noexcept { return is_packed_; }
  const PackedMatrix& packed() const noexcept { return packed_; }
  const RowMajorMatrix& dense() const noexcept { return dense_; }

  /// Dropout is on from the start; off, forward() is what is deployed.
  void set_dropout(bool on) noexcept { dropout_on_ = on; }

  /// What is added to W, as products see it.
  LowRank low_rank() const {
    LowRank l;
    l.a = a_;
    l.b = b_;
    l.scale = options_.scale();
    if (options_.values != Format::fp32) round_low_rank(l, options_.values);
    return l;
  }
  /// Starts from, or goes on with, a low rank of rank options().rank: A becomes l.a, and B l.b, times l's scale where that
  /// is another. Throws InvalidArgument where shapes differ or a value is not finite.
  void set_low_rank(const LowRank& l) {
    detail::require(l.rank() == options_.rank, "low rank of rank ", l.rank(), ", expected ", options_.rank);
    detail::check_low_rank(l, rows(), cols());
    a_ = l.a;
    b_ = l.b;
    if (l.scale != options_.scale())
      b_ = (l.b.template cast<double>() * (l.scale / options_.scale())).template cast<float>();
  }

  /// The epilogue must not refer to y.
  void forward(const ConstMatrixRef& x, MatrixRef y, const TrainOptions& options,
               const Epilogue& epilogue = {}) override {
    const detail::FpEnvironment environment;
    detail::require_shape(x, cols(), x.cols(), "x");
    detail::require_shape(y, rows(), x.cols(), "y");
    epilogue.check(y.rows(), y.cols());
    detail::require_apart(x, y, "x", "y");
    if (y.size() == 0) return;
    Scratch s(*this, x.cols());
    const Values v(*this);
    low_rank_input(v, x, s, options);
    gemm(v.b(), s.u, y, product(options));
    multiply_base(x, y, options, Epilogue().add(y).append(epilogue));
  }

  void backward(const ConstMatrixRef& x, const ConstMatrixRef& dy, MatrixRef* dx, Gradient how,
                const TrainOptions& options) override {
    const detail::FpEnvironment environment;
    detail::require_shape(x, cols(), dy.cols(), "x");
    detail::require_shape(dy, rows(), dy.cols(), "dy");
    if (dy.cols() == 0) return;
    Scratch s(*this, x.cols());
    const Values v(*this);
    // With u = scale A dropout(x) and g = scale B^T dy: dB += dy u^T, dA += g dropout(x)^T, dx = W^T dy + mask A^T g.
    low_rank_input(v, x, s, options);
    linear_backward_weight(dy, s.u, MatrixRef(db_), fp32(options), Gradient::add);
    gemm(v.b().transpose(), dy, s.g, product(options, Epilogue().scale(scales_)));
    // Transposed, so that the large operand is read in its own order.
    MatrixRef dat(Eigen::Map<Eigen::MatrixXf>(da_.data(), da_.cols(), da_.rows()));
    if (dropping())
      linear_backward_weight(s.dropped, s.g, dat, fp32(options), Gradient::add);
    else
      linear_backward_weight(x, s.g, dat, fp32(options), Gradient::add);
    if (dx == nullptr) return;
    detail::require_shape(*dx, cols(), dy.cols(), "dx");
    Epilogue already;
    if (how == Gradient::add) already.add(*dx);
    if (is_packed_)
      matmul_transposed(packed_, dy, *dx, product(options, already));
    else
      linear_backward_input(dense_, dy, *dx, options, how);
    if (!dropping()) {
      gemm(v.a().transpose(), s.g, *dx, product(options, Epilogue().add(*dx)));
      return;
    }
    gemm(v.a().transpose(), s.g, s.dropped, product(options));
    dropout_backward(s.dropped, *dx, static_cast<double>(options_.dropout), key(options), options, Gradient::add);
  }

  /// Two parameters: `prefix` + "lora_A" (r x K, row-major) and "lora_B" (N x r, column-major).
  void append_parameters(const std::string& prefix, Parameters& out) override {
    const auto add = [&](const char* name, auto& value, auto& gradient) {
      Parameter p;
      p.name = prefix + name;
      p.value = value.data();
      p.gradient = gradient.data();
      p.size = static_cast<std::size_t>(value.size());
      out.push_back(std::move(p));
    };
    add("lora_A", a_, da_);
    add("lora_B", b_, db_);
  }

  void begin_step(std::uint64_t step) override { step_ = step; }

 private:
  using Map = Eigen::Map<Eigen::MatrixXf, Eigen::Aligned64>;

  /// A and B as products see them.
  class Values {
   public:
    explicit Values(const LoraLinear& layer) : layer_(layer) {
      if (layer.options_.values == Format::fp32) return;
      rounded_a_ = layer.a_.unaryExpr([](float v) { return detail::stored_value(Format::bf16, v); });
      rounded_b_ = layer.b_.unaryExpr([](float v) { return detail::stored_value(Format::bf16, v); });
    }
    const RowMajorMatrix& a() const { return rounded_a_.size() != 0 ? rounded_a_ : layer_.a_; }
    const Eigen::MatrixXf& b() const { return rounded_b_.size() != 0 ? rounded_b_ : layer_.b_; }

   private:
    const LoraLinear& layer_;
    RowMajorMatrix rounded_a_;
    Eigen::MatrixXf rounded_b_;
  };

  struct Scratch {
    Scratch(const LoraLinear& layer, Eigen::Index tokens)
        : u(nullptr, 0, 0), g(nullptr, 0, 0), dropped(nullptr, 0, 0) {
      detail::ScratchPlan plan;
      const auto t = static_cast<std::size_t>(tokens);
      const std::size_t small = detail::checked_mul(static_cast<std::size_t>(layer.options_.rank), t, "lora");
      const std::size_t large =
          layer.dropping() ? detail::checked_mul(static_cast<std::size_t>(layer.cols()), t, "lora") : 0;
      const std::size_t u_at = plan.add(small, sizeof(float));
      const std::size_t g_at = plan.add(small, sizeof(float));
      const std::size_t dropped_at = plan.add(large, sizeof(float));
      std::uint8_t* memory = detail::lora_workspace().take(plan.total());
      const auto place = [&](Map& m, std::size_t at, Eigen::Index rows) {
        new (&m) Map(reinterpret_cast<float*>(memory + at), rows, tokens);
      };
      place(u, u_at, layer.options_.rank);
      place(g, g_at, layer.options_.rank);
      if (layer.dropping()) place(dropped, dropped_at, layer.cols());
    }
    Map u;        // scale A dropout(x), r x T
    Map g;        // scale B^T dy, r x T
    Map dropped;  // dropout(x), K x T, where there is dropout
  };

  void start(std::string_view name, const LoraOptions& options) {
    detail::require(options.rank >= 1 && options.rank <= 65536, "rank is ", options.rank, ", expected 1 to 65536");
    detail::require(std::isfinite(options.alpha), "alpha is ", options.alpha, ", expected a number");
    detail::require(options.dropout >= 0.0F && options.dropout < 1.0F, "dropout is ", options.dropout,
                    ", expected 0 to below 1");
    detail::require(options.values == Format::fp32 || options.values == Format::bf16, "LoRA in ",
                    name_of(options.values), ", expected fp32 or bf16");
    options_ = options;
    stream_ = stream_of(name);
    drops_ = detail::dropout_threshold(static_cast<double>(options.dropout)) != 0;
    scales_ = Eigen::VectorXf::Constant(options.rank, static_cast<float>(options.scale()));
    a_.resize(options.rank, cols());
    const float bound = cols() == 0 ? 0.0F : 1.0F / std::sqrt(static_cast<float>(cols()));
    const std::uint64_t seed = detail::mixed_bits(options.seed, stream_);
    for (Eigen::Index i = 0; i < a_.size(); ++i)
      a_.data()[i] = bound * detail::mixed_uniform(seed, static_cast<std::uint64_t>(i));
    b_ = Eigen::MatrixXf::Zero(rows(), options.rank);
    da_ = RowMajorMatrix::Zero(options.rank, cols());
    db_ = Eigen::MatrixXf::Zero(rows(), options.rank);
  }

  bool dropping() const noexcept { return dropout_on_ && drops_; }
  DropoutKey key(const TrainOptions& options) const noexcept {
    return {options_.seed, step_, stream_, options.first_column};
  }

  static TrainOptions fp32(TrainOptions options) {
    options.products = Activations::fp32;
    return options;
  }
  static MatmulOptions product(const TrainOptions& options, const Epilogue& epilogue = {}) {
    return detail::product_options(fp32(options), epilogue);
  }

  void multiply_base(const ConstMatrixRef& x, MatrixRef y, const TrainOptions& options, const Epilogue& epilogue) {
    if (is_packed_)
      matmul(packed_, x, y, product(options, epilogue));
    else
      gemm(dense_, x, y, detail::product_options(options, epilogue));
  }

  /// s.u, and s.dropped where there is dropout.
  void low_rank_input(const Values& v, const ConstMatrixRef& x, Scratch& s, const TrainOptions& options) const {
    const Epilogue scaled = Epilogue().scale(scales_);
    if (!dropping()) {
      gemm(v.a(), x, s.u, product(options, scaled));
      return;
    }
    nibble::dropout(x, s.dropped, static_cast<double>(options_.dropout), key(options), options);
    gemm(v.a(), s.dropped, s.u, product(options, scaled));
  }

  PackedMatrix packed_;
  RowMajorMatrix dense_;
  bool is_packed_;
  LoraOptions options_;
  std::uint64_t stream_ = 0;
  std::uint64_t step_ = 0;
  bool drops_ = false;  // the rate is above 0
  bool dropout_on_ = true;
  Eigen::VectorXf scales_;  // scale, r times: what an epilogue takes
  RowMajorMatrix a_;        // r x K
  Eigen::MatrixXf b_;       // N x r
  RowMajorMatrix da_;
  Eigen::MatrixXf db_;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
