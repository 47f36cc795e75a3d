// A scatter plot with labels as an SVG text: enough for size against perplexity.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace llm {

struct PlotPoint {
  double x = 0.0;
  double y = 0.0;
  std::string label;
};

namespace svg_detail {

inline std::string escape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&quot;";
    else
      out += c;
  }
  return out;
}

inline std::string number(double v) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", v);
  return text;
}

/// 1, 2 or 5 times a power of ten: the step that gives about five ticks.
inline double tick_step(double span) {
  const double power = std::pow(10.0, std::floor(std::log10(span / 5.0)));
  const double rest = span / 5.0 / power;
  return power * (rest < 1.5 ? 1.0 : rest < 3.5 ? 2.0 : rest < 7.5 ? 5.0 : 10.0);
}

struct Axis {
  double low = 0.0;
  double high = 1.0;
  double step = 1.0;
};

inline Axis axis_over(double low, double high) {
  const double span = high > low ? high - low : std::max(std::abs(high), 1.0) * 0.1;
  Axis a;
  a.step = tick_step(span);
  a.low = std::floor((low - 0.05 * span) / a.step) * a.step;
  a.high = std::ceil((high + 0.05 * span) / a.step) * a.step;
  return a;
}

}  // namespace svg_detail

/// Those of the points that no other beats in both x and y (less is better), by x.
inline std::vector<PlotPoint> pareto_front(std::vector<PlotPoint> points) {
  std::stable_sort(points.begin(), points.end(),
                   [](const PlotPoint& a, const PlotPoint& b) { return a.x < b.x || (a.x == b.x && a.y < b.y); });
  std::vector<PlotPoint> front;
  for (const PlotPoint& p : points)
    if (std::isfinite(p.x) && std::isfinite(p.y) && (front.empty() || p.y < front.back().y)) front.push_back(p);
  return front;
}

/// `front`: points that a line joins.
inline std::string scatter_svg(const std::string& title, const std::string& x_title, const std::string& y_title,
                               const std::vector<PlotPoint>& points, const std::vector<PlotPoint>& front = {}) {
  using svg_detail::number;
  constexpr double width = 760.0, height = 480.0, left = 80.0, right = 30.0, top = 50.0, bottom = 60.0;
  double x_low = 0.0, x_high = 1.0, y_low = 0.0, y_high = 1.0;
  bool first = true;
  for (const PlotPoint& p : points) {
    if (!std::isfinite(p.x) || !std::isfinite(p.y)) continue;
    x_low = first ? p.x : std::min(x_low, p.x);
    x_high = first ? p.x : std::max(x_high, p.x);
    y_low = first ? p.y : std::min(y_low, p.y);
    y_high = first ? p.y : std::max(y_high, p.y);
    first = false;
  }
  const svg_detail::Axis xs = svg_detail::axis_over(x_low, x_high);
  const svg_detail::Axis ys = svg_detail::axis_over(y_low, y_high);
  const auto px = [&](double x) { return left + (x - xs.low) / (xs.high - xs.low) * (width - left - right); };
  const auto py = [&](double y) {
    return height - bottom - (y - ys.low) / (ys.high - ys.low) * (height - top - bottom);
  };

  std::string svg =
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 760 480\" font-family=\"sans-serif\" "
      "font-size=\"12\">\n<rect width=\"760\" height=\"480\" fill=\"white\"/>\n";
  const auto text = [&](double x, double y, const char* attributes, const std::string& what) {
    svg += "<text x=\"" + number(x) + "\" y=\"" + number(y) + "\" " + attributes + ">" + svg_detail::escape(what) +
           "</text>\n";
  };
  const auto line = [&](double x1, double y1, double x2, double y2, const char* colour) {
    svg += "<line x1=\"" + number(x1) + "\" y1=\"" + number(y1) + "\" x2=\"" + number(x2) + "\" y2=\"" +
           number(y2) + "\" stroke=\"" + colour + "\"/>\n";
  };
  text(width / 2, 26, "text-anchor=\"middle\" font-size=\"15\"", title);
  for (double x = xs.low; x <= xs.high + xs.step / 2; x += xs.step) {
    line(px(x), top, px(x), height - bottom, "#e4e4e4");
    text(px(x), height - bottom + 18, "text-anchor=\"middle\"", number(x));
  }
  for (double y = ys.low; y <= ys.high + ys.step / 2; y += ys.step) {
    line(left, py(y), width - right, py(y), "#e4e4e4");
    text(left - 8, py(y) + 4, "text-anchor=\"end\"", number(y));
  }
  line(left, height - bottom, width - right, height - bottom, "#333");
  line(left, top, left, height - bottom, "#333");
  text((left + width - right) / 2, height - 16, "text-anchor=\"middle\"", x_title);
  text(20, (top + height - bottom) / 2, "text-anchor=\"middle\" transform=\"rotate(-90 20 235)\"", y_title);
  for (std::size_t i = 1; i < front.size(); ++i)
    line(px(front[i - 1].x), py(front[i - 1].y), px(front[i].x), py(front[i].y), "#d08a2e");
  for (const PlotPoint& p : points) {
    if (!std::isfinite(p.x) || !std::isfinite(p.y)) continue;
    svg += "<circle cx=\"" + number(px(p.x)) + "\" cy=\"" + number(py(p.y)) + "\" r=\"4.5\" fill=\"#1f6fb4\"/>\n";
    const bool near_edge = px(p.x) > width - right - 110.0;
    text(px(p.x) + (near_edge ? -8 : 8), py(p.y) - 7, near_edge ? "text-anchor=\"end\"" : "", p.label);
  }
  return svg + "</svg>\n";
}

}  // namespace llm
