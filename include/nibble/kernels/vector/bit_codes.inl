// Codes of 2, 3, 5 and 6 bits as the unsigned operand of dot products, written over int_ops. Included by the ISAs'
// table.hpp, in their regions, after int_params.inl.

namespace int_params {

/// 16 k of 16 channels in planes (kernels/args.hpp): half h of the channels, where a register holds no more.
template <unsigned Bits>
struct BitCodes {
  static constexpr std::size_t unit_bytes = 32 * Bits;
  static constexpr std::int32_t bias = 0;
  static constexpr std::int32_t symmetric_shift = Bits - 1;
  static constexpr std::int32_t plain_shift = 32;

  static NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* p, int h, Int (&w)[4]) noexcept {
    using namespace int_ops;
    const std::uint8_t* const from = p + static_cast<std::size_t>(h) * sizeof(Int);
    if constexpr (Bits < 4) {
      const Int pairs = load_codes(from);
      w[0] = pairs;
      w[1] = shift_right_bits<2>(pairs);
      w[2] = shift_right_bits<4>(pairs);
      w[3] = shift_right_bits<6>(pairs);
      if constexpr (Bits == 2) {
#pragma GCC unroll 4
        for (int m = 0; m < 4; ++m) w[m] = and_bytes<3>(w[m]);
      } else {
        const Int top = load_top_bits(p + 64, h);
        w[0] = and_bytes<7>(select_bytes<3>(w[0], shift_left_bits<2>(top)));
        w[1] = and_bytes<7>(select_bytes<3>(w[1], shift_left_bits<1>(top)));
        w[2] = and_bytes<7>(select_bytes<3>(w[2], top));
        w[3] = and_bytes<7>(select_bytes<3>(w[3], shift_right_bits<1>(top)));
      }
    } else {
      const Int first = load_codes(from);
      const Int second = load_codes(from + 64);
      if constexpr (Bits == 5) {
        const Int top = load_top_bits(p + 128, h);
        w[0] = and_bytes<31>(select_bytes<15>(first, shift_left_bits<4>(top)));
        w[1] = and_bytes<31>(select_bytes<15>(shift_right_bits<4>(first), shift_left_bits<3>(top)));
        w[2] = and_bytes<31>(select_bytes<15>(second, shift_left_bits<2>(top)));
        w[3] = and_bytes<31>(select_bytes<15>(shift_right_bits<4>(second), shift_left_bits<1>(top)));
      } else {
        const Int top = load_codes(from + 128);
        w[0] = and_bytes<63>(select_bytes<15>(first, shift_left_bits<4>(top)));
        w[1] = and_bytes<63>(select_bytes<15>(shift_right_bits<4>(first), shift_left_bits<2>(top)));
        w[2] = and_bytes<63>(select_bytes<15>(second, top));
        w[3] = and_bytes<63>(select_bytes<15>(shift_right_bits<4>(second), shift_right_bits<2>(top)));
      }
    }
  }
};

}  // namespace int_params
