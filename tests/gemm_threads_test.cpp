// The thread pool and products under threads: every task once, no deadlock, identical bits, no allocation.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <thread>

#include "gemm_support.hpp"
#include "nibble/gemm/matmul.hpp"

namespace {
std::atomic<long> allocations{0};
}

// Counting replacements: the hot path must not come here. GCC inlines one half of a pair and then takes free() for a
// mismatch.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
#endif
void* operator new(std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
void* operator new(std::size_t size, std::align_val_t align) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  const auto a = static_cast<std::size_t>(align);
  if (void* p = std::aligned_alloc(a, (size + a - 1) / a * a)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

using namespace gemm_test;
using Eigen::MatrixXf;
using nibble::MatmulOptions;
using nibble::PackedMatrix;
using nibble::ThreadPool;

TEST(ThreadPool, RunsEveryTaskOnce) {
  for (int threads : {1, 2, 3, 16}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (std::size_t tasks : {0, 1, 2, 5, 100}) {
      std::vector<std::atomic<int>> count(tasks);
      for (int round = 0; round < 50; ++round)
        pool.run(tasks, [&](std::size_t task, std::size_t thread) {
          ASSERT_LT(thread, static_cast<std::size_t>(threads));
          count[task].fetch_add(1);
        });
      for (auto& c : count) EXPECT_EQ(c.load(), 50);
    }
  }
}

TEST(ThreadPool, WorkersThatSleepWakeUp) {
  ThreadPool pool(2);
  for (int round = 0; round < 3; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // far beyond the spinning
    // Two tasks that wait for each other: only two threads can finish them.
    std::atomic<int> inside{0};
    pool.run(2, [&](std::size_t, std::size_t) {
      inside.fetch_add(1);
      while (inside.load() < 2) std::this_thread::yield();
    });
    EXPECT_EQ(inside.load(), 2);
  }
}

TEST(ThreadPool, NestedAndConcurrentRunsComplete) {
  ThreadPool pool(3);
  std::atomic<int> done{0};
  pool.run(8,
           [&](std::size_t, std::size_t) { pool.run(5, [&](std::size_t, std::size_t) { done.fetch_add(1); }); });
  EXPECT_EQ(done.load(), 40);
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) pool.run(4, [&](std::size_t, std::size_t) { done.fetch_add(1); });
    });
  for (std::thread& t : callers) t.join();
  EXPECT_EQ(done.load(), 40 + 4 * 200 * 4);
}

TEST(ThreadPool, AnExceptionComesOutAndThePoolLives) {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    EXPECT_THROW(pool.run(16,
                          [](std::size_t task, std::size_t) {
                            if (task == 7) throw nibble::Unsupported("seven");
                          }),
                 nibble::Unsupported);
    std::atomic<int> done{0};
    pool.run(16, [&](std::size_t, std::size_t) { done.fetch_add(1); });
    EXPECT_EQ(done.load(), 16);
  }
}

PackedMatrix some_weights() {
  return pack(
      random_quantized(scheme_of(Format::int4, Symmetry::symmetric, Granularity::per_group(32)), 200, 160, 1));
}

TEST(Threads, ManyCallersShareOneMatrixAndOnePool) {
  const PackedMatrix w = some_weights();
  const MatrixXf x = random_floats(160, 9, 2);
  MatrixXf expected(200, 9);
  nibble::matmul(w, x, expected);
  ThreadPool pool(2);
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&] {
      MatmulOptions options;
      options.pool = &pool;
      MatrixXf y(200, 9);
      for (int round = 0; round < 50; ++round) {
        y.setZero();
        nibble::matmul(w, x, y, options);
        if (bits(y) != bits(expected)) wrong.fetch_add(1);
      }
    });
  for (std::thread& t : callers) t.join();
  EXPECT_EQ(wrong.load(), 0);
}

#if !defined(__SANITIZE_THREAD__)  // TSan does not follow a threaded process through fork
TEST(Threads, AChildAfterForkWorksAlone) {
  const PackedMatrix w = some_weights();
  const MatrixXf x = random_floats(160, 9, 2);
  ThreadPool pool(2);
  MatmulOptions options;
  options.pool = &pool;
  MatrixXf expected(200, 9);
  nibble::matmul(w, x, expected, options);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(20);
    MatrixXf y(200, 9);
    nibble::matmul(w, x, y, options);
    _exit(bits(y) == bits(expected) ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif

TEST(Threads, TheHotPathAllocatesNothing) {
  ThreadPool pool(2);
  nibble::Workspace workspace;
  for (Format f : {Format::int4, Format::int8, Format::fp16, Format::nf4, Format::int3, Format::int6}) {
    const PackedMatrix w =
        pack(random_quantized(scheme_of(f, Symmetry::symmetric, Granularity::per_group(32)), 200, 160, 1));
    for (Eigen::Index m : {1, 3, 40}) {
      const MatrixXf x = random_floats(160, m, 2);
      MatrixXf y(200, m);
      MatmulOptions options;
      options.pool = &pool;
      options.workspace = &workspace;
      nibble::matmul(w, x, y, options);
      const long before = allocations.load();
      nibble::matmul(w, x, y, options);
      EXPECT_EQ(allocations.load(), before) << name_of(f) << " m " << m;
    }
  }
}

TEST(Threads, AFailedAllocationLeavesTheWorkspaceUsable) {
  nibble::Workspace workspace(128);
  EXPECT_ANY_THROW(workspace.reserve(std::size_t{1} << 62));
  EXPECT_EQ(workspace.capacity(), 128U);
  EXPECT_NE(workspace.take(64), nullptr);
}

}  // namespace
