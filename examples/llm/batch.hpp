// Many sequences decoded together: they share every read of the weights, and join and leave at any step.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "runner.hpp"
#include "sampler.hpp"

namespace llm {

struct BatchOptions {
  std::size_t sequences = 16;      // that run at once; others wait
  std::size_t prompt_tokens = 64;  // of prompts that a step takes beside sequences that decode
};

/// What one sequence is asked to say.
struct BatchRequest {
  std::vector<Token> prompt;
  std::size_t tokens = 128;  // at most
  SamplerOptions sampler;
};

/// A scheduler: submit() requests at any time and call step() until it returns false. A sequence says what it would say
/// alone, whoever runs beside it. One thread at a time may use it; the runner is its own meanwhile.
class Batch {
 public:
  using Id = std::size_t;

  /// `ends`: true for the tokens after which a sequence has nothing more to say. `vocabulary`: tokens to sample from.
  Batch(Runner& runner, std::size_t vocabulary, std::function<bool(Token)> ends, const BatchOptions& options = {})
      : runner_(runner), vocabulary_(vocabulary), ends_(std::move(ends)), options_(options) {
    if (options.sequences < 1 || options.sequences > runner.max_pieces() || options.prompt_tokens < 1)
      throw std::runtime_error("a batch runs 1 to " + std::to_string(runner.max_pieces()) + " sequences, not " +
                               std::to_string(options.sequences));
    slots_.resize(options.sequences);
  }

  /// Throws where the prompt is empty or does not fit the runner's context together with the answer.
  Id submit(BatchRequest request) {
    if (request.prompt.empty()) throw std::runtime_error("the prompt is empty");
    if (request.prompt.size() + request.tokens > runner_.options().context)
      throw std::runtime_error("a prompt of " + std::to_string(request.prompt.size()) + " tokens and " +
                               std::to_string(request.tokens) + " more do not fit a context of " +
                               std::to_string(runner_.options().context));
    sequences_.push_back(std::make_unique<Sequence>(std::move(request)));
    Sequence& s = *sequences_.back();
    s.done = s.request.tokens == 0;
    return sequences_.size() - 1;
  }

  /// Takes a sequence out; what it has said so far stays.
  void cancel(Id id) { at(id).done = true; }

  bool done(Id id) const { return at(id).done; }
  /// What a sequence has said so far.
  const std::vector<Token>& tokens(Id id) const { return at(id).said; }
  /// True where its last word was one that ends a text.
  bool ended(Id id) const { return at(id).ended; }
  /// Sequences that run, those that still read their prompt included.
  std::size_t running() const {
    return static_cast<std::size_t>(
        std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.sequence != nullptr; }));
  }

  /// One token more for each sequence that decodes, a piece of their prompts for others. False when all are done.
  bool step() {
    leave_and_join();
    pieces_.clear();
    sampled_.clear();
    std::size_t decoding = 0;
    for (const Slot& slot : slots_)
      if (slot.sequence != nullptr && slot.sequence->decodes()) {
        add_piece(slot, &slot.sequence->said.back(), 1);
        ++decoding;
      }
    std::size_t room = runner_.options().block - decoding;
    if (decoding > 0) room = std::min(room, options_.prompt_tokens);
    // The one that came first is served first: it then says its first word soonest.
    std::vector<const Slot*> reading;
    for (const Slot& slot : slots_)
      if (slot.sequence != nullptr && !slot.sequence->decodes()) reading.push_back(&slot);
    std::sort(reading.begin(), reading.end(), [](const Slot* a, const Slot* b) { return a->id < b->id; });
    for (const Slot* slot : reading) {
      Sequence& s = *slot->sequence;
      const std::size_t n = std::min(room, s.request.prompt.size() - s.read);
      if (n == 0) break;
      add_piece(*slot, s.request.prompt.data() + s.read, n);
      s.read += n;
      room -= n;
    }
    if (pieces_.empty()) return false;
    for (std::size_t p = 0; p < pieces_.size(); ++p) {
      pieces_[p].wants_logits = owners_[p]->read == owners_[p]->request.prompt.size();
      if (pieces_[p].wants_logits) sampled_.push_back(owners_[p]);
    }
    const Runner::Logits logits = runner_.append(pieces_.data(), pieces_.size());
    ProfileClock clock(runner_.options().profile);
    nibble::detail::for_tasks(runner_.options().pool, sampled_.size(), [&](std::size_t i, std::size_t) {
      say(*sampled_[i], logits.col(static_cast<Eigen::Index>(i)).data());
    });
    clock.lap(Operation::sampling, {sizeof(float) * static_cast<double>(logits.size()), 0.0, 0.0});
    return true;
  }

 private:
  struct Sequence {
    explicit Sequence(BatchRequest r) : request(std::move(r)), sampler(request.sampler) {}
    bool decodes() const { return !said.empty(); }

    BatchRequest request;
    Sampler sampler;
    std::size_t read = 0;  // tokens of the prompt that are in the cache
    std::vector<Token> said;
    bool done = false;
    bool ended = false;
  };
  /// A cache and who uses it.
  struct Slot {
    std::unique_ptr<nibble::KvCache> cache;
    Sequence* sequence = nullptr;
    Id id = 0;
  };

  Sequence& at(Id id) const {
    if (id >= sequences_.size()) throw std::runtime_error("there is no sequence " + std::to_string(id));
    return *sequences_[id];
  }

  void leave_and_join() {
    for (Slot& slot : slots_) {
      if (slot.sequence != nullptr && slot.sequence->done) slot.sequence = nullptr;
      while (slot.sequence == nullptr && next_ < sequences_.size()) {
        Sequence& s = *sequences_[next_];
        const Id id = next_++;
        if (s.done) continue;
        if (slot.cache == nullptr) slot.cache = std::make_unique<nibble::KvCache>(runner_.new_cache());
        slot.cache->clear();
        slot.sequence = &s;
        slot.id = id;
      }
    }
  }

  void add_piece(const Slot& slot, const Token* tokens, std::size_t count) {
    if (pieces_.empty()) owners_.clear();
    pieces_.push_back({slot.cache.get(), tokens, count, false});
    owners_.push_back(slot.sequence);
  }

  void say(Sequence& s, const float* logits) const {
    const Token token = s.sampler.sample(logits, vocabulary_);
    s.ended = ends_(token);
    if (!s.ended) s.said.push_back(token);
    s.done = s.ended || s.said.size() == s.request.tokens;
  }

  Runner& runner_;
  std::size_t vocabulary_;
  std::function<bool(Token)> ends_;
  BatchOptions options_;
  std::vector<std::unique_ptr<Sequence>> sequences_;  // by id
  std::size_t next_ = 0;                              // the first that waits
  std::vector<Slot> slots_;
  std::vector<Piece> pieces_;       // of the step
  std::vector<Sequence*> owners_;   // whose they are
  std::vector<Sequence*> sampled_;  // those that say a word at its end
};

}  // namespace llm
