// Threads for products of ten microseconds: workers spin a little before they sleep, and late ones are not waited for.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "nibble/core/error.hpp"
#include "nibble/core/fp_env.hpp"

#if NIBBLE_X86
#include <immintrin.h>
#endif

namespace nibble {
inline namespace NIBBLE_ABI {
namespace detail {

inline void spin_pause() noexcept {
#if NIBBLE_X86
  _mm_pause();
#elif NIBBLE_ARM64
  __asm__ volatile("isb" : : : "memory");  // some tens of cycles; yield is none on most cores
#else
  std::this_thread::yield();
#endif
}

/// Counts forks: a child has none of its parent's workers.
inline std::atomic<unsigned>& fork_generation() noexcept {
  static std::atomic<unsigned> generation{0};
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] { fork_generation().fetch_add(1); });
  (void)registered;
  return generation;
}

/// True on a thread that is inside a ThreadPool's task: products called from there run serially.
inline bool& inside_task() noexcept {
  thread_local bool inside = false;
  return inside;
}

}  // namespace detail

/// A fixed set of threads that the caller owns; products given none run on the calling thread alone.
///
/// run() may be called from several threads: one at a time gets the workers, the others work alone. A run() inside a
/// task, or in a child after fork(), is serial too. Results never depend on which of these happened.
class ThreadPool {
 public:
  /// `threads` in all, the caller's included; 0 takes the machine's. At most 1024.
  explicit ThreadPool(int threads = 0) : born_(detail::fork_generation().load()) {
    detail::require(threads >= 0 && threads <= 1024, "threads is ", threads, ", expected 0 (all cores) to 1024");
    if (threads == 0) threads = static_cast<int>(std::thread::hardware_concurrency());
    if (threads < 1) threads = 1;
    threads_ = threads;
    workers_ = std::make_unique<std::vector<std::thread>>();
    workers_->reserve(static_cast<std::size_t>(threads - 1));
#if NIBBLE_EXCEPTIONS
    try {
      for (int i = 1; i < threads; ++i) workers_->emplace_back([this, i] { work(static_cast<std::size_t>(i)); });
    } catch (...) {
      stop();
      throw;
    }
#else
    for (int i = 1; i < threads; ++i) workers_->emplace_back([this, i] { work(static_cast<std::size_t>(i)); });
#endif
  }

  ~ThreadPool() { stop(); }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const noexcept { return threads_; }

  /// Calls f(task, thread) for every task in [0, tasks) and returns when all are done; thread is in [0, threads()).
  /// The first exception that a task throws comes out of here, after the others have ended.
  template <class F>
  void run(std::size_t tasks, F&& f) {
    if (tasks == 0) return;
    const bool alone = tasks == 1 || threads_ == 1 || detail::inside_task() ||
                       born_ != detail::fork_generation().load(std::memory_order_relaxed);
    if (alone || !busy_.try_lock()) {
      for (std::size_t task = 0; task < tasks; ++task) f(task, std::size_t{0});
      return;
    }
    std::lock_guard<std::mutex> release(busy_, std::adopt_lock);
    using Function = std::remove_reference_t<F>;
    call_ = [](void* context, std::size_t task, std::size_t thread) {
      (*static_cast<Function*>(context))(task, thread);
    };
    context_ = const_cast<void*>(static_cast<const void*>(std::addressof(f)));
    tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    error_ = nullptr;
    const std::uint64_t generation = (gate_.load(std::memory_order_relaxed) >> 32) + 1;
    gate_.store(generation << 32 | open, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      { std::lock_guard<std::mutex> lock(sleep_mutex_); }
      wake_.notify_all();
    }
    take_tasks(0);
    // Whoever has not come yet need not come any more.
    gate_.fetch_and(~open, std::memory_order_acq_rel);
    for (unsigned spins = 0; (gate_.load(std::memory_order_acquire) & inside_mask) != 0; ++spins) {
      if (spins < spin_limit)
        detail::spin_pause();
      else
        std::this_thread::yield();
    }
#if NIBBLE_EXCEPTIONS
    if (error_) std::rethrow_exception(error_);
#endif
  }

 private:
  // The gate: generation in the high half, whether the job still admits workers, and how many are inside.
  static constexpr std::uint64_t open = std::uint64_t{1} << 31;
  static constexpr std::uint64_t inside_mask = open - 1;
  // About 50 microseconds: longer than what lies between two products of a decoder, shorter than anyone notices.
  static constexpr unsigned spin_limit = 2000;

  void take_tasks(std::size_t thread) noexcept {
    bool& inside = detail::inside_task();
    inside = true;
    for (;;) {
      const std::size_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) break;
#if NIBBLE_EXCEPTIONS
      try {
        call_(context_, task, thread);
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex_);
        if (!error_) error_ = std::current_exception();
      }
#else
      call_(context_, task, thread);
#endif
    }
    inside = false;
  }

  /// Waits for a job newer than `last` and enters it. False when the pool ends.
  bool enter(std::uint64_t& last) {
    for (unsigned spins = 0;; ++spins) {
      std::uint64_t gate = gate_.load(std::memory_order_acquire);
      while ((gate & open) != 0 && gate >> 32 != last) {
        if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
          last = gate >> 32;
          return true;
        }
      }
      if (stopping_.load(std::memory_order_acquire)) return false;
      if (spins < spin_limit) {
        detail::spin_pause();
        continue;
      }
      std::unique_lock<std::mutex> lock(sleep_mutex_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] {
        const std::uint64_t now = gate_.load(std::memory_order_seq_cst);
        return stopping_.load(std::memory_order_acquire) || ((now & open) != 0 && now >> 32 != last);
      });
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      spins = 0;
    }
  }

  void work(std::size_t thread) {
    const detail::FpEnvironment environment;
    std::uint64_t last = 0;
    while (enter(last)) {
      take_tasks(thread);
      gate_.fetch_sub(1, std::memory_order_release);
    }
  }

  void stop() {
    if (born_ != detail::fork_generation().load()) {
      // A child after fork: the threads are not there to be joined, so their handles are left alone.
      workers_.release();
      return;
    }
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      stopping_.store(true, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : *workers_) worker.join();
    workers_->clear();
  }

  int threads_ = 1;
  unsigned born_;
  std::unique_ptr<std::vector<std::thread>> workers_;
  std::mutex busy_;

  void (*call_)(void*, std::size_t, std::size_t) = nullptr;
  void* context_ = nullptr;
  std::size_t tasks_ = 0;
  std::mutex error_mutex_;
  std::exception_ptr error_;

  alignas(64) std::atomic<std::uint64_t> gate_{0};
  alignas(64) std::atomic<std::size_t> next_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

/// A pool of all the machine's cores, started by the first call and kept to the program's end.
inline ThreadPool& default_pool() {
  static ThreadPool pool;
  return pool;
}

namespace detail {

/// Calls f(task, thread) for all tasks: on the pool where there is one, else here.
template <class F>
void for_tasks(ThreadPool* pool, std::size_t tasks, F&& f) {
  if (pool != nullptr) {
    pool->run(tasks, f);
  } else {
    for (std::size_t task = 0; task < tasks; ++task) f(task, std::size_t{0});
  }
}

}  // namespace detail
}  // namespace NIBBLE_ABI
}  // namespace nibble
