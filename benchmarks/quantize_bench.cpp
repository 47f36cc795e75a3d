// Quantizing, dequantizing, packing and quantizing of activations, beside a loop that copies: bytes read and written a
// second. All of one thread.
#include <Eigen/Core>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench.hpp"
#include "limits.hpp"
#include "nibble/gemm/activations.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/quantize/quantizer.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bench {
namespace {

using nibble::Format;
using nibble::Granularity;
using nibble::ScaleType;
using nibble::Scheme;
using nibble::Symmetry;
using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

#if defined(__x86_64__)
/// Stores that go around the cache: no reading of the lines that are about to be overwritten.
__attribute__((target("avx2"))) void copy_streaming(void* to, const void* from, std::size_t bytes) {
  auto* out = static_cast<__m256i*>(to);
  const auto* in = static_cast<const __m256i*>(from);
  for (std::size_t i = 0; i < bytes / 32; ++i) _mm256_stream_si256(out + i, _mm256_loadu_si256(in + i));
  _mm_sfence();
}
#endif

struct Case {
  std::string name;
  Scheme scheme;
};

std::vector<Case> cases() {
  const auto group = [](Format format, std::size_t size, Symmetry symmetry) {
    return Scheme{format, symmetry, Granularity::per_group(size), ScaleType::fp16};
  };
  return {{"int8 channel symmetric",
           {Format::int8, Symmetry::symmetric, Granularity::per_channel(0), ScaleType::fp32}},
          {"int8 g128 asymmetric", group(Format::int8, 128, Symmetry::asymmetric)},
          {"int4 g32 symmetric", group(Format::int4, 32, Symmetry::symmetric)},
          {"int4 g32 float_offset", group(Format::int4, 32, Symmetry::float_offset)},
          {"nf4 g64", group(Format::nf4, 64, Symmetry::symmetric)},
          {"fp16", {Format::fp16, Symmetry::symmetric, {}, {}}},
          {"bf16", {Format::bf16, Symmetry::symmetric, {}, {}}}};
}

struct Work {
  std::vector<Competitor> field;
  std::vector<Row> rows;
  std::vector<double> bytes;  // read and written by one call

  void add(const std::string& operation, const std::string& format, double moved, std::function<void()> call) {
    Row row;
    row.suite = "quantize";
    row.kernel = operation;
    row.format = format;
    rows.push_back(row);
    bytes.push_back(moved);
    field.push_back({operation + "/" + format, std::move(call), false, {}});
  }
};

/// Races the work; the first `copies` entries are copy loops, the fastest of which is what the others are related to.
EntryReport finish(Work& work, std::size_t copies, std::int64_t n, std::int64_t k, bool weights) {
  RaceOptions race_options;
  race_options.sample = options().quick ? 0.002 : 0.01;
  race_options.budget = options().quick ? 2 : 20;
  race(work.field, race_options);
  EntryReport report;
  double copy_gbps = 0;
  for (std::size_t i = 0; i < work.field.size(); ++i) {
    Row& row = work.rows[i];
    row.isa = std::string(nibble::name_of(nibble::active_isa()));
    row.n = n;
    row.k = k;
    row.seconds = work.field[i].seconds_median();
    row.bytes = work.bytes[i];
    row.gbps = row.bytes / row.seconds / 1e9;
    if (i < copies) copy_gbps = std::max(copy_gbps, row.gbps);
  }
  for (std::size_t i = 0; i < work.rows.size(); ++i) {
    Row& row = work.rows[i];
    row.percent_of_limit = 100 * row.gbps / copy_gbps;
    if (i >= copies && weights) {
      char note[48];
      std::snprintf(note, sizeof note, "7B weights: %.1f s",
                    7e9 * row.seconds / (static_cast<double>(n) * static_cast<double>(k)));
      row.note = note;
    }
    report.seconds += row.seconds;
    report.counters.emplace_back(work.field[i].name, row.gbps);
    results().rows.push_back(row);
  }
  return report;
}

void add_copies(Work& work, const RowMajor& from, RowMajor& to) {
  const auto bytes = static_cast<std::size_t>(from.size()) * sizeof(float);
  work.add("copy", "memcpy", 2.0 * static_cast<double>(bytes),
           [&from, &to, bytes] { std::memcpy(to.data(), from.data(), bytes); });
#if defined(__x86_64__)
  // Matrices of this size start at a multiple of 16 and not always of 32, which streaming stores need.
  if (cpu_flags().avx2) {
    const std::size_t skip = (32 - reinterpret_cast<std::uintptr_t>(to.data()) % 32) % 32;
    const std::size_t count = (bytes - skip) / 32 * 32;
    work.add("copy", "streaming stores", 2.0 * static_cast<double>(count), [&from, &to, skip, count] {
      copy_streaming(reinterpret_cast<std::uint8_t*>(to.data()) + skip, from.data(), count);
    });
  }
#endif
}

EntryReport weights() {
  const std::int64_t n = options().quick ? 2048 : 4096;
  const std::int64_t k = 4096;
  RowMajor w(n, k);
  for (std::int64_t i = 0; i < w.size(); ++i)
    w.data()[i] =
        static_cast<float>(static_cast<std::int32_t>(static_cast<std::uint32_t>(i) * 2654435761U)) * 0x1p-31F;
  RowMajor out = w;
  Work work;
  add_copies(work, w, out);
  const std::size_t copies = work.field.size();
  const double dense = 4.0 * static_cast<double>(w.size());
  std::vector<std::unique_ptr<nibble::QuantizedTensor>> kept;
  for (const Case& c : cases()) {
    const nibble::DynamicQuantizer quantizer(c.scheme);
    kept.push_back(std::make_unique<nibble::QuantizedTensor>(quantizer.quantize(w)));
    const nibble::QuantizedTensor& q = *kept.back();
    const auto q_bytes = static_cast<double>(q.byte_size());
    const auto packed_bytes = static_cast<double>(nibble::pack(q).byte_size());
    work.add("quantize", c.name, dense + q_bytes, [quantizer, &w] { quantizer.quantize(w); });
    work.add("dequantize", c.name, dense + q_bytes, [&q, &out] { q.dequantize(out.data()); });
    work.add("pack", c.name, q_bytes + packed_bytes, [&q] { nibble::pack(q); });
  }
  return finish(work, copies, n, k, true);
}

EntryReport activations() {
  const std::int64_t tokens = 512;
  const std::int64_t k = 4096;
  RowMajor x(tokens, k);
  for (std::int64_t i = 0; i < x.size(); ++i)
    x.data()[i] =
        static_cast<float>(static_cast<std::int32_t>(static_cast<std::uint32_t>(i) * 2654435761U)) * 0x1p-31F;
  RowMajor out = x;
  Work work;
  add_copies(work, x, out);
  const std::size_t copies = work.field.size();
  const Eigen::Map<const Eigen::MatrixXf> columns(x.data(), k, tokens);
  nibble::QuantizedActivations symmetric;
  nibble::QuantizedActivations asymmetric;
  const double moved = 5.0 * static_cast<double>(x.size());  // floats in, codes out
  work.add("activations", "int8 a token", moved, [&] { symmetric.assign(columns, nibble::Activations::int8); });
  work.add("activations", "int8 a token, asymmetric", moved,
           [&] { asymmetric.assign(columns, nibble::Activations::int8_asymmetric); });
  return finish(work, copies, tokens, k, false);
}

}  // namespace

void register_quantize() {
  register_entry("quantize/weights", weights);
  register_entry("quantize/activations", activations);
}

}  // namespace bench
