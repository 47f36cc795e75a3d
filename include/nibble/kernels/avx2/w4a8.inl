// INT4 weights x INT8 activations on AVX2.

namespace w4a8 {

using int_ops::Float;
using int_ops::Int;
using int_params::Codes4;

inline constexpr std::size_t row_block = 64;
inline constexpr std::size_t panel_block = 4;
inline constexpr std::size_t few_rows = row_block / panel_block;  // up to here, panels go in blocks

enum class Start { sums, partial };
enum class End { partial, scale, offset };

/// One pass of all rows over the weights in the registers.
struct RowPass {
  const std::int8_t* x = nullptr;
  std::size_t x_stride = 0;
  const std::int32_t* sums = nullptr;
  std::size_t sums_stride = 0;
  std::size_t rows = 0;
  std::int32_t* partial = nullptr;  // [rows][8]
  float* acc = nullptr;             // [rows][8]
};

template <int Rows, int Dots, Start start, End end>
NIBBLE_ALWAYS_INLINE void rows_step(const Int (&w)[Dots], Float scale, Float offset, Int shift,
                                    RowPass& pass) noexcept {
  Int d[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Dots; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Int b = int_ops::broadcast4(pass.x + static_cast<std::size_t>(r) * pass.x_stride + 4 * i);
      if (i == 0) d[r] = int_ops::dot16(w[i], b);
      else int_ops::add_dot16(d[r], w[i], b);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const std::int32_t* sum = pass.sums + static_cast<std::size_t>(r) * pass.sums_stride;
    d[r] = int_ops::pair_sums(d[r]);
    if (start == Start::sums)
      d[r] = int_ops::sub(d[r], int_ops::shift_left(int_ops::broadcast4(sum), shift));
    else
      d[r] = int_ops::add(d[r], int_ops::load_int(pass.partial + 8 * r));
    if (end == End::partial) {
      int_ops::store_int(pass.partial + 8 * r, d[r]);
    } else {
      Float f = int_ops::fma(scale, int_ops::to_float(d[r]), int_ops::load_float(pass.acc + 8 * r));
      if (end == End::offset) f = int_ops::fma(offset, int_ops::to_float(int_ops::broadcast4(sum)), f);
      int_ops::store_float(pass.acc + 8 * r, f);
    }
  }
  pass.x += static_cast<std::size_t>(Rows) * pass.x_stride;
  pass.sums += static_cast<std::size_t>(Rows) * pass.sums_stride;
  pass.partial += 8 * Rows;
  pass.acc += 8 * Rows;
}

/// All rows over Dots x 4 k of half a panel.
template <int Dots, Start start, End end>
NIBBLE_ALWAYS_INLINE void rows_pass(const std::uint8_t* codes, Float scale, Float offset, Int shift,
                                    RowPass pass) noexcept {
  Int w[Dots];
#pragma GCC unroll 8
  for (int i = 0; i < Dots / 2; ++i) {
    const Int both = int_ops::load_int(codes + static_cast<std::size_t>(i) * Codes4::unit_bytes);
    w[2 * i] = int_ops::low_nibbles(both);
    w[2 * i + 1] = int_ops::high_nibbles(both);
  }
  constexpr int step = 2;
  std::size_t r = 0;
  for (; r + step <= pass.rows; r += step) rows_step<step, Dots, start, end>(w, scale, offset, shift, pass);
  for (; r < pass.rows; ++r) rows_step<1, Dots, start, end>(w, scale, offset, shift, pass);
}

/// One group of half a panel: acc = fma(scale, D, acc) and what else the variant asks for; raw: D stays in partial.
NIBBLE_ALWAYS_INLINE void half_group(const IntGemmArgs& a, std::size_t row0, std::size_t g, const std::uint8_t* codes,
                                     std::size_t param, bool fused, Int shift, RowPass pass) noexcept {
  std::size_t units = int_params::group_units(a.w, g);
  Float scale = int_ops::zero_float();
  Float offset = scale;
  if (a.raw == nullptr) {
    scale = int_params::load_scale(a.w, param);
    offset = int_params::load_offset(a.w, param);
  }
  const auto advance = [&](std::size_t n) {
    codes += n * Codes4::unit_bytes;
    pass.x += n * k_unit;
    units -= n;
  };
  if (fused && units % 4 == 0) {
    const bool has_offset = a.w.symmetry == Symmetry::float_offset;
    if (units == 4) {
      if (has_offset) rows_pass<8, Start::sums, End::offset>(codes, scale, offset, shift, pass);
      else rows_pass<8, Start::sums, End::scale>(codes, scale, offset, shift, pass);
      return;
    }
    rows_pass<8, Start::sums, End::partial>(codes, scale, offset, shift, pass);
    for (advance(4); units > 4; advance(4))
      rows_pass<8, Start::partial, End::partial>(codes, scale, offset, shift, pass);
    if (has_offset) rows_pass<8, Start::partial, End::offset>(codes, scale, offset, shift, pass);
    else rows_pass<8, Start::partial, End::scale>(codes, scale, offset, shift, pass);
    return;
  }
  if (a.w.symmetry == Symmetry::asymmetric) {
    const Int zero = int_params::total_zero<Codes4>(a.w, param);
    for (std::size_t r = 0; r < pass.rows; ++r)
      int_ops::store_int(pass.partial + 8 * r, int_params::start_multiplied(pass.sums + r * pass.sums_stride, zero));
  } else {
    for (std::size_t r = 0; r < pass.rows; ++r)
      int_ops::store_int(pass.partial + 8 * r, int_params::start_shifted(pass.sums + r * pass.sums_stride, shift));
  }
  for (; units >= 4; advance(4)) rows_pass<8, Start::partial, End::partial>(codes, scale, offset, shift, pass);
  for (; units > 0; advance(1)) rows_pass<2, Start::partial, End::partial>(codes, scale, offset, shift, pass);
  if (a.raw != nullptr) return;
  for (std::size_t r = 0; r < pass.rows; ++r)
    int_ops::store_float(pass.acc + 8 * r, int_params::finish(a, scale, offset, int_ops::load_int(pass.partial + 8 * r),
                                                              (row0 + r) * a.sums_stride + g,
                                                              int_ops::load_float(pass.acc + 8 * r)));
}

inline void block(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  alignas(32) std::int32_t partial[row_block * 8];
  alignas(32) float acc[row_block * 16];  // not a.acc, whose stride may put all rows in one cache set
  const bool fused = a.raw == nullptr && a.x_scales == nullptr && a.w.symmetry != Symmetry::asymmetric;
  const Int shift = int_params::bias_shift<Codes4>(a.w.symmetry);
  const std::size_t step = rows <= few_rows ? panel_block : 1;
  RowPass pass;
  pass.x_stride = a.x_stride;
  pass.sums_stride = a.sums_stride;
  pass.rows = rows;
  pass.partial = partial;
  for (std::size_t p0 = a.panel_begin; p0 < a.panel_end; p0 += step) {
    const std::size_t p1 = p0 + step < a.panel_end ? p0 + step : a.panel_end;
    for (std::size_t i = 0; i < (p1 - p0) * rows * 2; ++i) int_ops::store_float(acc + 8 * i, int_ops::zero_float());
    for (std::size_t g = 0; g < a.w.groups; ++g) {
      pass.x = a.x + row0 * a.x_stride + g * a.w.group_size;
      pass.sums = a.x_sums + row0 * a.sums_stride + g;
      for (std::size_t p = p0; p < p1; ++p) {
        const int_params::Panel panel = int_params::panel_at(a, p);
        const std::uint8_t* codes = panel.codes + g * a.w.group_size / k_unit * Codes4::unit_bytes;
        for (std::size_t half = 0; half < 2; ++half) {
          pass.acc = acc + ((p - p0) * 2 + half) * rows * 8;
          half_group(a, row0, g, codes + half * 32, panel.param + g * a.scale_group_stride + half * 8, fused, shift,
                     pass);
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

}  // namespace w4a8

inline void gemm_w4a8(const IntGemmArgs& a) noexcept {
  for (std::size_t row0 = 0; row0 < a.rows; row0 += w4a8::row_block)
    w4a8::block(a, row0, a.rows - row0 < w4a8::row_block ? a.rows - row0 : w4a8::row_block);
}
