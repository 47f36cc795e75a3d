// All kernels of one ISA: avx2's, and integer products on AVX-VNNI. They have run on silicon (Zen 5).
// This file is that ISA's only target region: nothing may be included inside but our own .inl files, for what a library
// header defines there would be compiled for this ISA and then shared with all of the program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/core/abi.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/avx2/table.hpp"
#include "nibble/kernels/table.hpp"

#if NIBBLE_HAVE_AVXVNNI

#include <immintrin.h>

NIBBLE_TARGET_BEGIN("avxvnni,avx2,fma,f16c")

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::avxvnni {

// clang-format off
#include "nibble/kernels/avxvnni/int_ops.inl"
#include "nibble/kernels/vector/int_params.inl"
#include "nibble/kernels/avxvnni/int_tiles.inl"
#include "nibble/kernels/avxvnni/w8a8.inl"
#include "nibble/kernels/avxvnni/w4a8.inl"
// clang-format on

inline constexpr KernelTable table = [] {
  KernelTable t = avx2::table;
  t.isa = Isa::avxvnni;
  t.int_panels = int_tiles::most_panels;
  t.gemm_w8a8 = &gemm_w8a8;
  t.gemm_w4a8 = &gemm_w4a8;
  return t;
}();

}  // namespace detail::avxvnni
}  // namespace NIBBLE_ABI
}  // namespace nibble

NIBBLE_TARGET_END

#endif  // NIBBLE_HAVE_AVXVNNI
