// INT4 weights x INT8 activations on AVX-512 VNNI.

/// 8 k of 16 channels: one register, low nibbles the first 4 k. Codes stay 0..15.
struct Weights4 {
  static constexpr std::size_t unit_bytes = 64;
  static constexpr std::int32_t bias = 0;
  static constexpr std::int32_t symmetric_shift = 3;
  static constexpr std::int32_t plain_shift = 32;
  static NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* codes, int_ops::Int& w0, int_ops::Int& w1) noexcept {
    const int_ops::Int both = int_ops::load_int(codes);
    w0 = int_ops::low_nibbles(both);
    w1 = int_ops::high_nibbles(both);
  }
};

inline void gemm_w4a8(const IntGemmArgs& a) noexcept { int_tiles::gemm<Weights4>(a); }
