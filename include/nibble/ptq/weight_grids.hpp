// The grids of a weight matrix while a method chooses them, and the codes that it chose: what every method of this
// layer works on and turns into a QuantizedTensor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/formats/bit_stream.hpp"
#include "nibble/formats/float_bits.hpp"
#include "nibble/formats/int4.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/quantize/line_codec.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/quantize/range.hpp"
#include "nibble/quantize/scheme.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Codes of a matrix as they are stored, one a byte: int8 -128..127, the others from 0 up.
using CodeMatrix = Eigen::Matrix<std::int8_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

namespace detail {

/// Codes of n values, one a byte, by the kernels: runs of `group` values (a multiple of 16, or 1) share a parameter.
/// Integer formats of any width are int8 with other ends; the codebooks' kernels write nibbles, which are taken apart.
inline void encode_bytes(const ParamStorage& params, std::size_t group, const float* scales, const float* offsets,
                         const std::int8_t* zeros, std::int32_t zero, const float* x, std::size_t n,
                         std::int8_t* codes) {
  constexpr std::size_t chunk = 4096;
  std::uint8_t nibbles[chunk / 2];
  const std::size_t step = is_integer(params.format) ? n
                           : group == 1              ? chunk
                           : group >= chunk          ? chunk
                                                     : chunk / group * group;
  for (std::size_t i = 0, count; i < n; i += count) {
    count = std::min(step, n - i);
    const std::size_t first = i / group;
    QuantizeGroupsArgs args;
    args.format = is_integer(params.format) ? Format::int8 : params.format;
    args.x = x + i;
    args.n = count;
    args.group = group >= chunk && count < n ? round_up(count, 16) : group;
    args.scales = scales + first;
    args.offsets = offsets == nullptr ? nullptr : offsets + first;
    args.zeros = zeros == nullptr ? nullptr : zeros + first;
    args.zero = zero;
    args.qmin = params.codes.min;
    args.qmax = params.codes.max;
    if (is_integer(params.format)) {
      args.q = reinterpret_cast<std::uint8_t*>(codes);
      kernels().quantize_groups(args);
    } else {
      args.q = nibbles;
      kernels().quantize_groups(args);
      unpack_nibbles(nibbles, count, reinterpret_cast<std::uint8_t*>(codes + i));
    }
  }
}

/// The values of such codes.
inline void decode_bytes(const ParamStorage& params, std::size_t group, const float* scales, const float* offsets,
                         const std::int8_t* zeros, std::int32_t zero, const std::int8_t* codes, std::size_t n,
                         float* x) {
  if (is_integer(params.format)) {
    DequantizeGroupsArgs args;
    args.format = Format::int8;
    args.q = reinterpret_cast<const std::uint8_t*>(codes);
    args.n = n;
    args.group = group;
    args.scales = scales;
    args.offsets = offsets;
    args.zeros = zeros;
    args.zero = zero;
    args.x = x;
    kernels().dequantize_groups(args);
    return;
  }
  for (std::size_t i = 0; i < n; ++i) x[i] = decode(params, {scales[i / group], 0.0F, 0}, codes[i]);
}

/// One line's codes, one a byte, as a QuantizedTensor stores them.
inline void store_line(Format format, const std::int8_t* codes, std::size_t n, std::uint8_t* line) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(codes);
  switch (bits_of(format)) {
    case 8: std::memcpy(line, codes, n); return;
    case 4: pack_nibbles(bytes, n, line); return;
    default: pack_bits(bits_of(format), bytes, n, line); return;
  }
}

}  // namespace detail

/// The grids (scale, zero point or offset) of an N x K matrix, one a row and group of inputs. Scales are values of the
/// scheme's scale type at all times, so that what a method computes with is what the tensor will hold.
///
/// Codes and values are those of DynamicQuantizer and QuantizedTensor for the same grids, bit for bit.
class WeightGrids {
 public:
  /// All grids cover zeros only (scale 1) until set. scheme: an integer format or a codebook, per_channel(0) or
  /// per_group(g, 1). Throws InvalidArgument for others and where a size is negative.
  WeightGrids(const Scheme& scheme, Eigen::Index rows, Eigen::Index cols)
      : layout_(checked(scheme, rows, cols), {static_cast<std::size_t>(rows), static_cast<std::size_t>(cols)}),
        fitter_(layout_.scheme),
        rows_(static_cast<std::size_t>(rows)),
        cols_(static_cast<std::size_t>(cols)) {
    const Granularity& g = layout_.scheme.granularity;
    const bool grouped = g.kind == Granularity::Kind::per_group;
    detail::require(grouped ? g.axis == 1 : g.kind == Granularity::Kind::per_channel && g.axis == 0,
                    "scheme of weights: expected one grid a row, per_channel(0), or groups along the inputs, "
                    "per_group(size, 1)");
    group_size_ =
        grouped ? std::min(g.group_size, std::max<std::size_t>(cols_, 1)) : std::max<std::size_t>(cols_, 1);
    kernel_group_ = grouped ? g.group_size : detail::round_up(group_size_, 16);
    groups_ = grouped ? detail::ceil_div(cols_, group_size_) : 1;
    const Symmetry symmetry = layout_.scheme.symmetry;
    const std::size_t count = rows_ * groups_;
    scales_.assign(count, 1.0F);
    const Grid zeros = fitter_.fit({0.0F, 0.0F}, 0);
    if (symmetry == Symmetry::asymmetric) zeros_.assign(count, static_cast<std::int8_t>(zeros.zero));
    if (symmetry == Symmetry::float_offset) offsets_.assign(count, zeros.offset);
    implied_zero_ = symmetry == Symmetry::symmetric ? zeros.zero : 0;
  }

  Eigen::Index rows() const noexcept { return static_cast<Eigen::Index>(rows_); }
  Eigen::Index cols() const noexcept { return static_cast<Eigen::Index>(cols_); }
  /// Groups a row; 1 for per_channel.
  Eigen::Index groups() const noexcept { return static_cast<Eigen::Index>(groups_); }
  /// Inputs a group, the last may have fewer; K for per_channel. At most K.
  Eigen::Index group_size() const noexcept { return static_cast<Eigen::Index>(group_size_); }
  Eigen::Index group_of(Eigen::Index k) const noexcept { return k / group_size(); }
  /// Inputs [first, second) of a group.
  std::pair<Eigen::Index, Eigen::Index> inputs_of(Eigen::Index group) const noexcept {
    return {group * group_size(), std::min((group + 1) * group_size(), cols())};
  }
  /// Canonical, as QuantizedTensor's.
  const Scheme& scheme() const noexcept { return layout_.scheme; }
  /// Lowest and highest code as stored.
  int min_code() const noexcept { return params().codes.min; }
  int max_code() const noexcept { return params().codes.max; }

  Grid at(Eigen::Index row, Eigen::Index group) const noexcept {
    const std::size_t p = index(row, group);
    Grid g;
    g.scale = scales_[p];
    g.zero = zeros_.empty() ? implied_zero_ : zeros_[p];
    if (!offsets_.empty()) g.offset = offsets_[p];
    return g;
  }

  /// The grid that covers `range`, as the quantizers fit it. Throws InvalidArgument where it does not fit its storage.
  void set(Eigen::Index row, Eigen::Index group, const Range& range) {
    const std::size_t p = index(row, group);
    put(p, fitter_.fit(range, p));
  }

  /// Scale and offset are rounded to the scale type first (a scale below its smallest becomes that). What the symmetry
  /// does not store is ignored: the zero point but for asymmetric, the offset but for float_offset. Throws
  /// InvalidArgument: a scale or offset that is not finite there, a zero point that is no code.
  void set(Eigen::Index row, Eigen::Index group, const Grid& grid) {
    const Grid g = stored(grid);
    detail::require(storable(grid), "grid of row ", row, ", group ", group, ": scale ", grid.scale, " or offset ",
                    grid.offset, " is not finite as ", name_of(scheme().scale_type));
    detail::require(zeros_.empty() || (g.zero >= min_code() && g.zero <= max_code()), "grid of row ", row,
                    ", group ", group, ": zero point is ", g.zero, ", expected ", min_code(), " to ", max_code());
    put(index(row, group), g);
  }

  /// `grid` as set() stores it.
  Grid stored(const Grid& grid) const noexcept {
    const ScaleType type = scheme().scale_type;
    Grid g = grid;
    g.scale = detail::round_to(type, g.scale);
    if (std::fabs(g.scale) < detail::smallest_scale(type))
      g.scale = std::copysign(detail::smallest_scale(type), g.scale);
    g.offset = offsets_.empty() ? 0.0F : detail::round_to(type, g.offset);
    if (zeros_.empty()) g.zero = implied_zero_;
    return g;
  }
  /// Whether its scale and offset are finite then.
  bool storable(const Grid& grid) const noexcept {
    const Grid g = stored(grid);
    return detail::scalar::is_finite(g.scale) && detail::scalar::is_finite(g.offset);
  }

  /// The grid that set(range) would store.
  Grid fit(const Range& range) const { return fitter_.fit(range, 0); }

  /// The code of weight w of row `row` and input k: the nearest, ties as the quantizers break them.
  int encode(Eigen::Index row, Eigen::Index k, float w) const noexcept { return encode(at(row, group_of(k)), w); }
  float decode(Eigen::Index row, Eigen::Index k, int code) const noexcept {
    return decode(at(row, group_of(k)), code);
  }

  /// The same under a grid that need not be one of these.
  int encode(const Grid& g, float w) const noexcept {
    using detail::rounded;
    if (is_integer(scheme().format)) {
      const float x = offsets_.empty() ? w : rounded(w - g.offset);
      return detail::scalar::to_code(rounded(x / g.scale), g.zero, min_code(), max_code());
    }
    std::int8_t code;
    detail::encode_bytes(params(), 1, &g.scale, nullptr, nullptr, 0, &w, 1, &code);
    return code;
  }
  float decode(const Grid& g, int code) const noexcept { return detail::decode(params(), g, code); }

  /// Codes of a whole row's K weights. The thread must hold nibble's floating-point environment for bits that do not
  /// depend on the caller's: the functions on matrices below see to that.
  void encode_row(Eigen::Index row, const float* w, std::int8_t* codes) const {
    const std::size_t p = index(row, 0);
    detail::encode_bytes(params(), kernel_group_, &scales_[p], offsets_.empty() ? nullptr : &offsets_[p],
                         zeros_.empty() ? nullptr : &zeros_[p], implied_zero_, w, cols_, codes);
  }
  void decode_row(Eigen::Index row, const std::int8_t* codes, float* w) const {
    const std::size_t p = index(row, 0);
    detail::decode_bytes(params(), kernel_group_, &scales_[p], offsets_.empty() ? nullptr : &offsets_[p],
                         zeros_.empty() ? nullptr : &zeros_[p], implied_zero_, codes, cols_, w);
  }

  /// Codes of n values that lie under one grid.
  void encode_run(const Grid& g, const float* w, std::size_t n, std::int8_t* codes) const {
    detail::encode_bytes(params(), detail::round_up(std::max<std::size_t>(n, 1), 16), &g.scale,
                         offsets_.empty() ? nullptr : &g.offset, nullptr, g.zero, w, n, codes);
  }
  void decode_run(const Grid& g, const std::int8_t* codes, std::size_t n, float* w) const {
    detail::decode_bytes(params(), detail::round_up(std::max<std::size_t>(n, 1), 16), &g.scale,
                         offsets_.empty() ? nullptr : &g.offset, nullptr, g.zero, codes, n, w);
  }

  /// Codes of n values that each have a grid of their own, laid out by parameter: offsets for float_offset alone, zeros for
  /// asymmetric alone, else nullptr.
  void encode_each(const float* scales, const float* offsets, const std::int8_t* zeros, const float* w,
                   std::size_t n, std::int8_t* codes) const {
    detail::encode_bytes(params(), 1, scales, offsets, zeros, implied_zero_, w, n, codes);
  }
  void decode_each(const float* scales, const float* offsets, const std::int8_t* zeros, const std::int8_t* codes,
                   std::size_t n, float* w) const {
    detail::decode_bytes(params(), 1, scales, offsets, zeros, implied_zero_, codes, n, w);
  }

  /// Nearest codes of all weights. Throws InvalidArgument, naming the index, for a weight that is not finite.
  CodeMatrix encode(const ConstWeightsRef& w, ThreadPool* pool = nullptr) const {
    check_shape("w", w.rows(), w.cols());
    CodeMatrix codes(rows(), cols());
    each_row(pool, [&](Eigen::Index row) {
      const float* from = w.data() + row * w.outerStride();
      require_finite(row, from);
      encode_row(row, from, codes.data() + row * cols());
    });
    return codes;
  }
  RowMajorMatrix decode(const CodeMatrix& codes, ThreadPool* pool = nullptr) const {
    check_shape("codes", codes.rows(), codes.cols());
    RowMajorMatrix w(rows(), cols());
    each_row(pool,
             [&](Eigen::Index row) { decode_row(row, codes.data() + row * cols(), w.data() + row * cols()); });
    return w;
  }

  /// The tensor of these grids and codes. Throws InvalidArgument where the shape differs or a code is beyond the
  /// format's bits.
  QuantizedTensor assemble(const CodeMatrix& codes) const {
    check_shape("codes", codes.rows(), codes.cols());
    const Scheme& s = scheme();
    Scheme widest = s;
    widest.full_range = true;
    if (widest.symmetry == Symmetry::symmetric && !is_integer(s.format)) widest.full_range = false;
    const detail::CodeRange stored = detail::code_range(widest);
    Buffer bytes = Buffer::uninitialized(layout_.code_bytes());
    for (std::size_t r = 0; r < rows_; ++r) {
      const std::int8_t* row = codes.data() + r * cols_;
      for (std::size_t k = 0; k < cols_; ++k)
        detail::require(row[k] >= stored.min && row[k] <= stored.max, "code (", r, ", ", k, ") is ",
                        static_cast<int>(row[k]), ", expected ", stored.min, " to ", stored.max);
      detail::store_line(s.format, row, cols_, bytes.mutable_data() + r * layout_.line_bytes);
    }
    Buffer scales = stored_values(scales_, layout_.scale_bytes());
    Buffer zeros = Buffer::uninitialized(layout_.zero_bytes());
    if (!zeros_.empty()) std::memcpy(zeros.mutable_data(), zeros_.data(), zeros_.size());
    if (!offsets_.empty()) zeros = stored_values(offsets_, layout_.zero_bytes());
    return QuantizedTensor::from_parts(s, layout_.shape, std::move(bytes), std::move(scales), std::move(zeros));
  }

  /// The grids of a quantized matrix. Throws InvalidArgument where its scheme is none of these.
  static WeightGrids of(const QuantizedTensor& q) {
    detail::require(q.rank() == 2, "tensor has ", q.rank(), " dimensions, expected a matrix");
    WeightGrids grids(q.scheme(), static_cast<Eigen::Index>(q.shape()[0]),
                      static_cast<Eigen::Index>(q.shape()[1]));
    for (std::size_t p = 0; p < q.param_count(); ++p) grids.put(p, q.grid(p));
    return grids;
  }

 private:
  static const Scheme& checked(const Scheme& scheme, Eigen::Index rows, Eigen::Index cols) {
    detail::require(rows >= 0 && cols >= 0, "weights are ", rows, " x ", cols);
    detail::require(has_scales(scheme.format), "scheme of weights: format ", name_of(scheme.format),
                    " has no grid to choose");
    return scheme;
  }

  detail::ParamStorage params() const noexcept { return layout_.storage(nullptr, nullptr); }
  std::size_t index(Eigen::Index row, Eigen::Index group) const noexcept {
    return static_cast<std::size_t>(row) * groups_ + static_cast<std::size_t>(group);
  }

  void put(std::size_t p, const Grid& g) noexcept {
    scales_[p] = g.scale;
    if (!zeros_.empty()) zeros_[p] = static_cast<std::int8_t>(g.zero);
    if (!offsets_.empty()) offsets_[p] = g.offset;
  }

  Buffer stored_values(const std::vector<float>& values, std::size_t bytes) const {
    Buffer to = Buffer::uninitialized(bytes);
    for (std::size_t p = 0; p < values.size(); ++p) switch (scheme().scale_type) {
        case ScaleType::fp32: to.as_mutable<float>()[p] = values[p]; break;
        case ScaleType::fp16: to.as_mutable<std::uint16_t>()[p] = fp16_from_float(values[p]); break;
        case ScaleType::bf16: to.as_mutable<std::uint16_t>()[p] = bf16_from_float(values[p]); break;
      }
    return to;
  }

  void check_shape(std::string_view what, Eigen::Index rows, Eigen::Index cols) const {
    detail::require(rows == this->rows() && cols == this->cols(), what, " is ", rows, " x ", cols,
                    ", the grids are for ", this->rows(), " x ", this->cols());
  }
  void require_finite(Eigen::Index row, const float* w) const {
    if (detail::kernels().line_range(w, cols_).finite) return;
    std::size_t k = 0;
    while (detail::scalar::is_finite(w[k])) ++k;
    detail::raise<InvalidArgument>(
        detail::concat("weight (", row, ", ", k, ") is ", w[k], ", expected a finite value"));
  }
  template <class F>
  void each_row(ThreadPool* pool, F&& f) const {
    const detail::FpEnvironment environment;
    const std::size_t at_once = std::max<std::size_t>(1, 16384 / std::max<std::size_t>(cols_, 1));
    detail::for_tasks(pool, detail::ceil_div(rows_, at_once), [&](std::size_t task, std::size_t) {
      for (std::size_t r = task * at_once; r < std::min(rows_, (task + 1) * at_once); ++r)
        f(static_cast<Eigen::Index>(r));
    });
  }

  detail::CodeLayout layout_;
  detail::GridFitter fitter_;
  std::size_t rows_;
  std::size_t cols_;
  std::size_t groups_ = 1;
  std::size_t group_size_ = 1;
  std::size_t kernel_group_ = 16;  // as the kernels have it
  std::int32_t implied_zero_ = 0;
  std::vector<float> scales_;       // [rows][groups]
  std::vector<std::int8_t> zeros_;  // the same, asymmetric only
  std::vector<float> offsets_;      // the same, float_offset only
};

/// The codes of a quantized matrix, one a byte. Throws InvalidArgument for other ranks and formats without scales.
inline CodeMatrix codes_of(const QuantizedTensor& q) {
  detail::require(q.rank() == 2 && has_scales(q.format()), "codes_of: expected a matrix of a format with scales");
  CodeMatrix codes(static_cast<Eigen::Index>(q.shape()[0]), static_cast<Eigen::Index>(q.shape()[1]));
  for (Eigen::Index r = 0; r < codes.rows(); ++r)
    for (Eigen::Index k = 0; k < codes.cols(); ++k)
      codes(r, k) = static_cast<std::int8_t>(q.code(static_cast<std::size_t>(r), static_cast<std::size_t>(k)));
  return codes;
}

/// A search for the clipped range that rounds with the least error, as GPTQ's "mse" option does it: the range of a group
/// is multiplied by p = 1 - i / grid, i = 0 .. max_shrink * grid - 1, and the first p with the least
/// sum_k importance_k |dequantize(quantize(w_k)) - w_k|^norm is kept. Source: IST-DASLab/gptq, quant.py.
struct MseOptions {
  double norm = 2.4;           ///< exponent of the error, > 0
  int grid = 100;              ///< steps that the whole range would be divided into, >= 1
  double max_shrink = 0.8;     ///< share of them that is tried, 0..1
  ThreadPool* pool = nullptr;  ///< threads to work with; nullptr: the calling one. Changes no bit.
};

namespace detail {

inline void check_importance(const Eigen::Ref<const Eigen::VectorXf>& importance, Eigen::Index cols) {
  require(importance.size() == 0 || importance.size() == cols, "importance has ", importance.size(),
          " values, expected one for each of ", cols, " inputs");
  for (Eigen::Index k = 0; k < importance.size(); ++k)
    require(scalar::is_finite(importance[k]) && importance[k] >= 0.0F, "importance ", k, " is ", importance[k],
            ", expected a finite value that is not negative");
}

/// Smallest and largest of n finite values. Throws InvalidArgument, naming (row, first + i), for NaN and Inf.
inline Range range_of(const float* w, Eigen::Index row, Eigen::Index first, std::size_t n) {
  const LineRange r = kernels().line_range(w, n);
  if (!r.finite) {
    std::size_t i = 0;
    while (scalar::is_finite(w[i])) ++i;
    raise<InvalidArgument>(concat("weight (", row, ", ", static_cast<std::size_t>(first) + i, ") is ", w[i],
                                  ", expected a finite value"));
  }
  return n == 0 ? Range{0.0F, 0.0F} : Range{r.min, r.max};
}

/// sum_k importance_k |decode(encode(w_k)) - w_k|^norm under a grid; importance may be null. codes and values are room
/// for n.
inline double rounding_error(const WeightGrids& grids, const Grid& g, const float* w, const float* importance,
                             std::size_t n, double norm, std::int8_t* codes, float* values) {
  grids.encode_run(g, w, n, codes);
  grids.decode_run(g, codes, n, values);
  double sum = 0.0;
  for (std::size_t k = 0; k < n; ++k) {
    const double e = std::fabs(static_cast<double>(values[k]) - static_cast<double>(w[k]));
    const double term = norm == 2.0 ? rounded(e * e) : std::pow(e, norm);
    sum += rounded(term * (importance == nullptr ? 1.0 : static_cast<double>(importance[k])));
  }
  return sum;
}

/// |x|^norm for 0 <= x < 4, from a table: 256 straight pieces an octave, exact to |norm (norm - 1)| / 8 / 256^2, 6e-6 for
/// 2.4; below 2^-20 it is 0. A search takes billions of powers, and std::pow 10 ns for each.
class PowerTable {
 public:
  explicit PowerTable(double norm) : norm_(norm) {
    if (norm == 2.0) return;
    for (std::uint32_t i = 0; i <= count; ++i)
      values_.push_back(
          static_cast<float>(std::pow(static_cast<double>(float_from_bits(first + (i << 15))), norm)));
  }
  double norm() const noexcept { return norm_; }
  double operator()(float x) const noexcept {
    const std::uint32_t bits = bits_from_float(x);
    if (bits < first) return 0.0;
    const std::size_t i = std::min((bits - first) >> 15, count - 1);
    const float part = static_cast<float>(bits & 0x7FFFU) * 0x1p-15F;
    const float step = values_[i + 1] - values_[i];
    // The product of two floats is exact: it does not matter whether it is contracted.
    return static_cast<double>(values_[i]) + static_cast<double>(part) * static_cast<double>(step);
  }

 private:
  static constexpr std::uint32_t first = (127 - 20) << 23;
  static constexpr std::uint32_t count = 22 << 8;
  double norm_;
  std::vector<float> values_;
};

/// rounding_error divided by factor^-norm, factor being about 1 / max |w|; or anything at least as large as `limit` where
/// it is that large.
inline double rounding_error(const WeightGrids& grids, const Grid& g, const float* w, const float* importance,
                             std::size_t n, const PowerTable& power, double factor, double limit,
                             std::int8_t* codes, float* values) {
  grids.encode_run(g, w, n, codes);
  grids.decode_run(g, codes, n, values);
  double sum = 0.0;
  for (std::size_t begin = 0, end; begin < n && sum < limit; begin = end) {
    end = std::min(begin + 16, n);
    float terms[16];
    for (std::size_t k = begin; k < end; ++k) {
      const float e = std::fabs(values[k] - w[k]);
      const auto scaled = static_cast<float>(static_cast<double>(e) * factor);
      terms[k - begin] = power.norm() == 2.0
                             ? static_cast<float>(static_cast<double>(scaled) * static_cast<double>(scaled))
                             : static_cast<float>(power(scaled));
    }
    for (std::size_t k = begin; k < end; ++k)
      sum += static_cast<double>(terms[k - begin]) *
             (importance == nullptr ? 1.0 : static_cast<double>(importance[k]));
  }
  return sum;
}

/// The shrunk grid of one run of weights: see MseOptions.
inline Grid best_shrunk_grid(const WeightGrids& grids, const Range& range, const float* w, const float* importance,
                             std::size_t n, const MseOptions& options, const PowerTable& power, std::int8_t* codes,
                             float* values) {
  Grid best = grids.fit(range);
  const float absmax = std::max(std::fabs(range.lo), std::fabs(range.hi));
  if (!(absmax > 0.0F)) return best;
  const double factor = 1.0 / static_cast<double>(absmax);
  const int steps = std::max(1, static_cast<int>(std::lround(options.max_shrink * options.grid)));
  double least = rounding_error(grids, best, w, importance, n, power, factor,
                                std::numeric_limits<double>::infinity(), codes, values);
  for (int i = 1; i < steps; ++i) {
    const auto p = static_cast<float>(1.0 - static_cast<double>(i) / options.grid);
    const Grid g = grids.fit({rounded(range.lo * p), rounded(range.hi * p)});
    const double error = rounding_error(grids, g, w, importance, n, power, factor, least, codes, values);
    if (error < least) {
      least = error;
      best = g;
    }
  }
  return best;
}

inline void check_mse(const MseOptions& o) {
  require(o.norm > 0.0 && o.norm < 16.0, "norm is ", o.norm, ", expected more than 0 and less than 16");
  require(o.grid >= 1 && o.grid <= 100000, "grid is ", o.grid, ", expected 1 to 100000");
  require(o.max_shrink >= 0.0 && o.max_shrink <= 1.0, "max_shrink is ", o.max_shrink, ", expected 0 to 1");
}

}  // namespace detail

/// Grids that cover each group's smallest and largest weight: those of DynamicQuantizer. w is N x K. Throws
/// InvalidArgument for a scheme that WeightGrids refuses and for a weight that is not finite, naming its index.
inline WeightGrids fit_min_max(const Scheme& scheme, const ConstWeightsRef& w, ThreadPool* pool = nullptr) {
  const detail::FpEnvironment environment;
  WeightGrids grids(scheme, w.rows(), w.cols());
  detail::for_tasks(pool, static_cast<std::size_t>(w.rows()), [&](std::size_t task, std::size_t) {
    const auto row = static_cast<Eigen::Index>(task);
    const float* values = w.data() + row * w.outerStride();
    for (Eigen::Index g = 0; g < grids.groups(); ++g) {
      const auto [begin, end] = grids.inputs_of(g);
      grids.set(row, g, detail::range_of(values + begin, row, begin, static_cast<std::size_t>(end - begin)));
    }
  });
  return grids;
}

/// Grids of clipped ranges, see MseOptions. importance: one weight an input, >= 0, or empty for 1. Throws as
/// fit_min_max does.
inline WeightGrids fit_mse(const Scheme& scheme, const ConstWeightsRef& w, const MseOptions& options = {},
                           const Eigen::Ref<const Eigen::VectorXf>& importance = Eigen::VectorXf()) {
  const detail::FpEnvironment environment;
  detail::check_mse(options);
  detail::check_importance(importance, w.cols());
  WeightGrids grids(scheme, w.rows(), w.cols());
  const auto group_size = static_cast<std::size_t>(grids.group_size());
  const std::size_t threads = options.pool == nullptr ? 1 : static_cast<std::size_t>(options.pool->threads());
  struct Room {
    std::vector<std::int8_t> codes;
    std::vector<float> values;
  };
  std::vector<Room> rooms(threads);
  const detail::PowerTable power(options.norm);
  detail::for_tasks(options.pool, static_cast<std::size_t>(w.rows()), [&](std::size_t task, std::size_t thread) {
    Room& room = rooms[thread];
    room.codes.resize(group_size);
    room.values.resize(group_size);
    const auto row = static_cast<Eigen::Index>(task);
    const float* values = w.data() + row * w.outerStride();
    for (Eigen::Index g = 0; g < grids.groups(); ++g) {
      const auto [begin, end] = grids.inputs_of(g);
      const auto n = static_cast<std::size_t>(end - begin);
      const Range range = detail::range_of(values + begin, row, begin, n);
      grids.set(row, g,
                detail::best_shrunk_grid(grids, range, values + begin,
                                         importance.size() == 0 ? nullptr : importance.data() + begin, n, options,
                                         power, room.codes.data(), room.values.data()));
    }
  });
  return grids;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
