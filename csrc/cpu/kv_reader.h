// Reads the caches: where the rows of tokens lie (pages, slots, scales), in which order a thread takes them,
// what it prefetches meanwhile, and the conversion of quantised rows.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "cpu/plan.h"

namespace lean::cpu {

// This row stands in for those of a run after its last token. (That token's own would not do: if it is
// infinite, its product with no weight is not 0.)
alignas(64) inline constexpr char kZeroRow[kMaxHeadDim * sizeof(float)] = {};

// The same tokens of neighbouring heads of a sequence.
struct TokenRange {
  int64_t sequence;
  int64_t kv_head;
  int64_t heads;  // at most kMaxHeadsPerPass
  TokenSpan tokens;
};

// The distances of a cache in bytes.
struct CacheBytes {
  explicit CacheBytes(const CacheView& cache)
      : row(element_size(cache.dtype) * cache.dims),
        to_token(element_size(cache.dtype) * cache.token_stride),
        to_head(element_size(cache.dtype) * cache.head_stride) {}

  bool heads_adjoin() const { return to_head == row; }

  int64_t row;
  int64_t to_token;  // from a row to that of the next token
  int64_t to_head;   // and to that of the next head
};

class PageWalk {
 public:
  explicit PageWalk(const DecodeParams& p) : k_bytes(p.k), v_bytes(p.v), p_(p) {}

  const CacheView& k() const { return p_.k; }
  const CacheView& v() const { return p_.v; }
  const CacheBytes k_bytes, v_bytes;

  // Hardware prefetchers follow rows of a head that lie apart at some distances: they compare addresses
  // within memory pages, where every other row of those at multiples of half a page seems to be the same.
  bool rows_attract_prefetchers() const {
    const auto attract = [&](const CacheBytes& bytes) {
      return bytes.to_token != bytes.row && (p_.pages.block_table || 2 * bytes.to_token % kPageBytes != 0);
    };
    return attract(k_bytes) || attract(v_bytes);
  }

  // Prefetches a line in each memory page of a range. The first access to a page costs a walk of the page
  // tables, for which a core waits, prefetch or not: some 400 cycles on a virtual machine, in which it
  // multiplies 4 KB of bf16 with 4 query heads per KV head. Walks that begin together overlap; one by one
  // each would cost that much. (Always inline, as prefetch_bytes is.)
  __attribute__((always_inline)) void touch(const TokenRange& range) const {
    const int64_t step = std::max(std::abs(k_bytes.to_head), std::abs(v_bytes.to_head));
    const bool share_pages = step * range.heads <= kPageBytes;
    for (int64_t head = 0; head < (share_pages ? 1 : range.heads); ++head) {
      by_block(range.sequence, range.kv_head + head, range.tokens,
               [&](const Piece& piece) __attribute__((always_inline)) {
                 touch_rows(piece.k, k_bytes.to_token, piece.tokens);
                 touch_rows(piece.v, v_bytes.to_token, piece.tokens);
               });
    }
  }

  // Fills in the rows of the range's first head. The range has at most kRunTokens tokens.
  void fill_rows(Rows& k_rows, Rows& v_rows, const TokenRange& range) const {
    const int tokens = static_cast<int>(range.tokens.end - range.tokens.begin);
    k_rows.tokens = v_rows.tokens = tokens;
    k_rows.scales = v_rows.scales = nullptr;
    int i = 0;
    by_block(range.sequence, range.kv_head, range.tokens, [&](const Piece& piece) {
      const char *k = piece.k, *v = piece.v;
      for (const int end_of_piece = i + static_cast<int>(piece.tokens); i < end_of_piece; ++i) {
        k_rows.row[i] = k;
        v_rows.row[i] = v;
        k += k_bytes.to_token;
        v += v_bytes.to_token;
      }
    });
    std::fill(k_rows.row + tokens, k_rows.row + kRunTokens, kZeroRow);
    std::fill(v_rows.row + tokens, v_rows.row + kRunTokens, kZeroRow);
  }

  // Fills in the scales of k() or v() for the range's tokens and the head that is `head` after its first;
  // behind the last token they are 1.
  void fill_scales(const Scales& scales, float (&to)[kRunTokens], const TokenRange& range,
                   int64_t head) const {
    float* at = to;
    by_block(range.sequence, range.kv_head + head, range.tokens, [&](const Piece& piece) {
      const float* from = scales.address(range.sequence, piece.block, piece.slot, range.kv_head + head);
      for (int64_t i = 0; i < piece.tokens; ++i) *at++ = from[i * scales.token_stride];
    });
    std::fill(at, to + kRunTokens, 1.0f);
  }

 private:
  static constexpr int64_t kPageBytes = 4096;  // of memory, not of a paged cache

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
    int64_t index = tokens.begin / p_.pages.block_size, slot = tokens.begin % p_.pages.block_size;
    for (int64_t begin = tokens.begin; begin < tokens.end; ++index, slot = 0) {
      const int64_t block = p_.pages.raw_block(sequence, kv_head, index);
      const int64_t count = std::min(tokens.end - begin, p_.pages.block_size - slot);
      take(Piece{block, slot, count, static_cast<const char*>(p_.k.address(block, slot, kv_head)),
                 static_cast<const char*>(p_.v.address(block, slot, kv_head))});
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
};

// Reads the runs of a range in order, at each step those of all its heads; while it is at the last step, what
// it prefetches is the first run of next_range(), if that has any tokens. It prepares one step beforehand, so
// that memory pages are touched before their rows are prefetched.
template <class NextRange>
class RunReader {
 public:
  RunReader(const PageWalk& walk, const Plan& plan, const TokenRange& range, const NextRange& next_range)
      : walk_(walk),
        k_(walk.k(), walk.k_bytes),
        v_(walk.v(), walk.v_bytes),
        run_tokens_(plan.run_tokens),
        touch_tokens_(plan.touch_tokens),
        prefetch_level_(plan.prefetch_level),
        joins_rows_(!plan.dequantises),
        heads_adjoin_(joins_rows_ && walk.k_bytes.heads_adjoin() && walk.v_bytes.heads_adjoin()),
        shuffles_(range.heads > 1 && walk.rows_attract_prefetchers()),
        from_(range),
        next_range_(next_range),
        begin_(range.tokens.begin),
        touched_(begin_) {
    fill_next();
  }

  // Moves to the first step, then from each to the next. `in_order`: its run has to have the tokens in order.
  void advance(bool in_order) {
    next_ ^= 1;
    now().shuffled = shuffles_ && !in_order && now().k.rows.tokens == run_tokens_;
    fill_next();
  }

  // The rows of a token's heads are contiguous, in both caches.
  bool has_adjoining_heads() const { return from_.heads > 1 && heads_adjoin_; }

  // Return the run's rows of a head. They stay until the next call.
  const Rows& keys(int64_t head) { return rows(k_, now().k, head); }
  const Rows& values(int64_t head) { return rows(v_, now().v, head); }

  // What is prefetched while those rows are multiplied. Into L2, which has room for it, goes the same of the
  // next run; into L1 what is read next: V of the head, or after V of all heads K of the next run.
  Prefetch prefetch_beside_keys(int64_t head) {
    return prefetch_level_ == 1 ? prefetch_in(now(), v_.bytes, now().v, head)
                                : prefetch_in(next(), k_.bytes, next().k, head);
  }
  Prefetch prefetch_beside_values(int64_t head) {
    return prefetch_level_ == 1 ? prefetch_in(next(), k_.bytes, next().k, head)
                                : prefetch_in(next(), v_.bytes, next().v, head);
  }

 private:
  struct RowsOfHead {
    Rows rows;
    int64_t head;  // it is so many after the range's first
  };
  struct Step {
    TokenRange at{};
    RowsOfHead k, v;
    bool shuffled;
  };
  // One of the caches, and the scales of the rows in hand where those of tokens differ.
  struct Cache {
    Cache(const CacheView& view, const CacheBytes& its_bytes)
        : scale(view.scale), bytes(its_bytes), scaled(scale.per_token()) {}

    const Scales& scale;
    const CacheBytes& bytes;
    const bool scaled;
    float scales[kRunTokens];
  };
  Step& now() { return steps_[next_ ^ 1]; }
  Step& next() { return steps_[next_]; }

  const Rows& rows(Cache& cache, RowsOfHead& of, int64_t head) {
    const Step& step = now();
    if (head == 0 && step.shuffled) shuffle(of.rows.row);
    move(of, cache.bytes, head);
    if (cache.scaled) {
      walk_.fill_scales(cache.scale, cache.scales, step.at, head);
      if (step.shuffled) shuffle(cache.scales);
      of.rows.scales = cache.scales;
    }
    return of.rows;
  }

  // Puts a run's tokens into an order that no hardware prefetcher follows. One that follows heads' rows
  // fetches what comes after the run, too early and piece by piece, in the way of what is prefetched here.
  // (AMD's do, unmeasured today. On a Xeon with AMX it makes no difference.)
  template <class T>
  void shuffle(T* of_tokens) const {
    for (int i = 1, j = 0; i < run_tokens_; ++i) {  // j is i with its bits reversed
      int bit = run_tokens_ / 2;
      for (; j & bit; bit /= 2) j ^= bit;
      j ^= bit;
      if (i < j) std::swap(of_tokens[i], of_tokens[j]);
    }
  }

  static void move(RowsOfHead& of, const CacheBytes& bytes, int64_t head) {
    if (head == of.head) return;
    const int64_t distance = (head - of.head) * bytes.to_head;
    const void** const rows = of.rows.row;
    const int tokens = of.rows.tokens;  // which the compiler could not tell from a row
    for (int i = 0; i < tokens; ++i) rows[i] = static_cast<const char*>(rows[i]) + distance;
    of.head = head;
  }

  // What is prefetched along with one head of a step: its own rows, or, where whole tokens are contiguous,
  // its share of the bytes of all heads, in the order of their addresses. Rows that adjoin are one long row.
  Prefetch prefetch_in(const Step& step, const CacheBytes& cache, RowsOfHead& of, int64_t head) const {
    if (head >= step.at.heads) return {};
    move(of, cache, heads_adjoin_ ? 0 : head);
    const void* const* rows = of.rows.row;
    const int bytes = static_cast<int>(cache.row * (heads_adjoin_ ? step.at.heads : 1));
    const int begin = heads_adjoin_ ? static_cast<int>(head * run_tokens_ * cache.row) : 0;
    const int count = of.rows.tokens;
    const bool adjoin =
        joins_rows_ && static_cast<const char*>(rows[count - 1]) - static_cast<const char*>(rows[0]) ==
                           int64_t{count - 1} * bytes;
    return {rows, adjoin ? 1 : count, adjoin ? count * bytes : bytes, begin, prefetch_level_};
  }

  void fill_next() {
    Step& step = steps_[next_];
    step.at.heads = 0;
    if (begin_ >= from_.tokens.end) {
      from_ = next_range_();
      touched_ = begin_ = from_.tokens.begin;
      if (begin_ >= from_.tokens.end) return;
    }
    if (touch_tokens_ > 0 && begin_ >= touched_) {
      touched_ = std::min(begin_ + touch_tokens_, from_.tokens.end);
      walk_.touch({from_.sequence, from_.kv_head, from_.heads, {begin_, touched_}});
    }
    step.at = {from_.sequence,
               from_.kv_head,
               from_.heads,
               {begin_, std::min(begin_ + run_tokens_, from_.tokens.end)}};
    walk_.fill_rows(step.k.rows, step.v.rows, step.at);
    step.k.head = step.v.head = 0;
    begin_ += run_tokens_;
  }

  const PageWalk& walk_;
  Cache k_, v_;
  const int run_tokens_;  // of every run, but for the last of a range
  const int64_t touch_tokens_;
  const int prefetch_level_;
  const bool joins_rows_;  // rows that adjoin, also those of several heads, are prefetched as one long row
  const bool heads_adjoin_;
  const bool shuffles_;
  TokenRange from_;
  const NextRange& next_range_;
  int64_t begin_;
  int64_t touched_;  // tokens before this one
  Step steps_[2];
  int next_ = 0;
};

// Dequantises the rows of a run before they are multiplied: once for all query rows, to the dtype that the
// kernel multiplies.
class DequantisedRows {
 public:
  DequantisedRows(const DecodeParams& p, const TileKernel& kernel, const DequantiseTable* table,
                  float* memory)
      : kernel_(kernel), table_(table), from_(p.k.dtype) {
    k_ = {p.k.dims, reinterpret_cast<char*>(memory), {}};
    v_ = {p.v.dims, k_.memory + kShortRunTokens * p.k.dims * element_size(kernel.row_dtype), {}};
  }

  static int64_t memory_floats(const DecodeParams& p, const TileKernel& kernel) {
    return ceil_div(kShortRunTokens * (p.k.dims + p.v.dims) * element_size(kernel.row_dtype), sizeof(float));
  }

  // Return the dequantised rows; they stay until the next call. Prefetch `prefetch` meanwhile.
  const Rows& keys(const Rows& from, const Prefetch& prefetch) { return dequantise(k_, from, prefetch); }
  const Rows& values(const Rows& from, const Prefetch& prefetch) { return dequantise(v_, from, prefetch); }

 private:
  struct Dequantised {
    int64_t dims;
    char* memory;
    Rows rows;
  };
  const Rows& dequantise(Dequantised& to, const Rows& from, const Prefetch& prefetch) const {
    to.rows.tokens = from.tokens;
    to.rows.scales = from.scales;
    kernel_.dequantise(from_, *table_, from.row, from.tokens, static_cast<int>(to.dims), to.memory, prefetch);
    const int64_t step = to.dims * element_size(kernel_.row_dtype);
    for (int i = 0; i < kRunTokens; ++i) {
      to.rows.row[i] = i < from.tokens ? to.memory + i * step : kZeroRow;
    }
    return to.rows;
  }

  const TileKernel& kernel_;
  const DequantiseTable* const table_;
  const DType from_;
  Dequantised k_, v_;
};

}  // namespace lean::cpu
