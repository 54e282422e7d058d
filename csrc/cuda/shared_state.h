// What the threads of a CTA tell each other: its range, the segment in hand, the warps' softmax states.
#pragma once

#include "cuda/config.h"

namespace lean::cuda {

template <class Config>
struct SharedState {
  int64_t ticket;
  Grid grid;
  int64_t cta;
  int64_t warp_tiles[kWarps];
  bool more;
  Segment segment;
  int row_begin;  // first packed row of it
  int rows;
  int first_token;
  int bad_block;               // index of a block that is out of range, in the sequence's row; -1: none
  int spans[Config::rows][2];  // tokens that a row sees, relative to first_token
  alignas(SegmentWalk) char walk[sizeof(SegmentWalk)];
  float slopes[Config::rows];           // of ALiBi, in units of log2
  int positions[Config::rows];          // of the rows' query tokens, relative to the segment's first token
  int new_tokens;                       // where the sequence's query tokens begin, likewise
  const bool* tree_rows[Config::rows];  // of the tree mask, to be indexed by such tokens
  float m[kWarps][Config::rows];        // of the warps; then the weight of their outputs
  float l[kWarps][Config::rows];        // of the warps; in l[0] then the merged one, or the output's factor
  float merged_m[Config::rows];
};

}  // namespace lean::cuda
