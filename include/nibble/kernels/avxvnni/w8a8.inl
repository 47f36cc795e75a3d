// INT8 weights x INT8 activations on AVX-VNNI.

struct Weights8 : int_params::Codes8 {
  /// 8 k of 8 channels, the first 4 k in w0.
  static NIBBLE_ALWAYS_INLINE void load(const std::uint8_t* codes, int_ops::Int& w0, int_ops::Int& w1) noexcept {
    w0 = int_ops::load_int(codes);
    w1 = int_ops::load_int(codes + 64);
  }
  /// The j-th 4 of these 8 k.
  template <int J>
  static NIBBLE_ALWAYS_INLINE int_ops::Int load_4(const std::uint8_t* codes, int_ops::Int) noexcept {
    return int_ops::load_codes(codes + 64 * J);
  }
  static NIBBLE_ALWAYS_INLINE void prefetch(const std::uint8_t* codes) noexcept {
    int_ops::prefetch(codes);
    int_ops::prefetch(codes + 64);
  }
};

inline void gemm_w8a8(const IntGemmArgs& a) noexcept { int_tiles::gemm<Weights8>(a); }
