// The machine's streaming-read bandwidth, which bounds decoding: the probe that benchmarks compare with.
#pragma once

#include <cstdint>

namespace lean::cpu {

// Reads `bytes` (a multiple of 64) once, on all of torch's threads, in equal contiguous shares. The result
// only keeps the reads from being optimised away.
uint64_t stream_read(const void* memory, int64_t bytes);

}  // namespace lean::cpu
