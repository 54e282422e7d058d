// Which segments a CTA has: its lean range, found from the lengths on the device.
#pragma once

#include "cuda/decode/nodes.h"

namespace lean::cuda {

// What sequence `sequence` of the schedule contributes to it; numbers out of range are brought into range.
LEAN_DEVICE Length32 length_of(const DecodeArguments& a, int32_t sequence) {
  const DecodeParams& p = a.p;
  const int32_t num_kv_heads = a.geometry.num_kv_heads;
  const int32_t b = p.lengths_per_head ? sequence / num_kv_heads : sequence;
  const int32_t head = p.lengths_per_head ? sequence - b * num_kv_heads : 0;
  const int32_t tokens =
      p.seq_lens ? index_at(p.seq_lens, b * p.seq_lens_batch_stride + head * p.seq_lens_head_stride)
                 : a.capacity;
  int32_t q_len = static_cast<int32_t>(p.query_tokens);
  if (p.cu_seqlens_q) {
    q_len = max(0, first_query(p, b + 1) - first_query(p, b));
  }
  const int32_t leftpad = p.cache_leftpad ? index_at(p.cache_leftpad, b) : 0;
  return {max(0, min(tokens, a.capacity)), max(0, min(leftpad, a.capacity)), q_len};
}

// Query tokens of a packed q that belong to no sequence come out as rows that see nothing.
LEAN_COLD void write_padding(const DecodeArguments& a, int32_t ticket, int thread) {
  const DecodeParams& p = a.p;
  const int32_t before = first_query(p, 0), end = first_query(p, p.batch);
  const int32_t count = before + static_cast<int32_t>(p.query_tokens) - end;
  const int32_t words = static_cast<int32_t>(p.v.dims) * (writes_floats(p) ? 2 : 1);
  LEAN_ROLLED
  for (int32_t n = ticket; n < count; n += static_cast<int32_t>(hw::num_ctas())) {
    const int32_t token = n < before ? n : end + n - before;
    LEAN_ROLLED
    for (int32_t head = 0; head < p.num_heads; ++head) {
      auto* const row =
          reinterpret_cast<uint16_t*>(out_address(p, token * p.out_token_stride + head * p.out_head_stride));
      LEAN_ROLLED
      for (int32_t i = thread; i < words; i += kThreads) row[i] = 0;
    }
    LEAN_ROLLED
    for (int32_t head = thread; head < p.num_heads; head += kThreads) {
      p.lse[head * p.lse_head_stride + token] = kMinusInfinity;
    }
  }
}

LEAN_COLD void report_bad_numbers(const DecodeArguments& a, int thread) {
  find_bad_numbers(a.p, thread, kThreads, [&a](const BadNumber& bad) { report(a.errors, bad); });
}

// Constants of the kernel take the place of divisors.
template <class Config>
LEAN_DEVICE Geometry32 geometry_of(const DecodeArguments& a) {
  Geometry32 geometry = a.geometry;
  geometry.rows_per_block = Config::rows;
  geometry.tile_tokens = Config::tile_tokens;
  return geometry;
}

// The same for calls that share prefixes, whose sequences begin with the nodes.
LEAN_COLD Length32 shared_length_of(const DecodeArguments& a, int32_t sequence, int32_t nodes) {
  if (sequence < nodes) return node_length(a, sequence);
  const int32_t b = sequence - nodes;
  Length32 length = length_of(a, b);
  const int64_t node = a.p.shared.deepest(b, b + 1, nodes);
  if (node >= 0) length.leftpad = static_cast<int32_t>(a.p.shared.node(node).end_token);
  return length;
}

// LeanTiles of some sequences.
template <class Config>
LEAN_COLD int32_t shared_tiles(const DecodeArguments& a, int32_t first, int32_t end) {
  const int32_t nodes = shared_state<Config>().nodes;
  int32_t sum = 0;
  LEAN_ROLLED
  for (int32_t i = first; i < end; ++i) {
    sum += geometry_of<Config>(a).sequence_tiles(shared_length_of(a, i, nodes));
  }
  return sum;
}

// Begins the walk where the first LeanTile of the range is one of the sequences [first, end), which end at
// LeanTile `end_tile`; false where it is not.
template <class Config>
LEAN_COLD bool begin_shared_walk(const DecodeArguments& a, LeanRangeOf<int32_t> range, int32_t first,
                                 int32_t end, int32_t end_tile) {
  SharedState<Config>& s = shared_state<Config>();
  const Geometry32 geometry = geometry_of<Config>(a);
  const auto length = [&](int32_t i) { return shared_length_of(a, i, s.nodes); };
  LEAN_ROLLED
  while (end_tile > range.begin && end > first) end_tile -= geometry.sequence_tiles(length(--end));
  if (end_tile > range.begin) return false;
  s.shared_walk() = SharedWalk32(geometry, range, end, end_tile, s.nodes, length);
  return true;
}

template <class Config>
LEAN_COLD bool next_shared_segment(const DecodeArguments& a, Segment32& segment, SegmentPlace& place) {
  SharedState<Config>& s = shared_state<Config>();
  const bool is_segment = s.shared_walk().next(geometry_of<Config>(a), segment,
                                               [&](int32_t i) { return shared_length_of(a, i, s.nodes); });
  if (is_segment) find_nodes(a, s.nodes, Config::rows, segment, place);
  return is_segment;
}

// Finds segment n of the CTA, after the one before it; where there is none, its place has no tokens. Called
// by one thread; the others see it after a barrier.
template <class Config>
LEAN_DEVICE void find_segment(const DecodeArguments& a, int n) {
  SharedState<Config>& s = shared_state<Config>();
  Segment32& segment = s.segments[n & 1];
  SegmentPlace& place = s.places[n & 1];
  const bool is_segment = shares(a)
                              ? next_shared_segment<Config>(a, segment, place)
                              : s.segment_walk().next(segment, [&](int32_t i) { return length_of(a, i); });
  s.is_segment[n & 1] = is_segment;
  if (is_segment) {
    find_place<Config>(a, segment, place);
  } else {
    place.begin = place.end = 0;
  }
}

template <class Config>
class Work {
 public:
  LEAN_DEVICE Work(const DecodeArguments& arguments, const Thread& thread) : a_(arguments), thread_(thread) {}

  // Finds the CTA's range; false where it has none. Called by all threads.
  LEAN_DEVICE bool begin() {
    SharedState<Config>& s = shared_state<Config>();
    // By a warp that has fewer lengths to add up than the first one.
    if (thread_.index == kThreads - 1) s.ticket = take_ticket(a_.workspace, hw::num_ctas());
    const Geometry32 geometry = geometry_of<Config>(a_);
    const int32_t sequences = sequences_of(a_) + (shares(a_) ? checked_nodes<Config>(a_) : 0);
    // Where all have the same LeanTiles, every thread counts those of the first.
    const int32_t per_thread = a_.ragged ? ceil_div(sequences, kThreads) : 1;
    const int32_t first = a_.ragged ? thread_.index * per_thread : 0,
                  end = min(first + per_thread, sequences);
    int32_t sum = 0, total = 0;
    // Of this thread's last sequence: most threads have one, whose length then is loaded once.
    Length32 length{};
    int32_t tiles = 0;
    if (shares(a_)) {
      sum = shared_tiles<Config>(a_, first, end);
    } else {
      LEAN_ROLLED
      for (int32_t i = first; i < end; ++i) {
        length = length_of(a_, i);
        tiles = geometry.sequence_tiles(length);
        sum += tiles;
      }
    }
    if (a_.ragged) {
      for (int lanes = 1; lanes < hw::kWarpThreads; lanes *= 2) {
        const int32_t below = hw::shuffle_up(sum, lanes);
        if (thread_.lane >= lanes) sum += below;
      }
      if (thread_.lane == hw::kWarpThreads - 1) s.warp_tiles[thread_.warp] = sum;
    }
    hw::sync_block();
    const int32_t ticket = s.ticket;
    if (ticket == 0) report_bad_numbers(a_, thread_.index);  // one CTA tells for all
    if (a_.p.cu_seqlens_q) write_padding(a_, ticket, thread_.index);
    if (a_.ragged) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w == thread_.warp) sum += total;
        total += s.warp_tiles[w];
      }
    } else {
      total = sequences * tiles;
    }
    if (total == 0) return false;
    const GridOf<int32_t> grid{useful_ctas(total, static_cast<int32_t>(hw::num_ctas()), a_.min_tiles_per_cta),
                               total};
    // Ranges go from the last to the first in the order in which CTAs arrive; see fix_up.h.
    const int32_t cta = grid.num_ctas - 1 - ticket;
    if (cta < 0) return false;
    const LeanRangeOf<int32_t> range = grid.range(cta);
    // One thread finds the sequence that has the range's first LeanTile.
    found_ = range.begin < sum;
    int32_t sequence = end, sequence_begin = sum;
    if (!a_.ragged) {
      found_ = thread_.index == 0;
      sequence = range.begin / tiles;
      sequence_begin = sequence * tiles;
    } else if (found_ && !shares(a_)) {
      --sequence;
      sequence_begin -= tiles;
      LEAN_ROLLED
      while (sequence_begin > range.begin && sequence > first) {
        length = length_of(a_, --sequence);
        sequence_begin -= geometry.sequence_tiles(length);
      }
      found_ = sequence_begin <= range.begin;
    }
    if (found_ && shares(a_)) found_ = begin_shared_walk<Config>(a_, range, first, end, sum);
    if (found_) {
      s.grid = grid;
      s.cta = cta;
      if (!shares(a_)) {
        s.segment_walk() =
            SegmentWalk32(geometry, range, sequence, sequence_begin, [&](int32_t) { return length; });
      }
    }
    return true;
  }

  // This thread finds segment n: the first one where it has found where the range begins; later ones in the
  // last warp, which has steps to wait for as all have.
  LEAN_DEVICE bool finds_segment(int n) const { return n == 0 ? found_ : thread_.index == kThreads - 1; }

 private:
  static LEAN_DEVICE int32_t sequences_of(const DecodeArguments& a) {
    const int32_t batch = static_cast<int32_t>(a.p.batch);
    return a.p.lengths_per_head ? batch * a.geometry.num_kv_heads : batch;
  }

  const DecodeArguments& a_;
  const Thread& thread_;
  bool found_ = false;
};

}  // namespace lean::cuda
