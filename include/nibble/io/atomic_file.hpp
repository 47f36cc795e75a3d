// Files that appear whole or not at all.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/io/mapped_file.hpp"

namespace nibble {
inline namespace NIBBLE_ABI {

/// Writes a file so that its path always holds either the old content or all of the new one, whatever fails: a
/// full disk, a kill, a power cut. Bytes go to a temporary file in the same directory; commit() flushes it to the
/// disk and renames it over the path. Without commit() the destructor removes the temporary. A kill leaves it
/// behind, named `.<name>.<process>-<number>.tmp`; it may be deleted.
///
/// An existing file is replaced, keeping its permissions; a symbolic link keeps pointing to the replaced file.
/// What exists and is not a regular file (a device, a pipe, a directory) is refused.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path) : path_(path) {
    resolve_link();
    struct stat status;
    mode_t mode = 0666;
    bool exists = false;
    if (::stat(path_.c_str(), &status) == 0) {
      exists = true;
      if (S_ISDIR(status.st_mode)) fail("write", EISDIR);
      if (!S_ISREG(status.st_mode))
        detail::raise<IoError>("cannot write '" + path_ + "': it exists and is not a regular file");
      mode = status.st_mode & 07777;
    } else if (errno != ENOENT) {
      fail("write", errno);
    }
    open_temporary(mode);
    // The umask does not matter for a file that had its permissions already.
    if (exists) (void)::fchmod(fd_.get(), mode);
    buffer_.reserve(chunk);
  }

  AtomicFile(AtomicFile&& other) noexcept
      : path_(std::move(other.path_)),
        temporary_(std::move(other.temporary_)),
        fd_(std::move(other.fd_)),
        buffer_(std::move(other.buffer_)),
        buffer_offset_(other.buffer_offset_),
        written_(other.written_),
        state_(std::exchange(other.state_, State::closed)) {
    other.temporary_.clear();
  }
  AtomicFile& operator=(AtomicFile&&) = delete;
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  ~AtomicFile() {
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
  }

  /// Appends bytes. Throws IoError when the system refuses (no space, a size limit), maybe only at a later call;
  /// commit() is refused after that.
  void write(const void* data, std::size_t size) {
    write_at(written_, data, size);
    written_ += size;
  }
  void write(std::string_view text) { write(text.data(), text.size()); }

  /// Appends `size` zero bytes.
  void write_zeros(std::uint64_t size) {
    static constexpr std::uint8_t zeros[4096] = {};
    while (size != 0) {
      const std::size_t step = static_cast<std::size_t>(std::min<std::uint64_t>(size, sizeof zeros));
      write(zeros, step);
      size -= step;
    }
  }

  /// Writes bytes at an offset of their own, for files whose parts come in any order. Appended bytes are not moved
  /// by it; what is never written reads as zeros. Throws as write() does.
  void write_at(std::uint64_t offset, const void* data, std::size_t size) {
    require_open();
    if (size > static_cast<std::uint64_t>(INT64_MAX) || offset > static_cast<std::uint64_t>(INT64_MAX) - size)
      fail_write("write", EFBIG);
    const auto* p = static_cast<const std::uint8_t*>(data);
    if (offset != buffer_offset_ + buffer_.size()) {
      flush();
      buffer_offset_ = offset;
    }
    while (size != 0) {
      const std::size_t room = chunk - static_cast<std::size_t>((buffer_offset_ + buffer_.size()) % chunk);
      const std::size_t n = std::min(size, room);
      if (n == chunk) {
        write_through(buffer_offset_, p, n);
        buffer_offset_ += n;
      } else {
        buffer_.insert(buffer_.end(), p, p + n);
        if (n == room) flush();
      }
      p += n;
      size -= n;
    }
  }

  /// Bytes appended so far.
  std::uint64_t position() const noexcept { return written_; }
  /// The file that will be replaced.
  const std::string& path() const noexcept { return path_; }

  /// Makes the content durable and puts it in place. At most once. Throws IoError; the old file is then untouched.
  void commit() {
    require_open();
    flush();
    if (::fsync(fd_.get()) != 0) fail_write("flush", errno);
    state_ = State::failed;
    // A network file system may report a failed write only here.
    if (::close(fd_.release()) != 0 && errno != EINTR) fail("close", errno);
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("replace", errno);
    temporary_.clear();
    state_ = State::closed;
    // The new content is in place from here on; a directory that cannot be flushed only delays its durability.
    const detail::FileDescriptor directory(
        ::open(directory_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (directory.get() >= 0) (void)::fsync(directory.get());
  }

 private:
  enum class State : std::uint8_t { open, failed, closed };
  // What is written in whole large pages is kept in large pages, and mapped as such: Linux 6.16 on ext4 maps a model of
  // 94 MB in 4 ms instead of 14.
  static constexpr std::size_t chunk = std::size_t{1} << 21;

  static std::string directory_of(const std::string& path) {
    const std::size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
  }

  [[noreturn]] void fail(const char* action, int code) const {
    detail::raise<IoError>(detail::concat("cannot ", action, " '", path_, "': ", detail::errno_text(code)));
  }
  [[noreturn]] void fail_write(const char* action, int code) {
    state_ = State::failed;
    fail(action, code);
  }

  void require_open() const {
    if (state_ == State::failed) detail::raise<IoError>("cannot write '" + path_ + "': an earlier write failed");
    detail::require(state_ == State::open, "AtomicFile: '", path_, "' was committed or moved from");
  }

  // A write through a link changes what it points to, and so does a replacement.
  void resolve_link() {
    struct stat status;
    if (::lstat(path_.c_str(), &status) != 0 || !S_ISLNK(status.st_mode)) return;
    char* target = ::realpath(path_.c_str(), nullptr);
    if (target == nullptr) fail("write through the link", errno);
    path_ = target;
    std::free(target);
  }

  void open_temporary(mode_t mode) {
    static std::atomic<unsigned> counter{0};
    const std::size_t slash = path_.rfind('/');
    const std::string folder = slash == std::string::npos ? "" : path_.substr(0, slash + 1);
    // Names are limited to 255 bytes; what is cut off only served recognition.
    const std::string name = path_.substr(folder.size(), 200);
    for (int attempt = 0; attempt < 1000; ++attempt) {
      std::string candidate = detail::concat(folder, ".", name, ".", static_cast<long>(::getpid()), "-",
                                             counter.fetch_add(1, std::memory_order_relaxed), ".tmp");
      const int fd = ::open(candidate.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
      if (fd >= 0) {
        fd_ = detail::FileDescriptor(fd);
        temporary_ = std::move(candidate);
        return;
      }
      if (errno != EEXIST) fail("write", errno);
    }
    fail("write", EEXIST);
  }

  void flush() {
    write_through(buffer_offset_, buffer_.data(), buffer_.size());
    buffer_offset_ += buffer_.size();
    buffer_.clear();
  }

  void write_through(std::uint64_t offset, const std::uint8_t* data, std::size_t size) {
    while (size != 0) {
      const ssize_t n = ::pwrite(fd_.get(), data, size, static_cast<off_t>(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail_write("write", errno);
      data += n;
      offset += static_cast<std::uint64_t>(n);
      size -= static_cast<std::size_t>(n);
    }
  }

  std::string path_;
  std::string temporary_;
  detail::FileDescriptor fd_;
  std::vector<std::uint8_t>
      buffer_;  // not written yet: the end of what came last, up to the next multiple of chunk
  std::uint64_t buffer_offset_ = 0;
  std::uint64_t written_ = 0;
  State state_ = State::open;
};

}  // namespace NIBBLE_ABI
}  // namespace nibble
