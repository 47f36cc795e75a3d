// Rows of bytes <-> the lanes of a panel: transposed in squares of 32-bit words.
//
// Port arithmetic, AVX-512, 1 KB of codes: 16 loads, 64 shuffles, 16 stores; 8 operations more a vector for nibbles.
// Measured, AMD EPYC (Zen 5, 4.1 GHz, shared), 2026-11-23, bytes in and out of the second-level cache, AVX-512 (AVX2):
// int8 108 GB/s (96), int4 59 (44); back 142 (130) and 91 (52).

// Two swaps of neighbours turn nibbles 0 1 2 3 4 5 6 7 into 0 4 1 5 2 6 3 7.
template <int distance>
NIBBLE_ALWAYS_INLINE Vi swap_bits(Vi v, std::int32_t mask) noexcept {
  const Vi t = and_int(xor_int(v, shift_right<distance>(v)), set1_int(mask));
  return xor_int(v, xor_int(t, shift_left<distance>(t)));
}
template <LaneElement element, bool to_lanes>
NIBBLE_ALWAYS_INLINE Vi convert_words(Vi v) noexcept {
  if constexpr (element == LaneElement::int8_codes)
    return xor_int(v, set1_int(static_cast<std::int32_t>(0x80808080U)));
  if constexpr (element == LaneElement::int4_codes) {
    if constexpr (to_lanes) return swap_bits<4>(swap_bits<8>(v, 0x0000FF00), 0x00F000F0);
    return swap_bits<8>(swap_bits<4>(v, 0x00F000F0), 0x0000FF00);
  }
  return v;
}

// Word w of `lanes` rows, from row `half * lanes` of the panel on.
template <LaneElement element>
NIBBLE_ALWAYS_INLINE void store_word(const LanesArgs& a, std::uint8_t* out, int half, Vi v) noexcept {
  if constexpr (element == LaneElement::bytes) {
    std::int8_t* to = reinterpret_cast<std::int8_t*>(out) + half * lanes;
    store_8(to, v);
    store_8(to + a.step, shift_right<8>(v));
    store_8(to + 2 * a.step, shift_right<16>(v));
    store_8(to + 3 * a.step, shift_right<24>(v));
  } else if constexpr (element == LaneElement::halves) {
    store_16(reinterpret_cast<std::uint16_t*>(out) + half * lanes, v);
    store_16(reinterpret_cast<std::uint16_t*>(out + a.step) + half * lanes, shift_right<16>(v));
  } else {
    store(reinterpret_cast<float*>(out) + half * lanes, from_bits(v));
  }
}
template <LaneElement element>
NIBBLE_ALWAYS_INLINE Vi load_word(const LanesArgs& a, const std::uint8_t* in, int half) noexcept {
  if constexpr (element == LaneElement::bytes) {
    const std::int8_t* from = reinterpret_cast<const std::int8_t*>(in) + half * lanes;
    const Vi low = set1_int(255);
    return or_int(or_int(and_int(load_s8(from), low), shift_left<8>(and_int(load_s8(from + a.step), low))),
                  or_int(shift_left<16>(and_int(load_s8(from + 2 * a.step), low)),
                         shift_left<24>(load_s8(from + 3 * a.step))));
  } else if constexpr (element == LaneElement::halves) {
    return or_int(load_u16(reinterpret_cast<const std::uint16_t*>(in) + half * lanes),
                  shift_left<16>(load_u16(reinterpret_cast<const std::uint16_t*>(in + a.step) + half * lanes)));
  } else {
    return load_int(in + half * lanes * 4);
  }
}

// Elements that make up one word.
constexpr std::size_t elements_a_word(LaneElement e) noexcept { return 4 / bytes_of(e); }

// `lanes` words of each of the 16 rows, at rows[r]: one square a half of the panel.
template <LaneElement element>
NIBBLE_ALWAYS_INLINE void square_to_lanes(const LanesArgs& a, const std::uint8_t* const* rows, std::size_t at,
                                          std::uint8_t* out) noexcept {
  for (int half = 0; half < halves; ++half) {
    Vi v[lanes];
    NIBBLE_UNROLL
    for (int r = 0; r < lanes; ++r) v[r] = convert_words<element, true>(load_int(rows[half * lanes + r] + at));
    transpose(v);
    NIBBLE_UNROLL
    for (int w = 0; w < lanes; ++w)
      store_word<element>(a, out + static_cast<std::size_t>(w) * elements_a_word(element) * a.step, half, v[w]);
  }
}
template <LaneElement element>
NIBBLE_ALWAYS_INLINE void square_to_rows(const LanesArgs& a, const std::uint8_t* in, std::uint8_t* const* rows,
                                         std::size_t at) noexcept {
  for (int half = 0; half < halves; ++half) {
    Vi v[lanes];
    NIBBLE_UNROLL
    for (int w = 0; w < lanes; ++w)
      v[w] = load_word<element>(a, in + static_cast<std::size_t>(w) * elements_a_word(element) * a.step, half);
    transpose(v);
    NIBBLE_UNROLL
    for (int r = 0; r < lanes; ++r)
      store(reinterpret_cast<float*>(rows[half * lanes + r] + at), from_bits(convert_words<element, false>(v[r])));
  }
}

// What does not fill a square goes through one: 16 rows of `lanes` words, and the lanes that they become.
struct LaneStage {
  alignas(64) std::uint8_t rows[panel_width * lanes * 4];
  alignas(64) std::uint8_t lanes_[panel_width * lanes * 4];
  std::uint8_t* row[panel_width];

  NIBBLE_ALWAYS_INLINE LaneStage() noexcept {
    for (std::size_t r = 0; r < panel_width; ++r) row[r] = rows + r * lanes * 4;
  }
};

template <LaneElement element>
inline void to_lanes_as(const LanesArgs& a) noexcept {
  constexpr std::size_t square = static_cast<std::size_t>(lanes) * 4;  // bytes of a row
  constexpr std::size_t size = bytes_of(element);
  const std::uint8_t* rows[panel_width];
  for (std::size_t r = 0; r < a.row_count; ++r) rows[r] = a.rows + r * a.row_stride;
  std::size_t at = 0;
  if (a.row_count == panel_width) {
    for (; at + square <= a.bytes; at += square) {
      // Sixteen rows are more streams than the hardware follows.
      for (std::size_t r = 0; r < panel_width; ++r)
        prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(rows[r] + at) + 512));
      square_to_lanes<element>(a, rows, at, a.lanes + at / size * a.step);
    }
  }
  if (at == a.bytes) return;
  LaneStage stage;
  LanesArgs staged = a;
  staged.step = panel_width * size;
  for (; at < a.bytes; at += square) {
    const std::size_t bytes = a.bytes - at < square ? a.bytes - at : square;
    // Missing rows become zero bytes, also where the conversion flips bits.
    std::memset(stage.rows, element == LaneElement::int8_codes ? 0x80 : 0, sizeof stage.rows);
    for (std::size_t r = 0; r < a.row_count; ++r) {
      std::memset(stage.row[r], 0, square);
      std::memcpy(stage.row[r], rows[r] + at, bytes);
    }
    square_to_lanes<element>(staged, stage.row, 0, stage.lanes_);
    for (std::size_t e = 0; e * size < bytes; ++e)
      std::memcpy(a.lanes + (at / size + e) * a.step, stage.lanes_ + e * staged.step, staged.step);
  }
}

template <LaneElement element>
inline void to_rows_as(const LanesArgs& a) noexcept {
  constexpr std::size_t square = static_cast<std::size_t>(lanes) * 4;
  constexpr std::size_t size = bytes_of(element);
  std::uint8_t* rows[panel_width];
  for (std::size_t r = 0; r < a.row_count; ++r) rows[r] = a.rows + r * a.row_stride;
  std::size_t at = 0;
  if (a.row_count == panel_width)
    for (; at + square <= a.bytes; at += square)
      square_to_rows<element>(a, a.lanes + at / size * a.step, rows, at);
  if (at == a.bytes) return;
  LaneStage stage;
  LanesArgs staged = a;
  staged.step = panel_width * size;
  std::memset(stage.lanes_, 0, sizeof stage.lanes_);
  for (; at < a.bytes; at += square) {
    const std::size_t bytes = a.bytes - at < square ? a.bytes - at : square;
    for (std::size_t e = 0; e * size < bytes; ++e)
      std::memcpy(stage.lanes_ + e * staged.step, a.lanes + (at / size + e) * a.step, staged.step);
    square_to_rows<element>(staged, stage.lanes_, stage.row, 0);
    for (std::size_t r = 0; r < a.row_count; ++r) std::memcpy(rows[r] + at, stage.row[r], bytes);
  }
}

inline void rows_to_lanes(const LanesArgs& a) noexcept {
  switch (a.element) {
    case LaneElement::bytes: return to_lanes_as<LaneElement::bytes>(a);
    case LaneElement::halves: return to_lanes_as<LaneElement::halves>(a);
    case LaneElement::words: return to_lanes_as<LaneElement::words>(a);
    case LaneElement::int8_codes: return to_lanes_as<LaneElement::int8_codes>(a);
    case LaneElement::int4_codes: return to_lanes_as<LaneElement::int4_codes>(a);
  }
}
inline void lanes_to_rows(const LanesArgs& a) noexcept {
  switch (a.element) {
    case LaneElement::bytes: return to_rows_as<LaneElement::bytes>(a);
    case LaneElement::halves: return to_rows_as<LaneElement::halves>(a);
    case LaneElement::words: return to_rows_as<LaneElement::words>(a);
    case LaneElement::int8_codes: return to_rows_as<LaneElement::int8_codes>(a);
    case LaneElement::int4_codes: return to_rows_as<LaneElement::int4_codes>(a);
  }
}

constexpr void fill_lines(KernelTable& t) noexcept {
  t.group_ranges = &group_ranges;
  t.fit_ranges = &fit_ranges;
  t.widen_ranges = &widen_ranges;
  t.quantize_groups = &quantize_groups;
  t.dequantize_groups = &dequantize_groups;
  t.rows_to_lanes = &rows_to_lanes;
  t.lanes_to_rows = &lanes_to_rows;
}
