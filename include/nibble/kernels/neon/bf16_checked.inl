// bf16 products, exact where results come near the subnormals.
//
// AArch64 flushes a result that is below 2^-126 before it is rounded, Bf16GemmArgs one that is so after. Where the two
// could differ, the first raises the underflow flag: blocks of one tile of x and four panels that do are computed again,
// by the oracle. Without BFMMLA: its sums are not those of vdpbf16ps.

NIBBLE_ALWAYS_INLINE std::uint64_t read_fpsr() noexcept {
  std::uint64_t v;
  asm volatile("mrs %0, fpsr" : "=r"(v) : : "memory");
  return v;
}
NIBBLE_ALWAYS_INLINE void write_fpsr(std::uint64_t v) noexcept {
  asm volatile("msr fpsr, %0" : : "r"(v) : "memory");
}

inline void gemm_bf16_checked(const Bf16GemmArgs& a) noexcept {
  constexpr std::uint64_t underflow = 8;
  constexpr std::size_t most_rows = 16;
  constexpr std::size_t most_panels = 4;
  float before[most_rows * most_panels * panel_width];
  if (a.tile_rows > most_rows) return scalar::gemm_bf16(a);
  const std::uint64_t flags = read_fpsr();
  Bf16GemmArgs part = a;
  for (std::size_t p = a.panel_begin; p < a.panel_end; p = part.panel_end) {
    part.panel_begin = p;
    part.panel_end = a.panel_end - p < most_panels ? a.panel_end : p + most_panels;
    const std::size_t width = (part.panel_end - p) * panel_width;
    for (std::size_t row = 0; row < a.rows; row += a.tile_rows) {
      part.x = a.x + row / a.tile_rows * a.x_tile_stride;
      part.rows = a.rows - row < a.tile_rows ? a.rows - row : a.tile_rows;
      part.acc = a.acc + row * a.acc_stride + (p - a.panel_begin) * panel_width;
      if (a.accumulate)
        for (std::size_t r = 0; r < part.rows; ++r)
          std::memcpy(before + r * width, part.acc + r * a.acc_stride, width * sizeof(float));
      write_fpsr(flags & ~underflow);
      gemm_bf16(part);
      if ((read_fpsr() & underflow) == 0) continue;
      if (a.accumulate)
        for (std::size_t r = 0; r < part.rows; ++r)
          std::memcpy(part.acc + r * a.acc_stride, before + r * width, width * sizeof(float));
      scalar::gemm_bf16(part);
    }
  }
  write_fpsr(flags);
}
