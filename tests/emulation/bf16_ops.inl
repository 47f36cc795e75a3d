// nibble/kernels/avx512bf16/bf16_ops.inl in plain C++.

struct FlushedSubnormals {
  FlushedSubnormals() noexcept {}
  ~FlushedSubnormals() {}
};

using Bf16Pairs = Vi;
inline Bf16Pairs bf16_pairs(const Vi& v) noexcept { return v; }
NIBBLE_EMULATED Vf dot_bf16(Vf acc, const Vi& w, const Vi& x) noexcept {
  const auto half = [](std::int32_t v, unsigned shift) {
    return float_from_bf16(static_cast<std::uint16_t>(unsigned_of(v) >> shift));
  };
  return each([&](int i) {
    const float odd = scalar::fma_flushed(half(w.v[i], 16), half(x.v[i], 16), acc.v[i]);
    return scalar::fma_flushed(half(w.v[i], 0), half(x.v[i], 0), odd);
  });
}
