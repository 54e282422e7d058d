// Numbers out of range, found on the device: the first one is kept until the host asks.
#pragma once

#include "cuda/hardware.h"

namespace lean::cuda {

enum class Culprit : int64_t {
  none,
  seq_lens,
  cache_leftpad,
  cache_batch_idx,
  cu_seqlens_q,
  block_table,
  append
};

// One per device; zero when there is nothing to tell.
struct ErrorRecord {
  uint64_t reports;
  Culprit culprit;
  int64_t sequence;
  int64_t kv_head;
  int64_t index;  // in the row of block_table
  int64_t value;
};

LEAN_DEVICE void report(ErrorRecord* record, Culprit culprit, int64_t sequence, int64_t kv_head,
                        int64_t index, int64_t value) {
  if (hw::fetch_add_relaxed(&record->reports, 1) == 0) {
    record->sequence = sequence;
    record->kv_head = kv_head;
    record->index = index;
    record->value = value;
    record->culprit = culprit;
  }
}

// Of a device, which must be the current one.
ErrorRecord* error_record_of(int device);

}  // namespace lean::cuda
