// Recipes as JSON text.
//
//   {
//     "format": "nibble-recipe", "version": 1,
//     "seed": 7, "transforms": ["rotate"], "parameters": {"windows": 64}, "inputs": {"calibration": "..."},
//     "tensors": [
//       {"name": "blk.0.attn_q.weight", "format": "int4", "symmetry": "asymmetric", "granularity": "per_group", "axis": 1,
//        "group_size": 64, "full_range": false, "scale_type": "fp16", "method": "awq+gptq", "double_quant_block": 0,
//        "parameters": {"damp": 0.01}},
//       {"name": "token_embd.weight", "keep": true}
//     ]
//   }
//
// One recipe has one text: fields in alphabetical order, numbers in the fewest digits that read back as the same double.
// "seed", "transforms", "parameters", "inputs", "double_quant_block" and "keep" may be left out when reading, and of the
// scheme what does not say format: symmetry (symmetric), granularity (per_tensor), axis (0), group_size (0), full_range
// (false), scale_type (fp32). Whatever else is missing, unknown, there twice or of another type is an error that says
// where: a recipe is never half understood.
//
// This header needs nlohmann/json and is not a part of <nibble/nibble.hpp>.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/io/atomic_file.hpp"
#include "nibble/io/bytes.hpp"
#include "nibble/io/mapped_file.hpp"
#include "nibble/ptq/recipe.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

inline constexpr std::string_view recipe_format = "nibble-recipe";
inline constexpr unsigned recipe_version = 1;
/// Longer texts are refused: a line for each matrix of the largest models is a thousandth of it.
inline constexpr std::size_t max_recipe_bytes = std::size_t{1} << 28;

namespace detail {

/// One JSON object of a recipe, whose every field must be asked for. `where` begins every message.
class RecipeObject {
 public:
  RecipeObject(const nlohmann::json& json, std::string where) : json_(json), where_(std::move(where)) {
    if (!json.is_object()) fail("is no JSON object");
  }

  const nlohmann::json* find(const char* key) {
    const auto at = json_.find(key);
    if (at == json_.end()) return nullptr;
    ++read_;
    return &*at;
  }
  std::string text(const char* key) {
    const nlohmann::json* value = find(key);
    if (value == nullptr) fail(concat("lacks '", key, "'"));
    if (!value->is_string()) fail(concat("has a '", key, "' that is no string"));
    return value->get<std::string>();
  }
  std::uint64_t number(const char* key, std::uint64_t otherwise) {
    const nlohmann::json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_number_unsigned()) fail(concat("has a '", key, "' that is no unsigned integer"));
    return value->get<std::uint64_t>();
  }
  bool boolean(const char* key, bool otherwise) {
    const nlohmann::json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) fail(concat("has a '", key, "' that is neither true nor false"));
    return value->get<bool>();
  }
  template <class E>
  E named(const char* key, std::initializer_list<E> values, E otherwise) {
    using detail::name_of;
    using nibble::name_of;
    const nlohmann::json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_string()) fail(concat("has a '", key, "' that is no string"));
    const std::string wanted = value->get<std::string>();
    std::string expected;
    for (const E e : values) {
      if (wanted == name_of(e)) return e;
      expected += (expected.empty() ? "" : ", ") + std::string(name_of(e));
    }
    fail(concat("has the unknown ", key, " '", printable(wanted), "', expected ", expected));
  }
  RecipeParameters parameters(const char* key) {
    RecipeParameters found;
    const nlohmann::json* value = find(key);
    if (value == nullptr) return found;
    if (!value->is_object()) fail(concat("has '", key, "' that are no JSON object"));
    for (const auto& entry : value->items()) {
      if (!entry.value().is_number())
        fail(concat("has a parameter '", printable(entry.key()), "' that is no number"));
      found[entry.key()] = entry.value().get<double>();
    }
    return found;
  }
  /// After the last field.
  void finish() const {
    if (json_.size() != read_) fail("has a field that this version of Nibble does not know");
  }
  [[noreturn]] void fail(const std::string& what) const { raise<FormatError>(where_ + " " + what); }

 private:
  const nlohmann::json& json_;
  std::string where_;
  std::size_t read_ = 0;
};

inline nlohmann::json recipe_json(const TensorRecipe& t) {
  nlohmann::json json;
  json["name"] = t.name;
  if (t.keep) {
    json["keep"] = true;
    return json;
  }
  const Scheme& s = t.scheme;
  json["format"] = std::string(nibble::name_of(s.format));
  json["symmetry"] = std::string(nibble::name_of(s.symmetry));
  json["granularity"] = std::string(name_of(s.granularity.kind));
  json["axis"] = s.granularity.axis;
  json["group_size"] = s.granularity.group_size;
  json["full_range"] = s.full_range;
  json["scale_type"] = std::string(nibble::name_of(s.scale_type));
  json["method"] = t.method;
  json["double_quant_block"] = t.double_quant_block;
  json["parameters"] = nlohmann::json(t.parameters);
  return json;
}

inline TensorRecipe read_tensor_recipe(const nlohmann::json& json, const std::string& where) {
  RecipeObject unnamed(json, where);
  TensorRecipe t;
  t.name = unnamed.text("name");
  RecipeObject object(json, where + " ('" + printable(t.name) + "')");
  object.text("name");
  t.keep = object.boolean("keep", false);
  if (t.keep) {
    object.finish();
    return t;
  }
  using Kind = Granularity::Kind;
  Scheme& s = t.scheme;
  const std::string format = object.text("format");
#if NIBBLE_EXCEPTIONS
  try {
    s.format = format_from_name(format);
  } catch (const InvalidArgument& error) {
    object.fail(concat("has an ", error.what()));
  }
#else
  s.format = format_from_name(format);
#endif
  s.symmetry = object.named("symmetry", {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset},
                            Symmetry::symmetric);
  s.scale_type = object.named("scale_type", {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16}, ScaleType::fp32);
  s.granularity.kind =
      object.named("granularity", {Kind::per_tensor, Kind::per_channel, Kind::per_group}, Kind::per_tensor);
  const std::uint64_t axis = object.number("axis", 0);
  if (axis > 1) object.fail(concat("has the axis ", axis, ", expected 0 or 1"));
  s.granularity.axis = static_cast<int>(axis);
  s.granularity.group_size = static_cast<std::size_t>(object.number("group_size", 0));
  s.full_range = object.boolean("full_range", false);
  t.method = object.text("method");
  t.double_quant_block = static_cast<std::size_t>(object.number("double_quant_block", 0));
  t.parameters = object.parameters("parameters");
  object.finish();
  return t;
}

}  // namespace detail

/// The recipe's text; equal recipes have equal texts. Throws InvalidArgument for a recipe that check() refuses, or a name
/// that is no UTF-8.
inline std::string recipe_text(Recipe recipe) {
  recipe.check();
  nlohmann::json json;
  json["format"] = std::string(recipe_format);
  json["version"] = recipe_version;
  json["seed"] = recipe.seed;
  json["transforms"] = recipe.transforms;
  json["parameters"] = nlohmann::json(recipe.parameters);
  json["inputs"] = nlohmann::json(recipe.inputs);
  json["tensors"] = nlohmann::json::array();
  for (const TensorRecipe& t : recipe.tensors) json["tensors"].push_back(detail::recipe_json(t));
#if NIBBLE_EXCEPTIONS
  try {
    return json.dump(1) + "\n";
  } catch (const nlohmann::json::exception&) {
    detail::raise<InvalidArgument>("recipe: a name is no UTF-8");
  }
#else
  return json.dump(1) + "\n";
#endif
}

/// Reads a recipe. `name` stands for it in messages. Throws FormatError, saying where, for a text that is broken or no
/// recipe, Unsupported for a version that is not known.
inline Recipe parse_recipe(std::string_view text, const std::string& name = "recipe") {
  const auto fail = [&](const std::string& what) { detail::raise<FormatError>(name + " " + what); };
  if (text.size() > max_recipe_bytes)
    fail(detail::concat("has ", text.size(), " bytes, expected at most ", max_recipe_bytes));
  if (text.find('\0') != std::string_view::npos) fail("is no JSON text: it has a zero byte");
  // No deeper than a recipe is; no key twice.
  std::vector<std::set<std::string>> keys;
  std::string twice;
  bool deep = false;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    using Event = nlohmann::json::parse_event_t;
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if ((event == Event::object_start || event == Event::array_start) && depth > 4) deep = true;
    if (event == Event::key && !keys.back().insert(value.get_ref<const std::string&>()).second && twice.empty())
      twice = value.get<std::string>();
    return !deep;
  };
  const nlohmann::json json = nlohmann::json::parse(text, watch, false);
  if (deep) fail("is nested deeper than a recipe");
  if (json.is_discarded()) fail("is no JSON text");
  if (!twice.empty()) fail("has the field '" + detail::printable(twice) + "' twice in one object");

  detail::RecipeObject object(json, name);
  if (object.text("format") != recipe_format)
    fail("is no recipe of Nibble: its 'format' is not " + std::string(recipe_format));
  const std::uint64_t version = object.number("version", 0);
  if (version != recipe_version)
    detail::raise<Unsupported>(
        detail::concat(name, " is a recipe of version ", version, "; this Nibble reads version ", recipe_version));
  Recipe recipe;
  recipe.seed = object.number("seed", 0);
  recipe.parameters = object.parameters("parameters");
  if (const nlohmann::json* transforms = object.find("transforms")) {
    if (!transforms->is_array()) object.fail("has 'transforms' that are no list");
    for (const nlohmann::json& t : *transforms) {
      if (!t.is_string()) object.fail("has a transform that is no string");
      recipe.transforms.push_back(t.get<std::string>());
    }
  }
  if (const nlohmann::json* inputs = object.find("inputs")) {
    if (!inputs->is_object()) object.fail("has 'inputs' that are no JSON object");
    for (const auto& entry : inputs->items()) {
      if (!entry.value().is_string()) object.fail("has an input that is no string");
      recipe.inputs[entry.key()] = entry.value().get<std::string>();
    }
  }
  const nlohmann::json* tensors = object.find("tensors");
  if (tensors == nullptr) object.fail("lacks 'tensors'");
  if (!tensors->is_array()) object.fail("has 'tensors' that are no list");
  object.finish();
  for (std::size_t i = 0; i < tensors->size(); ++i)
    recipe.tensors.push_back(detail::read_tensor_recipe((*tensors)[i], detail::concat(name, ": tensor ", i)));
#if NIBBLE_EXCEPTIONS
  try {
    recipe.check();
  } catch (const InvalidArgument& error) {
    detail::raise<FormatError>(name + ": " + error.what());
  }
#else
  recipe.check();
#endif
  return recipe;
}

/// Writes the recipe's text; the path holds its old content until all is written.
inline void write_recipe(const std::string& path, const Recipe& recipe) {
  const std::string text = recipe_text(recipe);
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

/// Throws as parse_recipe does, and IoError.
inline Recipe read_recipe(const std::string& path) {
  const MappedFile file = MappedFile::open(path);
  return parse_recipe(std::string_view(reinterpret_cast<const char*>(file.data()), file.size()), "'" + path + "'");
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
