// Quantizers: the templated type that states everything, and its run-time twin.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include <Eigen/Core>

#include "nibble/formats/bf16.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/formats/codebook.hpp"
#include "nibble/formats/int2.hpp"
#include "nibble/formats/int3.hpp"
#include "nibble/formats/int4.hpp"
#include "nibble/formats/int5.hpp"
#include "nibble/formats/int6.hpp"
#include "nibble/formats/int8.hpp"
#include "nibble/quantize/quantize_view.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/quantize/range.hpp"
#include "nibble/quantize/scheme.hpp"
#include "nibble/quantize/tensor_view.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Zero is code 0 (fewer than 8 bits: half of the number of codes). Int8 -127..127, scale = absmax / 127; Int4 -7..7,
/// scale = absmax / 7; Int2 -1, 0, 1, scale = absmax.
struct Symmetric {
  static constexpr Symmetry symmetry = Symmetry::symmetric;
  static constexpr bool full_range = false;
};
/// As Symmetric, with the lowest code in use: Int8 -128..127, scale = max(-min / 128, max / 127); Int4 -8..7,
/// scale = max(-min / 8, max / 7).
struct SymmetricFull {
  static constexpr Symmetry symmetry = Symmetry::symmetric;
  static constexpr bool full_range = true;
};
/// Integer zero point; the range always holds 0. Int8 -128..127, Int4 0..15; scale = (max - min) / 255 or / 15, b bits
/// / (2^b - 1).
struct Asymmetric {
  static constexpr Symmetry symmetry = Symmetry::asymmetric;
  static constexpr bool full_range = false;
};
/// Float offset, stored as the scale is; the range need not hold 0. Codes and scale as Asymmetric.
struct FloatOffset {
  static constexpr Symmetry symmetry = Symmetry::float_offset;
  static constexpr bool full_range = false;
};

/// One scale for all elements.
struct PerTensor {
  static constexpr Granularity granularity = Granularity::per_tensor();
};
/// One scale for each index along Axis; a negative axis counts from the end. For weights (out x in) the default gives
/// one scale an output channel.
template <int Axis = 0>
struct PerChannel {
  static constexpr Granularity granularity = Granularity::per_channel(Axis);
};
/// One scale for each Size elements along Axis; the last group may be shorter.
template <std::size_t Size, int Axis = -1>
struct PerGroup {
  static_assert(Size != 0 && Size % 16 == 0, "the group size must be a multiple of 16");
  static constexpr Granularity granularity = Granularity::per_group(Size, Axis);
};

/// How to work, not what comes out: that is the same for every number of threads.
struct QuantizeOptions {
  /// Threads to work with; nullptr: the calling one.
  ThreadPool* pool = nullptr;
};

namespace detail {
template <class Scale>
constexpr ScaleType scale_type_of() noexcept {
  constexpr ScalarType type = scalar_type<Scale>();
  static_assert(type != ScalarType::fp64, "scales are stored as float, Eigen::half or Eigen::bfloat16");
  return type == ScalarType::fp16 ? ScaleType::fp16 : type == ScalarType::bf16 ? ScaleType::bf16 : ScaleType::fp32;
}
}  // namespace detail

/// A QuantizedTensor whose scheme is known at compile time, and whose kind (matrix, or tensor of a rank) is that of
/// the object it came from. Converts to the erased tensor, which all of Nibble takes.
template <class Q, class Kind = detail::MatrixKind>
class Quantized {
 public:
  using Quantizer = Q;

  /// Takes an erased tensor, e.g. out of a file. Throws InvalidArgument where its scheme is not Q's.
  explicit Quantized(QuantizedTensor tensor) : tensor_(std::move(tensor)) {
    detail::require(tensor_.scheme() == detail::resolve(Q::scheme(), tensor_.shape()),
                    "quantized tensor has another scheme than the type it is to be held in");
  }

  const QuantizedTensor& erased() const& noexcept { return tensor_; }
  QuantizedTensor erased() && noexcept { return std::move(tensor_); }
  operator const QuantizedTensor&() const& noexcept { return tensor_; }

  const Shape& shape() const noexcept { return tensor_.shape(); }
  std::size_t byte_size() const noexcept { return tensor_.byte_size(); }

 private:
  QuantizedTensor tensor_;
};

/// Quantizes under a scheme that is a run-time value; Quantizer is the same with a static one.
///
/// x is any Eigen matrix expression of float, double, half or bfloat16 (rank 2: a column vector is n x 1), or any
/// Eigen tensor where <nibble/quantize/tensor.hpp> is included. Codes of the formats with scales are computed in float, to which
/// doubles are rounded first (nearest even); Fp16 and Bf16 round doubles once. Codes do not depend on x's storage
/// order, on the CPU, or on the caller's MXCSR.
///
/// Throws InvalidArgument, naming index or parameter: a NaN, Inf, or value beyond float's (Fp16, Bf16: the format's)
/// range; an axis that x does not have; a scale that does not fit the scale type.
class DynamicQuantizer {
 public:
  /// ranges: empty, to fit each parameter's smallest and largest value; else the ranges to cover, one for all
  /// parameters or one a parameter. Values outside are clamped.
  explicit DynamicQuantizer(const Scheme& scheme, Ranges ranges = {})
      : scheme_(scheme), ranges_(std::move(ranges)) {}

  const Scheme& scheme() const noexcept { return scheme_; }
  const Ranges& ranges() const noexcept { return ranges_; }

  template <class X>
  QuantizedTensor quantize(const X& x, const QuantizeOptions& options = {}) const {
    const auto input = make_input(detail::Front{}, x);
    return detail::quantize_view(input.view(), scheme_, ranges_, options.pool);
  }

  /// dequantize(quantize(x)), bit for bit, without the codes in between. Gives the kind of x.
  template <class X>
  auto fake_quantize(const X& x, const QuantizeOptions& options = {}) const {
    using Kind = decltype(kind_of(detail::Front{}, x));
    const auto input = make_input(detail::Front{}, x);
    auto out = Kind::make(input.view().layout.shape());
    detail::fake_quantize_view(input.view(), scheme_, ranges_, Kind::output(out), options.pool);
    return out;
  }

  /// Shows x to `observer`, which may have seen other data before, and gives its ranges.
  template <class X>
  Ranges observe(const X& x, RangeObserver& observer) const {
    const auto input = make_input(detail::Front{}, x);
    return detail::observe_view(input.view(), scheme_, observer);
  }

 private:
  Scheme scheme_;
  Ranges ranges_;
};

/// Quantizes to format F (Fp16, Bf16, Int8, Int6, Int5, Int4, Int3, Int2, Nf4, Fp4). S: Symmetric, SymmetricFull, Asymmetric, FloatOffset; G:
/// PerTensor, PerChannel<axis>, PerGroup<size, axis>; Scale: float, Eigen::half, Eigen::bfloat16. Fp16 and Bf16 have
/// no scales and ignore what follows F. Input, results and errors are DynamicQuantizer's.
///
///     using Weights = nibble::Quantizer<nibble::Int4, nibble::Symmetric, nibble::PerGroup<64>, Eigen::half>;
///     auto q = nibble::quantize<Weights>(w);
///     Eigen::MatrixXf back = nibble::dequantize(q);
template <class F, class S = Symmetric, class G = PerTensor, class Scale = float>
class Quantizer {
 public:
  static_assert(S::symmetry == Symmetry::symmetric || !has_scales(F::format) || is_integer(F::format),
                "NF4 and FP4 are symmetric only");

  static constexpr Scheme scheme() noexcept {
    return {F::format, S::symmetry, G::granularity, detail::scale_type_of<Scale>(), S::full_range};
  }

  /// As DynamicQuantizer's.
  explicit Quantizer(Ranges ranges = {}) : dynamic_(scheme(), std::move(ranges)) {}

  const Ranges& ranges() const noexcept { return dynamic_.ranges(); }

  template <class X>
  auto quantize(const X& x, const QuantizeOptions& options = {}) const {
    return Quantized<Quantizer, decltype(kind_of(detail::Front{}, x))>(dynamic_.quantize(x, options));
  }
  template <class X>
  auto fake_quantize(const X& x, const QuantizeOptions& options = {}) const {
    return dynamic_.fake_quantize(x, options);
  }
  template <class X>
  Ranges observe(const X& x, RangeObserver& observer) const {
    return dynamic_.observe(x, observer);
  }

 private:
  DynamicQuantizer dynamic_;
};

/// Quantizer Q, its ranges fitted to x.
template <class Q, class X>
auto quantize(const X& x, const QuantizeOptions& options = {}) {
  return Q{}.quantize(x, options);
}

/// The values, in the kind that was quantized: a column-major MatrixXf, or a tensor of the rank and order it had.
template <class Q, class Kind>
typename Kind::Result dequantize(const Quantized<Q, Kind>& q, const QuantizeOptions& options = {}) {
  auto out = Kind::make(q.shape());
  q.erased().dequantize(Kind::output(out), options.pool);
  return out;
}

/// The values of a tensor of rank 2. Throws InvalidArgument for other ranks.
inline Eigen::MatrixXf dequantize(const QuantizedTensor& q, const QuantizeOptions& options = {}) {
  auto out = detail::MatrixKind::make(q.shape());
  q.dequantize(detail::MatrixKind::output(out), options.pool);
  return out;
}

/// Writes the values into `out`, floats of q's shape: a Matrix, Map, Ref or Block in any storage order and with any
/// strides, or a Tensor or TensorMap. Throws InvalidArgument where the shapes differ.
template <class Out>
void dequantize_into(const QuantizedTensor& q, Out&& out, const QuantizeOptions& options = {}) {
  q.dequantize(decltype(kind_of(detail::Front{}, out))::output(out), options.pool);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
