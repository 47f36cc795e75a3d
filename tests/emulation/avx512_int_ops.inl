// nibble/kernels/avx512vnni/int_ops.inl in plain C++: the same names, lanes as arrays. The AVX-512 integer kernels
// compiled over this run on any machine.

// Out of line: inlined into the unrolled kernels, these loops would take minutes to compile.
#define NIBBLE_EMULATED inline __attribute__((noinline))

namespace int_ops {

struct Int {
  std::int32_t lane[16];
};
struct Float {
  float lane[16];
};

/// int32 arithmetic of the vector unit: modulo 2^32.
inline std::int32_t wrap(std::uint32_t v) noexcept {
  std::int32_t out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}
inline std::uint32_t bits(std::int32_t v) noexcept { return static_cast<std::uint32_t>(v); }
template <class Out, class F>
inline Out each(const F& f) noexcept {
  Out out;
  for (int i = 0; i < 16; ++i) out.lane[i] = f(i);
  return out;
}
/// Applies f to the 64 bytes.
template <class F>
NIBBLE_EMULATED Int each_byte(const Int& a, const F& f) noexcept {
  std::uint8_t bytes[64];
  std::memcpy(bytes, a.lane, sizeof bytes);
  for (std::uint8_t& b : bytes) b = static_cast<std::uint8_t>(f(b));
  Int out;
  std::memcpy(out.lane, bytes, sizeof bytes);
  return out;
}

NIBBLE_EMULATED Int set_int(std::int32_t v) noexcept {
  return each<Int>([&](int) { return v; });
}
NIBBLE_EMULATED Int zero_int() noexcept { return set_int(0); }
NIBBLE_EMULATED Int load_int(const void* p) noexcept {
  Int out;
  std::memcpy(out.lane, p, sizeof out.lane);
  return out;
}
NIBBLE_EMULATED Int load_codes(const std::uint8_t* p) noexcept { return load_int(p); }
NIBBLE_EMULATED void store_int(void* p, Int v) noexcept { std::memcpy(p, v.lane, sizeof v.lane); }
NIBBLE_EMULATED Int broadcast4(const void* p) noexcept {
  std::int32_t v;
  std::memcpy(&v, p, sizeof v);
  return set_int(v);
}
NIBBLE_EMULATED Int widen_s8(const std::int8_t* p) noexcept {
  return each<Int>([&](int i) { return p[i]; });
}
NIBBLE_EMULATED Int add(Int a, Int b) noexcept {
  return each<Int>([&](int i) { return wrap(bits(a.lane[i]) + bits(b.lane[i])); });
}
NIBBLE_EMULATED Int sub(Int a, Int b) noexcept {
  return each<Int>([&](int i) { return wrap(bits(a.lane[i]) - bits(b.lane[i])); });
}
NIBBLE_EMULATED Int mul(Int a, Int b) noexcept {
  return each<Int>([&](int i) { return wrap(bits(a.lane[i]) * bits(b.lane[i])); });
}
NIBBLE_EMULATED Int shift_left(Int a, Int count) noexcept {
  return each<Int>([&](int i) { return bits(count.lane[i]) > 31 ? 0 : wrap(bits(a.lane[i]) << count.lane[i]); });
}
NIBBLE_EMULATED Int low_nibbles(Int a) noexcept {
  return each_byte(a, [](unsigned b) { return b & 15U; });
}
NIBBLE_EMULATED Int high_nibbles(Int a) noexcept {
  return each_byte(a, [](unsigned b) { return b >> 4; });
}
template <int N>
NIBBLE_EMULATED Int shift_right_bits(Int a) noexcept {
  return each<Int>([&](int i) { return wrap(bits(a.lane[i]) >> N); });
}
template <int N>
NIBBLE_EMULATED Int shift_left_bits(Int a) noexcept {
  return each<Int>([&](int i) { return wrap(bits(a.lane[i]) << N); });
}
template <int Byte>
NIBBLE_EMULATED Int and_bytes(Int a) noexcept {
  return each_byte(a, [](unsigned b) { return b & static_cast<unsigned>(Byte); });
}
template <int Byte>
NIBBLE_EMULATED Int select_bytes(Int a, Int b) noexcept {
  constexpr std::uint32_t mask = 0x01010101U * static_cast<std::uint32_t>(Byte);
  return each<Int>([&](int i) { return wrap((bits(a.lane[i]) & mask) | (bits(b.lane[i]) & ~mask)); });
}
NIBBLE_EMULATED Int load_top_bits(const std::uint8_t* p, int) noexcept {
  return each<Int>([&](int i) {
    std::uint32_t v;
    std::memcpy(&v, p + i % 8 * 4, 4);
    return wrap(v >> (i / 8 * 4));
  });
}
NIBBLE_EMULATED void dot(Int& acc, Int u8, Int s8) noexcept {
  std::uint8_t u[64];
  std::int8_t s[64];
  std::memcpy(u, u8.lane, sizeof u);
  std::memcpy(s, s8.lane, sizeof s);
  for (int i = 0; i < 16; ++i) {
    std::int32_t sum = 0;
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += u[j] * s[j];
    acc.lane[i] = wrap(bits(acc.lane[i]) + bits(sum));
  }
}

NIBBLE_EMULATED void dot_broadcast(Int& acc, Int u8, const std::int8_t* s8) noexcept {
  dot(acc, u8, broadcast4(s8));
}

/// Half a unit of 8 k: codes that `load` makes of a panel's, 4 k of each row.
template <int Rows, class Load>
inline void dot_half(Int (&sums)[Rows][2], const std::uint8_t* codes, std::size_t panel_stride,
                     const std::int8_t* x, std::size_t x_stride, const Load& load) noexcept {
  for (std::size_t p = 0; p < 2; ++p)
    for (std::size_t r = 0; r < Rows; ++r)
      dot_broadcast(sums[r][p], load(codes + p * panel_stride), x + r * x_stride);
}
template <int Rows>
inline void dot8_low(Int (&sums)[Rows][2], const std::uint8_t* codes, std::size_t panel_stride,
                     const std::int8_t* x, std::size_t x_stride) noexcept {
  dot_half(sums, codes, panel_stride, x, x_stride, [](const std::uint8_t* p) { return load_int(p); });
}
template <int Rows>
inline void dot8_high(Int (&sums)[Rows][2], const std::uint8_t* codes, std::size_t panel_stride,
                      const std::int8_t* x, std::size_t x_stride) noexcept {
  dot_half(sums, codes + 64, panel_stride, x + 4, x_stride, [](const std::uint8_t* p) { return load_int(p); });
}
template <int Rows>
inline void dot4_low(Int (&sums)[Rows][2], const std::uint8_t* codes, std::size_t panel_stride,
                     const std::int8_t* x, std::size_t x_stride) noexcept {
  dot_half(sums, codes, panel_stride, x, x_stride, [](const std::uint8_t* p) { return low_nibbles(load_int(p)); });
}
template <int Rows>
inline void dot4_high(Int (&sums)[Rows][2], const std::uint8_t* codes, std::size_t panel_stride,
                      const std::int8_t* x, std::size_t x_stride) noexcept {
  dot_half(sums, codes, panel_stride, x + 4, x_stride,
           [](const std::uint8_t* p) { return high_nibbles(load_int(p)); });
}

NIBBLE_EMULATED Float set_float(float v) noexcept {
  return each<Float>([&](int) { return v; });
}
NIBBLE_EMULATED Float zero_float() noexcept { return set_float(0.0F); }
NIBBLE_EMULATED Float load_float(const float* p) noexcept {
  Float out;
  std::memcpy(out.lane, p, sizeof out.lane);
  return out;
}
NIBBLE_EMULATED void store_float(float* p, Float v) noexcept { std::memcpy(p, v.lane, sizeof v.lane); }
NIBBLE_EMULATED Float load_half(const void* p) noexcept {
  std::uint16_t half[16];
  std::memcpy(half, p, sizeof half);
  return each<Float>([&](int i) { return float_from_fp16(half[i]); });
}
NIBBLE_EMULATED Float to_float(Int v) noexcept {
  return each<Float>([&](int i) { return static_cast<float>(v.lane[i]); });
}
NIBBLE_EMULATED Float mul(Float a, Float b) noexcept {
  return each<Float>([&](int i) { return rounded(a.lane[i] * b.lane[i]); });
}
NIBBLE_EMULATED Float fma(Float a, Float b, Float c) noexcept {
  return each<Float>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
NIBBLE_EMULATED void prefetch(const void*) noexcept {}

}  // namespace int_ops

#undef NIBBLE_EMULATED
