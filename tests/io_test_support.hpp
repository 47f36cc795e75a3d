// What the file tests share: a folder that goes away, whole files as bytes, the Python that makes golden data.
#pragma once

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "nibble/core/buffer.hpp"
#include "nibble/core/error.hpp"

namespace io_test {

using Bytes = std::vector<std::uint8_t>;

/// A fresh folder, removed at the end of the test.
class TempFolder {
 public:
  TempFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "nibble-io-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) std::abort();
    path_ = pattern;
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  std::string file(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }
  std::size_t count() const {
    const std::filesystem::directory_iterator files(path_);
    return static_cast<std::size_t>(std::distance(begin(files), end(files)));
  }

 private:
  std::string path_;
};

inline Bytes read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return Bytes(std::istreambuf_iterator<char>(in), {});
}

inline void write_file(const std::string& path, const Bytes& bytes) {
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  ASSERT_TRUE(out.good()) << path;
}

template <class T>
std::vector<T> read_values(const std::string& path) {
  const Bytes bytes = read_file(path);
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

/// Bytes in memory of their exact size, so that the address sanitizer sees a read beyond the end.
inline nibble::Buffer exact_buffer(const Bytes& bytes) {
  const std::shared_ptr<std::uint8_t> memory(new std::uint8_t[bytes.size() + (bytes.empty() ? 1 : 0)],
                                             std::default_delete<std::uint8_t[]>());
  if (!bytes.empty()) std::memcpy(memory.get(), bytes.data(), bytes.size());
  return nibble::Buffer::borrow(memory.get(), bytes.size(), memory);
}

template <class T>
void append(Bytes& to, T value) {
  std::uint8_t bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  to.insert(to.end(), bytes, bytes + sizeof(T));
}
inline void append_text(Bytes& to, const std::string& text) { to.insert(to.end(), text.begin(), text.end()); }

/// Runs a command and gives what it printed; `status` receives its exit status.
inline std::string run(const std::string& command, int& status) {
  std::string output;
  FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) {
    status = -1;
    return output;
  }
  char chunk[4096];
  for (std::size_t n = 0; (n = std::fread(chunk, 1, sizeof chunk, pipe)) > 0;) output.append(chunk, n);
  const int result = ::pclose(pipe);
  status = WIFEXITED(result) ? WEXITSTATUS(result) : -1;
  return output;
}

/// Python from NIBBLE_PYTHON (default python3), or empty where it has no packages gguf and numpy. An address
/// sanitizer that this process runs under is not passed on.
inline std::string python() {
  const char* given = std::getenv("NIBBLE_PYTHON");
  const std::string command = std::string("env -u LD_PRELOAD '") + (given != nullptr ? given : "python3") + "'";
  int status = 0;
  run(command + " -c 'import gguf, numpy' 2>/dev/null", status);
  return status == 0 ? command : std::string();
}

inline std::string golden_script() {
  const char* root = std::getenv("NIBBLE_SOURCE_DIR");
  const std::filesystem::path folder =
      root != nullptr ? std::filesystem::path(root) / "tests" : std::filesystem::path(__FILE__).parent_path();
  return "'" + (folder / "io_golden.py").string() + "'";
}

#define NIBBLE_SKIP_WITHOUT_GGUF_PYTHON(command)                                 \
  const std::string command = io_test::python();                                 \
  if (command.empty())                                                           \
  GTEST_SKIP() << "needs a Python with the packages gguf and numpy; name it by " \
                  "NIBBLE_PYTHON"

/// Calls f, which must throw E with all of `parts` in its message.
template <class E, class F>
void expect_error(F&& f, const std::vector<std::string>& parts = {}) {
  try {
    f();
  } catch (const E& error) {
    for (const std::string& part : parts)
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what() << "\nlacks: " << part;
    return;
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another exception: " << error.what();
    return;
  }
  ADD_FAILURE() << "no error";
}

}  // namespace io_test
