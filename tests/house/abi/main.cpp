// Calls each copy that this CPU can run and compares their bits.
#include <cinttypes>
#include <cstdio>
#include <vector>

extern "C" {
std::uint64_t probe_plain();
std::uint64_t probe_avx2();
std::uint64_t probe_v4();
void raw_plain(const float*, std::int64_t, std::int64_t, const float*, float*);
void raw_avx2(const float*, std::int64_t, std::int64_t, const float*, float*);
void raw_v4(const float*, std::int64_t, std::int64_t, const float*, float*);
}

int main() {
  constexpr std::int64_t rows = 20;
  constexpr std::int64_t cols = 48;
  std::vector<float> w(rows * cols);
  std::vector<float> x(cols);
  for (std::size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(i % 17) - 8.0F;
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 5) - 2.0F;
  std::vector<float> expected(rows);
  raw_plain(w.data(), rows, cols, x.data(), expected.data());
  const std::uint64_t bits = probe_plain();
  std::printf("plain %016" PRIx64 "\n", bits);
  int faults = 0;
  const auto compare = [&](const char* name, std::uint64_t (*probe)(), auto raw) {
    std::vector<float> y(rows);
    raw(w.data(), rows, cols, x.data(), y.data());
    const std::uint64_t other = probe();
    std::printf("%s %016" PRIx64 "\n", name, other);
    faults += other != bits || y != expected;
  };
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) compare("avx2", probe_avx2, raw_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512cd"))
    compare("v4", probe_v4, raw_v4);
  return faults;
}
