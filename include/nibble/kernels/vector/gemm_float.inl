// fp32 panels times packed rows: the product behind every float-activation GEMM.
//
// Tile: gemm_rows rows x gemm_panels panels, accumulators in registers over the call's whole depth. AVX-512: 12
// x 2 zmm = 24 accumulators, 2 panel vectors, 1 broadcast; 24 FMAs on two pipes = 12 cycles a k, beside 14 loads
// on two ports: 100 % of the FMA limit. AVX2: 6 x 2 ymm = 12 accumulators, 2 + 1; 6 cycles a k. Measured, AMD
// EPYC (Zen 5, 4.1 GHz, shared), 2026-11-23, 4 panels x 256 k in cache, 252 rows, GFLOP/s of the FMA loop's:
// AVX-512 248 of 265 (93 %), 12 rows 237, 8 rows 231, 4 rows 220, 2 rows 158; AVX2 121 of 131 (93 %), 4 rows
// 113. With unpacking, N = K = 4096, 512 rows: int4 239, fp16 222, fp32 219; AVX2 120-124. OpenBLAS 0.3.21 in
// the same run: 121 as it chooses (AVX2), 226 when told to use AVX-512.

// Rows R of x: x[r * row_step] at the first k, k_step floats from one k to the next.
template <int R, int P>
NIBBLE_ALWAYS_INLINE void float_tile(const float* panels, std::size_t panel_stride, std::size_t depth,
                                     const float* x, std::size_t row_step, std::size_t k_step, bool accumulate,
                                     float* acc, std::size_t acc_stride) noexcept {
  constexpr int width = P * halves;
  Vf sum[R][width];
  if (accumulate) {
    NIBBLE_UNROLL
    for (int r = 0; r < R; ++r) {
      NIBBLE_UNROLL
      for (int v = 0; v < width; ++v) sum[r][v] = load(acc + static_cast<std::size_t>(r) * acc_stride + v * lanes);
    }
  } else {
    NIBBLE_UNROLL
    for (int r = 0; r < R; ++r) {
      NIBBLE_UNROLL
      for (int v = 0; v < width; ++v) sum[r][v] = zero();
    }
  }
  for (std::size_t k = 0; k < depth; ++k) {
    Vf b[width];
    NIBBLE_UNROLL
    for (int v = 0; v < width; ++v)
      b[v] = load(panels + static_cast<std::size_t>(v / halves) * panel_stride + (v % halves) * lanes);
    NIBBLE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vf a = set1(x[static_cast<std::size_t>(r) * row_step]);
      NIBBLE_UNROLL
      for (int v = 0; v < width; ++v) sum[r][v] = fma(b[v], a, sum[r][v]);
    }
    panels += panel_width;
    x += k_step;
  }
  NIBBLE_UNROLL
  for (int r = 0; r < R; ++r) {
    NIBBLE_UNROLL
    for (int v = 0; v < width; ++v) store(acc + static_cast<std::size_t>(r) * acc_stride + v * lanes, sum[r][v]);
  }
}

// R rows of a packed tile, from its row `first`, times all panels: P at a time, then one at a time.
template <int R, int P>
inline void float_rows(const FloatGemmArgs& a, const float* tile, std::size_t tile_rows, std::size_t first,
                       std::size_t row) noexcept {
  const float* x = tile + first;
  float* acc = a.acc + (row + first) * a.acc_stride;
  std::size_t p = 0;
  for (; p + P <= a.panels; p += P)
    float_tile<R, P>(a.panels_data + p * a.panel_stride, a.panel_stride, a.depth, x, 1, tile_rows, a.accumulate,
                     acc + p * panel_width, a.acc_stride);
  for (; p < a.panels; ++p)
    float_tile<R, 1>(a.panels_data + p * a.panel_stride, a.panel_stride, a.depth, x, 1, tile_rows, a.accumulate,
                     acc + p * panel_width, a.acc_stride);
}

inline void gemm_float(const FloatGemmArgs& a) noexcept {
  // Whole tiles: a few panels stay in the first-level cache while all of x passes.
  constexpr std::size_t height = gemm_rows;
  const std::size_t whole = a.rows / height * height;
  FloatGemmArgs part = a;
  for (std::size_t p = 0; p < a.panels; p += gemm_panels) {
    part.panels_data = a.panels_data + p * a.panel_stride;
    part.panels = a.panels - p < gemm_panels ? a.panels - p : gemm_panels;
    part.acc = a.acc + p * panel_width;
    const float* tile = a.x;
    for (std::size_t row = 0; row < whole; row += height, tile += a.x_tile_stride)
      float_rows<gemm_rows, gemm_panels>(part, tile, height, 0, row);
  }
  // The last, lower tile: the fewer rows, the more panels at once, so that two pipes of latency 4 stay full.
  const float* tile = a.x + whole / height * a.x_tile_stride;
  const std::size_t rows = a.rows - whole;
  std::size_t done = 0;
  if constexpr (height > 8) {
    for (; rows - done >= 8; done += 8) float_rows<8, gemm_panels>(a, tile, rows, done, whole);
  }
  for (; rows - done >= 4; done += 4) float_rows<4, gemm_panels_4>(a, tile, rows, done, whole);
  if (rows - done >= 2) {
    float_rows<2, gemm_panels_2>(a, tile, rows, done, whole);
    done += 2;
  }
  if (rows - done == 1) float_rows<1, gemm_panels_1>(a, tile, rows, done, whole);
}
