// The frozen weights that an adapter is trained over.
#pragma once

#include <cstdlib>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "../llm/block.hpp"
#include "../llm/format_spec.hpp"
#include "llama_adapter.hpp"
#include "nibble/ptq/double_quant.hpp"
#include "nibble/train/loftq.hpp"

namespace llm {

/// How the frozen weights come from a model's: floats as they are, or quantized. It is written into an adapter's file, so
/// that what is merged or measured later is what was trained.
struct AdapterBase {
  std::optional<nibble::Scheme> scheme;  // nothing: floats
  bool double_quantized = false;
  int loftq = 0;  // iterations; 0: low ranks start from 0 over the quantized weights

  std::map<std::string, std::string> to_metadata() const {
    return {{"nibble.base", scheme ? name_of(*scheme) : "float"},
            {"nibble.double_quant", double_quantized ? "1" : "0"},
            {"nibble.loftq", std::to_string(loftq)}};
  }
};

/// The base that an adapter names; floats where it names none, as PEFT's do not.
inline AdapterBase adapter_base_of(const LlamaAdapter& adapter) {
  const auto find = [&](const char* key) {
    const auto at = adapter.metadata.find(key);
    return at == adapter.metadata.end() ? std::string() : at->second;
  };
  AdapterBase base;
  const std::string format = find("nibble.base");
  if (format.empty() || format == "float") return base;
  base.scheme = scheme_of(parse_format(format));
  base.double_quantized = find("nibble.double_quant") == "1";
  base.loftq = std::atoi(find("nibble.loftq").c_str());
  nibble::detail::require<nibble::FormatError>(base.loftq >= 0 && base.loftq <= 1000,
                                               "adapter: 'nibble.loftq' is ", base.loftq, ", expected 0 to 1000");
  return base;
}

/// Frozen weights of one matrix, and the low rank that training over them starts from (empty: 0).
struct FrozenWeights {
  nibble::QuantizedTensor weights;
  nibble::LowRank start;
};
/// w quantized as `base` says, which has a scheme. rank: of the adapter, for LoftQ.
inline FrozenWeights frozen_weights(const WeightMatrix& w, const AdapterBase& base, Eigen::Index rank,
                                    nibble::ThreadPool* pool) {
  FrozenWeights f;
  if (base.loftq > 0) {
    nibble::LoftqOptions options;
    options.iterations = base.loftq;
    options.double_quantized = base.double_quantized;
    options.low_rank.pool = pool;
    nibble::LoftqResult r = nibble::loftq(w, *base.scheme, rank, options);
    f.weights = std::move(r.base);
    f.start = std::move(r.start);
    return f;
  }
  const nibble::WeightGrids grids = nibble::fit_min_max(*base.scheme, w, pool);
  f.weights = grids.assemble(grids.encode(w, pool));
  if (base.double_quantized) f.weights = nibble::double_quantize(f.weights).tensor;
  return f;
}

/// w := the weights that the adapter's outputs come from: its base's values plus its low rank, each rounded once.
inline void merge_adapter(const LlamaAdapter& adapter, const AdapterBase& base, const std::string& tensor,
                          WeightMatrix& w, nibble::ThreadPool* pool) {
  const nibble::LowRank* l = adapter.find(tensor);
  if (base.scheme) {
    const FrozenWeights f =
        frozen_weights(w, base, l != nullptr ? l->rank() : static_cast<Eigen::Index>(adapter.config.rank), pool);
    f.weights.dequantize(w.data(), pool);
  }
  if (l != nullptr) nibble::merge_low_rank(*l, w, pool);
}

}  // namespace llm
