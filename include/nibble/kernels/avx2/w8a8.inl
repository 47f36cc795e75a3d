// INT8 weights x INT8 activations on AVX2.

namespace w8a8 {

using int_ops::Float;
using int_ops::Int;
using int_params::Codes8;

inline constexpr std::size_t row_block = 32;
inline constexpr std::size_t panel_block = 2;
inline constexpr std::size_t k_block = 256;   // k of a panel that lie widened in L1
inline constexpr std::size_t direct_rows = 4; // up to here, weights are widened in registers

/// Where a panel's four registers of 4 k come from. Register 2h + i holds channels 8h + {2i, 2i+1 | 2i+4, 2i+5}.
struct FromCodes {
  const std::uint8_t* at;
  static constexpr std::size_t step = 64;
  NIBBLE_ALWAYS_INLINE void load(std::size_t offset, Int (&w)[4]) const noexcept {
    const Int b0 = int_ops::load_int(at + offset);
    const Int b1 = int_ops::load_int(at + offset + 32);
    w[0] = int_ops::widen_low(b0);
    w[1] = int_ops::widen_high(b0);
    w[2] = int_ops::widen_low(b1);
    w[3] = int_ops::widen_high(b1);
  }
};
struct FromWidened {
  const std::uint8_t* at;
  static constexpr std::size_t step = 128;
  NIBBLE_ALWAYS_INLINE void load(std::size_t offset, Int (&w)[4]) const noexcept {
#pragma GCC unroll 4
    for (std::size_t j = 0; j < 4; ++j) w[j] = int_ops::load_int(at + offset + 32 * j);
  }
};

/// k of one group that lie in one block of k.
struct Segment {
  std::size_t group = 0;
  std::size_t begin = 0;  // from the block's start
  std::size_t quads = 0;  // of 4 k
  bool first = false;     // of the group
  bool last = false;
};

/// Rows x one panel over one segment.
template <int Rows, class Source>
NIBBLE_ALWAYS_INLINE void tile(const IntGemmArgs& a, std::size_t row, const Source& source, const Segment& segment,
                               const std::int16_t* x, std::size_t param, bool fused, Int shift, std::int32_t* partial,
                               float* acc) noexcept {
  Int d[Rows][4];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) d[r][j] = int_ops::zero_int();
  }
  std::size_t offset = segment.begin / 4 * Source::step;
  x += segment.begin;
  for (std::size_t q = 0; q < segment.quads; ++q, offset += Source::step, x += 4) {
    Int w[4];
    source.load(offset, w);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Int b = int_ops::broadcast8(x + static_cast<std::size_t>(r) * k_block);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) int_ops::add_dot32(d[r][j], w[j], b);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const std::size_t sum_index = (row + static_cast<std::size_t>(r)) * a.sums_stride + segment.group;
#pragma GCC unroll 4
    for (int h = 0; h < 2; ++h) {
      std::int32_t* part = partial + 16 * r + 8 * h;
      float* to = acc + 16 * r + 8 * h;
      const std::size_t at = param + static_cast<std::size_t>(8 * h);
      Int sum = int_ops::fold(d[r][2 * h], d[r][2 * h + 1]);
      if (!segment.first) sum = int_ops::add(sum, int_ops::load_int(part));
      else if (a.w.symmetry != Symmetry::asymmetric)
        sum = int_ops::add(sum, int_params::start_shifted(a.x_sums + sum_index, shift));
      else
        sum = int_ops::add(sum, int_params::start_multiplied(a.x_sums + sum_index,
                                                             int_params::total_zero<Codes8>(a.w, at)));
      if (!segment.last || a.raw != nullptr) {
        int_ops::store_int(part, sum);
        continue;
      }
      const Float scale = int_params::load_scale(a.w, at);
      if (fused)
        int_ops::store_float(to, int_ops::fma(scale, int_ops::to_float(sum), int_ops::load_float(to)));
      else
        int_ops::store_float(to, int_params::finish(a, scale, int_params::load_offset(a.w, at), sum, sum_index,
                                                    int_ops::load_float(to)));
    }
  }
}

inline void block(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  alignas(32) std::int16_t x16[row_block * k_block];
  alignas(32) std::uint8_t widened[k_block * 32];
  alignas(32) std::int32_t partial[panel_block * row_block * 16];
  alignas(32) float acc[panel_block * row_block * 16];
  const bool fused = a.x_scales == nullptr && a.w.symmetry != Symmetry::float_offset;
  const Int shift = int_params::bias_shift<Codes8>(a.w.symmetry);
  // Groups up to k_block lie within one block, longer ones begin one.
  const std::size_t group = a.w.group_size;
  const std::size_t step = group <= k_block ? k_block / group * group : k_block;

  for (std::size_t p0 = a.panel_begin; p0 < a.panel_end; p0 += panel_block) {
    const std::size_t p1 = p0 + panel_block < a.panel_end ? p0 + panel_block : a.panel_end;
    for (std::size_t i = 0; i < panel_block * rows * 2; ++i) int_ops::store_float(acc + 8 * i, int_ops::zero_float());
    std::size_t g0 = 0;  // the block's first group
    for (std::size_t k0 = 0; k0 < a.w.k_padded;) {
      const std::size_t limit = group <= k_block ? a.w.k_padded : (g0 + 1) * group;
      std::size_t k1 = k0 + step < limit ? k0 + step : limit;
      if (k1 > a.w.k_padded) k1 = a.w.k_padded;
      for (std::size_t r = 0; r < rows; ++r) {
        const std::int8_t* from = a.x + (row0 + r) * a.x_stride + k0;
        std::int16_t* to = x16 + r * k_block;
        std::size_t k = 0;
        for (; k + 16 <= k1 - k0; k += 16) int_ops::store_int(to + k, int_ops::widen_s8_s16(from + k));
        for (; k < k1 - k0; ++k) to[k] = from[k];
      }
      for (std::size_t p = p0; p < p1; ++p) {
        const int_params::Panel panel = int_params::panel_at(a, p);
        const std::uint8_t* codes = panel.codes + k0 / k_unit * Codes8::unit_bytes;
        if (rows > direct_rows)
          for (std::size_t k = 0; k < k1 - k0; k += 4) {
            Int w[4];
            FromCodes{codes}.load(16 * k, w);
            for (std::size_t j = 0; j < 4; ++j) int_ops::store_int(widened + 32 * k + 32 * j, w[j]);
          }
        for (std::size_t k = k0, g = g0; k < k1; ++g) {
          std::size_t end = (g + 1) * group;
          Segment segment;
          segment.last = end <= k1 || k1 == a.w.k_padded;
          if (end > k1) end = k1;
          segment.group = g;
          segment.begin = k - k0;
          segment.quads = (end - k) / 4;
          segment.first = k == g * group;
          k = end;
          const std::size_t param = panel.param + g * a.scale_group_stride;
          std::int32_t* part = partial + (p - p0) * rows * 16;
          float* to = acc + (p - p0) * rows * 16;
          std::size_t r = 0;
          const auto run = [&](auto source) {
            for (; r + 2 <= rows; r += 2)
              tile<2>(a, row0 + r, source, segment, x16 + r * k_block, param, fused, shift, part + 16 * r, to + 16 * r);
            if (r < rows)
              tile<1>(a, row0 + r, source, segment, x16 + r * k_block, param, fused, shift, part + 16 * r, to + 16 * r);
          };
          if (rows > direct_rows) run(FromWidened{widened});
          else run(FromCodes{codes});
        }
      }
      k0 = k1;
      g0 = k1 / group;
    }
    for (std::size_t p = p0; p < p1; ++p)
      for (std::size_t r = 0; r < rows; ++r) {
        const std::size_t out = (row0 + r) * a.acc_stride + (p - a.panel_begin) * panel_width;
        const std::size_t from = ((p - p0) * rows + r) * 16;
        for (std::size_t h = 0; h < 16; h += 8) {
          if (a.raw != nullptr) int_ops::store_int(a.raw + out + h, int_ops::load_int(partial + from + h));
          else int_ops::store_float(a.acc + out + h, int_ops::load_float(acc + from + h));
        }
      }
  }
}

}  // namespace w8a8

inline void gemm_w8a8(const IntGemmArgs& a) noexcept {
  for (std::size_t row0 = 0; row0 < a.rows; row0 += w8a8::row_block)
    w8a8::block(a, row0, a.rows - row0 < w8a8::row_block ? a.rows - row0 : w8a8::row_block);
}
