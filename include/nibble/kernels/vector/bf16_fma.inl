// What vdpbf16ps computes, by FMAs: for ISAs without it.

// While alive, subnormal operands are taken as 0 and subnormal results become 0, as vdpbf16ps does whatever MXCSR
// says. Every load lies behind the first fence and every store in front of the second: so does the arithmetic between.
class FlushedSubnormals {
 public:
#if NIBBLE_X86
  FlushedSubnormals() noexcept : saved_(_mm_getcsr()) { set(saved_ | 0x8040U); }
#else
  FlushedSubnormals() noexcept {
    asm volatile("mrs %0, fpcr" : "=r"(saved_) : : "memory");
    set(saved_ | (1U << 24));
  }
#endif
  ~FlushedSubnormals() { set(saved_); }
  FlushedSubnormals(const FlushedSubnormals&) = delete;
  FlushedSubnormals& operator=(const FlushedSubnormals&) = delete;

 private:
#if NIBBLE_X86
  static void set(unsigned value) noexcept { asm volatile("ldmxcsr %0" : : "m"(value) : "memory"); }
  unsigned saved_;
#else
  static void set(std::uint64_t value) noexcept { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
  std::uint64_t saved_;
#endif
};

// Both bfloat16 of every lane: odd[], then even[].
struct Bf16Pairs {
  Vf odd;
  Vf even;
};
NIBBLE_ALWAYS_INLINE Bf16Pairs bf16_pairs(Vi v) noexcept {
  return {from_bits(and_int(v, set1_int(static_cast<std::int32_t>(0xFFFF0000U)))), from_bits(shift_left<16>(v))};
}
NIBBLE_ALWAYS_INLINE Vf dot_bf16(Vf acc, const Bf16Pairs& w, const Bf16Pairs& x) noexcept {
  return fma(w.even, x.even, fma(w.odd, x.odd, acc));
}
