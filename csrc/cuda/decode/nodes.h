// Prefixes that sequences share: nodes among the sequences of the schedule (shared_walk.h), and how their
// states reach who merges them. All of it is out of the way of calls that share nothing.
//
// Memory. The workspace has a state for each query row and KV head. A node writes those of its rows, in place
// of its parent's, which it has merged into them and which nobody else reads for these rows; last come the
// sequences, who read and write outputs. Each row block of a node and KV head has a flag, written by its host
// block, that is up when it holds the nonce (fix_up.h). Many wait for it, so nobody lowers it: CTAs that
// leave count themselves, and the last one, after which nobody waits, lowers all for the next replay.
//
// Progress. See shared_walk.h: whoever waits for a node waits for an earlier ticket, or for what its own CTA
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

// How many tokens of sequence b are nodes'.
LEAN_COLD int32_t shared_tokens(const DecodeArguments& a, int32_t b, int32_t nodes) {
  const int64_t node = a.p.shared.deepest(b, b + 1, nodes);
  return node < 0 ? 0 : static_cast<int32_t>(a.p.shared.node(node).end_token);
}

// The rows of `shared`, or 0 where one of them is invalid. Called by all threads; ends with a barrier.
template <class Config>
LEAN_COLD int32_t checked_nodes(const DecodeArguments& a) {
  SharedState<Config>& s = shared_state<Config>();
  const Thread thread;
  bool bad = false;
  find_bad_shared(a.p, thread.index, kThreads, [&bad](const BadNumber&) { bad = true; });
  bad = hw::any(bad);
  if (thread.lane == 0) s.warp_tiles[thread.warp] = bad;
  hw::sync_block();
  for (const int32_t warp_bad : s.warp_tiles) bad |= warp_bad != 0;
  hw::sync_block();
  return bad ? 0 : static_cast<int32_t>(a.p.shared.count);
}

// The segment's node, the one whose states are merged into its own, and where its rows are among theirs.
LEAN_DEVICE void find_nodes(const DecodeArguments& a, int32_t nodes, int32_t rows_per_block,
                            Segment32& segment, SegmentPlace& place) {
  const int32_t batch = static_cast<int32_t>(a.p.batch);
  const bool is_node = segment.batch >= batch;
  place.node = is_node ? batch + nodes - 1 - segment.batch : -1;
  const SharedNode own =
      is_node ? a.p.shared.node(place.node) : SharedNode{segment.batch, int64_t{segment.batch} + 1, 0, 0};
  segment.batch = static_cast<int32_t>(own.first_sequence);
  place.prefix = static_cast<int32_t>(
      a.p.shared.deepest(own.first_sequence, own.end_sequence, is_node ? place.node : nodes));
  const auto first_row = [&](int64_t sequence) {
    return static_cast<int32_t>(a.p.first_row(sequence)) * a.geometry.group;
  };
  place.first_row = first_row(own.first_sequence) + segment.row_block * rows_per_block;
  place.row_in_prefix =
      place.prefix < 0 ? 0 : place.first_row - first_row(a.p.shared.node(place.prefix).first_sequence);
}

// The states of a segment's rows.
template <class Config>
class NodeStates {
 public:
  LEAN_DEVICE NodeStates(const DecodeArguments& arguments, const Segment32& segment,
                         const SegmentPlace& place)
      : a_(arguments), segment_(segment), place_(place) {}

  LEAN_DEVICE bool is_node() const { return shares(a_) && place_.node >= 0; }
  LEAN_DEVICE bool has_prefix() const { return shares(a_) && place_.prefix >= 0; }

  LEAN_DEVICE float* output(int row, int column) const {
    return a_.workspace.states + index(row) * Config::head_dim_v + column;
  }
  // m, then l.
  LEAN_DEVICE hw::Float2* state(int row) const {
    return reinterpret_cast<hw::Float2*>(a_.workspace.state_sums) + index(row);
  }

  // Waits until the prefix's states of `count` rows are there. By thread `thread`, before a barrier.
  LEAN_DEVICE void wait(int thread, int count) const {
    const int32_t first = place_.row_in_prefix / Config::rows,
                  end = (place_.row_in_prefix + count - 1) / Config::rows + 1;
    if (first + thread < end) wait_for(a_.workspace, flag(place_.prefix, first + thread));
  }
  // Tells that the node's are. By one thread, after a barrier.
  LEAN_DEVICE void publish() const { raise(a_.workspace, flag(place_.node, segment_.row_block)); }

 private:
  LEAN_DEVICE int64_t index(int row) const {
    return segment_.kv_head * a_.workspace.state_rows + place_.first_row + row;
  }
  LEAN_DEVICE uint64_t* flag(int32_t node, int32_t row_block) const {
    const int64_t head = int64_t{node} * a_.geometry.num_kv_heads + segment_.kv_head;
    return a_.workspace.node_flags + head * a_.workspace.node_blocks + row_block;
  }

  const DecodeArguments& a_;
  const Segment32& segment_;
  const SegmentPlace& place_;
};

// Called by all threads of every CTA when it has nothing more to do.
template <class Config>
LEAN_COLD void leave(const DecodeArguments& a) {
  SharedState<Config>& s = shared_state<Config>();
  const int thread = hw::thread_index();
  hw::sync_block();
  if (thread == 0) s.ticket = take_ticket(a.workspace.departures, a.workspace.nonce, hw::num_ctas());
  hw::sync_block();
  if (s.ticket != static_cast<int32_t>(hw::num_ctas()) - 1) return;
  const int64_t flags = a.p.shared.count * a.geometry.num_kv_heads * a.workspace.node_blocks;
  LEAN_ROLLED
  for (int64_t i = thread; i < flags; i += kThreads) lower(a.workspace.node_flags + i);
}

}  // namespace lean::cuda
