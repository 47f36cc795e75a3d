// Activations as INT8 codes, one scale a token or one a token and group of inputs.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/gemm/workspace.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// What a product computes with.
enum class Activations : std::uint8_t {
  automatic,        ///< int8 for int8 and int4 weights, fp32 for the others
  fp32,             ///< floats; the product equals that of the dequantized weights
  int8,             ///< quantized inside, symmetric, one scale a token
  int8_grouped,     ///< quantized inside, symmetric, one scale a token and group of inputs: closer to floats
  int8_asymmetric,  ///< quantized inside with a zero point a token
  bf16,             ///< for bf16 weights: rounded to bfloat16 inside, pairs of products as AVX512-BF16 sums them
};

namespace detail {

/// Quantized activations as drivers see them.
struct ActivationView {
  const std::int8_t* codes = nullptr;  // [tokens][stride], zero from k on
  std::size_t stride = 0;
  const std::int32_t* block_sums = nullptr;  // [tokens][stride / 16]
  const std::int32_t* group_sums = nullptr;  // [tokens][ceil(inputs / sum_group)]
  std::size_t sum_group = 0;                 // inputs of one of these: group_size, the usual one where that is 0
  const float* scales = nullptr;             // [tokens][groups]
  const float* zeros = nullptr;              // [tokens] or nullptr: symmetric
  std::size_t tokens = 0;
  std::size_t inputs = 0;
  std::size_t group_size = 0;  // 0: one scale a token
  std::size_t groups = 1;
};

}  // namespace detail

/// A fixed grid of activations, from calibration or learned. Symmetric codes of b bits lie within +-(2^(b - 1) - 1), the
/// others within -2^(b - 1) .. 2^(b - 1) - 1.
struct StaticGrid {
  const float* scales = nullptr;  ///< one for each `group_size` inputs, positive
  std::size_t count = 0;          ///< of them
  std::size_t group_size = 0;     ///< a multiple of 16, as int8_grouped has them; 0: one scale for all inputs
  unsigned bits = 8;              ///< of a code, 2 to 8
  bool symmetric = true;          ///< false: one scale for all inputs, and a zero point
  std::int32_t zero_point = 0;    ///< real = scale * (code - zero_point); a code; 0 where symmetric
};

/// k x m activations (a token a column) as INT8 codes: quantize once, multiply with several weights (q, k and v, gate
/// and up). Reusing one object for the same or smaller shapes allocates nothing. Reading it from several threads is
/// safe, assigning is not.
class QuantizedActivations {
 public:
  /// Group of int8_grouped for weights that have one scale a channel.
  static constexpr std::size_t default_group = 32;

  QuantizedActivations() = default;

  /// Quantizes x: absmax / 127 a token (`kind` int8 or automatic), with a zero point a token (int8_asymmetric), or
  /// absmax / 127 a token and group (int8_grouped). Groups are `group_size` inputs, a multiple of 16: that of the weights
  /// or that divided by a power of two, anything where they have one scale a channel; activation_group(w) suits.
  /// Codes of fewer `bits`, 2 to 8, lie within a narrower range: absmax / (2^(bits - 1) - 1), 7 for 4 bits. A token with
  /// a NaN or an Inf gets a scale NaN: its outputs are NaN, no other token's are.
  void assign(const ConstMatrixRef& x, Activations kind = Activations::int8, ThreadPool* pool = nullptr,
              std::size_t group_size = default_group, unsigned bits = 8,
              const detail::KernelTable& kernels = detail::kernels()) {
    detail::require(kind != Activations::fp32 && kind != Activations::bf16,
                    "activations kind is of floats, expected int8, int8_grouped or int8_asymmetric");
    detail::require(kind != Activations::int8_grouped || (group_size != 0 && group_size % 16 == 0),
                    "activation group_size is ", group_size, ", expected a multiple of 16");
    check_bits(bits);
    const detail::FpEnvironment environment;
    const bool symmetric = kind != Activations::int8_asymmetric;
    resize(x.rows(), x.cols(), symmetric, kind == Activations::int8_grouped ? group_size : 0);
    const std::size_t x_stride = static_cast<std::size_t>(x.outerStride());
    const auto task = [&](std::size_t t, std::size_t) {
      const std::size_t first = t * rows_a_task;
      const std::size_t rows = std::min(rows_a_task, view_.tokens - first);
      std::int8_t* codes = codes_ + first * view_.stride;
      if (view_.group_size != 0) {
        for (std::size_t r = first; r < first + rows; ++r)
          quantize_groups(kernels, x.data() + r * x_stride, r, bits);
      } else {
        detail::QuantizeRowsArgs args;
        args.x = x.data() + first * x_stride;
        args.x_stride = x_stride;
        args.rows = rows;
        args.k = view_.inputs;
        args.symmetric = symmetric;
        args.bits = bits;
        args.q = codes;
        args.q_stride = view_.stride;
        args.scales = scales_ + first;
        args.zeros = integer_zeros_ + first;
        kernels.quantize_rows(args);
        for (std::size_t r = first; r < first + rows; ++r) zeros_[r] = static_cast<float>(integer_zeros_[r]);
      }
      kernels.block_sums(codes, rows * view_.stride, sums_ + first * view_.stride / 16);
      sum_groups(first, rows);
    };
    detail::for_tasks(pool, detail::ceil_div(view_.tokens, rows_a_task), task);
  }

  /// Quantizes x on fixed scales, from calibration: code = clamp(rne(x / scale), -127, 127). `scales` has one for each
  /// `group_size` inputs, as assign()'s groups; group_size 0: one for all inputs. A token with a NaN or an Inf gets a
  /// scale NaN. Throws InvalidArgument for a scale that is not positive, or another number of them.
  void assign_static(const ConstMatrixRef& x, const float* scales, std::size_t count, std::size_t group_size = 0,
                     ThreadPool* pool = nullptr, const detail::KernelTable& kernels = detail::kernels()) {
    StaticGrid grid;
    grid.scales = scales;
    grid.count = count;
    grid.group_size = group_size;
    assign_static(x, grid, pool, kernels);
  }

  /// Quantizes x on a fixed grid: code = clamp(rne(x / scale) + zero_point, lowest, highest). A token with a NaN or an Inf
  /// gets a scale NaN. Throws InvalidArgument for a scale that is not positive, another number of them, or a zero point
  /// that is no code.
  void assign_static(const ConstMatrixRef& x, const StaticGrid& grid, ThreadPool* pool = nullptr,
                     const detail::KernelTable& kernels = detail::kernels()) {
    const auto inputs = static_cast<std::size_t>(x.rows());
    check_static(inputs, grid);
    const float* const scales = grid.scales;
    const std::size_t groups = grid.count;
    const std::size_t group_size = grid.group_size;
    const std::int32_t lowest = -(std::int32_t{1} << (grid.bits - 1));
    const detail::FpEnvironment environment;
    resize(x.rows(), x.cols(), grid.symmetric, group_size);
    const std::size_t x_stride = static_cast<std::size_t>(x.outerStride());
    const std::size_t length = group_size == 0 ? inputs : group_size;
    detail::for_tasks(pool, detail::ceil_div(view_.tokens, rows_a_task), [&](std::size_t t, std::size_t) {
      const std::size_t first = t * rows_a_task;
      const std::size_t rows = std::min(rows_a_task, view_.tokens - first);
      for (std::size_t r = first; r < first + rows; ++r) {
        const float* token = x.data() + r * x_stride;
        std::int8_t* codes = codes_ + r * view_.stride;
        std::memset(codes, 0, view_.stride);
        const bool finite = inputs == 0 || kernels.line_range(token, inputs).finite;
        integer_zeros_[r] = finite ? grid.zero_point : 0;
        zeros_[r] = static_cast<float>(integer_zeros_[r]);
        for (std::size_t g = 0; g < groups; ++g) {
          scales_[r * groups + g] = finite ? scales[g] : std::numeric_limits<float>::quiet_NaN();
          detail::QuantizeLineArgs line;
          line.x = token + g * length;
          line.n = std::min(length, inputs - g * length);
          line.scale = scales[g];
          line.zero = grid.zero_point;
          line.qmin = grid.symmetric ? lowest + 1 : lowest;
          line.qmax = -1 - lowest;
          line.q = codes + g * length;
          if (finite && line.n != 0) kernels.quantize_line(line);
        }
      }
      kernels.block_sums(codes_ + first * view_.stride, rows * view_.stride, sums_ + first * view_.stride / 16);
      sum_groups(first, rows);
    });
  }

  /// Throws what assign_static() throws for its scales.
  static void check_static(std::size_t inputs, const float* scales, std::size_t count, std::size_t group_size) {
    detail::require(group_size % 16 == 0, "activation group_size is ", group_size, ", expected a multiple of 16");
    const std::size_t groups = group_size == 0 ? 1 : detail::ceil_div(inputs, group_size);
    detail::require(count == groups, "static scales are ", count, ", expected ", groups, " for ", inputs,
                    " inputs in groups of ", group_size);
    for (std::size_t g = 0; g < count; ++g)
      detail::require(scales[g] > 0.0F && detail::scalar::is_finite(scales[g]), "static scales[", g, "] is ",
                      scales[g], ", expected a positive number");
  }

  /// The same for a grid.
  static void check_static(std::size_t inputs, const StaticGrid& grid) {
    check_bits(grid.bits);
    check_static(inputs, grid.scales, grid.count, grid.group_size);
    const std::int32_t h = std::int32_t{1} << (grid.bits - 1);
    detail::require(!grid.symmetric || grid.zero_point == 0, "symmetric activations have the zero point ",
                    grid.zero_point, ", expected 0");
    detail::require(grid.zero_point >= -h && grid.zero_point < h, "activation zero_point is ", grid.zero_point,
                    ", expected ", -h, " to ", h - 1);
    detail::require(grid.symmetric || grid.group_size == 0,
                    "activations with a zero point have one scale for all inputs, not one for each ",
                    grid.group_size);
  }

  /// Throws InvalidArgument for a number of bits that codes of activations cannot have.
  static void check_bits(unsigned bits) {
    detail::require(bits >= 2 && bits <= 8, "activation bits are ", bits, ", expected 2 to 8");
  }

  /// Takes codes that a layer before has made: real = scale * (code - zero_point), one scale for all tokens.
  void assign_codes(const ConstInt8MatrixRef& codes, float scale, std::int32_t zero_point = 0) {
    detail::require(scale > 0.0F && detail::scalar::is_finite(scale), "activation scale is ", scale,
                    ", expected a positive number");
    detail::require(zero_point >= -128 && zero_point <= 127, "activation zero_point is ", zero_point,
                    ", expected -128 to 127");
    resize(codes.rows(), codes.cols(), zero_point == 0, 0);
    for (std::size_t r = 0; r < view_.tokens; ++r) {
      std::int8_t* row = codes_ + r * view_.stride;
      std::memset(row, 0, view_.stride);
      if (view_.inputs != 0)
        std::memcpy(row, codes.data() + r * static_cast<std::size_t>(codes.outerStride()), view_.inputs);
      scales_[r] = scale;
      zeros_[r] = static_cast<float>(zero_point);
      integer_zeros_[r] = zero_point;
    }
    detail::kernels().block_sums(codes_, view_.tokens * view_.stride, sums_);
    sum_groups(0, view_.tokens);
  }

  Eigen::Index inputs() const noexcept { return static_cast<Eigen::Index>(view_.inputs); }
  Eigen::Index tokens() const noexcept { return static_cast<Eigen::Index>(view_.tokens); }
  bool symmetric() const noexcept { return view_.zeros == nullptr; }
  /// Inputs that share a scale; 0 where a token has one.
  std::size_t group_size() const noexcept { return view_.group_size; }
  /// inputs() codes of token t.
  const std::int8_t* codes(Eigen::Index t) const {
    return view_.codes + static_cast<std::size_t>(t) * view_.stride;
  }
  float scale(Eigen::Index t, std::size_t group = 0) const {
    return scales_[static_cast<std::size_t>(t) * view_.groups + group];
  }
  std::int32_t zero_point(Eigen::Index t) const { return integer_zeros_[t]; }

  const detail::ActivationView& view() const noexcept { return view_; }

 private:
  static constexpr std::size_t rows_a_task = 16;

  /// A token's groups are rows to the kernel: full ones at once, the shorter last one after.
  void quantize_groups(const detail::KernelTable& kernels, const float* x, std::size_t token, unsigned bits) {
    std::int8_t* codes = codes_ + token * view_.stride;
    const std::size_t full = view_.inputs / view_.group_size;
    const std::size_t rest = view_.inputs % view_.group_size;
    detail::QuantizeRowsArgs args;
    args.x = x;
    args.x_stride = view_.group_size;
    args.rows = full;
    args.k = view_.group_size;
    args.bits = bits;
    args.q = codes;
    args.q_stride = view_.group_size;
    args.scales = scales_ + token * view_.groups;
    kernels.quantize_rows(args);
    const std::size_t done = full * view_.group_size;
    std::memset(codes + done, 0, view_.stride - done);
    if (rest == 0) return;
    args.x = x + done;
    args.rows = 1;
    args.k = rest;
    args.q = codes + done;
    args.q_stride = rest;
    args.scales += full;
    kernels.quantize_rows(args);
  }

  /// group_sums of some tokens, out of their block_sums; codes past the inputs are zero.
  void sum_groups(std::size_t first, std::size_t rows) noexcept {
    const std::size_t blocks = view_.sum_group / 16;
    const std::size_t count = detail::ceil_div(view_.inputs, view_.sum_group);
    const std::size_t all = view_.stride / 16;
    for (std::size_t r = first; r < first + rows; ++r) {
      const std::int32_t* in = sums_ + r * all;
      std::int32_t* out = group_sums_ + r * count;
      for (std::size_t g = 0; g < count; ++g) {
        const std::size_t stop = std::min((g + 1) * blocks, all);
        std::int32_t sum = 0;
        for (std::size_t b = g * blocks; b < stop; ++b) sum += in[b];
        out[g] = sum;
      }
    }
  }

  void resize(Eigen::Index inputs, Eigen::Index tokens, bool symmetric, std::size_t group_size) {
    const auto m = static_cast<std::size_t>(tokens);
    const auto k = static_cast<std::size_t>(inputs);
    // One line more than needed: rows whose distance is a power of two would share a few cache sets.
    const std::size_t stride = detail::round_up(detail::checked_add(k, 128, "activation inputs") - 128, 64) + 64;
    detail::ScratchPlan plan;
    const std::size_t codes = plan.add(m, stride);
    const std::size_t sums = plan.add(m, stride / 16 * sizeof(std::int32_t));
    const std::size_t sum_group = group_size == 0 ? default_group : group_size;
    const std::size_t group_sums = plan.add(m, detail::ceil_div(k, sum_group) * sizeof(std::int32_t));
    const std::size_t groups = group_size == 0 ? 1 : detail::ceil_div(k, group_size);
    const std::size_t scales = plan.add(m, groups * sizeof(float));
    const std::size_t zeros = plan.add(m, sizeof(float));
    const std::size_t integer_zeros = plan.add(m, sizeof(std::int32_t));
    std::uint8_t* base = memory_.take(plan.total());
    codes_ = reinterpret_cast<std::int8_t*>(base + codes);
    sums_ = reinterpret_cast<std::int32_t*>(base + sums);
    group_sums_ = reinterpret_cast<std::int32_t*>(base + group_sums);
    scales_ = reinterpret_cast<float*>(base + scales);
    zeros_ = reinterpret_cast<float*>(base + zeros);
    integer_zeros_ = reinterpret_cast<std::int32_t*>(base + integer_zeros);
    view_ = {codes_, stride, sums_,      group_sums_, sum_group, scales_, symmetric ? nullptr : zeros_,
             m,      k,      group_size, groups};
  }

  Workspace memory_;
  std::int8_t* codes_ = nullptr;
  std::int32_t* sums_ = nullptr;
  std::int32_t* group_sums_ = nullptr;
  float* scales_ = nullptr;
  float* zeros_ = nullptr;
  std::int32_t* integer_zeros_ = nullptr;
  detail::ActivationView view_;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
