// The typed front for Eigen::Tensor: any rank, either storage order, expressions too.
#pragma once

#include <cstddef>
#include <type_traits>

#include <unsupported/Eigen/CXX11/Tensor>

#include "nibble/quantize/quantizer.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

template <class Dimensions>
StridedLayout tensor_layout(const Dimensions& lengths, std::size_t rank, bool row_major) {
  StridedLayout layout;
  std::ptrdiff_t strides[max_rank] = {};
  std::ptrdiff_t stride = 1;
  for (std::size_t i = 0; i < rank; ++i) {
    const std::size_t d = row_major ? rank - 1 - i : i;
    strides[d] = stride;
    stride *= static_cast<std::ptrdiff_t>(lengths[d]);
  }
  for (std::size_t d = 0; d < rank; ++d) layout.add(static_cast<std::size_t>(lengths[d]), strides[d]);
  return layout;
}

/// A tensor of rank Rank and storage order Order (Eigen::ColMajor or RowMajor).
template <int Rank, int Order>
struct TensorKind {
  static_assert(Rank <= static_cast<int>(max_rank), "tensors of more than 8 dimensions are not supported");
  using Result = Eigen::Tensor<float, Rank, Order>;

  static Result make(const Shape& shape) {
    require(shape.size() == static_cast<std::size_t>(Rank), "tensor has shape ", shape_text(shape), ", expected ",
            Rank, " dimensions");
    typename Result::Dimensions lengths;
    for (std::size_t d = 0; d < shape.size(); ++d) lengths[d] = static_cast<Eigen::Index>(shape[d]);
    return Result(lengths);
  }

  template <class D>
  static OutputView output(Eigen::TensorBase<D>& base) {
    D& out = static_cast<D&>(base);
    static_assert(std::is_same_v<typename D::Scalar, float>, "Nibble writes floats");
    return {out.data(), tensor_layout(out.dimensions(), static_cast<std::size_t>(Rank), Order == Eigen::RowMajor)};
  }
};

template <class D>
using TensorKindOf = TensorKind<Eigen::internal::traits<D>::NumDimensions, Eigen::internal::traits<D>::Layout>;

template <class D>
struct is_stored_tensor : std::false_type {};
template <class T, int R, int O, class I>
struct is_stored_tensor<Eigen::Tensor<T, R, O, I>> : std::true_type {};
template <class T, class Sizes, int O, class I>
struct is_stored_tensor<Eigen::TensorFixedSize<T, Sizes, O, I>> : std::true_type {};
template <class T, int O, template <class> class Pointer>
struct is_stored_tensor<Eigen::TensorMap<T, O, Pointer>> : std::true_type {};

/// As MatrixInput.
template <class D, bool stored = is_stored_tensor<D>::value>
class TensorInput {
 public:
  TensorInput(const TensorInput&) = delete;
  explicit TensorInput(const D& x)
      : view_{x.data(), scalar_type<std::remove_const_t<typename D::Scalar>>(),
              tensor_layout(x.dimensions(), rank, Eigen::internal::traits<D>::Layout == Eigen::RowMajor)} {}
  const InputView& view() const noexcept { return view_; }

 private:
  static constexpr std::size_t rank = static_cast<std::size_t>(Eigen::internal::traits<D>::NumDimensions);
  InputView view_;
};

template <class D>
class TensorInput<D, false> {
  using Values = Eigen::Tensor<std::remove_const_t<typename Eigen::internal::traits<D>::Scalar>,
                               Eigen::internal::traits<D>::NumDimensions, Eigen::internal::traits<D>::Layout>;

 public:
  TensorInput(const TensorInput&) = delete;
  explicit TensorInput(const D& x) : values_((FpEnvironment(), x)), stored_(values_) {}
  const InputView& view() const noexcept { return stored_.view(); }

 private:
  Values values_;
  TensorInput<Values> stored_;
};

template <class D>
TensorKindOf<D> kind_of(Front, const Eigen::TensorBase<D, Eigen::ReadOnlyAccessors>&);
template <class D>
TensorInput<D> make_input(Front, const Eigen::TensorBase<D, Eigen::ReadOnlyAccessors>& x) {
  return TensorInput<D>(static_cast<const D&>(x));
}

}  // namespace detail

/// The values of an erased tensor as an Eigen::Tensor. Throws InvalidArgument where its rank is not Rank.
template <int Rank, int Order = Eigen::ColMajor>
Eigen::Tensor<float, Rank, Order> dequantize_tensor(const QuantizedTensor& q) {
  using Kind = detail::TensorKind<Rank, Order>;
  auto out = Kind::make(q.shape());
  q.dequantize(Kind::output(out));
  return out;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
