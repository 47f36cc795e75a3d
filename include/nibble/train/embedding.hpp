// Token embedding, with its gradient.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/train/options.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

namespace detail {

template <class Y>
void check_embedding(Eigen::Index vocabulary, Eigen::Index dim, const std::vector<std::int32_t>& tokens,
                     const Y& y, const char* name) {
  require_shape(y, dim, static_cast<Eigen::Index>(tokens.size()), name);
  for (std::size_t t = 0; t < tokens.size(); ++t)
    require(tokens[t] >= 0 && tokens[t] < vocabulary, "token ", t, " is ", tokens[t], ", expected 0 to ",
            vocabulary - 1);
}

}  // namespace detail

/// Column t of y, dim x T, = row tokens[t] of the table, vocabulary x dim.
/// Throws InvalidArgument, naming the token, where one is out of range, and where shapes do not fit.
inline void embedding(const ConstWeightsRef& table, const std::vector<std::int32_t>& tokens, MatrixRef y,
                      const TrainOptions& options = {}) {
  detail::check_embedding(table.rows(), table.cols(), tokens, y, "y");
  detail::for_chunks(options.pool, y.cols(), [&](Eigen::Index first, Eigen::Index n, std::size_t) {
    for (Eigen::Index t = first; t < first + n; ++t)
      y.col(t) = table.row(tokens[static_cast<std::size_t>(t)]).transpose();
  });
}

/// Row tokens[t] of dtable, vocabulary x dim, gets column t of dy, dim x T, added: ascending t for every row, whatever the
/// threads. dtable may be the gradient of an output layer too (tied weights). Throws as embedding() does.
inline void embedding_backward(const std::vector<std::int32_t>& tokens, const ConstMatrixRef& dy,
                               RowMajorRef dtable, const TrainOptions& options = {}) {
  detail::check_embedding(dtable.rows(), dtable.cols(), tokens, dy, "dy");
  // A task adds all tokens' part of some dimensions: no two tasks meet, and the order stays.
  constexpr Eigen::Index slice = 64;
  const Eigen::Index dim = dtable.cols();
  const auto tasks = detail::ceil_div(static_cast<std::size_t>(dim), static_cast<std::size_t>(slice));
  detail::for_tasks(options.pool, tasks, [&](std::size_t task, std::size_t) {
    const detail::FpEnvironment environment;
    const Eigen::Index begin = static_cast<Eigen::Index>(task) * slice;
    const Eigen::Index n = std::min(slice, dim - begin);
    for (Eigen::Index t = 0; t < dy.cols(); ++t)
      dtable.row(tokens[static_cast<std::size_t>(t)]).segment(begin, n) += dy.col(t).segment(begin, n).transpose();
  });
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
