// Tile routines for any target.
#include "cpu/tiles/tile_sets.h"

namespace lean::cpu::portable {
#include "cpu/tiles/simd/portable.h"
#include "cpu/tiles/tile_impl.h"

const TileRoutine float32 = Tile<float>::routine("portable");
const TileRoutine float16 = Tile<Half>::routine("portable");
const TileRoutine bfloat16 = Tile<BFloat16>::routine("portable");
}  // namespace lean::cpu::portable
