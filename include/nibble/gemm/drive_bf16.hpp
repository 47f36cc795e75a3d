// Plans and runs products of bf16 weights with activations rounded to bf16.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/drive_int.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/gemm/workspace.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// outputs x tokens = w * bf16(x), x's columns contiguous. Tasks are (panels, block of tokens); k runs from 0 up within
/// each, so bits depend on nothing but the values.
inline void run_bf16(const KernelTable& kernels, const PanelView& w, std::size_t panels, const FloatView& x,
                     const Epilogue& epilogue, const Output& out, ThreadPool* pool, Workspace& workspace) {
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
  std::uint8_t* scratch = workspace.take(plan.total());
  std::uint32_t* pairs = reinterpret_cast<std::uint32_t*>(scratch + x_at);
  float* sums = reinterpret_cast<float*>(scratch + acc_at);

  // Activations by blocks of depth, then tiles of tokens, then [pair of k][token].
  for_tasks(pool, padded / height, [&](std::size_t tile, std::size_t) {
    const std::size_t first = tile * height;
    const std::size_t rows = std::min(height, tokens - first);
    for (std::size_t r = 0; r < height; ++r) {
      for (std::size_t k0 = 0; k0 < w.k_padded; k0 += block_depth) {
        const std::size_t count = std::min(block_depth, w.k_padded - k0);
        const std::size_t here = r < rows ? std::min(count, w.k - k0) : 0;
        std::uint16_t row[block_depth];
        if (here != 0) kernels.bf16_from_float(x.data + (first + r) * x.col_stride + k0, here, row);
        std::memset(row + here, 0, (count - here) * sizeof(std::uint16_t));
        // Where all of k is one block, these pairs go on where the ones before end.
        std::uint32_t* to = pairs + k0 / 2 * padded + first * (count / 2) + r;
        for (std::size_t u = 0; u < count / 2; ++u, to += height) std::memcpy(to, row + 2 * u, sizeof *to);
      }
    }
  });

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
