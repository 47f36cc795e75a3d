// A trained model as a GGUF.
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../llm/quantize_model.hpp"
#include "llama_trainer.hpp"
#include "nibble/io/gguf.hpp"

namespace llm {

/// Writes a model all of whose matrices are trained in floats to the GGUF `path`, its matrices as `type` (F32, F16 or BF16)
/// and its norms as F32; the file appears whole or not at all. Throws InvalidArgument where a matrix is not among
/// `parameters` (LlamaTrainer::parameters()), IoError for a full disk.
inline void write_gguf(const std::string& path, const Hparams& h, const Vocabulary& vocabulary,
                       const nibble::Parameters& parameters, nibble::GgufType type) {
  nibble::GgufWriter out(path);
  quantize_detail::add_metadata(out, h, vocabulary);
  out.add("general.file_type", quantize_detail::gguf_file_type(type));
  std::vector<const nibble::Parameter*> tensors;
  const auto declare = [&](const std::string& name, std::size_t rows, std::size_t cols) {
    for (const nibble::Parameter& p : parameters) {
      if (p.name != name) continue;
      nibble::detail::require(p.size == rows * cols, "'", name, "' has ", p.size, " elements, expected ", rows,
                              " x ", cols);
      tensors.push_back(&p);
      if (rows == 1)
        out.declare(name, nibble::GgufType::f32, {cols});
      else
        out.declare(name, type, {cols, rows});
      return true;
    }
    return false;
  };
  const auto required = [&](const std::string& name, std::size_t rows, std::size_t cols) {
    nibble::detail::require(declare(name, rows, cols), "'", name, "' is not among the trained tensors");
  };
  required("token_embd.weight", h.vocabulary, h.dim);
  for (std::size_t l = 0; l < h.layers; ++l) {
    required(attention_norm_name(l), 1, h.dim);
    required(ffn_norm_name(l), 1, h.dim);
    for (const BlockMatrix m : block_matrices) {
      const MatrixShape shape = shape_of(h, m);
      required(tensor_name(l, m), static_cast<std::size_t>(shape.rows), static_cast<std::size_t>(shape.cols));
    }
  }
  required("output_norm.weight", 1, h.dim);
  (void)declare("output.weight", h.vocabulary, h.dim);  // not there: the embedding is the output layer
  for (const nibble::Parameter* p : tensors) out.write_floats(p->value, p->size);
  out.commit();
}

}  // namespace llm
