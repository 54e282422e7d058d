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

template <class Config>
LEAN_DEVICE void attend(const DecodeArguments& a, const Thread& thread, int n) {
  SharedState<Config>& s = shared_state<Config>();
  const Segment32& segment = s.segments[n % 2];
  SegmentPlace& place = s.places[n % 2];
  KvRing<Config> ring(a, place, thread);
  const QueryRows<Config> rows(a, segment);
  rows.load(thread);
  const TokenSpanOf<int32_t> all_see = rows.find_spans(thread, place.first_token, place.end);
  hw::sync_block();                                                  // the rows are there
  if (thread.index == kThreads - 1) find_segment<Config>(a, n + 1);  // while the first copies are under way
  hw::sync_warp();                                                   // that thread's lanes go on together
  Attention<Config> attention(a, thread, all_see);
  while (ring.has_step()) attention.step(ring, ring.first_token());
  reduce_warps<Config>(attention, thread);
  if (thread.index == 0 && place.bad_block >= 0) report_bad_block(a, segment, place.bad_block);
  if (segment.is_host()) {
    HostBlock<Config>(a, thread, segment).write();
  } else {
    publish<Config>(a, thread, rows.count());
  }
}

template <class Config>
LEAN_KERNEL(kThreads, 2)
decode_kernel(LEAN_KERNEL_PARAMETER DecodeArguments arguments) {
  const Thread thread;
  if (!Work<Config>(arguments, thread).begin()) return;
  const SharedState<Config>& s = shared_state<Config>();
  for (int n = 0; s.is_segment[n % 2]; ++n) {
    attend<Config>(arguments, thread, n);
    hw::sync_block();  // the segment's state has been read
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
