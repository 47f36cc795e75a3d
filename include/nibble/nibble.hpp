// Umbrella: quantizers, packed weights, products, transformer parts, files - what needs Eigen and the standard library
// alone. Post-training quantization and training cost a compiler as much again: <nibble/ptq.hpp>, <nibble/train.hpp>. The
// headers of nibble/io that read and write safetensors need nlohmann/json; include those by name.
#pragma once

#include "nibble/core/abi.hpp"
#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"
#include "nibble/core/thread_pool.hpp"

#include "nibble/formats/bf16.hpp"
#include "nibble/formats/format.hpp"
#include "nibble/formats/fp16.hpp"
#include "nibble/formats/fp4.hpp"
#include "nibble/formats/int2.hpp"
#include "nibble/formats/int3.hpp"
#include "nibble/formats/int4.hpp"
#include "nibble/formats/int5.hpp"
#include "nibble/formats/int6.hpp"
#include "nibble/formats/int8.hpp"
#include "nibble/formats/nf4.hpp"

#include "nibble/kernels/cpu.hpp"
#include "nibble/kernels/dispatch.hpp"
#include "nibble/kernels/table.hpp"

#include "nibble/quantize/bounds.hpp"
#include "nibble/quantize/error_report.hpp"
#include "nibble/quantize/fake_quantize.hpp"
#include "nibble/quantize/quantized_tensor.hpp"
#include "nibble/quantize/quantizer.hpp"
#include "nibble/quantize/range.hpp"
#include "nibble/quantize/scheme.hpp"
#include "nibble/quantize/tensor.hpp"

#include "nibble/gemm/activations.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/gemm/epilogue.hpp"
#include "nibble/gemm/explain.hpp"
#include "nibble/gemm/matmul.hpp"
#include "nibble/gemm/outliers.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/gemm/workspace.hpp"

#include "nibble/nn/attention.hpp"
#include "nibble/nn/gate.hpp"
#include "nibble/nn/kv_cache.hpp"
#include "nibble/nn/norm.hpp"
#include "nibble/nn/rope.hpp"
#include "nibble/nn/softmax.hpp"

#include "nibble/io/atomic_file.hpp"
#include "nibble/io/gguf.hpp"
#include "nibble/io/gguf_quantized.hpp"
#include "nibble/io/mapped_file.hpp"
