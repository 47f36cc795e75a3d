// Operations of groups.inl and lanes.inl on AArch64, beside float_ops.inl's.
// Included in the namespaces of the ISAs that have it, and by nothing else.

// All ones where a > b, else 0.
NIBBLE_ALWAYS_INLINE Vi above(Vf a, Vf b) noexcept { return vreinterpretq_s32_u32(vcgtq_f32(a, b)); }
// where the mask has ones: a, else b
NIBBLE_ALWAYS_INLINE Vf select(Vi mask, Vf a, Vf b) noexcept {
  return vbslq_f32(vreinterpretq_u32_s32(mask), a, b);
}

// Two lanes a byte, the even one in the low half. Lanes hold 0..15.
NIBBLE_ALWAYS_INLINE void store_nibbles(std::uint8_t* p, Vi v) noexcept {
  const uint64x2_t lanes64 = vreinterpretq_u64_s32(v);
  const uint64x2_t pairs = vorrq_u64(lanes64, vshrq_n_u64(lanes64, 28));
  p[0] = vgetq_lane_u8(vreinterpretq_u8_u64(pairs), 0);
  p[1] = vgetq_lane_u8(vreinterpretq_u8_u64(pairs), 8);
}
NIBBLE_ALWAYS_INLINE Vi load_nibbles(const std::uint8_t* p) noexcept {
  const Vi codes = {p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4};
  return codes;
}

// Lane j of vector i <-> lane i of vector j.
NIBBLE_ALWAYS_INLINE void transpose(Vi (&v)[lanes]) noexcept {
  const auto wide = [](Vi a) noexcept { return vreinterpretq_s64_s32(a); };
  const Vi a = vtrn1q_s32(v[0], v[1]);
  const Vi b = vtrn2q_s32(v[0], v[1]);
  const Vi c = vtrn1q_s32(v[2], v[3]);
  const Vi d = vtrn2q_s32(v[2], v[3]);
  v[0] = vreinterpretq_s32_s64(vtrn1q_s64(wide(a), wide(c)));
  v[1] = vreinterpretq_s32_s64(vtrn1q_s64(wide(b), wide(d)));
  v[2] = vreinterpretq_s32_s64(vtrn2q_s64(wide(a), wide(c)));
  v[3] = vreinterpretq_s32_s64(vtrn2q_s64(wide(b), wide(d)));
}

// nf4: how many of the 15 midpoints between levels are below, one after the other. A float is above a midpoint if and
// only if it is above the largest float that is not.
struct LevelSearch {
  float below[15];
};
inline constexpr LevelSearch level_search = [] {
  LevelSearch s = {};
  for (int i = 0; i < 15; ++i) s.below[i] = float_below(nf4_midpoints[i]);
  return s;
}();
NIBBLE_ALWAYS_INLINE const LevelSearch& load_levels() noexcept { return level_search; }
NIBBLE_ALWAYS_INLINE Vi nearest_level(const LevelSearch& s, Vf x) noexcept {
  Vi level = set1_int(0);
  NIBBLE_UNROLL
  for (float below : s.below) level = sub_int(level, above(x, set1(below)));
  return level;
}
