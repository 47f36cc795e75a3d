// What the kernels for lines of groups and for lanes are checked for, against scalar's bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "kernels_float_checks.hpp"
#include "nibble/kernels/scalar/table.hpp"

namespace kernels_float {

inline void check_group_ranges(const KernelTable& t) {
  Random random(31);
  for (const std::size_t group : {16U, 32U, 48U, 64U, 128U})
    for (std::size_t n = 1; n <= 40 * group; n += n < 2 * group ? 1 : group / 2 + 5) {
      Guarded<float> x(n);
      for (std::size_t i = 0; i < n; ++i)
        x[i] = n % 11 == 0 ? (random.below(2) == 0 ? 0.0F : -0.0F) : random.hostile();
      if (n % 5 == 0) x[random.below(n)] = random.non_finite();
      const std::size_t groups = (n + group - 1) / group;
      Guarded<float> lows(groups);
      Guarded<float> highs(groups);
      std::vector<float> want_lows(groups);
      std::vector<float> want_highs(groups);
      const bool got = t.group_ranges({x.data(), n, group, lows.data(), highs.data()});
      const bool want = scalar::table.group_ranges({x.data(), n, group, want_lows.data(), want_highs.data()});
      const std::string what = "group_ranges n=" + std::to_string(n) + " group=" + std::to_string(group);
      ASSERT_EQ(got, want) << what;
      if (!want) continue;
      expect_same(lows.data(), want_lows.data(), groups, what);
      expect_same(highs.data(), want_highs.data(), groups, what);
    }
  for (std::size_t n = 0; n <= 70; ++n) {
    Guarded<float> x(n);
    Guarded<float> lows(n);
    Guarded<float> highs(n);
    for (std::size_t i = 0; i < n; ++i) {
      x[i] = random.hostile();
      lows[i] = n % 3 == 0 ? std::numeric_limits<float>::infinity() : random.hostile();
      highs[i] = n % 3 == 0 ? -std::numeric_limits<float>::infinity() : random.hostile();
    }
    std::vector<float> want_lows(lows.data(), lows.data() + n);
    std::vector<float> want_highs(highs.data(), highs.data() + n);
    t.widen_ranges({x.data(), n, lows.data(), highs.data()});
    scalar::table.widen_ranges({x.data(), n, want_lows.data(), want_highs.data()});
    expect_same(lows.data(), want_lows.data(), n, "widen_ranges");
    expect_same(highs.data(), want_highs.data(), n, "widen_ranges");
  }
}

/// Ranges of ordinary and of odd data: tiny, huge, one-sided, far from zero, constant, empty.
inline void random_range(Random& random, float& lo, float& hi) {
  const float a = random.normal();
  const float b = random.normal();
  const float magnitude =
      random.below(4) == 0 ? std::ldexp(1.0F, static_cast<int>(random.below(240)) - 130) : 1.0F;
  lo = std::min(a, b) * magnitude;
  hi = std::max(a, b) * magnitude;
  switch (random.below(12)) {
    case 0: hi = lo; break;
    case 1:
      lo = 0.0F;
      hi = std::fabs(hi);
      break;
    case 2:
      hi = 0.0F;
      lo = -std::fabs(lo);
      break;
    case 3: lo = hi = 0.0F; break;
    case 4: hi = lo + std::fabs(lo) * 0x1p-10F; break;
    case 5:
      hi = std::fabs(hi);
      lo = -hi;
      break;
    case 6:
      lo = random.hostile();
      hi = std::max(lo, random.hostile());
      break;
    default: break;
  }
  lo += 0.0F;
  hi += 0.0F;
}

struct FitCase {
  Format format;
  Symmetry symmetry;
  int zero;
  int qmin;
  int qmax;
};
inline std::vector<FitCase> fit_cases() {
  return {{Format::int8, Symmetry::symmetric, 0, -127, 127},    {Format::int8, Symmetry::symmetric, 0, -128, 127},
          {Format::int4, Symmetry::symmetric, 8, 1, 15},        {Format::int4, Symmetry::symmetric, 8, 0, 15},
          {Format::int8, Symmetry::asymmetric, 0, -128, 127},   {Format::int4, Symmetry::asymmetric, 0, 0, 15},
          {Format::int8, Symmetry::float_offset, 0, -128, 127}, {Format::int4, Symmetry::float_offset, 0, 0, 15},
          {Format::int2, Symmetry::symmetric, 2, 1, 3},         {Format::int2, Symmetry::symmetric, 2, 0, 3},
          {Format::int3, Symmetry::asymmetric, 0, 0, 7},        {Format::int2, Symmetry::float_offset, 0, 0, 3},
          {Format::int6, Symmetry::symmetric, 32, 1, 63},       {Format::int5, Symmetry::asymmetric, 0, 0, 31},
          {Format::nf4, Symmetry::symmetric, 0, 0, 15},         {Format::fp4, Symmetry::symmetric, 0, 0, 15}};
}

inline void check_fit_ranges(const KernelTable& t, std::size_t rounds) {
  Random random(32);
  std::size_t regular = 0;
  std::size_t all = 0;
  for (const FitCase& c : fit_cases())
    for (const ScaleType type : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16})
      for (std::size_t n = 0; n < rounds; ++n) {
        Guarded<float> lows(n);
        Guarded<float> highs(n);
        for (std::size_t i = 0; i < n; ++i) random_range(random, lows[i], highs[i]);
        Guarded<float> scales(n);
        Guarded<float> offsets(n);
        Guarded<std::int8_t> zeros(n);
        Guarded<std::uint8_t> irregular(n);
        std::vector<float> want_scales(n);
        std::vector<float> want_offsets(n);
        std::vector<std::int8_t> want_zeros(n);
        std::vector<std::uint8_t> want_irregular(n);
        FitRangesArgs a;
        a.lows = lows.data();
        a.highs = highs.data();
        a.n = n;
        a.format = c.format;
        a.symmetry = c.symmetry;
        a.scale_type = type;
        a.zero = c.zero;
        a.qmin = c.qmin;
        a.qmax = c.qmax;
        a.scales = want_scales.data();
        a.offsets = want_offsets.data();
        a.zeros = want_zeros.data();
        a.irregular = want_irregular.data();
        scalar::table.fit_ranges(a);
        a.scales = scales.data();
        a.offsets = offsets.data();
        a.zeros = zeros.data();
        a.irregular = irregular.data();
        t.fit_ranges(a);
        expect_equal(irregular.data(), want_irregular.data(), n, "irregular");
        for (std::size_t i = 0; i < n; ++i) {
          ++all;
          if (want_irregular[i] != 0) continue;
          ++regular;
          ASSERT_TRUE(same(scales[i], want_scales[i])) << lows[i] << " " << highs[i];
          ASSERT_TRUE(c.symmetry != Symmetry::float_offset || same(offsets[i], want_offsets[i]));
          ASSERT_TRUE(c.symmetry != Symmetry::asymmetric || zeros[i] == want_zeros[i]);
        }
      }
  EXPECT_GT(regular, all / 3);
  EXPECT_LT(regular, all);
}

inline void check_group_codes(const KernelTable& t) {
  Random random(33);
  for (const Format format : {Format::int8, Format::int4, Format::nf4, Format::fp4})
    for (int kind = 0; kind < (is_codebook(format) ? 1 : 3); ++kind)
      for (const std::size_t group : {1U, 16U, 32U, 80U, 1024U})
        for (std::size_t n = 0; n <= 200; n += n < 40 ? 1 : 7) {
          Guarded<float> x(n);
          const std::size_t groups = (n + group - 1) / group;
          Guarded<float> scales(groups);
          Guarded<float> offsets(groups);
          Guarded<std::int8_t> zeros(groups);
          for (std::size_t g = 0; g < groups; ++g) {
            scales[g] = std::ldexp(0.5F + std::fabs(random.normal()), static_cast<int>(random.below(9)) - 6);
            if (g % 5 == 4) scales[g] = -scales[g];
            if (g % 7 == 6) scales[g] = 0x1p-126F;
            offsets[g] = random.normal();
            zeros[g] = static_cast<std::int8_t>(random.below(16));
          }
          for (std::size_t i = 0; i < n; ++i) {
            const float scale = scales[i / group];
            x[i] = random.hostile();
            // Around what rounding turns on: halves of a step, midpoints of levels, and the floats beside them.
            if (random.below(2) == 0) {
              const float at = format == Format::nf4   ? static_cast<float>(nf4_midpoints[random.below(15)])
                               : format == Format::fp4 ? fp4_last_of[random.below(15)]
                                                       : static_cast<float>(random.below(600)) * 0.5F - 150.0F;
              x[i] = bits_float(float_bits(at * scale) + static_cast<std::uint32_t>(random.below(3)) - 1);
              if (!(std::fabs(x[i]) < 3.4e38F)) x[i] = 0.0F;
            }
          }
          const std::size_t bytes = format == Format::int8 ? n : (n + 1) / 2;
          Guarded<std::uint8_t> codes(bytes);
          std::vector<std::uint8_t> want(bytes);
          QuantizeGroupsArgs a;
          a.format = format;
          a.x = x.data();
          a.n = n;
          a.group = group;
          a.scales = scales.data();
          a.offsets = kind == 1 ? offsets.data() : nullptr;
          a.zeros = kind == 2 ? zeros.data() : nullptr;
          a.zero = kind == 0 && format == Format::int4 ? 8 : 0;
          a.qmin = format == Format::int8 ? -128 + kind % 2 : 0;
          a.qmax = format == Format::int8 ? 127 : 15;
          a.q = want.data();
          scalar::table.quantize_groups(a);
          a.q = codes.data();
          t.quantize_groups(a);
          const std::string what = std::string(name_of(format)) + " kind=" + std::to_string(kind) +
                                   " n=" + std::to_string(n) + " group=" + std::to_string(group);
          expect_equal(codes.data(), want.data(), bytes, "quantize_groups " + what);

          for (std::size_t i = 0; i < bytes; ++i) codes[i] = static_cast<std::uint8_t>(random.below(256));
          Guarded<float> values(n);
          std::vector<float> want_values(n);
          DequantizeGroupsArgs d;
          d.format = format;
          d.q = codes.data();
          d.n = n;
          d.group = group;
          d.scales = a.scales;
          d.offsets = a.offsets;
          d.zeros = a.zeros;
          d.zero = a.zero;
          d.codebook = codebook_of(format);
          d.x = want_values.data();
          scalar::table.dequantize_groups(d);
          d.x = values.data();
          t.dequantize_groups(d);
          expect_same(values.data(), want_values.data(), n, "dequantize_groups " + what);
        }
}

inline void check_lanes(const KernelTable& t) {
  Random random(34);
  for (const LaneElement element : {LaneElement::bytes, LaneElement::halves, LaneElement::words,
                                    LaneElement::int8_codes, LaneElement::int4_codes})
    for (const std::size_t row_count : {16U, 1U, 7U, 15U})
      for (std::size_t bytes = 1; bytes <= 300; bytes += row_count == 16 && bytes < 140 ? 1 : 13) {
        const std::size_t size = bytes_of(element);
        const std::size_t elements = (bytes + size - 1) / size;
        const std::size_t gap = bytes % 3 * 5;
        const std::size_t step = 16 * size + (bytes % 2 == 0 ? 0 : 32);
        const std::size_t row_stride = bytes + gap;
        Guarded<std::uint8_t> rows((row_count - 1) * row_stride + bytes);
        for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::uint8_t>(random.below(256));
        Guarded<std::uint8_t> lanes((elements - 1) * step + 16 * size);
        std::memset(lanes.data(), 0x5A, lanes.size());
        std::vector<std::uint8_t> want(lanes.data(), lanes.data() + lanes.size());
        LanesArgs a{element, rows.data(), row_stride, row_count, bytes, want.data(), step};
        scalar::table.rows_to_lanes(a);
        a.lanes = lanes.data();
        t.rows_to_lanes(a);
        const std::string what = "element " + std::to_string(static_cast<int>(element)) +
                                 " rows=" + std::to_string(row_count) + " bytes=" + std::to_string(bytes);
        expect_equal(lanes.data(), want.data(), want.size(), "rows_to_lanes " + what);
        // Back: what lies between the rows stays as it is.
        std::vector<std::uint8_t> kept(rows.data(), rows.data() + rows.size());
        for (std::size_t r = 0; r < row_count; ++r) std::memset(rows.data() + r * row_stride, 0x33, bytes);
        a.rows = rows.data();
        t.lanes_to_rows(a);
        expect_equal(rows.data(), kept.data(), kept.size(), "lanes_to_rows " + what);
        std::memset(rows.data(), 0x33, bytes);
        scalar::table.lanes_to_rows(a);
        expect_equal(rows.data(), kept.data(), kept.size(), "scalar lanes_to_rows " + what);
      }
}

}  // namespace kernels_float
