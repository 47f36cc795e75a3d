// This machine's limits, measured once a process and remembered.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace bench {

struct CpuFlags {
  bool avx2 = false;  // with FMA and F16C
  bool avx_vnni = false;
  bool avx512 = false;
  bool avx512_vnni = false;
  bool avx512_bf16 = false;
};
CpuFlags cpu_flags();

/// Instruction mixes that this CPU runs.
std::vector<std::string> compute_limit_names();
/// GOP/s of an instruction mix on `threads` threads; 0 where the CPU lacks it.
double compute_limit(const std::string& name, int threads);

/// GB/s of the best read loop over `bytes`, shared by `threads` threads: interpolated between the measured sizes.
double read_limit(std::size_t bytes, int threads);
std::vector<std::size_t> read_sizes();

/// The mix that bounds a kernel: `kernel` as in the rows, `isa` as Nibble names it. Empty: none known.
std::string compute_limit_of(const std::string& kernel, const std::string& isa, std::int64_t group_size);

}  // namespace bench
