// INT8 weights x INT8 activations on AVX2.
//
// Exact for every code: both sides widened to int16, pmaddwd. A block of 256 k of x (up to 32 rows) and of one
// panel's weights is widened into L1, [k/2][16][2], and passed over in tiles of up to 6 rows x 16 channels: 12
// accumulators, 2 weights, a broadcast and a product fill the 16 registers. Up to 4 rows the weights are widened in
// registers instead, and where the whole of k of x fits L1 the panels are passed over one after the other. Port
// arithmetic for 6 rows x 2 k: 12 pmaddwd on two pipes, 12 paddd on the rest, 8 loads on two: 6 cycles, the pmaddwd
// loop itself; widening and ends of blocks cost the rest. Measured, Zen 5 (EPYC), one core, 2026-11-23, N = K = 4096,
// the pmaddwd loop 212 GOP/s: one group: M = 512 174-188, 64 178-188, 16 181-187, 8 156-167, 4 170, 2 173, 1 131 (65
// GB/s, L3); groups of 32: M = 512 149, 1 83-105. M = 1 from DRAM (16384 x 8192): 36 GB/s, 35 with groups of 32 and
// scales of x, where the best read loop does 36 and 36.

namespace w8a8 {

using int_ops::Float;
using int_ops::Int;
using int_params::Codes8;

inline constexpr std::size_t row_block = 32;
inline constexpr std::size_t panel_block = 2;
inline constexpr std::size_t k_block = 256;    // k of a panel that lie widened in L1
inline constexpr std::size_t direct_rows = 4;  // up to here, weights are widened in registers
inline constexpr std::size_t tile_rows = 6;
inline constexpr std::size_t prefetch_bytes = 8192;
inline constexpr std::size_t param_prefetch = 1024;
inline constexpr std::size_t direct_k = 16384;  // k of all rows that lie widened at once

/// k of one group that lie in one block of k.
struct Segment {
  std::size_t group = 0;
  std::size_t begin = 0;  // from the block's start
  std::size_t size = 0;   // a multiple of 8
  std::size_t param = 0;  // the group's first lane in scales and zeros
  bool first = false;     // of the group
  bool last = false;
};

/// What all tiles of a call share.
struct Call {
  const IntGemmArgs& a;
  bool fused;  // nothing but acc = fma(scale, D, acc) at a group's end
  Int shift;
};

/// k in [begin, end) of one panel, of which `first_group` is the first.
struct Block {
  std::size_t begin = 0;
  std::size_t end = 0;
  std::size_t first_group = 0;
  std::size_t param = 0;                // the panel's first lane in scales and zeros
  const std::uint8_t* codes = nullptr;  // from begin on
  const std::int16_t* widened = nullptr;
};

/// The group's part of a block that starts at k.
NIBBLE_ALWAYS_INLINE Segment segment_at(const IntGemmArgs& a, const Block& block, std::size_t g,
                                        std::size_t k) noexcept {
  const std::size_t group_begin = g * a.w.group_size;
  const std::size_t group_end =
      group_begin + a.w.group_size < a.w.k_padded ? group_begin + a.w.group_size : a.w.k_padded;
  const std::size_t stop = group_end < block.end ? group_end : block.end;
  Segment segment;
  segment.group = g;
  segment.begin = k - block.begin;
  segment.size = stop - k;
  segment.param = block.param + int_params::param_offset(a, g);
  segment.first = k == group_begin;
  segment.last = stop == group_end;
  return segment;
}

/// What D of 8 channels starts from.
NIBBLE_ALWAYS_INLINE Int start(const Call& call, const Segment& segment, std::size_t row, int half,
                               const std::int32_t* partial) noexcept {
  if (!segment.first) return int_ops::load_int(partial);
  const std::int32_t* sum = call.a.x_sums + row * call.a.sums_stride + segment.group;
  if (call.a.w.symmetry != Symmetry::asymmetric) return int_params::start_shifted(sum, call.shift);
  return int_params::start_multiplied(
      sum, int_params::total_zero<Codes8>(call.a.w, segment.param + 8 * static_cast<std::size_t>(half)));
}

/// Where D of 8 channels goes.
template <int Rows>
NIBBLE_ALWAYS_INLINE void end(const Call& call, const Segment& segment, std::size_t row, const Int (&d)[Rows][2],
                              std::int32_t* partial, float* acc) noexcept {
  const bool keep = !segment.last || call.a.raw != nullptr;
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h, partial += 8, acc += 8) {
    if (keep) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) int_ops::store_int(partial + 16 * r, d[r][h]);
      continue;
    }
    const std::size_t at = segment.param + 8 * static_cast<std::size_t>(h);
    const Float scale = int_params::load_scale(call.a.w, at);
    if (call.fused) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
        int_ops::store_float(acc + 16 * r,
                             int_ops::fma(scale, int_ops::to_float(d[r][h]), int_ops::load_float(acc + 16 * r)));
      continue;
    }
    const Float offset = int_params::load_offset(call.a.w, at);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
      int_ops::store_float(
          acc + 16 * r,
          int_params::finish(call.a, scale, offset, d[r][h],
                             (row + static_cast<std::size_t>(r)) * call.a.sums_stride + segment.group,
                             int_ops::load_float(acc + 16 * r)));
  }
}

/// Rows x one panel over a block, weights widened to [k/2][16][2] int16.
template <int Rows>
inline void tile(const Call& call, const Block& block, std::size_t row, const std::int16_t* x,
                 std::int32_t* partial, float* acc) noexcept {
  const std::int16_t* w = block.widened;
  for (std::size_t k = block.begin, g = block.first_group; k < block.end; ++g) {
    const Segment segment = segment_at(call.a, block, g, k);
    Int d[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
        d[r][h] = start(call, segment, row + static_cast<std::size_t>(r), h, partial + 16 * r + 8 * h);
    }
    for (std::size_t i = 0; i < segment.size; i += 2, w += 32, x += 2) {
      const Int w0 = int_ops::load_int(w);
      const Int w1 = int_ops::load_int(w + 16);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        Int b = int_ops::broadcast4(x + static_cast<std::size_t>(r) * k_block);
        int_ops::add_dot32(d[r][0], w0, b);
        int_ops::add_dot32_last(d[r][1], w1, b);
      }
    }
    end<Rows>(call, segment, row, d, partial, acc);
    k += segment.size;
  }
}

/// The same with weights that are widened on the way: for so few rows that nothing is gained by keeping them.
template <int Rows>
inline void tile_direct(const Call& call, const Block& block, std::size_t row, const std::int16_t* x,
                        std::size_t x_stride, std::int32_t* partial, float* acc) noexcept {
  const std::uint8_t* codes = block.codes;
  for (std::size_t k = block.begin, g = block.first_group; k < block.end; ++g) {
    const Segment segment = segment_at(call.a, block, g, k);
    if (g % 2 == 0 && call.a.raw == nullptr) {
      const std::size_t ahead = segment.param * (call.a.w.scale_type == ScaleType::fp32 ? 4 : 2) + param_prefetch;
      int_ops::prefetch(static_cast<const char*>(call.a.w.scales) + ahead);
      if (call.a.w.symmetry == Symmetry::float_offset)
        int_ops::prefetch(static_cast<const char*>(call.a.w.zeros) + ahead);
    }
    Int d[Rows][4];  // channels {0, 1 | 4, 5}, {2, 3 | 6, 7} of both halves, sums of even and odd pairs of k
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) d[r][j] = int_ops::zero_int();
    }
    for (std::size_t i = 0; i < segment.size; i += 4, codes += 64, x += 4) {
      int_ops::prefetch(codes + prefetch_bytes);
      Int b[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) b[r] = int_ops::broadcast8(x + static_cast<std::size_t>(r) * x_stride);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const Int bytes = int_ops::load_int(codes + 32 * h);
        const Int w0 = int_ops::widen_low(bytes);
        const Int w1 = int_ops::widen_high(bytes);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          int_ops::add_dot32(d[r][2 * h], w0, b[r]);
          int_ops::add_dot32(d[r][2 * h + 1], w1, b[r]);
        }
      }
    }
    Int sums[Rows][2];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
        sums[r][h] =
            int_ops::add(int_ops::fold(d[r][2 * h], d[r][2 * h + 1]),
                         start(call, segment, row + static_cast<std::size_t>(r), h, partial + 16 * r + 8 * h));
    }
    end<Rows>(call, segment, row, sums, partial, acc);
    k += segment.size;
  }
}

/// k of one panel, a multiple of 8, to int16 in the order that `tile` reads.
inline void widen(const std::uint8_t* codes, std::size_t k, std::int16_t* out) noexcept {
  for (; k != 0; k -= 4, codes += 64, out += 64) {
    int_ops::prefetch(codes + k_block * 16);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const Int bytes = int_ops::load_int(codes + 32 * h);
      const Int low = int_ops::widen_low(bytes);
      const Int high = int_ops::widen_high(bytes);
      int_ops::store_int(out + 16 * h, int_ops::even_lanes(low, high));
      int_ops::store_int(out + 16 * h + 32, int_ops::odd_lanes(low, high));
    }
  }
}

/// All rows over one block, in tiles of nearly equal height.
inline void rows_pass(const Call& call, const Block& block, std::size_t row0, std::size_t rows,
                      const std::int16_t* x, std::int32_t* partial, float* acc) noexcept {
  const bool direct = rows <= direct_rows;
  const std::size_t most = direct ? 2 : tile_rows;
  std::size_t tiles = (rows + most - 1) / most;
  for (std::size_t r = 0; r < rows; --tiles) {
    const std::size_t height = (rows - r + tiles - 1) / tiles;
    const std::int16_t* xr = x + r * k_block;
    std::int32_t* part = partial + 16 * r;
    float* to = acc + 16 * r;
    if (direct) {
      if (height == 2)
        tile_direct<2>(call, block, row0 + r, xr, k_block, part, to);
      else
        tile_direct<1>(call, block, row0 + r, xr, k_block, part, to);
    } else {
      switch (height) {
        case 6: tile<6>(call, block, row0 + r, xr, part, to); break;
        case 5: tile<5>(call, block, row0 + r, xr, part, to); break;
        case 4: tile<4>(call, block, row0 + r, xr, part, to); break;
        default: tile<3>(call, block, row0 + r, xr, part, to); break;
      }
    }
    r += height;
  }
}

/// A row's k in [begin, end) to int16; a multiple of 8 of them.
inline void widen_x(const std::int8_t* from, std::size_t count, std::int16_t* to) noexcept {
  std::size_t k = 0;
  for (; k + 16 <= count; k += 16) int_ops::store_int(to + k, int_ops::widen_s8_s16(from + k));
  for (; k < count; ++k) to[k] = from[k];
}

/// Few rows of which the whole of k lies widened: one panel after the other, so that weights, scales and offsets are
/// one sequential stream each.
inline void direct_panels(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  alignas(32) std::int16_t x16[direct_k];
  alignas(32) std::int32_t partial[direct_rows * 16];
  alignas(32) float acc[direct_rows * 16];
  const Call call{a, a.x_scales == nullptr && a.w.symmetry != Symmetry::float_offset,
                  int_params::bias_shift<Codes8>(a.w.symmetry)};
  const std::size_t k = a.w.k_padded;
  for (std::size_t r = 0; r < rows; ++r) widen_x(a.x + (row0 + r) * a.x_stride, k, x16 + r * k);
  for (std::size_t p = a.panel_begin; p < a.panel_end; ++p) {
    const int_params::Panel panel = int_params::panel_at(a, p);
    const Block block{0, k, 0, panel.param, panel.codes, nullptr};
    for (std::size_t i = 0; i < rows * 2; ++i) int_ops::store_float(acc + 8 * i, int_ops::zero_float());
    std::size_t r = 0;
    for (; r + 2 <= rows; r += 2)
      tile_direct<2>(call, block, row0 + r, x16 + r * k, k, partial + 16 * r, acc + 16 * r);
    if (r < rows) tile_direct<1>(call, block, row0 + r, x16 + r * k, k, partial + 16 * r, acc + 16 * r);
    for (r = 0; r < rows; ++r) {
      const std::size_t out = (row0 + r) * a.acc_stride + (p - a.panel_begin) * panel_width;
      for (std::size_t h = 0; h < 16; h += 8) {
        if (a.raw != nullptr)
          int_ops::store_int(a.raw + out + h, int_ops::load_int(partial + 16 * r + h));
        else
          int_ops::store_float(a.acc + out + h, int_ops::load_float(acc + 16 * r + h));
      }
    }
  }
}

inline void all_panels(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  alignas(32) std::int16_t x16[row_block * k_block];
  alignas(32) std::int16_t widened[k_block * 16];
  alignas(32) std::int32_t partial[panel_block * row_block * 16];
  alignas(32) float acc[panel_block * row_block * 16];
  const Call call{a, a.x_scales == nullptr && a.w.symmetry != Symmetry::float_offset,
                  int_params::bias_shift<Codes8>(a.w.symmetry)};
  // Groups up to k_block lie within one block, longer ones begin one.
  const std::size_t group = a.w.group_size;
  const std::size_t step = group <= k_block ? k_block / group * group : k_block;

  for (std::size_t p0 = a.panel_begin; p0 < a.panel_end; p0 += panel_block) {
    const std::size_t p1 = p0 + panel_block < a.panel_end ? p0 + panel_block : a.panel_end;
    for (std::size_t i = 0; i < panel_block * rows * 2; ++i)
      int_ops::store_float(acc + 8 * i, int_ops::zero_float());
    std::size_t g0 = 0;  // the block's first group
    for (std::size_t k0 = 0; k0 < a.w.k_padded;) {
      const std::size_t limit = group <= k_block ? a.w.k_padded : (g0 + 1) * group;
      std::size_t k1 = k0 + step < limit ? k0 + step : limit;
      if (k1 > a.w.k_padded) k1 = a.w.k_padded;
      for (std::size_t r = 0; r < rows; ++r)
        widen_x(a.x + (row0 + r) * a.x_stride + k0, k1 - k0, x16 + r * k_block);
      for (std::size_t p = p0; p < p1; ++p) {
        const int_params::Panel panel = int_params::panel_at(a, p);
        const Block block{k0, k1, g0, panel.param, panel.codes + k0 / k_unit * Codes8::unit_bytes, widened};
        if (rows > direct_rows) widen(block.codes, k1 - k0, widened);
        rows_pass(call, block, row0, rows, x16, partial + (p - p0) * rows * 16, acc + (p - p0) * rows * 16);
      }
      k0 = k1;
      g0 = k1 / group;
    }
    for (std::size_t p = p0; p < p1; ++p)
      for (std::size_t r = 0; r < rows; ++r) {
        const std::size_t out = (row0 + r) * a.acc_stride + (p - a.panel_begin) * panel_width;
        const std::size_t from = ((p - p0) * rows + r) * 16;
        for (std::size_t h = 0; h < 16; h += 8) {
          if (a.raw != nullptr)
            int_ops::store_int(a.raw + out + h, int_ops::load_int(partial + from + h));
          else
            int_ops::store_float(a.acc + out + h, int_ops::load_float(acc + from + h));
        }
      }
  }
}

}  // namespace w8a8

inline void gemm_w8a8(const IntGemmArgs& a) noexcept {
  using namespace w8a8;
  for (std::size_t row0 = 0; row0 < a.rows; row0 += row_block) {
    const std::size_t rows = a.rows - row0 < row_block ? a.rows - row0 : row_block;
    if (rows <= direct_rows && rows * a.w.k_padded <= direct_k)
      direct_panels(a, row0, rows);
    else
      all_panels(a, row0, rows);
  }
}
