// Recipes of whole runs: what a run was asked to do, as data, and back.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "nibble/io/recipe.hpp"
#include "pipeline.hpp"

namespace llm {

/// The text of a fingerprint.
inline std::string hex(std::uint64_t value) {
  static const char* digits = "0123456789abcdef";
  std::string text(16, '0');
  for (std::size_t i = 16; i-- > 0; value >>= 4) text[i] = digits[value & 15];
  return text;
}

inline constexpr const char* grid_fits[] = {"min-max", "mse", "weighted-mse", "clip"};

/// Windows of the calibration text: how many, and tokens of each.
struct WindowOptions {
  std::size_t windows = 64;
  std::size_t context = 512;
};

/// What `options` says, with a line for every matrix of `file`.
inline nibble::Recipe recipe_of(const ModelFile& file, const PtqOptions& options, const WindowOptions& windows) {
  nibble::Recipe recipe;
  recipe.seed = options.seed;
  const Method& m = options.method;
  if (m.rotate) recipe.transforms.emplace_back("rotate");
  if (m.equalize) recipe.transforms.emplace_back("equalize");
  if (m.smoothquant) recipe.transforms.emplace_back("smoothquant");
  if (m.awq) recipe.transforms.emplace_back("awq");
  const auto number = [](auto value) { return static_cast<double>(value); };
  const RoundingOptions& r = options.rounding;
  recipe.parameters = {
      {"correction", r.correction},
      {"residual", r.residual},
      {"max_change", r.max_change},
      {"damp", r.damp},
      {"act_order", r.act_order ? 1.0 : 0.0},
      {"grids", number(std::find(std::begin(grid_fits), std::end(grid_fits), r.grids) - std::begin(grid_fits))},
      {"smooth_alpha", options.transforms.smooth_alpha},
      {"awq_grid", number(options.transforms.awq_grid)},
      {"transform_windows", number(options.transforms.windows)},
      {"autoround_iterations", number(options.autoround.iterations)},
      {"autoround_batch", number(options.autoround.batch)},
      {"autoround_lr", number(options.autoround.lr)},
      {"windows", number(windows.windows)},
      {"context", number(windows.context)}};
  if (options.static_group) {
    recipe.parameters["static_group"] = number(*options.static_group);
    recipe.parameters["static_percentile"] = options.static_percentile;
  }
  std::string after;
  if (m.autoround) after += "+autoround";
  if (m.bias) after += "+bias";
  for (const TensorInfo& t : file.tensors()) {
    if (!t.is_matrix()) continue;
    const MatrixPlan plan = options.plan_of(t);
    nibble::TensorRecipe tensor;
    tensor.name = t.name;
    tensor.keep = !plan.scheme.has_value();
    if (plan.scheme) tensor.scheme = nibble::detail::resolve(*plan.scheme, t.shape);
    tensor.method = m.llm_int8 ? "llm-int8" : std::string(name_of(plan.method.rounding)) + after;
    tensor.double_quant_block = plan.double_quant_block;
    recipe.tensors.push_back(std::move(tensor));
  }
  return recipe;
}

/// Makes `options` and `windows` what the recipe says. Throws InvalidArgument for a parameter, transform or method that
/// this program does not know, and for a matrix of `file` of which the recipe says nothing.
inline void follow(const nibble::Recipe& recipe, const ModelFile& file, PtqOptions& options,
                   WindowOptions& windows) {
  options.seed = recipe.seed;
  options.autoround.seed = recipe.seed;
  options.method = {};
  for (const std::string& transform : recipe.transforms) {
    const Method m = parse_method(transform);
    nibble::detail::require(m.transforms(), "recipe: '", transform, "' is no transform");
    options.method.rotate = options.method.rotate || m.rotate;
    options.method.equalize = options.method.equalize || m.equalize;
    options.method.smoothquant = options.method.smoothquant || m.smoothquant;
    options.method.awq = options.method.awq || m.awq;
  }
  for (const auto& entry : recipe.parameters) {
    const double v = entry.second;
    const std::string& name = entry.first;
    const auto whole = [&] {
      nibble::detail::require(v >= 0.0 && v <= 1e9 && v == std::floor(v), "recipe: '", name, "' is ", v,
                              ", expected a whole number");
      return static_cast<std::size_t>(v);
    };
    if (name == "correction")
      options.rounding.correction = v;
    else if (name == "residual")
      options.rounding.residual = v;
    else if (name == "max_change")
      options.rounding.max_change = v;
    else if (name == "damp")
      options.rounding.damp = v;
    else if (name == "act_order")
      options.rounding.act_order = whole() != 0;
    else if (name == "grids")
      options.rounding.grids = grid_fits[std::min<std::size_t>(whole(), 3)];
    else if (name == "smooth_alpha")
      options.transforms.smooth_alpha = v;
    else if (name == "awq_grid")
      options.transforms.awq_grid = static_cast<int>(whole());
    else if (name == "transform_windows")
      options.transforms.windows = whole();
    else if (name == "autoround_iterations")
      options.autoround.iterations = static_cast<int>(whole());
    else if (name == "autoround_batch")
      options.autoround.batch = whole();
    else if (name == "autoround_lr")
      options.autoround.lr = static_cast<float>(v);
    else if (name == "static_group")
      options.static_group = whole();
    else if (name == "static_percentile")
      options.static_percentile = v;
    else if (name == "windows")
      windows.windows = whole();
    else if (name == "context")
      windows.context = whole();
    else
      nibble::detail::raise<nibble::InvalidArgument>("recipe: the parameter '" + name + "' is not known");
  }
  std::vector<std::pair<std::string, MatrixPlan>> plans;
  for (const TensorInfo& t : file.tensors()) {
    if (!t.is_matrix()) continue;
    const nibble::TensorRecipe* tensor = recipe.find(t.name);
    nibble::detail::require(tensor != nullptr, "recipe: it says nothing of the model's matrix '", t.name, "'");
    MatrixPlan plan;
    if (!tensor->keep) {
      plan.scheme = tensor->scheme;
      plan.method = parse_method(tensor->method);
      plan.double_quant_block = tensor->double_quant_block;
      nibble::detail::require(!plan.method.transforms() && !plan.method.tune, "recipe: method '", tensor->method,
                              "' of '", t.name, "' is none of one matrix");
      options.method.autoround = options.method.autoround || plan.method.autoround;
      options.method.bias = options.method.bias || plan.method.bias;
      options.method.llm_int8 = options.method.llm_int8 || plan.method.llm_int8;
    }
    plans.emplace_back(t.name, plan);
  }
  options.plan_of = [plans](const TensorInfo& t) {
    for (const auto& entry : plans)
      if (entry.first == t.name) return entry.second;
    return MatrixPlan();
  };
}

}  // namespace llm
