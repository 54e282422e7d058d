// Reads the caches: where the rows of tokens lie (pages, slots, scales), in which order a thread takes them,
// what it prefetches meanwhile, and the conversion of quantised rows.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "cpu/core_caches.h"
#include "cpu/kernels/tile_kernel.h"

namespace lean::cpu {

// This row stands in for those of a run after its last token. (That token's own would not do: if it is
// infinite, its product with no weight is not 0.)
alignas(64) inline constexpr char kZeroRow[kMaxHeadDim * sizeof(float)] = {};

// A run is this short where several heads with long rows are read in one pass, or quantised rows are
// dequantised before they are multiplied. The next run of those is prefetched meanwhile, and dequantising
// takes less time than reading: in two halves, more of the reading is left to the multiplication between
// them.
inline constexpr int kShortRunTokens = kRunTokens / 2;

// How many tokens of a head have their memory pages touched at once: many where rows are prefetched into L2;
// a core that prefetches them into L1 has fewer places for it.
inline int64_t touch_tokens() {
  return prefetches_into_l1() ? kRunTokens : 512;
}

// The most heads that a thread takes in one pass: many where whole tokens are contiguous (NHD), fewer in
// pages that are stored head by head (HND), whose pieces are long enough.
inline constexpr int64_t kMaxHeadsPerPass = 32;
inline constexpr int64_t kMaxHeadsPerPassInPages = 8;

// The same tokens of neighbouring heads of a sequence.
struct TokenRange {
  int64_t sequence;
  int64_t kv_head;
  int64_t heads;  // at most kMaxHeadsPerPass
  TokenSpan tokens;
};

// Which of the two caches is meant.
enum Side { kKeys, kValues };

class PageWalk {
 public:
  explicit PageWalk(const DecodeParams& p)
      : p_(p),
        row_bytes_{element_size(p.cache_dtype) * p.head_dim, element_size(p.cache_dtype) * p.head_dim_v},
        head_bytes_{element_size(p.cache_dtype) * p.k_head_stride,
                    element_size(p.cache_dtype) * p.v_head_stride},
        scaled_{p.k_scale.per_token(), p.v_scale.per_token()} {}

  int64_t row_bytes(Side side) const { return row_bytes_[side]; }
  // The distance from a token's row to that of the next head.
  int64_t head_bytes(Side side) const { return head_bytes_[side]; }
  // Hardware prefetchers follow rows of a head that lie apart at some distances: they compare addresses
  // within memory pages, where every other row of those at multiples of half a page seems to be the same.
  bool rows_attract_prefetchers() const {
    const auto attract = [&](Side side, int64_t token_stride) {
      const int64_t distance = element_size(p_.cache_dtype) * token_stride;
      return distance != row_bytes(side) && (p_.block_table != nullptr || 2 * distance % kPageBytes != 0);
    };
    return attract(kKeys, p_.k_token_stride) || attract(kValues, p_.v_token_stride);
  }
  // Rows of this cache have scales that differ between tokens.
  bool scaled(Side side) const { return scaled_[side]; }

  // Prefetches a line in each memory page of a range. The first access to a page costs a walk of the page
  // tables, for which a core waits, prefetch or not: some 400 cycles on a virtual machine, in which it
  // multiplies 4 KB of bf16 with 4 query heads per KV head. Walks that begin together overlap; one by one
  // each would cost that much. (Always inline, as prefetch_bytes is.)
  __attribute__((always_inline)) void touch(const TokenRange& range) const {
    const int64_t size = element_size(p_.cache_dtype);
    const int64_t step = std::max(std::abs(head_bytes(kKeys)), std::abs(head_bytes(kValues)));
    const bool share_pages = step * range.heads <= kPageBytes;
    for (int64_t head = 0; head < (share_pages ? 1 : range.heads); ++head) {
      by_block(range.sequence, range.kv_head + head, range.tokens,
               [&](const Piece& piece) __attribute__((always_inline)) {
                 touch_rows(piece.k, size * p_.k_token_stride, piece.tokens);
                 touch_rows(piece.v, size * p_.v_token_stride, piece.tokens);
               });
    }
  }

  // Fills in the rows of the range's first head. The range has at most kRunTokens tokens.
  void fill_rows(Run& run, const TokenRange& range) const {
    run.tokens = static_cast<int>(range.tokens.end - range.tokens.begin);
    run.k_scales = run.v_scales = nullptr;
    const int64_t k_stride = element_size(p_.cache_dtype) * p_.k_token_stride;
    const int64_t v_stride = element_size(p_.cache_dtype) * p_.v_token_stride;
    int i = 0;
    by_block(range.sequence, range.kv_head, range.tokens, [&](const Piece& piece) {
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

  // Fills in the scales of the range's tokens, for the head that is `head` after its first; behind the last
  // token they are 1.
  void fill_scales(Side side, float (&to)[kRunTokens], const TokenRange& range, int64_t head) const {
    float* at = to;
    by_block(range.sequence, range.kv_head + head, range.tokens, [&](const Piece& piece) {
      const float* from = scales(side).address(range.sequence, piece.block, piece.slot, range.kv_head + head);
      for (int64_t i = 0; i < piece.tokens; ++i) *at++ = from[i * scales(side).token_stride];
    });
    std::fill(at, to + kRunTokens, 1.0f);
  }

 private:
  static constexpr int64_t kPageBytes = 4096;  // of memory, not of a paged cache

  const Scales& scales(Side side) const { return side == kKeys ? p_.k_scale : p_.v_scale; }

  // A piece is the tokens of a range that lie in one block, from slot `slot` on; k and v are their first
  // rows.
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
      const int64_t block = p_.raw_block(sequence, kv_head, index);
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

  // Prefetches a line in each memory page of `count` rows.
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

// Reads the runs of a range in order, at each step those of all its heads; while it is at the last step, what
// it prefetches is the first run of next_range(), if that has any tokens. It prepares one step beforehand, so
// that memory pages are touched before their rows are prefetched.
template <class NextRange>
class RunReader {
 public:
  // Runs have `run_tokens` tokens, but for the last of a range. `joins_rows`: rows that adjoin, also those of
  // several heads, are prefetched as one long row.
  RunReader(const PageWalk& rows, int run_tokens, bool joins_rows, const TokenRange& range,
            const NextRange& next_range)
      : rows_(rows),
        run_tokens_(run_tokens),
        joins_rows_(joins_rows),
        heads_adjoin_(joins_rows && rows.head_bytes(kKeys) == rows.row_bytes(kKeys) &&
                      rows.head_bytes(kValues) == rows.row_bytes(kValues)),
        shuffles_(range.heads > 1 && rows.rows_attract_prefetchers()),
        from_(range),
        next_range_(next_range),
        begin_(range.tokens.begin),
        touched_(begin_) {
    fill_next();
  }

  // Moves to the first step, then from each to the next. `in_order`: its run has to have the tokens in order.
  void advance(bool in_order) {
    next_ ^= 1;
    now().shuffled = shuffles_ && !in_order && now().run.tokens == run_tokens_;
    fill_next();
  }

  // The rows of a token's heads are contiguous, in both caches.
  bool has_adjoining_heads() const { return from_.heads > 1 && heads_adjoin_; }

  // Returns a run with this side of a head; the other side may be another head's. It stays until the next
  // call for the side.
  const Run& run(Side side, int64_t head) {
    Step& step = now();
    if (head == 0 && step.shuffled) shuffle(rows_of(step.run, side));
    move(step, side, head);
    if (rows_.scaled(side)) {
      rows_.fill_scales(side, scales_[side], step.at, head);
      if (step.shuffled) shuffle(scales_[side]);
      (side == kKeys ? step.run.k_scales : step.run.v_scales) = scales_[side];
    }
    return step.run;
  }

  // What is prefetched while that run is multiplied. Into L2, which has room for it, goes the same side of
  // the next run; into L1 what is read next: V of the head, or after V of all heads K of the next run.
  Prefetch prefetch(Side side, int64_t head) {
    if (!into_l1_) return prefetch_in(next(), side, head);
    return side == kKeys ? prefetch_in(now(), kValues, head) : prefetch_in(next(), kKeys, head);
  }

 private:
  struct Step {
    TokenRange at{};
    Run run;
    int64_t head[2];  // those of `at` whose K and whose V the run has
    bool shuffled;
  };
  Step& now() { return steps_[next_ ^ 1]; }
  Step& next() { return steps_[next_]; }

  static const void** rows_of(Run& run, Side side) { return side == kKeys ? run.k_rows : run.v_rows; }

  // Puts a run's tokens into an order that no hardware prefetcher follows. One that follows heads' rows
  // fetches what comes after the run, too early and piece by piece, in the way of what is prefetched here.
  template <class T>
  void shuffle(T* of_tokens) const {
    for (int i = 1, j = 0; i < run_tokens_; ++i) {  // j is i with its bits reversed
      int bit = run_tokens_ / 2;
      for (; j & bit; bit /= 2) j ^= bit;
      j ^= bit;
      if (i < j) std::swap(of_tokens[i], of_tokens[j]);
    }
  }

  void move(Step& step, Side side, int64_t head) const {
    if (head == step.head[side]) return;
    const int64_t bytes = (head - step.head[side]) * rows_.head_bytes(side);
    const void** rows = rows_of(step.run, side);
    const int tokens = step.run.tokens;  // which the compiler could not tell from a row
    for (int i = 0; i < tokens; ++i) rows[i] = static_cast<const char*>(rows[i]) + bytes;
    step.head[side] = head;
  }

  // What is prefetched along with one head of a step: its own rows, or, where whole tokens are contiguous,
  // its share of the bytes of all heads, in the order of their addresses. Rows that adjoin are one long row.
  Prefetch prefetch_in(Step& step, Side side, int64_t head) const {
    if (head >= step.at.heads) return {};
    move(step, side, heads_adjoin_ ? 0 : head);
    const void* const* rows = rows_of(step.run, side);
    const int bytes = static_cast<int>(rows_.row_bytes(side) * (heads_adjoin_ ? step.at.heads : 1));
    const int begin = heads_adjoin_ ? static_cast<int>(head * run_tokens_ * rows_.row_bytes(side)) : 0;
    const int count = step.run.tokens;
    const bool adjoin =
        joins_rows_ && static_cast<const char*>(rows[count - 1]) - static_cast<const char*>(rows[0]) ==
                           int64_t{count - 1} * bytes;
    return {rows, adjoin ? 1 : count, adjoin ? count * bytes : bytes, begin, into_l1_ ? 1 : 2};
  }

  void fill_next() {
    Step& step = steps_[next_];
    step.at.heads = 0;
    if (begin_ >= from_.tokens.end) {
      from_ = next_range_();
      touched_ = begin_ = from_.tokens.begin;
      if (begin_ >= from_.tokens.end) return;
    }
    if (begin_ >= touched_) {
      touched_ = std::min(begin_ + touch_tokens_, from_.tokens.end);
      rows_.touch({from_.sequence, from_.kv_head, from_.heads, {begin_, touched_}});
    }
    step.at = {from_.sequence,
               from_.kv_head,
               from_.heads,
               {begin_, std::min(begin_ + run_tokens_, from_.tokens.end)}};
    rows_.fill_rows(step.run, step.at);
    step.head[kKeys] = step.head[kValues] = 0;
    begin_ += run_tokens_;
  }

  const PageWalk& rows_;
  const int run_tokens_;
  const bool joins_rows_;
  const bool heads_adjoin_;
  const bool shuffles_;
  const bool into_l1_ = prefetches_into_l1();
  const int64_t touch_tokens_ = touch_tokens();
  TokenRange from_;
  const NextRange& next_range_;
  int64_t begin_;
  int64_t touched_;  // tokens before this one
  Step steps_[2];
  float scales_[2][kRunTokens];
  int next_ = 0;
};

// Dequantises the rows of a run before they are multiplied: once for all query rows, to the dtype that the
// kernel multiplies.
class DequantisedRows {
 public:
  DequantisedRows(const DecodeParams& p, const TileKernel& kernel, const DequantiseTable* table,
                  float* memory)
      : p_(p),
        kernel_(kernel),
        table_(table),
        k_(reinterpret_cast<char*>(memory)),
        v_(k_ + kShortRunTokens * p.head_dim * element_size(kernel.row_dtype)) {}

  // The kernel does not take quantised rows as they are. `table` is null where caches have q's dtype.
  static bool are_needed(const TileKernel& kernel, const DequantiseTable* table) {
    return table != nullptr && kernel.dequantise != nullptr;
  }

  static int64_t memory_floats(const DecodeParams& p, const TileKernel& kernel) {
    return ceil_div(kShortRunTokens * (p.head_dim + p.head_dim_v) * element_size(kernel.row_dtype),
                    sizeof(float));
  }

  // Returns the run with one side dequantised; it stays until the next call for the side. Prefetches
  // `prefetch` meanwhile.
  const Run& dequantise(Side side, const Run& run, const Prefetch& prefetch) {
    run_.tokens = run.tokens;
    (side == kKeys ? run_.k_scales : run_.v_scales) = side == kKeys ? run.k_scales : run.v_scales;
    char* const to = side == kKeys ? k_ : v_;
    const int64_t columns = side == kKeys ? p_.head_dim : p_.head_dim_v;
    kernel_.dequantise(p_.cache_dtype, *table_, side == kKeys ? run.k_rows : run.v_rows, run.tokens,
                       static_cast<int>(columns), to, prefetch);
    const void** rows = side == kKeys ? run_.k_rows : run_.v_rows;
    const int64_t step = columns * element_size(kernel_.row_dtype);
    for (int i = 0; i < kRunTokens; ++i) rows[i] = i < run.tokens ? to + i * step : kZeroRow;
    return run_;
  }

 private:
  const DecodeParams& p_;
  const TileKernel& kernel_;
  const DequantiseTable* const table_;
  char* const k_;
  char* const v_;
  Run run_{};
};

}  // namespace lean::cpu
