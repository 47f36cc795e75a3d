// INT8 weights x INT8 activations on AVX-512 VNNI.

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
    if (rows <= int_tiles::tile_rows) int_tiles::stream_all<Weights8>(a, row0, rows);
    else int_tiles::stationary<Weights8>(a, row0, rows);
  }
}
