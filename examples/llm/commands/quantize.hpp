// nibble quantize: a model in another format.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../hf_export.hpp"
#include "../progress.hpp"
#include "../ptq/calibration.hpp"
#include "../ptq/pipeline.hpp"
#include "../ptq/recipes.hpp"
#include "../ptq/tuner.hpp"
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
  std::string export_as;
  std::string calibration;
  WindowOptions windows;
  std::uint64_t seed = 0;
  std::string recipe;
  std::string recipe_out;
  TuneGoal goal;
  std::string max_loss;
  TunerOptions tuner;
  std::optional<std::size_t> static_group;
  double static_percentile = 99.9;
  std::string activations;
  std::string resume;
  double state_seconds = 20.0;
  RoundingOptions rounding;
  TransformOptions transforms;
  AutoRoundStepOptions autoround;
  std::size_t double_quant = 0;
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
inline std::vector<std::vector<Token>> windows_of(const ModelFile& file, const std::string& text,
                                                  const WindowOptions& windows, std::uint64_t seed) {
  if (text.empty()) return {};
  const std::vector<Token> tokens = Tokenizer(file.vocabulary()).encode(read_text(text));
  return calibration_windows(tokens, windows.windows, windows.context, seed);
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

/// The recipe that the tuner makes of a goal, into `options`; how it came about, for the report.
inline nlohmann::json tune_model(const ModelFile& file, const QuantizeArguments& a, PtqOptions& options) {
  const int goals =
      (a.goal.bits > 0.0 ? 1 : 0) + (a.goal.size_mib > 0.0 ? 1 : 0) + (a.goal.max_loss > 0.0 ? 1 : 0);
  nibble::detail::require(goals == 1, "method 'tune' needs one of --bits, --size-mib and --max-loss");
  TunerOptions tuning = a.tuner;
  tuning.pool = options.pool;
  tuning.embedding = a.goal.bits <= 0.0;
  std::vector<Sensitivity> measured;
  {
    const std::size_t matrices = file.hparams().layers * block_matrices.size() + (tuning.embedding ? 1 : 0);
    Progress progress("tune", matrices);
    tuning.done = [&](const std::string& what) { progress.step(what); };
    measured = Tuner(file, options.windows, tuning).measure();
  }
  std::size_t other = 0;
  for (const TensorInfo& t : file.tensors()) {
    bool among = false;
    for (const Sensitivity& s : measured) among = among || s.name == t.name;
    if (among) continue;
    other += t.is_matrix() ? nibble::quantized_bytes(file.scheme(t.name), t.shape[0], t.shape[1])
                           : nibble::detail::element_count(t.shape) * sizeof(float);
  }
  const TunePlan chosen = choose(measured, a.goal, other);
  std::printf("tune: %.3f bits a block weight, predicted divergence %.4f (no choice is below %.4f)%s\n",
              chosen.bits, chosen.result.loss, chosen.result.bound,
              chosen.result.proven ? "" : ", not proven optimal");
  Method gptq;
  gptq.rounding = Rounding::gptq;
  options.method = gptq;
  options.plan_of = [chosen, gptq](const TensorInfo& t) {
    MatrixPlan p;
    p.method = gptq;
    for (const auto& entry : chosen.schemes)
      if (entry.first == t.name) p.scheme = entry.second;
    return p;
  };
  nlohmann::json sensitivities = nlohmann::json::array();
  for (std::size_t i = 0; i < measured.size(); ++i)
    sensitivities.push_back({{"name", measured[i].name},
                             {"divergence", measured[i].divergence},
                             {"chosen", chosen.schemes[i].second ? name_of(*chosen.schemes[i].second) : "same"}});
  return {{"bits", chosen.bits},
          {"bytes", chosen.result.bytes + (a.goal.bits > 0.0 ? 0 : other)},
          {"predicted", chosen.result.loss},
          {"bound", chosen.result.bound},
          {"proven", chosen.result.proven},
          {"sensitivities", sensitivities}};
}

/// Block by block, with whatever the method needs.
inline void quantize_by_blocks(const Common& c, const QuantizeArguments& a, const Method& method) {
  using nibble::detail::require;
  require(!wants_gguf(a.out), "method '", a.method, "' writes packed files only, not '", a.out, "'");
  require(!method.needs_calibration() || !a.calibration.empty(), "method '", a.method,
          "' needs a text: --calibration FILE");
  require(!a.static_group || !a.calibration.empty(), "static activations need a text: --calibration FILE");
  require(!a.recipe.empty() || method.tune || !a.format.empty(), "--format is missing");
  const auto file = open_model(c.model);
  nibble::ThreadPool pool(c.threads);
  const double start = limits_detail::seconds_now();
  PtqOptions options;
  WindowOptions windows = a.windows;
  options.method = method;
  options.pool = &pool;
  options.rounding = a.rounding;
  options.transforms = a.transforms;
  options.autoround = a.autoround;
  options.seed = options.autoround.seed = a.seed;
  options.static_group = a.static_group;
  options.static_percentile = a.static_percentile;
  options.resume = a.resume.empty() ? a.out + ".resume" : a.resume;
  options.state_seconds = a.state_seconds;
  const std::string model = fingerprint_of_model(c.model);
  const std::string text = a.calibration.empty() ? std::string() : read_text(a.calibration);
  const std::string text_print = hex(fingerprint(text.data(), text.size()));
  nlohmann::json tuned;
  if (!a.recipe.empty()) {
    const nibble::Recipe recipe = nibble::read_recipe(a.recipe);
    follow(recipe, *file, options, windows);
    for (const auto& input : recipe.inputs)
      if ((input.first == "model" && input.second != model) ||
          (input.first == "calibration" && input.second != text_print))
        std::fprintf(stderr, "nibble: the recipe was made with another %s: the result will differ\n",
                     input.first.c_str());
    bool needed = options.method.needs_calibration();
    for (const TensorInfo& t : file->tensors())
      if (t.is_matrix()) needed = needed || options.plan_of(t).method.needs_calibration();
    require(!needed || !a.calibration.empty(), "the recipe needs a text: --calibration FILE");
  } else if (!method.tune) {
    const QuantizePlan plan = plan_of(a);
    options.plan_of = [plan, method, &a](const TensorInfo& t) {
      const std::optional<FormatSpec> format = quantize_detail::format_for(plan, t);
      MatrixPlan p;
      p.method = method;
      p.double_quant_block = a.double_quant;
      if (format) p.scheme = scheme_of(*format);
      return p;
    };
  }
  options.windows = windows_of(*file, a.calibration, windows, options.seed);
  if (a.recipe.empty() && method.tune) tuned = tune_model(*file, a, options);
  options.identity = {{"model", model}};
  if (!a.recipe_out.empty()) {
    nibble::Recipe recipe = recipe_of(*file, options, windows);
    recipe.inputs["model"] = model;
    if (!a.calibration.empty()) recipe.inputs["calibration"] = text_print;
    nibble::write_recipe(a.recipe_out, recipe);
  }
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
    char spent[64];
    std::snprintf(spent, sizeof spent, "%s%s %.1f s", phases.empty() ? "" : ", ", phase.first.c_str(),
                  phase.second);
    phases += spent;
  }
  std::printf(
      "%s: %zu matrices by %s, %.1f MiB -> %.1f MiB (file %.1f MiB) in %.1f s (%s), peak memory %.0f MiB\n",
      a.out.c_str(), result.tensors.size(), a.method.c_str(), mib(bytes_in), mib(bytes_out), mib(size), seconds,
      phases.c_str(), mib(peak_memory()));
  nlohmann::json tensors = nlohmann::json::array();
  for (const TensorReport& t : result.tensors) tensors.push_back(t.to_json());
  write_json(c, {{"model", c.model},
                 {"output", a.out},
                 {"format", a.format},
                 {"method", a.recipe.empty() ? a.method : "recipe"},
                 {"windows", options.windows.size()},
                 {"context", windows.context},
                 {"seed", options.seed},
                 {"options", options.rounding.to_json()},
                 {"tune", tuned},
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

inline void quantize(const Common& c, QuantizeArguments a);

/// By way of a packed file beside the folder.
inline void quantize_and_export(const Common& c, const QuantizeArguments& a) {
  const HfExport kind = parse_hf_export(a.export_as);
  QuantizeArguments packed = a;
  packed.export_as.clear();
  packed.out = a.out + ".safetensors";
  quantize(c, packed);
  {
    const auto file = open_model(packed.out);
    Progress progress("export", file->tensors().size());
    write_hf_folder(*file, a.out, kind, [&](const std::string& name) { progress.step(name); });
  }
  std::filesystem::remove(packed.out);
  std::printf("%s: a Hugging Face folder, %s\n", a.out.c_str(), a.export_as.c_str());
}

inline void quantize(const Common& c, QuantizeArguments a) {
  if (!a.export_as.empty()) return quantize_and_export(c, a);
  if (!a.max_loss.empty()) {
    const bool percent = a.max_loss.back() == '%';
    char* end = nullptr;
    a.goal.max_loss = std::strtod(a.max_loss.c_str(), &end) / (percent ? 100.0 : 1.0);
    nibble::detail::require(*end == (percent ? '%' : '\0') && a.goal.max_loss > 0.0 && a.goal.max_loss < 100.0,
                            "--max-loss '", a.max_loss, "': expected a share like 1% or 0.01");
  }
  if (a.activations == "int8-static" && !a.static_group)
    a.static_group = nibble::QuantizedActivations::default_group;
  const Method method = parse_method(a.method);
  if (!a.recipe.empty() || a.static_group || !a.recipe_out.empty() || !method.is_plain() ||
      !a.calibration.empty() || a.double_quant != 0)
    return quantize_by_blocks(c, a, method);
  nibble::detail::require(!a.format.empty(), "--format is missing");
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
  command->add_option("--format", a->format, std::string("Format of the weights: ") + format_spec_help());
  command->add_option("--group", a->group, "Inputs that share a scale, a multiple of 16; 0: a scale a row");
  CLI::Option* symmetric = command->add_flag("--symmetric", a->symmetric, "No zero point");
  command->add_flag("--float-offset", a->float_offset, "A float offset instead of an integer zero point (Q4_1)")
      ->excludes(symmetric);
  command->add_option("--scales", a->scales, "Type of the scales")->check(CLI::IsMember({"fp32", "fp16", "bf16"}));
  command->add_option("--method", a->method, method_help())->capture_default_str();
  command
      ->add_option("--export", a->export_as,
                   "OUT becomes a Hugging Face folder with a checkpoint: gptq (v1), gptq-v2 or awq")
      ->check(CLI::IsMember({"gptq", "gptq-v2", "awq"}));
  command->add_option("--calibration", a->calibration, "A text for the methods that look at activations")
      ->check(CLI::ExistingFile);
  command->add_option("--windows", a->windows.windows, "Windows of the calibration text")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 24))
      ->capture_default_str();
  command->add_option("--context", a->windows.context, "Tokens of a window")
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
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command
      ->add_option("--residual", a->rounding.residual,
                   "The same for the error of the residual stream, which output and down add to")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command
      ->add_option("--max-change", a->rounding.max_change,
                   "Most that these two may change a matrix, a share of its norm")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--damp", a->rounding.damp, "Damping of the Hessian, a share of its mean diagonal")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command
      ->add_option(
          "--keep", a->keep,
          "REGEX=FORMAT: tensors whose name matches get FORMAT ('same': as it is). May be repeated; the first "
          "that matches decides")
      ->allow_extra_args(false);
  command->add_flag("--act-order,!--no-act-order", a->rounding.act_order,
                    "GPTQ: inputs of large activations first");
  command
      ->add_option("--grids", a->rounding.grids, "GPTQ: ranges by smallest and largest weight, or by least error")
      ->check(CLI::IsMember({"min-max", "mse", "weighted-mse", "clip"}))
      ->capture_default_str();
  command->add_option("--iterations", a->autoround.iterations, "AutoRound: steps a block")
      ->check(CLI::Range(0, 100000))
      ->capture_default_str();
  command->add_option("--batch", a->autoround.batch, "AutoRound: windows of a step")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20))
      ->capture_default_str();
  command->add_option("--lr", a->autoround.lr, "AutoRound: length of the first step; 0: 1 / iterations")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--smooth-alpha", a->transforms.smooth_alpha, "SmoothQuant: how much of the spread moves")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command
      ->add_option("--recipe", a->recipe, "Replay a recipe: format and method of every matrix, and all settings")
      ->check(CLI::ExistingFile);
  command->add_option("--recipe-out", a->recipe_out, "Write the recipe of this run (JSON)");
  command->add_option("--bits", a->goal.bits, "tune: bits of a block weight, scales included")
      ->check(CLI::PositiveNumber);
  command->add_option("--size-mib", a->goal.size_mib, "tune: MiB of all tensors, the embedding among them")
      ->check(CLI::PositiveNumber);
  command->add_option("--max-loss", a->max_loss, "tune: most that the perplexity may grow, e.g. 1%");
  command->add_option("--tune-windows", a->tuner.windows, "tune: windows that sensitivities are measured on")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20))
      ->capture_default_str();
  command
      ->add_option("--activations", a->activations,
                   "int8-static: the file gets scales of activations, for each 32 inputs, from the calibration "
                   "text. float: it gets none")
      ->check(CLI::IsMember({"float", "int8-static"}));
  command
      ->add_option("--static-activations", a->static_group,
                   "The same with a scale for each so many inputs, 0: one for all")
      ->check(CLI::Range(std::size_t{0}, std::size_t{1} << 20));
  command
      ->add_option("--activation-percentile", a->static_percentile,
                   "Percent of the calibration text's activations that static scales reach; what lies beyond is "
                   "multiplied as floats. 100: all, and what lies beyond is clamped")
      ->check(CLI::Range(50.0, 100.0))
      ->capture_default_str();
  command
      ->add_option("--double-quant", a->double_quant,
                   "Scales in eight bits, in blocks of so many (256); the packed file holds them decoded")
      ->check(CLI::Range(std::size_t{0}, std::size_t{1} << 20));
  add_threads(command, c);
  add_common(command, c, false);
}

}  // namespace commands
}  // namespace llm
