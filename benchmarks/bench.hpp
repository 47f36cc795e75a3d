// What all benchmarks share: options, the race that times competitors side by side, rows of results.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace bench {

struct Shape {
  std::int64_t n = 0;  // outputs
  std::int64_t k = 0;  // inputs
};

struct Options {
  bool quick = false;
  std::string json;                  // file, or empty
  std::string svg;                   // folder, or empty
  std::vector<std::string> suites;   // limits, gemm, quantize, sweep, ptq
  std::vector<std::string> kernels;  // empty: all
  std::vector<std::string> isas;     // empty: avx2 and the best that the machine has
  std::vector<Shape> shapes;         // empty: the suite's
  std::vector<std::int64_t> tokens;  // empty: the suite's
  std::vector<int> threads;          // empty: 1 and 2 (or 1 where there is one core)
};

/// The options of this process.
Options& options();
bool selected(const std::vector<std::string>& names, const std::string& name);

using Clock = std::chrono::steady_clock;

template <class F>
double seconds_of(F&& f) {
  const auto start = Clock::now();
  f();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double median(std::vector<double> values);

/// One that takes part in a race.
struct Competitor {
  std::string name;
  std::function<void()> call;
  /// Its threads go on spinning for a while after a call, on cores that the next one needs.
  bool lingers = false;
  std::vector<double> seconds;  // a call, one value a round

  double seconds_median() const { return median(seconds); }
  double seconds_best() const { return *std::min_element(seconds.begin(), seconds.end()); }
};

/// How long a race takes.
struct RaceOptions {
  double sample = 0.01;  // seconds that one competitor is timed for in a round, at least one call
  double budget = 15;    // seconds for all rounds, once the fewest are done
  std::size_t min_rounds = 3;
  std::size_t max_rounds = 9;
};

/// Interleaved rounds: in every round each competitor is called once untimed (unless a call is long) and then timed
/// over as many calls as fill a sample; the order rotates from round to round.
void race(std::vector<Competitor>& competitors, const RaceOptions& race_options);

/// Median over the rounds of (seconds of `other`) / (seconds of `self`): how many times faster self is.
double speedup(const Competitor& self, const Competitor& other);

/// A line of results.
struct Row {
  std::string suite;  // gemm, peer, quantize, sweep_tokens, sweep_shapes, ptq
  std::string kernel;
  std::string isa;
  std::int64_t group_size = 0;  // 0: one scale a channel, or none
  std::string symmetry;         // empty for float formats
  std::string format;           // of the suites quantize and ptq
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  int threads = 1;
  double seconds = 0;
  double gops = 0;
  double gbps = 0;
  double bytes = 0;           // moved by one call
  double ratio_openblas = 0;  // 0: not measured
  double ratio_eigen = 0;
  double ratio_onednn = 0;
  double percent_of_limit = 0;  // 0: no limit known
  std::string limit;            // the loop that is the limit
  std::string note;
  bool ok = true;  // equals the scalar kernels
};

/// One loop of the limits.
struct LimitRow {
  std::string name;
  int threads = 1;
  double gops = 0;       // instruction mixes
  double gbps = 0;       // reads
  double megabytes = 0;  // reads
  std::string note;
};

/// Everything measured so far.
struct Results {
  std::vector<LimitRow> limits;
  std::vector<Row> rows;
};
Results& results();

std::string cpu_name();
/// "always", "madvise" or "never": whether plain allocations get large pages.
std::string huge_pages_setting();
std::string utc_now();

void write_json(const std::string& path);
void write_svg(const std::string& folder);  // which exists

/// Ops of a product: a multiply and an add each.
inline double ops_of(std::int64_t m, std::int64_t n, std::int64_t k) {
  return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}

// Suites: each registers its Google Benchmark entries.
void register_limits();
void register_gemm();
void register_sweep();
void register_quantize();
void register_ptq();

/// What an entry tells Google Benchmark: its time, and figures by name. The rows go into results().
struct EntryReport {
  double seconds = 0;
  std::vector<std::pair<std::string, double>> counters;
};
void register_entry(const std::string& name, std::function<EntryReport()> run);

}  // namespace bench
