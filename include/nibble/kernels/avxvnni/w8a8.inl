// INT8 weights x INT8 activations on AVX-VNNI.
//
// int_tiles.inl over whole bytes. Port arithmetic for 6 rows x 16 channels and 8 k: 24 dpbusd on two multiplier pipes
// (12 cycles), 16 loads on two load ports, nothing else: predicted is the dpbusd loop, from 5 rows on (latency 5 wants
// 10 accumulators; 4 rows have 8); groups of 32 end with 12 FMA on the same pipes for 96 dpbusd: 89 % of it. Measured
// (kernel alone), Zen 5 (EPYC, 4.1 GHz), one core, 2026-11-23, N = K = 4096, the 256-bit dpbusd loop 527 GOP/s: one
// group: M = 512 474, 16 424, 4 398, 1 204 (102 GB/s, L3). M = 1 from DRAM (16384 x 8192): 38 GB/s beside a read loop
// of four streams at 36-40 and avx512vnni's 44; M = 4 there 36 GB/s.

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
