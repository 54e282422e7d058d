// The CPU backend.
#pragma once

#include "params.h"

namespace lean::cpu {

// Runs on torch's own threads. Throws if a sequence length is out of range.
void decode(const DecodeParams& params);

// The same by the schedules that stream-K replaces, for benchmarks: every output tile cut into `splits`
// pieces.
void decode_fixed_split(const DecodeParams& params, int64_t splits);

void merge_states(const MergeParams& params);

}  // namespace lean::cpu
