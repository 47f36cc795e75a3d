// Under -fno-exceptions -fno-rtti everything works, and an error ends the program with its message on stderr.
// With an argument the program makes such an error.
#include <cstdio>
#include <nibble/nibble.hpp>

int main(int argc, char**) {
  using Q = nibble::Quantizer<nibble::Int4, nibble::Symmetric, nibble::PerGroup<32>>;
  const nibble::PackedMatrix packed = nibble::pack(nibble::quantize<Q>(Eigen::MatrixXf::Ones(8, 64)));
  const Eigen::MatrixXf y = packed * Eigen::MatrixXf::Ones(argc > 1 ? 63 : 64, 1);
  // 64 ones times ones; 7 * (1/7) is 1 within one rounding, and so is 127 * (1/127).
  std::printf("%.6f\n", static_cast<double>(y(7, 0)));
  return y(7, 0) > 63.99F && y(7, 0) < 64.01F ? 0 : 1;
}
