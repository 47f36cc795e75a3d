// Panels of any format to fp32: what the float GEMM runs on, and the weights that GEMVs of several rows share.
//
// Port arithmetic, AVX-512, 16 weights: int4 and nf4 shift, permute, multiply, store; int8 shuffle, convert,
// subtract, multiply, store; fp16 convert, store. One store of 64 bytes a cycle binds: 16 weights a cycle at most.

template <Decode kind>
inline void unpack_panels(const UnpackArgs& a) noexcept {
  const PanelView& w = a.w;
  constexpr std::size_t units = unit_k(kind);
  alignas(64) float staged[units * panel_width];  // a unit that is cut short
  const Lookup16 table = load_lookup16(table_of(w));
  for (std::size_t p = a.panel_begin; p < a.panel_end; ++p) {
    Decoder<kind> d;
    const std::uint8_t* codes = w.codes + p * w.panel_bytes;
    float* out = a.out + (p - a.panel_begin) * a.out_panel_stride;
    std::size_t k = a.k_begin;
    while (k < a.k_end) {
      std::size_t end = a.k_end;
      if constexpr (has_groups(kind)) {
        const std::size_t g = k / w.group_size;
        d.group(w, p, g);
        end = (g + 1) * w.group_size < end ? (g + 1) * w.group_size : end;
      }
      while (k < end) {
        const std::size_t first = k / units * units;
        const std::size_t stop = first + units < end ? first + units : end;
        const bool cut = stop - k != units;
        prefetch_lines<static_cast<int>((unit_bytes(kind) + 63) / 64)>(codes, k / units * unit_bytes(kind) + 1024);
        d.unit(codes + k / units * unit_bytes(kind));
        decode_unit<kind>(d, table, cut ? staged : out);
        if (cut) std::memcpy(out, staged + (k - first) * panel_width, (stop - k) * panel_width * sizeof(float));
        out += (stop - k) * panel_width;
        k = stop;
      }
    }
  }
}

inline void unpack(const UnpackArgs& a) noexcept {
  switch (decode_of(a.w)) {
    case Decode::fp32: return unpack_panels<Decode::fp32>(a);
    case Decode::fp16: return unpack_panels<Decode::fp16>(a);
    case Decode::bf16: return unpack_panels<Decode::bf16>(a);
    case Decode::int8: return unpack_panels<Decode::int8>(a);
    case Decode::int8_offset: return unpack_panels<Decode::int8_offset>(a);
    case Decode::int4: return unpack_panels<Decode::int4>(a);
    case Decode::int4_plain:
      if constexpr (!cheap_lookup) return unpack_panels<Decode::int4_plain>(a);
      return;
    case Decode::int4_offset: return unpack_panels<Decode::int4_offset>(a);
    case Decode::levels: return unpack_panels<Decode::levels>(a);
    case Decode::int2: return unpack_panels<Decode::int2>(a);
    case Decode::int3: return unpack_panels<Decode::int3>(a);
    case Decode::int5: return unpack_panels<Decode::int5>(a);
    case Decode::int6: return unpack_panels<Decode::int6>(a);
  }
}

// Bit planes to whole nibbles or bytes.
template <Decode kind>
inline void expand_panels(const ExpandArgs& a) noexcept {
  constexpr bool nibbles = plane_bits(kind) < 4;
  const Vi bias = set1_int(static_cast<std::int32_t>(0x01010101U * expanded_bias(a.w)));
  for (std::size_t p = a.panel_begin; p < a.panel_end; ++p) {
    Decoder<kind> d;
    const std::uint8_t* codes = a.w.codes + p * a.w.panel_bytes;
    std::uint8_t* out = a.out + (p - a.panel_begin) * a.out_panel_stride;
    const std::uint8_t* const end = codes + a.w.k_padded / bits_k_unit * unit_bytes(kind);
    for (; codes != end; codes += unit_bytes(kind)) {
      prefetch_lines<static_cast<int>((unit_bytes(kind) + 63) / 64)>(codes, 4096);
      d.unit(codes);
      NIBBLE_UNROLL
      for (int h = 0; h < halves; ++h) {
        const Vi w[4] = {add_int(d.template bytes<0>(h), bias), add_int(d.template bytes<1>(h), bias),
                         add_int(d.template bytes<2>(h), bias), add_int(d.template bytes<3>(h), bias)};
        std::uint8_t* to = out + h * lanes * 4;
        if constexpr (nibbles) {
          store_words(to, or_int(w[0], shift_left<4>(w[1])));
          store_words(to + 64, or_int(w[2], shift_left<4>(w[3])));
        } else {
          NIBBLE_UNROLL
          for (int m = 0; m < 4; ++m) store_words(to + 64 * m, w[m]);
        }
      }
      out += nibbles ? 128 : 256;
    }
  }
}

inline void expand(const ExpandArgs& a) noexcept {
  switch (bits_of(a.w.format)) {
    case 2: return expand_panels<Decode::int2>(a);
    case 3: return expand_panels<Decode::int3>(a);
    case 5: return expand_panels<Decode::int5>(a);
    default: return expand_panels<Decode::int6>(a);
  }
}
