// Norm, softmax and rotary embedding (RmsNormArgs, SoftmaxArgs, SoftmaxCodesArgs, RopeArgs).
//
// Measured, AMD EPYC (Zen 5, 4.1 GHz, shared), 2026-11-23, in cache: softmax 0.13-0.15 ns an element (AVX2 0.35-0.39),
// straight to codes 0.27-0.30 (0.71). The bound by ports is 6 cycles a vector, 0.09 ns; 15 dependent operations keep it
// away: 4 vectors at once took 0.19, 8 take this. Norm of 576: 75-80 ns; rotary embedding of 576: 57-75 ns.

// Lanes 0 .. 15 of a sum, added up in the order of args.hpp.
NIBBLE_ALWAYS_INLINE float sum_lanes(const Vf (&sum)[halves]) noexcept {
  alignas(64) float lane[16];
  NIBBLE_UNROLL
  for (int h = 0; h < halves; ++h) store(lane + h * lanes, sum[h]);
  for (std::size_t step = 8; step != 0; step /= 2)
    for (std::size_t l = 0; l < step; ++l) lane[l] += lane[l + step];
  return lane[0];
}

inline void rms_norm(const RmsNormArgs& a) noexcept {
  for (std::size_t r = 0; r < a.rows; ++r) {
    const float* x = a.x + r * a.x_stride;
    float* out = a.out + r * a.out_stride;
    Vf sum[halves];
    NIBBLE_UNROLL
    for (int h = 0; h < halves; ++h) sum[h] = zero();
    std::size_t i = 0;
    for (; i + 16 <= a.n; i += 16) {
      NIBBLE_UNROLL
      for (int h = 0; h < halves; ++h) {
        const Vf v = load(x + i + h * lanes);
        sum[h] = fma(v, v, sum[h]);
      }
    }
    for (int h = 0; i < a.n; i += lanes, ++h) {
      const std::size_t left = a.n - i;
      // A lane that holds nothing adds +0.
      const Vf v = left < lanes ? load_n(x + i, left) : load(x + i);
      sum[h] = fma(v, v, sum[h]);
    }
    const float mean = sum_lanes(sum) / static_cast<float>(a.n);
    const Vf factor = set1(1.0F / __builtin_sqrtf(mean + a.epsilon));
    for (i = 0; i + lanes <= a.n; i += lanes) store(out + i, mul(mul(load(x + i), factor), load(a.weight + i)));
    if (i < a.n)
      store_n(out + i, mul(mul(load_n(x + i, a.n - i), factor), load_n(a.weight + i, a.n - i)), a.n - i);
  }
}

// The largest of n floats; NaNs are passed over.
NIBBLE_ALWAYS_INLINE float row_max(const float* x, std::size_t n) noexcept {
  constexpr std::size_t block = 4 * lanes;
  Vf highest[4];
  NIBBLE_UNROLL
  for (Vf& h : highest) h = set1(-__builtin_inff());
  std::size_t i = 0;
  for (; i + block <= n; i += block) {
    NIBBLE_UNROLL
    for (int v = 0; v < 4; ++v) highest[v] = max(load(x + i + static_cast<std::size_t>(v * lanes)), highest[v]);
  }
  for (; i + lanes <= n; i += lanes) highest[0] = max(load(x + i), highest[0]);
  if (i < n) highest[1] = max(load_n_or(x + i, n - i, highest[1]), highest[1]);
  return reduce_max(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
}

// x[0, V vectors) = exp(x - top) (times factors), added to `sum`; where V is 1, to its part `half`, and only the first
// `count` lanes are meant: the others act as -Inf, whose exp is 0 (or NaN, where all that counts is).
template <int V>
NIBBLE_ALWAYS_INLINE void exp_block(float* x, std::size_t count, Vf top, const float* factors, Vf (&sum)[halves],
                                    int half) noexcept {
  const bool whole = V != 1 || count == lanes;
  Vf e[V];
  NIBBLE_UNROLL
  for (int v = 0; v < V; ++v)
    e[v] = exp(sub(whole ? load(x + v * lanes) : load_n_or(x, count, set1(-__builtin_inff())), top));
  if constexpr (V == 1) {
    sum[half] = add(sum[half], e[0]);
  } else {
    NIBBLE_UNROLL
    for (int v = 0; v < V; ++v) sum[v % halves] = add(sum[v % halves], e[v]);
  }
  if (factors != nullptr) {
    NIBBLE_UNROLL
    for (int v = 0; v < V; ++v) e[v] = mul_only(e[v], whole ? load(factors + v * lanes) : load_n(factors, count));
  }
  NIBBLE_UNROLL
  for (int v = 0; v < V; ++v) {
    if (whole)
      store(x + v * lanes, e[v]);
    else
      store_n(x, e[v], count);
  }
}

// Binds: exp, 16 operations a vector on four pipes, 9 or more of them for FMA's two. Several vectors at once hide their
// latency.
inline void softmax_row(float* x, std::size_t n, std::size_t visible, const float* factors,
                        float* sum_out) noexcept {
  constexpr std::size_t block = exp_vectors * lanes;
  const Vf top = set1(row_max(x, visible));
  Vf sum[halves];
  NIBBLE_UNROLL
  for (int h = 0; h < halves; ++h) sum[h] = zero();
  const auto factors_at = [&](std::size_t at) noexcept { return factors == nullptr ? nullptr : factors + at; };
  std::size_t i = 0;
  for (; i + block <= visible; i += block) exp_block<exp_vectors>(x + i, lanes, top, factors_at(i), sum, 0);
  for (int half = 0; i < visible; i += lanes, half = (half + 1) % halves)
    exp_block<1>(x + i, visible - i < lanes ? visible - i : lanes, top, factors_at(i), sum, half);
  for (i = visible; i + lanes <= n; i += lanes) store(x + i, zero());
  if (i < n) store_n(x + i, zero(), n - i);
  *sum_out = sum_lanes(sum);
}

inline void softmax(const SoftmaxArgs& a) noexcept {
  for (std::size_t r = 0; r < a.rows; ++r)
    softmax_row(a.x + r * a.x_stride, a.n, a.first_visible + r / a.rows_a_step, a.factors, a.sums + r);
}

// V vectors of softmax_codes, whole groups, of which the first `count` elements are visible.
template <int V>
NIBBLE_ALWAYS_INLINE void codes_block(const float* x, std::size_t count, Vf top, const float* factors,
                                      Vf (&sum)[halves], std::int8_t* codes, float* scales) noexcept {
  constexpr int group = 32 / lanes;  // vectors
  constexpr std::size_t all = V * lanes;
  const bool whole = count >= all;
  Vf w[V];
  NIBBLE_UNROLL
  for (std::size_t v = 0; v < V; ++v) {
    const std::size_t at = v * lanes;
    const std::size_t n = count <= at ? 0 : count - at < lanes ? count - at : lanes;
    w[v] = exp(sub(whole ? load(x + at) : load_n_or(x + at, n, set1(-__builtin_inff())), top));
  }
  NIBBLE_UNROLL
  for (std::size_t v = 0; v < V; ++v) sum[v % halves] = add(sum[v % halves], w[v]);
  NIBBLE_UNROLL
  for (std::size_t v = 0; v < V; ++v) {
    const std::size_t at = v * lanes;
    const std::size_t n = count <= at ? 0 : count - at < lanes ? count - at : lanes;
    w[v] = zero_if_nan(mul_only(w[v], whole ? load(factors + at) : load_n(factors + at, n)));
  }
  NIBBLE_UNROLL
  for (int g = 0; g < V / group; ++g) {
    Vf highest = w[g * group];
    NIBBLE_UNROLL
    for (int v = 1; v < group; ++v) highest = max(w[g * group + v], highest);
    float m = reduce_max(highest);
    m = m < 0x1p-100F ? 0.0F : m;
    const Vf inverse = set1(m == 0.0F ? 0.0F : 127.0F / m);
    scales[g] = m * (1.0F / 127.0F);
    NIBBLE_UNROLL
    for (int v = 0; v < group; ++v)
      store_8(codes + (g * group + v) * lanes, to_int(mul_only(w[g * group + v], inverse)));
  }
}

inline void softmax_codes(const SoftmaxCodesArgs& a) noexcept {
  constexpr std::size_t block = exp_vectors * lanes;
  static_assert(block % 32 == 0, "blocks are whole groups");
  for (std::size_t r = 0; r < a.rows; ++r) {
    const float* x = a.x + r * a.x_stride;
    const std::size_t visible = a.first_visible + r / a.rows_a_step;
    std::int8_t* codes = a.codes + r * a.n;
    float* scales = a.scales + r * (a.n / 32);
    const Vf top = set1(row_max(x, visible));
    Vf sum[halves];
    NIBBLE_UNROLL
    for (int h = 0; h < halves; ++h) sum[h] = zero();
    std::size_t i = 0;
    for (; i + block <= visible; i += block)
      codes_block<exp_vectors>(x + i, block, top, a.factors + i, sum, codes + i, scales + i / 32);
    for (; i < visible; i += 32)
      codes_block<32 / lanes>(x + i, visible - i, top, a.factors + i, sum, codes + i, scales + i / 32);
    for (; i < a.n; i += 32) {
      for (std::size_t v = 0; v < 32; v += lanes) store_8(codes + i + v, set1_int(0));
      scales[i / 32] = 0.0F;
    }
    a.sums[r] = sum_lanes(sum);
    std::int32_t* sums = a.code_sums + r * (a.n / 32);
    for (i = 0; i + 64 <= a.n; i += 64) {
      std::int32_t quarter[4];
      sum_blocks_4(codes + i, quarter);
      sums[i / 32] = quarter[0] + quarter[1];
      sums[i / 32 + 1] = quarter[2] + quarter[3];
    }
    if (i < a.n) {
      std::int32_t last = 0;
      for (std::size_t j = 0; j < 32; ++j) last += codes[i + j];
      sums[i / 32] = last;
    }
  }
}

inline void rope(const RopeArgs& a) noexcept {
  const Vf scale = set1(a.scale);
  const std::size_t turned = 2 * a.pairs;
  const auto turn = [&](Vf x, Vf cosine, Vf sine) noexcept {
    return mul_only(fma(x, cosine, mul(swap_pairs(x), sine)), scale);
  };
  for (std::size_t h = 0; h < a.heads; ++h) {
    float* x = a.x + h * a.head_size;
    std::size_t i = 0;
    for (; i + lanes <= turned; i += lanes)
      store(x + i, turn(load(x + i), load(a.cosines + i), load(a.sines + i)));
    if (i < turned) {
      const std::size_t n = turned - i;
      store_n(x + i, turn(load_n(x + i, n), load_n(a.cosines + i, n), load_n(a.sines + i, n)), n);
    }
    for (i = turned; i + lanes <= a.head_size; i += lanes) store(x + i, mul_only(load(x + i), scale));
    if (i < a.head_size) store_n(x + i, mul_only(load_n(x + i, a.head_size - i), scale), a.head_size - i);
  }
}
