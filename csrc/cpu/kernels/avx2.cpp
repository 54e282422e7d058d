// The tile kernels for AVX2 with FMA and F16C.
#include "cpu/kernels/registry.h"

#if defined(LEAN_X86)
#include <immintrin.h>

LEAN_TARGET_BEGIN("avx2,fma,f16c")
namespace lean::cpu::avx2 {
#include "cpu/kernels/simd/avx2.h"
#include "cpu/kernels/tile_kernel-inl.h"

#include "cpu/kernels/outer_products-inl.h"

const TileKernel float32 = TileKernelFor<float>::kernel("avx2");
const TileKernel float16 = TileKernelFor<Half>::kernel("avx2");
const TileKernel bfloat16 = TileKernelFor<BFloat16>::kernel("avx2");

// Measured on a Xeon: from these numbers of rows on they are faster than those above.
const TileKernel float32_many_rows = OuterProductKernel<float>::kernel("avx2", 12);
const TileKernel float16_many_rows = OuterProductKernel<Half>::kernel("avx2", 16);
const TileKernel bfloat16_many_rows = OuterProductKernel<BFloat16>::kernel("avx2", 16);
}  // namespace lean::cpu::avx2
LEAN_TARGET_END
#endif
