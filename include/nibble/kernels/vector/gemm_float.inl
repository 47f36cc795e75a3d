// fp32 panels times packed rows: the product behind every float-activation GEMM.
//
// Tile: gemm_rows rows x gemm_panels panels, accumulators in registers over the call's whole depth. AVX-512: 12
// x 2 zmm = 24 accumulators, 2 panel vectors, 1 broadcast; 24 FMAs on two pipes = 12 cycles a k, beside 14 loads and 2
// prefetches on two ports: 100 % of the FMA limit. AVX2: 6 x 2 ymm = 12 accumulators, 2 + 1; 6 cycles a k. Measured, AMD
// EPYC (Zen 5, shared), 2026-11-23, in cache, 252 rows: AVX-512 232 of the FMA loop's 241 GFLOP/s (96 %). N = K = 4096,
// one thread, unpacking and packing inside, loop 250: 512 rows fp32 234 (93 %), int4 226, fp16 220 (loop 243); 64 rows fp32 233,
// fp16 and int4 220; 16 rows 225, 188, 196; 12 rows fp32 221 (37 GB/s). The weights that come next are fetched inside the
// tiles: before that 16 rows of fp32 got 127, of fp16 122. OpenBLAS 0.3.21 told to use AVX-512: 220-226.

// What a tile fetches beside its work: at every k, step bytes further in each panel.
struct Fetch {
  std::uintptr_t at;
  std::size_t stride;
  std::size_t step;
};

// Rows R of x: x[r * row_step] at the first k, k_step floats from one k to the next.
template <int R, int P>
NIBBLE_ALWAYS_INLINE void float_tile(const float* panels, std::size_t panel_stride, std::size_t depth,
                                     const float* x, std::size_t row_step, std::size_t k_step, bool accumulate,
                                     float* acc, std::size_t acc_stride, Fetch fetch = {}) noexcept {
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
    // Lower tiles have no loads to spare.
    if constexpr (R >= 4) {
      NIBBLE_UNROLL
      for (std::size_t p = 0; p < P; ++p) prefetch(reinterpret_cast<const void*>(fetch.at + p * fetch.stride));
      fetch.at += fetch.step;
    }
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
                       std::size_t row, Fetch fetch) noexcept {
  const float* x = tile + first;
  float* acc = a.acc + (row + first) * a.acc_stride;
  std::size_t p = 0;
  for (; p + P <= a.panels; p += P, fetch.at += P * fetch.stride)
    float_tile<R, P>(a.panels_data + p * a.panel_stride, a.panel_stride, a.depth, x, 1, tile_rows, a.accumulate,
                     acc + p * panel_width, a.acc_stride, fetch);
  for (; p < a.panels; ++p, fetch.at += fetch.stride)
    float_tile<R, 1>(a.panels_data + p * a.panel_stride, a.panel_stride, a.depth, x, 1, tile_rows, a.accumulate,
                     acc + p * panel_width, a.acc_stride, fetch);
}

inline void gemm_float(const FloatGemmArgs& a) noexcept {
  // Whole tiles: a few panels stay in the first-level cache while all of x passes. Each tile fetches its part.
  constexpr std::size_t height = gemm_rows;
  const std::size_t tiles = a.rows / height;
  const std::size_t whole = tiles * height;
  const std::size_t steps = a.depth * (tiles == 0 ? 1 : tiles);
  Fetch fetch{a.fetch, a.fetch_stride, steps == 0 ? 0 : (a.fetch_bytes + steps - 1) / steps};
  if (a.fetch_bytes == 0) fetch.at = reinterpret_cast<std::uintptr_t>(a.panels_data);
  FloatGemmArgs part = a;
  for (std::size_t p = 0; p < a.panels && tiles != 0; p += gemm_panels) {
    part.panels_data = a.panels_data + p * a.panel_stride;
    part.panels = a.panels - p < gemm_panels ? a.panels - p : gemm_panels;
    part.acc = a.acc + p * panel_width;
    const float* tile = a.x;
    Fetch piece = fetch;
    piece.at += p * fetch.stride;
    for (std::size_t row = 0; row < whole; row += height, tile += a.x_tile_stride) {
      float_rows<gemm_rows, gemm_panels>(part, tile, height, 0, row, piece);
      piece.at += a.depth * fetch.step;
    }
  }
  // The last, lower tile: the fewer rows, the more panels at once, so that two pipes of latency 4 stay full.
  const float* tile = a.x + tiles * a.x_tile_stride;
  const std::size_t rows = a.rows - whole;
  const Fetch nothing{reinterpret_cast<std::uintptr_t>(a.panels_data), 0, 0};
  std::size_t done = 0;
  const auto next = [&] { return tiles == 0 && done == 0 ? fetch : nothing; };
  if constexpr (height > 8) {
    for (; rows - done >= 8; done += 8) float_rows<8, gemm_panels>(a, tile, rows, done, whole, next());
    if (rows - done >= 6) {
      float_rows<6, gemm_panels_4>(a, tile, rows, done, whole, next());
      done += 6;
    }
  }
  for (; rows - done >= 4; done += 4) float_rows<4, gemm_panels_4>(a, tile, rows, done, whole, next());
  if (rows - done >= 2) {
    float_rows<2, gemm_panels_2>(a, tile, rows, done, whole, nothing);
    done += 2;
  }
  if (rows - done == 1) float_rows<1, gemm_panels_1>(a, tile, rows, done, whole, nothing);
}
