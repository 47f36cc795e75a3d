// exp_reference (scalar/exp.hpp), lane by lane.

NIBBLE_ALWAYS_INLINE Vf exp(Vf x) noexcept {
  using C = ExpConstants;
  // The operand that a NaN comes out of is the second.
  x = max(set1(C::lowest), x);
  x = min(set1(C::highest), x);
  const Vf shifted = fma(x, set1(C::log2_e), set1(C::magic));
  const Vf n = sub(shifted, set1(C::magic));
  Vf r = fma(n, set1(C::minus_ln2_hi), x);
  r = fma(n, set1(C::minus_ln2_lo), r);
  Vf p = fma(set1(C::c6), r, set1(C::c5));
  p = fma(p, r, set1(C::c4));
  p = fma(p, r, set1(C::c3));
  p = fma(p, r, set1(C::c2));
  p = fma(p, r, set1(1.0F));
  p = fma(p, r, set1(1.0F));
  if constexpr (has_scalef) return scalef(p, n);
  const Vi exponent = sub_int(bits(shifted), set1_int(C::magic_bits));
  const Vi half = shift_right_signed<1>(exponent);
  const Vi rest = sub_int(exponent, half);
  const Vi bias = set1_int(127);
  return mul(mul(p, from_bits(shift_left<23>(add_int(half, bias)))),
             from_bits(shift_left<23>(add_int(rest, bias))));
}
