// Numbers out of range, found on the device: the first one is kept until the host asks.
#pragma once

#include "bad_numbers.h"
#include "cuda/words.h"

namespace lean::cuda {

// One per device; zero when there is nothing to tell.
struct ErrorRecord {
  uint64_t reports;
  BadNumber first;
};

LEAN_DEVICE void report(ErrorRecord* record, const BadNumber& bad) {
  if (hw::fetch_add_relaxed(&record->reports, 1) == 0) record->first = bad;
}

// The record of `device`, which must be the current one.
ErrorRecord* error_record_of(int device);

}  // namespace lean::cuda
