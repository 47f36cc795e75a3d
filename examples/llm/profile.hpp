// Where a runner's time goes, operation by operation, and what of the machine's limits each of them reaches.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "machine_limits.hpp"

namespace llm {

enum class Operation : std::size_t {
  embedding,
  norm,
  quantize,
  qkv,
  rope,
  attention,
  attention_output,
  gate_up,
  down,
  output_layer,
  sampling,
};
inline constexpr std::size_t operation_count = 11;

constexpr const char* name_of(Operation o) {
  constexpr const char* names[operation_count] = {"embedding",
                                                  "norms",
                                                  "activation quantization",
                                                  "q, k, v",
                                                  "rope, KV store",
                                                  "attention",
                                                  "attention's output",
                                                  "gate, up",
                                                  "down",
                                                  "output layer",
                                                  "sampling"};
  return names[static_cast<std::size_t>(o)];
}

/// What an operation has to do: the bytes that it must read from memory, and its multiplications and additions.
struct Work {
  double bytes = 0.0;
  double integer_operations = 0.0;
  double float_operations = 0.0;

  Work& operator+=(const Work& o) {
    bytes += o.bytes;
    integer_operations += o.integer_operations;
    float_operations += o.float_operations;
    return *this;
  }
};

/// Sums of time and work. A runner whose options name one adds to it.
class Profile {
 public:
  struct Line {
    double seconds = 0.0;
    Work work;
  };

  void add(Operation o, double seconds, const Work& work) {
    Line& line = lines_[static_cast<std::size_t>(o)];
    line.seconds += seconds;
    line.work += work;
  }
  void clear() { lines_ = {}; }
  const Line& line(Operation o) const { return lines_[static_cast<std::size_t>(o)]; }
  double seconds() const {
    double sum = 0.0;
    for (const Line& line : lines_) sum += line.seconds;
    return sum;
  }

 private:
  std::array<Line, operation_count> lines_{};
};

/// Gives the time since its last lap to an operation; without a profile it does nothing.
class ProfileClock {
 public:
  explicit ProfileClock(Profile* profile) : profile_(profile) {
    if (profile_ != nullptr) last_ = limits_detail::seconds_now();
  }
  bool runs() const { return profile_ != nullptr; }
  void lap(Operation o, const Work& work = {}) {
    if (profile_ == nullptr) return;
    const double now = limits_detail::seconds_now();
    profile_->add(o, now - last_, work);
    last_ = now;
  }

 private:
  Profile* profile_;
  double last_ = 0.0;
};

/// The limit that binds an operation: what takes longest of reading its bytes and doing its arithmetic.
struct Bound {
  const char* loop = "";  // "read", "integer" or "fma"
  double percent = 0.0;   // of the time spent, how much it would take at the limit
};

inline Bound bound_of(const Profile::Line& line, const MachineLimits& limits) {
  const auto time = [](double work, double rate) { return rate > 0.0 ? work / rate * 1e-9 : 0.0; };
  const double read = time(line.work.bytes, limits.read_gbps);
  const double integer = time(line.work.integer_operations, limits.integer_gops);
  const double fma = time(line.work.float_operations, limits.float_gops);
  const double most = std::max({read, integer, fma});
  if (most == 0.0 || line.seconds == 0.0) return {};
  return {most == read ? "read" : most == integer ? "integer" : "fma", 100.0 * most / line.seconds};
}

/// The table: operations that took time, with their share, rates and percent of the limit that binds them.
inline std::string profile_table(const Profile& profile, const MachineLimits& limits) {
  std::string table;
  char text[160];
  std::snprintf(text, sizeof text, "%-24s %10s %8s %10s %10s %16s\n", "operation", "ms", "share", "GOP/s", "GB/s",
                "of limit");
  table += text;
  const double total = profile.seconds();
  const auto row = [&](const char* name, const Profile::Line& line) {
    const double per_second = line.seconds > 0.0 ? 1e-9 / line.seconds : 0.0;
    char gops[24] = "-", gbps[24] = "-", limit[40] = "-";
    const double ops = (line.work.integer_operations + line.work.float_operations) * per_second;
    if (ops > 0.0) std::snprintf(gops, sizeof gops, "%.1f", ops);
    if (line.work.bytes > 0.0) std::snprintf(gbps, sizeof gbps, "%.2f", line.work.bytes * per_second);
    if (const Bound bound = bound_of(line, limits); bound.percent > 0.0)
      std::snprintf(limit, sizeof limit, "%.1f %% %s", bound.percent, bound.loop);
    std::snprintf(text, sizeof text, "%-24s %10.3f %7.1f%% %10s %10s %16s\n", name, line.seconds * 1e3,
                  total > 0.0 ? 100.0 * line.seconds / total : 0.0, gops, gbps, limit);
    table += text;
  };
  Profile::Line all;
  for (std::size_t o = 0; o < operation_count; ++o) {
    const Profile::Line& line = profile.line(static_cast<Operation>(o));
    if (line.seconds == 0.0) continue;
    row(name_of(static_cast<Operation>(o)), line);
    all.seconds += line.seconds;
    all.work += line.work;
  }
  row("all", all);
  return table;
}

inline nlohmann::json profile_json(const Profile& profile, const MachineLimits& limits) {
  nlohmann::json json = nlohmann::json::array();
  const double total = profile.seconds();
  for (std::size_t o = 0; o < operation_count; ++o) {
    const Profile::Line& line = profile.line(static_cast<Operation>(o));
    if (line.seconds == 0.0) continue;
    const Bound bound = bound_of(line, limits);
    json.push_back({{"operation", name_of(static_cast<Operation>(o))},
                    {"seconds", line.seconds},
                    {"share", total > 0.0 ? line.seconds / total : 0.0},
                    {"bytes", line.work.bytes},
                    {"integer_operations", line.work.integer_operations},
                    {"float_operations", line.work.float_operations},
                    {"limit", bound.loop},
                    {"percent_of_limit", bound.percent}});
  }
  return json;
}

}  // namespace llm
