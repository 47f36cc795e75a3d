// Steps of an optimizer over batches: schedule, clipping, checkpoints from which a run goes on to the same bits, figures.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../llm/commands/common.hpp"
#include "../llm/progress.hpp"
#include "../llm/svg_plot.hpp"
#include "llama_trainer.hpp"
#include "nibble/io/training_state.hpp"
#include "nibble/train/optimizer.hpp"
#include "nibble/train/schedule.hpp"

namespace llm {

struct LoopOptions {
  nibble::Schedule schedule;  // its steps are the run's
  nibble::AdamWOptions adamw;
  double clip = 1.0;  // largest norm of the gradients; 0: any
  double minutes =
      0.0;  // above 0: the schedule goes by time, and ends then (the run depends on the machine's speed)
  std::size_t evaluate_every = 0;  // steps; 0: never
  bool evaluate_last = false;      // after the last step, too
  std::string checkpoint;          // empty: none
  std::size_t checkpoint_every = 200;
  bool resume = false;       // go on from the checkpoint, if it is there
  nlohmann::json settings;   // what a run must have in common with its checkpoint
  std::string csv, svg;      // empty: none
  double peak_gflops = 0.0;  // of the machine, for percentages; 0: unknown
  double operations_a_token = 0.0;
  std::size_t tokens_a_step = 0;
  nibble::ThreadPool* pool = nullptr;
};

struct LoopReport {
  std::size_t steps = 0;           // done
  double loss = 0.0;               // mean of the last 50 steps
  double best = 0.0;               // of the evaluations
  std::size_t best_step = 0;       // 0: none
  double seconds = 0.0;            // in steps, without evaluations and checkpoints
  double tokens_per_second = 0.0;  // of the steps since the start, or since it was resumed
  double percent_of_peak = 0.0;
};

/// What a run does beside its steps.
struct LoopHooks {
  std::function<TokenBatch(std::uint64_t)> batch;              // of step 0, 1, ...
  std::function<double()> evaluate;                            // a figure, less is better
  std::function<void(std::size_t)> best = [](std::size_t) {};  // the last figure is the best so far
  std::string figure = "test_bits_per_byte";                   // its name
};

/// Runs the steps. Each is begin_step(number from 1 on), gradients(batch), AdamW; losses have the same bits for any number of
/// threads, and after a kill at any moment and --resume.
/// Throws Error or runtime_error, naming step and tensor, where hidden states, gradients or what a step makes of parameters
/// are not finite: the last checkpoint is then the one before. Throws FormatError for a checkpoint of another run, IoError
/// for a full disk and, before the first step, for files that cannot be written.
inline LoopReport run_training(LlamaTrainer& trainer, const LoopOptions& o, const LoopHooks& hooks) {
  using commands::write_file;
  o.schedule.check();
  for (const std::string& path : {o.checkpoint, o.csv, o.svg}) commands::require_writable(path);
  const nibble::Parameters parameters = trainer.parameters();
  nibble::AdamW adamw(parameters, o.adamw);
  const std::string header =
      "step,loss,learning_rate,gradient_norm,tokens_per_second,percent_of_peak," + hooks.figure + "\n";
  std::string csv = header;
  LoopReport report;
  std::vector<double> recent;  // losses
  std::vector<PlotPoint> figures;
  double before = 0.0;  // seconds of the run that was resumed
  if (o.resume && !o.checkpoint.empty() && std::filesystem::exists(o.checkpoint)) {
    const nlohmann::json at = nibble::load_training_state(o.checkpoint, adamw);
    nibble::detail::require<nibble::FormatError>(at.at("settings") == o.settings, "'", o.checkpoint,
                                                 "' is of another run: its settings are ",
                                                 at.at("settings").dump(), ", expected ", o.settings.dump());
    csv = at.at("csv").get<std::string>();
    recent = at.at("recent").get<std::vector<double>>();
    before = at.at("seconds").get<double>();
    report.best = at.at("best").get<double>();
    report.best_step = at.at("best_step").get<std::size_t>();
    for (const auto& f : at.at("figures")) figures.push_back({f.at(0).get<double>(), f.at(1).get<double>(), ""});
    std::fprintf(stderr, "nibble: goes on after step %llu\n", static_cast<unsigned long long>(adamw.steps()));
  }
  // What the numbers have become is no fault of the arguments.
  const auto guarded = [](std::uint64_t step, auto&& f) {
    try {
      f();
    } catch (const nibble::InvalidArgument& e) {
      throw std::runtime_error("step " + std::to_string(step) + ": " + e.what());
    }
  };
  const auto checkpoint = [&](double seconds) {
    nlohmann::json points = nlohmann::json::array();
    for (const PlotPoint& f : figures) points.push_back({f.x, f.y});
    nibble::save_training_state(o.checkpoint, adamw,
                                {{"settings", o.settings},
                                 {"csv", csv},
                                 {"recent", recent},
                                 {"seconds", seconds},
                                 {"best", report.best},
                                 {"best_step", report.best_step},
                                 {"figures", points}});
    if (!o.csv.empty()) write_file(o.csv, csv);
  };
  const auto number = [](const char* pattern, double v) {
    char text[64];
    std::snprintf(text, sizeof text, pattern, v);
    return std::string(text);
  };

  const double begin = limits_detail::seconds_now();
  const std::uint64_t first = adamw.steps(), steps = o.schedule.steps;
  {
    // By time, hundredths of a minute are the bar's steps.
    const bool timed = o.minutes > 0.0;
    Progress progress("train", timed ? static_cast<std::size_t>(std::max(1.0, o.minutes * 100.0))
                                     : static_cast<std::size_t>(steps - std::min(first, steps)));
    std::size_t shown = 0;
    for (std::uint64_t done = first; done < steps; ++done) {
      const double start = limits_detail::seconds_now();
      const double through = timed ? (before + start - begin) / (60.0 * o.minutes) : 0.0;
      if (timed && through >= 1.0) break;
      const std::uint64_t step = done + 1;
      double rate = o.schedule.rate(done);
      if (timed) {
        // The place in a schedule of a million steps, but for the warm-up, which counts steps.
        nibble::Schedule by_time = o.schedule;
        by_time.steps = 1000000;
        by_time.warmup = 0;
        by_time.decay = o.schedule.kind == nibble::ScheduleKind::wsd
                            ? static_cast<std::uint64_t>(1e6 * static_cast<double>(o.schedule.decay) /
                                                         static_cast<double>(o.schedule.steps))
                            : 0;
        rate = by_time.rate(static_cast<std::uint64_t>(1e6 * through));
        if (done < o.schedule.warmup)
          rate =
              std::min(rate, o.schedule.peak * static_cast<double>(step) / static_cast<double>(o.schedule.warmup));
      }
      nibble::zero_gradients(parameters, o.pool);
      trainer.begin_step(step);
      double loss = 0.0, norm = 0.0;
      guarded(step, [&] {
        loss = trainer.gradients(hooks.batch(done));
        norm = adamw.step(rate, o.clip, o.pool);
      });
      trainer.end_step();
      report.seconds += limits_detail::seconds_now() - start;
      recent.push_back(loss);
      if (recent.size() > 50) recent.erase(recent.begin());
      report.loss = 0.0;
      for (const double l : recent) report.loss += l / static_cast<double>(recent.size());
      report.tokens_per_second = static_cast<double>(o.tokens_a_step * (step - first)) / report.seconds;
      if (o.peak_gflops > 0.0)
        report.percent_of_peak = 100.0 * report.tokens_per_second * o.operations_a_token / (o.peak_gflops * 1e9);

      std::string figure;
      std::string note =
          "loss " + number("%.4f", report.loss) + ", " + number("%.0f", report.tokens_per_second) + " tokens/s";
      if (o.peak_gflops > 0.0) note += ", " + number("%.0f", report.percent_of_peak) + " % of peak";
      const bool look =
          (o.evaluate_every != 0 && step % o.evaluate_every == 0) || (o.evaluate_last && step == steps);
      if (look && hooks.evaluate) {
        double f = 0.0;
        guarded(step, [&] { f = hooks.evaluate(); });
        figure = number("%.6f", f);
        figures.push_back({static_cast<double>(step), f, ""});
        std::fprintf(stderr, "%snibble: step %llu of %s, %s, %s %.4f\n", progress.on_terminal() ? "\r\x1b[K" : "",
                     static_cast<unsigned long long>(step),
                     timed ? (number("%.1f", 60.0 * o.minutes) + " s").c_str() : std::to_string(steps).c_str(),
                     note.c_str(), hooks.figure.c_str(), f);
        if (report.best_step == 0 || f < report.best) {
          report.best = f;
          report.best_step = static_cast<std::size_t>(step);
          hooks.best(report.best_step);
        }
      }
      csv += std::to_string(step) + "," + number("%.17g", loss) + "," + number("%.8g", rate) + "," +
             number("%.17g", norm) + "," + number("%.1f", report.tokens_per_second) + "," +
             number("%.2f", report.percent_of_peak) + "," + figure + "\n";
      if (timed) {
        const auto now = static_cast<std::size_t>(std::min(1.0, through) * o.minutes * 100.0);
        for (; shown < now; ++shown) progress.step(note);
      } else {
        progress.step(note);
      }
      if (!o.checkpoint.empty() && o.checkpoint_every != 0 && step % o.checkpoint_every == 0)
        guarded(step, [&] { checkpoint(before + limits_detail::seconds_now() - begin); });
    }
  }
  report.steps = static_cast<std::size_t>(adamw.steps());
  // What a checkpoint says of the steps before it, nothing else would of the last ones.
  guarded(adamw.steps(), [&] { nibble::require_finite(parameters, nibble::ParameterPart::value, {}, o.pool); });
  if (!o.csv.empty()) write_file(o.csv, csv);
  if (!o.svg.empty() && !figures.empty())
    write_file(o.svg, scatter_svg("Training", "step", hooks.figure, figures, figures));
  return report;
}

}  // namespace llm
