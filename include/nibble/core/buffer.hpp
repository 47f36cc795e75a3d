// Owned or borrowed bytes: what quantized and packed objects keep their data in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "nibble/core/error.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Immutable-size bytes, 64-byte aligned when owned. Copies share the memory; the bytes live as long as any copy.
/// A borrowed buffer (a tensor in a mapped file) keeps its owner alive and may have any alignment.
class Buffer {
 public:
  static constexpr std::size_t alignment = 64;

  Buffer() = default;

  /// Allocates `size` zeroed bytes, padded up to a multiple of 64. Throws std::bad_alloc.
  explicit Buffer(std::size_t size) : size_(size) {
    if (size == 0) return;
    const std::size_t padded = detail::checked_add(size, alignment - 1, "buffer size") / alignment * alignment;
    void* memory = ::operator new(padded, std::align_val_t(alignment));
    std::memset(memory, 0, padded);
    owner_ = std::shared_ptr<void>(memory, [](void* p) { ::operator delete(p, std::align_val_t(alignment)); });
    data_ = static_cast<std::uint8_t*>(memory);
  }

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
  std::shared_ptr<void> owner_;
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  bool borrowed_ = false;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
