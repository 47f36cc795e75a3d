// What this machine could do at best: a loop that only reads memory, and loops of nothing but the instructions that
// products are made of. `nibble bench` holds its figures against them.
#pragma once

#include <sys/mman.h>

#include <Eigen/Core>
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "nibble/core/thread_pool.hpp"
#include "nibble/kernels/dispatch.hpp"

#if NIBBLE_X86
#include <immintrin.h>

NIBBLE_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
namespace llm {
namespace limits_detail {

// Twelve independent chains hide the latency of either pipe. The empty asm keeps the compiler from folding the loop.
inline void vnni_loop(std::size_t turns) {
  __m512i sum[12];
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(2);
  for (auto& s : sum) s = _mm512_setzero_si512();
  for (std::size_t t = 0; t < turns; ++t)
    for (auto& s : sum) {
      s = _mm512_dpbusd_epi32(s, a, b);
      __asm__ volatile("" : "+v"(s));
    }
}
inline void fma512_loop(std::size_t turns) {
  __m512 sum[12];
  const __m512 a = _mm512_set1_ps(1.0F), b = _mm512_set1_ps(0.5F);
  for (auto& s : sum) s = _mm512_setzero_ps();
  for (std::size_t t = 0; t < turns; ++t)
    for (auto& s : sum) {
      s = _mm512_fmadd_ps(a, b, s);
      __asm__ volatile("" : "+v"(s));
    }
}

}  // namespace limits_detail
}  // namespace llm
NIBBLE_TARGET_END

NIBBLE_TARGET_BEGIN("avx2,fma")
namespace llm {
namespace limits_detail {

// Four-bit weights as AVX2 multiplies them: eight u8 x s8 pair products summed in 16 bits, then one widening.
inline void maddubs_loop(std::size_t turns) {
  __m256i wide[4];
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(2), one = _mm256_set1_epi16(1);
  for (auto& w : wide) w = _mm256_setzero_si256();
  for (std::size_t t = 0; t < turns; ++t)
    for (auto& w : wide) {
      __m256i sum = _mm256_setzero_si256();
      for (int i = 0; i < 8; ++i) {
        __m256i x = a;
        __asm__ volatile("" : "+x"(x));
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, b));
      }
      w = _mm256_add_epi32(w, _mm256_madd_epi16(sum, one));
      __asm__ volatile("" : "+x"(w));
    }
}
inline void fma256_loop(std::size_t turns) {
  __m256 sum[12];
  const __m256 a = _mm256_set1_ps(1.0F), b = _mm256_set1_ps(0.5F);
  for (auto& s : sum) s = _mm256_setzero_ps();
  for (std::size_t t = 0; t < turns; ++t)
    for (auto& s : sum) {
      s = _mm256_fmadd_ps(a, b, s);
      __asm__ volatile("" : "+x"(s));
    }
}

}  // namespace limits_detail
}  // namespace llm
NIBBLE_TARGET_END
#endif

namespace llm {

struct MachineLimits {
  double read_gbps = 0.0;     // sequential reads of memory that no cache holds
  double integer_gops = 0.0;  // 8-bit products and sums; 0 where the ISA has no loop here
  double float_gops = 0.0;    // fp32 fused multiply-adds, two operations each
};

namespace limits_detail {

inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Seconds of the fastest of a few runs of f(thread) on all threads at once.
template <class F>
double fastest(nibble::ThreadPool& pool, F&& f) {
  double best = 1e30;
  for (int round = 0; round < 4; ++round) {
    const double start = seconds_now();
    pool.run(static_cast<std::size_t>(pool.threads()), [&](std::size_t task, std::size_t) { f(task); });
    best = std::min(best, seconds_now() - start);
  }
  return best;
}

/// Adds up `bytes` from four places at once, asking for each line well before its turn: one stream alone does not keep
/// enough reads in flight.
inline int read_all(const std::uint8_t* data, std::size_t bytes) {
  using Line = Eigen::Array<int, 16, 1>;
  using Map = Eigen::Map<const Line, Eigen::Aligned64>;
  const std::size_t quarter = bytes / 4 / 64 * 64;
  Line sum = Line::Zero();
  for (std::size_t i = 0; i < quarter; i += 64)
    for (std::size_t s = 0; s < 4; ++s) {
      const std::uint8_t* p = data + s * quarter + i;
      __builtin_prefetch(p + 4096);
      sum += Map(reinterpret_cast<const int*>(p));
    }
  return sum.sum();
}

inline double read_limit(nibble::ThreadPool& pool) {
  // Larger than caches, on large pages if the system gives them.
  const auto threads = static_cast<std::size_t>(pool.threads());
  const std::size_t bytes = std::size_t{256} << 20;
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0.0;
#if defined(MADV_HUGEPAGE)
  (void)::madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  auto* data = static_cast<std::uint8_t*>(memory);
  for (std::size_t i = 0; i < bytes; i += 4096) data[i] = 1;
  std::vector<int> sums(threads * 16);
  const std::size_t share = bytes / threads / 256 * 256;
  const double time = fastest(pool, [&](std::size_t t) { sums[t * 16] = read_all(data + t * share, share); });
  // A use of the sums: otherwise nothing need be read.
  volatile int keep = 0;
  for (const int s : sums) keep = keep + s;
  ::munmap(memory, bytes);
  return static_cast<double>(share * threads) / time * 1e-9;
}

}  // namespace limits_detail

/// Measures with all of the pool's threads; takes about a third of a second.
inline MachineLimits measure_limits(nibble::ThreadPool& pool) {
  MachineLimits limits;
  limits.read_gbps = limits_detail::read_limit(pool);
#if NIBBLE_X86
  constexpr std::size_t turns = 1000000;
  const auto rate = [&](void (*loop)(std::size_t), double operations_a_turn) {
    const double time = limits_detail::fastest(pool, [&](std::size_t) { loop(turns); });
    return operations_a_turn * static_cast<double>(turns) * pool.threads() / time * 1e-9;
  };
  const nibble::Isa isa = nibble::detail::kernels().isa;
  if (isa >= nibble::Isa::avx512vnni) {
    limits.integer_gops = rate(limits_detail::vnni_loop, 12.0 * 64 * 2);
    limits.float_gops = rate(limits_detail::fma512_loop, 12.0 * 16 * 2);
  } else if (isa >= nibble::Isa::avx2) {
    limits.integer_gops = rate(limits_detail::maddubs_loop, 4.0 * 8 * 32 * 2);
    limits.float_gops = rate(limits_detail::fma256_loop, 12.0 * 8 * 2);
  }
#endif
  return limits;
}

}  // namespace llm
