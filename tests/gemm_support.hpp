// Random packed weights and a naive product: what the gemm tests compare with.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "nibble/gemm/pack.hpp"

namespace gemm_test {

using nibble::Buffer;
using nibble::Format;
using nibble::Granularity;
using nibble::QuantizedTensor;
using nibble::ScaleType;
using nibble::Scheme;
using nibble::Symmetry;

inline Scheme scheme_of(Format format, Symmetry symmetry, Granularity granularity,
                        ScaleType scales = ScaleType::fp32) {
  Scheme s;
  s.format = format;
  s.symmetry = symmetry;
  s.granularity = granularity;
  s.scale_type = scales;
  return s;
}

inline void put_param(Buffer& buffer, ScaleType type, std::size_t i, float value) {
  if (type == ScaleType::fp32) {
    buffer.as_mutable<float>()[i] = value;
  } else {
    buffer.as_mutable<std::uint16_t>()[i] =
        type == ScaleType::fp16 ? nibble::fp16_from_float(value) : nibble::bf16_from_float(value);
  }
}

/// Codes of every value, scales around 1e-2 of both signs, all zero points.
inline QuantizedTensor random_quantized(const Scheme& scheme, std::size_t n, std::size_t k, unsigned seed) {
  std::mt19937 rng(seed);
  const std::size_t bits = nibble::bits_of(scheme.format);
  const std::size_t line = (k * bits + 7) / 8;
  Buffer codes(n * line);
  for (std::size_t i = 0; i < n * line; ++i) codes.mutable_data()[i] = static_cast<std::uint8_t>(rng());
  for (std::size_t r = 0; r < n; ++r) {
    std::uint8_t* row = codes.mutable_data() + r * line;
    if (k * bits % 8 != 0) row[line - 1] &= static_cast<std::uint8_t>((1U << (k * bits % 8)) - 1U);
    for (std::size_t i = 0; i < k; ++i) {
      // Floats are drawn as values: random bits would be NaN now and then.
      const float value = std::ldexp(static_cast<float>(static_cast<int>(rng() % 2001) - 1000), -10);
      const std::uint16_t half = nibble::fp16_from_float(value);
      const std::uint16_t brain = nibble::bf16_from_float(value);
      if (scheme.format == Format::fp32) std::memcpy(row + 4 * i, &value, 4);
      if (scheme.format == Format::fp16) std::memcpy(row + 2 * i, &half, 2);
      if (scheme.format == Format::bf16) std::memcpy(row + 2 * i, &brain, 2);
    }
  }
  std::size_t params = 0;
  if (nibble::has_scales(scheme.format)) {
    params = 1;
    if (scheme.granularity.kind == Granularity::Kind::per_channel) params = n;
    if (scheme.granularity.kind == Granularity::Kind::per_group)
      params = n * ((k + scheme.granularity.group_size - 1) / scheme.granularity.group_size);
  }
  Buffer scales(params * nibble::bytes_of(scheme.scale_type));
  Buffer zeros(scheme.symmetry == Symmetry::symmetric    ? 0
               : scheme.symmetry == Symmetry::asymmetric ? params
                                                         : scales.size());
  std::uniform_real_distribution<float> scale(0.001F, 0.02F);
  for (std::size_t i = 0; i < params; ++i) {
    put_param(scales, scheme.scale_type, i, rng() % 8 == 0 ? -scale(rng) : scale(rng));
    if (scheme.symmetry == Symmetry::asymmetric)
      zeros.mutable_data()[i] = static_cast<std::uint8_t>(rng() % (1U << bits));
    if (scheme.symmetry == Symmetry::float_offset) put_param(zeros, scheme.scale_type, i, scale(rng) - 0.01F);
  }
  return QuantizedTensor::from_parts(scheme, {n, k}, codes, scales, zeros);
}

inline Eigen::MatrixXf random_floats(Eigen::Index rows, Eigen::Index cols, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Eigen::MatrixXf m(rows, cols);
  for (Eigen::Index i = 0; i < m.size(); ++i) m.data()[i] = normal(rng);
  return m;
}

/// Integer code relative to the zero point, and the rest of the parameters of element (r, k).
inline std::int64_t centred(const QuantizedTensor& q, std::size_t r, std::size_t k) {
  return q.code(r, k) - q.zero_point(q.param_index(r, k));
}

/// What a product with INT8 activations is defined to be, from the unpacked tensor alone.
/// x[t][k] are codes less their zero point; groups run along k.
inline float naive_int(const QuantizedTensor& q, std::size_t r, const std::vector<std::int32_t>& x,
                       std::size_t group) {
  const std::size_t k_total = q.shape()[1];
  float acc = 0.0F;
  for (std::size_t begin = 0; begin < k_total; begin += group) {
    const std::size_t end = std::min(begin + group, k_total);
    std::int64_t dot = 0;
    std::int64_t sum = 0;
    for (std::size_t k = begin; k < end; ++k) {
      dot += centred(q, r, k) * x[k];
      sum += x[k];
    }
    const std::size_t p = q.param_index(r, begin);
    acc = std::fma(q.scale(p), static_cast<float>(dot), acc);
    if (q.scheme().symmetry == Symmetry::float_offset) acc = std::fma(q.offset(p), static_cast<float>(sum), acc);
  }
  return acc;
}

/// Bits, so that NaN equals itself and -0 differs from 0.
inline std::vector<std::uint32_t> bits(const Eigen::MatrixXf& m) {
  std::vector<std::uint32_t> out(static_cast<std::size_t>(m.size()));
  if (m.size() != 0) std::memcpy(out.data(), m.data(), out.size() * 4);
  return out;
}

inline std::vector<nibble::Isa> available_isas() {
  std::vector<nibble::Isa> isas;
  for (nibble::Isa isa : nibble::built_isas)
    if (nibble::isa_available(isa)) isas.push_back(isa);
  return isas;
}

}  // namespace gemm_test
