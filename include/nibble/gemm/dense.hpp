// C = A * B in plain floats, dispatched at run time: Eigen's own product is compiled for the command line's ISA, which
// under -O2 alone is SSE2.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <type_traits>

#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/drive_float.hpp"
#include "nibble/gemm/matmul.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// c = epilogue(a * b): a n x k, b k x m, c n x m, all float; a and b in memory of any order and stride, so
/// a.transpose() and b.transpose() work as they are (other expressions are evaluated first). Every output is summed by
/// one fma a k in ascending order: the bits depend neither on the shape of the call nor on threads or ISA. c must not
/// overlap a or b. Throws InvalidArgument where shapes do not fit.
///
/// options.activations = Activations::bf16 rounds a and b to bfloat16 first and sums their products in float, in the
/// order of Bf16GemmArgs (kernels/args.hpp): about twice as fast where the CPU has AVX512-BF16.
template <class A, class B>
void gemm(const Eigen::MatrixBase<A>& a_in, const Eigen::MatrixBase<B>& b_in, MatrixRef c,
          const MatmulOptions& options = {}) {
  if constexpr (!detail::is_float_memory_v<A>) {
    const Eigen::MatrixXf a = a_in.template cast<float>();
    gemm(a, b_in, c, options);
  } else if constexpr (!detail::is_float_memory_v<B>) {
    const Eigen::MatrixXf b = b_in.template cast<float>();
    gemm(a_in, b, c, options);
  } else {
    const detail::FpEnvironment environment;
    const detail::FloatView a = detail::float_view(a_in);
    const detail::FloatView b = detail::float_view(b_in);
    detail::require(a.cols == b.rows, "a is ", a.rows, " x ", a.cols, " and b is ", b.rows, " x ", b.cols,
                    ", expected as many columns in a as rows in b");
    detail::require(static_cast<std::size_t>(c.rows()) == a.rows && static_cast<std::size_t>(c.cols()) == b.cols,
                    "c is ", c.rows(), " x ", c.cols(), ", expected ", a.rows, " x ", b.cols);
    options.epilogue.check(c.rows(), c.cols());
    detail::require_apart(a_in.derived(), c, "a", "c");
    detail::require_apart(b_in.derived(), c, "b", "c");
    if (c.size() == 0) return;
    const detail::KernelTable& kernels = detail::kernels_of(options);
    if (a.cols == 0) {  // sums of nothing, and null pointers to it
      auto* zeros = reinterpret_cast<float*>(detail::workspace_of(options).take(a.rows * sizeof(float)));
      std::fill_n(zeros, a.rows, 0.0F);
      detail::finish_tile(kernels, zeros, 0, 0, b.cols, 0, a.rows, nullptr, nullptr, nullptr, options.epilogue,
                          detail::float_output(c));
      return;
    }
    if (options.activations == Activations::bf16) {
      detail::PanelView w;
      w.format = Format::bf16;
      w.n = a.rows;
      w.k = a.cols;
      w.k_padded = detail::round_up(a.cols, detail::k_unit);
      w.group_size = w.k_padded;
      w.groups = 1;
      w.panel_bytes = w.k_padded * detail::panel_width * 2;
      detail::run_bf16(kernels, w, detail::ceil_div(a.rows, detail::panel_width), b, options.epilogue,
                       detail::float_output(c), options.pool, detail::workspace_of(options), &a);
      return;
    }
    // A few tokens: reading a once from where it lies beats packing it.
    const bool outputs_contiguous = a.row_stride == 1;
    const bool inputs_contiguous = a.col_stride == 1 && kernels.gemv_rows != nullptr;
    if (b.cols > (outputs_contiguous ? 8U : 4U) || (!outputs_contiguous && !inputs_contiguous)) {
      detail::run_float(kernels, detail::dense_source(a), b, options.epilogue, detail::float_output(c),
                        options.pool, detail::workspace_of(options));
      return;
    }
    const std::size_t threads = options.pool == nullptr ? 1 : static_cast<std::size_t>(options.pool->threads());
    const std::size_t chunk = detail::round_up(detail::ceil_div(a.rows, threads), 64);
    const detail::Output out = detail::float_output(c);
    // The epilogue may read c, so sums wait elsewhere for it.
    const bool finish = options.epilogue.steps() != 0;
    float* scratch = nullptr;
    if (finish)
      scratch =
          reinterpret_cast<float*>(detail::workspace_of(options).take(threads * chunk * b.cols * sizeof(float)));
    detail::for_tasks(options.pool, detail::ceil_div(a.rows, chunk), [&](std::size_t task, std::size_t thread) {
      const std::size_t row = task * chunk;
      const std::size_t rows = std::min(chunk, a.rows - row);
      detail::RowsGemvArgs args;
      args.a = a.data + row * a.row_stride;
      args.lda = outputs_contiguous ? a.col_stride : a.row_stride;
      args.n = rows;
      args.k = a.cols;
      args.x = b.data;
      args.x_stride = b.row_stride;
      args.y = finish ? scratch + thread * chunk * b.cols : out.floats + row;
      args.tokens = b.cols;
      args.x_token_stride = b.col_stride;
      args.y_stride = finish ? chunk : out.stride;
      outputs_contiguous ? kernels.gemv_dense(args) : kernels.gemv_rows(args);
      if (finish)
        detail::finish_tile(kernels, args.y, args.y_stride, 0, b.cols, row, rows, nullptr, nullptr, nullptr,
                            options.epilogue, out);
    });
  }
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
