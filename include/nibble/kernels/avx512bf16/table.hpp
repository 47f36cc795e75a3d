// All kernels of one ISA: avx512vnni's, and what AVX512-BF16 adds. They have run on silicon (Zen 5).
// This file is that ISA's only target region: nothing may be included inside but our own .inl files, for what a library
// header defines there would be compiled for this ISA and then shared with all of the program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/core/abi.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/avx512vnni/table.hpp"
#include "nibble/kernels/table.hpp"

#if NIBBLE_HAVE_AVX512BF16

#include <immintrin.h>

NIBBLE_TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::avx512bf16 {

namespace floats {
using namespace avx512vnni::floats;  // NOLINT: the operations, and one more
#define NIBBLE_UNROLL _Pragma("GCC unroll 16")
// clang-format off
#include "nibble/kernels/avx512bf16/bf16_ops.inl"
#include "nibble/kernels/vector/gemm_bf16.inl"
// clang-format on
#undef NIBBLE_UNROLL
}  // namespace floats

inline constexpr KernelTable table = [] {
  KernelTable t = avx512vnni::table;
  t.isa = Isa::avx512bf16;
  t.gemm_bf16 = &floats::gemm_bf16;
  return t;
}();

}  // namespace detail::avx512bf16
}  // namespace NIBBLE_ABI
}  // namespace nibble

NIBBLE_TARGET_END

#endif  // NIBBLE_HAVE_AVX512BF16
