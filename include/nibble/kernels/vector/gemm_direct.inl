// fp32 or fp16 panels times any number of rows that lie as they are: attention's two products, whose panels are the
// KV cache (keys: k is a head's size; values: k is the positions).
//
// Tile: rows_tall rows x 2 vectors (a block of a prompt's queries), or up to 4 rows x rows_panels panels (decoding: the
// queries that share a key), over all of k, sums in registers. No packing of x: a row's next element is one broadcast
// from a line that L1 holds. Port arithmetic, AVX-512, 12 x 2: 24 FMAs on two pipes = 12 cycles a k, beside 12
// broadcasts and 2 loads (fp16: converting ones) on two ports, 7; 3 x 4: 12 FMAs = 6 cycles for 128 bytes of fp16. So
// one tile is bound by FMA, and few rows by memory: the panels are as many streams, with a software prefetch in each.
// Measured, AMD EPYC (Zen 5, 4.1 GHz, shared), 2026-11-23, fp16 in cache: 12 rows 237-242 GFLOP/s (AVX2 122; the FMA
// loops of gemm_float.inl: 265 and 131); 3 rows 77-81 GB/s of panels, 232-242 GFLOP/s (AVX2 40, 120), 1 row 125 (104).
// Attention of one token at 4,000 positions from DRAM, softmax included: 27-31 GB/s where the read loop has 31-33 (in
// one run 21 of 34).

// Loads k's 16 lanes of one panel.
template <bool fp16>
NIBBLE_ALWAYS_INLINE Vf load_panel(const std::uint8_t* p, int h) noexcept {
  if constexpr (fp16) return load_fp16(p + h * lanes * 2);
  return load(reinterpret_cast<const float*>(p) + h * lanes);
}

template <bool fp16, int R, int P>
NIBBLE_ALWAYS_INLINE void rows_step(const std::uint8_t* codes, std::size_t panel_bytes,
                                    const float* const (&x)[(R + 3) / 4], std::size_t stride, std::size_t k,
                                    Vf (&sum)[R][P * halves]) noexcept {
  constexpr std::size_t step = fp16 ? 32 : 64;
  const auto panel_lanes = [&](int v) noexcept {
    return load_panel<fp16>(codes + static_cast<std::size_t>(v / halves) * panel_bytes + k * step, v % halves);
  };
  const auto broadcast = [&](int r) noexcept {
    return set1(x[r / 4][static_cast<std::size_t>(r % 4) * stride + k]);
  };
  // The shorter side stays in registers while the other passes.
  if constexpr (R < P * halves) {
    Vf a[R];
    NIBBLE_UNROLL
    for (int r = 0; r < R; ++r) a[r] = broadcast(r);
    NIBBLE_UNROLL
    for (int v = 0; v < P * halves; ++v) {
      const Vf b = panel_lanes(v);
      NIBBLE_UNROLL
      for (int r = 0; r < R; ++r) sum[r][v] = fma(b, a[r], sum[r][v]);
    }
  } else {
    Vf b[P * halves];
    NIBBLE_UNROLL
    for (int v = 0; v < P * halves; ++v) b[v] = panel_lanes(v);
    NIBBLE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vf a = broadcast(r);
      NIBBLE_UNROLL
      for (int v = 0; v < P * halves; ++v) sum[r][v] = fma(b[v], a, sum[r][v]);
    }
  }
}

// Panels of a tile of up to four rows: where a panel is two vectors of sixteen registers, as many as fit.
constexpr int few_panels(int rows) noexcept {
  return halves != 2 ? rows_panels : rows == 1 ? 4 : rows == 4 ? 1 : 2;
}

// R rows from `row` x P panels from `panel`, over all of k.
template <bool fp16, int R, int P>
NIBBLE_ALWAYS_INLINE void rows_tile(const FloatGemvArgs& a, std::size_t row, std::size_t panel) noexcept {
  constexpr std::size_t step = fp16 ? 32 : 64;  // bytes of one k of a panel
  constexpr std::size_t unit = 4;               // k between prefetches
  const std::uint8_t* codes = a.w.codes + panel * a.w.panel_bytes;
  const std::size_t bytes = a.w.panel_bytes;
  const float* x[(R + 3) / 4];
  NIBBLE_UNROLL
  for (int i = 0; i < (R + 3) / 4; ++i) x[i] = a.x + (row + 4 * static_cast<std::size_t>(i)) * a.x_stride;
  Vf sum[R][P * halves];
  NIBBLE_UNROLL
  for (int r = 0; r < R; ++r) {
    NIBBLE_UNROLL
    for (int v = 0; v < P * halves; ++v) sum[r][v] = zero();
  }
  // What comes next: further down a long panel, or the tile of panels after short ones.
  const std::size_t ahead = a.w.k * step > 2 * rows_prefetch ? rows_prefetch : P * bytes;
  std::size_t k = 0;
  for (; k + unit <= a.w.k; k += unit) {
    if constexpr (R <= 4) {
      NIBBLE_UNROLL
      for (int p = 0; p < P; ++p)
        prefetch_lines<static_cast<int>(unit * step / 64)>(codes + static_cast<std::size_t>(p) * bytes + k * step,
                                                           ahead);
    }
    NIBBLE_UNROLL
    for (std::size_t i = 0; i < unit; ++i) rows_step<fp16, R, P>(codes, bytes, x, a.x_stride, k + i, sum);
  }
  for (; k < a.w.k; ++k) rows_step<fp16, R, P>(codes, bytes, x, a.x_stride, k, sum);
  float* acc = a.acc + row * a.acc_stride + (panel - a.panel_begin) * panel_width;
  NIBBLE_UNROLL
  for (int r = 0; r < R; ++r) {
    NIBBLE_UNROLL
    for (int v = 0; v < P * halves; ++v)
      store(acc + static_cast<std::size_t>(r) * a.acc_stride + v * lanes, sum[r][v]);
  }
}

template <bool fp16, int R, int P>
inline void rows_panels_of(const FloatGemvArgs& a, std::size_t row) noexcept {
  std::size_t p = a.panel_begin;
  for (; p + P <= a.panel_end; p += P) rows_tile<fp16, R, P>(a, row, p);
  if constexpr (P > 2) {
    for (; p + 2 <= a.panel_end; p += 2) rows_tile<fp16, R, 2>(a, row, p);
  }
  if constexpr (P > 1) {
    for (; p < a.panel_end; ++p) rows_tile<fp16, R, 1>(a, row, p);
  }
}

// Panels of a tile of many rows: 2 vectors, or the one panel that is more.
constexpr int tall_panels = halves < 2 ? 2 : 1;

template <bool fp16>
inline void rows_all(const FloatGemvArgs& a) noexcept {
  std::size_t row = 0;
  for (; a.rows - row >= rows_tall; row += rows_tall) rows_panels_of<fp16, rows_tall, tall_panels>(a, row);
  if constexpr (rows_tall > 6) {
    for (; a.rows - row >= 6; row += 6) rows_panels_of<fp16, 6, tall_panels>(a, row);
  }
  for (; a.rows - row >= 4; row += 4) rows_panels_of<fp16, 4, few_panels(4)>(a, row);
  if (a.rows - row == 3) rows_panels_of<fp16, 3, few_panels(3)>(a, row);
  if (a.rows - row == 2) rows_panels_of<fp16, 2, few_panels(2)>(a, row);
  if (a.rows - row == 1) rows_panels_of<fp16, 1, few_panels(1)>(a, row);
}

inline void gemm_direct(const FloatGemvArgs& a) noexcept {
  if (a.w.format == Format::fp16)
    rows_all<true>(a);
  else
    rows_all<false>(a);
}
