// What quantizing did to the values: SQNR, cosine, largest and mean squared error, per tensor and per channel.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/quantize/scheme.hpp"
#include "nibble/quantize/strided.hpp"
#include "nibble/quantize/tensor_view.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Sums over pairs of reference x and approximation y, in double. Pairs that are not finite make the figures NaN.
class ErrorStats {
 public:
  void add(float x, float y) noexcept {
    const double a = static_cast<double>(x);
    const double b = static_cast<double>(y);
    const double e = b - a;
    ++count_;
    xx_ += a * a;
    yy_ += b * b;
    xy_ += a * b;
    ee_ += detail::rounded(e * e);  // the other products are exact
    raise_max(std::fabs(e));
  }
  void add(const ErrorStats& other) noexcept {
    count_ += other.count_;
    xx_ += other.xx_;
    yy_ += other.yy_;
    xy_ += other.xy_;
    ee_ += other.ee_;
    raise_max(other.max_);
  }

  std::size_t count() const noexcept { return count_; }
  /// Mean squared error; 0 for no data.
  double mse() const noexcept { return count_ == 0 ? 0.0 : ee_ / static_cast<double>(count_); }
  double max_abs_error() const noexcept { return max_; }
  /// Signal to quantization noise, 10 log10(sum x^2 / sum (y - x)^2), in dB; +Inf without error.
  double sqnr_db() const noexcept {
    if (ee_ == 0.0) return std::numeric_limits<double>::infinity();
    return 10.0 * std::log10(xx_ / ee_);
  }
  /// Cosine of the angle between x and y; 1 where both are zero, 0 where one is.
  double cosine() const noexcept {
    if (xx_ == 0.0 && yy_ == 0.0) return 1.0;
    if (xx_ == 0.0 || yy_ == 0.0) return 0.0;
    return xy_ / (std::sqrt(xx_) * std::sqrt(yy_));
  }

 private:
  // A NaN gets in and stays.
  void raise_max(double e) noexcept { max_ = e > max_ || e != e ? e : max_; }

  std::size_t count_ = 0;
  double xx_ = 0.0;
  double yy_ = 0.0;
  double xy_ = 0.0;
  double ee_ = 0.0;
  double max_ = 0.0;
};

/// One line of text: "SQNR 42.1 dB, max error 0.0031, mse 1.2e-06, cosine 0.99996921".
inline std::ostream& operator<<(std::ostream& out, const ErrorStats& s) {
  std::ostringstream text;  // keeps the stream's own formatting
  text.precision(4);
  text << "SQNR " << s.sqnr_db() << " dB, max error " << s.max_abs_error() << ", mse " << s.mse();
  text.precision(8);
  text << ", cosine " << s.cosine();
  return out << text.str();
}

/// Errors of a whole tensor and of each index along one axis.
struct ErrorReport {
  ErrorStats tensor;
  std::size_t axis = 0;
  std::vector<ErrorStats> channels;

  /// The channel with the lowest SQNR; channels.size() where there is none.
  std::size_t worst_channel() const noexcept {
    std::size_t worst = channels.size();
    for (std::size_t c = 0; c < channels.size(); ++c)
      if (worst == channels.size() || channels[c].sqnr_db() < channels[worst].sqnr_db()) worst = c;
    return worst;
  }
};

/// The tensor's line, and that of its worst channel.
inline std::ostream& operator<<(std::ostream& out, const ErrorReport& r) {
  out << "tensor: " << r.tensor;
  const std::size_t worst = r.worst_channel();
  if (worst < r.channels.size())
    out << "\nworst channel, " << worst << " of axis " << r.axis << ": " << r.channels[worst];
  return out;
}

namespace detail {

inline ErrorReport error_report_view(const InputView& x, const QuantizedTensor& q, int axis) {
  const FpEnvironment environment;
  const Shape shape = x.layout.shape();
  require(shape == q.shape(), "error_report: reference has shape ", shape_text(shape), ", the quantized tensor ",
          shape_text(q.shape()));
  Granularity by_axis = Granularity::per_channel(axis);
  if (shape.empty()) by_axis = Granularity::per_tensor();
  // Any format with scales serves to resolve the axis.
  by_axis = resolve({Format::int8, Symmetry::symmetric, by_axis, ScaleType::fp32, false}, shape).granularity;
  const ParamLayout channels(by_axis, shape);
  ErrorReport report;
  report.axis = static_cast<std::size_t>(by_axis.axis);
  report.channels.resize(channels.count());
  LineReader reader(x, Narrowing::nearest);
  std::vector<float> line(q.line_length());
  for_each_block(x.layout, [&](const LineBlock& block) {
    reader.read(block, [&](std::size_t l, const float* reference) {
      q.dequantize_line(l, 0, line.size(), line.data());
      const LineParams channel = channels.line(l);
      for (std::size_t i = 0; i < line.size(); ++i) report.channels[channel.index(i)].add(reference[i], line[i]);
    });
  });
  for (const ErrorStats& stats : report.channels) report.tensor.add(stats);
  return report;
}

}  // namespace detail

/// Compares x, any matrix or tensor, with its quantized form; channels run along `axis` (negative: from the end).
/// Throws InvalidArgument where the shapes differ or the axis does not exist.
template <class X>
ErrorReport error_report(const X& x, const QuantizedTensor& q, int axis = 0) {
  const auto input = make_input(detail::Front{}, x);
  return detail::error_report_view(input.view(), q, axis);
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
