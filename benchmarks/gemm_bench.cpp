// Products: Nibble on every ISA of this machine beside OpenBLAS, Eigen and oneDNN, in one race for each shape, number of
// tokens and number of threads.
#include <Eigen/Core>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bench.hpp"
#include "limits.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/gemm/matmul.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/quantize/quantizer.hpp"
#include "peers.hpp"

namespace bench {
namespace {

using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using nibble::Activations;
using nibble::Format;
using nibble::Granularity;
using nibble::Isa;
using nibble::ScaleType;
using nibble::Scheme;
using nibble::Symmetry;

/// A way to multiply.
struct Spec {
  const char* kernel;
  Scheme scheme;
  Activations activations = Activations::automatic;
  bool dense = false;     // Eigen matrices, nothing packed beforehand
  bool headline = false;  // in quick runs too
};

const std::vector<Spec>& all_specs() {
  const auto group = [](Format format, std::size_t size, Symmetry symmetry) {
    return Scheme{format, symmetry, Granularity::per_group(size), ScaleType::fp16};
  };
  const Scheme channel{Format::int8, Symmetry::symmetric, Granularity::per_channel(0), ScaleType::fp32};
  static const std::vector<Spec> specs = {
      {"w8a8", channel, Activations::int8, false, true},
      {"w4a8", group(Format::int4, 32, Symmetry::symmetric), Activations::int8, false, true},
      {"w4a8", group(Format::int4, 128, Symmetry::symmetric), Activations::int8, false, true},
      {"w4a8", group(Format::int4, 32, Symmetry::asymmetric), Activations::int8},
      {"w4a8", group(Format::int4, 32, Symmetry::float_offset), Activations::int8, false, true},
      {"w4a16", group(Format::int4, 32, Symmetry::symmetric), Activations::fp32, false, true},
      {"w2a8", group(Format::int2, 64, Symmetry::asymmetric), Activations::int8, false, true},
      {"w3a8", group(Format::int3, 64, Symmetry::asymmetric), Activations::int8, false, true},
      {"w5a8", group(Format::int5, 64, Symmetry::asymmetric), Activations::int8, false, true},
      {"w6a8", group(Format::int6, 64, Symmetry::asymmetric), Activations::int8, false, true},
      {"w3a16", group(Format::int3, 64, Symmetry::asymmetric), Activations::fp32, false, true},
      {"w8a16", channel, Activations::fp32},
      {"nf4", group(Format::nf4, 64, Symmetry::symmetric), Activations::fp32, false, true},
      {"fp16", {Format::fp16, Symmetry::symmetric, {}, {}}, Activations::fp32, false, true},
      {"bf16", {Format::bf16, Symmetry::symmetric, {}, {}}, Activations::fp32, false, true},
      {"bf16_bf16", {Format::bf16, Symmetry::symmetric, {}, {}}, Activations::bf16, false, true},
      {"fp32", {Format::fp32, Symmetry::symmetric, {}, {}}, Activations::fp32, false, true},
      {"fp32_dense", {Format::fp32, Symmetry::symmetric, {}, {}}, Activations::fp32, true},
  };
  return specs;
}

std::vector<const Spec*> chosen_specs() {
  std::vector<const Spec*> specs;
  for (const Spec& spec : all_specs()) {
    if (!selected(options().kernels, spec.kernel)) continue;
    if (options().quick && options().kernels.empty() && !spec.headline) continue;
    specs.push_back(&spec);
  }
  return specs;
}

std::vector<Isa> chosen_isas() {
  Isa best = Isa::scalar;
  for (const Isa isa : nibble::built_isas)
    if (nibble::isa_available(isa)) best = isa;
  std::vector<Isa> isas;
  for (const Isa isa : nibble::built_isas) {
    const std::string name(nibble::name_of(isa));
    if (!nibble::isa_available(isa)) continue;
    // What the machine is best at, and what most machines have.
    const bool by_default = isa == best || isa == Isa::avx2;
    if (options().isas.empty() ? by_default : selected(options().isas, name)) isas.push_back(isa);
  }
  return isas;
}

/// Uniform values within +-1: every code of every format comes up, the widest ones included.
void fill_uniform(float* values, std::size_t count, std::uint64_t seed) {
  std::uint64_t state = seed * 0x9E3779B97F4A7C15ULL + 1;
  for (std::size_t i = 0; i < count; ++i) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    values[i] = static_cast<float>(static_cast<std::int32_t>(state >> 32)) * 0x1p-31F;
  }
}

nibble::ThreadPool* pool_of(int threads) {
  static std::vector<std::unique_ptr<nibble::ThreadPool>> pools;
  if (threads <= 1) return nullptr;
  for (const auto& pool : pools)
    if (pool->threads() == threads) return pool.get();
  return pools.emplace_back(std::make_unique<nibble::ThreadPool>(threads)).get();
}

nibble::PackedMatrix pack_as(const Spec& spec, const RowMajor& w) {
  nibble::PackOptions pack_options;
  pack_options.pool = pool_of(options().threads.back());
  if (spec.scheme.format == Format::fp32) return nibble::pack(w, pack_options);
  return nibble::pack(nibble::DynamicQuantizer(spec.scheme).quantize(w), pack_options);
}

/// Weights of one shape in all forms, and activations; made on demand.
class Bed {
 public:
  Bed(Shape shape, std::int64_t most_tokens) : shape_(shape), w_(shape.n, shape.k) {
    fill_uniform(w_.data(), static_cast<std::size_t>(w_.size()), 1);
    x_.resize(shape.k, most_tokens);
    fill_uniform(x_.data(), static_cast<std::size_t>(x_.size()), 2);
    y_.resize(shape.n, most_tokens);
    packed_.resize(all_specs().size());
    slices_.resize(all_specs().size());
  }

  const Shape& shape() const { return shape_; }
  const RowMajor& w() const { return w_; }
  const Eigen::MatrixXf& x() const { return x_; }
  Eigen::MatrixXf& y() { return y_; }

  const nibble::PackedMatrix& packed(const Spec& spec) {
    auto& packed = packed_[index(spec)];
    if (!packed) packed = pack_as(spec, w_);
    return *packed;
  }

  double weight_bytes(const Spec& spec) {
    return spec.dense ? 4.0 * static_cast<double>(w_.size()) : static_cast<double>(packed(spec).byte_size());
  }

  /// One product of the first m tokens into y().
  void multiply(const Spec& spec, Isa isa, std::int64_t m, int threads) {
    nibble::MatmulOptions matmul_options;
    matmul_options.activations = spec.activations;
    matmul_options.pool = pool_of(threads);
    matmul_options.isa = isa;
    if (spec.dense)
      nibble::gemm(w_, x_.leftCols(m), y_.leftCols(m), matmul_options);
    else
      nibble::matmul(packed(spec), x_.leftCols(m), y_.leftCols(m), matmul_options);
  }

  /// True where y() holds, for the first and last rows and tokens, the very bits that the scalar kernels give.
  bool matches_scalar(const Spec& spec, std::int64_t m) {
    const Eigen::Index height = std::min<Eigen::Index>(16, shape_.n);
    auto& slice = slices_[index(spec)];
    RowMajor rows;
    if (!slice || spec.dense) {
      rows.resize(2 * height, shape_.k);
      rows << w_.topRows(height), w_.bottomRows(height);
      if (!slice && !spec.dense) slice = pack_as(spec, rows);
    }
    Eigen::MatrixXf tokens(shape_.k, 2);
    tokens << x_.col(0), x_.col(m - 1);
    Eigen::MatrixXf expected(2 * height, 2);
    nibble::MatmulOptions matmul_options;
    matmul_options.activations = spec.activations;
    matmul_options.isa = Isa::scalar;
    if (spec.dense)
      nibble::gemm(rows, tokens, expected, matmul_options);
    else
      nibble::matmul(*slice, tokens, expected, matmul_options);
    const auto same = [&](Eigen::Index y_row, Eigen::Index y_col, Eigen::Index row, Eigen::Index col) {
      return std::memcmp(&y_(y_row, y_col), &expected(row, col),
                         sizeof(float) * static_cast<std::size_t>(height)) == 0;
    };
    return same(0, 0, 0, 0) && same(shape_.n - height, 0, height, 0) && same(0, m - 1, 0, 1) &&
           same(shape_.n - height, m - 1, height, 1);
  }

  /// The same for a float library, within the bound of k roundings in any order.
  bool close_to_exact(std::int64_t m) const {
    for (const Eigen::Index row : {Eigen::Index{0}, static_cast<Eigen::Index>(shape_.n - 1)}) {
      for (const Eigen::Index col : {Eigen::Index{0}, static_cast<Eigen::Index>(m - 1)}) {
        const Eigen::ArrayXd terms =
            w_.row(row).transpose().cast<double>().array() * x_.col(col).cast<double>().array();
        const double bound = terms.abs().sum() * static_cast<double>(shape_.k) * 0x1p-24;
        if (!(std::abs(terms.sum() - static_cast<double>(y_(row, col))) <= bound)) return false;
      }
    }
    return true;
  }

 private:
  static std::size_t index(const Spec& spec) { return static_cast<std::size_t>(&spec - all_specs().data()); }

  Shape shape_;
  RowMajor w_;
  Eigen::MatrixXf x_;
  Eigen::MatrixXf y_;
  std::vector<std::optional<nibble::PackedMatrix>> packed_;
  std::vector<std::optional<nibble::PackedMatrix>> slices_;
};

/// The bed of a shape; the one before is given back first, for some take gigabytes.
Bed& bed_of(Shape shape, std::int64_t most_tokens) {
  static std::unique_ptr<Bed> bed;
  if (!bed || bed->shape().n != shape.n || bed->shape().k != shape.k || bed->y().cols() < most_tokens) {
    bed.reset();
    bed = std::make_unique<Bed>(shape, most_tokens);
  }
  return *bed;
}

Row row_of(const Spec& spec, Isa isa, Shape shape, std::int64_t m, int threads) {
  Row row;
  row.kernel = spec.kernel;
  row.isa = std::string(nibble::name_of(isa));
  row.group_size = static_cast<std::int64_t>(spec.scheme.granularity.group_size);
  if (nibble::has_scales(spec.scheme.format)) row.symmetry = std::string(nibble::name_of(spec.scheme.symmetry));
  row.m = m;
  row.n = shape.n;
  row.k = shape.k;
  row.threads = threads;
  return row;
}

/// Rates of a row whose time and weights are known: bytes are the weights, x and y, each moved once.
void finish(Row& row, double seconds, double weight_bytes) {
  row.seconds = seconds;
  row.gops = ops_of(row.m, row.n, row.k) / seconds / 1e9;
  row.bytes = weight_bytes + 4.0 * static_cast<double>(row.m) * static_cast<double>(row.n + row.k);
  row.gbps = row.bytes / seconds / 1e9;
}

/// The least time that this machine could take: its instructions or its reads, whichever is longer.
void relate_to_limit(Row& row) {
  const std::string mix = compute_limit_of(row.kernel, row.isa, row.group_size);
  if (mix.empty()) return;
  const double gops = compute_limit(mix, row.threads);
  const double gbps = read_limit(static_cast<std::size_t>(row.bytes), row.threads);
  if (gops <= 0 || gbps <= 0) return;
  const double compute_seconds = ops_of(row.m, row.n, row.k) / gops / 1e9;
  const double read_seconds = row.bytes / gbps / 1e9;
  row.limit = compute_seconds >= read_seconds ? mix : "read";
  row.percent_of_limit = 100 * std::max(compute_seconds, read_seconds) / row.seconds;
}

EntryReport measure(Shape shape, std::int64_t m, std::int64_t most_tokens, int threads) {
  Bed& bed = bed_of(shape, most_tokens);
  std::vector<Competitor> field;
  std::vector<Row> rows;

  // Peers first, so that rows find them by index.
  const auto peer = [&](const std::string& name, double weight_bytes, bool ok, const std::string& note,
                        std::function<void()> call) {
    Row row;
    row.suite = "peer";
    row.kernel = name;
    row.m = m;
    row.n = shape.n;
    row.k = shape.k;
    row.threads = threads;
    row.bytes = weight_bytes;
    row.ok = ok;
    row.note = note;
    rows.push_back(row);
    field.push_back({name, std::move(call), threads > 1, {}});
    return static_cast<int>(field.size()) - 1;
  };
  const double dense_bytes = 4.0 * static_cast<double>(shape.n) * static_cast<double>(shape.k);
  float* y = bed.y().data();
  const float* x = bed.x().data();
  const float* w = bed.w().data();
  int openblas = -1;
  if (peers::openblas_available()) {
    const auto call = [=] { peers::openblas(w, x, y, m, shape.n, shape.k, threads); };
    call();
    openblas = peer(m == 1 ? "openblas_sgemv" : "openblas_sgemm", dense_bytes, bed.close_to_exact(m), "", call);
  }
  const auto eigen_call = [=] { peers::eigen(w, x, y, m, shape.n, shape.k, threads); };
  eigen_call();
  const int eigen = peer("eigen", dense_bytes, bed.close_to_exact(m), "", eigen_call);
  std::vector<std::unique_ptr<peers::OneDnnProduct>> products;
  std::vector<int> onednn_int8;
  for (const auto kind : {peers::OneDnnKind::u8s8s32, peers::OneDnnKind::s8s8s32, peers::OneDnnKind::bf16}) {
    const bool bf16 = kind == peers::OneDnnKind::bf16;
    // In a quick run one of them: the fastest. bf16 is slow without instructions for it.
    if (options().quick && kind != peers::OneDnnKind::u8s8s32) continue;
    if (bf16 && !cpu_flags().avx512_bf16) continue;
    auto product = peers::make_onednn(kind, w, x, m, shape.n, shape.k, threads);
    if (!product) continue;
    product->run();
    const bool exact = product->wrong(64) == 0;
    // Its instructions saturate on some CPUs, which its documentation leaves to the caller: a note, no failure.
    const int at = peer(peers::name_of(kind), dense_bytes / (bf16 ? 2 : 4), true, exact ? "" : "NOT exact here",
                        [p = product.get()] { p->run(); });
    if (!bf16) onednn_int8.push_back(at);
    products.push_back(std::move(product));
  }

  for (const Spec* spec : chosen_specs()) {
    // Row-major dense weights are copied into panels at each call: no use at sizes beyond a test or two.
    if (spec->dense && dense_bytes > 128e6) continue;
    for (const Isa isa : chosen_isas()) {
      Row row = row_of(*spec, isa, shape, m, threads);
      row.suite = "gemm";
      bed.y().leftCols(m).setZero();
      bed.multiply(*spec, isa, m, threads);
      row.ok = bed.matches_scalar(*spec, m);
      row.bytes = bed.weight_bytes(*spec);
      rows.push_back(row);
      field.push_back({std::string(spec->kernel) + "/" + row.isa,
                       [&bed, spec, isa, m, threads] { bed.multiply(*spec, isa, m, threads); },
                       false,
                       {}});
    }
  }

  RaceOptions race_options;
  if (options().quick) {
    race_options.sample = 0.002;
    race_options.budget = 0.7;
    race_options.max_rounds = 7;
  }
  race(field, race_options);

  EntryReport report;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    Row& row = rows[i];
    finish(row, field[i].seconds_median(), row.bytes);
    const auto ratio = [&](int other) {
      return other < 0 ? 0.0 : speedup(field[i], field[static_cast<std::size_t>(other)]);
    };
    row.ratio_openblas = ratio(openblas);
    row.ratio_eigen = ratio(eigen);
    // The faster of its int8 products.
    if (!onednn_int8.empty()) {
      const auto best = std::min_element(onednn_int8.begin(), onednn_int8.end(), [&](int a, int b) {
        return field[static_cast<std::size_t>(a)].seconds_median() <
               field[static_cast<std::size_t>(b)].seconds_median();
      });
      row.ratio_onednn = ratio(*best);
    }
    if (row.suite == "gemm") relate_to_limit(row);
    report.seconds += row.seconds;
    std::string name = row.kernel;
    if (row.group_size != 0) name += "_g" + std::to_string(row.group_size) + "_" + row.symmetry;
    if (!row.isa.empty()) name += "/" + row.isa;
    report.counters.emplace_back(name, row.gops);
    results().rows.push_back(row);
  }
  return report;
}

struct Plan {
  Shape shape;
  std::vector<std::int64_t> tokens;
};

std::vector<Plan> plans() {
  std::vector<Plan> list;
  if (options().quick)
    list = {{{576, 576}, {1, 64}}, {{4096, 4096}, {1, 4, 16, 512}}};
  else
    list = {{{576, 576}, {1, 4, 16, 64, 512}},
            {{4096, 4096}, {1, 4, 16, 64, 512}},
            {{11008, 4096}, {1, 4, 16, 64, 512}},
            {{16384, 8192}, {1, 4}}};
  if (!options().shapes.empty()) {
    const std::vector<std::int64_t> tokens = list[1].tokens;
    list.clear();
    for (const Shape& shape : options().shapes) list.push_back({shape, tokens});
  }
  if (!options().tokens.empty())
    for (Plan& plan : list) plan.tokens = options().tokens;
  return list;
}

std::string text_of(Shape shape) { return std::to_string(shape.n) + "x" + std::to_string(shape.k); }

/// Bytes that the system could give to this process; 0 where it does not say.
double available_memory() {
  std::ifstream file("/proc/meminfo");
  for (std::string field; file >> field;) {
    double kilobytes = 0;
    if (field == "MemAvailable:" && file >> kilobytes) return kilobytes * 1024;
  }
  return 0;
}

// Sweeps: no number of tokens and no shape may fall off a cliff.

std::vector<const Spec*> sweep_specs() {
  std::vector<const Spec*> specs;
  for (const Spec& spec : all_specs()) {
    const std::string kernel = spec.kernel;
    const bool wanted = kernel == "w8a8" || kernel == "w4a16" || kernel == "fp32" ||
                        (kernel == "w4a8" && spec.scheme.granularity.group_size == 32 &&
                         spec.scheme.symmetry == Symmetry::symmetric);
    if (wanted && selected(options().kernels, kernel)) specs.push_back(&spec);
  }
  return specs;
}

// Here the best round counts, not the median: a cliff stands in every round, what disturbs the machine does not.
constexpr double cliff = 0.7;

RaceOptions sweep_race() {
  RaceOptions race_options;
  race_options.sample = options().quick ? 0.001 : 0.003;
  race_options.budget = options().quick ? 6 : 40;
  race_options.max_rounds = options().quick ? 3 : 7;
  return race_options;
}

/// All numbers of tokens in one race: what disturbs the machine for a moment then disturbs one round of many points.
EntryReport sweep_tokens() {
  const Shape shape = options().shapes.empty() ? Shape{4096, 4096} : options().shapes.front();
  constexpr std::int64_t most = 64;
  Bed& bed = bed_of(shape, most);
  const Isa isa = chosen_isas().back();
  std::vector<Competitor> field;
  std::vector<Row> rows;
  for (const Spec* spec : sweep_specs()) {
    for (std::int64_t m = 1; m <= most; m += options().quick && m >= 16 ? 4 : 1) {
      Row row = row_of(*spec, isa, shape, m, 1);
      row.suite = "sweep_tokens";
      bed.multiply(*spec, isa, m, 1);
      row.ok = bed.matches_scalar(*spec, m);
      rows.push_back(row);
      field.push_back({spec->kernel, [&bed, spec, isa, m] { bed.multiply(*spec, isa, m, 1); }, false, {}});
    }
  }
  race(field, sweep_race());
  EntryReport report;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    finish(rows[i], field[i].seconds_best(), 0);
    report.seconds += rows[i].seconds;
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    // A fall from one number of tokens to the next; that few tokens are slower than more is no cliff.
    const bool first = i == 0 || rows[i - 1].kernel != rows[i].kernel;
    const double before = first ? rows[i].gops : rows[i - 1].gops;
    if (rows[i].gops < cliff * before)
      rows[i].note = "CLIFF: " + std::to_string(static_cast<int>(100 * rows[i].gops / before)) +
                     " % of the number of tokens before";
    results().rows.push_back(rows[i]);
  }
  return report;
}

/// Odd shapes, each beside a round one of about its size.
EntryReport sweep_shapes() {
  static const std::vector<std::pair<Shape, Shape>> pairs = {
      {{172, 64}, {176, 64}},       {{64, 172}, {64, 176}},       {{300, 780}, {288, 768}},
      {{577, 571}, {576, 576}},     {{576, 1536}, {512, 1536}},   {{1536, 576}, {1536, 512}},
      {{1009, 1013}, {1008, 1024}}, {{2053, 2039}, {2048, 2048}}, {{4099, 4093}, {4096, 4096}},
      {{49152, 576}, {49152, 512}}, {{5503, 2051}, {5504, 2048}}};
  const Isa isa = chosen_isas().back();
  EntryReport report;
  for (const auto& [odd, round] : pairs) {
    constexpr std::int64_t most = 16;
    Bed odd_bed(odd, most);
    Bed round_bed(round, most);
    std::vector<Competitor> field;
    std::vector<Row> rows;
    for (const Spec* spec : sweep_specs()) {
      for (const std::int64_t m : {std::int64_t{1}, std::int64_t{3}, most}) {
        for (Bed* bed : {&odd_bed, &round_bed}) {
          Row row = row_of(*spec, isa, bed->shape(), m, 1);
          row.suite = "sweep_shapes";
          bed->multiply(*spec, isa, m, 1);
          row.ok = bed->matches_scalar(*spec, m);
          rows.push_back(row);
          field.push_back(
              {spec->kernel, [bed, spec = spec, isa, m] { bed->multiply(*spec, isa, m, 1); }, false, {}});
        }
      }
    }
    RaceOptions race_options = sweep_race();
    race_options.budget /= static_cast<double>(pairs.size());
    race(field, race_options);
    for (std::size_t i = 0; i < rows.size(); i += 2) {
      finish(rows[i], field[i].seconds_best(), 0);
      finish(rows[i + 1], field[i + 1].seconds_best(), 0);
      report.seconds += rows[i].seconds;
      const double share = rows[i].gops / rows[i + 1].gops;
      const int percent = static_cast<int>(100 * share);
      if (share < cliff) rows[i].note = "CLIFF: ";
      rows[i].note += std::to_string(percent) + " % of " + text_of(round);
      results().rows.push_back(rows[i]);
    }
  }
  return report;
}

}  // namespace

void register_gemm() {
  for (const Plan& plan : plans()) {
    const std::int64_t most = *std::max_element(plan.tokens.begin(), plan.tokens.end());
    // All formats and the peers' copies are in memory at once: about 30 bytes a weight.
    const double needed = 30.0 * static_cast<double>(plan.shape.n) * static_cast<double>(plan.shape.k);
    if (const double available = available_memory(); available > 0 && needed > available) {
      std::printf("%s is left out: it takes about %.1f GB of memory, %.1f GB are available\n",
                  text_of(plan.shape).c_str(), needed / 1e9, available / 1e9);
      continue;
    }
    for (const std::int64_t m : plan.tokens) {
      for (const int threads : options().threads) {
        // A quick run asks two threads where they matter most.
        if (options().quick && options().tokens.empty() && threads > 1 && m != 1 && m != 16) continue;
        register_entry(
            "gemm/" + text_of(plan.shape) + "/m:" + std::to_string(m) + "/threads:" + std::to_string(threads),
            [=] { return measure(plan.shape, m, most, threads); });
      }
    }
  }
}

void register_sweep() {
  register_entry("sweep/tokens", sweep_tokens);
  register_entry("sweep/shapes", sweep_shapes);
}

}  // namespace bench
