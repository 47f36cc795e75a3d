// The machine's limits: instruction mixes that touch no memory, and loops that only read.
//
// Mixes are assembly, so that no compiler has a say: 12 independent chains (8 in the grouped ones), operands in
// registers, all zero. Reads are tried in several variants - one to eight streams, with and without software prefetch,
// on large pages - and the best one counts.
#include "limits.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <thread>
#include <tuple>
#include <utility>

#include "bench.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bench {
namespace {

#if defined(__x86_64__)

#define REPEAT4(X) X(0) X(1) X(2) X(3)
#define REPEAT8(X) REPEAT4(X) X(4) X(5) X(6) X(7)
#define REPEAT12(X) REPEAT8(X) X(8) X(9) X(10) X(11)

// Registers that the compiler knows under any target; 16 to 31 are used in functions of an AVX-512 target alone.
#define CLOBBER_LOW                                                                                       \
  "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
      "xmm12", "xmm13", "xmm14", "xmm15"
#define CLOBBER_HIGH                                                                                          \
  "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", \
      "xmm28", "xmm29", "xmm30", "xmm31"

#define ZERO_LOW(i) "vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n\t"
#define ZERO_HIGH(i) "vpxord %%zmm2" #i ", %%zmm2" #i ", %%zmm2" #i "\n\t"
#define ZERO_ALL_LOW                                                       \
  REPEAT12(ZERO_LOW)                                                       \
  "vpxor %%xmm12, %%xmm12, %%xmm12\n\tvpxor %%xmm13, %%xmm13, %%xmm13\n\t" \
  "vpxor %%xmm14, %%xmm14, %%xmm14\n\tvpxor %%xmm15, %%xmm15, %%xmm15\n\t"

// A loop of `body`, run n times.
#define MIX_LOOP(body) \
  asm volatile(ZERO_ALL_LOW ".p2align 5\n1:\n\t" body "dec %0\n\tjnz 1b\n\tvzeroupper\n" : "+r"(n) : : CLOBBER_LOW)

#define FMA256(i) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" #i "\n\t"
#define MADDUBS256(i)                                                                                      \
  "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\n\tvpmaddwd %%ymm15, %%ymm14, %%ymm14\n\tvpaddd %%ymm14, %%ymm" #i \
  ", %%ymm" #i "\n\t"
#define PSIGN256(i)                                                                                          \
  "vpsignb %%ymm12, %%ymm13, %%ymm14\n\tvpmaddubsw %%ymm14, %%ymm12, %%ymm14\n\tvpmaddwd %%ymm15, %%ymm14, " \
  "%%ymm14\n\t"                                                                                              \
  "vpaddd %%ymm14, %%ymm" #i ", %%ymm" #i "\n\t"
#define MADDWD256(i) "vpmaddwd %%ymm12, %%ymm13, %%ymm14\n\tvpaddd %%ymm14, %%ymm" #i ", %%ymm" #i "\n\t"
#define MADDUBS16_256(i) "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\n\tvpaddw %%ymm14, %%ymm" #i ", %%ymm" #i "\n\t"
#define DPBUSD256(i) "%{vex%} vpdpbusd %%ymm12, %%ymm13, %%ymm" #i "\n\t"
#define FMA512(i) "vfmadd231ps %%zmm12, %%zmm13, %%zmm" #i "\n\t"
#define DPBUSD512(i) "vpdpbusd %%zmm12, %%zmm13, %%zmm" #i "\n\t"
#define DPWSSD512(i) "vpdpwssd %%zmm12, %%zmm13, %%zmm" #i "\n\t"
#define DPBF16_512(i) "vdpbf16ps %%zmm12, %%zmm13, %%zmm" #i "\n\t"

void fma_avx2(long n) { MIX_LOOP(REPEAT12(FMA256)); }
void maddubs_avx2(long n) { MIX_LOOP(REPEAT12(MADDUBS256)); }
void psign_avx2(long n) { MIX_LOOP(REPEAT12(PSIGN256)); }
void maddwd_avx2(long n) { MIX_LOOP(REPEAT12(MADDWD256)); }
void maddubs16_avx2(long n) { MIX_LOOP(REPEAT12(MADDUBS16_256)); }
void dpbusd_avxvnni(long n) { MIX_LOOP(REPEAT12(DPBUSD256)); }
void fma_avx512(long n) { MIX_LOOP(REPEAT12(FMA512)); }
void dpbusd_avx512(long n) { MIX_LOOP(REPEAT12(DPBUSD512)); }
void dpwssd_avx512(long n) { MIX_LOOP(REPEAT12(DPWSSD512)); }
void dpbf16_avx512(long n) { MIX_LOOP(REPEAT12(DPBF16_512)); }

// u4 x s8 on AVX2, 8 channels x 32 k: 8 maddubs summed in s16, widened once. Accumulators 0..3 take turns, 4..7 are the
// int32 sums of a longer group, 8..11 the float sums.
#define W4_FIRST(i) "vpmaddubsw %%ymm12, %%ymm13, %%ymm" #i "\n\t"
#define W4_STEP(i) "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\n\tvpaddw %%ymm14, %%ymm" #i ", %%ymm" #i "\n\t"
#define W4_DOTS     \
  REPEAT4(W4_FIRST) \
  REPEAT4(W4_STEP)  \
  REPEAT4(W4_STEP) REPEAT4(W4_STEP) REPEAT4(W4_STEP) REPEAT4(W4_STEP) REPEAT4(W4_STEP) REPEAT4(W4_STEP)
#define W4_SCALE(i, sum)       \
  "vpmaddwd %%ymm15, %%ymm" #i \
  ", %%ymm14\n\tvcvtdq2ps %%ymm14, %%ymm14\n\tvfmadd231ps %%ymm12, %%ymm14, %%ymm" #sum "\n\t"
#define W4_WIDEN(i, sum) \
  "vpmaddwd %%ymm15, %%ymm" #i ", %%ymm14\n\tvpaddd %%ymm14, %%ymm" #sum ", %%ymm" #sum "\n\t"
#define W4_WIDEN_FIRST(i, sum) "vpmaddwd %%ymm15, %%ymm" #i ", %%ymm" #sum "\n\t"
#define W4_FINISH(sum, out) "vcvtdq2ps %%ymm" #sum ", %%ymm14\n\tvfmadd231ps %%ymm12, %%ymm14, %%ymm" #out "\n\t"

void w4_g32_avx2(long n) { MIX_LOOP(W4_DOTS W4_SCALE(0, 8) W4_SCALE(1, 9) W4_SCALE(2, 10) W4_SCALE(3, 11)); }
void w4_g128_avx2(long n) {
  MIX_LOOP(W4_DOTS W4_WIDEN_FIRST(0, 4) W4_WIDEN_FIRST(1, 5) W4_WIDEN_FIRST(2, 6) W4_WIDEN_FIRST(3, 7)  //
           W4_DOTS W4_WIDEN(0, 4) W4_WIDEN(1, 5) W4_WIDEN(2, 6) W4_WIDEN(3, 7)                          //
           W4_DOTS W4_WIDEN(0, 4) W4_WIDEN(1, 5) W4_WIDEN(2, 6) W4_WIDEN(3, 7)                          //
           W4_DOTS W4_WIDEN(0, 4) W4_WIDEN(1, 5) W4_WIDEN(2, 6) W4_WIDEN(3, 7)                          //
           W4_FINISH(4, 8) W4_FINISH(5, 9) W4_FINISH(6, 10) W4_FINISH(7, 11));
}

// u4 x s8 with VNNI, 16 channels: a start value, 8 dots a 32 k, then one conversion and one FMA a group. Integer
// accumulators 0..7, float ones 20..27.
#define W4_START512(i) "vmovdqa64 %%zmm14, %%zmm" #i "\n\t"
#define W4_DOT512 REPEAT8(DPBUSD512) REPEAT8(DPBUSD512) REPEAT8(DPBUSD512) REPEAT8(DPBUSD512)
#define W4_SCALE512(i) "vcvtdq2ps %%zmm" #i ", %%zmm" #i "\n\tvfmadd231ps %%zmm15, %%zmm" #i ", %%zmm2" #i "\n\t"
#define MIX_LOOP512(body)                                                                                   \
  asm volatile(ZERO_ALL_LOW REPEAT8(ZERO_HIGH) ".p2align 5\n1:\n\t" body "dec %0\n\tjnz 1b\n\tvzeroupper\n" \
               : "+r"(n)                                                                                    \
               :                                                                                            \
               : CLOBBER_LOW, CLOBBER_HIGH)

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void w4_g32_avx512(long n) {
  MIX_LOOP512(REPEAT8(W4_START512) W4_DOT512 W4_DOT512 REPEAT8(W4_SCALE512));
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void w4_g128_avx512(long n) {
  MIX_LOOP512(
      REPEAT8(W4_START512)
          W4_DOT512 W4_DOT512 W4_DOT512 W4_DOT512 W4_DOT512 W4_DOT512 W4_DOT512 W4_DOT512 REPEAT8(W4_SCALE512));
}

// Sum of a buffer that is cut into `Streams` runs read side by side, 256 bytes of each in turn; `Ahead` bytes of
// prefetch, 0 for none. `bytes` is a multiple of Streams * 256.
template <int Streams, int Ahead>
__attribute__((target("avx2"))) std::uint64_t read_avx2(const std::uint8_t* data, std::size_t bytes) {
  const std::size_t run = bytes / Streams;
  __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                    _mm256_setzero_si256()};
  for (std::size_t i = 0; i < run; i += 256) {
#pragma GCC unroll 8
    for (int s = 0; s < Streams; ++s) {
      const std::uint8_t* at = data + static_cast<std::size_t>(s) * run + i;
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        if (Ahead != 0 && j % 2 == 0)
          _mm_prefetch(reinterpret_cast<const char*>(at) + Ahead + 32 * j, _MM_HINT_T0);
        sum[j % 4] = _mm256_xor_si256(sum[j % 4], _mm256_load_si256(reinterpret_cast<const __m256i*>(at) + j));
      }
    }
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  return static_cast<std::uint64_t>(_mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 3));
}

template <int Streams, int Ahead>
__attribute__((target("avx512f"))) std::uint64_t read_avx512(const std::uint8_t* data, std::size_t bytes) {
  const std::size_t run = bytes / Streams;
  __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                    _mm512_setzero_si512()};
  for (std::size_t i = 0; i < run; i += 256) {
#pragma GCC unroll 8
    for (int s = 0; s < Streams; ++s) {
      const std::uint8_t* at = data + static_cast<std::size_t>(s) * run + i;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (Ahead != 0) _mm_prefetch(reinterpret_cast<const char*>(at) + Ahead + 64 * j, _MM_HINT_T0);
        sum[j] = _mm512_xor_si512(sum[j], _mm512_load_si512(at + 64 * j));
      }
    }
  }
  const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
  std::uint64_t words[8];
  _mm512_storeu_si512(words, all);
  return words[0] ^ words[7];
}

#endif  // __x86_64__

template <int Streams>
std::uint64_t read_plain(const std::uint8_t* data, std::size_t bytes) {
  const std::size_t run = bytes / Streams;
  std::uint64_t sum[4] = {0, 0, 0, 0};
  for (std::size_t i = 0; i < run; i += 32) {
    for (int s = 0; s < Streams; ++s) {
      std::uint64_t words[4];
      std::memcpy(words, data + static_cast<std::size_t>(s) * run + i, sizeof words);
      for (int j = 0; j < 4; ++j) sum[j] ^= words[j];
    }
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

struct ReadLoop {
  const char* name;
  std::uint64_t (*run)(const std::uint8_t*, std::size_t);
  bool quick;  // one of the few that a quick run tries
};

std::vector<ReadLoop> read_loops() {
#if defined(__x86_64__)
  if (cpu_flags().avx512) {
    return {{"zmm, 1 stream", read_avx512<1, 0>, true},
            {"zmm, 1 stream, prefetch 2 KB", read_avx512<1, 2048>, false},
            {"zmm, 1 stream, prefetch 4 KB", read_avx512<1, 4096>, false},
            {"zmm, 2 streams", read_avx512<2, 0>, false},
            {"zmm, 2 streams, prefetch 4 KB", read_avx512<2, 4096>, true},
            {"zmm, 4 streams", read_avx512<4, 0>, false},
            {"zmm, 4 streams, prefetch 1 KB", read_avx512<4, 1024>, false},
            {"zmm, 4 streams, prefetch 4 KB", read_avx512<4, 4096>, true},
            {"zmm, 8 streams, prefetch 2 KB", read_avx512<8, 2048>, false}};
  }
  if (cpu_flags().avx2) {
    return {{"ymm, 1 stream", read_avx2<1, 0>, true},
            {"ymm, 1 stream, prefetch 2 KB", read_avx2<1, 2048>, false},
            {"ymm, 1 stream, prefetch 4 KB", read_avx2<1, 4096>, false},
            {"ymm, 2 streams", read_avx2<2, 0>, false},
            {"ymm, 2 streams, prefetch 4 KB", read_avx2<2, 4096>, true},
            {"ymm, 4 streams", read_avx2<4, 0>, false},
            {"ymm, 4 streams, prefetch 1 KB", read_avx2<4, 1024>, false},
            {"ymm, 4 streams, prefetch 4 KB", read_avx2<4, 4096>, true},
            {"ymm, 8 streams, prefetch 2 KB", read_avx2<8, 2048>, false}};
  }
#endif
  return {{"64 bit, 1 stream", read_plain<1>, true}, {"64 bit, 4 streams", read_plain<4>, true}};
}

struct Mix {
  const char* name;
  void (*run)(long);
  double ops;  // of one pass through the body
  bool available;
};

std::vector<Mix> mixes() {
#if defined(__x86_64__)
  const CpuFlags f = cpu_flags();
  const bool vnni = f.avx512 && f.avx512_vnni;
  return {{"fma_avx2", fma_avx2, 12 * 16, f.avx2},
          {"maddubs_madd_avx2", maddubs_avx2, 12 * 64, f.avx2},
          {"psign_maddubs_madd_avx2", psign_avx2, 12 * 64, f.avx2},
          {"pmaddwd_avx2", maddwd_avx2, 12 * 32, f.avx2},
          {"maddubs_paddw_avx2", maddubs16_avx2, 12 * 64, f.avx2},
          {"w4_g32_avx2", w4_g32_avx2, 4 * 8 * 64, f.avx2},
          {"w4_g128_avx2", w4_g128_avx2, 4 * 4 * 8 * 64, f.avx2},
          {"dpbusd_avxvnni", dpbusd_avxvnni, 12 * 64, f.avx2 && f.avx_vnni},
          {"fma_avx512", fma_avx512, 12 * 32, f.avx512},
          {"dpbusd_avx512", dpbusd_avx512, 12 * 128, vnni},
          {"dpwssd_avx512", dpwssd_avx512, 12 * 64, vnni},
          {"w4_g32_avx512", w4_g32_avx512, 8 * 8 * 128, vnni},
          {"w4_g128_avx512", w4_g128_avx512, 4 * 8 * 8 * 128, vnni},
          {"dpbf16_avx512", dpbf16_avx512, 12 * 64, f.avx512 && f.avx512_bf16}};
#else
  return {};
#endif
}

/// Seconds from the moment all threads start to the moment the last has ended; f(thread).
template <class F>
double timed_threads(int threads, F&& f) {
  if (threads <= 1) return seconds_of([&] { f(0); });
  std::atomic<int> waiting{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) {
    others.emplace_back([&, t] {
      waiting.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) {
      }
      f(t);
    });
  }
  while (waiting.load() != threads - 1) std::this_thread::yield();
  return seconds_of([&] {
    go.store(true, std::memory_order_release);
    f(0);
    for (std::thread& other : others) other.join();
  });
}

double measure_mix(const Mix& mix, int threads) {
  // Many short windows, the best of which counts: few of them are disturbed.
  const double window = options().quick ? 0.002 : 0.005;
  long n = 1000;
  double seconds = 0;
  while ((seconds = seconds_of([&] { mix.run(n); })) < window / 4) n *= 2;
  n = std::max(1L, static_cast<long>(static_cast<double>(n) * window / seconds));
  double best = 0;
  for (int i = 0; i < (options().quick ? 20 : 40); ++i) {
    const double took = timed_threads(threads, [&](int) { mix.run(n); });
    best = std::max(best, mix.ops * static_cast<double>(n) * threads / took / 1e9);
  }
  return best;
}

/// Memory on large pages where the system grants them, touched.
class LargeBlock {
 public:
  explicit LargeBlock(std::size_t bytes) : mapped_(bytes + large_page) {
    memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) {
      memory_ = nullptr;
      return;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(memory_);
    data_ = reinterpret_cast<std::uint8_t*>((address + large_page - 1) / large_page * large_page);
    madvise(data_, bytes, MADV_HUGEPAGE);
    std::memset(data_, 1, bytes);
  }
  ~LargeBlock() {
    if (memory_ != nullptr) munmap(memory_, mapped_);
  }
  LargeBlock(const LargeBlock&) = delete;
  LargeBlock& operator=(const LargeBlock&) = delete;
  const std::uint8_t* data() const { return data_; }

 private:
  static constexpr std::size_t large_page = std::size_t{2} << 20;
  std::size_t mapped_;
  void* memory_ = nullptr;
  std::uint8_t* data_ = nullptr;
};

std::atomic<std::uint64_t> sink;

std::pair<double, std::string> measure_read(const LargeBlock& block, std::size_t bytes, int threads) {
  const double window = options().quick ? 0.002 : 0.004;
  const std::size_t share = bytes / static_cast<std::size_t>(threads) / 4096 * 4096;
  std::pair<double, std::string> best;
  for (const ReadLoop& loop : read_loops()) {
    if (options().quick && !loop.quick) continue;
    const double once = seconds_of([&] { sink += loop.run(block.data(), share); });
    const int passes = std::max(1, static_cast<int>(window / once));
    for (int i = 0; i < (options().quick ? 8 : 12); ++i) {
      const double took = timed_threads(threads, [&](int t) {
        std::uint64_t sum = 0;
        for (int p = 0; p < passes; ++p)
          sum ^= loop.run(block.data() + static_cast<std::size_t>(t) * share, share);
        sink += sum;
      });
      const double gbps = static_cast<double>(share) * threads * passes / took / 1e9;
      if (gbps > best.first) best = {gbps, loop.name};
    }
  }
  return best;
}

}  // namespace

CpuFlags cpu_flags() {
  CpuFlags flags;
#if defined(__x86_64__)
  static const CpuFlags detected = [] {
    CpuFlags f;
    __builtin_cpu_init();
    f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    f.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
    // Not all compilers know these two by name.
    unsigned a = 7;
    unsigned b = 0;
    unsigned c = 1;
    unsigned d = 0;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    f.avx_vnni = f.avx2 && (a >> 4 & 1U) != 0;
    f.avx512_bf16 = f.avx512 && (a >> 5 & 1U) != 0;
    return f;
  }();
  flags = detected;
#endif
  return flags;
}

std::vector<std::string> compute_limit_names() {
  std::vector<std::string> names;
  for (const Mix& mix : mixes())
    if (mix.available) names.emplace_back(mix.name);
  return names;
}

double compute_limit(const std::string& name, int threads) {
  static std::map<std::pair<std::string, int>, double> known;
  const auto key = std::make_pair(name, threads);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  double gops = 0;
  for (const Mix& mix : mixes())
    if (mix.available && name == mix.name) gops = measure_mix(mix, threads);
  known[key] = gops;
  if (gops > 0) {
    LimitRow row;
    row.name = name;
    row.threads = threads;
    row.gops = gops;
    results().limits.push_back(row);
  }
  return gops;
}

std::vector<std::size_t> read_sizes() {
  constexpr std::size_t mb = std::size_t{1} << 20;
  if (options().quick) return {mb / 4, 2 * mb, 8 * mb, 16 * mb, 64 * mb, 256 * mb};
  return {mb / 8,  mb / 4,  mb / 2,  mb,      2 * mb,  4 * mb,   8 * mb,  12 * mb,
          16 * mb, 24 * mb, 32 * mb, 48 * mb, 64 * mb, 128 * mb, 512 * mb};
}

double read_limit(std::size_t bytes, int threads) {
  static std::map<int, std::map<std::size_t, double>> known;
  std::map<std::size_t, double>& curve = known[threads];
  if (curve.empty()) {
    const std::vector<std::size_t> sizes = read_sizes();
    const LargeBlock block(sizes.back() + 8192);
    for (const std::size_t size : sizes) {
      const auto [gbps, loop] = measure_read(block, size, threads);
      curve[size] = gbps;
      LimitRow row;
      row.name = "read";
      row.threads = threads;
      row.gbps = gbps;
      row.megabytes = static_cast<double>(size) / (1 << 20);
      row.note = loop;
      results().limits.push_back(row);
    }
  }
  const auto above = curve.lower_bound(bytes);
  if (above == curve.end()) return curve.rbegin()->second;
  if (above == curve.begin()) return above->second;
  const auto below = std::prev(above);
  const double t = std::log(static_cast<double>(bytes) / static_cast<double>(below->first)) /
                   std::log(static_cast<double>(above->first) / static_cast<double>(below->first));
  return below->second + t * (above->second - below->second);
}

std::string compute_limit_of(const std::string& kernel, const std::string& isa, std::int64_t group_size) {
  const bool avx512 = isa.substr(0, 6) == "avx512";
  if (!avx512 && isa.substr(0, 3) != "avx") return {};
  if (kernel == "w8a8") {
    if (avx512) return "dpbusd_avx512";
    if (isa == "avxvnni") return "dpbusd_avxvnni";
    // The exact ways to multiply s8 by s8.
    return compute_limit("pmaddwd_avx2", 1) >= compute_limit("psign_maddubs_madd_avx2", 1)
               ? "pmaddwd_avx2"
               : "psign_maddubs_madd_avx2";
  }
  if (kernel == "w4a8") {
    const bool small = group_size > 0 && group_size < 128;
    return std::string(small ? "w4_g32_" : "w4_g128_") + (avx512 ? "avx512" : "avx2");
  }
  if (kernel == "bf16_bf16" && isa == "avx512bf16") return "dpbf16_avx512";
  return avx512 ? "fma_avx512" : "fma_avx2";
}

void register_limits() {
  for (const int threads : options().threads) {
    for (const std::string& name : compute_limit_names()) {
      register_entry("limits/" + name + "/threads:" + std::to_string(threads), [name, threads] {
        const double gops = compute_limit(name, threads);
        return EntryReport{1 / gops, {{"gops", gops}}};  // seconds a GOP
      });
    }
    register_entry("limits/read/threads:" + std::to_string(threads), [threads] {
      const double gbps = read_limit(read_sizes().back(), threads);
      return EntryReport{1 / gbps, {{"gbps", gbps}}};
    });
  }
}

}  // namespace bench
