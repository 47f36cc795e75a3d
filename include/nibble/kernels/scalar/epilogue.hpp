// Epilogue, the oracle.
#pragma once

#include <cmath>

#include "nibble/core/fp_env.hpp"
#include "nibble/kernels/args.hpp"
#include "nibble/kernels/scalar/exp.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail::scalar {

inline float apply(const EpilogueOp& op, std::size_t r, std::size_t c, float v) noexcept {
  switch (op.kind) {
    case EpilogueOpKind::scale: return rounded(v * op.data[c]);
    case EpilogueOpKind::bias: return rounded(v + op.data[c]);
    case EpilogueOpKind::add: return rounded(v + op.data[r * op.stride + c]);
    case EpilogueOpKind::multiply: return rounded(v * op.data[r * op.stride + c]);
    case EpilogueOpKind::relu: return v <= 0.0F ? 0.0F : v;
    case EpilogueOpKind::silu: return rounded(silu_reference(v));
    case EpilogueOpKind::gelu: return rounded(gelu_reference(v));
  }
  return v;
}

inline void epilogue(const EpilogueArgs& a) noexcept {
  for (std::size_t r = 0; r < a.rows; ++r)
    for (std::size_t c = 0; c < a.cols; ++c) {
      float v = a.acc[r * a.acc_stride + c];
      if (a.row_zeros != nullptr) v = std::fma(-a.row_zeros[r], a.channel_sums[c], v);
      if (a.row_scales != nullptr) v = rounded(v * a.row_scales[r]);
      for (std::size_t i = 0; i < a.op_count; ++i) v = apply(a.ops[i], r, c, v);
      if (a.out_int8 != nullptr) {
        float q = rounded(std::nearbyint(rounded(v / a.out_scale)) + static_cast<float>(a.out_zero));
        if (!(q == q)) q = static_cast<float>(a.out_zero);
        q = q < -128.0F ? -128.0F : q > 127.0F ? 127.0F : q;
        a.out_int8[r * a.out_stride + c] = static_cast<std::int8_t>(q);
      } else {
        a.out[r * a.out_stride + c] = v;
      }
    }
}

}  // namespace detail::scalar
}  // namespace NIBBLE_ABI
}  // namespace nibble
