// A dense fp32 matrix with contiguous inputs times a few vectors: every output's row is read along, and still its sum is
// one chain in ascending k, so 16 rows are turned into lanes, four k at a time.
//
// AVX-512, 16 rows x 4 k: 16 loads of 16 bytes into quarters (8 cycles), 8 shuffles, 4 FMAs a token in one chain (16
// cycles): 16 bytes a cycle, more than memory gives. AVX2: two chains of 8 rows. Measured, AMD EPYC (Zen 5, shared),
// 2026-11-23, 4096 x 4096 on pages of 4 KB, 1 / 2 / 4 tokens, GB/s of the matrix: AVX-512 19 / 18 / 20, AVX2 24 / 26 /
// 22, Eigen at SSE2 22 / 5; a read loop has 37 on large pages.

// 16 rows of a from row i, T tokens.
template <int T>
inline void rows_block(const RowsGemvArgs& a, const float* x, float* y, std::size_t i) noexcept {
  Vf sum[T][halves];
  NIBBLE_UNROLL
  for (int t = 0; t < T; ++t) {
    NIBBLE_UNROLL
    for (int h = 0; h < halves; ++h) sum[t][h] = zero();
  }
  const float* row = a.a + i * a.lda;
  std::size_t k = 0;
  for (; k + 4 <= a.k; k += 4) {
    if (k % 16 == 0) {
      for (std::size_t r = 0; r < panel_width; ++r)
        prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(row + r * a.lda + k) + 512));
    }
    NIBBLE_UNROLL
    for (int h = 0; h < halves; ++h) {
      const float* at = row + static_cast<std::size_t>(h * lanes) * a.lda + k;
      Vf v[4] = {load_quads(at, a.lda), load_quads(at + a.lda, a.lda), load_quads(at + 2 * a.lda, a.lda),
                 load_quads(at + 3 * a.lda, a.lda)};
      transpose_quads(v);
      NIBBLE_UNROLL
      for (int j = 0; j < 4; ++j) {
        NIBBLE_UNROLL
        for (int t = 0; t < T; ++t)
          sum[t][h] = fma(v[j],
                          set1(x[static_cast<std::size_t>(t) * a.x_token_stride +
                                 (k + static_cast<std::size_t>(j)) * a.x_stride]),
                          sum[t][h]);
      }
    }
  }
  for (; k < a.k; ++k) {
    float column[panel_width];
    for (std::size_t r = 0; r < panel_width; ++r) column[r] = row[r * a.lda + k];
    NIBBLE_UNROLL
    for (int t = 0; t < T; ++t) {
      NIBBLE_UNROLL
      for (int h = 0; h < halves; ++h)
        sum[t][h] = fma(load(column + h * lanes),
                        set1(x[static_cast<std::size_t>(t) * a.x_token_stride + k * a.x_stride]), sum[t][h]);
    }
  }
  NIBBLE_UNROLL
  for (int t = 0; t < T; ++t) {
    NIBBLE_UNROLL
    for (int h = 0; h < halves; ++h)
      store(y + static_cast<std::size_t>(t) * a.y_stride + i + h * lanes, sum[t][h]);
  }
}

template <int T>
inline void rows_tokens(const RowsGemvArgs& a, std::size_t token) noexcept {
  const float* x = a.x + token * a.x_token_stride;
  float* y = a.y + token * a.y_stride;
  std::size_t i = 0;
  for (; i + panel_width <= a.n; i += panel_width) rows_block<T>(a, x, y, i);
  if (i == a.n) return;
  if (a.n >= panel_width) return rows_block<T>(a, x, y, a.n - panel_width);  // some outputs twice
  for (int t = 0; t < T; ++t)
    for (; i < a.n; ++i) {
      Vf sum = zero();
      for (std::size_t k = 0; k < a.k; ++k)
        sum = fma(set1(a.a[i * a.lda + k]),
                  set1(x[static_cast<std::size_t>(t) * a.x_token_stride + k * a.x_stride]), sum);
      store_n(y + static_cast<std::size_t>(t) * a.y_stride + i, sum, 1);
    }
}

inline void gemv_rows(const RowsGemvArgs& a) noexcept {
  for (std::size_t t = 0; t < a.tokens;) {
    const std::size_t left = a.n < panel_width ? 1 : a.tokens - t;
    if (left >= 4) {
      rows_tokens<4>(a, t);
      t += 4;
    } else if (left == 3) {
      rows_tokens<3>(a, t);
      t += 3;
    } else if (left == 2) {
      rows_tokens<2>(a, t);
      t += 2;
    } else {
      rows_tokens<1>(a, t);
      t += 1;
    }
  }
}
