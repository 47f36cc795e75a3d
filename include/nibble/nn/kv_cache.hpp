// Keys and values of the tokens of one sequence, in the layout that the products of attention read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string_view>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// How a cache stores keys and values.
enum class KvFormat : std::uint8_t {
  fp32,
  fp16,  ///< rounded to nearest even; beyond its range Inf
  int8,  ///< symmetric codes, a scale for each position and head
  /// Codes 0..15 with a float offset, 5 bits a value, in blocks of 32 positions. Keys: a scale for each channel of a block,
  /// values: one for each position and 64 channels (KIVI, Liu et al. 2024). A block is fp16 until its last position is
  /// stored: the token at position p sees the blocks that end at p or before as codes, and its own as fp16.
  int4,
};

constexpr std::string_view name_of(KvFormat format) noexcept {
  switch (format) {
    case KvFormat::fp32: return "fp32";
    case KvFormat::fp16: return "fp16";
    case KvFormat::int8: return "int8";
    case KvFormat::int4: return "int4";
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
  /// INT4: most tokens that are stored before attention looks at the first of them. As many positions, and a block, stay
  /// in fp16 beside the codes.
  std::size_t step = 512;
};

namespace detail {

/// Positions whose weights in attention's second product share a scale where the cache is INT8.
inline constexpr std::size_t kv_group = 32;

/// Keys or values of one layer and head.
struct KvPlane {
  PanelView panels;               // of all positions: whoever multiplies shortens n or k
  const float* scales = nullptr;  // int8: [positions]
};

/// INT4: channels of a position's values that share a scale.
inline constexpr std::size_t kv_value_group = 64;

/// Keys and values of one layer and head in INT4. value = scale * (code - 8) + offset.
struct KvBlocks {
  PanelView keys;                             // positions x head_size, codes - 8: without scales
  const std::uint16_t* key_scales = nullptr;  // fp16 [blocks][head_size]
  PanelView key_offsets;                      // fp16 panels, blocks x head_size
  PanelView values;                           // head_size x positions, codes - 8
  const float* value_scales = nullptr;        // [groups][padded positions]
  const float* value_offsets = nullptr;       // [groups][padded positions]
  std::size_t padded_positions = 0;
  std::size_t groups = 0;
  // The last positions in fp16: position p at p % ring.
  std::size_t ring = 0;
  PanelView recent_keys;    // ring x head_size
  PanelView recent_values;  // head_size x ring
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
    const auto lines = [&](std::size_t bytes) { return round_up(bytes, line); };
    const bool int4 = options.format == KvFormat::int4;
    key_panel_ = size(size(inputs, panel_width), element) / (int4 ? 2 : 1);
    // An odd number of lines: the panels of a head are read side by side, and must not meet in the same cache sets.
    const auto odd = [&](std::size_t bytes) {
      return lines(bytes) / line % 2 == 0 ? lines(bytes) + line : lines(bytes);
    };
    value_panel_ = odd(size(size(positions, panel_width), element) / (int4 ? 2 : 1));
    key_bytes_ = lines(size(positions / panel_width, key_panel_));
    value_bytes_ = size(ceil_div(options.head_size, panel_width), value_panel_);
    scale_bytes_ = options.format == KvFormat::int8 ? lines(positions * sizeof(float)) : 0;
    plane_ =
        checked_add(checked_add(key_bytes_, value_bytes_, "KV cache size"), 2 * scale_bytes_, "KV cache size");
    padded_positions_ = positions;
    padded_inputs_ = inputs;
    if (int4) {
      // Parts of a plane behind the codes.
      const auto add = [&](std::size_t bytes) {
        const std::size_t at = plane_;
        plane_ = checked_add(plane_, lines(bytes), "KV cache size");
        return at;
      };
      const std::size_t blocks = positions / kv_group;
      const std::size_t groups = ceil_div(options.head_size, kv_value_group);
      ring_ = std::min(positions, round_up(std::min(options.step, positions), kv_group) + kv_group);
      key_scales_at_ = add(size(blocks * 2, options.head_size));
      key_offset_panel_ = size(inputs * 2, panel_width);
      key_offsets_at_ = add(size(ceil_div(blocks, panel_width), key_offset_panel_));
      value_scales_at_ = add(size(groups * 4, positions));
      value_offsets_at_ = add(size(groups * 4, positions));
      recent_key_panel_ = size(inputs * 2, panel_width);
      recent_keys_at_ = add(size(ring_ / panel_width, recent_key_panel_));
      recent_value_panel_ = odd(size(ring_ * 2, panel_width));
      recent_values_at_ = add(size(ceil_div(options.head_size, panel_width), recent_value_panel_));
      stored_ = std::vector<std::uint32_t>(size(options.layers, blocks), 0);
      ones_.assign(round_up(std::max(options.head_size, kv_group), panel_width), 1.0F);
    }
    // An odd number of lines here, too.
    if (plane_ / line % 2 == 0) plane_ += line;
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
    if (format() == KvFormat::int4) {
      const std::size_t keys = options_.head_size / 2 + options_.head_size * 4 / detail::kv_group;
      const std::size_t values =
          options_.head_size / 2 + 8 * detail::ceil_div(options_.head_size, detail::kv_value_group);
      return options_.layers * options_.kv_heads * (keys + values);
    }
    const std::size_t element = format() == KvFormat::fp32 ? 4 : format() == KvFormat::fp16 ? 2 : 1;
    const std::size_t scales = format() == KvFormat::int8 ? sizeof(float) : 0;
    return 2 * options_.layers * options_.kv_heads * (options_.head_size * element + scales);
  }

  void clear() noexcept {
    size_ = reach_ = 0;
    exceptional_ = false;
    std::fill(stored_.begin(), stored_.end(), 0U);
  }
  /// Forgets the positions from `size` on; keeps all where there are no more. INT4: a block that is cut open is fp16 again,
  /// as it was stored if its positions are among the last options().step, else as its codes say.
  void truncate(std::size_t size) {
    size_ = size < size_ ? size : size_;
    if (format() != KvFormat::int4) return;
    const detail::FpEnvironment environment;
    const std::size_t block = size_ / detail::kv_group, blocks = padded_positions_ / detail::kv_group;
    const bool lost = size_ % detail::kv_group != 0 && block * detail::kv_group + ring_ < reach_;
    for (std::size_t layer = 0; layer < options_.layers; ++layer) {
      for (std::size_t h = 0; lost && h < options_.kv_heads; ++h) reopen(layer, h, block);
      std::uint32_t* stored = stored_.data() + layer * blocks;
      for (std::size_t b = block; b < blocks; ++b) stored[b] = 0;
      if (size_ % detail::kv_group != 0) stored[block] = (1U << (size_ % detail::kv_group)) - 1;
    }
    reach_ = size_;
  }

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
        case KvFormat::int4: store_recent(plane, position, k, v, kernels); break;
      }
    }
    if (format() != KvFormat::int4) return;
    // Whoever stores the last position of a block makes codes of it.
    const std::size_t block = position / detail::kv_group;
    std::uint32_t& stored = stored_[layer * (padded_positions_ / detail::kv_group) + block];
    const std::uint32_t all = __atomic_or_fetch(&stored, 1U << (position % detail::kv_group), __ATOMIC_ACQ_REL);
    if (all != ~0U) return;
    for (std::size_t h = 0; h < options_.kv_heads; ++h) close(plane_at(layer, h), block, kernels);
  }

  /// Makes `tokens` more positions count. Throws InvalidArgument beyond the capacity.
  void advance(std::size_t tokens) {
    detail::require(tokens <= options_.capacity - size_, "the KV cache holds ", options_.capacity, " tokens, ",
                    size_, " are taken, ", tokens, " more do not fit");
    size_ += tokens;
    reach_ = size_ > reach_ ? size_ : reach_;
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

  /// For attention, INT4.
  detail::KvBlocks blocks(std::size_t layer, std::size_t head) const noexcept {
    std::uint8_t* plane = plane_at(layer, head);
    const auto codes = [&](std::size_t n, std::size_t k, std::size_t k_padded, const std::uint8_t* at,
                           std::size_t panel_bytes) {
      detail::PanelView w = view(n, k, k_padded, at, panel_bytes);
      w.format = Format::int4;
      w.scales = ones_.data();
      return w;
    };
    const auto halves = [&](std::size_t n, std::size_t k, std::size_t k_padded, const std::uint8_t* at,
                            std::size_t panel_bytes) {
      detail::PanelView w = view(n, k, k_padded, at, panel_bytes);
      w.format = Format::fp16;
      return w;
    };
    detail::KvBlocks out;
    out.keys = codes(options_.capacity, options_.head_size, padded_inputs_, plane, key_panel_);
    out.key_scales = reinterpret_cast<const std::uint16_t*>(plane + key_scales_at_);
    out.key_offsets = halves(padded_positions_ / detail::kv_group, options_.head_size, padded_inputs_,
                             plane + key_offsets_at_, key_offset_panel_);
    out.values = codes(options_.head_size, options_.capacity, padded_positions_, plane + key_bytes_, value_panel_);
    out.value_scales = reinterpret_cast<const float*>(plane + value_scales_at_);
    out.value_offsets = reinterpret_cast<const float*>(plane + value_offsets_at_);
    out.padded_positions = padded_positions_;
    out.groups = detail::ceil_div(options_.head_size, detail::kv_value_group);
    out.ring = ring_;
    out.recent_keys =
        halves(ring_, options_.head_size, padded_inputs_, plane + recent_keys_at_, recent_key_panel_);
    out.recent_values = halves(options_.head_size, ring_, ring_, plane + recent_values_at_, recent_value_panel_);
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
    store_halves_at(plane, key_panel_, plane + key_bytes_, value_panel_, position, k, v, kernels);
  }
  void store_recent(std::uint8_t* plane, std::size_t position, const float* k, const float* v,
                    const detail::KernelTable& kernels) noexcept {
    store_halves_at(plane + recent_keys_at_, recent_key_panel_, plane + recent_values_at_, recent_value_panel_,
                    position % ring_, k, v, kernels);
  }
  void store_halves_at(std::uint8_t* keys, std::size_t key_panel, std::uint8_t* values, std::size_t value_panel,
                       std::size_t position, const float* k, const float* v,
                       const detail::KernelTable& kernels) noexcept {
    using detail::panel_width;
    std::uint16_t* key =
        reinterpret_cast<std::uint16_t*>(keys + position / panel_width * key_panel) + position % panel_width;
    std::uint16_t half[panel_width];
    bool finite = true;
    for (std::size_t d = 0; d < options_.head_size; d += panel_width) {
      const std::size_t n = lanes_from(d);
      kernels.fp16_from_float(k + d, n, half);
      for (std::size_t j = 0; j < n; ++j) key[(d + j) * panel_width] = half[j];
      kernels.fp16_from_float(v + d, n, half);
      for (std::size_t j = 0; j < n; ++j) finite = finite && (half[j] & 0x7C00U) != 0x7C00U;
      std::memcpy(values + d / panel_width * value_panel + position * panel_width * sizeof(half[0]), half,
                  n * sizeof(half[0]));
    }
    note(finite);
  }

  /// INT4: a grid of 16 values over [low, high].
  struct BlockGrid {
    float scale = 0.0F;
    float offset = 0.0F;  // what code 8 stands for
    float low = 0.0F;

    BlockGrid(float least, float most, bool finite, bool half) {
      if (!finite) {
        scale = offset = std::numeric_limits<float>::quiet_NaN();
        return;
      }
      low = least;
      scale = (most - least) / 15.0F;
      if (half) scale = float_from_fp16(fp16_from_float(scale));
      offset = std::fma(8.0F, scale, low);
      if (half) offset = float_from_fp16(fp16_from_float(offset));
    }
    std::uint32_t code(float x) const noexcept {
      if (!(scale > 0.0F)) return 8;  // all alike, or not finite
      const float q = std::nearbyint((x - offset) / scale) + 8.0F;
      return q <= 0.0F ? 0U : q >= 15.0F ? 15U : static_cast<std::uint32_t>(q);
    }
  };

  /// Codes of a block whose positions are all in the ring.
  void close(std::uint8_t* plane, std::size_t block, const detail::KernelTable& kernels) noexcept {
    using namespace detail;
    const std::size_t first = block * kv_group, slot = first % ring_;
    const auto* recent = plane + recent_keys_at_;
    auto* key_scales = reinterpret_cast<std::uint16_t*>(plane + key_scales_at_) + block * options_.head_size;
    auto* key_offsets =
        reinterpret_cast<std::uint16_t*>(plane + key_offsets_at_ + block / panel_width * key_offset_panel_) +
        block % panel_width;
    for (std::size_t p = 0; p < kv_group; p += panel_width)
      std::memset(plane + (first + p) / panel_width * key_panel_, 0, key_panel_);
    for (std::size_t d = 0; d < options_.head_size; ++d) {
      float x[kv_group];
      for (std::size_t p = 0; p < kv_group; p += panel_width)
        kernels.float_from_fp16(
            reinterpret_cast<const std::uint16_t*>(recent + (slot + p) / panel_width * recent_key_panel_) +
                d * panel_width,
            panel_width, x + p);
      const LineRange range = kernels.line_range(x, kv_group);
      const BlockGrid grid(range.min, range.max, range.finite, true);
      key_scales[d] = fp16_from_float(grid.scale);
      key_offsets[d * panel_width] = fp16_from_float(grid.offset);
      for (std::size_t p = 0; p < kv_group; ++p)
        put_nibble(plane + (first + p) / panel_width * key_panel_ + p % panel_width * 4, d, grid.code(x[p]));
    }
    auto* value_scales = reinterpret_cast<float*>(plane + value_scales_at_);
    auto* value_offsets = reinterpret_cast<float*>(plane + value_offsets_at_);
    const auto panels = ceil_div(options_.head_size, panel_width);
    for (std::size_t panel = 0; panel < panels; ++panel)
      std::memset(plane + key_bytes_ + panel * value_panel_ + first / 8 * 64, 0, kv_group / 8 * 64);
    for (std::size_t p = 0; p < kv_group; ++p)
      for (std::size_t begin = 0; begin < options_.head_size; begin += kv_value_group) {
        const std::size_t n = std::min(kv_value_group, options_.head_size - begin);
        float x[kv_value_group];
        for (std::size_t d = 0; d < n; d += panel_width)
          kernels.float_from_fp16(
              reinterpret_cast<const std::uint16_t*>(plane + recent_values_at_ +
                                                     (begin + d) / panel_width * recent_value_panel_) +
                  (slot + p) * panel_width,
              std::min(panel_width, n - d), x + d);
        const LineRange range = kernels.line_range(x, n);
        const BlockGrid grid(range.min, range.max, range.finite, false);
        value_scales[begin / kv_value_group * padded_positions_ + first + p] = grid.scale;
        value_offsets[begin / kv_value_group * padded_positions_ + first + p] = grid.offset;
        for (std::size_t d = 0; d < n; ++d)
          put_nibble(plane + key_bytes_ + (begin + d) / panel_width * value_panel_ + d % panel_width * 4,
                     first + p, grid.code(x[d]));
      }
  }
  /// Sets the code of input k of a lane; `lane` is where the lane's first unit is. The code was 0.
  static void put_nibble(std::uint8_t* lane, std::size_t k, std::uint32_t code) noexcept {
    std::uint8_t& byte = lane[k / 8 * 64 + k % 4];
    byte = static_cast<std::uint8_t>(byte | (code << (k % 8 / 4 * 4)));
  }
  static std::uint32_t nibble_at(const std::uint8_t* lane, std::size_t k) noexcept {
    return (static_cast<std::uint32_t>(lane[k / 8 * 64 + k % 4]) >> (k % 8 / 4 * 4)) & 15U;
  }

  /// The values of a closed block's codes to the ring.
  void reopen(std::size_t layer, std::size_t head, std::size_t block) {
    using namespace detail;
    const KvBlocks b = blocks(layer, head);
    std::uint8_t* plane = plane_at(layer, head);
    const KernelTable& table = detail::kernels();
    const bool was = exceptional();
    std::vector<float> k(options_.head_size), v(options_.head_size);
    for (std::size_t p = block * kv_group; p < (block + 1) * kv_group; ++p) {
      for (std::size_t d = 0; d < options_.head_size; ++d) {
        const std::uint8_t* key = plane + p / panel_width * key_panel_ + p % panel_width * 4;
        const std::uint8_t* value = plane + key_bytes_ + d / panel_width * value_panel_ + d % panel_width * 4;
        const float key_offset = float_from_fp16(reinterpret_cast<const std::uint16_t*>(
            b.key_offsets.codes + block / panel_width * key_offset_panel_)[d * panel_width + block % panel_width]);
        const std::size_t at = d / kv_value_group * padded_positions_ + p;
        k[d] = std::fma(float_from_fp16(b.key_scales[block * options_.head_size + d]),
                        static_cast<float>(nibble_at(key, d)) - 8.0F, key_offset);
        v[d] = std::fma(b.value_scales[at], static_cast<float>(nibble_at(value, p)) - 8.0F, b.value_offsets[at]);
      }
      store_recent(plane, p, k.data(), v.data(), table);
    }
    __atomic_store_n(&exceptional_, was, __ATOMIC_RELAXED);
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
  // INT4: where in a plane its parts are, and from one panel to the next.
  std::size_t key_scales_at_ = 0;
  std::size_t key_offsets_at_ = 0;
  std::size_t value_scales_at_ = 0;
  std::size_t value_offsets_at_ = 0;
  std::size_t recent_keys_at_ = 0;
  std::size_t recent_values_at_ = 0;
  std::size_t key_offset_panel_ = 0;
  std::size_t recent_key_panel_ = 0;
  std::size_t recent_value_panel_ = 0;
  std::size_t ring_ = 0;
  std::size_t reach_ = 0;              // positions that counted since the last cut
  std::vector<std::uint32_t> stored_;  // [layers][blocks]: a bit a position
  std::vector<float> ones_;
  bool exceptional_ = false;
  std::unique_ptr<std::uint8_t[], Free> memory_;
  std::uint8_t* base_ = nullptr;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
