// Quantizing through the erased view: the one implementation behind every typed quantizer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/quantize/line_codec.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/quantize/range.hpp"
#include "nibble/quantize/scheme.hpp"
#include "nibble/quantize/strided.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// All blocks of a layout, in for_each_block's order: the tasks of a thread pool.
inline std::vector<LineBlock> blocks_of(const StridedLayout& layout) {
  std::vector<LineBlock> blocks;
  for_each_block(layout, [&blocks](const LineBlock& block) { blocks.push_back(block); });
  return blocks;
}

/// One pass over a tensor: fits grids (or takes the ranges it is given) and hands out each line's codes.
class ViewQuantizer {
 public:
  /// ranges: empty to fit minimum and maximum; else one for all parameters or one a parameter. Threads change nothing:
  /// smallest and largest do not depend on the order in which they are found.
  ViewQuantizer(const InputView& x, const Scheme& scheme, const Ranges& ranges, ThreadPool* pool)
      : x_(x),
        pool_(pool),
        layout_(scheme, x.layout.shape()),
        scales_(Buffer::uninitialized(layout_.scale_bytes())),
        zeros_(Buffer::uninitialized(layout_.zero_bytes())),
        params_(layout_.storage(scales_.data(), zeros_.data())),
        fitter_(layout_.scheme),
        blocks_(blocks_of(x.layout)) {
    const std::size_t count = layout_.param_count();
    if (count == 0) return;
    if (!ranges.empty()) {
      require(ranges.size() == 1 || ranges.size() == count, "quantizer has ", ranges.size(),
              " ranges, expected 1 or one for each of ", count, " parameters");
      for (std::size_t p = 0; p < count; ++p) store(p, fitter_.fit(ranges[ranges.size() == 1 ? 0 : p], p));
      given_ = true;
    } else {
      fit_on_the_fly_ = each_line_has_its_own() && layout_.line_count * layout_.line_length != 0;
      if (!fit_on_the_fly_) fit_first();
    }
  }

  const CodeLayout& layout() const noexcept { return layout_; }
  Buffer take_scales() { return std::move(scales_); }
  Buffer take_zeros() { return std::move(zeros_); }
  std::size_t threads() const noexcept {
    return pool_ == nullptr ? 1 : static_cast<std::size_t>(pool_->threads());
  }

  /// Calls on_line(thread, block, index within the block, line number, x as fp32) and on_block_end(thread, block): blocks
  /// in any order, on any thread.
  template <class OnLine, class OnBlockEnd>
  void run(OnLine&& on_line, OnBlockEnd&& on_block_end) {
    fits_.resize(threads());
    each_block([&](std::size_t thread, LineReader& reader, const LineBlock& block) {
      std::size_t within = 0;
      reader.read(block, [&](std::size_t l, const float* line) {
        if (fit_on_the_fly_)
          fit_line(l, line);
        else if (given_)
          check_finite(l, line);
        on_line(thread, block, within++, l, line);
      });
      on_block_end(thread, block);
    });
  }

  /// Formats with scales: line l's codes as they are stored. Groups are fitted here.
  void encode(std::size_t thread, std::size_t l, const float* line, std::uint8_t* codes) {
    const LineParams where = layout_.params.line(l);
    if (!fit_on_the_fly_ || where.step == 0)
      encode_line(params_, where, layout_.line_length, line, codes);
    else
      fit_and_encode(l, line, codes, fits_[thread]);
  }
  /// The values of those codes.
  void decode(std::size_t l, const std::uint8_t* codes, float* out) const noexcept {
    decode_line(params_, layout_.params.line(l), 0, layout_.line_length, codes, out);
  }
  /// fp16 and bf16: line l's codes. Throws InvalidArgument for a value that does not fit.
  void encode16(std::size_t l, const float* line, std::uint16_t* codes) const {
    const bool half = layout_.scheme.format == Format::fp16;
    // What rounds to Inf: from halfway between the largest value and the next power of two on.
    const float limit = half ? 65520.0F : float_from_bits(0x7F7F8000U);
    const LineRange r = check_finite(l, line);
    if (r.max >= limit || r.min <= -limit) {
      std::size_t i = 0;
      while (std::fabs(line[i]) < limit) ++i;
      fail(l, i, line[i], half ? "too large for fp16" : "too large for bf16");
    }
    (half ? kernels().fp16_from_float : kernels().bf16_from_float)(line, layout_.line_length, codes);
  }

  /// Throws InvalidArgument, naming the index, where line l holds NaN or Inf.
  LineRange check_finite(std::size_t l, const float* line) const {
    const LineRange r = kernels().line_range(line, layout_.line_length);
    if (!r.finite) fail_not_finite(l, line);
    return r;
  }

 private:
  /// Ranges of consecutive parameters.
  struct Extremes {
    std::vector<float> lows;
    std::vector<float> highs;
    void resize(std::size_t n) {
      lows.assign(n, Range{}.lo);
      highs.assign(n, Range{}.hi);
    }
    void include(std::size_t p, const Range& r) noexcept {
      lows[p] = std::min(lows[p], r.lo);
      highs[p] = std::max(highs[p], r.hi);
    }
    Range range(std::size_t p) const noexcept { return {lows[p], highs[p]}; }
  };
  /// Room of one thread that fits the groups of a line.
  struct GroupFits {
    Extremes ranges;
    std::vector<float> scales;
    std::vector<float> offsets;
    std::vector<std::int8_t> zeros;
    std::vector<std::uint8_t> irregular;
    void resize(std::size_t n) {
      scales.resize(n);
      offsets.resize(n);
      zeros.resize(n);
      irregular.resize(n);
    }
  };

  template <class F>
  void each_block(F&& f) {
    std::vector<std::unique_ptr<LineReader>> readers(threads());
    for_tasks(pool_, blocks_.size(), [&](std::size_t task, std::size_t thread) {
      if (!readers[thread]) {
        const bool narrow = bits_of(layout_.scheme.format) == 16;
        readers[thread] = std::make_unique<LineReader>(x_, narrow ? Narrowing::to_odd : Narrowing::nearest);
      }
      f(thread, *readers[thread], blocks_[task]);
    });
  }

  bool each_line_has_its_own() const noexcept {
    const Granularity& g = layout_.scheme.granularity;
    const bool along_line = static_cast<std::size_t>(g.axis) + 1 == layout_.shape.size();
    switch (g.kind) {
      case Granularity::Kind::per_tensor: return layout_.line_count == 1;
      case Granularity::Kind::per_channel: return !along_line && layout_.param_count() == layout_.line_count;
      case Granularity::Kind::per_group: return along_line;
    }
    return false;
  }

  /// Where lines share parameters: all ranges, then all grids.
  void fit_first() {
    const std::size_t count = layout_.param_count();
    std::vector<Extremes> found(threads());
    found[0].resize(count);
    each_block([&](std::size_t thread, LineReader& reader, const LineBlock& block) {
      if (found[thread].lows.empty()) found[thread].resize(count);
      reader.read(block, [&](std::size_t l, const float* line) { observe(l, line, found[thread]); });
    });
    for (std::size_t t = 1; t < found.size(); ++t)
      for (std::size_t p = 0; p < found[t].lows.size(); ++p) found[0].include(p, found[t].range(p));
    if (layout_.line_count * layout_.line_length == 0) {
      // Parameters of no element.
      std::fill(found[0].lows.begin(), found[0].lows.end(), 0.0F);
      std::fill(found[0].highs.begin(), found[0].highs.end(), 0.0F);
    }
    GroupFits fits;
    constexpr std::size_t at_once = 4096;
    for (std::size_t p = 0; p < count; p += at_once)
      fit(p, std::min(at_once, count - p), found[0].lows.data() + p, found[0].highs.data() + p, fits);
  }

  /// Widens the ranges of line l's parameters by its values. Lines that share none come through fit_line.
  void observe(std::size_t l, const float* line, Extremes& ranges) const {
    const LineParams where = layout_.params.line(l);
    const LineRange r = check_finite(l, line);
    if (where.per_element()) {
      kernels().widen_ranges(
          {line, layout_.line_length, ranges.lows.data() + where.base, ranges.highs.data() + where.base});
    } else if (layout_.line_length != 0) {
      ranges.include(where.base, {r.min, r.max});
    }
  }

  /// One grid for a whole line. Groups wait for encode().
  void fit_line(std::size_t l, const float* line) {
    const LineParams where = layout_.params.line(l);
    if (where.step != 0) return;
    const LineRange r = check_finite(l, line);
    store(where.base, fitter_.fit({r.min, r.max}, where.base));
  }

  /// Ranges, grids and codes of a stretch that fits the first-level cache: it is read from memory once, and while it is
  /// computed on the next is fetched.
  void fit_and_encode(std::size_t l, const float* line, std::uint8_t* codes, GroupFits& fits) {
    const LineParams where = layout_.params.line(l);
    const std::size_t groups = ceil_div(layout_.line_length, where.div);
    const std::size_t at_once = std::clamp<std::size_t>(8192 / where.div, 1, LineStretch::max_params);
    fits.ranges.lows.resize(at_once);
    fits.ranges.highs.resize(at_once);
    for (std::size_t g = 0; g < groups; g += at_once) {
      const std::size_t begin = g * where.div;
      const std::size_t count = std::min(at_once, groups - g);
      const std::size_t n = std::min(layout_.line_length - begin, count * where.div);
      if (!kernels().group_ranges({line + begin, n, where.div, fits.ranges.lows.data(), fits.ranges.highs.data()}))
        fail_not_finite(l, line);
      fit(where.base + g, count, fits.ranges.lows.data(), fits.ranges.highs.data(), fits);
      QuantizeGroupsArgs args;
      args.format = params_.format;
      args.x = line + begin;
      args.n = n;
      args.group = where.div;
      args.scales = fits.scales.data();
      if (params_.symmetry == Symmetry::float_offset) args.offsets = fits.offsets.data();
      if (params_.symmetry == Symmetry::asymmetric) args.zeros = fits.zeros.data();
      if (params_.symmetry == Symmetry::symmetric) args.zero = symmetric_zero_of(params_.format);
      args.qmin = params_.codes.min;
      args.qmax = params_.codes.max;
      args.q = codes + code_offset(params_.format, begin);
      quantize_groups(args);
    }
  }

  /// Grids of parameters p .. p + n - 1: the common ones by a kernel, the others by the fitter.
  void fit(std::size_t p, std::size_t n, const float* lows, const float* highs, GroupFits& fits) {
    fits.resize(n);
    FitRangesArgs args;
    args.lows = lows;
    args.highs = highs;
    args.n = n;
    args.format = layout_.scheme.format;
    args.symmetry = layout_.scheme.symmetry;
    args.scale_type = layout_.scheme.scale_type;
    args.zero = args.symmetry == Symmetry::symmetric ? symmetric_zero_of(args.format) : 0;
    args.qmin = params_.codes.min;
    args.qmax = params_.codes.max;
    args.scales = fits.scales.data();
    args.offsets = fits.offsets.data();
    args.zeros = fits.zeros.data();
    args.irregular = fits.irregular.data();
    kernels().fit_ranges(args);
    put(scales_, p, n, args.scales);
    if (args.symmetry == Symmetry::asymmetric) std::memcpy(zeros_.mutable_data() + p, args.zeros, n);
    if (args.symmetry == Symmetry::float_offset) put(zeros_, p, n, args.offsets);
    for (std::size_t g = 0; g < n; ++g)
      if (fits.irregular[g] != 0) {
        const Grid grid = fitter_.fit({lows[g], highs[g]}, p + g);
        store(p + g, grid);
        fits.scales[g] = grid.scale;
        fits.offsets[g] = grid.offset;
        fits.zeros[g] = static_cast<std::int8_t>(grid.zero);
      }
  }

  void put(Buffer& to, std::size_t p, std::size_t n, const float* values) const {
    switch (layout_.scheme.scale_type) {
      case ScaleType::fp32: std::memcpy(to.as_mutable<float>() + p, values, n * sizeof(float)); return;
      case ScaleType::fp16: kernels().fp16_from_float(values, n, to.as_mutable<std::uint16_t>() + p); return;
      case ScaleType::bf16: kernels().bf16_from_float(values, n, to.as_mutable<std::uint16_t>() + p); return;
    }
  }

  void store(std::size_t p, const Grid& g) {
    put(scales_, p, 1, &g.scale);
    if (layout_.scheme.symmetry == Symmetry::asymmetric)
      zeros_.as_mutable<std::int8_t>()[p] = static_cast<std::int8_t>(g.zero);
    else if (layout_.scheme.symmetry == Symmetry::float_offset)
      put(zeros_, p, 1, &g.offset);
  }

  [[noreturn]] void fail(std::size_t l, std::size_t i, float value, const char* why) const {
    raise<InvalidArgument>(concat("element ", index_text(layout_.shape, l, i), " is ", value, ": ", why));
  }
  [[noreturn]] void fail_not_finite(std::size_t l, const float* line) const {
    std::size_t i = 0;
    while (scalar::is_finite(line[i])) ++i;
    fail(l, i, line[i], "only finite values within float's range can be quantized");
  }

  const InputView& x_;
  ThreadPool* pool_;
  CodeLayout layout_;
  Buffer scales_;
  Buffer zeros_;
  ParamStorage params_;
  GridFitter fitter_;
  std::vector<LineBlock> blocks_;
  std::vector<GroupFits> fits_;  // one a thread
  bool given_ = false;
  bool fit_on_the_fly_ = false;
};

inline QuantizedTensor quantize_view(const InputView& x, const Scheme& scheme, const Ranges& ranges,
                                     ThreadPool* pool = nullptr) {
  const FpEnvironment environment;
  ViewQuantizer quantizer(x, scheme, ranges, pool);
  const CodeLayout& layout = quantizer.layout();
  const Format format = layout.scheme.format;
  Buffer codes = Buffer::uninitialized(layout.code_bytes());
  std::uint8_t* const base = codes.mutable_data();
  quantizer.run(
      [&](std::size_t thread, const LineBlock&, std::size_t, std::size_t l, const float* line) {
        std::uint8_t* to = base + l * layout.line_bytes;
        switch (format) {
          case Format::fp32:
            quantizer.check_finite(l, line);
            std::memcpy(to, line, layout.line_bytes);
            return;
          case Format::fp16:
          case Format::bf16: quantizer.encode16(l, line, reinterpret_cast<std::uint16_t*>(to)); return;
          default: quantizer.encode(thread, l, line, to); return;
        }
      },
      [](std::size_t, const LineBlock&) {});
  return QuantizedTensor::from_parts(layout.scheme, layout.shape, std::move(codes), quantizer.take_scales(),
                                     quantizer.take_zeros());
}

/// out = dequantize(quantize(x)), with the codes of one line at a time in memory. out may be x itself.
inline void fake_quantize_view(const InputView& x, const Scheme& scheme, const Ranges& ranges,
                               const OutputView& out, ThreadPool* pool = nullptr) {
  const FpEnvironment environment;
  ViewQuantizer quantizer(x, scheme, ranges, pool);
  const CodeLayout& layout = quantizer.layout();
  const Format format = layout.scheme.format;
  require(out.layout.shape() == layout.shape, "fake_quantize: output has shape ", shape_text(out.layout.shape()),
          ", the input ", shape_text(layout.shape));
  struct Room {
    std::unique_ptr<LineWriter> writer;
    std::vector<std::uint16_t> codes;  // a line's
  };
  std::vector<Room> rooms(quantizer.threads());
  quantizer.run(
      [&](std::size_t thread, const LineBlock& block, std::size_t within, std::size_t l, const float* line) {
        Room& room = rooms[thread];
        if (!room.writer) {
          room.writer = std::make_unique<LineWriter>(out);
          room.codes.resize(format == Format::fp32 ? 0 : layout.line_length);
        }
        float* to = room.writer->line(block.in(out.layout), within);
        auto* bytes = reinterpret_cast<std::uint8_t*>(room.codes.data());
        switch (format) {
          case Format::fp32:
            quantizer.check_finite(l, line);
            std::memmove(to, line, layout.line_length * sizeof(float));
            return;
          case Format::fp16:
          case Format::bf16:
            quantizer.encode16(l, line, room.codes.data());
            (format == Format::fp16 ? kernels().float_from_fp16 : kernels().float_from_bf16)(
                room.codes.data(), layout.line_length, to);
            return;
          default:
            quantizer.encode(thread, l, line, bytes);
            quantizer.decode(l, bytes, to);
            return;
        }
      },
      [&](std::size_t thread, const LineBlock& block) {
        if (rooms[thread].writer) rooms[thread].writer->finish(block.in(out.layout));
      });
}

/// Shows `observer` all of x. Returns its ranges.
inline Ranges observe_view(const InputView& x, const Scheme& scheme, RangeObserver& observer) {
  const FpEnvironment environment;
  const Ranges any = {Range{0.0F, 0.0F}};
  ViewQuantizer quantizer(x, scheme, any, nullptr);
  const CodeLayout& layout = quantizer.layout();
  const std::size_t count = layout.param_count();
  observer.begin(count);
  if (count == 0) return {};
  quantizer.run(
      [&](std::size_t, const LineBlock&, std::size_t, std::size_t l, const float* line) {
        const LineParams where = layout.params.line(l);
        for (std::size_t i = 0, run; i < layout.line_length; i += run) {
          run = run_length(where, i, layout.line_length);
          observer.observe(where.index(i), line + i, run);
        }
      },
      [](std::size_t, const LineBlock&) {});
  Ranges ranges;
  for (std::size_t p = 0; p < count; ++p) ranges.push_back(observer.range(p));
  return ranges;
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
