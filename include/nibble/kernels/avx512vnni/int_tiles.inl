// The two loops that both integer kernels of this ISA are made of, over int_ops. `Weights` says how codes become
// the unsigned operand of a dot product (w8a8.inl, w4a8.inl). Included by table.hpp, in its region.
//
// Weights stationary (int8, more than 4 rows): 32 channels x 32 k of weights sit in 16 registers while all rows
// (up to 64) pass: a broadcast of 4 k of x feeds two dot products. What a group has summed so far lives in L1, as
// does the fp32 result. Per row and 32 k: 16 dpbusd, and at a group's end 2 FMA, on the two multiplier pipes; 8
// broadcasts, 2 loads and 2 stores beside them.
//
// Stream: up to 4 rows x 4 panels over the whole of k; every weight is used as it is loaded, the accumulators stay
// in registers, so that DRAM sees that many sequential streams and the dot products that many independent chains.

namespace int_tiles {

using int_ops::Float;
using int_ops::Int;
using int_params::Panel;

inline constexpr std::size_t row_block = 64;  // rows that share one pass over the weights
inline constexpr std::size_t tile_rows = 4;   // of the streaming loop
inline constexpr int tile_panels = 4;
inline constexpr std::size_t prefetch_bytes = 2048;

/// What a call needs at every group's end.
struct Call {
  const IntGemmArgs& a;
  bool plain;  // a group ends in float steps, not in raw sums
  Int shift;   // of S, where zero + bias is a power of two
};

template <class Weights>
NIBBLE_ALWAYS_INLINE Call call_of(const IntGemmArgs& a) noexcept {
  return {a, a.raw == nullptr, int_params::bias_shift<Weights>(a.w.symmetry)};
}

// ---- weights stationary ----------------------------------------------------------------------------------------

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
  std::int32_t* partial = nullptr;  // [rows][2][16]
  float* acc = nullptr;             // [rows][2][16]
};

/// One group's parameters of two panels.
struct PairParams {
  Float scale[2];
  Float offset[2];
  Int zero[2];
  Int shift;
};

template <int Rows, int Dots, Start start, End end>
NIBBLE_ALWAYS_INLINE void rows_step(const Int (&w0)[Dots], const Int (&w1)[Dots], const PairParams& params,
                                    RowPass& pass) noexcept {
  Int d[Rows][2];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const std::int32_t* sum = pass.sums + static_cast<std::size_t>(r) * pass.sums_stride;
    if (start == Start::partial) {
      d[r][0] = int_ops::load_int(pass.partial + 32 * r);
      d[r][1] = int_ops::load_int(pass.partial + 32 * r + 16);
    } else if (start == Start::multiplied) {
      d[r][0] = int_params::start_multiplied(sum, params.zero[0]);
      d[r][1] = int_params::start_multiplied(sum, params.zero[1]);
    } else {
      d[r][0] = int_params::start_shifted(sum, params.shift);
      d[r][1] = d[r][0];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Dots; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Int b = int_ops::broadcast4(pass.x + static_cast<std::size_t>(r) * pass.x_stride + 4 * i);
      int_ops::dot(d[r][0], w0[i], b);
      int_ops::dot(d[r][1], w1[i], b);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      if (end == End::partial) {
        int_ops::store_int(pass.partial + 32 * r + 16 * p, d[r][p]);
        continue;
      }
      float* acc = pass.acc + 32 * r + 16 * p;
      constexpr bool scaled_x = end == End::x_scale || end == End::x_offset;
      const Float dots = int_ops::to_float(d[r][p]);
      Float f = scaled_x ? int_ops::mul(params.scale[p], dots)
                         : int_ops::fma(params.scale[p], dots, int_ops::load_float(acc));
      if (end == End::offset || end == End::x_offset) {
        const std::int32_t* sum = pass.sums + static_cast<std::size_t>(r) * pass.sums_stride;
        f = int_ops::fma(params.offset[p], int_ops::to_float(int_ops::broadcast4(sum)), f);
      }
      if (scaled_x)
        f = int_ops::fma(int_ops::set_float(pass.x_scales[static_cast<std::size_t>(r) * pass.sums_stride]), f,
                         int_ops::load_float(acc));
      int_ops::store_float(acc, f);
    }
  }
  pass.x += static_cast<std::size_t>(Rows) * pass.x_stride;
  pass.sums += static_cast<std::size_t>(Rows) * pass.sums_stride;
  if (end == End::x_scale || end == End::x_offset)
    pass.x_scales += static_cast<std::size_t>(Rows) * pass.sums_stride;
  pass.partial += 32 * Rows;
  pass.acc += 32 * Rows;
}

/// All rows over Dots x 4 k of two panels.
template <class Weights, int Dots, Start start, End end>
NIBBLE_ALWAYS_INLINE void rows_pass(const std::uint8_t* const (&codes)[2], const PairParams& params,
                                    RowPass pass) noexcept {
  Int w0[Dots];
  Int w1[Dots];
#pragma GCC unroll 8
  for (int i = 0; i < Dots / 2; ++i) {
    const std::size_t at = static_cast<std::size_t>(i) * Weights::unit_bytes;
    Weights::load(codes[0] + at, w0[2 * i], w0[2 * i + 1]);
    Weights::load(codes[1] + at, w1[2 * i], w1[2 * i + 1]);
#pragma GCC unroll 2
    for (std::size_t line = 0; line < Weights::unit_bytes; line += 64) {
      int_ops::prefetch(codes[0] + at + line + prefetch_bytes);
      int_ops::prefetch(codes[1] + at + line + prefetch_bytes);
    }
  }
  constexpr int step = 2;
  std::size_t r = 0;
  for (; r + step <= pass.rows; r += step) rows_step<step, Dots, start, end>(w0, w1, params, pass);
  for (; r < pass.rows; ++r) rows_step<1, Dots, start, end>(w0, w1, params, pass);
}

/// All rows over the chunks of one group whose length is a multiple of 32, as one variant.
template <class Weights, Start start, End end>
NIBBLE_ALWAYS_INLINE void whole_group(const std::uint8_t* const (&at)[2], std::size_t units,
                                      const PairParams& params, RowPass pass) noexcept {
  if (units == 4) return rows_pass<Weights, 8, start, end>(at, params, pass);
  const std::uint8_t* codes[2] = {at[0], at[1]};
  rows_pass<Weights, 8, start, End::partial>(codes, params, pass);
  for (units -= 4;; units -= 4) {
    codes[0] += 4 * Weights::unit_bytes;
    codes[1] += 4 * Weights::unit_bytes;
    pass.x += 4 * k_unit;
    if (units == 4) break;
    rows_pass<Weights, 8, Start::partial, End::partial>(codes, params, pass);
  }
  rows_pass<Weights, 8, Start::partial, end>(codes, params, pass);
}

template <class Weights, End scale, End offset>
NIBBLE_ALWAYS_INLINE void whole_group(Symmetry symmetry, const std::uint8_t* const (&at)[2], std::size_t units,
                                      const PairParams& params, const RowPass& pass) noexcept {
  if (symmetry == Symmetry::symmetric)
    whole_group<Weights, Start::shifted, scale>(at, units, params, pass);
  else if (symmetry == Symmetry::asymmetric)
    whole_group<Weights, Start::multiplied, scale>(at, units, params, pass);
  else
    whole_group<Weights, Start::shifted, offset>(at, units, params, pass);
}

/// One group of any length and variant, in three steps: start values, dot products, float steps (or raw D, which
/// stays in pass.partial).
template <class Weights>
inline void any_group(const Call& call, const std::uint8_t* const (&at)[2], std::size_t units,
                      const PairParams& params, const RowPass& pass, std::size_t sum_index) noexcept {
  const IntGemmArgs& a = call.a;
  for (std::size_t r = 0; r < pass.rows; ++r)
    for (std::size_t p = 0; p < 2; ++p) {
      const std::int32_t* sum = pass.sums + r * pass.sums_stride;
      int_ops::store_int(pass.partial + 32 * r + 16 * p, a.w.symmetry == Symmetry::asymmetric
                                                             ? int_params::start_multiplied(sum, params.zero[p])
                                                             : int_params::start_shifted(sum, params.shift));
    }
  const std::uint8_t* codes[2] = {at[0], at[1]};
  RowPass part = pass;
  while (units != 0) {
    const std::size_t n = units >= 4 ? 4 : 1;
    if (n == 4)
      rows_pass<Weights, 8, Start::partial, End::partial>(codes, params, part);
    else
      rows_pass<Weights, 2, Start::partial, End::partial>(codes, params, part);
    codes[0] += n * Weights::unit_bytes;
    codes[1] += n * Weights::unit_bytes;
    part.x += n * k_unit;
    units -= n;
  }
  if (a.raw != nullptr) return;
  for (std::size_t r = 0; r < pass.rows; ++r)
    for (std::size_t p = 0; p < 2; ++p) {
      float* acc = pass.acc + 32 * r + 16 * p;
      int_ops::store_float(acc, int_params::finish(a, params.scale[p], params.offset[p],
                                                   int_ops::load_int(pass.partial + 32 * r + 16 * p),
                                                   sum_index + r * a.sums_stride, int_ops::load_float(acc)));
    }
}

template <class Weights>
inline void stationary(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  alignas(64) std::int32_t partial[row_block * 2 * panel_width];
  alignas(
      64) float acc[row_block * 2 * panel_width];  // not in a.acc, whose stride may put all rows in one cache set
  const PanelView& w = a.w;
  const Call call = call_of<Weights>(a);

  RowPass pass;
  pass.x_stride = a.x_stride;
  pass.sums_stride = a.sums_stride;
  pass.rows = rows;
  pass.partial = partial;
  pass.acc = acc;
  PairParams params;
  params.shift = call.shift;

  for (std::size_t p0 = a.panel_begin; p0 < a.panel_end; p0 += 2) {
    const std::size_t count = p0 + 1 < a.panel_end ? 2 : 1;  // an odd last panel is paired with itself
    const Panel panel[2] = {int_params::panel_at(a, p0), int_params::panel_at(a, p0 + count - 1)};
    for (std::size_t i = 0; i < rows * 2; ++i) int_ops::store_float(acc + 16 * i, int_ops::zero_float());

    const std::uint8_t* codes[2] = {panel[0].codes, panel[1].codes};
    pass.x = a.x + row0 * a.x_stride;
    for (std::size_t g = 0; g < w.groups; ++g) {
      const std::size_t units = int_params::group_units(w, g);
      const std::size_t sum_index = row0 * a.sums_stride + g;
      pass.sums = a.x_sums + sum_index;
      pass.x_scales = a.x_scales == nullptr ? nullptr : a.x_scales + sum_index;
      for (std::size_t p = 0; p < 2; ++p) {
        const std::size_t param = panel[p].param + int_params::param_offset(a, g);
        params.scale[p] = a.raw == nullptr ? int_params::load_scale(w, param) : int_ops::zero_float();
        params.offset[p] = a.raw == nullptr ? int_params::load_offset(w, param) : int_ops::zero_float();
        params.zero[p] =
            w.symmetry == Symmetry::asymmetric ? int_params::total_zero<Weights>(w, param) : int_ops::zero_int();
      }
      if (!call.plain || units % 4 != 0)
        any_group<Weights>(call, codes, units, params, pass, sum_index);
      else if (a.x_scales == nullptr)
        whole_group<Weights, End::scale, End::offset>(w.symmetry, codes, units, params, pass);
      else
        whole_group<Weights, End::x_scale, End::x_offset>(w.symmetry, codes, units, params, pass);
      codes[0] += units * Weights::unit_bytes;
      codes[1] += units * Weights::unit_bytes;
      pass.x += units * k_unit;
    }
    for (std::size_t r = 0; r < rows; ++r)
      for (std::size_t p = 0; p < count; ++p) {
        const std::size_t out = (row0 + r) * a.acc_stride + (p0 + p - a.panel_begin) * panel_width;
        if (a.raw != nullptr)
          int_ops::store_int(a.raw + out, int_ops::load_int(partial + 32 * r + 16 * p));
        else
          int_ops::store_float(a.acc + out, int_ops::load_float(acc + 32 * r + 16 * p));
      }
  }
}

// ---- stream ----------------------------------------------------------------------------------------------------

/// Rows x Panels over the whole of k.
template <class Weights, int Rows, int Panels>
inline void stream(const IntGemmArgs& a, std::size_t row0, std::size_t panel) noexcept {
  const PanelView& w = a.w;
  const Call call = call_of<Weights>(a);
  const std::uint8_t* codes[Panels];
  std::size_t param[Panels];
  Float acc[Rows][Panels];
  const std::int32_t* sums[Rows];
#pragma GCC unroll 8
  for (int p = 0; p < Panels; ++p) {
    const Panel at = int_params::panel_at(a, panel + static_cast<std::size_t>(p));
    codes[p] = at.codes;
    param[p] = at.param;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r][p] = int_ops::zero_float();
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) sums[r] = a.x_sums + (row0 + static_cast<std::size_t>(r)) * a.sums_stride;

  const std::int8_t* x = a.x + row0 * a.x_stride;
  const std::size_t out = row0 * a.acc_stride + (panel - a.panel_begin) * panel_width;
  std::size_t offset = 0;  // into codes
  for (std::size_t g = 0; g < w.groups; ++g) {
    Int d[Rows][Panels];
    if (w.symmetry == Symmetry::asymmetric) {
#pragma GCC unroll 8
      for (int p = 0; p < Panels; ++p) {
        const Int zero = int_params::total_zero<Weights>(w, param[p] + int_params::param_offset(a, g));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) d[r][p] = int_params::start_multiplied(sums[r] + g, zero);
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Int start = int_params::start_shifted(sums[r] + g, call.shift);
#pragma GCC unroll 8
        for (int p = 0; p < Panels; ++p) d[r][p] = start;
      }
    }
    for (std::size_t u = int_params::group_units(w, g); u != 0; --u, offset += Weights::unit_bytes, x += k_unit) {
      Int b[Rows][2];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        b[r][0] = int_ops::broadcast4(x + static_cast<std::size_t>(r) * a.x_stride);
        b[r][1] = int_ops::broadcast4(x + static_cast<std::size_t>(r) * a.x_stride + 4);
      }
#pragma GCC unroll 8
      for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 2
        for (std::size_t line = 0; line < Weights::unit_bytes; line += 64)
          int_ops::prefetch(codes[p] + offset + line + prefetch_bytes);
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
    if (a.raw != nullptr) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < Panels; ++p)
          int_ops::store_int(
              a.raw + out + static_cast<std::size_t>(r) * a.acc_stride + static_cast<std::size_t>(p) * panel_width,
              d[r][p]);
      }
      return;
    }
    Float scale[Panels];
#pragma GCC unroll 8
    for (int p = 0; p < Panels; ++p)
      scale[p] = int_params::load_scale(w, param[p] + int_params::param_offset(a, g));
    if (a.x_scales == nullptr && w.symmetry != Symmetry::float_offset) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < Panels; ++p) acc[r][p] = int_ops::fma(scale[p], int_ops::to_float(d[r][p]), acc[r][p]);
      }
      continue;
    }
    Float weight_offset[Panels];
#pragma GCC unroll 8
    for (int p = 0; p < Panels; ++p)
      weight_offset[p] = int_params::load_offset(w, param[p] + int_params::param_offset(a, g));
    if (a.x_scales == nullptr) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Float sum = int_ops::to_float(int_ops::broadcast4(sums[r] + g));
#pragma GCC unroll 8
        for (int p = 0; p < Panels; ++p)
          acc[r][p] =
              int_ops::fma(weight_offset[p], sum, int_ops::fma(scale[p], int_ops::to_float(d[r][p]), acc[r][p]));
      }
      continue;
    }
    const float* x_scales = a.x_scales + row0 * a.sums_stride + g;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Float x_scale = int_ops::set_float(x_scales[static_cast<std::size_t>(r) * a.sums_stride]);
      Float t[Panels];
#pragma GCC unroll 8
      for (int p = 0; p < Panels; ++p) t[p] = int_ops::mul(scale[p], int_ops::to_float(d[r][p]));
      if (w.symmetry == Symmetry::float_offset) {
        const Float sum = int_ops::to_float(int_ops::broadcast4(sums[r] + g));
#pragma GCC unroll 8
        for (int p = 0; p < Panels; ++p) t[p] = int_ops::fma(weight_offset[p], sum, t[p]);
      }
#pragma GCC unroll 8
      for (int p = 0; p < Panels; ++p) acc[r][p] = int_ops::fma(x_scale, t[p], acc[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < Panels; ++p)
      int_ops::store_float(
          a.acc + out + static_cast<std::size_t>(r) * a.acc_stride + static_cast<std::size_t>(p) * panel_width,
          acc[r][p]);
  }
}

template <class Weights, int Panels>
NIBBLE_ALWAYS_INLINE void stream_rows(const IntGemmArgs& a, std::size_t row0, std::size_t rows,
                                      std::size_t panel) noexcept {
  std::size_t tiles = (rows + tile_rows - 1) / tile_rows;
  for (std::size_t r = 0; r < rows; --tiles) {
    const std::size_t height = (rows - r + tiles - 1) / tiles;  // nearly equal ones
    switch (height) {
      case 1: stream<Weights, 1, Panels>(a, row0 + r, panel); break;
      case 2: stream<Weights, 2, Panels>(a, row0 + r, panel); break;
      case 3: stream<Weights, 3, Panels>(a, row0 + r, panel); break;
      default: stream<Weights, 4, Panels>(a, row0 + r, panel); break;
    }
    r += height;
  }
}

/// All panels of a call; the last few overlap with those before, which gives the same results twice.
template <class Weights>
inline void stream_all(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  if (a.panel_begin >= a.panel_end) return;
  std::size_t p = a.panel_begin;
  for (; p + tile_panels <= a.panel_end; p += tile_panels) stream_rows<Weights, tile_panels>(a, row0, rows, p);
  if (p == a.panel_end) return;
  if (a.panel_end - a.panel_begin >= tile_panels)
    return stream_rows<Weights, tile_panels>(a, row0, rows, a.panel_end - tile_panels);
  for (; p < a.panel_end; ++p) stream_rows<Weights, 1>(a, row0, rows, p);
}

}  // namespace int_tiles
