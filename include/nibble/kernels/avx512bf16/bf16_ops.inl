// vdpbf16ps, for the kernel in vector/gemm_bf16.inl: one instruction is a lane's pair of products. It takes subnormals
// as 0 whatever MXCSR says.

struct FlushedSubnormals {
  FlushedSubnormals() noexcept {}
  ~FlushedSubnormals() {}
};

using Bf16Pairs = Vi;
NIBBLE_ALWAYS_INLINE Bf16Pairs bf16_pairs(Vi v) noexcept { return v; }
// Assembly: compilers that know the instruction disagree on the type of its operands.
NIBBLE_ALWAYS_INLINE Vf dot_bf16(Vf acc, Bf16Pairs w, Bf16Pairs x) noexcept {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}
