// What a layer's calibration inputs say about it: the Hessian of its squared output error, and a few sums beside it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Seconds and floating-point operations of a phase of a method. Operations are what the textbook counts (a symmetric
/// product half of a full one), whatever was computed.
struct PhaseTime {
  double seconds = 0.0;
  double flop = 0.0;
  double gflops() const noexcept { return seconds > 0.0 ? flop / seconds * 1e-9 : 0.0; }
};

namespace detail {

/// Adds the time between construction and destruction.
class PhaseClock {
 public:
  PhaseClock(PhaseTime& phase, double flop) noexcept : phase_(phase), start_(std::chrono::steady_clock::now()) {
    phase_.flop += flop;
  }
  ~PhaseClock() {
    phase_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  PhaseClock(const PhaseClock&) = delete;
  PhaseClock& operator=(const PhaseClock&) = delete;

 private:
  PhaseTime& phase_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace detail

/// H = (2 / n) sum x x^T over all n tokens that a layer is shown, K x K: the Hessian of |W x - Q x|^2 averaged over the
/// tokens, for every row of W alike (Frantar et al. 2022, "GPTQ", section 3). Tokens come in batches X, K x T, a token a
/// column, of any T.
///
/// Two streams: where earlier layers are quantized already, a layer sees x~ where the float model had x. add(x, x~) gives
/// H of x~, and D = (2 / n) sum (x - x~) x~^T beside it: then the W' that minimizes
/// |W X - W' X~|^2 + damp |W' - W|^2 is W + W D (H + damp)^-1.
///
/// Numbers: tokens are collected into blocks of 512, whose product nibble::gemm sums by one fma a token; the blocks are
/// added in float one after the other. So the bits depend on the sequence of tokens alone, not on how it was cut into
/// batches or on threads. With u = 2^-24 and B = n / 512 blocks, to first order
///
///   |H_ij - exact| <= (512 + B + 2) u (2 / n) sum |x_i x_j| <= (514 + B) u sqrt(H_ii H_jj)
///
/// 3.9e-5 for 65,536 tokens and 1.6e-4 for a million (one chain of fmas: 3.9e-3 and 6e-2), and about the square root of
/// (512 + B) u = 1.6e-6 where rounding errors are as good as random: far below a damping of 0.01.
///
/// One thread at a time may add; reading is safe from several.
class Hessian {
 public:
  /// Tokens of a block.
  static constexpr Eigen::Index block = 512;

  /// inputs: K >= 1. pool: threads to work with, nullptr: the calling one; changes no bit.
  explicit Hessian(Eigen::Index inputs, ThreadPool* pool = nullptr) : inputs_(inputs), pool_(pool) {
    detail::require(inputs >= 1, "Hessian of ", inputs, " inputs, expected at least 1");
    detail::checked_mul(
        detail::checked_mul(static_cast<std::size_t>(inputs), static_cast<std::size_t>(inputs), "Hessian"),
        sizeof(float), "Hessian");
    sum_ = Eigen::MatrixXf::Zero(inputs, inputs);
    staged_.resize(block, inputs);
    sums_ = Eigen::MatrixXd::Zero(4, inputs);
  }

  /// More tokens: x is K x T, T >= 0. Throws InvalidArgument and keeps what it had: another number of inputs, a value
  /// that is not finite (token and input are named), or one stream where there were two.
  void add(const ConstMatrixRef& x) { add_streams(x, nullptr); }

  /// More tokens in two streams: x of the float model, x_quantized of the quantized one; both K x T.
  void add(const ConstMatrixRef& x, const ConstMatrixRef& x_quantized) { add_streams(x_quantized, &x); }

  Eigen::Index inputs() const noexcept { return inputs_; }
  /// Tokens so far.
  Eigen::Index tokens() const noexcept { return tokens_; }
  bool two_streams() const noexcept { return two_streams_; }

  /// H, K x K, both triangles. Of x~ where there are two streams. Products beyond float's range give Inf or NaN.
  /// Throws InvalidArgument where no token was added.
  Eigen::MatrixXf matrix() const {
    require_tokens();
    const detail::FpEnvironment environment;
    Eigen::MatrixXf h = sum_;
    if (fill_ > 0) multiply(h, pool_);
    const double scale = 2.0 / static_cast<double>(tokens_);
    // The lower triangle is scaled and mirrored, tile by tile.
    constexpr Eigen::Index tile = 64;
    const auto tiles = static_cast<std::size_t>((inputs_ + tile - 1) / tile);
    detail::for_tasks(pool_, tiles, [&](std::size_t task, std::size_t) {
      const Eigen::Index c = static_cast<Eigen::Index>(task) * tile;
      const Eigen::Index width = std::min(tile, inputs_ - c);
      for (Eigen::Index r = c; r < inputs_; r += tile) {
        const Eigen::Index height = std::min(tile, inputs_ - r);
        for (Eigen::Index j = 0; j < width; ++j)
          for (Eigen::Index i = r == c ? j : 0; i < height; ++i) {
            const auto value = static_cast<float>(static_cast<double>(h(r + i, c + j)) * scale);
            h(r + i, c + j) = value;
            h(c + j, r + i) = value;
          }
      }
    });
    return h;
  }

  /// D, K x K: (2 / n) sum (x - x~) x~^T. Throws InvalidArgument where there are not two streams.
  Eigen::MatrixXf difference() const {
    detail::require(two_streams_, "Hessian has seen one stream of inputs, expected two");
    require_tokens();
    const detail::FpEnvironment environment;
    Eigen::MatrixXf d = difference_;
    if (fill_ > 0) multiply_difference(d);
    const double scale = 2.0 / static_cast<double>(tokens_);
    for (Eigen::Index i = 0; i < d.size(); ++i)
      d.data()[i] = static_cast<float>(static_cast<double>(d.data()[i]) * scale);
    return d;
  }

  // One value an input, over all tokens (of x~ where there are two streams); sums are taken in double.
  Eigen::VectorXf mean() const { return average(0); }
  Eigen::VectorXf mean_abs() const { return average(1); }
  Eigen::VectorXf mean_square() const { return average(2); }
  Eigen::VectorXf max_abs() const { return sums_.row(3).transpose().cast<float>(); }

  /// What accumulating took so far.
  const PhaseTime& time() const noexcept { return time_; }

 private:
  void require_tokens() const {
    detail::require(tokens_ > 0, "Hessian of ", inputs_, " inputs has seen no token");
  }

  void add_streams(const ConstMatrixRef& x, const ConstMatrixRef* other) {
    check("x", x, x.cols());
    if (other != nullptr) check("x of the float model", *other, x.cols());
    detail::require(tokens_ == 0 || two_streams_ == (other != nullptr), "Hessian has seen ",
                    two_streams_ ? "two streams" : "one stream", " of inputs, now come ",
                    other != nullptr ? "two" : "one");
    if (x.cols() == 0) return;
    const detail::FpEnvironment environment;
    if (other != nullptr && !two_streams_) {
      difference_ = Eigen::MatrixXf::Zero(inputs_, inputs_);
      staged_difference_.resize(block, inputs_);
      two_streams_ = true;
    }
    const auto n = static_cast<double>(x.cols());
    const auto k = static_cast<double>(inputs_);
    const detail::PhaseClock clock(time_, n * k * (k + 1.0) + (other != nullptr ? 2.0 * n * k * k : 0.0));
    for (Eigen::Index t = 0, count; t < x.cols(); t += count) {
      count = std::min(block - fill_, x.cols() - t);
      stage(x, other, t, count);
      fill_ += count;
      tokens_ += count;
      if (fill_ == block) {
        multiply(sum_, pool_);
        if (two_streams_) multiply_difference(difference_);
        fill_ = 0;
      }
    }
  }

  void check(std::string_view what, const ConstMatrixRef& x, Eigen::Index tokens) const {
    detail::require(x.rows() == inputs_ && x.cols() == tokens, what, " is ", x.rows(), " x ", x.cols(),
                    ", expected ", inputs_, " x ", tokens, " (inputs x tokens)");
    for (Eigen::Index t = 0; t < x.cols(); ++t) {
      const float* column = x.data() + t * x.outerStride();
      if (detail::kernels().line_range(column, static_cast<std::size_t>(inputs_)).finite) continue;
      Eigen::Index i = 0;
      while (detail::scalar::is_finite(column[i])) ++i;
      detail::raise<InvalidArgument>(detail::concat(what, ": token ", tokens_ + t, ", input ", i, " is ",
                                                    column[i], ", expected a finite value"));
    }
  }

  /// Tokens t .. t + count - 1 into the block, a token a row: then an input's tokens lie side by side, which is how
  /// gemm reads both of its operands fastest. Sums on the way, tokens ascending.
  void stage(const ConstMatrixRef& x, const ConstMatrixRef* other, Eigen::Index t, Eigen::Index count) {
    constexpr Eigen::Index tile = 16;
    const auto tasks = static_cast<std::size_t>((inputs_ + 63) / 64);
    detail::for_tasks(pool_, tasks, [&](std::size_t task, std::size_t) {
      const Eigen::Index begin = static_cast<Eigen::Index>(task) * 64;
      const Eigen::Index end = std::min(begin + 64, inputs_);
      for (Eigen::Index c = 0; c < count; c += tile)
        for (Eigen::Index i = begin; i < end; i += tile)
          for (Eigen::Index token = c; token < std::min(c + tile, count); ++token) {
            const float* from = x.data() + (t + token) * x.outerStride();
            for (Eigen::Index input = i; input < std::min(i + tile, end); ++input)
              staged_(fill_ + token, input) = from[input];
            if (other == nullptr) continue;
            const float* first = other->data() + (t + token) * other->outerStride();
            for (Eigen::Index input = i; input < std::min(i + tile, end); ++input)
              staged_difference_(fill_ + token, input) = first[input] - from[input];
          }
      for (Eigen::Index input = begin; input < end; ++input) {
        const float* values = &staged_(fill_, input);
        double* sums = &sums_(0, input);
        for (Eigen::Index token = 0; token < count; ++token) {
          const auto v = static_cast<double>(values[token]);
          sums[0] += v;
          sums[1] += std::fabs(v);
          sums[2] += v * v;  // v * v is exact: contraction changes nothing
          sums[3] = std::max(sums[3], std::fabs(v));
        }
      }
    });
  }

  /// to += the products of the staged tokens, lower triangle: panels of rows, each up to its diagonal.
  void multiply(Eigen::MatrixXf& to, ThreadPool* pool) const {
    constexpr Eigen::Index panel = 256;
    const auto tokens = staged_.topRows(fill_);
    for (Eigen::Index r = 0; r < inputs_; r += panel) {
      const Eigen::Index height = std::min(panel, inputs_ - r);
      auto part = to.block(r, 0, height, r + height);
      MatmulOptions options;
      options.pool = pool;
      options.epilogue.add(part);
      gemm(tokens.middleCols(r, height).transpose(), tokens.leftCols(r + height), part, options);
    }
  }

  void multiply_difference(Eigen::MatrixXf& to) const {
    MatmulOptions options;
    options.pool = pool_;
    options.epilogue.add(to);
    gemm(staged_difference_.topRows(fill_).transpose(), staged_.topRows(fill_), to, options);
  }

  Eigen::VectorXf average(Eigen::Index row) const {
    require_tokens();
    return (sums_.row(row).transpose() / static_cast<double>(tokens_)).cast<float>();
  }

  Eigen::Index inputs_;
  ThreadPool* pool_;
  Eigen::Index tokens_ = 0;
  bool two_streams_ = false;
  Eigen::MatrixXf sum_;         // lower triangle: products of whole blocks, not scaled
  Eigen::MatrixXf difference_;  // the same of (x - x~) x~^T, full
  Eigen::Index fill_ = 0;       // tokens that wait
  Eigen::MatrixXf staged_;      // [block][inputs]
  Eigen::MatrixXf staged_difference_;
  Eigen::MatrixXd sums_;  // [x, |x|, x^2, max |x|][inputs]
  PhaseTime time_;
};

/// tr(E H E^T) = sum over rows e of e H e^T: what an error E of the weights, N x K, costs at the outputs, twice the mean
/// square summed over outputs. Products are nibble::gemm's, sums double. Throws InvalidArgument where shapes do not fit.
inline double quadratic_error(const ConstMatrixRef& e, const ConstMatrixRef& h, ThreadPool* pool = nullptr) {
  const detail::FpEnvironment environment;
  detail::require(h.rows() == h.cols() && h.rows() == e.cols(), "e is ", e.rows(), " x ", e.cols(), " and h ",
                  h.rows(), " x ", h.cols(), ", expected N x K and K x K");
  double sum = 0.0;
  constexpr Eigen::Index width = 512;
  for (Eigen::Index c = 0; c < h.cols(); c += width) {
    const Eigen::Index count = std::min(width, h.cols() - c);
    Eigen::MatrixXf product(e.rows(), count);
    MatmulOptions options;
    options.pool = pool;
    gemm(e, h.middleCols(c, count), product, options);
    for (Eigen::Index j = 0; j < count; ++j)
      for (Eigen::Index i = 0; i < e.rows(); ++i)
        sum += static_cast<double>(product(i, j)) * static_cast<double>(e(i, c + j));  // exact before it is added
  }
  return sum;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
