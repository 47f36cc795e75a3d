// Reading untrusted bytes: unaligned loads, a cursor that cannot leave its range, UTF-8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "nibble/core/error.hpp"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "nibble/io reads little-endian files by copying bytes and needs a little-endian machine"
#endif

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

/// Reads a T at any address.
template <class T>
inline T load_unaligned(const void* from) noexcept {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
inline void store_unaligned(void* to, T value) noexcept {
  std::memcpy(to, &value, sizeof(T));
}

/// memcpy that also takes null pointers where n is 0.
inline void copy_bytes(void* to, const void* from, std::size_t n) noexcept {
  if (n != 0) std::memcpy(to, from, n);
}

/// True for well-formed UTF-8: no overlong forms, no surrogates, nothing beyond U+10FFFF.
inline bool is_utf8(std::string_view text) noexcept {
  std::size_t i = 0;
  const std::size_t n = text.size();
  while (i < n) {
    const auto lead = static_cast<std::uint8_t>(text[i]);
    if (lead < 0x80) {
      ++i;
      continue;
    }
    std::size_t tail = 0;
    std::uint8_t low = 0x80, high = 0xBF;  // what the byte after the lead may be
    if (lead >= 0xC2 && lead <= 0xDF) {
      tail = 1;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
      tail = 2;
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
      tail = 3;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    } else {
      return false;
    }
    if (n - i <= tail) return false;
    for (std::size_t j = 1; j <= tail; ++j) {
      const auto byte = static_cast<std::uint8_t>(text[i + j]);
      if (byte < low || byte > high) return false;
      low = 0x80;
      high = 0xBF;
    }
    i += tail + 1;
  }
  return true;
}

/// Text for an error message: at most 60 bytes, what is not printable ASCII replaced, so that a hostile name
/// neither floods nor steers a terminal.
inline std::string printable(std::string_view text) {
  constexpr std::size_t most = 60;
  std::string out;
  for (char c : text.substr(0, most)) out += (c >= 0x20 && c < 0x7F) ? c : '?';
  if (text.size() > most) out += "...";
  return out;
}

/// A cursor over bytes of an untrusted file. Every read is checked against the end; a failure is a FormatError
/// that names the file, what was being read and where.
class ByteReader {
 public:
  ByteReader(const std::uint8_t* data, std::size_t size, std::string_view file) noexcept
      : data_(data), size_(size), file_(file) {}

  std::size_t position() const noexcept { return position_; }
  std::size_t remaining() const noexcept { return size_ - position_; }
  const std::uint8_t* here() const noexcept { return data_ + position_; }
  std::string_view file() const noexcept { return file_; }

  /// The next n bytes, which the cursor steps over.
  const std::uint8_t* take(std::uint64_t n, std::string_view what) {
    if (n > remaining()) fail(concat(what, " needs ", n, " bytes, but only ", remaining(), " are left"));
    const std::uint8_t* at = here();
    position_ += static_cast<std::size_t>(n);
    return at;
  }

  /// n items of `item_bytes` each; the product cannot overflow.
  const std::uint8_t* take_items(std::uint64_t n, std::size_t item_bytes, std::string_view what) {
    if (n > remaining() / item_bytes)
      fail(concat(what, " claims ", n, " elements of ", item_bytes, " bytes, but only ", remaining(),
                  " bytes are left"));
    return take(n * item_bytes, what);
  }

  template <class T>
  T read(std::string_view what) {
    return load_unaligned<T>(take(sizeof(T), what));
  }

  [[noreturn]] void fail(const std::string& message) const {
    raise<FormatError>(concat(file_, ": ", message, " (at byte ", position_, ")"));
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t position_ = 0;
  std::string_view file_;
};

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
