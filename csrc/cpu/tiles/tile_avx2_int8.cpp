// Tile routines for int8 caches with AVX2.
#include "cpu/tiles/tile_sets.h"

#if defined(LEAN_X86)
#include <immintrin.h>

LEAN_TARGET_BEGIN("avx2,fma,f16c")
namespace lean::cpu::avx2 {
#include "cpu/tiles/simd/avx2.h"
#include "cpu/tiles/tile_impl.h"

#include "cpu/tiles/int8_tile.h"

const TileRoutine float32_over_int8 = Int8Tile<float>::routine("avx2");
const TileRoutine float16_over_int8 = Int8Tile<Half>::routine("avx2");
const TileRoutine bfloat16_over_int8 = Int8Tile<BFloat16>::routine("avx2");
}  // namespace lean::cpu::avx2
LEAN_TARGET_END
#endif
