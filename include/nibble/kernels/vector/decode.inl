// Decoders: eight k (16 of the formats in bit planes) of one panel, in any format, to fp32 lanes. What unpack and the GEMVs share.

#define NIBBLE_UNROLL _Pragma("GCC unroll 16")

// How a panel decodes: its format and where its zero lies.
enum class Decode : int {
  fp32,
  fp16,
  bf16,
  int8,         // scale * float(q - zero)
  int8_offset,  // fma(scale, float(q), offset)
  int4,
  int4_plain,  // scale * float(q - 8)
  int4_offset,
  levels,  // scale * table[q]: nf4, and symmetric int4 where a lookup is cheaper than arithmetic
  int2,    // in planes of bits, from here on
  int3,
  int5,
  int6,
};

alignas(64) inline constexpr float int4_levels[16] = {-8.0F, -7.0F, -6.0F, -5.0F, -4.0F, -3.0F, -2.0F, -1.0F,
                                                      0.0F,  1.0F,  2.0F,  3.0F,  4.0F,  5.0F,  6.0F,  7.0F};
alignas(64) inline constexpr float nibble_values[16] = {0.0F, 1.0F, 2.0F,  3.0F,  4.0F,  5.0F,  6.0F,  7.0F,
                                                        8.0F, 9.0F, 10.0F, 11.0F, 12.0F, 13.0F, 14.0F, 15.0F};

inline Decode decode_of(const PanelView& w) noexcept {
  switch (w.format) {
    case Format::fp32: return Decode::fp32;
    case Format::fp16: return Decode::fp16;
    case Format::bf16: return Decode::bf16;
    case Format::int8: return w.symmetry == Symmetry::float_offset ? Decode::int8_offset : Decode::int8;
    case Format::int4:
      return w.symmetry == Symmetry::symmetric    ? (cheap_lookup ? Decode::levels : Decode::int4_plain)
             : w.symmetry == Symmetry::asymmetric ? Decode::int4
                                                  : Decode::int4_offset;
    case Format::int2: return Decode::int2;
    case Format::int3: return Decode::int3;
    case Format::int5: return Decode::int5;
    case Format::int6: return Decode::int6;
    case Format::nf4:
    case Format::fp4: break;
  }
  return Decode::levels;
}

// The table that a panel's codes index. Kinds without one are given one all the same: nothing reads it.
inline const float* table_of(const PanelView& w) noexcept {
  if (is_codebook(w.format)) return w.codebook;
  return w.symmetry == Symmetry::symmetric || is_bit_stream(w.format) ? int4_levels : nibble_values;
}

// With 32 registers there is room for the constants.
constexpr bool bytes_by_logic = halves == 1;

constexpr bool has_groups(Decode kind) noexcept { return kind > Decode::bf16; }
// The formats in bit planes: fma(scale, float(q - zero), offset), where the offset is -0 unless there are float offsets:
// adding -0 changes nothing, so one kind serves all symmetries.
constexpr bool in_planes(Decode kind) noexcept { return kind >= Decode::int2; }
constexpr unsigned plane_bits(Decode kind) noexcept {
  return kind == Decode::int2 ? 2 : kind == Decode::int3 ? 3 : kind == Decode::int5 ? 5 : 6;
}
// What a byte q - zero has added, so that zero points cost an addition of bytes for four k: below 4 bits it is then an
// index of int4_levels, above it keeps bytes positive.
constexpr std::int32_t zero_bias(Decode kind) noexcept { return plane_bits(kind) < 4 ? 8 : 64; }
// k of a unit, and its bytes in a panel.
constexpr std::size_t unit_k(Decode kind) noexcept { return in_planes(kind) ? bits_k_unit : k_unit; }
constexpr std::size_t unit_bytes(Decode kind) noexcept {
  return kind == Decode::fp32                           ? 512
         : kind == Decode::fp16 || kind == Decode::bf16 ? 256
         : kind >= Decode::int8 && kind < Decode::int4  ? 128
         : in_planes(kind)                              ? 32 * plane_bits(kind)
                                                        : 64;
}

NIBBLE_ALWAYS_INLINE Vf load_scales(const void* base, ScaleType type, std::size_t index) noexcept {
  switch (type) {
    case ScaleType::fp32: break;
    case ScaleType::fp16: return load_fp16(static_cast<const std::uint16_t*>(base) + index);
    case ScaleType::bf16:
      return from_bits(shift_left<16>(load_u16(static_cast<const std::uint16_t*>(base) + index)));
  }
  return load(static_cast<const float*>(base) + index);
}

// A byte in bits 0.. or 8.. of a lane, put under the exponent that gives that bit the value 1, is a float: 2^23 + q or
// 2^15 + q. An exact subtraction then takes away the power and the zero point. Logic and additions run beside the FMAs,
// while shuffles and conversions would compete with each other: int8 from 137 to 172 GFLOP/s at 4 rows on Zen 5.
template <int Bit>
constexpr float byte_base() noexcept {
  return static_cast<float>(1U << (23 - Bit));
}
template <int Bit>
NIBBLE_ALWAYS_INLINE Vf byte_under_base(Vi v) noexcept {
  return from_bits(or_int(and_int(v, set1_int(0xFF << Bit)), bits(set1(byte_base<Bit>()))));
}

// v << N, v >> -N where N is negative.
template <int N>
NIBBLE_ALWAYS_INLINE Vi move_bits(Vi v) noexcept {
  if constexpr (N > 0) return shift_left<N>(v);
  if constexpr (N < 0) return shift_right<-N>(v);
  return v;
}

// One panel's decoder. group() at every start of a group, then unit() and value<0>() .. value<7>() for every unit.
template <Decode kind>
struct Decoder {
  Vf scale[halves];
  Vf offset[halves];  // the float offset; asymmetric: float(zero), for int4 by table
  Vi zeros[halves];
  Vf base[2 * halves];  // what byte_under_base adds to q - zero, by bits 0 and 8
  Vi codes[(in_planes(kind) ? 3 : 2) * halves];
  const std::uint8_t* at;

  NIBBLE_ALWAYS_INLINE void group(const PanelView& w, std::size_t panel, std::size_t g) noexcept {
    if constexpr (has_groups(kind)) {
      NIBBLE_UNROLL
      for (int h = 0; h < halves; ++h) {
        const std::size_t index = (panel * w.groups + g) * panel_width + static_cast<std::size_t>(h * lanes);
        scale[h] = load_scales(w.scales, w.scale_type, index);
        if constexpr (in_planes(kind)) {
          offset[h] = set1(-0.0F);
          if (w.symmetry == Symmetry::float_offset) offset[h] = load_scales(w.zeros, w.scale_type, index);
          zeros[h] = set1_int(w.symmetry == Symmetry::symmetric ? 1 << (plane_bits(kind) - 1) : 0);
          if (w.symmetry == Symmetry::asymmetric)
            zeros[h] = load_s8(static_cast<const std::int8_t*>(w.zeros) + index);
          if constexpr (bytes_by_logic) {
            const Vi byte = sub_int(set1_int(zero_bias(kind)), zeros[h]);
            const Vi two = or_int(byte, shift_left<8>(byte));
            zeros[h] = or_int(two, shift_left<16>(two));
          }
        }
        if constexpr (kind == Decode::int8_offset || kind == Decode::int4_offset)
          offset[h] = load_scales(w.zeros, w.scale_type, index);
        if constexpr (kind == Decode::int4) {
          zeros[h] = load_s8(static_cast<const std::int8_t*>(w.zeros) + index);
          offset[h] = to_float(zeros[h]);
        }
        if constexpr (kind == Decode::int8) {
          // Codes are stored with 128 added.
          zeros[h] = set1_int(128);
          if (w.zeros != nullptr)
            zeros[h] = add_int(zeros[h], load_s8(static_cast<const std::int8_t*>(w.zeros) + index));
          base[h] = add(to_float(zeros[h]), set1(byte_base<0>()));
          base[halves + h] = add(to_float(zeros[h]), set1(byte_base<8>()));
        }
      }
    }
  }

  NIBBLE_ALWAYS_INLINE void unit(const std::uint8_t* p) noexcept {
    at = p;
    if constexpr (in_planes(kind)) {
      constexpr unsigned bits = plane_bits(kind);
      NIBBLE_UNROLL
      for (int h = 0; h < halves; ++h) {
        codes[h] = load_int(p + h * lanes * 4);
        if constexpr (bits == 3) codes[halves + h] = load_top_bits(p + 64, h);
        if constexpr (bits > 4) {
          codes[halves + h] = load_int(p + 64 + h * lanes * 4);
          codes[2 * halves + h] = bits == 5 ? load_top_bits(p + 128, h) : load_int(p + 128 + h * lanes * 4);
        }
      }
    } else if constexpr (unit_bytes(kind) == 64) {
      NIBBLE_UNROLL
      for (int h = 0; h < halves; ++h) {
        codes[h] = load_int(p + h * lanes * 4);
        // Offset binary to two's complement, so that an arithmetic shift yields q - 8.
        if constexpr (kind == Decode::int4_plain)
          codes[h] = xor_int(codes[h], set1_int(static_cast<std::int32_t>(0x88888888U)));
      }
    } else if constexpr (unit_bytes(kind) == 128) {
      NIBBLE_UNROLL
      for (int h = 0; h < 2 * halves; ++h) codes[h] = load_int(p + h * lanes * 4);
    }
  }

  // Formats in planes: a byte a code of k = 16 * unit + 4 * M .. + 3, lanes of half h.
  template <int M>
  NIBBLE_ALWAYS_INLINE Vi bytes(int h) const noexcept {
    constexpr unsigned bits = plane_bits(kind);
    if constexpr (bits < 4) {
      const Vi low = and_int(move_bits<-2 * M>(codes[h]), set1_int(0x03030303));
      if constexpr (bits == 2) return low;
      return or_int(low, and_int(move_bits<2 - M>(codes[halves + h]), set1_int(0x04040404)));
    } else {
      const Vi low = and_int(move_bits<-4 * (M % 2)>(codes[M / 2 * halves + h]), set1_int(0x0F0F0F0F));
      const Vi top = codes[2 * halves + h];
      if constexpr (bits == 5) return or_int(low, and_int(move_bits<4 - M>(top), set1_int(0x10101010)));
      return or_int(low, and_int(move_bits<4 - 2 * M>(top), set1_int(0x30303030)));
    }
  }

  // k = unit_k * unit + I, lanes of half h.
  template <int I>
  NIBBLE_ALWAYS_INLINE Vf value(int h, const Lookup16& table) const noexcept {
    if constexpr (kind == Decode::fp32) {
      return load(reinterpret_cast<const float*>(at) + I * 16 + h * lanes);
    } else if constexpr (kind == Decode::fp16) {
      return load_fp16(at + (I * 16 + h * lanes) * 2);
    } else if constexpr (kind == Decode::bf16) {
      const Vi pair = load_int(at + (I / 2) * 64 + h * lanes * 4);
      if constexpr (I % 2 == 0) return from_bits(shift_left<16>(pair));
      return from_bits(and_int(pair, set1_int(static_cast<std::int32_t>(0xFFFF0000U))));
    } else if constexpr (in_planes(kind)) {
      Vi four = bytes<I / 4>(h);
      if constexpr (bytes_by_logic) {
        four = add_int(four, zeros[h]);
        if constexpr (plane_bits(kind) < 4) return fma(scale[h], lookup16<I % 4 * 8>(table, four), offset[h]);
        const Vf q = byte_under_base<I % 2 * 8>(I % 4 < 2 ? four : shift_right<16>(four));
        return fma(scale[h], sub(q, set1(byte_base<I % 2 * 8>() + static_cast<float>(zero_bias(kind)))),
                   offset[h]);
      } else {
        return fma(scale[h], to_float(sub_int(byte_of_lanes<I % 4>(four), zeros[h])), offset[h]);
      }
    } else if constexpr (unit_bytes(kind) == 128 && bytes_by_logic) {
      constexpr int bit = I % 2 * 8;
      const Vi four = codes[(I / 4) * halves + h];
      const Vf q = byte_under_base<bit>(I % 4 < 2 ? four : shift_right<16>(four));
      if constexpr (kind == Decode::int8) return mul_only(scale[h], sub(q, base[I % 2 * halves + h]));
      return fma(scale[h], sub(q, set1(byte_base<bit>() + 128.0F)), offset[h]);
    } else if constexpr (unit_bytes(kind) == 128) {
      const Vi q = byte_of_lanes<I % 4>(codes[(I / 4) * halves + h]);
      if constexpr (kind == Decode::int8) return mul_only(scale[h], to_float(sub_int(q, zeros[h])));
      return fma(scale[h], to_float(sub_int(q, set1_int(128))), offset[h]);
    } else {
      constexpr int shift = 8 * (I % 4) + 4 * (I / 4);
      if constexpr (kind == Decode::levels) return mul_only(scale[h], lookup16<shift>(table, codes[h]));
      if constexpr (kind == Decode::int4_plain)
        return mul_only(scale[h], to_float(shift_right_signed<28>(shift_left<28 - shift>(codes[h]))));
      if constexpr (cheap_lookup) {
        const Vf q = lookup16<shift>(table, codes[h]);
        if constexpr (kind == Decode::int4) return mul_only(scale[h], sub(q, offset[h]));
        return fma(scale[h], q, offset[h]);
      } else {
        const Vi q = and_int(shift_right<shift>(codes[h]), set1_int(15));
        if constexpr (kind == Decode::int4) return mul_only(scale[h], to_float(sub_int(q, zeros[h])));
        return fma(scale[h], to_float(q), offset[h]);
      }
    }
  }
};

// All k of the current unit to out[unit_k][16].
template <Decode kind, int I = 0>
NIBBLE_ALWAYS_INLINE void decode_unit(const Decoder<kind>& d, const Lookup16& table, float* out) noexcept {
  if constexpr (I < static_cast<int>(unit_k(kind))) {
    NIBBLE_UNROLL
    for (int h = 0; h < halves; ++h) store(out + I * 16 + h * lanes, d.template value<I>(h, table));
    decode_unit<kind, I + 1>(d, table, out);
  }
}

// Fetches the codes of one unit that lie `ahead` bytes from p. They may lie beyond the buffer: nothing is read,
// and the address is made of integers, for no pointer may point there.
template <int Lines>
NIBBLE_ALWAYS_INLINE void prefetch_lines(const std::uint8_t* p, std::size_t ahead) noexcept {
  prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + ahead));
  if constexpr (Lines > 1) prefetch_lines<Lines - 1>(p, ahead + 64);
}
