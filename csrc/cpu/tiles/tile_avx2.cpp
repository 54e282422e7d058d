// Tile routines for AVX2 with FMA and F16C.
#include "cpu/tiles/tile_sets.h"

#if defined(LEAN_X86)
#include <immintrin.h>

LEAN_TARGET_BEGIN("avx2,fma,f16c")
namespace lean::cpu::avx2 {
#include "cpu/tiles/simd/avx2.h"
#include "cpu/tiles/tile_impl.h"

const TileRoutine float32 = Tile<float>::routine("avx2");
const TileRoutine float16 = Tile<Half>::routine("avx2");
const TileRoutine bfloat16 = Tile<BFloat16>::routine("avx2");
}  // namespace lean::cpu::avx2
LEAN_TARGET_END
#endif
