// The driver, for benchmarks that run it with a kernel of their own; backend.h has what the ops call.
#pragma once

#include "cpu/kernels/tile_kernel.h"

namespace lean::cpu {

void decode_with(const DecodeParams& params, const TileKernel& kernel);

}  // namespace lean::cpu
