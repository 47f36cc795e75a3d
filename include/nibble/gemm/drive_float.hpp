// Plans and runs products with float activations: weights become fp32 panels a block of k at a time, whatever they
// were before.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if NIBBLE_X86
#include <xmmintrin.h>
#endif

#include "nibble/gemm/drive_int.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/gemm/workspace.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// Gives fp32 panels of a left operand: outputs in lanes, depth ascending. Writes
/// out[(p - begin) * stride + (k - k_begin) * 16 + lane] for panels [begin, end) and depth [k_begin, k_end); lanes beyond
/// the last output are 0. k_begin is a multiple of float_depth_block.
struct PanelSource {
  std::size_t outputs = 0;
  std::size_t depth = 0;
  const void* context = nullptr;
  void (*fill)(const void* context, const KernelTable& kernels, std::size_t begin, std::size_t end,
               std::size_t k_begin, std::size_t k_end, float* out, std::size_t stride) = nullptr;
  /// Where the panels lie in memory as they are wanted, [depth][16] each, ready_stride floats apart; else nullptr.
  const float* ready = nullptr;
  std::size_t ready_stride = 0;
  /// Where the bytes of packed weights lie, to be fetched ahead: panel p's k at codes + p * panel_bytes + k * k_bytes.
  const std::uint8_t* codes = nullptr;
  std::size_t panel_bytes = 0;
  std::size_t k_bytes = 0;
};

/// Depth of a block of fp32 panels: four of them and a tile of activations share the L1 cache. Panels that lie ready
/// are not written there and go in blocks of twice that.
inline constexpr std::size_t float_depth_block = 128;

inline PanelSource packed_source(const PanelView& w) {
  // A file's bytes may lie anywhere; floats are read in place where they are aligned as floats.
  const bool ready = w.format == Format::fp32 && reinterpret_cast<std::uintptr_t>(w.codes) % alignof(float) == 0;
  return {w.n,
          w.k,
          &w,
          [](const void* context, const KernelTable& kernels, std::size_t begin, std::size_t end,
             std::size_t k_begin, std::size_t k_end, float* out, std::size_t stride) {
            kernels.unpack({*static_cast<const PanelView*>(context), begin, end, k_begin, k_end, out, stride});
          },
          ready ? reinterpret_cast<const float*>(w.codes) : nullptr,
          w.panel_bytes / sizeof(float),
          w.codes,
          w.panel_bytes,
          panel_width * bits_of(w.format) / 8};
}

/// W^T: the outputs are w's inputs, the depth its channels.
inline PanelSource transposed_source(const PanelView& w) {
  return {
      w.k, w.n, &w,
      [](const void* context, const KernelTable& kernels, std::size_t begin, std::size_t end, std::size_t n_begin,
         std::size_t n_end, float* out, std::size_t stride) {
        const PanelView& view = *static_cast<const PanelView*>(context);
        alignas(64) float block[panel_width * panel_width];
        for (std::size_t p = begin; p < end; ++p) {
          const std::size_t k_begin = p * panel_width;
          const std::size_t width = std::min(panel_width, view.k - k_begin);
          for (std::size_t n = n_begin; n < n_end; n += panel_width) {
            const std::size_t source = n / panel_width;
            kernels.unpack({view, source, source + 1, k_begin, k_begin + width, block, panel_width * panel_width});
            const std::size_t height = std::min(panel_width, n_end - n);
            float* to = out + (p - begin) * stride + (n - n_begin) * panel_width;
            for (std::size_t i = 0; i < height; ++i)
              for (std::size_t j = 0; j < panel_width; ++j)
                to[i * panel_width + j] = j < width ? block[j * panel_width + i] : 0.0F;
          }
        }
      }};
}

/// out[k * rows + r] = in[r * stride + k] for k < count; up to 16 rows.
inline void interleave_rows(const float* in, std::size_t stride, std::size_t rows, std::size_t count, float* out) {
  std::size_t k = 0;
#if NIBBLE_X86
  // Blocks of 4 x 4. Rows are often a power of two apart and share cache sets: a line of each is used at once.
  for (; rows % 4 == 0 && k + 16 <= count; k += 16)
    for (std::size_t r = 0; r < rows; r += 4) {
      for (std::size_t i = 0; i < 4; ++i)
        __builtin_prefetch(
            reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(in + (r + i) * stride + k) + 512));
      for (std::size_t i = k; i < k + 16; i += 4) {
        const float* at = in + r * stride + i;
        __m128 a = _mm_loadu_ps(at);
        __m128 b = _mm_loadu_ps(at + stride);
        __m128 c = _mm_loadu_ps(at + 2 * stride);
        __m128 d = _mm_loadu_ps(at + 3 * stride);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        float* to = out + i * rows + r;
        _mm_storeu_ps(to, a);
        _mm_storeu_ps(to + rows, b);
        _mm_storeu_ps(to + 2 * rows, c);
        _mm_storeu_ps(to + 3 * rows, d);
      }
    }
#endif
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t i = k; i < count; ++i) out[i * rows + r] = in[r * stride + i];
}

/// Tiles of `height` tokens that are consecutive in memory, tokens [begin, end), those from `real` on zeros:
/// out[first * count + k * rows + r] = in[k * stride + first + r] for the `rows` tokens of the tile that starts at `first`.
inline void interleave_columns(const float* in, std::size_t stride, std::size_t begin, std::size_t end,
                               std::size_t real, std::size_t height, std::size_t count, float* out) {
  for (std::size_t k = 0; k < count; ++k) {
    const float* from = in + k * stride;
    for (std::size_t t = begin; t < end; t += 16)
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(from) +
                                                       (8 * stride + t) * sizeof(float)));
    for (std::size_t first = begin; first < end; first += height) {
      const std::size_t rows = std::min(height, end - first);
      const std::size_t filled = std::min(rows, real - first);
      float* to = out + first * count + k * rows;
      std::size_t r = 0;
      for (; r + 4 <= filled; r += 4) std::memcpy(to + r, from + first + r, 4 * sizeof(float));
      for (; r < filled; ++r) to[r] = from[first + r];
      for (; r < rows; ++r) to[r] = 0.0F;
    }
  }
}

/// A dense matrix anywhere in memory.
inline PanelSource dense_source(const FloatView& a) {
  return {a.rows, a.cols, &a,
          [](const void* context, const KernelTable&, std::size_t begin, std::size_t end, std::size_t k_begin,
             std::size_t k_end, float* out, std::size_t stride) {
            const FloatView& view = *static_cast<const FloatView*>(context);
            const std::size_t row = begin * panel_width;
            const std::size_t height = std::min((end - begin) * panel_width, view.rows - row);
            const float* from = view.data + row * view.row_stride;
            const bool whole = height == (end - begin) * panel_width;
            if (view.row_stride == 1 && whole) {
              // Columns lie far apart: all of a column's part at once, and of one a few columns on.
              for (std::size_t k = k_begin; k < k_end; ++k) {
                const float* column = from + k * view.col_stride;
                for (std::size_t p = 0; p < end - begin; ++p) {
                  __builtin_prefetch(
                      reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(column) +
                                                    (16 * view.col_stride + p * panel_width) * sizeof(float)));
                  std::memcpy(out + p * stride + (k - k_begin) * panel_width, column + p * panel_width,
                              panel_width * sizeof(float));
                }
              }
              return;
            }
            for (std::size_t p = begin; p < end; ++p) {
              float* to = out + (p - begin) * stride;
              const std::size_t first = (p - begin) * panel_width;
              const float* rows = from + first * view.row_stride;
              if (view.col_stride == 1 && first + panel_width <= height) {
                interleave_rows(rows + k_begin, view.row_stride, panel_width, k_end - k_begin, to);
                continue;
              }
              std::memset(to, 0, (k_end - k_begin) * panel_width * sizeof(float));
              for (std::size_t j = 0; j < std::min(panel_width, height - first); ++j)
                for (std::size_t k = k_begin; k < k_end; ++k)
                  to[(k - k_begin) * panel_width + j] = rows[j * view.row_stride + k * view.col_stride];
            }
          }};
}

/// outputs x tokens = source (outputs x depth) * x (depth x tokens). Tasks are (panels, block of tokens); k runs from
/// 0 up within each, so bits depend on nothing but the values.
inline void run_float(const KernelTable& kernels, const PanelSource& source, const FloatView& x,
                      const Epilogue& epilogue, const Output& out, ThreadPool* pool, Workspace& workspace) {
  const std::size_t depth = source.depth;
  const std::size_t height = kernels.float_tile_rows;
  // A last tile of 3, 5, 7 or 11 rows is slower than one of a row more, which then is zeros that nobody asks for.
  const std::size_t rest = x.cols % height;
  const std::size_t tokens = x.cols + (rest % 2 == 1 && rest > 2 && rest != 9 ? 1 : 0);
  const std::size_t threads = pool == nullptr ? 1 : static_cast<std::size_t>(pool->threads());
  const std::size_t panels = ceil_div(source.outputs, panel_width);
  // Columns of a dense matrix want to be read in long runs; few tokens leave room for them in the cache.
  const bool dense = source.codes == nullptr;
  const std::size_t chunk = std::min(panels, kernels.float_panels * (dense && tokens <= 64 ? 4 : 1));
  // Blocks of about 256 tokens, whole tiles, nearly equal ones: more, and their sums leave the L2 cache.
  const std::size_t block = std::min(tokens, round_up(ceil_div(tokens, ceil_div(tokens, 256)), height));
  const std::size_t panel_tasks = ceil_div(panels, chunk);
  const std::size_t token_tasks = ceil_div(tokens, block);
  const std::size_t depth_block =
      std::min(depth, source.ready != nullptr ? 2 * float_depth_block : float_depth_block);

  ScratchPlan plan;
  const std::size_t x_at = plan.add(checked_mul(tokens, depth, "activations"), sizeof(float));
  const std::size_t per_thread = round_up(chunk * panel_width * depth_block + block * chunk * panel_width, 16);
  const std::size_t threads_at = plan.add(threads * per_thread, sizeof(float));
  std::uint8_t* scratch = workspace.take(plan.total());
  float* packed_x = reinterpret_cast<float*>(scratch + x_at);
  float* thread_scratch = reinterpret_cast<float*>(scratch + threads_at);

  // Activations by blocks of depth, then tiles of tokens, then [k][token]. Transposed ones lie along the tokens, and their next
  // k far away: some tiles at once, for a tile alone takes but a part of a cache line.
  const bool along_tokens = x.col_stride == 1 && x.row_stride != 1;
  const std::size_t packed_tokens = along_tokens ? 8 * height : height;
  for_tasks(pool, ceil_div(tokens, packed_tokens), [&](std::size_t task, std::size_t) {
    const std::size_t begin = task * packed_tokens;
    const std::size_t end = std::min(begin + packed_tokens, tokens);
    for (std::size_t k0 = 0; k0 < depth; k0 += depth_block) {
      const std::size_t count = std::min(depth_block, depth - k0);
      if (along_tokens) {
        interleave_columns(x.data + k0 * x.row_stride, x.row_stride, begin, end, x.cols, height, count,
                           packed_x + k0 * tokens);
        continue;
      }
      const std::size_t rows = end - begin;
      float* to = packed_x + k0 * tokens + begin * count;
      const float* from = x.data + k0 * x.row_stride + begin * x.col_stride;
      const std::size_t real = std::min(rows, x.cols - begin);
      if (x.row_stride == 1 && real == rows) {
        interleave_rows(from, x.col_stride, rows, count, to);
        continue;
      }
      for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t k = 0; k < count; ++k)
          to[k * rows + r] = r < real ? from[k * x.row_stride + r * x.col_stride] : 0.0F;
    }
  });

  for_tasks(pool, panel_tasks * token_tasks, [&](std::size_t task, std::size_t thread) {
    const std::size_t begin = task % panel_tasks * chunk;
    const std::size_t end = std::min(begin + chunk, panels);
    const std::size_t token = task / panel_tasks * block;
    const std::size_t rows = std::min(block, tokens - token);
    float* fp32_panels = thread_scratch + thread * per_thread;
    float* acc = fp32_panels + chunk * panel_width * depth_block;
    const std::size_t acc_stride = (end - begin) * panel_width;
    if (depth == 0) std::memset(acc, 0, rows * acc_stride * sizeof(float));
    for (std::size_t k0 = 0; k0 < depth; k0 += depth_block) {
      const std::size_t count = std::min(depth_block, depth - k0);
      FloatGemmArgs args;
      if (source.ready != nullptr) {
        args.panels_data = source.ready + begin * source.ready_stride + k0 * panel_width;
        args.panel_stride = source.ready_stride;
      } else {
        source.fill(source.context, kernels, begin, end, k0, k0 + count, fp32_panels, panel_width * depth_block);
        args.panels_data = fp32_panels;
        args.panel_stride = panel_width * depth_block;
      }
      args.panels = end - begin;
      args.depth = count;
      args.x = packed_x + k0 * tokens + token * count;
      args.x_tile_stride = height * count;
      args.rows = rows;
      args.accumulate = k0 != 0;
      args.acc = acc;
      args.acc_stride = acc_stride;
      if (source.codes != nullptr) {
        // The same panels' next k, or after the last the panels that follow.
        const std::size_t next = k0 + count;
        args.fetch =
            reinterpret_cast<std::uintptr_t>(source.codes) +
            (next < depth ? begin * source.panel_bytes + next * source.k_bytes : end * source.panel_bytes);
        args.fetch_stride = source.panel_bytes;
        args.fetch_bytes = count * source.k_bytes;
      }
      kernels.gemm_float(args);
    }
    const std::size_t channel = begin * panel_width;
    finish_tile(kernels, acc, acc_stride, token, std::min(rows, x.cols - token), channel,
                std::min(end * panel_width, source.outputs) - channel, nullptr, nullptr, nullptr, epilogue, out);
  });
}

/// A few tokens: weights are dequantized in registers and read once.
inline void run_float_gemv(const KernelTable& kernels, const PanelView& w, std::size_t panels, const FloatView& x,
                           const Epilogue& epilogue, const Output& out, ThreadPool* pool, Workspace& workspace) {
  const std::size_t threads = pool == nullptr ? 1 : static_cast<std::size_t>(pool->threads());
  const std::size_t chunk = std::min<std::size_t>(ceil_div(panels, threads * (threads > 1 ? 2 : 1)), 128);
  const std::size_t per_thread = x.cols * chunk * panel_width;
  ScratchPlan plan;
  const std::size_t acc_at = plan.add(threads * per_thread, sizeof(float));
  float* scratch = reinterpret_cast<float*>(workspace.take(plan.total()) + acc_at);
  for_tasks(pool, ceil_div(panels, chunk), [&](std::size_t task, std::size_t thread) {
    FloatGemvArgs args;
    args.w = w;
    args.panel_begin = task * chunk;
    args.panel_end = std::min(args.panel_begin + chunk, panels);
    args.x = x.data;
    args.x_stride = x.col_stride;
    args.rows = x.cols;
    args.acc = scratch + thread * per_thread;
    args.acc_stride = (args.panel_end - args.panel_begin) * panel_width;
    kernels.gemv_float(args);
    const std::size_t channel = args.panel_begin * panel_width;
    finish_tile(kernels, args.acc, args.acc_stride, 0, args.rows, channel,
                std::min(args.panel_end * panel_width, w.n) - channel, nullptr, nullptr, nullptr, epilogue, out);
  });
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
