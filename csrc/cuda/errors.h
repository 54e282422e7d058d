// Numbers out of range, found on the device: the first one is kept until the host asks.
#pragma once

#include "cuda/hardware.h"
#include "params.h"

namespace lean::cuda {

enum class BadNumber : int64_t {
  none,
  seq_lens,
  cache_leftpad,
  cache_batch_idx,
  cu_seqlens_q,
  first_cu_seqlens_q,
  block_table,
  append,
  append_cu_seqlens,
  append_first_cu_seqlens
};

// One per device; zero when there is nothing to tell.
struct ErrorRecord {
  uint64_t reports;
  BadNumber bad_number;
  int64_t sequence;
  int64_t kv_head;
  int64_t index;  // in the row of block_table
  int64_t value;
};

LEAN_DEVICE void report(ErrorRecord* record, BadNumber bad_number, int64_t sequence, int64_t kv_head,
                        int64_t index, int64_t value) {
  if (hw::fetch_add_relaxed(&record->reports, 1) == 0) {
    record->sequence = sequence;
    record->kv_head = kv_head;
    record->index = index;
    record->value = value;
    record->bad_number = bad_number;
  }
}

// Reports lengths, paddings and counts that DecodeParams brings into range; sequences `first`, `first +
// step`...
LEAN_DEVICE void check_values(const DecodeParams& p, ErrorRecord* record, int64_t first, int64_t step) {
  if (first == 0 && p.cu_seqlens_q && p.cu_seqlens_q[0] != 0) {
    report(record, BadNumber::first_cu_seqlens_q, 0, 0, 0, p.cu_seqlens_q[0]);
  }
  for (int64_t b = first; b < p.batch; b += step) {
    for (int64_t head = 0; head < (p.lengths_per_head ? p.num_kv_heads : 1); ++head) {
      const int64_t tokens = p.raw_seq_len(b, head);
      if (tokens < 0 || tokens > p.pages.capacity()) report(record, BadNumber::seq_lens, b, head, 0, tokens);
    }
    const int64_t leftpad = p.raw_leftpad(b);
    if (leftpad < 0) report(record, BadNumber::cache_leftpad, b, 0, 0, leftpad);
    if (p.cu_seqlens_q) {
      const int64_t begin = p.cu_seqlens_q[b], end = p.cu_seqlens_q[b + 1];
      const bool fits = !p.tree_mask || end - begin <= p.tree_columns;
      if (end < begin || end > p.query_tokens || !fits) {
        report(record, BadNumber::cu_seqlens_q, b, 0, 0, end);
      }
    }
  }
}

// The record of `device`, which must be the current one.
ErrorRecord* error_record_of(int device);

}  // namespace lean::cuda
