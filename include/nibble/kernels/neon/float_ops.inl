// Operations of the float kernels on AArch64's Advanced SIMD: four vectors are one panel's 16 lanes.
// Included in the namespaces of the ISAs that have it, and by nothing else.

using Vf = float32x4_t;
using Vi = int32x4_t;

constexpr int lanes = 4;
constexpr int halves = 4;  // vectors a panel
// Tiles: rows and panels of the float GEMM; panels that a GEMV of one row, and of several, takes at once. 4 rows x 1
// panel are 16 sums, as many as four pipes of latency 4 want, 4 weights and 4 values of x, which FMA takes as lanes: on
// two pipes (Neoverse N1) 8 cycles a k beside 8 loads on two and 24 instructions by four, on four (V1) 4 cycles: the FMA
// limit. With 6 rows, GCC 12 spills two sums. Never run on silicon; correct under qemu 7.2 (2026-11-23).
constexpr int gemm_rows = 4;
constexpr int gemm_panels = 1;
constexpr int gemm_panels_4 = 1;
constexpr int gemm_panels_2 = 1;
constexpr int gemm_panels_1 = 3;
constexpr int gemv_panels_1 = 2;
constexpr int gemv_panels_2 = 1;
constexpr int gemv_panels_4 = 1;
constexpr int exp_vectors = 8;  // vectors of exp at once
constexpr int rows_tall = 4;    // rows of gemm_direct for many, and panels for a few
constexpr int rows_panels = 2;
constexpr std::size_t rows_prefetch = 2048;
constexpr std::size_t gemv_prefetch = 2048;  // bytes ahead in every panel
// The same of the bf16 product; bytes of a panel from which on it counts as long.
constexpr int bf16_tile_rows = 4;
constexpr int bf16_panels_4 = 1;
constexpr int bf16_panels_2 = 1;
constexpr int bf16_panels_1 = 2;
constexpr std::size_t bf16_prefetch = 2048;
constexpr std::size_t bf16_long_panel = 16384;
// Sixteen floats are a lookup in four registers, by bytes: int4 codes decode by arithmetic, only nf4's by a table.
constexpr bool cheap_lookup = false;

NIBBLE_ALWAYS_INLINE Vf zero() noexcept { return vdupq_n_f32(0.0F); }
NIBBLE_ALWAYS_INLINE Vf set1(float v) noexcept { return vdupq_n_f32(v); }
NIBBLE_ALWAYS_INLINE Vi set1_int(std::int32_t v) noexcept { return vdupq_n_s32(v); }

// Loads and stores, at any alignment; the _n forms touch the first n < lanes elements only, the others are zero.
template <class T>
NIBBLE_ALWAYS_INLINE T load_bytes(const void* p, std::size_t n) noexcept {
  T v = {};
  std::memcpy(&v, p, n);
  return v;
}
template <class T>
NIBBLE_ALWAYS_INLINE void store_bytes(void* p, T v, std::size_t n) noexcept {
  std::memcpy(p, &v, n);
}
NIBBLE_ALWAYS_INLINE Vf load(const float* p) noexcept { return vld1q_f32(p); }
NIBBLE_ALWAYS_INLINE Vf load_n(const float* p, std::size_t n) noexcept { return load_bytes<Vf>(p, 4 * n); }
// The first n elements, the lanes of `rest` beside them.
NIBBLE_ALWAYS_INLINE Vf load_n_or(const float* p, std::size_t n, Vf rest) noexcept {
  float staged[4];
  vst1q_f32(staged, rest);
  std::memcpy(staged, p, 4 * n);
  return vld1q_f32(staged);
}
NIBBLE_ALWAYS_INLINE void store(float* p, Vf v) noexcept { vst1q_f32(p, v); }
NIBBLE_ALWAYS_INLINE void store_n(float* p, Vf v, std::size_t n) noexcept { store_bytes(p, v, 4 * n); }
NIBBLE_ALWAYS_INLINE Vi load_int(const void* p) noexcept { return load_bytes<Vi>(p, 16); }
// A plane of one bit a code (kernels/args.hpp) for half h of a panel: its bits in the low nibbles, whatever in the high.
NIBBLE_ALWAYS_INLINE Vi load_top_bits(const std::uint8_t* p, int h) noexcept {
  const auto both = vreinterpretq_u32_s32(load_int(p + h % 2 * 16));
  return vreinterpretq_s32_u32(h < 2 ? both : vshrq_n_u32(both, 4));
}
NIBBLE_ALWAYS_INLINE void store_words(void* p, Vi v) noexcept { store_bytes(p, v, 16); }
NIBBLE_ALWAYS_INLINE Vf widen_fp16(uint16x4_t v) noexcept { return vcvt_f32_f16(vreinterpret_f16_u16(v)); }
NIBBLE_ALWAYS_INLINE Vf load_fp16(const void* p) noexcept { return widen_fp16(load_bytes<uint16x4_t>(p, 8)); }
NIBBLE_ALWAYS_INLINE Vf load_fp16_n(const void* p, std::size_t n) noexcept {
  return widen_fp16(load_bytes<uint16x4_t>(p, 2 * n));
}
NIBBLE_ALWAYS_INLINE Vi widen_u16(uint16x4_t v) noexcept { return vreinterpretq_s32_u32(vmovl_u16(v)); }
NIBBLE_ALWAYS_INLINE Vi load_u16(const void* p) noexcept { return widen_u16(load_bytes<uint16x4_t>(p, 8)); }
NIBBLE_ALWAYS_INLINE Vi load_u16_n(const void* p, std::size_t n) noexcept {
  return widen_u16(load_bytes<uint16x4_t>(p, 2 * n));
}
NIBBLE_ALWAYS_INLINE Vi load_s8_n(const std::int8_t* p, std::size_t n) noexcept {
  return vmovl_s16(vget_low_s16(vmovl_s8(load_bytes<int8x8_t>(p, n))));
}
NIBBLE_ALWAYS_INLINE Vi load_s8(const std::int8_t* p) noexcept { return load_s8_n(p, 4); }
// Low 8 or 16 bits of every lane.
NIBBLE_ALWAYS_INLINE uint16x4_t narrow_16(Vi v) noexcept { return vmovn_u32(vreinterpretq_u32_s32(v)); }
NIBBLE_ALWAYS_INLINE uint8x8_t narrow_8(Vi v) noexcept {
  const uint16x4_t words = narrow_16(v);
  return vmovn_u16(vcombine_u16(words, words));
}
NIBBLE_ALWAYS_INLINE void store_8_n(std::int8_t* p, Vi v, std::size_t n) noexcept {
  store_bytes(p, narrow_8(v), n);
}
NIBBLE_ALWAYS_INLINE void store_8(std::int8_t* p, Vi v) noexcept { store_8_n(p, v, 4); }
NIBBLE_ALWAYS_INLINE void store_16(std::uint16_t* p, Vi v) noexcept { vst1_u16(p, narrow_16(v)); }
NIBBLE_ALWAYS_INLINE void store_16_n(std::uint16_t* p, Vi v, std::size_t n) noexcept {
  store_bytes(p, narrow_16(v), 2 * n);
}
NIBBLE_ALWAYS_INLINE uint16x4_t narrow_fp16(Vf v) noexcept { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
NIBBLE_ALWAYS_INLINE void store_fp16(std::uint16_t* p, Vf v) noexcept { vst1_u16(p, narrow_fp16(v)); }
NIBBLE_ALWAYS_INLINE void store_fp16_n(std::uint16_t* p, Vf v, std::size_t n) noexcept {
  store_bytes(p, narrow_fp16(v), 2 * n);
}

// The fence keeps compilers from contracting the product with a later addition into an fma.
NIBBLE_ALWAYS_INLINE Vf mul(Vf a, Vf b) noexcept {
  Vf v = vmulq_f32(a, b);
  asm("" : "+w"(v));
  return v;
}
// For a product that no addition or subtraction ever sees: nothing to contract.
NIBBLE_ALWAYS_INLINE Vf mul_only(Vf a, Vf b) noexcept { return vmulq_f32(a, b); }
NIBBLE_ALWAYS_INLINE Vf add(Vf a, Vf b) noexcept { return vaddq_f32(a, b); }
NIBBLE_ALWAYS_INLINE Vf sub(Vf a, Vf b) noexcept { return vsubq_f32(a, b); }
// a * 2^n: not an instruction here; exp takes two products.
constexpr bool has_scalef = false;
NIBBLE_ALWAYS_INLINE Vf scalef(Vf a, Vf) noexcept { return a; }
NIBBLE_ALWAYS_INLINE Vf div(Vf a, Vf b) noexcept { return vdivq_f32(a, b); }
NIBBLE_ALWAYS_INLINE Vf fma(Vf a, Vf b, Vf c) noexcept { return vfmaq_f32(c, a, b); }
// a where a < b (a > b), else b: b where either is NaN. fmin and fmax would give the NaN.
NIBBLE_ALWAYS_INLINE Vf min(Vf a, Vf b) noexcept { return vbslq_f32(vcltq_f32(a, b), a, b); }
NIBBLE_ALWAYS_INLINE Vf max(Vf a, Vf b) noexcept { return vbslq_f32(vcgtq_f32(a, b), a, b); }
NIBBLE_ALWAYS_INLINE Vf round(Vf v) noexcept { return vrndnq_f32(v); }
NIBBLE_ALWAYS_INLINE float round_scalar(float v) noexcept { return vrndns_f32(v); }

// Lanes 2i and 2i + 1 change places.
NIBBLE_ALWAYS_INLINE Vf swap_pairs(Vf v) noexcept { return vrev64q_f32(v); }

NIBBLE_ALWAYS_INLINE Vi bits(Vf v) noexcept { return vreinterpretq_s32_f32(v); }
NIBBLE_ALWAYS_INLINE Vf from_bits(Vi v) noexcept { return vreinterpretq_f32_s32(v); }
NIBBLE_ALWAYS_INLINE Vf zero_unless_positive_or_nan(Vf v) noexcept {
  return from_bits(vbicq_s32(bits(v), vreinterpretq_s32_u32(vclezq_f32(v))));
}
NIBBLE_ALWAYS_INLINE Vf zero_if_nan(Vf v) noexcept {
  return from_bits(vandq_s32(bits(v), vreinterpretq_s32_u32(vceqq_f32(v, v))));
}
// where v is NaN: a, else b
NIBBLE_ALWAYS_INLINE Vi if_nan(Vf v, Vi a, Vi b) noexcept { return vbslq_s32(vceqq_f32(v, v), b, a); }

NIBBLE_ALWAYS_INLINE Vf to_float(Vi v) noexcept { return vcvtq_f32_s32(v); }
NIBBLE_ALWAYS_INLINE Vi to_int(Vf v) noexcept { return vcvtnq_s32_f32(v); }
NIBBLE_ALWAYS_INLINE Vi add_int(Vi a, Vi b) noexcept { return vaddq_s32(a, b); }
NIBBLE_ALWAYS_INLINE Vi sub_int(Vi a, Vi b) noexcept { return vsubq_s32(a, b); }
NIBBLE_ALWAYS_INLINE Vi max_int(Vi a, Vi b) noexcept { return vmaxq_s32(a, b); }
NIBBLE_ALWAYS_INLINE Vi and_int(Vi a, Vi b) noexcept { return vandq_s32(a, b); }
NIBBLE_ALWAYS_INLINE Vi or_int(Vi a, Vi b) noexcept { return vorrq_s32(a, b); }
NIBBLE_ALWAYS_INLINE Vi xor_int(Vi a, Vi b) noexcept { return veorq_s32(a, b); }
// Counts of 0 are no shift that the intrinsics know.
template <int N>
NIBBLE_ALWAYS_INLINE Vi shift_left(Vi v) noexcept {
  return vshlq_n_s32(v, N);
}
template <int N>
NIBBLE_ALWAYS_INLINE Vi shift_right(Vi v) noexcept {
  if constexpr (N == 0)
    return v;
  else
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(v), N));
}
template <int N>
NIBBLE_ALWAYS_INLINE Vi shift_right_signed(Vi v) noexcept {
  return vshrq_n_s32(v, N);
}

// Byte J of every lane, zero-extended: indices beyond the table give 0.
template <int J>
NIBBLE_ALWAYS_INLINE Vi byte_of_lanes(Vi v) noexcept {
  constexpr int none = static_cast<int>(0xFFFFFF00U);
  const Vi index = {none + J, none + J + 4, none + J + 8, none + J + 12};
  return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(v), vreinterpretq_u8_s32(index)));
}

using Lookup16 = uint8x16x4_t;
NIBBLE_ALWAYS_INLINE Lookup16 load_lookup16(const float* table) noexcept {
  return vld1q_u8_x4(reinterpret_cast<const std::uint8_t*>(table));
}
// Table entries by bits N..N+3 of every lane: four bytes of the 64 a lane.
template <int N>
NIBBLE_ALWAYS_INLINE Vf lookup16(const Lookup16& t, Vi v) noexcept {
  const Vi code = and_int(shift_right<N>(v), set1_int(15));
  const Vi index = vmlaq_s32(set1_int(0x03020100), code, set1_int(0x04040404));
  return vreinterpretq_f32_u8(vqtbl4q_u8(t, vreinterpretq_u8_s32(index)));
}

NIBBLE_ALWAYS_INLINE float reduce_min(Vf v) noexcept { return vminvq_f32(v); }
NIBBLE_ALWAYS_INLINE float reduce_max(Vf v) noexcept { return vmaxvq_f32(v); }
NIBBLE_ALWAYS_INLINE std::int32_t reduce_max_int(Vi v) noexcept { return vmaxvq_s32(v); }

// Sums of four blocks of 16 bytes.
NIBBLE_ALWAYS_INLINE void sum_blocks_4(const std::int8_t* q, std::int32_t* out) noexcept {
  const auto quarters = [](const std::int8_t* p) noexcept { return vpaddlq_s16(vpaddlq_s8(vld1q_s8(p))); };
  const int32x4_t low = vpaddq_s32(quarters(q), quarters(q + 16));
  const int32x4_t high = vpaddq_s32(quarters(q + 32), quarters(q + 48));
  vst1q_s32(out, vpaddq_s32(low, high));
}

NIBBLE_ALWAYS_INLINE void prefetch(const void* p) noexcept { __builtin_prefetch(p); }
