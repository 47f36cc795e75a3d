// What a quantization run cost and what it did to each matrix.
#pragma once

#include <sys/resource.h>

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "../machine_limits.hpp"

namespace llm {

/// Seconds by phase, in the order in which the phases first came.
class PhaseTimer {
 public:
  /// The time since the last mark belongs to `phase`.
  void mark(const std::string& phase) {
    const double now = limits_detail::seconds_now();
    double* spent = nullptr;
    for (auto& entry : spent_)
      if (entry.first == phase) spent = &entry.second;
    if (spent == nullptr) spent = &spent_.emplace_back(phase, 0.0).second;
    *spent += now - last_;
    last_ = now;
  }
  const std::vector<std::pair<std::string, double>>& spent() const { return spent_; }
  nlohmann::json to_json() const {
    nlohmann::json json = nlohmann::json::object();
    for (const auto& entry : spent_) json[entry.first] = entry.second;
    return json;
  }

 private:
  double last_ = limits_detail::seconds_now();
  std::vector<std::pair<std::string, double>> spent_;
};

/// The most memory that this process has had at once, bytes.
inline std::size_t peak_memory() {
  struct rusage usage;
  return ::getrusage(RUSAGE_SELF, &usage) == 0 ? static_cast<std::size_t>(usage.ru_maxrss) * 1024 : 0;
}

/// One quantized matrix.
struct TensorReport {
  std::string name;
  std::string format;
  std::string method;
  double weight_error = 0.0;  // |Q - W|^2 / |W|^2
  double output_error = 0.0;  // |(Q - W) X~|^2 / |W X~|^2 over the calibration tokens; 0 where there are none
  std::size_t bytes = 0;      // codes, scales and zero points
  std::string note{};         // what went otherwise than asked

  nlohmann::json to_json() const {
    nlohmann::json json = {{"name", name},
                           {"format", format},
                           {"method", method},
                           {"weight_error", weight_error},
                           {"output_error", output_error},
                           {"bytes", bytes}};
    if (!note.empty()) json["note"] = note;
    return json;
  }
  static TensorReport of(const nlohmann::json& json) {
    return {json.at("name").get<std::string>(),    json.at("format").get<std::string>(),
            json.at("method").get<std::string>(),  json.at("weight_error").get<double>(),
            json.at("output_error").get<double>(), json.at("bytes").get<std::size_t>(),
            json.value("note", std::string())};
  }
};

}  // namespace llm
