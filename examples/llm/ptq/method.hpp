// What `nibble quantize --method` says: steps joined by '+', e.g. rtn, awq+gptq, rotate+gptq, gptq+autoround.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "nibble/core/error.hpp"

namespace llm {

/// How the codes of a matrix are chosen, once its grids or its Hessian are known.
enum class Rounding {
  rtn,         ///< round to nearest; ranges by min and max
  mse,         ///< round to nearest; ranges that lose least
  importance,  ///< ranges and codes weighted by the inputs' mean squares
  hqq,         ///< half-quadratic zero points, no calibration
  clip,        ///< round to nearest; AWQ's ranges, clipped where the outputs lose least
  gptq,        ///< column by column, the error carried to what is left
};

constexpr std::string_view name_of(Rounding r) noexcept {
  switch (r) {
    case Rounding::rtn: return "rtn";
    case Rounding::mse: return "mse";
    case Rounding::importance: return "importance";
    case Rounding::hqq: return "hqq";
    case Rounding::clip: return "clip";
    case Rounding::gptq: return "gptq";
  }
  return "?";
}

/// The steps of a method: transforms that keep the float function, then one rounding, then what improves it.
struct Method {
  bool rotate = false;
  bool equalize = false;
  bool smoothquant = false;
  bool awq = false;
  Rounding rounding = Rounding::rtn;
  bool autoround = false;
  bool bias = false;
  bool llm_int8 = false;
  bool tune = false;

  bool transforms() const { return rotate || equalize || smoothquant || awq; }
  /// Transforms that each block goes through on its own.
  bool moves_factors() const { return equalize || smoothquant || awq; }
  /// Whether a text must be read to run it.
  bool needs_calibration() const {
    return smoothquant || awq || autoround || bias || tune || rounding == Rounding::importance ||
           rounding == Rounding::clip || rounding == Rounding::gptq;
  }
  /// Whether anything but rounding to nearest happens.
  bool is_plain() const {
    return !transforms() && rounding == Rounding::rtn && !autoround && !bias && !llm_int8 && !tune;
  }
};

inline const char* method_help() {
  return "How codes are chosen: steps joined by '+'. Transforms that keep the float model: equalize, smoothquant, "
         "awq, "
         "rotate. Then one of rtn (round to nearest), mse (ranges of least error), importance, clip (ranges of "
         "least "
         "error at the outputs; what awq alone ends with), hqq, gptq; then autoround, bias. E.g. gptq, awq+gptq, "
         "gptq+autoround. llm-int8: outlier inputs in 16 bits. tune: format "
         "and "
         "method of every matrix from measured sensitivities";
}

/// Reads "awq+gptq". Throws InvalidArgument for an unknown step, one given twice, and steps in an order that means
/// nothing.
inline Method parse_method(std::string_view text) {
  const auto bad = [&](const std::string& why) {
    nibble::detail::raise<nibble::InvalidArgument>(
        nibble::detail::concat("method '", text, "': ", why, "; expected ", method_help()));
  };
  struct Step {
    std::string_view name;
    int phase;  // 0: a transform, 1: a rounding, 2: an improvement, 3: alone
  };
  static constexpr Step steps[] = {{"rotate", 0},   {"equalize", 0}, {"smoothquant", 0}, {"awq", 0},
                                   {"rtn", 1},      {"mse", 1},      {"importance", 1},  {"hqq", 1},
                                   {"clip", 1},     {"gptq", 1},     {"autoround", 2},   {"bias", 2},
                                   {"llm-int8", 3}, {"tune", 3}};
  Method m;
  int phase = 0;
  bool rounds = false;
  std::vector<std::string_view> seen;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find('+', begin), text.size());
    const std::string_view word = text.substr(begin, end - begin);
    begin = end + 1;
    const Step* step =
        std::find_if(std::begin(steps), std::end(steps), [&](const Step& s) { return s.name == word; });
    if (step == std::end(steps)) bad("'" + std::string(word) + "' is no step");
    if (std::find(seen.begin(), seen.end(), word) != seen.end())
      bad("'" + std::string(word) + "' stands there twice");
    if (!seen.empty() && (step->phase == 3 || phase == 3))
      bad("'" + std::string(word) + "' goes with no other step");
    if (step->phase < phase) bad("'" + std::string(word) + "' comes too late");
    if (step->phase == 2 && phase == 2) bad("autoround and bias do not go together");
    if (step->phase == 1 && phase == 1) bad("only one rounding is possible");
    phase = step->phase;
    rounds = rounds || phase == 1;
    seen.push_back(word);
    m.rotate = m.rotate || word == "rotate";
    m.equalize = m.equalize || word == "equalize";
    m.smoothquant = m.smoothquant || word == "smoothquant";
    m.awq = m.awq || word == "awq";
    m.autoround = m.autoround || word == "autoround";
    m.bias = m.bias || word == "bias";
    m.llm_int8 = m.llm_int8 || word == "llm-int8";
    m.tune = m.tune || word == "tune";
    for (const Rounding r : {Rounding::mse, Rounding::importance, Rounding::hqq, Rounding::clip, Rounding::gptq})
      if (word == name_of(r)) m.rounding = r;
  }
  // The paper's AWQ is both, scales and clipping.
  if (m.awq && !rounds) m.rounding = Rounding::clip;
  return m;
}

}  // namespace llm
