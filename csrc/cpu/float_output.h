// Rows of O in float32, where q has 16 bits: outputs that are merged with others before they are rounded.
#pragma once

#include <cstdint>

#include "cpu/kernels/tile_kernel.h"

namespace lean::cpu {

// Writes row * factor, as the kernel's write_output does in q's dtype. Kernels say in which order they have
// columns, so this is here once for all instruction sets.
inline void write_floats(const TileKernel& kernel, const TileState& t, int row, float factor, float* out) {
  const float* const from = t.output + row * t.output_stride;
  const int half = kernel.chunk_columns / 2;
  // In each order, eight neighbouring columns are two times four that lie together.
  for (int column = 0; column < t.head_dim_v; column += 8, out += 8) {
    const int in_chunk = column % kernel.chunk_columns;
    const float* const first = from + column - in_chunk / 2;
    switch (kernel.column_order) {
      case ColumnOrder::natural:
        for (int i = 0; i < 8; ++i) out[i] = from[column + i] * factor;
        break;
      case ColumnOrder::even_odd:
        for (int i = 0; i < 4; ++i) {
          out[2 * i] = first[i] * factor;
          out[2 * i + 1] = first[half + i] * factor;
        }
        break;
      case ColumnOrder::pairs_of_fours:
        for (int i = 0; i < 4; ++i) {
          out[i] = first[i] * factor;
          out[4 + i] = first[half + i] * factor;
        }
        break;
    }
  }
}

}  // namespace lean::cpu
