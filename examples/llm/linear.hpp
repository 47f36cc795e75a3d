// A linear layer: packed weights, and what its product may need beside them.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "hparams.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/ptq/hadamard.hpp"
#include "nibble/train/low_rank.hpp"

namespace llm {

/// y = W x'' + bias + side.scale side.b side.a x, where the input goes through, in this order and each only if it is there,
///   x'  = R^T x             a Hadamard rotation (HadamardRotation), the same for every token
///   x'' = x'[input_order]   column k of W multiplies input input_order[k]: GPTQ's act-order
/// and is then quantized, if the product is of integers.
struct LinearExtras {
  HadamardSpec hadamard;                   // block 0: none
  std::vector<std::uint32_t> input_order;  // a permutation of the inputs, or empty
  /// Static INT8: the scales of x'', one for each `activation_group` inputs; activation_group 0: one for all. Empty: none.
  std::vector<float> activation_scales;
  std::size_t activation_group = 0;
  /// Activations beyond their static scale's codes are multiplied as floats; else they are clamped.
  bool activation_outliers = false;
  /// Codes of the token itself, of so many bits; a scale a token, or one a token and group of inputs. 0: as one asks for.
  unsigned activation_bits = 0;
  bool activation_token = false;
  float outlier_threshold = 0.0F;  // LLM.int8(): activations from here on are multiplied as floats; 0: none are
  Eigen::VectorXf bias;            // of the outputs, or empty
  nibble::LowRank side;  // multiplied in floats beside W: an adapter, or what W's rounding lost; or empty

  bool empty() const {
    return hadamard.block == 0 && input_order.empty() && activation_scales.empty() && activation_bits == 0 &&
           outlier_threshold == 0.0F && bias.size() == 0 && side.empty();
  }
  /// True where x'' differs from x.
  bool transforms_input() const { return hadamard.block != 0 || !input_order.empty(); }
  /// True where x'' is the same for both.
  bool same_input(const LinearExtras& o) const { return hadamard == o.hadamard && input_order == o.input_order; }
  bool same_scales(const LinearExtras& o) const {
    return activation_group == o.activation_group && activation_outliers == o.activation_outliers &&
           activation_scales == o.activation_scales;
  }
};

/// Throws FormatError, naming `name`, for extras that do not fit a matrix of rows outputs and cols inputs.
inline void check(const LinearExtras& e, const std::string& name, std::size_t rows, std::size_t cols) {
  using nibble::FormatError;
  using nibble::detail::require;
  require<FormatError>(e.hadamard.block == 0 || cols % e.hadamard.block == 0, "'", name,
                       "' has a rotation in blocks of ", e.hadamard.block, ", expected a divisor of its ", cols,
                       " inputs");
  if (!e.input_order.empty()) {
    require<FormatError>(e.input_order.size() == cols, "'", name, "' has an order of ", e.input_order.size(),
                         " inputs, expected ", cols);
    std::vector<bool> seen(cols, false);
    for (const std::uint32_t k : e.input_order) {
      require<FormatError>(k < cols && !seen[k], "'", name, "': its order of inputs is no permutation of ", cols,
                           ": ", k, " is out of range or there twice");
      seen[k] = true;
    }
  }
  if (!e.activation_scales.empty()) {
    require<FormatError>(e.activation_group % 16 == 0, "'", name, "' has a scale for every ", e.activation_group,
                         " activations, expected a multiple of 16");
    const std::size_t groups = e.activation_group == 0 ? 1 : (cols + e.activation_group - 1) / e.activation_group;
    require<FormatError>(e.activation_scales.size() == groups, "'", name, "' has ", e.activation_scales.size(),
                         " scales of activations, expected ", groups);
    for (const float s : e.activation_scales)
      require<FormatError>(std::isfinite(s) && s > 0.0F, "'", name, "' has an activation scale of ", s,
                           ", expected a positive number");
  }
  require<FormatError>(std::isfinite(e.outlier_threshold) && e.outlier_threshold >= 0.0F, "'", name,
                       "' has an outlier threshold of ", e.outlier_threshold, ", expected 0 or more");
  require<FormatError>(e.activation_bits == 0 || (e.activation_bits >= 2 && e.activation_bits <= 8), "'", name,
                       "' has activations of ", e.activation_bits, " bits, expected 2 to 8");
  require<FormatError>(e.activation_bits == 0 || e.activation_scales.empty(), "'", name,
                       "' has static scales of activations and others made from each token");
  require<FormatError>(!e.activation_outliers || !e.activation_scales.empty(), "'", name,
                       "' has outliers of static scales, but no static scales");
  require<FormatError>(e.bias.size() == 0 || static_cast<std::size_t>(e.bias.size()) == rows, "'", name,
                       "' has a bias of ", e.bias.size(), " elements, expected ", rows);
  require<FormatError>(e.bias.allFinite(), "'", name, "' has a bias that is not finite");
  require<FormatError>(
      e.side.empty() || (static_cast<std::size_t>(e.side.rows()) == rows &&
                         static_cast<std::size_t>(e.side.cols()) == cols && e.side.b.cols() == e.side.rank()),
      "'", name, "' has a side term of ", e.side.rows(), " x ", e.side.cols(), ", expected ", rows, " x ", cols);
  require<FormatError>(e.side.a.allFinite() && e.side.b.allFinite() && std::isfinite(e.side.scale), "'", name,
                       "' has a side term that is not finite");
}

/// A side term as products take it: y += b (a x).
struct PackedSide {
  nibble::PackedMatrix a;  // r x cols
  nibble::PackedMatrix b;  // rows x r, times the scale

  explicit PackedSide(const nibble::LowRank& side)
      : a(packed(side.a)), b(packed((side.b.cast<double>() * side.scale).cast<float>())) {}

 private:
  /// As FP16 where that holds every value.
  static nibble::PackedMatrix packed(const nibble::RowMajorMatrix& m) {
    const auto n = static_cast<std::size_t>(m.size());
    nibble::Buffer codes(2 * n);
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint16_t bits = nibble::fp16_from_float(m.data()[i]);
      if (nibble::float_from_fp16(bits) != m.data()[i]) return nibble::pack(m);
      codes.as_mutable<std::uint16_t>()[i] = bits;
    }
    nibble::Scheme scheme;
    scheme.format = nibble::Format::fp16;
    return nibble::pack(nibble::QuantizedTensor::from_parts(
        scheme, {static_cast<std::size_t>(m.rows()), static_cast<std::size_t>(m.cols())}, std::move(codes)));
  }
};

/// Cheap to copy: weights and extras are shared.
class Linear {
 public:
  Linear() = default;
  Linear(nibble::PackedMatrix weights) : weights_(std::move(weights)) {}  // NOLINT: a plain matrix is one
  /// Throws FormatError where the extras do not fit; `name` is for its message.
  Linear(nibble::PackedMatrix weights, LinearExtras extras, const std::string& name = "linear")
      : weights_(std::move(weights)) {
    if (extras.empty()) return;
    check(extras, name, static_cast<std::size_t>(weights_.rows()), static_cast<std::size_t>(weights_.cols()));
    if (extras.hadamard.block != 0) rotation_ = rotation_of(extras.hadamard, weights_.cols());
    if (!extras.side.empty()) side_ = std::make_shared<const PackedSide>(extras.side);
    extras_ = std::make_shared<const LinearExtras>(std::move(extras));
  }

  const nibble::PackedMatrix& weights() const { return weights_; }
  /// nullptr: none.
  const LinearExtras* extras() const { return extras_.get(); }
  /// nullptr: none.
  const nibble::HadamardRotation* rotation() const { return rotation_.get(); }
  /// nullptr: none.
  const PackedSide* side() const { return side_.get(); }
  bool transforms_input() const { return extras_ != nullptr && extras_->transforms_input(); }

  Eigen::Index rows() const { return weights_.rows(); }
  Eigen::Index cols() const { return weights_.cols(); }
  nibble::Format format() const { return weights_.format(); }
  std::size_t byte_size() const {
    return weights_.byte_size() + (side_ == nullptr ? 0 : side_->a.byte_size() + side_->b.byte_size());
  }

 private:
  nibble::PackedMatrix weights_;
  std::shared_ptr<const LinearExtras> extras_;
  std::shared_ptr<const nibble::HadamardRotation> rotation_;
  std::shared_ptr<const PackedSide> side_;
};

/// The weights that inputs as they come meet: of the matrix `stored` (rows x cols, column k for input_order[k]) of a
/// linear with these extras, in place.
template <class Derived>
void undo_input_transform(const LinearExtras& e, Eigen::PlainObjectBase<Derived>& stored) {
  if (!e.input_order.empty()) {
    const Derived ordered = stored.derived();
    for (std::size_t k = 0; k < e.input_order.size(); ++k)
      stored.col(static_cast<Eigen::Index>(e.input_order[k])) = ordered.col(static_cast<Eigen::Index>(k));
  }
  if (e.hadamard.block != 0) {
    // W x' = W R^T x: the rows of W R^T are R times those of W.
    Eigen::MatrixXf transposed = stored.transpose();
    rotation_of(e.hadamard, stored.cols())->unrotate(transposed);
    stored = transposed.transpose();
  }
  if (e.side.empty()) return;
  nibble::RowMajorMatrix merged = stored;
  nibble::merge_low_rank(e.side, merged);
  stored = merged;
}

}  // namespace llm
