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

// Twelve independent chains hide the latency of either pipe. They are written out, as a loop over an array would keep
// them in memory; the empty asm keeps the compiler from folding the turns.
inline void dot(__m512i& s, __m512i a, __m512i b) {
  s = _mm512_dpbusd_epi32(s, a, b);
  __asm__ volatile("" : "+v"(s));
}
inline void vnni_loop(std::size_t turns) {
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(2);
  __m512i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a, s10 = a, s11 = a;
  for (std::size_t t = 0; t < turns; ++t) {
    dot(s0, a, b), dot(s1, a, b), dot(s2, a, b), dot(s3, a, b), dot(s4, a, b), dot(s5, a, b);
    dot(s6, a, b), dot(s7, a, b), dot(s8, a, b), dot(s9, a, b), dot(s10, a, b), dot(s11, a, b);
  }
}
inline void multiply_add(__m512& s, __m512 a, __m512 b) {
  s = _mm512_fmadd_ps(a, b, s);
  __asm__ volatile("" : "+v"(s));
}
inline void fma512_loop(std::size_t turns) {
  const __m512 a = _mm512_set1_ps(1.0F), b = _mm512_set1_ps(0.5F);
  __m512 s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a, s10 = a, s11 = a;
  for (std::size_t t = 0; t < turns; ++t) {
    multiply_add(s0, a, b), multiply_add(s1, a, b), multiply_add(s2, a, b), multiply_add(s3, a, b);
    multiply_add(s4, a, b), multiply_add(s5, a, b), multiply_add(s6, a, b), multiply_add(s7, a, b);
    multiply_add(s8, a, b), multiply_add(s9, a, b), multiply_add(s10, a, b), multiply_add(s11, a, b);
  }
}

}  // namespace limits_detail
}  // namespace llm
NIBBLE_TARGET_END

NIBBLE_TARGET_BEGIN("avx2,fma")
namespace llm {
namespace limits_detail {

// Four-bit weights as AVX2 multiplies them: eight u8 x s8 pair products summed in 16 bits, then one widening.
inline void pairs(__m256i& sum, __m256i a, __m256i b) {
  __asm__ volatile("" : "+x"(a));
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
}
inline void maddubs(__m256i& wide, __m256i a, __m256i b, __m256i one) {
  __m256i sum = _mm256_setzero_si256();
  pairs(sum, a, b), pairs(sum, a, b), pairs(sum, a, b), pairs(sum, a, b);
  pairs(sum, a, b), pairs(sum, a, b), pairs(sum, a, b), pairs(sum, a, b);
  wide = _mm256_add_epi32(wide, _mm256_madd_epi16(sum, one));
  __asm__ volatile("" : "+x"(wide));
}
inline void maddubs_loop(std::size_t turns) {
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(2), one = _mm256_set1_epi16(1);
  __m256i w0 = one, w1 = one, w2 = one, w3 = one;
  for (std::size_t t = 0; t < turns; ++t)
    maddubs(w0, a, b, one), maddubs(w1, a, b, one), maddubs(w2, a, b, one), maddubs(w3, a, b, one);
}
inline void multiply_add(__m256& s, __m256 a, __m256 b) {
  s = _mm256_fmadd_ps(a, b, s);
  __asm__ volatile("" : "+x"(s));
}
inline void fma256_loop(std::size_t turns) {
  const __m256 a = _mm256_set1_ps(1.0F), b = _mm256_set1_ps(0.5F);
  __m256 s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a, s10 = a, s11 = a;
  for (std::size_t t = 0; t < turns; ++t) {
    multiply_add(s0, a, b), multiply_add(s1, a, b), multiply_add(s2, a, b), multiply_add(s3, a, b);
    multiply_add(s4, a, b), multiply_add(s5, a, b), multiply_add(s6, a, b), multiply_add(s7, a, b);
    multiply_add(s8, a, b), multiply_add(s9, a, b), multiply_add(s10, a, b), multiply_add(s11, a, b);
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

/// The products alone, with all of the pool's threads; takes some hundredths of a second.
inline MachineLimits measure_products(nibble::ThreadPool& pool) {
  MachineLimits limits;
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
#else
  (void)pool;
#endif
  return limits;
}

/// Measures with all of the pool's threads; takes about a third of a second.
inline MachineLimits measure_limits(nibble::ThreadPool& pool) {
  MachineLimits limits = measure_products(pool);
  limits.read_gbps = limits_detail::read_limit(pool);
  return limits;
}

}  // namespace llm
