// INT8 weights x INT8 activations on AVX-512 VNNI.
//
// From 5 rows on 6 or 5 rows x 2 panels, 2 to 4 rows x 4 panels, one row panel after panel (int_tiles.inl). Port
// arithmetic for 6 x 2 and 8 k: 24 dpbusd on two multiplier pipes; 12 broadcasts and 4 loads beside them: 12 cycles
// where both pipes are 512 bits wide (Zen 5), 24 on Zen 4. Predicted: the dpbusd loop for one group a channel; 8/9 of
// it for groups of 32, whose ends take a FMA of every sum on the same pipes, 8/10 with a scale of x a group. Measured,
// Zen 5 (EPYC), one core, 2026-11-23, N = K = 4096, the register-only dpbusd loop 1002 GOP/s: one group: 64 rows 950,
// 16 910, 4 793; groups of 32: 825, 794, 637; with scales of x 728, 714, 606. M = 1: 212 GOP/s in L3 (106 GB/s); from
// DRAM (16384 x 8192) 41 GB/s, where the best read loop does 40; with groups of 32 and scales of x 40.

struct Weights8 : int_params::Codes8 {
  /// 8 k of 16 channels, the first 4 k in w0.
  static NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* codes, int_ops::Int& w0, int_ops::Int& w1) noexcept {
    w0 = int_ops::load_int(codes);
    w1 = int_ops::load_int(codes + 64);
  }
  /// The first (last) 4 of 8 k of 5 or 6 rows and two panels.
  template <int Rows>
  static NIBBLE_ALWAYS_INLINE void dot_low(int_ops::Int (&sums)[Rows][2], const std::uint8_t* codes,
                                           std::size_t panel_stride, const std::int8_t* x,
                                           std::size_t x_stride) noexcept {
    int_ops::dot8_low(sums, codes, panel_stride, x, x_stride);
  }
  template <int Rows>
  static NIBBLE_ALWAYS_INLINE void dot_high(int_ops::Int (&sums)[Rows][2], const std::uint8_t* codes,
                                            std::size_t panel_stride, const std::int8_t* x,
                                            std::size_t x_stride) noexcept {
    int_ops::dot8_high(sums, codes, panel_stride, x, x_stride);
  }
};

inline void gemm_w8a8(const IntGemmArgs& a) noexcept { int_tiles::gemm<Weights8>(a); }
