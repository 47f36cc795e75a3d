// Attention over KV caches: softmax(K^T q) V for any mixture of sequences, prompts and single tokens.
//
// A task is a block of one span's queries for one key-value head: the keys and values are read once for all query heads
// that share them. Where long tasks are fewer than threads (one sequence decodes), scores are cut by positions and
// values by dimensions instead, with a meeting between the two; no sum is ever cut.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/view.hpp"
#include "nibble/gemm/workspace.hpp"
#include "nibble/kernels/dispatch.hpp"
#include "nibble/nn/kv_cache.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Tokens of one sequence within a batch: columns [column, column + tokens) are its positions past, past + 1, ... Their
/// keys and values are in the cache (KvCache::store), though they need not count yet.
struct AttentionSpan {
  const KvCache* cache = nullptr;
  std::size_t column = 0;
  std::size_t tokens = 0;
  std::size_t past = 0;
};

/// How attention() runs; the results are the same bits.
struct AttentionOptions {
  ThreadPool* pool = nullptr;      ///< nullptr: the calling thread alone
  Workspace* workspace = nullptr;  ///< nullptr: one that the calling thread keeps
  std::optional<Isa> isa = {};     ///< empty: the best that the CPU and NIBBLE_MAX_ISA allow
};

namespace detail {

/// One call of attention(), from the plan to the outputs.
class AttentionRun {
 public:
  AttentionRun(const KernelTable& kernels, const AttentionSpan* spans, std::size_t count, std::size_t layer,
               const ConstMatrixRef& queries, MatrixRef& out)
      : kernels_(kernels), spans_(spans), count_(count), layer_(layer) {
    queries_ = queries.data();
    query_stride_ = static_cast<std::size_t>(queries.outerStride());
    out_ = out.data();
    out_stride_ = static_cast<std::size_t>(out.outerStride());
    head_size_ = spans[0].cache->options().head_size;
    kv_heads_ = spans[0].cache->options().kv_heads;
    shared_ = static_cast<std::size_t>(queries.rows()) / head_size_ / kv_heads_;
    for (std::size_t s = 0; s < count; ++s) {
      items_ += kv_heads_ * blocks_of(spans[s]);
      capacity_ = std::max(capacity_, spans[s].cache->capacity());
      any_int8_ = any_int8_ || spans[s].cache->format() == KvFormat::int8;
      any_int4_ = any_int4_ || spans[s].cache->format() == KvFormat::int4;
      for (std::size_t b = 0; b < blocks_of(spans[s]); ++b) {
        const Item item = item_at(s, 0, b);
        bytes_ += kv_heads_ * item.positions * head_size_ * 4;
      }
    }
  }

  void run(ThreadPool* pool, Workspace& workspace) {
    // Below this a second thread comes too late to help.
    constexpr std::size_t little = std::size_t{128} << 10;
    // From this on, cutting a task pays for the meeting in the middle, if threads would be idle: measured, three heads on
    // two threads take longer in pieces (int8, 4,000 positions: 68 us against 47).
    constexpr std::size_t much = std::size_t{512} << 10;
    std::size_t threads = pool == nullptr ? 1 : static_cast<std::size_t>(pool->threads());
    if (bytes_ < little || threads == 1) pool = nullptr, threads = 1;
    const bool split = threads > 1 && items_ < threads && bytes_ / items_ >= much;
    plan(split ? items_ : threads, threads, workspace);
    if (split)
      run_split(pool, threads);
    else
      for_tasks(pool, items_, [&](std::size_t task, std::size_t thread) {
        const Item item = list_[task];
        const Slot slot = slot_at(thread);
        prepare(item, slot);
        scores(item, slot, 0, ceil_div(item.positions, panel_width), thread);
        weigh(item, slot);
        values(item, slot, 0, ceil_div(head_size_, panel_width), thread);
      });
  }

 private:
  // Rows (queries times the heads that share keys) that a task likes: tiles of gemm_direct for floats, whose blocks cost
  // nothing else; more for the integer kernels, which load weights into registers for all rows.
  static constexpr std::size_t float_rows = 12;
  static constexpr std::size_t int_rows = 48;
  // Scores of one task, in floats: they stay in the second-level cache.
  static constexpr std::size_t score_floats = std::size_t{1} << 17;

  struct Item {
    std::uint32_t span = 0;
    std::uint32_t head = 0;
    std::size_t begin = 0;  // tokens of the span
    std::size_t end = 0;
    std::size_t positions = 0;  // that the last of them sees
  };
  /// Scratch of one task.
  struct Slot {
    float* queries;  // [rows][query_size_]
    float* scores;   // [rows][stride]
    float* sums;     // [rows]
    float* acc;      // [rows][padded head size]
    std::atomic<std::size_t>* chunks;
    // INT8: codes of the queries and of the weights, their scales and sums a group of 32
    std::int8_t* query_codes;
    float* query_scales;
    std::int32_t* query_sums;
    std::int8_t* codes;
    float* scales;
    std::int32_t* code_sums;
    std::int32_t* block_sums;
    // INT4: weights times the values' scales, [groups][rows][stride]; their sums of offsets, [groups][rows]
    float* scaled;
    float* offsets;
  };

  std::size_t rows_limit(std::size_t positions, KvFormat format) const noexcept {
    if (format != KvFormat::int8) return float_rows;
    return std::clamp(score_floats / score_stride(positions), float_rows, int_rows);
  }
  std::size_t block_tokens(const AttentionSpan& s) const noexcept {
    // 0 times what is not finite is not 0: then nobody may look at the tokens behind.
    if (s.cache->exceptional()) return 1;
    return std::max<std::size_t>(1, rows_limit(s.past + s.tokens, s.cache->format()) / shared_);
  }
  std::size_t blocks_of(const AttentionSpan& s) const noexcept { return ceil_div(s.tokens, block_tokens(s)); }
  Item item_at(std::size_t span, std::size_t head, std::size_t block) const noexcept {
    const AttentionSpan& s = spans_[span];
    const std::size_t tokens = block_tokens(s);
    Item item;
    item.span = static_cast<std::uint32_t>(span);
    item.head = static_cast<std::uint32_t>(head);
    item.begin = block * tokens;
    item.end = std::min(item.begin + tokens, s.tokens);
    item.positions = s.past + item.end;
    return item;
  }

  /// Floats from one row of scores to the next: whole groups, an odd number of cache lines.
  static std::size_t score_stride(std::size_t positions) noexcept { return round_up(positions, kv_group) + 16; }

  void plan(std::size_t slots, std::size_t threads, Workspace& workspace) {
    // For the whole of the capacity, so that a growing context asks for no more memory.
    const std::size_t stride = score_stride(capacity_);
    const std::size_t rows = std::max(any_int8_ ? int_rows : float_rows, shared_);
    const std::size_t least = std::max(float_rows, shared_);
    const std::size_t floats = std::min(rows * stride, std::max(score_floats + 16 * rows, least * stride));
    query_size_ = round_up(head_size_, 64);
    query_groups_ = ceil_div(head_size_, kv_group);
    dims_ = round_up(head_size_, panel_width);
    ScratchPlan slot;
    const std::size_t integers = any_int8_ ? 1 : 0;
    at_.queries = slot.add(rows * query_size_, sizeof(float));
    at_.scores = slot.add(floats, sizeof(float));
    at_.sums = slot.add(rows, sizeof(float));
    at_.acc = slot.add(rows * dims_, sizeof(float));
    at_.chunks = slot.add(1, sizeof(std::atomic<std::size_t>));
    at_.query_codes = slot.add(integers * rows, query_size_);
    at_.query_scales = slot.add(integers * rows * query_groups_, sizeof(float));
    at_.query_sums = slot.add(integers * rows * query_groups_, sizeof(std::int32_t));
    at_.codes = slot.add(integers, floats);
    at_.scales = slot.add(integers * ceil_div(floats, kv_group), sizeof(float));
    at_.code_sums = slot.add(integers * ceil_div(floats, kv_group), sizeof(std::int32_t));
    const std::size_t blocks = any_int4_ ? 1 : 0;
    value_groups_ = ceil_div(head_size_, kv_value_group);
    at_.scaled = slot.add(blocks * value_groups_ * floats, sizeof(float));
    at_.offsets = slot.add(blocks * value_groups_ * rows, sizeof(float));
    at_.block_sums = slot.add(integers * ceil_div(std::max(stride, query_size_), 16), sizeof(std::int32_t));
    slot_bytes_ = slot.total();
    ScratchPlan all;
    const std::size_t list_at = all.add(items_, sizeof(Item));
    const std::size_t ones_at = all.add(integers * dims_, sizeof(float));
    const std::size_t slots_at = all.add(slots, slot_bytes_);
    // A thread's: queries times a block's scales, scores of offsets, outputs of the open block.
    thread_floats_ = rows * (query_size_ + panel_width) + std::max(dims_, query_size_) + rows * dims_;
    const std::size_t threads_at = all.add(blocks * threads * thread_floats_, sizeof(float));
    std::uint8_t* scratch = workspace.take(all.total());
    slots_ = scratch + slots_at;
    thread_scratch_ = reinterpret_cast<float*>(scratch + threads_at);
    ones_ = reinterpret_cast<float*>(scratch + ones_at);
    std::fill(ones_, ones_ + integers * dims_, 1.0F);

    // Head by head, so that keys and values are still in a cache; the longest tasks first, so that threads end together.
    list_ = reinterpret_cast<Item*>(scratch + list_at);
    std::size_t i = 0;
    for (std::size_t s = 0; s < count_; ++s)
      for (std::size_t h = 0; h < kv_heads_; ++h)
        for (std::size_t b = blocks_of(spans_[s]); b-- > 0;) new (list_ + i++) Item(item_at(s, h, b));
    if (count_ > 1)
      std::sort(list_, list_ + items_, [](const Item& a, const Item& b) { return a.positions > b.positions; });
  }

  Slot slot_at(std::size_t i) const noexcept {
    std::uint8_t* base = slots_ + i * slot_bytes_;
    const auto floats = [&](std::size_t at) { return reinterpret_cast<float*>(base + at); };
    const auto integers = [&](std::size_t at) { return reinterpret_cast<std::int32_t*>(base + at); };
    const auto codes = [&](std::size_t at) { return reinterpret_cast<std::int8_t*>(base + at); };
    return {floats(at_.queries),
            floats(at_.scores),
            floats(at_.sums),
            floats(at_.acc),
            reinterpret_cast<std::atomic<std::size_t>*>(base + at_.chunks),
            codes(at_.query_codes),
            floats(at_.query_scales),
            integers(at_.query_sums),
            codes(at_.codes),
            floats(at_.scales),
            integers(at_.code_sums),
            integers(at_.block_sums),
            floats(at_.scaled),
            floats(at_.offsets)};
  }

  void run_split(ThreadPool* pool, std::size_t threads) {
    // Scores in many parts, so that threads end together; values in few, for a part of them reads that many streams.
    const std::size_t parts = ceil_div(8 * threads, items_);
    const std::size_t panels_of_values = ceil_div(head_size_, panel_width);
    const std::size_t value_parts = std::min(ceil_div(2 * threads, items_), panels_of_values);
    for (std::size_t i = 0; i < items_; ++i) {
      const Slot slot = slot_at(i);
      new (slot.chunks) std::atomic<std::size_t>(parts);
      prepare(list_[i], slot);
    }
    for_tasks(pool, items_ * parts, [&](std::size_t task, std::size_t thread) {
      const Item item = list_[task / parts];
      const Slot slot = slot_at(task / parts);
      const std::size_t panels = ceil_div(item.positions, panel_width);
      const auto cut = [&](std::size_t part) { return std::min(panels, round_up(panels * part / parts, 4)); };
      scores(item, slot, cut(task % parts), cut(task % parts + 1), thread);
      // Whoever ends last has all scores.
      if (slot.chunks->fetch_sub(1, std::memory_order_acq_rel) == 1) weigh(item, slot);
    });
    for_tasks(pool, items_ * value_parts, [&](std::size_t task, std::size_t thread) {
      const std::size_t part = task % value_parts;
      values(list_[task / value_parts], slot_at(task / value_parts), panels_of_values * part / value_parts,
             panels_of_values * (part + 1) / value_parts, thread);
    });
  }

  const KvCache& cache_of(const Item& item) const noexcept { return *spans_[item.span].cache; }
  std::size_t rows_of(const Item& item) const noexcept { return (item.end - item.begin) * shared_; }

  /// Codes of `rows` rows of `n` floats (n a multiple of 16 or shorter than a group) in groups of 32, their scales and sums.
  void quantize(const float* x, std::size_t x_stride, std::size_t rows, std::size_t n, std::size_t groups,
                std::int8_t* codes, std::size_t code_stride, float* scales, std::int32_t* sums,
                std::int32_t* block_sums) const noexcept {
    const std::size_t full = n / kv_group, rest = n % kv_group;
    for (std::size_t r = 0; r < rows; ++r) {
      QuantizeRowsArgs args;
      args.x = x + r * x_stride;
      args.x_stride = kv_group;
      args.rows = full;
      args.k = kv_group;
      args.q = codes + r * code_stride;
      args.q_stride = kv_group;
      args.scales = scales + r * groups;
      kernels_.quantize_rows(args);
      if (rest != 0) {
        args.x += full * kv_group;
        args.rows = 1;
        args.k = rest;
        args.q += full * kv_group;
        args.q_stride = kv_group;
        args.scales += full;
        kernels_.quantize_rows(args);
      }
      kernels_.block_sums(codes + r * code_stride, groups * kv_group, block_sums);
      for (std::size_t g = 0; g < groups; ++g) sums[r * groups + g] = block_sums[2 * g] + block_sums[2 * g + 1];
    }
  }

  /// The item's queries to its scratch, a row a query and head.
  void prepare(const Item& item, const Slot& slot) const noexcept {
    const AttentionSpan& s = spans_[item.span];
    const std::size_t first = item.head * shared_ * head_size_;
    float* to = slot.queries;
    for (std::size_t t = item.begin; t < item.end; ++t) {
      const float* from = queries_ + (s.column + t) * query_stride_ + first;
      for (std::size_t j = 0; j < shared_; ++j, to += query_size_)
        std::memcpy(to, from + j * head_size_, head_size_ * sizeof(float));
    }
    if (s.cache->format() == KvFormat::int8)
      quantize(slot.queries, query_size_, rows_of(item), head_size_, query_groups_, slot.query_codes, query_size_,
               slot.query_scales, slot.query_sums, slot.block_sums);
  }

  /// INT4: position of the first token of the item, and of its token t.
  std::size_t position_of(const Item& item, std::size_t t) const noexcept {
    return spans_[item.span].past + item.begin + t;
  }
  /// The first position of the block that is still open for the token at position p: what is before are codes.
  static std::size_t open_from(std::size_t p) noexcept { return (p + 1) / kv_group * kv_group; }
  /// panels [0, panels) of w times rows, a few at once.
  void gemv(FloatGemvArgs args, std::size_t panels, std::size_t rows) const noexcept {
    args.panel_begin = 0;
    args.panel_end = panels;
    for (std::size_t r = 0; r < rows; r += args.rows) {
      args.rows = std::min(rows - r, kernels_.gemv_max_rows);
      kernels_.gemv_float(args);
      args.x += args.rows * args.x_stride;
      args.acc += args.rows * args.acc_stride;
    }
  }

  /// scores() of INT4 keys. Codes: the block's scales go into the queries, its offsets are products of their own. What
  /// is still open for a token is fp16.
  void scores_int4(const Item& item, const Slot& slot, std::size_t begin, std::size_t end,
                   std::size_t thread) const noexcept {
    const KvBlocks b = cache_of(item).blocks(layer_, item.head);
    const std::size_t stride = score_stride(item.positions), rows = rows_of(item), tokens = item.end - item.begin;
    constexpr std::size_t panels = kv_group / panel_width;
    float* scaled = thread_scratch_ + thread * thread_floats_;
    float* offsets = scaled + rows * query_size_;
    float* scales = offsets + rows * panel_width;
    const std::size_t closed = open_from(position_of(item, tokens - 1)) / kv_group;
    for (std::size_t block = begin / panels; block < std::min(closed, ceil_div(end, panels)); ++block) {
      if (block == begin / panels || block % panel_width == 0) {
        FloatGemvArgs args;
        args.w = b.key_offsets;
        args.panel_begin = block / panel_width;
        args.panel_end = args.panel_begin + 1;
        args.x = slot.queries;
        args.x_stride = query_size_;
        args.rows = rows;
        args.acc = offsets;
        args.acc_stride = panel_width;
        kernels_.gemm_direct(args);
      }
      kernels_.float_from_fp16(b.key_scales + block * head_size_, head_size_, scales);
      for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t d = 0; d < head_size_; ++d)
          scaled[r * query_size_ + d] = slot.queries[r * query_size_ + d] * scales[d];
      FloatGemvArgs args;
      args.w = b.keys;
      args.w.codes += block * panels * b.keys.panel_bytes;
      args.w.n = kv_group;
      args.x = scaled;
      args.x_stride = query_size_;
      args.acc = slot.scores + block * kv_group;
      args.acc_stride = stride;
      gemv(args, panels, rows);
      for (std::size_t r = 0; r < rows; ++r) {
        float* row = args.acc + r * stride;
        const float offset = offsets[r * panel_width + block % panel_width];
        for (std::size_t i = 0; i < kv_group; ++i) row[i] += offset;
      }
    }
    for (std::size_t t = 0; t < tokens; ++t) {
      const std::size_t p = position_of(item, t), open = open_from(p);
      // What the token sees of it; the rest is not read.
      const std::size_t first = std::max(open / panel_width, begin);
      const std::size_t last = std::min(p / panel_width + 1, end);
      if (first >= last) continue;
      FloatGemvArgs args;
      args.w = b.recent_keys;
      args.panel_begin = first * panel_width % b.ring / panel_width;
      args.panel_end = args.panel_begin + (last - first);
      args.x = slot.queries + t * shared_ * query_size_;
      args.x_stride = query_size_;
      args.rows = shared_;
      args.acc = slot.scores + t * shared_ * stride + first * panel_width;
      args.acc_stride = stride;
      kernels_.gemm_direct(args);
    }
  }

  /// weigh() of INT4 values: also the weights times the values' scales, and the sums of weights times offsets.
  void weigh_int4(const Item& item, const Slot& slot) const noexcept {
    const KvBlocks b = cache_of(item).blocks(layer_, item.head);
    const std::size_t stride = score_stride(item.positions), rows = rows_of(item);
    const std::size_t closed = open_from(item.positions - 1);
    for (std::size_t g = 0; g < b.groups; ++g) {
      const float* scales = b.value_scales + g * b.padded_positions;
      for (std::size_t r = 0; r < rows; ++r) {
        const std::size_t open = open_from(position_of(item, r / shared_));
        const float* from = slot.scores + r * stride;
        float* to = slot.scaled + (g * rows + r) * stride;
        for (std::size_t i = 0; i < open; ++i) to[i] = from[i] * scales[i];
        for (std::size_t i = open; i < closed; ++i) to[i] = 0.0F;
        DenseGemvArgs args;
        args.a = b.value_offsets + g * b.padded_positions;
        args.lda = 1;
        args.n = 1;
        args.k = open;
        args.x = from;
        args.y = slot.offsets + g * rows + r;
        args.y_stride = 1;
        kernels_.gemv_dense(args);
      }
    }
  }

  /// Accumulators of values() for panels [begin, end) of INT4 values.
  void values_int4(const Item& item, const Slot& slot, std::size_t begin, std::size_t end,
                   std::size_t thread) const noexcept {
    const KvBlocks b = cache_of(item).blocks(layer_, item.head);
    const std::size_t stride = score_stride(item.positions), rows = rows_of(item), tokens = item.end - item.begin;
    const std::size_t closed = open_from(item.positions - 1);
    constexpr std::size_t panels_a_group = kv_value_group / panel_width;
    float* recent = thread_scratch_ + thread * thread_floats_;
    for (std::size_t panel = begin; panel < end;) {
      const std::size_t g = panel / panels_a_group;
      const std::size_t stop = std::min(end, (g + 1) * panels_a_group), width = (stop - panel) * panel_width;
      float* acc = slot.acc + panel * panel_width;
      FloatGemvArgs args;
      args.w = b.values;
      args.w.codes += panel * b.values.panel_bytes;
      args.w.n = width;
      args.w.k = closed;
      args.x = slot.scaled + g * rows * stride;
      args.x_stride = stride;
      args.acc = acc;
      args.acc_stride = dims_;
      if (closed > 0)
        gemv(args, stop - panel, rows);
      else
        for (std::size_t r = 0; r < rows; ++r) std::fill_n(acc + r * dims_, width, 0.0F);
      for (std::size_t t = 0; t < tokens; ++t) {
        const std::size_t p = position_of(item, t), open = open_from(p);
        if (open <= p) {
          args.w = b.recent_values;
          args.w.codes += panel * args.w.panel_bytes + open % b.ring * panel_width * sizeof(std::uint16_t);
          args.w.n = width;
          args.w.k = p - open + 1;
          args.panel_begin = 0;
          args.panel_end = stop - panel;
          args.x = slot.scores + t * shared_ * stride + open;
          args.rows = shared_;
          args.acc = recent;
          kernels_.gemm_direct(args);
        }
        for (std::size_t j = 0; j < shared_; ++j) {
          float* row = acc + (t * shared_ + j) * dims_;
          const float offset = slot.offsets[g * rows + t * shared_ + j];
          for (std::size_t d = 0; d < width; ++d) {
            row[d] += offset;
            if (open <= p) row[d] += recent[j * dims_ + d];
          }
        }
      }
      panel = stop;
    }
  }

  /// Scores against positions [16 * begin, 16 * end).
  void scores(const Item& item, const Slot& slot, std::size_t begin, std::size_t end,
              std::size_t thread) const noexcept {
    if (begin >= end) return;
    if (cache_of(item).format() == KvFormat::int4) return scores_int4(item, slot, begin, end, thread);
    const KvPlane keys = cache_of(item).keys(layer_, item.head);
    const std::size_t stride = score_stride(item.positions);
    float* acc = slot.scores + begin * panel_width;
    if (cache_of(item).format() != KvFormat::int8) {
      FloatGemvArgs args;
      args.w = keys.panels;
      args.panel_begin = begin;
      args.panel_end = end;
      args.x = slot.queries;
      args.x_stride = query_size_;
      args.rows = rows_of(item);
      args.acc = acc;
      args.acc_stride = stride;
      kernels_.gemm_direct(args);
      return;
    }
    IntGemmArgs args;
    args.w = keys.panels;
    args.w.group_size = kv_group;
    args.w.groups = query_groups_;
    args.group_shift = 63;
    args.panel_begin = begin;
    args.panel_end = end;
    args.x = slot.query_codes;
    args.x_stride = query_size_;
    args.x_sums = slot.query_sums;
    args.x_scales = slot.query_scales;
    args.sums_stride = query_groups_;
    args.rows = rows_of(item);
    args.acc = acc;
    args.acc_stride = stride;
    kernels_.gemm_w8a8(args);
  }

  /// Scores to weights, not yet divided by their sum; INT8: times the values' scales, as codes.
  void weigh(const Item& item, const Slot& slot) const noexcept {
    const std::size_t first = spans_[item.span].past + item.begin + 1;
    const std::size_t stride = score_stride(item.positions);
    if (cache_of(item).format() != KvFormat::int8) {
      kernels_.softmax({slot.scores, stride, rows_of(item), item.positions, first, shared_, nullptr, slot.sums});
      if (cache_of(item).format() == KvFormat::int4) weigh_int4(item, slot);
      return;
    }
    SoftmaxCodesArgs args;
    args.x = slot.scores;
    args.x_stride = stride;
    args.rows = rows_of(item);
    args.n = round_up(item.positions, kv_group);
    args.first_visible = first;
    args.rows_a_step = shared_;
    args.factors = cache_of(item).values(layer_, item.head).scales;
    args.sums = slot.sums;
    args.codes = slot.codes;
    args.scales = slot.scales;
    args.code_sums = slot.code_sums;
    kernels_.softmax_codes(args);
    if (!cache_of(item).exceptional()) return;
    // The codes have lost a value that is not finite; its scale is NaN.
    for (std::size_t r = 0; r < args.rows; ++r)
      for (std::size_t p = 0; p < first + r / shared_; ++p)
        if (!(args.factors[p] == args.factors[p])) slot.sums[r] = args.factors[p];
  }

  /// Dimensions [16 * begin, 16 * end) of the outputs.
  void values(const Item& item, const Slot& slot, std::size_t begin, std::size_t end,
              std::size_t thread) const noexcept {
    const KvPlane values = cache_of(item).values(layer_, item.head);
    const std::size_t padded = round_up(item.positions, kv_group);
    float* acc = slot.acc + begin * panel_width;
    if (cache_of(item).format() == KvFormat::int4) {
      values_int4(item, slot, begin, end, thread);
    } else if (cache_of(item).format() != KvFormat::int8) {
      FloatGemvArgs args;
      args.w = values.panels;
      args.w.k = item.positions;
      args.panel_begin = begin;
      args.panel_end = end;
      args.x = slot.scores;
      args.x_stride = score_stride(item.positions);
      args.rows = rows_of(item);
      args.acc = acc;
      args.acc_stride = dims_;
      kernels_.gemm_direct(args);
    } else {
      IntGemmArgs args;
      args.w = values.panels;
      args.w.k = padded;
      args.w.k_padded = padded;
      args.w.group_size = kv_group;
      args.w.groups = padded / kv_group;
      args.w.scales = ones_;
      args.group_shift = 63;
      args.panel_begin = begin;
      args.panel_end = end;
      args.x = slot.codes;
      args.x_stride = padded;
      args.x_sums = slot.code_sums;
      args.x_scales = slot.scales;
      args.sums_stride = args.w.groups;
      args.rows = rows_of(item);
      args.acc = acc;
      args.acc_stride = dims_;
      kernels_.gemm_w8a8(args);
    }
    const AttentionSpan& s = spans_[item.span];
    const std::size_t channel = begin * panel_width;
    const std::size_t channels = std::min(end * panel_width, head_size_) - channel;
    std::size_t row = 0;
    for (std::size_t t = item.begin; t < item.end; ++t) {
      float* to = out_ + (s.column + t) * out_stride_ + item.head * shared_ * head_size_ + channel;
      for (std::size_t j = 0; j < shared_; ++j, ++row) {
        const float inverse = 1.0F / slot.sums[row];
        const float* from = acc + row * dims_;
        // + 0: whether a vanishing sum ended as -0 may depend on how many zeros came after it.
        for (std::size_t d = 0; d < channels; ++d) to[j * head_size_ + d] = (from[d] + 0.0F) * inverse;
      }
    }
  }

  struct Offsets {
    std::size_t queries, scores, sums, acc, chunks, query_codes, query_scales, query_sums, codes, scales,
        code_sums, block_sums, scaled, offsets;
  };

  const KernelTable& kernels_;
  const AttentionSpan* spans_;
  std::size_t count_;
  std::size_t layer_;
  const float* queries_ = nullptr;
  float* out_ = nullptr;
  std::size_t query_stride_ = 0;
  std::size_t out_stride_ = 0;
  std::size_t head_size_ = 0;
  std::size_t kv_heads_ = 0;
  std::size_t shared_ = 1;  // query heads a key-value head
  std::size_t capacity_ = 0;
  bool any_int8_ = false;
  bool any_int4_ = false;
  std::size_t items_ = 0;
  std::size_t bytes_ = 0;  // of keys and values that all items read, about
  std::size_t query_size_ = 0;
  std::size_t query_groups_ = 0;
  std::size_t dims_ = 0;
  Offsets at_{};
  std::size_t slot_bytes_ = 0;
  Item* list_ = nullptr;
  float* ones_ = nullptr;
  std::size_t value_groups_ = 0;
  std::size_t thread_floats_ = 0;
  float* thread_scratch_ = nullptr;
  std::uint8_t* slots_ = nullptr;
};

}  // namespace detail

/// out = softmax(K^T q) V, causal: the token at position p sees positions 0 .. p of its cache.
///
/// queries and out are (heads * head_size) x m, a token a column, head by head; spans say which columns belong to which
/// cache. Columns that belong to no span are not touched. Query heads share key-value heads in runs of heads / kv_heads
/// (grouped-query attention). Queries are already scaled: Rope::apply does it on the way.
///
/// With fp32 and fp16 caches scores and outputs are sums of one fma a step in ascending order; with INT8 ones the queries
/// and the softmax weights are quantized in groups of 32 too, and sums over a group are exact. INT4 caches are decoded to
/// floats: a token's output is the sum over closed blocks, that of their offsets and that of the open block. The bits of a token's
/// output are the same whichever tokens are computed with it, and for any pool.
///
/// Allocates nothing once the workspace has grown to the largest capacity and batch seen. Throws InvalidArgument where
/// shapes do not fit.
inline void attention(const AttentionSpan* spans, std::size_t count, std::size_t layer,
                      const ConstMatrixRef& queries, MatrixRef out, const AttentionOptions& options = {}) {
  const detail::FpEnvironment environment;
  std::size_t tokens = 0;
  for (std::size_t s = 0; s < count; ++s) {
    const AttentionSpan& span = spans[s];
    detail::require(span.cache != nullptr, "attention span ", s, " has no cache");
    const KvCacheOptions& o = span.cache->options();
    const KvCacheOptions& first = spans[0].cache->options();
    detail::require(o.head_size == first.head_size && o.kv_heads == first.kv_heads, "attention span ", s, " has ",
                    o.kv_heads, " heads of ", o.head_size, ", the first has ", first.kv_heads, " of ",
                    first.head_size);
    detail::require(layer < o.layers, "layer is ", layer, ", the KV cache of span ", s, " has ", o.layers);
    detail::require(span.tokens <= o.capacity && span.past <= o.capacity - span.tokens, "attention span ", s,
                    " ends at ", span.past, " + ", span.tokens, " tokens, its cache holds ", o.capacity);
    detail::require(span.tokens <= static_cast<std::size_t>(queries.cols()) &&
                        span.column <= static_cast<std::size_t>(queries.cols()) - span.tokens,
                    "attention span ", s, " has columns ", span.column, " + ", span.tokens, ", queries have ",
                    queries.cols());
    const std::size_t unit = o.head_size * o.kv_heads;
    detail::require(queries.rows() > 0 && static_cast<std::size_t>(queries.rows()) % unit == 0, "queries have ",
                    queries.rows(), " rows, expected a multiple of ", unit);
    tokens += span.tokens;
  }
  detail::require(out.rows() == queries.rows() && out.cols() == queries.cols(), "out is ", out.rows(), " x ",
                  out.cols(), ", expected ", queries.rows(), " x ", queries.cols());
  detail::require_apart(queries, out, "queries", "out");
  if (tokens == 0) return;
  const detail::KernelTable& kernels = options.isa ? detail::kernels_for(*options.isa) : detail::kernels();
  detail::AttentionRun run(kernels, spans, count, layer, queries, out);
  run.run(options.pool, options.workspace != nullptr ? *options.workspace : detail::thread_workspace());
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
