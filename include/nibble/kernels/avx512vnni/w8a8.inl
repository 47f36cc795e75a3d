// INT8 weights x INT8 activations on AVX-512 VNNI.

/// 8 k of 16 channels: two registers, one byte a code, stored + 128.
struct Weights8 {
  static constexpr std::size_t unit_bytes = 128;
  static constexpr std::int32_t bias = 128;
  static constexpr std::int32_t symmetric_shift = 7;
  static constexpr std::int32_t plain_shift = 7;
  static NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* codes, int_ops::Int& w0, int_ops::Int& w1) noexcept {
    w0 = int_ops::load_int(codes);
    w1 = int_ops::load_int(codes + 64);
  }
};

inline void gemm_w8a8(const IntGemmArgs& a) noexcept { int_tiles::gemm<Weights8>(a); }
