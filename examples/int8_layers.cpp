// Two layers chained in INT8: the first writes codes, the second reads them, and no float is in between.
#include <cstdio>
#include <nibble/nibble.hpp>

int main() {
  using Int8 = nibble::Quantizer<nibble::Int8, nibble::Symmetric, nibble::PerChannel<0>>;
  const Eigen::MatrixXf w1 = Eigen::MatrixXf::Random(256, 128) / 8.0F;
  const Eigen::MatrixXf w2 = Eigen::MatrixXf::Random(64, 256) / 16.0F;
  const Eigen::MatrixXf x = Eigen::MatrixXf::Random(128, 10);
  const nibble::PackedMatrix layer1 = nibble::pack(nibble::quantize<Int8>(w1));
  const nibble::PackedMatrix layer2 = nibble::pack(nibble::quantize<Int8>(w2));

  // Calibration: what range the hidden values have. ReLU's begin at 0, so the codes -128..127 cover 0..largest.
  const Eigen::MatrixXf hidden = (w1 * x).cwiseMax(0.0F);
  const nibble::Int8Output grid{hidden.maxCoeff() / 255.0F, -128};

  nibble::QuantizedActivations input;
  input.assign(x);  // one scale a token; several layers may share it (q, k and v)
  nibble::MatmulOptions options;
  options.epilogue.relu();
  Eigen::Matrix<std::int8_t, Eigen::Dynamic, Eigen::Dynamic> codes(256, 10);
  nibble::matmul(layer1, input, codes, grid, options);

  nibble::QuantizedActivations between;
  between.assign_codes(codes, grid.scale, grid.zero_point);
  Eigen::MatrixXf y(64, 10);
  nibble::matmul(layer2, between, y);

  const Eigen::MatrixXf expected = w2 * hidden;
  const float error = (y - expected).norm() / expected.norm();
  std::printf("two INT8 layers, relative error %.4f\n", static_cast<double>(error));
  return error > 0.0F && error < 0.02F ? 0 : 1;
}
