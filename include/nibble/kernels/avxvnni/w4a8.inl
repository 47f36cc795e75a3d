// INT4 weights x INT8 activations on AVX-VNNI.
//
// int_tiles.inl over nibbles, unpacked in registers for every tile of up to 6 rows. Port arithmetic for 6 rows x 16
// channels and 8 k: 24 dpbusd on two multiplier pipes (12 cycles), 6 logic and shift operations on the others, 16
// loads; a group's end adds 12 FMA (as many again for float offsets): groups of 32 are predicted at 96 / 108 = 89 % of
// the dpbusd loop, with offsets at 80 %. Measured (kernel alone, fp16 scales), Zen 5 (EPYC, 4.1 GHz), one core,
// 2026-11-23, N = K = 4096, the 256-bit dpbusd loop 516-531 GOP/s: groups of 32: M = 512 412, 16 403, 4 377, 1 240 (60
// GB/s of codes, L3; the read loop 86); groups of 128: M = 512 447, 16 434, 4 391, 1 285; float offset, groups of 32:
// M = 512 360, 16 350, 4 315, 1 221. From DRAM (16384 x 8192): M = 1 33 GB/s of codes, 37 with scales, beside a read
// loop of four streams at 40. By profile, groups of 32 spend 61 % in dot products and unpacking, 21 % in the group's
// float steps and copies of registers, the rest in the loop over groups.

struct Weights4 : int_params::Codes4 {
  /// 8 k of 8 channels, the first 4 k in w0.
  static NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* codes, int_ops::Int& w0, int_ops::Int& w1) noexcept {
    const int_ops::Int both = int_ops::load_codes(codes);
    w0 = int_ops::low_nibbles(both);
    w1 = int_ops::high_nibbles(both);
  }
  /// The j-th 4 of these 8 k.
  template <int J>
  static NIBBLE_ALWAYS_INLINE int_ops::Int load_4(const std::uint8_t* codes, int_ops::Int mask) noexcept {
    return J == 0 ? int_ops::load_low_nibbles(codes, mask) : int_ops::load_high_nibbles(codes, mask);
  }
  static NIBBLE_ALWAYS_INLINE void prefetch(const std::uint8_t* codes) noexcept { int_ops::prefetch(codes); }
};

inline void gemm_w4a8(const IntGemmArgs& a) noexcept { int_tiles::gemm<Weights4>(a); }
