// Tile routines for AVX-512 without bf16 instructions.
#include "cpu/tiles/tile_sets.h"

#include <array>

#if defined(LEAN_X86)
#include <immintrin.h>

LEAN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace lean::cpu::avx512 {
#include "cpu/tiles/simd/avx512.h"
#include "cpu/tiles/tile_impl.h"

const TileRoutine float32 = Tile<float>::routine("avx512");
const TileRoutine float16 = Tile<Half>::routine("avx512");
const TileRoutine bfloat16 = Tile<BFloat16>::routine("avx512");
}  // namespace lean::cpu::avx512
LEAN_TARGET_END
#endif
