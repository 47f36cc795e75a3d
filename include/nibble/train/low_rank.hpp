// Products of two thin matrices: what LoRA adds to weights, and the nearest one to a matrix.
#pragma once

#include <Eigen/Core>
#include <Eigen/Eigenvalues>
#include <Eigen/QR>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/formats/bf16.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/ptq/output_error.hpp"
#include "nibble/ptq/weight_grids.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// scale * b a, N x K: what LoRA adds to a weight matrix (Hu et al. 2021, equation 3).
struct LowRank {
  RowMajorMatrix a;    ///< r x K
  RowMajorMatrix b;    ///< N x r
  double scale = 1.0;  ///< alpha / r, or alpha / sqrt(r) (rsLoRA)

  Eigen::Index rank() const noexcept { return a.rows(); }
  bool empty() const noexcept { return a.rows() == 0; }
  Eigen::Index rows() const noexcept { return b.rows(); }
  Eigen::Index cols() const noexcept { return a.cols(); }
  /// Bytes at `bytes_each` a value.
  std::size_t byte_size(std::size_t bytes_each) const noexcept {
    return static_cast<std::size_t>(a.size() + b.size()) * bytes_each;
  }
};

namespace detail {

/// Throws unless the parts belong together, fit n x k, and are finite.
inline void check_low_rank(const LowRank& l, Eigen::Index n, Eigen::Index k) {
  require(l.a.rows() == l.b.cols() && (l.empty() || (l.a.cols() == k && l.b.rows() == n)), "low rank: a is ",
          l.a.rows(), " x ", l.a.cols(), " and b is ", l.b.rows(), " x ", l.b.cols(), ", expected r x ", k,
          " and ", n, " x r");
  require(std::isfinite(l.scale) && l.a.allFinite() && l.b.allFinite(),
          "low rank: a, b or the scale is not finite");
}

/// Uniform bits of (seed, index): SplitMix64 (Steele, Lea and Flood 2014), so the same on every platform.
inline std::uint64_t mixed_bits(std::uint64_t seed, std::uint64_t index) noexcept {
  std::uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15U;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return z ^ (z >> 31);
}
/// Uniform on [-1, 1), 24 bits.
inline float mixed_uniform(std::uint64_t seed, std::uint64_t index) noexcept {
  return static_cast<float>(mixed_bits(seed, index) >> 40) * 0x1p-23F - 1.0F;
}

}  // namespace detail

/// y := w + scale b a in place, every element rounded once: products of floats are exact in double, their sum and w's are
/// taken there, so an element is off by half an ulp of float and about r 2^-53 sum |scale b a|.
/// Throws InvalidArgument where shapes do not fit or the low rank is not finite.
inline void merge_low_rank(const LowRank& l, RowMajorMatrix& w, ThreadPool* pool = nullptr) {
  const detail::FpEnvironment environment;
  detail::check_low_rank(l, w.rows(), w.cols());
  if (l.empty() || w.size() == 0) return;
  detail::for_tasks(pool, static_cast<std::size_t>(w.rows()), [&](std::size_t task, std::size_t) {
    const auto row = static_cast<Eigen::Index>(task);
    std::vector<double> sums(static_cast<std::size_t>(w.cols()), 0.0);
    for (Eigen::Index r = 0; r < l.rank(); ++r) {
      const auto factor = static_cast<double>(l.b(row, r));
      const float* a = l.a.data() + r * l.a.cols();
      for (std::size_t k = 0; k < sums.size(); ++k)
        sums[k] += factor * static_cast<double>(a[k]);  // exact product
    }
    float* values = w.data() + row * w.cols();
    for (std::size_t k = 0; k < sums.size(); ++k)
      values[k] = static_cast<float>(std::fma(l.scale, sums[k], static_cast<double>(values[k])));
  });
}

struct LowRankOptions {
  std::uint64_t seed = 1;
  Eigen::Index oversampling = 8;  ///< directions that are followed beside the wanted ones
  int iterations = 6;             ///< powers of the residual's Gram matrix
  ThreadPool* pool = nullptr;     ///< nullptr: the calling thread. Changes no bit
};

/// The b a of rank at most `rank` that is nearest to e, N x K: with a Hessian h the one of least tr((e - b a) h (e - b a)^T),
/// the error at a linear layer's outputs; without one (0 x 0) of least squares, which is e's truncated SVD.
///
/// With U the leading left singular vectors of e h^(1/2) it is U U^T e (Eckart and Young), so no root of h is needed.
/// U comes from randomized subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) on e h e^T, started from
/// `seed`. Column i of b and row i of a get the same length. Throws InvalidArgument where shapes do not fit, rank < 0, or
/// a value is not finite.
inline LowRank best_low_rank(const RowMajorMatrix& e, Eigen::Index rank,
                             const ConstMatrixRef& h = Eigen::MatrixXf(), const LowRankOptions& options = {}) {
  const detail::FpEnvironment environment;
  detail::require(rank >= 0, "rank is ", rank, ", expected 0 or more");
  detail::require(options.oversampling >= 0 && options.iterations >= 0, "oversampling is ", options.oversampling,
                  " and iterations ", options.iterations, ", expected 0 or more");
  detail::require(e.allFinite(), "the matrix to approximate is not finite");
  if (h.size() != 0) detail::check_hessian(h, e.cols());
  const Eigen::Index n = e.rows(), k = e.cols();
  const Eigen::Index smaller = std::min(n, k);
  rank = std::min(rank, smaller);
  LowRank l;
  l.a = RowMajorMatrix::Zero(rank, k);
  l.b = RowMajorMatrix::Zero(n, rank);
  const float largest = e.size() == 0 ? 0.0F : e.cwiseAbs().maxCoeff();
  if (rank == 0 || largest == 0.0F) return l;
  const Eigen::Index width = std::min(rank + options.oversampling, smaller);
  MatmulOptions product;
  product.pool = options.pool;
  Eigen::MatrixXf q(n, width), inner(k, width), weighted(k, width), outer(n, width);
  for (Eigen::Index i = 0; i < q.size(); ++i)
    q.data()[i] = detail::mixed_uniform(options.seed, static_cast<std::uint64_t>(i));
  /// outer = e h e^T q.
  const auto apply = [&] {
    gemm(e.transpose(), q, inner, product);
    if (h.size() != 0) gemm(h, inner, weighted, product);
    gemm(e, h.size() != 0 ? weighted : inner, outer, product);
  };
  const auto orthonormal = [&](const Eigen::MatrixXf& m) {
    // Scaled: a Gram matrix's values leave float's range sooner than e's.
    const float top = m.cwiseAbs().maxCoeff();
    Eigen::MatrixXd wide = m.cast<double>();
    if (top > 0.0F) wide /= static_cast<double>(top);
    const Eigen::HouseholderQR<Eigen::MatrixXd> qr(wide);
    q = (qr.householderQ() * Eigen::MatrixXd::Identity(n, width)).template cast<float>();
  };
  orthonormal(Eigen::MatrixXf(q));
  for (int i = 0; i < options.iterations; ++i) {
    apply();
    detail::require(outer.allFinite(), "the matrix to approximate, or the Hessian, is too large");
    orthonormal(outer);
  }
  apply();
  Eigen::MatrixXd small = q.cast<double>().transpose() * outer.cast<double>();
  small = 0.5 * (small + small.transpose()).eval();
  detail::require(small.allFinite(), "the matrix to approximate, or the Hessian, is too large");
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(small);
  const Eigen::MatrixXf u =
      (q.cast<double>() * solver.eigenvectors().rightCols(rank).rowwise().reverse()).cast<float>();
  Eigen::MatrixXf at(k, rank);
  gemm(e.transpose(), u, at, product);
  for (Eigen::Index i = 0; i < rank; ++i) {
    const double length = std::sqrt(at.col(i).cast<double>().squaredNorm());
    if (!(length > 0.0)) continue;
    const double root = std::sqrt(length);
    l.b.col(i) = (u.col(i).cast<double>() * root).cast<float>();
    l.a.row(i) = (at.col(i).cast<double>() / root).cast<float>().transpose();
  }
  return l;
}

namespace detail {

inline float stored_value(Format format, float x) noexcept {
  if (format == Format::fp16) return float_from_fp16(fp16_from_float(x));
  if (format == Format::bf16) return float_from_bf16(bf16_from_float(x));
  return x;
}

}  // namespace detail

/// a and b as a file in `format` (fp32, fp16 or bf16) holds them. Throws InvalidArgument for other formats, and where a
/// value leaves the format's range.
inline void round_low_rank(LowRank& l, Format format) {
  detail::require(format == Format::fp32 || format == Format::fp16 || format == Format::bf16,
                  "low rank in format ", name_of(format), ", expected fp32, fp16 or bf16");
  for (RowMajorMatrix* m : {&l.a, &l.b}) {
    for (Eigen::Index i = 0; i < m->size(); ++i) m->data()[i] = detail::stored_value(format, m->data()[i]);
    detail::require(m->allFinite(), "low rank: a value is beyond the range of ", name_of(format));
  }
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
