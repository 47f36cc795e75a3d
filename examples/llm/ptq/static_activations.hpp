// Static scales of activations for a packed model that is written already.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

#include "../calibrate.hpp"
#include "../model_file.hpp"
#include "../quantize_model.hpp"

namespace llm {

/// Runs the packed model `path` over the windows, with float activations, and writes it again with the scales found.
/// The file is replaced at once or, where that fails, not at all.
inline void add_static_activations(const std::string& path, const std::vector<std::vector<Token>>& windows,
                                   const CalibrateOptions& options) {
  const std::string next = std::filesystem::path(path).replace_extension("static.safetensors").string();
  {
    const auto file = open_model(path);
    const auto extras = calibrate(load_model(*file, options.pool), windows, options);
    QuantizePlan same;
    same.format = parse_format("int8");
    same.keep.push_back(parse_keep(".*=same"));
    quantize_to_packed(
        *file, next, same, options.pool, [](const std::string&) {}, extras);
  }
  std::filesystem::rename(next, path);
}

}  // namespace llm
