// The operations that the integer kernels of this ISA are written in: AVX2's, and what has a dot product in it.
// tests/emulation/avxvnni_int_ops.inl has the same ones in plain C++, so that the kernels are tested where there is no
// AVX-VNNI. Included by table.hpp, in its region.

namespace int_ops {

using namespace avx2::int_ops;

// GCC 12 copies and spills the accumulators of the intrinsic; an asm keeps each in its register. VEX-encoded: a CPU
// may have AVX-VNNI and no AVX-512.
/// acc += u8 . s8 over each lane's four bytes.
NIBBLE_ALWAYS_INLINE void dot(Int& acc, Int u8, Int s8) noexcept {
  asm("{%{vex%} vpdpbusd %2, %1, %0|%{vex%} vpdpbusd %0, %1, %2}" : "+x"(acc) : "x"(u8), "x"(s8));
}

/// acc0 += w0 . b, acc1 += w1 . b, where b has the four bytes at x + Times * stride + Bytes in every lane. In one
/// piece: compilers would keep an address register for every pair of Times and Bytes, and have none left.
template <int Times, int Bytes>
NIBBLE_ALWAYS_INLINE void dot_pair(Int& acc0, Int& acc1, Int w0, Int w1, const std::int8_t* x,
                                   std::size_t stride) noexcept {
  // The array stands for what is read, wherever in the rows.
  using Rows = const std::int8_t(*)[1 << 20];
  Int b;
  if constexpr (Times == 0)
    asm("{vpbroadcastd %c7(%5), %2|vpbroadcastd %2, dword ptr [%5 + %c7]}\n\t"
        "{%{vex%} vpdpbusd %2, %3, %0|%{vex%} vpdpbusd %0, %3, %2}\n\t"
        "{%{vex%} vpdpbusd %2, %4, %1|%{vex%} vpdpbusd %1, %4, %2}"
        : "+x"(acc0), "+x"(acc1), "=&x"(b)
        : "x"(w0), "x"(w1), "r"(x), "m"(*reinterpret_cast<Rows>(x)), "i"(Bytes));
  else
    asm("{vpbroadcastd %c7(%5,%6,%c8), %2|vpbroadcastd %2, dword ptr [%5 + %6 * %c8 + %c7]}\n\t"
        "{%{vex%} vpdpbusd %2, %3, %0|%{vex%} vpdpbusd %0, %3, %2}\n\t"
        "{%{vex%} vpdpbusd %2, %4, %1|%{vex%} vpdpbusd %1, %4, %2}"
        : "+x"(acc0), "+x"(acc1), "=&x"(b)
        : "x"(w0), "x"(w1), "r"(x), "r"(stride), "i"(Bytes), "i"(Times), "m"(*reinterpret_cast<Rows>(x)));
}

/// 15 in every byte.
NIBBLE_ALWAYS_INLINE Int nibble_mask() noexcept { return _mm256_set1_epi8(15); }
// Compilers would load once for the low and the high nibbles, and lack a register for it.
NIBBLE_ALWAYS_INLINE Int load_low_nibbles(const std::uint8_t* p, Int mask) noexcept {
  Int v;
  asm("{vpand %1, %2, %0|vpand %0, %2, %1}"
      : "=x"(v)
      : "m"(*static_cast<const char(*)[32]>(static_cast<const void*>(p))), "x"(mask));
  return v;
}
NIBBLE_ALWAYS_INLINE Int load_high_nibbles(const std::uint8_t* p, Int mask) noexcept {
  Int v;
  asm("{vmovdqu %1, %0\n\tvpsrlw $4, %0, %0\n\tvpand %0, %2, %0|"
      "vmovdqu %0, %1\n\tvpsrlw %0, %0, 4\n\tvpand %0, %2, %0}"
      : "=&x"(v)
      : "m"(*static_cast<const char(*)[32]>(static_cast<const void*>(p))), "x"(mask));
  return v;
}

}  // namespace int_ops
