// Y = W * X: the products of packed weights.
#pragma once

#include <Eigen/Core>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/activations.hpp"
#include "nibble/gemm/drive_bf16.hpp"
#include "nibble/gemm/drive_float.hpp"
#include "nibble/gemm/drive_int.hpp"
#include "nibble/gemm/epilogue.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/gemm/workspace.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// How a product runs. The defaults: serial, on the best ISA, scratch from a workspace of the calling thread.
/// Whatever is chosen here but `activations` and their bits, the results are the same bits.
struct MatmulOptions {
  Activations activations = Activations::automatic;
  unsigned activation_bits =
      8;  ///< of INT8 activations that are quantized inside: 2 to 8, see QuantizedActivations
  Epilogue epilogue = {};
  ThreadPool* pool = nullptr;      ///< nullptr: the calling thread alone
  Workspace* workspace = nullptr;  ///< nullptr: one that the calling thread keeps
  std::optional<Isa> isa = {};     ///< empty: the best that the CPU and NIBBLE_MAX_ISA allow
};

/// Scale and zero point of INT8 outputs: code = clamp(rne(y / scale) + zero_point, -128, 127).
struct Int8Output {
  float scale = 1.0F;
  std::int32_t zero_point = 0;
};

/// Group of int8_grouped activations that suits these weights: 32 where 2^i of these make one of theirs, or where they
/// have one scale a channel; else the weights' own.
inline std::size_t activation_group(const PackedMatrix& w) noexcept {
  constexpr std::size_t usual = QuantizedActivations::default_group;
  return detail::activation_group_shift(w, usual) != detail::no_group_shift ? usual : w.group_size();
}

namespace detail {

inline const KernelTable& kernels_of(const MatmulOptions& options) {
  return options.isa ? kernels_for(*options.isa) : kernels();
}

inline Workspace& workspace_of(const MatmulOptions& options) {
  return options.workspace != nullptr ? *options.workspace : thread_workspace();
}

/// `automatic` resolved for these weights. Throws InvalidArgument for activations that do not go with the weights.
inline Activations activations_for(const PackedMatrix& w, Activations asked) {
  if (asked == Activations::automatic) return is_integer(w.format()) ? Activations::int8 : Activations::fp32;
  if (asked == Activations::bf16) {
    require(w.format() == Format::bf16, "activations are bf16 but the weights are ", name_of(w.format()),
            ", expected bf16");
    return asked;
  }
  require(asked == Activations::fp32 || is_integer(w.format()), "activations are int8 but the weights are ",
          name_of(w.format()), ", expected an integer format");
  return asked;
}

inline void check_product(const PackedMatrix& w, Eigen::Index x_rows, Eigen::Index x_cols, Eigen::Index y_rows,
                          Eigen::Index y_cols, const Epilogue& epilogue) {
  require(x_rows == w.cols(), "x is ", x_rows, " x ", x_cols, ", expected ", w.cols(), " rows as w is ", w.rows(),
          " x ", w.cols());
  require(y_rows == w.rows() && y_cols == x_cols, "y is ", y_rows, " x ", y_cols, ", expected ", w.rows(), " x ",
          x_cols);
  epilogue.check(y_rows, y_cols);
}

inline void check_int(const PackedMatrix& w, const QuantizedActivations& x) {
  require(is_integer(w.format()), "x is quantized but the weights are ", name_of(w.format()),
          ", expected an integer format");
  require(x.symmetric() || !w.channel_sums().empty() || w.rows() == 0,
          "x has zero points, but w was packed without channel_sums (PackOptions)");
  require(x.group_size() == 0 || activation_group_shift(w, x.group_size()) != no_group_shift, "x has groups of ",
          x.group_size(), ", w has groups of ", w.group_size(),
          ": expected w's, or w's divided by a power of two");
}

inline void run_int(const PackedMatrix& w, const QuantizedActivations& x, const Output& out,
                    const MatmulOptions& options) {
  if (w.rows() == 0 || x.tokens() == 0) return;
  const std::size_t threads = options.pool == nullptr ? 1 : static_cast<std::size_t>(options.pool->threads());
  IntJob job(kernels_of(options), w, x.view(), options.epilogue, out, threads);
  run_jobs(&job, 1, options.pool, workspace_of(options));
}

/// Activations that a call quantizes for itself: kept a thread, so that the hot path allocates nothing.
inline QuantizedActivations& thread_activations() {
  thread_local QuantizedActivations activations;
  return activations;
}

inline Output float_output(MatrixRef& y) {
  Output out;
  out.floats = y.data();
  out.stride = static_cast<std::size_t>(y.outerStride());
  return out;
}

}  // namespace detail

/// y = epilogue(w * x) with activations that were quantized before; n x m floats out.
/// Throws InvalidArgument where shapes do not fit.
inline void matmul(const PackedMatrix& w, const QuantizedActivations& x, MatrixRef y,
                   const MatmulOptions& options = {}) {
  const detail::FpEnvironment environment;
  detail::check_product(w, x.inputs(), x.tokens(), y.rows(), y.cols(), options.epilogue);
  detail::check_int(w, x);
  detail::run_int(w, x, detail::float_output(y), options);
}

/// The same with INT8 codes out, so that layers chain without floats.
inline void matmul(const PackedMatrix& w, const QuantizedActivations& x, Int8MatrixRef y, const Int8Output& output,
                   const MatmulOptions& options = {}) {
  const detail::FpEnvironment environment;
  detail::check_product(w, x.inputs(), x.tokens(), y.rows(), y.cols(), options.epilogue);
  detail::check_int(w, x);
  detail::require(output.scale > 0.0F && detail::scalar::is_finite(output.scale), "output scale is ", output.scale,
                  ", expected a positive number");
  detail::require(output.zero_point >= -128 && output.zero_point <= 127, "output zero_point is ",
                  output.zero_point, ", expected -128 to 127");
  detail::Output out;
  out.codes = y.data();
  out.stride = static_cast<std::size_t>(y.outerStride());
  out.scale = output.scale;
  out.zero = output.zero_point;
  detail::run_int(w, x, out, options);
}

/// Raw accumulators: y[c, t] = sum over k of (q_w[c, k] - zero_w[c]) * q_x[k, t], exact. For weights with one group
/// (per tensor or per channel, k up to 65,792) and no float offset; x's zero point is not subtracted.
inline void matmul_raw(const PackedMatrix& w, const QuantizedActivations& x, Int32MatrixRef y,
                       const MatmulOptions& options = {}) {
  detail::check_product(w, x.inputs(), x.tokens(), y.rows(), y.cols(), options.epilogue);
  detail::require(is_integer(w.format()), "raw accumulators need integer weights, not ", name_of(w.format()));
  detail::require(w.groups() <= 1 && w.symmetry() != Symmetry::float_offset,
                  "raw accumulators need one integer sum a channel, w has ", w.groups(), " groups and is ",
                  name_of(w.symmetry()));
  detail::require(x.group_size() == 0, "raw accumulators need one scale a token, x has groups of ",
                  x.group_size());
  detail::Output out;
  out.raw = y.data();
  out.stride = static_cast<std::size_t>(y.outerStride());
  detail::run_int(w, x, out, options);
}

/// y = epilogue(w * x): w n x k packed, x k x m floats (a token a column), y n x m. x and y must not overlap.
///
/// With int8 activations every token is quantized inside (absmax / 127, with a zero point, or group by group); a NaN or an
/// Inf makes that token's outputs NaN and no other's. With fp32 activations the result is that of the dequantized weights,
/// summed by one fma a k in ascending order; with bf16 ones it is kernels/args.hpp's sum of pairs. After the workspace has grown once, nothing is allocated as long as x is
/// column-major memory. Throws InvalidArgument where shapes do not fit.
template <class Derived>
void matmul(const PackedMatrix& w, const Eigen::MatrixBase<Derived>& x_in, MatrixRef y,
            const MatmulOptions& options = {}) {
  static_assert(std::is_same_v<typename Derived::Scalar, float>, "x is float: cast<float>() it first");
  const ConstMatrixRef x(x_in.derived());
  const detail::FpEnvironment environment;
  detail::check_product(w, x.rows(), x.cols(), y.rows(), y.cols(), options.epilogue);
  detail::require_apart(x, y, "x", "y");
  const Activations kind = detail::activations_for(w, options.activations);
  if (y.size() == 0) return;
  if (kind != Activations::fp32 && kind != Activations::bf16) {
    QuantizedActivations& quantized = detail::thread_activations();
    quantized.assign(x, kind, options.pool, activation_group(w), options.activation_bits,
                     detail::kernels_of(options));
    detail::check_int(w, quantized);
    detail::run_int(w, quantized, detail::float_output(y), options);
    return;
  }
  const detail::KernelTable& kernels = detail::kernels_of(options);
  const detail::FloatView view = detail::float_view(x);
  const detail::PanelView panels = w.view();
  if (kind == Activations::bf16)
    detail::run_bf16(kernels, panels, w.panels(), view, options.epilogue, detail::float_output(y), options.pool,
                     detail::workspace_of(options));
  else if (view.cols <= kernels.gemv_max_rows && view.rows != 0)
    detail::run_float_gemv(kernels, panels, w.panels(), view, options.epilogue, detail::float_output(y),
                           options.pool, detail::workspace_of(options));
  else
    detail::run_float(kernels, detail::packed_source(panels), view, options.epilogue, detail::float_output(y),
                      options.pool, detail::workspace_of(options));
}

/// y = epilogue(w^T * x), what a layer's backward pass needs: w n x k packed, x n x m floats, y k x m. The result is that
/// of the dequantized weights, one fma a channel in ascending order.
template <class Derived>
void matmul_transposed(const PackedMatrix& w, const Eigen::MatrixBase<Derived>& x_in, MatrixRef y,
                       const MatmulOptions& options = {}) {
  static_assert(std::is_same_v<typename Derived::Scalar, float>, "x is float: cast<float>() it first");
  const ConstMatrixRef x(x_in.derived());
  const detail::FpEnvironment environment;
  detail::require(x.rows() == w.rows(), "x is ", x.rows(), " x ", x.cols(), ", expected ", w.rows(),
                  " rows as w is ", w.rows(), " x ", w.cols(), " and transposed");
  detail::require(y.rows() == w.cols() && y.cols() == x.cols(), "y is ", y.rows(), " x ", y.cols(), ", expected ",
                  w.cols(), " x ", x.cols());
  detail::require(options.activations == Activations::automatic || options.activations == Activations::fp32,
                  "a transposed product has fp32 activations only");
  options.epilogue.check(y.rows(), y.cols());
  detail::require_apart(x, y, "x", "y");
  if (y.size() == 0) return;
  const detail::PanelView panels = w.view();
  detail::run_float(detail::kernels_of(options), detail::transposed_source(panels), detail::float_view(x),
                    options.epilogue, detail::float_output(y), options.pool, detail::workspace_of(options));
}

/// w * x with the defaults of MatmulOptions.
template <class Derived>
Eigen::MatrixXf operator*(const PackedMatrix& w, const Eigen::MatrixBase<Derived>& x) {
  Eigen::MatrixXf y(w.rows(), x.cols());
  matmul(w, x, y);
  return y;
}

/// One product of a group: w * x into y, with an epilogue of its own.
struct GroupedProduct {
  const PackedMatrix* w = nullptr;
  const QuantizedActivations* x = nullptr;
  float* y = nullptr;         ///< n x m, column-major
  Eigen::Index y_stride = 0;  ///< floats from one token to the next; at least n
  Epilogue epilogue = {};
};

/// Most products in one group.
inline constexpr std::size_t max_grouped_products = 16;

/// Several products as one parallel region (q, k and v; gate and up; the experts of a mixture): their tasks share the
/// threads, so small ones do not leave cores idle. Options' epilogue and activations are not used.
inline void matmul_grouped(const GroupedProduct* products, std::size_t count, const MatmulOptions& options = {}) {
  detail::require(count <= max_grouped_products, "a group has ", count, " products, expected at most ",
                  max_grouped_products);
  const detail::FpEnvironment environment;
  const detail::KernelTable& kernels = detail::kernels_of(options);
  const std::size_t threads = options.pool == nullptr ? 1 : static_cast<std::size_t>(options.pool->threads());
  std::array<detail::IntJob, max_grouped_products> jobs;
  std::size_t used = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const GroupedProduct& p = products[i];
    detail::require(p.w != nullptr && p.x != nullptr, "grouped product ", i, " has no w or no x");
    detail::check_product(*p.w, p.x->inputs(), p.x->tokens(), p.w->rows(), p.x->tokens(), p.epilogue);
    detail::check_int(*p.w, *p.x);
    if (p.w->rows() == 0 || p.x->tokens() == 0) continue;
    detail::require(p.y != nullptr && p.y_stride >= p.w->rows(), "grouped product ", i, " has y_stride ",
                    p.y_stride, ", expected at least ", p.w->rows());
    detail::Output out;
    out.floats = p.y;
    out.stride = static_cast<std::size_t>(p.y_stride);
    jobs[used++] = detail::IntJob(kernels, *p.w, p.x->view(), p.epilogue, out, threads);
  }
  if (used != 0) detail::run_jobs(jobs.data(), used, options.pool, detail::workspace_of(options));
}

/// One product of a batch: w * x into y, any format of weights.
struct BatchedProduct {
  const PackedMatrix* w = nullptr;
  const float* x = nullptr;   ///< k x tokens, column-major
  Eigen::Index x_stride = 0;  ///< floats from one token to the next; at least k
  float* y = nullptr;         ///< n x tokens, column-major; overlaps no other product's x or y
  Eigen::Index y_stride = 0;  ///< at least n
  Eigen::Index tokens = 0;
  Epilogue epilogue = {};
};

/// Many small independent products in one call (heads, experts, layers of an ensemble): each runs whole on one thread,
/// so the threads meet once. Options' epilogue is not used; its workspace serves serial calls only.
inline void matmul_batched(const BatchedProduct* products, std::size_t count, const MatmulOptions& options = {}) {
  const auto in = [](const BatchedProduct& p) {
    return Eigen::Map<const Eigen::MatrixXf, 0, Eigen::OuterStride<>>(p.x, p.w->cols(), p.tokens,
                                                                      Eigen::OuterStride<>(p.x_stride));
  };
  const auto out = [](const BatchedProduct& p) {
    return Eigen::Map<Eigen::MatrixXf, 0, Eigen::OuterStride<>>(p.y, p.w->rows(), p.tokens,
                                                                Eigen::OuterStride<>(p.y_stride));
  };
  // All are checked before the first runs: nothing is half-written.
  for (std::size_t i = 0; i < count; ++i) {
    const BatchedProduct& p = products[i];
    detail::require(p.w != nullptr, "batched product ", i, " has no w");
    detail::require(p.tokens >= 0 && p.x_stride >= p.w->cols() && p.y_stride >= p.w->rows(), "batched product ", i,
                    " has ", p.tokens, " tokens, x_stride ", p.x_stride, " and y_stride ", p.y_stride,
                    ", expected strides of at least ", p.w->cols(), " and ", p.w->rows());
    p.epilogue.check(p.w->rows(), p.tokens);
    detail::activations_for(*p.w, options.activations);
    detail::require_apart(in(p), out(p), "x", "y");
  }
  detail::for_tasks(options.pool, count, [&](std::size_t i, std::size_t) {
    MatmulOptions serial;
    serial.activations = options.activations;
    serial.activation_bits = options.activation_bits;
    serial.isa = options.isa;
    serial.epilogue = products[i].epilogue;
    if (options.pool == nullptr) serial.workspace = options.workspace;
    matmul(*products[i].w, in(products[i]), out(products[i]), serial);
  });
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
