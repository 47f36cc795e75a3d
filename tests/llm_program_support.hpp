// What tests of the program `nibble` share: running it, killing it, taking its disk away.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "llm_support.hpp"

namespace llm_test {

inline std::string program() {
#if defined(NIBBLE_CLI)
  return NIBBLE_CLI;
#else
  const char* path = std::getenv("NIBBLE_CLI");
  return path == nullptr ? "" : path;
#endif
}

inline std::size_t lines(const std::string& text) {
  return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
}

class ProgramTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (program().empty()) GTEST_SKIP() << "SKIPPED: NIBBLE_CLI does not name the program";
  }

  struct Result {
    int status = -1;  // -1: a signal ended it
    std::string out;
    std::string err;
  };

  Result run(const std::string& arguments) const {
    const int status = std::system((command(arguments) + " 2> '" + (streams_ / "err") + "'").c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(streams_ / "out"),
            read_file(streams_ / "err")};
  }

  /// Runs until stderr tells of a step `from` or later ("step 7 of"); then it is killed. Its stderr is a pipe with room for
  /// one message: at the kill it may have told of the next step, but of none after that.
  Result run_and_kill(const std::string& arguments, int from) const {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC | O_DIRECT) != 0 && ::pipe2(ends, O_CLOEXEC) != 0) std::abort();
    (void)::fcntl(ends[1], F_SETPIPE_SZ, 4096);
    Result r;
    const pid_t child = start(arguments, ends[1], RLIM_INFINITY);
    ::close(ends[1]);
    char buffer[4096];
    for (ssize_t n = 0; (n = ::read(ends[0], buffer, sizeof buffer)) > 0;) {
      r.err.append(buffer, static_cast<std::size_t>(n));
      const std::size_t step = r.err.rfind(": step ");
      if (step != std::string::npos && std::atoi(r.err.c_str() + step + 7) >= from) break;
    }
    ::kill(child, SIGKILL);
    ::close(ends[0]);
    r.status = wait_for(child);
    return r;
  }

  /// No file of the program may grow beyond so many bytes: what a full disk is like.
  Result run_with_disk(const std::string& arguments, rlim_t bytes) const {
    const int err = ::open((streams_ / "err").c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    Result r;
    r.status = wait_for(start(arguments, err, bytes));
    ::close(err);
    r.out = read_file(streams_ / "out");
    r.err = read_file(streams_ / "err");
    return r;
  }

  nlohmann::json json() const { return nlohmann::json::parse(read_file(folder_ / "j.json"), nullptr, false); }
  std::string file(const std::string& name) const { return folder_ / name; }

  /// Everything in the test's folder, by name.
  std::set<std::string> files() const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder_ / ""))
      names.insert(std::filesystem::relative(entry.path(), folder_ / "").string());
    return names;
  }

  TempFolder folder_;
  TempFolder streams_;  // of the program

 private:
  std::string command(const std::string& arguments) const {
    return "'" + program() + "' " + arguments + " > '" + (streams_ / "out") + "' < /dev/null";
  }
  pid_t start(const std::string& arguments, int err, rlim_t file_bytes) const {
    const std::string text = "exec " + command(arguments);
    const pid_t child = ::fork();
    if (child != 0) return child;
    if (file_bytes != RLIM_INFINITY) {
      ::signal(SIGXFSZ, SIG_IGN);
      const rlimit limit{file_bytes, file_bytes};
      ::setrlimit(RLIMIT_FSIZE, &limit);
    }
    ::dup2(err, STDERR_FILENO);
    ::execl("/bin/sh", "sh", "-c", text.c_str(), static_cast<char*>(nullptr));
    ::_exit(127);
  }
  static int wait_for(pid_t child) {
    int status = 0;
    if (child < 0 || ::waitpid(child, &status, 0) != child) return -2;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
};

}  // namespace llm_test
