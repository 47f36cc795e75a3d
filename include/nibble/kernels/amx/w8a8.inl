// INT8 weights x INT8 activations on AMX: int_tiles.inl over the panels as they lie. Never run on silicon: tested by
// an emulation of the tile operations, and not measured.

struct Weights8 : int_params::Codes8 {
  /// k in [begin, end) of a panel as [k/4][16][4] bytes, in `buffer` if not in place.
  static const std::uint8_t* bytes(const std::uint8_t* codes, std::size_t begin, std::size_t,
                                   std::uint8_t*) noexcept {
    return codes + begin * panel_width;
  }
};

inline void gemm_w8a8(const IntGemmArgs& a) noexcept {
  if (int_tiles::suits(a))
    int_tiles::gemm<Weights8>(a);
  else
    below::gemm_w8a8(a);
}
