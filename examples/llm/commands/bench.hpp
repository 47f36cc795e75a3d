// nibble bench: speed against this machine's limits.
#pragma once

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "../bench.hpp"
#include "../progress.hpp"
#include "common.hpp"
#include "nibble/gemm/explain.hpp"

namespace llm {
namespace commands {

/// What bench is asked.
struct BenchArguments {
  BenchOptions options;
  std::vector<int> threads = {0};
};

inline void bench(const Common& c, const BenchArguments& a) {
  const BenchOptions& options = a.options;
  const std::vector<int>& threads = a.threads;
  Common loading = c;
  loading.threads = *std::max_element(threads.begin(), threads.end());
  Session s(loading);
  std::printf("%s on %s\n", c.model.c_str(), nibble::explain(s.model.layers[0].gate.weights(), 1).c_str());
  std::vector<BenchResult> results;
  {
    Progress progress("bench", threads.size() * (options.repeats + 1 + options.batches.size()));
    for (const int t : threads) {
      nibble::ThreadPool pool(t);
      results.push_back(llm::bench(s.model, options, runner_options(c, s.model), pool, [&] { progress.step(); }));
    }
  }
  const std::size_t resident = resident_bytes();
  std::printf("\nload %.3f s, resident %.1f MiB, file %.1f MiB, weights read a token %.1f MiB\n\n", s.load_seconds,
              mib(resident), mib(s.file_bytes), mib(s.model.bytes_per_token()));
  std::printf("%7s %12s %12s %10s %18s %18s\n", "threads", "prompt t/s", "decode t/s", "first s", "prompt GOP/s",
              "decode GB/s");
  nlohmann::json runs = nlohmann::json::array();
  const bool integer = c.activations != "float" && nibble::is_integer(s.model.layers[0].gate.format());
  for (const BenchResult& r : results) {
    const double compute = integer ? r.limits.integer_gops : r.limits.float_gops;
    char gops[64], gbps[64];
    std::snprintf(gops, sizeof gops, "%.0f of %.0f", r.prompt_gops, compute);
    std::snprintf(gbps, sizeof gbps, "%.1f of %.1f", r.decode_gbps, r.limits.read_gbps);
    std::printf("%7d %12.1f %12.1f %10.3f %18s %18s\n", r.threads, r.prompt_tokens_per_second,
                r.decode_tokens_per_second, r.time_to_first_token, gops, gbps);
    runs.push_back({{"threads", r.threads},
                    {"prompt_tokens_per_second", r.prompt_tokens_per_second},
                    {"decode_tokens_per_second", r.decode_tokens_per_second},
                    {"time_to_first_token_seconds", r.time_to_first_token},
                    {"prompt_gops", r.prompt_gops},
                    {"limit_gops", compute},
                    {"limit_integer_gops", r.limits.integer_gops},
                    {"limit_float_gops", r.limits.float_gops},
                    {"decode_gbps", r.decode_gbps},
                    {"limit_read_gbps", r.limits.read_gbps}});
  }
  if (!options.batches.empty()) {
    std::printf("\n%7s %10s %12s %14s\n", "threads", "sequences", "tokens/s", "t/s a sequence");
    for (std::size_t i = 0; i < results.size(); ++i)
      for (const BatchResult& b : results[i].batches) {
        const double each = b.tokens_per_second / static_cast<double>(b.sequences);
        std::printf("%7d %10zu %12.1f %14.1f\n", results[i].threads, b.sequences, b.tokens_per_second, each);
        runs[i]["batches"].push_back({{"sequences", b.sequences},
                                      {"tokens_per_second", b.tokens_per_second},
                                      {"tokens_per_second_a_sequence", each}});
      }
  }
  if (options.profile)
    for (std::size_t i = 0; i < results.size(); ++i) {
      const BenchResult& r = results[i];
      const auto print = [&](const std::string& what, std::size_t tokens, const Profile& profile) {
        if (tokens == 0) return;
        std::printf("\n%s of %zu tokens, %d threads\n%s", what.c_str(), tokens, r.threads,
                    profile_table(profile, r.limits).c_str());
        runs[i]["profile"][what] = profile_json(profile, r.limits);
      };
      print("prompt", options.prompt, r.prompt_profile);
      print("decode", options.decode, r.decode_profile);
      if (options.decode > 0)
        for (const BatchResult& b : r.batches)
          print("decode, " + std::to_string(b.sequences) + " together", options.decode * b.sequences, b.profile);
    }
  const BenchResult& last = results.back();
  write_json(c, {{"model", c.model},
                 {"activations", c.activations},
                 {"kv", c.kv},
                 {"isa", std::string(nibble::name_of(nibble::detail::kernels().isa))},
                 {"prompt", options.prompt},
                 {"decode", options.decode},
                 {"depth", options.depth},
                 {"file_bytes", s.file_bytes},
                 {"resident_bytes", resident},
                 {"load_seconds", s.load_seconds},
                 {"bytes_per_token", s.model.bytes_per_token()},
                 {"threads", last.threads},
                 {"prompt_tokens_per_second", last.prompt_tokens_per_second},
                 {"decode_tokens_per_second", last.decode_tokens_per_second},
                 {"time_to_first_token_seconds", last.time_to_first_token},
                 {"runs", runs}});
}

inline void add_bench(CLI::App& app, Common& c, std::function<void()>& action) {
  const auto a = std::make_shared<BenchArguments>();
  CLI::App* command = add_command(app, "bench", "Speed of prompts and decoding, against this machine's limits",
                                  action, [&c, a] { bench(c, *a); });
  add_model(command, c);
  command->add_option("--prompt", a->options.prompt, "Tokens of the prompt; 0: none")
      ->check(CLI::Range(std::size_t{0}, std::size_t{1} << 20))
      ->capture_default_str();
  command->add_option("--decode", a->options.decode, "Tokens to decode, one by one; 0: none")
      ->check(CLI::Range(std::size_t{0}, std::size_t{1} << 20))
      ->capture_default_str();
  command->add_option("--depth", a->options.depth, "Tokens of context before decoding is timed")
      ->check(CLI::Range(std::size_t{0}, std::size_t{1} << 20))
      ->capture_default_str();
  command
      ->add_option(
          "--batch", a->options.batches,
          "Also decode this many sequences together, each behind a prompt of 64 tokens, e.g. 1,2,4,8,16,32")
      ->delimiter(',')
      ->check(CLI::Range(std::size_t{1}, std::size_t{4096}))
      ->allow_extra_args(false);
  command->add_flag(
      "--profile", a->options.profile,
      "Also say where the time goes: a table by operation with its percent of the limit that binds it");
  command->add_option("--repeats", a->options.repeats, "Timed rounds; medians are shown")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1000}))
      ->capture_default_str();
  command->add_option("--threads", a->threads, "One or more numbers of threads, e.g. 1,2; 0: all cores")
      ->delimiter(',')
      ->check(CLI::Range(0, 1024))
      ->allow_extra_args(false);
  add_common(command, c, true);
}

}  // namespace commands
}  // namespace llm
