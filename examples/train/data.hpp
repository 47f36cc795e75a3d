// Windows of a text for training, and what a text costs a model in bits per byte.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "../llm/vocabulary.hpp"
#include "llama_trainer.hpp"
#include "nibble/core/error.hpp"
#include "nibble/train/dropout.hpp"

namespace llm {

/// Windows of a text in random order, every token once an epoch. Each epoch cuts the text at another place. What a step
/// sees is a function of the seed and the step alone: nothing has to be kept to go on later.
class TextWindows {
 public:
  /// @param bos  what one window in 16 begins with, moved to where a token `after` ends (a paragraph, say): so the model
  ///             learns to begin; no_token: none does
  TextWindows(std::vector<Token> tokens, std::size_t window, std::uint64_t seed, Token bos = no_token,
              Token after = no_token)
      : tokens_(std::move(tokens)), window_(window), seed_(seed), bos_(bos), after_(after) {
    nibble::detail::require(window_ > 0 && tokens_.size() >= 2 * window_ + 1, "the text has ", tokens_.size(),
                            " tokens, expected at least two windows of ", window_, " and one more");
    per_epoch_ = (tokens_.size() - 1) / window_ - 1;
  }

  std::size_t windows_per_epoch() const { return per_epoch_; }
  std::size_t tokens() const { return tokens_.size(); }

  /// The batch of step `step` (from 0 on) of `count` windows.
  TokenBatch batch(std::uint64_t step, std::size_t count) {
    TokenBatch b;
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint64_t number = step * count + i;
      const std::uint64_t epoch = number / per_epoch_;
      if (order_.empty() || epoch != epoch_) shuffle(epoch);
      append(order_[static_cast<std::size_t>(number % per_epoch_)], number, b);
    }
    return b;
  }

 private:
  std::uint64_t draw(std::uint64_t stream, std::uint64_t i) const {
    return nibble::detail::mix64(nibble::detail::mix64(nibble::detail::mix64(seed_) + stream) + i);
  }
  void shuffle(std::uint64_t epoch) {
    epoch_ = epoch;
    order_.resize(per_epoch_);
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    for (std::size_t i = per_epoch_; i > 1; --i)
      std::swap(order_[i - 1], order_[static_cast<std::size_t>(draw(2 * epoch + 2, i) % i)]);
    // Of what is left over when per_epoch_ windows are cut: between one and two windows.
    const std::size_t spare = tokens_.size() - 1 - per_epoch_ * window_;
    shift_ = static_cast<std::size_t>(draw(1, epoch) % (spare + 1));
  }
  void append(std::size_t index, std::uint64_t number, TokenBatch& b) const {
    std::size_t at = shift_ + index * window_;
    bool begins = false;
    if (bos_ != no_token && draw(0, number) % 16 == 0) {
      for (std::size_t i = at; i > 0 && at - i < 4 * window_ && !begins; --i)
        if (tokens_[i - 1] == after_) at = i, begins = true;
    }
    const auto from = [&](std::size_t i) { return tokens_.begin() + static_cast<std::ptrdiff_t>(i); };
    if (begins) {
      b.inputs.push_back(bos_);
      b.inputs.insert(b.inputs.end(), from(at), from(at + window_ - 1));
      b.targets.insert(b.targets.end(), from(at), from(at + window_));
    } else {
      b.inputs.insert(b.inputs.end(), from(at), from(at + window_));
      b.targets.insert(b.targets.end(), from(at + 1), from(at + window_ + 1));
    }
  }

  std::vector<Token> tokens_;
  std::size_t window_;
  std::uint64_t seed_;
  Token bos_, after_;
  std::size_t per_epoch_ = 0;
  std::uint64_t epoch_ = 0;
  std::size_t shift_ = 0;
  std::vector<std::size_t> order_;
};

/// What `tokens` cost, in nats and without dropout: every token once, the first predicted by `bos` (no_token: it is not
/// counted). Windows overlap by half, so that all but the text's first ones have at least half a window before them.
/// @param windows  at most so many, from the start of the text; 0: all
struct TextCost {
  double nats = 0.0;
  std::size_t tokens = 0;  // that were predicted: the text's first

  double per_token() const { return nats / static_cast<double>(tokens); }
  double bits(std::size_t bytes) const { return nats / std::log(2.0) / static_cast<double>(bytes); }
};
inline TextCost text_cost(LlamaTrainer& trainer, const std::vector<Token>& tokens, Token bos,
                          std::size_t windows = 0) {
  nibble::detail::require(tokens.size() > 1, "the text has ", tokens.size(), " tokens, expected at least 2");
  const std::size_t window = trainer.options().window, half = std::max<std::size_t>(window / 2, 1);
  std::vector<Token> stream;
  if (bos != no_token) stream.push_back(bos);
  stream.insert(stream.end(), tokens.begin(), tokens.end());
  TextCost cost;
  std::size_t scored = 1;  // stream[0 .. scored) are known or paid for
  for (std::size_t first = 0, done = 0; scored < stream.size() && (windows == 0 || done < windows);) {
    TokenBatch batch;
    for (std::size_t w = 0;
         w < trainer.options().windows_at_once && scored < stream.size() && (windows == 0 || done < windows);
         ++w, ++done, first += half)
      for (std::size_t i = first; i < first + window; ++i) {
        const bool within = i + 1 < stream.size();
        batch.inputs.push_back(i < stream.size() ? stream[i] : 0);
        const bool counts = within && i + 1 >= scored;
        batch.targets.push_back(counts ? stream[i + 1] : no_token);
        if (counts) ++cost.tokens;
        if (i + 1 == first + window) scored = first + window + 1;
      }
    for (const double l : trainer.losses(batch)) cost.nats += l;
  }
  return cost;
}

}  // namespace llm
