// libFuzzer entry for the file readers: every input is an error or a file that can be read whole. Build, with
// Clang:
//   clang++ -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -Iinclude -isystem /usr/include/eigen3
//   tests/fuzz_io.cpp
// The first byte of an input chooses the format. With -DNIBBLE_FUZZ_PACKED also packed models, GPTQ and AWQ checkpoints
// and the conversion to quantized tensors, which bring in all kernels: compiling them with the fuzzer's instrumentation
// takes minutes.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "nibble/io/gguf.hpp"
#include "nibble/io/safetensors.hpp"
#if defined(NIBBLE_FUZZ_PACKED)
#include "nibble/io/awq_checkpoint.hpp"
#include "nibble/io/gguf_quantized.hpp"
#include "nibble/io/gptq_checkpoint.hpp"
#include "nibble/io/packed_file.hpp"
#endif

namespace {

nibble::Buffer exact_copy(const std::uint8_t* data, std::size_t size) {
  const std::shared_ptr<std::uint8_t> memory(new std::uint8_t[size + 1], std::default_delete<std::uint8_t[]>());
  nibble::detail::copy_bytes(memory.get(), data, size);
  return nibble::Buffer::borrow(memory.get(), size, memory);
}

void read_gguf(const nibble::Buffer& bytes) {
  const auto file = nibble::GgufFile::parse(bytes);
  for (const auto& entry : file.metadata()) {
    nibble::GgufArray array;
    if (entry.value.get(array) && array.element_type() == nibble::GgufValueType::array) (void)array.arrays();
    if (entry.value.get(array) && array.element_type() == nibble::GgufValueType::string)
      (void)array.as<std::string_view>();
  }
  for (const auto& tensor : file.tensors()) {
    const nibble::GgufTypeInfo* info = nibble::gguf_type_info(tensor.type);
    if (info == nullptr || !info->decodes) continue;
    (void)tensor.dequantize();
#if defined(NIBBLE_FUZZ_PACKED)
    const auto quantized = nibble::to_quantized(tensor);
    (void)nibble::to_gguf(quantized, nibble::gguf_type_for(quantized));
#endif
  }
}

#if defined(NIBBLE_FUZZ_PACKED)
void read_packed(const nibble::Buffer& bytes) {
  const auto file = nibble::PackedFile::parse(bytes);
  for (const auto& [name, matrix] : file.matrices())
    if (matrix.rows() * matrix.cols() < 100000) (void)matrix.dequantize();
}

void expect_same(const std::vector<nibble::SafetensorsTensor>& written, const nibble::SafetensorsFile& file) {
  for (const auto& t : written) {
    const nibble::SafetensorsTensor* from = file.find_tensor(t.name);
    if (from != nullptr &&
        (from->data.size() != t.data.size() || std::memcmp(from->data.data(), t.data.data(), t.data.size()) != 0))
      __builtin_trap();
  }
}

// A layer "x" that is read is written back to the same bytes. The config stands in the file's metadata.
void read_checkpoint(const nibble::Buffer& bytes) {
  const auto file = nibble::SafetensorsFile::parse(bytes);
  const std::string* text = file.find_metadata("config");
  nlohmann::json json =
      nlohmann::json::parse(text == nullptr ? "{\"bits\":4,\"group_size\":16}" : *text, nullptr, false);
  if (!json.is_object()) return;
  if (json.value("quant_method", nlohmann::json()) == "awq") {
    expect_same(nibble::to_awq("x", nibble::read_awq(file, "x", nibble::parse_awq_config(json))), file);
    return;
  }
  const nibble::GptqConfig config = nibble::parse_gptq_config(json);
  const nibble::GptqVersion version = nibble::find_gptq_version(file, {"x"}, config);
  expect_same(nibble::to_gptq("x", nibble::read_gptq(file, "x", config, version), version), file);
}
#endif

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const nibble::Buffer bytes = exact_copy(data + 1, size - 1);
  try {
    switch (data[0] % 4) {
      case 0: read_gguf(bytes); break;
      case 1: (void)nibble::SafetensorsFile::parse(bytes); break;
#if defined(NIBBLE_FUZZ_PACKED)
      case 2: read_packed(bytes); break;
      default: read_checkpoint(bytes); break;
#else
      default: break;
#endif
    }
  } catch (const nibble::Error&) {
  }
  return 0;
}
