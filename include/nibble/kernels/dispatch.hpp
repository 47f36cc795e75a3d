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
#if (NIBBLE_X86 || NIBBLE_ARM64) && (!defined(NIBBLE_EXTERN_KERNELS) || defined(NIBBLE_DEFINE_KERNELS))
#define NIBBLE_KERNELS_HERE 1
#include "nibble/kernels/amx/table.hpp"
#include "nibble/kernels/avx2/table.hpp"
#include "nibble/kernels/avx512bf16/table.hpp"
#include "nibble/kernels/avx512vnni/table.hpp"
#include "nibble/kernels/avxvnni/table.hpp"
#include "nibble/kernels/neon/table.hpp"
#include "nibble/kernels/neon_dotprod/table.hpp"
#include "nibble/kernels/neon_i8mm/table.hpp"
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
/// The table of an ISA other than scalar that is one of built_isas.
NIBBLE_KERNELS_LINKAGE const KernelTable& vector_kernels(Isa isa) noexcept {
  switch (isa) {
#if NIBBLE_ARM64
    case Isa::neon_dotprod: return neon_dotprod::table;
    case Isa::neon_i8mm: return neon_i8mm::table;
    default: return neon::table;
#else
#if NIBBLE_HAVE_AVXVNNI
    case Isa::avxvnni: return avxvnni::table;
#endif
    case Isa::avx512vnni: return avx512vnni::table;
#if NIBBLE_HAVE_AVX512BF16
    case Isa::avx512bf16: return avx512bf16::table;
#endif
#if NIBBLE_HAVE_AMX
    case Isa::amx: return amx::table;
#endif
    default: return avx2::table;
#endif
  }
}
#elif NIBBLE_X86 || NIBBLE_ARM64
const KernelTable& vector_kernels(Isa isa) noexcept;
#endif

}  // namespace detail

/// The ISA called `name`, one of all_isas. Throws InvalidArgument for a name that is none.
inline Isa isa_from_name(std::string_view name) {
  std::string names;
  for (Isa isa : all_isas) {
    if (name == name_of(isa)) return isa;
    names += detail::concat(names.empty() ? "" : ", ", name_of(isa));
  }
  detail::raise<InvalidArgument>(
      detail::concat("unknown ISA '", name, "' (NIBBLE_MAX_ISA), expected one of ", names));
}

/// True where this build has kernels for `isa`, and this CPU and operating system run them, whatever NIBBLE_MAX_ISA says.
inline bool isa_available(Isa isa) noexcept {
  static const detail::CpuFeatures features = detail::detect_cpu();
  for (Isa built : built_isas)
    if (built == isa) return detail::supports(features, isa);
  return false;
}

namespace detail {

/// The table of `isa`. Throws Unsupported where this machine cannot run it.
inline const KernelTable& kernels_for(Isa isa) {
  require<Unsupported>(isa_available(isa), "this CPU cannot run the ", name_of(isa), " kernels");
#if NIBBLE_X86 || NIBBLE_ARM64
  if (isa != Isa::scalar) return vector_kernels(isa);
#endif
  return scalar::table;
}

/// The best of built_isas that the machine runs and that is no better than NIBBLE_MAX_ISA.
inline Isa choose_isa() {
  Isa limit = built_isas.back();
  if (const char* text = std::getenv("NIBBLE_MAX_ISA"); text != nullptr && *text != '\0') {
    limit = isa_from_name(text);
    bool built = false;
    std::string names;
    for (Isa isa : built_isas) {
      built = built || isa == limit;
      names += concat(names.empty() ? "" : ", ", name_of(isa));
    }
    // Another architecture's ISA is no limit on this one's.
    require(built, "NIBBLE_MAX_ISA is ", text, ", which this build has no kernels for, expected one of ", names);
  }
  Isa best = Isa::scalar;
  for (Isa isa : built_isas)
    if (isa <= limit && isa_available(isa)) best = isa;
  return best;
}

/// The best table that the CPU runs within the environment variable NIBBLE_MAX_ISA, read once at first use.
/// Throws InvalidArgument, on every call, where the variable does not name one of built_isas.
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
