// What this CPU and operating system can run.
#pragma once

#include <cstdint>

#include "nibble/kernels/table.hpp"

#if NIBBLE_X86
#include <cpuid.h>
#endif

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// CPU features that kernels ask for, each true only where the operating system saves the registers too.
struct CpuFeatures {
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool avx512 = false;  // F, BW, DQ and VL together
  bool avx512_vnni = false;
};

#if NIBBLE_X86
inline CpuFeatures detect_cpu() noexcept {
  CpuFeatures f;
  std::uint32_t a = 0;
  std::uint32_t b = 0;
  std::uint32_t c = 0;
  std::uint32_t d = 0;
  const auto bit = [](std::uint32_t word, int i) { return ((word >> i) & 1U) != 0; };
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return f;
  const bool osxsave = bit(c, 27);
  f.fma = bit(c, 12);
  f.f16c = bit(c, 29);
  if (!osxsave || !bit(c, 28)) return CpuFeatures{};
  // XCR0 says which registers the kernel saves on a context switch; CPUID alone does not.
  std::uint32_t xcr0 = 0;
  std::uint32_t xcr0_high = 0;
  __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  const bool os_avx = (xcr0 & 0x6U) == 0x6U;
  const bool os_avx512 = (xcr0 & 0xE6U) == 0xE6U;
  if (!os_avx) return CpuFeatures{};
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return f;
  f.avx2 = bit(b, 5);
  f.avx512 = os_avx512 && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  f.avx512_vnni = f.avx512 && bit(c, 11);
  return f;
}
#else
inline CpuFeatures detect_cpu() noexcept { return {}; }
#endif

inline bool supports(const CpuFeatures& f, Isa isa) noexcept {
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  switch (isa) {
    case Isa::scalar: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512vnni: return avx2 && f.avx512 && f.avx512_vnni;
  }
  return false;
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
