// Quantizing, dequantizing, packing and quantizing of activations, each beside a copy loop: one that reads and writes as
// many bytes as the operation does, into memory that is there already, with plain stores.
#include <Eigen/Core>
#include <algorithm>
#include <atomic>
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
#include "nibble/core/buffer.hpp"
#include "nibble/core/thread_pool.hpp"
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

/// Reads `r` bytes and writes `w`, interleaved in proportion, 64 bytes at a time. Both buffers are aligned to 64.
std::uint64_t copy_plain(const std::uint8_t* from, std::size_t r, std::uint8_t* to, std::size_t w) {
  std::uint64_t sum = 0;
  const std::size_t larger = std::max(r, w) / 64;
  std::size_t read = 0;
  std::size_t written = 0;
  for (std::size_t i = 1; i <= larger; i += 32) {
    for (; read / 64 < r / 64 * i / larger; read += 64)
      for (std::size_t j = 0; j < 64; j += 8) {
        std::uint64_t word;
        std::memcpy(&word, from + read + j, 8);
        sum ^= word;
      }
    for (; written / 64 < w / 64 * i / larger; written += 64)
      for (std::size_t j = 0; j < 64; j += 8) std::memcpy(to + written + j, &sum, 8);
  }
  return sum;
}
#if defined(__x86_64__)
__attribute__((target("avx2"))) std::uint64_t copy_avx2(const std::uint8_t* from, std::size_t r, std::uint8_t* to,
                                                        std::size_t w) {
  __m256i sum = _mm256_set1_epi8(1);
  const std::size_t blocks = std::max<std::size_t>(1, std::max(r, w) / 2048);
  std::size_t read = 0;
  std::size_t written = 0;
  for (std::size_t b = 1; b <= blocks; ++b) {
    const std::size_t read_end = r / 128 * b / blocks * 128;
    const std::size_t write_end = w / 128 * b / blocks * 128;
    for (; read < read_end; read += 128)
      for (std::size_t j = 0; j < 128; j += 32)
        sum = _mm256_xor_si256(sum, _mm256_load_si256(reinterpret_cast<const __m256i*>(from + read + j)));
    for (; written < write_end; written += 128)
      for (std::size_t j = 0; j < 128; j += 32)
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + written + j), sum);
  }
  return static_cast<std::uint64_t>(_mm256_extract_epi64(sum, 0));
}
#endif

std::atomic<std::uint64_t> sink;

/// The loop on a pool's threads, each with its share; nullptr: here.
void copy_loop(const nibble::Buffer& from, std::size_t r, nibble::Buffer& to, std::size_t w,
               nibble::ThreadPool* pool) {
  const std::size_t threads = pool == nullptr ? 1 : static_cast<std::size_t>(pool->threads());
  r = r / threads / 128 * 128;
  w = w / threads / 128 * 128;
  nibble::detail::for_tasks(pool, threads, [&](std::size_t t, std::size_t) {
#if defined(__x86_64__)
    if (cpu_flags().avx2) {
      sink += copy_avx2(from.data() + t * r, r, to.mutable_data() + t * w, w);
      return;
    }
#endif
    sink += copy_plain(from.data() + t * r, r, to.mutable_data() + t * w, w);
  });
}

struct Case {
  std::string name;
  Scheme scheme;
};

std::vector<Case> cases() {
  std::vector<Case> all = {{"fp16", {Format::fp16, Symmetry::symmetric, {}, {}, false}},
                           {"bf16", {Format::bf16, Symmetry::symmetric, {}, {}, false}}};
  for (const Format format : {Format::int8, Format::int4}) {
    const std::string name(nibble::name_of(format));
    all.push_back({name + " tensor symmetric",
                   {format, Symmetry::symmetric, Granularity::per_tensor(), ScaleType::fp32, false}});
    for (const Symmetry symmetry : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset}) {
      const std::string kind(nibble::name_of(symmetry));
      if (!options().quick)
        all.push_back(
            {name + " channel " + kind, {format, symmetry, Granularity::per_channel(0), ScaleType::fp32, false}});
      for (const std::size_t group : {std::size_t{32}, std::size_t{64}, std::size_t{128}})
        if (!options().quick || group == 32)
          all.push_back({name + " g" + std::to_string(group) + " " + kind,
                         {format, symmetry, Granularity::per_group(group), ScaleType::fp16, false}});
    }
  }
  all.push_back(
      {"nf4 g64", {Format::nf4, Symmetry::symmetric, Granularity::per_group(64), ScaleType::fp16, false}});
  return all;
}

/// Races one operation that reads r and writes w bytes against the copy loop of the same bytes.
class Bench {
 public:
  Bench(std::int64_t n, std::int64_t k, nibble::ThreadPool* pool)
      : n_(n), k_(k), pool_(pool), from_(nibble::Buffer(size())), to_(nibble::Buffer(size())) {}

  void operator()(const std::string& operation, const std::string& format, std::size_t r, std::size_t w,
                  std::function<void()> call) {
    std::vector<Competitor> field;
    field.push_back({"copy", [this, r, w] { copy_loop(from_, r, to_, w, pool_); }, false, {}});
    field.push_back({operation, std::move(call), false, {}});
    RaceOptions race_options;
    race_options.sample = options().quick ? 0.001 : 0.005;
    race_options.budget = options().quick ? 0.05 : 0.3;
    race(field, race_options);
    Row row;
    row.suite = "quantize";
    row.kernel = operation;
    row.format = format;
    row.isa = std::string(nibble::name_of(nibble::active_isa()));
    row.n = n_;
    row.k = k_;
    row.threads = pool_ == nullptr ? 1 : pool_->threads();
    row.seconds = field[1].seconds_median();
    row.bytes = static_cast<double>(r + w);
    row.gbps = row.bytes / row.seconds / 1e9;
    row.percent_of_limit = 100 * speedup(field[1], field[0]);
    row.limit = "copy loop";
    const double elements = static_cast<double>(n_) * static_cast<double>(k_);
    char note[64];
    std::snprintf(note, sizeof note, "copy %.1f GB/s; 7B elements: %.1f s",
                  row.bytes / field[0].seconds_median() / 1e9, 7e9 * row.seconds / elements);
    row.note = note;
    report.seconds += row.seconds;
    report.counters.emplace_back(operation + "/" + format, row.gbps);
    results().rows.push_back(row);
  }
  EntryReport report;

 private:
  std::size_t size() const { return static_cast<std::size_t>(n_ * k_) * sizeof(float) + 4096; }

  std::int64_t n_;
  std::int64_t k_;
  nibble::ThreadPool* pool_;
  nibble::Buffer from_;
  nibble::Buffer to_;
};

std::unique_ptr<nibble::ThreadPool> pool_of(int threads) {
  return threads > 1 ? std::make_unique<nibble::ThreadPool>(threads) : nullptr;
}

/// Numbers in a buffer of large pages.
void fill(float* to, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i)
    to[i] = static_cast<float>(static_cast<std::int32_t>(static_cast<std::uint32_t>(i) * 2654435761U)) * 0x1p-31F;
}

EntryReport weights(std::int64_t n, std::int64_t k, int threads) {
  const auto pool = pool_of(threads);
  const nibble::QuantizeOptions with{pool.get()};
  nibble::PackOptions pack_with;
  pack_with.pool = pool.get();
  const auto dense = static_cast<std::size_t>(n * k) * sizeof(float);
  nibble::Buffer in(dense);
  nibble::Buffer out(dense);
  fill(in.as_mutable<float>(), n * k);
  const Eigen::Map<const RowMajor> rows(in.as<float>(), n, k);
  const Eigen::Map<const Eigen::MatrixXf> columns(in.as<float>(), n, k);
  Bench bench(n, k, pool.get());
  for (const Case& c : cases()) {
    const nibble::DynamicQuantizer quantizer(c.scheme);
    const nibble::QuantizedTensor q = quantizer.quantize(rows, with);
    const nibble::PackedMatrix packed = nibble::pack(q, pack_with);
    bench("quantize", c.name, dense, q.byte_size(), [&] { quantizer.quantize(rows, with); });
    bench("quantize columns", c.name, dense, q.byte_size(), [&] { quantizer.quantize(columns, with); });
    bench("dequantize", c.name, q.byte_size(), dense, [&] { q.dequantize(out.as_mutable<float>(), pool.get()); });
    bench("pack", c.name, q.byte_size(), packed.byte_size(), [&] { nibble::pack(q, pack_with); });
    bench("unpack", c.name, packed.byte_size(), q.byte_size(), [&] { packed.unpack(pool.get()); });
    if (pool) continue;
    // Every row once: the lanes of a panel share cache lines.
    bench("dequantize_row", c.name, packed.byte_size(), dense, [&] {
      for (std::int64_t r = 0; r < n; ++r) packed.dequantize_row(r, out.as_mutable<float>() + r * k);
    });
  }
  return std::move(bench.report);
}

EntryReport activations(std::int64_t tokens, int threads) {
  const std::int64_t k = 4096;
  const auto pool = pool_of(threads);
  const auto count = static_cast<std::size_t>(tokens * k);
  nibble::Buffer in(count * sizeof(float));
  fill(in.as_mutable<float>(), tokens * k);
  const Eigen::Map<const Eigen::MatrixXf> columns(in.as<float>(), k, tokens);
  Bench bench(tokens, k, pool.get());
  using nibble::Activations;
  for (const auto& [name, kind] : {std::pair<const char*, Activations>{"int8 a token", Activations::int8},
                                   {"int8 a token, asymmetric", Activations::int8_asymmetric},
                                   {"int8 a group of 32", Activations::int8_grouped}}) {
    nibble::QuantizedActivations quantized;
    const Activations wanted = kind;
    bench("activations", name, 4 * count, count, [&, wanted] { quantized.assign(columns, wanted, pool.get()); });
  }
  return std::move(bench.report);
}

}  // namespace

void register_quantize() {
  const std::int64_t large = options().quick ? 4096 : 8192;
  for (const int threads : options().threads) {
    const std::string suffix = "/threads:" + std::to_string(threads);
    register_entry("quantize/weights/dram" + suffix, [=] { return weights(large, large, threads); });
    if (threads == 1) register_entry("quantize/weights/l2", [] { return weights(96, 1024, 1); });
    for (const std::int64_t tokens : {std::int64_t{1}, std::int64_t{512}})
      register_entry("quantize/activations/m:" + std::to_string(tokens) + suffix,
                     [=] { return activations(tokens, threads); });
  }
}

}  // namespace bench
