// Hadamard rotations: orthogonal matrices of +-1 / sqrt(n) that spread outliers over all channels, and their fast
// products.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

constexpr bool is_prime(Eigen::Index n) noexcept {
  for (Eigen::Index d = 2; d * d <= n; ++d)
    if (n % d == 0) return false;
  return n > 1;
}

/// Largest order that is multiplied out, m additions an element.
inline constexpr Eigen::Index max_paley_order = 512;

/// True where Paley's first construction gives a Hadamard matrix of order m = q + 1, q a prime 3 mod 4, or his second
/// one of order m = 2(q + 1), q a prime 1 mod 4: 12, 20, 24, 28, 36, 44, 60, 68, ...
constexpr bool is_paley_order(Eigen::Index m) noexcept {
  if (m % 4 != 0 || m > max_paley_order) return false;
  return is_prime(m - 1) || (m / 2 % 4 == 2 && is_prime(m / 2 - 1));
}

/// The Hadamard matrix of such an order, its entries +-1 (Paley, On orthogonal matrices, 1933).
inline Eigen::MatrixXd paley_matrix(Eigen::Index m) {
  const bool first = is_prime(m - 1);
  const Eigen::Index q = first ? m - 1 : m / 2 - 1;
  // The quadratic character: 1 on squares, -1 on the others, 0 on 0.
  std::vector<double> character(static_cast<std::size_t>(q), -1.0);
  for (Eigen::Index i = 1; i < q; ++i) character[static_cast<std::size_t>(i * i % q)] = 1.0;
  character[0] = 0.0;
  // Bordered by ones, skew where q is 3 mod 4, else symmetric: c c^T = q I either way.
  Eigen::MatrixXd c = Eigen::MatrixXd::Zero(q + 1, q + 1);
  c.row(0).tail(q).setOnes();
  c.col(0).tail(q).setConstant(first ? -1.0 : 1.0);
  for (Eigen::Index i = 0; i < q; ++i)
    for (Eigen::Index j = 0; j < q; ++j) c(i + 1, j + 1) = character[static_cast<std::size_t>((i - j + q) % q)];
  if (first) return Eigen::MatrixXd::Identity(m, m) + c;
  Eigen::MatrixXd h(m, m);
  for (Eigen::Index i = 0; i <= q; ++i)
    for (Eigen::Index j = 0; j <= q; ++j) {
      const double v = c(i, j);
      const double one = i == j ? 1.0 : 0.0;
      h(2 * i, 2 * j) = v + one;
      h(2 * i, 2 * j + 1) = h(2 * i + 1, 2 * j) = v - one;
      h(2 * i + 1, 2 * j + 1) = -v - one;
    }
  return h;
}

/// The Paley orders that make an order with a power of two, with the fewest additions an element.
struct HadamardPlan {
  std::vector<Eigen::Index> paley;
  Eigen::Index cost = -1;  // negative: there is no such product

  bool found() const noexcept { return cost >= 0; }
};

inline HadamardPlan plan_odd(Eigen::Index odd, int twos) {
  HadamardPlan best;
  if (odd == 1) {
    best.cost = twos;
    return best;
  }
  for (Eigen::Index d = 3; d <= odd; d += 2) {
    if (odd % d != 0) continue;
    Eigen::Index m = d * 4;
    for (int t = 2; t <= twos && m <= max_paley_order; ++t, m *= 2) {
      if (!is_paley_order(m)) continue;
      HadamardPlan rest = plan_odd(odd / d, twos - t);
      if (!rest.found() || (best.found() && best.cost <= rest.cost + m)) continue;
      rest.paley.insert(rest.paley.begin(), m);
      rest.cost += m;
      best = rest;
    }
  }
  return best;
}

inline HadamardPlan plan_hadamard(Eigen::Index order) {
  int twos = 0;
  Eigen::Index odd = order;
  while (odd > 0 && odd % 2 == 0) {
    odd /= 2;
    ++twos;
  }
  // Every odd factor comes with two twos or more, so few orders get far; the bound keeps nonsense from taking long.
  return odd >= 1 && odd <= 1000000 ? plan_odd(odd, twos) : HadamardPlan{};
}

}  // namespace detail

/// Largest n' that divides n and that HadamardRotation has an order of: n itself for 64, 576 = 36 * 16 and
/// 1536 = 12 * 128; 4 for 172 = 4 * 43, whose Hadamard matrices come from none of the constructions used here.
/// Throws InvalidArgument for n < 1.
inline Eigen::Index hadamard_block(Eigen::Index n) {
  detail::require(n >= 1, "n is ", n, ", expected at least 1");
  for (Eigen::Index parts = 1; parts < n; ++parts)
    if (n % parts == 0 && detail::plan_hadamard(n / parts).found()) return n / parts;
  return 1;
}

/// An orthogonal n x n matrix R = I (x) (D H / sqrt(b)): H a Hadamard matrix of order b (Kronecker products of Paley's
/// and of [1 1; 1 -1]), D a diagonal of +-1, the same block for each run of b channels.
///
/// A hidden state x is kept as x' = R^T x. A linear that reads it becomes W R, one that writes it R^T W: the function
/// stays the same (QuaRot, Ashkboos et al. 2024, section 3). An RMS norm in between commutes with R once its weight is
/// folded into what follows (fold_norm()). Within a head, v -> o: R^T applied to the values' rows and o's inputs times
/// R, in blocks of the head's size - with grouped queries too, as all heads have the same block.
///
/// Products run in double and round to float once. Same bits for any number of threads.
class HadamardRotation {
 public:
  /// @param n      channels
  /// @param block  channels that are mixed with each other, a divisor of n; 0: n
  /// @param seed   for random signs in D; empty: all +1
  /// Throws InvalidArgument where block does not divide n, Unsupported where there is no construction of that order:
  /// it must be a power of two times orders q + 1 (q prime, 3 mod 4) or 2(q + 1) (q prime, 1 mod 4) up to 512.
  explicit HadamardRotation(Eigen::Index n, Eigen::Index block = 0, std::optional<std::uint64_t> seed = {})
      : n_(n), block_(block == 0 ? n : block) {
    detail::require(n >= 1, "n is ", n, ", expected at least 1");
    detail::require(block_ >= 1 && n % block_ == 0, "block is ", block, ", expected a divisor of n, which is ", n);
    const detail::HadamardPlan plan = detail::plan_hadamard(block_);
    detail::require<Unsupported>(plan.found(), "there is no construction for a Hadamard matrix of order ", block_,
                                 "; use blocks of order ", hadamard_block(block_));
    for (const Eigen::Index m : plan.paley) paley_.push_back(detail::paley_matrix(m));
    signs_ = Eigen::VectorXd::Ones(block_);
    if (seed) {
      std::mt19937_64 random(*seed);
      for (double& s : signs_) s = (random() >> 63) != 0 ? -1.0 : 1.0;
    }
  }

  Eigen::Index size() const noexcept { return n_; }
  Eigen::Index block() const noexcept { return block_; }

  /// x := R^T x for every column; size() x m floats in memory: a Matrix, Map, Ref or Block of any order. Throws
  /// InvalidArgument for another number of rows and for values that are not finite; so do the others.
  template <class X>
  void rotate(X&& x, ThreadPool* pool = nullptr) const {
    check("x", x.rows(), "rows");
    apply(x.data(), x.rowStride(), x.colStride(), x.cols(), true, pool);
  }
  /// x := R x for every column: undoes rotate().
  template <class X>
  void unrotate(X&& x, ThreadPool* pool = nullptr) const {
    check("x", x.rows(), "rows");
    apply(x.data(), x.rowStride(), x.colStride(), x.cols(), false, pool);
  }
  /// w := w R: what a linear becomes whose input is rotated; N x size().
  template <class W>
  void rotate_inputs(W&& w, ThreadPool* pool = nullptr) const {
    check("w", w.cols(), "columns");
    apply(w.data(), w.colStride(), w.rowStride(), w.rows(), true, pool);
  }
  /// w := R^T w: what a linear becomes whose output is to be rotated; size() x K. A bias is a matrix of one column.
  template <class W>
  void rotate_outputs(W&& w, ThreadPool* pool = nullptr) const {
    rotate(w, pool);
  }

  /// R, written out.
  Eigen::MatrixXf matrix() const {
    Eigen::MatrixXf r = Eigen::MatrixXf::Identity(n_, n_);
    unrotate(r);
    return r;
  }

 private:
  static constexpr Eigen::Index lanes = 8;  // vectors that are transformed side by side
  using Lanes = Eigen::Array<double, static_cast<int>(lanes), Eigen::Dynamic>;

  void check(const char* name, Eigen::Index length, const char* what) const {
    detail::require(length == n_, name, " has ", length, " ", what, ", the rotation has size ", n_);
  }

  /// H^T or H times the columns' elements, without 1 / sqrt(b).
  void transform(Lanes& x, Lanes& scratch, bool transposed) const {
    Eigen::Index stride = block_;
    for (const Eigen::MatrixXd& h : paley_) {
      const Eigen::Index m = h.rows();
      const Eigen::Index outer = stride;
      stride /= m;
      for (Eigen::Index begin = 0; begin < block_; begin += outer)
        for (Eigen::Index t = begin; t < begin + stride; ++t) {
          for (Eigen::Index j = 0; j < m; ++j) {
            // Products with +-1 are exact, so it does not matter whether they are contracted.
            Eigen::Array<double, static_cast<int>(lanes), 1> sum = x.col(t) * (transposed ? h(0, j) : h(j, 0));
            for (Eigen::Index i = 1; i < m; ++i) sum += x.col(t + i * stride) * (transposed ? h(i, j) : h(j, i));
            scratch.col(j) = sum;
          }
          for (Eigen::Index j = 0; j < m; ++j) x.col(t + j * stride) = scratch.col(j);
        }
    }
    for (Eigen::Index half = stride / 2; half >= 1; half /= 2)
      for (Eigen::Index begin = 0; begin < block_; begin += 2 * half)
        for (Eigen::Index t = begin; t < begin + half; ++t) {
          const Eigen::Array<double, static_cast<int>(lanes), 1> a = x.col(t);
          const Eigen::Array<double, static_cast<int>(lanes), 1> b = x.col(t + half);
          x.col(t) = a + b;
          x.col(t + half) = a - b;
        }
  }

  /// R^T (transposed) or R times `vectors` vectors: element i of vector v is data[i * step + v * next].
  void apply(float* data, Eigen::Index step, Eigen::Index next, Eigen::Index vectors, bool transposed,
             ThreadPool* pool) const {
    const detail::FpEnvironment environment;
    const double norm = 1.0 / std::sqrt(static_cast<double>(block_));
    const Eigen::Index blocks = n_ / block_;
    const Eigen::Index tasks = (vectors + lanes - 1) / lanes;
    detail::for_tasks(pool, static_cast<std::size_t>(tasks), [&](std::size_t task, std::size_t) {
      const Eigen::Index first = static_cast<Eigen::Index>(task) * lanes;
      const Eigen::Index count = std::min(lanes, vectors - first);
      Lanes x = Lanes::Zero(lanes, block_);
      Lanes scratch(lanes, paley_.empty() ? 1 : detail::max_paley_order);
      for (Eigen::Index b = 0; b < blocks; ++b) {
        float* at = data + first * next + b * block_ * step;
        for (Eigen::Index i = 0; i < block_; ++i)
          for (Eigen::Index l = 0; l < count; ++l)
            x(l, i) = static_cast<double>(at[i * step + l * next]) * (transposed ? signs_[i] : 1.0);
        transform(x, scratch, transposed);
        double finite = 0.0;
        for (Eigen::Index i = 0; i < block_; ++i)
          for (Eigen::Index l = 0; l < count; ++l) {
            const double v = x(l, i) * (transposed ? norm : norm * signs_[i]);
            finite += v * 0.0;
            at[i * step + l * next] = static_cast<float>(v);
          }
        detail::require(finite == 0.0, "a value among vectors ", first, " to ", first + count - 1,
                        " of the matrix to be rotated is not finite");
      }
    });
  }

  Eigen::Index n_;
  Eigen::Index block_;
  std::vector<Eigen::MatrixXd> paley_;
  Eigen::VectorXd signs_;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
