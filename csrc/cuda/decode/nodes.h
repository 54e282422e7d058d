// Prefixes that sequences share: nodes among the sequences of the schedule (shared_walk.h), and how their
// states reach who merges them. All of it is out of the way of calls that share nothing.
//
// Memory. The workspace has a state and a flag for each query row and KV head. Sequences and nodes that lie
// in a node leave the states of their rows there; its host block merges them into its own, and leaves those
// in their place, or writes the outputs. A flag holds the launch's nonce and how many nodes its row's state
// has still to go through: each value is waited for by one CTA, the one that replaces it, and the last one
// leaves the flag down for a replay.
//
// Progress. See shared_walk.h: whoever waits for a state waits for an earlier ticket, or for what its own CTA
// has done before. Where rows of `shared` are invalid, all are taken as empty, by each CTA alike.
#pragma once

#include "cuda/decode/kv_source.h"

namespace lean::cuda {

LEAN_DEVICE bool shares(const DecodeArguments& a) {
  return a.p.shared.count > 0;
}

// What node `node` contributes to the schedule.
LEAN_COLD Length32 node_length(const DecodeArguments& a, int32_t node) {
  const SequenceLength length = a.p.node_length(a.p.shared.node(node));
  return {static_cast<int32_t>(length.tokens), static_cast<int32_t>(length.leftpad),
          static_cast<int32_t>(length.q_len), true};
}

// Whether this thread finds a row of `shared`, or a sequence of it, that is bad; tells of all where it is to.
LEAN_COLD bool finds_bad_shared(const DecodeArguments& a, bool tells) {
  bool found = false;
  find_bad_shared(a.p, hw::thread_index(), kThreads, [&](const BadNumber& bad) {
    found = true;
    if (tells) report(a.errors, bad);
  });
  return found;
}

// The rows of `shared`, or 0 where one of them is bad, of which one CTA tells. Called by all threads, once
// there is a ticket; ends with a barrier.
template <class Config>
LEAN_COLD int32_t checked_nodes(const DecodeArguments& a) {
  SharedState<Config>& s = shared_state<Config>();
  const Thread thread;
  bool bad = hw::any(finds_bad_shared(a, false));
  if (thread.lane == 0) s.warp_tiles[thread.warp] = bad;
  hw::sync_block();
  for (const int32_t warp_bad : s.warp_tiles) bad |= warp_bad != 0;
  if (bad && s.ticket == 0) finds_bad_shared(a, true);
  const int32_t nodes = bad ? 0 : static_cast<int32_t>(a.p.shared.count);
  if (thread.index == 0) s.nodes = nodes;
  hw::sync_block();
  return nodes;
}

// Whose the segment is among nodes and sequences, and where its rows are among the batch's.
LEAN_DEVICE void find_nodes(const DecodeArguments& a, int32_t nodes, int32_t rows_per_block,
                            Segment32& segment, SegmentPlace& place) {
  const int32_t sequence = segment.batch;
  place.is_node = sequence < nodes;
  const SharedNode own = place.is_node ? a.p.shared.node(sequence)
                                       : SharedNode{sequence - nodes, int64_t{sequence} - nodes + 1, 0, 0};
  place.depth = static_cast<int32_t>(
      a.p.shared.depth(own.first_sequence, own.end_sequence, place.is_node ? sequence : nodes));
  segment.batch = static_cast<int32_t>(own.first_sequence);
  place.first_row = static_cast<int32_t>(a.p.first_row(own.first_sequence)) * a.geometry.group +
                    segment.row_block * rows_per_block;
}

// The states that a segment's rows have in the workspace.
template <class Config>
class SharedStates {
 public:
  LEAN_DEVICE SharedStates(const DecodeArguments& arguments, const Segment32& segment,
                           const SegmentPlace& place)
      : a_(arguments), segment_(segment), place_(place) {}

  // Those that sequences and nodes below have left are merged into the segment's own.
  LEAN_DEVICE bool are_merged() const { return shares(a_) && place_.is_node; }
  // The segment's own are left to the node above.
  LEAN_DEVICE bool are_left() const { return shares(a_) && place_.depth > 0; }

  LEAN_DEVICE float* output(int row, int column) const {
    return a_.workspace.states + index(row) * Config::head_dim_v + column;
  }
  // m, then l.
  LEAN_DEVICE hw::Float2* sums(int row) const {
    return reinterpret_cast<hw::Float2*>(a_.workspace.state_sums) + index(row);
  }

  // Waits until what is merged into a row is there. By one thread for each row, before a barrier.
  LEAN_DEVICE void wait(int row) const {
    wait_for(flag(row), nonce() + place_.depth + 1);
    if (place_.depth == 0) lower(flag(row));
  }
  // Tells that the row's state is there. By one thread for each row, after a barrier.
  LEAN_DEVICE void raise(int row) const { hw::store_release(flag(row), nonce() + place_.depth); }

 private:
  LEAN_DEVICE int64_t index(int row) const {
    return segment_.kv_head * a_.workspace.state_rows + place_.first_row + row;
  }
  LEAN_DEVICE uint64_t* flag(int row) const { return a_.workspace.state_flags + index(row); }
  LEAN_DEVICE uint64_t nonce() const { return a_.workspace.nonce; }

  const DecodeArguments& a_;
  const Segment32& segment_;
  const SegmentPlace& place_;
};

}  // namespace lean::cuda
