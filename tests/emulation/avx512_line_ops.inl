// nibble/kernels/avx512vnni/line_ops.inl in plain C++.

NIBBLE_EMULATED Vi above(Vf a, Vf b) noexcept {
  return each_int([&](int i) { return a.v[i] > b.v[i] ? -1 : 0; });
}
NIBBLE_EMULATED Vf select(Vi mask, Vf a, Vf b) noexcept {
  return each([&](int i) { return mask.v[i] < 0 ? a.v[i] : b.v[i]; });
}
NIBBLE_EMULATED void store_nibbles(std::uint8_t* p, Vi v) noexcept {
  for (int i = 0; i < 8; ++i) p[i] = static_cast<std::uint8_t>(v.v[2 * i] | v.v[2 * i + 1] << 4);
}
NIBBLE_EMULATED Vi load_nibbles(const std::uint8_t* p) noexcept {
  return each_int([&](int i) { return p[i / 2] >> (i % 2 * 4) & 15; });
}
NIBBLE_EMULATED void transpose(Vi (&v)[lanes]) noexcept {
  for (int i = 0; i < lanes; ++i)
    for (int j = 0; j < i; ++j) std::swap(v[i].v[j], v[j].v[i]);
}
struct LevelSearch {};
NIBBLE_EMULATED LevelSearch load_levels() noexcept { return {}; }
NIBBLE_EMULATED Vi nearest_level(const LevelSearch&, Vf x) noexcept {
  return each_int([&](int i) { return nf4_from_float(x.v[i]); });
}
