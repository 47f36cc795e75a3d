// The operations that the integer kernels of this ISA are written in. Included by table.hpp, in its region.

namespace int_ops {

using Int = __m256i;  // 8 x int32, 16 x int16 or 32 bytes
using Float = __m256;
inline constexpr std::size_t lanes = 8;

NIBBLE_ALWAYS_INLINE Int zero_int() noexcept { return _mm256_setzero_si256(); }
NIBBLE_ALWAYS_INLINE Int set_int(std::int32_t v) noexcept { return _mm256_set1_epi32(v); }
NIBBLE_ALWAYS_INLINE Int load_int(const void* p) noexcept {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
/// The same, once: GCC 12 would load again for every use.
NIBBLE_ALWAYS_INLINE Int load_codes(const std::uint8_t* p) noexcept {
  Int v;
  asm("{vmovdqu %1, %0|vmovdqu %0, %1}"
      : "=x"(v)
      : "m"(*static_cast<const char(*)[32]>(static_cast<const void*>(p))));
  return v;
}
NIBBLE_ALWAYS_INLINE void store_int(void* p, Int v) noexcept { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

/// Four bytes from an address of any alignment, to every lane.
NIBBLE_ALWAYS_INLINE Int broadcast4(const void* p) noexcept {
  Int v;
  asm("{vpbroadcastd %1, %0|vpbroadcastd %0, %1}" : "=x"(v) : "m"(*static_cast<const char(*)[4]>(p)));
  return v;
}
/// Eight bytes to every pair of lanes.
NIBBLE_ALWAYS_INLINE Int broadcast8(const void* p) noexcept {
  Int v;
  asm("{vpbroadcastq %1, %0|vpbroadcastq %0, %1}" : "=x"(v) : "m"(*static_cast<const char(*)[8]>(p)));
  return v;
}
/// 8 int8 to int32 lanes.
NIBBLE_ALWAYS_INLINE Int widen_s8(const std::int8_t* p) noexcept {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(static_cast<const void*>(p))));
}
/// 16 int8 to int16.
NIBBLE_ALWAYS_INLINE Int widen_s8_s16(const std::int8_t* p) noexcept {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(static_cast<const void*>(p))));
}
/// The low (high) eight bytes of each half as uint16.
NIBBLE_ALWAYS_INLINE Int widen_low(Int bytes) noexcept {
  return _mm256_unpacklo_epi8(bytes, _mm256_setzero_si256());
}
NIBBLE_ALWAYS_INLINE Int widen_high(Int bytes) noexcept {
  return _mm256_unpackhi_epi8(bytes, _mm256_setzero_si256());
}

NIBBLE_ALWAYS_INLINE Int add(Int a, Int b) noexcept { return _mm256_add_epi32(a, b); }
NIBBLE_ALWAYS_INLINE Int sub(Int a, Int b) noexcept { return _mm256_sub_epi32(a, b); }
NIBBLE_ALWAYS_INLINE Int mul(Int a, Int b) noexcept { return _mm256_mullo_epi32(a, b); }
/// a << count in every lane; 0 where the count is 32.
NIBBLE_ALWAYS_INLINE Int shift_left(Int a, Int count) noexcept { return _mm256_sllv_epi32(a, count); }
NIBBLE_ALWAYS_INLINE Int low_nibbles(Int a) noexcept { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
NIBBLE_ALWAYS_INLINE Int high_nibbles(Int a) noexcept {
  return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15));
}

/// Bits of 32-bit lanes moved by N: what leaves a byte enters the next one.
template <int N>
NIBBLE_ALWAYS_INLINE Int shift_right_bits(Int a) noexcept {
  return _mm256_srli_epi32(a, N);
}
template <int N>
NIBBLE_ALWAYS_INLINE Int shift_left_bits(Int a) noexcept {
  return _mm256_slli_epi32(a, N);
}
/// Every byte & Byte; every byte's bits of Byte from a, the others from b.
template <int Byte>
NIBBLE_ALWAYS_INLINE Int and_bytes(Int a) noexcept {
  return _mm256_and_si256(a, _mm256_set1_epi8(Byte));
}
template <int Byte>
NIBBLE_ALWAYS_INLINE Int select_bytes(Int a, Int b) noexcept {
  const Int mask = _mm256_set1_epi8(Byte);
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}
/// A plane of one bit a code (kernels/args.hpp) of half h of a panel: its bits in the low nibbles, whatever in the high.
NIBBLE_ALWAYS_INLINE Int load_top_bits(const std::uint8_t* p, int h) noexcept {
  const Int both = load_int(p);
  return h == 0 ? both : _mm256_srli_epi32(both, 4);
}

// GCC 12 moves the products of an unrolled loop before the additions and spills them: an asm keeps both together.
/// u8 . s8 over pairs of bytes, int16. Exact where u8 is at most 15.
NIBBLE_ALWAYS_INLINE Int dot16(Int u8, Int s8) noexcept {
  Int out;
  asm("{vpmaddubsw %2, %1, %0|vpmaddubsw %0, %1, %2}" : "=x"(out) : "x"(u8), "x"(s8));
  return out;
}
/// acc16 += the same. Up to 8 such sums of u8 <= 15 fit: 8 * 2 * 15 * 128 = 30,720.
NIBBLE_ALWAYS_INLINE void add_dot16(Int& acc16, Int u8, Int s8) noexcept {
  asm("{vpmaddubsw %1, %2, %1\n\tvpaddw %1, %0, %0|vpmaddubsw %1, %2, %1\n\tvpaddw %0, %0, %1}"
      : "+x"(acc16), "+x"(s8)
      : "x"(u8));
}
/// The same where s8 is needed again.
NIBBLE_ALWAYS_INLINE void add_dot16_kept(Int& acc16, Int u8, Int s8) noexcept {
  Int t;
  asm("{vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0|vpmaddubsw %1, %2, %3\n\tvpaddw %0, %0, %1}"
      : "+x"(acc16), "=&x"(t)
      : "x"(u8), "x"(s8));
}
/// Sums of neighbouring int16, int32.
NIBBLE_ALWAYS_INLINE Int pair_sums(Int s16) noexcept { return _mm256_madd_epi16(s16, _mm256_set1_epi16(1)); }
/// acc += a . b over pairs of int16.
NIBBLE_ALWAYS_INLINE void add_dot32(Int& acc, Int a, Int b) noexcept {
  Int t;
  asm("{vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0|vpmaddwd %1, %2, %3\n\tvpaddd %0, %0, %1}"
      : "+x"(acc), "=&x"(t)
      : "x"(a), "x"(b));
}
/// The same where b is not needed any more: one register less.
NIBBLE_ALWAYS_INLINE void add_dot32_last(Int& acc, Int a, Int b) noexcept {
  asm("{vpmaddwd %1, %2, %1\n\tvpaddd %1, %0, %0|vpmaddwd %1, %2, %1\n\tvpaddd %0, %0, %1}"
      : "+x"(acc), "+x"(b)
      : "x"(a));
}
/// Per half: lanes 0, 2 of a and of b (1, 3).
NIBBLE_ALWAYS_INLINE Int even_lanes(Int a, Int b) noexcept {
  return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
}
NIBBLE_ALWAYS_INLINE Int odd_lanes(Int a, Int b) noexcept {
  return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xdd));
}
/// Per half: a0 + a1, a2 + a3, b0 + b1, b2 + b3.
NIBBLE_ALWAYS_INLINE Int fold(Int a, Int b) noexcept { return add(even_lanes(a, b), odd_lanes(a, b)); }

NIBBLE_ALWAYS_INLINE Float zero_float() noexcept { return _mm256_setzero_ps(); }
NIBBLE_ALWAYS_INLINE Float set_float(float v) noexcept { return _mm256_set1_ps(v); }
NIBBLE_ALWAYS_INLINE Float load_float(const float* p) noexcept { return _mm256_loadu_ps(p); }
NIBBLE_ALWAYS_INLINE void store_float(float* p, Float v) noexcept { _mm256_storeu_ps(p, v); }
/// 8 binary16 values.
NIBBLE_ALWAYS_INLINE Float load_half(const void* p) noexcept {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
NIBBLE_ALWAYS_INLINE Float to_float(Int v) noexcept { return _mm256_cvtepi32_ps(v); }
NIBBLE_ALWAYS_INLINE Float mul(Float a, Float b) noexcept { return _mm256_mul_ps(a, b); }
/// a * b + c, rounded once.
NIBBLE_ALWAYS_INLINE Float fma(Float a, Float b, Float c) noexcept { return _mm256_fmadd_ps(a, b, c); }
NIBBLE_ALWAYS_INLINE void prefetch(const void* p) noexcept {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

}  // namespace int_ops
