// Puts the kernels that are written over an ISA's operations into its table.

constexpr void fill(KernelTable& t) noexcept {
  t.float_tile_rows = gemm_rows;
  t.float_panels = 4;
  t.gemv_max_rows = 4;
  t.expand = &expand;
  t.unpack = &unpack;
  t.gemm_float = &gemm_float;
  t.gemv_float = &gemv_float;
  t.gemv_dense = &gemv_dense;
  t.gemm_direct = &gemm_direct;
  t.quantize_rows = &quantize_rows;
  t.epilogue = &epilogue;
  t.block_sums = &block_sums;
  t.rms_norm = &rms_norm;
  t.softmax = &softmax;
  t.softmax_codes = &softmax_codes;
  t.rope = &rope;
  t.line_range = &line_range;
  t.quantize_line = &quantize_line;
  t.dequantize_line = &dequantize_line;
  t.fp16_from_float = &fp16_from_float;
  t.float_from_fp16 = &float_from_fp16;
  t.bf16_from_float = &bf16_from_float;
  t.float_from_bf16 = &float_from_bf16;
}
