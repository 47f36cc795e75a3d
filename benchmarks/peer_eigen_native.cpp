// Eigen at its best: this file is compiled with -O3, -march=native and OpenMP. What it
// instantiates must not be linked in place of the plain Eigen of other files, so all of its names are changed.
#define Eigen EigenNative

#include <Eigen/Core>

#undef Eigen

#include "peers.hpp"

namespace bench::peers {

std::string eigen_version() {
  return std::to_string(EIGEN_WORLD_VERSION) + "." + std::to_string(EIGEN_MAJOR_VERSION) + "." +
         std::to_string(EIGEN_MINOR_VERSION);
}

void eigen(const float* w, const float* x, float* y, std::int64_t m, std::int64_t n, std::int64_t k, int threads) {
  using RowMajor = EigenNative::Matrix<float, EigenNative::Dynamic, EigenNative::Dynamic, EigenNative::RowMajor>;
  using ColMajor = EigenNative::Matrix<float, EigenNative::Dynamic, EigenNative::Dynamic>;
  using Vector = EigenNative::Matrix<float, EigenNative::Dynamic, 1>;
  EigenNative::setNbThreads(threads);
  const EigenNative::Map<const RowMajor> weights(w, n, k);
  if (m == 1)
    EigenNative::Map<Vector>(y, n).noalias() = weights * EigenNative::Map<const Vector>(x, k);
  else
    EigenNative::Map<ColMajor>(y, n, m).noalias() = weights * EigenNative::Map<const ColMajor>(x, k, m);
}

}  // namespace bench::peers
