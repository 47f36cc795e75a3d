// One model in several formats, side by side: size, memory, time, perplexity, speed.
#pragma once

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "svg_plot.hpp"

extern char** environ;

namespace llm {

struct CompareRow {
  std::string format;
  double file_bytes = 0.0;
  double resident_bytes = 0.0;
  double quantize_seconds = 0.0;  // 0: rounded to nearest, not timed
  double load_seconds = 0.0;
  double perplexity = 0.0;
  double change_percent = 0.0;  // against fp32, or the first row where there is none
  double prompt_tokens_per_second = 0.0;
  double decode_tokens_per_second = 0.0;
};

/// A folder that goes, with all in it, at the end of a scope.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "nibble-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make a temporary folder like " + name);
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// Runs this program with other arguments, its output to nowhere, and returns the JSON that it writes. Memory and load
/// time are only worth something in a process that has done nothing else.
inline nlohmann::json run_self(std::vector<std::string> arguments, const std::filesystem::path& json_file) {
  arguments.insert(arguments.begin(), "nibble");
  arguments.insert(arguments.end(), {"--json", json_file.string()});
  std::vector<char*> pointers;
  for (std::string& a : arguments) pointers.push_back(a.data());
  pointers.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t child = 0;
  const int error = ::posix_spawn(&child, "/proc/self/exe", &actions, nullptr, pointers.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) throw std::runtime_error("cannot start nibble " + arguments[1]);
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
    throw std::runtime_error("nibble " + arguments[1] + " failed");
  std::ifstream file(json_file);
  nlohmann::json json = nlohmann::json::parse(file, nullptr, false);
  if (!json.is_object()) throw std::runtime_error("nibble " + arguments[1] + " wrote no JSON");
  return json;
}

inline void fill_changes(std::vector<CompareRow>& rows) {
  if (rows.empty()) return;
  const CompareRow* base = &rows.front();
  for (const CompareRow& r : rows)
    if (r.format == "fp32") base = &r;
  const double reference = base->perplexity;
  for (CompareRow& r : rows) r.change_percent = (r.perplexity / reference - 1.0) * 100.0;
}

inline std::string compare_csv(const std::vector<CompareRow>& rows) {
  std::string csv =
      "format,file_bytes,resident_bytes,load_seconds,perplexity,change_percent,prompt_tokens_per_second,"
      "decode_tokens_per_second\n";
  char line[512];
  for (const CompareRow& r : rows) {
    std::snprintf(line, sizeof line, "%s,%.0f,%.0f,%.4f,%.4f,%.3f,%.1f,%.1f\n", r.format.c_str(), r.file_bytes,
                  r.resident_bytes, r.load_seconds, r.perplexity, r.change_percent, r.prompt_tokens_per_second,
                  r.decode_tokens_per_second);
    csv += line;
  }
  return csv;
}

inline std::string compare_table(const std::vector<CompareRow>& rows) {
  std::string table;
  char line[512];
  std::snprintf(line, sizeof line, "%-32s %10s %12s %8s %11s %9s %11s %11s\n", "format", "file MiB",
                "resident MiB", "load s", "perplexity", "change", "prompt t/s", "decode t/s");
  table += line;
  for (const CompareRow& r : rows) {
    std::snprintf(line, sizeof line, "%-32s %10.1f %12.1f %8.3f %11.3f %+8.2f%% %11.1f %11.1f\n", r.format.c_str(),
                  r.file_bytes / 1048576.0, r.resident_bytes / 1048576.0, r.load_seconds, r.perplexity,
                  r.change_percent, r.prompt_tokens_per_second, r.decode_tokens_per_second);
    table += line;
  }
  return table;
}

inline nlohmann::json compare_json(const std::vector<CompareRow>& rows) {
  nlohmann::json json = nlohmann::json::array();
  for (const CompareRow& r : rows)
    json.push_back({{"format", r.format},
                    {"file_bytes", r.file_bytes},
                    {"resident_bytes", r.resident_bytes},
                    {"quantize_seconds", r.quantize_seconds},
                    {"load_seconds", r.load_seconds},
                    {"perplexity", r.perplexity},
                    {"change_percent", r.change_percent},
                    {"prompt_tokens_per_second", r.prompt_tokens_per_second},
                    {"decode_tokens_per_second", r.decode_tokens_per_second}});
  return json;
}

inline std::string compare_svg(const std::vector<CompareRow>& rows, const std::string& model) {
  std::vector<PlotPoint> points;
  for (const CompareRow& r : rows) points.push_back({r.file_bytes / 1048576.0, r.perplexity, r.format});
  return scatter_svg(model + ": size and perplexity", "file, MiB", "perplexity", points, pareto_front(points));
}

}  // namespace llm
