// One table of function pointers an ISA: everything that is dispatched at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "nibble/kernels/args.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Instruction sets that have kernels, in ascending order of preference.
enum class Isa : std::uint8_t {
  scalar = 0,      ///< portable C++, the oracle
  avx2 = 1,        ///< AVX2 + FMA + F16C
  avx512vnni = 2,  ///< AVX-512 F, BW, VL, DQ, VNNI
};

constexpr std::string_view name_of(Isa isa) noexcept {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512vnni: return "avx512vnni";
  }
  return "?";
}

namespace detail {

/// Kernels of one ISA. Every entry equals the scalar table's bit for bit; the arguments' comments define the result.
struct KernelTable {
  Isa isa = Isa::scalar;

  // Tile parameters that the drivers above plan with.
  std::size_t float_tile_rows = 4;  // tokens a tile of packed x in FloatGemmArgs (at most 16)
  std::size_t float_panels = 1;     // panels that the float GEMM likes to be given at once
  std::size_t int_panels = 1;       // panels that the integer GEMM likes to be given at once
  std::size_t gemv_max_rows = 4;    // rows up to which FloatGemv beats unpack + float GEMM

  void (*gemm_w8a8)(const IntGemmArgs&) noexcept = nullptr;
  void (*gemm_w4a8)(const IntGemmArgs&) noexcept = nullptr;
  void (*unpack)(const UnpackArgs&) noexcept = nullptr;  // all formats
  void (*gemm_float)(const FloatGemmArgs&) noexcept = nullptr;
  void (*gemv_float)(const FloatGemvArgs&) noexcept = nullptr;  // all formats
  void (*gemv_dense)(const DenseGemvArgs&) noexcept = nullptr;
  void (*quantize_rows)(const QuantizeRowsArgs&) noexcept = nullptr;
  void (*epilogue)(const EpilogueArgs&) noexcept = nullptr;
  /// out[i] = sum of q[16 i .. 16 i + 15], for n / 16 blocks; n is a multiple of 16.
  void (*block_sums)(const std::int8_t* q, std::size_t n, std::int32_t* out) noexcept = nullptr;

  // Lines of elements.
  LineRange (*line_range)(const float* x, std::size_t n) noexcept = nullptr;
  void (*quantize_line)(const QuantizeLineArgs&) noexcept = nullptr;
  void (*dequantize_line)(const DequantizeLineArgs&) noexcept = nullptr;
  void (*fp16_from_float)(const float* x, std::size_t n, std::uint16_t* out) noexcept = nullptr;
  void (*float_from_fp16)(const std::uint16_t* x, std::size_t n, float* out) noexcept = nullptr;
  void (*bf16_from_float)(const float* x, std::size_t n, std::uint16_t* out) noexcept = nullptr;
  void (*float_from_bf16)(const std::uint16_t* x, std::size_t n, float* out) noexcept = nullptr;
};

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
