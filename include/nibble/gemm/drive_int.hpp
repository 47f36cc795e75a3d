// Plans and runs integer products: tasks of panels, blocks of tokens, epilogue on each tile while it is in cache.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "nibble/gemm/activations.hpp"
#include "nibble/gemm/epilogue.hpp"
#include "nibble/gemm/expand.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/workspace.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// Where outputs go: exactly one of the pointers is set. Column t (one token) starts at pointer + t * stride.
struct Output {
  float* floats = nullptr;
  std::int8_t* codes = nullptr;
  std::int32_t* raw = nullptr;
  std::size_t stride = 0;
  float scale = 1.0F;  // of codes
  std::int32_t zero = 0;
};

/// `ops` moved to the tile that starts at (row, channel).
inline void shift_ops(const Epilogue& epilogue, std::size_t row, std::size_t channel,
                      std::array<EpilogueOp, Epilogue::max_steps>& ops) noexcept {
  for (std::size_t i = 0; i < epilogue.steps(); ++i) {
    ops[i] = epilogue.op(i);
    if (ops[i].data != nullptr) ops[i].data += row * ops[i].stride + channel;
  }
}

/// Finishes one tile of accumulators.
inline void finish_tile(const KernelTable& kernels, const float* acc, std::size_t acc_stride, std::size_t row,
                        std::size_t rows, std::size_t channel, std::size_t channels, const float* row_scales,
                        const float* row_zeros, const float* channel_sums, const Epilogue& epilogue,
                        const Output& out) noexcept {
  std::array<EpilogueOp, Epilogue::max_steps> ops;
  shift_ops(epilogue, row, channel, ops);
  EpilogueArgs args;
  args.acc = acc;
  args.acc_stride = acc_stride;
  args.rows = rows;
  args.cols = channels;
  args.row_scales = row_scales == nullptr ? nullptr : row_scales + row;
  args.row_zeros = row_zeros == nullptr ? nullptr : row_zeros + row;
  args.channel_sums = channel_sums == nullptr ? nullptr : channel_sums + channel;
  args.ops = ops.data();
  args.op_count = epilogue.steps();
  args.out = out.floats == nullptr ? nullptr : out.floats + row * out.stride + channel;
  args.out_int8 = out.codes == nullptr ? nullptr : out.codes + row * out.stride + channel;
  args.out_stride = out.stride;
  args.out_scale = out.scale;
  args.out_zero = out.zero;
  kernels.epilogue(args);
}

/// What stands for "no shift makes these groups fit".
inline constexpr unsigned no_group_shift = 64;

/// IntGemmArgs::group_shift for activations in groups of `group` inputs: 2^shift of them make one of the weights'.
inline unsigned activation_group_shift(const PackedMatrix& w, std::size_t group) noexcept {
  if (w.groups() <= 1) return 63;
  for (unsigned shift = 0; shift < 16; ++shift)
    if (group << shift == w.group_size()) return shift;
  return no_group_shift;
}

/// One product of packed integer weights with quantized activations, cut into independent tasks: a range of panels
/// with all the tokens of a range. No task splits k, so bits depend neither on the tasks nor on who runs them.
class IntJob {
 public:
  IntJob() = default;
  IntJob(const KernelTable& kernels, const PackedMatrix& w, const ActivationView& x, const Epilogue& epilogue,
         const Output& out, std::size_t threads)
      : kernels_(&kernels), w_(&w), view_(w.view()), x_(x), epilogue_(&epilogue), out_(out) {
    if (x.group_size != 0) {
      group_shift_ = activation_group_shift(w, x.group_size);
      view_.group_size = x.group_size;
      view_.groups = x.groups;
    }
    finished_ = out.floats != nullptr && x.group_size != 0 && x.zeros == nullptr && epilogue.steps() == 0;
    const std::size_t panels = w.panels();
    block_ = std::min(x.tokens, max_block);
    // A tile of accumulators fits the L1 cache beside what feeds it.
    std::size_t widest = std::max<std::size_t>(kernels.int_panels, tile_floats / (block_ * panel_width));
    // What is expanded stays in the second-level cache for all the tokens of a task.
    expands_ = view_.groups != 0 && needs_expansion(kernels, view_.format, block_);
    if (expands_)
      widest = std::clamp<std::size_t>(expanded_bytes / expanded_panel_bytes(view_), kernels.int_panels, widest);
    const std::size_t rounds = ceil_div(panels, widest * threads);
    chunk_ = ceil_div(panels, rounds * threads);
    if (chunk_ > kernels.int_panels) chunk_ = std::min(round_up(chunk_, kernels.int_panels), widest);
    panel_tasks_ = ceil_div(panels, chunk_);
    // Narrow outputs of many tokens leave threads idle unless the tokens are shared out as well.
    token_tasks_ = 1;
    if (panel_tasks_ < 2 * threads && threads > 1)
      token_tasks_ = std::min(ceil_div(x.tokens, max_block), ceil_div(2 * threads, panel_tasks_));
    tokens_a_task_ = round_up(ceil_div(x.tokens, token_tasks_), block_);
    token_tasks_ = ceil_div(x.tokens, tokens_a_task_);
  }

  std::size_t tasks() const noexcept { return panel_tasks_ * token_tasks_; }
  /// Floats of scratch that a task needs for itself: a tile of sums, then panels that are expanded.
  std::size_t tile_size() const noexcept {
    return sums_tile() + (expands_ ? chunk_ * expanded_panel_bytes(view_) / sizeof(float) : 0);
  }
  /// int32 that the group sums take, shared by all tasks; 0 where the activations bring them.
  std::size_t sums_size() const noexcept { return brings_sums() ? 0 : x_.tokens * view_.groups; }

  /// Sums of the activations over the weights' groups; before any task.
  void sum_groups(std::int32_t* sums) noexcept {
    sums_ = brings_sums() ? x_.group_sums : sums;
    if (brings_sums()) return;
    const std::size_t blocks = x_.stride / 16;
    for (std::size_t t = 0; t < x_.tokens; ++t) {
      const std::int32_t* in = x_.block_sums + t * blocks;
      for (std::size_t g = 0; g < view_.groups; ++g) {
        const std::size_t begin = g * view_.group_size;
        const std::size_t end = std::min(begin + view_.group_size, view_.k);
        // Four chains: the compiler may not take any, and a sum over the whole of k is long.
        std::int32_t sum[4] = {0, 0, 0, 0};
        std::size_t b = begin / 16;
        const std::size_t stop = ceil_div(end, 16);
        for (; b + 4 <= stop; b += 4)
          for (std::size_t i = 0; i < 4; ++i) sum[i] += in[b + i];
        for (; b < stop; ++b) sum[0] += in[b];
        sums[t * view_.groups + g] = sum[0] + sum[1] + sum[2] + sum[3];
      }
    }
  }

  void run(std::size_t task, float* tile) const noexcept {
    const std::size_t panel_begin = task % panel_tasks_ * chunk_;
    const std::size_t panel_end = std::min(panel_begin + chunk_, w_->panels());
    const std::size_t token_begin = task / panel_tasks_ * tokens_a_task_;
    const std::size_t token_end = std::min(token_begin + tokens_a_task_, x_.tokens);
    const std::size_t channel = panel_begin * panel_width;
    const std::size_t channels = std::min(panel_end * panel_width, view_.n) - channel;
    auto* const room = reinterpret_cast<std::uint8_t*>(tile + sums_tile());
    if (expands_) expand_panels(*kernels_, view_, panel_begin, panel_end, room);
    for (std::size_t t = token_begin; t < token_end; t += block_) {
      IntGemmArgs args;
      args.w = view_;
      args.panel_begin = panel_begin;
      args.panel_end = panel_end;
      args.group_shift = group_shift_;
      args.x = x_.codes + t * x_.stride;
      args.x_stride = x_.stride;
      args.x_sums = sums_ + t * view_.groups;
      args.sums_stride = view_.groups;
      if (x_.group_size != 0) args.x_scales = x_.scales + t * view_.groups;
      args.rows = std::min(block_, token_end - t);
      // Nothing is left to be done to the sums: the kernel puts them where they belong.
      const bool direct = finished_ && channels == (panel_end - panel_begin) * panel_width;
      args.acc = direct ? out_.floats + t * out_.stride + channel : tile;
      args.acc_stride = direct ? out_.stride : (panel_end - panel_begin) * panel_width;
      if (out_.raw != nullptr) args.raw = reinterpret_cast<std::int32_t*>(tile);
      if (view_.groups == 0)  // k is 0: the sums are empty
        for (std::size_t r = 0; r < args.rows; ++r)
          std::memset(args.acc + r * args.acc_stride, 0, (panel_end - panel_begin) * panel_width * sizeof(float));
      else if (expands_)
        int_kernel(*kernels_, expanded_format(view_.format))(on_expanded(args, room));
      else if (is_bit_stream(view_.format))
        kernels_->gemm_bits(args);
      else
        int_kernel(*kernels_, view_.format)(args);
      if (direct) continue;
      if (out_.raw != nullptr) {
        for (std::size_t r = 0; r < args.rows; ++r)
          std::memcpy(out_.raw + (t + r) * out_.stride + channel, args.raw + r * args.acc_stride,
                      channels * sizeof(std::int32_t));
        continue;
      }
      finish_tile(*kernels_, tile, args.acc_stride, t, args.rows, channel, channels,
                  x_.group_size == 0 ? x_.scales : nullptr, x_.zeros, w_->channel_sums().as<float>(), *epilogue_,
                  out_);
    }
  }

 private:
  std::size_t sums_tile() const noexcept { return round_up(block_ * chunk_ * panel_width, 16); }
  bool brings_sums() const noexcept { return view_.group_size == x_.sum_group; }

  static constexpr std::size_t max_block = 64;
  static constexpr std::size_t tile_floats = 8192;
  static constexpr std::size_t expanded_bytes = 262144;

  const KernelTable* kernels_ = nullptr;
  const PackedMatrix* w_ = nullptr;
  PanelView view_;
  ActivationView x_;
  const Epilogue* epilogue_ = nullptr;
  Output out_;
  const std::int32_t* sums_ = nullptr;
  unsigned group_shift_ = 0;
  bool finished_ = false;  // the kernel's sums are the outputs
  bool expands_ = false;   // the weights' codes first
  std::size_t block_ = 0;
  std::size_t chunk_ = 0;
  std::size_t panel_tasks_ = 0;
  std::size_t token_tasks_ = 0;
  std::size_t tokens_a_task_ = 0;
};

/// Runs up to a handful of jobs as one parallel region.
inline void run_jobs(IntJob* jobs, std::size_t count, ThreadPool* pool, Workspace& workspace) {
  const std::size_t threads = pool == nullptr ? 1 : static_cast<std::size_t>(pool->threads());
  std::size_t tasks = 0;
  std::size_t tile = 0;
  std::size_t sums = 0;
  for (std::size_t j = 0; j < count; ++j) {
    tasks += jobs[j].tasks();
    tile = std::max(tile, jobs[j].tile_size());
    sums += jobs[j].sums_size();
  }
  ScratchPlan plan;
  tile = round_up(tile, 16);
  const std::size_t tiles_at = plan.add(threads * tile, sizeof(float));
  const std::size_t sums_at = plan.add(sums, sizeof(std::int32_t));
  std::uint8_t* scratch = workspace.take(plan.total());
  float* tiles = reinterpret_cast<float*>(scratch + tiles_at);
  std::int32_t* next_sums = reinterpret_cast<std::int32_t*>(scratch + sums_at);
  for (std::size_t j = 0; j < count; ++j) {
    jobs[j].sum_groups(next_sums);
    next_sums += jobs[j].sums_size();
  }
  for_tasks(pool, tasks, [&](std::size_t t, std::size_t thread) {
    std::size_t j = 0;
    while (t >= jobs[j].tasks()) t -= jobs[j++].tasks();
    jobs[j].run(t, tiles + thread * tile);
  });
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
