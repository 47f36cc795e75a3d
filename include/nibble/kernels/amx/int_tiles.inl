// The loop that both integer kernels of this ISA are made of, over tile_ops, and int_ops for what is no dot product.
// `Weights` says how codes become the unsigned operand (w8a8.inl, w4a8.inl). Included by table.hpp, in its region.
//
// Up to 32 rows x 2 panels at once: four tiles of sums, two of activations (16 rows x 64 k, as they lie), two of weights
// (64 k x 16 channels: the layout of int8 panels is that of a tile). A group ends with its sums in memory, from where
// the float steps go as in every other kernel; groups that are multiples of 32 and not of 64 take tiles of half the
// depth, others and few rows the AVX-512 kernels. Port arithmetic for 32 x 32 and 64 k: 4 tdpbsud of 16 cycles, 4
// loads of 8 beside them, so 1,024 products a cycle: eight times the dpbusd loop for long groups; a group's end stores
// 4 tiles and takes 64 x (2 loads, conversion, FMA, store) of AVX-512, some 100 cycles to the 64 (32) of its dot
// products where it has 64 (32) k.

namespace int_tiles {

using int_ops::Float;
using int_ops::Int;
using int_params::Panel;
using tile_ops::Config;
using tile_ops::Tiles;

inline constexpr std::size_t row_block = 64;  // rows that share one pass over the weights
inline constexpr std::size_t tile_rows = 16;
inline constexpr std::size_t pair_rows = 2 * tile_rows;
inline constexpr std::size_t least_rows = 8;  // below, the AVX-512 kernels
inline constexpr std::size_t k_block = 1024;  // k of two panels that lie unpacked

/// k that one tile of x takes, or 0: the groups suit no tile.
inline std::size_t chunk_of(const PanelView& w) noexcept {
  if (w.groups == 1 || w.group_size % 64 == 0) return 64;
  return w.group_size % 32 == 0 ? 32 : 0;
}

/// Tiles 0, 1 (first 16 rows) and 2, 3 (the others): sums of both panels; 4 and 5: x of these rows; 6 and 7: weights.
inline Config config_of(std::size_t rows, std::size_t k) noexcept {
  const std::size_t first = rows < tile_rows ? rows : tile_rows;
  const std::size_t others = rows > tile_rows ? rows - tile_rows : 1;  // not used where there are none
  Config config;
  for (std::size_t t = 0; t < 8; ++t) {
    const std::size_t height = t >= 6 ? k / 4 : t <= 1 || t == 4 ? first : others;
    config.rows[t] = static_cast<std::uint8_t>(height);
    config.row_bytes[t] = static_cast<std::uint16_t>(t == 4 || t == 5 ? k : 64);
  }
  return config;
}

/// The tiles, configured anew only for another shape.
struct Shaped {
  Tiles tiles;
  std::size_t rows = 0;
  std::size_t k = 0;

  void shape(std::size_t new_rows, std::size_t new_k) noexcept {
    if (new_rows == rows && new_k == k) return;
    rows = new_rows;
    k = new_k;
    tiles.configure(config_of(rows, k));
  }
};

/// Dot products of up to 32 rows with `steps` times k of both panels; sums [row][2][16] from 0, or from what they hold.
inline void dots(Shaped& shaped, std::size_t rows, std::size_t k, std::size_t steps, const std::int8_t* x,
                 std::size_t x_stride, const std::uint8_t* const (&w)[2], bool resumes,
                 std::int32_t* sums) noexcept {
  shaped.shape(rows, k);
  Tiles& tiles = shaped.tiles;
  constexpr std::size_t stride = 2 * panel_width * sizeof(std::int32_t);
  std::int32_t* others = sums + tile_rows * 2 * panel_width;
  const bool two = rows > tile_rows;
  if (resumes) {
    tiles.load<0>(sums, stride);
    tiles.load<1>(sums + panel_width, stride);
    if (two) {
      tiles.load<2>(others, stride);
      tiles.load<3>(others + panel_width, stride);
    }
  } else {
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
  }
  for (std::size_t i = 0; i < steps; ++i) {
    tiles.load<6>(w[0] + i * k * panel_width, 4 * panel_width);
    tiles.load<7>(w[1] + i * k * panel_width, 4 * panel_width);
    tiles.load<4>(x + i * k, x_stride);
    tiles.dot<0, 4, 6>();
    tiles.dot<1, 4, 7>();
    if (two) {
      tiles.load<5>(x + tile_rows * x_stride + i * k, x_stride);
      tiles.dot<2, 5, 6>();
      tiles.dot<3, 5, 7>();
    }
  }
  tiles.store<0>(sums, stride);
  tiles.store<1>(sums + panel_width, stride);
  if (two) {
    tiles.store<2>(others, stride);
    tiles.store<3>(others + panel_width, stride);
  }
}

/// sums to D, and on into acc (both [row][2][16]) or, raw, where they are.
template <class Weights>
inline void end_group(const IntGemmArgs& a, const Panel (&panel)[2], std::size_t g, std::size_t row,
                      std::size_t rows, std::int32_t* sums, float* acc) noexcept {
  const Int shift = int_params::bias_shift<Weights>(a.w.symmetry);
  for (std::size_t p = 0; p < 2; ++p) {
    const std::size_t param = panel[p].param + int_params::param_offset(a, g);
    const bool asymmetric = a.w.symmetry == Symmetry::asymmetric;
    const Int zero = asymmetric ? int_params::total_zero<Weights>(a.w, param) : int_ops::zero_int();
    const Float scale = a.raw == nullptr ? int_params::load_scale(a.w, param) : int_ops::zero_float();
    const Float offset = a.raw == nullptr ? int_params::load_offset(a.w, param) : int_ops::zero_float();
    for (std::size_t r = 0; r < rows; ++r) {
      const std::size_t sum_index = (row + r) * a.sums_stride + g;
      const std::size_t at = (r * 2 + p) * panel_width;
      const Int start = asymmetric ? int_params::start_multiplied(a.x_sums + sum_index, zero)
                                   : int_params::start_shifted(a.x_sums + sum_index, shift);
      const Int d = int_ops::add(start, int_ops::load_int(sums + at));
      if (a.raw != nullptr)
        int_ops::store_int(sums + at, d);
      else
        int_ops::store_float(acc + at,
                             int_params::finish(a, scale, offset, d, sum_index, int_ops::load_float(acc + at)));
    }
  }
}

/// All groups of k in [begin, end), which begins in group g.
template <class Weights>
inline void k_pass(const IntGemmArgs& a, Shaped& shaped, const Panel (&panel)[2],
                   const std::uint8_t* const (&w)[2], std::size_t begin, std::size_t end, std::size_t g,
                   std::size_t row, std::size_t rows, std::int32_t* sums, float* acc) noexcept {
  const std::size_t chunk = chunk_of(a.w);
  for (std::size_t k = begin; k < end; ++g) {
    const std::size_t group_begin = g * a.w.group_size;
    const std::size_t group_end =
        group_begin + a.w.group_size < a.w.k_padded ? group_begin + a.w.group_size : a.w.k_padded;
    const std::size_t stop = group_end < end ? group_end : end;
    bool resumes = k != group_begin;
    // Whole tiles, and what is left where k ends, in one tile of its own shape.
    for (std::size_t depth = chunk; k < stop; depth = stop - k) {
      const std::size_t steps = (stop - k) / depth;
      if (steps == 0) continue;
      const std::uint8_t* const at[2] = {w[0] + (k - begin) * panel_width, w[1] + (k - begin) * panel_width};
      dots(shaped, rows, depth, steps, a.x + row * a.x_stride + k, a.x_stride, at, resumes, sums);
      resumes = true;
      k += steps * depth;
    }
    if (stop == group_end) end_group<Weights>(a, panel, g, row, rows, sums, acc);
  }
}

template <class Weights>
inline void block_of_rows(const IntGemmArgs& a, Shaped& shaped, std::size_t row0, std::size_t rows) noexcept {
  alignas(64) std::int32_t sums[row_block * 2 * panel_width];
  alignas(64) float acc[row_block * 2 * panel_width];
  alignas(64) std::uint8_t unpacked[2][k_block * panel_width];
  const std::size_t group = a.w.group_size;
  // Groups up to k_block lie within one block, longer ones begin one.
  const std::size_t step = group <= k_block ? k_block / group * group : k_block;
  for (std::size_t p0 = a.panel_begin; p0 < a.panel_end; p0 += 2) {
    const std::size_t count = p0 + 1 < a.panel_end ? 2 : 1;  // an odd last panel is paired with itself
    const Panel panel[2] = {int_params::panel_at(a, p0), int_params::panel_at(a, p0 + count - 1)};
    for (std::size_t i = 0; i < rows * 2; ++i) int_ops::store_float(acc + i * panel_width, int_ops::zero_float());
    for (std::size_t k = 0, g = 0; k < a.w.k_padded; g = k / group) {
      const std::size_t group_end = (g + 1) * group;
      const std::size_t limit = group > k_block && group_end < a.w.k_padded ? group_end : a.w.k_padded;
      const std::size_t end = k + step < limit ? k + step : limit;
      const std::uint8_t* const w[2] = {Weights::bytes(panel[0].codes, k, end, unpacked[0]),
                                        Weights::bytes(panel[1].codes, k, end, unpacked[1])};
      for (std::size_t r = 0; r < rows; r += pair_rows)
        k_pass<Weights>(a, shaped, panel, w, k, end, g, row0 + r, rows - r < pair_rows ? rows - r : pair_rows,
                        sums + r * 2 * panel_width, acc + r * 2 * panel_width);
      k = end;
    }
    for (std::size_t r = 0; r < rows; ++r)
      for (std::size_t p = 0; p < count; ++p) {
        const std::size_t out = (row0 + r) * a.acc_stride + (p0 + p - a.panel_begin) * panel_width;
        const std::size_t from = (r * 2 + p) * panel_width;
        if (a.raw != nullptr)
          int_ops::store_int(a.raw + out, int_ops::load_int(sums + from));
        else
          int_ops::store_float(a.acc + out, int_ops::load_float(acc + from));
      }
  }
}

/// False where the product is not for tiles.
inline bool suits(const IntGemmArgs& a) noexcept { return a.rows >= least_rows && chunk_of(a.w) != 0; }

template <class Weights>
inline void gemm(const IntGemmArgs& a) noexcept {
  Shaped shaped;
  for (std::size_t row0 = 0; row0 < a.rows; row0 += row_block)
    block_of_rows<Weights>(a, shaped, row0, a.rows - row0 < row_block ? a.rows - row0 : row_block);
}

}  // namespace int_tiles
