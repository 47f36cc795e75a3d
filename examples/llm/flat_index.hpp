// A hash table that is one array of numbers, so that a file can hold it and a program use it where it is mapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"

namespace llm {

/// An immutable array, mapped or owned; copies share it.
template <class T>
class FlatArray {
 public:
  FlatArray() = default;
  explicit FlatArray(const std::vector<T>& values) : buffer_(values.size() * sizeof(T)), size_(values.size()) {
    if (!values.empty()) std::memcpy(buffer_.mutable_data(), values.data(), buffer_.size());
  }
  /// As many whole elements as `bytes` hold; they are copied only where they are not aligned.
  explicit FlatArray(nibble::Buffer bytes) : buffer_(std::move(bytes)), size_(buffer_.size() / sizeof(T)) {
    if (reinterpret_cast<std::uintptr_t>(buffer_.data()) % alignof(T) == 0) return;
    nibble::Buffer copy(buffer_.size());
    std::memcpy(copy.mutable_data(), buffer_.data(), buffer_.size());
    buffer_ = copy;
  }

  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  const T* data() const { return buffer_.as<T>(); }
  const T& operator[](std::size_t i) const { return data()[i]; }
  const T* begin() const { return data(); }
  const T* end() const { return data() + size_; }
  const nibble::Buffer& buffer() const { return buffer_; }

 private:
  nibble::Buffer buffer_;
  std::size_t size_ = 0;
};

/// FNV-1a, 64 bits: files depend on it.
inline std::uint64_t hash_of(std::string_view text) {
  std::uint64_t h = 0xCBF29CE484222325U;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001B3U;
  return h ^ h >> 32;
}

/// Two numbers, mixed by a multiplication whose high half decides: files depend on it.
inline std::uint64_t hash_of(std::int32_t a, std::int32_t b) {
  const std::uint64_t key =
      static_cast<std::uint64_t>(static_cast<std::uint32_t>(a)) << 32 | static_cast<std::uint32_t>(b);
  return key * 0x9E3779B97F4A7C15U >> 32;
}

/// Entry numbers by the hash of the entries, which lie elsewhere: an entry's slot is its hash modulo the number of
/// slots (a power of two) or the first free one after it, round the end.
class FlatIndex {
 public:
  static constexpr std::uint32_t none = std::numeric_limits<std::uint32_t>::max();  // a free slot; "not found"

  FlatIndex() = default;

  /// A table from a file for `entries` entries; what it says of them is checked when it is used.
  FlatIndex(FlatArray<std::uint32_t> slots, std::size_t entries) : slots_(std::move(slots)), entries_(entries) {
    nibble::detail::require<nibble::FormatError>(!slots_.empty() && (slots_.size() & (slots_.size() - 1)) == 0,
                                                 "an index has ", slots_.size(),
                                                 " slots, expected a power of two");
  }

  /// Of equal entries the first is found. hash(i), equal(i, j): of entries below `entries`.
  template <class Hash, class Equal>
  static FlatIndex build(std::size_t entries, Hash&& hash, Equal&& equal) {
    std::size_t size = 1;
    while (size < 2 * entries) size *= 2;
    std::vector<std::uint32_t> slots(size, none);
    for (std::size_t i = 0; i < entries; ++i) {
      std::size_t at = hash(i) & (size - 1);
      while (slots[at] != none && !equal(std::size_t{slots[at]}, i)) at = (at + 1) & (size - 1);
      if (slots[at] == none) slots[at] = static_cast<std::uint32_t>(i);
    }
    return {FlatArray<std::uint32_t>(slots), entries};
  }

  /// The entry of this hash for which match(entry) is true, or `none`. Throws FormatError where a file's table names
  /// an entry that there is not, or has no free slot.
  template <class Match>
  std::uint32_t find(std::uint64_t hash, Match&& match) const {
    const std::size_t mask = slots_.size() - 1;
    for (std::size_t probe = 0; probe < slots_.size(); ++probe) {
      const std::uint32_t entry = slots_[(hash + probe) & mask];
      if (entry == none) return none;
      nibble::detail::require<nibble::FormatError>(entry < entries_, "an index names entry ", entry, " of ",
                                                   entries_);
      if (match(std::size_t{entry})) return entry;
    }
    nibble::detail::raise<nibble::FormatError>("an index has no free slot");
  }

  bool empty() const { return slots_.empty(); }
  const FlatArray<std::uint32_t>& slots() const { return slots_; }

 private:
  FlatArray<std::uint32_t> slots_;
  std::size_t entries_ = 0;
};

}  // namespace llm
