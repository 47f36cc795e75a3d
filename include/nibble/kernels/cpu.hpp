// What this CPU and operating system can run.
#pragma once

#include <cstdint>

#include "nibble/kernels/table.hpp"

#if NIBBLE_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif NIBBLE_ARM64 && defined(__linux__)
#include <sys/auxv.h>
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
  bool avx_vnni = false;
  bool avx512_vnni = false;
  bool avx512_bf16 = false;
  bool amx_int8 = false;  // TILE and INT8 together
  bool neon = false;
  bool dotprod = false;
  bool i8mm = false;
};

#if NIBBLE_X86
/// Linux gives a process AMX's tile registers only where it asks for them; the answer holds for all of its threads.
inline bool request_amx_tiles() noexcept {
#if defined(__linux__)
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

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
  const bool os_amx = (xcr0 & 0x60000U) == 0x60000U;
  if (!os_avx) return CpuFeatures{};
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return f;
  f.avx2 = bit(b, 5);
  f.avx512 = os_avx512 && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  f.avx512_vnni = f.avx512 && bit(c, 11);
  const bool amx = os_amx && bit(d, 24) && bit(d, 25);
  // The highest subleaf of leaf 7 was in eax; a leaf beyond it answers with another leaf's bits.
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) {
    f.avx_vnni = bit(a, 4);
    f.avx512_bf16 = f.avx512 && bit(a, 5);
  }
  f.amx_int8 = amx && request_amx_tiles();
  return f;
}
#elif NIBBLE_ARM64
inline CpuFeatures detect_cpu() noexcept {
  CpuFeatures f;
  f.neon = true;  // a part of AArch64
#if defined(__linux__)
  // By number: old C libraries lack the names.
  constexpr unsigned long hwcap_asimddp = 1UL << 20;
  constexpr unsigned long hwcap2_i8mm = 1UL << 13;
  f.dotprod = (getauxval(AT_HWCAP) & hwcap_asimddp) != 0;
  f.i8mm = (getauxval(AT_HWCAP2) & hwcap2_i8mm) != 0;
#endif
  // Elsewhere, what the compiler may assume: on macOS every Apple CPU has DotProd.
#if defined(__ARM_FEATURE_DOTPROD)
  f.dotprod = true;
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
  f.i8mm = true;
#endif
  return f;
}
#else
inline CpuFeatures detect_cpu() noexcept { return {}; }
#endif

inline bool supports(const CpuFeatures& f, Isa isa) noexcept {
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  const bool avx512vnni = avx2 && f.avx512 && f.avx512_vnni;
  switch (isa) {
    case Isa::scalar: return true;
    case Isa::neon: return f.neon;
    case Isa::neon_dotprod: return f.neon && f.dotprod;
    case Isa::neon_i8mm: return f.neon && f.dotprod && f.i8mm;
    case Isa::avx2: return avx2;
    case Isa::avxvnni: return avx2 && f.avx_vnni;
    case Isa::avx512vnni: return avx512vnni;
    case Isa::avx512bf16: return avx512vnni && f.avx512_bf16;
    case Isa::amx: return avx512vnni && f.avx512_bf16 && f.amx_int8;
  }
  return false;
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
