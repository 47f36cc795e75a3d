// Integer kernels over operations in plain C++ (emulation/*_int_ops.inl): what is above the operations is tested on every machine, whatever its CPU has.
#include "nibble/core/abi.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels_int_problem.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/scalar/table.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::emulated512 {

// clang-format off
#include "emulation/avx512_int_ops.inl"
#include "nibble/kernels/vector/int_params.inl"
#include "nibble/kernels/avx512vnni/int_tiles.inl"
#include "nibble/kernels/avx512vnni/w4a8.inl"
#include "nibble/kernels/avx512vnni/w8a8.inl"
// clang-format on

}  // namespace detail::emulated512

namespace detail::emulated_avxvnni {

// clang-format off
#include "emulation/avxvnni_int_ops.inl"
#include "nibble/kernels/vector/int_params.inl"
#include "nibble/kernels/avxvnni/int_tiles.inl"
#include "nibble/kernels/avxvnni/w4a8.inl"
#include "nibble/kernels/avxvnni/w8a8.inl"
// clang-format on

}  // namespace detail::emulated_avxvnni
}  // namespace NIBBLE_ABI
}  // namespace nibble

namespace {

using nibble::Format;
using nibble_test::Problem;
using nibble_test::Shape;

using Kernel = void (*)(const nibble::detail::IntGemmArgs&) noexcept;

void expect_scalar_over_shapes(Kernel w8a8, Kernel w4a8) {
  std::size_t checked = 0;
  nibble_test::for_each_shape([&](const Shape& shape) {
    if (testing::Test::HasFailure()) return;
    const Problem problem(shape, static_cast<std::uint32_t>(checked));
    const bool eight = shape.format == Format::int8;
    const Kernel kernel = eight ? w8a8 : w4a8;
    const auto oracle = eight ? nibble::detail::scalar::table.gemm_w8a8 : nibble::detail::scalar::table.gemm_w4a8;
    ASSERT_TRUE(problem.run(kernel) == problem.run(oracle)) << shape.name();
    ++checked;
  });
  EXPECT_GT(checked, 1000U);
}

TEST(KernelsIntEmulated, Avx512EqualsScalarOverShapes) {
  expect_scalar_over_shapes(&nibble::detail::emulated512::gemm_w8a8, &nibble::detail::emulated512::gemm_w4a8);
}
TEST(KernelsIntEmulated, AvxVnniEqualsScalarOverShapes) {
  expect_scalar_over_shapes(&nibble::detail::emulated_avxvnni::gemm_w8a8,
                            &nibble::detail::emulated_avxvnni::gemm_w4a8);
}

}  // namespace
