// Transforms of a block that keep its float function and make its matrices easier to round: factors of channels move
// between a matrix and what feeds it, which is a norm, the values of attention, or the up half of the gate.
#pragma once

#include <Eigen/Core>
#include <array>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "../block.hpp"
#include "method.hpp"
#include "nibble/ptq/awq.hpp"
#include "nibble/ptq/equalize.hpp"
#include "nibble/ptq/fold.hpp"
#include "nibble/ptq/hadamard.hpp"
#include "nibble/ptq/hessian.hpp"
#include "nibble/ptq/smooth_quant.hpp"

namespace llm {

/// What the transforms need to know of the inputs of a block's matrices, one for each BlockInput.
struct InputSums {
  Eigen::VectorXf mean_abs;
  Eigen::VectorXf max_abs;
  Eigen::MatrixXf hessian;

  InputSums() = default;
  explicit InputSums(const nibble::Hessian& h)
      : mean_abs(h.mean_abs()), max_abs(h.max_abs()), hessian(h.matrix()) {}
  /// The inputs are divided by s from now on.
  void divide(const Eigen::VectorXf& s) {
    if (hessian.size() == 0) return;  // nobody asked
    mean_abs.array() /= s.array();
    max_abs.array() /= s.array();
    hessian = nibble::unscale_hessian(hessian, s);
  }
};
using BlockSums = std::array<InputSums, block_inputs.size()>;

inline nibble::HeadLayout head_layout(const Hparams& h) {
  return {static_cast<Eigen::Index>(h.heads), static_cast<Eigen::Index>(h.kv_heads),
          static_cast<Eigen::Index>(h.head_size)};
}

namespace transform_detail {

/// Multiplies the inputs of all matrices that read `which` by s, and divides what feeds them: the norm, value's rows by
/// one factor a key-value channel, or up's rows.
inline void fold(FloatBlock& b, BlockInput which, const Eigen::VectorXf& s, const Eigen::VectorXf& kv,
                 BlockSums& sums) {
  for (const BlockMatrix m : block_matrices)
    if (input_of(m) == which) nibble::scale_inputs(b[m], s);
  switch (which) {
    case BlockInput::attention_norm: nibble::unscale_norm(b.attention_norm, s); break;
    case BlockInput::attention: nibble::unscale_outputs(b[BlockMatrix::value], kv); break;
    case BlockInput::ffn_norm: nibble::unscale_norm(b.ffn_norm, s); break;
    case BlockInput::gated: nibble::unscale_outputs(b[BlockMatrix::up], s); break;
  }
  sums[static_cast<std::size_t>(which)].divide(s);
}

inline nibble::WeightList readers(const FloatBlock& b, BlockInput which) {
  nibble::WeightList list;
  for (const BlockMatrix m : block_matrices)
    if (input_of(m) == which) list.push_back(&b[m]);
  return list;
}

}  // namespace transform_detail

/// The rotation of a model's residual stream: in the largest blocks that have a Hadamard matrix.
inline HadamardSpec residual_rotation(const Hparams& h, std::uint64_t seed) {
  HadamardSpec spec;
  spec.block = static_cast<std::size_t>(nibble::hadamard_block(static_cast<Eigen::Index>(h.dim)));
  if (seed != 0) spec.seed = seed;
  return spec;
}

/// Rotates what a block reads from and adds to the residual stream, with the norms folded into what reads them, and,
/// between value and output, the channels of every head (QuaRot, Ashkboos et al. 2024, section 4).
inline void rotate_block(FloatBlock& b, const Hparams& h, const HadamardSpec& spec, nibble::ThreadPool* pool) {
  const auto residual = rotation_of(spec, static_cast<Eigen::Index>(h.dim));
  nibble::fold_norm(b.attention_norm, b[BlockMatrix::query], b[BlockMatrix::key], b[BlockMatrix::value]);
  nibble::fold_norm(b.ffn_norm, b[BlockMatrix::gate], b[BlockMatrix::up]);
  for (const BlockMatrix m :
       {BlockMatrix::query, BlockMatrix::key, BlockMatrix::value, BlockMatrix::gate, BlockMatrix::up})
    residual->rotate_inputs(b[m], pool);
  for (const BlockMatrix m : {BlockMatrix::output, BlockMatrix::down}) residual->rotate_outputs(b[m], pool);
  const Eigen::Index head = nibble::hadamard_block(static_cast<Eigen::Index>(h.head_size));
  nibble::HadamardRotation(static_cast<Eigen::Index>(h.kv_size()), head)
      .rotate_outputs(b[BlockMatrix::value], pool);
  nibble::HadamardRotation(static_cast<Eigen::Index>(h.q_size()), head)
      .rotate_inputs(b[BlockMatrix::output], pool);
}

struct TransformOptions {
  double smooth_alpha = 0.5;
  int awq_grid = 20;
  std::size_t windows = 16;  // of the calibration text that they look at, evenly spaced

  nlohmann::json to_json() const {
    return {{"smooth_alpha", smooth_alpha}, {"awq_grid", awq_grid}, {"windows", windows}};
  }
};

/// Applies the transforms of `method`, in their order. schemes: what each matrix is rounded to, for AWQ's search.
inline void transform_block(FloatBlock& b, const Hparams& h, const Method& method, const TransformOptions& options,
                            const std::array<nibble::Scheme, block_matrices.size()>& schemes, BlockSums& sums,
                            nibble::ThreadPool* pool) {
  using transform_detail::fold;
  using transform_detail::readers;
  const nibble::HeadLayout heads = head_layout(h);
  if (method.equalize) {
    const Eigen::VectorXf kv = nibble::equalizing_scales(b[BlockMatrix::value], b[BlockMatrix::output], heads);
    fold(b, BlockInput::attention, nibble::expand_to_queries(kv, heads), kv, sums);
    const Eigen::VectorXf s = nibble::equalizing_scales(b[BlockMatrix::up], {&b[BlockMatrix::down]});
    fold(b, BlockInput::gated, s, {}, sums);
  }
  if (method.smoothquant) {
    for (const BlockInput which : block_inputs) {
      const InputSums& in = sums[static_cast<std::size_t>(which)];
      if (which == BlockInput::attention) {
        const Eigen::VectorXf kv =
            nibble::smooth_scales(in.max_abs, readers(b, which), options.smooth_alpha, heads);
        fold(b, which, nibble::expand_to_queries(kv, heads), kv, sums);
      } else {
        fold(b, which, nibble::smooth_scales(in.max_abs, readers(b, which), options.smooth_alpha), {}, sums);
      }
    }
  }
  if (method.awq) {
    for (const BlockInput which : block_inputs) {
      const InputSums& in = sums[static_cast<std::size_t>(which)];
      nibble::AwqOptions awq;
      awq.grid = options.awq_grid;
      awq.pool = pool;
      if (which == BlockInput::attention) awq.heads = heads;
      nibble::Scheme scheme;
      for (const BlockMatrix m : block_matrices)
        if (input_of(m) == which && nibble::has_scales(schemes[static_cast<std::size_t>(m)].format))
          scheme = schemes[static_cast<std::size_t>(m)];
      if (!nibble::has_scales(scheme.format)) continue;
      const nibble::AwqScales found = nibble::awq_scales(scheme, readers(b, which), in.mean_abs, in.hessian, awq);
      fold(b, which, found.scales, found.kv_scales, sums);
    }
  }
}

}  // namespace llm
