// Progress on stderr: a bar that redraws itself on a terminal, a line every tenth where it is a file.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <string>
#include <utility>

namespace llm {

class Progress {
 public:
  Progress(std::string what, std::size_t total) : what_(std::move(what)), total_(total == 0 ? 1 : total) {
    terminal_ = ::isatty(STDERR_FILENO) == 1;
    if (terminal_) show({});
  }
  ~Progress() {
    if (terminal_) std::fputs("\r\x1b[K", stderr);
  }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  bool on_terminal() const { return terminal_; }

  /// One more of `total` is done; `note` goes behind the bar.
  void step(const std::string& note = {}) {
    ++done_;
    const double now = seconds();
    if (terminal_) {
      if (now - shown_ < 0.05 && done_ < total_) return;
      shown_ = now;
    } else {
      // Short work in a log is noise.
      const std::size_t tenth = done_ * 10 / total_;
      if (now < 2.0 || tenth == tenth_) return;
      tenth_ = tenth;
    }
    show(note);
  }

 private:
  void show(const std::string& note) const {
    constexpr std::size_t width = 30;
    const std::size_t full = done_ * width / total_;
    const double spent = seconds();
    const double left =
        done_ == 0 ? 0.0 : spent / static_cast<double>(done_) * static_cast<double>(total_ - done_);
    if (terminal_)
      std::fprintf(stderr, "\r\x1b[K%s [%s%s] %zu/%zu %.0f s left %s", what_.c_str(),
                   std::string(full, '#').c_str(), std::string(width - full, '.').c_str(), done_, total_, left,
                   note.c_str());
    else
      std::fprintf(stderr, "%s: %zu/%zu, %.0f s left %s\n", what_.c_str(), done_, total_, left, note.c_str());
    std::fflush(stderr);
  }

  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

  using Clock = std::chrono::steady_clock;
  std::string what_;
  std::size_t total_;
  std::size_t done_ = 0;
  std::size_t tenth_ = 0;
  double shown_ = -1.0;
  bool terminal_ = false;
  Clock::time_point start_ = Clock::now();
};

}  // namespace llm
