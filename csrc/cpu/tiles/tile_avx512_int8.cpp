// Tile routines for int8 caches with AVX-512.
#include "cpu/tiles/tile_sets.h"

#include <array>

#if defined(LEAN_X86)
#include <immintrin.h>

LEAN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace lean::cpu::avx512 {
#include "cpu/tiles/simd/avx512.h"
#include "cpu/tiles/tile_impl.h"

#include "cpu/tiles/int8_tile.h"

const TileRoutine float32_over_int8 = Int8Tile<float>::routine("avx512");
const TileRoutine float16_over_int8 = Int8Tile<Half>::routine("avx512");
const TileRoutine bfloat16_over_int8 = Int8Tile<BFloat16>::routine("avx512");
}  // namespace lean::cpu::avx512
LEAN_TARGET_END
#endif
