// The operations that the integer kernels of AArch64 are written in. Included by the ISAs' table.hpp, in their regions.

namespace int_ops {

using Int = int32x4_t;  // 4 x int32, or 16 bytes
using Float = float32x4_t;
inline constexpr std::size_t lanes = 4;

NIBBLE_ALWAYS_INLINE Int zero_int() noexcept { return vdupq_n_s32(0); }
NIBBLE_ALWAYS_INLINE Int set_int(std::int32_t v) noexcept { return vdupq_n_s32(v); }
NIBBLE_ALWAYS_INLINE Int load_int(const void* p) noexcept {
  return vreinterpretq_s32_u8(vld1q_u8(static_cast<const std::uint8_t*>(p)));
}
NIBBLE_ALWAYS_INLINE void store_int(void* p, Int v) noexcept {
  vst1q_u8(static_cast<std::uint8_t*>(p), vreinterpretq_u8_s32(v));
}
/// The low eight bytes; zeros above.
NIBBLE_ALWAYS_INLINE Int load_half_int(const void* p) noexcept {
  return vreinterpretq_s32_u8(vcombine_u8(vld1_u8(static_cast<const std::uint8_t*>(p)), vdup_n_u8(0)));
}
/// Four bytes from an address of any alignment, to every lane.
NIBBLE_ALWAYS_INLINE Int broadcast4(const void* p) noexcept {
  std::int32_t v;
  std::memcpy(&v, p, sizeof v);
  return vdupq_n_s32(v);
}
/// 4 int8 to int32 lanes.
NIBBLE_ALWAYS_INLINE Int widen_s8(const std::int8_t* p) noexcept {
  int8x8_t v = vdup_n_s8(0);
  std::memcpy(&v, p, 4);
  return vmovl_s16(vget_low_s16(vmovl_s8(v)));
}
NIBBLE_ALWAYS_INLINE Int add(Int a, Int b) noexcept { return vaddq_s32(a, b); }
NIBBLE_ALWAYS_INLINE Int sub(Int a, Int b) noexcept { return vsubq_s32(a, b); }
NIBBLE_ALWAYS_INLINE Int mul(Int a, Int b) noexcept { return vmulq_s32(a, b); }
/// a << count in every lane; 0 where the count is 32.
NIBBLE_ALWAYS_INLINE Int shift_left(Int a, Int count) noexcept { return vshlq_s32(a, count); }
NIBBLE_ALWAYS_INLINE Int low_nibbles(Int a) noexcept {
  return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(a), vdupq_n_u8(15)));
}
NIBBLE_ALWAYS_INLINE Int high_nibbles(Int a) noexcept {
  return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(a), 4));
}
/// Bytes less 128: codes as stored to codes.
NIBBLE_ALWAYS_INLINE Int flip_signs(Int a) noexcept {
  return vreinterpretq_s32_u8(veorq_u8(vreinterpretq_u8_s32(a), vdupq_n_u8(128)));
}
/// Lanes 0, 0, 1, 1 (2, 2, 3, 3).
NIBBLE_ALWAYS_INLINE Int twice_low(Int a) noexcept { return vzip1q_s32(a, a); }
NIBBLE_ALWAYS_INLINE Int twice_high(Int a) noexcept { return vzip2q_s32(a, a); }
NIBBLE_ALWAYS_INLINE Float twice_low(Float a) noexcept { return vzip1q_f32(a, a); }
NIBBLE_ALWAYS_INLINE Float twice_high(Float a) noexcept { return vzip2q_f32(a, a); }

NIBBLE_ALWAYS_INLINE Float zero_float() noexcept { return vdupq_n_f32(0.0F); }
NIBBLE_ALWAYS_INLINE Float set_float(float v) noexcept { return vdupq_n_f32(v); }
NIBBLE_ALWAYS_INLINE Float load_float(const float* p) noexcept { return vld1q_f32(p); }
NIBBLE_ALWAYS_INLINE void store_float(float* p, Float v) noexcept { vst1q_f32(p, v); }
/// 4 binary16 values.
NIBBLE_ALWAYS_INLINE Float load_half(const void* p) noexcept {
  uint16x4_t v;
  std::memcpy(&v, p, sizeof v);
  return vcvt_f32_f16(vreinterpret_f16_u16(v));
}
NIBBLE_ALWAYS_INLINE Float to_float(Int v) noexcept { return vcvtq_f32_s32(v); }
/// Rounded: the fence keeps compilers from contracting it with a later addition.
NIBBLE_ALWAYS_INLINE Float mul(Float a, Float b) noexcept {
  Float v = vmulq_f32(a, b);
  asm("" : "+w"(v));
  return v;
}
/// a * b + c, rounded once.
NIBBLE_ALWAYS_INLINE Float fma(Float a, Float b, Float c) noexcept { return vfmaq_f32(c, a, b); }
NIBBLE_ALWAYS_INLINE void prefetch(const void* p) noexcept { __builtin_prefetch(p); }

}  // namespace int_ops
