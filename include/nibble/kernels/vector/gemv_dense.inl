// A dense fp32 matrix with contiguous outputs times a few vectors.
//
// Memory binds: every FMA of a single vector loads a vector. Few outputs: their sums stay in registers over all of k.
// Many: columns lie far apart, so four at a time are read in runs of up to 8 KB, a stream each, and the sums pass
// through the L1 cache once every four k: 4 loads from the matrix, and for each token 1 load, 1 store and 4 FMAs.
// Measured, AMD EPYC (Zen 5, shared), 2026-11-23, 4096 x 4096 on pages of 4 KB, 1 / 2 / 4 tokens, GB/s of the matrix:
// AVX-512 24 / 22 / 21, AVX2 22 / 21 / 19, Eigen at SSE2 17 / 5; a read loop has 37 on large pages.

template <int V>
NIBBLE_ALWAYS_INLINE void dense_block(const DenseGemvArgs& a, const float* x, float* y, std::size_t i) noexcept {
  Vf sum[V];
  NIBBLE_UNROLL
  for (int v = 0; v < V; ++v) sum[v] = zero();
  const float* column = a.a + i;
  for (std::size_t k = 0; k < a.k; ++k, column += a.lda, x += a.x_stride) {
    const Vf b = set1(*x);
    NIBBLE_UNROLL
    for (int v = 0; v < V; ++v) sum[v] = fma(load(column + v * lanes), b, sum[v]);
  }
  NIBBLE_UNROLL
  for (int v = 0; v < V; ++v) store(y + i + v * lanes, sum[v]);
}

// Outputs from i on, in registers.
inline void dense_few(const DenseGemvArgs& a, const float* x, float* y, std::size_t i) noexcept {
  for (; i + 8 * lanes <= a.n; i += 8 * lanes) dense_block<8>(a, x, y, i);
  if (i + 4 * lanes <= a.n) dense_block<4>(a, x, y, i), i += 4 * lanes;
  if (i + 2 * lanes <= a.n) dense_block<2>(a, x, y, i), i += 2 * lanes;
  for (; i + lanes <= a.n; i += lanes) dense_block<1>(a, x, y, i);
  if (i < a.n) {
    Vf sum = zero();
    for (std::size_t k = 0; k < a.k; ++k)
      sum = fma(load_n(a.a + k * a.lda + i, a.n - i), set1(x[k * a.x_stride]), sum);
    store_n(y + i, sum, a.n - i);
  }
}

// C columns from k on into outputs [begin, end) of T tokens; whole vectors. What is fetched ahead: the runs' own bytes,
// and where they end, the runs of the columns that come next.
template <int C, int T>
inline void dense_columns(const DenseGemvArgs& a, const float* x, float* y, std::size_t k, std::size_t begin,
                          std::size_t end) noexcept {
  constexpr std::size_t ahead = 256;  // floats
  Vf b[T][C];
  NIBBLE_UNROLL
  for (int t = 0; t < T; ++t) {
    NIBBLE_UNROLL
    for (int c = 0; c < C; ++c)
      b[t][c] =
          set1(x[static_cast<std::size_t>(t) * a.x_token_stride + (k + static_cast<std::size_t>(c)) * a.x_stride]);
  }
  const float* column = a.a + k * a.lda;
  for (std::size_t i = begin; i < end; i += lanes) {
    const std::size_t next = i + ahead < end ? i + ahead : C * a.lda + begin + (i + ahead - end);
    Vf v[C];
    NIBBLE_UNROLL
    for (int c = 0; c < C; ++c) {
      const float* at = column + static_cast<std::size_t>(c) * a.lda;
      prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(at) + next * sizeof(float)));
      v[c] = load(at + i);
    }
    NIBBLE_UNROLL
    for (int t = 0; t < T; ++t) {
      float* out = y + static_cast<std::size_t>(t) * a.y_stride + i;
      Vf sum = k == 0 ? zero() : load(out);
      NIBBLE_UNROLL
      for (int c = 0; c < C; ++c) sum = fma(v[c], b[t][c], sum);
      store(out, sum);
    }
  }
}

template <int T>
inline void dense_many(const DenseGemvArgs& a, const float* x, float* y) noexcept {
  constexpr std::size_t run = T > 2 ? 1024 : 2048;
  const std::size_t whole = a.n / lanes * lanes;
  for (std::size_t begin = 0; begin < whole; begin += run) {
    const std::size_t end = whole - begin < run ? whole : begin + run;
    std::size_t k = 0;
    for (; k + 4 <= a.k; k += 4) dense_columns<4, T>(a, x, y, k, begin, end);
    for (; k < a.k; ++k) dense_columns<1, T>(a, x, y, k, begin, end);
  }
  for (int t = 0; t < T && whole < a.n; ++t)
    dense_few(a, x + static_cast<std::size_t>(t) * a.x_token_stride, y + static_cast<std::size_t>(t) * a.y_stride,
              whole);
}

inline void gemv_dense(const DenseGemvArgs& a) noexcept {
  const bool few = a.n <= 16 * lanes || a.k == 0;
  for (std::size_t t = 0; t < a.tokens;) {
    const float* x = a.x + t * a.x_token_stride;
    float* y = a.y + t * a.y_stride;
    const std::size_t left = a.tokens - t;
    if (few) {
      dense_few(a, x, y, 0);
      t += 1;
    } else if (left >= 4) {
      dense_many<4>(a, x, y);
      t += 4;
    } else {
      left == 3 ? dense_many<3>(a, x, y) : left == 2 ? dense_many<2>(a, x, y) : dense_many<1>(a, x, y);
      t = a.tokens;
    }
  }
}
