// The loops of AArch64's integer kernels, over a tier's dots: two rows x eight channels x 32 k at a time, the weights of
// 8 channels x 32 k stationary in 16 registers while up to 32 rows pass. One row alone streams two panels. Included by the tiers' table.hpp, in their regions.
//
// A tier's `dots` says how four registers hold the results of two rows x eight channels:
//   spread(v0, v1, out)  a number of each row: out[i / 2] is for register i
//   expand(low, high, out)  a number of each channel: out[i] is for register i
//   rows_of(acc, out)  back to out[row][channels 0-3, 4-7]
//   pack_x(x0, x1, out)  32 k of two rows to 64 bytes
//   Weights8, Weights4: bias (what the multiplier's byte is larger by than the code), load(codes) and products(x, acc)
//   Row8, Row4: the same for one row: unit(codes, x, acc) adds 8 k of 16 channels

namespace int_tiles {

using int_ops::Float;
using int_ops::Int;
using int_params::Codes4;
using int_params::Codes8;

inline constexpr std::size_t row_block = 32;
inline constexpr std::size_t pair_block = row_block / 2;
inline constexpr std::size_t panel_block = 4;  // panels that share a packed chunk of x
inline constexpr std::size_t chunk_units = 4;  // 32 k
inline constexpr std::size_t prefetch_bytes = 2048;

// From -bias * S (a number a row), from -(zero + bias) * S, or from what the group has so far.
enum class Start { shifted, multiplied, partial };
// Keep for the next chunk, or the float steps: of IntGemmArgs, without and with offsets, for one scale a row and (x_)
// for one a row and group.
enum class End { partial, scale, offset, x_scale, x_offset };

/// What a group has of every row pair; [2] as spread() makes it.
struct RowValues {
  Int starts[pair_block][2];  // -(symmetric zero + bias) * S
  Int sums[pair_block][2];    // S
  Float float_sums[pair_block][2];
  Float x_scales[pair_block][2];
};

/// One group's parameters of eight channels.
struct Params {
  Float scale[4];
  Float offset[4];
  Int zero[4];
};

/// What a pass over the row pairs reads and writes.
struct Pass {
  std::size_t pairs = 0;
  const std::int8_t* x = nullptr;  // [pairs][64]
  const RowValues* rows = nullptr;
  std::int32_t* partial = nullptr;  // [pairs][16]
  float* acc = nullptr;             // [pairs][16]
};

/// acc = the float steps of IntGemmArgs, for one register.
template <End end>
NIBBLE_ALWAYS_INLINE Float finish(const Params& params, const RowValues& rows, std::size_t pair, int i, Int d,
                                  Float acc) noexcept {
  const Float dots = int_ops::to_float(d);
  constexpr bool scaled_x = end == End::x_scale || end == End::x_offset;
  Float f = scaled_x ? int_ops::mul(params.scale[i], dots) : int_ops::fma(params.scale[i], dots, acc);
  if (end == End::offset || end == End::x_offset)
    f = int_ops::fma(params.offset[i], rows.float_sums[pair][i / 2], f);
  return scaled_x ? int_ops::fma(rows.x_scales[pair][i / 2], f, acc) : f;
}

/// All row pairs over one chunk of eight channels.
template <class Weights, Start start, End end>
NIBBLE_ALWAYS_INLINE void pass_rows(const std::uint8_t* codes, const Params& params, const Pass& pass) noexcept {
  Weights w;
  w.load(codes);
  const RowValues& rows = *pass.rows;
  const std::int8_t* x = pass.x;
  std::int32_t* partial = pass.partial;
  float* acc = pass.acc;
  for (std::size_t pair = 0; pair < pass.pairs; ++pair, x += 64, partial += 16, acc += 16) {
    Int d[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (start == Start::shifted)
        d[i] = rows.starts[pair][i / 2];
      else if (start == Start::multiplied)
        d[i] = int_ops::mul(params.zero[i], rows.sums[pair][i / 2]);
      else
        d[i] = int_ops::load_int(partial + 4 * i);
    }
    w.products(x, d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (end == End::partial)
        int_ops::store_int(partial + 4 * i, d[i]);
      else
        int_ops::store_float(acc + 4 * i,
                             finish<end>(params, rows, pair, i, d[i], int_ops::load_float(acc + 4 * i)));
    }
  }
}

template <class Weights, End end>
inline void pass_to(const std::uint8_t* codes, const Params& params, Start start, const Pass& pass) noexcept {
  if (start == Start::partial)
    pass_rows<Weights, Start::partial, end>(codes, params, pass);
  else if (start == Start::shifted)
    pass_rows<Weights, Start::shifted, end>(codes, params, pass);
  else
    pass_rows<Weights, Start::multiplied, end>(codes, params, pass);
}

template <class Weights>
NIBBLE_ALWAYS_INLINE void pass_chunk(const std::uint8_t* codes, const Params& params, Start start, End end,
                                     const Pass& pass) noexcept {
  switch (end) {
    case End::partial: return pass_to<Weights, End::partial>(codes, params, start, pass);
    case End::scale: return pass_to<Weights, End::scale>(codes, params, start, pass);
    case End::offset: return pass_to<Weights, End::offset>(codes, params, start, pass);
    case End::x_scale: return pass_to<Weights, End::x_scale>(codes, params, start, pass);
    case End::x_offset: return pass_to<Weights, End::x_offset>(codes, params, start, pass);
  }
}

/// The numbers of group g, for rows [row0, row0 + rows); a last row without a partner is paired with zeros.
template <class Weights>
NIBBLE_ALWAYS_INLINE void group_rows(const IntGemmArgs& a, std::size_t row0, std::size_t rows, std::size_t g,
                                     RowValues& out) noexcept {
  const std::uint32_t factor =
      static_cast<std::uint32_t>(Weights::bias) +
      (a.w.symmetry == Symmetry::symmetric ? static_cast<std::uint32_t>(Weights::zero) : 0U);
  for (std::size_t r = 0; r < rows; r += 2) {
    const std::size_t at[2] = {(row0 + r) * a.sums_stride + g,
                               (row0 + (r + 1 < rows ? r + 1 : r)) * a.sums_stride + g};
    std::int32_t start[2];
    std::int32_t sum[2];
    float x_scale[2];
    for (int i = 0; i < 2; ++i) {
      sum[i] = a.x_sums[at[i]];
      start[i] = static_cast<std::int32_t>(0U - factor * static_cast<std::uint32_t>(sum[i]));
      x_scale[i] = a.x_scales == nullptr ? 0.0F : a.x_scales[at[i]];
    }
    dots::spread(int_ops::set_int(start[0]), int_ops::set_int(start[1]), out.starts[r / 2]);
    dots::spread(int_ops::set_int(sum[0]), int_ops::set_int(sum[1]), out.sums[r / 2]);
    dots::spread(int_ops::set_float(x_scale[0]), int_ops::set_float(x_scale[1]), out.x_scales[r / 2]);
    for (int i = 0; i < 2; ++i) out.float_sums[r / 2][i] = int_ops::to_float(out.sums[r / 2][i]);
  }
}

/// What `out` has of a group; the rest keeps its zeros.
template <class Weights>
NIBBLE_ALWAYS_INLINE void load_params(const IntGemmArgs& a, std::size_t param, Params& out) noexcept {
  const PanelView& w = a.w;
  if (w.symmetry == Symmetry::asymmetric) {
    // Negated, so that start = zero * S.
    const auto* zeros = static_cast<const std::int8_t*>(w.zeros) + param;
    const Int bias = int_ops::set_int(-Weights::bias);
    dots::expand(int_ops::sub(bias, int_ops::widen_s8(zeros)), int_ops::sub(bias, int_ops::widen_s8(zeros + 4)),
                 out.zero);
  }
  if (a.raw != nullptr) return;
  dots::expand(int_params::load_scale(w, param), int_params::load_scale(w, param + 4), out.scale);
  if (w.symmetry == Symmetry::float_offset)
    dots::expand(int_params::load_offset(w, param), int_params::load_offset(w, param + 4), out.offset);
}

/// 32 k (fewer at a row's end) of all rows, paired; zeros where there is no row or no k.
inline void pack_chunk(const std::int8_t* x, std::size_t stride, std::size_t rows, std::size_t k,
                       std::int8_t* out) noexcept {
  std::int8_t staged[2][32];
  for (std::size_t r = 0; r < rows; r += 2, out += 64) {
    const bool alone = r + 1 == rows;
    const std::int8_t* from[2] = {x + r * stride, x + (alone ? r : r + 1) * stride};
    if (k != 32 || alone) {
      std::memset(staged, 0, sizeof staged);
      std::memcpy(staged[0], from[0], k);
      if (!alone) std::memcpy(staged[1], from[1], k);
      from[0] = staged[0];
      from[1] = staged[1];
    }
    dots::pack_x(from[0], from[1], out);
  }
}

/// The results of one block to where they belong.
NIBBLE_ALWAYS_INLINE void write_rows(const IntGemmArgs& a, const std::int32_t* partial, const float* acc,
                                     std::size_t row0, std::size_t rows, std::size_t column) noexcept {
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t to = (row0 + r) * a.acc_stride + column;
    const std::size_t from = r / 2 * 16;
    Int in[4];
    Int out[2][2];
    for (int i = 0; i < 4; ++i)
      in[i] = a.raw != nullptr ? int_ops::load_int(partial + from + 4 * i) : int_ops::load_int(acc + from + 4 * i);
    dots::rows_of(in, out);
    for (std::size_t i = 0; i < 2; ++i) {
      if (a.raw != nullptr)
        int_ops::store_int(a.raw + to + 4 * i, out[r % 2][i]);
      else
        int_ops::store_int(a.acc + to + 4 * i, out[r % 2][i]);
    }
  }
}

template <class Weights>
inline void rows_by_panels(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  constexpr std::size_t block = pair_block * 16;
  alignas(16) std::int8_t x[pair_block * 64];
  alignas(16) std::uint8_t staged[chunk_units * Weights::unit_bytes];  // a chunk that ends before its 32 k
  alignas(16) std::int32_t partial[panel_block * 2 * block];
  alignas(16) float acc[panel_block * 2 * block];
  RowValues values;
  Params params[panel_block * 2];
  Pass pass;
  pass.pairs = (rows + 1) / 2;
  pass.x = x;
  pass.rows = &values;
  const PanelView& w = a.w;
  const Start first = w.symmetry == Symmetry::asymmetric ? Start::multiplied : Start::shifted;
  const bool has_offset = w.symmetry == Symmetry::float_offset;
  const End last = a.raw != nullptr        ? End::partial
                   : a.x_scales == nullptr ? (has_offset ? End::offset : End::scale)
                                           : (has_offset ? End::x_offset : End::x_scale);
  for (Params& p : params)
    for (int i = 0; i < 4; ++i) {
      p.scale[i] = p.offset[i] = int_ops::zero_float();
      p.zero[i] = int_ops::zero_int();
    }
  for (std::size_t p0 = a.panel_begin; p0 < a.panel_end; p0 += panel_block) {
    const std::size_t panels = a.panel_end - p0 < panel_block ? a.panel_end - p0 : panel_block;
    std::memset(acc, 0, sizeof acc);
    for (std::size_t g = 0; g < w.groups; ++g) {
      group_rows<Weights>(a, row0, rows, g, values);
      for (std::size_t h = 0; h < 2 * panels; ++h)
        load_params<Weights>(
            a, int_params::panel_at(a, p0 + h / 2).param + int_params::param_offset(a, g) + h % 2 * 8, params[h]);
      const std::size_t units = int_params::group_units(w, g);
      const std::size_t begin = g * w.group_size;
      for (std::size_t u = 0; u < units; u += chunk_units) {
        const std::size_t n = units - u < chunk_units ? units - u : chunk_units;
        const std::size_t k = begin + u * k_unit;
        pack_chunk(a.x + row0 * a.x_stride + k, a.x_stride, rows, n * k_unit, x);
        for (std::size_t p = 0; p < panels; ++p) {
          const std::uint8_t* codes = int_params::panel_at(a, p0 + p).codes + k / k_unit * Weights::unit_bytes;
          for (std::size_t line = 0; line < chunk_units * Weights::unit_bytes; line += 64)
            int_ops::prefetch(
                reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(codes) + line + prefetch_bytes));
          if (n != chunk_units) {
            std::memset(staged, 0, sizeof staged);
            std::memcpy(staged, codes, n * Weights::unit_bytes);
            codes = staged;
          }
          for (std::size_t h = 2 * p; h < 2 * p + 2; ++h) {
            pass.partial = partial + h * block;
            pass.acc = acc + h * block;
            pass_chunk<Weights>(codes + h % 2 * 32, params[h], u == 0 ? first : Start::partial,
                                u + n == units ? last : End::partial, pass);
          }
        }
      }
    }
    for (std::size_t h = 0; h < 2 * panels; ++h)
      write_rows(a, partial + h * block, acc + h * block, row0, rows, (p0 - a.panel_begin) * panel_width + 8 * h);
  }
}

// ---- one row -----------------------------------------------------------------------------------------------------

/// One row by Panels panels over the whole of k, all sums in registers, each weight unpacked where it is used.
template <class Row, int Panels>
inline void stream(const IntGemmArgs& a, std::size_t panel0) noexcept {
  constexpr int width = 4 * Panels;
  const PanelView& w = a.w;
  const std::uint8_t* codes[Panels];
  std::size_t params[width];  // of each register's channels
  Float acc[width];
#pragma GCC unroll 8
  for (std::size_t i = 0; i < width; ++i) {
    const int_params::Panel panel = int_params::panel_at(a, panel0 + i / 4);
    codes[i / 4] = panel.codes;
    params[i] = panel.param + i % 4 * 4;
    acc[i] = int_ops::zero_float();
  }
  const std::uint32_t factor = static_cast<std::uint32_t>(Row::bias) +
                               (w.symmetry == Symmetry::symmetric ? static_cast<std::uint32_t>(Row::zero) : 0U);
  const std::size_t out = (panel0 - a.panel_begin) * panel_width;
  std::int32_t* const raw = a.raw;
  const bool plain = a.x_scales == nullptr && w.symmetry != Symmetry::float_offset;
  const bool fp16 = w.scale_type == ScaleType::fp16;
  const auto* half_scales = static_cast<const std::uint16_t*>(w.scales);
  const std::int8_t* x = a.x;
  for (std::size_t g = 0; g < w.groups; ++g) {
    const Int sum = int_ops::set_int(a.x_sums[g]);
    const Int start =
        int_ops::set_int(static_cast<std::int32_t>(0U - factor * static_cast<std::uint32_t>(a.x_sums[g])));
    const std::size_t at = int_params::param_offset(a, g);
    Int d[Panels][4];
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i)
      d[i / 4][i % 4] =
          w.symmetry == Symmetry::asymmetric
              ? int_ops::sub(start, int_ops::mul(sum, int_ops::widen_s8(static_cast<const std::int8_t*>(w.zeros) +
                                                                        params[i] + at)))
              : start;
    for (std::size_t units = int_params::group_units(w, g); units != 0; --units, x += k_unit) {
#pragma GCC unroll 2
      for (int p = 0; p < Panels; ++p) {
        for (std::size_t line = 0; line < Row::unit_bytes; line += 64)
          int_ops::prefetch(
              reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(codes[p]) + line + prefetch_bytes));
        Row::unit(codes[p], x, d[p]);
        codes[p] += Row::unit_bytes;
      }
    }
    if (raw != nullptr) {
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i) int_ops::store_int(raw + out + 4 * i, d[i / 4][i % 4]);
      return;
    }
    if (plain && fp16) {
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i)
        acc[i] = int_ops::fma(int_ops::load_half(half_scales + params[i] + at), int_ops::to_float(d[i / 4][i % 4]),
                              acc[i]);
      continue;
    }
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
      const std::size_t param = params[i] + at;
      const Float scale = int_params::load_scale(w, param);
      if (plain)
        acc[i] = int_ops::fma(scale, int_ops::to_float(d[i / 4][i % 4]), acc[i]);
      else
        acc[i] = int_params::finish(a, scale, int_params::load_offset(w, param), d[i / 4][i % 4], g, acc[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < width; ++i) int_ops::store_float(a.acc + out + 4 * i, acc[i]);
}

template <class Weights, class Row>
NIBBLE_ALWAYS_INLINE void gemm(const IntGemmArgs& a) noexcept {
  if (a.raw != nullptr && a.w.groups == 0) return;
  if (a.rows == 1) {
    std::size_t p = a.panel_begin;
    for (; p + 2 <= a.panel_end; p += 2) stream<Row, 2>(a, p);
    if (p < a.panel_end) stream<Row, 1>(a, p);
    return;
  }
  for (std::size_t row0 = 0; row0 < a.rows; row0 += row_block)
    rows_by_panels<Weights>(a, row0, a.rows - row0 < row_block ? a.rows - row0 : row_block);
}

}  // namespace int_tiles

inline void gemm_w8a8(const IntGemmArgs& a) noexcept { int_tiles::gemm<dots::Weights8, dots::Row8>(a); }
inline void gemm_w4a8(const IntGemmArgs& a) noexcept { int_tiles::gemm<dots::Weights4, dots::Row4>(a); }
