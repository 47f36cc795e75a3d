// Keys and values of the tokens of one sequence, in the layout that the products of attention read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string_view>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// How a cache stores keys and values.
enum class KvFormat : std::uint8_t {
  fp32,
  fp16,  ///< rounded to nearest even; beyond its range Inf
  int8,  ///< symmetric codes, a scale for each position and head
};

constexpr std::string_view name_of(KvFormat format) noexcept {
  switch (format) {
    case KvFormat::fp32: return "fp32";
    case KvFormat::fp16: return "fp16";
    case KvFormat::int8: return "int8";
  }
  return "?";
}

/// Shape of a cache.
struct KvCacheOptions {
  std::size_t layers = 0;
  std::size_t kv_heads = 0;
  std::size_t head_size = 0;
  std::size_t capacity = 0;  ///< positions
  KvFormat format = KvFormat::fp16;
};

namespace detail {

/// Positions whose weights in attention's second product share a scale where the cache is INT8.
inline constexpr std::size_t kv_group = 32;

/// Keys or values of one layer and head.
struct KvPlane {
  PanelView panels;               // of all positions: whoever multiplies shortens n or k
  const float* scales = nullptr;  // int8: [positions]
};

}  // namespace detail

/// The keys and values of one sequence: for every layer and key-value head two matrices in the layout "panel16"
/// (kernels/args.hpp). Keys are positions x head_size (an output channel a position), values head_size x positions: both
/// products of attention then read them as they lie, in order, and a token appends to both.
///
/// Writing different positions or layers from several threads is safe; so is reading what has been written. The memory is
/// asked for once, as zeros: pages that no token reaches cost nothing.
class KvCache {
 public:
  KvCache() = default;

  /// An empty cache. Throws InvalidArgument where a size is 0 or all of them overflow, std::bad_alloc.
  explicit KvCache(const KvCacheOptions& options) : options_(options) {
    using namespace detail;
    require(options.layers > 0 && options.kv_heads > 0 && options.head_size > 0 && options.capacity > 0,
            "a KV cache has ", options.layers, " layers, ", options.kv_heads, " heads of ", options.head_size,
            " and ", options.capacity, " positions, expected at least 1 of each");
    const std::size_t element = options.format == KvFormat::fp32 ? 4 : options.format == KvFormat::fp16 ? 2 : 1;
    const std::size_t positions =
        checked_add(options.capacity, kv_group - 1, "KV cache capacity") / kv_group * kv_group;
    const std::size_t inputs = checked_add(options.head_size, k_unit - 1, "KV cache head_size") / k_unit * k_unit;
    const std::size_t line = 64;
    const auto size = [](std::size_t a, std::size_t b) { return checked_mul(a, b, "KV cache size"); };
    key_panel_ = size(size(inputs, panel_width), element);
    // An odd number of lines: the panels of a head are read side by side, and must not meet in the same cache sets.
    value_panel_ = round_up(size(size(positions, panel_width), element), line);
    if (value_panel_ / line % 2 == 0) value_panel_ += line;
    key_bytes_ = round_up(size(positions / panel_width, key_panel_), line);
    value_bytes_ = size(ceil_div(options.head_size, panel_width), value_panel_);
    scale_bytes_ = options.format == KvFormat::int8 ? round_up(positions * sizeof(float), line) : 0;
    plane_ =
        checked_add(checked_add(key_bytes_, value_bytes_, "KV cache size"), 2 * scale_bytes_, "KV cache size");
    // An odd number of lines here, too.
    if (plane_ / line % 2 == 0) plane_ += line;
    padded_positions_ = positions;
    padded_inputs_ = inputs;
    const std::size_t bytes =
        checked_add(size(size(options.layers, options.kv_heads), plane_), 2 * line, "KV cache size");
    memory_.reset(static_cast<std::uint8_t*>(std::calloc(bytes, 1)));
    if (memory_ == nullptr) throw_bad_alloc();
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    base_ = memory_.get() + (line - address % line) % line;
  }

  const KvCacheOptions& options() const noexcept { return options_; }
  /// Positions that hold a token.
  std::size_t size() const noexcept { return size_; }
  std::size_t capacity() const noexcept { return options_.capacity; }
  KvFormat format() const noexcept { return options_.format; }
  /// What attention reads for a position: keys and values of all layers.
  std::size_t bytes_per_position() const noexcept {
    const std::size_t element = format() == KvFormat::fp32 ? 4 : format() == KvFormat::fp16 ? 2 : 1;
    const std::size_t scales = format() == KvFormat::int8 ? sizeof(float) : 0;
    return 2 * options_.layers * options_.kv_heads * (options_.head_size * element + scales);
  }

  void clear() noexcept {
    size_ = 0;
    exceptional_ = false;
  }
  /// Forgets the positions from `size` on; keeps all where there are no more.
  void truncate(std::size_t size) noexcept { size_ = size < size_ ? size : size_; }

  /// Writes the keys and values of one layer at `position`, which may lie beyond size(): advance() makes it count.
  /// @param keys, values  kv_heads * head_size floats each, head by head
  /// Throws InvalidArgument where the cache has no such layer or position.
  void store(std::size_t layer, std::size_t position, const float* keys, const float* values,
             const detail::KernelTable& kernels = detail::kernels()) {
    detail::require(layer < options_.layers, "layer is ", layer, ", the KV cache has ", options_.layers);
    detail::require(position < options_.capacity, "position is ", position, ": the KV cache holds ",
                    options_.capacity, " tokens and is full");
    const detail::FpEnvironment environment;
    for (std::size_t h = 0; h < options_.kv_heads; ++h) {
      std::uint8_t* plane = plane_at(layer, h);
      const float* k = keys + h * options_.head_size;
      const float* v = values + h * options_.head_size;
      switch (format()) {
        case KvFormat::fp32: store_floats(plane, position, k, v, kernels); break;
        case KvFormat::fp16: store_halves(plane, position, k, v, kernels); break;
        case KvFormat::int8: store_codes(plane, position, k, v, kernels); break;
      }
    }
  }

  /// Makes `tokens` more positions count. Throws InvalidArgument beyond the capacity.
  void advance(std::size_t tokens) {
    detail::require(tokens <= options_.capacity - size_, "the KV cache holds ", options_.capacity, " tokens, ",
                    size_, " are taken, ", tokens, " more do not fit");
    size_ += tokens;
  }

  /// For attention: keys of one layer and head, n = capacity, k = head_size; INT8 ones with a scale a channel.
  detail::KvPlane keys(std::size_t layer, std::size_t head) const noexcept {
    std::uint8_t* plane = plane_at(layer, head);
    detail::KvPlane out;
    out.panels = view(options_.capacity, options_.head_size, padded_inputs_, plane, key_panel_);
    if (format() == KvFormat::int8) {
      out.scales = reinterpret_cast<const float*>(plane + key_bytes_ + value_bytes_);
      out.panels.scales = out.scales;
    }
    return out;
  }
  /// Values of one layer and head, n = head_size, k = capacity. INT8 ones have their scales, a position's each, beside
  /// them: whoever multiplies puts them into the other operand.
  detail::KvPlane values(std::size_t layer, std::size_t head) const noexcept {
    std::uint8_t* plane = plane_at(layer, head);
    detail::KvPlane out;
    out.panels = view(options_.head_size, options_.capacity, padded_positions_, plane + key_bytes_, value_panel_);
    if (format() == KvFormat::int8)
      out.scales = reinterpret_cast<const float*>(plane + key_bytes_ + value_bytes_ + scale_bytes_);
    return out;
  }

  /// True once a value was stored that is NaN or Inf: 0 times it is not 0, so attention must not look beyond what a
  /// token may see.
  bool exceptional() const noexcept { return __atomic_load_n(&exceptional_, __ATOMIC_RELAXED); }

 private:
  struct Free {
    void operator()(std::uint8_t* p) const noexcept { std::free(p); }
  };

  [[noreturn]] static void throw_bad_alloc() {
#if NIBBLE_EXCEPTIONS
    throw std::bad_alloc();
#else
    std::abort();
#endif
  }

  std::uint8_t* plane_at(std::size_t layer, std::size_t head) const noexcept {
    return base_ + (layer * options_.kv_heads + head) * plane_;
  }
  detail::PanelView view(std::size_t n, std::size_t k, std::size_t k_padded, const std::uint8_t* codes,
                         std::size_t panel_bytes) const noexcept {
    detail::PanelView w;
    w.format = format() == KvFormat::fp32   ? Format::fp32
               : format() == KvFormat::fp16 ? Format::fp16
                                            : Format::int8;
    w.n = n;
    w.k = k;
    w.k_padded = k_padded;
    w.group_size = k_padded;
    w.groups = 1;
    w.codes = codes;
    w.panel_bytes = panel_bytes;
    return w;
  }
  void note(bool finite) noexcept {
    if (!finite) __atomic_store_n(&exceptional_, true, __ATOMIC_RELAXED);
  }

  void store_floats(std::uint8_t* plane, std::size_t position, const float* k, const float* v,
                    const detail::KernelTable& kernels) noexcept {
    using detail::panel_width;
    float* key = reinterpret_cast<float*>(plane + position / panel_width * key_panel_) + position % panel_width;
    for (std::size_t d = 0; d < options_.head_size; ++d) key[d * panel_width] = k[d];
    for (std::size_t d = 0; d < options_.head_size; d += panel_width)
      std::memcpy(plane + key_bytes_ + d / panel_width * value_panel_ + position * panel_width * sizeof(float),
                  v + d, lanes_from(d) * sizeof(float));
    note(kernels.line_range(v, options_.head_size).finite);
  }
  void store_halves(std::uint8_t* plane, std::size_t position, const float* k, const float* v,
                    const detail::KernelTable& kernels) noexcept {
    using detail::panel_width;
    std::uint16_t* key =
        reinterpret_cast<std::uint16_t*>(plane + position / panel_width * key_panel_) + position % panel_width;
    std::uint16_t half[panel_width];
    bool finite = true;
    for (std::size_t d = 0; d < options_.head_size; d += panel_width) {
      const std::size_t n = lanes_from(d);
      kernels.fp16_from_float(k + d, n, half);
      for (std::size_t j = 0; j < n; ++j) key[(d + j) * panel_width] = half[j];
      kernels.fp16_from_float(v + d, n, half);
      for (std::size_t j = 0; j < n; ++j) finite = finite && (half[j] & 0x7C00U) != 0x7C00U;
      std::memcpy(plane + key_bytes_ + d / panel_width * value_panel_ + position * panel_width * sizeof(half[0]),
                  half, n * sizeof(half[0]));
    }
    note(finite);
  }
  void store_codes(std::uint8_t* plane, std::size_t position, const float* k, const float* v,
                   const detail::KernelTable& kernels) noexcept {
    using detail::panel_width;
    auto* key_scales = reinterpret_cast<float*>(plane + key_bytes_ + value_bytes_);
    auto* value_scales = reinterpret_cast<float*>(plane + key_bytes_ + value_bytes_ + scale_bytes_);
    std::uint8_t* key = plane + position / panel_width * key_panel_ + position % panel_width * 4;
    quantize(k, kernels, key_scales + position,
             [&](std::size_t d, std::uint8_t code) { key[d / 4 * 64 + d % 4] = code; });
    std::uint8_t* value = plane + key_bytes_ + position / 4 * 64 + position % 4;
    quantize(v, kernels, value_scales + position, [&](std::size_t d, std::uint8_t code) {
      value[d / panel_width * value_panel_ + d % panel_width * 4] = code;
    });
  }
  /// put(dimension, code + 128) for one head, one scale for all of it.
  template <class Put>
  void quantize(const float* x, const detail::KernelTable& kernels, float* scale, const Put& put) noexcept {
    const LineScale s = line_scale(kernels.line_range(x, options_.head_size));
    *scale = s.scale;
    note(s.finite);
    for (std::size_t d = 0; d < options_.head_size; d += 64) {
      std::int8_t codes[64] = {};
      const std::size_t n = options_.head_size - d < 64 ? options_.head_size - d : 64;
      if (s.finite) {
        detail::QuantizeLineArgs line;
        line.x = x + d;
        line.n = n;
        line.scale = s.scale;
        line.qmin = -127;
        line.qmax = 127;
        line.q = codes;
        kernels.quantize_line(line);
      }
      for (std::size_t j = 0; j < n; ++j) put(d + j, static_cast<std::uint8_t>(codes[j] + 128));
    }
  }
  struct LineScale {
    float scale;
    bool finite;
  };
  /// QuantizeRowsArgs' symmetric scale.
  static LineScale line_scale(const detail::LineRange& range) noexcept {
    if (!range.finite) return {std::numeric_limits<float>::quiet_NaN(), false};
    const float widest = -range.min > range.max ? -range.min : range.max;
    if (widest == 0.0F) return {1.0F, true};
    const float scale = widest / 127.0F;
    return {scale > std::numeric_limits<float>::min() ? scale : std::numeric_limits<float>::min(), true};
  }
  std::size_t lanes_from(std::size_t d) const noexcept {
    return options_.head_size - d < detail::panel_width ? options_.head_size - d : detail::panel_width;
  }

  KvCacheOptions options_;
  std::size_t size_ = 0;
  std::size_t key_panel_ = 0;  // bytes of a panel of keys, and from one panel of values to the next
  std::size_t value_panel_ = 0;
  std::size_t key_bytes_ = 0;  // a plane: keys, values, scales of the keys, scales of the values
  std::size_t value_bytes_ = 0;
  std::size_t scale_bytes_ = 0;
  std::size_t plane_ = 0;
  std::size_t padded_positions_ = 0;
  std::size_t padded_inputs_ = 0;
  bool exceptional_ = false;
  std::unique_ptr<std::uint8_t[], Free> memory_;
  std::uint8_t* base_ = nullptr;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
