// The loop that both integer kernels of this ISA are made of, over int_ops. `Weights` says how codes become the
// unsigned operand of a dot product (w8a8.inl, w4a8.inl). Included by table.hpp, in its region.
//
// A tile is Rows x Panels x 16 channels over a block of k: up to 12 accumulators, two weights, a broadcast and a mask
// fill the 16 registers. What a group longer than a block has summed so far and the fp32 result lie in L1. All rows of
// a call (up to 64) pass over a block of one panel's weights before the next one comes, so that the block is read from
// L1; few rows take several panels at once, which DRAM sees as that many streams.

namespace int_tiles {

using int_ops::Float;
using int_ops::Int;
using int_params::Panel;

inline constexpr std::size_t row_block = 64;  // rows that share one pass over the weights
inline constexpr std::size_t prefetch_bytes = 4096;
inline constexpr std::size_t most_rows = 6;  // of a tile
inline constexpr std::size_t most_panels = 4;
inline constexpr std::size_t few_rows = 3;  // that a tile takes with several panels

/// k that stay in L1 while all rows pass; few rows never come back and go as far as the tables allow.
constexpr std::size_t k_block(bool few) noexcept { return few ? 8192 : 512; }
constexpr std::size_t block_groups(bool few) noexcept { return k_block(few) / 16; }
inline constexpr std::size_t table_size = row_block * block_groups(false) > few_rows* block_groups(true)
                                              ? row_block* block_groups(false)
                                              : few_rows* block_groups(true);

/// What a block of k needs of every row and group, rows block_groups apart: the caller's strides would take an
/// address register each.
struct Tables {
  std::int32_t start[table_size];  // of D; S itself where that is yet to be multiplied by zeros
  float sum[table_size];           // S; float_offset alone
  float x_scale[table_size];       // where there are such
};

/// What all tiles of a call share.
struct Call {
  const IntGemmArgs& a;
  std::size_t row0 = 0;
  std::size_t rows = 0;
  Tables* tables = nullptr;         // of the block
  std::int32_t* partial = nullptr;  // [panel][row][16]
  float* acc = nullptr;             // the same
};

/// k in [begin, end), beginning in `group`; groups up to k_block never cross its ends.
struct Block {
  std::size_t begin = 0;
  std::size_t end = 0;
  std::size_t group = 0;
  std::size_t groups = 0;
  bool resumes = false;  // a group that an earlier block began
  bool keeps = false;    // D, for a later block or as the raw result
};

/// Dot products of Rows rows with 4 k (the j-th of a unit) of one panel.
template <int Rows, int J>
NIBBLE_ALWAYS_INLINE void dots(Int (&d)[Rows][2], Int w0, Int w1, const std::int8_t* x, const std::int8_t* x3,
                               std::size_t stride) noexcept {
  int_ops::dot_pair<0, 4 * J>(d[0][0], d[0][1], w0, w1, x, stride);
  if constexpr (Rows > 1) int_ops::dot_pair<1, 4 * J>(d[1][0], d[1][1], w0, w1, x, stride);
  if constexpr (Rows > 2) int_ops::dot_pair<2, 4 * J>(d[2][0], d[2][1], w0, w1, x, stride);
  if constexpr (Rows > 3) int_ops::dot_pair<0, 4 * J>(d[3][0], d[3][1], w0, w1, x3, stride);
  if constexpr (Rows > 4) int_ops::dot_pair<1, 4 * J>(d[4][0], d[4][1], w0, w1, x3, stride);
  if constexpr (Rows > 5) int_ops::dot_pair<2, 4 * J>(d[5][0], d[5][1], w0, w1, x3, stride);
}

/// One unit of k.
template <class Weights, int Rows, int Panels>
NIBBLE_ALWAYS_INLINE void unit(Int (&d)[Panels][Rows][2], const std::uint8_t* const (&codes)[Panels],
                               const std::int8_t* x, const std::int8_t* x3, std::size_t stride,
                               Int mask) noexcept {
  if constexpr (Rows <= 2) {  // every code is loaded once
    Int b[Rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      b[r][0] = int_ops::broadcast4(x + static_cast<std::size_t>(r) * stride);
      b[r][1] = int_ops::broadcast4(x + static_cast<std::size_t>(r) * stride + 4);
    }
#pragma GCC unroll 12
    for (int h = 0; h < 2 * Panels; ++h) {
      if (h % 2 == 0) Weights::prefetch(codes[h / 2] + prefetch_bytes);
      Int w[2];
      Weights::load(codes[h / 2] + h % 2 * 32, w[0], w[1]);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        int_ops::dot(d[h / 2][r][h % 2], w[0], b[r][0]);
        int_ops::dot(d[h / 2][r][h % 2], w[1], b[r][1]);
      }
    }
  } else {  // every 4 k of x are broadcast once a panel
#pragma GCC unroll 12
    for (int p = 0; p < Panels; ++p) {
      Weights::prefetch(codes[p] + prefetch_bytes);
      dots<Rows, 0>(d[p], Weights::template load_4<0>(codes[p], mask),
                    Weights::template load_4<0>(codes[p] + 32, mask), x, x3, stride);
    }
#pragma GCC unroll 12
    for (int p = 0; p < Panels; ++p)
      dots<Rows, 1>(d[p], Weights::template load_4<1>(codes[p], mask),
                    Weights::template load_4<1>(codes[p] + 32, mask), x, x3, stride);
  }
}

/// Rows x Panels over a block of k; `row` of the call's rows and `panel` of the panels that partial and acc hold.
template <class Weights, int Rows, int Panels>
inline void tile(const Call& call, const Block& all, std::size_t row, std::size_t first_panel,
                 std::size_t panel) noexcept {
  constexpr int halves = 2 * Panels;
  constexpr std::size_t row_groups = block_groups(Panels > 1);
  const IntGemmArgs a = call.a;
  const Block block = all;
  const std::size_t panel_stride = call.rows * panel_width;
  std::int32_t* partial = call.partial + (panel * call.rows + row) * panel_width;
  float* acc = call.acc + (panel * call.rows + row) * panel_width;
  const Tables& tables = *call.tables;
  std::size_t at = row * row_groups;  // into tables
  const bool has_offset = a.w.symmetry == Symmetry::float_offset;
  const Int mask = int_ops::nibble_mask();
  const std::uint8_t* codes[Panels];
  std::size_t first_param[Panels];
#pragma GCC unroll 12
  for (int p = 0; p < Panels; ++p) {
    // Beyond the last one: that once more, into a place of its own.
    const std::size_t index = first_panel + panel + static_cast<std::size_t>(p);
    const Panel from = int_params::panel_at(a, index < a.panel_end ? index : a.panel_end - 1);
    codes[p] = from.codes + block.begin / k_unit * Weights::unit_bytes;
    first_param[p] = from.param;
  }
  const std::size_t stride = a.x_stride;
  const std::int8_t* x = a.x + (call.row0 + row) * stride + block.begin;
  const std::int8_t* x3 = Rows > 3 ? x + 3 * stride : x;
  std::size_t k = block.begin;
  for (std::size_t g = block.group; k < block.end; ++g, ++at) {
    const std::size_t stop = a.w.group_size < block.end - k ? k + a.w.group_size : block.end;
    std::size_t param[Panels];
#pragma GCC unroll 12
    for (int p = 0; p < Panels; ++p) param[p] = first_param[p] + int_params::param_offset(a, g);

    Int d[Panels][Rows][2];
    if (block.resumes) {
#pragma GCC unroll 12
      for (int i = 0; i < halves * Rows; ++i)
        d[i / 2 / Rows][i / 2 % Rows][i % 2] = int_ops::load_int(
            partial + static_cast<std::size_t>(i / 2 / Rows) * panel_stride + i % (2 * Rows) * 8);
    } else if (a.w.symmetry != Symmetry::asymmetric) {
#pragma GCC unroll 12
      for (int i = 0; i < halves * Rows; ++i)
        d[i / 2 / Rows][i / 2 % Rows][i % 2] =
            int_ops::broadcast4(tables.start + at + static_cast<std::size_t>(i / 2 % Rows) * row_groups);
    } else {
#pragma GCC unroll 12
      for (int h = 0; h < halves; ++h) {
        const Int zero = int_params::total_zero<Weights>(a.w, param[h / 2] + static_cast<std::size_t>(h % 2 * 8));
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r)
          d[h / 2][r][h % 2] =
              int_params::start_multiplied(tables.start + at + static_cast<std::size_t>(r) * row_groups, zero);
      }
    }

    for (; k < stop; k += k_unit) {
      unit<Weights, Rows, Panels>(d, codes, x, x3, stride, mask);
      x += k_unit;
      x3 += k_unit;
#pragma GCC unroll 12
      for (int p = 0; p < Panels; ++p) codes[p] += Weights::unit_bytes;
    }

    if (block.keeps) {
#pragma GCC unroll 12
      for (int i = 0; i < halves * Rows; ++i)
        int_ops::store_int(partial + static_cast<std::size_t>(i / 2 / Rows) * panel_stride + i % (2 * Rows) * 8,
                           d[i / 2 / Rows][i / 2 % Rows][i % 2]);
      continue;
    }
#pragma GCC unroll 12
    for (int h = 0; h < halves; ++h) {
      const std::size_t p = param[h / 2] + static_cast<std::size_t>(h % 2 * 8);
      const Float scale = int_params::load_scale(a.w, p);
      float* to = acc + static_cast<std::size_t>(h / 2) * panel_stride + h % 2 * 8;
      if (a.x_scales == nullptr && !has_offset) {
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r, to += 16)
          int_ops::store_float(
              to, int_ops::fma(scale, int_ops::to_float(d[h / 2][r][h % 2]), int_ops::load_float(to)));
        continue;
      }
      const Float offset = int_params::load_offset(a.w, p);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r, to += 16) {
        const std::size_t i = at + static_cast<std::size_t>(r) * row_groups;
        const Float dots = int_ops::to_float(d[h / 2][r][h % 2]);
        if (a.x_scales == nullptr) {
          const Float f = int_ops::fma(scale, dots, int_ops::load_float(to));
          int_ops::store_float(to, int_ops::fma(offset, int_ops::set_float(tables.sum[i]), f));
        } else {
          Float f = int_ops::mul(scale, dots);
          if (has_offset) f = int_ops::fma(offset, int_ops::set_float(tables.sum[i]), f);
          int_ops::store_float(to,
                               int_ops::fma(int_ops::set_float(tables.x_scale[i]), f, int_ops::load_float(to)));
        }
      }
    }
  }
}

/// All rows over a block of `panels` panels.
template <class Weights>
inline void rows_pass(const Call& call, const Block& block, std::size_t first, std::size_t panels) noexcept {
  if (call.rows == 1)
    for (std::size_t p = 0; p < panels; p += 4) tile<Weights, 1, 4>(call, block, 0, first, p);
  else if (call.rows == 2)
    for (std::size_t p = 0; p < panels; p += 2) tile<Weights, 2, 2>(call, block, 0, first, p);
  else if (call.rows == 3)
    for (std::size_t p = 0; p < panels; p += 2) tile<Weights, 3, 2>(call, block, 0, first, p);
  else
    for (std::size_t p = 0; p < panels; ++p) {
      // Tiles of nearly equal height.
      std::size_t tiles = (call.rows + most_rows - 1) / most_rows;
      for (std::size_t r = 0; r < call.rows; --tiles) {
        const std::size_t height = (call.rows - r + tiles - 1) / tiles;
        switch (height) {
          case 6: tile<Weights, 6, 1>(call, block, r, first, p); break;
          case 5: tile<Weights, 5, 1>(call, block, r, first, p); break;
          case 4: tile<Weights, 4, 1>(call, block, r, first, p); break;
          default: tile<Weights, 3, 1>(call, block, r, first, p); break;
        }
        r += height;
      }
    }
}

template <class Weights>
inline void fill_tables(const Call& call, const Block& block) noexcept {
  const IntGemmArgs& a = call.a;
  const bool has_offset = a.w.symmetry == Symmetry::float_offset;
  const std::int32_t factor = a.w.symmetry == Symmetry::asymmetric  ? 1
                              : a.w.symmetry == Symmetry::symmetric ? -(1 << Weights::symmetric_shift)
                                                                    : -Weights::bias;
  const Int factors = int_ops::set_int(factor);
  Tables& t = *call.tables;
  for (std::size_t r = 0; r < call.rows; ++r) {
    const std::size_t from = (call.row0 + r) * a.sums_stride + block.group;
    const std::int32_t* sums = a.x_sums + from;
    const std::size_t to = r * block_groups(call.rows <= few_rows);
    std::size_t g = 0;
    for (; g + 8 <= block.groups; g += 8) {
      const Int sum = int_ops::load_int(sums + g);
      int_ops::store_int(t.start + to + g, int_ops::mul(factors, sum));
      if (has_offset) int_ops::store_float(t.sum + to + g, int_ops::to_float(sum));
    }
    for (; g < block.groups; ++g) {
      t.start[to + g] =
          static_cast<std::int32_t>(static_cast<std::uint32_t>(factor) * static_cast<std::uint32_t>(sums[g]));
      if (has_offset) t.sum[to + g] = static_cast<float>(sums[g]);
    }
    if (a.x_scales != nullptr) std::memcpy(t.x_scale + to, a.x_scales + from, block.groups * sizeof(float));
  }
}

template <class Weights>
inline void block_of_rows(const IntGemmArgs& a, std::size_t row0, std::size_t rows) noexcept {
  // All rows of one panel, or few rows of up to four: in L1, and not where a.acc's stride puts them.
  static_assert(most_panels * few_rows <= row_block, "");
  alignas(32) std::int32_t partial[row_block * panel_width];
  alignas(32) float acc[row_block * panel_width];
  alignas(32) Tables tables;
  const Call call{a, row0, rows, &tables, partial, acc};
  const std::size_t group = a.w.group_size;
  const std::size_t at_once = rows <= few_rows ? most_panels : 1;
  const std::size_t longest = k_block(rows <= few_rows);
  const std::size_t step = group <= longest ? longest / group * group : longest;
  for (std::size_t p0 = a.panel_begin; p0 < a.panel_end; p0 += at_once) {
    const std::size_t panels = p0 + at_once < a.panel_end ? at_once : a.panel_end - p0;
    for (std::size_t i = 0; i < at_once * rows * 2; ++i) int_ops::store_float(acc + 8 * i, int_ops::zero_float());
    for (Block block; block.begin < a.w.k_padded; block.begin = block.end, block.group = block.end / group) {
      std::size_t limit = group <= longest ? a.w.k_padded : (block.group + 1) * group;
      if (limit > a.w.k_padded) limit = a.w.k_padded;
      block.end = block.begin + step < limit ? block.begin + step : limit;
      block.groups = (block.end - 1) / group + 1 - block.group;
      block.resumes = block.begin != block.group * group;
      block.keeps = a.raw != nullptr || (block.end % group != 0 && block.end != a.w.k_padded);
      fill_tables<Weights>(call, block);
      rows_pass<Weights>(call, block, p0, panels);
    }
    for (std::size_t p = 0; p < panels; ++p)
      for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t h = 0; h < 16; h += 8) {
          const std::size_t out = (row0 + r) * a.acc_stride + (p0 + p - a.panel_begin) * panel_width + h;
          const std::size_t from = (p * rows + r) * 16 + h;
          if (a.raw != nullptr)
            int_ops::store_int(a.raw + out, int_ops::load_int(partial + from));
          else
            int_ops::store_float(a.acc + out, int_ops::load_float(acc + from));
        }
  }
}

template <class Weights>
inline void gemm(const IntGemmArgs& a) noexcept {
  for (std::size_t row0 = 0; row0 < a.rows; row0 += row_block)
    block_of_rows<Weights>(a, row0, a.rows - row0 < row_block ? a.rows - row0 : row_block);
}

}  // namespace int_tiles
