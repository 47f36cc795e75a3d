// What the commands of the program share: arguments, a model ready to run, files.
#pragma once

#include <CLI/CLI.hpp>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "../machine_limits.hpp"
#include "../model.hpp"
#include "../model_file.hpp"
#include "../runner.hpp"
#include "../tokenizer.hpp"
#include "nibble/io/atomic_file.hpp"
#include "nibble/nn/kv_cache.hpp"

namespace llm {
namespace commands {

/// What several commands share.
struct Common {
  std::string model;
  std::string json;
  std::string activations = "auto";
  float outlier_threshold = nibble::llm_int8_threshold;
  std::string kv = "fp16";
  int threads = 0;
};

inline nibble::KvFormat kv_format_of(const Common& c) {
  return c.kv == "fp32"   ? nibble::KvFormat::fp32
         : c.kv == "int8" ? nibble::KvFormat::int8
         : c.kv == "int4" ? nibble::KvFormat::int4
                          : nibble::KvFormat::fp16;
}

/// What the arguments say of activations, keys and values. Throws InvalidArgument for static activations where the model
/// has no scales for them.
inline RunnerOptions runner_options(const Common& c, const Model& model) {
  using nibble::Activations;
  RunnerOptions options;
  options.kv_format = kv_format_of(c);
  if (c.activations == "float") options.activations = Activations::fp32;
  if (c.activations == "int8" || c.activations == "llm-int8") options.activations = Activations::int8_grouped;
  if (c.activations == "int8-token") options.activations = Activations::int8;
  if (c.activations == "llm-int8") options.outlier_threshold = c.outlier_threshold;
  if (c.activations == "int4") options.activations = Activations::int8_grouped, options.activation_bits = 4;
  if (c.activations == "int4-token") options.activations = Activations::int8, options.activation_bits = 4;
  // As the papers have it: the output layer stays out of these.
  if (c.activations == "int8-token" || c.activations == "llm-int8" || c.activations == "int8-static" ||
      c.activations == "int4" || c.activations == "int4-token")
    options.output_activations = Activations::fp32;
  if (c.activations != "int8-static") return options;
  for (const Layer& l : model.layers)
    for (const Linear* w : l.linears())
      nibble::detail::require(
          !nibble::is_integer(w->format()) || (w->extras() != nullptr && !w->extras()->activation_scales.empty()),
          "--activations int8-static: '", c.model,
          "' has no static scales (nibble quantize makes them from a calibration text)");
  return options;
}

inline void write_file(const std::string& path, const std::string& text) {
  nibble::AtomicFile file(path);
  file.write(text);
  file.commit();
}

inline void write_json(const Common& c, const nlohmann::json& json) {
  if (!c.json.empty())
    write_file(c.json, json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

/// Throws IoError where `path`, unless it is empty, could not be written: better at the start than after hours.
inline void require_writable(const std::string& path) {
  if (!path.empty()) nibble::AtomicFile probe(path);  // its temporary is gone again
}

/// A number from `least` to `most`; unlike CLI::Range it takes no NaN.
inline CLI::Validator number_in(double least, double most) {
  std::ostringstream range;
  range << least << " to " << most;
  const auto check = [least, most, range = range.str()](const std::string& text) {
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    const bool number = end != text.c_str() && *end == '\0';
    return number && value >= least && value <= most ? std::string() : "'" + text + "' is no number from " + range;
  };
  return CLI::Validator(check, "FLOAT in [" + range.str() + "]");
}
/// A rate at which an average forgets, such as AdamW's beta2: below 1.
inline CLI::Validator forgetting() { return number_in(0.0, 0.9999999); }

inline std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw nibble::IoError("cannot open '" + path + "'");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline double mib(std::size_t bytes) { return static_cast<double>(bytes) / 1048576.0; }

/// Where the time of a start goes: one mark after each phase.
class Phases {
 public:
  void mark(const char* name) {
    const double now = limits_detail::seconds_now();
    spent_.emplace_back(name, now - last_);
    last_ = now;
  }
  nlohmann::json to_json() const {
    nlohmann::json json = nlohmann::json::object();
    for (const auto& [name, seconds] : spent_) json[name] = seconds;
    return json;
  }
  /// One line: each phase's milliseconds.
  std::string text() const {
    std::string line;
    for (const auto& [name, seconds] : spent_) {
      char part[64];
      std::snprintf(part, sizeof part, "%s%s %.2f ms", line.empty() ? "" : ", ", name, seconds * 1e3);
      line += part;
    }
    return line;
  }

 private:
  double last_ = limits_detail::seconds_now();
  std::vector<std::pair<const char*, double>> spent_;
};

/// A model that is open and ready to run.
struct Session {
  Phases phases;
  nibble::ThreadPool pool;
  std::unique_ptr<Tokenizer> tokenizer;
  Model model;
  std::size_t file_bytes = 0;
  double load_seconds = 0.0;

  explicit Session(const Common& c) : pool(c.threads) {
    const double start = limits_detail::seconds_now();
    // What the model needs of the file it keeps itself: a GGUF's map goes, a packed file's stays.
    const auto file = open_model(c.model);
    phases.mark("open");
    file_bytes = file->bytes();
    tokenizer = std::make_unique<Tokenizer>(file->vocabulary());
    if (tokenizer->vocabulary().size() > file->hparams().vocabulary)
      throw nibble::FormatError("the vocabulary has more tokens than the embedding has rows");
    phases.mark("vocabulary");
    model = load_model(*file, &pool);
    phases.mark("weights");
    load_seconds = limits_detail::seconds_now() - start;
  }
  nibble::ThreadPool* workers() { return pool.threads() > 1 ? &pool : nullptr; }
};

inline void add_common(CLI::App* app, Common& c, bool runs) {
  app->add_option("--json", c.json, "Write every figure to this file as JSON");
  if (!runs) return;
  app->add_option(
         "--activations", c.activations,
         "What integer weights are multiplied with. float: exact products of the dequantized weights; int8: "
         "codes, a "
         "scale a token and 32 inputs; int8-token: a scale a token; int4 and int4-token: the same with codes of 4 "
         "bits; int8-static: the file's scales; llm-int8: as "
         "int8, but large activations stay floats (the output layer is float in these five); auto: as the "
         "file says, or else int8")
      ->check(
          CLI::IsMember({"auto", "float", "int8", "int8-token", "int4", "int4-token", "int8-static", "llm-int8"}))
      ->capture_default_str();
  app->add_option("--outlier-threshold", c.outlier_threshold, "From where on activations are large, for llm-int8")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--kv", c.kv, "How keys and values of the context are stored: fp32, fp16, int8 or int4")
      ->check(CLI::IsMember({"fp32", "fp16", "int8", "int4"}))
      ->capture_default_str();
}

inline void add_threads(CLI::App* app, Common& c) {
  app->add_option("--threads", c.threads, "Threads; 0: all cores. Results do not depend on it")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

inline CLI::Option* add_model(CLI::App* app, Common& c) {
  return app
      ->add_option("model", c.model,
                   "A GGUF, a packed .safetensors made by nibble quantize, or a Hugging Face folder")
      ->required()
      ->check(CLI::ExistingPath);
}

/// A subcommand; `run` is called once all of the command line is understood.
inline CLI::App* add_command(CLI::App& app, const char* name, const char* what, std::function<void()>& action,
                             std::function<void()> run) {
  CLI::App* command = app.add_subcommand(name, what);
  command->callback([&action, run = std::move(run)] { action = run; });
  return command;
}

}  // namespace commands
}  // namespace llm
