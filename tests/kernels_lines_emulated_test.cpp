// The kernels for lines and lanes on vectors of 16 floats in plain C++: their tails tested on any machine.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels_lines_checks.hpp"
#include "nibble/kernels/avx512vnni/table.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::emulated_lines {

// clang-format off: the order matters
#include "emulation/avx512_float_ops.inl"
#include "emulation/avx512_line_ops.inl"
#include "nibble/kernels/vector/decode.inl"
#include "nibble/kernels/vector/lines.inl"
#include "nibble/kernels/vector/groups.inl"
#include "nibble/kernels/vector/lanes.inl"
// clang-format on
#undef NIBBLE_UNROLL

inline constexpr KernelTable table = [] {
  KernelTable t = scalar::table;
  fill_lines(t);
  return t;
}();

}  // namespace detail::emulated_lines
}  // namespace NIBBLE_ABI
}  // namespace nibble

using namespace kernels_float;  // NOLINT

namespace {

TEST(EmulatedLineKernels, GroupRanges) { check_group_ranges(emulated_lines::table); }
TEST(EmulatedLineKernels, FitRanges) { check_fit_ranges(emulated_lines::table, 40); }
TEST(EmulatedLineKernels, GroupCodes) { check_group_codes(emulated_lines::table); }
TEST(EmulatedLineKernels, Lanes) { check_lanes(emulated_lines::table); }

}  // namespace
