// The two loops that both integer kernels of this ISA are made of, over the operations of int_ops.inl. `Weights` says
// how codes become the unsigned operand of a dot product (w8a8.inl, w4a8.inl). Included by table.hpp, in its region.
//
// D = sum (q - zero) * x is had as sum u * x - (zero + bias) * S, where u is the byte the dot product sees and S the
// group's sum of x. Everything is modulo 2^32, so only D itself has to fit.
//
// Weights stationary (rows >= 3): 32 channels x 32 k of weights sit in 16 registers while all rows (up to 64) pass:
// a broadcast of 4 k of x feeds two dot products. What a group has summed so far lives in L1, as does the fp32 result.
// Per row and 32 k: 16 dpbusd, and at a group's end 2 FMA, on the two multiplier pipes; 8 broadcasts, 2 loads and
// 2 stores beside them.
//
// Stream (rows <= 2): every weight is loaded once and used at once; accumulators of 4 or 8 panels stay in registers,
// so that DRAM sees that many sequential streams and the dot products that many independent chains.

namespace int_tiles {

using int_ops::Float;
using int_ops::Int;

inline constexpr std::size_t row_block = 64;  // rows that share one pass over the weights
inline constexpr std::size_t chunk_k = 32;    // k of weights that the registers hold

/// Where one group of one call lies.
struct Group {
  std::size_t index = 0;
  std::size_t units = 0;  // of 8 k
  bool first = false;
};

/// The parameters of one panel: 16 lanes a group.
struct PanelParams {
  const std::uint8_t* codes = nullptr;
  std::size_t param = 0;  // index of the first group's lane 0 in scales and zeros
};

NIBBLE_ALWAYS_INLINE PanelParams panel_params(const IntGemmArgs& a, std::size_t panel) noexcept {
  const std::size_t groups = a.scale_group_stride == 0 ? 1 : a.w.groups;
  return {a.w.codes + panel * a.w.panel_bytes, panel * groups * panel_width};
}

NIBBLE_ALWAYS_INLINE Group group_at(const PanelView& w, std::size_t g) noexcept {
  const std::size_t begin = g * w.group_size;
  const std::size_t end = begin + w.group_size < w.k_padded ? begin + w.group_size : w.k_padded;
  return {g, (end - begin) / k_unit, g == 0};
}

/// 16 values of the weights' scale type, fp32.
NIBBLE_ALWAYS_INLINE Float load_param(const PanelView& w, const void* base, std::size_t index) noexcept {
  if (w.scale_type == ScaleType::fp32) return int_ops::load_float(static_cast<const float*>(base) + index);
  return int_ops::load_half(static_cast<const std::uint16_t*>(base) + index);
}

/// log2 of what every code is too large by, or 32 (which shifts everything out) where that is nothing.
template <class Weights>
NIBBLE_ALWAYS_INLINE std::int32_t bias_shift(Symmetry symmetry) noexcept {
  return symmetry == Symmetry::symmetric ? Weights::symmetric_shift : Weights::plain_shift;
}

/// zero + bias of 16 channels, for asymmetric weights.
template <class Weights>
NIBBLE_ALWAYS_INLINE Int total_zero(const PanelView& w, std::size_t index) noexcept {
  return int_ops::add(int_ops::widen_s8(static_cast<const std::int8_t*>(w.zeros) + index),
                      int_ops::set_int(Weights::bias));
}

/// acc = fma(scale, D, acc), and the float offset's term: IntGemmArgs' steps for one row, group and panel.
NIBBLE_ALWAYS_INLINE Float finish(const IntGemmArgs& a, Float scale, Float offset, Int d, std::size_t sum_index,
                                  Float acc) noexcept {
  const bool has_offset = a.w.symmetry == Symmetry::float_offset;
  if (a.x_scales != nullptr) {
    const Float xs = int_ops::set_float(a.x_scales[sum_index]);
    scale = int_ops::mul(scale, xs);
    if (has_offset) offset = int_ops::mul(offset, xs);
  }
  acc = int_ops::fma(scale, int_ops::to_float(d), acc);
  if (has_offset)
    acc = int_ops::fma(offset, int_ops::to_float(int_ops::broadcast4(a.x_sums + sum_index)), acc);
  return acc;
}

// ---- weights stationary ----------------------------------------------------------------------------------------

enum class Start { sums, partial };          // from -bias * S, or from what the group has so far
enum class End { partial, scale, offset };   // keep for the next chunk, or acc = fma(scale, D, acc) (and the offset's)

/// One pass of all rows over the weights in the registers.
struct RowPass {
  const std::int8_t* x = nullptr;
  std::size_t x_stride = 0;
  const std::int32_t* sums = nullptr;
  std::size_t sums_stride = 0;
  std::size_t rows = 0;
  std::int32_t* partial = nullptr;  // [rows][2][16]
  float* acc = nullptr;             // [rows][2][16]
};

struct PairParams {
  Float scale0, scale1, offset0, offset1;
  Int shift;
};

template <int Rows, int Dots, Start start, End end>
NIBBLE_ALWAYS_INLINE void rows_step(const Int (&w0)[Dots], const Int (&w1)[Dots], const PairParams& params,
                                    RowPass& pass) noexcept {
  Int d0[Rows];
  Int d1[Rows];
  const std::int8_t* x = pass.x;
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    if (start == Start::sums) {
      const Int sum = int_ops::broadcast4(pass.sums + static_cast<std::size_t>(r) * pass.sums_stride);
      d0[r] = int_ops::sub(int_ops::zero_int(), int_ops::shift_left(sum, params.shift));
      d1[r] = d0[r];
    } else {
      d0[r] = int_ops::load_int(pass.partial + 32 * r);
      d1[r] = int_ops::load_int(pass.partial + 32 * r + 16);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Dots; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Int b = int_ops::broadcast4(x + static_cast<std::size_t>(r) * pass.x_stride + 4 * i);
      int_ops::dot(d0[r], w0[i], b);
      int_ops::dot(d1[r], w1[i], b);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    if (end == End::partial) {
      int_ops::store_int(pass.partial + 32 * r, d0[r]);
      int_ops::store_int(pass.partial + 32 * r + 16, d1[r]);
    } else {
      Float f0 = int_ops::fma(params.scale0, int_ops::to_float(d0[r]), int_ops::load_float(pass.acc + 32 * r));
      Float f1 = int_ops::fma(params.scale1, int_ops::to_float(d1[r]), int_ops::load_float(pass.acc + 32 * r + 16));
      if (end == End::offset) {
        const Float sum =
            int_ops::to_float(int_ops::broadcast4(pass.sums + static_cast<std::size_t>(r) * pass.sums_stride));
        f0 = int_ops::fma(params.offset0, sum, f0);
        f1 = int_ops::fma(params.offset1, sum, f1);
      }
      int_ops::store_float(pass.acc + 32 * r, f0);
      int_ops::store_float(pass.acc + 32 * r + 16, f1);
    }
  }
  pass.x += static_cast<std::size_t>(Rows) * pass.x_stride;
  pass.sums += static_cast<std::size_t>(Rows) * pass.sums_stride;
  pass.partial += 32 * Rows;
  pass.acc += 32 * Rows;
}

/// All rows over Dots x 4 k of two panels.
template <class Weights, int Dots, Start start, End end>
NIBBLE_ALWAYS_INLINE void rows_pass(const std::uint8_t* codes0, const std::uint8_t* codes1,
                                    const PairParams& params, RowPass pass) noexcept {
  Int w0[Dots];
  Int w1[Dots];
#pragma GCC unroll 8
  for (int i = 0; i < Dots / 2; ++i) {
    Weights::load(codes0 + static_cast<std::size_t>(i) * Weights::unit_bytes, w0[2 * i], w0[2 * i + 1]);
    Weights::load(codes1 + static_cast<std::size_t>(i) * Weights::unit_bytes, w1[2 * i], w1[2 * i + 1]);
  }
  constexpr int step = 4;
  std::size_t r = 0;
  for (; r + step <= pass.rows; r += step) rows_step<step, Dots, start, end>(w0, w1, params, pass);
  for (; r < pass.rows; ++r) rows_step<1, Dots, start, end>(w0, w1, params, pass);
}

/// The start values of a group, for what rows_pass does not do on the way: partial = -(zero + bias) * S.
template <class Weights>
inline void start_rows(const IntGemmArgs& a, std::size_t row0, std::size_t rows, const Group& group,
                       std::size_t param0, std::size_t param1, std::int32_t* partial) noexcept {
  Int zero0 = int_ops::zero_int();
  Int zero1 = zero0;
  const bool asymmetric = a.w.symmetry == Symmetry::asymmetric;
  if (asymmetric) {
    zero0 = total_zero<Weights>(a.w, param0);
    zero1 = total_zero<Weights>(a.w, param1);
  }
  const Int shift = int_ops::set_int(bias_shift<Weights>(a.w.symmetry));
  for (std::size_t r = 0; r < rows; ++r) {
    const Int sum = int_ops::broadcast4(a.x_sums + (row0 + r) * a.sums_stride + group.index);
    Int d0;
    Int d1;
    if (asymmetric) {
      d0 = int_ops::sub(int_ops::zero_int(), int_ops::mul(zero0, sum));
      d1 = int_ops::sub(int_ops::zero_int(), int_ops::mul(zero1, sum));
    } else {
      d0 = int_ops::sub(int_ops::zero_int(), int_ops::shift_left(sum, shift));
      d1 = d0;
    }
    int_ops::store_int(partial + 32 * r, d0);
    int_ops::store_int(partial + 32 * r + 16, d1);
  }
}

/// What follows a group's last chunk where rows_pass did not do it: the float steps with every variant.
inline void finish_rows(const IntGemmArgs& a, std::size_t row0, const Group& group, const PairParams& params,
                        const RowPass& pass) noexcept {
  for (std::size_t r = 0; r < pass.rows; ++r) {
    const std::int32_t* d = pass.partial + 32 * r;
    float* acc = pass.acc + 32 * r;
    const std::size_t sum_index = (row0 + r) * a.sums_stride + group.index;
    int_ops::store_float(acc, finish(a, params.scale0, params.offset0, int_ops::load_int(d), sum_index,
                                     int_ops::load_float(acc)));
    int_ops::store_float(acc + 16, finish(a, params.scale1, params.offset1, int_ops::load_int(d + 16), sum_index,
                                          int_ops::load_float(acc + 16)));
  }
}

/// [rows][2][16] to a matrix of one or two panels; T is float or int32.
template <class T>
inline void copy_out(const T* from, std::size_t rows, bool pair, T* to, std::size_t stride) noexcept {
  for (std::size_t r = 0; r < rows; ++r) {
    int_ops::store_int(to + r * stride, int_ops::load_int(from + 32 * r));
    if (pair) int_ops::store_int(to + r * stride + 16, int_ops::load_int(from + 32 * r + 16));
  }
}

template <class Weights>
inline void stationary(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  alignas(64) std::int32_t partial[row_block * 2 * panel_width];
  alignas(64) float acc[row_block * 2 * panel_width];  // not in a.acc, whose stride may put all rows in one cache set
  const PanelView& w = a.w;
  const bool has_offset = w.symmetry == Symmetry::float_offset;
  const bool fused = a.raw == nullptr && a.x_scales == nullptr && w.symmetry != Symmetry::asymmetric;

  RowPass pass;
  pass.x_stride = a.x_stride;
  pass.sums_stride = a.sums_stride;
  pass.rows = rows;
  pass.partial = partial;
  pass.acc = acc;
  PairParams params;
  params.offset0 = params.offset1 = int_ops::zero_float();
  params.scale0 = params.scale1 = int_ops::zero_float();
  params.shift = int_ops::set_int(bias_shift<Weights>(w.symmetry));

  for (std::size_t p = a.panel_begin; p < a.panel_end; p += 2) {
    const bool pair = p + 1 < a.panel_end;  // an odd last panel is paired with itself
    const PanelParams panel0 = panel_params(a, p);
    const PanelParams panel1 = panel_params(a, pair ? p + 1 : p);
    const std::size_t out = row0 * a.acc_stride + (p - a.panel_begin) * panel_width;
    for (std::size_t i = 0; i < rows * 2; ++i) int_ops::store_float(acc + 16 * i, int_ops::zero_float());

    const std::uint8_t* codes0 = panel0.codes;
    const std::uint8_t* codes1 = panel1.codes;
    const std::int8_t* x = a.x + row0 * a.x_stride;
    for (std::size_t g = 0; g < w.groups; ++g) {
      const Group group = group_at(w, g);
      const std::size_t param0 = panel0.param + g * a.scale_group_stride;
      const std::size_t param1 = panel1.param + g * a.scale_group_stride;
      if (a.raw == nullptr) {
        params.scale0 = load_param(w, w.scales, param0);
        params.scale1 = load_param(w, w.scales, param1);
        if (has_offset) {
          params.offset0 = load_param(w, w.zeros, param0);
          params.offset1 = load_param(w, w.zeros, param1);
        }
      }
      pass.sums = a.x_sums + row0 * a.sums_stride + g;
      std::size_t units = group.units;

      const auto advance = [&](std::size_t n) {
        codes0 += n * Weights::unit_bytes;
        codes1 += n * Weights::unit_bytes;
        x += n * k_unit;
        units -= n;
      };
      pass.x = x;
      if (fused && units % 4 == 0) {
        if (units == 4) {
          if (has_offset) rows_pass<Weights, 8, Start::sums, End::offset>(codes0, codes1, params, pass);
          else rows_pass<Weights, 8, Start::sums, End::scale>(codes0, codes1, params, pass);
          advance(4);
          continue;
        }
        rows_pass<Weights, 8, Start::sums, End::partial>(codes0, codes1, params, pass);
        advance(4);
        for (; units > 4; advance(4)) {
          pass.x = x;
          rows_pass<Weights, 8, Start::partial, End::partial>(codes0, codes1, params, pass);
        }
        pass.x = x;
        if (has_offset) rows_pass<Weights, 8, Start::partial, End::offset>(codes0, codes1, params, pass);
        else rows_pass<Weights, 8, Start::partial, End::scale>(codes0, codes1, params, pass);
        advance(4);
        continue;
      }
      start_rows<Weights>(a, row0, rows, group, param0, param1, partial);
      for (; units >= 4; advance(4)) {
        pass.x = x;
        rows_pass<Weights, 8, Start::partial, End::partial>(codes0, codes1, params, pass);
      }
      for (; units > 0; advance(1)) {
        pass.x = x;
        rows_pass<Weights, 2, Start::partial, End::partial>(codes0, codes1, params, pass);
      }
      if (a.raw == nullptr) finish_rows(a, row0, group, params, pass);
    }
    if (a.raw != nullptr) copy_out(partial, rows, pair, a.raw + out, a.acc_stride);
    else copy_out(acc, rows, pair, a.acc + out, a.acc_stride);
  }
}

// ---- stream ----------------------------------------------------------------------------------------------------

/// Rows x Panels with all accumulators in registers, K whole.
template <class Weights, int Rows, int Panels>
inline void stream(const IntGemmArgs& a, std::size_t row0, std::size_t panel) noexcept {
  const PanelView& w = a.w;
  const std::uint8_t* codes[Panels];
  std::size_t param[Panels];
#pragma GCC unroll 8
  for (int p = 0; p < Panels; ++p) {
    const PanelParams at = panel_params(a, panel + static_cast<std::size_t>(p));
    codes[p] = at.codes;
    param[p] = at.param;
  }
  const std::int8_t* x = a.x + row0 * a.x_stride;
  Float acc[Rows][Panels];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < Panels; ++p) acc[r][p] = int_ops::zero_float();
  }
  const Int shift = int_ops::set_int(bias_shift<Weights>(w.symmetry));
  const std::size_t out = row0 * a.acc_stride + (panel - a.panel_begin) * panel_width;
  std::size_t offset = 0;  // into codes
  for (std::size_t g = 0; g < w.groups; ++g) {
    const Group group = group_at(w, g);
    Int d[Rows][Panels];
    const std::size_t sums = row0 * a.sums_stride + g;
    if (w.symmetry == Symmetry::asymmetric) {
#pragma GCC unroll 8
      for (int p = 0; p < Panels; ++p) {
        const Int zero = total_zero<Weights>(w, param[p] + g * a.scale_group_stride);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          d[r][p] = int_ops::sub(int_ops::zero_int(),
                                 int_ops::mul(zero, int_ops::broadcast4(a.x_sums + sums + static_cast<std::size_t>(r) * a.sums_stride)));
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Int sum = int_ops::broadcast4(a.x_sums + sums + static_cast<std::size_t>(r) * a.sums_stride);
        const Int start = int_ops::sub(int_ops::zero_int(), int_ops::shift_left(sum, shift));
#pragma GCC unroll 8
        for (int p = 0; p < Panels; ++p) d[r][p] = start;
      }
    }
    for (std::size_t u = 0; u < group.units; ++u, offset += Weights::unit_bytes, x += k_unit) {
      Int b[Rows][2];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        b[r][0] = int_ops::broadcast4(x + static_cast<std::size_t>(r) * a.x_stride);
        b[r][1] = int_ops::broadcast4(x + static_cast<std::size_t>(r) * a.x_stride + 4);
      }
#pragma GCC unroll 8
      for (int p = 0; p < Panels; ++p) {
        Int w0;
        Int w1;
        Weights::load(codes[p] + offset, w0, w1);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          int_ops::dot(d[r][p], w0, b[r][0]);
          int_ops::dot(d[r][p], w1, b[r][1]);
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < Panels; ++p) {
      const std::size_t at = param[p] + g * a.scale_group_stride;
      if (a.raw != nullptr) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          int_ops::store_int(a.raw + out + static_cast<std::size_t>(r) * a.acc_stride + static_cast<std::size_t>(p) * panel_width, d[r][p]);
        continue;
      }
      const Float scale = load_param(w, w.scales, at);
      const Float off = w.symmetry == Symmetry::float_offset ? load_param(w, w.zeros, at) : int_ops::zero_float();
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
        acc[r][p] = finish(a, scale, off, d[r][p], sums + static_cast<std::size_t>(r) * a.sums_stride, acc[r][p]);
    }
  }
  if (a.raw != nullptr) return;
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < Panels; ++p)
      int_ops::store_float(a.acc + out + static_cast<std::size_t>(r) * a.acc_stride + static_cast<std::size_t>(p) * panel_width, acc[r][p]);
  }
}

/// All panels of a call, Panels at a time; the last few overlap with those before (the same results twice).
template <class Weights, int Rows, int Panels>
inline void stream_panels(const IntGemmArgs& a, std::size_t row0) noexcept {
  constexpr std::size_t step = Panels;
  std::size_t p = a.panel_begin;
  for (; p + step <= a.panel_end; p += step) stream<Weights, Rows, Panels>(a, row0, p);
  if (p == a.panel_end) return;
  if (a.panel_end - a.panel_begin >= step) return stream<Weights, Rows, Panels>(a, row0, a.panel_end - step);
  for (; p < a.panel_end; ++p) stream<Weights, Rows, 1>(a, row0, p);
}

template <class Weights>
inline void gemm(const IntGemmArgs& a) noexcept {
  if (a.panel_begin >= a.panel_end) return;
  for (std::size_t row0 = 0; row0 < a.rows;) {
    const std::size_t rows = a.rows - row0 < row_block ? a.rows - row0 : row_block;
    if (rows == 1) stream_panels<Weights, 1, 4>(a, row0);
    else if (rows == 2) stream_panels<Weights, 2, 4>(a, row0);
    else stationary<Weights>(a, row0, rows);
    row0 += rows;
  }
}

}  // namespace int_tiles
