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
// Pure arithmetic: no torch, no CUDA, no memory. The kernels of every backend and the Python
// bindings compile this one text.
#pragma once

#include <cstdint>

#include "integers.h"

namespace lean {

// Tokens [begin, end) of a sequence.
struct TokenSpan {
  int64_t begin;
  int64_t end;
};

// Which tokens a query row may see. Query token i of q_len sits at position seq_len - q_len + i
// (bottom-right aligned) and sees positions [position - window_left, position + window_right] of
// the sequence. A negative window is unbounded; causal attention is window_right = 0.
struct Visibility {
  int64_t window_left;
  int64_t window_right;
};

// What a sequence contributes to the schedule.
struct SequenceLength {
  int64_t tokens;   // cached tokens, the new ones included
  int64_t leftpad;  // leading tokens that no row may see
  int64_t q_len;    // query tokens; with none the sequence has no output tile
};

LEAN_HOST_DEVICE constexpr TokenSpan visible_tokens(const Visibility& v, SequenceLength length,
                                                    int64_t first_query, int64_t last_query) {
  const int64_t offset = length.tokens - length.q_len;
  const int64_t begin =
      v.window_left < 0 ? length.leftpad : max(length.leftpad, offset + first_query - v.window_left);
  const int64_t end =
      v.window_right < 0 ? length.tokens : min(length.tokens, offset + last_query + v.window_right + 1);
  return {begin, max(begin, end)};
}

// The KV heads of the cache that one pass over a sequence's tokens takes.
struct HeadSpan {
  int64_t first;
  int64_t count;
};

// The shape of the work, lengths saved. The query rows of a KV head (its `group` query heads times
// q_len query tokens, token-major) are packed as rows and cut into row blocks; one row block of one
// pass of one sequence is an output tile. A pass takes one KV head or, on a CPU, several neighbouring ones,
// whose LeanTiles are taken together. Where every KV head has a length of its own, each counts as a
// sequence of one pass.
struct Geometry {
  int64_t num_kv_heads;  // of the cache
  bool lengths_per_head;
  int64_t passes;          // of a sequence, num_kv_heads at most
  int64_t group;           // query heads per KV head
  int64_t rows_per_block;  // rows that share one pass over K and V
  int64_t tile_tokens;     // tokens of a LeanTile
  Visibility visibility;

  LEAN_HOST_DEVICE constexpr int64_t row_blocks(int64_t q_len) const {
    return ceil_div(group * q_len, rows_per_block);
  }
  LEAN_HOST_DEVICE constexpr int64_t block_rows(int64_t q_len, int64_t row_block) const {
    return min(rows_per_block, group * q_len - row_block * rows_per_block);
  }
  // Tokens that any row of the block sees.
  LEAN_HOST_DEVICE constexpr TokenSpan block_span(SequenceLength length, int64_t row_block) const {
    const int64_t first_row = row_block * rows_per_block;
    return visible_tokens(visibility, length, first_row / group,
                          (first_row + block_rows(length.q_len, row_block) - 1) / group);
  }
  // There is at least one LeanTile, so that an output tile that sees nothing still has an owner.
  LEAN_HOST_DEVICE constexpr int64_t block_tiles(TokenSpan span) const {
    return max(1, ceil_div(span.end - span.begin, tile_tokens));
  }
  LEAN_HOST_DEVICE constexpr int64_t pass_tiles(SequenceLength length) const {
    int64_t tiles = 0;
    for (int64_t block = 0; block < row_blocks(length.q_len); ++block) {
      tiles += block_tiles(block_span(length, block));
    }
    return tiles;
  }
  LEAN_HOST_DEVICE constexpr int64_t sequence_tiles(SequenceLength length) const {
    return passes * pass_tiles(length);
  }

  // What a sequence of the schedule is in the batch, and which KV heads one of its passes takes.
  LEAN_HOST_DEVICE constexpr int64_t batch_of(int64_t sequence) const {
    return lengths_per_head ? sequence / num_kv_heads : sequence;
  }
  LEAN_HOST_DEVICE constexpr HeadSpan heads_of(int64_t sequence, int64_t pass) const {
    if (lengths_per_head) return {sequence % num_kv_heads, 1};
    if (passes == num_kv_heads) return {pass, 1};
    const int64_t first = pass * num_kv_heads / passes;
    return {first, (pass + 1) * num_kv_heads / passes - first};
  }
};

// LeanTiles [begin, end) of the whole batch.
struct LeanRange {
  int64_t begin;
  int64_t end;
};

// total_tiles LeanTiles over num_ctas CTAs, and how a CTA and a LeanTile find each other. The first
// total_tiles % num_ctas ranges are the longer ones.
struct Grid {
  int64_t num_ctas;
  int64_t total_tiles;

  LEAN_HOST_DEVICE constexpr LeanRange range(int64_t cta) const { return {start(cta), start(cta + 1)}; }
  LEAN_HOST_DEVICE constexpr int64_t cta_of(int64_t tile) const {
    const int64_t share = total_tiles / num_ctas, longer = total_tiles % num_ctas;
    const int64_t in_longer = longer * (share + 1);
    return tile < in_longer ? tile / (share + 1) : longer + (tile - in_longer) / share;
  }

 private:
  LEAN_HOST_DEVICE constexpr int64_t start(int64_t cta) const {
    const int64_t share = total_tiles / num_ctas, longer = total_tiles % num_ctas;
    return cta * share + min(cta, longer);
  }
};

// How many of `max_ctas` CTAs to use: a CTA that cannot get `min_tiles` LeanTiles costs more than
// it saves.
LEAN_HOST_DEVICE constexpr int64_t useful_ctas(int64_t total_tiles, int64_t max_ctas, int64_t min_tiles) {
  return max(1, min(max_ctas, total_tiles / min_tiles));
}

// The LeanTiles of one output tile that one CTA computes.
struct Segment {
  int64_t batch;
  int64_t kv_head;   // the first of the pass
  int64_t kv_heads;  // how many it takes
  int64_t row_block;
  SequenceLength length;
  TokenSpan span;        // visible tokens of the output tile
  int64_t output_begin;  // index of the output tile's first LeanTile in the batch
  int64_t output_end;    // and one past its last
  LeanRange tiles;       // the LeanTiles of this segment, indices in the batch

  LEAN_HOST_DEVICE constexpr bool is_host() const { return tiles.begin == output_begin; }
  LEAN_HOST_DEVICE constexpr bool has_peers() const { return tiles.end < output_end; }
  LEAN_HOST_DEVICE constexpr TokenSpan tokens(int64_t tile_tokens) const {
    return {span.begin + (tiles.begin - output_begin) * tile_tokens,
            min(span.end, span.begin + (tiles.end - output_begin) * tile_tokens)};
  }
};

// Walks the segments of a lean range in order. `sequence` is the one that holds the range's first
// LeanTile, `sequence_begin` the batch index of that sequence's first LeanTile;
// `length_of(sequence)` returns a SequenceLength.
class SegmentWalk {
 public:
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr SegmentWalk(const Geometry& geometry, LeanRange range, int64_t sequence,
                                         int64_t sequence_begin, const LengthOf& length_of)
      : geometry_(geometry), next_(range.begin), end_(range.end), sequence_(sequence) {
    if (next_ >= end_) return;
    length_ = length_of(sequence_);
    const int64_t in_sequence = next_ - sequence_begin;
    const int64_t pass_tiles = geometry_.pass_tiles(length_);
    pass_ = in_sequence / pass_tiles;
    output_begin_ = sequence_begin + pass_ * pass_tiles;
    while (next_ >= output_begin_ + geometry_.block_tiles(geometry_.block_span(length_, row_block_))) {
      output_begin_ += geometry_.block_tiles(geometry_.block_span(length_, row_block_));
      ++row_block_;
    }
  }

  // The next segment; false when the range is done.
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr bool next(Segment& segment, const LengthOf& length_of) {
    if (next_ >= end_) return false;
    const TokenSpan span = geometry_.block_span(length_, row_block_);
    const int64_t output_end = output_begin_ + geometry_.block_tiles(span);
    const int64_t stop = min(end_, output_end);
    const HeadSpan heads = geometry_.heads_of(sequence_, pass_);
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

 private:
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr void advance(int64_t output_end, const LengthOf& length_of) {
    output_begin_ = output_end;
    if (++row_block_ < geometry_.row_blocks(length_.q_len)) return;
    row_block_ = 0;
    if (++pass_ < geometry_.passes) return;
    pass_ = 0;
    if (next_ >= end_) return;
    do {
      length_ = length_of(++sequence_);
    } while (length_.q_len == 0);
  }

  Geometry geometry_;
  int64_t next_;
  int64_t end_;
  int64_t sequence_;
  int64_t pass_ = 0;
  int64_t row_block_ = 0;
  int64_t output_begin_ = 0;
  SequenceLength length_{0, 0, 0};
};

// Tokens of a LeanTile (section 4.2 of the paper measures these as best on GPUs; the CPU keeps
// them).
LEAN_HOST_DEVICE constexpr int64_t lean_tile_tokens(int64_t head_dim) {
  return head_dim <= 64 ? 256 : head_dim <= 128 ? 128 : 64;
}

}  // namespace lean
