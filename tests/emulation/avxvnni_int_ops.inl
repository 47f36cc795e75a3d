// nibble/kernels/avxvnni/int_ops.inl in plain C++: the same names, lanes as arrays. The AVX-VNNI integer kernels
// compiled over this run on any machine.

// Out of line: inlined into the unrolled kernels, these loops would take minutes to compile.
#define NIBBLE_EMULATED inline __attribute__((noinline))

namespace int_ops {

struct Int {
  std::int32_t lane[8];
};
struct Float {
  float lane[8];
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
  for (int i = 0; i < 8; ++i) out.lane[i] = f(i);
  return out;
}
/// Applies f to the 32 bytes.
template <class F>
NIBBLE_EMULATED Int each_byte(const Int& a, const F& f) noexcept {
  std::uint8_t bytes[32];
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
NIBBLE_EMULATED Int nibble_mask() noexcept { return set_int(0x0F0F0F0F); }
NIBBLE_EMULATED Int load_low_nibbles(const std::uint8_t* p, Int) noexcept { return low_nibbles(load_int(p)); }
NIBBLE_EMULATED Int load_high_nibbles(const std::uint8_t* p, Int) noexcept { return high_nibbles(load_int(p)); }
NIBBLE_EMULATED void dot(Int& acc, Int u8, Int s8) noexcept {
  std::uint8_t u[32];
  std::int8_t s[32];
  std::memcpy(u, u8.lane, sizeof u);
  std::memcpy(s, s8.lane, sizeof s);
  for (int i = 0; i < 8; ++i) {
    std::int32_t sum = 0;
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += u[j] * s[j];
    acc.lane[i] = wrap(bits(acc.lane[i]) + bits(sum));
  }
}
template <int Times, int Bytes>
inline void dot_pair(Int& acc0, Int& acc1, Int w0, Int w1, const std::int8_t* x, std::size_t stride) noexcept {
  const Int b = broadcast4(x + Times * stride + Bytes);
  dot(acc0, w0, b);
  dot(acc1, w1, b);
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
  std::uint16_t half[8];
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
