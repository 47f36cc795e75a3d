// All kernels of one ISA: avx2's, and integer products on AVX-VNNI. This file is that ISA's only target region: nothing may be included
// inside but our own .inl files, for what a library header defines there would be compiled for this ISA and then
// shared with all of the program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/core/abi.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/avx2/table.hpp"
#include "nibble/kernels/table.hpp"

#if NIBBLE_X86

#include <immintrin.h>

NIBBLE_TARGET_BEGIN("avxvnni,avx2,fma,f16c")

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::avxvnni {

inline constexpr KernelTable table = [] {
  KernelTable t = avx2::table;
  t.isa = Isa::avxvnni;
  return t;
}();

}  // namespace detail::avxvnni
}  // namespace NIBBLE_ABI
}  // namespace nibble

NIBBLE_TARGET_END

#endif  // NIBBLE_X86
