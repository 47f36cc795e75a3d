// INT2, INT3, INT5 and INT6 weights x INT8 activations, one row, on AVX-512 VNNI. More rows multiply codes that were
// expanded to nibbles or bytes, for in cache the wider formats' tiles are as fast as there are multipliers.
//
// Port arithmetic for 16 k of a panel, 32 bytes a bit: int2 1 load, 7 logic and shift operations, 4 dpbusd; int3 2 loads
// and 15; int5 3 and 15; int6 3 and 14: at most 19 on four pipes, 5 cycles for 64 to 192 bytes. DRAM at 40 GB/s and 4.1
// GHz gives 64 bytes in 6.6 cycles: it binds from int2 on.

namespace bit_lines {

using int_ops::Float;
using int_ops::Int;

/// 16 k of 16 channels in planes (kernels/args.hpp).
template <unsigned Bits>
struct Codes {
  static constexpr std::size_t unit_bytes = 32 * Bits;
  static constexpr std::int32_t bias = 0;
  static constexpr std::int32_t symmetric_shift = Bits - 1;
  static constexpr std::int32_t plain_shift = 32;

  static NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* p, Int (&w)[4]) noexcept {
    using namespace int_ops;
    if constexpr (Bits < 4) {
      const Int pairs = load_codes(p);
      w[0] = pairs;
      w[1] = shift_right_bits<2>(pairs);
      w[2] = shift_right_bits<4>(pairs);
      w[3] = shift_right_bits<6>(pairs);
      if constexpr (Bits == 2) {
#pragma GCC unroll 4
        for (int m = 0; m < 4; ++m) w[m] = and_bytes<3>(w[m]);
      } else {
        const Int top = load_top_bits(p + 64);
        w[0] = and_bytes<7>(select_bytes<3>(w[0], shift_left_bits<2>(top)));
        w[1] = and_bytes<7>(select_bytes<3>(w[1], shift_left_bits<1>(top)));
        w[2] = and_bytes<7>(select_bytes<3>(w[2], top));
        w[3] = and_bytes<7>(select_bytes<3>(w[3], shift_right_bits<1>(top)));
      }
    } else {
      const Int first = load_codes(p);
      const Int second = load_codes(p + 64);
      if constexpr (Bits == 5) {
        const Int top = load_top_bits(p + 128);
        w[0] = and_bytes<31>(select_bytes<15>(first, shift_left_bits<4>(top)));
        w[1] = and_bytes<31>(select_bytes<15>(shift_right_bits<4>(first), shift_left_bits<3>(top)));
        w[2] = and_bytes<31>(select_bytes<15>(second, shift_left_bits<2>(top)));
        w[3] = and_bytes<31>(select_bytes<15>(shift_right_bits<4>(second), shift_left_bits<1>(top)));
      } else {
        const Int top = load_codes(p + 128);
        w[0] = and_bytes<63>(select_bytes<15>(first, shift_left_bits<4>(top)));
        w[1] = and_bytes<63>(select_bytes<15>(shift_right_bits<4>(first), shift_left_bits<2>(top)));
        w[2] = and_bytes<63>(select_bytes<15>(second, top));
        w[3] = and_bytes<63>(select_bytes<15>(shift_right_bits<4>(second), shift_right_bits<2>(top)));
      }
    }
  }
};

/// One row times all panels of a call, panel after panel: what a group ends with is chosen at run time, for a branch that
/// always goes the same way costs nothing, and a variant of its own would have to be compiled.
template <unsigned Bits>
inline void line(const IntGemmArgs& args, std::size_t row) noexcept {
  using Weights = Codes<Bits>;
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
        Weights::load(codes, u);
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
