// Perplexity by the convention of llama.cpp's tool: windows side by side, the second half of each is predicted.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "math.hpp"
#include "runner.hpp"

namespace llm {

struct PerplexityResult {
  std::size_t windows = 0;
  std::size_t predictions = 0;
  double negative_log_likelihood = 0.0;  // sum, natural logarithm

  double perplexity() const { return std::exp(negative_log_likelihood / static_cast<double>(predictions)); }
};

/// Windows of `context` tokens from the start of `tokens`, no beginning-of-sequence token: in each, positions
/// context/2 .. context-2 predict the tokens after them. Calls done(window result so far) after each window.
template <class R, class Done>
PerplexityResult perplexity(R& runner, const std::vector<Token>& tokens, std::size_t context, std::size_t windows,
                            nibble::ThreadPool* pool, Done&& done) {
  PerplexityResult result;
  auto cache = runner.new_cache();
  std::vector<double> loss(context);
  for (std::size_t w = 0; w < windows && (w + 1) * context <= tokens.size(); ++w) {
    const Token* window = tokens.data() + w * context;
    cache.clear();
    runner.append(cache, window, context - 1, context / 2, [&](std::size_t first, const auto& logits) {
      const auto columns = static_cast<std::size_t>(logits.cols());
      const auto column = [&](std::size_t c, std::size_t = 0) {
        const float* l = logits.col(static_cast<Eigen::Index>(c)).data();
        const auto n = static_cast<std::size_t>(logits.rows());
        loss[first + c] = log_sum_exp(l, n) - static_cast<double>(l[window[first + c + 1]]);
      };
      if (pool != nullptr)
        pool->run(columns, column);
      else
        for (std::size_t c = 0; c < columns; ++c) column(c);
    });
    // Added in order, so that the sum does not depend on threads.
    for (std::size_t i = context / 2; i + 1 < context; ++i) result.negative_log_likelihood += loss[i];
    result.predictions += context - 1 - context / 2;
    ++result.windows;
    done(result);
  }
  return result;
}

}  // namespace llm
