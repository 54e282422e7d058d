// Where the rows of K, of V and of their scales lie, step by step of a warp.
#pragma once

#include "cuda/decode/config.h"

namespace lean::cuda {

// A block that the caller's numbers name; another one where it is out of range. Reported when the segment is
// done: where steps are copied are no registers to spare.
LEAN_DEVICE int32_t checked_block(const DecodeArguments& a, SegmentPlace& place, uint64_t block,
                                  int32_t index) {
  if (block < static_cast<uint32_t>(a.num_blocks)) return static_cast<int32_t>(block);
  place.bad_block = index;
  return 0;
}

// An entry of the segment's table. A negative one of 32 bits is none that checked_block takes.
LEAN_DEVICE uint64_t entry(const DecodeArguments& a, const SegmentPlace& place, int32_t index) {
  if (a.p.pages.block_table.is_int64) return static_cast<const uint64_t*>(place.table)[index];
  return static_cast<const uint32_t*>(place.table)[index];
}

// The low 32 bits of an entry of the segment's table. They are looked up a step ahead, which has no register
// for the others.
LEAN_DEVICE uint32_t low_entry(const DecodeArguments& a, const SegmentPlace& place, int32_t index) {
  return static_cast<const uint32_t*>(
      place.table)[static_cast<uint32_t>(index) << a.p.pages.block_table.is_int64];
}
// All of an entry of int64, whose low half is in L1; no block where it has more than 32 bits. Negative ones
// of 32 bits are none either.
LEAN_COLD uint32_t wide_entry(const SegmentPlace& place, int32_t index) {
  const uint64_t entry = static_cast<const uint64_t*>(place.table)[index];
  return entry >> 32 == 0 ? static_cast<uint32_t>(entry) : ~0u;
}
LEAN_DEVICE int32_t checked_entry(const DecodeArguments& a, SegmentPlace& place, uint32_t low,
                                  int32_t index) {
  return checked_block(a, place, a.p.pages.block_table.is_int64 ? wide_entry(place, index) : low, index);
}

LEAN_COLD void report_bad_block(const DecodeArguments& a, const Segment32& segment, int32_t index) {
  const int64_t block = a.p.pages.raw_block(segment.batch, segment.kv_head, index);
  report(a.errors, bad_block(BadNumber::decode, a.p.pages, segment.batch, segment.kv_head, index, block));
}

// In pages, steps begin at multiples of 16 tokens, so that none has rows in two blocks; the first one may
// then begin before the segment.
template <class Config>
LEAN_DEVICE void find_place(const DecodeArguments& a, const Segment32& segment, SegmentPlace& place) {
  const DecodeParams& p = a.p;
  const bool paged = bool{p.pages.block_table};
  const TokenSpanOf<int32_t> tokens = segment.tokens(Config::tile_tokens);
  const bool empty = tokens.begin >= tokens.end;
  const int32_t before = paged && a.whole_steps && !empty ? tokens.begin % kStepTokens : 0;
  place.first_token = tokens.begin - before;
  place.begin = before;
  place.end = empty ? 0 : tokens.end - tokens.begin + before;
  place.bad_block = -1;
  int32_t block = 0;
  if (!paged && !empty) {
    block = checked_block(a, place, p.pages.raw_block(segment.batch, 0, 0), 0);
  }
  place.table = nullptr;
  if (paged) {
    const int64_t row = segment.batch * p.pages.batch_stride + segment.kv_head * p.pages.head_stride;
    place.table = p.pages.block_table.address(row);
  }
  place.k = static_cast<const char*>(p.k.address(block, 0, segment.kv_head));
  place.v = static_cast<const char*>(p.v.address(block, 0, segment.kv_head));
  if constexpr (Config::quantised) {  // scales that are not there are 1
    const auto scales = [&](const Scales& of) {
      return of.data == nullptr ? hw::address_of_one() : of.address(segment.batch, block, 0, segment.kv_head);
    };
    place.scales[0] = scales(p.k.scale);
    place.scales[1] = scales(p.v.scale);
  }
}

// The addresses of a step that a warp copies whole: of this lane's first chunk of K and of V, and of its
// scale.
template <class Config>
class WholeSteps {
  using KPanels = typename Config::KPanels;
  using VPanels = typename Config::VPanels;

 public:
  const char* k;
  const char* v;
  const float* scale;  // of K's token `lane`, or of V's token `lane - 16`

  // Begins at the step at `token`, which is one of the sequence.
  LEAN_DEVICE void begin(const DecodeArguments& a, SegmentPlace& place, int lane, int32_t first_dim_v,
                         int32_t token) {
    if (place.table != nullptr) {
      look_up(a, place, token);
      move(a, place, lane, first_dim_v, token);
    } else {
      set(a, place, lane, first_dim_v, 0, token);
    }
  }

  // Moves on to the warp's next step, at `token`.
  LEAN_DEVICE void advance(const DecodeArguments& a, SegmentPlace& place, int lane, int32_t first_dim_v,
                           int32_t token) {
    constexpr int kTokens = Config::token_warps * kStepTokens;
    if (a.p.pages.block_table) {
      move(a, place, lane, first_dim_v, token);
      return;
    }
    k += kTokens * int64_t{a.k_token_bytes};
    v += kTokens * int64_t{a.v_token_bytes};
    if constexpr (Config::quantised) scale += kTokens * scales_of(a, lane).token_stride;
  }

 private:
  static LEAN_DEVICE const Scales& scales_of(const DecodeArguments& a, int lane) {
    return lane < kStepTokens ? a.p.k.scale : a.p.v.scale;
  }

  LEAN_DEVICE void set(const DecodeArguments& a, const SegmentPlace& place, int lane, int32_t first_dim_v,
                       int32_t block, int32_t slot) {
    k = place.k + block * int64_t{a.k_block_bytes} +
        (slot + lane / KPanels::lanes_per_row) * int64_t{a.k_token_bytes} +
        16 * (lane % KPanels::lanes_per_row);
    v = place.v + block * int64_t{a.v_block_bytes} +
        (slot + lane / VPanels::lanes_per_row) * int64_t{a.v_token_bytes} +
        16 * (lane % VPanels::lanes_per_row) +
        static_cast<int>(sizeof(typename Config::Element)) * first_dim_v;
    if constexpr (Config::quantised) {
      const Scales& scales = scales_of(a, lane);
      scale = place.scales[lane / kStepTokens] + block * scales.block_stride +
              (slot + lane % kStepTokens) * scales.token_stride;
    }
  }

  // The block of a step is looked up while the step before it is copied.
  LEAN_DEVICE void look_up(const DecodeArguments& a, const SegmentPlace& place, int32_t token) {
    index_ = min(token, place.first_token + place.end - 1) / a.block_size;
    block_ = low_entry(a, place, index_);
  }
  LEAN_DEVICE void move(const DecodeArguments& a, SegmentPlace& place, int lane, int32_t first_dim_v,
                        int32_t token) {
    set(a, place, lane, first_dim_v, checked_entry(a, place, block_, index_), token - index_ * a.block_size);
    look_up(a, place, token + Config::token_warps * kStepTokens);
  }

  int32_t index_;
  uint32_t block_;  // the low bits of its entry
};

// Copies a panel row by row, each by two lanes: any block size, strides and alignment. `token` is its first
// one, relative to the segment's first step, `first_dim` that of its rows. Tokens outside the segment and
// dims that the tensor does not have arrive as zeros, unread. (It does without registers: the caller's are
// all in use.)
template <class Config>
LEAN_COLD void copy_rows(const DecodeArguments& a, SegmentPlace& place, char* panel, bool values,
                         int32_t token, int32_t first_dim) {
  using Element = typename Config::Element;
  constexpr int kElements = 16 / sizeof(Element);
  const CacheView& cache = values ? a.p.v : a.p.k;
  const int lane = hw::thread_index() % hw::kWarpThreads, row = lane % kStepTokens;
  token += row;
  const bool exists = token >= place.begin && token < place.end;
  int32_t slot = place.first_token + min(max(token, place.begin), place.end - 1), block = 0;
  if (place.table != nullptr) {
    const int32_t index = slot / a.block_size;
    slot -= index * a.block_size;
    block = checked_block(a, place, entry(a, place, index), index);
  }
  const Element* from =
      reinterpret_cast<const Element*>(values ? place.v : place.k) + cache.offset(block, slot, 0) + first_dim;
  const int32_t count = exists ? static_cast<int32_t>(cache.dims) - first_dim : 0;
  const int pitch = values ? Config::VPanels::Rows::pitch : Config::KPanels::Rows::pitch;
  const int dims = values ? Config::VPanels::dims : Config::KPanels::dims;
  Element* const to = reinterpret_cast<Element*>(panel + row * pitch);
#pragma unroll 1
  for (int e = lane / kStepTokens * kElements; e < dims;
       e += e % kElements == kElements - 1 ? kElements + 1 : 1) {
    to[e] = e < count ? from[e] : Element{0};
  }
  if (Config::quantised && !values && first_dim == 0) {
    const Scales& scales = lane < kStepTokens ? a.p.k.scale : a.p.v.scale;
    reinterpret_cast<float*>(panel + Config::scales_at)[lane] =
        place.scales[lane / kStepTokens][block * scales.block_stride + slot * scales.token_stride];
  }
}

}  // namespace lean::cuda
