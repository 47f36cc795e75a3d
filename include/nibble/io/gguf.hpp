// GGUF files, versions 2 and 3: a reader that maps the file and trusts nothing in it, and a writer that streams.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/io/atomic_file.hpp"
#include "nibble/io/bytes.hpp"
#include "nibble/io/gguf_blocks.hpp"
#include "nibble/io/mapped_file.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// The type of a metadata value, with the number that files store.
enum class GgufValueType : std::uint32_t {
  uint8 = 0,
  int8 = 1,
  uint16 = 2,
  int16 = 3,
  uint32 = 4,
  int32 = 5,
  float32 = 6,
  boolean = 7,
  string = 8,
  array = 9,
  uint64 = 10,
  int64 = 11,
  float64 = 12,
};

constexpr std::string_view name_of(GgufValueType type) noexcept {
  constexpr std::string_view names[] = {"uint8",   "int8",   "uint16", "int16",  "uint32", "int32",  "float32",
                                        "boolean", "string", "array",  "uint64", "int64",  "float64"};
  const auto i = static_cast<std::uint32_t>(type);
  return i < 13 ? names[i] : "?";
}

namespace detail {

/// Arrays within arrays may go this deep. Known files have none.
inline constexpr int gguf_max_nesting = 8;
/// The format's limit on names: 2^16 - 1 bytes.
inline constexpr std::uint64_t gguf_max_name = 65535;
inline constexpr std::size_t gguf_max_rank = 4;
inline constexpr std::uint64_t gguf_max_alignment = std::uint64_t{1} << 30;

/// Bytes of one value of a fixed size; 0 for strings and arrays.
constexpr std::size_t gguf_value_bytes(GgufValueType type) noexcept {
  switch (type) {
    case GgufValueType::uint8:
    case GgufValueType::int8:
    case GgufValueType::boolean: return 1;
    case GgufValueType::uint16:
    case GgufValueType::int16: return 2;
    case GgufValueType::uint32:
    case GgufValueType::int32:
    case GgufValueType::float32: return 4;
    case GgufValueType::uint64:
    case GgufValueType::int64:
    case GgufValueType::float64: return 8;
    case GgufValueType::string:
    case GgufValueType::array: return 0;
  }
  return 0;
}

template <class T>
constexpr GgufValueType gguf_value_type_of() noexcept {
  if constexpr (std::is_same_v<T, bool>)
    return GgufValueType::boolean;
  else if constexpr (std::is_same_v<T, float>)
    return GgufValueType::float32;
  else if constexpr (std::is_same_v<T, double>)
    return GgufValueType::float64;
  else if constexpr (std::is_integral_v<T>)
    return sizeof(T) == 1   ? (std::is_signed_v<T> ? GgufValueType::int8 : GgufValueType::uint8)
           : sizeof(T) == 2 ? (std::is_signed_v<T> ? GgufValueType::int16 : GgufValueType::uint16)
           : sizeof(T) == 4 ? (std::is_signed_v<T> ? GgufValueType::int32 : GgufValueType::uint32)
                            : (std::is_signed_v<T> ? GgufValueType::int64 : GgufValueType::uint64);
  else
    static_assert(std::is_convertible_v<T, std::string_view>, "not a type of GGUF metadata");
  return GgufValueType::string;
}

/// True where v can be given as a T: integers exactly; a double as a float rounded, if it does not overflow.
template <class T, class V>
constexpr bool gguf_fits(V v) noexcept {
  if constexpr (std::is_same_v<T, bool> || std::is_same_v<V, bool>) {
    return std::is_same_v<T, V>;
  } else if constexpr (std::is_floating_point_v<T> && std::is_floating_point_v<V>) {
    return !(v < std::numeric_limits<V>::infinity() && v > std::numeric_limits<T>::max()) &&
           !(v > -std::numeric_limits<V>::infinity() && v < std::numeric_limits<T>::lowest());
  } else if constexpr (std::is_floating_point_v<V>) {
    return false;
  } else {
    constexpr bool to_float = std::is_floating_point_v<T>;
    constexpr std::uint64_t most = to_float ? std::uint64_t{1} << (to_float ? std::numeric_limits<T>::digits : 0)
                                            : static_cast<std::uint64_t>(std::numeric_limits<T>::max());
    if constexpr (std::is_signed_v<V>) {
      // -min of a signed type is max + 1.
      if (v < 0)
        return std::is_signed_v<T> && static_cast<std::uint64_t>(-(v + 1)) <= (to_float ? most - 1 : most);
    }
    return static_cast<std::uint64_t>(v) <= most;
  }
}

}  // namespace detail

/// An array in the metadata, read where it lies in the file. Valid while the GgufFile (or a tensor of it) lives.
class GgufArray {
 public:
  GgufArray() = default;
  GgufArray(GgufValueType element_type, std::size_t size, const std::uint8_t* data, std::size_t bytes) noexcept
      : type_(element_type), size_(size), data_(data), bytes_(bytes) {}

  GgufValueType element_type() const noexcept { return type_; }
  std::size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }
  /// The elements as the file stores them, without the array's own type and count.
  const std::uint8_t* raw() const noexcept { return data_; }
  std::size_t raw_bytes() const noexcept { return bytes_; }

  /// All elements as T, which must be the stored type or one that holds each value exactly (any integer type for
  /// integers, float or double for floats). Throws FormatError otherwise.
  template <class T>
  std::vector<T> as() const {
    std::vector<T> out;
    if constexpr (std::is_same_v<T, std::string_view> || std::is_same_v<T, std::string>) {
      if (type_ != GgufValueType::string) mismatch("strings");
      out.reserve(size_);
      for_each_string([&out](std::string_view text) { out.emplace_back(text); });
    } else {
      static_assert(std::is_arithmetic_v<T>);
      const std::size_t width = detail::gguf_value_bytes(type_);
      if (width == 0) mismatch("numbers");
      out.reserve(size_);
      for (std::size_t i = 0; i < size_; ++i) append(out, data_ + i * width);
    }
    return out;
  }

  /// The elements of an array of arrays.
  std::vector<GgufArray> arrays() const;

  /// Calls f(std::string_view) for every string, without allocating. Throws FormatError for an array of others.
  template <class F>
  void for_each_string(F&& f) const {
    if (type_ != GgufValueType::string) mismatch("strings");
    const std::uint8_t* p = data_;
    for (std::size_t i = 0; i < size_; ++i) {
      const auto n = static_cast<std::size_t>(detail::load_unaligned<std::uint64_t>(p));
      f(std::string_view(reinterpret_cast<const char*>(p + 8), n));
      p += 8 + n;
    }
  }

 private:
  [[noreturn]] void mismatch(std::string_view wanted) const {
    detail::raise<FormatError>(
        detail::concat("GGUF metadata: an array of ", name_of(type_), " where ", wanted, " are expected"));
  }
  template <class T, class V>
  void append_as(std::vector<T>& out, const std::uint8_t* p) const {
    if constexpr (std::is_same_v<V, bool>) {
      if constexpr (std::is_same_v<T, bool>)
        out.push_back(*p != 0);
      else
        mismatch("numbers");
    } else {
      const V value = detail::load_unaligned<V>(p);
      if (!detail::gguf_fits<T>(value)) mismatch("other numbers");
      out.push_back(static_cast<T>(value));
    }
  }
  template <class T>
  void append(std::vector<T>& out, const std::uint8_t* p) const {
    switch (type_) {
      case GgufValueType::uint8: return append_as<T, std::uint8_t>(out, p);
      case GgufValueType::int8: return append_as<T, std::int8_t>(out, p);
      case GgufValueType::uint16: return append_as<T, std::uint16_t>(out, p);
      case GgufValueType::int16: return append_as<T, std::int16_t>(out, p);
      case GgufValueType::uint32: return append_as<T, std::uint32_t>(out, p);
      case GgufValueType::int32: return append_as<T, std::int32_t>(out, p);
      case GgufValueType::float32: return append_as<T, float>(out, p);
      case GgufValueType::boolean: return append_as<T, bool>(out, p);
      case GgufValueType::uint64: return append_as<T, std::uint64_t>(out, p);
      case GgufValueType::int64: return append_as<T, std::int64_t>(out, p);
      case GgufValueType::float64: return append_as<T, double>(out, p);
      case GgufValueType::string:
      case GgufValueType::array: break;
    }
    mismatch("numbers");
  }

  GgufValueType type_ = GgufValueType::uint8;
  std::size_t size_ = 0;
  const std::uint8_t* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// A metadata value. Its alternatives stand in the order of GgufValueType; strings and arrays point into the file.
using GgufVariant =
    std::variant<std::uint8_t, std::int8_t, std::uint16_t, std::int16_t, std::uint32_t, std::int32_t, float, bool,
                 std::string_view, GgufArray, std::uint64_t, std::int64_t, double>;

class GgufValue {
 public:
  GgufValue() = default;
  template <class T, std::enable_if_t<!std::is_same_v<std::decay_t<T>, GgufValue>, int> = 0>
  explicit GgufValue(T value) : value_(value) {}

  GgufValueType type() const noexcept { return static_cast<GgufValueType>(value_.index()); }
  const GgufVariant& variant() const noexcept { return value_; }

  /// Stores the value in `out`: bool; any integer type (from an integer of any width whose value fits); float or
  /// double (from either, or from an integer that fits exactly); std::string_view, std::string or GgufArray.
  /// Returns false, with `out` untouched, where the value is not such a T.
  template <class T>
  bool get(T& out) const {
    return std::visit([&out](const auto& stored) { return assign(stored, out); }, value_);
  }

 private:
  template <class V, class T>
  static bool assign(const V& stored, T& out) {
    if constexpr (std::is_same_v<V, T>) {
      out = stored;
    } else if constexpr (std::is_same_v<V, std::string_view> && std::is_same_v<T, std::string>) {
      out.assign(stored);
    } else if constexpr (std::is_arithmetic_v<V> && std::is_arithmetic_v<T>) {
      if (!detail::gguf_fits<T>(stored)) return false;
      out = static_cast<T>(stored);
    } else {
      return false;
    }
    return true;
  }

  GgufVariant value_;
};

struct GgufEntry {
  std::string_view key;
  GgufValue value;
};

/// A tensor of a GGUF file. Its name and data stay valid as long as any copy of the tensor, or the file, lives.
struct GgufTensor {
  std::string_view name;
  GgufType type = GgufType::f32;
  std::size_t rank = 0;
  /// Dimensions in GGUF's order, which is Eigen's column-major one: dims[0] runs fastest. A weight of n outputs by
  /// k inputs has dims {k, n}. Those beyond `rank` are 1.
  std::array<std::uint64_t, detail::gguf_max_rank> dims{1, 1, 1, 1};
  std::uint64_t elements = 0;
  std::uint64_t offset = 0;  ///< of the data, from the start of the data section
  Buffer data;               ///< the stored bytes, in the map; empty where the type is not known

  /// True where the type is one whose size Nibble knows.
  bool known() const noexcept { return gguf_type_info(type) != nullptr; }
  /// Rows of dims[0] weights.
  std::size_t rows() const noexcept { return static_cast<std::size_t>(dims[1] * dims[2] * dims[3]); }
  std::size_t cols() const noexcept { return static_cast<std::size_t>(dims[0]); }

  /// Decodes everything to fp32, in the file's order. Throws Unsupported for a type that does not decode.
  std::vector<float> dequantize() const {
    check_decodes();
    std::vector<float> out(static_cast<std::size_t>(elements));
    gguf_dequantize(type, data.data(), out.size(), out.data());
    return out;
  }
  /// Decodes `count` rows from `first` on into `out` (count * cols() floats).
  void dequantize_rows(std::size_t first, std::size_t count, float* out) const {
    check_decodes();
    detail::require(first <= rows() && count <= rows() - first, "tensor '", detail::printable(name), "': rows ",
                    first, " + ", count, " of ", rows());
    const std::size_t line = gguf_bytes(type, cols());
    gguf_dequantize(type, data.data() + first * line, count * cols(), out);
  }

 private:
  void check_decodes() const {
    const GgufTypeInfo* info = gguf_type_info(type);
    if (info == nullptr || !info->decodes)
      detail::raise<Unsupported>(detail::concat("tensor '", detail::printable(name), "' has GGUF type ",
                                                static_cast<std::uint32_t>(type), " (", name_of(type),
                                                "), which Nibble cannot decode"));
  }
};

/// A GGUF file, opened for reading. Opening checks everything that the header says against the file's length, in
/// time and memory proportional to the header's real bytes; afterwards every tensor's data lies within the map and
/// no two tensors share a byte. Strings and arrays are not copied. Copies share the map.
class GgufFile {
 public:
  /// Maps `path`. Throws IoError, FormatError (broken or hostile), or Unsupported (version 1, big-endian).
  static GgufFile open(const std::string& path, MapOptions options = {}) {
    const MappedFile file = MappedFile::open(path, options);
    return parse(file.buffer(), "'" + path + "'");
  }

  /// Reads a file that is in memory. `name` stands for it in messages.
  static GgufFile parse(Buffer bytes, const std::string& name = "GGUF data") {
    GgufFile file;
    file.bytes_ = std::move(bytes);
    file.read(name);
    return file;
  }

  std::uint32_t version() const noexcept { return version_; }
  std::uint64_t alignment() const noexcept { return alignment_; }
  /// Where the data section starts in the file.
  std::size_t data_offset() const noexcept { return data_offset_; }
  std::size_t file_bytes() const noexcept { return bytes_.size(); }

  /// Metadata in the file's order.
  const std::vector<GgufEntry>& metadata() const noexcept { return metadata_; }
  const GgufValue* find(std::string_view key) const noexcept {
    const std::size_t i = lookup(metadata_, key_order_, &GgufEntry::key, key);
    return i < metadata_.size() ? &metadata_[i].value : nullptr;
  }
  /// The value of `key` as T (GgufValue::get). Throws FormatError where it is missing or of another type.
  template <class T>
  T get(std::string_view key) const {
    const GgufValue* value = find(key);
    if (value == nullptr) detail::raise<FormatError>(detail::concat("GGUF metadata: '", key, "' is missing"));
    return convert<T>(key, *value);
  }
  /// The same, but `otherwise` where the key is missing. A value of a wrong type still throws.
  template <class T>
  T get_or(std::string_view key, T otherwise) const {
    const GgufValue* value = find(key);
    return value == nullptr ? std::move(otherwise) : convert<T>(key, *value);
  }

  /// Tensors in the file's order.
  const std::vector<GgufTensor>& tensors() const noexcept { return tensors_; }
  const GgufTensor* find_tensor(std::string_view name) const noexcept {
    const std::size_t i = lookup(tensors_, name_order_, &GgufTensor::name, name);
    return i < tensors_.size() ? &tensors_[i] : nullptr;
  }
  /// Throws FormatError where there is no such tensor.
  const GgufTensor& tensor(std::string_view name) const {
    const GgufTensor* found = find_tensor(name);
    if (found == nullptr)
      detail::raise<FormatError>(detail::concat("GGUF: tensor '", detail::printable(name), "' is missing"));
    return *found;
  }

 private:
  template <class T>
  static T convert(std::string_view key, const GgufValue& value) {
    T out{};
    if (!value.get(out))
      detail::raise<FormatError>(detail::concat("GGUF metadata: '", key, "' is of type ", name_of(value.type()),
                                                " or has a value that does not fit the type asked for"));
    return out;
  }

  // Sorted indices instead of a hash table: no names, however chosen, make them slow.
  template <class Item>
  static std::vector<std::uint32_t> sorted_by(const std::vector<Item>& items, std::string_view Item::*name) {
    std::vector<std::uint32_t> order(items.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::uint32_t>(i);
    std::sort(order.begin(), order.end(),
              [&](std::uint32_t a, std::uint32_t b) { return items[a].*name < items[b].*name; });
    return order;
  }
  template <class Item>
  static std::size_t lookup(const std::vector<Item>& items, const std::vector<std::uint32_t>& order,
                            std::string_view Item::*name, std::string_view wanted) noexcept {
    const auto at = std::lower_bound(order.begin(), order.end(), wanted,
                                     [&](std::uint32_t i, std::string_view w) { return items[i].*name < w; });
    return at != order.end() && items[*at].*name == wanted ? *at : items.size();
  }
  template <class Item>
  static void refuse_duplicates(const detail::ByteReader& in, const std::vector<Item>& items,
                                const std::vector<std::uint32_t>& order, std::string_view Item::*name,
                                std::string_view what) {
    for (std::size_t i = 1; i < order.size(); ++i)
      if (items[order[i - 1]].*name == items[order[i]].*name)
        in.fail(detail::concat("two ", what, " are called '", detail::printable(items[order[i]].*name), "'"));
  }

  static std::string_view read_string(detail::ByteReader& in, std::string_view what) {
    const auto size = in.read<std::uint64_t>(what);
    const std::uint8_t* text = in.take(size, what);
    return {reinterpret_cast<const char*>(text), static_cast<std::size_t>(size)};
  }
  static std::string_view read_name(detail::ByteReader& in, std::string_view what) {
    const std::string_view name = read_string(in, what);
    if (name.size() > detail::gguf_max_name)
      in.fail(detail::concat("a ", what, " of ", name.size(), " bytes; at most 65535 are allowed"));
    if (!detail::is_utf8(name))
      in.fail(detail::concat("a ", what, " is not UTF-8: '", detail::printable(name), "'"));
    return name;
  }
  static GgufValueType read_value_type(detail::ByteReader& in, std::string_view key) {
    const auto raw = in.read<std::uint32_t>("a value's type");
    if (raw > 12) in.fail(detail::concat("'", detail::printable(key), "' has the unknown value type ", raw));
    return static_cast<GgufValueType>(raw);
  }
  static void check_bools(const detail::ByteReader& in, const std::uint8_t* p, std::size_t n,
                          std::string_view key) {
    for (std::size_t i = 0; i < n; ++i)
      if (p[i] > 1)
        in.fail(detail::concat("'", detail::printable(key), "' holds a boolean that is neither 0 nor 1"));
  }
  static GgufArray read_array(detail::ByteReader& in, std::string_view key, int depth) {
    if (depth > detail::gguf_max_nesting)
      in.fail(
          detail::concat("'", detail::printable(key), "' nests arrays deeper than ", detail::gguf_max_nesting));
    const GgufValueType type = read_value_type(in, key);
    const auto count = in.read<std::uint64_t>("an array's length");
    const std::uint8_t* begin = in.here();
    const std::size_t width = detail::gguf_value_bytes(type);
    if (width != 0) {
      in.take_items(count, width, "an array");
      if (type == GgufValueType::boolean) check_bools(in, begin, static_cast<std::size_t>(count), key);
    } else {
      // Each element takes at least 8 bytes of the file, so a false count ends soon.
      for (std::uint64_t i = 0; i < count; ++i) {
        if (type == GgufValueType::string)
          read_string(in, "a string in an array");
        else
          read_array(in, key, depth + 1);
      }
    }
    return {type, static_cast<std::size_t>(count), begin, static_cast<std::size_t>(in.here() - begin)};
  }
  static GgufValue read_value(detail::ByteReader& in, std::string_view key) {
    switch (read_value_type(in, key)) {
      case GgufValueType::uint8: return GgufValue(in.read<std::uint8_t>("a value"));
      case GgufValueType::int8: return GgufValue(in.read<std::int8_t>("a value"));
      case GgufValueType::uint16: return GgufValue(in.read<std::uint16_t>("a value"));
      case GgufValueType::int16: return GgufValue(in.read<std::int16_t>("a value"));
      case GgufValueType::uint32: return GgufValue(in.read<std::uint32_t>("a value"));
      case GgufValueType::int32: return GgufValue(in.read<std::int32_t>("a value"));
      case GgufValueType::float32: return GgufValue(in.read<float>("a value"));
      case GgufValueType::boolean: {
        const std::uint8_t* p = in.take(1, "a value");
        check_bools(in, p, 1, key);
        return GgufValue(*p != 0);
      }
      case GgufValueType::string: return GgufValue(read_string(in, "a string"));
      case GgufValueType::array: return GgufValue(read_array(in, key, 1));
      case GgufValueType::uint64: return GgufValue(in.read<std::uint64_t>("a value"));
      case GgufValueType::int64: return GgufValue(in.read<std::int64_t>("a value"));
      case GgufValueType::float64: break;
    }
    return GgufValue(in.read<double>("a value"));
  }

  /// Everything about a tensor but its data. `bytes` receives its size, 0 for a type that is not known.
  static GgufTensor read_tensor_info(detail::ByteReader& in, std::uint64_t& bytes) {
    GgufTensor tensor;
    tensor.name = read_name(in, "tensor name");
    const auto called = [&] { return detail::concat("tensor '", detail::printable(tensor.name), "'"); };
    const auto rank = in.read<std::uint32_t>("a tensor's rank");
    if (rank > detail::gguf_max_rank)
      in.fail(
          detail::concat(called(), " has ", rank, " dimensions; at most ", detail::gguf_max_rank, " are allowed"));
    tensor.rank = rank;
    // Every partial product must fit, also where a later dimension is 0.
    tensor.elements = 1;
    std::uint64_t extent = 1;
    for (std::size_t i = 0; i < rank; ++i) {
      tensor.dims[i] = in.read<std::uint64_t>("a tensor's dimension");
      const std::uint64_t factor = tensor.dims[i] == 0 ? 1 : tensor.dims[i];
      if (__builtin_mul_overflow(extent, factor, &extent) || extent > static_cast<std::uint64_t>(INT64_MAX))
        in.fail(detail::concat(called(), " has more than 2^63 elements"));
      tensor.elements *= tensor.dims[i];
    }
    tensor.type = static_cast<GgufType>(in.read<std::uint32_t>("a tensor's type"));
    tensor.offset = in.read<std::uint64_t>("a tensor's offset");
    bytes = 0;
    if (const GgufTypeInfo* info = gguf_type_info(tensor.type)) {
      if (tensor.dims[0] % info->block_elements != 0)
        in.fail(detail::concat(called(), " has rows of ", tensor.dims[0], ", no multiple of the ",
                               info->block_elements, " that a block of ", info->name, " holds"));
      if (__builtin_mul_overflow(tensor.elements / info->block_elements, std::uint64_t{info->block_bytes}, &bytes))
        in.fail(detail::concat(called(), " is larger than 2^64 bytes"));
    }
    return tensor;
  }

  void read(const std::string& name) {
    detail::ByteReader in(bytes_.data(), bytes_.size(), name);
    const std::uint8_t* magic = in.take(4, "the magic");
    if (std::memcmp(magic, "GGUF", 4) != 0) in.fail("not a GGUF file: it does not start with 'GGUF'");
    version_ = in.read<std::uint32_t>("the version");
    if (version_ != 2 && version_ != 3) {
      if (version_ != 0 && (version_ & 0xFFFFU) == 0)
        detail::raise<Unsupported>(name + ": a big-endian GGUF file; only little-endian ones are read");
      if (version_ == 1) detail::raise<Unsupported>(name + ": GGUF version 1; versions 2 and 3 are read");
      in.fail(detail::concat("GGUF version ", version_, " is not known; versions 2 and 3 are read"));
    }
    const auto tensor_count = in.read<std::uint64_t>("the tensor count");
    const auto entry_count = in.read<std::uint64_t>("the metadata count");
    // The smallest entry has 13 bytes, the smallest tensor 24: counts are refused before anything is allocated.
    constexpr std::size_t least_entry = 13, least_tensor = 24;
    if (entry_count > in.remaining() / least_entry)
      in.fail(detail::concat("the header claims ", entry_count, " metadata entries, more than the file can hold"));
    if (tensor_count > in.remaining() / least_tensor || tensor_count > 0xFFFFFFFFU || entry_count > 0xFFFFFFFFU)
      in.fail(detail::concat("the header claims ", tensor_count, " tensors, more than the file can hold"));

    for (std::uint64_t i = 0; i < entry_count; ++i) {
      GgufEntry entry;
      entry.key = read_name(in, "metadata key");
      entry.value = read_value(in, entry.key);
      metadata_.push_back(entry);
    }
    key_order_ = sorted_by(metadata_, &GgufEntry::key);
    refuse_duplicates(in, metadata_, key_order_, &GgufEntry::key, "metadata entries");

    if (const GgufValue* given = find("general.alignment")) {
      if (given->type() != GgufValueType::uint32) in.fail("'general.alignment' is no uint32");
      given->get(alignment_);
      if (alignment_ == 0 || (alignment_ & (alignment_ - 1)) != 0 || alignment_ > detail::gguf_max_alignment)
        in.fail(detail::concat("'general.alignment' is ", alignment_, ", expected a power of two up to 2^30"));
    }

    std::vector<std::uint64_t> sizes;
    for (std::uint64_t i = 0; i < tensor_count; ++i) {
      std::uint64_t bytes = 0;
      tensors_.push_back(read_tensor_info(in, bytes));
      sizes.push_back(bytes);
    }
    name_order_ = sorted_by(tensors_, &GgufTensor::name);
    refuse_duplicates(in, tensors_, name_order_, &GgufTensor::name, "tensors");
    place_tensors(in, sizes);
  }

  void place_tensors(const detail::ByteReader& in, const std::vector<std::uint64_t>& sizes) {
    data_offset_ = detail::round_up(in.position(), static_cast<std::size_t>(alignment_));
    // A file without data may end right after its header.
    const std::uint64_t space = data_offset_ <= bytes_.size() ? bytes_.size() - data_offset_ : 0;
    const std::shared_ptr<const void> owner = std::make_shared<const Buffer>(bytes_);
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      GgufTensor& tensor = tensors_[i];
      const auto called = [&] { return detail::concat("tensor '", detail::printable(tensor.name), "'"); };
      if (tensor.offset % alignment_ != 0)
        in.fail(detail::concat(called(), " lies at offset ", tensor.offset, ", no multiple of the alignment ",
                               alignment_));
      if (tensor.offset > space || sizes[i] > space - tensor.offset)
        in.fail(detail::concat(called(), " takes ", sizes[i], " bytes at offset ", tensor.offset,
                               ", beyond the end of the data (", space, " bytes)"));
      if (tensor.known() && sizes[i] != 0)
        tensor.data = Buffer::borrow(bytes_.data() + data_offset_ + tensor.offset,
                                     static_cast<std::size_t>(sizes[i]), owner);
    }
    std::vector<std::uint32_t> order;
    for (std::size_t i = 0; i < tensors_.size(); ++i)
      if (sizes[i] != 0) order.push_back(static_cast<std::uint32_t>(i));
    std::sort(order.begin(), order.end(),
              [this](std::uint32_t a, std::uint32_t b) { return tensors_[a].offset < tensors_[b].offset; });
    for (std::size_t i = 1; i < order.size(); ++i) {
      const GgufTensor& left = tensors_[order[i - 1]];
      const GgufTensor& right = tensors_[order[i]];
      if (sizes[order[i - 1]] > right.offset - left.offset)
        in.fail(detail::concat("tensors '", detail::printable(left.name), "' and '", detail::printable(right.name),
                               "' overlap"));
    }
  }

  Buffer bytes_;
  std::uint32_t version_ = 0;
  std::uint64_t alignment_ = 32;
  std::size_t data_offset_ = 0;
  std::vector<GgufEntry> metadata_;
  std::vector<GgufTensor> tensors_;
  std::vector<std::uint32_t> key_order_;
  std::vector<std::uint32_t> name_order_;
};

inline std::vector<GgufArray> GgufArray::arrays() const {
  if (type_ != GgufValueType::array) mismatch("arrays");
  // Checked when the file was opened: this walk only finds the elements again.
  struct Walk {
    static const std::uint8_t* skip(const std::uint8_t* p, GgufValueType type, std::uint64_t count) {
      const std::size_t width = detail::gguf_value_bytes(type);
      if (width != 0) return p + count * width;
      for (std::uint64_t i = 0; i < count; ++i) {
        if (type == GgufValueType::string)
          p += 8 + detail::load_unaligned<std::uint64_t>(p);
        else
          p = skip(p + 12, static_cast<GgufValueType>(detail::load_unaligned<std::uint32_t>(p)),
                   detail::load_unaligned<std::uint64_t>(p + 4));
      }
      return p;
    }
  };
  std::vector<GgufArray> out;
  out.reserve(size_);
  const std::uint8_t* p = data_;
  for (std::size_t i = 0; i < size_; ++i) {
    const auto type = static_cast<GgufValueType>(detail::load_unaligned<std::uint32_t>(p));
    const auto count = detail::load_unaligned<std::uint64_t>(p + 4);
    const std::uint8_t* end = Walk::skip(p + 12, type, count);
    out.emplace_back(type, static_cast<std::size_t>(count), p + 12, static_cast<std::size_t>(end - (p + 12)));
    p = end;
  }
  return out;
}

/// Writes a GGUF file (version 3) tensor by tensor, so that a model larger than memory can be converted. In this
/// order: metadata and tensor declarations, in any mix; then the data of every tensor in the order of declaration,
/// in pieces of any size; then commit(). The path holds its old content until then, whatever fails (AtomicFile).
///
/// Misuse (a name twice, too many or missing bytes, a declaration after the first data) throws InvalidArgument.
class GgufWriter {
 public:
  explicit GgufWriter(const std::string& path) : file_(path) {}

  /// Adds a metadata entry, stored with the type that T says: bool, the integers, float, double, anything that
  /// converts to std::string_view, a std::vector of these, or a GgufValue or GgufArray of another file.
  /// "general.alignment", a uint32 power of two from 8 on, also sets the alignment of the data; 32 without it.
  template <class T>
  void add(std::string_view key, const T& value) {
    require_header("add");
    detail::require(!key.empty() && key.size() <= detail::gguf_max_name && detail::is_utf8(key),
                    "GgufWriter: key '", detail::printable(key), "' is not 1 to 65535 bytes of UTF-8");
    detail::require(keys_.insert(std::string(key)).second, "GgufWriter: key '", key, "' was added before");
    if (key == "general.alignment") set_alignment(value);
    put_string(entries_, key);
    put_value(value);
    ++entry_count_;
  }

  /// Adds every entry of another file.
  void add_metadata(const GgufFile& from) {
    for (const GgufEntry& entry : from.metadata()) add(entry.key, entry.value);
  }

  /// Announces a tensor. `dims` is in GGUF's order: a weight of n outputs by k inputs is {k, n}. At most 4
  /// dimensions, the first a multiple of the type's block; names have 1 to 63 bytes (ggml's limit).
  void declare(std::string_view name, GgufType type, const std::vector<std::uint64_t>& dims) {
    require_header("declare");
    detail::require(!name.empty() && name.size() < 64 && detail::is_utf8(name), "GgufWriter: tensor name '",
                    detail::printable(name), "' is not 1 to 63 bytes of UTF-8");
    detail::require(dims.size() <= detail::gguf_max_rank, "GgufWriter: tensor '", name, "' has ", dims.size(),
                    " dimensions, at most 4 are possible");
    const GgufTypeInfo* info = gguf_type_info(type);
    detail::require(info != nullptr, "GgufWriter: tensor '", name, "' has the unknown type ",
                    static_cast<std::uint32_t>(type));
    std::size_t elements = 1;
    for (const std::uint64_t d : dims)
      elements = detail::checked_mul(elements, static_cast<std::size_t>(d), "GgufWriter: size of a tensor");
    const std::uint64_t line = dims.empty() ? 1 : dims[0];
    detail::require(line % info->block_elements == 0, "GgufWriter: tensor '", name, "' has rows of ", line,
                    ", expected a multiple of ", info->block_elements, " for ", info->name);
    detail::require(names_.insert(std::string(name)).second, "GgufWriter: tensor '", name,
                    "' was declared before");
    tensors_.push_back({std::string(name), type, dims, gguf_bytes(type, elements)});
  }
  void declare(const GgufTensor& like) {
    declare(like.name, like.type, {like.dims.begin(), like.dims.begin() + static_cast<std::ptrdiff_t>(like.rank)});
  }

  /// Appends bytes to the tensor whose turn it is; they may not reach beyond its end.
  void write(const void* bytes, std::size_t size) {
    write_header();
    if (size == 0) return;
    skip_empty();
    detail::require(current_ < tensors_.size(), "GgufWriter: data beyond the last declared tensor");
    const Declared& tensor = tensors_[current_];
    detail::require(size <= tensor.bytes - filled_, "GgufWriter: tensor '", tensor.name, "' takes ", tensor.bytes,
                    " bytes, ", filled_, " are written and ", size, " more given");
    file_.write(bytes, size);
    filled_ += size;
    if (filled_ == tensor.bytes) finish_tensor();
  }

  /// Appends floats, a whole number of blocks, encoded to the type of the tensor whose turn it is (gguf_quantize).
  void write_floats(const float* values, std::size_t count) {
    write_header();
    if (count == 0) return;
    skip_empty();
    detail::require(current_ < tensors_.size(), "GgufWriter: data beyond the last declared tensor");
    const GgufType type = tensors_[current_].type;
    // Nothing is written of a piece that does not fit.
    detail::require(gguf_bytes(type, count) <= tensors_[current_].bytes - filled_, "GgufWriter: tensor '",
                    tensors_[current_].name, "' does not take ", count, " more values");
    constexpr std::size_t chunk = 8192;
    std::vector<std::uint8_t> encoded(gguf_bytes(type, std::min(count, chunk)));
    for (std::size_t i = 0; i < count; i += chunk) {
      const std::size_t n = std::min(chunk, count - i);
      gguf_quantize(type, values + i, n, encoded.data());
      write(encoded.data(), gguf_bytes(type, n));
    }
  }

  /// All bytes of one tensor, which must be the next in order and not begun.
  void write_tensor(std::string_view name, const void* bytes, std::size_t size) {
    write_header();
    require_turn(name);
    detail::require(size == tensors_[current_].bytes, "GgufWriter: tensor '", name, "' takes ",
                    tensors_[current_].bytes, " bytes, ", size, " given");
    if (size == 0)
      finish_tensor();
    else
      write(bytes, size);
  }

  /// Completes the file and puts it in place.
  void commit() {
    write_header();
    skip_empty();
    detail::require(current_ == tensors_.size(), "GgufWriter: tensor '",
                    current_ < tensors_.size() ? tensors_[current_].name : std::string(), "' is not complete");
    file_.commit();
  }

 private:
  struct Declared {
    std::string name;
    GgufType type;
    std::vector<std::uint64_t> dims;
    std::size_t bytes;
  };

  template <class T>
  static void put(std::string& to, T value) {
    char bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    to.append(bytes, sizeof(T));
  }
  static void put_string(std::string& to, std::string_view text) {
    put(to, static_cast<std::uint64_t>(text.size()));
    to.append(text);
  }
  static void put_type(std::string& to, GgufValueType type) { put(to, static_cast<std::uint32_t>(type)); }

  template <class T>
  void put_plain(const T& value) {
    if constexpr (std::is_same_v<T, bool>)
      put(entries_, static_cast<std::uint8_t>(value));
    else if constexpr (std::is_arithmetic_v<T>)
      put(entries_, value);
    else
      put_string(entries_, value);
  }
  template <class T>
  void put_value(const T& value) {
    put_type(entries_, detail::gguf_value_type_of<T>());
    put_plain(value);
  }
  template <class T>
  void put_value(const std::vector<T>& values) {
    put_type(entries_, GgufValueType::array);
    put_type(entries_, detail::gguf_value_type_of<T>());
    put(entries_, static_cast<std::uint64_t>(values.size()));
    for (std::size_t i = 0; i < values.size(); ++i) put_plain<T>(values[i]);
  }
  void put_value(const GgufArray& array) {
    put_type(entries_, GgufValueType::array);
    put_type(entries_, array.element_type());
    put(entries_, static_cast<std::uint64_t>(array.size()));
    if (array.raw_bytes() != 0) entries_.append(reinterpret_cast<const char*>(array.raw()), array.raw_bytes());
  }
  void put_value(const GgufValue& value) {
    std::visit([this](const auto& stored) { put_value(stored); }, value.variant());
  }

  template <class T>
  void set_alignment(const T& value) {
    std::uint32_t wanted = 0;
    if constexpr (std::is_same_v<T, GgufValue>) {
      if (value.type() == GgufValueType::uint32) value.get(wanted);
    } else if constexpr (std::is_same_v<T, std::uint32_t>) {
      wanted = value;
    }
    detail::require(wanted >= 8 && (wanted & (wanted - 1)) == 0 && wanted <= detail::gguf_max_alignment,
                    "GgufWriter: general.alignment must be a uint32 power of two from 8 to 2^30");
    alignment_ = wanted;
  }

  void require_header(std::string_view what) const {
    detail::require(!header_written_, "GgufWriter: ", what, " after the first data");
  }
  void require_turn(std::string_view name) const {
    const bool known = current_ < tensors_.size();
    detail::require(known && tensors_[current_].name == name && filled_ == 0, "GgufWriter: data of tensor '", name,
                    "' given where '", known ? tensors_[current_].name : std::string("(none)"), "' is due");
  }

  void write_header() {
    if (header_written_) return;
    std::string head = "GGUF";
    put(head, std::uint32_t{3});
    put(head, static_cast<std::uint64_t>(tensors_.size()));
    put(head, entry_count_);
    head += entries_;
    std::size_t offset = 0;
    for (const Declared& tensor : tensors_) {
      put_string(head, tensor.name);
      put(head, static_cast<std::uint32_t>(tensor.dims.size()));
      for (const std::uint64_t d : tensor.dims) put(head, d);
      put(head, static_cast<std::uint32_t>(tensor.type));
      put(head, static_cast<std::uint64_t>(offset));
      offset = detail::checked_add(offset, tensor.bytes, "GgufWriter: size of the file");
      offset =
          detail::checked_add(offset, alignment_ - 1, "GgufWriter: size of the file") / alignment_ * alignment_;
    }
    file_.write(head);
    pad();
    header_written_ = true;
    entries_ = {};
  }
  void pad() { file_.write_zeros((alignment_ - file_.position() % alignment_) % alignment_); }
  void finish_tensor() {
    pad();
    ++current_;
    filled_ = 0;
  }
  void skip_empty() {
    while (current_ < tensors_.size() && tensors_[current_].bytes == 0) finish_tensor();
  }

  AtomicFile file_;
  std::string entries_;
  std::uint64_t entry_count_ = 0;
  std::size_t alignment_ = 32;
  std::set<std::string> keys_;
  std::set<std::string> names_;
  std::vector<Declared> tensors_;
  bool header_written_ = false;
  std::size_t current_ = 0;
  std::size_t filled_ = 0;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
