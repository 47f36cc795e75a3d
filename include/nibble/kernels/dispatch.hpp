// Chooses the kernels that this machine runs.
#pragma once

#include <cstdlib>
#include <string>
#include <string_view>

#include "nibble/core/error.hpp"
#include "nibble/kernels/cpu.hpp"
#include "nibble/kernels/scalar/table.hpp"
#include "nibble/kernels/table.hpp"

// The kernels' machine code goes into every translation unit that multiplies, and the linker keeps one copy. A program
// of many translation units saves their compile time by defining NIBBLE_EXTERN_KERNELS for all of them and
// NIBBLE_DEFINE_KERNELS, too, for one.
#if NIBBLE_X86 && (!defined(NIBBLE_EXTERN_KERNELS) || defined(NIBBLE_DEFINE_KERNELS))
#define NIBBLE_KERNELS_HERE 1
#include "nibble/kernels/avx2/table.hpp"
#include "nibble/kernels/avx512vnni/table.hpp"
#else
#define NIBBLE_KERNELS_HERE 0
#endif
#if defined(NIBBLE_EXTERN_KERNELS)
#define NIBBLE_KERNELS_LINKAGE
#else
#define NIBBLE_KERNELS_LINKAGE inline
#endif

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

#if NIBBLE_KERNELS_HERE
NIBBLE_KERNELS_LINKAGE const KernelTable& avx2_kernels() noexcept { return avx2::table; }
NIBBLE_KERNELS_LINKAGE const KernelTable& avx512vnni_kernels() noexcept { return avx512vnni::table; }
#elif NIBBLE_X86
const KernelTable& avx2_kernels() noexcept;
const KernelTable& avx512vnni_kernels() noexcept;
#endif

}  // namespace detail

/// The ISA called `name` ("scalar", "avx2", "avx512vnni"). Throws InvalidArgument for a name that is none.
inline Isa isa_from_name(std::string_view name) {
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512vnni})
    if (name == name_of(isa)) return isa;
  detail::raise<InvalidArgument>(
      detail::concat("unknown ISA '", name, "' (NIBBLE_MAX_ISA), expected scalar, avx2 or avx512vnni"));
}

/// True where this CPU and operating system run `isa`, whatever NIBBLE_MAX_ISA says.
inline bool isa_available(Isa isa) noexcept {
  static const detail::CpuFeatures features = detail::detect_cpu();
  return detail::supports(features, isa);
}

namespace detail {

/// The table of `isa`. Throws Unsupported where this machine cannot run it.
inline const KernelTable& kernels_for(Isa isa) {
  require<Unsupported>(isa_available(isa), "this CPU cannot run the ", name_of(isa), " kernels");
#if NIBBLE_X86
  if (isa == Isa::avx512vnni) return avx512vnni_kernels();
  if (isa == Isa::avx2) return avx2_kernels();
#endif
  return scalar::table;
}

inline Isa choose_isa() {
  Isa limit = Isa::avx512vnni;
  if (const char* text = std::getenv("NIBBLE_MAX_ISA"); text != nullptr && *text != '\0')
    limit = isa_from_name(text);
  for (Isa isa : {Isa::avx512vnni, Isa::avx2})
    if (isa <= limit && isa_available(isa)) return isa;
  return Isa::scalar;
}

/// The best table that the CPU runs within the environment variable NIBBLE_MAX_ISA, read once at first use.
/// Throws InvalidArgument, on every call, where the variable names no ISA.
inline const KernelTable& kernels() {
  static const KernelTable& chosen = kernels_for(choose_isa());
  return chosen;
}

}  // namespace detail

/// The ISA that products run on unless told otherwise.
inline Isa active_isa() { return detail::kernels().isa; }

}  // namespace NIBBLE_ABI
}  // namespace nibble

#undef NIBBLE_KERNELS_HERE
#undef NIBBLE_KERNELS_LINKAGE
