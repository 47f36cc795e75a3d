// A model's folder: safetensors files, one or several that an index lists, and JSON files beside them.
//
// This header needs nlohmann/json and is not a part of <nibble/nibble.hpp>.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/io/bytes.hpp"
#include "nibble/io/mapped_file.hpp"
#include "nibble/io/safetensors.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// The JSON object in the file `path`. Throws IoError; FormatError where it is no JSON object.
inline nlohmann::json read_json_object(const std::string& path) {
  const MappedFile file = MappedFile::open(path);
  const auto* text = reinterpret_cast<const char*>(file.data());
  // (nlohmann/json takes a NUL for the end of its input.)
  const bool whole = file.size() != 0 && std::memchr(text, 0, file.size()) == nullptr;
  nlohmann::json json = whole ? nlohmann::json::parse(text, text + file.size(), nullptr, false) : nlohmann::json();
  detail::require<FormatError>(json.is_object(), "'", path, "' holds no JSON object");
  return json;
}

/// The tensors of a folder's safetensors files as one set: those that `model.safetensors.index.json` names, else
/// `model.safetensors`, else the only *.safetensors there is. Copies share the maps.
class SafetensorsFolder {
 public:
  /// Throws IoError; FormatError where a file breaks a rule, the index names a file outside of the folder or a tensor
  /// that its file does not hold, two files hold the same tensor, or it is not clear which files are meant.
  static SafetensorsFolder open(const std::string& folder, MapOptions options = {}) {
    namespace fs = std::filesystem;
    SafetensorsFolder result;
    const std::string index = folder + "/model.safetensors.index.json";
    std::error_code ignored;
    if (fs::exists(index, ignored)) {
      result.open_index(folder, index, options);
    } else if (fs::exists(folder + "/model.safetensors", ignored)) {
      result.add(SafetensorsFile::open(folder + "/model.safetensors", options));
    } else {
      std::vector<std::string> found;
      std::error_code failed;
      for (fs::directory_iterator it(folder, failed), end; !failed && it != end; it.increment(failed))
        if (it->path().extension() == ".safetensors") found.push_back(it->path().string());
      if (failed) detail::raise<IoError>("cannot read the folder '" + folder + "': " + failed.message());
      detail::require<FormatError>(found.size() == 1, "'", folder, "' holds ", found.size(),
                                   " safetensors files and no index; expected model.safetensors.index.json, "
                                   "model.safetensors, or one file");
      result.add(SafetensorsFile::open(found[0], options));
    }
    return result;
  }

  const std::vector<SafetensorsFile>& files() const noexcept { return files_; }
  /// Bytes of all tensors.
  std::size_t bytes() const noexcept { return bytes_; }
  /// Names, sorted.
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& [name, place] : places_) out.push_back(name);
    return out;
  }
  /// nullptr where there is no such tensor.
  const SafetensorsTensor* find_tensor(std::string_view name) const noexcept {
    const auto at = places_.find(name);
    return at == places_.end() ? nullptr : &files_[at->second.first].tensors()[at->second.second];
  }
  /// Throws FormatError where there is no such tensor.
  const SafetensorsTensor& tensor(std::string_view name) const {
    const SafetensorsTensor* found = find_tensor(name);
    if (found == nullptr)
      detail::raise<FormatError>(detail::concat("safetensors: tensor '", detail::printable(name), "' is missing"));
    return *found;
  }

 private:
  void open_index(const std::string& folder, const std::string& path, MapOptions options) {
    const nlohmann::json json = read_json_object(path);
    const auto map = json.find("weight_map");
    detail::require<FormatError>(map != json.end() && map->is_object() && !map->empty(), "'", path,
                                 "' lacks a 'weight_map'");
    std::map<std::string, std::size_t> numbers;
    for (auto it = map->begin(); it != map->end(); ++it) {
      const auto* file = it.value().get_ptr<const nlohmann::json::string_t*>();
      detail::require<FormatError>(file != nullptr && !file->empty() && file->find('/') == std::string::npos &&
                                       file->find('\0') == std::string::npos && *file != "." && *file != "..",
                                   "'", path, "': tensor '", detail::printable(it.key()),
                                   "' is not mapped to a file of the folder");
      const auto [at, fresh] = numbers.emplace(*file, files_.size());
      if (fresh) add(SafetensorsFile::open(folder + "/" + *file, options));
      detail::require<FormatError>(files_[at->second].find_tensor(it.key()) != nullptr, "'", path, "': tensor '",
                                   detail::printable(it.key()), "' is not in '", detail::printable(*file), "'");
    }
  }

  void add(SafetensorsFile file) {
    for (std::size_t i = 0; i < file.tensors().size(); ++i) {
      const SafetensorsTensor& tensor = file.tensors()[i];
      bytes_ += tensor.data.size();
      detail::require<FormatError>(places_.emplace(tensor.name, std::make_pair(files_.size(), i)).second,
                                   "safetensors: two files hold a tensor '", detail::printable(tensor.name), "'");
    }
    files_.push_back(std::move(file));
  }

  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::pair<std::size_t, std::size_t>, std::less<>> places_;  // file, tensor
  std::size_t bytes_ = 0;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
