// A format and method for every matrix of a model, under a budget: mixed precision as a multiple-choice knapsack.
//
// Objective. Every layer i has candidates j (a format, a group, a method) of bytes b_ij - codes, scales and zero points,
// exactly - and a predicted loss l_ij. One candidate a layer is chosen so that
//
//   sum l_i,j(i) is least   while   sum b_i,j(i) <= budget        (minimize_loss)
//   sum b_i,j(i) is least   while   sum l_i,j(i) <= limit         (minimize_bytes)
//
// Losses of layers are taken to add up, which holds to first order for small errors.
//
// Sensitivity. l_ij = measured_i * error_ij / error_i,ref: measured_i is the increase of the loss (KL divergence to the
// float model, or NLL) on calibration text with layer i alone at a reference format, error = tr(E H E^T) is the squared
// error that a candidate makes at the layer's outputs on that text (quadratic_error()). To second order the model's loss
// is quadratic in the error at a layer's output; the measurement scales it, so that the costly passes through the model
// are one a layer, not one a candidate.
//
// Solver. Exact: states (bytes, loss) of the first layers, kept where no other is as good in both; those that cannot be
// completed to better than the best known solution are dropped by a Lagrangian bound. The multiplier is that of the
// linear relaxation, solved greedily over the layers' convex hulls, whose value also bounds what any choice can
// achieve: a result carries that bound. Where more states than allowed are left, they are thinned, and the result says
// that it is not proven optimal; the bound still says how far off it can be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/quantize/scheme.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// One way to store a layer.
struct TuneCandidate {
  std::size_t bytes = 0;  ///< codes, scales and zero points; at most 2^52
  double loss = 0.0;      ///< predicted; may be negative
  std::string label;      ///< for people and recipes
};

struct TuneLayer {
  std::string name;
  std::vector<TuneCandidate> candidates;  ///< at least one
};

struct TuneOptions {
  std::size_t max_states = std::size_t{1} << 20;  ///< of one layer; beyond it states are thinned
};

struct TuneResult {
  std::vector<std::size_t> choice;  ///< a candidate a layer
  std::size_t bytes = 0;
  double loss = 0.0;
  /// No choice has an objective below it (loss or bytes, whichever was minimized).
  double bound = 0.0;
  bool proven = true;      ///< the choice is optimal
  std::size_t states = 0;  ///< most that a layer had: how hard it was
};

/// Bytes of an n x k matrix under a scheme: codes, scales and zero points of a QuantizedTensor.
inline std::size_t quantized_bytes(const Scheme& scheme, std::size_t rows, std::size_t cols) {
  const detail::CodeLayout layout(scheme, {rows, cols});
  return layout.code_bytes() + layout.scale_bytes() + layout.zero_bytes();
}

/// The same as packed files and products have it, whole panels, without channel sums.
inline std::size_t packed_bytes(const Scheme& scheme, std::size_t rows, std::size_t cols) {
  const detail::PackedShape shape = detail::shape_of({detail::resolve(scheme, {rows, cols}), rows, cols});
  return shape.codes_bytes + shape.scales_bytes + shape.zeros_bytes;
}

/// A candidate's loss by the sensitivity model at the head of this file. Noise can make a measured increase negative:
/// it counts as 0, as does a layer whose reference makes no error. Throws InvalidArgument for what is not finite and
/// for negative errors.
inline double predicted_loss(double measured, double reference_error, double error) {
  detail::require(std::isfinite(measured) && std::isfinite(reference_error) && std::isfinite(error) &&
                      reference_error >= 0.0 && error >= 0.0,
                  "predicted loss of measured ", measured, ", reference_error ", reference_error, " and error ",
                  error, ": expected numbers, errors not negative");
  if (measured <= 0.0 || reference_error == 0.0) return 0.0;
  return measured * (error / reference_error);
}

namespace detail {

/// min sum cost subject to sum weight <= limit, one item a layer.
class ChoiceKnapsack {
 public:
  struct Item {
    double weight = 0.0;
    double cost = 0.0;
    std::size_t index = 0;  // the caller's
  };

  /// items: of every layer at least one, finite.
  ChoiceKnapsack(std::vector<std::vector<Item>> layers, double limit, std::size_t max_states)
      : layers_(std::move(layers)), limit_(limit), max_states_(std::max<std::size_t>(max_states, 2)) {
    for (std::vector<Item>& items : layers_) drop_dominated(items);
  }

  double least_weight() const noexcept {
    double sum = 0.0;
    for (const std::vector<Item>& items : layers_) sum += items.front().weight;
    return sum;
  }

  struct Solution {
    std::vector<std::size_t> choice;
    double bound = 0.0;
    bool proven = true;
    std::size_t states = 0;
  };

  /// least_weight() must not be above the limit.
  Solution solve() {
    relax();
    run();
    Solution s;
    s.bound = bound_;
    s.proven = proven_;
    s.states = most_states_;
    for (std::size_t i = 0; i < layers_.size(); ++i) s.choice.push_back(layers_[i][choice_[i]].index);
    return s;
  }

 private:
  struct State {
    double weight = 0.0;
    double cost = 0.0;
    std::uint32_t before = 0;
    std::uint32_t item = 0;
  };
  struct Step {  // from a hull's point to its next
    double weight = 0.0;
    double cost = 0.0;  // negative
    std::uint32_t layer = 0;
    std::uint32_t to = 0;
  };

  /// Ascending weights, strictly falling costs; of equals the caller's first.
  static void drop_dominated(std::vector<Item>& items) {
    std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
      if (a.weight != b.weight) return a.weight < b.weight;
      return a.cost != b.cost ? a.cost < b.cost : a.index < b.index;
    });
    std::size_t kept = 0;
    for (const Item& item : items)
      if (kept == 0 || item.cost < items[kept - 1].cost) items[kept++] = item;
    items.resize(kept);
  }

  /// The linear relaxation: multiplier_, bound_, and a first solution in choice_.
  void relax() {
    const std::size_t n = layers_.size();
    std::vector<Step> steps;
    for (std::size_t i = 0; i < n; ++i) {
      const std::vector<Item>& items = layers_[i];
      std::vector<std::uint32_t> hull;
      for (std::uint32_t j = 0; j < items.size(); ++j) {
        while (hull.size() >= 2 && !turns(items[hull[hull.size() - 2]], items[hull.back()], items[j]))
          hull.pop_back();
        hull.push_back(j);
      }
      for (std::size_t h = 1; h < hull.size(); ++h)
        steps.push_back({items[hull[h]].weight - items[hull[h - 1]].weight,
                         items[hull[h]].cost - items[hull[h - 1]].cost, static_cast<std::uint32_t>(i), hull[h]});
    }
    // Steepest first; within a layer the hull is convex, so its steps stay in order.
    std::stable_sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) { return slope(a) < slope(b); });
    choice_.assign(n, 0);
    std::vector<bool> stopped(n, false);
    double weight = least_weight();
    multiplier_ = 0.0;
    for (const Step& step : steps) {
      if (stopped[step.layer]) continue;
      if (weight + step.weight <= limit_) {
        weight += step.weight;
        choice_[step.layer] = step.to;
        continue;
      }
      if (multiplier_ == 0.0) multiplier_ = -slope(step);
      stopped[step.layer] = true;
    }
    bound_ = -multiplier_ * limit_;
    double cost = 0.0;
    for (std::size_t i = 0; i < n; ++i) {
      bound_ += reduced(i);
      cost += layers_[i][choice_[i]].cost;
    }
    best_cost_ = cost;
  }
  static double slope(const Step& step) noexcept { return step.cost / step.weight; }
  /// Whether b lies below the line from a to c.
  static bool turns(const Item& a, const Item& b, const Item& c) noexcept {
    return (b.cost - a.cost) * (c.weight - a.weight) < (c.cost - a.cost) * (b.weight - a.weight);
  }
  /// min over a layer's items of cost + multiplier * weight.
  double reduced(std::size_t i) const noexcept {
    double least = std::numeric_limits<double>::infinity();
    for (const Item& item : layers_[i]) least = std::min(least, item.cost + rounded(multiplier_ * item.weight));
    return least;
  }

  void run() {
    const std::size_t n = layers_.size();
    // Of the layers from i on: the least weight and the least reduced cost.
    std::vector<double> rest_weight(n + 1, 0.0);
    std::vector<double> rest_cost(n + 1, 0.0);
    for (std::size_t i = n; i-- > 0;) {
      rest_weight[i] = rest_weight[i + 1] + layers_[i].front().weight;
      rest_cost[i] = rest_cost[i + 1] + reduced(i);
    }
    // Sums of doubles in different orders: what is this little worse than the best known is not dropped yet.
    const double slack = 1e-9 * (std::fabs(best_cost_) + std::fabs(bound_) + 1e-300);
    std::vector<std::vector<State>> fronts(1, std::vector<State>(1));
    std::vector<State> all;
    for (std::size_t i = 0; i < n; ++i) {
      all.clear();
      const std::vector<State>& from = fronts.back();
      for (std::uint32_t s = 0; s < from.size(); ++s)
        for (std::uint32_t j = 0; j < layers_[i].size(); ++j) {
          const double weight = from[s].weight + layers_[i][j].weight;
          const double cost = from[s].cost + layers_[i][j].cost;
          if (weight + rest_weight[i + 1] > limit_) break;  // later items weigh more
          const double least = cost + rest_cost[i + 1] + rounded(multiplier_ * (weight - limit_));
          if (least > best_cost_ + slack) continue;
          all.push_back({weight, cost, s, j});
        }
      std::sort(all.begin(), all.end(), [](const State& a, const State& b) {
        if (a.weight != b.weight) return a.weight < b.weight;
        if (a.cost != b.cost) return a.cost < b.cost;
        return a.before != b.before ? a.before < b.before : a.item < b.item;
      });
      std::vector<State> front;
      for (const State& s : all)
        if (front.empty() || s.cost < front.back().cost) front.push_back(s);
      if (front.size() > max_states_) thin(front);
      most_states_ = std::max(most_states_, front.size());
      fronts.push_back(std::move(front));
    }
    // The last has the least cost. None is left only where thinning has lost all that is as good as the first solution.
    if (fronts.back().empty()) return;
    const State* last = &fronts.back().back();
    if (!proven_ && last->cost > best_cost_) return;
    for (std::size_t i = n; i-- > 0;) {
      choice_[i] = last->item;
      last = &fronts[i][last->before];
    }
  }

  /// Keeps the first state and, of every stretch of weights, the one of least cost.
  void thin(std::vector<State>& front) {
    proven_ = false;
    const double lowest = front.front().weight;
    const double width = (front.back().weight - lowest) / static_cast<double>(max_states_ - 1);
    std::vector<State> kept(1, front.front());
    std::size_t stretch = 0;
    for (std::size_t i = 1; i < front.size(); ++i) {
      const auto s = static_cast<std::size_t>((front[i].weight - lowest) / width);
      if (kept.size() > 1 && s == stretch)
        kept.back() = front[i];
      else
        kept.push_back(front[i]);
      stretch = s;
    }
    front = std::move(kept);
  }

  std::vector<std::vector<Item>> layers_;
  double limit_;
  std::size_t max_states_;
  double multiplier_ = 0.0;
  double bound_ = 0.0;
  double best_cost_ = 0.0;
  std::vector<std::size_t> choice_;  // places in layers_
  bool proven_ = true;
  std::size_t most_states_ = 0;
};

inline TuneResult tune(const std::vector<TuneLayer>& layers, double limit, bool by_loss,
                       const TuneOptions& options, const char* what) {
  constexpr auto most = std::size_t{1} << 52;
  std::vector<std::vector<ChoiceKnapsack::Item>> items;
  for (const TuneLayer& layer : layers) {
    require(!layer.candidates.empty(), "layer '", layer.name, "' has no candidates");
    items.emplace_back();
    for (std::size_t j = 0; j < layer.candidates.size(); ++j) {
      const TuneCandidate& c = layer.candidates[j];
      require(std::isfinite(c.loss), "layer '", layer.name, "', candidate '", c.label, "': loss is ", c.loss,
              ", expected a number");
      require(c.bytes <= most, "layer '", layer.name, "', candidate '", c.label, "': ", c.bytes,
              " bytes, at most ", most);
      const auto bytes = static_cast<double>(c.bytes);
      items.back().push_back(by_loss ? ChoiceKnapsack::Item{bytes, c.loss, j}
                                     : ChoiceKnapsack::Item{c.loss, bytes, j});
    }
  }
  ChoiceKnapsack knapsack(std::move(items), limit, options.max_states);
  require(knapsack.least_weight() <= limit, what, " is ", limit, ", the least that these candidates reach is ",
          knapsack.least_weight());
  const ChoiceKnapsack::Solution solution = knapsack.solve();
  TuneResult result;
  result.choice = solution.choice;
  result.bound = solution.bound;
  result.proven = solution.proven;
  result.states = solution.states;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    result.bytes += layers[i].candidates[result.choice[i]].bytes;
    result.loss += layers[i].candidates[result.choice[i]].loss;
  }
  return result;
}

}  // namespace detail

/// The choice of least predicted loss within `budget` bytes; of equal ones the smallest, then that with the earlier
/// candidates. Deterministic. Throws InvalidArgument where no choice fits, saying what the smallest takes, and for
/// candidates that are missing or not finite.
inline TuneResult minimize_loss(const std::vector<TuneLayer>& layers, std::size_t budget,
                                const TuneOptions& options = {}) {
  const detail::FpEnvironment environment;
  return detail::tune(layers, static_cast<double>(budget), true, options, "budget in bytes");
}

/// The smallest choice whose predicted loss is at most `limit`; of equal ones that of least loss. Throws as
/// minimize_loss does.
inline TuneResult minimize_bytes(const std::vector<TuneLayer>& layers, double limit,
                                 const TuneOptions& options = {}) {
  detail::require(std::isfinite(limit), "loss limit is ", limit, ", expected a number");
  const detail::FpEnvironment environment;
  return detail::tune(layers, limit, false, options, "loss limit");
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
