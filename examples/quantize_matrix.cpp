// Quantizes a matrix in several formats, looks at the error and gets the values back.
#include <cstdio>
#include <nibble/nibble.hpp>

namespace {

template <class Quantizer>
void show(const char* name, const Eigen::MatrixXf& weights) {
  const auto quantized = nibble::quantize<Quantizer>(weights);
  const Eigen::MatrixXf back = nibble::dequantize(quantized);
  const float largest = (back - weights).cwiseAbs().maxCoeff();
  std::printf("%-34s %8zu bytes, largest error %.5f\n", name, quantized.byte_size(), static_cast<double>(largest));
}

}  // namespace

int main() {
  using nibble::Asymmetric, nibble::Symmetric, nibble::PerChannel, nibble::PerGroup, nibble::PerTensor;
  const Eigen::MatrixXf weights = Eigen::MatrixXf::Random(256, 1024);  // 256 outputs, 1024 inputs

  // The type says it all: format, where zero lies, how many values share a scale, and how the scale is stored.
  show<nibble::Quantizer<nibble::Fp16>>("fp16", weights);
  show<nibble::Quantizer<nibble::Int8, Symmetric, PerTensor>>("int8, per tensor", weights);
  show<nibble::Quantizer<nibble::Int8, Symmetric, PerChannel<0>>>("int8, per channel", weights);
  show<nibble::Quantizer<nibble::Int4, Symmetric, PerGroup<64>, Eigen::half>>("int4, groups of 64, fp16 scales",
                                                                              weights);
  show<nibble::Quantizer<nibble::Int4, Asymmetric, PerGroup<64>>>("int4, asymmetric, groups of 64", weights);
  show<nibble::Quantizer<nibble::Nf4, Symmetric, PerGroup<64>>>("nf4, groups of 64", weights);

  // The same described at run time, as files and tools need it.
  const nibble::Scheme scheme{nibble::Format::int8, nibble::Symmetry::symmetric,
                              nibble::Granularity::per_channel(0)};
  const nibble::QuantizedTensor quantized = nibble::DynamicQuantizer(scheme).quantize(weights);
  using Int8 = nibble::Quantizer<nibble::Int8, Symmetric, PerChannel<0>>;
  const bool same = nibble::dequantize(quantized) == nibble::dequantize(nibble::quantize<Int8>(weights));
  std::printf("run-time scheme gives the same values: %s\n", same ? "yes" : "no");

  // What quantization does to values, without keeping codes: calibration and training use it.
  const bool faked = nibble::fake_quantize<Int8>(weights) == nibble::dequantize(nibble::quantize<Int8>(weights));
  return same && faked ? 0 : 1;
}
