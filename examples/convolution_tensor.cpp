// A convolution's weights, an Eigen tensor of rank 4, with one scale an output channel.
#include <cmath>
#include <cstdio>
#include <nibble/nibble.hpp>

int main() {
  // Output channels x input channels x height x width, channels of very different size.
  Eigen::Tensor<float, 4, Eigen::RowMajor> weights(16, 8, 3, 3);
  weights.setRandom();
  for (Eigen::Index c = 0; c < 16; ++c)
    weights.chip(c, 0) = weights.chip(c, 0) * std::ldexp(1.0F, static_cast<int>(c % 8));

  using PerOutput = nibble::Quantizer<nibble::Int8, nibble::Symmetric, nibble::PerChannel<0>>;
  const auto quantized = nibble::quantize<PerOutput>(weights);
  const Eigen::Tensor<float, 4, Eigen::RowMajor> back = nibble::dequantize(quantized);

  // The same error relative to each channel's largest weight, however large that is.
  float worst = 0.0F;
  for (Eigen::Index c = 0; c < 16; ++c) {
    const Eigen::Tensor<float, 0, Eigen::RowMajor> error = (back.chip(c, 0) - weights.chip(c, 0)).abs().maximum();
    const Eigen::Tensor<float, 0, Eigen::RowMajor> size = weights.chip(c, 0).abs().maximum();
    worst = std::fmax(worst, error() / size());
  }
  std::printf("%zu bytes for %td weights, worst error of a channel: %.5f of its largest weight\n",
              quantized.byte_size(), weights.size(), static_cast<double>(worst));
  // Half a step of 1/127, and a float's rounding.
  return worst <= 0.5F / 127.0F + 1e-6F ? 0 : 1;
}
