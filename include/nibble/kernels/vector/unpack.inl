// Panels of any format to fp32: what the float GEMM runs on, and the weights that GEMVs of several rows share.
//
// Port arithmetic, AVX-512, 16 weights: int4 and nf4 shift, permute, multiply, store; int8 shuffle, convert,
// subtract, multiply, store; fp16 convert, store. One store of 64 bytes a cycle binds: 16 weights a cycle at most.

template <Decode kind>
inline void unpack_panels(const UnpackArgs& a) noexcept {
  const PanelView& w = a.w;
  alignas(64) float staged[8 * panel_width];  // the last unit, where it is cut short
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
      for (; k < end; k += 8, out += 8 * panel_width) {
        const bool cut = k + 8 > end;
        prefetch_lines<static_cast<int>(unit_bytes(kind) / 64)>(codes, k / 8 * unit_bytes(kind) + 1024);
        d.unit(codes + k / 8 * unit_bytes(kind));
        decode_unit<kind>(d, table, cut ? staged : out);
        if (cut) std::memcpy(out, staged, (end - k) * panel_width * sizeof(float));
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
  }
}
