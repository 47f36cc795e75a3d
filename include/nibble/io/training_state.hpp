// Checkpoints of training, from which it goes on to the same bits: safetensors files with parameters, moments, whatever else
// changes, and JSON.
//
// This header needs nlohmann/json (3.9 or newer) and is not a part of <nibble/nibble.hpp>.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/io/bytes.hpp"
#include "nibble/io/safetensors.hpp"
#include "nibble/train/optimizer.hpp"
#include "nibble/train/parameters.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Floats that a checkpoint keeps beside parameters and moments, such as an observer's ranges. The memory is its owner's.
struct TrainingBuffer {
  std::string name;
  float* data = nullptr;
  std::size_t size = 0;
};

namespace detail {

/// A checksum of 64 bits, 8 bytes a step. Every step is a bijection of the sum and of the word, so a change within one
/// word is always seen.
class Checksum {
 public:
  void add(const void* data, std::size_t size) noexcept {
    mix(size);
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    std::size_t i = 0;
    for (; i + 8 <= size; i += 8) mix(load_unaligned<std::uint64_t>(bytes + i));
    std::uint64_t last = 0;
    copy_bytes(&last, bytes + i, size - i);
    if (i != size) mix(last);
  }
  void add(std::string_view text) noexcept { add(text.data(), text.size()); }
  std::string text() const { return std::to_string(sum_); }

 private:
  void mix(std::uint64_t word) noexcept {
    sum_ = (sum_ ^ word) * 0x9E3779B97F4A7C15U;
    sum_ ^= sum_ >> 32;
  }
  std::uint64_t sum_ = 0x243F6A8885A308D3U;
};

/// One block of bytes of a checkpoint.
struct TrainingTensor {
  std::string name;
  SafetensorsType type;
  const void* data;
  std::size_t count;
  std::size_t bytes() const noexcept { return count * bits_of(type) / 8; }
};

inline std::vector<TrainingTensor> training_tensors(const Parameters& parameters,
                                                    const std::vector<AdamWState>& states,
                                                    const std::vector<TrainingBuffer>& buffers) {
  std::vector<TrainingTensor> tensors;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const Parameter& p = parameters[i];
    const AdamWState& s = states[i];
    tensors.push_back({"value/" + p.name, SafetensorsType::f32, p.value, p.size});
    tensors.push_back({"first/" + p.name, SafetensorsType::f32, s.first.data(), s.first.size()});
    tensors.push_back({"second/" + p.name, SafetensorsType::f32, s.second.data(), s.second.size()});
    if (!s.eight_bit) continue;
    tensors.push_back({"first_codes/" + p.name, SafetensorsType::u8, s.first_codes.data(), s.first_codes.size()});
    tensors.push_back(
        {"second_codes/" + p.name, SafetensorsType::u8, s.second_codes.data(), s.second_codes.size()});
  }
  for (const TrainingBuffer& b : buffers) {
    require(b.size == 0 || b.data != nullptr, "buffer '", b.name, "' has no memory");
    tensors.push_back({"buffer/" + b.name, SafetensorsType::f32, b.data, b.size});
  }
  return tensors;
}

inline constexpr const char* training_state_format = "nibble training state";
inline constexpr const char* training_state_version = "1";

}  // namespace detail

/// Writes a checkpoint: the optimizer's parameters, moments and steps, the buffers, and metadata: free JSON for what else a run
/// must know, such as its position in the data and its seed (integers to 64 bits and doubles come back exactly). The path
/// holds its old content until the new one is complete and on the disk (AtomicFile): a kill or a full disk leaves the
/// last checkpoint as it was. Throws IoError; InvalidArgument, before anything is written, for a parameter that is not finite.
inline void save_training_state(const std::string& path, const AdamW& optimizer,
                                const nlohmann::json& metadata = nlohmann::json::object(),
                                const std::vector<TrainingBuffer>& buffers = {}) {
  require_finite(optimizer.parameters(), ParameterPart::value,
                 detail::concat("checkpoint after step ", optimizer.steps()));
  const std::vector<detail::TrainingTensor> tensors =
      detail::training_tensors(optimizer.parameters(), optimizer.states(), buffers);
  const std::string steps = std::to_string(optimizer.steps());
  const std::string json = metadata.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  detail::Checksum sum;
  sum.add(steps);
  sum.add(json);
  for (const detail::TrainingTensor& t : tensors) {
    sum.add(t.name);
    sum.add(t.data, t.bytes());
  }
  SafetensorsWriter writer(path);
  writer.add_metadata("format", detail::training_state_format);
  writer.add_metadata("version", detail::training_state_version);
  writer.add_metadata("steps", steps);
  writer.add_metadata("metadata", json);
  writer.add_metadata("checksum", sum.text());
  for (const detail::TrainingTensor& t : tensors) writer.declare(t.name, t.type, {t.count});
  for (const detail::TrainingTensor& t : tensors) writer.write(t.name, t.data, t.bytes());
  writer.commit();
}

/// Reads a checkpoint into an optimizer of the same parameters (names and sizes) and the same kind of moments, and into the
/// same buffers; returns the metadata. Everything is checked before anything is changed. Gradients are not a part of it.
/// Throws IoError, and FormatError for a file that is damaged, of another kind or version, or of another model; the
/// message names the tensor.
inline nlohmann::json load_training_state(const std::string& path, AdamW& optimizer,
                                          const std::vector<TrainingBuffer>& buffers = {}) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  const auto fail = [&path](const std::string& message) {
    detail::raise<FormatError>("'" + path + "': " + message);
  };
  const auto text = [&](const char* key) -> const std::string& {
    static const std::string none;
    const std::string* found = file.find_metadata(key);
    return found != nullptr ? *found : none;
  };
  if (text("format") != detail::training_state_format) fail("this is no checkpoint of training");
  if (text("version") != detail::training_state_version)
    fail("version '" + detail::printable(text("version")) + "' of a training checkpoint, expected " +
         detail::training_state_version);

  // The same tensors, in the same order, as would be written now.
  std::vector<AdamWState> states = optimizer.states();
  const std::vector<detail::TrainingTensor> tensors =
      detail::training_tensors(optimizer.parameters(), states, buffers);
  std::vector<const SafetensorsTensor*> found;
  detail::Checksum sum;
  sum.add(text("steps"));
  sum.add(text("metadata"));
  for (const detail::TrainingTensor& t : tensors) {
    const SafetensorsTensor* from = file.find_tensor(t.name);
    if (from == nullptr) fail("tensor '" + detail::printable(t.name) + "' is missing");
    if (from->type != t.type || from->elements() != t.count || from->data.size() != t.bytes())
      fail(detail::concat("tensor '", detail::printable(t.name), "' has ", from->elements(), " elements of ",
                          name_of(from->type), ", expected ", t.count, " of ", name_of(t.type)));
    sum.add(t.name);
    sum.add(from->data.data(), from->data.size());
    found.push_back(from);
  }
  if (file.tensors().size() != tensors.size())
    for (const SafetensorsTensor& t : file.tensors())
      if (std::none_of(tensors.begin(), tensors.end(), [&](const auto& own) { return own.name == t.name; }))
        fail("tensor '" + detail::printable(t.name) + "' is in the file, but not in the model");
  if (text("checksum") != sum.text()) fail("the checksum is wrong: the file is damaged");
  nlohmann::json metadata = nlohmann::json::parse(text("metadata"), nullptr, false);
  if (metadata.is_discarded()) fail("the metadata is not valid JSON");
  std::uint64_t steps = 0;
  for (const char c : text("steps")) steps = steps * 10 + static_cast<std::uint64_t>(c - '0');

  // `states` is this function's, parameters and buffers are their owners'.
  for (std::size_t i = 0; i < tensors.size(); ++i)
    detail::copy_bytes(const_cast<void*>(tensors[i].data), found[i]->data.data(), found[i]->data.size());
  optimizer.restore(steps, std::move(states));
  return metadata;
}

}  // namespace NIBBLE_ABI
}  // namespace nibble
