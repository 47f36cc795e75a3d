// The upper Cholesky factor of an inverse, without the inverse: what the error feedback of GPTQ reads its rows from.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include <Eigen/Core>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/ptq/hessian.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// How a factorisation ended.
struct CholeskyStatus {
  bool ok = true;
  Eigen::Index failed_at = -1;  ///< the input whose pivot had no correct digit left, or was not finite
  double pivot = 0.0;           ///< that pivot as a part of its diagonal entry; NaN where not finite
};

namespace detail {

inline constexpr Eigen::Index cholesky_block = 64;   // factored and inverted by plain loops
inline constexpr Eigen::Index cholesky_panel = 256;  // what one deep product brings up to date

/// One diagonal block, upper triangle, n <= 64: a becomes R with R R^T = a, and s its inverse. Sums are double, factors
/// floats: so every product is exact, and the bits are the same however the compiler contracts. Returns the index of the
/// pivot that fails, or n.
inline Eigen::Index factor_block(Eigen::Ref<Eigen::MatrixXf, 0, Eigen::OuterStride<>> a, const float* diagonal,
                                 double tolerance, Eigen::Ref<Eigen::MatrixXf, 0, Eigen::OuterStride<>> s,
                                 double& pivot) {
  constexpr auto width = static_cast<std::size_t>(cholesky_block);
  const auto n = static_cast<std::size_t>(a.rows());
  double sums[width * width];
  float r[width * width];
  for (std::size_t j = 0; j < n; ++j)
    for (std::size_t i = 0; i <= j; ++i)
      sums[j * width + i] = static_cast<double>(a(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)));
  for (std::size_t c = n; c-- > 0;) {
    pivot = sums[c * width + c];
    const double whole = static_cast<double>(diagonal[c]);
    if (!(pivot > tolerance * whole) || !(pivot <= 2.0 * whole) || !(whole < 1e30)) {
      pivot /= whole;
      return static_cast<Eigen::Index>(c);
    }
    const double root = std::sqrt(pivot);
    float* column = r + c * width;
    for (std::size_t i = 0; i < c; ++i) column[i] = static_cast<float>(sums[c * width + i] / root);
    column[c] = static_cast<float>(root);
    for (std::size_t j = 0; j < c; ++j) {
      const double factor = static_cast<double>(column[j]);
      double* to = sums + j * width;
      for (std::size_t i = 0; i <= j; ++i) to[i] -= static_cast<double>(column[i]) * factor;
    }
  }
  // Column j of the inverse: R s = e_j from the last row up.
  for (std::size_t j = 0; j < n; ++j) {
    double rest[width] = {};
    rest[j] = 1.0;
    for (std::size_t k = j + 1; k-- > 0;) {
      const float* column = r + k * width;
      const auto value = static_cast<float>(rest[k] / static_cast<double>(column[k]));
      s(static_cast<Eigen::Index>(k), static_cast<Eigen::Index>(j)) = value;
      for (std::size_t i = 0; i < k; ++i) rest[i] -= static_cast<double>(column[i]) * static_cast<double>(value);
    }
    for (std::size_t i = j + 1; i < n; ++i) s(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)) = 0.0F;
  }
  for (std::size_t j = 0; j < n; ++j)
    for (std::size_t i = 0; i <= j; ++i)
      a(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)) = r[j * width + i];
  return a.rows();
}

/// to = -from^T, by tiles.
inline void negated_transpose(const Eigen::Ref<const Eigen::MatrixXf, 0, Eigen::OuterStride<>>& from,
                              Eigen::MatrixXf& to, ThreadPool* pool) {
  constexpr Eigen::Index tile = 16;
  const Eigen::Index strip = 256;
  to.resize(from.cols(), from.rows());
  for_tasks(pool, static_cast<std::size_t>((from.cols() + strip - 1) / strip), [&](std::size_t task, std::size_t) {
    const Eigen::Index begin = static_cast<Eigen::Index>(task) * strip;
    const Eigen::Index end = std::min(begin + strip, from.cols());
    for (Eigen::Index k = begin; k < end; k += tile)
      for (Eigen::Index m = 0; m < from.rows(); m += tile)
        for (Eigen::Index j = k; j < std::min(k + tile, end); ++j)
          for (Eigen::Index i = m; i < std::min(m + tile, from.rows()); ++i) to(j, i) = -from(i, j);
  });
}

/// R with R R^T = h, upper, in h's upper triangle, and the inverses of its diagonal blocks. From the last column to the
/// first: a panel of columns takes in everything right of it by one product as deep as that is wide.
inline CholeskyStatus factor_from_the_end(Eigen::MatrixXf& h, Eigen::MatrixXf& inverses, ThreadPool* pool) {
  const Eigen::Index n = h.rows();
  const Eigen::VectorXf diagonal = h.diagonal();
  // Below it a pivot is the rounding errors of the n products that were subtracted.
  const double tolerance = std::sqrt(static_cast<double>(n)) * 0x1p-24;
  inverses.resize(cholesky_block, n);
  Eigen::MatrixXf right;
  Eigen::MatrixXf above;
  Eigen::MatrixXf factor;
  Eigen::MatrixXf rest;
  const auto update = [&](Eigen::Index rows, Eigen::Index begin, Eigen::Index end, Eigen::Index from,
                          Eigen::Index to) {
    if (from == to) return;
    negated_transpose(h.block(begin, from, end - begin, to - from), right, pool);
    auto part = h.block(0, begin, rows, end - begin);
    MatmulOptions options;
    options.pool = pool;
    options.epilogue.add(part);
    gemm(h.block(0, from, rows, to - from), right, part, options);
  };
  for (Eigen::Index p0 = (n - 1) / cholesky_panel * cholesky_panel; p0 >= 0; p0 -= cholesky_panel) {
    const Eigen::Index p1 = std::min(p0 + cholesky_panel, n);
    update(p1, p0, p1, p1, n);
    for (Eigen::Index b0 = p0 + (p1 - p0 - 1) / cholesky_block * cholesky_block; b0 >= p0; b0 -= cholesky_block) {
      const Eigen::Index b1 = std::min(b0 + cholesky_block, p1);
      const Eigen::Index width = b1 - b0;
      update(b1, b0, b1, b1, p1);
      CholeskyStatus status;
      const Eigen::Index failed = factor_block(h.block(b0, b0, width, width), diagonal.data() + b0, tolerance,
                                               inverses.block(0, b0, width, width), status.pivot);
      if (failed != width) {
        status.ok = false;
        status.failed_at = b0 + failed;
        return status;
      }
      if (b0 == 0) continue;
      // Times the inverse's transpose; then the same of what is left, for an inverse alone errs by the block's condition,
      // and a token of huge activations makes that large: 0.04 of the mean diagonal, four times the usual damping.
      above = h.block(0, b0, b0, width);
      right = inverses.block(0, b0, width, width).transpose();
      auto solved = h.block(0, b0, b0, width);
      MatmulOptions options;
      options.pool = pool;
      gemm(above, right, solved, options);
      factor = -h.block(b0, b0, width, width).template triangularView<Eigen::Upper>().toDenseMatrix().transpose();
      rest.resize(b0, width);
      MatmulOptions plus = options;
      plus.epilogue.add(above);
      gemm(solved, factor, rest, plus);
      MatmulOptions again = options;
      again.epilogue.add(solved);
      gemm(rest, right, solved, again);
    }
  }
  return {};
}

/// R^-1 in place of R, upper, from the inverses of its diagonal blocks: two neighbours A and C that are inverted become one,
/// [A B; 0 C]^-1 = [A^-1, -A^-1 B C^-1; 0, C^-1].
inline void invert_upper(Eigen::MatrixXf& r, const Eigen::MatrixXf& inverses, ThreadPool* pool) {
  const Eigen::Index n = r.rows();
  // First of all: products below read pieces of triangles as wholes.
  for_tasks(pool, static_cast<std::size_t>((n + 63) / 64), [&](std::size_t task, std::size_t) {
    const Eigen::Index begin = static_cast<Eigen::Index>(task) * 64;
    for (Eigen::Index c = begin; c < std::min(begin + 64, n); ++c) r.col(c).tail(n - c - 1).setZero();
  });
  for (Eigen::Index b = 0; b < n; b += cholesky_block) {
    const Eigen::Index width = std::min(cholesky_block, n - b);
    r.block(b, b, width, width) = inverses.block(0, b, width, width);
  }
  const Eigen::VectorXf minus = Eigen::VectorXf::Constant(n, -1.0F);
  const auto merge = [&](Eigen::Index lo, Eigen::Index mid, Eigen::Index hi, ThreadPool* threads) {
    Eigen::MatrixXf product(mid - lo, hi - mid);
    MatmulOptions options;
    options.pool = threads;
    // Triangles are passed over by pieces: what is left of zeros costs an eighth more.
    const Eigen::Index piece = std::max<Eigen::Index>(64, ((mid - lo) / 8 + 63) / 64 * 64);
    for (Eigen::Index c = mid; c < hi; c += piece) {
      const Eigen::Index end = std::min(c + piece, hi);
      gemm(r.block(lo, mid, mid - lo, end - mid), r.block(mid, c, end - mid, end - c),
           product.middleCols(c - mid, end - c), options);
    }
    for (Eigen::Index row = lo; row < mid; row += piece) {
      const Eigen::Index end = std::min(row + piece, mid);
      MatmulOptions negated = options;
      negated.epilogue.scale(minus.head(end - row));
      gemm(r.block(row, row, end - row, mid - row), product.bottomRows(mid - row),
           r.block(row, mid, end - row, hi - mid), negated);
    }
  };
  for (Eigen::Index size = cholesky_block; size < n; size *= 2) {
    const Eigen::Index pairs = (n - size + 2 * size - 1) / (2 * size);
    const auto pair = [&](Eigen::Index i, ThreadPool* threads) {
      const Eigen::Index lo = i * 2 * size;
      merge(lo, lo + size, std::min(lo + 2 * size, n), threads);
    };
    if (size <= 256)
      for_tasks(pool, static_cast<std::size_t>(pairs),
                [&](std::size_t task, std::size_t) { pair(static_cast<Eigen::Index>(task), nullptr); });
    else
      for (Eigen::Index i = 0; i < pairs; ++i) pair(i, pool);
  }
}

}  // namespace detail

/// U, upper, with U^T U = h^-1, in place of h (K x K, symmetric; the upper triangle is read). No inverse is formed: from
/// h = R R^T, R upper, follows U = R^-1, so it takes 2/3 K^3 operations instead of the 5/3 K^3 of Cholesky, inverse and
/// Cholesky again.
///
/// Float, on nibble::gemm, with sums in double inside blocks of 64: |R R^T - h| <= about (K + c) u |R| |R^T|, entry by entry
/// (Higham 2002, theorem 10.3), c growing with the condition of the diagonal blocks scaled to a unit diagonal, for those
/// are applied as inverses. The bits depend on h alone.
///
/// Fails where a pivot is below sqrt(K) u of its diagonal entry, which is what rounding makes of zero, and where h holds
/// NaN or Inf; h is lost then. Throws InvalidArgument where h is not square.
inline CholeskyStatus inverse_cholesky(Eigen::MatrixXf& h, ThreadPool* pool = nullptr) {
  const detail::FpEnvironment environment;
  detail::require(h.rows() == h.cols(), "h is ", h.rows(), " x ", h.cols(), ", expected a square matrix");
  if (h.rows() == 0) return {};
  Eigen::MatrixXf inverses;
  const CholeskyStatus status = detail::factor_from_the_end(h, inverses, pool);
  if (status.ok) detail::invert_upper(h, inverses, pool);
  return status;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
