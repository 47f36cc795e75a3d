// Scratch memory that products reuse from call to call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "nibble/core/buffer.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Scratch that grows to the largest product seen and then never allocates again. One product at a time may use it:
/// give every calling thread its own.
class Workspace {
 public:
  Workspace() = default;
  Workspace(Workspace&&) = default;
  Workspace& operator=(Workspace&&) = default;
  /// Starts with room for `bytes`.
  explicit Workspace(std::size_t bytes) { reserve(bytes); }

  std::size_t capacity() const noexcept { return buffer_.size(); }

  /// Makes room for `bytes`. Throws std::bad_alloc and keeps what it has.
  void reserve(std::size_t bytes) {
    if (bytes > buffer_.size()) buffer_ = Buffer(bytes);
  }

  /// At least `bytes`, 64-byte aligned, valid until the next call.
  std::uint8_t* take(std::size_t bytes) {
    reserve(bytes);
    return buffer_.mutable_data();
  }

 private:
  Buffer buffer_;
};

namespace detail {

/// The workspace of calls that bring none: one a thread.
inline Workspace& thread_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

/// Cuts one block of scratch into 64-byte aligned pieces: add() every piece, then place() them.
class ScratchPlan {
 public:
  /// Reserves `count` elements of `size` bytes and returns the piece's offset.
  std::size_t add(std::size_t count, std::size_t size) {
    const std::size_t offset = total_;
    const std::size_t bytes = checked_mul(count, size, "workspace size");
    total_ = round_up(checked_add(checked_add(total_, bytes, "workspace size"), 63, "workspace size") - 63, 64);
    return offset;
  }
  std::size_t total() const noexcept { return total_; }

 private:
  std::size_t total_ = 0;
};

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
