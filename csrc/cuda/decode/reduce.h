// The warps' states become the CTA's, in shared memory.
#pragma once

#include "cuda/decode/attention.h"

namespace lean::cuda {

// Lays the warp's output in its ring, whose copies have all been used.
template <class Config>
LEAN_DEVICE void lay_output(const Attention<Config>& attention, const Thread& thread) {
  const int g = thread.lane / 4, t = thread.lane % 4;
#pragma unroll
  for (int rt = 0; rt < Config::row_tiles; ++rt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const to = output_row<Config>(thread.warp, rt * kTileRows + half * 8 + g);
      const auto& output = attention.output[rt];
      if constexpr (Config::quantised) {
        // Columns of two tiles are the even and the odd dims of 16.
#pragma unroll
        for (int j = 0; j < Config::warp_dim_v / 8; j += 2) {
          hw::store_vector(reinterpret_cast<hw::Float4*>(to + j * 8 + 4 * t),
                           hw::Float4{output[j][half * 2], output[j + 1][half * 2], output[j][half * 2 + 1],
                                      output[j + 1][half * 2 + 1]});
        }
      } else {
#pragma unroll
        for (int j = 0; j < Config::warp_dim_v / 8; ++j) {
          hw::store_vector(reinterpret_cast<hw::Float2*>(to + j * 8 + 2 * t),
                           hw::Float2{output[j][half * 2], output[j][half * 2 + 1]});
        }
      }
    }
  }
}

// Lays the warp's state in shared memory.
template <class Config>
LEAN_DEVICE void lay_state(Attention<Config>& attention, const Thread& thread) {
  SharedState<Config>& s = shared_state<Config>();
  hw::wait_copies<0>();
  hw::sync_warp();
  lay_output<Config>(attention, thread);
#pragma unroll
  for (int rt = 0; rt < Config::row_tiles; ++rt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto& state = attention.rows[rt][half];
      state.l += hw::shuffle_xor(state.l, 1);
      state.l += hw::shuffle_xor(state.l, 2);
      if (thread.lane % 4 == 0) {
        const int row = rt * kTileRows + half * 8 + thread.lane / 4;
        s.m[thread.warp][row] = state.m();
        s.l[thread.warp][row] = state.l;
      }
    }
  }
}

// After it m of the shared state is the weight of each warp's output, and merged_m and l[0] are the CTA's
// state. Called by all threads, after a barrier; ends with one.
template <class Config>
LEAN_DEVICE void merge_warps(const Thread& thread) {
  SharedState<Config>& s = shared_state<Config>();
  if (thread.index < Config::rows) {
    const int row = thread.index;
    SoftmaxState merged;
    LEAN_ROLLED
    for (int w = 0; w < kWarps; w += Config::dim_warps) {  // warps of the same tokens have the same state
      merged = merge(merged, {s.m[w][row], s.l[w][row]}).state;
    }
    LEAN_ROLLED
    for (int w = 0; w < kWarps; ++w) s.m[w][row] = rescale(s.m[w][row], merged.m);
    s.merged_m[row] = merged.m;
    s.l[0][row] = merged.l;
  }
  hw::sync_block();
}

LEAN_DEVICE void add(hw::Float4& sum, float weight, hw::Float4 of) {
  sum.x += weight * of.x;
  sum.y += weight * of.y;
  sum.z += weight * of.z;
  sum.w += weight * of.w;
}

// Four neighbouring elements of the CTA's output.
template <class Config>
LEAN_DEVICE hw::Float4 reduced_output(int row, int column) {
  const SharedState<Config>& s = shared_state<Config>();
  hw::Float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < Config::token_warps; ++i) {
    const int w = i * Config::dim_warps + column / Config::warp_dim_v;
    add(sum, s.m[w][row],
        hw::load_vector(
            reinterpret_cast<const hw::Float4*>(output_row<Config>(w, row) + column % Config::warp_dim_v)));
  }
  return sum;
}

}  // namespace lean::cuda
