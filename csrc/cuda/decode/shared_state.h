// What the threads of a CTA tell each other, and the layout of its shared memory.
#pragma once

#include "cuda/decode/arguments.h"
#include "cuda/decode/config.h"

namespace lean::cuda {

// Partial states of peers that a host block merges at a time.
constexpr int kPeersAtOnce = 32;

// Where the caches of a segment's sequence and head lie, and which tokens its steps have: counted from the
// first one of the first step, those of the segment are [begin, end).
struct SegmentPlace {
  const char* k;  // in pages, the head's row of the first slot of block 0; else its row of token 0
  const char* v;
  const float* scales[2];  // of the same rows of K and V
  const int32_t* table;    // the sequence's row of block_table
  int32_t first_token;     // in the sequence
  int32_t begin;
  int32_t end;
  int32_t bad_block;  // index of a block that is out of range, in the table's row; -1: none
};

template <class Config>
struct SharedState {
  // The CTA's range, and its segments.
  int32_t ticket;
  int32_t cta;
  int32_t warp_tiles[kWarps];
  GridOf<int32_t> grid;
  alignas(SegmentWalk32) char walk[sizeof(SegmentWalk32)];
  Segment32 segments[2];  // the one in hand and the one after it, in turn
  SegmentPlace places[2];
  bool is_segment[2];

  // Of the segment in hand. Tokens are relative to its first step's first one.
  int32_t new_tokens;                   // where the sequence's query tokens begin
  int32_t spans[Config::rows][2];       // tokens that a row sees
  int32_t positions[Config::rows];      // of the rows' query tokens
  float slopes[Config::rows];           // of ALiBi, in units of log2
  const bool* tree_rows[Config::rows];  // of the tree mask, to be indexed by such tokens

  // The partial states: of the warps, then m is the weight of a warp's output; and of peers.
  float m[kWarps][Config::rows];
  float l[kWarps][Config::rows];  // in l[0] then the merged one, or the output's factor
  float merged_m[Config::rows];
  uint16_t* out_rows[Config::rows];
  float peer_m[kPeersAtOnce][Config::rows];  // then the weight of the peer's output
  float peer_l[kPeersAtOnce][Config::rows];

  LEAN_DEVICE SegmentWalk32& segment_walk() { return *reinterpret_cast<SegmentWalk32*>(walk); }
};

// A ring per warp, the query rows, the shared state.
template <class Config>
constexpr int shared_bytes() {
  return kWarps * Config::ring_bytes + Config::q_bytes + sizeof(SharedState<Config>);
}
template <class Config>
LEAN_DEVICE char* ring_of(int warp) {
  return hw::shared_memory() + warp * Config::ring_bytes;
}
template <class Config>
LEAN_DEVICE char* query_rows() {
  return hw::shared_memory() + kWarps * Config::ring_bytes;
}
template <class Config>
LEAN_DEVICE SharedState<Config>& shared_state() {
  return *reinterpret_cast<SharedState<Config>*>(query_rows<Config>() + Config::q_bytes);
}
// A row of a warp's output, laid in its ring.
template <class Config>
LEAN_DEVICE float* output_row(int warp, int row) {
  return reinterpret_cast<float*>(ring_of<Config>(warp)) + row * Config::output_pitch;
}

// Where a thread stands in its CTA.
struct Thread {
  LEAN_DEVICE Thread()
      : index(hw::thread_index()), warp(index / hw::kWarpThreads), lane(index % hw::kWarpThreads) {}
  int index, warp, lane;
};

}  // namespace lean::cuda
