// The tile kernels for int8 caches with AVX-512.
#include "cpu/kernels/registry.h"

#include <array>

#if defined(LEAN_X86)
#include <immintrin.h>

LEAN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace lean::cpu::avx512 {
#include "cpu/kernels/simd/avx512.h"
#include "cpu/kernels/tile_kernel-inl.h"

#include "cpu/kernels/rows_int8-inl.h"

const TileKernel float32_over_int8 = Int8TileKernel<float>::kernel("avx512");
const TileKernel float16_over_int8 = Int8TileKernel<Half>::kernel("avx512");
const TileKernel bfloat16_over_int8 = Int8TileKernel<BFloat16>::kernel("avx512");
}  // namespace lean::cpu::avx512
LEAN_TARGET_END
#endif
