// Quantizing and dequantizing in one step: what training and error studies need.
#pragma once

#include "nibble/quantize/quantizer.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// dequantize(quantize<Q>(x)), bit for bit, without the codes in between. Gives the kind of x, in float.
template <class Q, class X>
auto fake_quantize(const X& x, const QuantizeOptions& options = {}) {
  return Q{}.fake_quantize(x, options);
}

/// The same into `out`, floats of x's shape; out may be x itself. Other overlaps are not allowed.
template <class Q, class X, class Out>
void fake_quantize_into(const X& x, Out&& out, const Ranges& ranges = {}, const QuantizeOptions& options = {}) {
  const auto input = make_input(detail::Front{}, x);
  detail::fake_quantize_view(input.view(), Q::scheme(), ranges,
                             decltype(kind_of(detail::Front{}, out))::output(out), options.pool);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
