// INT4 weights x INT8 activations on AVX-VNNI.

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
