// Where the rows of a sequence's tokens lie in the caches: pages, slots, scales, quantised rows.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "cpu/core_caches.h"
#include "cpu/tiles/tile.h"

namespace lean::cpu {

// Stands in for the rows of a run after its last token. (That token's own would not do: if it is infinite,
// its product with no weight is not 0.)
alignas(64) inline constexpr char kZeroRow[kMaxHeadDim * sizeof(float)] = {};

// Tokens of a short run: of several heads with long rows, or of quantised rows that are converted before they
// are multiplied. The next run of these is prefetched while they are converted, which takes less time than to
// read it: in two halves, more of the reading is left to the multiplication between them.
inline constexpr int kShortRunTokens = kRunTokens / 2;

// Tokens of a head whose memory pages are touched at once: many where rows are read through the second cache
// level, while a core that reads them through the first has fewer places for it.
inline int64_t touch_tokens() {
  return reads_through_first_level() ? kRunTokens : 512;
}

// Heads that a thread may take through the tokens abreast: many, so that it reads whole tokens, but of pages
// that are stored head by head fewer, whose pieces are long enough.
inline constexpr int64_t kMaxAbreast = 32;
inline constexpr int64_t kMaxAbreastInPages = 8;

// Tokens of neighbouring heads of a sequence.
struct Stretch {
  int64_t sequence;
  int64_t kv_head;
  int64_t heads;  // at most kMaxAbreast
  TokenSpan tokens;
};

// Of a cache.
enum Side { kKeys, kValues };

class CacheRows {
 public:
  explicit CacheRows(const DecodeParams& p)
      : p_(p),
        row_bytes_{element_size(p.cache_dtype) * p.head_dim, element_size(p.cache_dtype) * p.head_dim_v},
        head_bytes_{element_size(p.cache_dtype) * p.k_head_stride,
                    element_size(p.cache_dtype) * p.v_head_stride},
        scaled_{p.k_scale.per_token(), p.v_scale.per_token()} {}

  int64_t row_bytes(Side side) const { return row_bytes_[side]; }
  // From a token's row to that of the next head.
  int64_t head_bytes(Side side) const { return head_bytes_[side]; }
  // Whether a head's rows lie apart at distances that hardware prefetchers follow: they compare addresses
  // within memory pages, where every other row of those at multiples of half a page seems to be the same.
  bool rows_attract_prefetchers() const {
    const auto attract = [&](Side side, int64_t token_stride) {
      const int64_t distance = element_size(p_.cache_dtype) * token_stride;
      return distance != row_bytes(side) && (p_.block_table != nullptr || 2 * distance % kPageBytes != 0);
    };
    return attract(kKeys, p_.k_token_stride) || attract(kValues, p_.v_token_stride);
  }
  // Whether what rows are multiplied by differs between tokens.
  bool scaled(Side side) const { return scaled_[side]; }

  // Asks for a line in each memory page of a stretch. The first access to a page costs a walk of the page
  // tables, for which a core waits, prefetch or not: some 400 cycles on a virtual machine, in which it
  // multiplies 4 KB of bf16 at group 4. Many walks at once go on together. (Always inline, as `prefetch` is.)
  __attribute__((always_inline)) void touch(const Stretch& stretch) const {
    const int64_t size = element_size(p_.cache_dtype);
    const int64_t step = std::max(std::abs(head_bytes(kKeys)), std::abs(head_bytes(kValues)));
    const bool share_pages = step * stretch.heads <= kPageBytes;
    for (int64_t head = 0; head < (share_pages ? 1 : stretch.heads); ++head) {
      by_block(stretch.sequence, stretch.kv_head + head, stretch.tokens,
               [&](const Piece& piece) __attribute__((always_inline)) {
                 touch_rows(piece.k, size * p_.k_token_stride, piece.tokens);
                 touch_rows(piece.v, size * p_.v_token_stride, piece.tokens);
               });
    }
  }

  // The rows of a stretch's first head. It is kRunTokens long at most.
  void fill_rows(Run& run, const Stretch& stretch) const {
    run.tokens = static_cast<int>(stretch.tokens.end - stretch.tokens.begin);
    run.k_scales = run.v_scales = nullptr;
    const int64_t k_stride = element_size(p_.cache_dtype) * p_.k_token_stride;
    const int64_t v_stride = element_size(p_.cache_dtype) * p_.v_token_stride;
    int i = 0;
    by_block(stretch.sequence, stretch.kv_head, stretch.tokens, [&](const Piece& piece) {
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
  }

  // The scales of a stretch's tokens, for the head that is `head` after its first; 1 behind the last.
  void fill_scales(Side side, float (&to)[kRunTokens], const Stretch& stretch, int64_t head) const {
    float* at = to;
    by_block(stretch.sequence, stretch.kv_head + head, stretch.tokens, [&](const Piece& piece) {
      const float* from =
          scales(side).address(stretch.sequence, piece.block, piece.slot, stretch.kv_head + head);
      for (int64_t i = 0; i < piece.tokens; ++i) *at++ = from[i * scales(side).token_stride];
    });
    std::fill(at, to + kRunTokens, 1.0f);
  }

 private:
  static constexpr int64_t kPageBytes = 4096;  // of memory

  const Scales& scales(Side side) const { return side == kKeys ? p_.k_scale : p_.v_scale; }

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
  const int64_t row_bytes_[2];
  const int64_t head_bytes_[2];
  const bool scaled_[2];
};

// The runs of a stretch in order, those of all its heads at each place, and then the first of what
// `upcoming()` says at the last of them, if that has any tokens. It looks a place ahead, so that memory pages
// are touched before their rows are asked for.
template <class Upcoming>
class RunQueue {
 public:
  // In runs of `run_tokens`, but the last of a stretch. With `joins_rows` those that adjoin, of heads abreast
  // too, are asked for together.
  RunQueue(const CacheRows& rows, int run_tokens, bool joins_rows, const Stretch& stretch,
           const Upcoming& upcoming)
      : rows_(rows),
        run_tokens_(run_tokens),
        joins_rows_(joins_rows),
        whole_tokens_(joins_rows && rows.head_bytes(kKeys) == rows.row_bytes(kKeys) &&
                      rows.head_bytes(kValues) == rows.row_bytes(kValues)),
        shuffles_(stretch.heads > 1 && rows.rows_attract_prefetchers()),
        from_(stretch),
        upcoming_(upcoming),
        begin_(stretch.tokens.begin),
        touched_(begin_) {
    fill_next();
  }

  // To the first place, then from each to the next. With `in_order` its run has the tokens in order.
  void advance(bool in_order) {
    next_ ^= 1;
    now().shuffled = shuffles_ && !in_order && now().run.tokens == run_tokens_;
    fill_next();
  }

  // Whether the heads of a token are neighbours, in both caches.
  bool has_whole_tokens() const { return from_.heads > 1 && whole_tokens_; }

  // The run with this side of a head; the other side is another head's, maybe. It stays until the next call
  // for the side.
  const Run& run(Side side, int64_t head) {
    Place& place = now();
    if (head == 0 && place.shuffled) shuffle(rows_of(place.run, side));
    move(place, side, head);
    if (rows_.scaled(side)) {
      rows_.fill_scales(side, scales_[side], place.at, head);
      if (place.shuffled) shuffle(scales_[side]);
      (side == kKeys ? place.run.k_scales : place.run.v_scales) = scales_[side];
    }
    return place.run;
  }

  // What to prefetch while that is multiplied: the same side a run ahead, where the second level has room for
  // it. Through the first level, what comes next: after K of all heads their V.
  RowsAhead ahead(Side side, int64_t head) {
    if (!first_level_) return ahead_in(next(), side, head);
    return side == kKeys ? ahead_in(now(), kValues, head) : ahead_in(next(), kKeys, head);
  }

 private:
  struct Place {
    Stretch at{};
    Run run;
    int64_t head[2];  // of `at`, whose K and whose V the run has
    bool shuffled;
  };
  Place& now() { return places_[next_ ^ 1]; }
  Place& next() { return places_[next_]; }

  static const void** rows_of(Run& run, Side side) { return side == kKeys ? run.k_rows : run.v_rows; }

  // Takes a run's tokens in an order that no prefetcher follows. Those that follow heads' rows fetch what
  // comes after the run, before it is asked for, piece by piece and in the way of what is.
  template <class T>
  void shuffle(T* of_tokens) const {
    for (int i = 1, j = 0; i < run_tokens_; ++i) {  // j is i with its bits reversed
      int bit = run_tokens_ / 2;
      for (; j & bit; bit /= 2) j ^= bit;
      j ^= bit;
      if (i < j) std::swap(of_tokens[i], of_tokens[j]);
    }
  }

  void move(Place& place, Side side, int64_t head) const {
    if (head == place.head[side]) return;
    const int64_t bytes = (head - place.head[side]) * rows_.head_bytes(side);
    const void** rows = rows_of(place.run, side);
    const int tokens = place.run.tokens;  // which the compiler could not tell from a row
    for (int i = 0; i < tokens; ++i) rows[i] = static_cast<const char*>(rows[i]) + bytes;
    place.head[side] = head;
  }

  // What one of a place's heads asks for: its own rows, or, of whole tokens, as many of all heads' in the
  // order of their addresses. Rows that adjoin are one long row.
  RowsAhead ahead_in(Place& place, Side side, int64_t head) const {
    if (head >= place.at.heads) return {};
    move(place, side, whole_tokens_ ? 0 : head);
    const void* const* rows = rows_of(place.run, side);
    const int bytes = static_cast<int>(rows_.row_bytes(side) * (whole_tokens_ ? place.at.heads : 1));
    const int begin = whole_tokens_ ? static_cast<int>(head * run_tokens_ * rows_.row_bytes(side)) : 0;
    const int count = place.run.tokens;
    const bool adjoin =
        joins_rows_ && static_cast<const char*>(rows[count - 1]) - static_cast<const char*>(rows[0]) ==
                           int64_t{count - 1} * bytes;
    return {rows, adjoin ? 1 : count, adjoin ? count * bytes : bytes, begin, first_level_ ? 1 : 2};
  }

  void fill_next() {
    Place& place = places_[next_];
    place.at.heads = 0;
    if (begin_ >= from_.tokens.end) {
      from_ = upcoming_();
      touched_ = begin_ = from_.tokens.begin;
      if (begin_ >= from_.tokens.end) return;
    }
    if (begin_ >= touched_) {
      touched_ = std::min(begin_ + touch_tokens_, from_.tokens.end);
      rows_.touch({from_.sequence, from_.kv_head, from_.heads, {begin_, touched_}});
    }
    place.at = {from_.sequence,
                from_.kv_head,
                from_.heads,
                {begin_, std::min(begin_ + run_tokens_, from_.tokens.end)}};
    rows_.fill_rows(place.run, place.at);
    place.head[kKeys] = place.head[kValues] = 0;
    begin_ += run_tokens_;
  }

  const CacheRows& rows_;
  const int run_tokens_;
  const bool joins_rows_;
  const bool whole_tokens_;
  const bool shuffles_;
  const bool first_level_ = reads_through_first_level();
  const int64_t touch_tokens_ = touch_tokens();
  Stretch from_;
  const Upcoming& upcoming_;
  int64_t begin_;
  int64_t touched_;  // tokens before this one
  Place places_[2];
  float scales_[2][kRunTokens];
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
        v_(k_ + kShortRunTokens * p.head_dim * element_size(routine.row_dtype)) {}

  // Whether a routine has rows converted. `table` is null where caches have q's dtype.
  static bool are_needed(const TileRoutine& routine, const WideningTable* table) {
    return table != nullptr && routine.widen != nullptr;
  }

  static int64_t memory_floats(const DecodeParams& p, const TileRoutine& routine) {
    return ceil_div(kShortRunTokens * (p.head_dim + p.head_dim_v) * element_size(routine.row_dtype),
                    sizeof(float));
  }

  // The run with one side converted, until that is converted again. Prefetches what is ahead.
  const Run& widen(Side side, const Run& run, const RowsAhead& ahead) {
    wide_.tokens = run.tokens;
    (side == kKeys ? wide_.k_scales : wide_.v_scales) = side == kKeys ? run.k_scales : run.v_scales;
    char* const to = side == kKeys ? k_ : v_;
    const int64_t columns = side == kKeys ? p_.head_dim : p_.head_dim_v;
    routine_.widen(p_.cache_dtype, *table_, side == kKeys ? run.k_rows : run.v_rows, run.tokens,
                   static_cast<int>(columns), to, ahead);
    const void** rows = side == kKeys ? wide_.k_rows : wide_.v_rows;
    const int64_t step = columns * element_size(routine_.row_dtype);
    for (int i = 0; i < kRunTokens; ++i) rows[i] = i < run.tokens ? to + i * step : kZeroRow;
    return wide_;
  }

 private:
  const DecodeParams& p_;
  const TileRoutine& routine_;
  const WideningTable* const table_;
  char* const k_;
  char* const v_;
  Run wide_{};
};

}  // namespace lean::cpu
