// The tile kernels for any target.
#include "cpu/kernels/registry.h"

namespace lean::cpu::portable {
#include "cpu/kernels/simd/portable.h"
#include "cpu/kernels/tile_kernel-inl.h"

const TileKernel float32 = TileKernelFor<float>::kernel("portable");
const TileKernel float16 = TileKernelFor<Half>::kernel("portable");
const TileKernel bfloat16 = TileKernelFor<BFloat16>::kernel("portable");
}  // namespace lean::cpu::portable
