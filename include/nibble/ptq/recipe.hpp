// What is to be done with every matrix of a model, as data: what a tuner chooses and a quantization run replays.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/quantize/scheme.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Numbers that a method or a run is given, by name ("damp", "iterations", "windows").
using RecipeParameters = std::map<std::string, double>;

/// What becomes of one matrix.
struct TensorRecipe {
  std::string name;            ///< the tensor's in the model
  bool keep = false;           ///< true: it stays as it is, and nothing below counts
  Scheme scheme;               ///< of a matrix: axis 0 outputs, axis 1 inputs
  std::string method = "rtn";  ///< steps joined by '+', as the run that replays it reads them
  std::size_t double_quant_block =
      0;                        ///< scales in a block of double quantization; 0: scales as the scheme has them
  RecipeParameters parameters;  ///< of the method
};

/// Everything that the bits of a quantized model depend on, besides the float model itself and the text that `inputs`
/// names: replaying a recipe on the same data gives the same bits, on any machine and number of threads.
struct Recipe {
  std::uint64_t seed = 0;
  std::vector<std::string> transforms;        ///< of the whole model before its matrices are rounded, in order
  RecipeParameters parameters;                ///< of the run
  std::map<std::string, std::string> inputs;  ///< what it was made with: a model's name, a text's fingerprint
  std::vector<TensorRecipe> tensors;          ///< names are distinct

  /// nullptr where the recipe says nothing of that tensor.
  const TensorRecipe* find(std::string_view name) const noexcept {
    for (const TensorRecipe& t : tensors)
      if (t.name == name) return &t;
    return nullptr;
  }

  /// Throws InvalidArgument, naming tensor and field, for an empty or repeated name, a scheme that is none of a matrix,
  /// an empty step in a method or transform, a parameter that is not finite. Schemes become canonical (resolve()).
  void check() {
    std::set<std::string_view> names;
    for (const std::string& transform : transforms)
      detail::require(is_word(transform), "recipe: transform '", transform, "' is no name of lower-case letters");
    check_numbers("recipe", parameters);
    for (TensorRecipe& t : tensors) {
      detail::require(!t.name.empty(), "recipe: a tensor has no name");
      detail::require(names.insert(t.name).second, "recipe: tensor '", t.name, "' is there twice");
      if (t.keep) continue;
      const std::string where = "recipe: tensor '" + t.name + "'";
      check_scheme(where, t);
      for (std::size_t begin = 0, end = 0; end != std::string::npos; begin = end + 1) {
        end = t.method.find('+', begin);
        detail::require(is_word(t.method.substr(begin, end - begin)), where, ": method '", t.method,
                        "' is no list of names joined by '+'");
      }
      detail::require(t.double_quant_block == 0 || has_scales(t.scheme.format), where,
                      ": double quantization of a format without scales, ", name_of(t.scheme.format));
      check_numbers(where, t.parameters);
    }
  }

 private:
  static bool is_word(const std::string& text) noexcept {
    for (const char c : text)
      if (!((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_')) return false;
    return !text.empty();
  }
  static void check_numbers(const std::string& where, const RecipeParameters& parameters) {
    for (const auto& entry : parameters)
      detail::require(std::isfinite(entry.second), where, ": parameter '", entry.first, "' is ", entry.second,
                      ", expected a number");
  }
  static void check_scheme(const std::string& where, TensorRecipe& t) {
#if NIBBLE_EXCEPTIONS
    try {
      t.scheme = detail::resolve(t.scheme, {1, 1});
    } catch (const InvalidArgument& error) {
      detail::raise<InvalidArgument>(where + ": " + error.what());
    }
#else
    (void)where;
    t.scheme = detail::resolve(t.scheme, {1, 1});
#endif
  }
};

inline bool operator==(const TensorRecipe& a, const TensorRecipe& b) {
  return a.name == b.name && a.keep == b.keep &&
         (a.keep || (a.scheme == b.scheme && a.method == b.method &&
                     a.double_quant_block == b.double_quant_block && a.parameters == b.parameters));
}
inline bool operator!=(const TensorRecipe& a, const TensorRecipe& b) { return !(a == b); }
inline bool operator==(const Recipe& a, const Recipe& b) {
  return a.seed == b.seed && a.transforms == b.transforms && a.parameters == b.parameters &&
         a.inputs == b.inputs && a.tensors == b.tensors;
}
inline bool operator!=(const Recipe& a, const Recipe& b) { return !(a == b); }

}  // namespace NIBBLE_ABI
}  // namespace nibble
