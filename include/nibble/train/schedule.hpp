// Learning rates over the steps of a run.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "nibble/core/error.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

enum class ScheduleKind : std::uint8_t {
  constant,
  linear,  ///< falls in a line to the floor
  cosine,  ///< falls in half a cosine to the floor (Loshchilov and Hutter 2017, equation 5)
  wsd,     ///< stays, then falls in a line to the floor within the last `decay` steps (Hu et al. 2024, MiniCPM)
};

constexpr std::string_view name_of(ScheduleKind kind) noexcept {
  switch (kind) {
    case ScheduleKind::constant: return "constant";
    case ScheduleKind::linear: return "linear";
    case ScheduleKind::cosine: return "cosine";
    default: return "wsd";
  }
}

/// Every kind starts with a warm-up: step i < warmup has peak (i + 1) / warmup.
struct Schedule {
  ScheduleKind kind = ScheduleKind::cosine;
  double peak = 1e-3;
  double floor = 0.0;       ///< the rate after the last step, a part of the peak: 0 to 1
  std::uint64_t steps = 1;  ///< of the whole run, warm-up included
  std::uint64_t warmup = 0;
  std::uint64_t decay = 0;  ///< wsd: steps of the fall

  /// Throws InvalidArgument for what does not fit together.
  void check() const {
    detail::require(kind <= ScheduleKind::wsd, "unknown schedule ", static_cast<int>(kind));
    detail::require(peak >= 0.0 && std::isfinite(peak), "schedule: peak is ", peak,
                    ", expected a number from 0 on");
    detail::require(floor >= 0.0 && floor <= 1.0, "schedule: floor is ", floor, ", expected 0 to 1");
    detail::require(steps >= 1, "schedule: steps is 0, expected at least 1");
    detail::require(warmup <= steps, "schedule: warmup is ", warmup, ", expected at most ", steps, ", all steps");
    detail::require(kind != ScheduleKind::wsd || decay <= steps - warmup, "schedule: decay is ", decay,
                    ", expected at most ", steps - warmup, ", the steps after the warm-up");
  }

  /// The rate of step 0, 1, ...; of later steps than the last, the floor's (constant: the peak).
  double rate(std::uint64_t step) const noexcept {
    if (step < warmup) return peak * (static_cast<double>(step + 1) / static_cast<double>(warmup));
    if (kind == ScheduleKind::constant) return peak;
    const std::uint64_t start = kind == ScheduleKind::wsd ? steps - decay : warmup;
    if (step < start) return peak;
    if (step >= steps) return peak * floor;
    const double done = static_cast<double>(step - start) / static_cast<double>(steps - start);
    constexpr double pi = 3.14159265358979323846;
    const double left = kind == ScheduleKind::cosine ? (1.0 + std::cos(pi * done)) / 2.0 : 1.0 - done;
    return peak * (floor + (1.0 - floor) * left);
  }
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
