// Rotary position embedding.
#pragma once

#include <cmath>
#include <cstddef>
#include <memory>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/kernels/dispatch.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Shape and frequencies of a Rope.
struct RopeOptions {
  std::size_t dimensions = 0;  ///< even; the first of every head that turn
  std::size_t positions = 0;
  double base = 10000.0;
  double linear_scale = 1.0;  ///< positions are divided by it
  std::vector<float> divisors =
      {};  ///< one a pair, or none; Llama 3's long-context scaling divides frequencies by them
};

/// Rotary position embedding over adjacent pairs, as GGUF's Llama files have their rows (Su 2021, equation 34): pair i at
/// position p turns by p * base^(-2i / dimensions).
class Rope {
 public:
  Rope() = default;

  /// Reserves the tables; prepare() fills them. Throws InvalidArgument where dimensions is odd or divisors do not fit.
  explicit Rope(const RopeOptions& options) : options_(options) {
    const std::size_t pairs = options.dimensions / 2;
    detail::require(options.dimensions % 2 == 0, "rope dimensions is ", options.dimensions,
                    ", expected an even number");
    detail::require(options.divisors.empty() || options.divisors.size() == pairs, "rope has ",
                    options.divisors.size(), " divisors, expected none or ", pairs);
    frequencies_.resize(pairs);
    for (std::size_t i = 0; i < pairs; ++i) {
      frequencies_[i] =
          std::pow(options.base, -2.0 * static_cast<double>(i) / static_cast<double>(options.dimensions));
      if (!options.divisors.empty()) frequencies_[i] /= static_cast<double>(options.divisors[i]);
    }
    const std::size_t size = detail::checked_mul(
        detail::checked_mul(options.positions, options.dimensions, "rope table"), 2, "rope table");
    table_.reset(new float[size]);  // written when it is needed
    inverse_.reset(new float[size / 2]);
  }

  /// Computes the angles of positions [0, positions); what was computed stays. Not while others use this.
  void prepare(std::size_t positions) {
    detail::require(positions <= options_.positions, "rope is asked for position ", positions - 1,
                    ", expected below ", options_.positions);
    for (; prepared_ < positions; ++prepared_) {
      float* cosines = row(prepared_);
      float* sines = cosines + options_.dimensions;
      float* back = inverse_.get() + prepared_ * options_.dimensions;
      for (std::size_t i = 0; i < frequencies_.size(); ++i) {
        const double angle = static_cast<double>(prepared_) / options_.linear_scale * frequencies_[i];
        const auto cosine = static_cast<float>(std::cos(angle));
        const auto sine = static_cast<float>(std::sin(angle));
        cosines[2 * i] = cosine;
        cosines[2 * i + 1] = cosine;
        sines[2 * i] = -sine;
        sines[2 * i + 1] = sine;
        back[2 * i] = sine;
        back[2 * i + 1] = -sine;
      }
    }
  }

  /// Turns back by the same angle what apply() has turned: its inverse but for the scale, and the gradient's way through it
  /// (a rotation's transpose). The same constraints.
  void apply_inverse(float* x, std::size_t heads, std::size_t head_size, std::size_t position, float scale = 1.0F,
                     const detail::KernelTable& kernels = detail::kernels()) const {
    turn(x, heads, head_size, position, scale, true, kernels);
  }

  /// Turns `heads` heads of head_size floats at x, in place, for a position that is prepared, and multiplies all by
  /// `scale` (1 / sqrt(head_size) for queries). Safe from several threads.
  void apply(float* x, std::size_t heads, std::size_t head_size, std::size_t position, float scale = 1.0F,
             const detail::KernelTable& kernels = detail::kernels()) const {
    turn(x, heads, head_size, position, scale, false, kernels);
  }

 private:
  void turn(float* x, std::size_t heads, std::size_t head_size, std::size_t position, float scale, bool back,
            const detail::KernelTable& kernels) const {
    detail::require(position < prepared_, "rope position is ", position, ", prepared are ", prepared_);
    detail::require(head_size >= options_.dimensions, "head_size is ", head_size, ", expected at least the ",
                    options_.dimensions, " dimensions of rope");
    const detail::FpEnvironment environment;
    detail::RopeArgs args;
    args.x = x;
    args.heads = heads;
    args.head_size = head_size;
    args.pairs = frequencies_.size();
    args.cosines = row(position);
    args.sines = back ? inverse_.get() + position * options_.dimensions : args.cosines + options_.dimensions;
    args.scale = scale;
    kernels.rope(args);
  }

  float* row(std::size_t position) const noexcept { return table_.get() + position * 2 * options_.dimensions; }

  RopeOptions options_;
  std::vector<double> frequencies_;
  std::size_t prepared_ = 0;
  std::unique_ptr<float[]> table_;    // [positions][cosines, sines][dimensions]
  std::unique_ptr<float[]> inverse_;  // [positions][dimensions], sines of the angles back
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
