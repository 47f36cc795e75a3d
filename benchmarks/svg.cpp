// The drawings: plain SVG 1.1, no script, no fonts but the viewer's.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "bench.hpp"
#include "limits.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace bench {
namespace {

const char* const palette[] = {"#1b6ca8", "#c8472b", "#2e8b57", "#8856a7", "#b8860b", "#444444",
                               "#d6568a", "#3aa6a6", "#7f7f00", "#5566cc", "#aa5500", "#008855"};

std::string short_number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, value >= 100 ? "%.0f" : "%.3g", value);
  return text;
}

struct Axis {
  double low = 0;
  double high = 1;
  bool log = false;
  std::string label;

  double at(double value) const {
    return log ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
  }
  std::vector<double> ticks() const {
    std::vector<double> list;
    if (log) {
      for (double decade = std::pow(10, std::floor(std::log10(low))); decade <= high; decade *= 10)
        for (const double step : {1.0, 2.0, 5.0})
          if (decade * step >= low * 0.999 && decade * step <= high * 1.001) list.push_back(decade * step);
      return list;
    }
    double step = std::pow(10, std::floor(std::log10((high - low) / 5)));
    while ((high - low) / step > 10) step *= 2;
    for (double value = std::ceil(low / step) * step; value <= high * 1.0001; value += step) list.push_back(value);
    return list;
  }
};

/// A chart of lines and points, 860 x 520, legend to the right.
class Chart {
 public:
  Chart(std::string title, Axis x, Axis y) : x_(std::move(x)), y_(std::move(y)) {
    body_ << "<text x=\"" << left << "\" y=\"26\" font-size=\"16\" font-weight=\"bold\">" << escaped(title)
          << "</text>\n";
    for (const double value : x_.label.empty() ? std::vector<double>() : x_.ticks()) {
      line(px(value), top, px(value), top + height, "#dddddd", 1, "");
      text(px(value), top + height + 18, short_number(value), "middle", 11, "#333333");
    }
    for (const double value : y_.ticks()) {
      line(left, py(value), left + width, py(value), "#dddddd", 1, "");
      text(left - 8, py(value) + 4, short_number(value), "end", 11, "#333333");
    }
    body_ << "<rect x=\"" << left << "\" y=\"" << top << "\" width=\"" << width << "\" height=\"" << height
          << "\" fill=\"none\" stroke=\"#333333\"/>\n";
    text(left + width / 2, top + height + 42, x_.label, "middle", 13, "#000000");
    body_ << "<text transform=\"translate(20 " << top + height / 2
          << ") rotate(-90)\" text-anchor=\"middle\" font-size=\"13\">" << escaped(y_.label) << "</text>\n";
  }

  void polyline(const std::vector<std::pair<double, double>>& points, const std::string& color,
                const std::string& name, const std::string& dash = "") {
    body_ << "<polyline fill=\"none\" stroke=\"" << color << "\" stroke-width=\"1.8\"";
    if (!dash.empty()) body_ << " stroke-dasharray=\"" << dash << "\"";
    body_ << " points=\"";
    for (const auto& [x, y] : points) body_ << round_to(px(x)) << ',' << round_to(py(y)) << ' ';
    body_ << "\"/>\n";
    if (!name.empty()) legend(name, color, dash);
  }

  void point(double x, double y, const std::string& color, const std::string& hint) {
    body_ << "<circle cx=\"" << round_to(px(x)) << "\" cy=\"" << round_to(py(y)) << "\" r=\"3.6\" fill=\"" << color
          << "\" fill-opacity=\"0.85\"><title>" << escaped(hint) << "</title></circle>\n";
  }

  void legend(const std::string& name, const std::string& color, const std::string& dash = "") {
    const double y = top + 8 + 18 * static_cast<double>(entries_++);
    line(left + width + 14, y, left + width + 38, y, color, 3, dash);
    text(left + width + 44, y + 4, name, "start", 11, "#000000");
  }

  void label(double x, double y, const std::string& words, const std::string& color) {
    text(px(x), py(y) - 5, words, "start", 11, color);
  }

  void x_words(const std::vector<std::string>& words) {
    for (std::size_t i = 0; i < words.size(); ++i)
      body_ << "<text transform=\"translate(" << px(static_cast<double>(i)) << ' ' << top + height + 14
            << ") rotate(24)\" font-size=\"10\">" << escaped(words[i]) << "</text>\n";
  }

  bool write(const std::string& path) const {
    std::ofstream out(path);
    out << "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"860\" height=\"520\" viewBox=\"0 0 860 520\" "
           "font-family=\"sans-serif\">\n<rect width=\"860\" height=\"520\" fill=\"#ffffff\"/>\n"
        << body_.str();
    // What was measured where, in every picture.
    out << "<text x=\"" << left << "\" y=\"512\" font-size=\"10\" fill=\"#666666\">" << escaped(cpu_name()) << ", "
        << utc_now() << "</text>\n</svg>\n";
    out.flush();
    return static_cast<bool>(out);
  }

 private:
  static constexpr double left = 70;
  static constexpr double top = 44;
  static constexpr double width = 570;
  static constexpr double height = 400;

  static std::string escaped(const std::string& text) {
    std::string out;
    for (const char c : text) {
      if (c == '<')
        out += "&lt;";
      else if (c == '>')
        out += "&gt;";
      else if (c == '&')
        out += "&amp;";
      else
        out += c;
    }
    return out;
  }
  static double round_to(double value) { return std::round(value * 10) / 10; }

  double px(double value) const { return left + width * std::clamp(x_.at(value), 0.0, 1.0); }
  double py(double value) const { return top + height * (1 - std::clamp(y_.at(value), 0.0, 1.0)); }

  void line(double x1, double y1, double x2, double y2, const std::string& color, double thick,
            const std::string& dash) {
    body_ << "<line x1=\"" << round_to(x1) << "\" y1=\"" << round_to(y1) << "\" x2=\"" << round_to(x2)
          << "\" y2=\"" << round_to(y2) << "\" stroke=\"" << color << "\" stroke-width=\"" << thick << '"';
    if (!dash.empty()) body_ << " stroke-dasharray=\"" << dash << '"';
    body_ << "/>\n";
  }
  void text(double x, double y, const std::string& words, const char* anchor, int size, const std::string& color) {
    body_ << "<text x=\"" << round_to(x) << "\" y=\"" << round_to(y) << "\" text-anchor=\"" << anchor
          << "\" font-size=\"" << size << "\" fill=\"" << color << "\">" << escaped(words) << "</text>\n";
  }

  Axis x_;
  Axis y_;
  std::ostringstream body_;
  int entries_ = 0;
};

std::string kernel_name(const Row& row) {
  std::string name = row.kernel;
  if (row.group_size != 0) name += " g" + std::to_string(row.group_size);
  if (row.symmetry == "asymmetric") name += " zero point";
  if (row.symmetry == "float_offset") name += " offset";
  return name;
}

/// GOP/s against ops a byte, one thread, the best ISA that was measured; roofs are this run's limits.
bool draw_roofline(const std::string& path) {
  std::string isa;
  for (const Row& row : results().rows)
    if (row.suite == "gemm" && row.threads == 1)
      isa = std::max(isa, row.isa, [](const auto& a, const auto& b) {
        const auto rank = [](const std::string& name) {
          return name.empty() ? -1 : static_cast<int>(nibble::isa_from_name(name));
        };
        return rank(a) < rank(b);
      });
  std::vector<const Row*> rows;
  double most_gops = 10;
  double least_gops = 1e9;
  for (const Row& row : results().rows) {
    if (row.suite != "gemm" || row.threads != 1 || row.isa != isa || row.gops <= 0) continue;
    rows.push_back(&row);
    most_gops = std::max(most_gops, row.gops);
    least_gops = std::min(least_gops, row.gops);
  }
  if (rows.empty()) return true;
  std::vector<const LimitRow*> roofs;
  double l3 = 0;
  double dram = 0;
  double largest = 0;
  for (const LimitRow& limit : results().limits) {
    if (limit.threads != 1) continue;
    if (limit.gops > 0) {
      const bool mine = isa.substr(0, 6) == "avx512"
                            ? limit.name.find("avx512") != std::string::npos && limit.name != "dpwssd_avx512"
                            : limit.name.find("avx2") != std::string::npos && limit.name != "maddubs_paddw_avx2" &&
                                  limit.name != "maddubs_madd_avx2";
      if (mine) roofs.push_back(&limit);
      if (mine) most_gops = std::max(most_gops, limit.gops);
    } else {
      if (std::fabs(limit.megabytes - 8) < 0.5) l3 = limit.gbps;
      if (limit.megabytes > largest) {
        largest = limit.megabytes;
        dram = limit.gbps;
      }
    }
  }
  Chart chart("Roofline, one thread, " + isa, {0.2, 1000, true, "operations per byte (weights, x and y once)"},
              {least_gops / 2, most_gops * 1.5, true, "GOP/s"});
  std::sort(roofs.begin(), roofs.end(), [](const LimitRow* a, const LimitRow* b) { return a->gops < b->gops; });
  double below = 0;
  double label_at = 0;
  for (const LimitRow* roof : roofs) {
    const double corner = roof->gops / std::max({l3, dram, 1.0});
    chart.polyline({{std::max(0.2, corner), roof->gops}, {1000, roof->gops}}, "#999999", "", "5 3");
    // Roofs close to each other have their names side by side.
    label_at = roof->gops < below * 1.2 && label_at > 6 ? label_at / 5 : 130;
    below = roof->gops;
    chart.label(label_at, roof->gops, roof->name, "#777777");
  }
  for (const auto& [gbps, name] : {std::pair<double, std::string>{l3, "read 8 MB"}, {dram, "read DRAM"}}) {
    if (gbps <= 0) continue;
    std::vector<std::pair<double, double>> points;
    for (double x = std::max(0.2, least_gops / 2 / gbps); x * gbps < most_gops && x < 1000; x *= 1.2)
      points.emplace_back(x, x * gbps);
    chart.polyline(points, "#999999", name + ", " + short_number(gbps) + " GB/s",
                   name == "read DRAM" ? "" : "5 3");
  }
  std::map<std::string, std::string> colors;
  for (const Row* row : rows) {
    const std::string name = kernel_name(*row);
    if (colors.count(name) == 0) {
      const std::string color = palette[colors.size() % (sizeof palette / sizeof *palette)];
      colors[name] = color;
      chart.legend(name, color);
    }
    chart.point(ops_of(row->m, row->n, row->k) / row->bytes, row->gops, colors[name],
                name + ", " + std::to_string(row->n) + " x " + std::to_string(row->k) +
                    ", m = " + std::to_string(row->m) + ": " + short_number(row->gops) + " GOP/s");
  }
  return chart.write(path);
}

bool draw_sweep_tokens(const std::string& path) {
  std::map<std::string, std::vector<std::pair<double, double>>> lines;
  double most_gops = 0;
  double most_tokens = 2;
  std::string where;
  for (const Row& row : results().rows) {
    if (row.suite != "sweep_tokens") continue;
    lines[kernel_name(row)].emplace_back(row.m, row.gops);
    most_gops = std::max(most_gops, row.gops);
    most_tokens = std::max(most_tokens, static_cast<double>(row.m));
    where = std::to_string(row.n) + " x " + std::to_string(row.k) + ", " + row.isa;
  }
  if (lines.empty()) return true;
  Chart chart("GOP/s over tokens, " + where + ", one thread", {1, most_tokens, false, "tokens (m)"},
              {0, most_gops * 1.1, false, "GOP/s"});
  std::size_t color = 0;
  for (const auto& [name, points] : lines) {
    chart.polyline(points, palette[color], name);
    for (const auto& [m, gops] : points)
      chart.point(m, gops, palette[color], name + ", m = " + short_number(m) + ": " + short_number(gops));
    color = (color + 1) % (sizeof palette / sizeof *palette);
  }
  return chart.write(path);
}

bool draw_sweep_shapes(const std::string& path) {
  std::vector<std::string> shapes;
  std::map<std::string, std::vector<std::pair<double, double>>> lines;
  double most_gops = 0;
  for (const Row& row : results().rows) {
    if (row.suite != "sweep_shapes") continue;
    const std::string shape = std::to_string(row.n) + "x" + std::to_string(row.k);
    if (shapes.empty() || std::find(shapes.begin(), shapes.end(), shape) == shapes.end()) shapes.push_back(shape);
    if (row.m == 3) continue;
    const auto at = std::find(shapes.begin(), shapes.end(), shape) - shapes.begin();
    lines[kernel_name(row) + ", m = " + std::to_string(row.m)].emplace_back(static_cast<double>(at), row.gops);
    most_gops = std::max(most_gops, row.gops);
  }
  if (lines.empty()) return true;
  Chart chart("GOP/s over odd shapes (outputs x inputs), one thread",
              {0, std::max(1.0, static_cast<double>(shapes.size() - 1)) + 0.001, false, ""},
              {0, most_gops * 1.1, false, "GOP/s"});
  chart.x_words(shapes);
  std::size_t color = 0;
  for (const auto& [name, points] : lines) {
    chart.polyline(points, palette[color], name);
    for (const auto& [i, gops] : points)
      chart.point(i, gops, palette[color],
                  name + ", " + shapes[static_cast<std::size_t>(i)] + ": " + short_number(gops));
    color = (color + 1) % (sizeof palette / sizeof *palette);
  }
  return chart.write(path);
}

}  // namespace

void write_svg(const std::string& folder) {
  const bool ok = draw_roofline(folder + "/roofline.svg") && draw_sweep_tokens(folder + "/sweep_tokens.svg") &&
                  draw_sweep_shapes(folder + "/sweep_shapes.svg");
  if (!ok) {
    std::fprintf(stderr, "nibble_benchmarks: cannot write into %s\n", folder.c_str());
    std::exit(1);
  }
}

}  // namespace bench
