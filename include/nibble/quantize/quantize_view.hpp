// Quantizing through the erased view: the one implementation behind every typed quantizer.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/quantize/line_codec.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/quantize/range.hpp"
#include "nibble/quantize/scheme.hpp"
#include "nibble/quantize/strided.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// One pass over a tensor: fits grids (or takes the ranges it is given) and hands out each line's codes.
class ViewQuantizer {
 public:
  /// ranges: empty to fit minimum and maximum; else one for all parameters or one a parameter.
  ViewQuantizer(const InputView& x, const Scheme& scheme, const Ranges& ranges)
      : x_(x),
        layout_(scheme, x.layout.shape()),
        reader_(x, bits_of(layout_.scheme.format) == 16 ? Narrowing::to_odd : Narrowing::nearest),
        scales_(layout_.scale_bytes()),
        zeros_(layout_.zero_bytes()),
        params_(layout_.storage(scales_.data(), zeros_.data())),
        fitter_(layout_.scheme) {
    const std::size_t count = layout_.param_count();
    if (count == 0) return;
    if (!ranges.empty()) {
      require(ranges.size() == 1 || ranges.size() == count, "quantizer has ", ranges.size(),
              " ranges, expected 1 or one for each of ", count, " parameters");
      for (std::size_t p = 0; p < count; ++p) store(p, fitter_.fit(ranges[ranges.size() == 1 ? 0 : p], p));
      given_ = true;
    } else {
      ranges_.resize(count);
      fit_on_the_fly_ = each_line_has_its_own() && layout_.line_count * layout_.line_length != 0;
      if (fit_on_the_fly_) return;
      for_each_block(x_.layout, [this](const LineBlock& block) {
        reader_.read(block, [this](std::size_t l, const float* line) { observe(l, line); });
      });
      for (std::size_t p = 0; p < count; ++p) store(p, fitter_.fit(ranges_[p], p));
    }
  }

  const CodeLayout& layout() const noexcept { return layout_; }
  Buffer take_scales() { return std::move(scales_); }
  Buffer take_zeros() { return std::move(zeros_); }

  /// Calls on_line(block, index within the block, line number, x as fp32) and on_block_end(block).
  template <class OnLine, class OnBlockEnd>
  void run(OnLine&& on_line, OnBlockEnd&& on_block_end) {
    for_each_block(x_.layout, [&](const LineBlock& block) {
      std::size_t within = 0;
      reader_.read(block, [&](std::size_t l, const float* line) {
        if (fit_on_the_fly_) {
          observe(l, line);
          fit_line(l);
        } else if (given_) {
          check_finite(l, line);
        }
        on_line(block, within++, l, line);
      });
      on_block_end(block);
    });
  }

  /// int8, int4 and nf4: line l's codes, one a byte.
  void encode(std::size_t l, const float* line, std::int8_t* codes) const {
    encode_line(params_, layout_.params.line(l), 0, layout_.line_length, line, codes);
  }
  /// The values of those codes.
  void decode(std::size_t l, const std::int8_t* codes, float* out) const {
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

  /// Widens the ranges of line l's parameters by its values.
  void observe(std::size_t l, const float* line) {
    const LineParams where = layout_.params.line(l);
    if (where.per_element()) {
      check_finite(l, line);
      for (std::size_t i = 0; i < layout_.line_length; ++i) ranges_[where.base + i].include(line[i]);
      return;
    }
    for (std::size_t i = 0, run; i < layout_.line_length; i += run) {
      run = run_length(where, i, layout_.line_length);
      const LineRange r = kernels().line_range(line + i, run);
      if (!r.finite) fail_not_finite(l, line);
      Range& range = ranges_[where.index(i)];
      range.include(r.min);
      range.include(r.max);
    }
  }

  void fit_line(std::size_t l) {
    const LineParams where = layout_.params.line(l);
    for (std::size_t i = 0, run; i < layout_.line_length; i += run) {
      run = run_length(where, i, layout_.line_length);
      const std::size_t p = where.index(i);
      store(p, fitter_.fit(ranges_[p], p));
    }
  }

  void store(std::size_t p, const Grid& g) {
    const ScaleType type = layout_.scheme.scale_type;
    const auto put = [type, p](Buffer& to, float v) {
      if (type == ScaleType::fp32)
        to.as_mutable<float>()[p] = v;
      else
        to.as_mutable<std::uint16_t>()[p] = type == ScaleType::fp16 ? fp16_from_float(v) : bf16_from_float(v);
    };
    put(scales_, g.scale);
    if (layout_.scheme.symmetry == Symmetry::asymmetric)
      zeros_.as_mutable<std::int8_t>()[p] = static_cast<std::int8_t>(g.zero);
    else if (layout_.scheme.symmetry == Symmetry::float_offset)
      put(zeros_, g.offset);
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
  CodeLayout layout_;
  LineReader reader_;
  Buffer scales_;
  Buffer zeros_;
  ParamStorage params_;
  GridFitter fitter_;
  Ranges ranges_;
  bool given_ = false;
  bool fit_on_the_fly_ = false;
};

inline QuantizedTensor quantize_view(const InputView& x, const Scheme& scheme, const Ranges& ranges) {
  const FpEnvironment environment;
  ViewQuantizer quantizer(x, scheme, ranges);
  const CodeLayout& layout = quantizer.layout();
  const Format format = layout.scheme.format;
  Buffer codes(layout.code_bytes());
  std::uint8_t* const base = codes.mutable_data();
  std::vector<std::int8_t> unpacked(bits_of(format) == 4 ? layout.line_length : 0);
  quantizer.run(
      [&](const LineBlock&, std::size_t, std::size_t l, const float* line) {
        std::uint8_t* to = base + l * layout.line_bytes;
        switch (format) {
          case Format::fp32:
            quantizer.check_finite(l, line);
            std::memcpy(to, line, layout.line_bytes);
            return;
          case Format::fp16:
          case Format::bf16: quantizer.encode16(l, line, reinterpret_cast<std::uint16_t*>(to)); return;
          case Format::int8: quantizer.encode(l, line, reinterpret_cast<std::int8_t*>(to)); return;
          case Format::int4:
          case Format::nf4:
            quantizer.encode(l, line, unpacked.data());
            pack_nibbles(reinterpret_cast<const std::uint8_t*>(unpacked.data()), layout.line_length, to);
            return;
        }
      },
      [](const LineBlock&) {});
  return QuantizedTensor::from_parts(layout.scheme, layout.shape, std::move(codes), quantizer.take_scales(),
                                     quantizer.take_zeros());
}

/// out = dequantize(quantize(x)), with the codes of one line at a time in memory. out may be x itself.
inline void fake_quantize_view(const InputView& x, const Scheme& scheme, const Ranges& ranges,
                               const OutputView& out) {
  const FpEnvironment environment;
  ViewQuantizer quantizer(x, scheme, ranges);
  const CodeLayout& layout = quantizer.layout();
  const Format format = layout.scheme.format;
  require(out.layout.shape() == layout.shape, "fake_quantize: output has shape ", shape_text(out.layout.shape()),
          ", the input ", shape_text(layout.shape));
  LineWriter writer(out);
  std::vector<std::int8_t> codes(has_scales(format) ? layout.line_length : 0);
  std::vector<std::uint16_t> codes16(bits_of(format) == 16 ? layout.line_length : 0);
  quantizer.run(
      [&](const LineBlock& block, std::size_t within, std::size_t l, const float* line) {
        float* to = writer.line(block.in(out.layout), within);
        switch (format) {
          case Format::fp32:
            quantizer.check_finite(l, line);
            std::memmove(to, line, layout.line_length * sizeof(float));
            return;
          case Format::fp16:
          case Format::bf16:
            quantizer.encode16(l, line, codes16.data());
            (format == Format::fp16 ? kernels().float_from_fp16 : kernels().float_from_bf16)(codes16.data(),
                                                                                             codes16.size(), to);
            return;
          case Format::int8:
          case Format::int4:
          case Format::nf4:
            quantizer.encode(l, line, codes.data());
            quantizer.decode(l, codes.data(), to);
            return;
        }
      },
      [&](const LineBlock& block) { writer.finish(block.in(out.layout)); });
}

/// Shows `observer` all of x. Returns its ranges.
inline Ranges observe_view(const InputView& x, const Scheme& scheme, RangeObserver& observer) {
  const FpEnvironment environment;
  const Ranges any = {Range{0.0F, 0.0F}};
  ViewQuantizer quantizer(x, scheme, any);
  const CodeLayout& layout = quantizer.layout();
  const std::size_t count = layout.param_count();
  observer.begin(count);
  if (count == 0) return {};
  quantizer.run(
      [&](const LineBlock&, std::size_t, std::size_t l, const float* line) {
        const LineParams where = layout.params.line(l);
        for (std::size_t i = 0, run; i < layout.line_length; i += run) {
          run = run_length(where, i, layout.line_length);
          observer.observe(where.index(i), line + i, run);
        }
      },
      [](const LineBlock&) {});
  Ranges ranges;
  for (std::size_t p = 0; p < count; ++p) ranges.push_back(observer.range(p));
  return ranges;
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
