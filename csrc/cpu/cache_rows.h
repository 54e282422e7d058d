// Where the rows of a sequence's tokens lie in the caches: pages, slots, scales, quantised rows.
#pragma once

#include <algorithm>

#include "cpu/tiles/tile.h"

namespace lean::cpu {

// A run and what its pointers point to.
struct RunMemory {
  Run run;
  float k_scales[kRunTokens];
  float v_scales[kRunTokens];
};

class CacheRows {
 public:
  explicit CacheRows(const DecodeParams& p)
      : p_(p), k_scaled_(p.k_scale.per_token()), v_scaled_(p.v_scale.per_token()) {}

  // The run that begins at token `begin` of a sequence, and ends at `end` at the latest.
  void fill(RunMemory& memory, int64_t sequence, int64_t kv_head, int64_t begin, int64_t end) const {
    Run& run = memory.run;
    run.tokens = static_cast<int>(std::min<int64_t>(kRunTokens, end - begin));
    run.k_scales = k_scaled_ ? memory.k_scales : nullptr;
    run.v_scales = v_scaled_ ? memory.v_scales : nullptr;
    const int64_t size = element_size(p_.cache_dtype);
    int64_t index = begin / p_.block_size, slot = begin % p_.block_size;
    for (int i = 0; i < run.tokens; ++index, slot = 0) {
      const int64_t block = p_.given_block(sequence, kv_head, index);
      const int end_of_block = static_cast<int>(std::min<int64_t>(run.tokens, i + p_.block_size - slot));
      const char* k =
          static_cast<const char*>(p_.k_cache) +
          size * (block * p_.k_block_stride + slot * p_.k_token_stride + kv_head * p_.k_head_stride);
      const char* v =
          static_cast<const char*>(p_.v_cache) +
          size * (block * p_.v_block_stride + slot * p_.v_token_stride + kv_head * p_.v_head_stride);
      // A block in another memory page costs a walk of the page tables, about as long as it takes to multiply
      // its rows. Asked for here, a run's walks go on together and before its rows are wanted.
      __builtin_prefetch(k, 0, 2);
      __builtin_prefetch(v, 0, 2);
      for (; i < end_of_block; ++i, ++slot) {
        run.k_rows[i] = k;
        run.v_rows[i] = v;
        if (k_scaled_) memory.k_scales[i] = p_.k_scale.at(sequence, block, slot, kv_head);
        if (v_scaled_) memory.v_scales[i] = p_.v_scale.at(sequence, block, slot, kv_head);
        k += size * p_.k_token_stride;
        v += size * p_.v_token_stride;
      }
    }
    const int last = run.tokens - 1;
    std::fill(run.k_rows + run.tokens, run.k_rows + kRunTokens, run.k_rows[last]);
    std::fill(run.v_rows + run.tokens, run.v_rows + kRunTokens, run.v_rows[last]);
    if (k_scaled_) std::fill(memory.k_scales + run.tokens, memory.k_scales + kRunTokens, 1.0f);
    if (v_scaled_) std::fill(memory.v_scales + run.tokens, memory.v_scales + kRunTokens, 1.0f);
  }

 private:
  const DecodeParams& p_;
  const bool k_scaled_;
  const bool v_scaled_;
};

// Heads that a thread may take through the tokens abreast.
inline constexpr int64_t kMaxAbreast = 8;

// Tokens of neighbouring heads of a sequence.
struct Stretch {
  int64_t sequence;
  int64_t kv_head;
  int64_t heads;  // at most kMaxAbreast
  TokenSpan tokens;
};

// The runs of a stretch in order, those of all its heads at each place, and then the first of `upcoming`, if that
// has any tokens. It looks a place ahead, so that the next place's blocks are asked for early.
class RunQueue {
 public:
  RunQueue(const CacheRows& rows, const Stretch& stretch, const Stretch& upcoming)
      : rows_(rows), from_(stretch), upcoming_(upcoming), begin_(stretch.tokens.begin) {
    fill_next();
  }

  // To the first place, then from each to the next.
  void advance() {
    next_ ^= 1;
    fill_next();
  }

  // Both stay as they are until the next call of advance().
  const Run& run(int64_t head) const { return now().runs[head].run; }
  const Run* after(int64_t head) const {
    if (head + 1 < now().heads) return &now().runs[head + 1].run;
    return next().heads > 0 ? &next().runs[0].run : nullptr;
  }

 private:
  struct Place {
    int64_t heads = 0;
    RunMemory runs[kMaxAbreast];
  };
  const Place& now() const { return places_[next_ ^ 1]; }
  const Place& next() const { return places_[next_]; }

  void fill_next() {
    Place& place = places_[next_];
    place.heads = 0;
    if (begin_ >= from_.tokens.end) {
      from_ = upcoming_;
      begin_ = from_.tokens.begin;
      if (begin_ >= from_.tokens.end) return;
    }
    for (; place.heads < from_.heads; ++place.heads) {
      rows_.fill(place.runs[place.heads], from_.sequence, from_.kv_head + place.heads, begin_, from_.tokens.end);
    }
    begin_ += kRunTokens;
  }

  const CacheRows& rows_;
  Stretch from_;
  const Stretch upcoming_;
  int64_t begin_;
  Place places_[2];
  int next_ = 0;
};

// Converts the rows of a run to the dtype of q before they are multiplied: once for all query rows.
class WideRows {
 public:
  WideRows(const DecodeParams& p, const TileRoutine& routine, float* memory)
      : p_(p),
        routine_(routine),
        table_(p.cache_dtype == p.dtype ? nullptr : widening_table(p.cache_dtype, p.dtype)),
        k_(reinterpret_cast<char*>(memory)),
        v_(k_ + kRunTokens * p.head_dim * element_size(p.dtype)) {}

  static int64_t memory_floats(const DecodeParams& p) {
    return ceil_div(kRunTokens * (p.head_dim + p.head_dim_v) * element_size(p.dtype), sizeof(float));
  }

  // Valid until the next call. Prefetches `next`, if not null.
  const Run& widen(const Run& run, const Run* next) {
    wide_.tokens = run.tokens;
    wide_.k_scales = run.k_scales;
    wide_.v_scales = run.v_scales;
    const Run& ahead = next != nullptr ? *next : run;
    widen_rows(run.tokens, run.k_rows, ahead.k_rows, static_cast<int>(p_.head_dim), k_, wide_.k_rows);
    widen_rows(run.tokens, run.v_rows, ahead.v_rows, static_cast<int>(p_.head_dim_v), v_, wide_.v_rows);
    return wide_;
  }

 private:
  void widen_rows(int tokens, const void* const* from, const void* const* ahead, int columns, char* to,
                  const void** rows) const {
    const int64_t step = columns * element_size(p_.dtype);
    for (int i = 0; i < kRunTokens; ++i) {
      const char* row = static_cast<const char*>(ahead[i]);
      for (int column = 0; column < columns; column += 64) __builtin_prefetch(row + column, 0, 2);
      if (i < tokens) routine_.widen(p_.cache_dtype, table_, from[i], columns, to + i * step);
      rows[i] = to + std::min(i, tokens - 1) * step;
    }
  }

  const DecodeParams& p_;
  const TileRoutine& routine_;
  const uint16_t* const table_;
  char* const k_;
  char* const v_;
  Run wide_{};
};

}  // namespace lean::cpu
