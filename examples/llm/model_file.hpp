// A model on disk, whichever of the two kinds it is: a GGUF, or a packed safetensors file of ours.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "hparams.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/io/gguf_quantized.hpp"
#include "vocabulary.hpp"

namespace llm {

struct TensorInfo {
  std::string name;
  std::vector<std::size_t> shape;  // outermost first: outputs, inputs
  std::string format;              // as `nibble inspect` prints it
  std::size_t bytes = 0;           // in the file

  bool is_matrix() const { return shape.size() == 2; }
};

class ModelFile {
 public:
  virtual ~ModelFile() = default;

  virtual std::string kind() const = 0;
  virtual std::size_t bytes() const = 0;
  virtual const Hparams& hparams() const = 0;
  virtual Vocabulary vocabulary() const = 0;
  /// The weights; what a packed file keeps its vocabulary in is not among them.
  virtual const std::vector<TensorInfo>& tensors() const = 0;
  /// A weight matrix, ready for the kernels.
  virtual nibble::PackedMatrix matrix(const std::string& name, nibble::ThreadPool* pool) const = 0;
  /// The same as codes and scales in logical order: exactly what the file holds.
  virtual nibble::QuantizedTensor quantized(const std::string& name) const = 0;
  /// A vector (norm) as floats.
  virtual Eigen::VectorXf vector(const std::string& name) const = 0;
  /// The GGUF behind it, or nullptr.
  virtual const nibble::GgufFile* gguf() const { return nullptr; }

  bool has(const std::string& name) const {
    for (const TensorInfo& t : tensors())
      if (t.name == name) return true;
    return false;
  }
};

class GgufModelFile : public ModelFile {
 public:
  explicit GgufModelFile(const std::string& path) : file_(nibble::GgufFile::open(path)), hparams_(hparams_of(file_)) {
    for (const nibble::GgufTensor& t : file_.tensors()) {
      TensorInfo info;
      info.name = t.name;
      for (std::size_t i = t.rank; i-- > 0;) info.shape.push_back(static_cast<std::size_t>(t.dims[i]));
      info.format = nibble::name_of(t.type);
      info.bytes = t.data.size();
      tensors_.push_back(std::move(info));
    }
  }

  std::string kind() const override { return "GGUF v" + std::to_string(file_.version()); }
  std::size_t bytes() const override { return file_.file_bytes(); }
  const Hparams& hparams() const override { return hparams_; }
  Vocabulary vocabulary() const override { return vocabulary_of(file_); }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  nibble::PackedMatrix matrix(const std::string& name, nibble::ThreadPool* pool) const override {
    nibble::PackOptions options;
    options.pool = pool;
    options.channel_sums = false;  // for asymmetric activations only, which this runner does not use
    return nibble::pack(quantized(name), options);
  }
  nibble::QuantizedTensor quantized(const std::string& name) const override {
    return nibble::to_quantized(file_.tensor(name));
  }
  Eigen::VectorXf vector(const std::string& name) const override {
    const std::vector<float> values = file_.tensor(name).dequantize();
    return Eigen::Map<const Eigen::VectorXf>(values.data(), static_cast<Eigen::Index>(values.size()));
  }
  const nibble::GgufFile* gguf() const override { return &file_; }

 private:
  nibble::GgufFile file_;
  Hparams hparams_;
  std::vector<TensorInfo> tensors_;
};

}  // namespace llm
