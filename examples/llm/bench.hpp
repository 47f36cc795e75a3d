// Tokens per second of prompts and of decoding, and what of the machine's limits that is.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "batch.hpp"
#include "machine_limits.hpp"
#include "profile.hpp"
#include "runner.hpp"
#include "sampler.hpp"

namespace llm {

struct BenchOptions {
  std::size_t prompt = 512;  // tokens
  std::size_t decode = 64;   // tokens
  std::size_t depth = 0;     // tokens in the cache before decoding is timed
  std::size_t repeats = 3;
  std::vector<std::size_t> batches;  // numbers of sequences to decode together
  bool profile = false;
};

/// Sequences decoded together.
struct BatchResult {
  std::size_t sequences = 0;
  double tokens_per_second = 0.0;  // of all
  Profile profile;                 // of options.decode tokens each
};

struct BenchResult {
  int threads = 1;
  double prompt_tokens_per_second = 0.0;
  double decode_tokens_per_second = 0.0;
  double time_to_first_token = 0.0;  // seconds from the prompt's tokens to the first generated one
  double prompt_gops = 0.0;
  double decode_gbps = 0.0;
  MachineLimits limits;
  std::vector<BatchResult> batches;
  Profile prompt_profile;  // of one prompt, and of options.decode tokens
  Profile decode_profile;
};

/// Bytes of this process in memory now.
inline std::size_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::size_t size = 0, resident = 0;
  statm >> size >> resident;
  return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

namespace bench_detail {

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2.0;
}

/// Any tokens will do: the work does not depend on them.
inline std::vector<Token> some_tokens(std::size_t n, std::size_t vocabulary) {
  std::vector<Token> tokens(n);
  std::uint32_t state = 1;
  for (Token& t : tokens) {
    state = state * 1664525U + 1013904223U;
    t = static_cast<Token>((state >> 8) % vocabulary);
  }
  return tokens;
}

}  // namespace bench_detail

/// Speed of `sequences` that decode together, behind prompts of 64 tokens each.
inline BatchResult bench_batch(const Model& model, std::size_t sequences, const BenchOptions& options,
                               RunnerOptions runner_options) {
  constexpr std::size_t prompt = 64;
  runner_options.context = prompt + options.decode + 1;
  // All prompts in one step: afterwards all decode, and end together.
  runner_options.block = prompt * sequences;
  BatchResult result;
  result.sequences = sequences;
  if (options.profile) runner_options.profile = &result.profile;
  Runner runner(model, runner_options);
  BatchOptions batch_options;
  batch_options.sequences = sequences;
  const std::size_t vocabulary = model.hparams.vocabulary;
  Batch batch(
      runner, vocabulary, [](Token) { return false; }, batch_options);
  const std::vector<Token> tokens = bench_detail::some_tokens(prompt * sequences, vocabulary);
  std::vector<double> times;
  for (std::size_t round = 0; round < options.repeats; ++round) {
    for (std::size_t s = 0; s < sequences; ++s) {
      BatchRequest request;
      const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(s * prompt);
      request.prompt.assign(first, first + prompt);
      request.tokens = options.decode + 1;
      batch.submit(std::move(request));
    }
    batch.step();
    result.profile.clear();
    const double start = limits_detail::seconds_now();
    while (batch.step()) {
    }
    times.push_back(limits_detail::seconds_now() - start);
  }
  result.tokens_per_second = static_cast<double>(sequences * options.decode) / bench_detail::median(times);
  return result;
}

/// Medians over options.repeats rounds. `runner_options` say how products run; `step` is called after every
/// round.
template <class Step>
BenchResult bench(const Model& model, const BenchOptions& options, RunnerOptions runner_options,
                  nibble::ThreadPool& pool, Step&& step) {
  using limits_detail::seconds_now;
  runner_options.context = std::max(options.prompt, options.depth + options.decode + 1) + 1;
  runner_options.pool = pool.threads() > 1 ? &pool : nullptr;
  Runner runner(model, runner_options);
  auto cache = runner.new_cache();
  const std::size_t vocabulary = model.hparams.vocabulary;
  const std::vector<Token> tokens =
      bench_detail::some_tokens(std::max<std::size_t>({options.prompt, options.depth + 1, 1}), vocabulary);

  BenchResult result;
  result.threads = pool.threads();
  std::vector<double> prompt_times, first_times, decode_times;
  const double keys_read_at = static_cast<double>(options.depth) + static_cast<double>(options.decode) / 2.0;
  for (std::size_t round = 0; round <= options.repeats; ++round) {  // the first warms caches and clocks up
    if (options.prompt > 0) {
      cache.clear();
      const double start = seconds_now();
      const float* logits = runner.append(cache, tokens.data(), options.prompt);
      const double computed = seconds_now();
      const volatile Token first = argmax(logits, vocabulary);
      (void)first;
      if (round > 0) {
        prompt_times.push_back(computed - start);
        first_times.push_back(seconds_now() - start);
      }
    }
    if (options.decode > 0) {
      cache.clear();
      const float* logits = runner.append(cache, tokens.data(), options.depth + 1);
      Token next = argmax(logits, vocabulary);
      const double start = seconds_now();
      for (std::size_t i = 0; i < options.decode; ++i) next = argmax(runner.append(cache, &next, 1), vocabulary);
      if (round > 0) decode_times.push_back(seconds_now() - start);
    }
    step();
  }

  if (options.profile) {
    const auto profiled = [&](std::size_t first, std::size_t decode, Profile& profile) {
      RunnerOptions profiling = runner_options;
      profiling.profile = &profile;
      Runner profiled_runner(model, profiling);
      cache.clear();
      Token next = 0;
      const auto say = [&](const Token* from, std::size_t count) {
        const float* logits = profiled_runner.append(cache, from, count);
        ProfileClock clock(&profile);
        next = argmax(logits, vocabulary);
        clock.lap(Operation::sampling, {sizeof(float) * static_cast<double>(vocabulary), 0.0, 0.0});
      };
      for (int round = 0; round < 2; ++round) {  // the first grows the workspaces
        cache.clear();
        profile.clear();
        say(tokens.data(), first);
        if (decode > 0) profile.clear();
        for (std::size_t i = 0; i < decode; ++i) say(&next, 1);
      }
    };
    if (options.prompt > 0) profiled(options.prompt, 0, result.prompt_profile);
    if (options.decode > 0) profiled(options.depth + 1, options.decode, result.decode_profile);
  }
  for (const std::size_t sequences : options.batches) {
    result.batches.push_back(bench_batch(model, sequences, options, runner_options));
    step();
  }

  result.limits = measure_limits(pool);
  const Hparams& h = model.hparams;
  if (!prompt_times.empty()) {
    const double time = bench_detail::median(prompt_times);
    const auto n = static_cast<double>(options.prompt);
    result.prompt_tokens_per_second = n / time;
    result.time_to_first_token = bench_detail::median(first_times);
    // Queries against keys and weights against values, half of the square each, two operations an element.
    const double attention = 2.0 * static_cast<double>(h.q_size() * h.layers) * n * (n + 1.0);
    result.prompt_gops = (n * model.block_operations() + model.output_operations() + attention) / time * 1e-9;
  }
  if (!decode_times.empty()) {
    result.decode_tokens_per_second = static_cast<double>(options.decode) / bench_detail::median(decode_times);
    const double cache_bytes = static_cast<double>(cache.bytes_per_position()) * keys_read_at;
    result.decode_gbps =
        (static_cast<double>(model.bytes_per_token()) + cache_bytes) * result.decode_tokens_per_second * 1e-9;
  }
  return result;
}

}  // namespace llm
