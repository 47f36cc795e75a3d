// Integer products by usmmla: 2 channels x 8 k of unsigned weights by 8 k x 2 rows of x, 32 MAC an instruction.
//
// Weights enter as they are stored (int8 + 128, int4 0..15). One zip joins the two registers that hold four channels'
// k 0-3 and k 4-7 into two pairs of channels by eight k, once for up to 32 rows; x is paired as it is packed, once for four
// panels. Sums stay [channel 0: rows 0, 1 | channel 1: rows 0, 1] up to the end, parameters are doubled instead. Port
// arithmetic for 2 rows x 8 channels x 32 k: 16 usmmla, 4 cvt, 4 FMA (groups of 32), 8 loads and 4 stores: on two vector
// pipes (Neoverse N2) 12 cycles for 512 MAC, 43 a cycle of 64; with one group 16 usmmla, 8 cycles, which the 8 loads (two
// or three a cycle) and 4 stores just fill. usdot would need 32 for the same sums. One row alone takes usdot: half of usmmla would be wasted. fp32 FMA does 8 MAC a cycle. Never run on silicon; correct under qemu 7.2 (2026-11-23).

namespace dots {

using int_ops::Float;
using int_ops::Int;

template <class V>
NIBBLE_ALWAYS_INLINE void expand(V low, V high, V (&out)[4]) noexcept {
  out[0] = int_ops::twice_low(low);
  out[1] = int_ops::twice_high(low);
  out[2] = int_ops::twice_low(high);
  out[3] = int_ops::twice_high(high);
}
NIBBLE_ALWAYS_INLINE void spread(Int v0, Int v1, Int (&out)[2]) noexcept { out[0] = out[1] = vzip1q_s32(v0, v1); }
NIBBLE_ALWAYS_INLINE void spread(Float v0, Float v1, Float (&out)[2]) noexcept {
  out[0] = out[1] = vzip1q_f32(v0, v1);
}
NIBBLE_ALWAYS_INLINE void rows_of(const Int (&in)[4], Int (&out)[2][2]) noexcept {
  for (int v = 0; v < 2; ++v) {
    out[0][v] = vuzp1q_s32(in[2 * v], in[2 * v + 1]);
    out[1][v] = vuzp2q_s32(in[2 * v], in[2 * v + 1]);
  }
}
/// [k / 8][2 rows][8 k].
NIBBLE_ALWAYS_INLINE void pack_x(const std::int8_t* x0, const std::int8_t* x1, std::int8_t* out) noexcept {
  for (int i = 0; i < 2; ++i) {
    const int64x2_t row0 = vreinterpretq_s64_s32(int_ops::load_int(x0 + 16 * i));
    const int64x2_t row1 = vreinterpretq_s64_s32(int_ops::load_int(x1 + 16 * i));
    int_ops::store_int(out + 32 * i, vreinterpretq_s32_s64(vzip1q_s64(row0, row1)));
    int_ops::store_int(out + 32 * i + 16, vreinterpretq_s32_s64(vzip2q_s64(row0, row1)));
  }
}

/// acc[c][r] += sum over 8 k of w[c][k] * x[r][k], w unsigned.
NIBBLE_ALWAYS_INLINE void multiply(Int& acc, Int w, Int x) noexcept {
  asm("usmmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(w), "w"(x));
}

/// 32 k of eight channels: [k / 8][2 channels][8 k].
template <class Codes>
struct Weights {
  static constexpr std::size_t unit_bytes = Codes::unit_bytes;
  static constexpr std::int32_t bias = Codes::bias;
  static constexpr std::int32_t zero = unit_bytes == 64 ? 8 : 0;
  Int w[4][4];

  NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* codes) noexcept {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const std::uint8_t* at = codes + static_cast<std::size_t>(i / 2) * unit_bytes + i % 2 * 16;
      Int first = int_ops::load_int(at);  // k 0-3 of four channels
      Int second = unit_bytes == 64 ? int_ops::high_nibbles(first) : int_ops::load_int(at + 64);  // k 4-7
      if (unit_bytes == 64) first = int_ops::low_nibbles(first);
      w[i / 2][i % 2 * 2] = vzip1q_s32(first, second);
      w[i / 2][i % 2 * 2 + 1] = vzip2q_s32(first, second);
    }
  }
  /// acc += 32 k of two rows by eight channels.
  NIBBLE_ALWAYS_INLINE void products(const std::int8_t* x, Int (&acc)[4]) const noexcept {
#pragma GCC unroll 4
    for (int o = 0; o < 4; ++o) {
      const Int b = int_ops::load_int(x + 16 * o);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) multiply(acc[c], w[o][c], b);
    }
  }
};
using Weights8 = Weights<int_params::Codes8>;
using Weights4 = Weights<int_params::Codes4>;

/// acc += w . x over each lane's four bytes, w unsigned, for lane Lane of x.
template <int Lane>
NIBBLE_ALWAYS_INLINE void dot(Int& acc, Int w, Int x) noexcept {
  asm("usdot %0.4s, %1.16b, %2.4b[%c3]" : "+w"(acc) : "w"(w), "w"(x), "i"(Lane));
}

/// One row: 8 k of 16 channels, with 8 bytes of x.
template <class Codes>
struct Row : Weights<Codes> {
  static NIBBLE_ALWAYS_INLINE void unit(const std::uint8_t* codes, const std::int8_t* x, Int (&acc)[4]) noexcept {
    const Int b = int_ops::load_half_int(x);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Int first = int_ops::load_int(codes + 16 * v);
      const bool nibbles = Codes::unit_bytes == 64;
      dot<0>(acc[v], nibbles ? int_ops::low_nibbles(first) : first, b);
      dot<1>(acc[v], nibbles ? int_ops::high_nibbles(first) : int_ops::load_int(codes + 64 + 16 * v), b);
    }
  }
};
using Row8 = Row<int_params::Codes8>;
using Row4 = Row<int_params::Codes4>;

}  // namespace dots
