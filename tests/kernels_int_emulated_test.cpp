// Integer kernels over operations in plain C++ (emulation/*_int_ops.inl): what is above the operations is tested on every machine, whatever its CPU has.
#include "nibble/core/abi.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
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
#include "nibble/kernels/vector/bit_codes.inl"
#include "nibble/kernels/avx512vnni/wba8.inl"
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

namespace detail::emulated_amx {

namespace below = emulated512;
namespace int_ops = emulated512::int_ops;
namespace int_params = emulated512::int_params;

// clang-format off
#include "emulation/amx_tile_ops.inl"
#include "nibble/kernels/amx/int_tiles.inl"
#include "nibble/kernels/amx/w4a8.inl"
#include "nibble/kernels/amx/w8a8.inl"
// clang-format on

}  // namespace detail::emulated_amx
}  // namespace NIBBLE_ABI
}  // namespace nibble

namespace {

using nibble::Format;
using nibble_test::Problem;
using nibble_test::Shape;

using Kernel = void (*)(const nibble::detail::IntGemmArgs&) noexcept;

void expect_scalar_over_shapes(Kernel w8a8, Kernel w4a8, Kernel bits = nullptr) {
  std::size_t checked = 0;
  nibble_test::for_each_shape([&](const Shape& shape) {
    if (testing::Test::HasFailure()) return;
    const Problem problem(shape, static_cast<std::uint32_t>(checked));
    nibble::detail::KernelTable table = nibble::detail::scalar::table;
    table.gemm_w8a8 = w8a8;
    table.gemm_w4a8 = w4a8;
    table.gemm_bits = bits;
    table.gemm_bits_rows = bits == nullptr ? 0 : 1;
    ASSERT_TRUE(problem.run(table) == problem.run(nibble::detail::scalar::table)) << shape.name();
    ++checked;
  });
  EXPECT_GT(checked, 1000U);
}

TEST(KernelsIntEmulated, Avx512EqualsScalarOverShapes) {
  expect_scalar_over_shapes(&nibble::detail::emulated512::gemm_w8a8, &nibble::detail::emulated512::gemm_w4a8,
                            &nibble::detail::emulated512::gemm_bits);
}
TEST(KernelsIntEmulated, AvxVnniEqualsScalarOverShapes) {
  expect_scalar_over_shapes(&nibble::detail::emulated_avxvnni::gemm_w8a8,
                            &nibble::detail::emulated_avxvnni::gemm_w4a8);
}

TEST(KernelsIntEmulated, AmxEqualsScalarOverShapes) {
  expect_scalar_over_shapes(&nibble::detail::emulated_amx::gemm_w8a8, &nibble::detail::emulated_amx::gemm_w4a8);
}

// Shapes that go through tiles: whole and half ones, tails of k, all numbers of rows, groups longer than a block.
TEST(KernelsIntEmulated, AmxTilesEqualScalar) {
  using nibble::detail::emulated_amx::tile_ops::Tiles;
  std::size_t turn = 0;
  const auto check = [&](Shape shape) {
    if (testing::Test::HasFailure()) return;
    const Problem problem(shape, static_cast<std::uint32_t>(++turn));
    nibble::detail::KernelTable table = nibble::detail::scalar::table;
    table.gemm_w8a8 = &nibble::detail::emulated_amx::gemm_w8a8;
    table.gemm_w4a8 = &nibble::detail::emulated_amx::gemm_w4a8;
    table.gemm_bits_rows = 0;
    const std::size_t dots = Tiles::dots;
    ASSERT_TRUE(problem.run(table) == problem.run(nibble::detail::scalar::table)) << shape.name();
    ASSERT_GT(Tiles::dots, dots) << shape.name();
  };
  nibble_test::for_each_variant(Shape{}, [&](Shape s) {
    for (std::size_t group : {0U, 32U, 64U, 96U, 128U, 1088U, 2048U})
      for (std::size_t rows : {8U, 16U, 19U, 32U, 33U, 64U, 75U}) {
        s.rows = rows;
        s.panels = 1 + turn % 3;
        s.k = group > 128 ? 2191 + turn % 50 : 257 + turn % 66;
        s.group_size = group;
        s.x_pad = turn % 3;
        s.acc_pad = turn % 5;
        s.gap = turn % 2;
        if (group <= 128 || rows < 20) check(s);
      }
  });
  for (Format format : {Format::int8, Format::int4})
    for (nibble::Symmetry symmetry : {nibble::Symmetry::symmetric, nibble::Symmetry::asymmetric})
      for (std::size_t rows : {8U, 40U})
        for (std::size_t k : {5U, 64U, 1500U}) {
          Shape s;
          s.format = format;
          s.symmetry = symmetry;
          s.rows = rows;
          s.panels = 3;
          s.k = k;
          s.raw = true;
          check(s);
        }
  EXPECT_GT(turn, 500U);
}

}  // namespace
