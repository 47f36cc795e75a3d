// The weights of a Llama-family model, packed for the kernels.
#pragma once

#include <Eigen/Core>
#include <array>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "hparams.hpp"
#include "linear.hpp"
#include "model_file.hpp"
#include "nibble/gemm/matmul.hpp"

namespace llm {

struct Layer {
  Eigen::VectorXf attention_norm;
  Linear query;
  Linear key;
  Linear value;
  Linear output;
  Eigen::VectorXf ffn_norm;
  Linear gate;
  Linear up;
  Linear down;

  std::array<const Linear*, 7> linears() const { return {&query, &key, &value, &output, &gate, &up, &down}; }
};

struct Model {
  Hparams hparams;
  nibble::PackedMatrix embedding;  // vocabulary x dim; its rows are gathered
  std::vector<Layer> layers;
  Eigen::VectorXf output_norm;
  Linear output;  // vocabulary x dim; tied embeddings: the same bytes as `embedding`
  std::vector<float> rope_divisors;

  /// Bytes that one token's products read: all block matrices and the output layer.
  std::size_t bytes_per_token() const {
    std::size_t bytes = output.byte_size();
    for (const Layer& l : layers)
      for (const Linear* m : l.linears()) bytes += m->byte_size();
    return bytes;
  }
  /// Multiplications and additions of one token in the blocks, and in the output layer.
  double block_operations() const {
    double macs = 0.0;
    for (const Layer& l : layers)
      for (const Linear* m : l.linears()) macs += static_cast<double>(m->rows()) * static_cast<double>(m->cols());
    return 2.0 * macs;
  }
  double output_operations() const {
    return 2.0 * static_cast<double>(output.rows()) * static_cast<double>(output.cols());
  }
};

/// Loads every tensor of `file`. Throws FormatError where one is missing or has a wrong shape, and where the file holds
/// one that this runner would not use (it would compute something else than the model).
inline Model load_model(const ModelFile& file, nibble::ThreadPool* pool = nullptr) {
  using nibble::FormatError;
  using nibble::detail::require;
  Model model;
  model.hparams = file.hparams();
  const Hparams& h = model.hparams;
  std::size_t used = 0;
  const auto matrix = [&](const std::string& name, std::size_t rows, std::size_t cols) {
    Linear m = file.linear(name, pool);
    require<FormatError>(static_cast<std::size_t>(m.rows()) == rows && static_cast<std::size_t>(m.cols()) == cols,
                         "tensor '", name, "' is ", m.rows(), " x ", m.cols(), ", expected ", rows, " x ", cols);
    ++used;
    return m;
  };
  const auto vector = [&](const std::string& name, std::size_t size) {
    Eigen::VectorXf v = file.vector(name);
    require<FormatError>(static_cast<std::size_t>(v.size()) == size, "tensor '", name, "' has ", v.size(),
                         " elements, expected ", size);
    ++used;
    return v;
  };
  const Linear embedding = matrix("token_embd.weight", h.vocabulary, h.dim);
  require<nibble::Unsupported>(embedding.extras() == nullptr, "the embedding has an order, scales or a rotation");
  model.embedding = embedding.weights();
  model.output_norm = vector("output_norm.weight", h.dim);
  model.output =
      file.has("output.weight") ? matrix("output.weight", h.vocabulary, h.dim) : Linear(model.embedding);
  if (file.has("rope_freqs.weight")) {
    const Eigen::VectorXf divisors = vector("rope_freqs.weight", h.rope_size / 2);
    model.rope_divisors.assign(divisors.data(), divisors.data() + divisors.size());
  }
  model.layers.reserve(h.layers);
  for (std::size_t i = 0; i < h.layers; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    Layer l;
    l.attention_norm = vector(block + "attn_norm.weight", h.dim);
    l.query = matrix(block + "attn_q.weight", h.q_size(), h.dim);
    l.key = matrix(block + "attn_k.weight", h.kv_size(), h.dim);
    l.value = matrix(block + "attn_v.weight", h.kv_size(), h.dim);
    l.output = matrix(block + "attn_output.weight", h.dim, h.q_size());
    l.ffn_norm = vector(block + "ffn_norm.weight", h.dim);
    l.gate = matrix(block + "ffn_gate.weight", h.ffn, h.dim);
    l.up = matrix(block + "ffn_up.weight", h.ffn, h.dim);
    l.down = matrix(block + "ffn_down.weight", h.dim, h.ffn);
    model.layers.push_back(std::move(l));
  }
  require<nibble::Unsupported>(used == file.tensors().size(), "the file holds ", file.tensors().size(),
                               " tensors, of which this runner knows ", used,
                               " (biases and others are not supported)");
  return model;
}

}  // namespace llm
