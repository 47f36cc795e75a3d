// nibble merge: a model and an adapter as one model.
#pragma once

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "../../llm/commands/common.hpp"
#include "../../llm/progress.hpp"
#include "../../llm/ptq/calibration.hpp"
#include "../merge_model.hpp"

namespace llm {
namespace commands {

struct MergeArguments {
  std::string adapter, out, format = "fp16", calibration, onto = "base";
  std::size_t windows = 128, length = 512;
  std::uint64_t seed = 0;
  double side_term = 0.0;
};

inline void merge(const Common& c, const MergeArguments& a) {
  using nibble::detail::require;
  const double start = limits_detail::seconds_now();
  MergeModelOptions options;
  options.scheme = scheme_of(parse_format(a.format));
  options.side_share = a.side_term;
  const bool quantized = nibble::has_scales(options.scheme.format);
  require(quantized || (a.calibration.empty() && a.side_term == 0.0),
          "--calibration and --side-term are for quantized formats, --format is ", a.format);
  require(!wants_gguf(a.out) || !quantized, "'", a.out,
          "' would be a GGUF: quantized weights go into a packed .safetensors");
  require(!quantized || !a.calibration.empty(), "merging into ", a.format, " needs --calibration TEXT");
  require_writable(a.out);
  require_writable(c.json);
  nibble::ThreadPool pool(c.threads);
  const auto file = open_model(c.model);
  const LlamaAdapter adapter = read_llama_adapter(a.adapter, file->hparams());
  for (const TensorInfo& t : file->tensors())
    require<nibble::Unsupported>(file->extras(t.name) == nullptr, "'", t.name,
                                 "' has an order, scales, a rotation or a ",
                                 "bias of its own: merge into the model that it was made from");
  if (a.onto == "base") options.base = adapter_base_of(adapter);
  options.pool = pool.threads() > 1 ? &pool : nullptr;
  nlohmann::json json = {{"model", c.model}, {"adapter", a.adapter}, {"format", name_of(options.scheme)}};
  if (!quantized) {
    Progress progress("merge", file->tensors().size());
    options.done = [&](const std::string& name) { progress.step(name); };
    merge_into_floats(*file, adapter, a.out, options);
  } else {
    const Tokenizer tokenizer(file->vocabulary());
    options.windows = calibration_windows(tokenizer.encode(read_text(a.calibration)), a.windows, a.length, a.seed);
    std::vector<MergeReport> reports;
    {
      Progress progress("merge", file->hparams().layers);
      options.done = [&](const std::string& name) { progress.step(name); };
      reports = QuantizedMerger(*file, adapter, options).run(a.out);
    }
    double error = 0.0, naive = 0.0, worst = 0.0;
    std::size_t bytes = 0, side = 0;
    nlohmann::json tensors = nlohmann::json::array();
    for (const MergeReport& r : reports) {
      const double share = r.naive_error > 0.0 ? r.error / r.naive_error : 0.0;
      error += r.error / static_cast<double>(reports.size());
      naive += r.naive_error / static_cast<double>(reports.size());
      worst = std::max(worst, share);
      bytes += r.bytes;
      side += r.side_bytes;
      tensors.push_back({{"name", r.name},
                         {"mean_square_error", r.error},
                         {"naive_mean_square_error", r.naive_error},
                         {"mean_square", r.energy},
                         {"bytes", r.bytes},
                         {"side_bytes", r.side_bytes},
                         {"note", r.note}});
      if (!r.note.empty()) std::printf("%s: %s\n", r.name.c_str(), r.note.c_str());
    }
    double mean_share = 0.0;
    for (const MergeReport& r : reports)
      mean_share += (r.naive_error > 0.0 ? r.error / r.naive_error : 0.0) / static_cast<double>(reports.size());
    std::printf(
        "mean square error of outputs: %.6g, %.1f %% of naive requantization's %.6g; a matrix's own share: mean "
        "%.1f %%, worst %.1f %%\n",
        error, naive > 0.0 ? 100.0 * error / naive : 0.0, naive, 100.0 * mean_share, 100.0 * worst);
    if (side != 0)
      std::printf("side terms: %.2f MiB, %.1f %% of the packed %.2f MiB\n", mib(side),
                  100.0 * static_cast<double>(side) / static_cast<double>(bytes), mib(bytes));
    json["mean_square_error"] = error;
    json["naive_mean_square_error"] = naive;
    json["mean_share"] = mean_share;
    json["packed_bytes"] = bytes;
    json["side_bytes"] = side;
    json["tensors"] = std::move(tensors);
  }
  json["seconds"] = limits_detail::seconds_now() - start;
  std::printf("merged %zu matrices in %.1f s\n", adapter.matrices.size(), limits_detail::seconds_now() - start);
  write_json(c, json);
}

inline void add_merge(CLI::App& app, Common& c, std::function<void()>& action) {
  const auto a = std::make_shared<MergeArguments>();
  CLI::App* command = add_command(app, "merge", "A model and a LoRA adapter as one model, in floats or quantized",
                                  action, [&c, a] { merge(c, *a); });
  add_model(command, c);
  command->add_option("adapter", a->adapter, "A folder in PEFT's layout")
      ->required()
      ->check(CLI::ExistingDirectory);
  command->add_option("out", a->out, "The file to write: a packed .safetensors, or a .gguf for float formats")
      ->required();
  command->add_option("--format", a->format, std::string("Of the blocks' matrices: ") + format_spec_help())
      ->capture_default_str();
  command
      ->add_option("--onto", a->onto,
                   "base: the weights that the adapter was trained over, quantized as its file says; model: the "
                   "model's own")
      ->check(CLI::IsMember({"base", "model"}))
      ->capture_default_str();
  command->add_option("--calibration", a->calibration, "A text whose outputs are kept, for quantized formats")
      ->check(CLI::ExistingFile);
  command->add_option("--calibration-windows", a->windows, "Windows of it")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20))
      ->capture_default_str();
  command->add_option("--calibration-length", a->length, "Tokens of a window")
      ->check(CLI::Range(std::size_t{2}, std::size_t{1} << 20))
      ->capture_default_str();
  command->add_option("--seed", a->seed, "Where windows begin; 0: evenly over the text")->capture_default_str();
  command
      ->add_option("--side-term", a->side_term,
                   "Keep a low-rank term of what rounding loses, of at most this share of each matrix's bytes")
      ->check(number_in(0.0, 1.0))
      ->capture_default_str();
  add_threads(command, c);
  add_common(command, c, false);
}

}  // namespace commands
}  // namespace llm
