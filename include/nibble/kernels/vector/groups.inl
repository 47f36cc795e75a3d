// Lines whose groups of elements have grids of their own: ranges, grids, codes, values.
//
// Port arithmetic, AVX-512, a group of 32: the range takes 2 loads, 2 compares of minima and of maxima each, 4 integer
// operations for NaN and Inf, and 10 for its share of two transposed squares; the codes 2 divisions (one of 16 lanes in
// about 4 cycles on Zen 5) and 7 operations each. A copy loop of the same bytes takes 0.12 ns an element out of DRAM, so
// true division (0.06) does not bind there; 10 cycles for 16 quotients (Zen 4; AVX2 on Zen 5) is 0.15 to 0.17 ns, about
// what memory takes.
// Measured, AMD EPYC (Zen 5, 4.1 GHz, shared), 2026-11-23, ns an element in the first-level cache, AVX-512 (AVX2), groups
// of 32: ranges 0.055 (0.067); int8 codes 0.061 (0.152), int4 0.069 (0.179), nf4 0.103 (0.323); values of int8 0.045, int4
// 0.053, nf4 0.049.

// The extreme of every row of a square: lane j is row j's.
NIBBLE_ALWAYS_INLINE void load_columns(const float* rows, Vi (&v)[lanes]) noexcept {
  NIBBLE_UNROLL
  for (int j = 0; j < lanes; ++j) v[j] = load_int(rows + j * lanes);
  transpose(v);
}
NIBBLE_ALWAYS_INLINE Vf min_of_rows(const float* rows) noexcept {
  Vi v[lanes];
  load_columns(rows, v);
  Vf m = from_bits(v[0]);
  NIBBLE_UNROLL
  for (int j = 1; j < lanes; ++j) m = min(from_bits(v[j]), m);
  return add(m, zero());
}
NIBBLE_ALWAYS_INLINE Vf max_of_rows(const float* rows) noexcept {
  Vi v[lanes];
  load_columns(rows, v);
  Vf m = from_bits(v[0]);
  NIBBLE_UNROLL
  for (int j = 1; j < lanes; ++j) m = max(from_bits(v[j]), m);
  return add(m, zero());
}

inline bool group_ranges(const GroupRangesArgs& args) noexcept {
  const GroupRangesArgs a = args;
  alignas(64) float lows[lanes * lanes];
  alignas(64) float highs[lanes * lanes];
  const Vi magnitude = set1_int(0x7FFFFFFF);
  Vi top = set1_int(0);
  const std::size_t full = a.n / a.group;
  std::size_t g = 0;
  for (; g + lanes <= full; g += lanes) {
    for (std::size_t j = 0; j < static_cast<std::size_t>(lanes); ++j) {
      const float* x = a.x + (g + j) * a.group;
      Vf low = load(x);
      Vf high = low;
      top = max_int(top, and_int(bits(low), magnitude));
      for (std::size_t i = lanes; i < a.group; i += lanes) {
        const Vf v = load(x + i);
        low = min(v, low);
        high = max(v, high);
        top = max_int(top, and_int(bits(v), magnitude));
      }
      store(lows + j * lanes, low);
      store(highs + j * lanes, high);
    }
    store(a.lows + g, min_of_rows(lows));
    store(a.highs + g, max_of_rows(highs));
  }
  bool finite = static_cast<std::uint32_t>(reduce_max_int(top)) < 0x7F800000U;
  for (std::size_t i = g * a.group; i < a.n; i += a.group, ++g) {
    const LineRange r = line_range(a.x + i, a.n - i < a.group ? a.n - i : a.group);
    finite = finite && r.finite;
    a.lows[g] = r.min;
    a.highs[g] = r.max;
  }
  return finite;
}

inline void widen_ranges(const WidenRangesArgs& a) noexcept {
  std::size_t i = 0;
  for (; i + lanes <= a.n; i += lanes) {
    const Vf x = load(a.x + i);
    store(a.lows + i, add(min(x, load(a.lows + i)), zero()));
    store(a.highs + i, add(max(x, load(a.highs + i)), zero()));
  }
  if (i == a.n) return;
  const std::size_t rest = a.n - i;
  const Vf x = load_n(a.x + i, rest);
  store_n(a.lows + i, add(min(x, load_n(a.lows + i, rest)), zero()), rest);
  store_n(a.highs + i, add(max(x, load_n(a.highs + i, rest)), zero()), rest);
}

template <ScaleType type>
NIBBLE_ALWAYS_INLINE Vf stored_as(Vf v) noexcept {
  if constexpr (type == ScaleType::fp32) return v;
  if constexpr (type == ScaleType::bf16) return from_bits(shift_left<16>(bf16_bits(v)));
  alignas(64) std::uint16_t codes[lanes];
  store_fp16(codes, v);
  return load_fp16(codes);
}
NIBBLE_ALWAYS_INLINE Vf magnitude_of(Vf v) noexcept { return from_bits(and_int(bits(v), set1_int(0x7FFFFFFF))); }
NIBBLE_ALWAYS_INLINE Vf negative(Vf v) noexcept { return from_bits(xor_int(bits(v), set1_int(INT32_MIN))); }

template <ScaleType type, Symmetry symmetry>
NIBBLE_ALWAYS_INLINE void fit_lanes(const FitRangesArgs& a, std::size_t g, std::size_t n) noexcept {
  const auto zero_point = static_cast<float>(a.zero);
  const auto qmin = static_cast<float>(a.qmin);
  const auto qmax = static_cast<float>(a.qmax);
  const bool codebook = is_codebook(a.format);
  constexpr bool narrow = type != ScaleType::fp32;
  const Vi all = set1_int(-1);
  Vf lo = load_n(a.lows + g, n);
  Vf hi = load_n(a.highs + g, n);
  Vf s;
  if constexpr (symmetry == Symmetry::symmetric) {
    s = max(negative(lo), hi);
    if (!codebook) s = max(div(negative(lo), set1(zero_point - qmin)), div(hi, set1(qmax - zero_point)));
  } else if constexpr (symmetry == Symmetry::asymmetric) {
    lo = min(lo, zero());
    hi = max(hi, zero());
    s = sub(div(hi, set1(qmax - qmin)), div(lo, set1(qmax - qmin)));
  } else {
    s = div(sub(hi, lo), set1(qmax - qmin));
  }
  Vf scale = max(stored_as<type>(s), set1(type == ScaleType::fp16 ? 0x1p-24F : 0x1p-126F));
  const Vi some = or_int(above(magnitude_of(lo), zero()), above(magnitude_of(hi), zero()));
  scale = select(some, scale, set1(1.0F));
  Vi irregular = set1_int(0);
  if constexpr (symmetry == Symmetry::symmetric && narrow) {
    const Vf reach_above = set1(codebook ? 1.1F : qmax - zero_point + 0.5F);
    const Vf reach_below = set1(codebook ? 1.1F : zero_point - qmin + 0.5F);
    irregular = or_int(above(hi, mul(reach_above, scale)), above(negative(lo), mul(reach_below, scale)));
  }
  if constexpr (symmetry == Symmetry::asymmetric) {
    for (int attempt = 0;; ++attempt) {
      const Vf q = min(max(round(sub(set1(qmin), div(lo, scale))), set1(qmin)), set1(qmax));
      store_8_n(a.zeros + g, to_int(q), n);
      if (!narrow || attempt == 2) break;
      const Vf reach_above = mul(add(sub(set1(qmax), q), set1(0.5F)), scale);
      const Vf reach_below = mul(add(sub(q, set1(qmin)), set1(0.5F)), scale);
      const Vi misses = or_int(above(hi, reach_above), above(negative(lo), reach_below));
      if (reduce_max_int(and_int(misses, set1_int(1))) == 0) break;
      irregular = or_int(irregular, and_int(misses, above(set1(0x1p-14F), scale)));
      const Vi step = set1_int(type == ScaleType::fp16 ? 0x2000 : 0x10000);
      scale = from_bits(add_int(bits(scale), and_int(misses, step)));
    }
  }
  if constexpr (symmetry == Symmetry::float_offset) {
    const Vf offset = stored_as<type>(fma(set1(-qmin), scale, lo));
    store_n(a.offsets + g, offset, n);
    const Vf margin = set1(1.0F + 0x1p-16F);
    irregular = or_int(xor_int(above(set1(0x1.000002p90F), magnitude_of(offset)), all),
                       or_int(above(mul(sub(hi, offset), margin), mul(set1(qmax + 0.5F), scale)),
                              above(mul(sub(offset, lo), margin), mul(set1(0.5F - qmin), scale))));
  }
  store_n(a.scales + g, scale, n);
  const Vf smallest = set1(0x1p-90F);
  const Vf largest = set1(type == ScaleType::fp16 ? 65504.0F : 0x1p90F);
  irregular = or_int(irregular, or_int(above(smallest, scale), above(scale, largest)));
  store_8_n(reinterpret_cast<std::int8_t*>(a.irregular) + g, and_int(irregular, set1_int(1)), n);
}

template <ScaleType type, Symmetry symmetry>
inline void fit_as(const FitRangesArgs& a) noexcept {
  for (std::size_t g = 0; g < a.n; g += lanes) fit_lanes<type, symmetry>(a, g, a.n - g < lanes ? a.n - g : lanes);
}
template <ScaleType type>
inline void fit_for(const FitRangesArgs& a) noexcept {
  switch (a.symmetry) {
    case Symmetry::symmetric: return fit_as<type, Symmetry::symmetric>(a);
    case Symmetry::asymmetric: return fit_as<type, Symmetry::asymmetric>(a);
    case Symmetry::float_offset: return fit_as<type, Symmetry::float_offset>(a);
  }
}
inline void fit_ranges(const FitRangesArgs& a) noexcept {
  switch (a.scale_type) {
    case ScaleType::fp32: return fit_for<ScaleType::fp32>(a);
    case ScaleType::fp16: return fit_for<ScaleType::fp16>(a);
    case ScaleType::bf16: return fit_for<ScaleType::bf16>(a);
  }
}

// How many of the 15 last values of a code are below.
NIBBLE_ALWAYS_INLINE Vi fp4_code(Vf x) noexcept {
  Vi code = set1_int(0);
  NIBBLE_UNROLL
  for (int i = 0; i < 15; ++i) code = sub_int(code, above(x, set1(fp4_last_of[i])));
  return code;
}

template <Format format, bool has_offset>
struct GroupEncoder {
  Vf scale;
  Vf offset;
  Vf zero;
  Vf low;
  Vf high;
  LevelSearch levels;

  NIBBLE_ALWAYS_INLINE explicit GroupEncoder(const QuantizeGroupsArgs& a) noexcept
      : zero(set1(static_cast<float>(a.zero))),
        low(set1(static_cast<float>(a.qmin))),
        high(set1(static_cast<float>(a.qmax))) {
    if constexpr (format == Format::nf4) levels = load_levels();
  }
  NIBBLE_ALWAYS_INLINE void group(const QuantizeGroupsArgs& a, std::size_t g) noexcept {
    scale = set1(a.scales[g]);
    if constexpr (has_offset) offset = set1(a.offsets[g]);
    if (a.zeros != nullptr) zero = set1(static_cast<float>(a.zeros[g]));
  }
  // n <= lanes elements from i on, each with parameters of its own.
  NIBBLE_ALWAYS_INLINE void elements(const QuantizeGroupsArgs& a, std::size_t i, std::size_t n) noexcept {
    const bool all = n == static_cast<std::size_t>(lanes);
    scale = all ? load(a.scales + i) : load_n(a.scales + i, n);
    if constexpr (has_offset) offset = all ? load(a.offsets + i) : load_n(a.offsets + i, n);
    if (a.zeros != nullptr) zero = to_float(all ? load_s8(a.zeros + i) : load_s8_n(a.zeros + i, n));
  }
  NIBBLE_ALWAYS_INLINE Vi codes(Vf x) const noexcept {
    if constexpr (format == Format::nf4) return nearest_level(levels, div(x, scale));
    if constexpr (format == Format::fp4) return fp4_code(div(x, scale));
    if constexpr (has_offset) x = sub(x, offset);
    return to_int(min(max(add(round(div(x, scale)), zero), low), high));
  }
  NIBBLE_ALWAYS_INLINE void run(const QuantizeGroupsArgs& a, std::size_t i) const noexcept {
    prefetch_next_line(a.x + i, a.n);
    const Vi q = codes(load(a.x + i));
    if constexpr (format == Format::int8)
      store_8(reinterpret_cast<std::int8_t*>(a.q) + i, q);
    else
      store_nibbles(a.q + i / 2, q);
  }
  NIBBLE_ALWAYS_INLINE void tail(const QuantizeGroupsArgs& a, std::size_t i, std::size_t n) const noexcept {
    const Vi q = codes(load_n(a.x + i, n));
    if constexpr (format == Format::int8) {
      store_8_n(reinterpret_cast<std::int8_t*>(a.q) + i, q, n);
    } else {
      alignas(16) std::int8_t staged[16];
      store_8(staged, q);
      pack_nibbles(reinterpret_cast<const std::uint8_t*>(staged), n, a.q + i / 2);
    }
  }
};

template <Format format, bool has_offset>
inline void quantize_as(const QuantizeGroupsArgs& args) noexcept {
  const QuantizeGroupsArgs a = args;  // a copy that no store can change: it stays in registers
  GroupEncoder<format, has_offset> e(a);
  if (a.group == 1) {
    std::size_t i = 0;
    for (; i + lanes <= a.n; i += lanes) {
      e.elements(a, i, lanes);
      e.run(a, i);
    }
    if (i == a.n) return;
    e.elements(a, i, a.n - i);
    e.tail(a, i, a.n - i);
    return;
  }
  for (std::size_t i = 0, g = 0; i < a.n; ++g) {
    e.group(a, g);
    const std::size_t end = a.n - i < a.group ? a.n : i + a.group;
    for (; i + lanes <= end; i += lanes) e.run(a, i);
    if (i == end) continue;
    e.tail(a, i, end - i);
    i = end;
  }
}

inline void quantize_groups(const QuantizeGroupsArgs& a) noexcept {
  const bool offset = a.offsets != nullptr;
  if (a.format == Format::nf4) return quantize_as<Format::nf4, false>(a);
  if (a.format == Format::fp4) return quantize_as<Format::fp4, false>(a);
  if (a.format == Format::int8)
    return offset ? quantize_as<Format::int8, true>(a) : quantize_as<Format::int8, false>(a);
  return offset ? quantize_as<Format::int4, true>(a) : quantize_as<Format::int4, false>(a);
}

template <Format format, bool has_offset>
struct GroupDecoder {
  Vf scale;
  Vf offset;
  Vi zero;
  Lookup16 levels;

  NIBBLE_ALWAYS_INLINE explicit GroupDecoder(const DequantizeGroupsArgs& a) noexcept : zero(set1_int(a.zero)) {
    if constexpr (format == Format::nf4) levels = load_lookup16(a.codebook);
  }
  NIBBLE_ALWAYS_INLINE void group(const DequantizeGroupsArgs& a, std::size_t g) noexcept {
    scale = set1(a.scales[g]);
    if constexpr (has_offset) offset = set1(a.offsets[g]);
    if (a.zeros != nullptr) zero = set1_int(a.zeros[g]);
  }
  NIBBLE_ALWAYS_INLINE void elements(const DequantizeGroupsArgs& a, std::size_t i, std::size_t n) noexcept {
    const bool all = n == static_cast<std::size_t>(lanes);
    scale = all ? load(a.scales + i) : load_n(a.scales + i, n);
    if constexpr (has_offset) offset = all ? load(a.offsets + i) : load_n(a.offsets + i, n);
    if (a.zeros != nullptr) zero = all ? load_s8(a.zeros + i) : load_s8_n(a.zeros + i, n);
  }
  NIBBLE_ALWAYS_INLINE Vf values(Vi q) const noexcept {
    if constexpr (format == Format::nf4) return mul_only(scale, lookup16<0>(levels, q));
    if constexpr (has_offset) return fma(scale, to_float(q), offset);
    return mul_only(scale, to_float(sub_int(q, zero)));
  }
  NIBBLE_ALWAYS_INLINE void run(const DequantizeGroupsArgs& a, std::size_t i) const noexcept {
    if constexpr (format == Format::int8)
      store(a.x + i, values(load_s8(reinterpret_cast<const std::int8_t*>(a.q) + i)));
    else
      store(a.x + i, values(load_nibbles(a.q + i / 2)));
  }
  NIBBLE_ALWAYS_INLINE void tail(const DequantizeGroupsArgs& a, std::size_t i, std::size_t n) const noexcept {
    if constexpr (format == Format::int8) {
      store_n(a.x + i, values(load_s8_n(reinterpret_cast<const std::int8_t*>(a.q) + i, n)), n);
    } else {
      alignas(16) std::uint8_t staged[16] = {};
      std::memcpy(staged, a.q + i / 2, (n + 1) / 2);
      store_n(a.x + i, values(load_nibbles(staged)), n);
    }
  }
};

template <Format format, bool has_offset>
inline void dequantize_as(const DequantizeGroupsArgs& args) noexcept {
  const DequantizeGroupsArgs a = args;
  GroupDecoder<format, has_offset> d(a);
  if (a.group == 1) {
    std::size_t i = 0;
    for (; i + lanes <= a.n; i += lanes) {
      d.elements(a, i, lanes);
      d.run(a, i);
    }
    if (i == a.n) return;
    d.elements(a, i, a.n - i);
    d.tail(a, i, a.n - i);
    return;
  }
  for (std::size_t i = 0, g = 0; i < a.n; ++g) {
    d.group(a, g);
    const std::size_t end = a.n - i < a.group ? a.n : i + a.group;
    for (; i + lanes <= end; i += lanes) d.run(a, i);
    if (i == end) continue;
    d.tail(a, i, end - i);
    i = end;
  }
}

inline void dequantize_groups(const DequantizeGroupsArgs& a) noexcept {
  const bool offset = a.offsets != nullptr;
  if (is_codebook(a.format)) return dequantize_as<Format::nf4, false>(a);
  if (a.format == Format::int8)
    return offset ? dequantize_as<Format::int8, true>(a) : dequantize_as<Format::int8, false>(a);
  return offset ? dequantize_as<Format::int4, true>(a) : dequantize_as<Format::int4, false>(a);
}
