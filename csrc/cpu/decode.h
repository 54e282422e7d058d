// The driver, for benchmarks that run it with a kernel of their own; backend.h has what the ops call.
#pragma once

#include <functional>

#include "cpu/kernels/tile_kernel.h"

namespace lean::cpu {

// With what `adapt` makes of the kernel that decode would use.
void decode_with(const DecodeParams& params,
                 const std::function<TileKernel(const TileKernel& kernel)>& adapt);

}  // namespace lean::cpu
