// What is trained: named blocks of floats with their gradients, and what is done to all of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Floats that an optimizer changes. The memory is its owner's and stays where it is.
struct Parameter {
  std::string name;
  float* value = nullptr;
  float* gradient = nullptr;
  std::size_t size = 0;
  bool decay = true;  ///< whether weight decay applies: usually to matrices, not to norms
  float rate = 1.0F;  ///< multiplies the learning rate
};

/// All parameters of a model, in an order that does not change; names are unique.
using Parameters = std::vector<Parameter>;

/// The floats of all parameters together.
inline std::size_t count(const Parameters& parameters) noexcept {
  std::size_t floats = 0;
  for (const Parameter& p : parameters) floats += p.size;
  return floats;
}

/// Throws InvalidArgument for a name that is empty or there twice, and for memory that is missing.
inline void check(const Parameters& parameters) {
  std::unordered_set<std::string_view> names;
  for (const Parameter& p : parameters) {
    detail::require(!p.name.empty(), "a parameter of ", p.size, " elements has no name");
    detail::require(names.insert(p.name).second, "two parameters are called '", p.name, "'");
    detail::require(p.size == 0 || (p.value != nullptr && p.gradient != nullptr), "parameter '", p.name,
                    "' has no ", p.value == nullptr ? "value" : "gradient");
    detail::require(std::isfinite(p.rate) && p.rate >= 0.0F, "parameter '", p.name, "' has rate ", p.rate,
                    ", expected a number from 0 on");
  }
}

namespace detail {

/// Elements of one task of what works parameter by parameter; sums are cut here, whatever the threads.
inline constexpr std::size_t parameter_chunk = 16384;

/// Parameters in pieces of at most parameter_chunk elements, in order.
class ParameterChunks {
 public:
  explicit ParameterChunks(const Parameters& parameters) {
    for (std::size_t p = 0; p < parameters.size(); ++p)
      for (std::size_t at = 0; at < parameters[p].size; at += parameter_chunk)
        chunks_.push_back({p, at, std::min(parameter_chunk, parameters[p].size - at)});
  }

  std::size_t size() const noexcept { return chunks_.size(); }

  /// f(parameter's index, first element, elements, chunk) for all.
  template <class F>
  void run(ThreadPool* pool, F&& f) const {
    for_tasks(pool, chunks_.size(), [&](std::size_t task, std::size_t) {
      const FpEnvironment environment;
      f(chunks_[task].parameter, chunks_[task].first, chunks_[task].count, task);
    });
  }

 private:
  struct Chunk {
    std::size_t parameter, first, count;
  };
  std::vector<Chunk> chunks_;
};

/// The sum of x[i]^2. Squares of floats are exact in double; 8 sums side by side, then those in order.
inline double sum_of_squares(const float* x, std::size_t n) noexcept {
  double sums[8] = {};
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (std::size_t j = 0; j < 8; ++j) {
      const auto v = static_cast<double>(x[i + j]);
      sums[j] += v * v;
    }
  double total = 0.0;
  for (const double s : sums) total += s;
  for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return total;
}

}  // namespace detail

/// Every gradient becomes 0.
inline void zero_gradients(const Parameters& parameters, ThreadPool* pool = nullptr) {
  detail::ParameterChunks(parameters).run(pool, [&](std::size_t p, std::size_t first, std::size_t n, std::size_t) {
    std::fill_n(parameters[p].gradient + first, n, 0.0F);
  });
}

/// The Euclidean norm of all gradients together; NaN or Inf where one of them is not finite. Sums are in double, in fixed
/// chunks: the bits do not depend on threads.
inline double gradient_norm(const Parameters& parameters, ThreadPool* pool = nullptr) {
  const detail::ParameterChunks chunks(parameters);
  std::vector<double> squares(chunks.size());
  chunks.run(pool, [&](std::size_t p, std::size_t first, std::size_t n, std::size_t chunk) {
    squares[chunk] = detail::sum_of_squares(parameters[p].gradient + first, n);
  });
  double total = 0.0;
  for (const double s : squares) total += s;
  return std::sqrt(total);
}

/// The two blocks of floats of a parameter.
enum class ParameterPart : bool { value, gradient };

/// Throws InvalidArgument for the first NaN or Inf among all values or gradients; the message has the parameter's name, the
/// element's index and `when`: "gradient of 'layers.0.up' is nan at element 17 (step 12)".
inline void require_finite(const Parameters& parameters, ParameterPart part, std::string_view when = {},
                           ThreadPool* pool = nullptr) {
  const auto data = [part](const Parameter& p) { return part == ParameterPart::value ? p.value : p.gradient; };
  const detail::ParameterChunks chunks(parameters);
  std::vector<char> finite(chunks.size());
  chunks.run(pool, [&](std::size_t p, std::size_t first, std::size_t n, std::size_t chunk) {
    finite[chunk] = std::isfinite(detail::sum_of_squares(data(parameters[p]) + first, n)) ? 1 : 0;
  });
  if (std::find(finite.begin(), finite.end(), 0) == finite.end()) return;
  for (const Parameter& p : parameters)
    for (std::size_t i = 0; i < p.size; ++i)
      detail::require(std::isfinite(data(p)[i]), part == ParameterPart::value ? "value" : "gradient", " of '",
                      p.name, "' is ", data(p)[i], " at element ", i, when.empty() ? "" : " (", when,
                      when.empty() ? "" : ")");
}

/// Where the gradients' norm is above max_norm, multiplies all of them by max_norm / norm. Returns the norm that it found.
/// Throws InvalidArgument, and changes nothing, for a gradient that is not finite (see require_finite) and a max_norm that
/// is not above 0. Source: Pascanu, Mikolov, Bengio 2013, algorithm 1.
inline double clip_gradients(const Parameters& parameters, double max_norm, ThreadPool* pool = nullptr,
                             std::string_view when = {}) {
  detail::require(max_norm > 0.0, "max_norm is ", max_norm, ", expected a number above 0");
  const detail::FpEnvironment environment;
  const double norm = gradient_norm(parameters, pool);
  if (!std::isfinite(norm)) require_finite(parameters, ParameterPart::gradient, when, pool);
  if (norm <= max_norm) return norm;
  const auto factor = static_cast<float>(max_norm / norm);
  detail::ParameterChunks(parameters).run(pool, [&](std::size_t p, std::size_t first, std::size_t n, std::size_t) {
    float* g = parameters[p].gradient + first;
    for (std::size_t i = 0; i < n; ++i) g[i] *= factor;
  });
  return norm;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
