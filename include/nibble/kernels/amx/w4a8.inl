// INT4 weights x INT8 activations on AMX: blocks of two panels, unpacked to bytes once for up to 64 rows, in
// int_tiles.inl. Never run on silicon: tested by an emulation of the tile operations, and not measured.

struct Weights4 : int_params::Codes4 {
  /// k in [begin, end) of a panel as [k/4][16][4] bytes, in `buffer` if not in place.
  static const std::uint8_t* bytes(const std::uint8_t* codes, std::size_t begin, std::size_t end,
                                   std::uint8_t* buffer) noexcept {
    for (std::size_t u = begin / k_unit; u < end / k_unit; ++u) {
      const int_ops::Int both = int_ops::load_codes(codes + u * unit_bytes);
      std::uint8_t* to = buffer + (u - begin / k_unit) * 2 * unit_bytes;
      int_ops::store_int(to, int_ops::low_nibbles(both));
      int_ops::store_int(to + unit_bytes, int_ops::high_nibbles(both));
    }
    return buffer;
  }
};

inline void gemm_w4a8(const IntGemmArgs& a) noexcept {
  if (int_tiles::suits(a))
    int_tiles::gemm<Weights4>(a);
  else
    below::gemm_w4a8(a);
}
