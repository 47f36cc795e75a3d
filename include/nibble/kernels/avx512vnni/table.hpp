// All kernels of one ISA: AVX-512 F, BW, VL, DQ and VNNI. This file is that ISA's only target region: nothing may be
// included inside but our own .inl files, for what a library header defines there would be compiled for this ISA and
// then shared with all of the program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/core/abi.hpp"
#include "nibble/formats/format.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/scalar/exp.hpp"
#include "nibble/kernels/table.hpp"

#if NIBBLE_X86

#include <immintrin.h>

NIBBLE_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::avx512vnni {

inline constexpr KernelTable table = [] {
  KernelTable t;
  t.isa = Isa::avx512vnni;
  return t;
}();

}  // namespace detail::avx512vnni
}  // namespace NIBBLE_ABI
}  // namespace nibble

NIBBLE_TARGET_END

#endif  // NIBBLE_X86
