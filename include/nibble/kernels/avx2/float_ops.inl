// Operations of the float kernels on AVX2 + FMA + F16C: two vectors are one panel's 16 lanes.
// Included in the ISA's target region and namespace, and by nothing else.

using Vf = __m256;
using Vi = __m256i;

constexpr int lanes = 8;
constexpr int halves = 2;  // vectors a panel
// Tiles: rows and panels of the float GEMM; panels that a GEMV of one row, and of several, takes at once.
constexpr int gemm_rows = 6;
constexpr int gemm_panels = 1;
constexpr int gemm_panels_4 = 1;
constexpr int gemm_panels_2 = 2;
constexpr int gemm_panels_1 = 4;
constexpr int gemv_panels_1 = 4;
constexpr int gemv_panels_2 = 2;
constexpr int gemv_panels_4 = 1;
constexpr int exp_vectors = 4;  // vectors of exp at once
constexpr int rows_tall = 6;    // rows of gemm_direct for many, and panels for a few
constexpr int rows_panels = 2;
constexpr std::size_t rows_prefetch = 2048;
constexpr std::size_t gemv_prefetch = 2048;  // bytes ahead in every panel
// The same of the bf16 product; bytes of a panel from which on it counts as long.
constexpr int bf16_tile_rows = 4;
constexpr int bf16_panels_4 = 1;
constexpr int bf16_panels_2 = 2;
constexpr int bf16_panels_1 = 4;
constexpr std::size_t bf16_prefetch = 2048;
constexpr std::size_t bf16_long_panel = 16384;
// Sixteen floats do not fit one permute: int4 codes decode by arithmetic, only nf4's by a table.
constexpr bool cheap_lookup = false;

// Lanes whose index is below n.
NIBBLE_ALWAYS_INLINE __m256i first(std::size_t n) noexcept {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

NIBBLE_ALWAYS_INLINE Vf zero() noexcept { return _mm256_setzero_ps(); }
NIBBLE_ALWAYS_INLINE Vf set1(float v) noexcept { return _mm256_set1_ps(v); }
NIBBLE_ALWAYS_INLINE Vi set1_int(std::int32_t v) noexcept { return _mm256_set1_epi32(v); }

// Loads and stores, at any alignment; the _n forms touch the first n < lanes elements only, the others are zero.
NIBBLE_ALWAYS_INLINE Vf load(const float* p) noexcept { return _mm256_loadu_ps(p); }
NIBBLE_ALWAYS_INLINE Vf load_n(const float* p, std::size_t n) noexcept { return _mm256_maskload_ps(p, first(n)); }
// The first n elements, the lanes of `rest` beside them.
NIBBLE_ALWAYS_INLINE Vf load_n_or(const float* p, std::size_t n, Vf rest) noexcept {
  return _mm256_blendv_ps(rest, load_n(p, n), _mm256_castsi256_ps(first(n)));
}
NIBBLE_ALWAYS_INLINE void store(float* p, Vf v) noexcept { _mm256_storeu_ps(p, v); }
NIBBLE_ALWAYS_INLINE void store_n(float* p, Vf v, std::size_t n) noexcept { _mm256_maskstore_ps(p, first(n), v); }
NIBBLE_ALWAYS_INLINE Vi load_int(const void* p) noexcept {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
// The first n bytes of a vector, n < 16, through memory: AVX2 masks nothing narrower than 32 bits.
NIBBLE_ALWAYS_INLINE __m128i load_bytes(const void* p, std::size_t n) noexcept {
  alignas(16) unsigned char staged[16] = {};
  std::memcpy(staged, p, n);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(staged));
}
NIBBLE_ALWAYS_INLINE void store_bytes(void* p, __m128i v, std::size_t n) noexcept {
  alignas(16) unsigned char staged[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(staged), v);
  std::memcpy(p, staged, n);
}
// A plane of one bit a code (kernels/args.hpp) for half h of a panel: its bits in the low nibbles, whatever in the high.
NIBBLE_ALWAYS_INLINE Vi load_top_bits(const std::uint8_t* p, int h) noexcept {
  const Vi both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return h == 0 ? both : _mm256_srli_epi32(both, 4);
}
NIBBLE_ALWAYS_INLINE void store_words(void* p, Vi v) noexcept { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
NIBBLE_ALWAYS_INLINE Vf load_fp16(const void* p) noexcept {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
NIBBLE_ALWAYS_INLINE Vf load_fp16_n(const void* p, std::size_t n) noexcept {
  return _mm256_cvtph_ps(load_bytes(p, 2 * n));
}
NIBBLE_ALWAYS_INLINE Vi load_u16(const void* p) noexcept {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
NIBBLE_ALWAYS_INLINE Vi load_u16_n(const void* p, std::size_t n) noexcept {
  return _mm256_cvtepu16_epi32(load_bytes(p, 2 * n));
}
NIBBLE_ALWAYS_INLINE Vi load_s8(const std::int8_t* p) noexcept {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
NIBBLE_ALWAYS_INLINE Vi load_s8_n(const std::int8_t* p, std::size_t n) noexcept {
  return _mm256_cvtepi8_epi32(load_bytes(p, n));
}
// Low 8 or 16 bits of every lane.
NIBBLE_ALWAYS_INLINE __m128i narrow_16(Vi v) noexcept {
  const __m256i kept = _mm256_and_si256(v, _mm256_set1_epi32(0xFFFF));
  return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
}
NIBBLE_ALWAYS_INLINE __m128i narrow_8(Vi v) noexcept {
  const __m128i words = narrow_16(_mm256_and_si256(v, _mm256_set1_epi32(0xFF)));
  return _mm_packus_epi16(words, words);
}
NIBBLE_ALWAYS_INLINE void store_8(std::int8_t* p, Vi v) noexcept {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow_8(v));
}
NIBBLE_ALWAYS_INLINE void store_8_n(std::int8_t* p, Vi v, std::size_t n) noexcept {
  store_bytes(p, narrow_8(v), n);
}
NIBBLE_ALWAYS_INLINE void store_16(std::uint16_t* p, Vi v) noexcept {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_16(v));
}
NIBBLE_ALWAYS_INLINE void store_16_n(std::uint16_t* p, Vi v, std::size_t n) noexcept {
  store_bytes(p, narrow_16(v), 2 * n);
}
NIBBLE_ALWAYS_INLINE void store_fp16(std::uint16_t* p, Vf v) noexcept {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
NIBBLE_ALWAYS_INLINE void store_fp16_n(std::uint16_t* p, Vf v, std::size_t n) noexcept {
  store_bytes(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), 2 * n);
}

// The fence keeps compilers from contracting the product with a later addition into an fma.
NIBBLE_ALWAYS_INLINE Vf mul(Vf a, Vf b) noexcept {
  Vf v = _mm256_mul_ps(a, b);
  asm("" : "+x"(v));
  return v;
}
// For a product that no addition or subtraction ever sees: nothing to contract, so the compiler may fold its load.
NIBBLE_ALWAYS_INLINE Vf mul_only(Vf a, Vf b) noexcept { return _mm256_mul_ps(a, b); }
NIBBLE_ALWAYS_INLINE Vf add(Vf a, Vf b) noexcept { return _mm256_add_ps(a, b); }
NIBBLE_ALWAYS_INLINE Vf sub(Vf a, Vf b) noexcept { return _mm256_sub_ps(a, b); }
// a * 2^n: not an instruction here; exp takes two products.
constexpr bool has_scalef = false;
NIBBLE_ALWAYS_INLINE Vf scalef(Vf a, Vf) noexcept { return a; }
NIBBLE_ALWAYS_INLINE Vf div(Vf a, Vf b) noexcept { return _mm256_div_ps(a, b); }
NIBBLE_ALWAYS_INLINE Vf fma(Vf a, Vf b, Vf c) noexcept { return _mm256_fmadd_ps(a, b, c); }
// a where a < b (a > b), else b: b where either is NaN.
NIBBLE_ALWAYS_INLINE Vf min(Vf a, Vf b) noexcept { return _mm256_min_ps(a, b); }
NIBBLE_ALWAYS_INLINE Vf max(Vf a, Vf b) noexcept { return _mm256_max_ps(a, b); }
NIBBLE_ALWAYS_INLINE Vf round(Vf v) noexcept {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
NIBBLE_ALWAYS_INLINE float round_scalar(float v) noexcept {
  return _mm_cvtss_f32(_mm_round_ps(_mm_set_ss(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
NIBBLE_ALWAYS_INLINE Vf zero_unless_positive_or_nan(Vf v) noexcept {
  return _mm256_and_ps(v, _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ));
}
NIBBLE_ALWAYS_INLINE Vf zero_if_nan(Vf v) noexcept { return _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q)); }
// where v is NaN: a, else b
NIBBLE_ALWAYS_INLINE Vi if_nan(Vf v, Vi a, Vi b) noexcept {
  return _mm256_blendv_epi8(b, a, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}

// Lanes 2i and 2i + 1 change places.
NIBBLE_ALWAYS_INLINE Vf swap_pairs(Vf v) noexcept { return _mm256_permute_ps(v, 0xB1); }

NIBBLE_ALWAYS_INLINE Vi bits(Vf v) noexcept { return _mm256_castps_si256(v); }
NIBBLE_ALWAYS_INLINE Vf from_bits(Vi v) noexcept { return _mm256_castsi256_ps(v); }
NIBBLE_ALWAYS_INLINE Vf to_float(Vi v) noexcept { return _mm256_cvtepi32_ps(v); }
NIBBLE_ALWAYS_INLINE Vi to_int(Vf v) noexcept { return _mm256_cvtps_epi32(v); }
NIBBLE_ALWAYS_INLINE Vi add_int(Vi a, Vi b) noexcept { return _mm256_add_epi32(a, b); }
NIBBLE_ALWAYS_INLINE Vi sub_int(Vi a, Vi b) noexcept { return _mm256_sub_epi32(a, b); }
NIBBLE_ALWAYS_INLINE Vi max_int(Vi a, Vi b) noexcept { return _mm256_max_epi32(a, b); }
NIBBLE_ALWAYS_INLINE Vi and_int(Vi a, Vi b) noexcept { return _mm256_and_si256(a, b); }
NIBBLE_ALWAYS_INLINE Vi or_int(Vi a, Vi b) noexcept { return _mm256_or_si256(a, b); }
NIBBLE_ALWAYS_INLINE Vi xor_int(Vi a, Vi b) noexcept { return _mm256_xor_si256(a, b); }
template <int N>
NIBBLE_ALWAYS_INLINE Vi shift_left(Vi v) noexcept {
  return _mm256_slli_epi32(v, N);
}
template <int N>
NIBBLE_ALWAYS_INLINE Vi shift_right(Vi v) noexcept {
  return _mm256_srli_epi32(v, N);
}
template <int N>
NIBBLE_ALWAYS_INLINE Vi shift_right_signed(Vi v) noexcept {
  return _mm256_srai_epi32(v, N);
}

// Byte J of every lane, zero-extended. One shuffle: shift and mask are two, on pipes that the conversions want.
template <int J>
NIBBLE_ALWAYS_INLINE Vi byte_of_lanes(Vi v) noexcept {
  // Control bytes with the top bit set give 0.
  constexpr int none = static_cast<int>(0x80808000U);
  const __m128i lane = _mm_setr_epi32(none + J, none + J + 4, none + J + 8, none + J + 12);
  return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(lane));
}

struct Lookup16 {
  Vf low;
  Vf high;
};
NIBBLE_ALWAYS_INLINE Lookup16 load_lookup16(const float* table) noexcept { return {load(table), load(table + 8)}; }
// Table entries by bits N..N+3 of every lane.
template <int N>
NIBBLE_ALWAYS_INLINE Vf lookup16(const Lookup16& t, Vi v) noexcept {
  const Vi index = shift_right<N>(v);
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index),
                          from_bits(shift_left<28 - N>(v)));
}

NIBBLE_ALWAYS_INLINE float reduce_min(Vf v) noexcept {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}
NIBBLE_ALWAYS_INLINE float reduce_max(Vf v) noexcept {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
NIBBLE_ALWAYS_INLINE std::int32_t reduce_max_int(Vi v) noexcept {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}

// Sums of four blocks of 16 bytes.
NIBBLE_ALWAYS_INLINE void sum_blocks_4(const std::int8_t* q, std::int32_t* out) noexcept {
  // psadbw sums unsigned bytes: bias by 128 before, and by 16 * 128 after.
  const __m256i bias = _mm256_set1_epi8(-128);
  const __m256i a = _mm256_sad_epu8(_mm256_xor_si256(load_int(q), bias), _mm256_setzero_si256());
  const __m256i b = _mm256_sad_epu8(_mm256_xor_si256(load_int(q + 32), bias), _mm256_setzero_si256());
  const __m256i both =
      _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
  const __m256i sums = _mm256_hadd_epi32(both, both);  // blocks 0 2 . . | 1 3 . .
  const __m128i ordered = _mm_unpacklo_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_sub_epi32(ordered, _mm_set1_epi32(16 * 128)));
}

NIBBLE_ALWAYS_INLINE void prefetch(const void* p) noexcept {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

// Four floats each at p and 4 rows further.
NIBBLE_ALWAYS_INLINE Vf load_quads(const float* p, std::size_t stride) noexcept {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
}
// Blocks of 4 x 4: lane 4q + r of v[j] gets lane 4q + j of v[r].
NIBBLE_ALWAYS_INLINE void transpose_quads(Vf (&v)[4]) noexcept {
  const __m256 low01 = _mm256_unpacklo_ps(v[0], v[1]);
  const __m256 high01 = _mm256_unpackhi_ps(v[0], v[1]);
  const __m256 low23 = _mm256_unpacklo_ps(v[2], v[3]);
  const __m256 high23 = _mm256_unpackhi_ps(v[2], v[3]);
  v[0] = _mm256_shuffle_ps(low01, low23, 0x44);
  v[1] = _mm256_shuffle_ps(low01, low23, 0xEE);
  v[2] = _mm256_shuffle_ps(high01, high23, 0x44);
  v[3] = _mm256_shuffle_ps(high01, high23, 0xEE);
}
