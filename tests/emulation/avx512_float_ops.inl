// nibble/kernels/avx512vnni/float_ops.inl in plain C++: the same names and tiles, vectors as arrays of 16. The
// AVX-512 float kernels compiled over this run on any machine.

// Out of line: inlined into the unrolled kernels, these loops would take minutes to compile.
#define NIBBLE_EMULATED inline __attribute__((noinline))

struct Vf {
  float v[16];
};
struct Vi {
  std::int32_t v[16];
};

constexpr int lanes = 16;
constexpr int halves = 1;
constexpr int gemm_rows = avx512vnni::floats::gemm_rows;
constexpr int gemm_panels = avx512vnni::floats::gemm_panels;
constexpr int gemm_panels_4 = avx512vnni::floats::gemm_panels_4;
constexpr int gemm_panels_2 = avx512vnni::floats::gemm_panels_2;
constexpr int gemm_panels_1 = avx512vnni::floats::gemm_panels_1;
constexpr int gemv_panels_1 = avx512vnni::floats::gemv_panels_1;
constexpr int gemv_panels_2 = avx512vnni::floats::gemv_panels_2;
constexpr int gemv_panels_4 = avx512vnni::floats::gemv_panels_4;
constexpr int exp_vectors = avx512vnni::floats::exp_vectors;
constexpr int rows_tall = avx512vnni::floats::rows_tall;
constexpr int rows_panels = avx512vnni::floats::rows_panels;
constexpr std::size_t rows_prefetch = avx512vnni::floats::rows_prefetch;
constexpr std::size_t gemv_prefetch = avx512vnni::floats::gemv_prefetch;
constexpr int bf16_tile_rows = avx512vnni::floats::bf16_tile_rows;
constexpr int bf16_panels_4 = avx512vnni::floats::bf16_panels_4;
constexpr int bf16_panels_2 = avx512vnni::floats::bf16_panels_2;
constexpr int bf16_panels_1 = avx512vnni::floats::bf16_panels_1;
constexpr std::size_t bf16_prefetch = avx512vnni::floats::bf16_prefetch;
constexpr std::size_t bf16_long_panel = avx512vnni::floats::bf16_long_panel;
constexpr bool cheap_lookup = avx512vnni::floats::cheap_lookup;

template <class F>
inline Vf each(const F& f) noexcept {
  Vf out;
  for (int i = 0; i < 16; ++i) out.v[i] = f(i);
  return out;
}
template <class F>
inline Vi each_int(const F& f) noexcept {
  Vi out;
  for (int i = 0; i < 16; ++i) out.v[i] = static_cast<std::int32_t>(f(i));
  return out;
}
inline std::uint32_t unsigned_of(std::int32_t v) noexcept { return static_cast<std::uint32_t>(v); }
template <class T>
inline T element(const void* p, int i) noexcept {
  T value;
  std::memcpy(&value, static_cast<const unsigned char*>(p) + static_cast<std::size_t>(i) * sizeof(T), sizeof(T));
  return value;
}
template <class T>
inline void put(T* p, int i, T value) noexcept {
  std::memcpy(reinterpret_cast<unsigned char*>(p) + static_cast<std::size_t>(i) * sizeof(T), &value, sizeof(T));
}
inline int count_of(std::size_t n) noexcept { return static_cast<int>(n); }

NIBBLE_EMULATED Vf set1(float v) noexcept {
  return each([&](int) { return v; });
}
NIBBLE_EMULATED Vf zero() noexcept { return set1(0.0F); }
NIBBLE_EMULATED Vi set1_int(std::int32_t v) noexcept {
  return each_int([&](int) { return v; });
}

NIBBLE_EMULATED Vf load_n(const float* p, std::size_t n) noexcept {
  return each([&](int i) { return i < count_of(n) ? element<float>(p, i) : 0.0F; });
}
NIBBLE_EMULATED Vf load_n_or(const float* p, std::size_t n, Vf rest) noexcept {
  return each([&](int i) { return i < count_of(n) ? element<float>(p, i) : rest.v[i]; });
}
NIBBLE_EMULATED Vf load(const float* p) noexcept { return load_n(p, 16); }
NIBBLE_EMULATED void store_n(float* p, Vf v, std::size_t n) noexcept {
  for (int i = 0; i < count_of(n); ++i) put(p, i, v.v[i]);
}
NIBBLE_EMULATED void store(float* p, Vf v) noexcept { store_n(p, v, 16); }
NIBBLE_EMULATED Vi load_int(const void* p) noexcept {
  return each_int([&](int i) { return element<std::int32_t>(p, i); });
}
NIBBLE_EMULATED Vi load_top_bits(const std::uint8_t* p, int) noexcept {
  return each_int([&](int i) { return element<std::uint32_t>(p, i % 8) >> (i / 8 * 4); });
}
NIBBLE_EMULATED void store_words(void* p, Vi v) noexcept { std::memcpy(p, v.v, sizeof v.v); }
NIBBLE_EMULATED Vf load_fp16_n(const void* p, std::size_t n) noexcept {
  return each([&](int i) { return i < count_of(n) ? float_from_fp16(element<std::uint16_t>(p, i)) : 0.0F; });
}
NIBBLE_EMULATED Vf load_fp16(const void* p) noexcept { return load_fp16_n(p, 16); }
NIBBLE_EMULATED Vi load_u16_n(const void* p, std::size_t n) noexcept {
  return each_int([&](int i) { return i < count_of(n) ? element<std::uint16_t>(p, i) : 0; });
}
NIBBLE_EMULATED Vi load_u16(const void* p) noexcept { return load_u16_n(p, 16); }
NIBBLE_EMULATED Vi load_s8_n(const std::int8_t* p, std::size_t n) noexcept {
  return each_int([&](int i) { return i < count_of(n) ? p[i] : 0; });
}
NIBBLE_EMULATED Vi load_s8(const std::int8_t* p) noexcept { return load_s8_n(p, 16); }
NIBBLE_EMULATED void store_8_n(std::int8_t* p, Vi v, std::size_t n) noexcept {
  for (int i = 0; i < count_of(n); ++i) p[i] = static_cast<std::int8_t>(v.v[i] & 0xFF);
}
NIBBLE_EMULATED void store_8(std::int8_t* p, Vi v) noexcept { store_8_n(p, v, 16); }
NIBBLE_EMULATED void store_16_n(std::uint16_t* p, Vi v, std::size_t n) noexcept {
  for (int i = 0; i < count_of(n); ++i) put(p, i, static_cast<std::uint16_t>(v.v[i] & 0xFFFF));
}
NIBBLE_EMULATED void store_16(std::uint16_t* p, Vi v) noexcept { store_16_n(p, v, 16); }
NIBBLE_EMULATED void store_fp16_n(std::uint16_t* p, Vf v, std::size_t n) noexcept {
  for (int i = 0; i < count_of(n); ++i) put(p, i, nibble::fp16_from_float(v.v[i]));
}
NIBBLE_EMULATED void store_fp16(std::uint16_t* p, Vf v) noexcept { store_fp16_n(p, v, 16); }

NIBBLE_EMULATED Vf mul(Vf a, Vf b) noexcept {
  return each([&](int i) { return rounded(a.v[i] * b.v[i]); });
}
NIBBLE_EMULATED Vf mul_only(Vf a, Vf b) noexcept { return mul(a, b); }
NIBBLE_EMULATED Vf add(Vf a, Vf b) noexcept {
  return each([&](int i) { return rounded(a.v[i] + b.v[i]); });
}
NIBBLE_EMULATED Vf sub(Vf a, Vf b) noexcept {
  return each([&](int i) { return rounded(a.v[i] - b.v[i]); });
}
constexpr bool has_scalef = true;
NIBBLE_EMULATED Vf scalef(Vf a, Vf n) noexcept {
  return each(
      [&](int i) { return a.v[i] == a.v[i] ? rounded(std::ldexp(a.v[i], static_cast<int>(n.v[i]))) : a.v[i]; });
}
NIBBLE_EMULATED Vf div(Vf a, Vf b) noexcept {
  return each([&](int i) { return rounded(a.v[i] / b.v[i]); });
}
NIBBLE_EMULATED Vf fma(Vf a, Vf b, Vf c) noexcept {
  return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
NIBBLE_EMULATED Vf min(Vf a, Vf b) noexcept {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
NIBBLE_EMULATED Vf max(Vf a, Vf b) noexcept {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
NIBBLE_EMULATED Vf round(Vf v) noexcept {
  return each([&](int i) { return std::nearbyint(v.v[i]); });
}
NIBBLE_EMULATED float round_scalar(float v) noexcept { return std::nearbyint(v); }
NIBBLE_EMULATED Vf zero_unless_positive_or_nan(Vf v) noexcept {
  return each([&](int i) { return v.v[i] <= 0.0F ? 0.0F : v.v[i]; });
}
NIBBLE_EMULATED Vf zero_if_nan(Vf v) noexcept {
  return each([&](int i) { return v.v[i] == v.v[i] ? v.v[i] : 0.0F; });
}
NIBBLE_EMULATED Vi if_nan(Vf v, Vi a, Vi b) noexcept {
  return each_int([&](int i) { return v.v[i] == v.v[i] ? b.v[i] : a.v[i]; });
}

NIBBLE_EMULATED Vf swap_pairs(Vf v) noexcept {
  return each([&](int i) { return v.v[i ^ 1]; });
}

NIBBLE_EMULATED Vi bits(Vf v) noexcept {
  return each_int([&](int i) { return bits_from_float(v.v[i]); });
}
NIBBLE_EMULATED Vf from_bits(Vi v) noexcept {
  return each([&](int i) { return float_from_bits(unsigned_of(v.v[i])); });
}
NIBBLE_EMULATED Vf to_float(Vi v) noexcept {
  return each([&](int i) { return static_cast<float>(v.v[i]); });
}
// The instruction's answer to NaN and to what does not fit.
NIBBLE_EMULATED Vi to_int(Vf v) noexcept {
  return each_int([&](int i) {
    const float r = std::nearbyint(v.v[i]);
    return r >= -2147483648.0F && r < 2147483648.0F ? static_cast<std::int32_t>(r) : INT32_MIN;
  });
}
NIBBLE_EMULATED Vi add_int(Vi a, Vi b) noexcept {
  return each_int([&](int i) { return unsigned_of(a.v[i]) + unsigned_of(b.v[i]); });
}
NIBBLE_EMULATED Vi sub_int(Vi a, Vi b) noexcept {
  return each_int([&](int i) { return unsigned_of(a.v[i]) - unsigned_of(b.v[i]); });
}
NIBBLE_EMULATED Vi max_int(Vi a, Vi b) noexcept {
  return each_int([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
NIBBLE_EMULATED Vi and_int(Vi a, Vi b) noexcept {
  return each_int([&](int i) { return a.v[i] & b.v[i]; });
}
NIBBLE_EMULATED Vi or_int(Vi a, Vi b) noexcept {
  return each_int([&](int i) { return a.v[i] | b.v[i]; });
}
NIBBLE_EMULATED Vi xor_int(Vi a, Vi b) noexcept {
  return each_int([&](int i) { return a.v[i] ^ b.v[i]; });
}
template <int N>
NIBBLE_EMULATED Vi shift_left(Vi v) noexcept {
  return each_int([&](int i) { return unsigned_of(v.v[i]) << N; });
}
template <int N>
NIBBLE_EMULATED Vi shift_right(Vi v) noexcept {
  return each_int([&](int i) { return unsigned_of(v.v[i]) >> N; });
}
template <int N>
NIBBLE_EMULATED Vi shift_right_signed(Vi v) noexcept {
  return each_int([&](int i) { return v.v[i] >> N; });
}

template <int J>
NIBBLE_EMULATED Vi byte_of_lanes(Vi v) noexcept {
  return each_int([&](int i) { return unsigned_of(v.v[i]) >> (8 * J) & 255U; });
}

struct Lookup16 {
  Vf levels;
};
NIBBLE_EMULATED Lookup16 load_lookup16(const float* table) noexcept { return {load(table)}; }
template <int N>
NIBBLE_EMULATED Vf lookup16(const Lookup16& t, Vi v) noexcept {
  return each([&](int i) { return t.levels.v[unsigned_of(v.v[i]) >> N & 15U]; });
}

NIBBLE_EMULATED float reduce_min(Vf v) noexcept {
  float m = v.v[0];
  for (float x : v.v) m = x < m ? x : m;
  return m;
}
NIBBLE_EMULATED float reduce_max(Vf v) noexcept {
  float m = v.v[0];
  for (float x : v.v) m = x > m ? x : m;
  return m;
}
NIBBLE_EMULATED std::int32_t reduce_max_int(Vi v) noexcept {
  std::int32_t m = v.v[0];
  for (std::int32_t x : v.v) m = x > m ? x : m;
  return m;
}

NIBBLE_EMULATED void sum_blocks_4(const std::int8_t* q, std::int32_t* out) noexcept {
  for (int b = 0; b < 4; ++b) {
    out[b] = 0;
    for (int i = 0; i < 16; ++i) out[b] += q[16 * b + i];
  }
}

NIBBLE_EMULATED void prefetch(const void*) noexcept {}

NIBBLE_EMULATED Vf load_quads(const float* p, std::size_t stride) noexcept {
  return each([&](int i) { return element<float>(p + static_cast<std::size_t>(i / 4 * 4) * stride, i % 4); });
}
NIBBLE_EMULATED void transpose_quads(Vf (&v)[4]) noexcept {
  const Vf old[4] = {v[0], v[1], v[2], v[3]};
  for (int j = 0; j < 4; ++j) v[j] = each([&](int i) { return old[i % 4].v[i / 4 * 4 + j]; });
}
