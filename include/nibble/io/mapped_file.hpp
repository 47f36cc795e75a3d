// A whole file mapped read-only into memory.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// How a file will be read: a hint to the kernel's read-ahead.
enum class MapAccess : std::uint8_t {
  normal,
  sequential,  ///< front to back, once
  random,      ///< no read-ahead
  will_need,   ///< start reading all of it in the background now
};

struct MapOptions {
  MapAccess access = MapAccess::normal;
  bool populate = false;  ///< read all of the file before open returns: no page faults later
};

namespace detail {

inline std::string errno_text(int code) { return std::strerror(code); }

/// Closes a descriptor at the end of a scope.
class FileDescriptor {
 public:
  explicit FileDescriptor(int fd = -1) noexcept : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const noexcept { return fd_; }
  int release() noexcept { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

}  // namespace detail

/// A read-only mapping of a regular file. Copies share it, and so do buffers borrowed from it; the mapping goes
/// when the last of them does. The path may be renamed or deleted meanwhile.
///
/// Limits: the size is taken when the file is opened. If another process truncates the file in place after that,
/// touching the lost pages raises SIGBUS, and if it overwrites the file the bytes change under the reader: nothing
/// that maps files can prevent it. Writers that replace files by renaming, as AtomicFile does, are safe.
class MappedFile {
 public:
  MappedFile() = default;

  /// Maps `path`. An empty file gives size() 0. Throws IoError, with the path and the reason, for what cannot be
  /// opened and for what is not a regular file.
  static MappedFile open(const std::string& path, MapOptions options = {}) {
    // Non-blocking, so that a FIFO is refused below instead of waiting here for its writer.
    detail::FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (fd.get() < 0) fail("open", path, errno);
    struct stat status;
    if (::fstat(fd.get(), &status) != 0) fail("inspect", path, errno);
    if (S_ISDIR(status.st_mode)) fail("map", path, EISDIR);
    if (!S_ISREG(status.st_mode)) detail::raise<IoError>("cannot map '" + path + "': not a regular file");

    MappedFile file;
    file.path_ = std::make_shared<const std::string>(path);
    file.size_ = static_cast<std::size_t>(status.st_size);
    if (file.size_ == 0) return file;

    int flags = MAP_PRIVATE;
#if defined(MAP_POPULATE)
    if (options.populate) flags |= MAP_POPULATE;
#endif
    void* memory = ::mmap(nullptr, file.size_, PROT_READ, flags, fd.get(), 0);
    if (memory == MAP_FAILED) fail("map", path, errno);
    const std::size_t size = file.size_;
    file.owner_ =
        std::shared_ptr<const void>(memory, [size](const void* p) { ::munmap(const_cast<void*>(p), size); });
    file.data_ = static_cast<const std::uint8_t*>(memory);
    file.advise(options.access);
    return file;
  }

  const std::uint8_t* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  /// Keeps the mapping alive; null for an empty file.
  std::shared_ptr<const void> owner() const noexcept { return owner_; }
  /// The path that was opened.
  const std::string& path() const noexcept {
    static const std::string none;
    return path_ ? *path_ : none;
  }

  /// Bytes [offset, offset + size) without a copy. Throws InvalidArgument beyond the end.
  Buffer buffer(std::size_t offset, std::size_t size) const {
    detail::require(offset <= size_ && size <= size_ - offset, "'", path(), "': bytes ", offset, " + ", size,
                    " do not lie within its ", size_);
    return Buffer::borrow(data_ + offset, size, owner_);
  }
  Buffer buffer() const { return buffer(0, size_); }

  /// Gives the kernel a hint. Never fails: a hint that is refused changes nothing but speed.
  void advise(MapAccess access) const noexcept {
    if (data_ == nullptr) return;
    int advice = MADV_NORMAL;
    switch (access) {
      case MapAccess::normal: return;
      case MapAccess::sequential: advice = MADV_SEQUENTIAL; break;
      case MapAccess::random: advice = MADV_RANDOM; break;
      case MapAccess::will_need: advice = MADV_WILLNEED; break;
    }
    (void)::madvise(const_cast<std::uint8_t*>(data_), size_, advice);
  }

  /// Lets the kernel take back the memory of pages [offset, offset + size): they are read again when touched. For
  /// walking once through a model that is larger than memory.
  void release(std::size_t offset, std::size_t size) const noexcept {
    if (data_ == nullptr || offset >= size_) return;
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const std::size_t end = size < size_ - offset ? offset + size : size_;
    const std::size_t first = detail::round_up(offset, page);
    const std::size_t last = end == size_ ? end : end / page * page;
    if (first < last) (void)::madvise(const_cast<std::uint8_t*>(data_) + first, last - first, MADV_DONTNEED);
  }

 private:
  [[noreturn]] static void fail(const char* action, const std::string& path, int code) {
    detail::raise<IoError>(detail::concat("cannot ", action, " '", path, "': ", detail::errno_text(code)));
  }

  std::shared_ptr<const std::string> path_;
  std::shared_ptr<const void> owner_;
  const std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
