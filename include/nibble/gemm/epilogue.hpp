// What happens to an accumulator on its way out.
#pragma once

#include <Eigen/Core>
#include <array>
#include <cstddef>
#include <type_traits>

#include "nibble/core/error.hpp"
#include "nibble/kernels/args.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// A chain of steps applied to every output in the order in which they were added:
///
///     Epilogue().bias(b).add(residual).relu()
///
/// Vectors have one element an output channel (n), matrices the shape of Y (n x m, column-major, contiguous columns).
/// They are referred to, not copied: they must outlive the product. `add` and `multiply` may refer to Y itself.
/// At most 8 steps.
class Epilogue {
 public:
  static constexpr std::size_t max_steps = 8;

  /// Multiplies channel c by v[c].
  template <class D>
  Epilogue& scale(const Eigen::DenseBase<D>& v) {
    return push_vector(detail::EpilogueOpKind::scale, v.derived(), "epilogue scale");
  }
  /// Adds v[c] to channel c.
  template <class D>
  Epilogue& bias(const Eigen::DenseBase<D>& v) {
    return push_vector(detail::EpilogueOpKind::bias, v.derived(), "epilogue bias");
  }
  /// Adds a matrix of Y's shape, such as a residual.
  template <class D>
  Epilogue& add(const Eigen::DenseBase<D>& m) {
    return push_matrix(detail::EpilogueOpKind::add, m.derived(), "epilogue add");
  }
  /// Multiplies by a matrix of Y's shape, such as SwiGLU's other half.
  template <class D>
  Epilogue& multiply(const Eigen::DenseBase<D>& m) {
    return push_matrix(detail::EpilogueOpKind::multiply, m.derived(), "epilogue multiply");
  }
  // A temporary would be gone before the product runs.
  template <class D>
  Epilogue& scale(Eigen::PlainObjectBase<D>&&) = delete;
  template <class D>
  Epilogue& bias(Eigen::PlainObjectBase<D>&&) = delete;
  template <class D>
  Epilogue& add(Eigen::PlainObjectBase<D>&&) = delete;
  template <class D>
  Epilogue& multiply(Eigen::PlainObjectBase<D>&&) = delete;

  Epilogue& relu() { return push(detail::EpilogueOpKind::relu, nullptr, 0, 0, 0); }
  /// v / (1 + exp(-v)).
  Epilogue& silu() { return push(detail::EpilogueOpKind::silu, nullptr, 0, 0, 0); }
  /// The tanh form of GELU (Hendrycks and Gimpel 2016, equation 2).
  Epilogue& gelu() { return push(detail::EpilogueOpKind::gelu, nullptr, 0, 0, 0); }

  /// Appends another chain's steps.
  Epilogue& append(const Epilogue& other) {
    const std::size_t n = other.count_;
    for (std::size_t i = 0; i < n; ++i) {
      const Step s = other.steps_[i];
      push(s.op.kind, s.op.data, s.op.stride, s.rows, s.cols, s.name);
    }
    return *this;
  }

  std::size_t steps() const noexcept { return count_; }

  /// Throws InvalidArgument unless every step fits outputs of n channels by m tokens.
  void check(Eigen::Index n, Eigen::Index m) const {
    for (std::size_t i = 0; i < count_; ++i) {
      const Step& s = steps_[i];
      if (s.op.data == nullptr && s.rows == 0) continue;
      detail::require(s.rows == n, s.name, " has ", s.rows, " channels, expected ", n);
      detail::require(s.cols < 0 || s.cols == m, s.name, " has ", s.cols, " tokens, expected ", m);
    }
  }

  const detail::EpilogueOp& op(std::size_t i) const noexcept { return steps_[i].op; }

 private:
  struct Step {
    detail::EpilogueOp op;
    Eigen::Index rows = 0;
    Eigen::Index cols = -1;  // -1: a vector
    const char* name = "";
  };

  template <class D>
  Epilogue& push_vector(detail::EpilogueOpKind kind, const D& v, const char* name) {
    static_assert(std::is_same_v<typename D::Scalar, float>, "an epilogue's vectors are float");
    static_assert((static_cast<int>(D::Flags) & Eigen::DirectAccessBit) != 0, "evaluate the expression first");
    detail::require(v.rows() == 1 || v.cols() == 1 || v.size() == 0, name, " is ", v.rows(), " x ", v.cols(),
                    ", expected a vector");
    detail::require(v.size() <= 1 || v.innerStride() == 1, name, " has stride ", v.innerStride(), ", expected 1");
    return push(kind, v.data(), 0, v.size(), -1, name);
  }

  template <class D>
  Epilogue& push_matrix(detail::EpilogueOpKind kind, const D& m, const char* name) {
    static_assert(std::is_same_v<typename D::Scalar, float>, "an epilogue's matrices are float");
    static_assert((static_cast<int>(D::Flags) & Eigen::DirectAccessBit) != 0, "evaluate the expression first");
    static_assert(!D::IsRowMajor || D::RowsAtCompileTime == 1, "an epilogue's matrices are column-major");
    detail::require(m.rows() <= 1 || m.innerStride() == 1, name, " has inner stride ", m.innerStride(),
                    ", expected 1");
    return push(kind, m.data(), static_cast<std::size_t>(m.outerStride()), m.rows(), m.cols(), name);
  }

  Epilogue& push(detail::EpilogueOpKind kind, const float* data, std::size_t stride, Eigen::Index rows,
                 Eigen::Index cols, const char* name = "") {
    detail::require(count_ < max_steps, "an epilogue has at most ", max_steps, " steps");
    steps_[count_++] = Step{{kind, data, stride}, rows, cols, name};
    return *this;
  }

  std::array<Step, max_steps> steps_{};
  std::size_t count_ = 0;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
