// LoRA adapters of a Llama: PEFT's names and row order on disk, ours in memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../llm/block.hpp"
#include "../llm/hf_layout.hpp"
#include "../llm/hparams.hpp"
#include "nibble/io/peft_adapter.hpp"

namespace llm {

/// An adapter by the names of our tensors ("blk.0.attn_q.weight"), rows in their order.
struct LlamaAdapter {
  nibble::PeftConfig config;
  std::map<std::string, nibble::LowRank> matrices;
  std::map<std::string, std::string> metadata;

  /// nullptr: that matrix has none.
  const nibble::LowRank* find(const std::string& tensor) const {
    const auto at = matrices.find(tensor);
    return at == matrices.end() ? nullptr : &at->second;
  }
};

namespace adapter_detail {

inline nibble::RowMajorMatrix with_rows(const nibble::RowMajorMatrix& m, const std::vector<std::size_t>& rows) {
  if (rows.empty()) return m;
  nibble::RowMajorMatrix out(m.rows(), m.cols());
  for (std::size_t r = 0; r < rows.size(); ++r)
    out.row(static_cast<Eigen::Index>(r)) = m.row(static_cast<Eigen::Index>(rows[r]));
  return out;
}

}  // namespace adapter_detail

/// Reads an adapter for a model of these hyperparameters. Throws as nibble::read_peft_adapter(); FormatError for matrices of
/// another shape, Unsupported for modules that no block has (an adapted embedding, say).
inline LlamaAdapter read_llama_adapter(const std::string& folder, const Hparams& h) {
  using nibble::detail::require;
  nibble::PeftAdapter peft = nibble::read_peft_adapter(folder);
  LlamaAdapter adapter;
  adapter.config = peft.config;
  adapter.metadata = peft.metadata;
  for (std::size_t layer = 0; layer < h.layers; ++layer)
    for (const BlockMatrix m : block_matrices) {
      const std::string name = tensor_name(layer, m);
      const auto at = peft.modules.find(hf_module_of(name));
      if (at == peft.modules.end()) continue;
      nibble::LowRank l = std::move(at->second);
      const MatrixShape shape = shape_of(h, m);
      require<nibble::FormatError>(l.rows() == shape.rows && l.cols() == shape.cols, "adapter: '", at->first,
                                   "' is for a matrix of ", l.rows(), " x ", l.cols(), ", the model's is ",
                                   shape.rows, " x ", shape.cols);
      l.b = adapter_detail::with_rows(l.b, hf_rows_of(name, h));
      peft.modules.erase(at);
      adapter.matrices.emplace(name, std::move(l));
    }
  require<nibble::Unsupported>(peft.modules.empty(), "adapter: the model's blocks have no '",
                               peft.modules.empty() ? "" : nibble::detail::printable(peft.modules.begin()->first),
                               "'");
  return adapter;
}

/// Writes one; the folder gets target_modules of what there is.
inline void write_llama_adapter(const std::string& folder, const LlamaAdapter& adapter, const Hparams& h,
                                nibble::Format format = nibble::Format::fp32) {
  nibble::PeftAdapter peft;
  peft.config = adapter.config;
  peft.metadata = adapter.metadata;
  peft.config.target_modules.clear();
  for (const auto& entry : adapter.matrices) {
    const std::string module = hf_module_of(entry.first);
    nibble::detail::require(!module.empty(), "'", entry.first, "' has no place in a Hugging Face Llama");
    const std::string last = module.substr(module.rfind('.') + 1);
    auto& targets = peft.config.target_modules;
    if (std::find(targets.begin(), targets.end(), last) == targets.end()) targets.push_back(last);
    nibble::LowRank l = entry.second;
    const std::vector<std::size_t> rows = hf_rows_of(entry.first, h);
    if (!rows.empty()) l.b = adapter_detail::with_rows(l.b, inverse_of(rows));
    peft.modules.emplace(module, std::move(l));
  }
  nibble::write_peft_adapter(folder, peft, format);
}

}  // namespace llm
