// INT8 weights x INT8 activations on AVX-512 VNNI.
//
// Up to 4 rows: the streaming tile, rows x 4 panels; from 5 on: weights stationary, 2 panels x 32 k
// (int_tiles.inl). Port arithmetic, stationary, for one row, 32 k and 32 channels: 16 dpbusd on two multiplier
// pipes; 10 loads, 2 stores and the loop hide behind them: 8 cycles where both pipes are 512 bits wide (Zen 5), 16
// on Zen 4. Predicted: the dpbusd loop for one group a channel; 8/9 of it for groups of 32, whose ends take 2 FMA
// on the same pipes. Measured, Zen 5 (EPYC, 3.7 GHz), one core, 2026-11-23, N = K = 4096, the register-only dpbusd
// loop 954 GOP/s: one group: M = 512 885-927, 64 916-942, 16 870-950, 8 800-880, 4 780-850; groups of 32: M = 512
// 763, 16 750, 4 650. M = 1: 210-221 GOP/s in L3 (105-110 GB/s); 44 GB/s from DRAM (16384 x 8192), where a plain
// loop with prefetch reads 37.

struct Weights8 : int_params::Codes8 {
  /// 8 k of 16 channels, the first 4 k in w0.
  static NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* codes, int_ops::Int& w0, int_ops::Int& w1) noexcept {
    w0 = int_ops::load_int(codes);
    w1 = int_ops::load_int(codes + 64);
  }
};

inline void gemm_w8a8(const IntGemmArgs& a) noexcept {
  constexpr std::size_t block = int_tiles::row_block;
  for (std::size_t row0 = 0; row0 < a.rows; row0 += block) {
    const std::size_t rows = a.rows - row0 < block ? a.rows - row0 : block;
    if (rows <= int_tiles::tile_rows)
      int_tiles::stream_all<Weights8>(a, row0, rows);
    else
      int_tiles::stationary<Weights8>(a, row0, rows);
  }
}
