// Prints one number a topic, out of the bits of many results: the same on every machine and for every ISA, whatever its
// compiler contracts. The last line names the ISAs that ran; all gave the same numbers.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <map>
#include <nibble/nibble.hpp>
#include <string>
#include <vector>

#include "nibble/io/gguf_blocks.hpp"

namespace {

using namespace nibble;

// NaNs count as one value: which of them an operation makes is the architecture's own choice.
struct Hash {
  std::uint64_t value = 14695981039346656037ULL;
  void bits(std::uint64_t word) { value = (value ^ word) * 1099511628211ULL; }
  void add(float x) {
    std::uint32_t word = 0;
    std::memcpy(&word, &x, sizeof word);
    bits(x != x ? 0x7FC00000U : word);
  }
  void add(double x) {
    std::uint64_t word = 0;
    std::memcpy(&word, &x, sizeof word);
    bits(x != x ? 0x7FF8000000000000U : word);
  }
  void add(const Eigen::MatrixXf& m) {
    for (Eigen::Index i = 0; i < m.size(); ++i) add(m.data()[i]);
  }
  void add(const Buffer& b) {
    for (std::size_t i = 0; i < b.size(); ++i) bits(b.data()[i]);
  }
};

std::map<std::string, Hash> topics;

std::uint32_t draw(std::uint32_t& seed) { return (seed = seed * 1664525U + 1013904223U) >> 8; }

// 24 bits of mantissa in about 2^8 binades, and a few that are equal.
Eigen::MatrixXf pattern(Eigen::Index rows, Eigen::Index cols, std::uint32_t seed, int binades = 8) {
  Eigen::MatrixXf m(rows, cols);
  for (Eigen::Index i = 0; i < m.size(); ++i) {
    const auto value = static_cast<float>(static_cast<std::int32_t>(draw(seed)) - (1 << 23));
    m.data()[i] = std::ldexp(value, -23 - static_cast<int>(draw(seed) % static_cast<unsigned>(binades)));
  }
  return m;
}

std::vector<Scheme> schemes() {
  std::vector<Scheme> all;
  for (Format f : {Format::fp32, Format::fp16, Format::bf16})
    all.push_back({f, Symmetry::symmetric, Granularity::per_tensor(), ScaleType::fp32, false});
  for (Granularity g : {Granularity::per_tensor(), Granularity::per_channel(0), Granularity::per_group(32),
                        Granularity::per_group(48)})
    for (ScaleType t : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16}) {
      for (Format f : {Format::int8, Format::int4})
        for (Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset}) {
          all.push_back({f, s, g, t, false});
          if (s == Symmetry::symmetric) all.push_back({f, s, g, t, true});
        }
      all.push_back({Format::nf4, Symmetry::symmetric, g, t, false});
    }
  return all;
}

// What does not depend on kernels.
void library() {
  for (const Scheme& scheme : schemes()) {
    const Eigen::MatrixXf w = pattern(21, 101, 7);
    if (scheme.format == Format::fp32) continue;
    const DynamicQuantizer quantizer(scheme);
    const QuantizedTensor q = quantizer.quantize(w);
    Hash& codes = topics["quantize " + std::string(name_of(scheme.format))];
    codes.add(q.codes());
    codes.add(q.scales());
    codes.add(q.zeros());
    Eigen::MatrixXf back(w.cols(), w.rows());  // rows of w are its columns
    q.dequantize(back.data());
    topics["dequantize"].add(back);
    topics["fake_quantize"].add(quantizer.fake_quantize(w));
    const ErrorReport report = error_report(w, q);
    for (const ErrorStats& s : report.channels) {
      topics["error report"].add(s.mse());
      topics["error report"].add(s.max_abs_error());
    }
  }
  std::vector<float> values(1024);
  for (int t = 0; t < 40; ++t) {
    const GgufTypeInfo* info = gguf_type_info(static_cast<GgufType>(t));
    if (info == nullptr || !info->decodes) continue;
    std::uint32_t seed = 99;
    std::vector<std::uint8_t> bytes(values.size() / info->block_elements * info->block_bytes);
    // No exponent bits of a float at random: every scale a NaN or none.
    for (std::uint8_t& b : bytes) b = static_cast<std::uint8_t>(draw(seed) & 0xBF);
    gguf_dequantize(info->type, bytes.data(), values.size(), values.data());
    Hash& hash = topics["gguf " + std::string(info->name)];
    for (float v : values) hash.add(v);
    if (!info->encodes) continue;
    const Eigen::MatrixXf x = pattern(1024, 1, 5);
    gguf_quantize(info->type, x.data(), values.size(), bytes.data());
    for (std::uint8_t b : bytes) hash.bits(b);
  }
}

void products(Isa isa, std::map<std::string, Hash>& out) {
  const Eigen::VectorXf bias = pattern(45, 1, 31);
  for (const Scheme& scheme : schemes()) {
    const Eigen::MatrixXf weights = pattern(45, 203, 1);
    const PackedMatrix w =
        scheme.format == Format::fp32 ? pack(weights) : pack(DynamicQuantizer(scheme).quantize(weights));
    std::vector<Activations> kinds = {Activations::fp32};
    if (is_integer(scheme.format))
      kinds = {Activations::fp32, Activations::int8, Activations::int8_grouped, Activations::int8_asymmetric};
    for (Activations kind : kinds) {
      if (kind == Activations::int8_grouped && scheme.granularity.kind == Granularity::Kind::per_group &&
          scheme.granularity.group_size == 48 && activation_group(w) != 48)
        continue;
      Hash& hash =
          out["product " + std::string(name_of(scheme.format)) + " " + std::to_string(static_cast<int>(kind))];
      for (const Eigen::Index tokens : {1, 2, 3, 7, 19}) {
        const Eigen::MatrixXf x = pattern(203, tokens, 2, 4);
        Eigen::MatrixXf y(45, tokens);
        MatmulOptions options;
        options.isa = isa;
        options.activations = kind;
        if (tokens == 2) options.epilogue = Epilogue().bias(bias).silu();
        if (tokens == 3) options.epilogue = Epilogue().scale(bias).gelu();
        if (tokens == 7) options.epilogue = Epilogue().bias(bias).relu();
        matmul(w, x, y, options);
        hash.add(y);
      }
    }
    const Eigen::MatrixXf x = pattern(45, 3, 11);
    Eigen::MatrixXf y(203, 3);
    MatmulOptions options;
    options.isa = isa;
    matmul_transposed(w, x, y, options);
    out["transposed product"].add(y);
  }
}

}  // namespace

int main() {
  library();
  std::map<std::string, Hash> expected;
  products(Isa::scalar, expected);
  std::string names;
  for (Isa isa : built_isas) {
    if (!isa_available(isa)) continue;
    names += " " + std::string(name_of(isa));
    std::map<std::string, Hash> mine;
    products(isa, mine);
    for (const auto& [topic, hash] : expected)
      if (mine[topic].value != hash.value) {
        std::fprintf(stderr, "%s: %s differs from scalar\n", std::string(name_of(isa)).c_str(), topic.c_str());
        return 1;
      }
  }
  topics.insert(expected.begin(), expected.end());
  for (const auto& [topic, hash] : topics) std::printf("%-28s %016" PRIx64 "\n", topic.c_str(), hash.value);
  std::printf("ran:%s\n", names.c_str());
}
