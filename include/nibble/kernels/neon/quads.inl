// Weights as four channels x four k a register, for instructions that sum each lane's four bytes; register 2 * row +
// half holds a row's channels 0-3 or 4-7. Codes are signed bytes. What the tiers without I8MM share.

namespace dots {

using int_ops::Float;
using int_ops::Int;

template <class V>
NIBBLE_ALWAYS_INLINE void spread(V v0, V v1, V (&out)[2]) noexcept {
  out[0] = v0;
  out[1] = v1;
}
template <class V>
NIBBLE_ALWAYS_INLINE void expand(V low, V high, V (&out)[4]) noexcept {
  out[0] = out[2] = low;
  out[1] = out[3] = high;
}
NIBBLE_ALWAYS_INLINE void rows_of(const Int (&in)[4], Int (&out)[2][2]) noexcept {
  for (int i = 0; i < 4; ++i) out[i / 2][i % 2] = in[i];
}
NIBBLE_ALWAYS_INLINE void pack_x(const std::int8_t* x0, const std::int8_t* x1, std::int8_t* out) noexcept {
  for (int i = 0; i < 2; ++i) {
    int_ops::store_int(out + 16 * i, int_ops::load_int(x0 + 16 * i));
    int_ops::store_int(out + 32 + 16 * i, int_ops::load_int(x1 + 16 * i));
  }
}

/// 32 k of eight channels: [k / 4][channels 0-3, 4-7].
struct Quads8 {
  static constexpr std::size_t unit_bytes = 128;
  static constexpr std::int32_t bias = 0;
  static constexpr std::int32_t zero = 0;
  Int w[8][2];

  NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* codes) noexcept {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      w[i / 2][i % 2] = int_ops::flip_signs(int_ops::load_int(codes + i / 2 * 64 + i % 2 * 16));
  }
};
struct Quads4 {
  static constexpr std::size_t unit_bytes = 64;
  static constexpr std::int32_t bias = 0;
  static constexpr std::int32_t zero = 8;
  Int w[8][2];

  NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* codes) noexcept {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const Int both = int_ops::load_int(codes + i / 2 * 64 + i % 2 * 16);
      w[i / 2 * 2][i % 2] = int_ops::low_nibbles(both);
      w[i / 2 * 2 + 1][i % 2] = int_ops::high_nibbles(both);
    }
  }
};

}  // namespace dots
