// A model and an adapter as one model: in floats, or quantized again with the outputs kept.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../llm/block.hpp"
#include "../llm/model_file.hpp"
#include "../llm/packed_model.hpp"
#include "../llm/quantize_model.hpp"
#include "adapter_base.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/io/gguf.hpp"
#include "nibble/io/packed_file.hpp"
#include "nibble/train/merge.hpp"

namespace llm {

struct MergeModelOptions {
  nibble::Scheme scheme;                    // of the blocks' matrices: floats, or quantized
  AdapterBase base;                         // under the adapter
  std::vector<std::vector<Token>> windows;  // calibration text, where scheme is quantized; all as long
  double side_share = 0.0;                  // of a matrix's bytes, for a low-rank term of what rounding loses
  nibble::ThreadPool* pool = nullptr;
  std::function<void(const std::string&)> done = [](const std::string&) {};
};

struct MergeReport {
  std::string name;
  double error = 0.0;        // mean square error of an output on the calibration tokens
  double naive_error = 0.0;  // the same of rounding to nearest
  double energy = 0.0;       // mean square of an output
  std::size_t bytes = 0;     // packed
  std::size_t side_bytes = 0;
  std::string note;
};

namespace merge_detail {

/// The embedding and all that is no block's matrix stays as the model has it.
inline bool is_block_matrix(const TensorInfo& t) { return t.is_matrix() && t.name.compare(0, 4, "blk.") == 0; }

inline nibble::QuantizedTensor float_tensor(const WeightMatrix& w, nibble::Format format) {
  nibble::Scheme scheme;
  scheme.format = format;
  const auto n = static_cast<std::size_t>(w.size());
  nibble::Buffer codes(n * nibble::bits_of(format) / 8);
  if (format == nibble::Format::fp32) {
    std::memcpy(codes.mutable_data(), w.data(), codes.size());
  } else {
    for (std::size_t i = 0; i < n; ++i)
      codes.as_mutable<std::uint16_t>()[i] = format == nibble::Format::fp16 ? nibble::fp16_from_float(w.data()[i])
                                                                            : nibble::bf16_from_float(w.data()[i]);
  }
  return nibble::QuantizedTensor::from_parts(
      scheme, {static_cast<std::size_t>(w.rows()), static_cast<std::size_t>(w.cols())}, std::move(codes));
}

}  // namespace merge_detail

/// Merges in floats, into a GGUF (path ends with ".gguf") or a packed file; one matrix at a time is in memory.
inline void merge_into_floats(const ModelFile& in, const LlamaAdapter& adapter, const std::string& path,
                              const MergeModelOptions& options) {
  using merge_detail::is_block_matrix;
  const nibble::Format format = options.scheme.format;
  const auto merged = [&](const TensorInfo& t) {
    const nibble::QuantizedTensor stored = in.quantized(t.name);
    WeightMatrix w(static_cast<Eigen::Index>(t.shape[0]), static_cast<Eigen::Index>(t.shape[1]));
    stored.dequantize(w.data(), options.pool);
    if (is_block_matrix(t)) merge_adapter(adapter, options.base, t.name, w, options.pool);
    return w;
  };
  if (path.size() > 5 && path.compare(path.size() - 5, 5, ".gguf") == 0) {
    const nibble::GgufType type = format == nibble::Format::fp16   ? nibble::GgufType::f16
                                  : format == nibble::Format::bf16 ? nibble::GgufType::bf16
                                                                   : nibble::GgufType::f32;
    nibble::GgufWriter out(path);
    quantize_detail::add_metadata(out, in.hparams(), in.vocabulary());
    out.add("general.file_type", quantize_detail::gguf_file_type(type));
    for (const TensorInfo& t : in.tensors()) {
      if (t.is_matrix())
        out.declare(t.name, type, {t.shape[1], t.shape[0]});
      else
        out.declare(t.name, nibble::GgufType::f32, {t.shape[0]});
    }
    for (const TensorInfo& t : in.tensors()) {
      if (t.is_matrix()) {
        const WeightMatrix w = merged(t);
        out.write_floats(w.data(), static_cast<std::size_t>(w.size()));
      } else {
        const Eigen::VectorXf v = in.vector(t.name);
        out.write_floats(v.data(), static_cast<std::size_t>(v.size()));
      }
      options.done(t.name);
    }
    out.commit();
    return;
  }
  nibble::PackedFileWriter out(path);
  add_model_data(out, in.hparams(), in.vocabulary());
  for (const TensorInfo& t : in.tensors()) {
    if (!t.is_matrix())
      out.declare_tensor(t.name, nibble::SafetensorsType::f32, t.shape);
    else
      out.declare(t.name, {is_block_matrix(t) ? options.scheme : in.scheme(t.name), t.shape[0], t.shape[1]},
                  false);
  }
  nibble::PackOptions pack;
  pack.pool = options.pool;
  pack.channel_sums = false;
  for (const TensorInfo& t : in.tensors()) {
    if (is_block_matrix(t)) {
      out.write(t.name, nibble::pack(merge_detail::float_tensor(merged(t), format), pack));
    } else if (t.is_matrix()) {
      out.write(t.name, nibble::pack(in.quantized(t.name), pack));
    } else {
      const Eigen::VectorXf v = in.vector(t.name);
      out.write_tensor(t.name, v.data(), static_cast<std::size_t>(v.size()) * sizeof(float));
    }
    options.done(t.name);
  }
  out.commit();
}

/// Merges into quantized weights, block by block: each matrix by merge_quantized() on the inputs that the blocks merged
/// so far give it. Writes a packed file.
class QuantizedMerger {
 public:
  QuantizedMerger(const ModelFile& in, const LlamaAdapter& adapter, const MergeModelOptions& options)
      : in_(in), adapter_(adapter), options_(options), h_(in.hparams()) {
    nibble::detail::require(!options.windows.empty() && !options.windows.front().empty(), "merging into ",
                            name_of(options.scheme), " needs a calibration text");
    BlockOptions block;
    block.window = options.windows.front().size();
    block.rope_divisors = rope_divisors_of(in);
    block.pool = options.pool;
    forward_ = std::make_unique<BlockRunner>(h_, block);
  }

  std::vector<MergeReport> run(const std::string& path) {
    for (const std::vector<Token>& w : options_.windows) states_.push_back(embed(in_, w));
    for (std::size_t layer = 0; layer < h_.layers; ++layer) merge_block(layer);
    nibble::PackedFileWriter out(path);
    add_model_data(out, h_, in_.vocabulary());
    add_linear_extras(out, h_, extras_);
    nibble::PackOptions pack;
    pack.pool = options_.pool;
    pack.channel_sums = false;
    for (const TensorInfo& t : in_.tensors()) {
      const auto at = tensors_.find(t.name);
      if (!t.is_matrix())
        out.declare_tensor(t.name, nibble::SafetensorsType::f32, t.shape);
      else
        out.declare(t.name,
                    {at != tensors_.end() ? at->second.scheme() : in_.scheme(t.name), t.shape[0], t.shape[1]},
                    false);
    }
    for (const TensorInfo& t : in_.tensors()) {
      const auto at = tensors_.find(t.name);
      if (t.is_matrix()) {
        out.write(t.name, at != tensors_.end() ? at->second : nibble::pack(in_.quantized(t.name), pack));
      } else {
        const Eigen::VectorXf v = in_.vector(t.name);
        out.write_tensor(t.name, v.data(), static_cast<std::size_t>(v.size()) * sizeof(float));
      }
    }
    out.commit();
    return std::move(reports_);
  }

 private:
  void merge_block(std::size_t layer) {
    FloatBlock block = load_block(in_, layer, options_.pool);
    for (const BlockMatrix m : block_matrices)
      merge_adapter(adapter_, options_.base, tensor_name(layer, m), block[m], options_.pool);
    for (const BlockInput stage : block_inputs) {
      const BlockMatrix first = stage == BlockInput::attention_norm ? BlockMatrix::query
                                : stage == BlockInput::attention    ? BlockMatrix::output
                                : stage == BlockInput::ffn_norm     ? BlockMatrix::gate
                                                                    : BlockMatrix::down;
      const bool adds = first == BlockMatrix::output || first == BlockMatrix::down;
      nibble::Hessian hessian(shape_of(h_, first).cols, options_.pool);
      std::vector<Eigen::MatrixXf> inputs(adds ? states_.size() : 1);
      for (std::size_t w = 0; w < states_.size(); ++w) {
        Eigen::MatrixXf& in = inputs[adds ? w : 0];
        forward_->input(block, stage, states_[w], in);
        hessian.add(in);
      }
      for (const BlockMatrix m : block_matrices)
        if (input_of(m) == stage) merge_matrix(tensor_name(layer, m), hessian, block[m]);
      for (std::size_t w = 0; adds && w < states_.size(); ++w)
        forward_->add_product(block[first], inputs[w], states_[w]);
    }
    options_.done("block " + std::to_string(layer));
  }

  /// w becomes the values that it is rounded to.
  void merge_matrix(const std::string& name, const nibble::Hessian& hessian, WeightMatrix& w) {
    nibble::MergeOptions merge;
    merge.side_share = options_.side_share;
    merge.gptq.pool = options_.pool;
    nibble::MergeResult r = nibble::merge_quantized(w, hessian, options_.scheme, merge);
    MergeReport report;
    report.name = name;
    report.error = r.error;
    report.naive_error = r.naive_error;
    report.energy =
        0.5 * nibble::quadratic_error(w, hessian.matrix(), options_.pool) / static_cast<double>(w.rows());
    report.note = r.report;
    r.weights.dequantize(w.data(), options_.pool);
    nibble::PackOptions pack;
    pack.pool = options_.pool;
    pack.channel_sums = false;
    const nibble::PackedMatrix packed = nibble::pack(r.weights, pack);
    report.bytes = packed.byte_size();
    report.side_bytes = r.side.byte_size(2);
    tensors_.emplace(name, packed);
    if (!r.side.empty()) {
      nibble::merge_low_rank(r.side, w, options_.pool);
      extras_[name].side = std::move(r.side);
    }
    reports_.push_back(std::move(report));
  }

  const ModelFile& in_;
  const LlamaAdapter& adapter_;
  const MergeModelOptions& options_;
  const Hparams h_;
  std::unique_ptr<BlockRunner> forward_;
  std::vector<Eigen::MatrixXf> states_;
  std::map<std::string, nibble::PackedMatrix> tensors_;
  std::map<std::string, LinearExtras> extras_;
  std::vector<MergeReport> reports_;
};

/// `model` with the adapter beside its weights, unmerged: over the weights that it was trained over.
inline void attach_adapter(Model& model, const ModelFile& file, const LlamaAdapter& adapter,
                           const AdapterBase& base, nibble::ThreadPool* pool) {
  for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
    Layer& l = model.layers[layer];
    Linear* const linears[] = {&l.query, &l.key, &l.value, &l.output, &l.gate, &l.up, &l.down};
    for (const BlockMatrix m : block_matrices) {
      Linear& linear = *linears[static_cast<std::size_t>(m)];
      const std::string name = tensor_name(layer, m);
      nibble::detail::require<nibble::Unsupported>(
          linear.extras() == nullptr, "'", name, "' has extras: an adapter belongs to the model it was made from");
      const nibble::LowRank* low_rank = adapter.find(name);
      nibble::PackedMatrix weights = linear.weights();
      if (base.scheme) {
        WeightMatrix w(weights.rows(), weights.cols());
        file.quantized(name).dequantize(w.data(), pool);
        nibble::PackOptions pack;
        pack.pool = pool;
        pack.channel_sums = false;
        const Eigen::Index rank =
            low_rank != nullptr ? low_rank->rank() : static_cast<Eigen::Index>(adapter.config.rank);
        weights = nibble::pack(frozen_weights(w, base, rank, pool).weights, pack);
      }
      LinearExtras extras;
      if (low_rank != nullptr) extras.side = *low_rank;
      linear = Linear(std::move(weights), std::move(extras), name);
    }
  }
}

}  // namespace llm
