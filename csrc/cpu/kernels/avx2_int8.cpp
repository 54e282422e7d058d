// The tile kernels for int8 caches with AVX2.
#include "cpu/kernels/registry.h"

#if defined(LEAN_X86)
#include <immintrin.h>

LEAN_TARGET_BEGIN("avx2,fma,f16c")
namespace lean::cpu::avx2 {
#include "cpu/kernels/simd/avx2.h"
#include "cpu/kernels/tile_kernel-inl.h"

#include "cpu/kernels/rows_int8-inl.h"

const TileKernel float32_over_int8 = Int8TileKernel<float>::kernel("avx2");
const TileKernel float16_over_int8 = Int8TileKernel<Half>::kernel("avx2");
const TileKernel bfloat16_over_int8 = Int8TileKernel<BFloat16>::kernel("avx2");
}  // namespace lean::cpu::avx2
LEAN_TARGET_END
#endif
