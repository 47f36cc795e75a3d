// bfloat16 panels times bfloat16 rows: pairs of products into fp32 lanes.
//
// Tile: R rows x P panels, accumulators in registers over the call's whole depth: 12 x 2, 10 x 2, 8 x 2, 6 x 4, 4 x 4,
// 2 x 8, 1 x 8. AVX512-BF16, 12 x 2 zmm: 24 vdpbf16ps on two pipes = 12 cycles a pair of k, beside 14 loads and 2
// prefetches on two ports: 100 % of the instruction's limit, twice FMA's. Without the instruction every pair is decoded
// in registers: 4 x 1 on AVX2. Measured, AMD EPYC (Zen 5, shared), 2026-11-23, N = K = 4096, one thread, activations
// rounded and packed inside, GOP/s beside 463 of the vdpbf16ps loop: 512 rows 442 (95 %), 64 rows 432, 16 rows 420, 8
// rows 394 (49 GB/s of weights); in cache alone 465. By FMAs, loop 246: AVX-512 512 rows 223; AVX2 (123) 94.

// Rows R of x: x[0..R-1] at the first pair, x_step pairs from one pair of k to the next. With every pair, `next` moves
// on by next_step bytes and is fetched, in each panel.
template <int R, int P>
NIBBLE_ALWAYS_INLINE void bf16_tile(const std::uint8_t* panels, std::size_t panel_bytes, std::size_t pairs,
                                    const std::uint32_t* x, std::size_t x_step, std::size_t next,
                                    std::size_t next_step, bool accumulate, float* acc,
                                    std::size_t acc_stride) noexcept {
  constexpr int width = P * halves;
  Vf sum[R][width];
  NIBBLE_UNROLL
  for (int r = 0; r < R; ++r) {
    NIBBLE_UNROLL
    for (int v = 0; v < width; ++v)
      sum[r][v] = accumulate ? load(acc + static_cast<std::size_t>(r) * acc_stride + v * lanes) : zero();
  }
  const std::uint8_t* base = panels;
  for (std::size_t u = 0; u < pairs; ++u) {
    Bf16Pairs w[width];
    NIBBLE_UNROLL
    for (int v = 0; v < width; ++v) {
      const std::size_t panel = static_cast<std::size_t>(v / halves) * panel_bytes;
      if (v % halves == 0) prefetch_lines<1>(base, next + panel);
      w[v] = bf16_pairs(load_int(panels + panel + (v % halves) * lanes * 4));
    }
    NIBBLE_UNROLL
    for (int r = 0; r < R; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, x + r, sizeof pair);
      const Bf16Pairs b = bf16_pairs(set1_int(pair));
      NIBBLE_UNROLL
      for (int v = 0; v < width; ++v) sum[r][v] = dot_bf16(sum[r][v], w[v], b);
    }
    panels += 64;
    next += next_step;
    x += x_step;
  }
  NIBBLE_UNROLL
  for (int r = 0; r < R; ++r) {
    NIBBLE_UNROLL
    for (int v = 0; v < width; ++v) store(acc + static_cast<std::size_t>(r) * acc_stride + v * lanes, sum[r][v]);
  }
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// Rows of `tiles` tiles: R of each from x on, `height` being the tiles' rows.
struct Bf16Rows {
  const std::uint32_t* x;
  std::size_t height;
  std::size_t tiles;
  float* acc;
};

// All panels, P at a time, then one at a time. A few panels stay in the first-level cache while all tiles pass.
template <int R, int P>
inline void bf16_rows(const Bf16GemmArgs& a, const Bf16Rows& rows, std::size_t begin, std::size_t end) noexcept {
  const std::size_t pairs = (a.k_end - a.k_begin) / 2;
  std::size_t p = begin;
  for (; p + P <= end; p += P) {
    const std::uint8_t* panels = a.w.codes + p * a.w.panel_bytes + a.k_begin / 2 * 64;
    // What is fetched meanwhile: a long panel's bytes a little ahead, else the panels that follow, a part with each
    // tile; after the last of them, the first ones' next k.
    const bool stream = rows.tiles == 1 && pairs * 64 > bf16_long_panel;
    const std::size_t step = stream ? 64 : (64 + rows.tiles - 1) / rows.tiles;
    std::size_t next = stream                ? bf16_prefetch
                       : p + P < a.panel_end ? P * a.w.panel_bytes
                                             : pairs * 64 - (p - a.panel_begin) * a.w.panel_bytes;
    for (std::size_t t = 0; t < rows.tiles; ++t, next += pairs * step)
      bf16_tile<R, P>(panels, a.w.panel_bytes, pairs, rows.x + t * a.x_tile_stride, rows.height, next, step,
                      a.accumulate, rows.acc + t * rows.height * a.acc_stride + (p - a.panel_begin) * panel_width,
                      a.acc_stride);
  }
  if constexpr (P > 1) {
    if (p < end) bf16_rows<R, 1>(a, rows, p, end);
  }
}

// Tiles of any height: their rows by the largest R that fits.
inline void bf16_tiles(const Bf16GemmArgs& a, Bf16Rows rows) noexcept {
  for (std::size_t left = rows.height; left != 0;) {
    std::size_t done = 1;
    const auto take = [&](auto r, auto p) {
      done = decltype(r)::value;
      bf16_rows<decltype(r)::value, decltype(p)::value>(a, rows, a.panel_begin, a.panel_end);
    };
    if constexpr (bf16_tile_rows > 4) {
      if (left >= 12)
        take(Int<12>{}, Int<2>{});
      else if (left >= 10)
        take(Int<10>{}, Int<2>{});
      else if (left >= 8)
        take(Int<8>{}, Int<2>{});
      else if (left >= 6)
        take(Int<6>{}, Int<4>{});
    }
    if (done == 1) {
      if (left >= 4)
        take(Int<4>{}, Int<bf16_panels_4>{});
      else if (left >= 2)
        take(Int<2>{}, Int<bf16_panels_2>{});
      else
        take(Int<1>{}, Int<bf16_panels_1>{});
    }
    left -= done;
    rows.x += done;
    rows.acc += done * a.acc_stride;
  }
}

inline void gemm_bf16(const Bf16GemmArgs& a) noexcept {
  const FlushedSubnormals environment;
  const std::size_t tiles = a.rows / a.tile_rows;
  const std::size_t rest = a.rows % a.tile_rows;
  if (tiles != 0) bf16_tiles(a, {a.x, a.tile_rows, tiles, a.acc});
  if (rest != 0)
    bf16_tiles(a, {a.x + tiles * a.x_tile_stride, rest, 1, a.acc + tiles * a.tile_rows * a.acc_stride});
}
