// Eigen in, pointers out.
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "nibble/core/error.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// A column-major float matrix or a block of one, to be written: n x m, any outer stride.
using MatrixRef = Eigen::Ref<Eigen::MatrixXf, 0, Eigen::OuterStride<>>;
/// The same, to be read. Anything else than column-major float memory is copied first.
using ConstMatrixRef = Eigen::Ref<const Eigen::MatrixXf, 0, Eigen::OuterStride<>>;

/// Weights with the inputs of an output side by side, N x K.
using RowMajorMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// Such a matrix or a block of one, to be written.
using RowMajorRef = Eigen::Ref<RowMajorMatrix, 0, Eigen::OuterStride<>>;
/// The same, to be read; anything else (a MatrixXf, an expression) is copied first.
using ConstWeightsRef = Eigen::Ref<const RowMajorMatrix, 0, Eigen::OuterStride<>>;

/// A column-major matrix of int8 codes or int32 accumulators.
using Int8Matrix = Eigen::Matrix<std::int8_t, Eigen::Dynamic, Eigen::Dynamic>;
using Int32Matrix = Eigen::Matrix<std::int32_t, Eigen::Dynamic, Eigen::Dynamic>;
using Int8MatrixRef = Eigen::Ref<Int8Matrix, 0, Eigen::OuterStride<>>;
using ConstInt8MatrixRef = Eigen::Ref<const Int8Matrix, 0, Eigen::OuterStride<>>;
using Int32MatrixRef = Eigen::Ref<Int32Matrix, 0, Eigen::OuterStride<>>;

namespace detail {

/// Floats anywhere: element (row, col) is data[row * row_stride + col * col_stride].
struct FloatView {
  const float* data = nullptr;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::size_t row_stride = 1;
  std::size_t col_stride = 0;
};

/// A view of an expression that lives in memory; others must be evaluated before.
template <class D>
FloatView float_view(const Eigen::MatrixBase<D>& m) {
  static_assert(std::is_same_v<typename D::Scalar, float>, "a float matrix is expected");
  const D& d = m.derived();
  const auto inner = static_cast<std::size_t>(d.innerStride());
  const auto outer = static_cast<std::size_t>(d.outerStride());
  FloatView view;
  view.data = d.data();
  view.rows = static_cast<std::size_t>(d.rows());
  view.cols = static_cast<std::size_t>(d.cols());
  view.row_stride = D::IsRowMajor ? outer : inner;
  view.col_stride = D::IsRowMajor ? inner : outer;
  return view;
}

template <class D>
inline constexpr bool is_float_memory_v = std::is_same_v<typename D::Scalar, float> &&
                                          (static_cast<int>(D::Flags) & Eigen::DirectAccessBit) != 0;

/// Throws where the memory of `a` (read) and `b` (written) overlaps: a product would read what it has written.
template <class A, class B>
void require_apart(const A& a, const B& b, std::string_view name_a, std::string_view name_b) {
  if (a.size() == 0 || b.size() == 0) return;
  const auto begin = [](const auto& m) { return reinterpret_cast<std::uintptr_t>(m.data()); };
  const auto end = [](const auto& m) {
    return reinterpret_cast<std::uintptr_t>(m.data() + (m.outerSize() - 1) * m.outerStride() +
                                            (m.innerSize() - 1) * m.innerStride() + 1);
  };
  require(end(a) <= begin(b) || end(b) <= begin(a), name_a, " and ", name_b, " overlap in memory");
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
