// The loops that both integer kernels of this ISA are made of, over int_ops. `Weights` says how codes become the
// unsigned operand of a dot product (w8a8.inl, w4a8.inl). Included by table.hpp, in its region.
//
// Line: one row (2 to 4 where weights come from memory), panel after panel: codes, scales and offsets are read as one
// sequential stream each, which is what memory likes best, and panels of a few KB cost no new start. A broadcast of 4 k
// of x is the dot product's memory operand.
//
// Tile: 6 or 5 rows x 2 panels, 4 to 2 rows x 4, over the whole of k; more rows pass over the same panels again while
// these are in L2. No more panels than the chains of dot products need: panels are often a multiple of 4 KB apart, and
// loads at such distances get in each other's way in L1 (4 rows x 4 panels, from L1: 76 % of the dpbusd loop so, 87 %
// at other distances; 6 x 2: 87 % and 89 %).

namespace int_tiles {

using int_ops::Float;
using int_ops::Int;
using int_params::Panel;

inline constexpr std::size_t row_block = 64;  // rows that share one pass over the weights
inline constexpr std::size_t tile_rows = 6;
inline constexpr std::size_t panel_multiple = 4;      // what tiles of every height divide
inline constexpr std::size_t prefetch_bytes = 8192;   // codes, ahead of their use
inline constexpr std::size_t prefetch_params = 1024;  // scales and offsets

/// The float steps at a group's end: IntGemmArgs', without and with offsets, for one scale a row and (x_) for one a row
/// and group.
enum class End { scale, offset, x_scale, x_offset };

/// Scales and offsets of a panel: fp32 or fp16.
struct Params {
  const void* scales = nullptr;
  const void* offsets = nullptr;
  bool fp32 = false;
};

NIBBLE_ALWAYS_INLINE Params params_of(const PanelView& w) noexcept {
  return {w.scales, w.zeros, w.scale_type == ScaleType::fp32};
}
NIBBLE_ALWAYS_INLINE Float load_param(const void* base, bool fp32, std::size_t index) noexcept {
  if (fp32) return int_ops::load_float(static_cast<const float*>(base) + index);
  return int_ops::load_half(static_cast<const std::uint16_t*>(base) + index);
}
NIBBLE_ALWAYS_INLINE void prefetch_param(const void* base, bool fp32, std::size_t index) noexcept {
  int_ops::prefetch(static_cast<const char*>(base) + index * (fp32 ? 4 : 2) + prefetch_params);
}

/// IntGemmArgs' steps at the end of a group for one row and panel.
template <End end>
NIBBLE_ALWAYS_INLINE Float finish(Float scale, Float offset, Float d, Float sum, Float x_scale,
                                  Float acc) noexcept {
  if (end == End::scale) return int_ops::fma(scale, d, acc);
  if (end == End::offset) return int_ops::fma(offset, sum, int_ops::fma(scale, d, acc));
  Float t = int_ops::mul(scale, d);
  if (end == End::x_offset) t = int_ops::fma(offset, sum, t);
  return int_ops::fma(x_scale, t, acc);
}

// ---- line ------------------------------------------------------------------------------------------------------

/// What language models are made of: fp16 scales, no integer zero points, whole groups of a multiple of 32.
inline bool is_plain(const IntGemmArgs& a) noexcept {
  return a.raw == nullptr && a.w.scale_type == ScaleType::fp16 && a.w.symmetry != Symmetry::asymmetric &&
         a.w.group_size % 32 == 0 && a.w.k_padded % a.w.group_size == 0;
}

/// Rows from row0 on times all panels of a call. Low and high k of a single row are chains of their own. `plain`: is_plain(a).
template <class Weights, End end, int Rows, bool plain>
inline void line(const IntGemmArgs& a, std::size_t row0) noexcept {
  constexpr int chains = Rows == 1 ? 2 : 1;
  constexpr bool has_offset = end == End::offset || end == End::x_offset;
  constexpr bool scaled_x = end == End::x_scale || end == End::x_offset;
  const PanelView& w = a.w;
  const Params params = {w.scales, w.zeros, !plain && w.scale_type == ScaleType::fp32};
  const Int shift = int_params::bias_shift<Weights>(w.symmetry);
  const bool asymmetric = !plain && w.symmetry == Symmetry::asymmetric;
  const std::size_t x_stride = a.x_stride;
  const std::size_t sums_stride = a.sums_stride;
  const std::size_t group_units = w.group_size / k_unit;
  for (std::size_t p = a.panel_begin; p < a.panel_end; ++p) {
    const Panel panel = int_params::panel_at(a, p);
    const std::size_t out = row0 * a.acc_stride + (p - a.panel_begin) * panel_width;
    const std::uint8_t* codes = panel.codes;
    const std::int8_t* x = a.x + row0 * x_stride;
    const std::int32_t* sums = a.x_sums + row0 * sums_stride;
    const float* x_scales = scaled_x ? a.x_scales + row0 * sums_stride : nullptr;
    Float acc[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) acc[r] = int_ops::zero_float();
    std::size_t units_left = w.k_padded / k_unit;
    for (std::size_t g = 0; units_left != 0; ++g, ++sums) {
      const std::size_t param = panel.param + int_params::param_offset(a, g);
      Int low[Rows];
      Int high[Rows];
      if (asymmetric) {
        const Int zero = int_params::total_zero<Weights>(w, param);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
          low[r] = int_params::start_multiplied(sums + static_cast<std::size_t>(r) * sums_stride, zero);
      } else {
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
          low[r] = int_params::start_shifted(sums + static_cast<std::size_t>(r) * sums_stride, shift);
      }
      if (chains == 2) {
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) high[r] = int_ops::zero_int();
      }
      if (g % 2 == 0) {
        if (plain || a.raw == nullptr) prefetch_param(params.scales, params.fp32, param);
        if (has_offset) prefetch_param(params.offsets, params.fp32, param);
      }
      std::size_t units = plain || units_left > group_units ? group_units : units_left;
      units_left -= units;
      const auto unit = [&](const std::uint8_t* from, const std::int8_t* xs) {
#pragma GCC unroll 2
        for (std::size_t at = 0; at < Weights::unit_bytes; at += 64) int_ops::prefetch(from + at + prefetch_bytes);
        Int w0;
        Int w1;
        Weights::load(from, w0, w1);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          int_ops::dot_broadcast(low[r], w0, xs + static_cast<std::size_t>(r) * x_stride);
          int_ops::dot_broadcast(chains == 2 ? high[r] : low[r], w1,
                                 xs + static_cast<std::size_t>(r) * x_stride + 4);
        }
      };
      for (; units >= 4; units -= 4, codes += 4 * Weights::unit_bytes, x += 4 * k_unit) {
        unit(codes, x);
        unit(codes + Weights::unit_bytes, x + k_unit);
        unit(codes + 2 * Weights::unit_bytes, x + 2 * k_unit);
        unit(codes + 3 * Weights::unit_bytes, x + 3 * k_unit);
      }
      for (; !plain && units != 0; --units, codes += Weights::unit_bytes, x += k_unit) unit(codes, x);
      if (chains == 2) {
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) low[r] = int_ops::add(low[r], high[r]);
      }
      if (!plain && a.raw != nullptr) {
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
          int_ops::store_int(a.raw + out + static_cast<std::size_t>(r) * a.acc_stride, low[r]);
        break;
      }
      const Float scale = load_param(params.scales, params.fp32, param);
      const Float offset = has_offset ? load_param(params.offsets, params.fp32, param) : int_ops::zero_float();
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const std::size_t at = static_cast<std::size_t>(r) * sums_stride;
        const Float sum = has_offset ? int_ops::to_float(int_ops::broadcast4(sums + at)) : int_ops::zero_float();
        const Float x_scale = scaled_x ? int_ops::set_float(x_scales[at + g]) : int_ops::zero_float();
        acc[r] = finish<end>(scale, offset, int_ops::to_float(low[r]), sum, x_scale, acc[r]);
      }
    }
    if (!plain && a.raw != nullptr) continue;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
      int_ops::store_float(a.acc + out + static_cast<std::size_t>(r) * a.acc_stride, acc[r]);
  }
}

// ---- tile ------------------------------------------------------------------------------------------------------

/// Panels of a tile of some rows.
constexpr int panels_for(int rows) noexcept { return rows <= 4 ? 4 : 2; }

/// Rows from row0 on times the panels at panel0, panel0 + step, ..., over the whole of k. `fetch`: nobody has read
/// these weights just before.
template <class Weights, End end, int Rows>
inline void tile(const IntGemmArgs& a, std::size_t row0, std::size_t panel0, std::size_t step,
                 bool fetch) noexcept {
  constexpr int panels = panels_for(Rows);
  constexpr bool has_offset = end == End::offset || end == End::x_offset;
  constexpr bool scaled_x = end == End::x_scale || end == End::x_offset;
  const PanelView& w = a.w;
  const Params params = params_of(w);
  const Int shift = int_params::bias_shift<Weights>(w.symmetry);
  const Panel panel = int_params::panel_at(a, panel0);
  const std::size_t panel_stride = step * w.panel_bytes;
  const std::size_t param_stride = step * scale_groups(w.groups, a.group_shift) * panel_width;
  const std::uint8_t* codes = panel.codes;
  constexpr std::size_t tile_prefetch = panels == 2 ? 8192 : 2048;
  // Near a panel's end, what comes next is the next tile's: it lies behind all panels of this one.
  const std::uint8_t* const turn = codes + (w.panel_bytes < tile_prefetch ? 0 : w.panel_bytes - tile_prefetch);
  const std::size_t turned = (panels - 1) * w.panel_bytes;
  Float acc[Rows][panels];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < panels; ++p) acc[r][p] = int_ops::zero_float();
  }
  const std::int8_t* x = a.x + row0 * a.x_stride;
  const std::int32_t* sums = a.x_sums + row0 * a.sums_stride;
  const float* x_scales = scaled_x ? a.x_scales + row0 * a.sums_stride : nullptr;
  const std::size_t out = row0 * a.acc_stride + (panel0 - a.panel_begin) * panel_width;
  for (std::size_t g = 0; g < w.groups; ++g) {
    const std::size_t param = panel.param + int_params::param_offset(a, g);
    Int d[Rows][panels];
    if (w.symmetry == Symmetry::asymmetric) {
#pragma GCC unroll 4
      for (int p = 0; p < panels; ++p) {
        const Int zero = int_params::total_zero<Weights>(w, param + static_cast<std::size_t>(p) * param_stride);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          d[r][p] = int_params::start_multiplied(sums + static_cast<std::size_t>(r) * a.sums_stride + g, zero);
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Int start = int_params::start_shifted(sums + static_cast<std::size_t>(r) * a.sums_stride + g, shift);
#pragma GCC unroll 4
        for (int p = 0; p < panels; ++p) d[r][p] = start;
      }
    }
    if (fetch && g % 2 == 0) {
#pragma GCC unroll 4
      for (int p = 0; p < panels; ++p) {
        const std::size_t at = param + static_cast<std::size_t>(p) * param_stride;
        if (a.raw == nullptr) prefetch_param(params.scales, params.fp32, at);
        if (has_offset) prefetch_param(params.offsets, params.fp32, at);
      }
    }
    for (std::size_t u = int_params::group_units(w, g); u != 0; --u, x += k_unit, codes += Weights::unit_bytes) {
      if (fetch) {
        const std::size_t ahead = codes < turn ? tile_prefetch : tile_prefetch + turned;
#pragma GCC unroll 4
        for (std::size_t p = 0; p < panels; ++p) {
#pragma GCC unroll 2
          for (std::size_t at = 0; at < Weights::unit_bytes; at += 64)
            int_ops::prefetch(codes + p * panel_stride + at + ahead);
        }
      }
      if constexpr (Rows >= 5) {
        Weights::dot_low(d, codes, panel_stride, x, a.x_stride);
        Weights::dot_high(d, codes, panel_stride, x, a.x_stride);
      } else {
        Int b[Rows][2];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          b[r][0] = int_ops::broadcast4(x + static_cast<std::size_t>(r) * a.x_stride);
          b[r][1] = int_ops::broadcast4(x + static_cast<std::size_t>(r) * a.x_stride + 4);
        }
#pragma GCC unroll 4
        for (int p = 0; p < panels; ++p) {
          Int w0;
          Int w1;
          Weights::load(codes + static_cast<std::size_t>(p) * panel_stride, w0, w1);
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r) {
            int_ops::dot(d[r][p], w0, b[r][0]);
            int_ops::dot(d[r][p], w1, b[r][1]);
          }
        }
      }
    }
    if (a.raw != nullptr) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < panels; ++p)
          int_ops::store_int(a.raw + out + static_cast<std::size_t>(r) * a.acc_stride +
                                 static_cast<std::size_t>(p) * step * panel_width,
                             d[r][p]);
      }
      return;
    }
    Float scale[panels];
    Float offset[panels];
#pragma GCC unroll 4
    for (int p = 0; p < panels; ++p) {
      const std::size_t at = param + static_cast<std::size_t>(p) * param_stride;
      scale[p] = load_param(params.scales, params.fp32, at);
      offset[p] = has_offset ? load_param(params.offsets, params.fp32, at) : int_ops::zero_float();
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const std::size_t at = static_cast<std::size_t>(r) * a.sums_stride + g;
      const Float sum = has_offset ? int_ops::to_float(int_ops::broadcast4(sums + at)) : int_ops::zero_float();
      const Float x_scale = scaled_x ? int_ops::set_float(x_scales[at]) : int_ops::zero_float();
#pragma GCC unroll 4
      for (int p = 0; p < panels; ++p)
        acc[r][p] = finish<end>(scale[p], offset[p], int_ops::to_float(d[r][p]), sum, x_scale, acc[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < panels; ++p)
      int_ops::store_float(a.acc + out + static_cast<std::size_t>(r) * a.acc_stride +
                               static_cast<std::size_t>(p) * step * panel_width,
                           acc[r][p]);
  }
}

/// Rows from row0 on times panels [begin, end). The last few overlap with those before, which gives the same results
/// twice; where a call has too few panels, each one fills a tile of its own.
template <class Weights, End end, int Rows>
inline void tiles(const IntGemmArgs& a, std::size_t row0, std::size_t begin, std::size_t stop,
                  bool fetch) noexcept {
  constexpr std::size_t panels = panels_for(Rows);
  std::size_t p = begin;
  for (; p + panels <= stop; p += panels) tile<Weights, end, Rows>(a, row0, p, 1, fetch);
  if (p == stop) return;
  if (stop - a.panel_begin >= panels) return tile<Weights, end, Rows>(a, row0, stop - panels, 1, fetch);
  for (; p < stop; ++p) tile<Weights, end, Rows>(a, row0, p, 0, fetch);
}

/// At least two rows, in tiles of nearly equal height; these pass over a block of panels one after the other.
template <class Weights, End end>
inline void rows_pass(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  const std::size_t count = (rows + tile_rows - 1) / tile_rows;
  const std::size_t lowest = rows / count;
  const std::size_t higher = rows - lowest * count;  // tiles of one more
  const std::size_t block = count == 1 ? a.panel_end - a.panel_begin : lowest >= 5 ? 2 : 4;
  for (std::size_t p = a.panel_begin; p < a.panel_end; p += block) {
    const std::size_t stop = a.panel_end - p < block ? a.panel_end : p + block;
    std::size_t row = row0;
    for (std::size_t t = 0; t < count; ++t) {
      const bool fetch = t == 0;
      const std::size_t height = lowest + (t < higher ? 1 : 0);
      switch (height) {
        case 2: tiles<Weights, end, 2>(a, row, p, stop, fetch); break;
        case 3:
          // Three rows of int8 wait for their loads: under another tile the row before is computed twice.
          if (t != 0 && Weights::unit_bytes == 128)
            tiles<Weights, end, 4>(a, row - 1, p, stop, fetch);
          else
            tiles<Weights, end, 3>(a, row, p, stop, fetch);
          break;
        case 4: tiles<Weights, end, 4>(a, row, p, stop, fetch); break;
        case 5: tiles<Weights, end, 5>(a, row, p, stop, fetch); break;
        default: tiles<Weights, end, 6>(a, row, p, stop, fetch); break;
      }
      row += height;
    }
  }
}

template <class Weights, End end, int Rows>
inline void lines(const IntGemmArgs& a, std::size_t row, bool plain) noexcept {
  if (plain)
    line<Weights, end, Rows, true>(a, row);
  else
    line<Weights, end, Rows, false>(a, row);
}

/// Whether 2 to 4 rows are better off with lines: weights surely come from memory, and their bytes more than their
/// products take the time, or panels are too short for streams of their own to come up to speed.
inline bool prefers_lines(const PanelView& w, std::size_t rows) noexcept {
  constexpr std::size_t cached = std::size_t{24} << 20;
  constexpr std::size_t short_panel = 8192;
  if (w.panel_bytes <= short_panel) return true;
  return (rows == 2 || w.format == Format::int8) && (w.n + panel_width - 1) / panel_width * w.panel_bytes > cached;
}

template <class Weights, End end>
inline void all(const IntGemmArgs& a) noexcept {
  for (std::size_t row = 0; row < a.rows;) {
    const std::size_t rest = a.rows - row;
    const bool plain = is_plain(a);
    if (rest == 1) return lines<Weights, end, 1>(a, row, plain);
    if (rest <= 4 && prefers_lines(a.w, rest)) {
      switch (rest) {
        case 2: return lines<Weights, end, 2>(a, row, plain);
        case 3: return lines<Weights, end, 3>(a, row, plain);
        default: return lines<Weights, end, 4>(a, row, plain);
      }
    }
    // No row is left alone.
    const std::size_t rows = rest <= row_block ? rest : rest == row_block + 1 ? row_block - 1 : row_block;
    rows_pass<Weights, end>(a, row, rows);
    row += rows;
  }
}

/// The product of IntGemmArgs.
template <class Weights>
inline void gemm(const IntGemmArgs& a) noexcept {
  const bool has_offset = a.w.symmetry == Symmetry::float_offset;
  if (a.x_scales != nullptr)
    has_offset ? all<Weights, End::x_offset>(a) : all<Weights, End::x_scale>(a);
  else
    has_offset ? all<Weights, End::offset>(a) : all<Weights, End::scale>(a);
}

}  // namespace int_tiles
