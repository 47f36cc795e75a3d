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

/// Bits of 32-bit lanes moved by N: what leaves a byte enters the next one.
template <int N>
NIBBLE_ALWAYS_INLINE Int shift_right_bits(Int a) noexcept {
  return _mm512_srli_epi32(a, N);
}
template <int N>
NIBBLE_ALWAYS_INLINE Int shift_left_bits(Int a) noexcept {
  return _mm512_slli_epi32(a, N);
}
/// Every byte & Byte; every byte's bits of Byte from a, the others from b.
template <int Byte>
NIBBLE_ALWAYS_INLINE Int and_bytes(Int a) noexcept {
  return _mm512_and_si512(a, _mm512_set1_epi8(Byte));
}
template <int Byte>
NIBBLE_ALWAYS_INLINE Int select_bytes(Int a, Int b) noexcept {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(Byte), a, b, 0xCA);
}
/// A plane of one bit a code (kernels/args.hpp): its bits in the low nibbles, whatever in the high.
NIBBLE_ALWAYS_INLINE Int load_top_bits(const std::uint8_t* p, int) noexcept {
  const Int both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_srlv_epi64(both, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
}

// GCC 12 copies and spills the accumulators of the intrinsic; an asm keeps each in its register.
/// acc += u8 . s8 over each lane's four bytes.
NIBBLE_ALWAYS_INLINE void dot(Int& acc, Int u8, Int s8) noexcept {
  asm("{vpdpbusd %2, %1, %0|vpdpbusd %0, %1, %2}" : "+v"(acc) : "v"(u8), "v"(s8));
}

/// The same with four bytes of s8 for every lane.
NIBBLE_ALWAYS_INLINE void dot_broadcast(Int& acc, Int u8, const std::int8_t* s8) noexcept {
  asm("{vpdpbusd %2%{1to16%}, %1, %0|vpdpbusd %0, %1, %2%{1to16%}}"
      : "+v"(acc)
      : "v"(u8), "m"(*static_cast<const char(*)[4]>(static_cast<const void*>(s8))));
}

// 4 k of 5 or 6 rows times 2 panels, in one asm: of single operations GCC 12 spills what is broadcast. Rows lie at x,
// x + s, x + 2s and from x3 on, panels at c and c + d; broadcasts are in zmm16 to 21, weights in zmm22.
#define NIBBLE_ROW(reg, att, intel) \
  "{vpbroadcastd " att ", %%zmm" #reg "|vpbroadcastd %%zmm" #reg ", dword ptr [" intel "]}\n\t"
#define NIBBLE_ROWS_5(at)                                       \
  NIBBLE_ROW(16, #at "(%[x])", "%[x] + " #at)                   \
  NIBBLE_ROW(17, #at "(%[x],%[s])", "%[x] + %[s] + " #at)       \
  NIBBLE_ROW(18, #at "(%[x],%[s],2)", "%[x] + 2 * %[s] + " #at) \
  NIBBLE_ROW(19, #at "(%[x3])", "%[x3] + " #at)                 \
  NIBBLE_ROW(20, #at "(%[x3],%[s])", "%[x3] + %[s] + " #at)
#define NIBBLE_ROWS_6(at) NIBBLE_ROWS_5(at) NIBBLE_ROW(21, #at "(%[x3],%[s],2)", "%[x3] + 2 * %[s] + " #at)
#define NIBBLE_BYTES(att, intel) "{vmovdqu64 " att ", %%zmm22|vmovdqu64 %%zmm22, zmmword ptr [" intel "]}\n\t"
#define NIBBLE_BYTES_0(at) NIBBLE_BYTES(#at "(%[c])", "%[c] + " #at)
#define NIBBLE_BYTES_1(at) NIBBLE_BYTES(#at "(%[c],%[d])", "%[c] + %[d] + " #at)
#define NIBBLE_MASK "{vpandd %[mask], %%zmm22, %%zmm22|vpandd %%zmm22, %%zmm22, %[mask]}\n\t"
#define NIBBLE_CODES_8_low(p) NIBBLE_BYTES_##p(0)
#define NIBBLE_CODES_8_high(p) NIBBLE_BYTES_##p(64)
#define NIBBLE_CODES_4_low(p) NIBBLE_BYTES_##p(0) NIBBLE_MASK
#define NIBBLE_CODES_4_high(p) \
  NIBBLE_BYTES_##p(0) "{vpsrlw $4, %%zmm22, %%zmm22|vpsrlw %%zmm22, %%zmm22, 4}\n\t" NIBBLE_MASK
#define NIBBLE_DOT(sum, x) \
  "{vpdpbusd %%zmm" #x ", %%zmm22, %[" #sum "]|vpdpbusd %[" #sum "], %%zmm22, %%zmm" #x "}\n\t"
#define NIBBLE_DOTS_5(p) \
  NIBBLE_DOT(d0##p, 16) NIBBLE_DOT(d1##p, 17) NIBBLE_DOT(d2##p, 18) NIBBLE_DOT(d3##p, 19) NIBBLE_DOT(d4##p, 20)
#define NIBBLE_DOTS_6(p) NIBBLE_DOTS_5(p) NIBBLE_DOT(d5##p, 21)
#define NIBBLE_SUMS(r) [d##r##0] "+v"(sums[r][0]), [d##r##1] "+v"(sums[r][1])
#define NIBBLE_SUMS_5 NIBBLE_SUMS(0), NIBBLE_SUMS(1), NIBBLE_SUMS(2), NIBBLE_SUMS(3), NIBBLE_SUMS(4)
#define NIBBLE_SUMS_6 NIBBLE_SUMS_5, NIBBLE_SUMS(5)
#define NIBBLE_MASK_8
#define NIBBLE_MASK_4 , [mask] "v"(_mm512_set1_epi8(15))
// 30 operands are the most that GCC takes: what is read is not among them but in "memory".
#define NIBBLE_HALF(rows, bits, half, x_at)                                                     \
  /** sums += u8 . s8: the low or high half of a unit of 8 k. */                                \
  NIBBLE_ALWAYS_INLINE void dot##bits##_##half(Int(&sums)[rows][2], const std::uint8_t* codes,  \
                                               std::size_t panel_stride, const std::int8_t* x,  \
                                               std::size_t x_stride) noexcept {                 \
    asm volatile(NIBBLE_ROWS_##rows(x_at) NIBBLE_CODES_##bits##_##half(0) NIBBLE_DOTS_##rows(0) \
                     NIBBLE_CODES_##bits##_##half(1) NIBBLE_DOTS_##rows(1)                      \
                 : NIBBLE_SUMS_##rows                                                           \
                 : [c] "r"(codes), [d] "r"(panel_stride), [x] "r"(x), [s] "r"(x_stride),        \
                   [x3] "r"(x + 3 * x_stride) NIBBLE_MASK_##bits                                \
                 : "memory", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22");    \
  }
NIBBLE_HALF(5, 8, low, 0)
NIBBLE_HALF(5, 8, high, 4)
NIBBLE_HALF(6, 8, low, 0)
NIBBLE_HALF(6, 8, high, 4)
NIBBLE_HALF(5, 4, low, 0)
NIBBLE_HALF(5, 4, high, 4)
NIBBLE_HALF(6, 4, low, 0)
NIBBLE_HALF(6, 4, high, 4)
#undef NIBBLE_ROW
#undef NIBBLE_ROWS_5
#undef NIBBLE_ROWS_6
#undef NIBBLE_BYTES
#undef NIBBLE_BYTES_0
#undef NIBBLE_BYTES_1
#undef NIBBLE_MASK
#undef NIBBLE_CODES_8_low
#undef NIBBLE_CODES_8_high
#undef NIBBLE_CODES_4_low
#undef NIBBLE_CODES_4_high
#undef NIBBLE_DOT
#undef NIBBLE_DOTS_5
#undef NIBBLE_DOTS_6
#undef NIBBLE_SUMS
#undef NIBBLE_SUMS_5
#undef NIBBLE_SUMS_6
#undef NIBBLE_MASK_8
#undef NIBBLE_MASK_4
#undef NIBBLE_HALF

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
