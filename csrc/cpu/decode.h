// The CPU backend.
#pragma once

#include "params.h"

namespace lean::cpu {

// Runs on torch's own threads. Throws if a sequence length is out of range.
void decode(const DecodeParams& params);

void merge_states(const MergeParams& params);

}  // namespace lean::cpu
