// A model on disk, whichever of the three kinds it is: a GGUF, a packed safetensors file of ours, or a Hugging Face
// folder (hf_model.hpp).
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "format_spec.hpp"
#include "hparams.hpp"
#include "linear.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/io/gguf_quantized.hpp"
#include "packed_model.hpp"
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
  /// The scheme that quantized() has.
  virtual nibble::Scheme scheme(const std::string& name) const = 0;
  /// A vector (norm) as floats.
  virtual Eigen::VectorXf vector(const std::string& name) const = 0;
  /// What the product with a matrix needs beside it, or nullptr. quantized() and matrix() are what is stored: their
  /// columns are in the order of the extras, for rotated inputs if these say so.
  virtual const LinearExtras* extras(const std::string& name) const {
    (void)name;
    return nullptr;
  }
  /// True where some matrix has extras, or the residual stream is rotated.
  virtual bool has_extras() const { return false; }
  /// The GGUF behind it, or nullptr.
  virtual const nibble::GgufFile* gguf() const { return nullptr; }

  /// A weight matrix with what belongs to it.
  Linear linear(const std::string& name, nibble::ThreadPool* pool) const {
    const LinearExtras* e = extras(name);
    return e == nullptr ? Linear(matrix(name, pool)) : Linear(matrix(name, pool), *e, name);
  }
  bool has(const std::string& name) const {
    for (const TensorInfo& t : tensors())
      if (t.name == name) return true;
    return false;
  }
};

class GgufModelFile : public ModelFile {
 public:
  explicit GgufModelFile(const std::string& path)
      : file_(nibble::GgufFile::open(path)), hparams_(hparams_of(file_)) {
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
  nibble::Scheme scheme(const std::string& name) const override {
    return nibble::gguf_scheme(file_.tensor(name).type);
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

/// Weights stay where the file is mapped: nothing is copied or packed again.
class PackedModelFile : public ModelFile {
 public:
  explicit PackedModelFile(const std::string& path)
      : file_(nibble::PackedFile::open(path)), hparams_(hparams_of(packed_detail::json_of(file_, "hparams"))) {
    for (const auto& [name, matrix] : file_.matrices())
      tensors_.push_back(
          {name, {matrix.header().rows, matrix.header().cols}, name_of(matrix.scheme()), matrix.byte_size()});
    for (const nibble::SafetensorsTensor& t : file_.safetensors().tensors()) {
      bytes_ += t.data.size();
      if (is_vocabulary_tensor(t.name) || is_linear_tensor(t.name) || is_part(t.name)) continue;
      tensors_.push_back({t.name, t.shape, std::string(nibble::name_of(t.type)), t.data.size()});
    }
    extras_ = linear_extras_of(file_);
  }

  std::string kind() const override { return "packed safetensors"; }
  std::size_t bytes() const override { return bytes_; }
  const Hparams& hparams() const override { return hparams_; }
  Vocabulary vocabulary() const override { return vocabulary_of(file_); }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  nibble::PackedMatrix matrix(const std::string& name, nibble::ThreadPool*) const override {
    return file_.matrix(name);
  }
  nibble::QuantizedTensor quantized(const std::string& name) const override { return file_.matrix(name).unpack(); }
  nibble::Scheme scheme(const std::string& name) const override { return file_.matrix(name).scheme(); }
  const LinearExtras* extras(const std::string& name) const override {
    const auto at = extras_.find(name);
    return at == extras_.end() ? nullptr : &at->second;
  }
  bool has_extras() const override { return !extras_.empty() || hparams_.rotation.block != 0; }
  Eigen::VectorXf vector(const std::string& name) const override {
    const auto values = packed_detail::array_of<float>(file_, name.c_str(), nibble::SafetensorsType::f32, true);
    return Eigen::Map<const Eigen::VectorXf>(values.data(), static_cast<Eigen::Index>(values.size()));
  }

 private:
  /// True for ".codes", ".scales", ... of a matrix.
  bool is_part(const std::string& name) const {
    return file_.find_matrix(std::string_view(name).substr(0, name.rfind('.'))) != nullptr;
  }

  nibble::PackedFile file_;
  Hparams hparams_;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, LinearExtras> extras_;
  std::size_t bytes_ = 0;
};

/// A Hugging Face folder; see hf_model.hpp.
inline std::unique_ptr<ModelFile> open_hf_model(const std::string& folder);

/// Opens any kind: a folder, or a file by what it begins with. Throws IoError, FormatError or Unsupported.
inline std::unique_ptr<ModelFile> open_model(const std::string& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) return open_hf_model(path);
  const nibble::MappedFile file = nibble::MappedFile::open(path);
  if (file.size() >= 4 && std::memcmp(file.data(), "GGUF", 4) == 0) return std::make_unique<GgufModelFile>(path);
  nibble::detail::require<nibble::FormatError>(file.size() > 8 && file.data()[8] == '{', "'", path,
                                               "' is neither a GGUF nor a packed safetensors file");
  return std::make_unique<PackedModelFile>(path);
}

}  // namespace llm

#include "hf_model.hpp"  // needs what stands above, and is what open_model needs
