// Keys and values of the tokens so far.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace llm {

/// Keys and values of one sequence, stored as `Element` (float, Eigen::half or Eigen::bfloat16).
///
/// For every layer and key-value head, keys lie transposed, [dimension][position], and values [position][dimension]:
/// both attention products then read their matrix along contiguous outputs, with no transposition at any context.
template <class Element = float>
class KvCache {
 public:
  using Matrix = Eigen::Matrix<Element, Eigen::Dynamic, Eigen::Dynamic>;
  using View = Eigen::Map<const Matrix, 0, Eigen::OuterStride<>>;

  KvCache(std::size_t layers, std::size_t heads, std::size_t head_size, std::size_t capacity)
      : heads_(heads), head_size_(head_size), capacity_(capacity) {
    // An odd number of cache lines: a power of two would put a key's dimensions into the same few cache sets.
    stride_ = (capacity + 15) / 16 * 16;
    if (stride_ % 32 == 0) stride_ += 16;
    plane_ = head_size_ * stride_;
    // calloc: pages that no token reaches cost no memory.
    keys_ = allocate(layers * heads * plane_);
    values_ = allocate(layers * heads * plane_);
  }

  std::size_t size() const { return size_; }
  std::size_t capacity() const { return capacity_; }
  void clear() { size_ = 0; }
  /// Drops the tokens from `size` on.
  void truncate(std::size_t size) { size_ = size < size_ ? size : size_; }

  /// Writes one token's heads * head_size keys and values of one layer. advance() makes the token count.
  void store(std::size_t layer, std::size_t position, const float* keys, const float* values) {
    if (position >= capacity_)
      throw std::runtime_error("the KV cache holds " + std::to_string(capacity_) + " tokens and is full");
    for (std::size_t h = 0; h < heads_; ++h) {
      Element* k = keys_.get() + (layer * heads_ + h) * plane_ + position;
      Element* v = values_.get() + (layer * heads_ + h) * plane_ + position * head_size_;
      for (std::size_t d = 0; d < head_size_; ++d) {
        k[d * stride_] = static_cast<Element>(keys[h * head_size_ + d]);
        v[d] = static_cast<Element>(values[h * head_size_ + d]);
      }
    }
  }
  void advance(std::size_t tokens) { size_ += tokens; }

  /// positions x head_size keys.
  View keys(std::size_t layer, std::size_t head, std::size_t positions) const {
    return View(keys_.get() + (layer * heads_ + head) * plane_, index(positions), index(head_size_),
                Eigen::OuterStride<>(index(stride_)));
  }
  /// head_size x positions values.
  View values(std::size_t layer, std::size_t head, std::size_t positions) const {
    return View(values_.get() + (layer * heads_ + head) * plane_, index(head_size_), index(positions),
                Eigen::OuterStride<>(index(head_size_)));
  }

 private:
  struct Free {
    void operator()(Element* p) const { std::free(p); }
  };
  using Memory = std::unique_ptr<Element[], Free>;

  static Eigen::Index index(std::size_t n) { return static_cast<Eigen::Index>(n); }
  static Memory allocate(std::size_t elements) {
    auto* memory = static_cast<Element*>(std::calloc(elements, sizeof(Element)));
    if (memory == nullptr) throw std::bad_alloc();
    return Memory(memory);
  }

  std::size_t heads_;
  std::size_t head_size_;
  std::size_t capacity_;
  std::size_t stride_ = 0;  // elements from one dimension's keys to the next's
  std::size_t plane_ = 0;   // elements of one layer and head
  std::size_t size_ = 0;
  Memory keys_;
  Memory values_;
};

}  // namespace llm
