// The control word of the floating-point unit, and settings of it that a library must not depend on.
#pragma once

#include <cstdint>

#include "nibble/core/abi.hpp"

#if NIBBLE_X86
#include <xmmintrin.h>
#endif

#if NIBBLE_X86 || NIBBLE_ARM64
#define NIBBLE_TEST_FP_MODES 1

namespace fp_modes {

#if NIBBLE_X86
inline unsigned get() { return _mm_getcsr() & ~0x3FU; }  // without the sticky flags
inline void set(unsigned word) { _mm_setcsr(word); }
// Down, up, toward zero, flush to zero and denormals are zero; the last two together.
constexpr unsigned hostile[] = {0x3F80U, 0x5F80U, 0x7F80U, 0x1F80U | 0x8040U, 0x5F80U | 0x8040U};
#else
inline std::uint64_t get() {
  std::uint64_t word = 0;
  __asm__ volatile("mrs %0, fpcr" : "=r"(word) : : "memory");
  return word;
}
inline void set(std::uint64_t word) { __asm__ volatile("msr fpcr, %0" : : "r"(word) : "memory"); }
// Down, up, toward zero, flush to zero; all of these: up, flush, default NaN, alternative half precision.
constexpr std::uint64_t hostile[] = {0x00800000U, 0x00400000U, 0x00C00000U, 0x01000000U, 0x07400000U};
#endif

}  // namespace fp_modes
#else
#define NIBBLE_TEST_FP_MODES 0
#endif
