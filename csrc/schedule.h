// The stream-K schedule of LeanAttention (arXiv 2405.10480, section 4): who computes what.
//
// All KV caches of a batch are cut into LeanTiles and laid end to end, ordered by sequence, then KV
// head (on a CPU, several that one pass takes), then row block. Each CTA takes one contiguous run of them,
// its lean range; the lengths of any two lean ranges differ by at most one LeanTile. (A CPU's threads take
// several, of lengths of their own: cpu/lean_ranges.h.)
//
//   output tile      |--------- A ---------|--- B ---|-------------- C --------------|
//   LeanTiles        | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |10 |11 |12 |13 |14 |
//   lean ranges      |----- CTA 0 -----|----- CTA 1 -----|----- CTA 2 -----|
//                     hosts A           helps A, hosts B, C  helps C
//
// The CTA that holds the first LeanTile of an output tile is its host block: it merges and writes
// the output. Later CTAs that hold some of it are its peers. A range starts inside at most one
// output tile, so a CTA publishes at most one partial state, and its peers are always the CTAs
// right after it.
//
// Pure arithmetic: no torch, no CUDA, no memory. The kernels of every backend and the ops
// for inspection compile this one text: in 64-bit integers, and on a GPU in 32-bit ones, which it multiplies
// and divides several times as fast.
#pragma once

#include <cstdint>
#include <type_traits>

#include "integers.h"

namespace lean {

// Tokens [begin, end) of a sequence.
template <class Int>
struct TokenSpanOf {
  Int begin;
  Int end;
};
using TokenSpan = TokenSpanOf<int64_t>;

// Which tokens a query row may see. Query token i of q_len sits at position seq_len - q_len + i
// (bottom-right aligned) and sees positions [position - window_left, position + window_right] of
// the sequence. A negative window is unbounded; causal attention is window_right = 0.
template <class Int>
struct VisibilityOf {
  Int window_left;
  Int window_right;
};
using Visibility = VisibilityOf<int64_t>;

// What a sequence contributes to the schedule.
template <class Int>
struct SequenceLengthOf {
  Int tokens;                // cached tokens, the new ones included
  Int leftpad;               // leading tokens that no row may see
  Int q_len;                 // query tokens; with none the sequence has no output tile
  bool seen_by_all = false;  // every query token sees all tokens; there is no window to the left
};
using SequenceLength = SequenceLengthOf<int64_t>;

template <class Int>
LEAN_HOST_DEVICE constexpr TokenSpanOf<Int> visible_tokens(const VisibilityOf<Int>& v,
                                                           SequenceLengthOf<Int> length,
                                                           std::type_identity_t<Int> first_query,
                                                           std::type_identity_t<Int> last_query) {
  const Int offset = length.tokens - length.q_len;
  const Int begin =
      v.window_left < 0 ? length.leftpad : max(length.leftpad, offset + first_query - v.window_left);
  const Int end = v.window_right < 0 || length.seen_by_all
                      ? length.tokens
                      : min(length.tokens, offset + last_query + v.window_right + 1);
  return {begin, max(begin, end)};
}

// The KV heads of the cache that one pass over a sequence's tokens takes.
template <class Int>
struct HeadSpanOf {
  Int first;
  Int count;
};

// The shape of the work, lengths saved. The query rows of a KV head (its `group` query heads times
// q_len query tokens, token-major) are packed as rows and cut into row blocks; one row block of one
// pass of one sequence is an output tile. A pass takes one KV head or, on a CPU, several neighbouring ones,
// whose LeanTiles are taken together. Where every KV head has a length of its own, each counts as a
// sequence of one pass.
template <class Int, class Divisor = Int>
struct GeometryOf {
  using Length = SequenceLengthOf<Int>;
  using Span = TokenSpanOf<Int>;

  Int num_kv_heads;  // of the cache
  bool lengths_per_head;
  Int passes;          // of a sequence, num_kv_heads at most
  Divisor group;       // query heads per KV head
  Int rows_per_block;  // rows that share one pass over K and V
  Int tile_tokens;     // tokens of a LeanTile
  VisibilityOf<Int> visibility;

  LEAN_HOST_DEVICE constexpr Int row_blocks(Int q_len) const {
    return ceil_div(group * q_len, rows_per_block);
  }
  LEAN_HOST_DEVICE constexpr Int block_rows(Int q_len, Int row_block) const {
    return min(rows_per_block, group * q_len - row_block * rows_per_block);
  }
  // Tokens that any row of the block sees.
  LEAN_HOST_DEVICE constexpr Span block_span(Length length, Int row_block) const {
    const Int first_row = row_block * rows_per_block;
    return visible_tokens(visibility, length, first_row / group,
                          (first_row + block_rows(length.q_len, row_block) - 1) / group);
  }
  // There is at least one LeanTile, so that an output tile that sees nothing still has an owner.
  LEAN_HOST_DEVICE constexpr Int block_tiles(Span span) const {
    return max(Int{1}, ceil_div(span.end - span.begin, tile_tokens));
  }
  LEAN_HOST_DEVICE constexpr Int pass_tiles(Length length) const {
    Int tiles = 0;
    LEAN_ROLLED
    for (Int block = 0; block < row_blocks(length.q_len); ++block) {
      tiles += block_tiles(block_span(length, block));
    }
    return tiles;
  }
  LEAN_HOST_DEVICE constexpr Int sequence_tiles(Length length) const { return passes * pass_tiles(length); }

  // What a sequence of the schedule is in the batch, and which KV heads one of its passes takes.
  LEAN_HOST_DEVICE constexpr Int batch_of(Int sequence) const {
    return lengths_per_head ? sequence / num_kv_heads : sequence;
  }
  LEAN_HOST_DEVICE constexpr HeadSpanOf<Int> heads_of(Int sequence, Int pass) const {
    if (lengths_per_head) return {sequence % num_kv_heads, 1};
    if (passes == num_kv_heads) return {pass, 1};
    const Int first = pass * num_kv_heads / passes;
    return {first, (pass + 1) * num_kv_heads / passes - first};
  }
};
using Geometry = GeometryOf<int64_t>;

// LeanTiles [begin, end) of the whole batch.
template <class Int>
struct LeanRangeOf {
  Int begin;
  Int end;
};
using LeanRange = LeanRangeOf<int64_t>;

// total_tiles LeanTiles over num_ctas CTAs, and how a CTA and a LeanTile find each other. The first
// total_tiles % num_ctas ranges are the longer ones.
template <class Int>
struct GridOf {
  Int num_ctas;
  Int total_tiles;

  LEAN_HOST_DEVICE constexpr LeanRangeOf<Int> range(Int cta) const { return {start(cta), start(cta + 1)}; }
  LEAN_HOST_DEVICE constexpr Int cta_of(Int tile) const {
    const Int share = total_tiles / num_ctas, longer = total_tiles % num_ctas;
    const Int in_longer = longer * (share + 1);
    return tile < in_longer ? tile / (share + 1) : longer + (tile - in_longer) / share;
  }

 private:
  LEAN_HOST_DEVICE constexpr Int start(Int cta) const {
    const Int share = total_tiles / num_ctas, longer = total_tiles % num_ctas;
    return cta * share + min(cta, longer);
  }
};
using Grid = GridOf<int64_t>;

// How many of `max_ctas` CTAs to use: a CTA that cannot get `min_tiles` LeanTiles costs more than
// it saves.
template <class Int, class Divisor>
LEAN_HOST_DEVICE constexpr Int useful_ctas(Int total_tiles, std::type_identity_t<Int> max_ctas,
                                           const Divisor& min_tiles) {
  return max(Int{1}, min(max_ctas, total_tiles / min_tiles));
}

// The LeanTiles of one output tile that one CTA computes.
template <class Int>
struct SegmentOf {
  Int batch;
  Int kv_head;   // the first of the pass
  Int kv_heads;  // how many it takes
  Int row_block;
  SequenceLengthOf<Int> length;
  TokenSpanOf<Int> span;   // visible tokens of the output tile
  Int output_begin;        // index of the output tile's first LeanTile in the batch
  Int output_end;          // and one past its last
  LeanRangeOf<Int> tiles;  // the LeanTiles of this segment, indices in the batch

  LEAN_HOST_DEVICE constexpr bool is_host() const { return tiles.begin == output_begin; }
  LEAN_HOST_DEVICE constexpr bool has_peers() const { return tiles.end < output_end; }
  LEAN_HOST_DEVICE constexpr TokenSpanOf<Int> tokens(Int tile_tokens) const {
    return {span.begin + (tiles.begin - output_begin) * tile_tokens,
            min(span.end, span.begin + (tiles.end - output_begin) * tile_tokens)};
  }
};
using Segment = SegmentOf<int64_t>;

// Walks the segments of a lean range in order. `sequence` is the one that holds the range's first
// LeanTile, `sequence_begin` the batch index of that sequence's first LeanTile;
// `length_of(sequence)` returns a SequenceLength.
template <class Int, class Divisor = Int>
class SegmentWalkOf {
  using Geometry = GeometryOf<Int, Divisor>;

 public:
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr SegmentWalkOf(const Geometry& geometry, LeanRangeOf<Int> range, Int sequence,
                                           Int sequence_begin, const LengthOf& length_of)
      : geometry_(geometry), next_(range.begin), end_(range.end), sequence_(sequence) {
    if (next_ >= end_) return;
    length_ = length_of(sequence_);
    const Int in_sequence = next_ - sequence_begin;
    const Int pass_tiles = geometry_.pass_tiles(length_);
    pass_ = in_sequence / pass_tiles;
    output_begin_ = sequence_begin + pass_ * pass_tiles;
    LEAN_ROLLED
    while (next_ >= output_begin_ + geometry_.block_tiles(geometry_.block_span(length_, row_block_))) {
      output_begin_ += geometry_.block_tiles(geometry_.block_span(length_, row_block_));
      ++row_block_;
    }
  }

  // The next segment; false when the range is done.
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr bool next(SegmentOf<Int>& segment, const LengthOf& length_of) {
    if (next_ >= end_) return false;
    const TokenSpanOf<Int> span = geometry_.block_span(length_, row_block_);
    const Int output_end = output_begin_ + geometry_.block_tiles(span);
    const Int stop = min(end_, output_end);
    const HeadSpanOf<Int> heads = geometry_.heads_of(sequence_, pass_);
    segment = {geometry_.batch_of(sequence_),
               heads.first,
               heads.count,
               row_block_,
               length_,
               span,
               output_begin_,
               output_end,
               {next_, stop}};
    next_ = stop;
    if (stop == output_end) advance(output_end, length_of);
    return true;
  }

  // What comes next begins behind its output tile's first LeanTile.
  LEAN_HOST_DEVICE constexpr bool is_inside_output() const { return next_ < end_ && next_ > output_begin_; }

 private:
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr void advance(Int output_end, const LengthOf& length_of) {
    output_begin_ = output_end;
    if (++row_block_ < geometry_.row_blocks(length_.q_len)) return;
    row_block_ = 0;
    if (++pass_ < geometry_.passes) return;
    pass_ = 0;
    if (next_ >= end_) return;
    LEAN_ROLLED
    do {
      length_ = length_of(++sequence_);
    } while (length_.q_len == 0);
  }

  Geometry geometry_;
  Int next_;
  Int end_;
  Int sequence_;
  Int pass_ = 0;
  Int row_block_ = 0;
  Int output_begin_ = 0;
  SequenceLengthOf<Int> length_{0, 0, 0};
};
using SegmentWalk = SegmentWalkOf<int64_t>;

// Tokens of a LeanTile (section 4.2 of the paper measures these as best on GPUs; the CPU keeps
// them).
LEAN_HOST_DEVICE constexpr int64_t lean_tile_tokens(int64_t head_dim) {
  return head_dim <= 64 ? 256 : head_dim <= 128 ? 128 : 64;
}

}  // namespace lean
