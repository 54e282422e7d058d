// The order in which a CTA takes the segments of its range where sequences share prefixes.
//
// A node of `shared` (params.h) is one more sequence of the schedule: its query rows are those of all its
// sequences, which see all of its tokens, and the sequences keep the tokens after their deepest node. Whoever
// has a node leaves his states to it; its host block merges them into its own, and leaves those to the
// parent. A root's host block writes the outputs. On the schedule's line nodes come before all sequences,
// parents before children:
//
//   shared         0: sequences 0 to 2, tokens 0 to 9      1: sequences 0 and 1, tokens 9 to 12
//   LeanTiles      | node 0 | node 1 | sequence 0 | sequence 1 | sequence 2 |
//   leaves states    -        to 0     to 1         to 1         to 0
//
// Ranges are handed out from the last one on, so a node's host block waits for ranges that were taken
// earlier, or for its own. In its own range a CTA first takes what it has to publish for another host block,
// then sequences, then nodes, children before parents: what it waits for is done. (The other way round, where
// sequences merge their nodes' states, those CTAs that have sequences would wait for all nodes in the middle
// of their ranges. A CTA with several small nodes still does, if their sequences are in later ranges.)
#pragma once

#include "schedule.h"

namespace lean {

template <class Int, class Divisor = Int>
class SharedWalkOf {
  using Geometry = GeometryOf<Int, Divisor>;
  using Walk = SegmentWalkOf<Int, Divisor>;

 public:
  // As SegmentWalkOf. The schedule's first `nodes` sequences are nodes.
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr SharedWalkOf(const Geometry& geometry, LeanRangeOf<Int> range, Int sequence,
                                          Int sequence_begin, Int nodes, const LengthOf& length_of)
      : walk_(geometry, range, sequence, sequence_begin, length_of),
        end_(range.end),
        nodes_(nodes),
        node_(nodes),
        node_begin_(sequence_begin) {
    LEAN_ROLLED
    for (; sequence < nodes; ++sequence) node_begin_ += geometry.sequence_tiles(length_of(sequence));
    left_ = {range.begin, min(range.end, node_begin_)};
  }

  // The next segment; false when the range is done.
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr bool next(const Geometry& geometry, SegmentOf<Int>& segment,
                                       const LengthOf& length_of) {
    const bool publishes = !is_behind_nodes_ && walk_.is_inside_output();
    if (!is_behind_nodes_ && !publishes) go_behind_nodes(geometry, length_of);
    if (!walk_.next(segment, length_of)) return next_node(geometry, segment, length_of);
    if (publishes) left_.begin = segment.tiles.end;
    return true;
  }

 private:
  // Has walk_ go on with the first sequence, where there are nodes before it.
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr void go_behind_nodes(const Geometry& geometry, const LengthOf& length_of) {
    is_behind_nodes_ = true;
    if (left_.begin >= left_.end) return;
    Int sequence = nodes_;
    LEAN_ROLLED
    while (node_begin_ < end_ && length_of(sequence).q_len == 0) ++sequence;
    walk_ = Walk(geometry, {node_begin_, end_}, sequence, node_begin_, length_of);
  }

  // All output tiles of a node have the same number of LeanTiles.
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr bool next_node(const Geometry& geometry, SegmentOf<Int>& segment,
                                            const LengthOf& length_of) {
    if (left_.begin >= left_.end) return false;
    LEAN_ROLLED
    while (node_begin_ >= left_.end) {
      length_ = length_of(--node_);
      node_begin_ -= geometry.sequence_tiles(length_);
    }
    const TokenSpanOf<Int> span = geometry.block_span(length_, 0);
    const Int tiles = geometry.block_tiles(span), row_blocks = geometry.row_blocks(length_.q_len);
    const Int output = (left_.end - 1 - node_begin_) / tiles;
    const Int output_begin = node_begin_ + output * tiles;
    const HeadSpanOf<Int> heads = geometry.heads_of(node_, output / row_blocks);
    segment = {geometry.batch_of(node_),
               heads.first,
               heads.count,
               output % row_blocks,
               length_,
               span,
               output_begin,
               output_begin + tiles,
               {max(left_.begin, output_begin), left_.end}};
    left_.end = segment.tiles.begin;
    return true;
  }

  Walk walk_;  // over what is published, then over sequences
  Int end_;    // of the range
  bool is_behind_nodes_ = false;
  Int nodes_;
  Int node_;  // the one taken last, and its first LeanTile; at first the end of all
  Int node_begin_;
  LeanRangeOf<Int> left_{0, 0};  // of nodes, what has not been taken
  SequenceLengthOf<Int> length_{0, 0, 0};
};
using SharedWalk = SharedWalkOf<int64_t>;

}  // namespace lean
