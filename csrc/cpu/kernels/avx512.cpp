// The tile kernels for AVX-512 without bf16 instructions.
#include "cpu/kernels/registry.h"

#include <array>

#if defined(LEAN_X86)
#include <immintrin.h>

LEAN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace lean::cpu::avx512 {
#include "cpu/kernels/simd/avx512.h"
#include "cpu/kernels/tile_kernel-inl.h"

#include "cpu/kernels/outer_products-inl.h"

const TileKernel float32 = TileKernelFor<float>::kernel("avx512");
const TileKernel float16 = TileKernelFor<Half>::kernel("avx512");
const TileKernel bfloat16 = TileKernelFor<BFloat16>::kernel("avx512");

// Measured on a Xeon: from these numbers of rows on they are faster than those above.
const TileKernel float32_many_rows = OuterProductKernel<float>::kernel("avx512", 16);
const TileKernel float16_many_rows = OuterProductKernel<Half>::kernel("avx512", 32);
const TileKernel bfloat16_many_rows = OuterProductKernel<BFloat16>::kernel("avx512", 48);
}  // namespace lean::cpu::avx512
LEAN_TARGET_END
#endif
