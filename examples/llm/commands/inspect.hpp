// nibble inspect: what is in a model.
#pragma once

#include <cstdio>
#include <map>
#include <string>

#include "common.hpp"

namespace llm {
namespace commands {

inline void inspect(const Common& c) {
  const auto file = open_model(c.model);
  const Hparams& h = file->hparams();
  const Vocabulary v = file->vocabulary();
  std::printf("%s: %s, %.1f MiB\n\n", c.model.c_str(), file->kind().c_str(), mib(file->bytes()));
  std::printf("  %s\n  layers %zu, embedding %zu, feed-forward %zu, heads %zu (%zu key-value heads) of %zu\n",
              h.name.c_str(), h.layers, h.dim, h.ffn, h.heads, h.kv_heads, h.head_size);
  std::printf("  context %zu, rope base %g over %zu dimensions, rms epsilon %g\n", h.context, h.rope_base,
              h.rope_size, static_cast<double>(h.rms_epsilon));
  std::printf("  vocabulary %zu (%s%s%s), %s embeddings\n\n", h.vocabulary, v.model.c_str(),
              v.model == "gpt2" ? ", " : "", v.model == "gpt2" ? v.pre.c_str() : "",
              file->has("output.weight") ? "separate" : "tied");

  struct Group {
    std::size_t tensors = 0;
    std::size_t weights = 0;
    std::size_t bytes = 0;
  };
  std::map<std::string, Group> groups;
  nlohmann::json tensors = nlohmann::json::array();
  std::size_t weights = 0, bytes = 0;
  std::printf("  %-28s %-14s %-20s %12s\n", "tensor", "shape", "format", "bytes");
  for (const TensorInfo& t : file->tensors()) {
    std::string shape;
    std::size_t count = 1;
    for (const std::size_t d : t.shape) {
      shape += (shape.empty() ? "" : " x ") + std::to_string(d);
      count *= d;
    }
    std::printf("  %-28s %-14s %-20s %12zu\n", t.name.c_str(), shape.c_str(), t.format.c_str(), t.bytes);
    tensors.push_back({{"name", t.name}, {"shape", t.shape}, {"format", t.format}, {"bytes", t.bytes}});
    Group& g = groups[t.format];
    ++g.tensors;
    g.weights += count;
    g.bytes += t.bytes;
    weights += count;
    bytes += t.bytes;
  }
  std::printf("\n  %-20s %8s %12s %10s %8s\n", "format", "tensors", "weights", "MiB", "bits");
  nlohmann::json formats = nlohmann::json::object();
  const auto line = [](const std::string& name, const Group& g) {
    std::printf("  %-20s %8zu %12zu %10.2f %8.3f\n", name.c_str(), g.tensors, g.weights, mib(g.bytes),
                8.0 * static_cast<double>(g.bytes) / static_cast<double>(g.weights == 0 ? 1 : g.weights));
  };
  for (const auto& [name, g] : groups) {
    line(name, g);
    formats[name] = {{"tensors", g.tensors}, {"weights", g.weights}, {"bytes", g.bytes}};
  }
  line("all", {file->tensors().size(), weights, bytes});
  write_json(c, {{"model", c.model},
                 {"kind", file->kind()},
                 {"file_bytes", file->bytes()},
                 {"weights", weights},
                 {"tensor_bytes", bytes},
                 {"hparams", to_json(h)},
                 {"formats", formats},
                 {"tensors", tensors}});
}

inline void add_inspect(CLI::App& app, Common& c, std::function<void()>& action) {
  CLI::App* command = add_command(app, "inspect", "Show a model's tensors, formats, sizes and hyperparameters",
                                  action, [&c] { inspect(c); });
  add_model(command, c);
  add_common(command, c, false);
}

}  // namespace commands
}  // namespace llm
