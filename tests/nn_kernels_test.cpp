// Norm, softmax, rotary embedding and the products of attention: every ISA against the oracle bit for bit, and the
// oracle against double.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels_float_checks.hpp"
#include "nibble/kernels/dispatch.hpp"

using namespace kernels_float;  // NOLINT

namespace {

const KernelTable& oracle() { return scalar::table; }

class NnKernels : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (!isa_available(GetParam())) GTEST_SKIP() << "this CPU cannot run " << name_of(GetParam());
  }
  const KernelTable& table() const { return kernels_for(GetParam()); }
  FpEnvironment environment_;
};

TEST_P(NnKernels, RmsNorm) {
  Random random(1);
  for (const std::size_t n : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 576, 577})
    for (const bool hostile : {false, true}) {
      constexpr std::size_t rows = 3;
      const std::size_t stride = n + 5;
      Guarded<float> x(rows * stride - 5), weight(n), got(rows * stride - 5);
      std::vector<float> want(rows * stride);
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = hostile ? random.hostile() : random.normal();
      if (hostile && n > 2) x[stride + 1] = random.non_finite();
      for (std::size_t i = 0; i < n; ++i) weight[i] = random.normal();
      for (std::size_t i = 0; i < got.size(); ++i) got[i] = want[i] = -7.0F;
      RmsNormArgs a{x.data(), stride, weight.data(), rows, n, 1e-5F, got.data(), stride};
      table().rms_norm(a);
      a.out = want.data();
      oracle().rms_norm(a);
      expect_same(got.data(), want.data(), got.size(), "n " + std::to_string(n));
    }
}

TEST(RmsNormOracle, EqualsTheDefinition) {
  Random random(2);
  for (const std::size_t n : {1, 3, 16, 48, 576}) {
    std::vector<float> x(n), weight(n), out(n);
    for (float& v : x) v = random.normal();
    for (float& v : weight) v = random.normal();
    oracle().rms_norm({x.data(), n, weight.data(), 1, n, 1e-5F, out.data(), n});
    double squares = 0.0;
    for (const float v : x) squares += static_cast<double>(v) * static_cast<double>(v);
    const double factor = 1.0 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(1e-5F));
    // All squares have one sign: n / 16 + 4 additions of 2^-24 each, halved by the root, and five more roundings.
    const double tolerance = (static_cast<double>(n) / 32.0 + 8.0) * 0x1p-24;
    for (std::size_t i = 0; i < n; ++i) {
      const double exact = static_cast<double>(x[i]) * factor * static_cast<double>(weight[i]);
      EXPECT_NEAR(static_cast<double>(out[i]), exact, std::fabs(exact) * tolerance) << n << " " << i;
    }
  }
}

struct SoftmaxProblem {
  std::size_t rows, n, visible, step, stride;
  std::vector<float> x, factors;
};

SoftmaxProblem softmax_problem(Random& random, std::size_t visible, int kind) {
  SoftmaxProblem p;
  p.rows = 5;
  p.visible = visible;
  p.step = 2;
  p.n = (visible + p.rows / p.step + 31) / 32 * 32;
  p.stride = p.n + 3;
  p.x.resize(p.rows * p.stride);
  p.factors.resize(p.n);
  for (float& v : p.x) v = 5.0F * random.normal();
  for (float& v : p.factors) v = std::fabs(random.normal());
  if (kind == 1)  // what exp makes zeros, subnormals and ones of
    for (float& v : p.x)
      v = random.below(3) == 0 ? -90.0F - static_cast<float>(random.below(30)) : random.hostile();
  if (kind == 2) p.x[p.stride + visible / 2] = random.non_finite();
  if (kind == 3)
    for (float& v : p.x) v = -std::numeric_limits<float>::infinity();
  if (kind == 4) p.factors[visible / 2] = std::numeric_limits<float>::quiet_NaN();
  if (kind == 5)
    for (float& v : p.factors) v *= 1e-30F;  // groups that vanish, and such that do not
  if (kind == 6)
    for (float& v : p.x) v = 0.0F;
  return p;
}
const std::size_t visibles[] = {1,  2,  7,  8,   15,  16,  17,  31,  32,  33,
                                63, 64, 65, 127, 128, 129, 255, 256, 300, 1000};

TEST_P(NnKernels, Softmax) {
  Random random(3);
  for (const std::size_t visible : visibles)
    for (int kind = 0; kind < 7; ++kind)
      for (const bool factors : {false, true}) {
        const SoftmaxProblem p = softmax_problem(random, visible, kind);
        Guarded<float> x(p.rows * p.stride - 3), factor(p.n);
        std::copy_n(p.x.data(), x.size(), x.data());
        std::copy_n(p.factors.data(), p.n, factor.data());
        std::vector<float> want = p.x, got_sums(p.rows), want_sums(p.rows);
        SoftmaxArgs a{x.data(),       p.stride, p.rows, p.n, visible, p.step, factors ? factor.data() : nullptr,
                      got_sums.data()};
        table().softmax(a);
        a.x = want.data();
        a.sums = want_sums.data();
        oracle().softmax(a);
        const std::string what = "visible " + std::to_string(visible) + " kind " + std::to_string(kind);
        expect_same(x.data(), want.data(), x.size(), what);
        expect_same(got_sums.data(), want_sums.data(), p.rows, what + ", sums");
      }
}

TEST_P(NnKernels, SoftmaxCodes) {
  Random random(4);
  for (const std::size_t visible : visibles)
    for (int kind = 0; kind < 7; ++kind) {
      const SoftmaxProblem p = softmax_problem(random, visible, kind);
      const std::size_t groups = p.n / 32;
      Guarded<float> x(p.rows * p.stride - 3), factors(p.n), sums(p.rows), scales(p.rows * groups);
      Guarded<std::int8_t> codes(p.rows * p.n);
      Guarded<std::int32_t> code_sums(p.rows * groups);
      std::copy_n(p.x.data(), x.size(), x.data());
      std::copy_n(p.factors.data(), p.n, factors.data());
      SoftmaxCodesArgs a;
      a.x = x.data();
      a.x_stride = p.stride;
      a.rows = p.rows;
      a.n = p.n;
      a.first_visible = visible;
      a.rows_a_step = p.step;
      a.factors = factors.data();
      a.sums = sums.data();
      a.codes = codes.data();
      a.scales = scales.data();
      a.code_sums = code_sums.data();
      table().softmax_codes(a);
      std::vector<float> want_sums(p.rows), want_scales(scales.size());
      std::vector<std::int8_t> want_codes(codes.size());
      std::vector<std::int32_t> want_code_sums(code_sums.size());
      a.sums = want_sums.data();
      a.codes = want_codes.data();
      a.scales = want_scales.data();
      a.code_sums = want_code_sums.data();
      oracle().softmax_codes(a);
      const std::string what = "visible " + std::to_string(visible) + " kind " + std::to_string(kind);
      expect_same(sums.data(), want_sums.data(), p.rows, what + ", sums");
      expect_same(scales.data(), want_scales.data(), scales.size(), what + ", scales");
      expect_equal(codes.data(), want_codes.data(), codes.size(), what + ", codes");
      expect_equal(code_sums.data(), want_code_sums.data(), code_sums.size(), what + ", sums of codes");
    }
}

TEST(SoftmaxOracle, EqualsTheDefinition) {
  Random random(5);
  for (const std::size_t n : {1, 5, 16, 100, 1000}) {
    const SoftmaxProblem p = softmax_problem(random, n, 0);
    std::vector<float> x = p.x, sums(p.rows);
    oracle().softmax({x.data(), p.stride, p.rows, p.n, n, p.step, p.factors.data(), sums.data()});
    for (std::size_t r = 0; r < p.rows; ++r) {
      const std::size_t visible = n + r / p.step;
      const float* in = p.x.data() + r * p.stride;
      const auto top = static_cast<double>(*std::max_element(in, in + visible));
      double sum = 0.0;
      for (std::size_t i = 0; i < p.n; ++i) {
        const double e = i < visible ? std::exp(static_cast<double>(in[i]) - top) : 0.0;
        sum += e;
        const double exact = e * static_cast<double>(p.factors[i]);
        // The difference is rounded to 2^-24 of at most 40, exp to 2 ulp, the product to half of one.
        EXPECT_NEAR(static_cast<double>(x[r * p.stride + i]), exact, exact * 50.0 * 0x1p-24)
            << n << " " << r << " " << i;
      }
      EXPECT_NEAR(static_cast<double>(sums[r]), sum, sum * (50.0 + static_cast<double>(n) / 16.0) * 0x1p-24);
    }
  }
}

// A code is off by half a step, of which a group's scale is one; NaN factors count as zeros.
TEST(SoftmaxOracle, CodesAreNear) {
  Random random(6);
  for (const int kind : {0, 4, 5}) {
    const SoftmaxProblem p = softmax_problem(random, 300, kind);
    const std::size_t groups = p.n / 32;
    std::vector<float> x = p.x, factors = p.factors, sums(p.rows), other_sums(p.rows), scales(p.rows * groups);
    std::vector<std::int8_t> codes(p.rows * p.n);
    std::vector<std::int32_t> code_sums(p.rows * groups);
    oracle().softmax_codes({p.x.data(), p.stride, p.rows, p.n, p.visible, p.step, p.factors.data(), sums.data(),
                            codes.data(), scales.data(), code_sums.data()});
    for (float& f : factors) f = f == f ? f : 0.0F;
    oracle().softmax({x.data(), p.stride, p.rows, p.n, p.visible, p.step, factors.data(), other_sums.data()});
    expect_same(sums.data(), other_sums.data(), p.rows, "sums");
    int largest = 0;
    for (std::size_t r = 0; r < p.rows; ++r)
      for (std::size_t i = 0; i < p.n; ++i) {
        const int code = codes[r * p.n + i];
        const float scale = scales[r * groups + i / 32];
        largest = std::max(largest, code);
        EXPECT_GE(code, 0);
        EXPECT_NEAR(scale * static_cast<float>(code), x[r * p.stride + i], 0.5001F * scale + 0x1p-100F)
            << r << " " << i;
      }
    EXPECT_EQ(largest, 127);
  }
}

TEST_P(NnKernels, Rope) {
  Random random(7);
  for (const std::size_t head : {2, 6, 8, 16, 34, 64, 128})
    for (const std::size_t pairs : {std::size_t{1}, head / 4, head / 2}) {
      constexpr std::size_t heads = 3;
      Guarded<float> x(heads * head), cosines(2 * pairs), sines(2 * pairs);
      std::vector<float> want(x.size());
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = want[i] = random.hostile();
      for (std::size_t i = 0; i < 2 * pairs; ++i) cosines[i] = random.normal(), sines[i] = random.normal();
      RopeArgs a{x.data(), heads, head, pairs, cosines.data(), sines.data(), 0.3F};
      table().rope(a);
      a.x = want.data();
      oracle().rope(a);
      expect_same(x.data(), want.data(), x.size(),
                  "head " + std::to_string(head) + " pairs " + std::to_string(pairs));
    }
}

TEST_P(NnKernels, GemmDirect) {
  Random random(8);
  for (const bool half : {false, true})
    for (const std::size_t rows : {1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 18, 25})
      for (const std::size_t k : {1, 3, 4, 8, 13, 64, 600})
        for (const std::size_t panels : {1, 2, 3, 4, 5, 9}) {
          if (k == 600 && (panels == 9 || rows == 25)) continue;
          const std::size_t element = half ? 2 : 4, k_padded = (k + 7) / 8 * 8;
          const std::size_t bytes = panel_width * k_padded * element + 64;
          // Of the last panel, what lies behind k is not to be touched.
          Guarded<std::uint8_t> codes((panels - 1) * bytes + panel_width * k * element);
          for (std::size_t i = 0; i < codes.size(); i += element) {
            const float v = random.hostile();
            const std::uint16_t h = fp16_from_float(v);
            if (half)
              std::memcpy(codes.bytes() + i, &h, 2);
            else
              std::memcpy(codes.bytes() + i, &v, 4);
          }
          Guarded<float> x(rows * (k + 3) - 3);
          for (std::size_t i = 0; i < x.size(); ++i) x[i] = random.hostile();
          FloatGemvArgs a;
          a.w.format = half ? Format::fp16 : Format::fp32;
          a.w.n = panels * panel_width;
          a.w.k = k;
          a.w.k_padded = a.w.group_size = k_padded;
          a.w.groups = 1;
          a.w.codes = codes.data();
          a.w.panel_bytes = bytes;
          a.panel_begin = panels > 2 ? 1 : 0;
          a.panel_end = panels;
          a.x = x.data();
          a.x_stride = k + 3;
          a.rows = rows;
          a.acc_stride = (a.panel_end - a.panel_begin) * panel_width + 7;
          Guarded<float> got(rows * a.acc_stride - 7);
          std::vector<float> want(rows * a.acc_stride, -3.0F);
          for (std::size_t i = 0; i < got.size(); ++i) got[i] = -3.0F;
          a.acc = got.data();
          table().gemm_direct(a);
          a.acc = want.data();
          oracle().gemm_direct(a);
          expect_same(
              got.data(), want.data(), got.size(),
              "rows " + std::to_string(rows) + " k " + std::to_string(k) + " panels " + std::to_string(panels));
        }
}

INSTANTIATE_TEST_SUITE_P(Isas, NnKernels,
                         testing::Values(Isa::neon, Isa::avx2, Isa::avxvnni, Isa::avx512vnni, Isa::avx512bf16),
                         [](const testing::TestParamInfo<Isa>& isa) { return std::string(name_of(isa.param)); });

}  // namespace
