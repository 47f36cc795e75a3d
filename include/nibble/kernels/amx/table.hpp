// All kernels of one ISA: avx512bf16's, and integer products on AMX-INT8. THE LATTER HAVE NEVER RUN ON SILICON: they
// are tested over an emulation of the tile operations (tests/emulation/amx_tile_ops.inl).
// This file is that ISA's only target region: nothing may be included inside but our own .inl files, for what a library
// header defines there would be compiled for this ISA and then shared with all of the program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/core/abi.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/avx512bf16/table.hpp"
#include "nibble/kernels/table.hpp"

#if NIBBLE_HAVE_AMX

#include <immintrin.h>

NIBBLE_TARGET_BEGIN("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")

// GCC 12 warns about the undefined vectors inside of its own intrinsics, wherever they are inlined.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::amx {

namespace below = avx512vnni;
namespace int_ops = avx512vnni::int_ops;
namespace int_params = avx512vnni::int_params;

// clang-format off
#include "nibble/kernels/amx/tile_ops.inl"
#include "nibble/kernels/amx/int_tiles.inl"
#include "nibble/kernels/amx/w8a8.inl"
#include "nibble/kernels/amx/w4a8.inl"
// clang-format on

inline constexpr KernelTable table = [] {
  KernelTable t = avx512bf16::table;
  t.isa = Isa::amx;
  t.gemm_w8a8 = &gemm_w8a8;
  t.gemm_w4a8 = &gemm_w4a8;
  return t;
}();

}  // namespace detail::amx
}  // namespace NIBBLE_ABI
}  // namespace nibble

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

NIBBLE_TARGET_END

#endif  // NIBBLE_HAVE_AMX
