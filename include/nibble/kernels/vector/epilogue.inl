// Accumulators to outputs. The operations of exp_reference and its activations, lane by lane.
//
// Four vectors at once: as many chains hide the latency of exp (15 dependent operations) and of the division.
// Measured, AMD EPYC (Zen 5, 4.1 GHz, shared), 2026-11-23, ns an element: scale 0.04 (AVX2 0.06), SiLU 0.17
// (0.35), GELU 0.23 (0.51).

NIBBLE_ALWAYS_INLINE Vf silu(Vf v) noexcept {
  const Vf minus = from_bits(xor_int(bits(v), set1_int(static_cast<std::int32_t>(0x80000000U))));
  return div(v, add(set1(1.0F), exp(minus)));
}

NIBBLE_ALWAYS_INLINE Vf gelu(Vf v) noexcept {
  const Vf cube = mul(mul(v, v), v);
  const Vf u = mul(set1(0.797884561F), fma(set1(0.044715F), cube, v));
  return div(v, add(set1(1.0F), exp(mul(set1(-2.0F), u))));
}

// V vectors from column c of row r; `count` lanes of the last are meant where V is 1.
template <int V>
NIBBLE_ALWAYS_INLINE void epilogue_block(const EpilogueArgs& a, std::size_t r, std::size_t c,
                                         std::size_t count) noexcept {
  const bool whole = V != 1 || count == lanes;
  const auto get = [&](const float* p, int v) noexcept { return whole ? load(p + v * lanes) : load_n(p, count); };
  Vf y[V];
  NIBBLE_UNROLL
  for (int v = 0; v < V; ++v) y[v] = get(a.acc + r * a.acc_stride + c, v);
  if (a.row_zeros != nullptr) {
    const Vf minus_zero = set1(-a.row_zeros[r]);
    NIBBLE_UNROLL
    for (int v = 0; v < V; ++v) y[v] = fma(minus_zero, get(a.channel_sums + c, v), y[v]);
  }
  if (a.row_scales != nullptr) {
    const Vf scale = set1(a.row_scales[r]);
    NIBBLE_UNROLL
    for (int v = 0; v < V; ++v) y[v] = mul(y[v], scale);
  }
  for (std::size_t i = 0; i < a.op_count; ++i) {
    const EpilogueOp& op = a.ops[i];
    const float* row = op.data == nullptr ? nullptr : op.data + c;
    switch (op.kind) {
      case EpilogueOpKind::multiply: row += r * op.stride; [[fallthrough]];
      case EpilogueOpKind::scale:
        NIBBLE_UNROLL
        for (int v = 0; v < V; ++v) y[v] = mul(y[v], get(row, v));
        break;
      case EpilogueOpKind::add: row += r * op.stride; [[fallthrough]];
      case EpilogueOpKind::bias:
        NIBBLE_UNROLL
        for (int v = 0; v < V; ++v) y[v] = add(y[v], get(row, v));
        break;
      case EpilogueOpKind::relu:
        NIBBLE_UNROLL
        for (int v = 0; v < V; ++v) y[v] = zero_unless_positive_or_nan(y[v]);
        break;
      case EpilogueOpKind::silu:
        NIBBLE_UNROLL
        for (int v = 0; v < V; ++v) y[v] = silu(y[v]);
        break;
      case EpilogueOpKind::gelu:
        NIBBLE_UNROLL
        for (int v = 0; v < V; ++v) y[v] = gelu(y[v]);
        break;
    }
  }
  if (a.out_int8 != nullptr) {
    std::int8_t* out = a.out_int8 + r * a.out_stride + c;
    const Vf scale = set1(a.out_scale);
    const Vf zero_point = set1(static_cast<float>(a.out_zero));
    NIBBLE_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vf q = add(zero_if_nan(round(div(y[v], scale))), zero_point);
      const Vi code = to_int(min(max(q, set1(-128.0F)), set1(127.0F)));
      if (whole)
        store_8(out + v * lanes, code);
      else
        store_8_n(out, code, count);
    }
  } else {
    float* out = a.out + r * a.out_stride + c;
    NIBBLE_UNROLL
    for (int v = 0; v < V; ++v) {
      if (whole)
        store(out + v * lanes, y[v]);
      else
        store_n(out, y[v], count);
    }
  }
}

inline void epilogue(const EpilogueArgs& a) noexcept {
  for (std::size_t r = 0; r < a.rows; ++r) {
    std::size_t c = 0;
    for (; c + 4 * lanes <= a.cols; c += 4 * lanes) epilogue_block<4>(a, r, c, lanes);
    for (; c < a.cols; c += lanes) epilogue_block<1>(a, r, c, a.cols - c < lanes ? a.cols - c : lanes);
  }
}
