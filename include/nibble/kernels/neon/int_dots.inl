// Integer products without dot product instructions.
//
// int4 x int8: smlal on each half of a register, summed in int16 over 32 k (8 * 15 * 128 = 15,360 fits), then pairwise
// to int32. int8 x int8: smull and sadalp, for two products of -128 x -128 would not fit int16; a product and a widening
// sum for 8 MAC, where smlal on int16 does 4 and would want twice the registers. Port arithmetic for 2 rows x 8
// channels x 32 k, two vector pipes (Cortex-A72): int4 64 smlal + 16 dup + 12 to sum = 92, 46 cycles, 11 MAC a cycle;
// int8 64 smull + 64 sadalp + 16 dup + 4 = 148, 74 cycles, 6.9 MAC a cycle; fp32 FMA does 8. (A72 multiplies on one
// pipe only: 64 cycles both.) Never run on silicon; correct under qemu 7.2 (2026-11-23).

namespace dots {

NIBBLE_ALWAYS_INLINE int8x16_t bytes(Int v) noexcept { return vreinterpretq_s8_s32(v); }

struct Weights8 : Quads8 {
  /// acc += 32 k of two rows by eight channels.
  NIBBLE_ALWAYS_INLINE void products(const std::int8_t* x, Int (&acc)[4]) const noexcept {
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      int32x4_t low[2] = {int_ops::zero_int(), int_ops::zero_int()};
      int32x4_t high[2] = {int_ops::zero_int(), int_ops::zero_int()};
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) {
        const int8x16_t b = bytes(int_ops::broadcast4(x + 32 * r + 4 * q));
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          low[v] = vpadalq_s16(low[v], vmull_s8(vget_low_s8(bytes(w[q][v])), vget_low_s8(b)));
          high[v] = vpadalq_s16(high[v], vmull_high_s8(bytes(w[q][v]), b));
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) acc[2 * r + v] = int_ops::add(acc[2 * r + v], vpaddq_s32(low[v], high[v]));
    }
  }
};

struct Weights4 : Quads4 {
  NIBBLE_ALWAYS_INLINE void products(const std::int8_t* x, Int (&acc)[4]) const noexcept {
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      int16x8_t low[2] = {vdupq_n_s16(0), vdupq_n_s16(0)};
      int16x8_t high[2] = {vdupq_n_s16(0), vdupq_n_s16(0)};
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) {
        const int8x16_t b = bytes(int_ops::broadcast4(x + 32 * r + 4 * q));
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          low[v] = vmlal_s8(low[v], vget_low_s8(bytes(w[q][v])), vget_low_s8(b));
          high[v] = vmlal_high_s8(high[v], bytes(w[q][v]), b);
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
        acc[2 * r + v] = int_ops::add(acc[2 * r + v], vpaddq_s32(vpaddlq_s16(low[v]), vpaddlq_s16(high[v])));
    }
  }
};

/// One row: 8 k of 16 channels, with 8 bytes of x.
struct Row8 : Quads8 {
  static NIBBLE_ALWAYS_INLINE void unit(const std::uint8_t* codes, const std::int8_t* x, Int (&acc)[4]) noexcept {
    const int8x16_t b0 = bytes(int_ops::broadcast4(x));
    const int8x16_t b1 = bytes(int_ops::broadcast4(x + 4));
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int8x16_t w0 = bytes(int_ops::flip_signs(int_ops::load_int(codes + 16 * v)));
      const int8x16_t w1 = bytes(int_ops::flip_signs(int_ops::load_int(codes + 64 + 16 * v)));
      Int low = vpaddlq_s16(vmull_s8(vget_low_s8(w0), vget_low_s8(b0)));
      Int high = vpaddlq_s16(vmull_high_s8(w0, b0));
      low = vpadalq_s16(low, vmull_s8(vget_low_s8(w1), vget_low_s8(b1)));
      high = vpadalq_s16(high, vmull_high_s8(w1, b1));
      acc[v] = int_ops::add(acc[v], vpaddq_s32(low, high));
    }
  }
};
struct Row4 : Quads4 {
  static NIBBLE_ALWAYS_INLINE void unit(const std::uint8_t* codes, const std::int8_t* x, Int (&acc)[4]) noexcept {
    const int8x16_t b0 = bytes(int_ops::broadcast4(x));
    const int8x16_t b1 = bytes(int_ops::broadcast4(x + 4));
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Int both = int_ops::load_int(codes + 16 * v);
      const int8x16_t w0 = bytes(int_ops::low_nibbles(both));
      const int8x16_t w1 = bytes(int_ops::high_nibbles(both));
      int16x8_t low = vmull_s8(vget_low_s8(w0), vget_low_s8(b0));
      int16x8_t high = vmull_high_s8(w0, b0);
      low = vmlal_s8(low, vget_low_s8(w1), vget_low_s8(b1));
      high = vmlal_high_s8(high, w1, b1);
      // Neighbouring sums of two products fit int16 as well: 4 * 15 * 128.
      acc[v] = vpadalq_s16(acc[v], vpaddq_s16(low, high));
    }
  }
};

}  // namespace dots
