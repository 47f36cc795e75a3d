// INT4 weights x INT8 activations on AVX-512 VNNI.
//
// The streaming tile for every number of rows: up to 4 rows x 4 panels (int_tiles.inl); more rows pass over the
// same four panels again while these are in L2. Port arithmetic for 4 x 4 and 8 k: 32 dpbusd on two multiplier
// pipes, 12 logic and shift operations on the other two, 12 loads: 16 cycles where the pipes are 512 bits wide
// (Zen 5), 32 on Zen 4. A group's end adds 16 FMA (and as many for float offsets or zero points): groups of 32 are
// predicted at 128 / 144 = 89 % of the dpbusd loop, with offsets or zero points at 80 %. Measured, Zen 5 (EPYC,
// 3.7 GHz), one core, 2026-11-23, N = K = 4096, the register-only dpbusd loop 954 GOP/s: groups of 32 symmetric: M
// = 512 735-780, 64 750-773, 16 809, 8 802, 4 776-807, 2 600-635; asymmetric: M = 512 683-725, 16 750; float
// offset: M = 512 621-641, 16 675; groups of 128: M = 512 830-914, 16 920-950. Weights stationary, as in w8a8.inl,
// got 740-770, 640-690 and 620-655 for groups of 32. M = 1: 320-360 GOP/s in L3 (90-100 GB/s); 40-44 GB/s from
// DRAM (16384 x 8192), where a plain loop with prefetch reads 37; time(M = 4) there is 1.1 x time(M = 1).

struct Weights4 : int_params::Codes4 {
  /// 8 k of 16 channels, the first 4 k in w0.
  static NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* codes, int_ops::Int& w0, int_ops::Int& w1) noexcept {
    const int_ops::Int both = int_ops::load_codes(codes);
    w0 = int_ops::low_nibbles(both);
    w1 = int_ops::high_nibbles(both);
  }
};

inline void gemm_w4a8(const IntGemmArgs& a) noexcept {
  constexpr std::size_t block = int_tiles::row_block;
  for (std::size_t row0 = 0; row0 < a.rows; row0 += block)
    int_tiles::stream_all<Weights4>(a, row0, a.rows - row0 < block ? a.rows - row0 : block);
}
