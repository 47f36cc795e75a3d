// safetensors files: a reader by the format's exact rules, and a writer that streams.
//
// This header needs nlohmann/json (3.9 or newer) and is not a part of <nibble/nibble.hpp>. Where exceptions are
// off, nlohmann/json aborts by itself when memory runs out; broken files abort through Nibble's errors, with their
// message.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/io/atomic_file.hpp"
#include "nibble/io/bytes.hpp"
#include "nibble/io/mapped_file.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Element types of the format.
enum class SafetensorsType : std::uint8_t {
  boolean,
  f4,
  f6_e2m3,
  f6_e3m2,
  u8,
  i8,
  f8_e5m2,
  f8_e4m3,
  f8_e8m0,
  f8_e4m3fnuz,
  f8_e5m2fnuz,
  i16,
  u16,
  f16,
  bf16,
  i32,
  u32,
  f32,
  c64,
  f64,
  i64,
  u64,
};

namespace detail {

struct SafetensorsTypeInfo {
  SafetensorsType type;
  std::string_view name;
  unsigned bits;
};

inline constexpr SafetensorsTypeInfo safetensors_types[] = {
    {SafetensorsType::boolean, "BOOL", 8},
    {SafetensorsType::f4, "F4", 4},
    {SafetensorsType::f6_e2m3, "F6_E2M3", 6},
    {SafetensorsType::f6_e3m2, "F6_E3M2", 6},
    {SafetensorsType::u8, "U8", 8},
    {SafetensorsType::i8, "I8", 8},
    {SafetensorsType::f8_e5m2, "F8_E5M2", 8},
    {SafetensorsType::f8_e4m3, "F8_E4M3", 8},
    {SafetensorsType::f8_e8m0, "F8_E8M0", 8},
    {SafetensorsType::f8_e4m3fnuz, "F8_E4M3FNUZ", 8},
    {SafetensorsType::f8_e5m2fnuz, "F8_E5M2FNUZ", 8},
    {SafetensorsType::i16, "I16", 16},
    {SafetensorsType::u16, "U16", 16},
    {SafetensorsType::f16, "F16", 16},
    {SafetensorsType::bf16, "BF16", 16},
    {SafetensorsType::i32, "I32", 32},
    {SafetensorsType::u32, "U32", 32},
    {SafetensorsType::f32, "F32", 32},
    {SafetensorsType::c64, "C64", 64},
    {SafetensorsType::f64, "F64", 64},
    {SafetensorsType::i64, "I64", 64},
    {SafetensorsType::u64, "U64", 64},
};

/// The format's limit on the header.
inline constexpr std::uint64_t safetensors_max_header = 100000000;
/// Limits of ours on what no real file has: dimensions of a tensor, depth of values under keys that the format
/// does not know (they are skipped).
inline constexpr std::size_t safetensors_max_rank = 64;
inline constexpr int safetensors_max_depth = 32;

}  // namespace detail

/// "F32", as in a file's header.
constexpr std::string_view name_of(SafetensorsType type) noexcept {
  for (const auto& info : detail::safetensors_types)
    if (info.type == type) return info.name;
  return "?";
}
constexpr unsigned bits_of(SafetensorsType type) noexcept {
  for (const auto& info : detail::safetensors_types)
    if (info.type == type) return info.bits;
  return 0;
}

/// Bytes of a tensor. Throws InvalidArgument where the size overflows or is no whole number of bytes.
inline std::size_t safetensors_bytes(SafetensorsType type, const std::vector<std::size_t>& shape) {
  std::size_t bits = 1;
  for (const std::size_t d : shape) bits = detail::checked_mul(bits, d, "safetensors shape");
  bits = detail::checked_mul(bits, bits_of(type), "safetensors size in bits");
  detail::require(bits % 8 == 0, "safetensors: ", bits, " bits are no whole number of bytes");
  return bits / 8;
}

/// A tensor of a safetensors file, in C order. `data` lies in the map and may have any alignment: the format pads
/// its header to 8 bytes at most. It stays valid as long as any copy of the buffer lives.
struct SafetensorsTensor {
  std::string name;
  SafetensorsType type = SafetensorsType::u8;
  std::vector<std::size_t> shape;
  Buffer data;

  std::size_t elements() const noexcept {
    std::size_t count = 1;
    for (const std::size_t d : shape) count *= d;
    return count;
  }
  /// The elements copied out as T, whatever their alignment. sizeof(T) must be the size of one element.
  template <class T>
  std::vector<T> values() const {
    detail::require(sizeof(T) * 8 == bits_of(type), "safetensors tensor '", detail::printable(name), "' is ",
                    name_of(type), ", not of ", sizeof(T), " bytes an element");
    std::vector<T> out(elements());
    detail::copy_bytes(out.data(), data.data(), data.size());
    return out;
  }
};

namespace detail {

struct SafetensorsEntry {
  std::string name;
  SafetensorsType type = SafetensorsType::u8;
  std::vector<std::size_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

/// Takes the header's JSON event by event: nothing is built but the entries, and what the format forbids ends the
/// parse where it stands.
class SafetensorsHeader {
 public:
  std::vector<SafetensorsEntry> entries;
  std::vector<std::pair<std::string, std::string>> metadata;
  std::string error;

  bool null() { return scalar("null"); }
  bool boolean(bool) { return scalar("a boolean"); }
  bool number_integer(std::int64_t value) {
    return skipping() || fail(value < 0 ? "a negative number" : "an unexpected number");
  }
  bool number_unsigned(std::uint64_t value) {
    if (skipping()) return true;
    SafetensorsEntry* entry = entries.empty() ? nullptr : &entries.back();
    if (state_ == State::shape) {
      if (entry->shape.size() == safetensors_max_rank) return fail("more than 64 dimensions");
      entry->shape.push_back(static_cast<std::size_t>(value));
      return true;
    }
    if (state_ == State::offsets) {
      if (offsets_ == 2) return fail("'data_offsets' with more than two numbers");
      (offsets_++ == 0 ? entry->begin : entry->end) = value;
      return true;
    }
    return fail("an unexpected number");
  }
  bool number_float(double, const std::string&) { return scalar("a number that is no unsigned 64-bit integer"); }
  bool string(std::string& value) {
    if (skipping()) return true;
    if (state_ == State::metadata) {
      metadata.back().second = std::move(value);
      return true;
    }
    if (state_ == State::entry && field_ == Field::dtype) {
      for (const auto& info : safetensors_types) {
        if (info.name != value) continue;
        entries.back().type = info.type;
        return true;
      }
      return fail("the unknown dtype '" + printable(value) + "'");
    }
    return fail("an unexpected string");
  }
  bool binary(nlohmann::json::binary_t&) { return fail("binary data"); }

  bool start_object(std::size_t) {
    if (skipping()) return deeper();
    switch (state_) {
      case State::start: state_ = State::top; return true;
      case State::top:
        if (in_metadata_) {
          state_ = State::metadata;
        } else {
          state_ = State::entry;
          fields_ = 0;
          field_ = Field::none;
        }
        return true;
      default: return fail("an object where none belongs");
    }
  }
  bool key(std::string& name) {
    if (depth_ > 0) return true;
    if (state_ == State::top) {
      in_metadata_ = name == "__metadata__";
      if (in_metadata_) {
        if (seen_metadata_) return fail("two '__metadata__'");
        seen_metadata_ = true;
      } else {
        entries.emplace_back();
        entries.back().name = std::move(name);
      }
    } else if (state_ == State::metadata) {
      metadata.emplace_back(std::move(name), std::string());
    } else {
      field_ = name == "dtype"          ? Field::dtype
               : name == "shape"        ? Field::shape
               : name == "data_offsets" ? Field::offsets
                                        : Field::other;
      const unsigned bit = field_ == Field::other ? 0 : 1U << static_cast<unsigned>(field_);
      if ((fields_ & bit) != 0) return fail("the key '" + name + "' twice");
      fields_ |= bit;
    }
    return true;
  }
  bool end_object() {
    if (depth_ > 0) return --depth_, true;
    if (state_ == State::entry) {
      constexpr unsigned all = 1U << static_cast<unsigned>(Field::dtype) |
                               1U << static_cast<unsigned>(Field::shape) |
                               1U << static_cast<unsigned>(Field::offsets);
      if (fields_ != all) return fail("an entry without dtype, shape or data_offsets");
    }
    state_ = state_ == State::top ? State::end : State::top;
    return true;
  }
  bool start_array(std::size_t) {
    if (skipping()) return deeper();
    if (state_ == State::entry && field_ == Field::shape) {
      state_ = State::shape;
      return true;
    }
    if (state_ == State::entry && field_ == Field::offsets) {
      state_ = State::offsets;
      offsets_ = 0;
      return true;
    }
    return fail("an array where none belongs");
  }
  bool end_array() {
    if (depth_ > 0) return --depth_, true;
    if (state_ == State::offsets && offsets_ != 2) return fail("'data_offsets' without two numbers");
    state_ = State::entry;
    return true;
  }
  template <class Exception>
  bool parse_error(std::size_t at, const std::string&, const Exception&) {
    error = concat("the header is not valid JSON (at byte ", at, " of it)");
    return false;
  }

 private:
  enum class State : std::uint8_t { start, top, metadata, entry, shape, offsets, end };
  enum class Field : std::uint8_t { none, dtype, shape, offsets, other };

  // Within the value of a key that the format does not know.
  bool skipping() const { return depth_ > 0 || (state_ == State::entry && field_ == Field::other); }
  bool deeper() { return ++depth_ <= safetensors_max_depth || fail("values nested too deeply"); }
  bool scalar(const char* what) { return skipping() || fail(what); }
  bool fail(const std::string& what) {
    const bool named = !entries.empty() && (state_ == State::entry || state_ == State::shape ||
                                            state_ == State::offsets || state_ == State::top);
    error = "the header has " + what +
            (named ? " near tensor '" + printable(entries.back().name) + "'" : std::string());
    return false;
  }

  State state_ = State::start;
  Field field_ = Field::none;
  unsigned fields_ = 0;
  int offsets_ = 0;
  int depth_ = 0;
  bool in_metadata_ = false;
  bool seen_metadata_ = false;
};

}  // namespace detail

/// A safetensors file, opened for reading. Opening checks all of the format's rules; afterwards the tensors cover
/// the data section without holes or overlaps. Copies share the map.
class SafetensorsFile {
 public:
  /// Maps `path`. Throws IoError, or FormatError for a file that breaks a rule.
  static SafetensorsFile open(const std::string& path, MapOptions options = {}) {
    const MappedFile file = MappedFile::open(path, options);
    return parse(file.buffer(), "'" + path + "'");
  }

  /// Reads a file that is in memory. `name` stands for it in messages.
  static SafetensorsFile parse(Buffer bytes, const std::string& name = "safetensors data") {
    SafetensorsFile file;
    file.read(bytes, name);
    return file;
  }

  /// `__metadata__`, sorted by key.
  const std::vector<std::pair<std::string, std::string>>& metadata() const noexcept { return metadata_; }
  /// nullptr where there is no such key.
  const std::string* find_metadata(std::string_view key) const noexcept {
    const auto at = std::lower_bound(metadata_.begin(), metadata_.end(), key,
                                     [](const auto& entry, std::string_view k) { return entry.first < k; });
    return at != metadata_.end() && at->first == key ? &at->second : nullptr;
  }

  /// In the order of their data.
  const std::vector<SafetensorsTensor>& tensors() const noexcept { return tensors_; }
  const SafetensorsTensor* find_tensor(std::string_view name) const noexcept {
    const auto at = std::lower_bound(order_.begin(), order_.end(), name,
                                     [this](std::uint32_t i, std::string_view n) { return tensors_[i].name < n; });
    return at != order_.end() && tensors_[*at].name == name ? &tensors_[*at] : nullptr;
  }
  /// Throws FormatError where there is no such tensor.
  const SafetensorsTensor& tensor(std::string_view name) const {
    const SafetensorsTensor* found = find_tensor(name);
    if (found == nullptr)
      detail::raise<FormatError>(detail::concat("safetensors: tensor '", detail::printable(name), "' is missing"));
    return *found;
  }

 private:
  void read(const Buffer& bytes, const std::string& name) {
    const auto fail = [&name](const std::string& message) { detail::raise<FormatError>(name + ": " + message); };
    if (bytes.size() < 8) fail(detail::concat("a safetensors file has at least 8 bytes, this one ", bytes.size()));
    const auto length = detail::load_unaligned<std::uint64_t>(bytes.data());
    if (length > detail::safetensors_max_header)
      fail(detail::concat("the header claims ", length, " bytes; at most ", detail::safetensors_max_header,
                          " are allowed"));
    if (length > bytes.size() - 8)
      fail(detail::concat("the header claims ", length, " bytes, but only ", bytes.size() - 8, " follow"));
    const auto* text = reinterpret_cast<const char*>(bytes.data() + 8);
    if (length == 0 || text[0] != '{') fail("the header does not start with '{'");

    // nlohmann/json takes a NUL for the end of its input; to JSON it is an error, and here it could hide bytes.
    if (std::memchr(text, 0, static_cast<std::size_t>(length)) != nullptr)
      fail("the header is not valid JSON (it holds a NUL)");
    detail::SafetensorsHeader header;
    if (!nlohmann::json::sax_parse(text, text + length, &header)) fail(header.error);
    metadata_ = std::move(header.metadata);
    std::sort(metadata_.begin(), metadata_.end());
    for (std::size_t i = 1; i < metadata_.size(); ++i)
      if (metadata_[i - 1].first == metadata_[i].first)
        fail("'__metadata__' has the key '" + detail::printable(metadata_[i].first) + "' twice");

    std::vector<detail::SafetensorsEntry>& entries = header.entries;
    std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
      return a.begin != b.begin ? a.begin < b.begin : a.end != b.end ? a.end < b.end : a.name < b.name;
    });
    const std::uint64_t space = bytes.size() - 8 - length;
    const std::uint8_t* data = bytes.data() + 8 + length;
    // Every buffer keeps the map alive through this one.
    const std::shared_ptr<const void> owner = std::make_shared<const Buffer>(bytes);
    std::uint64_t expected = 0;
    tensors_.reserve(entries.size());
    for (detail::SafetensorsEntry& entry : entries) {
      const auto called = [&entry] { return "tensor '" + detail::printable(entry.name) + "'"; };
      if (entry.begin != expected || entry.end < entry.begin)
        fail(detail::concat(called(), " has data_offsets [", entry.begin, ", ", entry.end,
                            "]; a tensor must begin at ", expected, ", where the one before ends"));
      if (entry.end > space)
        fail(detail::concat(called(), " ends at ", entry.end, ", beyond the data (", space, " bytes)"));
      check_size(entry, called, fail);
      expected = entry.end;
      SafetensorsTensor tensor;
      tensor.name = std::move(entry.name);
      tensor.type = entry.type;
      tensor.shape = std::move(entry.shape);
      tensor.data = Buffer::borrow(data + entry.begin, static_cast<std::size_t>(entry.end - entry.begin), owner);
      tensors_.push_back(std::move(tensor));
    }
    if (expected != space)
      fail(detail::concat("the tensors end at ", expected, ", but the data section has ", space, " bytes"));

    order_.resize(tensors_.size());
    for (std::size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<std::uint32_t>(i);
    std::sort(order_.begin(), order_.end(),
              [this](std::uint32_t a, std::uint32_t b) { return tensors_[a].name < tensors_[b].name; });
    for (std::size_t i = 1; i < order_.size(); ++i)
      if (tensors_[order_[i - 1]].name == tensors_[order_[i]].name)
        fail("two tensors are called '" + detail::printable(tensors_[order_[i]].name) + "'");
  }

  template <class Called, class Fail>
  static void check_size(const detail::SafetensorsEntry& entry, const Called& called, const Fail& fail) {
    std::uint64_t bits = 1;
    bool fits = true;
    for (const std::size_t d : entry.shape) fits = fits && !__builtin_mul_overflow(bits, std::uint64_t{d}, &bits);
    fits = fits && !__builtin_mul_overflow(bits, std::uint64_t{bits_of(entry.type)}, &bits);
    if (!fits) fail(called() + ": the size that its shape gives overflows");
    if (bits % 8 != 0) fail(detail::concat(called(), " has ", bits, " bits, no whole number of bytes"));
    if (bits / 8 != entry.end - entry.begin)
      fail(detail::concat(called(), " takes ", bits / 8, " bytes by its shape, but ", entry.end - entry.begin,
                          " by its data_offsets"));
  }

  std::vector<std::pair<std::string, std::string>> metadata_;
  std::vector<SafetensorsTensor> tensors_;
  std::vector<std::uint32_t> order_;
};

/// Writes a safetensors file. First metadata and declarations, then the tensors' data in any order and in pieces
/// of any size, then commit(); a model larger than memory can be converted. The path holds its old content until
/// then (AtomicFile).
///
/// Tensors are laid out by what their sizes divide by (64 bytes and more first, then 32, 16 ...; among equals in
/// the order of declaration), so that each begins at a multiple of its own element size; with alignment 64 the
/// header is padded so that those whose size is a multiple of 64 bytes begin at a multiple of 64 in the file, and
/// in memory once mapped.
///
/// Misuse (a name twice, too many or missing bytes, a declaration after the first data) throws InvalidArgument.
class SafetensorsWriter {
 public:
  /// `alignment` of the data section: a power of two from 8 on.
  explicit SafetensorsWriter(const std::string& path, std::size_t alignment = 8)
      : file_(path), alignment_(alignment) {
    detail::require(alignment >= 8 && (alignment & (alignment - 1)) == 0 && alignment <= 4096,
                    "SafetensorsWriter: alignment is ", alignment, ", expected a power of two from 8 to 4096");
  }

  void add_metadata(const std::string& key, const std::string& value) {
    require_header("add_metadata");
    detail::require(detail::is_utf8(key) && detail::is_utf8(value), "SafetensorsWriter: metadata '",
                    detail::printable(key), "' is not UTF-8");
    detail::require(metadata_.emplace(key, value).second, "SafetensorsWriter: metadata '", detail::printable(key),
                    "' was added before");
  }

  /// Announces a tensor in C order.
  void declare(const std::string& name, SafetensorsType type, const std::vector<std::size_t>& shape) {
    require_header("declare");
    detail::require(name != "__metadata__" && detail::is_utf8(name), "SafetensorsWriter: '",
                    detail::printable(name), "' cannot be the name of a tensor");
    detail::require(shape.size() <= detail::safetensors_max_rank, "SafetensorsWriter: tensor '", name, "' has ",
                    shape.size(), " dimensions, at most ", detail::safetensors_max_rank, " are possible");
    const std::size_t bytes = safetensors_bytes(type, shape);
    detail::require(index_.emplace(name, tensors_.size()).second, "SafetensorsWriter: tensor '",
                    detail::printable(name), "' was declared before");
    tensors_.push_back({name, type, shape, bytes, 0, 0});
  }

  /// Appends bytes to a declared tensor; they may not reach beyond its end.
  void write(std::string_view name, const void* bytes, std::size_t size) {
    write_header();
    const auto at = index_.find(name);
    detail::require(at != index_.end(), "SafetensorsWriter: tensor '", detail::printable(name),
                    "' was not declared");
    Declared& tensor = tensors_[at->second];
    detail::require(size <= tensor.bytes - tensor.filled, "SafetensorsWriter: tensor '", detail::printable(name),
                    "' takes ", tensor.bytes, " bytes, ", tensor.filled, " are written and ", size, " more given");
    file_.write_at(data_offset_ + tensor.offset + tensor.filled, bytes, size);
    tensor.filled += size;
  }

  /// Completes the file and puts it in place.
  void commit() {
    write_header();
    for (const Declared& tensor : tensors_)
      detail::require(tensor.filled == tensor.bytes, "SafetensorsWriter: tensor '", detail::printable(tensor.name),
                      "' takes ", tensor.bytes, " bytes, only ", tensor.filled, " are written");
    file_.commit();
  }

 private:
  struct Declared {
    std::string name;
    SafetensorsType type;
    std::vector<std::size_t> shape;
    std::size_t bytes;
    std::uint64_t offset;
    std::size_t filled;
  };

  void require_header(std::string_view what) const {
    detail::require(!header_written_, "SafetensorsWriter: ", what, " after the first data");
  }

  static std::string quoted(const std::string& text) { return nlohmann::json(text).dump(); }

  void write_header() {
    if (header_written_) return;
    std::vector<std::size_t> order(tensors_.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    const auto divisor = [this](std::size_t i) {
      const std::size_t bytes = tensors_[i].bytes;
      return std::min<std::size_t>(bytes & (~bytes + 1), 64) - 1;  // of 0: the largest
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return divisor(a) > divisor(b); });

    std::string head = "{";
    if (!metadata_.empty()) {
      head += "\"__metadata__\":{";
      for (const auto& [key, value] : metadata_)
        head += (head.back() == '{' ? "" : ",") + quoted(key) + ":" + quoted(value);
      head += "}";
    }
    std::uint64_t offset = 0;
    for (const std::size_t i : order) {
      Declared& tensor = tensors_[i];
      tensor.offset = offset;
      offset = detail::checked_add(static_cast<std::size_t>(offset), tensor.bytes, "safetensors file size");
      if (head.back() != '{') head += ",";
      head += quoted(tensor.name) + ":{\"dtype\":\"" + std::string(name_of(tensor.type)) + "\",\"shape\":[";
      for (std::size_t d = 0; d < tensor.shape.size(); ++d)
        head += (d != 0 ? "," : "") + std::to_string(tensor.shape[d]);
      head += "],\"data_offsets\":[" + std::to_string(tensor.offset) + "," + std::to_string(offset) + "]}";
    }
    head += "}";
    head.append((alignment_ - (head.size() + 8) % alignment_) % alignment_, ' ');
    detail::require(head.size() <= detail::safetensors_max_header, "SafetensorsWriter: a header of ", head.size(),
                    " bytes; the format allows ", detail::safetensors_max_header);
    const std::uint64_t length = head.size();
    file_.write(&length, 8);
    file_.write(head);
    data_offset_ = file_.position();
    header_written_ = true;
  }

  AtomicFile file_;
  std::size_t alignment_;
  std::map<std::string, std::string> metadata_;
  std::vector<Declared> tensors_;
  std::map<std::string, std::size_t, std::less<>> index_;
  bool header_written_ = false;
  std::uint64_t data_offset_ = 0;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
