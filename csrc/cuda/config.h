// What a compiled kernel is made for, and the shared memory that follows from it.
#pragma once

#include <type_traits>

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
// ring but one are in flight: 48 KB here, and two or three CTAs fit on an SM of those GPUs, so that one CTA's
// drain at the end of an output tile hides behind the others. One CTA still fits the 99 KB of an sm_86 SM.
constexpr int kRingBytes = 64 * 1024;

// 16-bit rows in shared memory, in chunks of 16 bytes, so placed that eight neighbouring rows of one chunk
// column lie in different banks: ldmatrix reads and copies write without conflicts. Rows of a multiple of
// eight chunks are swizzled, others padded to an odd number of chunks.
template <int kDims>
struct SharedRows {
  static_assert(kDims % 16 == 0);
  static constexpr int chunks = kDims / 8;
  static constexpr bool swizzled = chunks % 8 == 0;
  static constexpr int row_bytes = 16 * (swizzled ? chunks : chunks + 1);
  static LEAN_DEVICE int offset(int row, int chunk) {
    return row * row_bytes + 16 * (swizzled ? chunk ^ (row & 7) : chunk);
  }
};

// K and V pass through the ring in panels of 16 tokens by at most this many dims, so that large head_dims
// keep as many copies in flight as small ones.
constexpr int kMaxPanelDims = 128;

template <int kDims, int kElementBytes>
struct Panels {
  static constexpr int count = (kDims + kMaxPanelDims - 1) / kMaxPanelDims;
  static constexpr int dims = kDims / count;
  using Rows = SharedRows<dims * kElementBytes / 2>;  // in the ring
  using DequantisedRows = SharedRows<dims>;           // as they are multiplied
  static constexpr int bytes = kStepTokens * Rows::row_bytes;
  static constexpr int dequantised_bytes = kStepTokens * DequantisedRows::row_bytes;
  static_assert(count * dims == kDims);
};

// kElementBytes is the size of an element of the caches. Those of 1 byte are quantised, and dequantised to T
// panel by panel.
template <class T_, int kHeadDim, int kHeadDimV, int kRowTiles, int kElementBytes = 2>
struct Config {
  using T = T_;
  using Element = std::conditional_t<kElementBytes == 1, uint8_t, uint16_t>;
  static constexpr bool quantised = kElementBytes == 1;
  static constexpr int head_dim = kHeadDim;
  static constexpr int head_dim_v = kHeadDimV;
  static constexpr int row_tiles = kRowTiles;
  static constexpr int rows = kRowTiles * kTileRows;
  static constexpr int64_t tile_tokens = lean_tile_tokens(kHeadDim);

  // The warps split the tokens; where a warp cannot hold an output of all dims, so many of them take the same
  // tokens, each with all their scores and its part of the output's dims. Widening takes registers too.
  static constexpr int dim_warps = kHeadDimV <= 256 ? 1 : quantised ? 4 : 2;
  static constexpr int token_warps = kWarps / dim_warps;
  static constexpr int warp_dim_v = kHeadDimV / dim_warps;
  static_assert(tile_tokens % (token_warps * kStepTokens) == 0);

  using KPanels = Panels<kHeadDim, kElementBytes>;
  using VPanels = Panels<warp_dim_v, kElementBytes>;
  static constexpr int panels = KPanels::count + VPanels::count;
  static constexpr int slot_bytes = max(KPanels::bytes, VPanels::bytes);
  static constexpr int slots = min(8, kRingBytes / (kWarps * slot_bytes));
  static constexpr int ring_bytes = slots * slot_bytes;  // of one warp
  static_assert(slots >= 3);

  // A warp lays its output there when its tokens are done.
  static_assert(rows * warp_dim_v * sizeof(float) <= ring_bytes);

  using QRows = SharedRows<kHeadDim>;
  static constexpr int q_bytes = rows * QRows::row_bytes;
  static constexpr int dequantised_bytes =
      quantised ? max(KPanels::dequantised_bytes, VPanels::dequantised_bytes) : 0;  // of a warp
  static constexpr bool query_in_registers = kRowTiles * kHeadDim <= 128;

  static constexpr int partial_floats = rows * (kHeadDimV + 2);
};

}  // namespace lean::cuda
