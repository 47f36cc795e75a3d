// Decoding a token allocates nothing: every way to ask for memory is watched.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace {
std::atomic<bool> watching{false};
std::atomic<int> allocations{0};

void* allocate(std::size_t size, std::size_t alignment) {
  if (watching.load(std::memory_order_relaxed)) allocations.fetch_add(1);
  void* p = nullptr;
  if (::posix_memalign(&p, alignment < sizeof(void*) ? sizeof(void*) : alignment, size == 0 ? 1 : size) != 0)
    throw std::bad_alloc();
  return p;
}
}  // namespace

// GoogleTest's and the libraries' allocations come here too; they are counted only while a token is computed. Not
// inlined: GCC would then see malloc's memory given to delete and warn of it.
#define NOT_INLINED __attribute__((noinline))
NOT_INLINED void* operator new(std::size_t size) { return allocate(size, alignof(std::max_align_t)); }
NOT_INLINED void* operator new[](std::size_t size) { return allocate(size, alignof(std::max_align_t)); }
NOT_INLINED void* operator new(std::size_t size, std::align_val_t a) { return allocate(size, std::size_t(a)); }
NOT_INLINED void* operator new[](std::size_t size, std::align_val_t a) { return allocate(size, std::size_t(a)); }
NOT_INLINED void operator delete(void* p) noexcept { std::free(p); }
NOT_INLINED void operator delete[](void* p) noexcept { std::free(p); }
NOT_INLINED void operator delete(void* p, std::size_t) noexcept { std::free(p); }
NOT_INLINED void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
NOT_INLINED void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
NOT_INLINED void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
NOT_INLINED void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
NOT_INLINED void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

// Eigen calls malloc by itself; it tells of that when asked.
#define EIGEN_RUNTIME_NO_MALLOC
#undef eigen_assert
#define eigen_assert(x) \
  if (!(x)) allocations.fetch_add(1)
#include <Eigen/Core>

#include "llm/runner.hpp"
#include "llm_support.hpp"

namespace {

using nibble::Format;

void decode_without_allocating(Format format, int threads, nibble::KvFormat kv) {
  const llm_test::RandomModel m = llm_test::random_model(llm_test::scheme_of(format));
  nibble::ThreadPool pool(threads);
  llm::RunnerOptions options;
  options.context = 128;
  options.pool = threads > 1 ? &pool : nullptr;
  options.kv_format = kv;
  llm::Runner runner(m.model, options);
  auto cache = runner.new_cache();
  const std::vector<llm::Token> tokens = llm_test::some_tokens(120, m.model.hparams.vocabulary);
  // Workspaces grow to their size with the first tokens of every kind.
  runner.append(cache, tokens.data(), 60);
  for (std::size_t i = 60; i < 100; ++i) runner.append(cache, &tokens[i], 1);
  cache.truncate(60);
  allocations = 0;
  Eigen::internal::set_is_malloc_allowed(false);
  watching = true;
  for (std::size_t i = 60; i < 100; ++i) runner.append(cache, &tokens[i], 1);
  watching = false;
  Eigen::internal::set_is_malloc_allowed(true);
  EXPECT_EQ(allocations.load(), 0);
}

class Allocation : public ::testing::TestWithParam<std::pair<Format, int>> {};

TEST_P(Allocation, NoneInDecoding) {
  decode_without_allocating(GetParam().first, GetParam().second, nibble::KvFormat::fp16);
}

TEST(Allocation4Bits, NoneInDecoding) {
  for (const int threads : {1, 2}) decode_without_allocating(Format::int8, threads, nibble::KvFormat::int4);
}

INSTANTIATE_TEST_SUITE_P(Formats, Allocation,
                         ::testing::Values(std::pair{Format::fp32, 1}, std::pair{Format::int8, 1},
                                           std::pair{Format::int4, 1}, std::pair{Format::nf4, 1},
                                           std::pair{Format::int4, 2}, std::pair{Format::fp32, 2}));

TEST(Watch, SeesAllocations) {
  allocations = 0;
  watching = true;
  ::operator delete(::operator new(8));
  watching = false;
  EXPECT_EQ(allocations.load(), 1);
}

}  // namespace
