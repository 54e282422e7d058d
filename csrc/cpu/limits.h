// What bounds decoding on a CPU, measured: the probes that benchmarks compare with.
#pragma once

#include <cstdint>

#include "params.h"

namespace lean::cpu {

// Reads `bytes` (a multiple of 64) once, on all of torch's threads, in equal contiguous shares. The result
// only keeps the reads from being optimised away.
uint64_t stream_read(const void* memory, int64_t bytes);

// Multiplies as the tile routine for `dtype` does, on all of torch's threads, but from registers alone,
// without loads, conversions and softmax. Returns how many products it added up: `rounds` times a constant.
int64_t multiply(DType dtype, int64_t rounds);

}  // namespace lean::cpu
