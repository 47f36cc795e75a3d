// One floating-point environment for all of Nibble's arithmetic.
#pragma once

#include <cstdint>
#include <type_traits>

#include "nibble/core/abi.hpp"

#if NIBBLE_X86
#include <xmmintrin.h>
#endif

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// While alive: round to nearest even, subnormals honoured, exceptions masked; the caller's setting comes back
/// after. Every public entry and every worker thread holds one, so results do not depend on the caller's MXCSR or
/// FPCR.
class FpEnvironment {
 public:
#if NIBBLE_X86
  FpEnvironment() noexcept : saved_(_mm_getcsr()) {
    if (saved_ != default_mxcsr) _mm_setcsr(default_mxcsr);
  }
  ~FpEnvironment() {
    if (saved_ != default_mxcsr) _mm_setcsr(saved_);
  }

 private:
  // All exceptions masked, nearest even, no flush to zero, no denormals-are-zero.
  static constexpr unsigned default_mxcsr = 0x1F80;
  unsigned saved_;
#elif NIBBLE_ARM64
  FpEnvironment() noexcept {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_) : : "memory");
    if (saved_ != default_fpcr) write(default_fpcr);
  }
  ~FpEnvironment() {
    if (saved_ != default_fpcr) write(saved_);
  }

 private:
  static void write(std::uint64_t fpcr) noexcept { __asm__ volatile("msr fpcr, %0" : : "r"(fpcr) : "memory"); }
  // No traps, nearest even, no flush to zero, NaNs keep their payload, IEEE half precision.
  static constexpr std::uint64_t default_fpcr = 0;
  std::uint64_t saved_;
#else
  FpEnvironment() noexcept {}
  ~FpEnvironment() {}
#endif
 public:
  FpEnvironment(const FpEnvironment&) = delete;
  FpEnvironment& operator=(const FpEnvironment&) = delete;
};

/// `v`, a float or a double, rounded here: keeps the compiler from contracting the operation that made v with the next
/// one into an FMA.
template <class T>
NIBBLE_ALWAYS_INLINE T rounded(T v) noexcept {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "rounded takes a float or a double");
#if NIBBLE_X86
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  volatile T fence = v;
  v = fence;
#endif
  return v;
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
