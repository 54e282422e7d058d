// Where the rows of a sequence's tokens lie in the caches: pages, slots, scales, quantised rows.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "cpu/tiles/tile.h"

namespace lean::cpu {

// A run and what its pointers point to.
struct RunMemory {
  Run run;
  float k_scales[kRunTokens];
  float v_scales[kRunTokens];
};

// Stands in for the rows of a run after its last token. (That token's own would not do: if it is infinite,
// its product with no weight is not 0.)
alignas(64) inline constexpr char kZeroRow[kMaxHeadDim * sizeof(float)] = {};

// Tokens of a run of quantised rows that are converted before they are multiplied. The next run is prefetched
// while these are converted, which takes less time than to read it: in two halves, more of the reading is
// left to the multiplication between them.
inline constexpr int kWideRunTokens = kRunTokens / 2;

// Tokens of a head whose memory pages are touched at once.
inline constexpr int64_t kTouchTokens = 512;

// Heads that a thread may take through the tokens abreast.
inline constexpr int64_t kMaxAbreast = 8;

// Tokens of neighbouring heads of a sequence.
struct Stretch {
  int64_t sequence;
  int64_t kv_head;
  int64_t heads;  // at most kMaxAbreast
  TokenSpan tokens;
};

class CacheRows {
 public:
  CacheRows(const DecodeParams& p, int run_tokens)
      : p_(p), run_tokens_(run_tokens), k_scaled_(p.k_scale.per_token()), v_scaled_(p.v_scale.per_token()) {}

  // Tokens of all runs but the last of a stretch.
  int run_tokens() const { return run_tokens_; }

  // Asks for a line in each memory page of a stretch. The first access to a page costs a walk of the page
  // tables, for which a core waits, prefetch or not: some 400 cycles on a virtual machine, in which it
  // multiplies 4 KB of bf16 at group 4. Many walks at once go on together. (Always inline, as `prefetch` is.)
  __attribute__((always_inline)) void touch(const Stretch& stretch) const {
    const int64_t size = element_size(p_.cache_dtype);
    const int64_t head_bytes = size * std::max(std::abs(p_.k_head_stride), std::abs(p_.v_head_stride));
    const bool share_pages = p_.table_head_stride == 0 && head_bytes * stretch.heads <= kPageBytes;
    for (int64_t head = 0; head < (share_pages ? 1 : stretch.heads); ++head) {
      by_block(stretch.sequence, stretch.kv_head + head, stretch.tokens,
               [&](const Piece& piece) __attribute__((always_inline)) {
                 touch_rows(piece.k, size * p_.k_token_stride, piece.tokens);
                 touch_rows(piece.v, size * p_.v_token_stride, piece.tokens);
               });
    }
  }

  // The run that begins at token `begin` of a sequence, and ends at `end` at the latest.
  void fill(RunMemory& memory, int64_t sequence, int64_t kv_head, int64_t begin, int64_t end) const {
    Run& run = memory.run;
    run.tokens = static_cast<int>(std::min<int64_t>(run_tokens_, end - begin));
    run.k_scales = k_scaled_ ? memory.k_scales : nullptr;
    run.v_scales = v_scaled_ ? memory.v_scales : nullptr;
    const int64_t k_stride = element_size(p_.cache_dtype) * p_.k_token_stride;
    const int64_t v_stride = element_size(p_.cache_dtype) * p_.v_token_stride;
    int i = 0;
    by_block(sequence, kv_head, {begin, begin + run.tokens}, [&](const Piece& piece) {
      const auto copy_scales = [&](const Scales& scales, float* to) {
        const float* from = scales.address(sequence, piece.block, piece.slot, kv_head);
        for (int64_t j = 0; j < piece.tokens; ++j) to[i + j] = from[j * scales.token_stride];
      };
      if (k_scaled_) copy_scales(p_.k_scale, memory.k_scales);
      if (v_scaled_) copy_scales(p_.v_scale, memory.v_scales);
      const char *k = piece.k, *v = piece.v;
      for (const int end_of_piece = i + static_cast<int>(piece.tokens); i < end_of_piece; ++i) {
        run.k_rows[i] = k;
        run.v_rows[i] = v;
        k += k_stride;
        v += v_stride;
      }
    });
    std::fill(run.k_rows + run.tokens, run.k_rows + kRunTokens, kZeroRow);
    std::fill(run.v_rows + run.tokens, run.v_rows + kRunTokens, kZeroRow);
    if (k_scaled_) std::fill(memory.k_scales + run.tokens, memory.k_scales + kRunTokens, 1.0f);
    if (v_scaled_) std::fill(memory.v_scales + run.tokens, memory.v_scales + kRunTokens, 1.0f);
  }

 private:
  static constexpr int64_t kPageBytes = 4096;

  // Tokens of a sequence that lie in one block, from slot `slot` on, and their first rows.
  struct Piece {
    int64_t block;
    int64_t slot;
    int64_t tokens;
    const char* k;
    const char* v;
  };
  template <class Take>
  __attribute__((always_inline)) void by_block(int64_t sequence, int64_t kv_head, TokenSpan tokens,
                                               const Take& take) const {
    const int64_t size = element_size(p_.cache_dtype);
    int64_t index = tokens.begin / p_.block_size, slot = tokens.begin % p_.block_size;
    for (int64_t begin = tokens.begin; begin < tokens.end; ++index, slot = 0) {
      const int64_t block = p_.given_block(sequence, kv_head, index);
      const int64_t count = std::min(tokens.end - begin, p_.block_size - slot);
      take(Piece{
          block, slot, count,
          static_cast<const char*>(p_.k_cache) +
              size * (block * p_.k_block_stride + slot * p_.k_token_stride + kv_head * p_.k_head_stride),
          static_cast<const char*>(p_.v_cache) +
              size * (block * p_.v_block_stride + slot * p_.v_token_stride + kv_head * p_.v_head_stride)});
      begin += count;
    }
  }

  // Asks for a line in each memory page of `count` rows.
  __attribute__((always_inline)) static void touch_rows(const char* row, int64_t stride, int64_t count) {
    const int64_t step = stride == 0 ? count : std::max<int64_t>(kPageBytes / std::abs(stride), 1);
    for (int64_t i = 0; i < count; i += step) __builtin_prefetch(row + i * stride, 0, 2);
    __builtin_prefetch(row + (count - 1) * stride, 0, 2);  // where the first row is not a page's first
  }

  const DecodeParams& p_;
  const int run_tokens_;
  const bool k_scaled_;
  const bool v_scaled_;
};

// The runs of a stretch in order, those of all its heads at each place, and then the first of `upcoming`, if
// that has any tokens. It looks a place ahead, so that memory pages are touched before their rows are asked
// for.
class RunQueue {
 public:
  RunQueue(const CacheRows& rows, const Stretch& stretch, const Stretch& upcoming)
      : rows_(rows), from_(stretch), upcoming_(upcoming), begin_(stretch.tokens.begin), touched_(begin_) {
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
      touched_ = begin_ = from_.tokens.begin;
      if (begin_ >= from_.tokens.end) return;
    }
    if (begin_ >= touched_) {
      touched_ = std::min(begin_ + kTouchTokens, from_.tokens.end);
      rows_.touch({from_.sequence, from_.kv_head, from_.heads, {begin_, touched_}});
    }
    for (; place.heads < from_.heads; ++place.heads) {
      rows_.fill(place.runs[place.heads], from_.sequence, from_.kv_head + place.heads, begin_,
                 from_.tokens.end);
    }
    begin_ += rows_.run_tokens();
  }

  const CacheRows& rows_;
  Stretch from_;
  const Stretch upcoming_;
  int64_t begin_;
  int64_t touched_;  // tokens before this one
  Place places_[2];
  int next_ = 0;
};

// Converts the rows of a run to the routine's dtype before they are multiplied: once for all query rows.
class WideRows {
 public:
  WideRows(const DecodeParams& p, const TileRoutine& routine, const WideningTable* table, float* memory)
      : p_(p),
        routine_(routine),
        table_(table),
        k_(reinterpret_cast<char*>(memory)),
        v_(k_ + kWideRunTokens * p.head_dim * element_size(routine.row_dtype)) {}

  static int64_t memory_floats(const DecodeParams& p, const TileRoutine& routine) {
    return ceil_div(kWideRunTokens * (p.head_dim + p.head_dim_v) * element_size(routine.row_dtype),
                    sizeof(float));
  }

  // Valid until the next call. Prefetches `next`, if not null.
  const Run& widen(const Run& run, const Run* next) {
    wide_.tokens = run.tokens;
    wide_.k_scales = run.k_scales;
    wide_.v_scales = run.v_scales;
    widen_rows(run.tokens, run.k_rows, next ? next->k_rows : nullptr, p_.head_dim, k_, wide_.k_rows);
    widen_rows(run.tokens, run.v_rows, next ? next->v_rows : nullptr, p_.head_dim_v, v_, wide_.v_rows);
    return wide_;
  }

 private:
  void widen_rows(int count, const void* const* from, const void* const* next, int64_t columns, char* to,
                  const void** rows) const {
    routine_.widen(p_.cache_dtype, *table_, from, count, static_cast<int>(columns), to, next);
    const int64_t step = columns * element_size(routine_.row_dtype);
    for (int i = 0; i < kRunTokens; ++i) rows[i] = i < count ? to + i * step : kZeroRow;
  }

  const DecodeParams& p_;
  const TileRoutine& routine_;
  const WideningTable* const table_;
  char* const k_;
  char* const v_;
  Run wide_{};
};

}  // namespace lean::cpu
