// INT4 weights x INT8 activations on AVX-512 VNNI.
//
// Tiles as in w8a8.inl. Port arithmetic for 6 x 2 and 8 k: 24 dpbusd on two multiplier pipes; 12 broadcasts, 4 loads
// and 6 logic operations beside them, which leave these pipes alone: 12 cycles where the pipes are 512 bits wide (Zen
// 5), 24 on Zen 4. A group's end adds a FMA for every sum, one for float offsets, one for scales of x: groups of 32 are
// predicted at 8/9 of the dpbusd loop, with offsets at 8/10, with both at 8/11. Measured, Zen 5 (EPYC), one core,
// 2026-11-23, N = K = 4096, the register-only dpbusd loop 1002 GOP/s: groups of 32 symmetric: 64 rows 835, 16 822, 4
// 755; float offset 728, 730, 690, with scales of x 664, 658, 648; groups of 128: 918, 918, 888. M = 1: 349 GOP/s in
// L3 (98 GB/s), 316 with offsets and scales of x; from DRAM (16384 x 8192) 40 and 39 GB/s, where the best read loop
// does 40 and 39, and 39 to 42 over the 210 matrices of a small language model one after the other (read loop 43 to
// 45; four panels as four streams got 26). time(M = 4) there is 1.1 x time(M = 1).

struct Weights4 : int_params::Codes4 {
  /// 8 k of 16 channels, the first 4 k in w0.
  static NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* codes, int_ops::Int& w0, int_ops::Int& w1) noexcept {
    const int_ops::Int both = int_ops::load_codes(codes);
    w0 = int_ops::low_nibbles(both);
    w1 = int_ops::high_nibbles(both);
  }
  /// The first (last) 4 of 8 k of 5 or 6 rows and two panels.
  template <int Rows>
  static NIBBLE_ALWAYS_INLINE void dot_low(int_ops::Int (&sums)[Rows][2], const std::uint8_t* codes,
                                           std::size_t panel_stride, const std::int8_t* x,
                                           std::size_t x_stride) noexcept {
    int_ops::dot4_low(sums, codes, panel_stride, x, x_stride);
  }
  template <int Rows>
  static NIBBLE_ALWAYS_INLINE void dot_high(int_ops::Int (&sums)[Rows][2], const std::uint8_t* codes,
                                            std::size_t panel_stride, const std::int8_t* x,
                                            std::size_t x_stride) noexcept {
    int_ops::dot4_high(sums, codes, panel_stride, x, x_stride);
  }
};

inline void gemm_w4a8(const IntGemmArgs& a) noexcept { int_tiles::gemm<Weights4>(a); }
