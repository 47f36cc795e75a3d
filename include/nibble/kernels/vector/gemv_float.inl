// A few rows times packed weights of any format.

// Weights beyond the last panel alias it: they cost no memory traffic, and their sums are dropped.
struct PanelGroup {
  std::size_t panel[gemv_panels];
  std::size_t count;
};
inline PanelGroup panel_group(std::size_t begin, std::size_t end) noexcept {
  PanelGroup group;
  group.count = end - begin < gemv_panels ? end - begin : gemv_panels;
  for (std::size_t p = 0; p < gemv_panels; ++p) group.panel[p] = begin + (p < group.count ? p : group.count - 1);
  return group;
}

template <Decode kind, int I>
NIBBLE_ALWAYS_INLINE void gemv_step(const Decoder<kind>& d, const Lookup16& table, const float* x, Vf* sum) noexcept {
  NIBBLE_UNROLL
  for (int h = 0; h < halves; ++h) sum[h] = fma(d.template value<I>(h, table), set1(x[I]), sum[h]);
}

// One row: decode in registers, gemv_panels panels at once. The panels are as many independent FMA chains, and as
// many streams for the hardware prefetchers.
template <Decode kind>
inline void gemv_row(const FloatGemvArgs& a) noexcept {
  const PanelView& w = a.w;
  const Lookup16 table = load_lookup16(table_of(w));
  const std::size_t group_size = has_groups(kind) ? w.group_size : w.k;
  for (std::size_t begin = a.panel_begin; begin < a.panel_end; begin += gemv_panels) {
    const PanelGroup panels = panel_group(begin, a.panel_end);
    const std::uint8_t* codes[gemv_panels];
    Vf sum[gemv_panels][halves];
    NIBBLE_UNROLL
    for (std::size_t p = 0; p < gemv_panels; ++p) {
      codes[p] = w.codes + panels.panel[p] * w.panel_bytes;
      NIBBLE_UNROLL
      for (int h = 0; h < halves; ++h) sum[p][h] = zero();
    }
    std::size_t k = 0;
    for (std::size_t g = 0; k < w.k; ++g) {
      Decoder<kind> d[gemv_panels];
      NIBBLE_UNROLL
      for (std::size_t p = 0; p < gemv_panels; ++p) d[p].group(w, panels.panel[p], g);
      const std::size_t end = w.k - k < group_size ? w.k : k + group_size;
      for (; k + 8 <= end; k += 8) {
        const float* x = a.x + k;
        const std::size_t at = k / 8 * unit_bytes(kind);
        NIBBLE_UNROLL
        for (std::size_t p = 0; p < gemv_panels; ++p) {
          d[p].unit(codes[p] + at);
          gemv_step<kind, 0>(d[p], table, x, sum[p]);
          gemv_step<kind, 1>(d[p], table, x, sum[p]);
          gemv_step<kind, 2>(d[p], table, x, sum[p]);
          gemv_step<kind, 3>(d[p], table, x, sum[p]);
          gemv_step<kind, 4>(d[p], table, x, sum[p]);
          gemv_step<kind, 5>(d[p], table, x, sum[p]);
          gemv_step<kind, 6>(d[p], table, x, sum[p]);
          gemv_step<kind, 7>(d[p], table, x, sum[p]);
        }
      }
      if (k < end) {
        NIBBLE_UNROLL
        for (std::size_t p = 0; p < gemv_panels; ++p) {
          float staged[8 * panel_width];
          d[p].unit(codes[p] + k / 8 * unit_bytes(kind));
          decode_unit<kind>(d[p], table, staged);
          for (std::size_t i = 0; i < end - k; ++i) {
            NIBBLE_UNROLL
            for (int h = 0; h < halves; ++h)
              sum[p][h] = fma(load(staged + i * panel_width + h * lanes), set1(a.x[k + i]), sum[p][h]);
          }
        }
        k = end;
      }
    }
    float* acc = a.acc + (begin - a.panel_begin) * panel_width;
    NIBBLE_UNROLL
    for (std::size_t p = 0; p < gemv_panels; ++p) {
      if (p < panels.count) {
        NIBBLE_UNROLL
        for (int h = 0; h < halves; ++h) store(acc + p * panel_width + h * lanes, sum[p][h]);
      }
    }
  }
}

// Several rows: a block of weights is decoded once, into the first-level cache, and multiplied with every row.
inline void gemv_rows(const FloatGemvArgs& a) noexcept {
  constexpr std::size_t block = 64;
  alignas(64) float weights[gemv_block_panels * block * panel_width];
  for (std::size_t begin = a.panel_begin; begin < a.panel_end; begin += gemv_block_panels) {
    UnpackArgs u;
    u.w = a.w;
    u.panel_begin = begin;
    u.panel_end = a.panel_end - begin < gemv_block_panels ? a.panel_end : begin + gemv_block_panels;
    u.out = weights;
    u.out_panel_stride = block * panel_width;
    const std::size_t panels = u.panel_end - begin;
    for (std::size_t k = 0; k < a.w.k; k += block) {
      u.k_begin = k;
      u.k_end = a.w.k - k < block ? a.w.k : k + block;
      unpack(u);
      const std::size_t depth = u.k_end - k;
      for (std::size_t p = 0; p < panels;) {
        const float* panel = weights + p * u.out_panel_stride;
        float* acc = a.acc + (begin - a.panel_begin + p) * panel_width;
        const bool pair = panels - p >= 2;
        for (std::size_t r = 0; r < a.rows;) {
          const std::size_t left = a.rows - r;
          const float* x = a.x + r * a.x_stride + k;
          float* out = acc + r * a.acc_stride;
          if (left >= 4 && pair)
            float_tile<4, 2>(panel, u.out_panel_stride, depth, x, a.x_stride, 1, k != 0, out, a.acc_stride);
          else if (left >= 4)
            float_tile<4, 1>(panel, u.out_panel_stride, depth, x, a.x_stride, 1, k != 0, out, a.acc_stride);
          else if (pair)
            float_tile<1, 2>(panel, u.out_panel_stride, depth, x, a.x_stride, 1, k != 0, out, a.acc_stride);
          else
            float_tile<1, 1>(panel, u.out_panel_stride, depth, x, a.x_stride, 1, k != 0, out, a.acc_stride);
          r += left >= 4 ? 4 : 1;
        }
        p += pair ? 2 : 1;
      }
    }
    if (a.w.k == 0) {
      for (std::size_t r = 0; r < a.rows; ++r)
        for (std::size_t j = 0; j < panels * panel_width; ++j)
          a.acc[r * a.acc_stride + (begin - a.panel_begin) * panel_width + j] = 0.0F;
    }
  }
}

inline void gemv_float(const FloatGemvArgs& a) noexcept {
  if (a.rows != 1) return gemv_rows(a);
  switch (decode_of(a.w)) {
    case Decode::fp32: return gemv_row<Decode::fp32>(a);
    case Decode::fp16: return gemv_row<Decode::fp16>(a);
    case Decode::bf16: return gemv_row<Decode::bf16>(a);
    case Decode::int8: return gemv_row<Decode::int8>(a);
    case Decode::int8_plain: return gemv_row<Decode::int8_plain>(a);
    case Decode::int8_offset: return gemv_row<Decode::int8_offset>(a);
    case Decode::int4: return gemv_row<Decode::int4>(a);
    case Decode::int4_plain:
      if constexpr (!cheap_lookup) return gemv_row<Decode::int4_plain>(a);
      return;
    case Decode::int4_offset: return gemv_row<Decode::int4_offset>(a);
    case Decode::levels: return gemv_row<Decode::levels>(a);
  }
}
