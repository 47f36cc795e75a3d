// Norm, softmax and rotary embedding (RmsNormArgs, SoftmaxArgs, RopeArgs).

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

// x[0, V vectors) = exp(x - top) (times factors), added to `sum`, whose lanes `half` of V = 1 is.
template <int V>
NIBBLE_ALWAYS_INLINE void exp_block(float* x, Vf top, const float* factors, Vf (&sum)[halves], int half) noexcept {
  Vf e[V];
  NIBBLE_UNROLL
  for (int v = 0; v < V; ++v) e[v] = exp(sub(load(x + v * lanes), top));
  if constexpr (V == 1) {
    sum[half] = add(sum[half], e[0]);
  } else {
    NIBBLE_UNROLL
    for (int v = 0; v < V; ++v) sum[v % halves] = add(sum[v % halves], e[v]);
  }
  if (factors != nullptr) {
    NIBBLE_UNROLL
    for (int v = 0; v < V; ++v) e[v] = mul_only(e[v], load(factors + v * lanes));
  }
  NIBBLE_UNROLL
  for (int v = 0; v < V; ++v) store(x + v * lanes, e[v]);
}

// Binds: exp, 16 operations a vector on four pipes, 11 of them for FMA's two. Four vectors at once hide their latency.
inline void softmax_row(float* x, std::size_t n, std::size_t visible, const float* factors,
                        float* sum_out) noexcept {
  constexpr std::size_t block = 4 * lanes;
  const float lowest = -__builtin_inff();
  const std::size_t last = visible / lanes * lanes;
  const std::size_t rest = visible - last;
  // The last elements, beside lanes that change nothing: -Inf, whose exp is 0 (or NaN, where all that counts is).
  alignas(64) float tail[lanes];
  for (float& t : tail) t = lowest;
  std::memcpy(tail, x + last, rest * sizeof(float));

  Vf highest[4];
  NIBBLE_UNROLL
  for (Vf& h : highest) h = set1(lowest);
  std::size_t i = 0;
  for (; i + block <= visible; i += block) {
    NIBBLE_UNROLL
    for (int v = 0; v < 4; ++v) highest[v] = max(load(x + i + static_cast<std::size_t>(v * lanes)), highest[v]);
  }
  for (; i < last; i += lanes) highest[0] = max(load(x + i), highest[0]);
  highest[1] = max(load(tail), highest[1]);
  const Vf top = set1(reduce_max(max(max(highest[0], highest[1]), max(highest[2], highest[3]))));

  Vf sum[halves];
  NIBBLE_UNROLL
  for (int h = 0; h < halves; ++h) sum[h] = zero();
  for (i = 0; i + block <= visible; i += block)
    exp_block<4>(x + i, top, factors == nullptr ? nullptr : factors + i, sum, 0);
  int half = 0;
  for (; i < last; i += lanes, half = (half + 1) % halves)
    exp_block<1>(x + i, top, factors == nullptr ? nullptr : factors + i, sum, half);
  if (rest != 0) {
    alignas(64) float tail_factors[lanes] = {};
    if (factors != nullptr) std::memcpy(tail_factors, factors + last, rest * sizeof(float));
    exp_block<1>(tail, top, factors == nullptr ? nullptr : tail_factors, sum, half);
    std::memcpy(x + last, tail, rest * sizeof(float));
  }
  std::memset(x + visible, 0, (n - visible) * sizeof(float));
  *sum_out = sum_lanes(sum);
}

inline void softmax(const SoftmaxArgs& a) noexcept {
  for (std::size_t r = 0; r < a.rows; ++r)
    softmax_row(a.x + r * a.x_stride, a.n, a.first_visible + r / a.rows_a_step, a.factors, a.sums + r);
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
