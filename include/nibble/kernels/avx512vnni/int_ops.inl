// The operations that the integer kernels of this ISA are written in. tests/emulation/avx512_int_ops.inl has the
// same ones in plain C++, so that the kernels are tested where there is no AVX-512. Included by table.hpp, in its
// region.

namespace int_ops {

using Int = __m512i;  // 16 x int32, or 64 bytes
using Float = __m512;

NIBBLE_ALWAYS_INLINE Int zero_int() noexcept { return _mm512_setzero_si512(); }
NIBBLE_ALWAYS_INLINE Int set_int(std::int32_t v) noexcept { return _mm512_set1_epi32(v); }
NIBBLE_ALWAYS_INLINE Int load_int(const void* p) noexcept { return _mm512_loadu_si512(p); }
/// The same, once: GCC 12 would load again for every use.
NIBBLE_ALWAYS_INLINE Int load_codes(const std::uint8_t* p) noexcept {
  Int v;
  asm("{vmovdqu64 %1, %0|vmovdqu64 %0, %1}"
      : "=v"(v)
      : "m"(*static_cast<const char(*)[64]>(static_cast<const void*>(p))));
  return v;
}
NIBBLE_ALWAYS_INLINE void store_int(void* p, Int v) noexcept { _mm512_storeu_si512(p, v); }

/// Four bytes from an address of any alignment, to every lane.
NIBBLE_ALWAYS_INLINE Int broadcast4(const void* p) noexcept {
  Int v;
  asm("{vpbroadcastd %1, %0|vpbroadcastd %0, %1}" : "=v"(v) : "m"(*static_cast<const char(*)[4]>(p)));
  return v;
}
/// 16 int8 to int32 lanes.
NIBBLE_ALWAYS_INLINE Int widen_s8(const std::int8_t* p) noexcept {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(static_cast<const void*>(p))));
}
NIBBLE_ALWAYS_INLINE Int add(Int a, Int b) noexcept { return _mm512_add_epi32(a, b); }
NIBBLE_ALWAYS_INLINE Int sub(Int a, Int b) noexcept { return _mm512_sub_epi32(a, b); }
NIBBLE_ALWAYS_INLINE Int mul(Int a, Int b) noexcept { return _mm512_mullo_epi32(a, b); }
/// a << count in every lane; 0 where the count is 32.
NIBBLE_ALWAYS_INLINE Int shift_left(Int a, Int count) noexcept { return _mm512_sllv_epi32(a, count); }
NIBBLE_ALWAYS_INLINE Int low_nibbles(Int a) noexcept { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
NIBBLE_ALWAYS_INLINE Int high_nibbles(Int a) noexcept {
  return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15));
}

// GCC 12 copies and spills the accumulators of the intrinsic; an asm keeps each in its register.
/// acc += u8 . s8 over each lane's four bytes.
NIBBLE_ALWAYS_INLINE void dot(Int& acc, Int u8, Int s8) noexcept {
  asm("{vpdpbusd %2, %1, %0|vpdpbusd %0, %1, %2}" : "+v"(acc) : "v"(u8), "v"(s8));
}

NIBBLE_ALWAYS_INLINE Float zero_float() noexcept { return _mm512_setzero_ps(); }
NIBBLE_ALWAYS_INLINE Float set_float(float v) noexcept { return _mm512_set1_ps(v); }
NIBBLE_ALWAYS_INLINE Float load_float(const float* p) noexcept { return _mm512_loadu_ps(p); }
NIBBLE_ALWAYS_INLINE void store_float(float* p, Float v) noexcept { _mm512_storeu_ps(p, v); }
/// 16 binary16 values.
NIBBLE_ALWAYS_INLINE Float load_half(const void* p) noexcept {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
NIBBLE_ALWAYS_INLINE Float to_float(Int v) noexcept { return _mm512_cvtepi32_ps(v); }
NIBBLE_ALWAYS_INLINE Float mul(Float a, Float b) noexcept { return _mm512_mul_ps(a, b); }
/// a * b + c, rounded once.
NIBBLE_ALWAYS_INLINE Float fma(Float a, Float b, Float c) noexcept { return _mm512_fmadd_ps(a, b, c); }
NIBBLE_ALWAYS_INLINE void prefetch(const void* p) noexcept {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

}  // namespace int_ops
