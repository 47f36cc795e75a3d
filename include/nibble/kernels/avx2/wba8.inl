// INT2, INT3, INT5 and INT6 weights x INT8 activations, one row, on AVX2; more rows multiply expanded codes.
//
// u8 x s8 by maddubs. Sums of int16 hold 4 of up to 5 bits (4 * 2 * 31 * 128 = 31,744) and 2 of 6 bits (32,256) before they
// are widened. Measured, Zen 5 (EPYC), one core, 2026-11-23, 8192 x 8192 in DRAM, groups of 64 with integer zero points,
// GB/s: int2 29, int3 21, int5 34, int6 39, where int4 does 44 and the read loop 41: all but int6 are bound by their logic.

namespace bit_lines {

using int_ops::Float;
using int_ops::Int;

/// One row times all panels of a call, panel after panel; what a group ends with is chosen at run time.
template <unsigned Bits>
inline void line(const IntGemmArgs& args, std::size_t row) noexcept {
  using Weights = int_params::BitCodes<Bits>;
  const IntGemmArgs a = args;
  const PanelView& w = a.w;
  const Int shift = int_params::bias_shift<Weights>(w.symmetry);
  for (std::size_t p = a.panel_begin; p < a.panel_end; ++p) {
    const int_params::Panel panel = int_params::panel_at(a, p);
    const std::uint8_t* codes = panel.codes;
    const std::int8_t* x = a.x + row * a.x_stride;
    std::size_t sum = row * a.sums_stride;
    Float acc[2] = {int_ops::zero_float(), int_ops::zero_float()};
    Int d[2] = {int_ops::zero_int(), int_ops::zero_int()};
    std::size_t units_left = w.k_padded / bits_k_unit;
    const std::size_t group_units = w.group_size / bits_k_unit;
    for (std::size_t g = 0; units_left != 0; ++g, ++sum) {
      const std::size_t param = panel.param + int_params::param_offset(a, g);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
        d[h] = w.symmetry == Symmetry::asymmetric
                   ? int_params::start_multiplied(
                         a.x_sums + sum,
                         int_params::total_zero<Weights>(w, param + static_cast<std::size_t>(h) * int_ops::lanes))
                   : int_params::start_shifted(a.x_sums + sum, shift);
      std::size_t units = units_left > group_units ? group_units : units_left;
      units_left -= units;
      for (; units != 0; --units, codes += Weights::unit_bytes, x += bits_k_unit) {
#pragma GCC unroll 3
        for (std::size_t at = 0; at < Weights::unit_bytes; at += 64)
          int_ops::prefetch(codes + at + w4a8::stream_prefetch);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          Int u[4];
          Weights::load(codes, h, u);
          Int low = int_ops::dot16(u[0], int_ops::broadcast4(x));
          int_ops::add_dot16(low, u[1], int_ops::broadcast4(x + 4));
          if constexpr (Bits < 6) {
            int_ops::add_dot16(low, u[2], int_ops::broadcast4(x + 8));
            int_ops::add_dot16(low, u[3], int_ops::broadcast4(x + 12));
          } else {
            Int high = int_ops::dot16(u[2], int_ops::broadcast4(x + 8));
            int_ops::add_dot16(high, u[3], int_ops::broadcast4(x + 12));
            d[h] = int_ops::add(d[h], int_ops::pair_sums(high));
          }
          d[h] = int_ops::add(d[h], int_ops::pair_sums(low));
        }
      }
      if (a.raw != nullptr) continue;
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const std::size_t at = param + static_cast<std::size_t>(h) * int_ops::lanes;
        acc[h] = int_params::finish(a, int_params::load_scale(w, at), int_params::load_offset(w, at), d[h], sum,
                                    acc[h]);
      }
    }
    const std::size_t out = row * a.acc_stride + (p - a.panel_begin) * panel_width;
    for (std::size_t h = 0; h < 2; ++h) {
      if (a.raw != nullptr)
        int_ops::store_int(a.raw + out + h * int_ops::lanes, d[h]);
      else
        int_ops::store_float(a.acc + out + h * int_ops::lanes, acc[h]);
    }
  }
}

}  // namespace bit_lines

inline void gemm_bits(const IntGemmArgs& a) noexcept {
  for (std::size_t row = 0; row < a.rows; ++row) switch (bits_of(a.w.format)) {
      case 2: bit_lines::line<2>(a, row); break;
      case 3: bit_lines::line<3>(a, row); break;
      case 5: bit_lines::line<5>(a, row); break;
      default: bit_lines::line<6>(a, row); break;
    }
}
