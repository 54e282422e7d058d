// The order in which a CTA takes the segments of its range where sequences share prefixes.
//
// A node of `shared` (params.h) is one more sequence of the schedule: its query rows are those of all its
// sequences, which see all of its tokens, and the sequences keep the tokens after their deepest node. A
// node's states, with its parent's merged into them, are merged into those of its children and sequences by
// these' host blocks. On the schedule's line nodes come after all sequences, children before their parents:
//
//   shared        0: sequences 0 to 2, tokens 0 to 9      1: sequences 0 and 1, tokens 9 to 12
//   LeanTiles     | sequence 0 | sequence 1 | sequence 2 | node 1 | node 0 |
//   waits for       node 1       node 1       node 0       node 0
//
// Ranges are handed out from the last one on, so whoever waits for a node waits for a range that was taken
// earlier, or for its own. In its own range a CTA first takes what it has to publish for a host block, then
// nodes, parents before children, then sequences: what it waits for is done.
#pragma once

#include "schedule.h"

namespace lean {

template <class Int, class Divisor = Int>
class SharedWalkOf : private SegmentWalkOf<Int, Divisor> {
  using Walk = SegmentWalkOf<Int, Divisor>;

 public:
  // As SegmentWalkOf. The schedule has `sequences`, which are nodes from `first_node` on, and `total_tiles`.
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr SharedWalkOf(const GeometryOf<Int, Divisor>& geometry, LeanRangeOf<Int> range,
                                          Int sequence, Int sequence_begin, Int first_node, Int sequences,
                                          Int total_tiles, const LengthOf& length_of)
      : Walk(geometry, range, sequence, sequence_begin, length_of),
        publishes_(this->is_inside_output()),
        nodes_(range),
        first_node_(first_node),
        node_(sequences),
        node_begin_(total_tiles) {}

  // The next segment; false when the range is done.
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr bool next(SegmentOf<Int>& segment, const LengthOf& length_of) {
    if (publishes_) {
      publishes_ = false;
      Walk::next(segment, length_of);
      nodes_.begin = segment.tiles.end;
      return true;
    }
    if (next_node(segment, length_of)) return true;
    return Walk::next(segment, length_of) && segment.batch < first_node_;
  }

 private:
  // All output tiles of a node have the same number of LeanTiles.
  template <class LengthOf>
  LEAN_HOST_DEVICE constexpr bool next_node(SegmentOf<Int>& segment, const LengthOf& length_of) {
    const auto& geometry = this->geometry_;
    if (nodes_.begin >= nodes_.end) return false;
    LEAN_ROLLED
    while (node_begin_ >= nodes_.end) {
      if (node_ == first_node_) return false;
      length_ = length_of(--node_);
      node_begin_ -= geometry.sequence_tiles(length_);
    }
    const TokenSpanOf<Int> span = geometry.block_span(length_, 0);
    const Int tiles = geometry.block_tiles(span), row_blocks = geometry.row_blocks(length_.q_len);
    const Int output = (nodes_.end - 1 - node_begin_) / tiles;
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
               {max(nodes_.begin, output_begin), nodes_.end}};
    nodes_.end = segment.tiles.begin;
    return true;
  }

  bool publishes_;          // the range's first segment is another one's peer, and not taken yet
  LeanRangeOf<Int> nodes_;  // LeanTiles whose nodes have not been taken
  Int first_node_;
  Int node_;  // the one taken last, and its first LeanTile
  Int node_begin_;
  SequenceLengthOf<Int> length_{0, 0, 0};
};
using SharedWalk = SharedWalkOf<int64_t>;

}  // namespace lean
