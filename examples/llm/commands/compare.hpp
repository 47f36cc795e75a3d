// nibble compare: one model in several formats.
#pragma once

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "../compare.hpp"
#include "../ptq/method.hpp"
#include "../progress.hpp"
#include "../quantize_model.hpp"
#include "common.hpp"

namespace llm {
namespace commands {

struct CompareArguments {
  std::string text;
  std::vector<std::string> formats;
  std::size_t context = 512;
  std::size_t windows = 16;
  std::size_t prompt = 512;
  std::size_t decode = 64;
  std::string calibration;
  std::size_t calibration_windows = 64;
  std::string csv;
  std::string svg;
};

inline void compare(const Common& c, const CompareArguments& a) {
  std::vector<QuantizePlan> plans;
  std::vector<std::string> methods;  // empty: rounded to nearest, here
  for (const std::string& entry : a.formats) {
    const std::size_t colon = entry.find(':');
    const std::string f = entry.substr(0, colon);
    methods.push_back(colon == std::string::npos ? "" : entry.substr(colon + 1));
    if (!methods.back().empty()) {
      const Method method = parse_method(methods.back());
      nibble::detail::require(f != "same" && !method.tune, "format '", entry, "': '", f, "' and '", methods.back(),
                              "' do not go together");
      nibble::detail::require(!method.needs_calibration() || !a.calibration.empty(), "method '", methods.back(),
                              "' needs a text: --calibration FILE");
    }
    plans.emplace_back();
    if (f == "same")
      plans.back().keep.push_back(parse_keep(".*=same"));
    else
      plans.back().format = parse_format(f);
  }
  const auto file = open_model(c.model);
  const std::size_t tokens = Tokenizer(file->vocabulary()).encode(read_text(a.text)).size();
  nibble::detail::require(a.windows * a.context <= tokens, "'", a.text, "' has ", tokens, " tokens, ", a.windows,
                          " windows of ", a.context, " take ", a.windows * a.context);
  const TemporaryFolder folder;
  const std::string threads = std::to_string(nibble::ThreadPool(c.threads).threads());
  std::vector<CompareRow> rows;
  for (std::size_t i = 0; i < plans.size(); ++i) {
    CompareRow row;
    row.format = a.formats[i];
    const std::string path = (folder.path() / "model.safetensors").string();
    if (!methods[i].empty()) {
      std::vector<std::string> arguments = {
          "quantize", c.model,    path,        "--format", row.format.substr(0, row.format.find(':')),
          "--method", methods[i], "--threads", threads};
      if (!a.calibration.empty())
        arguments.insert(arguments.end(),
                         {"--calibration", a.calibration, "--windows", std::to_string(a.calibration_windows),
                          "--context", std::to_string(a.context)});
      std::fprintf(stderr, "%s: quantize\n", row.format.c_str());
      row.quantize_seconds =
          run_self(std::move(arguments), folder.path() / "result.json").at("seconds").get<double>();
    } else {
      nibble::ThreadPool pool(c.threads);
      Progress progress(row.format + ": quantize", file->tensors().size());
      quantize_to_packed(*file, path, plans[i], &pool, [&](const std::string&) { progress.step(); });
    }
    row.file_bytes = static_cast<double>(std::filesystem::file_size(path));
    const std::vector<std::string> shared = {"--activations", c.activations, "--kv", c.kv, "--threads", threads};
    const auto run = [&](std::vector<std::string> arguments) {
      arguments.insert(arguments.end(), shared.begin(), shared.end());
      std::fprintf(stderr, "%s: %s\n", row.format.c_str(), arguments[0].c_str());
      return run_self(std::move(arguments), folder.path() / "result.json");
    };
    row.perplexity = run({"perplexity", path, a.text, "--context", std::to_string(a.context), "--windows",
                          std::to_string(a.windows)})
                         .at("perplexity")
                         .get<double>();
    const nlohmann::json speed =
        run({"bench", path, "--prompt", std::to_string(a.prompt), "--decode", std::to_string(a.decode)});
    row.resident_bytes = speed.at("resident_bytes").get<double>();
    row.load_seconds = speed.at("load_seconds").get<double>();
    row.prompt_tokens_per_second = speed.at("prompt_tokens_per_second").get<double>();
    row.decode_tokens_per_second = speed.at("decode_tokens_per_second").get<double>();
    rows.push_back(row);
  }
  fill_changes(rows);
  std::fputs(compare_table(rows).c_str(), stdout);
  if (!a.csv.empty()) write_file(a.csv, compare_csv(rows));
  if (!a.svg.empty()) write_file(a.svg, compare_svg(rows, file->hparams().name));
  write_json(c, {{"model", c.model},
                 {"text", a.text},
                 {"context", a.context},
                 {"windows", a.windows},
                 {"activations", c.activations},
                 {"threads", std::stoi(threads)},
                 {"formats", compare_json(rows)}});
}

inline void add_compare(CLI::App& app, Common& c, std::function<void()>& action) {
  const auto a = std::make_shared<CompareArguments>();
  CLI::App* command = add_command(app, "compare", "One model in several formats: a table, a CSV, a plot", action,
                                  [&c, a] { compare(c, *a); });
  add_model(command, c);
  command->add_option("text", a->text, "A text file for the perplexity")->required()->check(CLI::ExistingFile);
  command
      ->add_option("--formats", a->formats,
                   "Formats, separated by commas, each with a method of nibble quantize behind a colon if it is "
                   "not to be rounded "
                   "to nearest (int4-g64:gptq): 'same' (the weights as they are) or " +
                       std::string(format_spec_help()))
      ->delimiter(',')
      ->allow_extra_args(false);
  a->formats = {"fp32", "fp16", "int8", "int4-g32", "int4-g128-sym", "nf4"};
  command->add_option("--context", a->context, "Tokens of a window")
      ->check(CLI::Range(std::size_t{4}, std::size_t{1} << 20))
      ->capture_default_str();
  command->add_option("--windows", a->windows, "Windows of the text")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 24))
      ->capture_default_str();
  command->add_option("--calibration", a->calibration, "A text for the methods that look at activations")
      ->check(CLI::ExistingFile);
  command->add_option("--calibration-windows", a->calibration_windows, "Windows of it")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 24))
      ->capture_default_str();
  command->add_option("--prompt", a->prompt, "Tokens of the timed prompt")->capture_default_str();
  command->add_option("--decode", a->decode, "Tokens to decode")->capture_default_str();
  command->add_option("--csv", a->csv, "Write the table as CSV");
  command->add_option(
      "--svg", a->svg,
      "Write a plot of size against perplexity, with the line of those that no other beats in both");
  add_threads(command, c);
  add_common(command, c, true);
}

}  // namespace commands
}  // namespace llm
