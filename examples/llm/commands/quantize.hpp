// nibble quantize: a model in another format.
#pragma once

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../progress.hpp"
#include "../ptq/calibration.hpp"
#include "../ptq/pipeline.hpp"
#include "../quantize_model.hpp"
#include "common.hpp"

namespace llm {
namespace commands {

struct QuantizeArguments {
  std::string out;
  std::string format;
  std::string method = "rtn";
  std::string scales;
  std::optional<std::size_t> group;
  bool symmetric = false;
  bool float_offset = false;
  std::vector<std::string> keep;
  std::string calibration;
  std::size_t windows = 64;
  std::size_t context = 512;
  std::uint64_t seed = 0;
  std::string resume;
  double state_seconds = 20.0;
  RoundingOptions rounding;
};

inline QuantizePlan plan_of(const QuantizeArguments& a) {
  QuantizePlan plan;
  std::string format = a.format;
  if (a.group) format += *a.group == 0 ? "-row" : "-g" + std::to_string(*a.group);
  if (a.symmetric) format += "-sym";
  if (a.float_offset) format += "-offset";
  if (!a.scales.empty()) format += a.scales == "fp32" ? "-s32" : a.scales == "fp16" ? "-s16" : "-sbf16";
  plan.format = parse_format(format);
  for (const std::string& k : a.keep) plan.keep.push_back(parse_keep(k));
  return plan;
}

/// Windows of the calibration text.
inline std::vector<std::vector<Token>> windows_of(const ModelFile& file, const QuantizeArguments& a) {
  if (a.calibration.empty()) return {};
  const std::vector<Token> tokens = Tokenizer(file.vocabulary()).encode(read_text(a.calibration));
  return calibration_windows(tokens, a.windows, a.context, a.seed);
}

inline std::string table_of(const PtqResult& result) {
  std::string text;
  char line[256];
  for (const TensorReport& t : result.tensors) {
    std::snprintf(line, sizeof line, "  %-28s %-20s %-12s weights %.3e outputs %.3e %s\n", t.name.c_str(),
                  t.format.c_str(), t.method.c_str(), t.weight_error, t.output_error, t.note.c_str());
    text += line;
  }
  return text;
}

/// Tells models apart: of a file, or of all files of a folder.
inline std::string fingerprint_of_model(const std::string& path) {
  std::vector<std::string> files = {path};
  if (std::filesystem::is_directory(path)) {
    files.clear();
    for (const auto& entry : std::filesystem::directory_iterator(path))
      if (entry.is_regular_file()) files.push_back(entry.path().string());
    std::sort(files.begin(), files.end());
  }
  std::string text;
  for (const std::string& file : files) {
    const nibble::MappedFile bytes = nibble::MappedFile::open(file);
    text += (text.empty() ? "" : "-") + std::to_string(fingerprint(bytes.data(), bytes.size()));
  }
  return text;
}

/// Block by block, with whatever the method needs.
inline void quantize_by_blocks(const Common& c, const QuantizeArguments& a, const Method& method) {
  nibble::detail::require(!wants_gguf(a.out), "method '", a.method, "' writes packed files only, not '", a.out,
                          "'");
  nibble::detail::require(!method.needs_calibration() || !a.calibration.empty(), "method '", a.method,
                          "' needs a text: --calibration FILE");
  const QuantizePlan plan = plan_of(a);
  const auto file = open_model(c.model);
  nibble::ThreadPool pool(c.threads);
  const double start = limits_detail::seconds_now();
  PtqOptions options;
  options.method = method;
  options.windows = windows_of(*file, a);
  options.pool = &pool;
  options.rounding = a.rounding;
  options.resume = a.resume.empty() ? a.out + ".resume" : a.resume;
  options.state_seconds = a.state_seconds;
  options.identity = {{"model", fingerprint_of_model(c.model)}, {"method", a.method}};
  options.plan_of = [&](const TensorInfo& t) {
    const std::optional<FormatSpec> format = quantize_detail::format_for(plan, t);
    MatrixPlan p;
    p.method = method;
    if (format) p.scheme = scheme_of(*format);
    return p;
  };
  PtqResult result;
  {
    PtqPipeline pipeline(*file, options);
    Progress progress("quantize", pipeline.steps());
    options.done = [&](const std::string& what) { progress.step(what); };
    result = pipeline.run(a.out);
  }
  const double seconds = limits_detail::seconds_now() - start;
  const auto size = static_cast<std::size_t>(std::filesystem::file_size(a.out));
  const auto written = open_model(a.out);
  std::size_t bytes_in = 0, bytes_out = 0;
  for (const TensorInfo& t : file->tensors()) bytes_in += t.bytes;
  for (const TensorInfo& t : written->tensors()) bytes_out += t.bytes;
  std::fputs(table_of(result).c_str(), stdout);
  std::string phases;
  for (const auto& phase : result.phases.spent()) {
    char text[64];
    std::snprintf(text, sizeof text, "%s%s %.1f s", phases.empty() ? "" : ", ", phase.first.c_str(), phase.second);
    phases += text;
  }
  std::printf(
      "%s: %zu matrices by %s, %.1f MiB -> %.1f MiB (file %.1f MiB) in %.1f s (%s), peak memory %.0f MiB\n",
      a.out.c_str(), result.tensors.size(), a.method.c_str(), mib(bytes_in), mib(bytes_out), mib(size), seconds,
      phases.c_str(), mib(peak_memory()));
  nlohmann::json tensors = nlohmann::json::array();
  for (const TensorReport& t : result.tensors) tensors.push_back(t.to_json());
  write_json(c, {{"model", c.model},
                 {"output", a.out},
                 {"format", a.format.empty() ? "" : name_of(scheme_of(plan.format))},
                 {"method", a.method},
                 {"windows", options.windows.size()},
                 {"context", a.context},
                 {"seed", a.seed},
                 {"options", a.rounding.to_json()},
                 {"tensors", file->tensors().size()},
                 {"quantized", result.tensors.size()},
                 {"matrices", tensors},
                 {"bytes_in", bytes_in},
                 {"bytes_out", bytes_out},
                 {"file_bytes", size},
                 {"resumed_blocks", result.first_block},
                 {"phases", result.phases.to_json()},
                 {"peak_bytes", peak_memory()},
                 {"seconds", seconds}});
}

inline void quantize(const Common& c, const QuantizeArguments& a) {
  const Method method = parse_method(a.method);
  if (!method.is_plain() || !a.calibration.empty()) return quantize_by_blocks(c, a, method);
  const QuantizePlan plan = plan_of(a);
  const bool gguf = wants_gguf(a.out);
  const auto file = open_model(c.model);
  nibble::ThreadPool pool(c.threads);
  const double start = limits_detail::seconds_now();
  QuantizeReport report;
  {
    Progress progress("quantize", file->tensors().size());
    const auto done = [&](const std::string& name) { progress.step(name); };
    report =
        gguf ? quantize_to_gguf(*file, a.out, plan, done) : quantize_to_packed(*file, a.out, plan, &pool, done);
  }
  const double seconds = limits_detail::seconds_now() - start;
  const auto size = static_cast<std::size_t>(std::filesystem::file_size(a.out));
  std::printf("%s: %zu of %zu tensors quantized, %.1f MiB -> %.1f MiB (file %.1f MiB) in %.1f s\n", a.out.c_str(),
              report.quantized, report.tensors, mib(report.bytes_in), mib(report.bytes_out), mib(size), seconds);
  write_json(c, {{"model", c.model},
                 {"output", a.out},
                 {"format", name_of(scheme_of(plan.format, gguf))},
                 {"method", a.method},
                 {"tensors", report.tensors},
                 {"quantized", report.quantized},
                 {"bytes_in", report.bytes_in},
                 {"bytes_out", report.bytes_out},
                 {"file_bytes", size},
                 {"seconds", seconds}});
}

inline void add_quantize(CLI::App& app, Common& c, std::function<void()>& action) {
  const auto a = std::make_shared<QuantizeArguments>();
  CLI::App* command =
      add_command(app, "quantize", "Write a model in another format", action, [&c, a] { quantize(c, *a); });
  command->description(
      "Write a model in another format. The matrices of the blocks are quantized; the embedding, the output layer "
      "and "
      "the norms stay as they are unless --keep names them. The output is a GGUF or a packed safetensors file by "
      "its "
      "extension; a GGUF that could not decode to exactly the same values is refused.");
  add_model(command, c);
  command->add_option("out", a->out, "The file to write: .safetensors (packed) or .gguf")->required();
  command->add_option("--format", a->format, std::string("Format of the weights: ") + format_spec_help())
      ->required();
  command->add_option("--group", a->group, "Inputs that share a scale, a multiple of 16; 0: a scale a row");
  CLI::Option* symmetric = command->add_flag("--symmetric", a->symmetric, "No zero point");
  command->add_flag("--float-offset", a->float_offset, "A float offset instead of an integer zero point (Q4_1)")
      ->excludes(symmetric);
  command->add_option("--scales", a->scales, "Type of the scales")->check(CLI::IsMember({"fp32", "fp16", "bf16"}));
  command->add_option("--method", a->method, method_help())->capture_default_str();
  command->add_option("--calibration", a->calibration, "A text for the methods that look at activations")
      ->check(CLI::ExistingFile);
  command->add_option("--windows", a->windows, "Windows of the calibration text")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 24))
      ->capture_default_str();
  command->add_option("--context", a->context, "Tokens of a window")
      ->check(CLI::Range(std::size_t{2}, std::size_t{1} << 20))
      ->capture_default_str();
  command->add_option("--seed", a->seed, "Where the windows lie; 0: evenly spaced")->capture_default_str();
  command->add_option(
      "--resume", a->resume,
      "Folder for finished blocks: a run that was killed goes on there. Default: OUT.resume, removed at "
      "the end");
  command->add_option("--state-seconds", a->state_seconds, "Work that a kill may cost, seconds")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      ->add_option("--correction", a->rounding.correction,
                   "How much of the error of earlier layers a matrix makes up for, 0 to 1")
      ->check(CLI::Range(0.0F, 1.0F))
      ->capture_default_str();
  command
      ->add_option("--residual", a->rounding.residual,
                   "The same for the error of the residual stream, which output and down add to")
      ->check(CLI::Range(0.0F, 1.0F))
      ->capture_default_str();
  command->add_option("--damp", a->rounding.damp, "Damping of the Hessian, a share of its mean diagonal")
      ->check(CLI::Range(0.0F, 1.0F))
      ->capture_default_str();
  command
      ->add_option(
          "--keep", a->keep,
          "REGEX=FORMAT: tensors whose name matches get FORMAT ('same': as it is). May be repeated; the first "
          "that matches decides")
      ->allow_extra_args(false);
  add_threads(command, c);
  add_common(command, c, false);
}

}  // namespace commands
}  // namespace llm
