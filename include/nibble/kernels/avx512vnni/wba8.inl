// INT2, INT3, INT5 and INT6 weights x INT8 activations, one row, on AVX-512 VNNI. More rows multiply codes that were
// expanded to nibbles or bytes, for in cache the wider formats' tiles are as fast as there are multipliers.
//
// Port arithmetic for 16 k of a panel, 32 bytes a bit: int2 1 load, 7 logic and shift operations, 4 dpbusd; int3 2 loads
// and 15; int5 3 and 15; int6 3 and 14: at most 19 on four pipes, 5 cycles for 64 to 192 bytes. DRAM at 40 GB/s and 4.1
// GHz gives 64 bytes in 6.6 cycles: it binds from int2 on. Measured, Zen 5 (EPYC), one core, 2026-11-23, 8192 x 8192 in
// DRAM, groups of 64 with integer zero points, GB/s of codes, scales and zeros: int2 45.6-48.5, int3 45.6, int5 45-46.5,
// int6 43.5-45.5, int4 47-48, int8 45-48, the read loop 41-44; time beside int4's: 0.55, 0.80, 1.27, 1.55 (bytes: 0.54,
// 0.77, 1.23, 1.46). Expanded, 4096 x 4096, 64 rows: int2 and int3 700 GOP/s (int4 753), int5 and int6 660 (int8 724); 4
// rows 430-470 and 280-300 (689 and 479).

namespace bit_lines {

using int_ops::Float;
using int_ops::Int;

/// One row times all panels of a call, panel after panel: what a group ends with is chosen at run time, for a branch that
/// always goes the same way costs nothing, and a variant of its own would have to be compiled.
template <unsigned Bits>
inline void line(const IntGemmArgs& args, std::size_t row) noexcept {
  using Weights = int_params::BitCodes<Bits>;
  const IntGemmArgs a = args;
  const PanelView& w = a.w;
  const Int shift = int_params::bias_shift<Weights>(w.symmetry);
  const bool asymmetric = w.symmetry == Symmetry::asymmetric;
  const std::size_t param_bytes = w.scale_type == ScaleType::fp32 ? 4 : 2;
  for (std::size_t p = a.panel_begin; p < a.panel_end; ++p) {
    const int_params::Panel panel = int_params::panel_at(a, p);
    const std::uint8_t* codes = panel.codes;
    const std::int8_t* x = a.x + row * a.x_stride;
    std::size_t sum = row * a.sums_stride;
    Float acc = int_ops::zero_float();
    Int d[4];
    std::size_t units_left = w.k_padded / bits_k_unit;
    const std::size_t group_units = w.group_size / bits_k_unit;
    for (std::size_t g = 0; units_left != 0; ++g, ++sum) {
      const std::size_t param = panel.param + int_params::param_offset(a, g);
      d[0] = asymmetric ? int_params::start_multiplied(a.x_sums + sum, int_params::total_zero<Weights>(w, param))
                        : int_params::start_shifted(a.x_sums + sum, shift);
      d[1] = d[2] = d[3] = int_ops::zero_int();
      if (g % 2 == 0 && a.raw == nullptr) {
        const std::size_t ahead = param * param_bytes + int_tiles::prefetch_params;
        int_ops::prefetch(static_cast<const char*>(w.scales) + ahead);
        if (w.symmetry == Symmetry::float_offset) int_ops::prefetch(static_cast<const char*>(w.zeros) + ahead);
      }
      std::size_t units = units_left > group_units ? group_units : units_left;
      units_left -= units;
      for (; units != 0; --units, codes += Weights::unit_bytes, x += bits_k_unit) {
#pragma GCC unroll 3
        for (std::size_t at = 0; at < Weights::unit_bytes; at += 64)
          int_ops::prefetch(codes + at + int_tiles::prefetch_bytes);
        Int u[4];
        Weights::load(codes, 0, u);
#pragma GCC unroll 4
        for (int m = 0; m < 4; ++m) int_ops::dot_broadcast(d[m], u[m], x + 4 * m);
      }
      d[0] = int_ops::add(int_ops::add(d[0], d[1]), int_ops::add(d[2], d[3]));
      if (a.raw != nullptr) continue;
      acc = int_params::finish(a, int_params::load_scale(w, param), int_params::load_offset(w, param), d[0], sum,
                               acc);
    }
    const std::size_t out = row * a.acc_stride + (p - a.panel_begin) * panel_width;
    if (a.raw != nullptr)
      int_ops::store_int(a.raw + out, d[0]);
    else
      int_ops::store_float(a.acc + out, acc);
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
