// All kernels of one ISA: AVX2, FMA and F16C. This file is that ISA's only target region: nothing may be
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

NIBBLE_TARGET_BEGIN("avx2,fma,f16c")

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::avx2 {

inline constexpr KernelTable table = [] {
  KernelTable t;
  t.isa = Isa::avx2;
  return t;
}();

}  // namespace detail::avx2
}  // namespace NIBBLE_ABI
}  // namespace nibble

NIBBLE_TARGET_END

#endif  // NIBBLE_X86
