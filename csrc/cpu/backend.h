// The CPU backend, as the ops see it.
#pragma once

#include "backend_interface.h"

namespace lean::cpu {

// Computes attention on torch's own threads. Throws if a sequence length is out of range.
void decode(const DecodeParams& params);

// Computes the same by the schedules that stream-K replaces, for benchmarks: every output tile is cut into
// `splits` pieces.
void decode_fixed_split(const DecodeParams& params, int64_t splits);

// Reads K and V as `decode` does and computes nothing, for benchmarks: out is 0 and lse -inf.
void read_only(const DecodeParams& params);

void merge_states(const MergeParams& params);

// Throws if a token would go outside the cache; nothing is written then.
void append_kv(const AppendParams& params);

inline constexpr Backend kBackend{
    .decode = [](const DecodeParams& params, const Queue&) { decode(params); },
    .append_kv = [](const AppendParams& params, const Queue&) { append_kv(params); },
    .merge_states = [](const MergeParams& params, const Queue&) { merge_states(params); },
};

}  // namespace lean::cpu
