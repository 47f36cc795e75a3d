// fp32 panels times packed rows: the product behind every float-activation GEMM.
//
// Tile: gemm_rows rows x gemm_panels panels, accumulators in registers over the call's whole depth.
// AVX-512: 12 x 2 zmm = 24 accumulators, 2 panel vectors, 1 broadcast; 24 FMAs on two pipes = 12 cycles a k, beside
// 14 loads on two ports: 100 % of the FMA limit. AVX2: 6 x 2 ymm = 12 accumulators, 2 + 1; 6 cycles a k.

// Rows R of x: x[r * row_step] at the first k, k_step floats from one k to the next.
template <int R, int P>
NIBBLE_ALWAYS_INLINE void float_tile(const float* panels, std::size_t panel_stride, std::size_t depth, const float* x,
                                     std::size_t row_step, std::size_t k_step, bool accumulate, float* acc,
                                     std::size_t acc_stride) noexcept {
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

// R rows from row r of a packed tile, all panels.
template <int R>
inline void float_rows(const FloatGemmArgs& a, std::size_t panel, std::size_t panels, const float* x,
                       std::size_t tile_rows, std::size_t row) noexcept {
  float* acc = a.acc + row * a.acc_stride + panel * panel_width;
  const float* w = a.panels_data + panel * a.panel_stride;
  if (panels == 2)
    float_tile<R, 2>(w, a.panel_stride, a.depth, x, 1, tile_rows, a.accumulate, acc, a.acc_stride);
  else
    float_tile<R, 1>(w, a.panel_stride, a.depth, x, 1, tile_rows, a.accumulate, acc, a.acc_stride);
}

inline void gemm_float(const FloatGemmArgs& a) noexcept {
  for (std::size_t panel = 0; panel < a.panels; panel += gemm_panels) {
    const std::size_t panels = a.panels - panel < gemm_panels ? a.panels - panel : gemm_panels;
    const float* tile = a.x;
    for (std::size_t row = 0; row < a.rows; row += gemm_rows, tile += a.x_tile_stride) {
      const std::size_t rows = a.rows - row < gemm_rows ? a.rows - row : gemm_rows;
      std::size_t done = 0;
      while (done < rows) {
        const std::size_t left = rows - done;
        const float* x = tile + done;
        if (left >= gemm_rows) {
          float_rows<gemm_rows>(a, panel, panels, x, rows, row + done);
          done += gemm_rows;
        } else if (left >= 4) {
          float_rows<4>(a, panel, panels, x, rows, row + done);
          done += 4;
        } else if (left >= 2) {
          float_rows<2>(a, panel, panels, x, rows, row + done);
          done += 2;
        } else {
          float_rows<1>(a, panel, panels, x, rows, row + done);
          done += 1;
        }
      }
    }
  }
}
