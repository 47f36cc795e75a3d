// How functions of training run.
#pragma once

#include <Eigen/Core>
#include <optional>

#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/matmul.hpp"
#include "nibble/gemm/workspace.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// How to work, not what comes out: that has the same bits for every number of threads.
struct TrainOptions {
  ThreadPool* pool = nullptr;      ///< nullptr: the calling thread alone
  Workspace* workspace = nullptr;  ///< nullptr: memory of the call's own
  /// fp32, or bf16: products of linear layers round their operands to bfloat16, for twice the speed where the CPU has
  /// AVX512-BF16 (others compute the same bits, slowly).
  Activations products = Activations::fp32;
  std::optional<Isa> isa = {};  ///< empty: the best that the CPU and NIBBLE_MAX_ISA allow
  /// Of the columns given, in the whole batch of a step: what is drawn by column draws for parts of a batch what it would
  /// for the whole.
  Eigen::Index first_column = 0;
};

namespace detail {

inline const KernelTable& kernels_of(const TrainOptions& options) {
  return options.isa ? kernels_for(*options.isa) : kernels();
}

inline MatmulOptions product_options(const TrainOptions& options, const Epilogue& epilogue = {}) {
  MatmulOptions o;
  o.activations = options.products;
  o.epilogue = epilogue;
  o.pool = options.pool;
  o.workspace = options.workspace;
  o.isa = options.isa;
  return o;
}

/// Tokens of one task of what works token by token; sums over tokens are cut here, whatever the threads.
inline constexpr Eigen::Index train_chunk = 32;

/// f(first token, tokens, task) for all of `tokens`, train_chunk to a task.
template <class F>
void for_chunks(ThreadPool* pool, Eigen::Index tokens, F&& f) {
  const auto tasks = ceil_div(static_cast<std::size_t>(tokens), static_cast<std::size_t>(train_chunk));
  for_tasks(pool, tasks, [&](std::size_t task, std::size_t) {
    const Eigen::Index first = static_cast<Eigen::Index>(task) * train_chunk;
    f(first, std::min(train_chunk, tokens - first), task);
  });
}

/// Throws unless m is rows x cols.
template <class M>
void require_shape(const M& m, Eigen::Index rows, Eigen::Index cols, const char* name) {
  require(m.rows() == rows && m.cols() == cols, name, " is ", m.rows(), " x ", m.cols(), ", expected ", rows,
          " x ", cols);
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
