// LLM.int8() (Dettmers et al. 2022, section 3): the few activations of large magnitude are multiplied as floats, the rest
// as INT8, so that one outlier does not coarsen the grid of its whole token.
//
//   y[c, t] = sum over k of w[c, k] * dequantize(quantize(r[:, t]))[k]   +   sum over outliers k of w[c, k] * x[k, t]
//
// where r is x with its outliers set to 0 before the token's absmax is taken.
//
// Which values are outliers. In the original a column of the batch is one where any token's |x| reaches the threshold, so
// a token's result depends on what it shares its batch with. Here x[k, t] is an outlier where its own |x[k, t]| >=
// threshold, or where k is one of the fixed columns that calibration has found; a token alone and the same token in a
// batch have the same bits. Values below the threshold of a column that is an outlier elsewhere stay INT8: they are no
// larger than what the grid is made for.
//
// With fixed scales (assign_static) outliers are what their codes do not reach, which nothing then clips.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/gemm/activations.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/gemm/matmul.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/gemm/workspace.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// The threshold of the paper.
inline constexpr float llm_int8_threshold = 6.0F;

struct OutlierOptions {
  float threshold = llm_int8_threshold;  ///< |x| from here on is an outlier; infinity: the fixed columns alone
  std::vector<Eigen::Index> columns;     ///< inputs that are outliers in every token: ascending, distinct
  Activations activations = Activations::int8;  ///< of the rest: int8, int8_grouped or int8_asymmetric
  std::size_t group_size = QuantizedActivations::default_group;  ///< of int8_grouped
};

/// How many activations were outliers.
struct OutlierShare {
  std::size_t tokens = 0;
  std::size_t inputs = 0;
  std::size_t columns = 0;   ///< inputs that were an outlier in at least one token
  std::uint64_t values = 0;  ///< outliers in all tokens

  /// Share of the columns, 0..1: what the paper reports as "outlier features".
  double column_share() const noexcept {
    return inputs == 0 ? 0.0 : static_cast<double>(columns) / static_cast<double>(inputs);
  }
  /// Share of all values, 0..1.
  double value_share() const noexcept {
    const double all = static_cast<double>(tokens) * static_cast<double>(inputs);
    return all == 0.0 ? 0.0 : static_cast<double>(values) / all;
  }
};

/// k x m activations (a token a column) divided into INT8 codes and outliers: divide once, multiply with several weights.
/// Reusing one object for the same or smaller shapes and no more outliers allocates nothing. Reading it from several
/// threads is safe, assigning is not.
class OutlierActivations {
 public:
  OutlierActivations() = default;

  /// Divides x. A token with a NaN or an Inf has no outliers and a scale NaN: its outputs are NaN, no other token's are.
  /// Throws InvalidArgument for a threshold that is not positive, and for columns that are not ascending or not x's.
  void assign(const ConstMatrixRef& x, const OutlierOptions& options = {}, ThreadPool* pool = nullptr,
              const detail::KernelTable& kernels = detail::kernels()) {
    detail::require(options.threshold > 0.0F, "outlier threshold is ", options.threshold,
                    ", expected a positive number");
    for (std::size_t i = 0; i < options.columns.size(); ++i) {
      const Eigen::Index column = options.columns[i];
      detail::require(column >= 0 && column < x.rows() && (i == 0 || column > options.columns[i - 1]),
                      "outlier columns[", i, "] is ", column, ", expected ascending numbers below x's ", x.rows(),
                      " rows");
    }
    const detail::FpEnvironment environment;
    const auto k = static_cast<std::size_t>(x.rows());
    limits_.assign(1, options.threshold);
    begin(k);
    for (Eigen::Index t = 0; t < x.cols(); ++t) {
      const float* token = x.data() + t * x.outerStride();
      const detail::LineRange range = kernels.line_range(token, k);
      if (!range.finite || k == 0) continue;
      find(t, token, k, k, range.max >= limits_[0] || -range.min >= limits_[0], options.columns);
    }
    end(k);
    codes_.assign(without_outliers(x), options.activations, pool, options.group_size, 8, kernels);
  }

  /// Divides x where each `group_size` inputs have a fixed scale, as QuantizedActivations::assign_static(): what lies
  /// beyond the codes, |x| >= 127.5 * scale, is an outlier instead of being clamped. The same throws.
  void assign_static(const ConstMatrixRef& x, const float* scales, std::size_t count, std::size_t group_size = 0,
                     ThreadPool* pool = nullptr, const detail::KernelTable& kernels = detail::kernels()) {
    const detail::FpEnvironment environment;
    const auto k = static_cast<std::size_t>(x.rows());
    QuantizedActivations::check_static(k, scales, count, group_size);
    const std::size_t length = group_size == 0 ? k : group_size;
    limits_.resize(count);
    for (std::size_t g = 0; g < count; ++g) limits_[g] = 127.5F * scales[g];
    begin(k);
    for (Eigen::Index t = 0; t < x.cols(); ++t) {
      const float* token = x.data() + t * x.outerStride();
      bool finite = k != 0, some = false;
      for (std::size_t g = 0; g < count && finite; ++g) {
        const detail::LineRange range = kernels.line_range(token + g * length, std::min(length, k - g * length));
        finite = range.finite;
        some = some || range.max >= limits_[g] || -range.min >= limits_[g];
      }
      if (finite && some) find(t, token, k, length, true, {});
    }
    end(k);
    codes_.assign_static(without_outliers(x), scales, count, group_size, pool, kernels);
  }

  Eigen::Index inputs() const noexcept { return codes_.inputs(); }
  Eigen::Index tokens() const noexcept { return codes_.tokens(); }
  /// What is left without outliers.
  const QuantizedActivations& codes() const noexcept { return codes_; }
  /// Inputs that are an outlier in at least one token, ascending.
  const std::vector<Eigen::Index>& columns() const noexcept { return columns_; }
  /// How many tokens each of columns() is an outlier in.
  const std::vector<std::size_t>& column_counts() const noexcept { return counts_; }
  /// Tokens that have an outlier, ascending.
  const std::vector<Eigen::Index>& outlier_tokens() const noexcept { return tokens_; }
  /// Their values, columns() x outlier_tokens(); 0 where a token has none.
  Eigen::Map<const Eigen::MatrixXf> values() const noexcept {
    return {values_, static_cast<Eigen::Index>(columns_.size()), static_cast<Eigen::Index>(tokens_.size())};
  }
  OutlierShare share() const noexcept {
    return {static_cast<std::size_t>(tokens()), static_cast<std::size_t>(inputs()), columns_.size(),
            entries_.size()};
  }

 private:
  void begin(std::size_t k) {
    tokens_.clear();
    starts_.assign(1, 0);
    entries_.clear();
    columns_.clear();
    counts_.clear();
    place_.assign(k, 0);
  }

  /// Adds the outliers of token t to entries_: the fixed columns, and if there are `some`, what reaches limits_, of which
  /// there is one for each `length` inputs.
  void find(Eigen::Index t, const float* token, std::size_t k, std::size_t length, bool some,
            const std::vector<Eigen::Index>& columns) {
    if (!some && columns.empty()) return;
    auto fixed = columns.begin();
    if (!some) {
      for (; fixed != columns.end(); ++fixed) entries_.push_back(static_cast<std::uint32_t>(*fixed));
    } else {
      for (std::size_t g = 0; g * length < k; ++g) {
        const float limit = limits_[g];
        for (std::size_t i = g * length; i < std::min(k, (g + 1) * length); ++i) {
          const bool is_fixed = fixed != columns.end() && static_cast<std::size_t>(*fixed) == i;
          if (is_fixed) ++fixed;
          if (is_fixed || std::fabs(token[i]) >= limit) entries_.push_back(static_cast<std::uint32_t>(i));
        }
      }
    }
    tokens_.push_back(t);
    starts_.push_back(entries_.size());
  }

  /// Fills columns_, counts_ and place_ out of entries_.
  void end(std::size_t k) {
    for (const std::uint32_t column : entries_) ++place_[column];
    for (std::size_t i = 0; i < k; ++i) {
      if (place_[i] == 0) continue;
      counts_.push_back(static_cast<std::size_t>(place_[i]));
      place_[i] = static_cast<std::ptrdiff_t>(columns_.size());
      columns_.push_back(static_cast<Eigen::Index>(i));
    }
  }

  /// x with zeros for its outliers, which go to values_: among all columns that have one. A token has zeros where it has
  /// none, which add nothing to its sum.
  ConstMatrixRef without_outliers(const ConstMatrixRef& x) {
    const Eigen::Index m = static_cast<Eigen::Index>(tokens_.size());
    if (m == 0) return x;
    const Eigen::Index k = x.rows();
    float* rest = reinterpret_cast<float*>(rest_.take(detail::checked_mul(
        detail::checked_mul(static_cast<std::size_t>(k), static_cast<std::size_t>(x.cols()), "x"), sizeof(float),
        "x")));
    Eigen::Map<Eigen::MatrixXf> copy(rest, k, x.cols());
    copy = x;
    const Eigen::Index u = static_cast<Eigen::Index>(columns_.size());
    values_ = reinterpret_cast<float*>(memory_.take(static_cast<std::size_t>(u * m) * sizeof(float)));
    std::fill_n(values_, u * m, 0.0F);
    for (Eigen::Index i = 0; i < m; ++i) {
      float* token = copy.col(tokens_[static_cast<std::size_t>(i)]).data();
      for (std::size_t e = starts_[static_cast<std::size_t>(i)]; e < starts_[static_cast<std::size_t>(i) + 1];
           ++e) {
        const std::size_t column = entries_[e];
        values_[i * u + place_[column]] = token[column];
        token[column] = 0.0F;
      }
    }
    return ConstMatrixRef(copy);
  }

  QuantizedActivations codes_;
  std::vector<Eigen::Index> tokens_;
  std::vector<std::size_t> starts_;     // of outlier token i's part of entries_, and the end
  std::vector<std::uint32_t> entries_;  // columns, ascending within a token
  std::vector<Eigen::Index> columns_;
  std::vector<std::size_t> counts_;
  std::vector<std::ptrdiff_t> place_;  // of a column in columns_
  std::vector<float> limits_;
  Workspace rest_;
  Workspace memory_;
  float* values_ = nullptr;
};

/// Outliers of all batches of one layer; finds the columns to fix. Batches may be cut anyhow.
class OutlierStatistics {
 public:
  /// Throws InvalidArgument where x has another number of inputs than the batches before.
  void add(const OutlierActivations& x) {
    const auto inputs = static_cast<std::size_t>(x.inputs());
    detail::require(tokens_ == 0 || counts_.size() == inputs, "x has ", inputs, " inputs, the batches before had ",
                    counts_.size());
    if (tokens_ == 0) counts_.assign(inputs, 0);
    tokens_ += static_cast<std::size_t>(x.tokens());
    for (std::size_t i = 0; i < x.columns().size(); ++i)
      counts_[static_cast<std::size_t>(x.columns()[i])] += x.column_counts()[i];
  }

  OutlierShare share() const noexcept {
    OutlierShare s{tokens_, counts_.size(), 0, 0};
    for (const std::uint64_t count : counts_) {
      s.columns += count != 0 ? 1 : 0;
      s.values += count;
    }
    return s;
  }

  /// Inputs that were outliers in at least `token_share` of the tokens (the paper's outlier features: 0.06), ascending.
  std::vector<Eigen::Index> columns(double token_share = 0.06) const {
    std::vector<Eigen::Index> found;
    for (std::size_t i = 0; i < counts_.size(); ++i)
      if (counts_[i] != 0 && static_cast<double>(counts_[i]) >= token_share * static_cast<double>(tokens_))
        found.push_back(static_cast<Eigen::Index>(i));
    return found;
  }

 private:
  std::size_t tokens_ = 0;
  std::vector<std::uint64_t> counts_;
};

/// INT8 (or other integer) weights, with some of their columns kept in 16-bit floats beside: the columns to fix. Where an
/// outlier meets a kept column it is multiplied with the kept values, elsewhere with the dequantized codes.
class OutlierMatrix {
 public:
  OutlierMatrix() = default;
  explicit OutlierMatrix(PackedMatrix weights) : weights_(std::move(weights)) {}

  /// `columns`: ascending, distinct; `values`: weights.rows() x columns.size(), the unquantized weights of these columns,
  /// rounded here to fp16. Throws InvalidArgument where shapes do not fit or a value is not finite in fp16.
  OutlierMatrix(PackedMatrix weights, std::vector<Eigen::Index> columns, const Eigen::MatrixXf& values)
      : weights_(std::move(weights)), columns_(std::move(columns)) {
    detail::require(
        values.rows() == weights_.rows() && values.cols() == static_cast<Eigen::Index>(columns_.size()),
        "kept values are ", values.rows(), " x ", values.cols(), ", expected ", weights_.rows(), " x ",
        columns_.size());
    for (std::size_t i = 0; i < columns_.size(); ++i)
      detail::require(
          columns_[i] >= 0 && columns_[i] < weights_.cols() && (i == 0 || columns_[i] > columns_[i - 1]),
          "kept columns[", i, "] is ", columns_[i], ", expected ascending numbers below ", weights_.cols());
    kept_.resize(static_cast<std::size_t>(values.size()));
    for (std::size_t i = 0; i < kept_.size(); ++i) {
      kept_[i] = fp16_from_float(values.data()[i]);
      detail::require((kept_[i] & 0x7C00U) != 0x7C00U, "kept value ", i, " is ", values.data()[i],
                      ", expected a number within fp16's range");
    }
  }

  Eigen::Index rows() const noexcept { return weights_.rows(); }
  Eigen::Index cols() const noexcept { return weights_.cols(); }
  const PackedMatrix& weights() const noexcept { return weights_; }
  /// The columns kept in fp16; give them to OutlierOptions.
  const std::vector<Eigen::Index>& columns() const noexcept { return columns_; }
  /// Column i of the kept ones, rows() values.
  const std::uint16_t* kept(std::size_t i) const noexcept {
    return kept_.data() + i * static_cast<std::size_t>(weights_.rows());
  }
  std::size_t byte_size() const noexcept { return weights_.byte_size() + kept_.size() * sizeof(std::uint16_t); }

 private:
  PackedMatrix weights_;
  std::vector<Eigen::Index> columns_;
  std::vector<std::uint16_t> kept_;  // columns one after the other
};

namespace detail {

/// Scratch of products with outliers, apart from what the products inside use.
struct OutlierScratch {
  Workspace columns;
  Workspace sums;
  Workspace inner;
};

inline OutlierScratch& outlier_scratch() {
  thread_local OutlierScratch scratch;
  return scratch;
}

/// Columns `columns` of the weights as floats: out[i * n + row].
inline void dequantize_columns(const KernelTable& kernels, const PackedMatrix& w,
                               const std::vector<Eigen::Index>& columns, const OutlierMatrix* kept,
                               ThreadPool* pool, float* out) {
  const PanelView view = w.view();
  constexpr std::size_t panels_a_task = 16;
  constexpr std::size_t unit = 8;  // unpack begins at multiples of it
  const std::size_t height = view.n;
  for_tasks(pool, ceil_div(w.panels(), panels_a_task), [&](std::size_t task, std::size_t) {
    alignas(64) float room[panels_a_task * unit * panel_width];
    const std::size_t first = task * panels_a_task;
    const std::size_t end = std::min(first + panels_a_task, w.panels());
    const std::size_t row = first * panel_width;
    const std::size_t rows = std::min(end * panel_width, height) - row;
    std::size_t next_kept = 0;
    std::size_t loaded = std::numeric_limits<std::size_t>::max();
    for (std::size_t i = 0; i < columns.size(); ++i) {
      const auto k = static_cast<std::size_t>(columns[i]);
      float* to = out + i * height + row;
      if (kept != nullptr) {
        const std::vector<Eigen::Index>& all = kept->columns();
        while (next_kept < all.size() && all[next_kept] < columns[i]) ++next_kept;
        if (next_kept < all.size() && all[next_kept] == columns[i]) {
          kernels.float_from_fp16(kept->kept(next_kept) + row, rows, to);
          continue;
        }
      }
      const std::size_t k_begin = k / unit * unit;
      const std::size_t k_end = std::min(k_begin + unit, view.k);
      if (k_begin != loaded) kernels.unpack({view, first, end, k_begin, k_end, room, unit * panel_width});
      loaded = k_begin;
      for (std::size_t r = 0; r < rows; r += panel_width)
        std::memcpy(to + r, room + (r / panel_width * unit + (k - k_begin)) * panel_width,
                    std::min(panel_width, rows - r) * sizeof(float));
    }
  });
}

inline void matmul_outliers(const PackedMatrix& w, const OutlierMatrix* kept, const OutlierActivations& x,
                            MatrixRef y, const MatmulOptions& options) {
  const auto m = static_cast<Eigen::Index>(x.outlier_tokens().size());
  if (m == 0) {
    matmul(w, x.codes(), y, options);
    return;
  }
  const FpEnvironment environment;
  check_product(w, x.inputs(), x.tokens(), y.rows(), y.cols(), options.epilogue);
  check_int(w, x.codes());
  if (y.size() == 0) return;
  const KernelTable& kernels = kernels_of(options);
  OutlierScratch& scratch = outlier_scratch();
  const auto n = static_cast<std::size_t>(y.rows());
  const std::size_t u = x.columns().size();
  const bool finish = options.epilogue.steps() != 0;
  const Output out = float_output(y);

  MatmulOptions inner = options;
  inner.epilogue = {};
  if (inner.workspace == nullptr) inner.workspace = &scratch.inner;
  float* columns =
      reinterpret_cast<float*>(scratch.columns.take(checked_mul(n, u, "outlier columns") * sizeof(float)));
  dequantize_columns(kernels, w, x.columns(), kept, options.pool, columns);

  // Sums of the outliers; where an epilogue may still read y, the sums of the codes stand beside them.
  const auto tokens = static_cast<std::size_t>(x.tokens());
  const std::size_t sums_floats =
      checked_mul(n, static_cast<std::size_t>(m) + (finish ? tokens : 0), "outlier sums");
  float* sums =
      reinterpret_cast<float*>(scratch.sums.take(checked_mul(sums_floats, sizeof(float), "outlier sums")));
  Eigen::Map<Eigen::MatrixXf> outliers(sums, y.rows(), m);
  gemm(Eigen::Map<const Eigen::MatrixXf>(columns, y.rows(), static_cast<Eigen::Index>(u)), x.values(),
       MatrixRef(outliers), inner);
  float* acc = finish ? sums + n * static_cast<std::size_t>(m) : y.data();
  const auto acc_stride = finish ? n : static_cast<std::size_t>(y.outerStride());
  matmul(w, x.codes(),
         MatrixRef(Eigen::Map<Eigen::MatrixXf, 0, Eigen::OuterStride<>>(
             acc, y.rows(), y.cols(), Eigen::OuterStride<>(static_cast<Eigen::Index>(acc_stride)))),
         inner);
  constexpr std::size_t tokens_a_task = 16;
  const std::vector<Eigen::Index>& owners = x.outlier_tokens();
  for_tasks(options.pool, ceil_div(tokens, tokens_a_task), [&](std::size_t task, std::size_t) {
    const std::size_t first = task * tokens_a_task;
    const std::size_t end = std::min(first + tokens_a_task, tokens);
    auto owner = std::lower_bound(owners.begin(), owners.end(), static_cast<Eigen::Index>(first));
    for (; owner != owners.end() && static_cast<std::size_t>(*owner) < end; ++owner) {
      float* to = acc + static_cast<std::size_t>(*owner) * acc_stride;
      const float* from = sums + static_cast<std::size_t>(owner - owners.begin()) * n;
      // + 0: a sum of underflowed products may be -0 or +0, by the zeros between them.
      for (std::size_t c = 0; c < n; ++c) to[c] += from[c] + 0.0F;
    }
    if (finish)
      finish_tile(kernels, acc + first * acc_stride, acc_stride, first, end - first, 0, n, nullptr, nullptr,
                  nullptr, options.epilogue, out);
  });
}

}  // namespace detail

/// y = epilogue(w * x) as LLM.int8() has it (at the head of this file): w n x k of integers, y n x m floats. For a token
/// without outliers the bits are those of matmul(w, x.codes(), y). For others the outliers' sum - from 0, one fma an
/// outlier, columns ascending - is added to that, before the epilogue. The bits do not depend on ISA, threads or
/// batch. Throws InvalidArgument where shapes do not fit. y must not overlap what an epilogue's matrix refers to, unless
/// it is y itself.
inline void matmul(const PackedMatrix& w, const OutlierActivations& x, MatrixRef y,
                   const MatmulOptions& options = {}) {
  detail::matmul_outliers(w, nullptr, x, std::move(y), options);
}
inline void matmul(const OutlierMatrix& w, const OutlierActivations& x, MatrixRef y,
                   const MatmulOptions& options = {}) {
  detail::matmul_outliers(w.weights(), &w, x, std::move(y), options);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
