// Says which kernel a product runs on, and why no better one.
#pragma once

#include <Eigen/Core>
#include <string>

#include "nibble/gemm/matmul.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// A few lines about w * x for `tokens` columns of x: kernel, ISA and why not a better one, layout, tiles, threads.
inline std::string explain(const PackedMatrix& w, Eigen::Index tokens, const MatmulOptions& options = {}) {
  detail::require(tokens >= 0, "tokens is ", tokens, ", expected 0 or more");
  const detail::KernelTable& kernels = detail::kernels_of(options);
  const Activations kind = detail::activations_for(w, options.activations);
  const bool integers = kind != Activations::fp32 && kind != Activations::bf16;
  std::string kernel;
  const auto int_name = [](Format f) { return std::string(f == Format::int8 ? "gemm_w8a8" : "gemm_w4a8"); };
  if (integers)
    kernel = !is_bit_stream(w.format()) ? int_name(w.format())
             : static_cast<std::size_t>(tokens) <= kernels.gemm_bits_rows
                 ? "gemm_bits"
                 : detail::concat(int_name(detail::expanded_format(w.format())), " (", name_of(w.format()),
                                  " expanded to ", name_of(detail::expanded_format(w.format())), " in cache)");
  else if (kind == Activations::bf16)
    kernel = "gemm_bf16";
  else if (tokens <= static_cast<Eigen::Index>(kernels.gemv_max_rows))
    kernel = detail::concat("gemv_float (", name_of(w.format()), " dequantized in registers)");
  else
    kernel = detail::concat("gemm_float (", name_of(w.format()), " dequantized to fp32 panels)");
  std::string text = detail::concat("kernel: ", kernel, "\nisa: ", name_of(kernels.isa));

  std::string why;
  if (options.isa) {
    why = "asked for by the caller";
  } else {
    std::string runs;   // better ones that the CPU runs
    std::string lacks;  // and that it does not
    for (Isa isa : built_isas) {
      if (isa <= kernels.isa) continue;
      std::string& list = isa_available(isa) ? runs : lacks;
      list += detail::concat(list.empty() ? "" : ", ", name_of(isa));
    }
    const char* limit = std::getenv("NIBBLE_MAX_ISA");
    if (!runs.empty())
      why = detail::concat("NIBBLE_MAX_ISA is ", limit == nullptr ? "" : limit, "; the CPU could run ", runs);
    else if (!lacks.empty())
      why = detail::concat("this CPU or operating system lacks ", lacks);
    else
      why = "the best there is";
  }
  text += detail::concat(" (", why, ")\nweights: ", w.rows(), " x ", w.cols(), " ", name_of(w.format()));
  if (has_scales(w.format()))
    text += detail::concat(" ", name_of(w.symmetry()), ", ", w.groups(), w.groups() == 1 ? " group" : " groups",
                           " of ", w.group_size(), ", ", name_of(w.scale_type()), " scales");
  text += detail::concat(", layout ", w.layout(), ", ", w.panels(), " panels of ", detail::panel_width,
                         " channels\nactivations: ",
                         kind == Activations::fp32              ? "fp32"
                         : kind == Activations::bf16            ? "rounded to bf16"
                         : kind == Activations::int8_asymmetric ? "int8 with a zero point, one scale a token"
                         : kind == Activations::int8_grouped    ? "int8, one scale a token and group"
                                                                : "int8, one scale a token");
  if (kind == Activations::fp32 && is_integer(w.format()))
    text += " (weights are dequantized; int8 activations would be faster)";
  text +=
      detail::concat("\ntokens: ", tokens, ", threads: ", options.pool == nullptr ? 1 : options.pool->threads(),
                     options.pool == nullptr ? " (no pool given)" : "");
  return text + "\n";
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
