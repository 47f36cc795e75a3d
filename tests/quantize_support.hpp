// An independent quantizer to compare with: one element at a time, by multi-index, in double arithmetic.
//
// A quotient or sum of two floats that is taken in double and then rounded to float equals the float operation
// (53 >= 2 * 24 + 2), so the codes can be compared exactly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include <Eigen/Core>

#include "nibble/quantize/quantizer.hpp"

namespace nibble_test {

using nibble::Format;
using nibble::Granularity;
using nibble::ScaleType;
using nibble::Scheme;
using nibble::Shape;
using nibble::Symmetry;

inline std::uint32_t bits(float x) {
  std::uint32_t b;
  std::memcpy(&b, &x, sizeof b);
  return b;
}

inline double wide(float x) { return static_cast<double>(x); }
inline float narrow(double x) { return static_cast<float>(x); }

/// Nearest integer, ties to even, without the floating-point environment.
inline double nearest_even(double x) {
  const double down = std::floor(x);
  const double rest = x - down;
  if (rest > 0.5 || (rest == 0.5 && std::fmod(down, 2.0) != 0.0)) return down + 1.0;
  return down;
}

/// Values in C order with their shape.
struct Values {
  Shape shape;
  std::vector<float> x;
};

inline std::size_t count(const Shape& shape) {
  std::size_t n = 1;
  for (std::size_t length : shape) n *= length;
  return n;
}

inline std::vector<std::size_t> index_of(const Shape& shape, std::size_t flat) {
  std::vector<std::size_t> index(shape.size());
  for (std::size_t d = shape.size(); d-- > 0; flat /= shape[d]) index[d] = flat % shape[d];
  return index;
}

inline Values random_values(const Shape& shape, unsigned seed, float spread = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.1F, spread);
  Values v{shape, std::vector<float>(count(shape))};
  for (float& x : v.x) x = normal(random);
  return v;
}

inline float to_storage(ScaleType type, float v) {
  if (type == ScaleType::fp16) return static_cast<float>(Eigen::half(v));
  if (type == ScaleType::bf16) return static_cast<float>(Eigen::bfloat16(v));
  return v;
}

/// Key of the parameter that an element uses, by the definition of the granularity; keys sort in C order.
inline std::vector<std::size_t> param_key(const Granularity& g, const Shape& shape,
                                          std::vector<std::size_t> index) {
  if (g.kind == Granularity::Kind::per_tensor) return {};
  const auto axis = static_cast<std::size_t>(g.axis < 0 ? g.axis + static_cast<int>(shape.size()) : g.axis);
  if (g.kind == Granularity::Kind::per_channel) return {index[axis]};
  index[axis] /= g.group_size;
  return index;
}

struct Reference {
  std::vector<nibble::Grid> grids;  // in C order of the parameters
  std::vector<std::size_t> param;   // of each element
  std::vector<int> codes;           // of each element
  std::vector<float> values;        // dequantized
};

inline nibble::Grid reference_grid(const Scheme& s, float lo, float hi) {
  const double half = std::ldexp(0.5, static_cast<int>(nibble::bits_of(s.format)));  // 128, 8 .. 2
  const double first = s.format == Format::int8 ? -half : 0;
  const double steps = 2 * half - 1;
  const double smallest = s.scale_type == ScaleType::fp16 ? std::ldexp(1.0, -24) : std::ldexp(1.0, -126);
  nibble::Grid g;
  const auto store = [&](double v) { return std::max(to_storage(s.scale_type, narrow(v)), narrow(smallest)); };
  if (s.symmetry == Symmetry::symmetric) {
    const bool integer = s.format != Format::nf4 && s.format != Format::fp4;
    if (integer && s.format != Format::int8) g.zero = static_cast<int>(half);
    const double absmax = std::max(std::fabs(wide(lo)), std::fabs(wide(hi)));
    const double top = integer ? half - 1 : 1.0;
    double scale = absmax / top;
    if (s.full_range) scale = std::max(-wide(lo) / (top + 1), wide(hi) / top);
    if (absmax > 0) g.scale = store(scale);
  } else if (s.symmetry == Symmetry::asymmetric) {
    lo = std::min(lo, 0.0F);
    hi = std::max(hi, 0.0F);
    if (hi > lo) g.scale = store(wide(narrow(wide(hi) / steps)) - wide(narrow(wide(lo) / steps)));
    const double z = nearest_even(wide(narrow(first - wide(narrow(wide(lo) / wide(g.scale))))));
    g.zero = static_cast<int>(std::clamp(z, first, first + steps));
  } else {
    if (lo != 0 || hi != 0) g.scale = store(wide(narrow(wide(hi) - wide(lo))) / steps);
    g.offset = to_storage(s.scale_type, narrow(wide(lo) - first * wide(g.scale)));
  }
  return g;
}

/// Quantizes naively. grids: where given, used instead of fitting.
inline Reference reference(const Values& v, const Scheme& s, const std::vector<nibble::Grid>& grids = {}) {
  Reference r;
  std::map<std::vector<std::size_t>, std::pair<float, float>> ranges;
  for (std::size_t i = 0; i < v.x.size(); ++i) {
    const auto key = param_key(s.granularity, v.shape, index_of(v.shape, i));
    const auto at = ranges.emplace(key, std::make_pair(v.x[i], v.x[i])).first;
    at->second = {std::min(at->second.first, v.x[i]), std::max(at->second.second, v.x[i])};
  }
  std::map<std::vector<std::size_t>, std::size_t> order;
  for (const auto& range : ranges) {
    order[range.first] = r.grids.size();
    r.grids.push_back(reference_grid(s, range.second.first, range.second.second));
  }
  if (!grids.empty()) r.grids = grids;
  for (std::size_t i = 0; i < v.x.size(); ++i) {
    const std::size_t p = order[param_key(s.granularity, v.shape, index_of(v.shape, i))];
    const nibble::Grid& g = r.grids[p];
    r.param.push_back(p);
    const double shifted = wide(narrow(wide(v.x[i]) - wide(g.offset)));
    const double ratio = wide(narrow(shifted / wide(g.scale)));
    if (s.format == Format::nf4 || s.format == Format::fp4) {
      const float* levels = s.format == Format::nf4 ? nibble::nf4_levels : nibble::fp4_levels;
      int nearest = 0;
      for (int c = 1; c < 16; ++c)
        if (std::fabs(ratio - wide(levels[c])) < std::fabs(ratio - wide(levels[nearest]))) nearest = c;
      // The zero of the sign: what is at or above 0 takes the upper one of fp4's two.
      if (s.format == Format::fp4 && nearest == 7 && ratio >= 0) nearest = 8;
      r.codes.push_back(nearest);
      r.values.push_back(narrow(wide(g.scale) * wide(levels[nearest])));
      continue;
    }
    const bool whole = s.symmetry != Symmetry::symmetric || s.full_range;
    const double codes = std::ldexp(1.0, static_cast<int>(nibble::bits_of(s.format)));
    const double lowest = s.format == Format::int8 ? -codes / 2 : 0;
    const double first = whole ? lowest : lowest + 1;
    const double last = lowest + codes - 1;
    const double q = std::clamp(nearest_even(ratio) + g.zero, first, last);
    r.codes.push_back(static_cast<int>(q));
    if (s.symmetry == Symmetry::float_offset)
      r.values.push_back(std::fma(g.scale, narrow(q), g.offset));
    else
      r.values.push_back(narrow(wide(g.scale) * (q - g.zero)));
  }
  return r;
}

/// Codes of a tensor, one an element, in C order.
inline std::vector<int> codes_of(const nibble::QuantizedTensor& q) {
  std::vector<int> codes;
  for (std::size_t l = 0; l < q.line_count(); ++l)
    for (std::size_t i = 0; i < q.line_length(); ++i) codes.push_back(static_cast<int>(q.code(l, i)));
  return codes;
}

inline std::vector<float> values_of(const nibble::QuantizedTensor& q) {
  std::vector<float> values(q.size());
  q.dequantize(values.data());
  return values;
}

inline std::vector<nibble::Grid> grids_of(const nibble::QuantizedTensor& q) {
  std::vector<nibble::Grid> grids;
  for (std::size_t p = 0; p < q.param_count(); ++p) grids.push_back(q.grid(p));
  return grids;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

inline bool same_bytes(const nibble::Buffer& a, const nibble::Buffer& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

/// A view of values in C order, for the erased entry.
inline nibble::detail::InputView view_of(const Values& v) {
  nibble::detail::InputView view{v.x.data(), nibble::detail::ScalarType::fp32, {}};
  for (std::size_t d = 0; d < v.shape.size(); ++d) {
    std::size_t stride = 1;
    for (std::size_t e = d + 1; e < v.shape.size(); ++e) stride *= v.shape[e];
    view.layout.add(v.shape[d], static_cast<std::ptrdiff_t>(stride));
  }
  return view;
}

inline nibble::QuantizedTensor quantize(const Values& v, const Scheme& s, const nibble::Ranges& ranges = {}) {
  return nibble::detail::quantize_view(view_of(v), s, ranges);
}

inline std::string describe(const Scheme& s, const Shape& shape) {
  return std::string(nibble::name_of(s.format)) + " " + std::string(nibble::name_of(s.symmetry)) +
         (s.full_range ? " full" : "") + ", scales " + std::string(nibble::name_of(s.scale_type)) +
         ", granularity " + std::to_string(static_cast<int>(s.granularity.kind)) + " axis " +
         std::to_string(s.granularity.axis) + " group " + std::to_string(s.granularity.group_size) + ", shape " +
         nibble::detail::shape_text(shape);
}

/// Every scheme of the formats with scales, for one granularity.
inline std::vector<Scheme> all_schemes(const Granularity& g) {
  std::vector<Scheme> schemes;
  for (ScaleType t : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16}) {
    for (Format f : {Format::int8, Format::int6, Format::int5, Format::int4, Format::int3, Format::int2}) {
      for (Symmetry s : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
        schemes.push_back({f, s, g, t, false});
      schemes.push_back({f, Symmetry::symmetric, g, t, true});
    }
    for (Format f : {Format::nf4, Format::fp4}) schemes.push_back({f, Symmetry::symmetric, g, t, false});
  }
  return schemes;
}

}  // namespace nibble_test
