// Quantization-aware training of a whole model: what its layers are, and the model that it deploys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../llm/format_spec.hpp"
#include "../llm/model.hpp"
#include "../llm/packed_model.hpp"
#include "llama_trainer.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/train/qat_linear.hpp"

namespace llm {

/// What the matrices of all blocks become; nullopt: they stay floats, the reference that a quantized model is measured by.
using QatPlan = std::optional<nibble::QatOptions>;

/// "int4", "int3-g64", "w4a4" ...: format_spec.hpp's names. What is left open: a scale a row, in fp32; a float offset
/// below 8 bits, none at 8. w4a4 is int4 with 4-bit activations, a scale a token; the others have INT8 activations, a scale a
/// token and group of inputs, what a runner has by default. "float": nullopt. Throws InvalidArgument for what is no integer
/// format.
inline QatPlan qat_plan(const std::string& format) {
  if (format == "float") return std::nullopt;
  const bool w4a4 = format.compare(0, 4, "w4a4") == 0;
  FormatSpec spec = parse_format(w4a4 ? "int4" + format.substr(4) : format);
  nibble::detail::require(nibble::is_integer(spec.format), "format '", format,
                          "' has no integer codes, expected int8, int6, int5, int4, int3, int2 or w4a4");
  if (!spec.group) spec.group = 0;
  if (!spec.symmetry)
    spec.symmetry =
        spec.format == nibble::Format::int8 ? nibble::Symmetry::symmetric : nibble::Symmetry::float_offset;
  nibble::QatOptions options;
  options.scheme = scheme_of(spec);
  options.activations = w4a4 ? nibble::Activations::int8 : nibble::Activations::int8_grouped;
  options.activation_bits = w4a4 ? 4 : 8;
  return options;
}

/// Layers by the plan.
inline LayerFactory qat_layers(const QatPlan& plan, nibble::ThreadPool* pool = nullptr) {
  if (!plan) return dense_layer;
  return [plan, pool](const LayerSource& source) -> std::unique_ptr<nibble::LinearLayer> {
    return std::make_unique<nibble::QatLinear>(source.values(), *plan, pool);
  };
}

/// What the file says beside a matrix of this plan: nothing where a runner does the same unasked.
inline LinearExtras qat_extras(const QatPlan& plan) {
  LinearExtras e;
  if (!plan || (plan->activations == nibble::Activations::int8_grouped && plan->activation_bits == 8)) return e;
  nibble::detail::require(
      plan->activations == nibble::Activations::int8 || plan->activations == nibble::Activations::int8_grouped,
      "a model file has no words for these activations, expected int8 or int8_grouped ones");
  e.activation_bits = plan->activation_bits;
  e.activation_token = plan->activations == nibble::Activations::int8;
  return e;
}

/// The model as it is deployed: the very matrices that the training forward pass multiplies by. `trainer` was made of `file`
/// with layers of `plan`.
inline Model qat_model(LlamaTrainer& trainer, const ModelFile& file, const QatPlan& plan,
                       nibble::ThreadPool* pool = nullptr) {
  Model model;
  model.hparams = trainer.hparams();
  model.rope_divisors = rope_divisors_of(file);
  nibble::PackOptions options;
  options.pool = pool;
  options.channel_sums = false;
  const auto table = [&](nibble::DenseLinear* trained, const char* name) {
    return trained != nullptr ? nibble::pack(trained->weight(), options) : file.matrix(name, pool);
  };
  model.embedding = table(trainer.embedding(), "token_embd.weight");
  model.output = trainer.tied() ? Linear(model.embedding) : Linear(table(trainer.output(), "output.weight"));
  model.output_norm = trainer.output_norm();
  const LinearExtras extras = qat_extras(plan);
  for (std::size_t l = 0; l < model.hparams.layers; ++l) {
    const auto linear = [&](BlockMatrix m) {
      nibble::LinearLayer& layer = trainer.layer(l, m);
      if (!plan) return Linear(nibble::pack(static_cast<nibble::DenseLinear&>(layer).weight(), options));
      return Linear(nibble::pack(static_cast<nibble::QatLinear&>(layer).quantized(pool), options), extras,
                    tensor_name(l, m));
    };
    Layer layer;
    layer.attention_norm = trainer.attention_norm(l);
    layer.ffn_norm = trainer.ffn_norm(l);
    layer.query = linear(BlockMatrix::query);
    layer.key = linear(BlockMatrix::key);
    layer.value = linear(BlockMatrix::value);
    layer.output = linear(BlockMatrix::output);
    layer.gate = linear(BlockMatrix::gate);
    layer.up = linear(BlockMatrix::up);
    layer.down = linear(BlockMatrix::down);
    model.layers.push_back(std::move(layer));
  }
  return model;
}

/// Writes a model that qat_model() made as a packed .safetensors; the file appears whole or not at all.
inline void write_qat_model(const std::string& path, const Model& model, const ModelFile& file) {
  nibble::PackedFileWriter out(path);
  add_model_data(out, model.hparams, file.vocabulary());
  std::map<std::string, LinearExtras> extras;
  for (std::size_t l = 0; l < model.layers.size(); ++l)
    for (const BlockMatrix m : block_matrices)
      if (const LinearExtras* e = model.layers[l].linears()[static_cast<std::size_t>(m)]->extras())
        extras.emplace(tensor_name(l, m), *e);
  add_linear_extras(out, model.hparams, extras);
  const auto vector = [&](const std::string& name, const Eigen::VectorXf& v) {
    out.add_tensor(name, std::vector<float>(v.data(), v.data() + v.size()));
  };
  out.add("token_embd.weight", model.embedding);
  if (file.has("output.weight")) out.add("output.weight", model.output.weights());
  if (!model.rope_divisors.empty()) out.add_tensor("rope_freqs.weight", model.rope_divisors);
  vector("output_norm.weight", model.output_norm);
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    vector(attention_norm_name(l), model.layers[l].attention_norm);
    vector(ffn_norm_name(l), model.layers[l].ffn_norm);
    for (const BlockMatrix m : block_matrices)
      out.add(tensor_name(l, m), model.layers[l].linears()[static_cast<std::size_t>(m)]->weights());
  }
  out.commit();
}

}  // namespace llm
