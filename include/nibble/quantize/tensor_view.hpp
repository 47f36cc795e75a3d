// The typed front for matrices: any Eigen expression becomes an erased view.
#pragma once

#include <type_traits>
#include <utility>

#include <Eigen/Core>

#include "nibble/core/error.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/quantize/strided.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

template <class Scalar>
constexpr ScalarType scalar_type() noexcept {
  constexpr bool known = std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double> ||
                         std::is_same_v<Scalar, Eigen::half> || std::is_same_v<Scalar, Eigen::bfloat16>;
  static_assert(known, "Nibble quantizes float, double, Eigen::half and Eigen::bfloat16");
  if (std::is_same_v<Scalar, double>) return ScalarType::fp64;
  if (std::is_same_v<Scalar, Eigen::half>) return ScalarType::fp16;
  if (std::is_same_v<Scalar, Eigen::bfloat16>) return ScalarType::bf16;
  return ScalarType::fp32;
}

template <class D>
StridedLayout matrix_layout(const Eigen::DenseBase<D>& x) {
  StridedLayout layout;
  layout.add(static_cast<std::size_t>(x.rows()), static_cast<std::ptrdiff_t>(x.derived().rowStride()));
  layout.add(static_cast<std::size_t>(x.cols()), static_cast<std::ptrdiff_t>(x.derived().colStride()));
  return layout;
}

/// Keeps an argument's numbers alive while its view is in use. An expression without memory of its own is evaluated,
/// once, in Nibble's floating-point environment.
template <class D, bool direct = (Eigen::internal::traits<D>::Flags & Eigen::DirectAccessBit) != 0>
class MatrixInput {
 public:
  MatrixInput(const MatrixInput&) = delete;
  explicit MatrixInput(const D& x) : view_{x.data(), scalar_type<typename D::Scalar>(), matrix_layout(x)} {}
  const InputView& view() const noexcept { return view_; }

 private:
  InputView view_;
};

template <class D>
class MatrixInput<D, false> {
 public:
  MatrixInput(const MatrixInput&) = delete;
  // The environment lives until the evaluation is done.
  explicit MatrixInput(const D& x)
      : values_((FpEnvironment(), x)),
        view_{values_.data(), scalar_type<typename D::Scalar>(), matrix_layout(values_)} {}
  const InputView& view() const noexcept { return view_; }

 private:
  typename D::PlainObject values_;
  InputView view_;
};

/// What kind of object a quantized tensor came from, and so what dequantize gives back.
struct MatrixKind {
  using Result = Eigen::MatrixXf;

  static Result make(const Shape& shape) {
    require(shape.size() == 2, "tensor has shape ", shape_text(shape), ", a matrix has two dimensions");
    return Result(static_cast<Eigen::Index>(shape[0]), static_cast<Eigen::Index>(shape[1]));
  }

  template <class D>
  static OutputView output(Eigen::DenseBase<D>& out) {
    static_assert(std::is_same_v<typename D::Scalar, float>, "Nibble writes floats");
    static_assert((Eigen::internal::traits<D>::Flags & Eigen::DirectAccessBit) != 0 &&
                      (Eigen::internal::traits<D>::Flags & Eigen::LvalueBit) != 0,
                  "Nibble writes to a Matrix, Map, Ref or Block");
    return {out.derived().data(), matrix_layout(out)};
  }
};

/// Selects the front by the base class of the argument: overloads found through this tag, so that tensor.hpp adds
/// Eigen's tensors from outside, and classes derived from Eigen's work as well.
struct Front {};

template <class D>
MatrixKind kind_of(Front, const Eigen::DenseBase<D>&);
template <class D>
MatrixInput<D> make_input(Front, const Eigen::DenseBase<D>& x) {
  return MatrixInput<D>(x.derived());
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
