// What a compiled kernel is made for, and the shared memory that follows from it.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/decode/arguments.h"
#include "cuda/ptx.h"
#include "schedule.h"

namespace lean::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * hw::kWarpThreads;

// Tokens that a warp multiplies at a time: the k of the product P V.
constexpr int kStepTokens = 16;

// Query rows of one matrix product.
constexpr int kTileRows = 16;

// Shared memory for copies in flight, per CTA. By Little's law an SM needs latency x bandwidth / SMs in
// flight: about 0.8 us x 4.8 TB/s / 132 = 29 KB on an H200, 48 KB on a B200, 15 KB on an A100. All slots of a
// ring but one are in flight, 51 KB here, and two CTAs fit on an SM of those GPUs, so that one CTA's drain at
// the end of an output tile hides behind the other. One CTA still fits the 99 KB of an sm_86 SM.
constexpr int kRingBytes = 68 * 1024;

// Rows in shared memory, in chunks of 16 bytes. Their pitch is an odd number of chunks, so that eight
// neighbouring rows of one chunk column lie in different banks: ldmatrix reads without conflicts, and every
// place in a panel is the lane's own plus a constant, which instructions hold.
template <int kBytes>
struct SharedRows {
  static_assert(kBytes % 16 == 0);
  static constexpr int chunks = kBytes / 16;
  static constexpr int pitch = 16 * (chunks | 1);
  static LEAN_DEVICE int offset(int row, int chunk) { return row * pitch + 16 * chunk; }
};

// K and V pass through the ring in panels of 16 tokens by at most this many dims, so that large head_dims
// keep as many copies in flight as small ones.
constexpr int kMaxPanelDims = 128;

template <int kDims, int kElementBytes>
struct Panels {
  static constexpr int count = (kDims + kMaxPanelDims - 1) / kMaxPanelDims;
  static constexpr int dims = kDims / count;
  using Rows = SharedRows<dims * kElementBytes>;
  static constexpr int bytes = kStepTokens * Rows::pitch;
  static_assert(count * dims == kDims);

  // How a warp copies a panel: so many lanes take neighbouring chunks of a row, the others those of other
  // rows. A lane's copies are `row_copies` rows apart, and within a row `chunk_copies` times so many chunks.
  static constexpr int lanes_per_row = Rows::chunks & -Rows::chunks;
  static constexpr int rows_per_copy = hw::kWarpThreads / lanes_per_row;
  static constexpr int row_copies = kStepTokens / rows_per_copy;
  static constexpr int chunk_copies = Rows::chunks / lanes_per_row;
  static_assert(lanes_per_row <= hw::kWarpThreads && rows_per_copy <= kStepTokens);
};

// kElementBytes is the size of an element of the caches. Those of 1 byte are quantised, and dequantised to T
// in registers.
template <class T_, int kHeadDim, int kHeadDimV, int kRowTiles, int kElementBytes = 2>
struct Config {
  using T = T_;
  using Element = std::conditional_t<kElementBytes == 1, uint8_t, uint16_t>;
  static constexpr bool quantised = kElementBytes == 1;
  static constexpr int head_dim = kHeadDim;
  static constexpr int head_dim_v = kHeadDimV;
  static constexpr int row_tiles = kRowTiles;
  static constexpr int rows = kRowTiles * kTileRows;
  static constexpr int tile_tokens = static_cast<int>(lean_tile_tokens(kHeadDim));

  // The warps split the tokens; where a warp cannot hold an output of all dims, so many of them take the same
  // tokens, each with all their scores and its part of the output's dims.
  static constexpr int dim_warps = kHeadDimV <= 256 ? 1 : quantised ? 4 : 2;
  static constexpr int token_warps = kWarps / dim_warps;
  static constexpr int warp_dim_v = kHeadDimV / dim_warps;
  static_assert(tile_tokens % (token_warps * kStepTokens) == 0);

  using KPanels = Panels<kHeadDim, kElementBytes>;
  using VPanels = Panels<warp_dim_v, kElementBytes>;
  static constexpr int panels = KPanels::count + VPanels::count;
  // Behind the first panel of a quantised step lie the scales of its tokens, those of K, then those of V.
  static constexpr int scales_at = KPanels::bytes;
  static constexpr int scales_bytes = quantised ? 2 * kStepTokens * sizeof(float) : 0;
  static constexpr int slot_bytes = max(KPanels::bytes + scales_bytes, VPanels::bytes);
  static constexpr int slots = min(8, kRingBytes / (kWarps * slot_bytes));
  static constexpr int ring_bytes = slots * slot_bytes;  // of one warp
  static_assert(slots >= 3 && slots <= 8);               // cp.async waits for at most 8 pending groups
  static_assert(slot_bytes % 16 == 0);

  // A warp lays its output at the end of its ring when its tokens are done; in the slots before it the first
  // steps of the next segment are copied meanwhile. The pitch of its rows lets eight of them be written
  // without bank conflicts.
  static constexpr int output_pitch = warp_dim_v + 8;
  static constexpr int output_at = ring_bytes - rows * output_pitch * static_cast<int>(sizeof(float));
  static_assert(output_at >= 0 && output_at % 16 == 0);
  static constexpr int early_steps = min(output_at / slot_bytes, slots - 1) / panels;

  using QRows = SharedRows<kHeadDim * 2>;
  static constexpr int q_bytes = rows * QRows::pitch;
  static constexpr bool query_in_registers = kRowTiles * kHeadDim <= 128;

  static constexpr int partial_floats = rows * (kHeadDimV + 2);
};

// ---- What the threads of a CTA tell each other, and the layout of its shared memory.

// Partial states of peers that a host block merges at a time.
constexpr int kPeersAtOnce = 32;

// Where the caches of a segment's sequence and head lie, and which tokens its steps have: counted from the
// first one of the first step, those of the segment are [begin, end).
struct SegmentPlace {
  const char* k;  // in pages, the head's row of the first slot of block 0; else its row of token 0
  const char* v;
  const float* scales[2];  // of the same rows of K and V
  const void* table;       // the sequence's row of block_table
  int32_t first_token;     // in the sequence
  int32_t begin;
  int32_t end;
  int32_t bad_block;  // index of a block that is out of range, in the table's row; -1: none

  // Where sequences share prefixes; see nodes.h.
  bool is_node;       // the segment is a node's
  int32_t depth;      // how many nodes its states go through
  int32_t first_row;  // among the batch's query rows of a KV head
};

template <class Config>
struct SharedState {
  // The CTA's range, and its segments.
  int32_t ticket;
  int32_t cta;
  int32_t warp_tiles[kWarps];
  GridOf<int32_t> grid;
  alignas(SegmentWalk32) char walk[sizeof(SegmentWalk32)];
  alignas(SharedWalk32) char walk_with_nodes[sizeof(SharedWalk32)];  // in place of `walk`
  int32_t nodes;                                                     // rows of `shared` that count
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
  char* out_rows[Config::rows];
  float shared_weight[Config::rows];         // of outputs that nodes and sequences have left
  float peer_m[kPeersAtOnce][Config::rows];  // then the weight of the peer's output
  float peer_l[kPeersAtOnce][Config::rows];

  LEAN_DEVICE SegmentWalk32& segment_walk() { return *reinterpret_cast<SegmentWalk32*>(walk); }
  LEAN_DEVICE SharedWalk32& shared_walk() { return *reinterpret_cast<SharedWalk32*>(walk_with_nodes); }
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
  return reinterpret_cast<float*>(ring_of<Config>(warp) + Config::output_at) + row * Config::output_pitch;
}

// The nearest number of 32 bits. A function of its own, so that its load is in nobody's way.
LEAN_COLD int32_t narrowed(const int64_t* index) {
  constexpr int64_t kLeast = std::numeric_limits<int32_t>::min(), kMost = std::numeric_limits<int32_t>::max();
  return static_cast<int32_t>(max(kLeast, min(*index, kMost)));
}
LEAN_DEVICE int32_t index_at(const Indices& indices, int64_t i) {
  return indices.is_int64 ? narrowed(static_cast<const int64_t*>(indices.data) + i)
                          : static_cast<const int32_t*>(indices.data)[i];
}
// DecodeParams::first_query in 32 bits, which hold it on a GPU.
LEAN_DEVICE int32_t first_query(const DecodeParams& p, int64_t b) {
  return p.cu_seqlens_q ? max(0, min(index_at(p.cu_seqlens_q, b), static_cast<int32_t>(p.query_tokens))) : 0;
}

// Outputs that are merged with others before they are rounded.
LEAN_DEVICE bool writes_floats(const DecodeParams& p) {
  return p.out_dtype == DType::float32;
}
LEAN_DEVICE char* out_address(const DecodeParams& p, int64_t element) {
  return static_cast<char*>(p.out) + element * (writes_floats(p) ? 4 : 2);
}

// Where a thread stands in its CTA.
struct Thread {
  LEAN_DEVICE explicit Thread(int of = hw::thread_index())
      : index(of), warp(of / hw::kWarpThreads), lane(of % hw::kWarpThreads) {}
  int index, warp, lane;
};

}  // namespace lean::cuda
