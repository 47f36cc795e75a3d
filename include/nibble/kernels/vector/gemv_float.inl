// A few rows times packed weights of any format, decoded in registers.
//
// Tile: 1, 2 or 4 rows (3 are 4 with one dropped) x gemv_panels_1, _2, _4 panels; one pass over the weights.
// Port arithmetic, AVX-512, 16 weights by R rows, FMA and multiply on the same two pipes: int4 and nf4 shift +
// permute + multiply + R FMAs = (1 + R) / 2 cycles; int8 logic + subtract + multiply + R FMAs; fp16, bf16, fp32 R / 2.
// AVX2 takes twice as many vectors, and int4 shift, shift, convert. In DRAM the limit is what one core reads: four
// panels are as many streams for the hardware prefetchers, with a software prefetch 2 KB ahead in each.
// Measured, AMD EPYC (Zen 5, shared), 2026-11-23, AVX-512, GB/s of weights:
//   1 row in DRAM, read loop 37-39: fp32 35.5, fp16 35.9, int8 32, int4 g32 26 (multiply and FMA bind at 34)
//   1 row in cache: fp16 111, int8 44.6, int4 30.2 (107 GFLOP/s), nf4 28.6; 4 rows: int8 172 GFLOP/s, int4 176

// Panels beyond the last alias it: they cost no memory traffic, and their sums are dropped. So do rows.
template <Decode kind, int R, int P, int I>
NIBBLE_ALWAYS_INLINE void gemv_step(const Decoder<kind>& d, const Lookup16& table, const float* const* x,
                                    std::size_t k, Vf (&sum)[R][halves]) noexcept {
  NIBBLE_UNROLL
  for (int h = 0; h < halves; ++h) {
    const Vf w = d.template value<I>(h, table);
    NIBBLE_UNROLL
    for (int r = 0; r < R; ++r) sum[r][h] = fma(w, set1(x[r][k + I]), sum[r][h]);
  }
}

// Four k of all panels: sixteen of one after the other would be a chain of FMAs longer than a CPU looks ahead.
template <Decode kind, int R, int P, int M>
NIBBLE_ALWAYS_INLINE void gemv_four(const Decoder<kind> (&d)[P], const Lookup16& table, const float* const* x,
                                    std::size_t k, Vf (&sum)[P][R][halves]) noexcept {
  NIBBLE_UNROLL
  for (int p = 0; p < P; ++p) {
    gemv_step<kind, R, P, 4 * M>(d[p], table, x, k, sum[p]);
    gemv_step<kind, R, P, 4 * M + 1>(d[p], table, x, k, sum[p]);
    gemv_step<kind, R, P, 4 * M + 2>(d[p], table, x, k, sum[p]);
    gemv_step<kind, R, P, 4 * M + 3>(d[p], table, x, k, sum[p]);
  }
}

// R rows, P panels at once, decoded in registers. The panels are as many independent FMA chains, and as many
// streams for the hardware prefetchers.
template <Decode kind, int R, int P>
inline void gemv_tile(const FloatGemvArgs& a, std::size_t row) noexcept {
  const PanelView& w = a.w;
  const Lookup16 table = load_lookup16(table_of(w));
  const std::size_t group_size = has_groups(kind) ? w.group_size : w.k;
  const std::size_t rows = a.rows - row < R ? a.rows - row : R;
  const float* x[R];
  for (std::size_t r = 0; r < R; ++r) x[r] = a.x + (row + (r < rows ? r : rows - 1)) * a.x_stride;
  for (std::size_t begin = a.panel_begin; begin < a.panel_end; begin += P) {
    const std::size_t panels = a.panel_end - begin < P ? a.panel_end - begin : P;
    std::size_t panel[P];
    const std::uint8_t* codes[P];
    Vf sum[P][R][halves];
    NIBBLE_UNROLL
    for (std::size_t p = 0; p < P; ++p) {
      panel[p] = begin + (p < panels ? p : panels - 1);
      codes[p] = w.codes + panel[p] * w.panel_bytes;
      NIBBLE_UNROLL
      for (int r = 0; r < R; ++r) {
        NIBBLE_UNROLL
        for (int h = 0; h < halves; ++h) sum[p][r][h] = zero();
      }
    }
    std::size_t k = 0;
    constexpr std::size_t units = unit_k(kind);
    const std::size_t whole = w.k / units * units;
    for (std::size_t g = 0; k < whole; ++g) {
      Decoder<kind> d[P];
      NIBBLE_UNROLL
      for (std::size_t p = 0; p < P; ++p) d[p].group(w, panel[p], g);
      const std::size_t end = whole - k < group_size ? whole : k + group_size;
      for (; k < end; k += units) {
        const std::size_t at = k / units * unit_bytes(kind);
        if constexpr (in_planes(kind)) {
          NIBBLE_UNROLL
          for (std::size_t p = 0; p < P; ++p) {
            prefetch_lines<static_cast<int>((unit_bytes(kind) + 63) / 64)>(codes[p], at + gemv_prefetch);
            d[p].unit(codes[p] + at);
          }
          gemv_four<kind, R, P, 0>(d, table, x, k, sum);
          gemv_four<kind, R, P, 1>(d, table, x, k, sum);
          gemv_four<kind, R, P, 2>(d, table, x, k, sum);
          gemv_four<kind, R, P, 3>(d, table, x, k, sum);
          continue;
        }
        NIBBLE_UNROLL
        for (std::size_t p = 0; p < P; ++p) {
          prefetch_lines<static_cast<int>((unit_bytes(kind) + 63) / 64)>(codes[p], at + gemv_prefetch);
          d[p].unit(codes[p] + at);
          gemv_step<kind, R, P, 0>(d[p], table, x, k, sum[p]);
          gemv_step<kind, R, P, 1>(d[p], table, x, k, sum[p]);
          gemv_step<kind, R, P, 2>(d[p], table, x, k, sum[p]);
          gemv_step<kind, R, P, 3>(d[p], table, x, k, sum[p]);
          gemv_step<kind, R, P, 4>(d[p], table, x, k, sum[p]);
          gemv_step<kind, R, P, 5>(d[p], table, x, k, sum[p]);
          gemv_step<kind, R, P, 6>(d[p], table, x, k, sum[p]);
          gemv_step<kind, R, P, 7>(d[p], table, x, k, sum[p]);
        }
      }
    }
    float* acc = a.acc + row * a.acc_stride + (begin - a.panel_begin) * panel_width;
    NIBBLE_UNROLL
    for (std::size_t p = 0; p < P; ++p) {
      NIBBLE_UNROLL
      for (std::size_t r = 0; r < R; ++r) {
        if (p < panels && r < rows) {
          NIBBLE_UNROLL
          for (int h = 0; h < halves; ++h)
            store(acc + r * a.acc_stride + p * panel_width + h * lanes, sum[p][r][h]);
        }
      }
    }
  }
}

template <Decode kind>
inline void gemv_kind(const FloatGemvArgs& a) noexcept {
  for (std::size_t row = 0; row < a.rows;) {
    const std::size_t left = a.rows - row;
    // A table of two registers and 4 rows do not fit AVX2's sixteen: the sums would be spilled inside the FMA chains.
    // Formats in planes make do with two rows: half of what they would take to compile.
    constexpr bool four = (kind != Decode::levels || cheap_lookup) && !in_planes(kind);
    if (four && left >= 3) {
      if constexpr (four) gemv_tile<kind, 4, gemv_panels_4>(a, row);
      row += 4;
    } else if (left >= 2) {
      gemv_tile<kind, 2, gemv_panels_2>(a, row);
      row += 2;
    } else {
      gemv_tile<kind, 1, gemv_panels_1>(a, row);
      row += 1;
    }
  }
  constexpr std::size_t units = unit_k(kind);
  if (a.w.k % units == 0) return;
  // The last few k, on top of the sums: decoded by unpack, out of line.
  float weights[units * panel_width];
  UnpackArgs u;
  u.w = a.w;
  u.k_begin = a.w.k / units * units;
  u.k_end = a.w.k;
  u.out = weights;
  for (std::size_t p = a.panel_begin; p < a.panel_end; ++p) {
    u.panel_begin = p;
    u.panel_end = p + 1;
    unpack_panels<kind>(u);
    for (std::size_t r = 0; r < a.rows; ++r)
      float_tile<1, 1>(weights, 0, u.k_end - u.k_begin, a.x + r * a.x_stride + u.k_begin, 1, 1, true,
                       a.acc + r * a.acc_stride + (p - a.panel_begin) * panel_width, 0);
  }
}

inline void gemv_float(const FloatGemvArgs& a) noexcept {
  switch (decode_of(a.w)) {
    case Decode::fp32: return gemv_kind<Decode::fp32>(a);
    case Decode::fp16: return gemv_kind<Decode::fp16>(a);
    case Decode::bf16: return gemv_kind<Decode::bf16>(a);
    case Decode::int8: return gemv_kind<Decode::int8>(a);
    case Decode::int8_offset: return gemv_kind<Decode::int8_offset>(a);
    case Decode::int4: return gemv_kind<Decode::int4>(a);
    case Decode::int4_plain:
      if constexpr (!cheap_lookup) return gemv_kind<Decode::int4_plain>(a);
      return;
    case Decode::int4_offset: return gemv_kind<Decode::int4_offset>(a);
    case Decode::levels: return gemv_kind<Decode::levels>(a);
    case Decode::int2: return gemv_kind<Decode::int2>(a);
    case Decode::int3: return gemv_kind<Decode::int3>(a);
    case Decode::int5: return gemv_kind<Decode::int5>(a);
    case Decode::int6: return gemv_kind<Decode::int6>(a);
  }
}
