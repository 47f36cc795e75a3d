// Random products for the integer kernels: packed operands whose ends lie against guard pages, and a naive result.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "nibble/core/fp_env.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/gemm/expand.hpp"
#include "nibble/kernels/args.hpp"

namespace nibble_test {

/// Bytes of which the last is followed, after `gap` more, by a page that nobody may touch.
class GuardedBytes {
 public:
  explicit GuardedBytes(std::size_t size, std::size_t gap = 0) : size_(size) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t used = (size + gap + page - 1) / page * page;
    mapped_ = used + page;
    base_ = static_cast<std::uint8_t*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + used, page, PROT_NONE) != 0) std::abort();
    data_ = base_ + used - size - gap;
  }
  ~GuardedBytes() { munmap(base_, mapped_); }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  std::uint8_t* data() { return data_; }
  const std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::uint8_t* base_ = nullptr;
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t mapped_ = 0;
};

enum class Values { random, lowest, highest_weights, alternating };

/// What one product is.
struct Shape {
  nibble::Format format = nibble::Format::int8;
  nibble::Symmetry symmetry = nibble::Symmetry::symmetric;
  nibble::ScaleType scale_type = nibble::ScaleType::fp32;
  std::size_t rows = 1;
  std::size_t panels = 1;  // of the matrix
  std::size_t k = 1;
  std::size_t group_size = 0;   // 0: one group
  std::size_t panel_begin = 0;  // the product is of [panel_begin, panels)
  bool x_scales = false;
  unsigned group_shift = 0;  // 2^shift groups share a scale
  bool raw = false;
  Values values = Values::random;
  std::size_t x_pad = 0;    // x_stride - k_padded
  std::size_t acc_pad = 0;  // acc_stride - 16 * panels
  std::size_t gap = 0;      // bytes between x's end and its guard page: moves x off its alignment

  std::string name() const {
    return std::string(nibble::name_of(format)) + " " + std::string(nibble::name_of(symmetry)) + " " +
           std::string(nibble::name_of(scale_type)) + " rows " + std::to_string(rows) + " panels " +
           std::to_string(panel_begin) + ".." + std::to_string(panels) + " k " + std::to_string(k) + " group " +
           std::to_string(group_size) + (x_scales ? " x_scales" : "") + " shift " + std::to_string(group_shift) +
           (raw ? " raw" : "") + " values " + std::to_string(static_cast<int>(values)) + " x_pad " +
           std::to_string(x_pad) + " acc_pad " + std::to_string(acc_pad) + " gap " + std::to_string(gap);
  }
};

/// Operands of one product, as logical values and packed.
class Problem {
 public:
  explicit Problem(const Shape& shape, std::uint32_t seed = 1)
      : shape_(shape),
        channels_(shape.panels * 16),
        k_padded_((shape.k + unit() - 1) / unit() * unit()),
        group_size_(shape.group_size == 0 ? k_padded_ : shape.group_size),
        groups_((shape.k + group_size_ - 1) / group_size_),
        scale_groups_(((groups_ - 1) >> shape.group_shift) + 1),
        x_stride_(k_padded_ + shape.x_pad),
        panel_bytes_(16 * k_padded_ * nibble::bits_of(shape.format) / 8),
        codes_(shape.panels * panel_bytes_),
        scales_(shape.panels * scale_groups_ * 16 * nibble::bytes_of(shape.scale_type)),
        zeros_(shape.panels * scale_groups_ * 16 *
               (shape.symmetry == nibble::Symmetry::float_offset ? nibble::bytes_of(shape.scale_type) : 1)),
        x_((shape.rows - 1) * x_stride_ + k_padded_, shape.gap),
        sums_(((shape.rows - 1) * sums_stride() + groups_) * 4),
        x_scales_(((shape.rows - 1) * sums_stride() + groups_) * 4) {
    fill(seed);
  }

  nibble::detail::IntGemmArgs args(void* out) const {
    nibble::detail::IntGemmArgs a;
    a.w.format = shape_.format;
    a.w.symmetry = shape_.symmetry;
    a.w.scale_type = shape_.scale_type;
    a.w.n = channels_;
    a.w.k = shape_.k;
    a.w.k_padded = k_padded_;
    a.w.group_size = group_size_;
    a.w.groups = groups_;
    a.w.codes = codes_.data();
    a.w.panel_bytes = panel_bytes_;
    a.w.scales = scales_.data();
    a.w.zeros = shape_.symmetry == nibble::Symmetry::symmetric ? nullptr : zeros_.data();
    a.panel_begin = shape_.panel_begin;
    a.panel_end = shape_.panels;
    a.group_shift = shape_.group_shift;
    a.x = reinterpret_cast<const std::int8_t*>(x_.data());
    a.x_stride = x_stride_;
    a.x_sums = reinterpret_cast<const std::int32_t*>(sums_.data());
    a.sums_stride = sums_stride();
    a.x_scales = shape_.x_scales ? reinterpret_cast<const float*>(x_scales_.data()) : nullptr;
    a.rows = shape_.rows;
    a.acc_stride = acc_stride();
    if (shape_.raw)
      a.raw = static_cast<std::int32_t*>(out);
    else
      a.acc = static_cast<float*>(out);
    return a;
  }

  std::size_t acc_stride() const { return 16 * (shape_.panels - shape_.panel_begin) + shape_.acc_pad; }
  /// Bytes of a result, which ends with the last row's last lane.
  std::size_t out_bytes() const { return ((shape_.rows - 1) * acc_stride() + acc_stride() - shape_.acc_pad) * 4; }

  nibble::Format format() const { return shape_.format; }

  /// Runs a table's kernel for the format: its own, or the wider format's on expanded codes.
  std::vector<std::uint8_t> run(const nibble::detail::KernelTable& table) const {
    if (!nibble::is_bit_stream(shape_.format)) return run(nibble::detail::int_kernel(table, shape_.format));
    if (!nibble::detail::needs_expansion(table, shape_.format, shape_.rows)) return run(table.gemm_bits);
    GuardedBytes out(out_bytes());
    std::memset(out.data(), 0xA5, out.size());
    const nibble::detail::IntGemmArgs a = args(out.data());
    GuardedBytes room((a.panel_end - a.panel_begin) * nibble::detail::expanded_panel_bytes(a.w));
    nibble::detail::expand_panels(table, a.w, a.panel_begin, a.panel_end, room.data());
    const nibble::detail::IntGemmArgs e = nibble::detail::on_expanded(a, room.data());
    nibble::detail::int_kernel(table, e.w.format)(e);
    return std::vector<std::uint8_t>(out.data(), out.data() + out.size());
  }

  /// Runs one kernel into a buffer that is filled with a pattern first and ends at a guard page.
  std::vector<std::uint8_t> run(void (*kernel)(const nibble::detail::IntGemmArgs&) noexcept) const {
    GuardedBytes out(out_bytes());
    std::memset(out.data(), 0xA5, out.size());
    kernel(args(out.data()));
    return std::vector<std::uint8_t>(out.data(), out.data() + out.size());
  }

  /// The contract in int64 and std::fma, out of the logical values. False where a D does not fit int32.
  bool naive(std::vector<std::uint8_t>* result) const {
    result->assign(out_bytes(), 0xA5);
    for (std::size_t r = 0; r < shape_.rows; ++r)
      for (std::size_t c = shape_.panel_begin * 16; c < channels_; ++c) {
        const std::size_t at = (r * acc_stride() + c - shape_.panel_begin * 16) * 4;
        float acc = 0.0F;
        for (std::size_t g = 0; g < groups_; ++g) {
          const std::size_t sg = g >> shape_.group_shift;
          std::int64_t zero = nibble::symmetric_zero_of(shape_.format);
          if (shape_.symmetry == nibble::Symmetry::asymmetric) zero = zero_[c * scale_groups_ + sg];
          if (shape_.symmetry == nibble::Symmetry::float_offset) zero = 0;
          std::int64_t d = 0;
          std::int64_t s = 0;
          for (std::size_t k = g * group_size_; k < std::min(shape_.k, (g + 1) * group_size_); ++k) {
            d += (q_[c * shape_.k + k] - zero) * xv_[r * shape_.k + k];
            s += xv_[r * shape_.k + k];
          }
          if (d < INT32_MIN || d > INT32_MAX) return false;
          if (shape_.raw) {
            const auto d32 = static_cast<std::int32_t>(d);
            std::memcpy(result->data() + at, &d32, 4);
            continue;
          }
          const float scale = scale_[c * scale_groups_ + sg];
          const float offset = offset_[c * scale_groups_ + sg];
          const bool has_offset = shape_.symmetry == nibble::Symmetry::float_offset;
          if (shape_.x_scales) {
            float t = nibble::detail::rounded(scale * static_cast<float>(d));
            if (has_offset) t = std::fma(offset, static_cast<float>(s), t);
            acc = std::fma(x_scale(r, g), t, acc);
          } else {
            acc = std::fma(scale, static_cast<float>(d), acc);
            if (has_offset) acc = std::fma(offset, static_cast<float>(s), acc);
          }
        }
        if (!shape_.raw) std::memcpy(result->data() + at, &acc, 4);
      }
    return true;
  }

 private:
  std::size_t sums_stride() const { return groups_ + 1; }
  float x_scale(std::size_t r, std::size_t g) const {
    float v;
    std::memcpy(&v, x_scales_.data() + (r * sums_stride() + g) * 4, 4);
    return v;
  }
  float put_float(GuardedBytes* bytes, std::size_t index, float v) const {
    if (shape_.scale_type == nibble::ScaleType::fp32) {
      std::memcpy(bytes->data() + index * 4, &v, 4);
      return v;
    }
    const std::uint16_t half = nibble::fp16_from_float(v);
    std::memcpy(bytes->data() + index * 2, &half, 2);
    return nibble::float_from_fp16(half);
  }

  std::size_t unit() const { return nibble::is_bit_stream(shape_.format) ? 16 : 8; }

  /// args.hpp's planes, bit by bit: k = 4 m + j of lane l.
  static void put_bits(std::uint8_t* unit, unsigned bits, std::size_t l, std::size_t k, unsigned code) {
    const std::size_t m = k / 4;
    const std::size_t j = k % 4;
    const auto set = [&](std::size_t byte, std::size_t bit, unsigned from) {
      if ((code >> from & 1U) != 0) unit[byte] = static_cast<std::uint8_t>(unit[byte] | 1U << bit);
    };
    std::size_t plane = 0;
    unsigned done = 0;
    if (bits > 4) {
      for (; done < 4; ++done) set(m / 2 * 64 + l * 4 + j, m % 2 * 4 + done, done);
      plane = 128;
    }
    if (bits != 5) {
      for (unsigned i = 0; i < 2; ++i, ++done) set(plane + l * 4 + j, 2 * m + i, done);
      plane += 64;
    }
    if (done < bits) set(plane + l % 8 * 4 + j, m + l / 8 * 4, done);
  }

  void fill(std::uint32_t seed) {
    std::mt19937 rng(seed);
    const bool four = shape_.format == nibble::Format::int4;
    const unsigned bits = nibble::bits_of(shape_.format);
    const int q_lo = bits == 8 ? -128 : 0;
    const int q_hi = q_lo + (1 << bits) - 1;
    const auto draw = [&](int lo, int hi) {
      return lo + static_cast<int>(rng() % static_cast<unsigned>(hi - lo + 1));
    };

    q_.resize(channels_ * shape_.k);
    for (std::size_t i = 0; i < q_.size(); ++i) {
      const bool odd = i % shape_.k % 2 != 0;
      switch (shape_.values) {
        case Values::random: q_[i] = draw(q_lo, q_hi); break;
        case Values::lowest: q_[i] = q_lo; break;
        case Values::highest_weights: q_[i] = q_hi; break;
        case Values::alternating: q_[i] = odd ? q_lo : q_hi; break;
      }
    }
    xv_.resize(shape_.rows * shape_.k);
    for (std::size_t i = 0; i < xv_.size(); ++i) {
      const bool odd = i % shape_.k % 2 != 0;
      switch (shape_.values) {
        case Values::random: xv_[i] = draw(-128, 127); break;
        case Values::lowest: xv_[i] = -128; break;
        case Values::highest_weights: xv_[i] = i % 2 == 0 ? 127 : -128; break;
        case Values::alternating: xv_[i] = odd ? -128 : 127; break;
      }
    }
    // Codes beyond k are 0 as packed bytes, whatever x holds there is multiplied by them: x is 0 there too.
    std::memset(codes_.data(), 0, codes_.size());
    for (std::size_t c = 0; c < channels_; ++c)
      for (std::size_t k = 0; k < shape_.k; ++k) {
        std::uint8_t* panel = codes_.data() + c / 16 * panel_bytes_;
        const int q = q_[c * shape_.k + k];
        if (nibble::is_bit_stream(shape_.format)) {
          put_bits(panel + k / 16 * 32 * bits, bits, c % 16, k % 16, static_cast<unsigned>(q));
        } else if (four) {
          std::uint8_t& byte = panel[(k / 8 * 16 + c % 16) * 4 + k % 4];
          byte = static_cast<std::uint8_t>(byte | (k % 8 < 4 ? q : q << 4));
        } else {
          panel[(k / 4 * 16 + c % 16) * 4 + k % 4] = static_cast<std::uint8_t>(q + 128);
        }
      }
    std::memset(x_.data(), 0x5A, x_.size());  // between the rows: not ours
    for (std::size_t r = 0; r < shape_.rows; ++r)
      for (std::size_t k = 0; k < k_padded_; ++k)
        x_.data()[r * x_stride_ + k] =
            k < shape_.k ? static_cast<std::uint8_t>(xv_[r * shape_.k + k]) : std::uint8_t{0};

    scale_.resize(channels_ * scale_groups_);
    offset_.resize(channels_ * scale_groups_);
    zero_.resize(channels_ * scale_groups_);
    for (std::size_t c = 0; c < channels_; ++c)
      for (std::size_t g = 0; g < scale_groups_; ++g) {
        const std::size_t at = c * scale_groups_ + g;
        const std::size_t packed = (c / 16 * scale_groups_ + g) * 16 + c % 16;
        scale_[at] = put_float(&scales_, packed, static_cast<float>(draw(-999, 999)) * 0.00317F);
        zero_[at] = shape_.values == Values::lowest ? q_hi : draw(q_lo, q_hi);
        if (shape_.symmetry == nibble::Symmetry::float_offset)
          offset_[at] = put_float(&zeros_, packed, static_cast<float>(draw(-999, 999)) * 0.0291F);
        else
          zeros_.data()[packed] = static_cast<std::uint8_t>(zero_[at]);
      }
    std::memset(sums_.data(), 0x77, sums_.size());
    for (std::size_t r = 0; r < shape_.rows; ++r)
      for (std::size_t g = 0; g < groups_; ++g) {
        std::int32_t s = 0;
        for (std::size_t k = g * group_size_; k < std::min(shape_.k, (g + 1) * group_size_); ++k)
          s += xv_[r * shape_.k + k];
        std::memcpy(sums_.data() + (r * sums_stride() + g) * 4, &s, 4);
        const float xs = static_cast<float>(draw(1, 999)) * 0.0123F;
        std::memcpy(x_scales_.data() + (r * sums_stride() + g) * 4, &xs, 4);
      }
  }

  Shape shape_;
  std::size_t channels_;
  std::size_t k_padded_;
  std::size_t group_size_;
  std::size_t groups_;
  std::size_t scale_groups_;
  std::size_t x_stride_;
  std::size_t panel_bytes_;
  std::vector<int> q_;
  std::vector<int> xv_;
  std::vector<int> zero_;
  std::vector<float> scale_;
  std::vector<float> offset_;
  GuardedBytes codes_;
  GuardedBytes scales_;
  GuardedBytes zeros_;
  GuardedBytes x_;
  GuardedBytes sums_;
  GuardedBytes x_scales_;
};

/// The integer formats.
inline constexpr nibble::Format integer_formats[] = {nibble::Format::int8, nibble::Format::int4,
                                                     nibble::Format::int2, nibble::Format::int3,
                                                     nibble::Format::int5, nibble::Format::int6};

/// Calls f(shape) for all formats and all that a product can be besides its sizes.
template <class F>
void for_each_variant(Shape shape, const F& f) {
  for (nibble::Format format : integer_formats)
    for (nibble::Symmetry symmetry :
         {nibble::Symmetry::symmetric, nibble::Symmetry::asymmetric, nibble::Symmetry::float_offset})
      for (nibble::ScaleType type : {nibble::ScaleType::fp32, nibble::ScaleType::fp16})
        for (bool x_scales : {false, true}) {
          shape.format = format;
          shape.symmetry = symmetry;
          shape.scale_type = type;
          shape.x_scales = x_scales;
          f(shape);
        }
}

/// Every shape that a table's kernels are compared over.
template <class F>
void for_each_shape(const F& check) {
  // All small sizes, every variant in turn.
  std::size_t turn = 0;
  std::vector<Shape> variants;
  for_each_variant(Shape{}, [&](const Shape& s) { variants.push_back(s); });
  const std::size_t small_groups[] = {0, 16, 32, 48, 64};
  const auto next = [&](std::size_t rows, std::size_t panels, std::size_t k) {
    Shape s = variants[turn % variants.size()];
    s.rows = rows;
    s.panels = panels;
    s.k = k;
    s.group_size = small_groups[turn / 3 % 5];
    if (s.group_size >= k) s.group_size = 0;
    s.x_pad = turn % 7;
    s.acc_pad = turn % 4;
    s.gap = turn % 5;
    if (turn % 11 == 0) s.panel_begin = panels - 1;
    ++turn;
    check(s);
  };
  for (std::size_t rows = 1; rows <= 9; ++rows)
    for (std::size_t panels = 1; panels <= 5; ++panels)
      for (std::size_t k = 1; k <= 95; k += 1 + (rows * panels + k) % 5) next(rows, panels, k);
  for (std::size_t rows : {10U, 11U, 13U, 15U, 16U, 17U, 23U, 31U, 32U, 33U, 63U, 64U, 65U, 67U, 130U})
    for (std::size_t k : {7U, 32U, 61U, 97U, 172U}) next(rows, 1 + rows % 4, k);
  for (std::size_t panels : {7U, 8U, 9U, 12U, 13U, 17U})
    for (std::size_t rows : {1U, 2U, 3U, 4U, 5U, 7U}) next(rows, panels, 101);

  // Every variant at sizes that take each loop: groups that end within and between the kernels' steps.
  for_each_variant(Shape{}, [&](Shape s) {
    for (std::size_t group : {0U, 16U, 32U, 48U, 64U, 80U, 128U, 160U})
      for (std::size_t rows : {1U, 2U, 5U, 9U}) {
        s.rows = rows;
        s.panels = rows == 9 ? 3 : 5;
        s.k = 331;
        s.group_size = group;
        check(s);
      }
    // The groups are the activations' own.
    s.rows = 6;
    s.k = 200;
    s.group_size = 64;
    s.group_shift = 63;
    s.panels = 3;
    check(s);
    s.group_shift = 1;
    check(s);
    s.group_shift = 63;
    s.rows = 1;
    check(s);
  });

  // Raw int32.
  for (nibble::Format format : integer_formats)
    for (nibble::Symmetry symmetry : {nibble::Symmetry::symmetric, nibble::Symmetry::asymmetric})
      for (std::size_t rows : {1U, 2U, 3U, 4U, 7U, 12U, 65U}) {
        Shape s;
        s.format = format;
        s.symmetry = symmetry;
        s.rows = rows;
        s.panels = 1 + rows % 6;
        s.k = 139 + rows;
        s.raw = true;
        s.acc_pad = rows % 3;
        check(s);
      }

  // Extremes, also at lengths where an accumulator of 16 bits would have overflowed long ago.
  for_each_variant(Shape{}, [&](Shape s) {
    for (Values values : {Values::lowest, Values::highest_weights, Values::alternating})
      for (std::size_t rows : {1U, 3U, 7U})
        for (std::size_t group : {std::size_t{0}, std::size_t{256}}) {
          s.values = values;
          s.rows = rows;
          s.panels = 1 + rows % 2;
          s.k = 1024;
          s.group_size = group;
          check(s);
        }
  });
}

}  // namespace nibble_test
