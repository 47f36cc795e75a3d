// Integer products by sdot: each lane's four bytes of signed weights with four bytes of x, taken as a lane.
//
// Weights are stored + 128; the sign bits are flipped as they enter the registers, once for up to 32 rows, and int4 codes
// are signed bytes already. Port arithmetic for 2 rows x 8 channels x 32 k: 32 sdot, 4 cvt, 4 FMA (groups of 32), 8 loads
// of accumulators and x, 4 stores: on two vector pipes (Neoverse N1) 20 cycles for 512 MAC, 25.6 a cycle of 32, on four
// (V1) 10 cycles; one group: 32 sdot, 16 and 8 cycles, where the 8 loads and 4 stores of partial sums fit beside.
// fp32 FMA does 8 and 16 MAC a cycle. Never run on silicon; correct under qemu 7.2 (2026-11-23).

namespace dots {

/// acc += w . x over each lane's four bytes, for lane Lane of x. An asm because Clang 14 hides the intrinsic.
template <int Lane>
NIBBLE_ALWAYS_INLINE void dot(Int& acc, Int w, Int x) noexcept {
  asm("sdot %0.4s, %1.16b, %2.4b[%c3]" : "+w"(acc) : "w"(w), "w"(x), "i"(Lane));
}

template <int Q>
NIBBLE_ALWAYS_INLINE void dots_from(const Int (&w)[8][2], const Int (&x)[4], Int (&acc)[4]) noexcept {
  if constexpr (Q < 8) {
    dot<Q % 4>(acc[0], w[Q][0], x[Q / 4]);
    dot<Q % 4>(acc[1], w[Q][1], x[Q / 4]);
    dot<Q % 4>(acc[2], w[Q][0], x[2 + Q / 4]);
    dot<Q % 4>(acc[3], w[Q][1], x[2 + Q / 4]);
    dots_from<Q + 1>(w, x, acc);
  }
}

template <class Quads>
struct Weights : Quads {
  /// acc += 32 k of two rows by eight channels.
  NIBBLE_ALWAYS_INLINE void products(const std::int8_t* x, Int (&acc)[4]) const noexcept {
    const Int b[4] = {int_ops::load_int(x), int_ops::load_int(x + 16), int_ops::load_int(x + 32),
                      int_ops::load_int(x + 48)};
    dots_from<0>(this->w, b, acc);
  }
};
using Weights8 = Weights<Quads8>;
using Weights4 = Weights<Quads4>;

/// One row: 8 k of 16 channels, with 8 bytes of x.
struct Row8 : Quads8 {
  static NIBBLE_ALWAYS_INLINE void unit(const std::uint8_t* codes, const std::int8_t* x, Int (&acc)[4]) noexcept {
    const Int b = int_ops::load_half_int(x);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      dot<0>(acc[v], int_ops::flip_signs(int_ops::load_int(codes + 16 * v)), b);
      dot<1>(acc[v], int_ops::flip_signs(int_ops::load_int(codes + 64 + 16 * v)), b);
    }
  }
};
struct Row4 : Quads4 {
  static NIBBLE_ALWAYS_INLINE void unit(const std::uint8_t* codes, const std::int8_t* x, Int (&acc)[4]) noexcept {
    const Int b = int_ops::load_half_int(x);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Int both = int_ops::load_int(codes + 16 * v);
      dot<0>(acc[v], int_ops::low_nibbles(both), b);
      dot<1>(acc[v], int_ops::high_nibbles(both), b);
    }
  }
};

}  // namespace dots
