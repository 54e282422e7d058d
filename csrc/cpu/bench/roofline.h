// The roofline of decoding on a CPU: the loops whose speed benchmarks take for the read bandwidth and the
// rate of products.
#pragma once

#include <cstdint>

#include "params.h"

namespace lean::cpu {

// Reads `bytes` (a multiple of 64) once, on all of torch's threads, in equal contiguous shares; what
// read_bandwidth times. The result only keeps the reads from being optimised away.
uint64_t read_loop(const void* memory, int64_t bytes);

// Multiplies as the tile kernel for `dtype` and output tiles of `rows` rows does, on all of torch's threads,
// but from registers alone, without loads, conversions and softmax. Returns how many products it added up
// (`rounds` times a constant); what fma_rate times.
int64_t fma_loop(DType dtype, int64_t rounds, int64_t rows);

}  // namespace lean::cpu
