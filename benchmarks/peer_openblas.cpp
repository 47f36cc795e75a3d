#include "peers.hpp"

#if NIBBLE_BENCH_OPENBLAS
#include <cblas.h>

// Declared here as well: which cblas.h is found first depends on Debian's alternatives.
extern "C" void openblas_set_num_threads(int threads);
extern "C" char* openblas_get_config(void);

namespace bench::peers {

bool openblas_available() { return true; }

std::string openblas_version() {
  const std::string config = openblas_get_config();  // "OpenBLAS 0.3.21 NO_LAPACKE ..."
  const auto digit = config.find_first_of("0123456789");
  return digit == std::string::npos ? config : config.substr(digit, config.find(' ', digit) - digit);
}

void openblas(const float* w, const float* x, float* y, std::int64_t m, std::int64_t n, std::int64_t k,
              int threads) {
  static int set = 0;
  if (set != threads) openblas_set_num_threads(set = threads);
  const auto rows = static_cast<int>(n);
  const auto depth = static_cast<int>(k);
  const auto cols = static_cast<int>(m);
  if (m == 1)
    cblas_sgemv(CblasRowMajor, CblasNoTrans, rows, depth, 1.0F, w, depth, x, 1, 0.0F, y, 1);
  else
    cblas_sgemm(CblasColMajor, CblasTrans, CblasNoTrans, rows, cols, depth, 1.0F, w, depth, x, depth, 0.0F, y,
                rows);
}

}  // namespace bench::peers

#else

namespace bench::peers {
bool openblas_available() { return false; }
std::string openblas_version() { return {}; }
void openblas(const float*, const float*, float*, std::int64_t, std::int64_t, std::int64_t, int) {}
}  // namespace bench::peers

#endif
