// Plans and runs products of bf16 weights with activations rounded to bf16.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if NIBBLE_X86
#include <emmintrin.h>
#endif

#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/drive_int.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/gemm/workspace.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// out[i] = low[i] | high[i] << 16 for i < n.
inline void interleave_halves(const std::uint16_t* low, const std::uint16_t* high, std::size_t n,
                              std::uint32_t* out) noexcept {
  std::size_t i = 0;
#if NIBBLE_X86
  for (; i + 4 <= n; i += 4) {
    const __m128i a = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(low + i));
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(high + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_unpacklo_epi16(a, b));
  }
#endif
  for (; i < n; ++i) out[i] = static_cast<std::uint32_t>(low[i]) | static_cast<std::uint32_t>(high[i]) << 16;
}

/// A dense matrix' rows as pairs of depths (k, k + 1) of bf16, the even k in the low half: blocks of `height` rows,
/// zeros beyond the last row and depth. Element (row, k) is at[row * row_stride + k * depth_stride]. The pair of k and the
/// rows of block b, height of them side by side, go to place(b, k); from one multiple of 256 to the next, place(b, k)
/// advances evenly.
template <class Place>
void pack_bf16_pairs(const KernelTable& kernels, const FloatView& m, bool transposed, std::size_t height,
                     std::size_t depth_padded, ThreadPool* pool, const Place& place) {
  const std::size_t rows = transposed ? m.cols : m.rows, depth = transposed ? m.rows : m.cols;
  const std::size_t row_stride = transposed ? m.col_stride : m.row_stride;
  const std::size_t depth_stride = transposed ? m.row_stride : m.col_stride;
  const std::size_t blocks = ceil_div(rows, height);
  constexpr std::size_t most = 256;
  if (row_stride != 1 || height > most) {
    for_tasks(pool, blocks, [&](std::size_t block, std::size_t) {
      const std::size_t first = block * height;
      std::uint16_t line[most];
      for (std::size_t i = 0; i < height; ++i)
        for (std::size_t k0 = 0; k0 < depth_padded; k0 += most) {
          const std::size_t count = std::min(most, depth_padded - k0);
          const std::size_t here = first + i < rows && k0 < depth ? std::min(count, depth - k0) : 0;
          const float* from = m.data + (first + i) * row_stride + k0 * depth_stride;
          if (depth_stride == 1 && here != 0)
            kernels.bf16_from_float(from, here, line);
          else
            for (std::size_t k = 0; k < here; ++k) kernels.bf16_from_float(from + k * depth_stride, 1, line + k);
          std::memset(line + here, 0, (count - here) * sizeof(std::uint16_t));
          // Pairs of 256 depths lie evenly.
          std::uint32_t* to = place(block, k0) + i;
          const std::ptrdiff_t step = count > 2 ? place(block, k0 + 2) - place(block, k0) : 0;
          for (std::size_t k = 0; k < count; k += 2, to += step) std::memcpy(to, line + k, sizeof *to);
        }
    });
    return;
  }
  // Rows lie side by side: a run of them at two depths, for several blocks at once.
  const std::size_t at_once = std::max<std::size_t>(1, most / height);
  constexpr std::size_t depths = 64;
  const std::size_t row_tasks = ceil_div(blocks, at_once);
  for_tasks(pool, row_tasks * ceil_div(depth_padded, depths), [&](std::size_t task, std::size_t) {
    const std::size_t block = task % row_tasks * at_once;
    const std::size_t end = std::min(block + at_once, blocks);
    const std::size_t first = block * height;
    const std::size_t have = std::min(rows, end * height) - first;
    std::uint16_t line[2][most] = {};
    const std::size_t k_end = std::min(depth_padded, (task / row_tasks + 1) * depths);
    for (std::size_t k = task / row_tasks * depths; k < k_end; k += 2) {
      for (std::size_t h = 0; h < 2; ++h) {
        if (k + h < depth)
          kernels.bf16_from_float(m.data + first * row_stride + (k + h) * depth_stride, have, line[h]);
        else
          std::memset(line[h], 0, sizeof(line[h]));
      }
      for (std::size_t b = block; b < end; ++b)
        interleave_halves(line[0] + (b - block) * height, line[1] + (b - block) * height, height, place(b, k));
    }
  });
}

/// outputs x tokens = w * bf16(x). Tasks are (panels, block of tokens); k runs from 0 up within each, so bits depend on
/// nothing but the values. dense: what w is packed from first where it has no codes yet, n x k floats; else nullptr.
inline void run_bf16(const KernelTable& kernels, PanelView w, std::size_t panels, const FloatView& x,
                     const Epilogue& epilogue, const Output& out, ThreadPool* pool, Workspace& workspace,
                     const FloatView* dense = nullptr) {
  // A block of k of 256 tokens is an eighth of a 1 MB L2 cache; of a tile and two panels, half of the L1 cache.
  constexpr std::size_t most_tokens = 256;
  constexpr std::size_t most_panels = 8;
  constexpr std::size_t block_depth = 256;
  const std::size_t tokens = x.cols;
  const std::size_t threads = pool == nullptr ? 1 : static_cast<std::size_t>(pool->threads());
  // Tiles of equal height; the last one is filled up with tokens of zeros, which nobody asks for afterwards. So of the
  // heights that are fast, the one that needs the fewest.
  std::size_t height = std::min(tokens, kernels.bf16_tile_rows);
  if (height > 2) height = round_up(height, 2);
  for (std::size_t h = height - 2; height >= 8 && h >= 8 && tokens > height; h -= 2)
    if (round_up(tokens, h) < round_up(tokens, height)) height = h;
  const std::size_t padded = round_up(tokens, height);
  // One low tile: what counts is reading the weights, in long runs.
  const bool few = padded == height && height <= 6;
  const std::size_t depth = few ? std::max(w.k_padded, std::size_t{1}) : block_depth;
  const std::size_t chunk = few ? std::min<std::size_t>(ceil_div(panels, threads > 1 ? 2 * threads : 1), 128)
                                : std::min(panels, most_panels);
  const std::size_t block = std::min(padded, round_up(ceil_div(padded, ceil_div(padded, most_tokens)), height));
  const std::size_t panel_tasks = ceil_div(panels, chunk);
  const std::size_t token_tasks = ceil_div(padded, block);

  ScratchPlan plan;
  const std::size_t x_at = plan.add(checked_mul(padded, w.k_padded / 2, "activations"), sizeof(std::uint32_t));
  const std::size_t per_thread = round_up(block * chunk * panel_width, 16);
  const std::size_t acc_at = plan.add(threads * per_thread, sizeof(float));
  const std::size_t w_at = plan.add(dense == nullptr ? 0 : panels, w.panel_bytes);
  std::uint8_t* scratch = workspace.take(plan.total());
  std::uint32_t* pairs = reinterpret_cast<std::uint32_t*>(scratch + x_at);
  float* sums = reinterpret_cast<float*>(scratch + acc_at);

  // Activations by blocks of depth, then tiles of tokens, then [pair of k][token].
  // Where all of k is one block, the pairs of each 256 go on where the ones before end.
  pack_bf16_pairs(kernels, x, true, height, w.k_padded, pool, [&](std::size_t tile, std::size_t k) {
    const std::size_t k0 = k / block_depth * block_depth;
    const std::size_t count = std::min(block_depth, w.k_padded - k0);
    return pairs + k0 / 2 * padded + tile * height * (count / 2) + (k - k0) / 2 * height;
  });
  if (dense != nullptr) {
    w.codes = scratch + w_at;
    pack_bf16_pairs(kernels, *dense, false, panel_width, w.k_padded, pool, [&](std::size_t panel, std::size_t k) {
      return reinterpret_cast<std::uint32_t*>(scratch + w_at + panel * w.panel_bytes) + k / 2 * panel_width;
    });
  }

  for_tasks(pool, panel_tasks * token_tasks, [&](std::size_t task, std::size_t thread) {
    Bf16GemmArgs args;
    args.w = w;
    args.panel_begin = task % panel_tasks * chunk;
    args.panel_end = std::min(args.panel_begin + chunk, panels);
    const std::size_t token = task / panel_tasks * block;
    args.rows = std::min(block, padded - token);
    args.tile_rows = height;
    args.acc = sums + thread * per_thread;
    args.acc_stride = (args.panel_end - args.panel_begin) * panel_width;
    if (w.k_padded == 0) std::memset(args.acc, 0, args.rows * args.acc_stride * sizeof(float));
    for (args.k_begin = 0; args.k_begin < w.k_padded; args.k_begin = args.k_end) {
      args.k_end = std::min(args.k_begin + depth, w.k_padded);
      const std::size_t count = (args.k_end - args.k_begin) / 2;
      args.x = pairs + args.k_begin / 2 * padded + token * count;
      args.x_tile_stride = height * count;
      args.accumulate = args.k_begin != 0;
      kernels.gemm_bf16(args);
    }
    const std::size_t channel = args.panel_begin * panel_width;
    finish_tile(kernels, args.acc, args.acc_stride, token, std::min(args.rows, tokens - token), channel,
                std::min(args.panel_end * panel_width, w.n) - channel, nullptr, nullptr, nullptr, epilogue, out);
  });
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
