// The integer kernels of every ISA that this machine runs: bit for bit the scalar table's results, and those bit
// for bit an int64 reference's. Operands end at guard pages.
#include "nibble/core/abi.hpp"

#include <gtest/gtest.h>

#include "kernels_int_problem.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace {

using nibble::Format;
using nibble::Isa;
using nibble::Symmetry;
using nibble::detail::IntGemmArgs;
using nibble::detail::KernelTable;
using nibble_test::Problem;
using nibble_test::Shape;
using nibble_test::Values;
using Kernel = void (*)(const IntGemmArgs&) noexcept;

Kernel kernel_of(const KernelTable& table, Format format) {
  return format == Format::int8 ? table.gemm_w8a8 : table.gemm_w4a8;
}

const KernelTable& scalar() { return nibble::detail::scalar::table; }

TEST(KernelsIntScalar, EqualsInt64Reference) {
  std::size_t checked = 0;
  nibble_test::for_each_shape([&](const Shape& shape) {
    if (testing::Test::HasFailure()) return;
    const Problem problem(shape);
    std::vector<std::uint8_t> expected;
    ASSERT_TRUE(problem.naive(&expected)) << shape.name();
    ASSERT_TRUE(problem.run(scalar()) == expected) << shape.name();
    ++checked;
  });
  EXPECT_GT(checked, 1000U);
}

class KernelsInt : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (!nibble::isa_available(GetParam())) GTEST_SKIP() << "this CPU has no " << nibble::name_of(GetParam());
  }
  const KernelTable& table() const { return nibble::detail::kernels_for(GetParam()); }
  void expect_equal(const Shape& shape, std::uint32_t seed = 1) const {
    if (HasFailure()) return;
    const Problem problem(shape, seed);
    ASSERT_TRUE(problem.run(table()) == problem.run(scalar())) << shape.name();
  }
};

TEST_P(KernelsInt, EqualsScalarOverShapes) {
  std::size_t checked = 0;
  nibble_test::for_each_shape([&](const Shape& shape) {
    expect_equal(shape, static_cast<std::uint32_t>(checked));
    ++checked;
  });
  EXPECT_GT(checked, 1000U);
}

// Every zero point of both formats: the 16 lanes of 16 panels hold 256 of them.
TEST_P(KernelsInt, EveryZeroPoint) {
  for (Format format : {Format::int8, Format::int4})
    for (std::size_t rows : {1U, 2U, 5U}) {
      Shape shape;
      shape.format = format;
      shape.symmetry = Symmetry::asymmetric;
      shape.rows = rows;
      shape.panels = 16;
      shape.k = 75;
      shape.raw = true;
      const Problem problem(shape);
      std::vector<std::int8_t> zeros(256);
      for (std::size_t i = 0; i < zeros.size(); ++i)
        zeros[i] = static_cast<std::int8_t>(format == Format::int8 ? static_cast<int>(i) - 128
                                                                   : static_cast<int>(i) % 16);
      const auto run = [&](Kernel kernel) {
        std::vector<std::int32_t> out(rows * problem.acc_stride());
        IntGemmArgs args = problem.args(out.data());
        args.w.zeros = zeros.data();
        kernel(args);
        return out;
      };
      EXPECT_EQ(run(kernel_of(table(), format)), run(kernel_of(scalar(), format)))
          << nibble::name_of(format) << " rows " << rows;
    }
}

// The longest group whose sum fits int32 by the contract, at the values that bring it nearest to the edge.
TEST_P(KernelsInt, LongestGroup) {
  for (Format format : {Format::int8, Format::int4})
    for (Symmetry symmetry : {Symmetry::symmetric, Symmetry::asymmetric})
      for (Values values : {Values::lowest, Values::highest_weights, Values::alternating})
        for (std::size_t rows : {1U, 3U}) {
          Shape shape;
          shape.format = format;
          shape.symmetry = symmetry;
          shape.values = values;
          shape.rows = rows;
          shape.k = nibble::detail::max_exact_group;
          shape.raw = true;
          expect_equal(shape);
        }
}

// Codes of 2, 3, 5 and 6 bits as nibbles and bytes.
TEST_P(KernelsInt, Expand) {
  for (Format format : {Format::int2, Format::int3, Format::int5, Format::int6})
    for (Symmetry symmetry : {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset})
      for (std::size_t k : {1U, 16U, 17U, 75U}) {
        Shape shape;
        shape.format = format;
        shape.symmetry = symmetry;
        shape.panels = 3;
        shape.k = k;
        const Problem problem(shape);
        const nibble::detail::PanelView w = problem.args(nullptr).w;
        const std::size_t bytes = nibble::detail::expanded_panel_bytes(w);
        const auto run = [&](const KernelTable& t) {
          nibble_test::GuardedBytes room(2 * bytes);
          nibble::detail::expand_panels(t, w, 1, 3, room.data());
          return std::vector<std::uint8_t>(room.data(), room.data() + room.size());
        };
        EXPECT_EQ(run(table()), run(scalar())) << nibble::name_of(format) << " k " << k;
      }
}

TEST_P(KernelsInt, NothingToDo) {
  for (Format format : {Format::int8, Format::int4}) {
    Shape shape;
    shape.format = format;
    shape.panels = 3;
    shape.k = 40;
    const Problem problem(shape);
    std::vector<float> out(problem.acc_stride(), 1.5F);
    IntGemmArgs args = problem.args(out.data());
    args.rows = 0;
    kernel_of(table(), format)(args);
    args = problem.args(out.data());
    args.panel_begin = args.panel_end;
    kernel_of(table(), format)(args);
    EXPECT_EQ(out, std::vector<float>(out.size(), 1.5F)) << nibble::name_of(format);
  }
}

// All but scalar, the first.
INSTANTIATE_TEST_SUITE_P(Isas, KernelsInt,
                         testing::ValuesIn(nibble::built_isas.begin() + 1, nibble::built_isas.end()),
                         [](const testing::TestParamInfo<Isa>& isa) {
                           return std::string(nibble::name_of(isa.param));
                         });

// A table without an entry would make the comparisons above meaningless.
TEST(KernelsIntTables, AllEntriesArePresent) {
  for (Isa isa : nibble::built_isas) {
    if (!nibble::isa_available(isa)) continue;
    const KernelTable& table = nibble::detail::kernels_for(isa);
    ASSERT_NE(table.gemm_w8a8, nullptr) << nibble::name_of(isa);
    ASSERT_NE(table.gemm_w4a8, nullptr) << nibble::name_of(isa);
    if (isa != Isa::scalar) {
      EXPECT_NE(table.gemm_w8a8, scalar().gemm_w8a8) << nibble::name_of(isa);
      EXPECT_NE(table.gemm_w4a8, scalar().gemm_w4a8) << nibble::name_of(isa);
    }
  }
}

}  // namespace
