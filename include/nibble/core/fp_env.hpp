// One floating-point environment for all of Nibble's arithmetic.
#pragma once

#include "nibble/core/abi.hpp"

#if NIBBLE_X86
#include <xmmintrin.h>
#endif

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// While alive: round to nearest even, subnormals honoured, exceptions masked; the caller's setting comes back
/// after. Every public entry and every worker thread holds one, so results do not depend on the caller's MXCSR.
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
#else
  FpEnvironment() noexcept {}
  ~FpEnvironment() {}
#endif
 public:
  FpEnvironment(const FpEnvironment&) = delete;
  FpEnvironment& operator=(const FpEnvironment&) = delete;
};

/// `v`, rounded here: keeps the compiler from contracting the operation that made v with the next one into an FMA.
NIBBLE_ALWAYS_INLINE float rounded(float v) noexcept {
#if NIBBLE_X86
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  volatile float fence = v;
  v = fence;
#endif
  return v;
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
