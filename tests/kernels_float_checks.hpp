// Every entry of a kernel table except the integer products, against the scalar table, bit for bit. Inputs and
// outputs end at a page that may not be touched.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "nibble/core/fp_env.hpp"
#include "nibble/formats/bf16.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/kernels/scalar/table.hpp"

namespace kernels_float {

using namespace nibble;          // NOLINT: a test's own namespace
using namespace nibble::detail;  // NOLINT

/// `size` elements that end `slack` bytes before an inaccessible page. What lies in front is checked to stay as
/// it was.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::size_t size, std::size_t slack = 0) : size_(size) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    front_ = (size * sizeof(T) + slack + 64 + page - 1) / page * page;
    mapped_ = front_ + page;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + front_, page, PROT_NONE) != 0) std::abort();
    std::memset(base_, canary, front_);
    bytes_ = base_ + front_ - slack - size * sizeof(T);
  }
  ~Guarded() {
    for (const unsigned char* p = base_; p < bytes_; ++p)
      if (*p != canary) {
        ADD_FAILURE() << "written " << bytes_ - p << " bytes in front of a buffer";
        break;
      }
    munmap(base_, mapped_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return reinterpret_cast<T*>(bytes_); }
  unsigned char* bytes() { return bytes_; }
  T& operator[](std::size_t i) { return data()[i]; }
  std::size_t size() const { return size_; }

 private:
  static constexpr unsigned char canary = 0xA5;
  unsigned char* base_ = nullptr;
  unsigned char* bytes_ = nullptr;
  std::size_t size_ = 0;
  std::size_t front_ = 0;
  std::size_t mapped_ = 0;
};

inline std::uint32_t float_bits(float v) {
  std::uint32_t b = 0;
  std::memcpy(&b, &v, sizeof b);
  return b;
}
inline float bits_float(std::uint32_t b) {
  float v = 0;
  std::memcpy(&v, &b, sizeof v);
  return v;
}
/// The same bits, or both NaN: which NaN comes out of an operation on two is not promised.
inline bool same(float a, float b) { return (a != a && b != b) || float_bits(a) == float_bits(b); }

inline void expect_same(const float* got, const float* want, std::size_t n, const std::string& what) {
  for (std::size_t i = 0; i < n; ++i)
    if (!same(got[i], want[i])) {
      ADD_FAILURE() << what << ": element " << i << " is " << got[i] << ", scalar has " << want[i] << std::hexfloat
                    << " (" << got[i] << ", " << want[i] << ")";
      return;
    }
}
template <class T>
void expect_equal(const T* got, const T* want, std::size_t n, const std::string& what) {
  for (std::size_t i = 0; i < n; ++i)
    if (got[i] != want[i]) {
      ADD_FAILURE() << what << ": element " << i << " is " << +got[i] << ", scalar has " << +want[i];
      return;
    }
}

class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}
  std::uint32_t bits() { return static_cast<std::uint32_t>(engine_()); }
  std::size_t below(std::size_t n) { return bits() % n; }
  float normal() { return normal_(engine_); }
  /// Mostly ordinary, now and then hostile: zeros of both signs, subnormals, the largest, halves.
  float hostile() {
    static const float special[] = {0.0F,     -0.0F, 1e-40F, -1e-42F, 3.4e38F,
                                    -3.4e38F, 0.5F,  -1.5F,  2.5F,    1.17549435e-38F};
    return below(8) == 0 ? special[below(10)] : normal();
  }
  float non_finite() {
    static const float special[] = {std::numeric_limits<float>::infinity(),
                                    -std::numeric_limits<float>::infinity(),
                                    std::numeric_limits<float>::quiet_NaN()};
    return special[below(3)];
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

struct WeightKind {
  Format format;
  Symmetry symmetry;
  ScaleType scale_type;
};
inline std::vector<WeightKind> weight_kinds() {
  std::vector<WeightKind> kinds = {{Format::fp32, Symmetry::symmetric, ScaleType::fp32},
                                   {Format::fp16, Symmetry::symmetric, ScaleType::fp32},
                                   {Format::bf16, Symmetry::symmetric, ScaleType::fp32}};
  for (ScaleType scale : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16}) {
    for (Format format : {Format::int8, Format::int4, Format::int2, Format::int3, Format::int5, Format::int6})
      for (Symmetry symmetry : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
        kinds.push_back({format, symmetry, scale});
    for (Format format : {Format::nf4, Format::fp4}) kinds.push_back({format, Symmetry::symmetric, scale});
  }
  return kinds;
}

/// A packed matrix of random codes, every byte pattern included; its buffers lie at odd addresses before guard
/// pages.
class Weights {
 public:
  Weights(WeightKind kind, std::size_t n, std::size_t k, std::size_t group, Random& random)
      : panels_((n + 15) / 16),
        k_padded_((k + k_unit_of(kind.format) - 1) / k_unit_of(kind.format) * k_unit_of(kind.format)),
        group_(group == 0 || group > k_padded_ ? (k_padded_ == 0 ? 8 : k_padded_) : group),
        groups_(k == 0 ? 0 : (k_padded_ + group_ - 1) / group_),
        panel_bytes_(16 * k_padded_ * bits_of(kind.format) / 8),
        codes_(panels_ * panel_bytes_, random.below(4)),
        scales_(panels_ * groups_ * 16 * bytes_of(kind.scale_type), random.below(4)),
        zeros_(panels_ * groups_ * 16 * (kind.symmetry == Symmetry::asymmetric ? 1 : bytes_of(kind.scale_type)),
               random.below(4)) {
    for (std::size_t i = 0; i < codes_.size(); ++i)
      codes_.bytes()[i] = static_cast<unsigned char>(random.bits() >> 8);
    if (kind.format == Format::fp32 || kind.format == Format::fp16 || kind.format == Format::bf16) {
      // Ordinary numbers: random bit patterns would overflow every sum. NaN, Inf and subnormals have tests of
      // their own.
      for (std::size_t i = 0; i < codes_.size() * 8 / bits_of(kind.format); ++i) {
        const float v = random.below(16) == 0 ? 0.0F : random.normal();
        const std::uint16_t half =
            kind.format == Format::fp16 ? nibble::fp16_from_float(v) : nibble::bf16_from_float(v);
        if (kind.format == Format::fp32)
          std::memcpy(codes_.bytes() + 4 * i, &v, 4);
        else
          std::memcpy(codes_.bytes() + 2 * i, &half, 2);
      }
    }
    const bool integer_zeros = kind.symmetry == Symmetry::asymmetric;
    for (std::size_t i = 0; i < panels_ * groups_ * 16; ++i) {
      write(scales_.bytes(), kind.scale_type, i, random.below(32) == 0 ? 1e-39F : 0.1F * random.normal());
      if (integer_zeros)
        zeros_.bytes()[i] = static_cast<unsigned char>(random.below(std::size_t{1} << bits_of(kind.format)));
      else
        write(zeros_.bytes(), kind.scale_type, i, random.normal());
    }
    for (float& level : levels_) level = random.normal();
    view.format = kind.format;
    view.symmetry = kind.symmetry;
    view.scale_type = kind.scale_type;
    view.n = n;
    view.k = k;
    view.k_padded = k_padded_;
    view.group_size = group_;
    view.groups = groups_;
    view.codes = codes_.bytes();
    view.panel_bytes = panel_bytes_;
    if (has_scales(kind.format)) {
      view.scales = scales_.bytes();
      if (kind.symmetry != Symmetry::symmetric) view.zeros = zeros_.bytes();
    }
    if (is_codebook(kind.format)) view.codebook = levels_;
  }

  std::size_t panels() const { return panels_; }
  unsigned char* codes() { return codes_.bytes(); }
  std::string name() const {
    return std::string(name_of(view.format)) + " " + std::string(name_of(view.symmetry)) + " " +
           std::string(name_of(view.scale_type)) + " n=" + std::to_string(view.n) +
           " k=" + std::to_string(view.k) + " group=" + std::to_string(view.group_size);
  }

  PanelView view;

 private:
  static void write(unsigned char* base, ScaleType type, std::size_t i, float v) {
    const std::uint16_t half = type == ScaleType::fp16 ? nibble::fp16_from_float(v) : nibble::bf16_from_float(v);
    if (type == ScaleType::fp32)
      std::memcpy(base + 4 * i, &v, 4);
    else
      std::memcpy(base + 2 * i, &half, 2);
  }

  std::size_t panels_, k_padded_, group_, groups_, panel_bytes_;
  Guarded<unsigned char> codes_, scales_, zeros_;
  float levels_[16];
};

inline void check_unpack_one(const KernelTable& t, Weights& w, Random& random) {
  const std::size_t k = w.view.k;
  // The whole, and a window that starts inside.
  for (int window = 0; window < 2; ++window) {
    UnpackArgs a;
    a.w = w.view;
    a.panel_begin = window == 0 ? 0 : random.below(w.panels());
    a.panel_end = w.panels();
    a.k_begin = window == 0 ? 0 : random.below(k / 8 + 1) * 8;
    a.k_end = window == 0 ? k : a.k_begin + random.below(k - a.k_begin + 1);
    const std::size_t panels = a.panel_end - a.panel_begin;
    const std::size_t depth = a.k_end - a.k_begin;
    a.out_panel_stride = 16 * depth + 3;
    const std::size_t size = panels == 0 ? 0 : (panels - 1) * a.out_panel_stride + 16 * depth;
    Guarded<float> got(size);
    std::vector<float> want(size);
    if (size != 0) std::memcpy(want.data(), got.data(), size * 4);  // gaps between the panels stay as they are
    a.out = want.data();
    scalar::table.unpack(a);
    a.out = got.data();
    t.unpack(a);
    expect_same(got.data(), want.data(), size, "unpack " + w.name());
  }
}

inline void check_gemv_one(const KernelTable& t, Weights& w, std::size_t rows, Random& random) {
  const std::size_t k = w.view.k;
  FloatGemvArgs a;
  a.w = w.view;
  a.panel_begin = random.below(2) == 0 ? 0 : random.below(w.panels());
  a.panel_end = w.panels();
  a.rows = rows;
  a.x_stride = k + random.below(5);
  Guarded<float> x((rows - 1) * a.x_stride + k);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = random.normal();
  if (random.below(4) == 0 && k > 0) x[(rows - 1) * a.x_stride + random.below(k)] = random.non_finite();
  a.x = x.data();
  const std::size_t width = 16 * (a.panel_end - a.panel_begin);
  a.acc_stride = width + random.below(3);
  Guarded<float> got((rows - 1) * a.acc_stride + width);
  std::vector<float> want(got.size());
  std::memcpy(want.data(), got.data(), got.size() * 4);
  a.acc = want.data();
  scalar::table.gemv_float(a);
  a.acc = got.data();
  t.gemv_float(a);
  expect_same(got.data(), want.data(), got.size(), "gemv " + w.name() + " rows=" + std::to_string(rows));
}

inline void check_packed_weights(const KernelTable& t) {
  Random random(1);
  std::size_t checked = 0;
  for (const WeightKind kind : weight_kinds()) {
    const auto run = [&](std::size_t n, std::size_t k, std::size_t group) {
      Weights w(kind, n, k, group, random);
      check_unpack_one(t, w, random);
      check_gemv_one(t, w, 1, random);
      check_gemv_one(t, w, 1 + random.below(t.gemv_max_rows), random);
      ++checked;
    };
    for (std::size_t k = 1; k <= 95; ++k) run(1 + random.below(40), k, 16 * (1 + k % 4));
    for (std::size_t group : {16U, 32U, 48U, 64U, 128U, 0U}) {
      run(17, 172, group);
      run(130, 251, group);
      run(33, 576, group);
    }
    for (std::size_t rows = 1; rows <= t.gemv_max_rows; ++rows)
      for (std::size_t n : {1U, 47U, 80U, 81U, 128U, 160U}) {
        Weights w(kind, n, 67, 32, random);
        check_gemv_one(t, w, rows, random);
      }
  }
  EXPECT_EQ(checked, weight_kinds().size() * (95 + 18));
}

/// Every 16-bit pattern, and floats that are NaN, Inf or subnormal, come out of unpack and of the GEMV.
inline void check_float_weight_specials(const KernelTable& t) {
  Random random(2);
  for (Format format : {Format::fp16, Format::bf16, Format::fp32}) {
    Weights w({format, Symmetry::symmetric, ScaleType::fp32}, 64, 1024, 0, random);
    for (std::size_t i = 0; i < 65536; ++i) {
      const auto half = static_cast<std::uint16_t>(i);
      const std::uint32_t whole = static_cast<std::uint32_t>(i << 16 | (i * 40503U & 0xFFFFU));
      if (format == Format::fp32)
        std::memcpy(w.codes() + 4 * i, &whole, 4);
      else
        std::memcpy(w.codes() + 2 * i, &half, 2);
    }
    check_unpack_one(t, w, random);
    check_gemv_one(t, w, 1, random);
    check_gemv_one(t, w, t.gemv_max_rows, random);
  }
}

/// x in tiles of `tile` rows, as FloatGemmArgs wants it.
inline void pack_rows(const std::vector<float>& x, std::size_t rows, std::size_t k, std::size_t tile, float* out) {
  for (std::size_t r0 = 0; r0 < rows; r0 += tile) {
    const std::size_t height = std::min(tile, rows - r0);
    for (std::size_t i = 0; i < k; ++i)
      for (std::size_t r = 0; r < height; ++r) out[r0 / tile * tile * k + i * height + r] = x[(r0 + r) * k + i];
  }
}

inline void check_gemm_float(const KernelTable& t) {
  Random random(3);
  const auto run = [&](std::size_t rows, std::size_t panels, std::size_t depth, bool accumulate) {
    FloatGemmArgs a;
    a.panels = panels;
    a.panel_stride = depth * 16 + 16 * random.below(2);
    a.depth = depth;
    a.rows = rows;
    a.accumulate = accumulate;
    Guarded<float> weights(panels == 0 ? 0 : (panels - 1) * a.panel_stride + depth * 16);
    for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = random.normal();
    a.panels_data = weights.data();
    std::vector<float> x(rows * depth);
    for (float& v : x) v = random.hostile();
    const std::size_t poisoned = random.below(rows);
    if (depth > 0 && random.below(4) == 0) x[poisoned * depth + random.below(depth)] = random.non_finite();
    a.acc_stride = panels * 16 + random.below(20);
    Guarded<float> got((rows - 1) * a.acc_stride + panels * 16);
    std::vector<float> want(got.size());
    for (std::size_t i = 0; i < got.size(); ++i) want[i] = got[i] = random.normal();
    Guarded<float> packed(rows * depth);
    a.x = packed.data();
    pack_rows(x, rows, depth, scalar::table.float_tile_rows, packed.data());
    a.x_tile_stride = scalar::table.float_tile_rows * depth;
    a.acc = want.data();
    scalar::table.gemm_float(a);
    pack_rows(x, rows, depth, t.float_tile_rows, packed.data());
    a.x_tile_stride = t.float_tile_rows * depth;
    a.acc = got.data();
    t.gemm_float(a);
    expect_same(got.data(), want.data(), got.size(),
                "gemm rows=" + std::to_string(rows) + " panels=" + std::to_string(panels) +
                    " depth=" + std::to_string(depth) + (accumulate ? " accumulate" : ""));
  };
  for (std::size_t rows = 1; rows <= 70; ++rows)
    for (std::size_t panels : {1U, 2U, 3U}) run(rows, panels, 1 + random.below(24), rows % 2 == 0);
  for (std::size_t depth = 0; depth <= 95; ++depth) run(1 + depth % 29, 1 + depth % 5, depth, depth % 3 == 0);
  run(31, 7, 509, true);
}

/// GEMV of r rows, GEMM of those rows in any company, in any split of K: one and the same result.
inline void check_products_agree(const KernelTable& t) {
  Random random(4);
  for (const WeightKind kind : weight_kinds()) {
    const std::size_t n = 80;
    const std::size_t k = 173;
    Weights w(kind, n, k, 48, random);
    const std::size_t rows = t.float_tile_rows + 3;
    std::vector<float> x(rows * k);
    for (float& v : x) v = random.normal();
    std::vector<float> one(rows * n);
    std::vector<float> few(rows * n);
    for (std::size_t r = 0; r < rows; ++r) {
      FloatGemvArgs a;
      a.w = w.view;
      a.panel_end = w.panels();
      a.x = x.data() + r * k;
      a.x_stride = k;
      a.rows = 1;
      a.acc = one.data() + r * n;
      a.acc_stride = n;
      t.gemv_float(a);
    }
    for (std::size_t r = 0; r < rows; r += t.gemv_max_rows) {
      FloatGemvArgs a;
      a.w = w.view;
      a.panel_end = w.panels();
      a.x = x.data() + r * k;
      a.x_stride = k;
      a.rows = std::min(t.gemv_max_rows, rows - r);
      a.acc = few.data() + r * n;
      a.acc_stride = n;
      t.gemv_float(a);
    }
    std::vector<float> panels(n * k);
    std::vector<float> packed(rows * k);
    std::vector<float> whole(rows * n);
    const std::size_t cut = 64;
    for (std::size_t k0 = 0; k0 < k; k0 += cut) {
      const std::size_t depth = std::min(cut, k - k0);
      UnpackArgs u;
      u.w = w.view;
      u.panel_end = w.panels();
      u.k_begin = k0;
      u.k_end = k0 + depth;
      u.out = panels.data();
      u.out_panel_stride = 16 * depth;
      t.unpack(u);
      std::vector<float> part(rows * depth);
      for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t i = 0; i < depth; ++i) part[r * depth + i] = x[r * k + k0 + i];
      pack_rows(part, rows, depth, t.float_tile_rows, packed.data());
      FloatGemmArgs g;
      g.panels_data = panels.data();
      g.panel_stride = 16 * depth;
      g.panels = w.panels();
      g.depth = depth;
      g.x = packed.data();
      g.x_tile_stride = t.float_tile_rows * depth;
      g.rows = rows;
      g.accumulate = k0 != 0;
      g.acc = whole.data();
      g.acc_stride = n;
      t.gemm_float(g);
    }
    expect_same(few.data(), one.data(), one.size(), "rows together against rows alone, " + w.name());
    expect_same(whole.data(), one.data(), one.size(), "GEMM against GEMV, " + w.name());
  }
}

/// Pairs of bfloat16 summed as vdpbf16ps does: ordinary ones, and in half of the problems numbers whose products are
/// subnormal, at the edge of it, cancel, or are not finite. Whole and in two calls.
inline void check_gemm_bf16(const KernelTable& t) {
  Random random(11);
  const auto hostile_half = [&](int flavour) -> std::uint16_t {
    const std::uint32_t r = random.bits();
    if (flavour == 0) return nibble::bf16_from_float(random.normal());
    // Exponents of about 2^-63: their products are near 2^-126.
    if (flavour == 1) return static_cast<std::uint16_t>((r & 0x807FU) | (62 + (r >> 20) % 4) << 7);
    if (flavour == 2) return static_cast<std::uint16_t>((r & 0x807FU) | ((r >> 20) % 3) << 7);
    return static_cast<std::uint16_t>(r);
  };
  const auto run = [&](std::size_t rows, std::size_t n, std::size_t k, int flavour) {
    Weights w({Format::bf16, Symmetry::symmetric, ScaleType::fp32}, n, k, 0, random);
    const std::size_t k_padded = w.view.k_padded;
    for (std::size_t p = 0; p < w.panels(); ++p)
      for (std::size_t i = 0; i < k_padded * 16; ++i) {
        const std::size_t at = i / 32 * 2 + i % 2;  // k of this element
        const std::uint16_t half =
            at < k ? hostile_half(flavour == 4 ? static_cast<int>(random.below(3)) : flavour) : 0;
        std::memcpy(w.codes() + p * w.view.panel_bytes + 2 * i, &half, 2);
      }
    std::vector<std::uint32_t> x(rows * k_padded / 2);
    for (std::size_t i = 0; i < x.size(); ++i)
      for (std::size_t j = 0; j < 2; ++j)
        if (i % (k_padded / 2) * 2 + j < k) x[i] |= static_cast<std::uint32_t>(hostile_half(flavour)) << (16 * j);
    Bf16GemmArgs a;
    a.w = w.view;
    a.panel_begin = random.below(w.panels());
    a.panel_end = w.panels();
    a.rows = rows;
    const std::size_t width = 16 * (a.panel_end - a.panel_begin);
    a.acc_stride = width + random.below(20);
    Guarded<float> got((rows - 1) * a.acc_stride + width);
    std::vector<float> want(got.size());
    for (std::size_t i = 0; i < got.size(); ++i) want[i] = got[i] = random.hostile();
    a.tile_rows = 1 + random.below(t.bf16_tile_rows);
    const auto product = [&](const KernelTable& table, float* acc, std::size_t begin, std::size_t end,
                             bool accumulate) {
      const std::size_t pairs = (end - begin) / 2;
      const std::size_t tile = a.tile_rows;
      Guarded<std::uint32_t> packed(rows * pairs);
      for (std::size_t r = 0; r < rows; ++r) {
        const std::size_t first = r / tile * tile;
        for (std::size_t u = 0; u < pairs; ++u)
          packed[first * pairs + u * std::min(tile, rows - first) + r - first] =
              x[r * k_padded / 2 + begin / 2 + u];
      }
      a.x = packed.data();
      a.x_tile_stride = tile * pairs;
      a.k_begin = begin;
      a.k_end = end;
      a.accumulate = accumulate;
      a.acc = acc;
      table.gemm_bf16(a);
    };
    const bool accumulate = random.below(3) == 0;
    product(scalar::table, want.data(), 0, k_padded, accumulate);
    if (random.below(2) == 0) {
      product(t, got.data(), 0, k_padded, accumulate);
    } else {
      const std::size_t cut = random.below(k_padded / 8 + 1) * 8;
      product(t, got.data(), 0, cut, accumulate);
      product(t, got.data(), cut, k_padded, true);
    }
    expect_same(got.data(), want.data(), got.size(),
                "gemm_bf16 rows=" + std::to_string(rows) + " flavour=" + std::to_string(flavour) + " " + w.name());
  };
  for (std::size_t rows = 1; rows <= 40; ++rows)
    for (std::size_t n : {16U, 70U, 129U}) run(rows, n, 1 + random.below(50), static_cast<int>(rows % 5));
  for (int flavour = 0; flavour < 5; ++flavour)
    for (std::size_t k = 1; k <= 40; ++k) run(1 + k % 14, 33, k, flavour);
  run(27, 48, 1030, 0);
}

/// Both orders of storage; outputs and inputs end at guard pages.
inline void check_gemv_dense(const KernelTable& t) {
  Random random(5);
  const auto run = [&](std::size_t n, std::size_t k, bool rows) {
    if (rows && t.gemv_rows == nullptr) return;
    RowsGemvArgs a;
    a.n = n;
    a.k = k;
    const std::size_t runs = rows ? n : k;
    const std::size_t length = rows ? k : n;
    a.lda = length + random.below(7);
    a.x_stride = 1 + random.below(3);
    a.tokens = 1 + random.below(5);
    a.x_token_stride = k * a.x_stride + random.below(3);
    a.y_stride = n + random.below(3);
    Guarded<float> matrix(runs == 0 || length == 0 ? 0 : (runs - 1) * a.lda + length);
    for (std::size_t i = 0; i < matrix.size(); ++i) matrix[i] = random.normal();
    Guarded<float> x(k == 0 ? 0 : (a.tokens - 1) * a.x_token_stride + (k - 1) * a.x_stride + 1);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = random.hostile();
    if (k > 0 && random.below(8) == 0) x[random.below(k) * a.x_stride] = random.non_finite();
    Guarded<float> got((a.tokens - 1) * a.y_stride + n);
    std::vector<float> want(got.size());
    std::memcpy(want.data(), got.data(), got.size() * 4);  // gaps between the tokens stay as they are
    a.a = matrix.data();
    a.x = x.data();
    const auto product = [&](const KernelTable& table, float* y) {
      a.y = y;
      rows ? table.gemv_rows(a) : table.gemv_dense(a);
    };
    product(scalar::table, want.data());
    product(t, got.data());
    expect_same(
        got.data(), want.data(), got.size(),
        std::string(rows ? "gemv_rows" : "gemv_dense") + " n=" + std::to_string(n) + " k=" + std::to_string(k));
  };
  for (const bool rows : {false, true}) {
    for (std::size_t n = 1; n <= 95; ++n) run(n, n % 43, rows);
    for (std::size_t n : {127U, 128U, 129U, 191U, 251U, 257U, 576U, 2048U, 4500U}) {
      run(n, 95, rows);
      run(n, 6, rows);
      run(n, 1, rows);
      run(n, 0, rows);
    }
  }
}

inline void check_quantize_rows(const KernelTable& t) {
  Random random(6);
  const auto run = [&](std::size_t rows, std::size_t k, bool symmetric, int flavour, unsigned bits = 8) {
    QuantizeRowsArgs a;
    a.bits = bits;
    a.rows = rows;
    a.k = k;
    a.symmetric = symmetric;
    a.x_stride = k + random.below(4);
    a.q_stride = (k / 64 + 1 + random.below(2)) * 64;
    Guarded<float> x((rows - 1) * a.x_stride + k);
    for (std::size_t i = 0; i < x.size(); ++i) {
      float v = random.normal();
      if (flavour == 1) v = random.hostile();
      if (flavour == 2) v = 1e-41F * v;                                      // subnormals: the scale is floored
      if (flavour == 3) v = static_cast<float>(random.below(255)) - 127.0F;  // near ties once divided
      if (flavour == 4) v = std::fabs(v);
      if (flavour == 5) v = random.below(2) == 0 ? 0.0F : -0.0F;
      if (flavour == 6) v = 0.5F * static_cast<float>(random.below(509)) - 127.0F;  // ties, where the scale is 1
      x[i] = v;
    }
    if (flavour == 6 && k > 0)
      for (std::size_t r = 0; r < rows; ++r) x[r * a.x_stride] = 127.0F;
    if (flavour == 7 && k > 0) x[random.below(rows) * a.x_stride + random.below(k)] = random.non_finite();
    a.x = x.data();
    Guarded<std::int8_t> got(rows * a.q_stride);
    Guarded<float> scales(rows);
    Guarded<std::int32_t> zeros(rows);
    std::vector<std::int8_t> want(got.size());
    std::vector<float> want_scales(rows);
    std::vector<std::int32_t> want_zeros(rows);
    a.q = want.data();
    a.scales = want_scales.data();
    a.zeros = want_zeros.data();
    scalar::table.quantize_rows(a);
    a.q = got.data();
    a.scales = scales.data();
    a.zeros = symmetric && random.below(2) == 0 ? nullptr : zeros.data();
    t.quantize_rows(a);
    const std::string what = "quantize_rows k=" + std::to_string(k) + " flavour=" + std::to_string(flavour) +
                             " bits=" + std::to_string(bits);
    expect_equal(got.data(), want.data(), got.size(), what);
    expect_same(scales.data(), want_scales.data(), rows, what + " scales");
    if (a.zeros != nullptr) expect_equal(zeros.data(), want_zeros.data(), rows, what + " zeros");
  };
  for (int flavour = 0; flavour < 8; ++flavour)
    for (bool symmetric : {true, false}) {
      for (std::size_t k = 0; k <= 95; ++k) run(1 + k % 3, k, symmetric, flavour);
      for (std::size_t k : {127U, 128U, 129U, 576U, 1021U}) run(3, k, symmetric, flavour);
      for (unsigned bits = 2; bits < 8; ++bits)
        for (std::size_t k : {0U, 1U, 15U, 16U, 31U, 32U, 33U, 200U}) run(3, k, symmetric, flavour, bits);
    }
}

inline void check_block_sums(const KernelTable& t) {
  Random random(7);
  for (std::size_t n = 0; n <= 16 * 23; n += 16)
    for (int extreme = 0; extreme < 3; ++extreme) {
      Guarded<std::int8_t> q(n, random.below(5));
      for (std::size_t i = 0; i < n; ++i)
        q[i] = static_cast<std::int8_t>(extreme == 1   ? -128
                                        : extreme == 2 ? 127
                                                       : static_cast<int>(random.below(256)) - 128);
      Guarded<std::int32_t> got(n / 16);
      std::vector<std::int32_t> want(n / 16);
      scalar::table.block_sums(q.data(), n, want.data());
      t.block_sums(q.data(), n, got.data());
      expect_equal(got.data(), want.data(), n / 16, "block_sums n=" + std::to_string(n));
    }
}

inline void check_epilogue(const KernelTable& t) {
  Random random(8);
  std::size_t int8_outputs = 0;
  const auto run = [&](std::size_t rows, std::size_t cols, const std::vector<EpilogueOpKind>& kinds, bool scales,
                       bool zeros, bool int8) {
    EpilogueArgs a;
    a.rows = rows;
    a.cols = cols;
    a.acc_stride = cols + random.below(4);
    a.out_stride = cols + random.below(4);
    Guarded<float> acc((rows - 1) * a.acc_stride + cols);
    for (std::size_t i = 0; i < acc.size(); ++i) acc[i] = 3.0F * random.hostile();
    if (random.below(3) == 0) acc[random.below(acc.size())] = random.non_finite();
    Guarded<float> row_scales(rows);
    Guarded<float> row_zeros(rows);
    for (std::size_t r = 0; r < rows; ++r) {
      row_scales[r] = random.normal();
      row_zeros[r] = static_cast<float>(random.below(256)) - 128.0F;
    }
    Guarded<float> sums(cols);
    for (std::size_t c = 0; c < cols; ++c) sums[c] = random.normal();
    const std::size_t stride = cols + random.below(3);
    Guarded<float> data((rows - 1) * stride + cols);
    for (std::size_t i = 0; i < data.size(); ++i) data[i] = random.normal();
    std::vector<EpilogueOp> ops;
    for (EpilogueOpKind kind : kinds) {
      EpilogueOp op;
      op.kind = kind;
      op.data = kind >= EpilogueOpKind::relu ? nullptr : data.data();
      op.stride = stride;
      ops.push_back(op);
    }
    a.acc = acc.data();
    a.row_scales = scales ? row_scales.data() : nullptr;
    a.row_zeros = zeros ? row_zeros.data() : nullptr;
    a.channel_sums = zeros ? sums.data() : nullptr;
    a.ops = ops.data();
    a.op_count = ops.size();
    a.out_scale = 0.031F;
    a.out_zero = static_cast<std::int32_t>(random.below(256)) - 128;
    const std::size_t size = (rows - 1) * a.out_stride + cols;
    std::string what = "epilogue cols=" + std::to_string(cols) + " ops";
    for (EpilogueOpKind kind : kinds) what += " " + std::to_string(static_cast<int>(kind));
    if (int8) {
      Guarded<std::int8_t> got(size);
      std::vector<std::int8_t> want(got.data(), got.data() + size);
      a.out_int8 = want.data();
      scalar::table.epilogue(a);
      a.out_int8 = got.data();
      t.epilogue(a);
      expect_equal(got.data(), want.data(), size, what);
      ++int8_outputs;
    } else {
      Guarded<float> got(size);
      std::vector<float> want(got.data(), got.data() + size);
      a.out = want.data();
      scalar::table.epilogue(a);
      a.out = got.data();
      t.epilogue(a);
      expect_same(got.data(), want.data(), size, what);
    }
  };
  for (std::size_t cols = 1; cols <= 95; ++cols) {
    std::vector<EpilogueOpKind> kinds;
    for (std::size_t i = random.below(5); i > 0; --i)
      kinds.push_back(static_cast<EpilogueOpKind>(random.below(7)));
    for (int form = 0; form < 8; ++form)
      run(1 + random.below(4), cols, kinds, (form & 1) != 0, (form & 2) != 0, (form & 4) != 0);
  }
  for (int kind = 0; kind < 7; ++kind)
    for (std::size_t cols : {16U, 64U, 67U, 191U})
      run(5, cols, {static_cast<EpilogueOpKind>(kind)}, kind % 2 == 0, false, false);
  EXPECT_EQ(int8_outputs, 95U * 4U);
}

/// The activations' own input range, swept: every sign, exponent and a few hundred mantissas.
inline void check_activations(const KernelTable& t) {
  std::vector<float> x;
  for (std::uint32_t high = 0; high < 65536; ++high)
    x.push_back(bits_float(high << 16 | (high * 40503U & 0xFFFFU)));
  Random random(9);
  for (int i = 0; i < 100000; ++i) x.push_back(30.0F * random.normal());
  for (EpilogueOpKind kind : {EpilogueOpKind::silu, EpilogueOpKind::gelu, EpilogueOpKind::relu}) {
    EpilogueOp op;
    op.kind = kind;
    EpilogueArgs a;
    a.acc = x.data();
    a.acc_stride = x.size();
    a.rows = 1;
    a.cols = x.size();
    a.ops = &op;
    a.op_count = 1;
    a.out_stride = x.size();
    std::vector<float> got(x.size());
    std::vector<float> want(x.size());
    a.out = want.data();
    scalar::table.epilogue(a);
    a.out = got.data();
    t.epilogue(a);
    expect_same(got.data(), want.data(), x.size(), "activation " + std::to_string(static_cast<int>(kind)));
  }
}

inline void check_lines(const KernelTable& t) {
  Random random(10);
  for (std::size_t n = 0; n <= 300; ++n) {
    Guarded<float> x(n);
    for (std::size_t i = 0; i < n; ++i) x[i] = random.hostile();
    if (n % 7 == 0)  // the range of both zeros is the positive one, in any order
      for (std::size_t i = 0; i < n; ++i) x[i] = random.below(2) == 0 ? 0.0F : -0.0F;
    if (n > 0 && n % 3 == 0) x[random.below(n)] = random.non_finite();
    if (n > 0 && n % 5 == 0)
      for (std::size_t i = 0; i < n; ++i) x[i] = std::fabs(x[i]);
    const LineRange got = t.line_range(x.data(), n);
    const LineRange want = scalar::table.line_range(x.data(), n);
    EXPECT_EQ(got.finite, want.finite) << n;
    EXPECT_TRUE(same(got.min, want.min)) << n << " " << got.min << " " << want.min;
    EXPECT_TRUE(same(got.max, want.max)) << n << " " << got.max << " " << want.max;
  }
  const int limits[][2] = {{-127, 127}, {-128, 127}, {0, 15}, {1, 15}};
  for (std::size_t n = 0; n <= 300; ++n)
    for (const auto& limit : limits) {
      Guarded<float> x(n);
      for (std::size_t i = 0; i < n; ++i)
        x[i] = n % 2 == 0 ? random.hostile() : 0.25F * static_cast<float>(random.below(99));
      Guarded<std::int8_t> got(n);
      std::vector<std::int8_t> want(n);
      QuantizeLineArgs a;
      a.x = x.data();
      a.n = n;
      a.scale = n % 7 == 0 ? -0.1F : n % 2 == 0 ? 0.03F : 0.5F;
      a.offset = n % 3 == 0 ? random.normal() : 0.0F;
      a.zero = n % 3 == 1 ? static_cast<std::int32_t>(random.below(16)) : 0;
      a.qmin = limit[0];
      a.qmax = limit[1];
      a.q = want.data();
      scalar::table.quantize_line(a);
      a.q = got.data();
      t.quantize_line(a);
      expect_equal(got.data(), want.data(), n, "quantize_line n=" + std::to_string(n));
      DequantizeLineArgs d;
      for (std::size_t i = 0; i < n; ++i) got[i] = static_cast<std::int8_t>(random.below(256));
      d.q = got.data();
      d.n = n;
      d.scale = random.normal();
      d.has_offset = n % 3 == 0;
      d.offset = random.normal();
      d.zero = static_cast<std::int32_t>(random.below(256)) - 128;
      Guarded<float> values(n);
      std::vector<float> want_values(n);
      d.x = want_values.data();
      scalar::table.dequantize_line(d);
      d.x = values.data();
      t.dequantize_line(d);
      expect_same(values.data(), want_values.data(), n, "dequantize_line n=" + std::to_string(n));
    }
}

/// Conversions keep even NaN payloads, so these are compared by bits.
inline void check_conversions(const KernelTable& t) {
  std::vector<std::uint16_t> halves(65536);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
  std::vector<float> got(65536);
  std::vector<float> want(65536);
  t.float_from_fp16(halves.data(), halves.size(), got.data());
  scalar::table.float_from_fp16(halves.data(), halves.size(), want.data());
  EXPECT_EQ(std::memcmp(got.data(), want.data(), 4 * got.size()), 0) << "float_from_fp16";
  t.float_from_bf16(halves.data(), halves.size(), got.data());
  scalar::table.float_from_bf16(halves.data(), halves.size(), want.data());
  EXPECT_EQ(std::memcmp(got.data(), want.data(), 4 * got.size()), 0) << "float_from_bf16";

  // Around every value and midpoint of both formats: the top 20 bits swept, the rest at its corners.
  std::vector<float> x;
  for (std::uint32_t top = 0; top < 1U << 20; ++top)
    for (std::uint32_t low : {0x000U, 0x001U, 0x7FFU, 0x800U, 0x801U, 0xFFFU})
      x.push_back(bits_float(top << 12 | low));
  std::vector<std::uint16_t> codes(x.size());
  std::vector<std::uint16_t> want_codes(x.size());
  t.fp16_from_float(x.data(), x.size(), codes.data());
  scalar::table.fp16_from_float(x.data(), x.size(), want_codes.data());
  expect_equal(codes.data(), want_codes.data(), x.size(), "fp16_from_float");
  t.bf16_from_float(x.data(), x.size(), codes.data());
  scalar::table.bf16_from_float(x.data(), x.size(), want_codes.data());
  expect_equal(codes.data(), want_codes.data(), x.size(), "bf16_from_float");

  for (std::size_t n = 0; n <= 70; ++n) {
    Guarded<float> line(n);
    Guarded<std::uint16_t> out(n);
    for (std::size_t i = 0; i < n; ++i) line[i] = x[(i + n) * 7919 % x.size()];
    t.fp16_from_float(line.data(), n, out.data());
    scalar::table.fp16_from_float(line.data(), n, want_codes.data());
    expect_equal(out.data(), want_codes.data(), n, "fp16_from_float n=" + std::to_string(n));
    t.float_from_fp16(out.data(), n, line.data());
    scalar::table.float_from_fp16(out.data(), n, want.data());
    EXPECT_EQ(std::memcmp(line.data(), want.data(), 4 * n), 0) << "float_from_fp16 n=" << n;
    t.bf16_from_float(line.data(), n, out.data());
    scalar::table.bf16_from_float(line.data(), n, want_codes.data());
    expect_equal(out.data(), want_codes.data(), n, "bf16_from_float n=" + std::to_string(n));
    t.float_from_bf16(out.data(), n, line.data());
    scalar::table.float_from_bf16(out.data(), n, want.data());
    EXPECT_EQ(std::memcmp(line.data(), want.data(), 4 * n), 0) << "float_from_bf16 n=" << n;
  }
}

}  // namespace kernels_float
