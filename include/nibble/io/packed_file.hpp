// Nibble's packed models: a file of weights in the layout that kernels read, mapped and used where it lies.
//
// The file is a safetensors file (any safetensors reader lists it) with, in `__metadata__`:
//
//   format = "nibble-packed", version = "1", layout = "panel16"
//   matrix:<name> = a flat JSON object, for every packed matrix:
//     layout, rows, cols; format (name_of); symmetry (symmetric, asymmetric,
//     float_offset); granularity (per_tensor, per_channel, per_group), axis, group_size, full_range: the scheme it
//     was quantized by; scale_type (fp32, fp16, bf16)
//   and whatever else the writer adds: hyperparameters, a tokenizer's settings.
//
// A matrix of P = ceil(rows / 16) panels, whose layout kernels/args.hpp draws, is stored as tensors
//
//   <name>.codes         U8 [P, bytes of a panel]
//   <name>.scales        F16 or F32 [P, groups, 16], formats with scales only (bf16 scales are packed as F32)
//   <name>.zeros         I8 (asymmetric), or as scales (float_offset) [P, groups, 16]
//   <name>.channel_sums  F32 [P, 16], optional
//
// Double-quantized scales (ptq/double_quant.hpp) are stored in 8 bits: the matrix' object then has scale_coding =
// "double8", scale_map (dynamic, linear) and scale_block, scale_type is fp32, and in the place of <name>.scales stand
//
//   <name>.scale_codes   U8 [scales], in the order of QuantizedTensor's scales: rows, and groups within
//   <name>.scale_absmax  F32 [ceil(scales / scale_block)]
//   <name>.scale_offset  F32 [1]
//
// They are decoded when the file is opened; codes are used where they are mapped, as always. (Versions of Nibble that
// do not know scale_coding refuse such a file for an unknown field.)
//
// Other tensors (norms, a vocabulary) stand beside them as plain safetensors.
//
// The promise. A file of version 1 is read, with the same values, by every later version of Nibble, on every
// machine that Nibble runs on: the layout does not depend on the ISA. What changes the meaning of a file gets a
// new version or a new layout name, and a reader refuses, with a message that says so, what it does not know:
// another version, another layout, an unknown field of a matrix, a size that does not fit, a scale that is NaN or
// Inf. It never misreads. Metadata keys and tensors that it does not know are the writer's own and are ignored.
//
// This header needs nlohmann/json and is not a part of <nibble/nibble.hpp>.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/formats/format.hpp"
#include "nibble/gemm/pack.hpp"
#include "nibble/gemm/packed_matrix.hpp"
#include "nibble/io/safetensors.hpp"
#include "nibble/ptq/double_quant.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

inline constexpr std::string_view packed_file_format = "nibble-packed";
inline constexpr std::string_view packed_file_version = "1";

namespace detail {

inline constexpr std::string_view packed_matrix_prefix = "matrix:";

inline constexpr const char* double_quant_coding = "double8";

inline std::string packed_header_text(const PackedHeader& header,
                                      const std::optional<DoubleQuantOptions>& coding) {
  const Scheme& s = header.scheme;
  nlohmann::json json;
  json["layout"] = std::string(panel16_layout);
  json["rows"] = header.rows;
  json["cols"] = header.cols;
  json["format"] = std::string(nibble::name_of(s.format));
  json["symmetry"] = std::string(nibble::name_of(s.symmetry));
  json["granularity"] = std::string(name_of(s.granularity.kind));
  json["axis"] = s.granularity.axis;
  json["group_size"] = s.granularity.group_size;
  json["full_range"] = s.full_range;
  json["scale_type"] = std::string(nibble::name_of(s.scale_type));
  if (coding) {
    json["scale_coding"] = double_quant_coding;
    json["scale_map"] = std::string(nibble::name_of(coding->map));
    json["scale_block"] = coding->block;
  }
  return json.dump();
}

/// Reads one matrix header of a file. `where` begins every message.
class PackedHeaderReader {
 public:
  PackedHeaderReader(const std::string& text, std::string where) : where_(std::move(where)) {
    std::set<std::string> keys;
    bool flat = true;
    const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
      using Event = nlohmann::json::parse_event_t;
      if (event == Event::key) flat = flat && keys.insert(value.get_ref<const std::string&>()).second;
      if (event == Event::array_start || (event == Event::object_start && depth > 0)) flat = false;
      return flat;
    };
    json_ = nlohmann::json::parse(text, watch, false);
    // (nlohmann/json takes a NUL for the end of the text.)
    if (!flat || !json_.is_object() || text.find('\0') != std::string::npos)
      fail("is no flat JSON object with distinct keys");
  }

  PackedHeader read() {
    const std::string& layout = text("layout");
    if (layout != panel16_layout)
      raise<Unsupported>(where_ + " has the layout '" + printable(layout) + "'; this version of Nibble runs '" +
                         std::string(panel16_layout) + "'");
    PackedHeader header;
    header.rows = number("rows");
    header.cols = number("cols");
    Scheme& s = header.scheme;
    s.format = named("format", all_formats);
    s.symmetry = named("symmetry", {Symmetry::symmetric, Symmetry::asymmetric, Symmetry::float_offset});
    s.scale_type = named("scale_type", {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16});
    using Kind = Granularity::Kind;
    s.granularity.kind = named("granularity", {Kind::per_tensor, Kind::per_channel, Kind::per_group});
    const std::size_t axis = number("axis");
    if (axis > 1) fail(concat("has the axis ", axis, ", expected 0 or 1"));
    s.granularity.axis = static_cast<int>(axis);
    s.granularity.group_size = number("group_size");
    const nlohmann::json& full_range = member("full_range");
    if (!full_range.is_boolean()) fail("has a 'full_range' that is no boolean");
    s.full_range = full_range.get<bool>();
    if (json_.contains("scale_coding")) {
      const std::string& coding = text("scale_coding");
      if (coding != double_quant_coding) fail("has the unknown scale_coding '" + printable(coding) + "'");
      DoubleQuantOptions options;
      options.map = named("scale_map", {ScaleMap::dynamic, ScaleMap::linear});
      options.block = number("scale_block");
      if (options.block == 0) fail("has a 'scale_block' of 0");
      if (!has_scales(s.format) || s.scale_type != ScaleType::fp32)
        fail("has a scale_coding for scales that are not fp32");
      coding_ = options;
    }
    if (json_.size() != read_) fail("has a field that this version of Nibble does not know");
    return header;
  }
  /// After read(): how scales are double-quantized, where they are.
  const std::optional<DoubleQuantOptions>& coding() const noexcept { return coding_; }

 private:
  [[noreturn]] void fail(const std::string& what) const { raise<FormatError>(where_ + " " + what); }

  const nlohmann::json& member(const char* key) {
    const auto at = json_.find(key);
    if (at == json_.end()) fail(concat("lacks '", key, "'"));
    ++read_;
    return *at;
  }
  const std::string& text(const char* key) {
    const auto* value = member(key).get_ptr<const nlohmann::json::string_t*>();
    if (value == nullptr) fail(concat("has a '", key, "' that is no string"));
    return *value;
  }
  std::size_t number(const char* key) {
    const nlohmann::json& value = member(key);
    if (!value.is_number_unsigned()) fail(concat("has a '", key, "' that is no unsigned integer"));
    return value.get<std::size_t>();
  }
  template <class E>
  E named(const char* key, std::initializer_list<E> values) {
    return named<std::initializer_list<E>, E>(key, values);
  }
  template <class List, class E = typename List::value_type>
  E named(const char* key, const List& values) {
    using detail::name_of;
    using nibble::name_of;
    const std::string& wanted = text(key);
    for (const E value : values)
      if (wanted == name_of(value)) return value;
    fail(concat("has the unknown ", key, " '", printable(wanted), "'"));
  }

  std::string where_;
  nlohmann::json json_;
  std::size_t read_ = 0;
  std::optional<DoubleQuantOptions> coding_;
};

/// The tensors of a packed matrix.
struct PackedPart {
  const char* suffix;
  SafetensorsType type;
  std::vector<std::size_t> shape;
  std::size_t bytes;
};

constexpr SafetensorsType safetensors_type(ScaleType type) noexcept {
  return type == ScaleType::fp32   ? SafetensorsType::f32
         : type == ScaleType::fp16 ? SafetensorsType::f16
                                   : SafetensorsType::bf16;
}

/// Scales that the quantized matrix has.
inline std::size_t quantized_params(const PackedHeader& header) {
  return CodeLayout(header.scheme, {header.rows, header.cols}).param_count();
}

/// Scales in the order of the quantized matrix, as the panels have them.
inline Buffer panel_scales(const PackedHeader& header, const std::vector<float>& scales) {
  const PackedShape shape = shape_of(header);
  Buffer panels = Buffer::uninitialized(shape.scales_bytes);
  if (shape.params == 0) return panels;
  // Rows are only read on their way to the lanes.
  auto* all = reinterpret_cast<std::uint8_t*>(const_cast<float*>(scales.data()));
  for (std::size_t panel = 0; panel < shape.panels; ++panel) {
    const std::size_t row = panel * panel_width;
    move_params<true>(header.scheme.granularity, sizeof(float), all, row, std::min(panel_width, header.rows - row),
                      shape.groups, panels.mutable_data() + row * shape.groups * sizeof(float));
  }
  return panels;
}

/// What double-quantized scales are stored as, in the order of DoubleQuantizedScales' codes, absmax and offset.
inline std::vector<PackedPart> double_quant_parts(const PackedHeader& header, const DoubleQuantOptions& coding) {
  const std::size_t count = quantized_params(header);
  if (count == 0) return {};
  const std::size_t blocks = ceil_div(count, coding.block);
  return {{".scale_codes", SafetensorsType::u8, {count}, count},
          {".scale_absmax", SafetensorsType::f32, {blocks}, blocks * sizeof(float)},
          {".scale_offset", SafetensorsType::f32, {1}, sizeof(float)}};
}

/// Codes, scales, zeros, channel sums, in this order; those that have no bytes are not stored. `header` is
/// resolved.
inline std::vector<PackedPart> packed_parts(const PackedHeader& header) {
  const PackedShape shape = shape_of(header);
  const SafetensorsType scales = safetensors_type(shape.scale_type);
  const bool integers = header.scheme.symmetry == Symmetry::asymmetric;
  const std::vector<std::size_t> params = {shape.panels, shape.groups, panel_width};
  const std::size_t panel = shape.panels == 0 ? 0 : shape.codes_bytes / shape.panels;
  return {{".codes", SafetensorsType::u8, {shape.panels, panel}, shape.codes_bytes},
          {".scales", scales, params, shape.scales_bytes},
          {".zeros", integers ? SafetensorsType::i8 : scales, params, shape.zeros_bytes},
          {".channel_sums",
           SafetensorsType::f32,
           {shape.panels, panel_width},
           shape.panels * panel_width * sizeof(float)}};
}

}  // namespace detail

/// Writes a packed model. Either add() everything and commit(), which keeps the matrices in memory until then; or
/// declare() everything first and then write() matrix by matrix, for a model larger than memory. The path holds
/// its old content until commit() returns (AtomicFile). Names must be distinct.
class PackedFileWriter {
 public:
  explicit PackedFileWriter(const std::string& path) : file_(path, Buffer::alignment) {
    file_.add_metadata("format", std::string(packed_file_format));
    file_.add_metadata("version", std::string(packed_file_version));
    file_.add_metadata("layout", std::string(panel16_layout));
  }

  /// Adds a metadata entry of the caller's own. "format", "version", "layout" and "matrix:..." are taken.
  void add_metadata(const std::string& key, const std::string& value) {
    detail::require(key.compare(0, detail::packed_matrix_prefix.size(), detail::packed_matrix_prefix) != 0,
                    "PackedFileWriter: metadata keys that begin with '", detail::packed_matrix_prefix,
                    "' are taken");
    file_.add_metadata(key, value);
  }

  /// Adds a matrix, whose bytes are written at commit().
  void add(const std::string& name, const PackedMatrix& matrix) {
    declare(name, matrix.header(), !matrix.channel_sums().empty());
    kept_matrices_.push_back({name, matrix, std::nullopt});
  }
  /// The same with its scales in 8 bits: `scales` must decode to the matrix' own.
  void add(const std::string& name, const PackedMatrix& matrix, const DoubleQuantizedScales& scales) {
    declare(name, matrix.header(), !matrix.channel_sums().empty(), DoubleQuantOptions{scales.block, scales.map});
    kept_matrices_.push_back({name, matrix, scales});
  }
  /// Adds a plain tensor in C order; `data` is copied or shared until commit().
  void add_tensor(const std::string& name, SafetensorsType type, const std::vector<std::size_t>& shape,
                  Buffer data) {
    detail::require(safetensors_bytes(type, shape) == data.size(), "PackedFileWriter: tensor '", name, "' has ",
                    data.size(), " bytes, its shape takes ", safetensors_bytes(type, shape));
    declare_tensor(name, type, shape);
    kept_tensors_.emplace_back(name, std::move(data));
  }
  void add_tensor(const std::string& name, const std::vector<float>& values) {
    Buffer data(values.size() * sizeof(float));
    detail::copy_bytes(data.mutable_data(), values.data(), data.size());
    add_tensor(name, SafetensorsType::f32, {values.size()}, std::move(data));
  }

  /// Announces a matrix: its header is all that is needed. `channel_sums`: whether the matrix will have them. `scales`:
  /// how its scales, which are fp32, will be double-quantized.
  void declare(const std::string& name, const PackedHeader& header, bool channel_sums = true,
               const std::optional<DoubleQuantOptions>& scales = std::nullopt) {
    const PackedHeader resolved = resolve(header);
    detail::require(
        !scales || (has_scales(resolved.scheme.format) && resolved.scheme.scale_type == ScaleType::fp32 &&
                    scales->block > 0),
        "PackedFileWriter: matrix '", name,
        "' is to have double-quantized scales: expected a format with fp32 scales and blocks of 1 or more");
    file_.add_metadata(std::string(detail::packed_matrix_prefix) + name,
                       detail::packed_header_text(resolved, scales));
    for (const detail::PackedPart& part : detail::packed_parts(resolved)) {
      if (std::string_view(part.suffix) == ".scales" && scales) {
        for (const detail::PackedPart& coded : detail::double_quant_parts(resolved, *scales))
          file_.declare(name + coded.suffix, coded.type, coded.shape);
        continue;
      }
      if (part.bytes == 0 && std::string_view(part.suffix) != ".codes") continue;
      if (std::string_view(part.suffix) == ".channel_sums" && !channel_sums) continue;
      file_.declare(name + part.suffix, part.type, part.shape);
    }
    declared_.emplace(name, Declared{resolved, channel_sums, scales});
  }
  void declare_tensor(const std::string& name, SafetensorsType type, const std::vector<std::size_t>& shape) {
    file_.declare(name, type, shape);
  }

  /// Writes a declared matrix. Throws InvalidArgument where it is not the one that was declared.
  void write(const std::string& name, const PackedMatrix& matrix) { write_parts(name, matrix, nullptr); }
  /// The same for one that was declared with double-quantized scales.
  void write(const std::string& name, const PackedMatrix& matrix, const DoubleQuantizedScales& scales) {
    write_parts(name, matrix, &scales);
  }
  /// Appends bytes to a declared plain tensor.
  void write_tensor(const std::string& name, const void* bytes, std::size_t size) {
    file_.write(name, bytes, size);
  }

  /// Writes what was added and puts the file in place.
  void commit() {
    for (const Kept& kept : kept_matrices_)
      write_parts(kept.name, kept.matrix, kept.scales ? &*kept.scales : nullptr);
    for (const auto& [name, data] : kept_tensors_) write_tensor(name, data.data(), data.size());
    kept_matrices_.clear();
    kept_tensors_.clear();
    file_.commit();
  }

 private:
  static PackedHeader resolve(const PackedHeader& header) {
    return {detail::resolve(header.scheme, {header.rows, header.cols}), header.rows, header.cols};
  }

  struct Declared {
    PackedHeader header;
    bool channel_sums = false;
    std::optional<DoubleQuantOptions> scales;
  };
  struct Kept {
    std::string name;
    PackedMatrix matrix;
    std::optional<DoubleQuantizedScales> scales;
  };

  void write_parts(const std::string& name, const PackedMatrix& matrix, const DoubleQuantizedScales* scales) {
    const auto at = declared_.find(name);
    detail::require(at != declared_.end(), "PackedFileWriter: matrix '", name, "' was not declared");
    const Declared& declared = at->second;
    const PackedHeader& header = declared.header;
    detail::require(header.scheme == resolve(matrix.header()).scheme && header.rows == matrix.header().rows &&
                        header.cols == matrix.header().cols &&
                        declared.channel_sums == !matrix.channel_sums().empty() &&
                        declared.scales.has_value() == (scales != nullptr),
                    "PackedFileWriter: matrix '", name, "' differs from its declaration");
    if (scales != nullptr) check_scales(name, matrix, declared, *scales);
    const auto put = [&](const char* suffix, const void* data, std::size_t bytes) {
      if (bytes != 0) file_.write(name + suffix, data, bytes);
    };
    put(".codes", matrix.codes().data(), matrix.codes().size());
    if (scales == nullptr) {
      put(".scales", matrix.scales().data(), matrix.scales().size());
    } else if (scales->size() != 0) {
      put(".scale_codes", scales->codes.data(), scales->codes.size());
      put(".scale_absmax", scales->absmax.data(), scales->absmax.size() * sizeof(float));
      put(".scale_offset", &scales->offset, sizeof(float));
    }
    put(".zeros", matrix.zeros().data(), matrix.zeros().size());
    put(".channel_sums", matrix.channel_sums().data(), matrix.channel_sums().size());
  }

  static void check_scales(const std::string& name, const PackedMatrix& matrix, const Declared& declared,
                           const DoubleQuantizedScales& scales) {
    const std::size_t count = detail::quantized_params(declared.header);
    detail::require(scales.block == declared.scales->block && scales.map == declared.scales->map &&
                        scales.size() == count && scales.absmax.size() == detail::ceil_div(count, scales.block),
                    "PackedFileWriter: matrix '", name, "' has other double-quantized scales than were declared");
    const Buffer decoded = detail::panel_scales(matrix.header(), scales.decode());
    detail::require(
        decoded.size() == matrix.scales().size() &&
            (decoded.empty() || std::memcmp(decoded.data(), matrix.scales().data(), decoded.size()) == 0),
        "PackedFileWriter: the double-quantized scales of matrix '", name, "' do not decode to its own");
  }

  SafetensorsWriter file_;
  std::map<std::string, Declared> declared_;
  std::vector<Kept> kept_matrices_;
  std::vector<std::pair<std::string, Buffer>> kept_tensors_;
};

/// A packed model, opened for reading. Codes and parameters are used where the map holds them: opening copies and
/// repacks nothing, it reads the scales once to check them. (Buffers that do not lie at multiples of 64 bytes, as
/// in a file that another program has rewritten, are copied.) Matrices keep the map alive.
class PackedFile {
 public:
  /// Throws IoError; FormatError for a file that is broken or no packed model; Unsupported for a version or layout
  /// that this Nibble does not know.
  static PackedFile open(const std::string& path, MapOptions options = {}) {
    return read(SafetensorsFile::open(path, options), "'" + path + "'");
  }
  /// Reads a file that is in memory. `name` stands for it in messages.
  static PackedFile parse(Buffer bytes, const std::string& name = "packed model") {
    return read(SafetensorsFile::parse(std::move(bytes), name), name);
  }

  /// Sorted by name.
  const std::vector<std::pair<std::string, PackedMatrix>>& matrices() const noexcept { return matrices_; }
  /// nullptr where there is no such matrix.
  const PackedMatrix* find_matrix(std::string_view name) const noexcept {
    const auto at = std::lower_bound(matrices_.begin(), matrices_.end(), name,
                                     [](const auto& entry, std::string_view n) { return entry.first < n; });
    return at != matrices_.end() && at->first == name ? &at->second : nullptr;
  }
  /// Throws FormatError where there is no such matrix.
  const PackedMatrix& matrix(std::string_view name) const {
    const PackedMatrix* found = find_matrix(name);
    if (found == nullptr)
      detail::raise<FormatError>(
          detail::concat("packed model: matrix '", detail::printable(name), "' is missing"));
    return *found;
  }

  /// The compact form of a matrix' scales, in the order of QuantizedTensor's; nullptr where they are stored as they are.
  const DoubleQuantizedScales* double_quantized_scales(std::string_view name) const noexcept {
    const auto at = double_quantized_.find(name);
    return at == double_quantized_.end() ? nullptr : &at->second;
  }

  /// All metadata, Nibble's own included.
  const std::vector<std::pair<std::string, std::string>>& metadata() const noexcept { return file_.metadata(); }
  const std::string* find_metadata(std::string_view key) const noexcept { return file_.find_metadata(key); }

  /// All tensors as safetensors, the parts of matrices included.
  const SafetensorsFile& safetensors() const noexcept { return file_; }
  const SafetensorsTensor* find_tensor(std::string_view name) const noexcept { return file_.find_tensor(name); }
  const SafetensorsTensor& tensor(std::string_view name) const { return file_.tensor(name); }

 private:
  static PackedFile read(SafetensorsFile file, const std::string& name) {
    const auto text = [&file](std::string_view key) {
      const std::string* value = file.find_metadata(key);
      return value == nullptr ? std::string() : *value;
    };
    if (text("format") != packed_file_format)
      detail::raise<FormatError>(
          name + " is no packed model of Nibble: its metadata lacks format = " + std::string(packed_file_format));
    if (text("version") != packed_file_version)
      detail::raise<Unsupported>(name + " is a packed model of version '" + detail::printable(text("version")) +
                                 "'; this Nibble reads version " + std::string(packed_file_version));
    if (text("layout") != panel16_layout)
      detail::raise<Unsupported>(name + " has the layout '" + detail::printable(text("layout")) +
                                 "'; this Nibble runs '" + std::string(panel16_layout) +
                                 "': pack the model again");
    PackedFile packed;
    packed.file_ = std::move(file);
    for (const auto& [key, value] : packed.file_.metadata()) {
      if (key.compare(0, detail::packed_matrix_prefix.size(), detail::packed_matrix_prefix) != 0) continue;
      const std::string called = key.substr(detail::packed_matrix_prefix.size());
      const std::string where = name + ": matrix '" + detail::printable(called) + "'";
      detail::PackedHeaderReader reader(value, where);
      const PackedHeader header = reader.read();
      packed.matrices_.emplace_back(called, packed.assemble(header, reader.coding(), called, where));
    }
    return packed;
  }

  using Coding = std::optional<DoubleQuantOptions>;

  PackedMatrix assemble(const PackedHeader& header, const Coding& coding, const std::string& name,
                        const std::string& where) {
#if NIBBLE_EXCEPTIONS
    try {
      return assemble_parts(header, coding, name, where);
    } catch (const InvalidArgument& error) {
      // The caller gave a file, not the sizes and scales that are wrong in it.
      detail::raise<FormatError>(where + ": " + error.what());
    } catch (const Unsupported& error) {
      detail::raise<Unsupported>(where + ": " + error.what());
    }
#else
    return assemble_parts(header, coding, name, where);
#endif
  }

  PackedMatrix assemble_parts(const PackedHeader& header, const Coding& coding, const std::string& name,
                              const std::string& where) {
    const Scheme scheme = detail::resolve(header.scheme, {header.rows, header.cols});
    if (scheme != header.scheme)
      detail::raise<FormatError>(where + " has a scheme that contradicts itself (axis, group_size or full_range)");
    const std::vector<detail::PackedPart> parts = detail::packed_parts(header);
    Buffer buffers[4];
    for (std::size_t i = 0; i < parts.size(); ++i) {
      if (i == 1 && coding) continue;
      const SafetensorsTensor* tensor = part_of(parts[i], i != 3, name, where);
      if (tensor != nullptr) buffers[i] = aligned(tensor->data);
    }
    if (coding) buffers[1] = detail::panel_scales(header, decoded_scales(header, *coding, name, where));
    for (std::size_t i = 0; i < buffers[3].size() / sizeof(float); ++i)
      if (!std::isfinite(detail::load_unaligned<float>(buffers[3].data() + i * sizeof(float))))
        detail::raise<FormatError>(detail::concat(where, ": channel sum ", i, " is not finite"));
    return PackedMatrix::from_parts(header, buffers[0], buffers[1], buffers[2], buffers[3]);
  }

  /// A part's tensor; nullptr where it may be missing and is. Throws FormatError for one of another type or shape.
  const SafetensorsTensor* part_of(const detail::PackedPart& part, bool needed, const std::string& name,
                                   const std::string& where) const {
    const SafetensorsTensor* tensor = file_.find_tensor(name + part.suffix);
    if (tensor == nullptr) {
      if (part.bytes != 0 && needed) detail::raise<FormatError>(where + " lacks its tensor '" + part.suffix + "'");
      return nullptr;
    }
    if (tensor->type != part.type || tensor->shape != part.shape)
      detail::raise<FormatError>(detail::concat(where, ": '", part.suffix, "' is ", name_of(tensor->type), " ",
                                                detail::shape_text(tensor->shape), ", expected ",
                                                name_of(part.type), " ", detail::shape_text(part.shape)));
    return tensor;
  }

  std::vector<float> decoded_scales(const PackedHeader& header, const DoubleQuantOptions& coding,
                                    const std::string& name, const std::string& where) {
    DoubleQuantizedScales scales;
    scales.block = coding.block;
    scales.map = coding.map;
    const std::vector<detail::PackedPart> parts = detail::double_quant_parts(header, coding);
    if (!parts.empty()) {
      scales.codes = part_of(parts[0], true, name, where)->values<std::uint8_t>();
      scales.absmax = part_of(parts[1], true, name, where)->values<float>();
      scales.offset = part_of(parts[2], true, name, where)->values<float>()[0];
      bool fine = std::isfinite(scales.offset);
      for (const float absmax : scales.absmax) fine = fine && std::isfinite(absmax) && absmax >= 0.0F;
      if (!fine) detail::raise<FormatError>(where + ": a number of its double-quantized scales is not finite");
    }
    return double_quantized_.emplace(name, std::move(scales)).first->second.decode();
  }

  static Buffer aligned(const Buffer& data) {
    if (reinterpret_cast<std::uintptr_t>(data.data()) % Buffer::alignment == 0) return data;
    Buffer copy(data.size());
    detail::copy_bytes(copy.mutable_data(), data.data(), data.size());
    return copy;
  }

  SafetensorsFile file_;
  std::vector<std::pair<std::string, PackedMatrix>> matrices_;
  std::map<std::string, DoubleQuantizedScales, std::less<>> double_quantized_;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
