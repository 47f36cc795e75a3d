// Operations of groups.inl and lanes.inl on AVX2, beside float_ops.inl's.
// Included in the ISA's target region and namespace, and by nothing else.

// All ones where a > b, else 0.
NIBBLE_ALWAYS_INLINE Vi above(Vf a, Vf b) noexcept { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
// where the mask has ones: a, else b
NIBBLE_ALWAYS_INLINE Vf select(Vi mask, Vf a, Vf b) noexcept {
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(mask));
}
// Entries 0..7 of a table by every lane.
NIBBLE_ALWAYS_INLINE Vf load_lookup8(const float* table) noexcept { return _mm256_loadu_ps(table); }
NIBBLE_ALWAYS_INLINE Vf lookup8(Vf table, Vi index) noexcept { return _mm256_permutevar8x32_ps(table, index); }

// Two lanes a byte, the even one in the low half. Lanes hold 0..15.
NIBBLE_ALWAYS_INLINE void store_nibbles(std::uint8_t* p, Vi v) noexcept {
  const __m256i pairs = _mm256_or_si256(v, _mm256_srli_epi64(v, 28));
  // The low byte of every quarter.
  const __m256i bytes = _mm256_shuffle_epi8(pairs, _mm256_broadcastsi128_si256(_mm_cvtsi32_si128(0x0800)));
  const std::uint32_t word = (static_cast<std::uint32_t>(_mm256_extract_epi16(bytes, 0)) & 0xFFFFU) |
                             static_cast<std::uint32_t>(_mm256_extract_epi16(bytes, 8)) << 16;
  std::memcpy(p, &word, 4);
}
NIBBLE_ALWAYS_INLINE Vi load_nibbles(const std::uint8_t* p) noexcept {
  int word;
  std::memcpy(&word, p, 4);
  const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(word));
  return _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi64(bytes, 28)), _mm256_set1_epi32(15));
}

// Lane j of vector i <-> lane i of vector j.
NIBBLE_ALWAYS_INLINE void transpose(Vi (&v)[lanes]) noexcept {
  Vi t[lanes];
  NIBBLE_UNROLL
  for (int i = 0; i < lanes; i += 2) {
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  NIBBLE_UNROLL
  for (int i = 0; i < lanes; i += 4) {
    v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  NIBBLE_UNROLL
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm256_permute2x128_si256(v[c], v[c + 4], 0x20);
    t[c + 4] = _mm256_permute2x128_si256(v[c], v[c + 4], 0x31);
  }
  NIBBLE_UNROLL
  for (int i = 0; i < lanes; ++i) v[i] = t[i];
}

// nf4: the midpoints between levels, sorted by the step of a binary search that asks for them. A float is above a
// midpoint if and only if it is above the largest float that is not.
struct LevelSearch {
  Vf last;    // 7
  Vf high;    // 11
  Vf low;     // 3
  Vf second;  // 1 5 9 13
  Vf first;   // 0 2 4 .. 14
};
alignas(64) inline constexpr float level_steps[16] = {
    float_below(nf4_midpoints[1]),  float_below(nf4_midpoints[5]),
    float_below(nf4_midpoints[9]),  float_below(nf4_midpoints[13]),
    float_below(nf4_midpoints[3]),  float_below(nf4_midpoints[11]),
    float_below(nf4_midpoints[7]),  0.0F,
    float_below(nf4_midpoints[0]),  float_below(nf4_midpoints[2]),
    float_below(nf4_midpoints[4]),  float_below(nf4_midpoints[6]),
    float_below(nf4_midpoints[8]),  float_below(nf4_midpoints[10]),
    float_below(nf4_midpoints[12]), float_below(nf4_midpoints[14])};
NIBBLE_ALWAYS_INLINE LevelSearch load_levels() noexcept {
  return {set1(level_steps[6]), set1(level_steps[5]), set1(level_steps[4]), load_lookup8(level_steps),
          load_lookup8(level_steps + 8)};
}
NIBBLE_ALWAYS_INLINE Vi nearest_level(const LevelSearch& s, Vf x) noexcept {
  // Masks are -1 where a midpoint is below x: subtracting adds.
  const Vi eight = above(x, s.last);
  const Vi four = above(x, select(eight, s.high, s.low));
  const Vi pair = sub_int(sub_int(set1_int(0), add_int(eight, eight)), four);
  const Vi two = above(x, lookup8(s.second, pair));
  const Vi eighth = sub_int(add_int(pair, pair), two);
  const Vi one = above(x, lookup8(s.first, eighth));
  return sub_int(add_int(eighth, eighth), one);
}
