// Lines of elements: range, quantize, dequantize, conversions. All of them stream; the copy loop is the limit.

// What follows a line in memory is most often the next one. It is fetched while this one, which lies in the cache, is
// converted. It may lie beyond the buffer: nothing is read, and the address is made of integers, for no pointer may
// point there.
NIBBLE_ALWAYS_INLINE void prefetch_next_line(const float* x, std::size_t n) noexcept {
  prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(x) + n * sizeof(float)));
}

inline LineRange line_range(const float* x, std::size_t n) noexcept {
  LineRange range;
  if (n == 0) return range;
  // Exponent bits of the largest magnitude tell NaN and Inf, whose order min and max would lose.
  const Vi magnitude = set1_int(0x7FFFFFFF);
  Vf low = set1(x[0]);
  Vf high = low;
  Vi top = set1_int(0);
  std::size_t i = 0;
  // Four chains: one alone waits for its own results.
  if (n >= 4 * lanes) {
    Vf lows[4] = {low, low, low, low};
    Vf highs[4] = {low, low, low, low};
    Vi tops[4] = {top, top, top, top};
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
      NIBBLE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const Vf v = load(x + i + j * lanes);
        lows[j] = min(v, lows[j]);
        highs[j] = max(v, highs[j]);
        tops[j] = max_int(tops[j], and_int(bits(v), magnitude));
      }
    }
    low = min(min(lows[0], lows[1]), min(lows[2], lows[3]));
    high = max(max(highs[0], highs[1]), max(highs[2], highs[3]));
    top = max_int(max_int(tops[0], tops[1]), max_int(tops[2], tops[3]));
  }
  for (; i + lanes <= n; i += lanes) {
    const Vf v = load(x + i);
    low = min(v, low);
    high = max(v, high);
    top = max_int(top, and_int(bits(v), magnitude));
  }
  float lowest = reduce_min(low);
  float highest = reduce_max(high);
  std::uint32_t largest = static_cast<std::uint32_t>(reduce_max_int(top));
  for (; i < n; ++i) {
    lowest = x[i] < lowest ? x[i] : lowest;
    highest = x[i] > highest ? x[i] : highest;
    const std::uint32_t m = bits_from_float(x[i]) & 0x7FFFFFFFU;
    largest = m > largest ? m : largest;
  }
  // + 0 so that a zero is the positive one, whichever was met first.
  range.finite = largest < 0x7F800000U;
  range.min = range.finite ? lowest + 0.0F : 0.0F;
  range.max = range.finite ? highest + 0.0F : 0.0F;
  return range;
}

struct LineGrid {
  Vf scale;
  Vf offset;
  Vf zero;
  Vf low;
  Vf high;
};
NIBBLE_ALWAYS_INLINE Vi quantize_lanes(const LineGrid& g, Vf x) noexcept {
  const Vf q = add(round(div(sub(x, g.offset), g.scale)), g.zero);
  return to_int(min(max(q, g.low), g.high));
}

inline void quantize_line(const QuantizeLineArgs& a) noexcept {
  const LineGrid grid = {set1(a.scale), set1(a.offset), set1(static_cast<float>(a.zero)),
                         set1(static_cast<float>(a.qmin)), set1(static_cast<float>(a.qmax))};
  std::size_t i = 0;
  for (; i + lanes <= a.n; i += lanes) store_8(a.q + i, quantize_lanes(grid, load(a.x + i)));
  if (i < a.n) store_8_n(a.q + i, quantize_lanes(grid, load_n(a.x + i, a.n - i)), a.n - i);
}

template <bool has_offset>
NIBBLE_ALWAYS_INLINE void dequantize_lanes(const DequantizeLineArgs& a) noexcept {
  const Vf scale = set1(a.scale);
  const Vf offset = set1(a.offset);
  const Vi zero_point = set1_int(a.zero);
  const auto value = [&](Vi q) noexcept {
    if constexpr (has_offset) return fma(scale, to_float(q), offset);
    return mul_only(scale, to_float(sub_int(q, zero_point)));
  };
  std::size_t i = 0;
  for (; i + lanes <= a.n; i += lanes) store(a.x + i, value(load_s8(a.q + i)));
  if (i < a.n) store_n(a.x + i, value(load_s8_n(a.q + i, a.n - i)), a.n - i);
}

inline void dequantize_line(const DequantizeLineArgs& a) noexcept {
  if (a.has_offset)
    dequantize_lanes<true>(a);
  else
    dequantize_lanes<false>(a);
}

inline void fp16_from_float(const float* x, std::size_t n, std::uint16_t* out) noexcept {
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    prefetch_next_line(x + i, n);
    store_fp16(out + i, load(x + i));
  }
  if (i < n) store_fp16_n(out + i, load_n(x + i, n - i), n - i);
}

inline void float_from_fp16(const std::uint16_t* x, std::size_t n, float* out) noexcept {
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) store(out + i, load_fp16(x + i));
  if (i < n) store_n(out + i, load_fp16_n(x + i, n - i), n - i);
}

NIBBLE_ALWAYS_INLINE Vi bf16_bits(Vf v) noexcept {
  const Vi b = bits(v);
  // Half an ulp, less one where the kept part is even: carries exactly when rounding to nearest even goes up.
  const Vi odd = and_int(shift_right<16>(b), set1_int(1));
  const Vi nearest = shift_right<16>(add_int(b, add_int(odd, set1_int(0x7FFF))));
  const Vi quiet = or_int(shift_right<16>(b), set1_int(0x40));
  return if_nan(v, quiet, nearest);
}

inline void bf16_from_float(const float* x, std::size_t n, std::uint16_t* out) noexcept {
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    prefetch_next_line(x + i, n);
    store_16(out + i, bf16_bits(load(x + i)));
  }
  if (i < n) store_16_n(out + i, bf16_bits(load_n(x + i, n - i)), n - i);
}

inline void float_from_bf16(const std::uint16_t* x, std::size_t n, float* out) noexcept {
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) store(out + i, from_bits(shift_left<16>(load_u16(x + i))));
  if (i < n) store_n(out + i, from_bits(shift_left<16>(load_u16_n(x + i, n - i))), n - i);
}
