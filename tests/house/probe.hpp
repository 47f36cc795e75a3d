// What the house tests compile in many ways: every kind of product once, its bits folded into one number.
#pragma once

#include <cstdint>
#include <cstring>
#include <nibble/nibble.hpp>

namespace probe {

// The same floats everywhere: a linear congruential generator, no library's distribution.
inline Eigen::MatrixXf pattern(Eigen::Index rows, Eigen::Index cols, std::uint32_t seed) {
  Eigen::MatrixXf m(rows, cols);
  for (Eigen::Index j = 0; j < cols; ++j)
    for (Eigen::Index i = 0; i < rows; ++i) {
      seed = seed * 1664525U + 1013904223U;
      m(i, j) = static_cast<float>(static_cast<std::int32_t>(seed >> 8) - (1 << 23)) / static_cast<float>(1 << 22);
    }
  return m;
}

inline std::uint64_t fold(std::uint64_t hash, const Eigen::MatrixXf& m) {
  for (Eigen::Index j = 0; j < m.cols(); ++j)
    for (Eigen::Index i = 0; i < m.rows(); ++i) {
      const float value = m(i, j);
      std::uint32_t bits = 0;
      std::memcpy(&bits, &value, sizeof bits);
      hash = (hash ^ bits) * 1099511628211ULL;
    }
  return hash;
}

template <class Quantizer>
std::uint64_t product(std::uint64_t hash, nibble::Activations activations) {
  // 45 x 100: neither is a multiple of a tile, and the last group of 32 is short.
  const nibble::PackedMatrix w = nibble::pack(nibble::quantize<Quantizer>(pattern(45, 100, 1)));
  for (const Eigen::Index tokens : {1, 5, 37}) {
    const Eigen::MatrixXf x = pattern(100, tokens, 2);
    Eigen::MatrixXf y(45, tokens);
    nibble::MatmulOptions options;
    options.activations = activations;
    nibble::matmul(w, x, y, options);
    hash = fold(hash, y);
  }
  return hash;
}

/// One number out of every format's products.
inline std::uint64_t run() {
  using namespace nibble;
  std::uint64_t hash = 14695981039346656037ULL;
  hash = product<Quantizer<Int8, Symmetric, PerChannel<0>>>(hash, Activations::int8);
  hash = product<Quantizer<Int8, Asymmetric, PerTensor>>(hash, Activations::int8_asymmetric);
  hash = product<Quantizer<Int4, Symmetric, PerGroup<32>, Eigen::half>>(hash, Activations::int8);
  hash = product<Quantizer<Int4, Asymmetric, PerGroup<32>>>(hash, Activations::fp32);
  hash = product<Quantizer<Nf4, Symmetric, PerGroup<64>>>(hash, Activations::fp32);
  const Eigen::MatrixXf a = pattern(45, 100, 3);
  hash = fold(hash, pack(a) * pattern(100, 7, 4));
  return hash;
}

}  // namespace probe
