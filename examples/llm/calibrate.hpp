// Static scales of activations: a model runs over a calibration text, and every linear layer's inputs are observed.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "linear.hpp"
#include "model.hpp"
#include "nibble/ptq/observers.hpp"
#include "nibble/quantize/range.hpp"
#include "runner.hpp"

namespace llm {

struct CalibrateOptions {
  std::size_t group = 0;  // inputs that share a scale, a multiple of 16; 0: one for all
  /// Percent of the magnitudes that the scales reach, those beyond to stay floats (activation_outliers); 100: all, and
  /// what another text has beyond is clamped. The first token of a text and a few others have values some hundred times
  /// as large as all the rest's (attention sinks): scales that reach these lose everything else.
  double percentile = 100.0;
  /// Makes the observer of a layer in the place of a percentile's. Ranges become symmetric: scale = max(-lo, hi) / 127.
  std::function<std::unique_ptr<nibble::RangeObserver>()> observer = {};
  nibble::Activations activations = nibble::Activations::fp32;  // while calibrating
  nibble::ThreadPool* pool = nullptr;
};

namespace calibrate_detail {

/// One range observer a layer and input.
class ScaleObserver : public InputObserver {
 public:
  ScaleObserver(const Model& model, const CalibrateOptions& options) : group_(options.group) {
    nibble::PercentileOptions percentile;
    percentile.percentile = options.percentile;
    for (const Layer& l : model.layers) {
      const Linear* before = nullptr;
      for (const Linear* w : l.linears()) {
        // Query, key and value see the same, and gate and up.
        const bool shared = before != nullptr && w != &l.output && w != &l.gate && w != &l.down &&
                            same_input(before->extras(), w->extras());
        if (!shared) {
          before = w;
          if (options.observer)
            observers_[w] = options.observer();
          else if (options.percentile < 100.0)
            observers_[w] = std::make_unique<nibble::PercentileObserver>(percentile);
          else
            observers_[w] = std::make_unique<nibble::MinMaxObserver>();
        }
        owners_[w] = before;
      }
    }
  }
  void see(const Linear& w, const Eigen::Ref<const Eigen::MatrixXf>& x) override {
    if (owners_.at(&w) != &w) return;
    nibble::RangeObserver& observer = *observers_.at(&w);
    const auto inputs = static_cast<std::size_t>(x.rows());
    const std::size_t length = group_ == 0 ? inputs : group_;
    observer.begin(groups(inputs));
    for (Eigen::Index t = 0; t < x.cols(); ++t) {
      nibble::detail::require(x.col(t).allFinite(), "calibration: token ", t,
                              " of a batch has an activation that is not finite");
      for (std::size_t g = 0; g < groups(inputs); ++g)
        observer.observe(g, x.col(t).data() + g * length, std::min(length, inputs - g * length));
    }
  }
  std::vector<float> scales(const Linear& w) const {
    std::vector<float> out;
    for (std::size_t g = 0; g < groups(static_cast<std::size_t>(w.cols())); ++g) {
      const nibble::Range r = observers_.at(owners_.at(&w))->range(g);
      const float widest = std::max(-r.lo, r.hi);
      // As QuantizeRowsArgs: 1 where all is 0.
      out.push_back(widest > 0.0F ? std::max(widest / 127.0F, std::numeric_limits<float>::min()) : 1.0F);
    }
    return out;
  }

 private:
  static bool same_input(const LinearExtras* a, const LinearExtras* b) {
    const LinearExtras none;
    return (a != nullptr ? *a : none).same_input(b != nullptr ? *b : none);
  }
  std::size_t groups(std::size_t inputs) const { return group_ == 0 ? 1 : (inputs + group_ - 1) / group_; }

  std::size_t group_;
  std::map<const Linear*, std::unique_ptr<nibble::RangeObserver>> observers_;
  std::map<const Linear*, const Linear*> owners_;  // whose observer a linear's input is
};

}  // namespace calibrate_detail

/// What the blocks' linear layers of `model` need beside their weights, by the name of the matrix, with static scales from
/// running the windows, each on its own. Deterministic: threads change no bit.
/// Throws InvalidArgument without windows, for a window without tokens, and for activations that are not finite.
inline std::map<std::string, LinearExtras> calibrate(const Model& model,
                                                     const std::vector<std::vector<Token>>& windows,
                                                     const CalibrateOptions& options = {}) {
  nibble::detail::require(!windows.empty(), "calibration needs at least one window of tokens");
  nibble::detail::require(options.percentile > 0.0 && options.percentile <= 100.0, "calibration percentile is ",
                          options.percentile, ", expected above 0 to 100");
  nibble::detail::require(options.group % 16 == 0, "calibration group is ", options.group,
                          ", expected a multiple of 16");
  calibrate_detail::ScaleObserver observer(model, options);
  RunnerOptions running;
  running.context = 1;
  for (std::size_t w = 0; w < windows.size(); ++w) {
    nibble::detail::require(!windows[w].empty(), "calibration window ", w, " has no tokens");
    running.context = std::max(running.context, windows[w].size());
  }
  running.activations = options.activations;
  running.pool = options.pool;
  running.observer = &observer;
  Runner runner(model, running);
  auto cache = runner.new_cache();
  for (const std::vector<Token>& window : windows) {
    cache.clear();
    runner.append(cache, window.data(), window.size());
  }
  static constexpr const char* names[] = {"attn_q",   "attn_k", "attn_v",  "attn_output",
                                          "ffn_gate", "ffn_up", "ffn_down"};
  std::map<std::string, LinearExtras> all;
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    const std::array<const Linear*, 7> linears = model.layers[i].linears();
    for (std::size_t j = 0; j < linears.size(); ++j) {
      LinearExtras extras = linears[j]->extras() != nullptr ? *linears[j]->extras() : LinearExtras();
      extras.activation_scales = observer.scales(*linears[j]);
      extras.activation_group = options.group;
      extras.activation_outliers = options.percentile < 100.0;
      all.emplace("blk." + std::to_string(i) + "." + names[j] + ".weight", std::move(extras));
    }
  }
  return all;
}

}  // namespace llm
