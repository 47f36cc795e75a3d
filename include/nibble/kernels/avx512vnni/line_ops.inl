// Operations of groups.inl and lanes.inl on AVX-512, beside float_ops.inl's.
// Included in the ISA's target region and namespace, and by nothing else.

// All ones where a > b, else 0.
NIBBLE_ALWAYS_INLINE Vi above(Vf a, Vf b) noexcept {
  return _mm512_movm_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ));
}
// where the mask has ones: a, else b
NIBBLE_ALWAYS_INLINE Vf select(Vi mask, Vf a, Vf b) noexcept {
  return _mm512_mask_mov_ps(b, _mm512_movepi32_mask(mask), a);
}

// Two lanes a byte, the even one in the low half. Lanes hold 0..15.
NIBBLE_ALWAYS_INLINE void store_nibbles(std::uint8_t* p, Vi v) noexcept {
  const __m512i pairs = _mm512_or_si512(v, _mm512_srli_epi64(v, 28));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(pairs));
}
NIBBLE_ALWAYS_INLINE Vi load_nibbles(const std::uint8_t* p) noexcept {
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)), _mm512_set1_epi32(15));
}

// Lane j of vector i <-> lane i of vector j.
NIBBLE_ALWAYS_INLINE void transpose(Vi (&v)[lanes]) noexcept {
  Vi t[lanes];
  NIBBLE_UNROLL
  for (int i = 0; i < lanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  // v[4 b + c]: column c of every 128-bit part, rows 4 b .. 4 b + 3.
  NIBBLE_UNROLL
  for (int i = 0; i < lanes; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  NIBBLE_UNROLL
  for (int c = 0; c < 4; ++c) {
    const Vi low = _mm512_shuffle_i32x4(v[c], v[c + 4], 0x88);        // parts 0 and 2 of rows 0..7
    const Vi low_odd = _mm512_shuffle_i32x4(v[c], v[c + 4], 0xDD);    // parts 1 and 3
    const Vi high = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0x88);  // the same of rows 8..15
    const Vi high_odd = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0xDD);
    t[c] = _mm512_shuffle_i32x4(low, high, 0x88);
    t[c + 8] = _mm512_shuffle_i32x4(low, high, 0xDD);
    t[c + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    t[c + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD);
  }
  NIBBLE_UNROLL
  for (int i = 0; i < lanes; ++i) v[i] = t[i];
}

// nf4: [-1, 1] is cut into 32 cells, so narrow that none holds two midpoints between levels. A code is the number of
// midpoints below the cell and one more above the cell's own midpoint.
struct LevelCells {
  alignas(64) float midpoints
      [32];  // the largest float that is not above the midpoint: floats above one are above both
  alignas(64) std::int32_t codes[32];
};
// The cell of x is rne(15.5 x + 15.5). No midpoint lies near enough to the end of a cell for rounding to matter:
// the nearest is 0.03 of a cell away (checked by a test, float by float around every midpoint and end).
inline constexpr LevelCells level_cells = [] {
  LevelCells cells = {};
  for (int cell = 0; cell < 32; ++cell) {
    const double begin = (cell - 0.5 - 15.5) / 15.5;
    const double end = (cell + 0.5 - 15.5) / 15.5;
    int code = 0;
    while (code < 15 && nf4_midpoints[code] < begin) ++code;
    cells.codes[cell] = code;
    cells.midpoints[cell] = code < 15 && nf4_midpoints[code] < end ? float_below(nf4_midpoints[code]) : 2.0F;
  }
  return cells;
}();
struct LevelSearch {
  Vf midpoints[2];
  Vi codes[2];
};
NIBBLE_ALWAYS_INLINE LevelSearch load_levels() noexcept {
  return {{load(level_cells.midpoints), load(level_cells.midpoints + 16)},
          {load_int(level_cells.codes), load_int(level_cells.codes + 16)}};
}
NIBBLE_ALWAYS_INLINE Vi nearest_level(const LevelSearch& s, Vf x) noexcept {
  x = min(max(x, set1(-1.0F)), set1(1.0F));
  const Vi cell = to_int(fma(x, set1(15.5F), set1(15.5F)));
  const Vi code = _mm512_permutex2var_epi32(s.codes[0], cell, s.codes[1]);
  const __mmask16 more =
      _mm512_cmp_ps_mask(x, _mm512_permutex2var_ps(s.midpoints[0], cell, s.midpoints[1]), _CMP_GT_OQ);
  return _mm512_mask_add_epi32(code, more, code, _mm512_set1_epi32(1));
}
