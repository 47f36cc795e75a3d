// nibble quantize: a model in another format.
#pragma once

#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../progress.hpp"
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

inline void quantize(const Common& c, const QuantizeArguments& a) {
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
  command->add_option("--method", a->method, "How codes are chosen; rtn: round to nearest")
      ->check(CLI::IsMember({"rtn"}))
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
