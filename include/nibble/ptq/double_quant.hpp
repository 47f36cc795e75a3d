// Double quantization (QLoRA, Dettmers et al. 2023, section 3): the scales of a quantized tensor are quantized themselves.
//
//   offset = mean of all scales
//   absmax[b] = largest |scale - offset| of block b of 256 scales
//   code[p] = the nearest of a map's 256 values to (scale[p] - offset) / absmax[b]
//   scale'[p] = map[code[p]] * absmax[b] + offset
//
// 8 + 32 / 256 bits a scale: 0.127 bits a weight in groups of 64, where fp32 scales take 0.5 and fp16 ones 0.25. Products run
// with the decoded scales, which are fp32; what gets smaller are files (io/packed_file.hpp).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/formats/dynamic_map.hpp"
#include "nibble/quantize/line_codec.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/quantize/range.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// 256 ascending values that a normalized scale is rounded to.
enum class ScaleMap : std::uint8_t {
  dynamic = 0,  ///< bitsandbytes' 8-bit dynamic map: fine around 0, 6 decades
  linear = 1,   ///< (code - 128) / 127
};

constexpr std::string_view name_of(ScaleMap map) noexcept {
  return map == ScaleMap::dynamic ? "dynamic" : "linear";
}

namespace detail {

constexpr std::array<float, 256> make_linear_map() noexcept {
  std::array<float, 256> map{};
  for (int c = 0; c < 256; ++c) map[static_cast<std::size_t>(c)] = static_cast<float>(c - 128) / 127.0F;
  return map;
}

}  // namespace detail

/// The values of a map, ascending.
inline const std::array<float, 256>& scale_map_values(ScaleMap map) noexcept {
  static constexpr std::array<float, 256> dynamic = detail::make_dynamic_map();
  static constexpr std::array<float, 256> linear = detail::make_linear_map();
  return map == ScaleMap::dynamic ? dynamic : linear;
}

struct DoubleQuantOptions {
  std::size_t block = 256;  ///< scales that share an absmax
  ScaleMap map = ScaleMap::dynamic;
};

/// Scales in 8 bits.
struct DoubleQuantizedScales {
  std::size_t block = 256;
  ScaleMap map = ScaleMap::dynamic;
  float offset = 0.0F;
  std::vector<float> absmax;        ///< one a block
  std::vector<std::uint8_t> codes;  ///< one a scale, in the order of QuantizedTensor's

  std::size_t size() const noexcept { return codes.size(); }
  std::size_t byte_size() const noexcept { return codes.size() + (absmax.size() + 1) * sizeof(float); }

  float scale(std::size_t p) const noexcept {
    return detail::rounded(detail::rounded(scale_map_values(map)[codes[p]] * absmax[p / block]) + offset);
  }
  std::vector<float> decode() const {
    const detail::FpEnvironment environment;
    std::vector<float> scales(size());
    for (std::size_t p = 0; p < scales.size(); ++p) scales[p] = scale(p);
    return scales;
  }
};

/// Quantizes scales. `used` says which of them matter (those of groups of zeros do not, and would spoil their block); empty:
/// all. What is not used decodes to about the mean. A positive scale decodes to a positive one: where the nearest
/// code's is not, to the smallest of its block that is. Throws InvalidArgument for a scale that is not finite.
inline DoubleQuantizedScales double_quantize_scales(const std::vector<float>& scales,
                                                    const DoubleQuantOptions& options = {},
                                                    const std::vector<bool>& used = {}) {
  const detail::FpEnvironment environment;
  detail::require(options.block >= 1, "double quantization: block is 0, expected at least 1");
  detail::require(options.map <= ScaleMap::linear, "double quantization: unknown map ",
                  static_cast<int>(options.map));
  detail::require(used.empty() || used.size() == scales.size(), "double quantization: used has ", used.size(),
                  " values for ", scales.size(), " scales");
  DoubleQuantizedScales q;
  q.block = options.block;
  q.map = options.map;
  q.codes.resize(scales.size());
  q.absmax.assign(detail::ceil_div(scales.size(), q.block), 0.0F);
  const auto matters = [&](std::size_t p) { return used.empty() || used[p]; };
  double sum = 0.0;
  std::size_t count = 0;
  for (std::size_t p = 0; p < scales.size(); ++p) {
    detail::require(detail::scalar::is_finite(scales[p]), "scale ", p, " is ", scales[p], ", expected a number");
    if (!matters(p)) continue;
    sum += static_cast<double>(scales[p]);
    ++count;
  }
  if (count != 0) q.offset = static_cast<float>(sum / static_cast<double>(count));
  const std::array<float, 256>& map = scale_map_values(q.map);
  const auto difference = [&](std::size_t p) {
    const float d = matters(p) ? detail::rounded(scales[p] - q.offset) : 0.0F;
    detail::require(detail::scalar::is_finite(d), "scale ", p, " is ", scales[p], ": too far from the mean");
    return d;
  };
  for (std::size_t p = 0; p < scales.size(); ++p) {
    float& absmax = q.absmax[p / q.block];
    absmax = std::max(absmax, std::fabs(difference(p)));
  }
  for (std::size_t p = 0; p < scales.size(); ++p) {
    const float absmax = q.absmax[p / q.block];
    q.codes[p] = detail::nearest_in_map(map, absmax == 0.0F ? 0.0F : detail::rounded(difference(p) / absmax));
    if (matters(p) && scales[p] > 0.0F)
      while (q.codes[p] != 255 && !(q.scale(p) > 0.0F)) ++q.codes[p];
  }
  return q;
}

/// A tensor whose scales are double-quantized.
struct DoubleQuantizedTensor {
  QuantizedTensor tensor;        ///< the decoded scales, as fp32: what products take
  DoubleQuantizedScales scales;  ///< the compact form, for files

  /// Codes, compact scales and zero points (a float offset is kept as fp32).
  std::size_t byte_size() const noexcept {
    return tensor.codes().size() + scales.byte_size() + tensor.zeros().size();
  }
  double bits_per_weight() const noexcept {
    return tensor.empty() ? 0.0 : 8.0 * static_cast<double>(byte_size()) / static_cast<double>(tensor.size());
  }
};

namespace detail {

/// Which parameters have a code that is not their zero.
inline std::vector<bool> used_params(const QuantizedTensor& q) {
  std::vector<bool> used(q.param_count(), false);
  const ParamStorage plain{q.format(), q.scheme().symmetry,   ScaleType::fp32, nullptr,
                           nullptr,    code_range(q.scheme())};
  for (std::size_t l = 0; l < q.line_count(); ++l) {
    const LineParams where = q.line_params(l);
    for (std::size_t i = 0, run; i < q.line_length(); i += run) {
      run = run_length(where, i, q.line_length());
      const std::size_t p = where.index(i);
      Grid g = q.grid(p);
      g.scale = 1.0F;
      g.offset = 0.0F;
      for (std::size_t e = i; e < i + run && !used[p]; ++e)
        used[p] = decode(plain, g, static_cast<int>(q.code(l, e))) != 0.0F;
    }
  }
  return used;
}

/// q with other scales, as fp32.
inline QuantizedTensor with_scales(const QuantizedTensor& q, const std::vector<float>& values) {
  Scheme scheme = q.scheme();
  scheme.scale_type = ScaleType::fp32;
  Buffer scales(values.size() * sizeof(float));
  if (!values.empty()) std::memcpy(scales.mutable_data(), values.data(), scales.size());
  Buffer zeros = q.zeros();
  if (scheme.symmetry == Symmetry::float_offset) {
    zeros = Buffer(scales.size());
    for (std::size_t p = 0; p < values.size(); ++p) zeros.as_mutable<float>()[p] = q.offset(p);
  }
  return QuantizedTensor::from_parts(scheme, q.shape(), q.codes(), std::move(scales), std::move(zeros));
}

}  // namespace detail

/// Double-quantizes the scales of a tensor of any scheme; its codes and zero points stay. Throws InvalidArgument for a
/// format without scales.
inline DoubleQuantizedTensor double_quantize(const QuantizedTensor& q, const DoubleQuantOptions& options = {}) {
  detail::require(has_scales(q.format()), "double quantization of a tensor of format ", name_of(q.format()),
                  ", which has no scales");
  std::vector<float> scales(q.param_count());
  for (std::size_t p = 0; p < scales.size(); ++p) scales[p] = q.scale(p);
  DoubleQuantizedTensor result;
  result.scales = double_quantize_scales(scales, options, detail::used_params(q));
  result.tensor = detail::with_scales(q, result.scales.decode());
  return result;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
