// INT4 weights x INT8 activations on AVX-512 VNNI.

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
