// INT4 weights x INT8 activations on AVX2.
//
// u4 x s8 by maddubs, eight products summed in int16 (at most 30,720) before they are widened. Up to 4 rows: 1 or 2
// rows x one panel after the other, each weight unpacked where it is used; memory then sees one sequential stream. From
// 5 on: weights stationary, 8 channels x 32 k in 8 registers while up to 64 rows pass. Port arithmetic, stationary, for
// one row, 32 k and 8 channels: 8 maddubs, 7 paddw, madd, the start value's 2, cvt and FMA = 20 operations on four
// pipes, 10 loads on two: 5 cycles for 256 MAC, 1.6 x the bound of the pmaddwd loop, whose 4 operations do 32. Measured,
// Zen 5 (EPYC), one core, 2026-11-23, N = K = 4096, the pmaddwd loop 212 GOP/s, maddubs + paddw 415: groups of 32
// symmetric: M = 512 285-300, 64 274-302, 16 280-294, 8 218-263, 4 223, 2 222, 1 181-200 (50-57 GB/s, L3); asymmetric
// 270, float offset 270; groups of 128: M = 512 347. M = 1 from DRAM (16384 x 8192): 37 GB/s, 39 with offsets and scales
// of x, where the best read loop does 38 and 38; 36 over the 210 matrices of a small language model (read loop 39).

namespace w4a8 {

using int_ops::Float;
using int_ops::Int;
using int_params::Codes4;

inline constexpr std::size_t row_block = 64;
inline constexpr std::size_t panel_block = 4;
inline constexpr std::size_t few_rows = row_block / panel_block;  // up to here, panels go in blocks
inline constexpr std::size_t stream_rows = 4;
inline constexpr std::size_t prefetch_bytes = 2048;
inline constexpr std::size_t stream_prefetch = 8192;
inline constexpr std::size_t param_prefetch = 1024;

// From -2^shift * S, from -zero * S, or from what the group has so far.
enum class Start { shifted, multiplied, partial };
// Keep for the next chunk, or the float steps: of IntGemmArgs, without and with offsets, for one scale a row and (x_)
// for one a row and group.
enum class End { partial, scale, offset, x_scale, x_offset };

/// One pass of all rows over the weights in the registers.
struct RowPass {
  const std::int8_t* x = nullptr;
  std::size_t x_stride = 0;
  const std::int32_t* sums = nullptr;
  std::size_t sums_stride = 0;
  const float* x_scales = nullptr;  // strided as sums
  std::size_t rows = 0;
  std::int32_t* partial = nullptr;  // [rows][8]
  float* acc = nullptr;             // [rows][8]
};

/// One group's parameters of 8 channels.
struct Params {
  Float scale;
  Float offset;
  Int zero;
  Int shift;
};

template <int Rows, int Dots, Start start, End end>
NIBBLE_ALWAYS_INLINE void rows_step(const Int (&w)[Dots], const Params& params, RowPass& pass) noexcept {
  Int d[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Dots; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Int b = int_ops::broadcast4(pass.x + static_cast<std::size_t>(r) * pass.x_stride + 4 * i);
      if (i == 0)
        d[r] = int_ops::dot16(w[i], b);
      else
        int_ops::add_dot16(d[r], w[i], b);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const std::int32_t* sum = pass.sums + static_cast<std::size_t>(r) * pass.sums_stride;
    d[r] = int_ops::pair_sums(d[r]);
    if (start == Start::shifted)
      d[r] = int_ops::sub(d[r], int_ops::shift_left(int_ops::broadcast4(sum), params.shift));
    else if (start == Start::multiplied)
      d[r] = int_ops::sub(d[r], int_ops::mul(int_ops::broadcast4(sum), params.zero));
    else
      d[r] = int_ops::add(d[r], int_ops::load_int(pass.partial + 8 * r));
    if (end == End::partial) {
      int_ops::store_int(pass.partial + 8 * r, d[r]);
    } else {
      constexpr bool scaled_x = end == End::x_scale || end == End::x_offset;
      const Float dots = int_ops::to_float(d[r]);
      Float f = scaled_x ? int_ops::mul(params.scale, dots)
                         : int_ops::fma(params.scale, dots, int_ops::load_float(pass.acc + 8 * r));
      if (end == End::offset || end == End::x_offset)
        f = int_ops::fma(params.offset, int_ops::to_float(int_ops::broadcast4(sum)), f);
      if (scaled_x)
        f = int_ops::fma(int_ops::set_float(pass.x_scales[static_cast<std::size_t>(r) * pass.sums_stride]), f,
                         int_ops::load_float(pass.acc + 8 * r));
      int_ops::store_float(pass.acc + 8 * r, f);
    }
  }
  pass.x += static_cast<std::size_t>(Rows) * pass.x_stride;
  pass.sums += static_cast<std::size_t>(Rows) * pass.sums_stride;
  if (end == End::x_scale || end == End::x_offset)
    pass.x_scales += static_cast<std::size_t>(Rows) * pass.sums_stride;
  pass.partial += 8 * Rows;
  pass.acc += 8 * Rows;
}

/// All rows over Dots x 4 k of half a panel.
template <int Dots, Start start, End end>
NIBBLE_ALWAYS_INLINE void rows_pass(const std::uint8_t* codes, const Params& params, RowPass pass) noexcept {
  Int w[Dots];
#pragma GCC unroll 8
  for (int i = 0; i < Dots / 2; ++i) {
    const std::uint8_t* at = codes + static_cast<std::size_t>(i) * Codes4::unit_bytes;
    int_ops::prefetch(at + prefetch_bytes);
    const Int both = int_ops::load_int(at);
    w[2 * i] = int_ops::low_nibbles(both);
    w[2 * i + 1] = int_ops::high_nibbles(both);
  }
  constexpr int step = 2;
  std::size_t r = 0;
  for (; r + step <= pass.rows; r += step) rows_step<step, Dots, start, end>(w, params, pass);
  for (; r < pass.rows; ++r) rows_step<1, Dots, start, end>(w, params, pass);
}

/// All rows over the chunks of one group whose length is a multiple of 32, as one variant.
template <Start start, End end>
NIBBLE_ALWAYS_INLINE void whole_group(const std::uint8_t* codes, std::size_t units, const Params& params,
                                      RowPass pass) noexcept {
  if (units == 4) return rows_pass<8, start, end>(codes, params, pass);
  rows_pass<8, start, End::partial>(codes, params, pass);
  for (units -= 4;; units -= 4) {
    codes += 4 * Codes4::unit_bytes;
    pass.x += 4 * k_unit;
    if (units == 4) break;
    rows_pass<8, Start::partial, End::partial>(codes, params, pass);
  }
  rows_pass<8, Start::partial, end>(codes, params, pass);
}

template <End scale, End offset>
NIBBLE_ALWAYS_INLINE void whole_group(Symmetry symmetry, const std::uint8_t* codes, std::size_t units,
                                      const Params& params, const RowPass& pass) noexcept {
  if (symmetry == Symmetry::symmetric)
    whole_group<Start::shifted, scale>(codes, units, params, pass);
  else if (symmetry == Symmetry::asymmetric)
    whole_group<Start::multiplied, scale>(codes, units, params, pass);
  else
    whole_group<Start::shifted, offset>(codes, units, params, pass);
}

/// One group of any length and variant, in three steps: start values, products, float steps (or raw D, which stays
/// in pass.partial).
inline void any_group(const IntGemmArgs& a, const std::uint8_t* codes, std::size_t units, const Params& params,
                      const RowPass& pass, std::size_t sum_index) noexcept {
  for (std::size_t r = 0; r < pass.rows; ++r) {
    const std::int32_t* sum = pass.sums + r * pass.sums_stride;
    int_ops::store_int(pass.partial + 8 * r, a.w.symmetry == Symmetry::asymmetric
                                                 ? int_params::start_multiplied(sum, params.zero)
                                                 : int_params::start_shifted(sum, params.shift));
  }
  RowPass part = pass;
  while (units != 0) {
    const std::size_t n = units >= 4 ? 4 : 1;
    if (n == 4)
      rows_pass<8, Start::partial, End::partial>(codes, params, part);
    else
      rows_pass<2, Start::partial, End::partial>(codes, params, part);
    codes += n * Codes4::unit_bytes;
    part.x += n * k_unit;
    units -= n;
  }
  if (a.raw != nullptr) return;
  for (std::size_t r = 0; r < pass.rows; ++r)
    int_ops::store_float(
        pass.acc + 8 * r,
        int_params::finish(a, params.scale, params.offset, int_ops::load_int(pass.partial + 8 * r),
                           sum_index + r * a.sums_stride, int_ops::load_float(pass.acc + 8 * r)));
}

inline void block(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  alignas(32) std::int32_t partial[row_block * 8];
  alignas(32) float acc[row_block * 16];  // not a.acc, whose stride may put all rows in one cache set
  Params params;
  params.shift = int_params::bias_shift<Codes4>(a.w.symmetry);
  const std::size_t step = rows <= few_rows ? panel_block : 1;
  RowPass pass;
  pass.x_stride = a.x_stride;
  pass.sums_stride = a.sums_stride;
  pass.rows = rows;
  pass.partial = partial;
  for (std::size_t p0 = a.panel_begin; p0 < a.panel_end; p0 += step) {
    const std::size_t p1 = p0 + step < a.panel_end ? p0 + step : a.panel_end;
    for (std::size_t i = 0; i < (p1 - p0) * rows * 2; ++i)
      int_ops::store_float(acc + 8 * i, int_ops::zero_float());
    for (std::size_t g = 0; g < a.w.groups; ++g) {
      const std::size_t units = int_params::group_units(a.w, g);
      pass.x = a.x + row0 * a.x_stride + g * a.w.group_size;
      pass.sums = a.x_sums + row0 * a.sums_stride + g;
      pass.x_scales = a.x_scales == nullptr ? nullptr : a.x_scales + row0 * a.sums_stride + g;
      for (std::size_t p = p0; p < p1; ++p) {
        const int_params::Panel panel = int_params::panel_at(a, p);
        const std::uint8_t* codes = panel.codes + g * a.w.group_size / k_unit * Codes4::unit_bytes;
        for (std::size_t half = 0; half < 2; ++half) {
          pass.acc = acc + ((p - p0) * 2 + half) * rows * 8;
          const std::size_t param = panel.param + int_params::param_offset(a, g) + half * 8;
          params.scale = a.raw == nullptr ? int_params::load_scale(a.w, param) : int_ops::zero_float();
          params.offset = a.raw == nullptr ? int_params::load_offset(a.w, param) : int_ops::zero_float();
          params.zero = a.w.symmetry == Symmetry::asymmetric ? int_params::total_zero<Codes4>(a.w, param)
                                                             : int_ops::zero_int();
          const std::uint8_t* at = codes + half * 32;
          if (a.raw != nullptr || units % 4 != 0)
            any_group(a, at, units, params, pass, row0 * a.sums_stride + g);
          else if (a.x_scales == nullptr)
            whole_group<End::scale, End::offset>(a.w.symmetry, at, units, params, pass);
          else
            whole_group<End::x_scale, End::x_offset>(a.w.symmetry, at, units, params, pass);
          if (a.raw != nullptr)
            for (std::size_t r = 0; r < rows; ++r)
              int_ops::store_int(a.raw + (row0 + r) * a.acc_stride + (p - a.panel_begin) * panel_width + half * 8,
                                 int_ops::load_int(partial + 8 * r));
        }
      }
    }
    if (a.raw != nullptr) continue;
    for (std::size_t p = p0; p < p1; ++p)
      for (std::size_t half = 0; half < 2; ++half)
        for (std::size_t r = 0; r < rows; ++r)
          int_ops::store_float(a.acc + (row0 + r) * a.acc_stride + (p - a.panel_begin) * panel_width + half * 8,
                               int_ops::load_float(acc + (((p - p0) * 2 + half) * rows + r) * 8));
  }
}

// ---- stream ----------------------------------------------------------------------------------------------------

/// Rows x one panel over the whole of k, float accumulators in registers. `plain`: fp16 scales, no integer zero points,
/// groups of whole 32.
template <int Rows, End end, bool plain>
inline void stream(const IntGemmArgs& a, std::size_t row0, std::size_t panel_index) noexcept {
  constexpr bool has_offset = end == End::offset || end == End::x_offset;
  constexpr bool scaled_x = end == End::x_scale || end == End::x_offset;
  const PanelView& w = a.w;
  const bool asymmetric = !plain && w.symmetry == Symmetry::asymmetric;
  const bool fp32 = !plain && w.scale_type == ScaleType::fp32;
  const bool raw = !plain && a.raw != nullptr;
  const Int shift = int_params::bias_shift<Codes4>(w.symmetry);
  const int_params::Panel panel = int_params::panel_at(a, panel_index);
  const std::uint8_t* codes = panel.codes;
  Float acc[Rows][2];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = int_ops::zero_float();
  const std::int8_t* x = a.x + row0 * a.x_stride;
  const std::int32_t* sums = a.x_sums + row0 * a.sums_stride;
  const float* x_scales = scaled_x ? a.x_scales + row0 * a.sums_stride : nullptr;
  const std::size_t out = row0 * a.acc_stride + (panel_index - a.panel_begin) * panel_width;
  const auto load_param = [&](const void* base, std::size_t index) {
    return fp32 ? int_ops::load_float(static_cast<const float*>(base) + index)
                : int_ops::load_half(static_cast<const std::uint16_t*>(base) + index);
  };
  for (std::size_t g = 0; g < w.groups; ++g) {
    const std::size_t param = panel.param + int_params::param_offset(a, g);
    if (g % 2 == 0 && !raw) {
      const std::size_t ahead = param * (fp32 ? 4 : 2) + param_prefetch;
      int_ops::prefetch(static_cast<const char*>(w.scales) + ahead);
      if (has_offset) int_ops::prefetch(static_cast<const char*>(w.zeros) + ahead);
    }
    Int d[Rows][2];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const std::int32_t* sum = sums + static_cast<std::size_t>(r) * a.sums_stride + g;
      if (asymmetric) {
        d[r][0] = int_params::start_multiplied(sum, int_params::total_zero<Codes4>(w, param));
        d[r][1] = int_params::start_multiplied(sum, int_params::total_zero<Codes4>(w, param + 8));
      } else {
        d[r][0] = d[r][1] = int_params::start_shifted(sum, shift);
      }
    }
    for (std::size_t units = plain ? w.group_size / k_unit : int_params::group_units(w, g); units != 0;) {
      Int d16[Rows][2];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) d16[r][0] = d16[r][1] = int_ops::zero_int();
      const auto unit = [&] {
        int_ops::prefetch(codes + stream_prefetch);
        Int b[Rows][2];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          b[r][0] = int_ops::broadcast4(x + static_cast<std::size_t>(r) * a.x_stride);
          b[r][1] = int_ops::broadcast4(x + static_cast<std::size_t>(r) * a.x_stride + 4);
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const Int both = int_ops::load_codes(codes + 32 * h);
          const Int low = int_ops::low_nibbles(both);
          const Int high = int_ops::high_nibbles(both);
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r) {
            int_ops::add_dot16_kept(d16[r][h], low, b[r][0]);
            int_ops::add_dot16_kept(d16[r][h], high, b[r][1]);
          }
        }
        codes += Codes4::unit_bytes;
        x += k_unit;
      };
      if (plain || units >= 4) {
        unit();
        unit();
        unit();
        unit();
        units -= 4;
      } else {
        for (; units != 0; --units) unit();
      }
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        d[r][0] = int_ops::add(d[r][0], int_ops::pair_sums(d16[r][0]));
        d[r][1] = int_ops::add(d[r][1], int_ops::pair_sums(d16[r][1]));
      }
    }
    if (raw) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        int_ops::store_int(a.raw + out + static_cast<std::size_t>(r) * a.acc_stride, d[r][0]);
        int_ops::store_int(a.raw + out + static_cast<std::size_t>(r) * a.acc_stride + 8, d[r][1]);
      }
      return;
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const std::size_t at = param + static_cast<std::size_t>(h * 8);
      const Float scale = load_param(w.scales, at);
      const Float offset = has_offset ? load_param(w.zeros, at) : int_ops::zero_float();
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const std::size_t index = static_cast<std::size_t>(r) * a.sums_stride + g;
        const Float sum =
            has_offset ? int_ops::to_float(int_ops::broadcast4(sums + index)) : int_ops::zero_float();
        const Float dots = int_ops::to_float(d[r][h]);
        Float f = scaled_x ? int_ops::mul(scale, dots) : int_ops::fma(scale, dots, acc[r][h]);
        if (has_offset) f = int_ops::fma(offset, sum, f);
        if (scaled_x) f = int_ops::fma(int_ops::set_float(x_scales[index]), f, acc[r][h]);
        acc[r][h] = f;
      }
    }
  }
  if (raw) return;
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    int_ops::store_float(a.acc + out + static_cast<std::size_t>(r) * a.acc_stride, acc[r][0]);
    int_ops::store_float(a.acc + out + static_cast<std::size_t>(r) * a.acc_stride + 8, acc[r][1]);
  }
}

/// Up to stream_rows rows, one panel after the other: codes, scales and offsets are then one sequential stream each.
template <End end, bool plain>
inline void stream_panels(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  for (std::size_t p = a.panel_begin; p < a.panel_end; ++p) {
    std::size_t r = 0;
    for (; r + 2 <= rows; r += 2) stream<2, end, plain>(a, row0 + r, p);
    if (r < rows) stream<1, end, plain>(a, row0 + r, p);
  }
}
template <End end>
inline void stream_all(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  const bool plain = a.raw == nullptr && a.w.scale_type == ScaleType::fp16 &&
                     a.w.symmetry != Symmetry::asymmetric && a.w.group_size % 32 == 0 &&
                     a.w.k_padded % a.w.group_size == 0;
  if (plain)
    stream_panels<end, true>(a, row0, rows);
  else
    stream_panels<end, false>(a, row0, rows);
}

}  // namespace w4a8

inline void gemm_w4a8(const IntGemmArgs& a) noexcept {
  using namespace w4a8;
  const bool has_offset = a.w.symmetry == Symmetry::float_offset;
  for (std::size_t row0 = 0; row0 < a.rows; row0 += row_block) {
    const std::size_t rows = a.rows - row0 < row_block ? a.rows - row0 : row_block;
    if (rows > stream_rows)
      block(a, row0, rows);
    else if (a.x_scales != nullptr)
      has_offset ? stream_all<End::x_offset>(a, row0, rows) : stream_all<End::x_scale>(a, row0, rows);
    else
      has_offset ? stream_all<End::offset>(a, row0, rows) : stream_all<End::scale>(a, row0, rows);
  }
}
