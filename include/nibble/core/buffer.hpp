// Owned or borrowed bytes: what quantized and packed objects keep their data in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "nibble/core/error.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nibble {
inline namespace NIBBLE_ABI {

/// Immutable-size bytes, 64-byte aligned when owned. Copies share the memory; the bytes live as long as any copy.
/// A borrowed buffer (a tensor in a mapped file) keeps its owner alive and may have any alignment.
class Buffer {
 public:
  static constexpr std::size_t alignment = 64;

  Buffer() = default;

  /// Allocates `size` zeroed bytes, padded up to a multiple of 64. Throws std::bad_alloc.
  explicit Buffer(std::size_t size) : Buffer(size, Unset{}) {
    if (size != 0) std::memset(data_, 0, size);
  }

  /// The same for an owner that is going to write every byte: only the padding is zeroed.
  static Buffer uninitialized(std::size_t size) { return Buffer(size, Unset{}); }

  /// Refers to `size` bytes at `data`, which `owner` keeps alive. The bytes are never written.
  static Buffer borrow(const void* data, std::size_t size, std::shared_ptr<const void> owner) {
    Buffer buffer;
    buffer.owner_ = std::const_pointer_cast<void>(std::move(owner));
    buffer.data_ = static_cast<std::uint8_t*>(const_cast<void*>(data));
    buffer.size_ = size;
    buffer.borrowed_ = true;
    return buffer;
  }

  const std::uint8_t* data() const noexcept { return data_; }
  /// Writable bytes. Only for owned buffers that nobody else shares yet: the one who made it fills it.
  std::uint8_t* mutable_data() {
    detail::require(!borrowed_, "buffer is borrowed and cannot be written");
    return data_;
  }
  std::size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }
  bool borrowed() const noexcept { return borrowed_; }

  template <class T>
  const T* as() const noexcept {
    return reinterpret_cast<const T*>(data_);
  }
  template <class T>
  T* as_mutable() {
    return reinterpret_cast<T*>(mutable_data());
  }

 private:
  struct Unset {};

  // From here on memory is asked for in large pages: new memory then costs a fault for 2 MB instead of one for 4 KB (which
  // takes longer than quantizing into it does), and kernels that stream it miss fewer translations.
  static constexpr std::size_t large_page = std::size_t{2} << 20;
  static constexpr std::size_t large_size = 2 * large_page;

  Buffer(std::size_t size, Unset) : size_(size) {
    if (size == 0) return;
    const bool large = size >= large_size;
    const std::size_t aligned_to = large ? large_page : alignment;
    const std::size_t padded = detail::checked_add(size, alignment - 1, "buffer size") / alignment * alignment;
    void* memory = ::operator new(padded, std::align_val_t(aligned_to));
    data_ = static_cast<std::uint8_t*>(memory);
#if defined(__linux__)
    // A wish: nothing depends on whether the system grants it.
    if (large) static_cast<void>(::madvise(memory, padded / large_page * large_page, MADV_HUGEPAGE));
#endif
    owner_ = std::shared_ptr<void>(memory,
                                   [aligned_to](void* p) { ::operator delete(p, std::align_val_t(aligned_to)); });
    std::memset(data_ + size, 0, padded - size);
  }

  std::shared_ptr<void> owner_;
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  bool borrowed_ = false;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
