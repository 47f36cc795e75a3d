// The program: options, Google Benchmark as the runner, the table on the terminal and the JSON file.
//
// Google Benchmark repeats one entry before it turns to the next, so a noisy second falls on one competitor. Entries
// here run once, with manual time: what they report is the median of interleaved rounds (race) over all competitors.
#include "bench.hpp"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <utility>

#include "peers.hpp"

namespace bench {

Options& options() {
  static Options instance;
  return instance;
}

Results& results() {
  static Results instance;
  return instance;
}

bool selected(const std::vector<std::string>& names, const std::string& name) {
  return names.empty() || std::find(names.begin(), names.end(), name) != names.end();
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 != 0 ? values[half] : (values[half - 1] + values[half]) / 2;
}

double speedup(const Competitor& self, const Competitor& other) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < std::min(self.seconds.size(), other.seconds.size()); ++i)
    ratios.push_back(other.seconds[i] / self.seconds[i]);
  return median(ratios);
}

void race(std::vector<Competitor>& competitors, const RaceOptions& race_options) {
  // Longer than OpenBLAS's and OpenMP's threads spin by default.
  constexpr auto rest = std::chrono::milliseconds(40);
  constexpr double long_call = 0.05;
  std::vector<std::size_t> calls(competitors.size(), 1);
  std::vector<double> estimate(competitors.size());
  double round_seconds = 0;
  for (std::size_t i = 0; i < competitors.size(); ++i) {
    const auto& call = competitors[i].call;
    double seconds = seconds_of(call);
    if (seconds < long_call) seconds = seconds_of(call);
    calls[i] = static_cast<std::size_t>(std::clamp(race_options.sample / seconds, 1.0, 1e6));
    estimate[i] = seconds;
    round_seconds += seconds * static_cast<double>(calls[i] + (seconds < long_call ? 1 : 0));
  }
  const double affordable = race_options.budget / std::max(round_seconds, 1e-9);
  const std::size_t rounds = static_cast<std::size_t>(std::clamp(
      affordable, static_cast<double>(race_options.min_rounds), static_cast<double>(race_options.max_rounds)));
  const bool any_lingers =
      std::any_of(competitors.begin(), competitors.end(), [](const Competitor& c) { return c.lingers; });
  for (std::size_t round = 0; round < rounds; ++round) {
    bool lingering = any_lingers;
    for (std::size_t j = 0; j < competitors.size(); ++j) {
      const std::size_t i = (j + round * competitors.size() / rounds) % competitors.size();
      Competitor& competitor = competitors[i];
      if (lingering) std::this_thread::sleep_for(rest);
      lingering = competitor.lingers;
      if (estimate[i] < long_call) competitor.call();
      // In eight parts, so that a sample which turns out much longer than expected ends early.
      double seconds = 0;
      std::size_t done = 0;
      for (int part = 1; part <= 8 && seconds < 4 * race_options.sample; ++part) {
        const std::size_t until = std::max<std::size_t>(1, calls[i] * static_cast<std::size_t>(part) / 8);
        if (until == done) continue;
        seconds += seconds_of([&] {
          for (; done < until; ++done) competitor.call();
        });
      }
      competitor.seconds.push_back(seconds / static_cast<double>(done));
    }
  }
}

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  std::map<std::string, std::string> fields;
  for (std::string line; std::getline(file, line) && !line.empty();) {
    const auto colon = line.find(':');
    if (colon == std::string::npos) continue;
    const auto end = line.find_last_not_of(" \t", colon - 1);
    fields[line.substr(0, end + 1)] = colon + 2 < line.size() ? line.substr(colon + 2) : "";
  }
  std::string name = fields.count("model name") != 0 ? fields["model name"] : "unknown CPU";
  // Virtual machines often hide the model's name; family and model still tell the microarchitecture.
  if (fields.count("cpu family") != 0)
    name += " (family " + fields["cpu family"] + ", model " + fields["model"] + ")";
  return name;
}

std::string huge_pages_setting() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string text;
  std::getline(file, text);
  const auto open = text.find('[');
  const auto close = text.find(']');
  return open == std::string::npos || close == std::string::npos ? "unknown"
                                                                 : text.substr(open + 1, close - open - 1);
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  char text[32];
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 32 ? ' ' : c;
  }
  return out + '"';
}

std::string number(double value, int digits = 4) {
  char text[40];
  std::snprintf(text, sizeof text, "%.*g", digits, value);
  return text;
}

/// A figure, or null where it was not measured.
std::string number_or_null(double value, int digits = 4) { return value > 0 ? number(value, digits) : "null"; }

std::string ratio_text(double ratio) {
  if (ratio <= 0) return "-";
  char text[16];
  std::snprintf(text, sizeof text, "%.2f", ratio);
  return text;
}

std::string row_json(const Row& row, const std::string& cpu, const std::string& date) {
  std::ostringstream out;
  out << "{\"kernel\": " << quoted(row.kernel) << ", \"isa\": " << quoted(row.isa)
      << ", \"group_size\": " << row.group_size
      << ", \"symmetric\": " << (row.symmetry.empty() || row.symmetry == "symmetric" ? "true" : "false")
      << ", \"symmetry\": " << (row.symmetry.empty() ? "null" : quoted(row.symmetry)) << ", \"m\": " << row.m
      << ", \"n\": " << row.n << ", \"k\": " << row.k << ", \"threads\": " << row.threads
      << ", \"seconds\": " << number(row.seconds, 6) << ", \"gops\": " << number_or_null(row.gops)
      << ", \"gbps\": " << number(row.gbps) << ", \"ratio_openblas\": " << number_or_null(row.ratio_openblas)
      << ", \"ratio_eigen\": " << number_or_null(row.ratio_eigen)
      << ", \"ratio_onednn\": " << number_or_null(row.ratio_onednn)
      << ", \"percent_of_limit\": " << number_or_null(row.percent_of_limit)
      << ", \"limit\": " << (row.limit.empty() ? "null" : quoted(row.limit))
      << ", \"equals_scalar\": " << (row.ok ? "true" : "false")
      << ", \"note\": " << (row.note.empty() ? "null" : quoted(row.note)) << ", \"cpu\": " << quoted(cpu)
      << ", \"date\": " << quoted(date) << "}";
  return out.str();
}

void write_rows(std::ostream& out, const char* key, const std::string& suite, const std::string& cpu,
                const std::string& date) {
  out << "  " << quoted(key) << ": [";
  const char* separator = "\n    ";
  for (const Row& row : results().rows) {
    if (row.suite != suite) continue;
    out << separator << row_json(row, cpu, date);
    separator = ",\n    ";
  }
  out << "\n  ]";
}

/// Prints rows as they come: a heading a group, a line a row.
class TableReporter : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override {
    std::printf("CPU: %s, %u cores; large pages: %s\n", cpu_name().c_str(), std::thread::hardware_concurrency(),
                huge_pages_setting().c_str());
    std::printf("Eigen %s", peers::eigen_version().c_str());
    if (peers::openblas_available()) std::printf(", OpenBLAS %s", peers::openblas_version().c_str());
    if (peers::onednn_available()) std::printf(", oneDNN %s", peers::onednn_version().c_str());
    std::printf(
        "\nAll figures: medians of interleaved rounds; Nibble's times include quantization and epilogue.\n");
    return true;
  }

  void ReportRuns(const std::vector<Run>&) override {
    for (; limits_ < results().limits.size(); ++limits_) print(results().limits[limits_]);
    for (; rows_ < results().rows.size(); ++rows_) print(results().rows[rows_]);
    std::fflush(stdout);
  }

 private:
  void heading(const std::string& text, const char* columns) {
    if (text == heading_) return;
    heading_ = text;
    std::printf("\n%s\n%s\n", text.c_str(), columns);
  }

  void print(const LimitRow& limit) {
    heading("limits of this machine", "  loop                       threads     GOP/s      GB/s");
    if (limit.gops > 0)
      std::printf("  %-26s %7d %9.1f\n", limit.name.c_str(), limit.threads, limit.gops);
    else
      std::printf("  read %8.3f MB %18d %19.1f   (%s)\n", limit.megabytes, limit.threads, limit.gbps,
                  limit.note.c_str());
  }

  void print(const Row& row) {
    char title[160];
    if (row.suite == "quantize") {
      heading("quantize, dequantize, pack: GB/s read and written, beside a copy loop",
              "  operation           format                        GB/s  % of copy  note");
      std::printf("  %-19s %-26s %7.2f %9.0f%%  %s\n", row.kernel.c_str(), row.format.c_str(), row.gbps,
                  row.percent_of_limit, row.note.c_str());
      return;
    }
    if (row.suite == "ptq") {
      std::snprintf(title, sizeof title, "post-training quantization of %lld x %lld, %d thread%s",
                    static_cast<long long>(row.n), static_cast<long long>(row.k), row.threads,
                    row.threads == 1 ? "" : "s");
      heading(title, "  phase             format           seconds   GFLOP/s  % of gemm");
      std::printf("  %-17s %-14s %9.3f", row.kernel.c_str(), row.format.c_str(), row.seconds);
      if (row.gops > 0) std::printf(" %9.1f %9.0f%%", row.gops, row.percent_of_limit);
      std::printf("\n");
      return;
    }
    if (row.suite == "sweep_tokens" || row.suite == "sweep_shapes") {
      heading(row.suite == "sweep_tokens" ? "sweep over tokens" : "sweep over odd shapes",
              "  kernel  group isa           n x k              m     GOP/s  note");
      char shape[40];
      std::snprintf(shape, sizeof shape, "%lld x %lld", static_cast<long long>(row.n),
                    static_cast<long long>(row.k));
      std::printf("  %-7s %5lld %-12s  %-16s %4lld %9.1f  %s\n", row.kernel.c_str(),
                  static_cast<long long>(row.group_size), row.isa.c_str(), shape, static_cast<long long>(row.m),
                  row.gops, row.note.c_str());
      return;
    }
    std::snprintf(title, sizeof title, "%lld x %lld, m = %lld, %d thread%s", static_cast<long long>(row.n),
                  static_cast<long long>(row.k), static_cast<long long>(row.m), row.threads,
                  row.threads == 1 ? "" : "s");
    heading(
        title,
        "  kernel           weights             isa          GOP/s    GB/s  xOpenBLAS  xEigen xoneDNN  %limit");
    char weights[40] = "";
    if (row.group_size != 0)
      std::snprintf(weights, sizeof weights, "g%lld %s", static_cast<long long>(row.group_size),
                    row.symmetry.c_str());
    else if (!row.symmetry.empty())
      std::snprintf(weights, sizeof weights, "channel %s", row.symmetry.c_str());
    std::printf("  %-16s %-19s %-10s %7.1f %7.1f  %9s %7s %7s", row.kernel.c_str(), weights, row.isa.c_str(),
                row.gops, row.gbps, ratio_text(row.ratio_openblas).c_str(), ratio_text(row.ratio_eigen).c_str(),
                ratio_text(row.ratio_onednn).c_str());
    if (row.percent_of_limit > 0) std::printf(" %6.0f%% %s", row.percent_of_limit, row.limit.c_str());
    if (!row.note.empty()) std::printf("  %s", row.note.c_str());
    if (!row.ok) std::printf("  WRONG: differs from the scalar kernel");
    std::printf("\n");
  }

  std::size_t limits_ = 0;
  std::size_t rows_ = 0;
  std::string heading_;
};

/// What rows say together: two threads against one, four tokens against one. A line a kernel and shape.
void print_scaling() {
  const auto same_product = [](const Row& a, const Row& b) {
    return a.suite == "gemm" && b.suite == "gemm" && a.kernel == b.kernel && a.isa == b.isa &&
           a.group_size == b.group_size && a.symmetry == b.symmetry && a.n == b.n && a.k == b.k;
  };
  const std::vector<Row>& rows = results().rows;
  const auto print = [&](const char* title, auto&& is_pair, auto&& text_of) {
    bool titled = false;
    std::vector<bool> told(rows.size(), false);
    for (std::size_t first = 0; first < rows.size(); ++first) {
      if (told[first]) continue;
      std::string line;
      for (std::size_t i = first; i < rows.size(); ++i) {
        if (!same_product(rows[first], rows[i])) continue;
        told[i] = true;
        for (const Row& other : rows)
          if (same_product(rows[i], other) && is_pair(rows[i], other)) line += text_of(rows[i], other);
      }
      if (line.empty()) continue;
      if (!titled) std::printf("\n%s\n", title);
      titled = true;
      const Row& row = rows[first];
      const std::string shape = std::to_string(row.n) + " x " + std::to_string(row.k);
      std::printf("  %-10s g%-4lld %-13s %-11s %-13s%s\n", row.kernel.c_str(),
                  static_cast<long long>(row.group_size), row.symmetry.c_str(), row.isa.c_str(), shape.c_str(),
                  line.c_str());
    }
  };
  print(
      "two threads, times as fast as one",
      [](const Row& two, const Row& one) { return two.threads == 2 && one.threads == 1 && two.m == one.m; },
      [](const Row& two, const Row& one) {
        return "  m=" + std::to_string(two.m) + ": " + ratio_text(one.seconds / two.seconds);
      });
  print(
      "time for four tokens, in times of that for one",
      [](const Row& four, const Row& one) { return four.m == 4 && one.m == 1 && four.threads == one.threads; },
      [](const Row& four, const Row& one) {
        return "  threads=" + std::to_string(four.threads) + ": " + ratio_text(four.seconds / one.seconds);
      });
}

const char usage[] =
    "usage: nibble_benchmarks [OPTION ...] [--benchmark_... options of Google Benchmark]\n"
    "\n"
    "  --quick             about a minute: fewer shapes, tokens and rounds\n"
    "  --json FILE         all rows\n"
    "  --svg DIR           draws roofline.svg, sweep_tokens.svg and sweep_shapes.svg (adds the sweeps)\n"
    "  --suite LIST        of limits,gemm,quantize,sweep,ptq (limits,gemm,quantize)\n"
    "  --kernels LIST      of w8a8,w6a8,w5a8,w4a8,w3a8,w2a8,w4a16,w3a16,w8a16,nf4,fp16,bf16,bf16_bf16,fp32,\n"
    "                      fp32_dense (all)\n"
    "  --isas LIST         names of ISAs, e.g. avx2,avx512vnni (avx2 and the best that this CPU runs)\n"
    "  --shapes LIST       such as 4096x4096,576x576: outputs x inputs\n"
    "  --tokens LIST       such as 1,16,512\n"
    "  --threads LIST      such as 1,2\n";

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "nibble_benchmarks: %s (--help)\n", message.c_str());
  std::exit(2);
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::istringstream in(list);
  for (std::string part; std::getline(in, part, ',');)
    if (!part.empty()) parts.push_back(part);
  return parts;
}

std::int64_t positive(const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 1 || value > (1LL << 30))
    fail("'" + text + "' is no positive number");
  return value;
}

void parse(int argc, char** argv) {
  Options& o = options();
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--quick") {
      o.quick = true;
      continue;
    }
    if (name == "--help" || name == "-h") {
      std::fputs(usage, stdout);
      std::exit(0);
    }
    static const char* const known[] = {"--json", "--svg",    "--suite",  "--kernels",
                                        "--isas", "--shapes", "--tokens", "--threads"};
    if (std::none_of(std::begin(known), std::end(known), [&](const char* k) { return name == k; }))
      fail("unknown option '" + name + "'");
    if (i + 1 >= argc) fail(name + " needs a value");
    const std::string value = argv[++i];
    if (name == "--json") o.json = value;
    if (name == "--svg") o.svg = value;
    if (name == "--suite") o.suites = split(value);
    if (name == "--kernels") o.kernels = split(value);
    if (name == "--isas") o.isas = split(value);
    if (name == "--tokens")
      for (const std::string& part : split(value)) o.tokens.push_back(positive(part));
    if (name == "--threads")
      for (const std::string& part : split(value)) o.threads.push_back(static_cast<int>(positive(part)));
    if (name == "--shapes") {
      for (const std::string& part : split(value)) {
        const auto x = part.find('x');
        if (x == std::string::npos) fail("'" + part + "' is no shape such as 4096x4096");
        o.shapes.push_back({positive(part.substr(0, x)), positive(part.substr(x + 1))});
      }
    }
  }
  if (o.suites.empty()) {
    o.suites = {"limits", "gemm", "quantize"};
    if (!o.svg.empty()) o.suites.emplace_back("sweep");
  }
  for (const std::string& suite : o.suites)
    if (suite != "limits" && suite != "gemm" && suite != "quantize" && suite != "sweep" && suite != "ptq")
      fail("unknown suite '" + suite + "'");
  // Better now than after ten minutes.
  if (!o.json.empty() && !std::ofstream(o.json, std::ios::app)) fail("cannot write " + o.json);
  if (!o.svg.empty()) {
    std::error_code error;
    std::filesystem::create_directories(o.svg, error);
    if (error) fail("cannot make the folder " + o.svg);
  }
  if (o.threads.empty()) {
    o.threads = {1};
    if (std::thread::hardware_concurrency() > 1) o.threads.push_back(2);
  }
}

}  // namespace

void register_entry(const std::string& name, std::function<EntryReport()> run) {
  benchmark::RegisterBenchmark(name.c_str(),
                               [run = std::move(run)](benchmark::State& state) {
                                 for (auto _ : state) {
                                   const EntryReport report = run();
                                   state.SetIterationTime(report.seconds);
                                   for (const auto& [counter, value] : report.counters)
                                     state.counters[counter] = value;
                                 }
                               })
      ->Iterations(1)
      ->UseManualTime();
}

void write_json(const std::string& path) {
  std::ofstream out(path);
  const std::string cpu = cpu_name();
  const std::string date = utc_now();
  out << "{\n  \"cpu\": " << quoted(cpu) << ",\n  \"date\": " << quoted(date)
      << ",\n  \"cores\": " << std::thread::hardware_concurrency()
      << ",\n  \"large_pages\": " << quoted(huge_pages_setting())
      << ",\n  \"quick\": " << (options().quick ? "true" : "false")
      << ",\n  \"eigen\": " << quoted(peers::eigen_version())
      << ",\n  \"openblas\": " << (peers::openblas_available() ? quoted(peers::openblas_version()) : "null")
      << ",\n  \"onednn\": " << (peers::onednn_available() ? quoted(peers::onednn_version()) : "null")
      << ",\n  \"limits\": [";
  const char* separator = "\n    ";
  for (const LimitRow& limit : results().limits) {
    out << separator << "{\"loop\": " << quoted(limit.name) << ", \"threads\": " << limit.threads
        << ", \"gops\": " << number_or_null(limit.gops) << ", \"gbps\": " << number_or_null(limit.gbps)
        << ", \"megabytes\": " << number_or_null(limit.megabytes)
        << ", \"variant\": " << (limit.note.empty() ? "null" : quoted(limit.note)) << "}";
    separator = ",\n    ";
  }
  out << "\n  ],\n";
  write_rows(out, "rows", "gemm", cpu, date);
  out << ",\n";
  write_rows(out, "peers", "peer", cpu, date);
  out << ",\n  \"quantize\": [";
  separator = "\n    ";
  for (const Row& row : results().rows) {
    if (row.suite != "quantize") continue;
    out << separator << "{\"operation\": " << quoted(row.kernel) << ", \"format\": " << quoted(row.format)
        << ", \"isa\": " << quoted(row.isa) << ", \"rows\": " << row.n << ", \"cols\": " << row.k
        << ", \"threads\": " << row.threads << ", \"seconds\": " << number(row.seconds, 6)
        << ", \"gbps\": " << number(row.gbps) << ", \"percent_of_copy\": " << number_or_null(row.percent_of_limit)
        << "}";
    separator = ",\n    ";
  }
  out << "\n  ],\n  \"ptq\": [";
  separator = "\n    ";
  for (const Row& row : results().rows) {
    if (row.suite != "ptq") continue;
    out << separator << "{\"phase\": " << quoted(row.kernel) << ", \"format\": " << quoted(row.format)
        << ", \"n\": " << row.n << ", \"k\": " << row.k << ", \"threads\": " << row.threads
        << ", \"seconds\": " << number(row.seconds, 6) << ", \"gflops\": " << number_or_null(row.gops)
        << ", \"percent_of_gemm\": " << number_or_null(row.percent_of_limit) << "}";
    separator = ",\n    ";
  }
  out << "\n  ],\n";
  write_rows(out, "sweep_tokens", "sweep_tokens", cpu, date);
  out << ",\n";
  write_rows(out, "sweep_shapes", "sweep_shapes", cpu, date);
  out << "\n}\n";
  out.flush();
  if (!out) {
    std::fprintf(stderr, "nibble_benchmarks: cannot write %s\n", path.c_str());
    std::exit(1);
  }
}

}  // namespace bench

int main(int argc, char** argv) {
  // Google Benchmark takes its own options out; ours are left.
  if (argc > 1 && (std::strcmp(argv[1], "--help") == 0 || std::strcmp(argv[1], "-h") == 0))
    bench::parse(argc, argv);
  benchmark::Initialize(&argc, argv);
  bench::parse(argc, argv);
  const auto start = bench::Clock::now();
  const auto wanted = [](const char* suite) { return bench::selected(bench::options().suites, suite); };
  if (wanted("limits")) bench::register_limits();
  if (wanted("gemm")) bench::register_gemm();
  if (wanted("quantize")) bench::register_quantize();
  if (wanted("sweep")) bench::register_sweep();
  if (wanted("ptq")) bench::register_ptq();
  bench::TableReporter reporter;
  benchmark::RunSpecifiedBenchmarks(&reporter);
  benchmark::Shutdown();
  bench::print_scaling();
  if (!bench::options().json.empty()) bench::write_json(bench::options().json);
  if (!bench::options().svg.empty()) bench::write_svg(bench::options().svg);
  int wrong = 0;
  for (const bench::Row& row : bench::results().rows) wrong += row.ok ? 0 : 1;
  std::printf("\n%zu rows in %.0f s", bench::results().rows.size(),
              std::chrono::duration<double>(bench::Clock::now() - start).count());
  if (!bench::options().json.empty()) std::printf(", written to %s", bench::options().json.c_str());
  std::printf("\n");
  if (wrong != 0) std::printf("%d of them DIFFER from the scalar kernels\n", wrong);
  return wrong == 0 ? 0 : 1;
}
