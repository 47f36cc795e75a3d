// GPTQ: weights are rounded one input after the other, and those that are left make up for the error (Frantar et al. 2022,
// "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers").
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/kernels/dispatch.hpp"
#include "nibble/ptq/cholesky.hpp"
#include "nibble/ptq/hessian.hpp"
#include "nibble/ptq/weight_grids.hpp"
#include "nibble/quantize/quantized_tensor.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// How a group's grid comes from its weights.
enum class GridFit : std::uint8_t {
  min_max,       ///< smallest and largest weight
  mse,           ///< the clipped range with the least error, see MseOptions
  weighted_mse,  ///< the same, each input's error weighted with its diagonal entry of H
};

struct GptqOptions {
  /// Added to H's diagonal, as a part of the diagonal's mean; >= 0. Where the factorisation fails it is multiplied by 4
  /// (starting from at least 0.001) as long as it is below max_damp; then the layer is rounded to nearest.
  double damp = 0.01;
  double max_damp = 1.0;
  /// Inputs in descending order of H's diagonal, rather than as they come.
  bool act_order = true;
  /// All grids from the weights as they come. false: a group's grid from its updated weights when its first input's turn
  /// comes; with act_order groups then are runs of the new order, and the result has a permutation.
  bool static_groups = true;
  GridFit grid_fit = GridFit::min_max;
  MseOptions mse;
  /// Instead of both: all grids for the matrix that is to be rounded (w, or the target of two streams), with the scheme and
  /// shape of w, e.g. awq_clip()'s. For static groups only.
  std::function<WeightGrids(const RowMajorMatrix& target)> fit_grids = {};
  /// Where the Hessian has two streams: how much of the correction for the errors of earlier layers is applied, 0 to 1.
  /// The target becomes W + correction * W D (H + damp)^-1, see Hessian.
  double correction = 1.0;
  /// Inputs whose updates of the others are collected; changes rounding errors alone. 1 to 1024.
  Eigen::Index block = 128;
  /// Threads to work with; nullptr: the calling one. Changes no bit.
  ThreadPool* pool = nullptr;
};

struct GptqTimes {
  PhaseTime hessian;     ///< accumulating, as the Hessian itself counted it
  PhaseTime cholesky;    ///< the factor of the inverse, all attempts
  PhaseTime correction;  ///< the target for two streams
  PhaseTime grids;       ///< static grids
  PhaseTime sweep;       ///< rounding and feedback inside blocks, with the grids of groups that start there
  PhaseTime update;      ///< feedback to later blocks
};

struct GptqResult {
  QuantizedTensor weights;
  /// Empty: inputs are in their own order. Else input permutation[j] is column j of `weights`.
  std::vector<Eigen::Index> permutation;
  /// tr(E H E^T), E = target - weights, H without damping: twice the mean square error at the outputs, summed over them.
  /// Infinite where H is not finite.
  double error = 0.0;
  /// The damping in use, as a part of the diagonal's mean.
  double damp = 0.0;
  bool fell_back_to_rtn = false;
  /// Inputs that calibration never saw other than zero; their weights became zero.
  Eigen::Index dead_inputs = 0;
  /// What did not go as asked, for people; empty where nothing.
  std::string report;
  GptqTimes times;
};

namespace detail {

/// The state of one layer under GPTQ: everything in the order of the sweep.
class GptqSweep {
 public:
  GptqSweep(const ConstWeightsRef& w, const Hessian& hessian, const Scheme& scheme, const GptqOptions& options)
      : options_(options),
        rows_(w.rows()),
        cols_(w.cols()),
        grids_(scheme, w.rows(), w.cols()),
        power_(options.mse.norm),
        target_(w) {
    require(!options.fit_grids || options.static_groups,
            "fit_grids is given, static_groups is false, expected true");
    require(hessian.inputs() == cols_, "Hessian has ", hessian.inputs(), " inputs, expected ", cols_,
            " as w, which is ", rows_, " x ", cols_);
    require(options.damp >= 0.0 && options.damp <= options.max_damp && options.max_damp <= 1e6, "damp is ",
            options.damp, " and max_damp ", options.max_damp, ", expected 0 <= damp <= max_damp");
    require(options.correction >= 0.0 && options.correction <= 1.0, "correction is ", options.correction,
            ", expected 0 to 1");
    require(options.block >= 1 && options.block <= 1024, "block is ", options.block, ", expected 1 to 1024");
    check_mse(options.mse);
    result_.times.hessian = hessian.time();
    for (Eigen::Index r = 0; r < rows_; ++r)
      range_of(target_.data() + r * cols_, r, 0, static_cast<std::size_t>(cols_));  // throws where not finite
    take(hessian);
  }

  GptqResult run() && {
    if (!finite_) {
      result_.report = "the Hessian is not finite (activations are too large); rounded to nearest";
      return std::move(*this).round_to_nearest();
    }
    if (!factor()) return std::move(*this).round_to_nearest();
    // work_ is the target in the order of the sweep, a column an input.
    work_.resize(rows_, cols_);
    each_tile([&](Eigen::Index r0, Eigen::Index r1, std::size_t, std::size_t) {
      for (Eigen::Index j = 0; j < cols_; ++j)
        for (Eigen::Index r = r0; r < r1; ++r) work_(r, j) = target_(r, order_[static_cast<std::size_t>(j)]);
    });
    if (d_.size() != 0) correct();
    if (options_.static_groups) fit_static();
    sweep();
    finish();
    return std::move(result_);
  }

 private:
  static constexpr Eigen::Index tile_ = 128;         // rows that are swept at once
  static constexpr Eigen::Index superblock_ = 1024;  // inputs whose feedback to the rest is one product

  template <class F>
  void each_tile(F&& f) {
    const auto tiles = static_cast<std::size_t>((rows_ + tile_ - 1) / tile_);
    for_tasks(options_.pool, tiles, [&](std::size_t task, std::size_t thread) {
      const Eigen::Index begin = static_cast<Eigen::Index>(task) * tile_;
      f(begin, std::min(begin + tile_, rows_), task, thread);
    });
  }

  /// H, and D where it is wanted, scaled by a power of two that brings the diagonal's mean near 1.
  void take(const Hessian& hessian) {
    h_ = hessian.matrix();
    double sum = 0.0;
    Eigen::Index live = 0;
    for (Eigen::Index k = 0; k < cols_; ++k) {
      sum += static_cast<double>(h_(k, k));
      if (h_(k, k) != 0.0F) ++live;
    }
    finite_ = sum <= std::numeric_limits<double>::max();
    result_.dead_inputs = cols_ - live;
    order_.resize(static_cast<std::size_t>(cols_));
    std::iota(order_.begin(), order_.end(), Eigen::Index{0});
    if (!finite_) return;
    const double mean = live > 0 ? sum / static_cast<double>(live) : 1.0;
    exponent_ = -std::ilogb(mean);
    // In two steps: 2^exponent itself may be no float.
    const double scale = std::ldexp(1.0, exponent_);
    for (Eigen::Index i = 0; i < h_.size(); ++i) {
      h_.data()[i] = static_cast<float>(static_cast<double>(h_.data()[i]) * scale);
      finite_ = finite_ && scalar::is_finite(h_.data()[i]);
    }
    if (!finite_) return;
    // A dead input is coupled with none: whatever stands on its diagonal, the mean leaves the damping alone.
    dead_.assign(static_cast<std::size_t>(cols_), 0);
    for (Eigen::Index k = 0; k < cols_; ++k)
      if (h_(k, k) == 0.0F) {
        dead_[static_cast<std::size_t>(k)] = 1;
        h_(k, k) = static_cast<float>(mean * scale);
        target_.col(k).setZero();
      }
    mean_ = static_cast<double>(h_.diagonal().cast<double>().sum()) / static_cast<double>(cols_);
    if (options_.act_order)
      std::stable_sort(order_.begin(), order_.end(),
                       [&](Eigen::Index a, Eigen::Index b) { return h_(a, a) > h_(b, b); });
    if (hessian.two_streams() && options_.correction > 0.0) {
      d_ = hessian.difference();
      for (Eigen::Index i = 0; i < d_.size(); ++i)
        d_.data()[i] = static_cast<float>(static_cast<double>(d_.data()[i]) * scale);
    }
  }

  /// to(i, j) = from(order[i], order[j]).
  Eigen::MatrixXf permuted(const Eigen::MatrixXf& from) const {
    Eigen::MatrixXf to(cols_, cols_);
    for_tasks(options_.pool, static_cast<std::size_t>(cols_), [&](std::size_t j, std::size_t) {
      const float* column = from.data() + order_[j] * cols_;
      float* out = to.data() + static_cast<Eigen::Index>(j) * cols_;
      for (std::size_t i = 0; i < order_.size(); ++i) out[i] = column[order_[i]];
    });
    return to;
  }

  bool factor() {
    const auto k = static_cast<double>(cols_);
    std::string tried;
    for (double damp = options_.damp;; damp = std::max(4.0 * damp, 0.001)) {
      if (damp > options_.max_damp) break;
      u_ = permuted(h_);
      for (Eigen::Index i = 0; i < cols_; ++i)
        u_(i, i) = static_cast<float>(static_cast<double>(u_(i, i)) + rounded(damp * mean_));
      CholeskyStatus status;
      {
        const PhaseClock clock(result_.times.cholesky, 2.0 / 3.0 * k * k * k);
        status = inverse_cholesky(u_, options_.pool);
      }
      result_.damp = damp;
      if (status.ok) {
        if (!tried.empty()) result_.report = concat(tried, "; damping was raised to ", damp);
        return true;
      }
      if (tried.empty())
        tried = concat("with damping ", damp, " the factorisation failed at input ",
                       order_[static_cast<std::size_t>(status.failed_at)], " of ", cols_);
    }
    result_.report = concat(tried, ", and so it did up to damping ", result_.damp, "; rounded to nearest");
    return false;
  }

  /// work += correction * work D (H + damp)^-1, the inverse as U^T U. A product with a triangle goes by pieces.
  void correct() {
    const auto n = static_cast<double>(rows_);
    const auto k = static_cast<double>(cols_);
    const PhaseClock clock(result_.times.correction, 2.0 * n * k * k + 2.0 * n * k * k);
    constexpr Eigen::Index piece = 512;
    Eigen::MatrixXf first(rows_, cols_);
    Eigen::MatrixXf second(rows_, cols_);
    MatmulOptions options;
    options.pool = options_.pool;
    gemm(work_, permuted(d_), first, options);
    for (Eigen::Index c = 0; c < cols_; c += piece) {
      const Eigen::Index count = std::min(piece, cols_ - c);
      const Eigen::MatrixXf factor = u_.block(c, c, count, cols_ - c).transpose();
      gemm(first.rightCols(cols_ - c), factor, second.middleCols(c, count), options);
    }
    for (Eigen::Index c = 0; c < cols_; c += piece) {
      const Eigen::Index count = std::min(piece, cols_ - c);
      gemm(second.leftCols(c + count), u_.block(0, c, c + count, count), first.middleCols(c, count), options);
    }
    const auto strength = static_cast<float>(options_.correction);
    each_tile([&](Eigen::Index r0, Eigen::Index r1, std::size_t, std::size_t) {
      for (Eigen::Index j = 0; j < cols_; ++j)
        for (Eigen::Index r = r0; r < r1; ++r) {
          // Exact product, one rounding: the same however it is contracted.
          const double change = static_cast<double>(first(r, j)) * static_cast<double>(strength);
          work_(r, j) = static_cast<float>(static_cast<double>(work_(r, j)) + change);
          target_(r, order_[static_cast<std::size_t>(j)]) = work_(r, j);
        }
    });
  }

  Eigen::VectorXf importance() const {
    return options_.grid_fit == GridFit::weighted_mse ? Eigen::VectorXf(h_.diagonal()) : Eigen::VectorXf();
  }

  void fit_static() {
    const PhaseClock clock(result_.times.grids, 0.0);
    if (options_.fit_grids) {
      WeightGrids grids = options_.fit_grids(target_);
      require(grids.scheme() == grids_.scheme() && grids.rows() == rows_ && grids.cols() == cols_,
              "fit_grids gave grids of ", grids.rows(), " x ", grids.cols(),
              ", or another scheme, expected w's: ", rows_, " x ", cols_);
      grids_ = std::move(grids);
    } else if (options_.grid_fit == GridFit::min_max) {
      grids_ = fit_min_max(grids_.scheme(), target_, options_.pool);
    } else {
      MseOptions mse = options_.mse;
      mse.pool = options_.pool;
      grids_ = fit_mse(grids_.scheme(), target_, mse, importance());
    }
    const Eigen::Index groups = grids_.groups();
    reserve_lanes();
    for (Eigen::Index g = 0; g < groups; ++g)
      for (Eigen::Index r = 0; r < rows_; ++r) load_lane(r, g);
  }

  // Grids with the rows of a group side by side: what a column is rounded with.
  void reserve_lanes() {
    const auto count = static_cast<std::size_t>(rows_ * grids_.groups());
    scales_.resize(count);
    if (grids_.scheme().symmetry == Symmetry::asymmetric) zeros_.resize(count);
    if (grids_.scheme().symmetry == Symmetry::float_offset) offsets_.resize(count);
  }
  void load_lane(Eigen::Index row, Eigen::Index group) {
    const auto at = static_cast<std::size_t>(group * rows_ + row);
    const Grid g = grids_.at(row, group);
    scales_[at] = g.scale;
    if (!zeros_.empty()) zeros_[at] = static_cast<std::int8_t>(g.zero);
    if (!offsets_.empty()) offsets_[at] = g.offset;
  }

  /// The group that sweep position j belongs to.
  Eigen::Index group_at(Eigen::Index j) const {
    return grids_.group_of(options_.static_groups ? order_[static_cast<std::size_t>(j)] : j);
  }

  /// A block ends where a group does, or lies within one: so grids that are fitted on the way see weights of this block and
  /// of blocks whose feedback has arrived.
  Eigen::Index block_end(Eigen::Index begin, Eigen::Index longest) const {
    const Eigen::Index end = std::min(begin + longest, cols_);
    if (options_.static_groups) return end;
    const Eigen::Index size = grids_.group_size();
    const Eigen::Index last = end / size * size;  // the last start of a group up to the end
    return last > begin ? std::min(last, end) : end;
  }

  /// Room of one thread: a tile of rows under one block.
  struct Room {
    std::vector<float> errors;  // [input of the block][tile_], negated
    std::vector<float> weights;
    std::vector<float> values;
    std::vector<std::int8_t> codes;
    std::vector<float> group;  // [row][input] of a group whose grid is fitted
    std::vector<std::int8_t> group_codes;
    std::vector<float> group_values;
  };

  void sweep() {
    codes_.resize(rows_, cols_);
    if (!options_.static_groups) {
      reserve_lanes();
      weights_of_inputs_.resize(0);
      if (options_.grid_fit == GridFit::weighted_mse) {
        weights_of_inputs_.resize(cols_);
        for (Eigen::Index j = 0; j < cols_; ++j)
          weights_of_inputs_[j] = h_(order_[static_cast<std::size_t>(j)], order_[static_cast<std::size_t>(j)]);
      }
    }
    const std::size_t threads = options_.pool == nullptr ? 1 : static_cast<std::size_t>(options_.pool->threads());
    std::vector<Room> rooms(threads);
    const Eigen::Index widest = std::max(superblock_, options_.block);
    Eigen::MatrixXf errors(rows_, std::min(widest, cols_));
    std::vector<double> sums(static_cast<std::size_t>((rows_ + tile_ - 1) / tile_), 0.0);
    const auto feed_back = [&](Eigen::Index from, Eigen::Index to, Eigen::Index first, Eigen::Index begin,
                               Eigen::Index end) {
      if (begin >= end) return;
      const double flop =
          2.0 * static_cast<double>(rows_) * static_cast<double>(to - from) * static_cast<double>(end - begin);
      const PhaseClock clock(result_.times.update, flop);
      auto part = work_.middleCols(begin, end - begin);
      MatmulOptions options;
      options.pool = options_.pool;
      options.epilogue.add(part);
      gemm(errors.middleCols(from - first, to - from), u_.block(from, begin, to - from, end - begin), part,
           options);
    };
    for (Eigen::Index s0 = 0, s1; s0 < cols_; s0 = s1) {
      s1 = block_end(s0, widest);
      for (Eigen::Index b0 = s0, b1; b0 < s1; b0 = b1) {
        b1 = std::min(block_end(b0, options_.block), s1);
        const auto width = static_cast<double>(b1 - b0);
        {
          const PhaseClock clock(result_.times.sweep, static_cast<double>(rows_) * width * width);
          each_tile([&](Eigen::Index r0, Eigen::Index r1, std::size_t tile, std::size_t thread) {
            sums[tile] += sweep_tile(rooms[thread], r0, r1, b0, b1, errors, s0);
          });
        }
        feed_back(b0, b1, s0, b1, s1);
      }
      feed_back(s0, s1, s0, s1, cols_);
    }
    damped_error_ = std::accumulate(sums.begin(), sums.end(), 0.0);
  }

  /// Rows [r0, r1) of the block [b0, b1). Gives the sum of squares of err = (w - q) / U_ii, which is what rounding these
  /// weights adds to tr(E (H + damp) E^T).
  double sweep_tile(Room& room, Eigen::Index r0, Eigen::Index r1, Eigen::Index b0, Eigen::Index b1,
                    Eigen::MatrixXf& errors, Eigen::Index s0) {
    const auto n = static_cast<std::size_t>(r1 - r0);
    room.errors.resize(static_cast<std::size_t>(tile_ * (b1 - b0)));
    room.weights.resize(static_cast<std::size_t>(tile_));
    room.values.resize(static_cast<std::size_t>(tile_));
    room.codes.resize(static_cast<std::size_t>(tile_));
    double sum = 0.0;
    for (Eigen::Index i = b0; i < b1; ++i) {
      if (!options_.static_groups && i % grids_.group_size() == 0) fit_group(room, r0, r1, b0, i);
      float* w = room.weights.data();
      updated(room, r0, n, b0, i, i, w);
      const auto at = static_cast<std::size_t>(group_at(i) * rows_ + r0);
      const float* scales = scales_.data() + at;
      const float* offsets = offsets_.empty() ? nullptr : offsets_.data() + at;
      const std::int8_t* zeros = zeros_.empty() ? nullptr : zeros_.data() + at;
      grids_.encode_each(scales, offsets, zeros, w, n, room.codes.data());
      grids_.decode_each(scales, offsets, zeros, room.codes.data(), n, room.values.data());
      float* e = room.errors.data() + (i - b0) * tile_;
      const float diagonal = u_(i, i);
      for (std::size_t r = 0; r < n; ++r) e[r] = (room.values[r] - w[r]) / diagonal;
      for (std::size_t r = 0; r < n; ++r) sum += static_cast<double>(e[r]) * static_cast<double>(e[r]);
      std::copy(e, e + n, errors.data() + (i - s0) * rows_ + r0);
      const Eigen::Index column = options_.static_groups ? order_[static_cast<std::size_t>(i)] : i;
      for (std::size_t r = 0; r < n; ++r)
        codes_.data()[(r0 + static_cast<Eigen::Index>(r)) * cols_ + column] = room.codes[r];
    }
    return sum;
  }

  /// Weights of sweep position j after the feedback of [b0, i): the kernel sums by one fma an input, ascending.
  void updated(const Room& room, Eigen::Index r0, std::size_t n, Eigen::Index b0, Eigen::Index i, Eigen::Index j,
               float* w) const {
    const float* column = work_.data() + j * rows_ + r0;
    if (i == b0) {
      std::copy(column, column + n, w);
      return;
    }
    DenseGemvArgs args;
    args.a = room.errors.data();
    args.lda = static_cast<std::size_t>(tile_);
    args.n = n;
    args.k = static_cast<std::size_t>(i - b0);
    args.x = u_.data() + j * cols_ + b0;
    args.y = w;
    kernels().gemv_dense(args);
    for (std::size_t r = 0; r < n; ++r) w[r] += column[r];
  }

  /// Grids of the group that starts at sweep position i, from its weights as they are now.
  void fit_group(Room& room, Eigen::Index r0, Eigen::Index r1, Eigen::Index b0, Eigen::Index i) {
    const Eigen::Index group = grids_.group_of(i);
    const Eigen::Index end = grids_.inputs_of(group).second;
    const auto size = static_cast<std::size_t>(end - i);
    const auto n = static_cast<std::size_t>(r1 - r0);
    room.group.resize(static_cast<std::size_t>(tile_) * size);
    room.group_codes.resize(size);
    room.group_values.resize(size);
    for (std::size_t k = 0; k < size; ++k) {
      updated(room, r0, n, b0, i, i + static_cast<Eigen::Index>(k), room.weights.data());
      for (std::size_t r = 0; r < n; ++r) room.group[r * size + k] = room.weights[r];
    }
    for (std::size_t r = 0; r < n; ++r) {
      const Eigen::Index row = r0 + static_cast<Eigen::Index>(r);
      const float* w = room.group.data() + r * size;
      const Range range = range_of(w, row, i, size);
      if (options_.grid_fit == GridFit::min_max) {
        grids_.set(row, group, range);
      } else {
        const float* importance = weights_of_inputs_.size() == 0 ? nullptr : weights_of_inputs_.data() + i;
        grids_.set(row, group,
                   best_shrunk_grid(grids_, range, w, importance, size, options_.mse, power_,
                                    room.group_codes.data(), room.group_values.data()));
      }
      load_lane(row, group);
    }
  }

  void finish() {
    result_.weights = grids_.assemble(codes_);
    if (options_.act_order && !options_.static_groups) result_.permutation = order_;
    // The damping's part is taken off again.
    const RowMajorMatrix values = grids_.decode(codes_, options_.pool);
    double norm = 0.0;
    double dead_norm = 0.0;
    for (Eigen::Index r = 0; r < rows_; ++r)
      for (Eigen::Index j = 0; j < cols_; ++j) {
        const Eigen::Index k = options_.static_groups ? j : order_[static_cast<std::size_t>(j)];
        const auto e = static_cast<float>(static_cast<double>(target_(r, k)) - static_cast<double>(values(r, j)));
        const double square = static_cast<double>(e) * static_cast<double>(e);
        (dead_[static_cast<std::size_t>(k)] != 0 ? dead_norm : norm) += square;
      }
    const double damping = rounded(rounded(result_.damp * mean_) * norm);
    const double dead = rounded(rounded((1.0 + result_.damp) * mean_) * dead_norm);
    result_.error = std::ldexp(std::max(0.0, damped_error_ - damping - dead), -exponent_);
  }

  GptqResult round_to_nearest() && {
    result_.fell_back_to_rtn = true;
    fit_static();
    codes_ = grids_.encode(target_, options_.pool);
    result_.weights = grids_.assemble(codes_);
    result_.error = std::numeric_limits<double>::infinity();
    if (finite_) {
      for (Eigen::Index k = 0; k < cols_; ++k)
        if (dead_[static_cast<std::size_t>(k)] != 0) h_(k, k) = 0.0F;
      const Eigen::MatrixXf e = target_ - grids_.decode(codes_, options_.pool);
      result_.error = std::ldexp(nibble::quadratic_error(e, h_, options_.pool), -exponent_);
    }
    return std::move(result_);
  }

  const GptqOptions& options_;
  Eigen::Index rows_;
  Eigen::Index cols_;
  WeightGrids grids_;
  PowerTable power_;
  RowMajorMatrix target_;  // inputs in their own order
  Eigen::MatrixXf h_;      // scaled, in the inputs' own order
  Eigen::MatrixXf d_;
  bool finite_ = true;
  int exponent_ = 0;   // h_ = 2^exponent_ H
  double mean_ = 1.0;  // of h_'s diagonal
  std::vector<Eigen::Index> order_;
  std::vector<std::uint8_t> dead_;
  Eigen::MatrixXf u_;
  Eigen::MatrixXf work_;
  CodeMatrix codes_;           // as the result has them
  std::vector<float> scales_;  // [group][row]
  std::vector<float> offsets_;
  std::vector<std::int8_t> zeros_;
  Eigen::VectorXf weights_of_inputs_;
  double damped_error_ = 0.0;
  GptqResult result_;
};

}  // namespace detail

/// Rounds w, N x K, so that W X changes little on the calibration inputs that `hessian` has seen.
///
/// With U the upper Cholesky factor of (H + damp)^-1 (Frantar et al., algorithm 1), input i after input i:
///   q_i = nearest code, err = (w_i - q_i) / U_ii, w_j -= err U_ij for all j > i
/// The feedback inside a block is summed for a column when its turn comes, to later blocks by products that collect 128 and
/// 1024 inputs: the sums of the algorithm in another order.
///
/// Any scheme of WeightGrids. Dead inputs (H_ii = 0) lose their weights. A failing factorisation is answered with more
/// damping, then with rounding to nearest, and always with a report: no input but a bad argument throws, and no weight
/// becomes NaN. The bits depend on the arguments alone. Memory: four matrices of w's size and three of H's.
///
/// Throws InvalidArgument: shapes that do not fit, a weight that is not finite (named), no calibration token, options out
/// of range, a scale that its type cannot hold.
inline GptqResult gptq(const ConstWeightsRef& w, const Hessian& hessian, const Scheme& scheme,
                       const GptqOptions& options = {}) {
  const detail::FpEnvironment environment;
  return detail::GptqSweep(w, hessian, scheme, options).run();
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
