// The program that all four consumers build.
#include <cmath>
#include <cstdio>
#include <nibble/nibble.hpp>

int main() {
  using Q = nibble::Quantizer<nibble::Int8, nibble::Symmetric, nibble::PerChannel<0>>;
  const Eigen::MatrixXf weights = Eigen::MatrixXf::Random(48, 80);
  const Eigen::MatrixXf x = Eigen::MatrixXf::Random(80, 3);
  const nibble::PackedMatrix packed = nibble::pack(nibble::quantize<Q>(weights));
  const Eigen::MatrixXf y = packed * x;
  const float error = (y - weights * x).norm() / (weights * x).norm();
  std::printf("nibble %d.%d.%d, relative error %.4f\n", NIBBLE_VERSION_MAJOR, NIBBLE_VERSION_MINOR,
              NIBBLE_VERSION_PATCH, static_cast<double>(error));
  // Two roundings to 8 bits, each of at most 1/254 of the largest element: a few parts in a thousand, and never zero.
  return error > 0.0F && error < 0.02F ? 0 : 1;
}
