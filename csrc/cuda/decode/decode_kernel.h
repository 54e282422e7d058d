// LeanAttention's decode kernel (arXiv 2405.10480, section 4): one launch in which every CTA finds its lean
// range from the lengths on the device, computes it, publishes at most one partial state, and host blocks
// merge the states of their peers.
//
// Inside a CTA the four warps split the tokens of a segment, 16 at a time in turn, each with a ring of
// asynchronous copies of its own, so that no barrier stands in the loop; they merge once per segment.
#pragma once

#include "cuda/decode/attention.h"
#include "cuda/decode/result.h"
#include "cuda/decode/work.h"

namespace lean::cuda {

// Makes the output tile, or a partial state, of the states that the warps have laid in shared memory. Called
// by all threads, after a barrier; ends with one.
template <class Config>
LEAN_DEVICE void finish(const DecodeArguments& a, const Segment32& segment, const SegmentPlace& place) {
  const Thread thread(hw::thread_index_again());  // steps have no registers for what follows from it
  merge_warps<Config>(thread);
  if (thread.index == 0 && place.bad_block >= 0) report_bad_block(a, segment, place.bad_block);
  Result<Config>(a, thread, segment, place).make();
  hw::sync_block();
}

// In turn n the CTA attends to segment n. The next one is found while the first copies of this one are under
// way, and its own first copies begin before this one is finished. Turn -1 has only the next one.
template <class Config>
LEAN_KERNEL(kThreads, 2)
decode_kernel(LEAN_KERNEL_PARAMETER DecodeArguments arguments) {
  const Thread thread;
  Work<Config> work(arguments, thread);
  if (!work.begin()) return;
  SharedState<Config>& s = shared_state<Config>();
  KvRing<Config> ring(arguments, thread);
  for (int n = -1;; ++n) {
    const Segment32& segment = s.segments[n & 1];
    SegmentPlace &place = s.places[n & 1], &next_place = s.places[(n + 1) & 1];
    TokenSpanOf<int32_t> all_see{};
    if (n >= 0) {
      const QueryRows<Config> rows(arguments, segment);
      rows.load(thread);
      all_see = rows.find_spans(thread, place.first_token, place.end);
      hw::sync_block();  // the rows are there
    }
    if (work.finds_segment(n + 1)) find_segment<Config>(arguments, n + 1);
    if (n >= 0) {
      hw::sync_warp();  // the lanes of who finds it go on together
      Attention<Config> attention(arguments, thread, all_see);
      while (ring.has_step()) attention.step(ring, ring.first_token());
      lay_state<Config>(attention, thread);
    }
    hw::sync_block();
    ring.begin(next_place, thread);
    LEAN_ROLLED
    for (int part = 0; part < 2; ++part) {  // the code of copies is large, and here once
      ring.fill_steps(part == 0);
      if (part == 0 && n >= 0) finish<Config>(arguments, segment, place);
    }
    if (!s.is_segment[(n + 1) & 1]) return;
    ring.fill_panels();
  }
}

// The entry of the kernel in the table, defined in an object of its own.
template <class Config>
Kernel make_kernel() {
  static std::atomic<int64_t> resident_ctas[kMaxDevices];
  return {Config::head_dim,       Config::head_dim_v,
          Config::rows,           Config::quantised,
          Config::tile_tokens,    shared_bytes<Config>(),
          Config::partial_floats, kWarps * (Config::slots - 1) * Config::slot_bytes,
          &decode_kernel<Config>, resident_ctas};
}

#define LEAN_DEFINE_DECODE_KERNEL(T, dims, dims_v, row_tiles, bytes)       \
  Kernel decode_kernel_##T##_##dims##_##dims_v##_##row_tiles##_##bytes() { \
    return make_kernel<Config<hw::T, dims, dims_v, row_tiles, bytes>>();   \
  }

}  // namespace lean::cuda
