// Operations of the float kernels on AVX-512: one vector is one panel's 16 lanes.
// Included in the ISA's target region and namespace, and by nothing else.

using Vf = __m512;
using Vi = __m512i;

constexpr int lanes = 16;
constexpr int halves = 1;  // vectors a panel
// Tiles: rows and panels of the float GEMM; panels that a GEMV of one row, and of several, takes at once.
constexpr int gemm_rows = 12;
constexpr int gemm_panels = 2;
constexpr int gemm_panels_4 = 4;
constexpr int gemm_panels_2 = 4;
constexpr int gemm_panels_1 = 4;
constexpr int gemv_panels_1 = 4;
constexpr int gemv_panels_2 = 4;
constexpr int gemv_panels_4 = 4;
// Vectors of exp at once: as many chains of 15 dependent operations as registers hold.
constexpr int exp_vectors = 8;
constexpr int rows_tall = 12;  // rows of gemm_direct for many, and panels for a few
constexpr int rows_panels = 4;
constexpr std::size_t rows_prefetch = 2048;
constexpr std::size_t gemv_prefetch = 2048;  // bytes ahead in every panel
// The same of the bf16 product; bytes of a panel from which on it counts as long.
constexpr int bf16_tile_rows = 12;
constexpr int bf16_panels_4 = 4;
constexpr int bf16_panels_2 = 8;
constexpr int bf16_panels_1 = 8;
constexpr std::size_t bf16_prefetch = 2048;
constexpr std::size_t bf16_long_panel = 16384;
// A permute of 16 floats is one instruction: int4 codes then decode as nf4's do, by a table of the grid.
constexpr bool cheap_lookup = true;

NIBBLE_ALWAYS_INLINE __mmask16 first(std::size_t n) noexcept { return static_cast<__mmask16>((1U << n) - 1U); }

NIBBLE_ALWAYS_INLINE Vf zero() noexcept { return _mm512_setzero_ps(); }
NIBBLE_ALWAYS_INLINE Vf set1(float v) noexcept { return _mm512_set1_ps(v); }
NIBBLE_ALWAYS_INLINE Vi set1_int(std::int32_t v) noexcept { return _mm512_set1_epi32(v); }

// Loads and stores, at any alignment; the _n forms touch the first n < lanes elements only, the others are zero.
NIBBLE_ALWAYS_INLINE Vf load(const float* p) noexcept { return _mm512_loadu_ps(p); }
NIBBLE_ALWAYS_INLINE Vf load_n(const float* p, std::size_t n) noexcept {
  return _mm512_maskz_loadu_ps(first(n), p);
}
// The first n elements, the lanes of `rest` beside them.
NIBBLE_ALWAYS_INLINE Vf load_n_or(const float* p, std::size_t n, Vf rest) noexcept {
  return _mm512_mask_loadu_ps(rest, first(n), p);
}
NIBBLE_ALWAYS_INLINE void store(float* p, Vf v) noexcept { _mm512_storeu_ps(p, v); }
NIBBLE_ALWAYS_INLINE void store_n(float* p, Vf v, std::size_t n) noexcept {
  _mm512_mask_storeu_ps(p, first(n), v);
}
NIBBLE_ALWAYS_INLINE Vi load_int(const void* p) noexcept { return _mm512_loadu_si512(p); }
// A plane of one bit a code (kernels/args.hpp) for half h of a panel: its bits in the low nibbles, whatever in the high.
NIBBLE_ALWAYS_INLINE Vi load_top_bits(const std::uint8_t* p, int) noexcept {
  const Vi both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_srlv_epi64(both, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
}
NIBBLE_ALWAYS_INLINE void store_words(void* p, Vi v) noexcept { _mm512_storeu_si512(p, v); }
NIBBLE_ALWAYS_INLINE Vf load_fp16(const void* p) noexcept {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
NIBBLE_ALWAYS_INLINE Vf load_fp16_n(const void* p, std::size_t n) noexcept {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
}
NIBBLE_ALWAYS_INLINE Vi load_u16(const void* p) noexcept {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
NIBBLE_ALWAYS_INLINE Vi load_u16_n(const void* p, std::size_t n) noexcept {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p));
}
NIBBLE_ALWAYS_INLINE Vi load_s8(const std::int8_t* p) noexcept {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
NIBBLE_ALWAYS_INLINE Vi load_s8_n(const std::int8_t* p, std::size_t n) noexcept {
  return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p));
}
// Low 8 or 16 bits of every lane.
NIBBLE_ALWAYS_INLINE void store_8(std::int8_t* p, Vi v) noexcept {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}
NIBBLE_ALWAYS_INLINE void store_8_n(std::int8_t* p, Vi v, std::size_t n) noexcept {
  _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(v));
}
NIBBLE_ALWAYS_INLINE void store_16(std::uint16_t* p, Vi v) noexcept {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}
NIBBLE_ALWAYS_INLINE void store_16_n(std::uint16_t* p, Vi v, std::size_t n) noexcept {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(v));
}
NIBBLE_ALWAYS_INLINE void store_fp16(std::uint16_t* p, Vf v) noexcept {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
NIBBLE_ALWAYS_INLINE void store_fp16_n(std::uint16_t* p, Vf v, std::size_t n) noexcept {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// The fence keeps compilers from contracting the product with a later addition into an fma.
NIBBLE_ALWAYS_INLINE Vf mul(Vf a, Vf b) noexcept {
  Vf v = _mm512_mul_ps(a, b);
  asm("" : "+v"(v));
  return v;
}
// For a product that no addition or subtraction ever sees: nothing to contract, so the compiler may fold its load.
NIBBLE_ALWAYS_INLINE Vf mul_only(Vf a, Vf b) noexcept { return _mm512_mul_ps(a, b); }
NIBBLE_ALWAYS_INLINE Vf add(Vf a, Vf b) noexcept { return _mm512_add_ps(a, b); }
NIBBLE_ALWAYS_INLINE Vf sub(Vf a, Vf b) noexcept { return _mm512_sub_ps(a, b); }
// a * 2^n, rounded once; n holds integers.
constexpr bool has_scalef = true;
NIBBLE_ALWAYS_INLINE Vf scalef(Vf a, Vf n) noexcept { return _mm512_scalef_ps(a, n); }
NIBBLE_ALWAYS_INLINE Vf div(Vf a, Vf b) noexcept { return _mm512_div_ps(a, b); }
NIBBLE_ALWAYS_INLINE Vf fma(Vf a, Vf b, Vf c) noexcept { return _mm512_fmadd_ps(a, b, c); }
// a where a < b (a > b), else b: b where either is NaN.
NIBBLE_ALWAYS_INLINE Vf min(Vf a, Vf b) noexcept { return _mm512_min_ps(a, b); }
NIBBLE_ALWAYS_INLINE Vf max(Vf a, Vf b) noexcept { return _mm512_max_ps(a, b); }
NIBBLE_ALWAYS_INLINE Vf round(Vf v) noexcept {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
NIBBLE_ALWAYS_INLINE float round_scalar(float v) noexcept {
  return _mm_cvtss_f32(_mm_round_ps(_mm_set_ss(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
NIBBLE_ALWAYS_INLINE Vf zero_unless_positive_or_nan(Vf v) noexcept {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ), v);
}
NIBBLE_ALWAYS_INLINE Vf zero_if_nan(Vf v) noexcept {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
}
// where v is NaN: a, else b
NIBBLE_ALWAYS_INLINE Vi if_nan(Vf v, Vi a, Vi b) noexcept {
  return _mm512_mask_mov_epi32(b, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), a);
}

// Lanes 2i and 2i + 1 change places.
NIBBLE_ALWAYS_INLINE Vf swap_pairs(Vf v) noexcept { return _mm512_permute_ps(v, 0xB1); }

NIBBLE_ALWAYS_INLINE Vi bits(Vf v) noexcept { return _mm512_castps_si512(v); }
NIBBLE_ALWAYS_INLINE Vf from_bits(Vi v) noexcept { return _mm512_castsi512_ps(v); }
NIBBLE_ALWAYS_INLINE Vf to_float(Vi v) noexcept { return _mm512_cvtepi32_ps(v); }
NIBBLE_ALWAYS_INLINE Vi to_int(Vf v) noexcept { return _mm512_cvtps_epi32(v); }
NIBBLE_ALWAYS_INLINE Vi add_int(Vi a, Vi b) noexcept { return _mm512_add_epi32(a, b); }
NIBBLE_ALWAYS_INLINE Vi sub_int(Vi a, Vi b) noexcept { return _mm512_sub_epi32(a, b); }
NIBBLE_ALWAYS_INLINE Vi max_int(Vi a, Vi b) noexcept { return _mm512_max_epi32(a, b); }
NIBBLE_ALWAYS_INLINE Vi and_int(Vi a, Vi b) noexcept { return _mm512_and_si512(a, b); }
NIBBLE_ALWAYS_INLINE Vi or_int(Vi a, Vi b) noexcept { return _mm512_or_si512(a, b); }
NIBBLE_ALWAYS_INLINE Vi xor_int(Vi a, Vi b) noexcept { return _mm512_xor_si512(a, b); }
template <int N>
NIBBLE_ALWAYS_INLINE Vi shift_left(Vi v) noexcept {
  return _mm512_slli_epi32(v, N);
}
template <int N>
NIBBLE_ALWAYS_INLINE Vi shift_right(Vi v) noexcept {
  return _mm512_srli_epi32(v, N);
}
template <int N>
NIBBLE_ALWAYS_INLINE Vi shift_right_signed(Vi v) noexcept {
  return _mm512_srai_epi32(v, N);
}

// Byte J of every lane, zero-extended. One shuffle: shift and mask are two, on pipes that the conversions want.
template <int J>
NIBBLE_ALWAYS_INLINE Vi byte_of_lanes(Vi v) noexcept {
  // Control bytes with the top bit set give 0.
  constexpr int none = static_cast<int>(0x80808000U);
  const __m128i lane = _mm_setr_epi32(none + J, none + J + 4, none + J + 8, none + J + 12);
  return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(lane));
}

struct Lookup16 {
  Vf levels;
};
NIBBLE_ALWAYS_INLINE Lookup16 load_lookup16(const float* table) noexcept { return {load(table)}; }
// Table entries by bits N..N+3 of every lane.
template <int N>
NIBBLE_ALWAYS_INLINE Vf lookup16(const Lookup16& t, Vi v) noexcept {
  return _mm512_permutexvar_ps(shift_right<N>(v), t.levels);
}

NIBBLE_ALWAYS_INLINE float reduce_min(Vf v) noexcept { return _mm512_reduce_min_ps(v); }
NIBBLE_ALWAYS_INLINE float reduce_max(Vf v) noexcept { return _mm512_reduce_max_ps(v); }
NIBBLE_ALWAYS_INLINE std::int32_t reduce_max_int(Vi v) noexcept { return _mm512_reduce_max_epi32(v); }

// Sums of four blocks of 16 bytes.
NIBBLE_ALWAYS_INLINE void sum_blocks_4(const std::int8_t* q, std::int32_t* out) noexcept {
  // psadbw sums unsigned bytes: bias by 128 before, and by 16 * 128 after.
  const __m512i sums =
      _mm512_sad_epu8(_mm512_xor_si512(load_int(q), _mm512_set1_epi8(-128)), _mm512_setzero_si512());
  const __m256i halves_of_blocks = _mm512_cvtepi64_epi32(sums);
  const __m128i blocks =
      _mm_hadd_epi32(_mm256_castsi256_si128(halves_of_blocks), _mm256_extracti128_si256(halves_of_blocks, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_sub_epi32(blocks, _mm_set1_epi32(16 * 128)));
}

NIBBLE_ALWAYS_INLINE void prefetch(const void* p) noexcept {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

// Four floats each at p, and 4, 8 and 12 rows further.
NIBBLE_ALWAYS_INLINE Vf load_quads(const float* p, std::size_t stride) noexcept {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_mask_broadcast_f32x4(v, 0x00F0, _mm_loadu_ps(p + 4 * stride));
  v = _mm512_mask_broadcast_f32x4(v, 0x0F00, _mm_loadu_ps(p + 8 * stride));
  return _mm512_mask_broadcast_f32x4(v, 0xF000, _mm_loadu_ps(p + 12 * stride));
}
// Blocks of 4 x 4: lane 4q + r of v[j] gets lane 4q + j of v[r].
NIBBLE_ALWAYS_INLINE void transpose_quads(Vf (&v)[4]) noexcept {
  const __m512 low01 = _mm512_unpacklo_ps(v[0], v[1]);
  const __m512 high01 = _mm512_unpackhi_ps(v[0], v[1]);
  const __m512 low23 = _mm512_unpacklo_ps(v[2], v[3]);
  const __m512 high23 = _mm512_unpackhi_ps(v[2], v[3]);
  v[0] = _mm512_shuffle_ps(low01, low23, 0x44);
  v[1] = _mm512_shuffle_ps(low01, low23, 0xEE);
  v[2] = _mm512_shuffle_ps(high01, high23, 0x44);
  v[3] = _mm512_shuffle_ps(high01, high23, 0xEE);
}
