// Compiled three times with different -march; PROBE_NAME tells the copies apart. Only plain data crosses.
#include "../probe.hpp"

extern "C" std::uint64_t PROBE_NAME() { return probe::run(); }

// What a user can pass between differently compiled units: pointers, and Eigen's and std's types over float.
extern "C" void PROBE_RAW(const float* weights, std::int64_t rows, std::int64_t cols, const float* x, float* y) {
  const Eigen::Map<const Eigen::MatrixXf> w(weights, rows, cols);
  const Eigen::Map<const Eigen::MatrixXf> in(x, cols, 1);
  using Q = nibble::Quantizer<nibble::Int8, nibble::Symmetric, nibble::PerChannel<0>>;
  Eigen::Map<Eigen::MatrixXf>(y, rows, 1) = nibble::pack(nibble::quantize<Q>(w)) * in;
}
