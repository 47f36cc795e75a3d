// One table of function pointers an ISA: everything that is dispatched at run time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "nibble/kernels/args.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Instruction sets that have kernels; those of one architecture in ascending order of preference.
enum class Isa : std::uint8_t {
  scalar = 0,    ///< portable C++, the oracle
  neon,          ///< AArch64's Advanced SIMD
  neon_dotprod,  ///< neon + DotProd
  neon_i8mm,     ///< neon_dotprod + I8MM
  avx2,          ///< AVX2 + FMA + F16C
  avxvnni,       ///< avx2 + AVX-VNNI: dot products of 256 bits
  avx512vnni,    ///< avx2 + AVX-512 F, BW, VL, DQ, VNNI
  avx512bf16,    ///< avx512vnni + AVX512-BF16
  amx,           ///< avx512bf16 + AMX-TILE, AMX-INT8
};

constexpr std::string_view name_of(Isa isa) noexcept {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::neon: return "neon";
    case Isa::neon_dotprod: return "neon_dotprod";
    case Isa::neon_i8mm: return "neon_i8mm";
    case Isa::avx2: return "avx2";
    case Isa::avxvnni: return "avxvnni";
    case Isa::avx512vnni: return "avx512vnni";
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::amx: return "amx";
  }
  return "?";
}

/// Every ISA that has a name, whatever the architecture.
inline constexpr std::array<Isa, 9> all_isas = {Isa::scalar,     Isa::neon,       Isa::neon_dotprod,
                                                Isa::neon_i8mm,  Isa::avx2,       Isa::avxvnni,
                                                Isa::avx512vnni, Isa::avx512bf16, Isa::amx};

// What the oldest compilers that Nibble knows, and the assemblers of their time, have not heard of.
#if NIBBLE_X86 && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define NIBBLE_HAVE_AVXVNNI 1
#define NIBBLE_HAVE_AMX 1
#else
#define NIBBLE_HAVE_AVXVNNI 0
#define NIBBLE_HAVE_AMX 0
#endif
#if NIBBLE_X86 && (defined(__clang__) || __GNUC__ >= 10)
#define NIBBLE_HAVE_AVX512BF16 1
#else
#define NIBBLE_HAVE_AVX512BF16 0
#endif

/// The ISAs whose kernels are in this build, in ascending order of preference, scalar first.
#if NIBBLE_X86
inline constexpr std::array built_isas = {
    Isa::scalar,     Isa::avx2,
#if NIBBLE_HAVE_AVXVNNI
    Isa::avxvnni,
#endif
    Isa::avx512vnni,
#if NIBBLE_HAVE_AVX512BF16
    Isa::avx512bf16,
#endif
#if NIBBLE_HAVE_AMX
    Isa::amx,
#endif
};
#elif NIBBLE_ARM64
inline constexpr std::array<Isa, 4> built_isas = {Isa::scalar, Isa::neon, Isa::neon_dotprod, Isa::neon_i8mm};
#else
inline constexpr std::array<Isa, 1> built_isas = {Isa::scalar};
#endif

namespace detail {

/// Kernels of one ISA. Every entry equals the scalar table's bit for bit; the arguments' comments define the result.
struct KernelTable {
  Isa isa = Isa::scalar;

  // Tile parameters that the drivers above plan with.
  std::size_t float_tile_rows = 4;  // tokens a tile of packed x in FloatGemmArgs (at most 16)
  std::size_t float_panels = 1;     // panels that the float GEMM likes to be given at once
  std::size_t bf16_tile_rows = 4;   // most tokens in a tile of Bf16GemmArgs
  std::size_t int_panels = 1;       // panels that the integer GEMM likes to be given at once
  std::size_t gemv_max_rows = 4;    // rows up to which FloatGemv beats unpack + float GEMM
  std::size_t gemm_bits_rows =
      0;  // rows up to which gemm_bits beats expand + the wider format's; 0: there is none

  void (*gemm_w8a8)(const IntGemmArgs&) noexcept = nullptr;
  void (*gemm_w4a8)(const IntGemmArgs&) noexcept = nullptr;
  void (*gemm_bits)(const IntGemmArgs&) noexcept = nullptr;  // int2, int3, int5, int6; up to gemm_bits_rows rows
  void (*expand)(const ExpandArgs&) noexcept = nullptr;      // the same formats
  void (*unpack)(const UnpackArgs&) noexcept = nullptr;      // all formats
  void (*gemm_float)(const FloatGemmArgs&) noexcept = nullptr;
  void (*gemv_float)(const FloatGemvArgs&) noexcept = nullptr;  // all formats
  void (*gemm_bf16)(const Bf16GemmArgs&) noexcept = nullptr;    // bf16
  void (*gemv_dense)(const DenseGemvArgs&) noexcept = nullptr;
  void (*gemv_rows)(const RowsGemvArgs&) noexcept = nullptr;     // nullptr: packing first is as fast
  void (*gemm_direct)(const FloatGemvArgs&) noexcept = nullptr;  // fp32 and fp16, any number of rows
  void (*quantize_rows)(const QuantizeRowsArgs&) noexcept = nullptr;
  void (*epilogue)(const EpilogueArgs&) noexcept = nullptr;
  /// out[i] = sum of q[16 i .. 16 i + 15], for n / 16 blocks; n is a multiple of 16.
  void (*block_sums)(const std::int8_t* q, std::size_t n, std::int32_t* out) noexcept = nullptr;

  // Transformers.
  void (*rms_norm)(const RmsNormArgs&) noexcept = nullptr;
  void (*softmax)(const SoftmaxArgs&) noexcept = nullptr;
  void (*softmax_codes)(const SoftmaxCodesArgs&) noexcept = nullptr;
  void (*rope)(const RopeArgs&) noexcept = nullptr;

  // Lines of elements.
  LineRange (*line_range)(const float* x, std::size_t n) noexcept = nullptr;
  void (*quantize_line)(const QuantizeLineArgs&) noexcept = nullptr;
  void (*dequantize_line)(const DequantizeLineArgs&) noexcept = nullptr;
  void (*fp16_from_float)(const float* x, std::size_t n, std::uint16_t* out) noexcept = nullptr;
  void (*float_from_fp16)(const std::uint16_t* x, std::size_t n, float* out) noexcept = nullptr;
  void (*bf16_from_float)(const float* x, std::size_t n, std::uint16_t* out) noexcept = nullptr;
  void (*float_from_bf16)(const std::uint16_t* x, std::size_t n, float* out) noexcept = nullptr;

  // Lines of groups, and rows as lanes.
  bool (*group_ranges)(const GroupRangesArgs&) noexcept = nullptr;
  void (*fit_ranges)(const FitRangesArgs&) noexcept = nullptr;
  void (*widen_ranges)(const WidenRangesArgs&) noexcept = nullptr;
  void (*quantize_groups)(const QuantizeGroupsArgs&) noexcept = nullptr;
  void (*dequantize_groups)(const DequantizeGroupsArgs&) noexcept = nullptr;
  void (*rows_to_lanes)(const LanesArgs&) noexcept = nullptr;
  void (*lanes_to_rows)(const LanesArgs&) noexcept = nullptr;
};

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
