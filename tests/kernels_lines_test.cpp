// Kernels for lines of groups and for lanes, on every ISA, against the oracle.
#include "kernels_lines_checks.hpp"
#include "nibble/kernels/dispatch.hpp"

using namespace kernels_float;  // NOLINT

namespace {

class LineKernels : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (!isa_available(GetParam())) GTEST_SKIP() << "this CPU cannot run " << name_of(GetParam());
  }
  const KernelTable& table() const { return kernels_for(GetParam()); }
  FpEnvironment environment_;
};

TEST_P(LineKernels, GroupRanges) { check_group_ranges(table()); }
TEST_P(LineKernels, FitRanges) { check_fit_ranges(table(), 150); }
TEST_P(LineKernels, GroupCodes) { check_group_codes(table()); }
TEST_P(LineKernels, Lanes) { check_lanes(table()); }

INSTANTIATE_TEST_SUITE_P(Isas, LineKernels, testing::ValuesIn(all_isas),
                         [](const testing::TestParamInfo<Isa>& isa) { return std::string(name_of(isa.param)); });

// Above a midpoint, as a double, is above the float that the search asks for: checked at the floats around each.
TEST(LevelSearch, FloatsBelowMidpoints) {
  for (double m : nf4_midpoints) {
    const float f = float_below(m);
    EXPECT_LE(static_cast<double>(f), m);
    EXPECT_GT(static_cast<double>(std::nextafter(f, 2.0F)), m);
  }
}

}  // namespace
