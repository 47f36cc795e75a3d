// A model into another format, tensor by tensor: memory is bounded by the largest tensor, whatever the model's size.
#pragma once

#include <regex.h>

#include <Eigen/Core>
#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "format_spec.hpp"
#include "model_file.hpp"
#include "nibble/quantize/quantizer.hpp"

namespace llm {

/// An extended regular expression of POSIX; std::regex costs seconds of compile time.
class Regex {
 public:
  explicit Regex(const std::string& pattern) {
    auto* compiled = new regex_t;
    const int error = ::regcomp(compiled, pattern.c_str(), REG_EXTENDED | REG_NOSUB);
    if (error != 0) {
      char why[128];
      ::regerror(error, compiled, why, sizeof why);
      delete compiled;
      nibble::detail::raise<nibble::InvalidArgument>("regular expression '" + pattern + "': " + why);
    }
    compiled_ = std::shared_ptr<regex_t>(compiled, [](regex_t* r) {
      ::regfree(r);
      delete r;
    });
  }
  bool found_in(const std::string& text) const {
    return ::regexec(compiled_.get(), text.c_str(), 0, nullptr, 0) == 0;
  }

 private:
  std::shared_ptr<regex_t> compiled_;
};

/// --keep REGEX=FORMAT: tensors whose name matches get this format; no format: they stay as they are.
struct KeepRule {
  Regex pattern;
  std::optional<FormatSpec> format;
};

/// Reads "REGEX=FORMAT" (FORMAT "same": as it is). Throws InvalidArgument.
inline KeepRule parse_keep(const std::string& text) {
  const std::size_t equals = text.rfind('=');
  nibble::detail::require(equals != std::string::npos && equals > 0, "--keep '", text,
                          "': expected REGEX=FORMAT, e.g. 'ffn_down=int8' or 'token_embd=same'");
  KeepRule rule{Regex(text.substr(0, equals)), {}};
  const std::string format = text.substr(equals + 1);
  if (format != "same") rule.format = parse_format(format);
  return rule;
}

struct QuantizePlan {
  FormatSpec format;           // of the block matrices
  std::vector<KeepRule> keep;  // the first that matches decides
};

struct QuantizeReport {
  std::size_t tensors = 0;
  std::size_t quantized = 0;
  std::size_t bytes_in = 0;
  std::size_t bytes_out = 0;
};

namespace quantize_detail {

/// What a tensor becomes; nothing: it stays as it is.
inline std::optional<FormatSpec> format_for(const QuantizePlan& plan, const TensorInfo& tensor) {
  if (!tensor.is_matrix()) return {};
  for (const KeepRule& rule : plan.keep)
    if (rule.pattern.found_in(tensor.name)) return rule.format;
  // The embedding and the output layer are worth their bits: they stay unless named.
  if (tensor.name.compare(0, 4, "blk.") != 0) return {};
  return plan.format;
}

inline nibble::QuantizedTensor quantize(const ModelFile& in, const TensorInfo& tensor,
                                        const nibble::Scheme& scheme) {
  const nibble::QuantizedTensor stored = in.quantized(tensor.name);
  using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Rows values(static_cast<Eigen::Index>(tensor.shape[0]), static_cast<Eigen::Index>(tensor.shape[1]));
  stored.dequantize(values.data());
  return nibble::DynamicQuantizer(scheme).quantize(values);
}

inline nibble::Scheme resolved(const nibble::Scheme& scheme, const TensorInfo& tensor) {
  return nibble::detail::resolve(scheme, tensor.shape);
}

/// The GGUF type that decodes to exactly the values of this scheme at its own number of bits. Throws InvalidArgument
/// with the nearest format that has one.
inline nibble::GgufType gguf_type_of(const nibble::Scheme& s, const TensorInfo& tensor) {
  using nibble::Format;
  using nibble::Symmetry;
  const auto refuse = [&](const std::string& why, const std::string& nearest) {
    nibble::detail::raise<nibble::InvalidArgument>("a GGUF cannot hold '" + tensor.name + "' as " + name_of(s) +
                                                   " exactly: " + why + "; the nearest format that it can is " +
                                                   nearest + " (or write a .safetensors)");
  };
  switch (s.format) {
    case Format::fp32: return nibble::GgufType::f32;
    case Format::fp16: return nibble::GgufType::f16;
    case Format::bf16: return nibble::GgufType::bf16;
    case Format::int8:
    case Format::int4: break;
    case Format::nf4: refuse("GGUF has no NF4", "int4-g32-offset (Q4_1)"); break;
    case Format::fp4: refuse("GGUF has no FP4", "int4-g32-offset (Q4_1)"); break;
    default:
      refuse("GGUF has no type of " + std::to_string(nibble::bits_of(s.format)) + " bits that Nibble writes",
             nibble::bits_of(s.format) > 4 ? "int8-g32-sym (Q8_0)" : "int4-g32-offset (Q4_1)");
  }
  const bool int8 = s.format == Format::int8;
  const std::size_t cols = tensor.shape.back();
  const std::string same_bits = int8                                ? "int8-g32-sym (Q8_0)"
                                : s.symmetry == Symmetry::symmetric ? "int4-g32-sym (Q4_0)"
                                                                    : "int4-g32-offset (Q4_1)";
  if (cols % 32 != 0)
    refuse("its rows of " + std::to_string(cols) + " are no multiple of 32",
           "fp16 for this tensor (--keep '" + tensor.name + "=fp16')");
  if (s.granularity.kind == nibble::Granularity::Kind::per_group && s.granularity.group_size % 32 != 0 &&
      s.granularity.group_size < cols)
    refuse("its groups are no multiple of 32", same_bits);
  if (s.scale_type != nibble::ScaleType::fp16) refuse("GGUF's scales are fp16", same_bits + ", --scales fp16");
  if (s.symmetry == Symmetry::symmetric) return int8 ? nibble::GgufType::q8_0 : nibble::GgufType::q4_0;
  if (int8) refuse("Q8_0 has no zero points", same_bits);
  if (s.symmetry == Symmetry::asymmetric) refuse("Q4_1 has float offsets, not integer zero points", same_bits);
  return nibble::GgufType::q4_1;
}

/// The same for a tensor as it is stored: int4 with integer zero points is Q4_1 where every scale times its zero point is
/// an fp16 number.
inline nibble::GgufType gguf_type_of(const ModelFile& in, const nibble::Scheme& s, const TensorInfo& tensor) {
  if (s.format != nibble::Format::int4 || s.symmetry != nibble::Symmetry::asymmetric)
    return gguf_type_of(s, tensor);
  const std::string obstacle = nibble::detail::gguf_obstacle(in.quantized(tensor.name), nibble::GgufType::q4_1);
  nibble::detail::require(obstacle.empty(), "a GGUF cannot hold '", tensor.name, "' (", name_of(s),
                          ") exactly as Q4_1: ", obstacle, "; write a .safetensors");
  return nibble::GgufType::q4_1;
}

/// general.file_type as llama.cpp numbers it.
inline std::uint32_t gguf_file_type(nibble::GgufType type) {
  switch (type) {
    case nibble::GgufType::f16: return 1;
    case nibble::GgufType::q4_0: return 2;
    case nibble::GgufType::q4_1: return 3;
    case nibble::GgufType::q8_0: return 7;
    case nibble::GgufType::bf16: return 32;
    default: return 0;
  }
}

/// Metadata for a GGUF made from a packed file.
inline void add_metadata(nibble::GgufWriter& out, const Hparams& h, const Vocabulary& v) {
  const auto u32 = [](std::size_t n) { return static_cast<std::uint32_t>(n); };
  out.add("general.architecture", "llama");
  out.add("general.name", h.name);
  out.add("llama.block_count", u32(h.layers));
  out.add("llama.context_length", u32(h.context));
  out.add("llama.embedding_length", u32(h.dim));
  out.add("llama.feed_forward_length", u32(h.ffn));
  out.add("llama.attention.head_count", u32(h.heads));
  out.add("llama.attention.head_count_kv", u32(h.kv_heads));
  out.add("llama.attention.key_length", u32(h.head_size));
  out.add("llama.attention.value_length", u32(h.head_size));
  out.add("llama.attention.layer_norm_rms_epsilon", h.rms_epsilon);
  out.add("llama.rope.dimension_count", u32(h.rope_size));
  out.add("llama.rope.freq_base", static_cast<float>(h.rope_base));
  if (h.rope_scale != 1.0) {
    out.add("llama.rope.scaling.type", "linear");
    out.add("llama.rope.scaling.factor", static_cast<float>(h.rope_scale));
  }
  out.add("llama.vocab_size", u32(h.vocabulary));
  out.add("tokenizer.ggml.model", v.model);
  if (v.model == "gpt2") out.add("tokenizer.ggml.pre", v.pre);
  std::vector<std::string> tokens;
  std::vector<std::int32_t> types;
  for (Token t = 0; v.has(t); ++t) {
    tokens.emplace_back(v.token(t));
    types.push_back(static_cast<std::int32_t>(v.type(t)));
  }
  out.add("tokenizer.ggml.tokens", tokens);
  if (!v.arrays().types.empty()) out.add("tokenizer.ggml.token_type", types);
  const FlatArray<float>& scores = v.arrays().scores;
  if (!scores.empty()) out.add("tokenizer.ggml.scores", std::vector<float>(scores.begin(), scores.end()));
  std::vector<std::string> merges;
  for (const MergeRule& m : v.merges())
    merges.push_back(tokens[static_cast<std::size_t>(m.left)] + " " + tokens[static_cast<std::size_t>(m.right)]);
  if (!merges.empty()) out.add("tokenizer.ggml.merges", merges);
  const auto token = [&](const char* key, Token t) {
    if (t != no_token) out.add(key, static_cast<std::uint32_t>(t));
  };
  token("tokenizer.ggml.bos_token_id", v.bos);
  token("tokenizer.ggml.eos_token_id", v.eos);
  token("tokenizer.ggml.eot_token_id", v.eot);
  token("tokenizer.ggml.unknown_token_id", v.unknown);
  out.add("tokenizer.ggml.add_bos_token", v.add_bos);
  out.add("tokenizer.ggml.add_space_prefix", v.add_space_prefix);
  if (!v.chat_template.empty()) out.add("tokenizer.chat_template", v.chat_template);
}

}  // namespace quantize_detail

/// True where the name asks for a GGUF, false for a packed file. Throws InvalidArgument for another extension.
inline bool wants_gguf(const std::string& path) {
  const auto ends_with = [&](const std::string& end) {
    return path.size() > end.size() && path.compare(path.size() - end.size(), end.size(), end) == 0;
  };
  if (ends_with(".gguf")) return true;
  nibble::detail::require(ends_with(".safetensors"), "output '", path,
                          "': expected a name in .gguf or .safetensors");
  return false;
}

/// Writes `in` to the packed safetensors file `path` under `plan`. Calls done(tensor name) after each tensor. `extras`, by
/// the name of the matrix, stand in the place of those of the file, as calibrate() makes them.
template <class Done>
QuantizeReport quantize_to_packed(const ModelFile& in, const std::string& path, const QuantizePlan& plan,
                                  nibble::ThreadPool* pool, Done&& done,
                                  std::map<std::string, LinearExtras> extras = {}) {
  using namespace quantize_detail;
  nibble::PackedFileWriter out(path);
  add_model_data(out, in.hparams(), in.vocabulary());
  // Codes stay in the order, and for the inputs, that they had.
  for (const TensorInfo& t : in.tensors())
    if (const LinearExtras* e = in.extras(t.name)) extras.emplace(t.name, *e);
  add_linear_extras(out, in.hparams(), extras);
  std::vector<nibble::Scheme> schemes;
  for (const TensorInfo& t : in.tensors()) {
    schemes.emplace_back();
    if (!t.is_matrix()) {
      out.declare_tensor(t.name, nibble::SafetensorsType::f32, t.shape);
      continue;
    }
    const std::optional<FormatSpec> format = format_for(plan, t);
    schemes.back() = resolved(format ? scheme_of(*format) : in.scheme(t.name), t);
    out.declare(t.name, {schemes.back(), t.shape[0], t.shape[1]}, false);
  }
  QuantizeReport report;
  for (std::size_t i = 0; i < in.tensors().size(); ++i) {
    const TensorInfo& t = in.tensors()[i];
    ++report.tensors;
    report.bytes_in += t.bytes;
    if (!t.is_matrix()) {
      const Eigen::VectorXf values = in.vector(t.name);
      const std::size_t bytes = static_cast<std::size_t>(values.size()) * sizeof(float);
      out.write_tensor(t.name, values.data(), bytes);
      report.bytes_out += bytes;
    } else {
      nibble::PackOptions options;
      options.pool = pool;
      options.channel_sums = false;
      const bool same = !format_for(plan, t);
      const nibble::PackedMatrix packed =
          nibble::pack(same ? in.quantized(t.name) : quantize(in, t, schemes[i]), options);
      out.write(t.name, packed);
      report.bytes_out += packed.byte_size();
      report.quantized += same ? 0 : 1;
    }
    done(t.name);
  }
  out.commit();
  return report;
}

/// Writes `in` to the GGUF `path` under `plan`. Whatever its tensors cannot hold exactly is refused before anything is
/// written, with an InvalidArgument that names the nearest format.
template <class Done>
QuantizeReport quantize_to_gguf(const ModelFile& in, const std::string& path, const QuantizePlan& plan,
                                Done&& done) {
  using namespace quantize_detail;
  nibble::detail::require(
      !in.has_extras(),
      "a GGUF cannot hold this model: its residual stream or some linear layer's input is rotated, "
      "reordered or has static scales (write a .safetensors)");
  struct Item {
    nibble::Scheme scheme;
    nibble::GgufType type = nibble::GgufType::f32;
    const nibble::GgufTensor* copy = nullptr;  // the bytes of another GGUF, whatever their type
    bool quantized = false;
  };
  std::vector<Item> items;
  const nibble::GgufTensor* main_like = nullptr;
  for (const TensorInfo& t : in.tensors()) {
    Item item;
    const std::optional<FormatSpec> format = format_for(plan, t);
    if (!format && in.gguf() != nullptr) {
      item.copy = &in.gguf()->tensor(t.name);
      item.type = item.copy->type;
      if (t.is_matrix() && t.name.compare(0, 4, "blk.") == 0) main_like = item.copy;
    } else if (t.is_matrix()) {
      item.scheme = resolved(format ? scheme_of(*format, true) : in.scheme(t.name), t);
      item.type = format ? gguf_type_of(item.scheme, t) : gguf_type_of(in, item.scheme, t);
      item.quantized = format.has_value();
    }
    items.push_back(item);
  }
  nibble::GgufType main_type = main_like != nullptr ? main_like->type : nibble::GgufType::f32;
  for (std::size_t i = 0; i < items.size(); ++i)
    if (items[i].quantized) main_type = items[i].type;

  nibble::GgufWriter out(path);
  if (in.gguf() != nullptr) {
    for (const nibble::GgufEntry& entry : in.gguf()->metadata())
      if (entry.key != "general.file_type" && entry.key != "general.quantization_version")
        out.add(entry.key, entry.value);
  } else {
    add_metadata(out, in.hparams(), in.vocabulary());
  }
  out.add("general.file_type", gguf_file_type(main_type));
  out.add("general.quantization_version", std::uint32_t{2});
  for (std::size_t i = 0; i < items.size(); ++i) {
    const TensorInfo& t = in.tensors()[i];
    out.declare(t.name, items[i].type, {t.shape.rbegin(), t.shape.rend()});
  }
  QuantizeReport report;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const TensorInfo& t = in.tensors()[i];
    nibble::Buffer bytes;
    if (items[i].copy != nullptr) {
      bytes = items[i].copy->data;
    } else if (t.is_matrix()) {
      bytes = nibble::to_gguf(items[i].quantized ? quantize(in, t, items[i].scheme) : in.quantized(t.name),
                              items[i].type);
    } else {
      const Eigen::VectorXf values = in.vector(t.name);
      bytes = nibble::Buffer(static_cast<std::size_t>(values.size()) * sizeof(float));
      std::memcpy(bytes.mutable_data(), values.data(), bytes.size());
    }
    out.write_tensor(t.name, bytes.data(), bytes.size());
    ++report.tensors;
    report.quantized += items[i].quantized ? 1 : 0;
    report.bytes_in += t.bytes;
    report.bytes_out += bytes.size();
    done(t.name);
  }
  out.commit();
  return report;
}

}  // namespace llm
