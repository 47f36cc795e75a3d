// What kernels are given: raw pointers, strides and sizes. No Eigen, no exceptions, no allocation below this line.
#pragma once

#include <cstddef>
#include <cstdint>

#include "nibble/formats/format.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// Output channels that one panel interleaves: one zmm of int32 or fp32 lanes, two ymm.
inline constexpr std::size_t panel_width = 16;
/// K is padded to a multiple of this in most packed layouts (one unit of 4-bit codes) ...
inline constexpr std::size_t k_unit = 8;
/// ... and of this in those of 2, 3, 5 and 6 bits.
inline constexpr std::size_t bits_k_unit = 16;
/// Bytes of a unit of these: 32 a bit.
constexpr std::size_t bits_unit_bytes(Format f) noexcept { return panel_width * bits_k_unit / 8 * bits_of(f); }
constexpr std::size_t k_unit_of(Format f) noexcept { return is_bit_stream(f) ? bits_k_unit : k_unit; }
/// Longest group whose int32 sum is exact for every code, u8 x s8 included: 65,793 rounded down to a multiple of 16.
inline constexpr std::size_t max_exact_group = 65792;

/// A packed matrix of n output channels by k inputs ("panel16" layout), as kernels see it.
///
/// Output channels are cut into panels of 16 lanes; missing lanes of the last panel hold zero codes and zero
/// scales. Within a panel, k runs outermost, k_padded = round_up(k, 8), for 2, 3, 5 and 6 bits round_up(k, 16); codes
/// beyond k are 0:
///
/// | format    | order                 | element                                                           |
/// |-----------|-----------------------|-------------------------------------------------------------------|
/// | fp32      | [k][16]               | float                                                             |
/// | fp16      | [k][16]               | binary16 bits                                                     |
/// | bf16      | [k/2][16][2]          | bfloat16 bits, the even k in the low half of each 32-bit lane     |
/// | int8      | [k/4][16][4]          | uint8: code + 128                                                 |
/// | int4, nf4,| [k/8][16][4]          | uint8: low nibble k = 8u + j, high nibble k = 8u + 4 + j          |
/// | fp4       |                       |                                                                   |
/// | int2      | [k/16]{P}             | planes of 16 k, see below                                         |
/// | int3      | [k/16]{P, S}          | P has the low two bits, S the third                               |
/// | int5      | [k/16]{N, N, S}       | N have the low four bits, S the fifth                             |
/// | int6      | [k/16]{N, N, P}       | N have the low four bits, P the other two                         |
///
/// With k = 16 u + 4 m + j, j < 4, and a lane l: N are two [16][4] as int4's, of m = 0, 1 and of m = 2, 3; P is [16][4]
/// bytes, the j-th of lane l having k's bits at 2 m and 2 m + 1; S is [8][4] bytes, the j-th of l % 8 having k's bit at
/// m + 4 (l / 8). So a unit of 16 k takes 32 bytes a bit, every plane but S is loaded, shifted and masked as nibbles are,
/// and S costs a shift more for the upper lanes. A panel is filled up with zeros to a multiple of 64 bytes.
///
/// scales, and zeros where there are any, are [panel][group][16]. group_size is a multiple of 16, or k_padded where
/// there is one group; only the last group may be shorter. Scales may be negative.
struct PanelView {
  Format format = Format::fp32;
  Symmetry symmetry = Symmetry::symmetric;
  ScaleType scale_type = ScaleType::fp32;  // of scales and float offsets; packed: fp32 or fp16
  std::size_t n = 0;
  std::size_t k = 0;
  std::size_t k_padded = 0;
  std::size_t group_size = 0;
  std::size_t groups = 0;
  const std::uint8_t* codes = nullptr;
  std::size_t panel_bytes = 0;      // from one panel's codes to the next's
  const void* scales = nullptr;     // scale_type; nullptr for the float formats
  const void* zeros = nullptr;      // symmetric: nullptr; asymmetric: int8_t; float_offset: scale_type
  const float* codebook = nullptr;  // nf4, fp4: 16 levels
};

/// Groups that scales have where 2^shift of `groups` share one.
constexpr std::size_t scale_groups(std::size_t groups, unsigned shift) noexcept {
  return groups == 0 ? 0 : ((groups - 1) >> shift) + 1;
}

/// Integer product of packed integer weights with int8 activations, for panels [panel_begin, panel_end) and all of
/// `rows` tokens. For token r and channel c (lane of a panel), in this order, every step rounded once:
///
///   acc = 0
///   for g = 0 .. groups-1:                              D, S exact in int32
///     D = sum over the group of (q[c,k] - zero[c,g]) * x[r,k]     (zero: symmetric_zero_of(format) for symmetric
///                                                                  weights, 0 for float_offset)
///     x_scales == nullptr:
///       acc = fma(scale[c,g], float(D), acc)
///       float_offset, S = x_sums[r,g]:  acc = fma(offset[c,g], float(S), acc)
///     else:
///       t = scale[c,g] * float(D)
///       float_offset:  t = fma(offset[c,g], float(S), t)
///       acc = fma(x_scales[r,g], t, acc)
///
/// The groups of D are those of the scales and zeros where group_shift is 0. Where activations have finer groups of
/// their own, 2^group_shift groups of D share one of the scales', and w.group_size and w.groups are the finer ones; 63:
/// all share one. Scales and zeros are [panel][scale_groups(w.groups, group_shift)][16].
struct IntGemmArgs {
  PanelView w;
  std::size_t panel_begin = 0;
  std::size_t panel_end = 0;
  unsigned group_shift = 0;
  const std::int8_t* x = nullptr;        // [rows][x_stride], zero from k up to k_padded
  std::size_t x_stride = 0;              // bytes; at least k_padded
  const std::int32_t* x_sums = nullptr;  // [rows][sums_stride]: sum of x over each group; never nullptr
  std::size_t sums_stride = 0;
  const float* x_scales = nullptr;  // [rows][sums_stride] or nullptr
  std::size_t rows = 0;
  float* acc = nullptr;         // [rows][acc_stride]; lane j of panel p at (p - panel_begin)*16 + j
  std::size_t acc_stride = 0;   // floats; at least 16 * (panel_end - panel_begin)
  std::int32_t* raw = nullptr;  // same shape as acc: where set (groups == 1), D goes here instead
};

/// Panels [panel_begin, panel_end) of 2, 3, 5 or 6 bits in the layout of expanded_format(), with the same products: the
/// codes have expanded_bias() added, so that a symmetric zero is the wider format's. All k up to w.k_padded.
struct ExpandArgs {
  PanelView w;
  std::size_t panel_begin = 0;
  std::size_t panel_end = 0;
  std::uint8_t* out = nullptr;       // panel p at (p - panel_begin) * out_panel_stride
  std::size_t out_panel_stride = 0;  // at least 16 * k_padded * bits_of(expanded_format()) / 8
};

/// The format whose kernels multiply codes of 2, 3, 5 and 6 bits once these are expanded.
constexpr Format expanded_format(Format f) noexcept { return bits_of(f) < 4 ? Format::int4 : Format::int8; }
/// What expanding adds to a code, as a packed byte or nibble.
constexpr unsigned expanded_bias(const PanelView& w) noexcept {
  const unsigned to = expanded_format(w.format) == Format::int4 ? 8U : 128U;
  if (w.symmetry == Symmetry::symmetric) return to - static_cast<unsigned>(symmetric_zero_of(w.format));
  return to == 8U ? 0U : to;
}

/// Dequantizes k in [k_begin, k_end) of panels [panel_begin, panel_end) to fp32:
/// out[(p - panel_begin) * out_panel_stride + (k - k_begin) * 16 + lane]. k_begin is a multiple of 8.
/// The values equal dequantize's: int: scale * float(q - zero), one rounding; float_offset: fma(scale, float(q),
/// offset); nf4, fp4: scale * codebook[q]; fp16, bf16, fp32: exact.
struct UnpackArgs {
  PanelView w;
  std::size_t panel_begin = 0;
  std::size_t panel_end = 0;
  std::size_t k_begin = 0;
  std::size_t k_end = 0;
  float* out = nullptr;
  std::size_t out_panel_stride = 0;  // floats; at least 16 * (k_end - k_begin)
};

/// fp32 panels times fp32 rows: acc[r][p*16 + j] (+)= sum over k of panel[p][k][j] * x[r][k].
/// One fma a k, k ascending, from 0 (or from acc's content where `accumulate`): the same bits for every tile shape.
/// x is packed by tiles of `float_tile_rows` tokens (KernelTable): tile t holds [k][tile_rows(t)], where
/// tile_rows(t) = min(float_tile_rows, rows - t * float_tile_rows); tiles follow each other at x_tile_stride.
struct FloatGemmArgs {
  const float* panels_data = nullptr;  // [panels][panel_stride]
  std::size_t panel_stride = 0;        // floats
  std::size_t panels = 0;
  std::size_t depth = 0;  // number of k
  const float* x = nullptr;
  std::size_t x_tile_stride = 0;  // floats, from one tile's first k of this call to the next tile's
  std::size_t rows = 0;
  bool accumulate = false;
  float* acc = nullptr;  // [rows][acc_stride]
  std::size_t acc_stride = 0;
  // A hint: what the caller reads next, fetched meanwhile. fetch_bytes for every panel, fetch_stride apart; no matter
  // what lies there, or whether anything does.
  std::uintptr_t fetch = 0;
  std::size_t fetch_stride = 0;
  std::size_t fetch_bytes = 0;
};

/// Packed weights of any format times a few fp32 rows (rows <= KernelTable::gemv_max_rows), dequantized in
/// registers; the same bits as unpack followed by the float GEMM. KernelTable::gemm_direct takes the same for any number
/// of rows and fp32 or fp16 weights, codes aligned as their type; it reads nothing of k from w.k on.
struct FloatGemvArgs {
  PanelView w;
  std::size_t panel_begin = 0;
  std::size_t panel_end = 0;
  const float* x = nullptr;  // [rows][x_stride]
  std::size_t x_stride = 0;  // floats
  std::size_t rows = 0;
  float* acc = nullptr;  // [rows][acc_stride]; lane j of panel p at (p - panel_begin)*16 + j
  std::size_t acc_stride = 0;
};

/// bf16 panels times bfloat16 rows. For row r and channel c, with a = w[c], b = x[r], what AVX512-BF16's vdpbf16ps
/// computes, whatever MXCSR says:
///
///   acc = 0 (or acc's content where `accumulate`)
///   for k = k_begin, k_begin + 2 .. k_end - 2:
///     acc = flush(fma(a[k + 1], b[k + 1], acc))         the odd k first
///     acc = flush(fma(a[k], b[k], acc))
///
/// Subnormal a, b and acc count as zeros of their sign, and flush() does the same to results that are below 2^-126
/// after rounding to 24 bits. This is the order that Intel's manual gives; AMD's Zen 5 was compared with it over 20
/// million random, subnormal, cancelling and non-finite inputs, all equal, bits of NaNs included.
/// x is packed by tiles of tile_rows tokens: tile t holds [(k_end - k_begin) / 2][rows of it] pairs, the even k in the low
/// half; only the last tile may have fewer rows. x is 0 from w.k on. k_begin and k_end are multiples of 8, at most k_padded.
struct Bf16GemmArgs {
  PanelView w;
  std::size_t panel_begin = 0;
  std::size_t panel_end = 0;
  std::size_t k_begin = 0;
  std::size_t k_end = 0;
  const std::uint32_t* x = nullptr;
  std::size_t x_tile_stride = 0;  // pairs, from one tile's first of this call to the next tile's
  std::size_t tile_rows = 0;      // best 1, 2 or an even number up to KernelTable::bf16_tile_rows
  std::size_t rows = 0;
  bool accumulate = false;
  float* acc = nullptr;  // [rows][acc_stride]; lane j of panel p at (p - panel_begin)*16 + j
  std::size_t acc_stride = 0;
};

/// y[t][i] = sum over k of a[k * lda + i] * x[t][k] for i < n: a dense fp32 matrix whose n outputs are contiguous
/// (Eigen's column-major A), times a few tokens. One fma a k, k ascending, from 0.
struct DenseGemvArgs {
  const float* a = nullptr;
  std::size_t lda = 0;
  std::size_t n = 0;
  std::size_t k = 0;
  const float* x = nullptr;  // x[t][k] at t * x_token_stride + k * x_stride
  std::size_t x_stride = 1;
  float* y = nullptr;  // y[t][i] at t * y_stride + i
  std::size_t tokens = 1;
  std::size_t x_token_stride = 0;
  std::size_t y_stride = 0;
};

/// The same of a matrix whose k inputs are contiguous (row-major A): a[i * lda + k].
struct RowsGemvArgs : DenseGemvArgs {};

/// Quantizes rows of floats to int8 codes of b = `bits` bits, one scale a row. With h = 2^(b - 1), 128 for 8 bits:
/// symmetric: scale = max(absmax / (h - 1), FLT_MIN), 1 for a row of zeros; q = rne(x / scale), within +-(h - 1); zero = 0.
/// asymmetric: lo = min(0, min x), hi = max(0, max x), steps = 2h - 1, scale = max((hi - lo) / steps, FLT_MIN) with the
///   difference taken as hi / steps - lo / steps, 1 for a row of zeros; zero = clamp(rne(-h - lo / scale), -h, h - 1);
///   q = clamp(rne(x / scale) + zero, -h, h - 1), clamped in float before the conversion.
/// A row that holds NaN or Inf gets scale NaN, zero 0 and codes 0.
/// Bytes from k up to q_stride are set to 0.
struct QuantizeRowsArgs {
  const float* x = nullptr;  // [rows][x_stride]
  std::size_t x_stride = 0;  // floats
  std::size_t rows = 0;
  std::size_t k = 0;
  bool symmetric = true;
  unsigned bits = 8;              // 2 to 8: codes of fewer lie within the same bytes
  std::int8_t* q = nullptr;       // [rows][q_stride]
  std::size_t q_stride = 0;       // bytes; at least k
  float* scales = nullptr;        // [rows]
  std::int32_t* zeros = nullptr;  // [rows]; may be nullptr where symmetric
};

enum class EpilogueOpKind : std::uint8_t {
  scale,     // v * data[c]
  bias,      // v + data[c]
  add,       // v + data[r * stride + c]
  multiply,  // v * data[r * stride + c]
  relu,      // v <= 0 ? 0 : v (NaN stays)
  silu,      // v / (1 + exp(-v))
  gelu,      // v / (1 + exp(-2u)), u = sqrt(2/pi) * fma(0.044715, (v * v) * v, v): exp.hpp has the code
};

struct EpilogueOp {
  EpilogueOpKind kind = EpilogueOpKind::relu;
  const float* data = nullptr;  // channel (or row and channel) 0 of this call
  std::size_t stride = 0;       // floats from one row to the next
};

/// Turns accumulators into outputs. For row r and channel c < cols, in this order:
///   v = acc[r][c]
///   row_zeros:  v = fma(-row_zeros[r], channel_sums[c], v)       (asymmetric activations)
///   row_scales: v = v * row_scales[r]
///   then ops in order
///   out: out[r][c] = v, or out_int8[r][c] = clamp(rne(v / out_scale) + out_zero, -128, 127); NaN becomes out_zero
struct EpilogueArgs {
  const float* acc = nullptr;
  std::size_t acc_stride = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;
  const float* row_scales = nullptr;
  const float* row_zeros = nullptr;
  const float* channel_sums = nullptr;
  const EpilogueOp* ops = nullptr;
  std::size_t op_count = 0;
  float* out = nullptr;
  std::int8_t* out_int8 = nullptr;
  std::size_t out_stride = 0;  // elements
  float out_scale = 1.0F;
  std::int32_t out_zero = 0;
};

/// Range of a line of floats.
struct LineRange {
  float min = 0.0F;
  float max = 0.0F;
  bool finite = true;  // false: some element is NaN or Inf; min and max then say nothing
};

/// Codes of a line on one grid: q = clamp(rne(x / scale) + zero, qmin, qmax), sum and clamp in float.
struct QuantizeLineArgs {
  const float* x = nullptr;
  std::size_t n = 0;
  float scale = 1.0F;
  float offset = 0.0F;  // float_offset: q = clamp(rne((x - offset) / scale), qmin, qmax)
  std::int32_t zero = 0;
  std::int32_t qmin = 0;
  std::int32_t qmax = 0;
  std::int8_t* q = nullptr;  // one code a byte (uint8 where qmin >= 0: the same bits)
};

/// Values of a line of codes on one grid: scale * float(q - zero); with an offset fma(scale, float(q), offset).
struct DequantizeLineArgs {
  const std::int8_t* q = nullptr;
  std::size_t n = 0;
  float scale = 1.0F;
  bool has_offset = false;
  float offset = 0.0F;
  std::int32_t zero = 0;
  float* x = nullptr;
};

// ---- What a transformer needs beside products (nn/) ----
//
// Sums over a row run in 16 lanes: element i is added to lane i % 16, i ascending, from 0. Then lane l takes in lane l + 8,
// l + 4, l + 2 and l + 1 in turn: the bits depend on the row alone.

/// out = x / rms(x) * weight, for every row:
///   s = sum of x[i]^2 in 16 lanes, one fma each
///   f = 1 / sqrt(s / n + epsilon), every operation rounded
///   out[i] = (x[i] * f) * weight[i]
struct RmsNormArgs {
  const float* x = nullptr;  // [rows][x_stride]
  std::size_t x_stride = 0;
  const float* weight = nullptr;  // [n]
  std::size_t rows = 0;
  std::size_t n = 0;
  float epsilon = 0.0F;
  float* out = nullptr;  // [rows][out_stride]; may be x
  std::size_t out_stride = 0;
};

/// The numerators of softmax, for every row r, whose first visible(r) = first_visible + r / rows_a_step elements count:
///   m = the largest x[i]; a NaN is never larger than another
///   x[i] = exp(x[i] - m), exp as in exp.hpp
///   sums[r] = their sum in 16 lanes
///   factors: x[i] = x[i] * factors[i]
///   x[i] = 0 from visible(r) up to n
/// A NaN or +Inf makes all that counts NaN.
struct SoftmaxArgs {
  float* x = nullptr;  // [rows][x_stride]
  std::size_t x_stride = 0;
  std::size_t rows = 0;
  std::size_t n = 0;
  std::size_t first_visible = 1;  // at least 1; none is above n
  std::size_t rows_a_step = 1;
  const float* factors = nullptr;  // [n] or nullptr
  float* sums = nullptr;           // [rows]
};

/// The same as codes, for a product with INT8 values whose scales are `factors`. With e[i] the numerators and sums as
/// above (0 from visible(r) on), for every row and group of 32:
///   w[i] = e[i] * factors[i], NaN counts as 0
///   m = the largest w[i] of the group, 0 where it is below 2^-100
///   scales[r][g] = m * (1 / 127), the reciprocal rounded
///   codes[r][i] = rne(w[i] * (127 / m)); 0 where m is 0
///   code_sums[r][g] = their sum
struct SoftmaxCodesArgs {
  const float* x = nullptr;  // [rows][x_stride]; n of a row are read
  std::size_t x_stride = 0;
  std::size_t rows = 0;
  std::size_t n = 0;              // a multiple of 32
  std::size_t first_visible = 1;  // at least 1; none is above n
  std::size_t rows_a_step = 1;
  const float* factors = nullptr;     // [n]; none is negative
  float* sums = nullptr;              // [rows]
  std::int8_t* codes = nullptr;       // [rows][n]
  float* scales = nullptr;            // [rows][n / 32]
  std::int32_t* code_sums = nullptr;  // [rows][n / 32]
};

/// Rotary position embedding of `heads` heads of one token, in place. Adjacent pairs turn: for i < pairs,
///   a = x[2i], b = x[2i+1]
///   x[2i]   = fma(a, cosines[2i], b * sines[2i]) * scale
///   x[2i+1] = fma(b, cosines[2i+1], a * sines[2i+1]) * scale
/// where cosines[2i] = cosines[2i+1] = cos(t) and sines[2i+1] = -sines[2i] = sin(t); every step rounded. The rest of the
/// head is multiplied by scale.
struct RopeArgs {
  float* x = nullptr;  // [heads][head_size]
  std::size_t heads = 0;
  std::size_t head_size = 0;
  std::size_t pairs = 0;
  const float* cosines = nullptr;  // [2 * pairs]
  const float* sines = nullptr;    // [2 * pairs]
  float scale = 1.0F;
};

/// Smallest and largest value of every run of `group` elements (the last may be shorter): lows[g], highs[g]. A zero is
/// the positive one. False where x holds NaN or Inf: lows and highs then say nothing.
struct GroupRangesArgs {
  const float* x = nullptr;
  std::size_t n = 0;
  std::size_t group = 0;   // a multiple of 16
  float* lows = nullptr;   // [ceil(n / group)]
  float* highs = nullptr;  // [ceil(n / group)]
};

/// Grids for ranges, as the quantizer's GridFitter makes them. The common case alone: where irregular[g] is set, the
/// other results for g say nothing, and GridFitter has to be asked. For each g, every operation rounded to float
/// (stored(v): to scale_type and back; steps = qmax - qmin; smallest: 2^-24 for fp16, else FLT_MIN):
///
///   symmetric: s = max(-lo / (zero - qmin), hi / (qmax - zero)); nf4, fp4: max(-lo, hi)
///   asymmetric: lo = min(lo, 0), hi = max(hi, 0); s = hi / steps - lo / steps
///   float_offset: s = (hi - lo) / steps
///   scale = max(stored(s), smallest); 1 where lo = hi = 0
///   asymmetric: zero = clamp(rne(qmin - lo / scale), qmin, qmax); up to twice, where the scale is 16 bits and hi or lo
///     falls outside of the grid [(qmin - zero - 1/2) scale, (qmax - zero + 1/2) scale], with the next larger scale
///   float_offset: offset = stored(fma(-qmin, scale, lo))
///   irregular: scale beyond 2^-90..2^90, or above 65504 for fp16; |offset| > 2^90; a 16-bit scale of the symmetric kind, or any of the
///     float_offset kind, whose grid misses lo or hi by (nearly) half a step; a next scale wanted below 2^-14
struct FitRangesArgs {
  const float* lows = nullptr;  // finite, lows[g] <= highs[g]
  const float* highs = nullptr;
  std::size_t n = 0;
  Format format = Format::int8;
  Symmetry symmetry = Symmetry::symmetric;
  ScaleType scale_type = ScaleType::fp32;
  std::int32_t zero = 0;  // symmetric: symmetric_zero_of(format)
  std::int32_t qmin = 0;
  std::int32_t qmax = 0;
  float* scales = nullptr;            // values of scale_type
  float* offsets = nullptr;           // float_offset: values of scale_type
  std::int8_t* zeros = nullptr;       // asymmetric
  std::uint8_t* irregular = nullptr;  // 0 or 1
};

/// lows[i] = min(lows[i], x[i]), highs[i] = max(highs[i], x[i]); zeros as GroupRangesArgs has them. x is finite.
struct WidenRangesArgs {
  const float* x = nullptr;
  std::size_t n = 0;
  float* lows = nullptr;
  float* highs = nullptr;
};

/// Codes of a line, as a quantized tensor stores them (a byte a code, or two codes a byte, the even one in the low
/// half; a last half without a code is 0). Elements g * group .. g * group + group - 1 share parameter g:
///   int8, int4: clamp(rne((x - offsets[g]) / scales[g]) + zeros[g], qmin, qmax), each operation rounded to float
///   nf4, fp4: the level nearest to x / scales[g], the lower one of two
struct QuantizeGroupsArgs {
  Format format = Format::int8;
  const float* x = nullptr;
  std::size_t n = 0;
  std::size_t group = 0;               // a multiple of 16, or 1: a parameter an element
  const float* scales = nullptr;       // [ceil(n / group)], not 0
  const float* offsets = nullptr;      // the same; nullptr: 0
  const std::int8_t* zeros = nullptr;  // the same; nullptr: `zero`
  std::int32_t zero = 0;
  std::int32_t qmin = 0;
  std::int32_t qmax = 0;
  std::uint8_t* q = nullptr;
};

/// Values of a line of such codes: scale * float(q - zero); with offsets fma(scale, float(q), offset);
/// nf4, fp4: scale * level[q].
struct DequantizeGroupsArgs {
  Format format = Format::int8;
  const std::uint8_t* q = nullptr;
  std::size_t n = 0;
  std::size_t group = 0;               // a multiple of 16, or 1
  const float* scales = nullptr;       // [ceil(n / group)]
  const float* offsets = nullptr;      // the same, or nullptr
  const std::int8_t* zeros = nullptr;  // the same; nullptr: `zero`
  std::int32_t zero = 0;
  const float* codebook = nullptr;  // nf4, fp4: 16 levels
  float* x = nullptr;
};

/// What a row of LanesArgs consists of.
enum class LaneElement : std::uint8_t {
  bytes,       // 1 byte
  halves,      // 2 bytes
  words,       // 4 bytes
  int8_codes,  // 4 int8 codes <-> 4 uint8, 128 added
  int4_codes,  // 8 nibbles, k ascending from the low half up <-> low halves k = 0..3, high halves k = 4..7
};
constexpr std::size_t bytes_of(LaneElement e) noexcept {
  return e == LaneElement::bytes ? 1 : e == LaneElement::halves ? 2 : 4;
}

/// Rows of bytes <-> the lanes of a panel: element e of row r lies at lanes + e * step + r * bytes_of(element).
/// A last element that `bytes` cuts short counts as filled up with zeros (before conversion), and is cut short on its
/// way back to the rows. Towards the lanes, rows that do not exist (rows < 16) give zero bytes.
struct LanesArgs {
  LaneElement element = LaneElement::bytes;
  std::uint8_t* rows = nullptr;  // [row_count][row_stride]; only read on the way to the lanes
  std::size_t row_stride = 0;
  std::size_t row_count = 0;      // at most 16
  std::size_t bytes = 0;          // of a row
  std::uint8_t* lanes = nullptr;  // only read on the way to the rows
  std::size_t step = 0;           // at least 16 elements
};

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
