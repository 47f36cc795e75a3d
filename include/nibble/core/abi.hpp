// Version, ABI namespace and target regions: what every other header stands on.
#pragma once

#include <Eigen/Core>

#define NIBBLE_VERSION_MAJOR 0
#define NIBBLE_VERSION_MINOR 1
#define NIBBLE_VERSION_PATCH 0

#if !defined(__GNUC__)
#error "Nibble needs GCC 9 or newer, or Clang 10 or newer"
#endif

#if defined(__x86_64__)
#define NIBBLE_X86 1
#else
#define NIBBLE_X86 0
#endif
// Little-endian AArch64: what the kernels' layouts assume.
#if defined(__aarch64__) && defined(__AARCH64EL__)
#define NIBBLE_ARM64 1
#else
#define NIBBLE_ARM64 0
#endif

#if defined(__cpp_exceptions) || defined(__EXCEPTIONS)
#define NIBBLE_EXCEPTIONS 1
#else
#define NIBBLE_EXCEPTIONS 0
#endif

// Whatever changes the meaning of our inline functions is a part of their names: translation units that are
// compiled with different flags then keep their symbols apart, and passing our types between them fails at link
// time instead of corrupting memory.
#if defined(__AVX512F__)
#define NIBBLE_ABI_ISA x86v4
#elif defined(__AVX2__) && defined(__FMA__)
#define NIBBLE_ABI_ISA x86v3
#elif defined(__AVX__)
#define NIBBLE_ABI_ISA avx
#elif defined(__SSE4_2__)
#define NIBBLE_ABI_ISA x86v2
#elif defined(__x86_64__)
#define NIBBLE_ABI_ISA x86v1
#elif defined(__aarch64__) && defined(__ARM_FEATURE_SVE)
#define NIBBLE_ABI_ISA armv8sve
#elif defined(__aarch64__)
#define NIBBLE_ABI_ISA armv8
#else
#define NIBBLE_ABI_ISA portable
#endif
#if defined(__FAST_MATH__)
#define NIBBLE_ABI_MATH fast
#else
#define NIBBLE_ABI_MATH strict
#endif
#if NIBBLE_EXCEPTIONS
#define NIBBLE_ABI_THROW throws
#else
#define NIBBLE_ABI_THROW aborts
#endif
#define NIBBLE_ABI_PASTE_(maj, min, align, isa, math, thr) v##maj##_##min##_align##align##_##isa##_##math##_##thr
#define NIBBLE_ABI_PASTE(maj, min, align, isa, math, thr) NIBBLE_ABI_PASTE_(maj, min, align, isa, math, thr)

/// Inline namespace that holds all of Nibble, e.g. `v0_1_align16_x86v1_strict_throws`.
#define NIBBLE_ABI                                                                                    \
  NIBBLE_ABI_PASTE(NIBBLE_VERSION_MAJOR, NIBBLE_VERSION_MINOR, EIGEN_MAX_ALIGN_BYTES, NIBBLE_ABI_ISA, \
                   NIBBLE_ABI_MATH, NIBBLE_ABI_THROW)

// A target region compiles what lies between BEGIN and END for an ISA beyond the command line's. It opens after
// every #include (a header included inside would leak that ISA's code into weak functions that all of the program
// shares) and outside of all namespaces. The argument is one string literal, e.g. "avx2,fma,f16c".
#define NIBBLE_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define NIBBLE_TARGET_BEGIN(isa) \
  NIBBLE_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define NIBBLE_TARGET_END _Pragma("clang attribute pop")
#else
#define NIBBLE_TARGET_BEGIN(isa) _Pragma("GCC push_options") NIBBLE_PRAGMA(GCC target(isa))
#define NIBBLE_TARGET_END _Pragma("GCC pop_options")
#endif

// The regions of AArch64's kernels: Clang 14 knows features alone, GCC's assembler takes these from ARMv8.2 on.
#if defined(__clang__)
#define NIBBLE_TARGET_DOTPROD "dotprod"
#define NIBBLE_TARGET_I8MM "dotprod,i8mm"
#else
#define NIBBLE_TARGET_DOTPROD "arch=armv8.2-a+dotprod"
#define NIBBLE_TARGET_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif

#define NIBBLE_ALWAYS_INLINE inline __attribute__((always_inline))
