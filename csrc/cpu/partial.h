// The partial state of an output tile, while it is summed and set aside.
#pragma once

#include <algorithm>

#include "cpu/tiles/tile.h"

namespace lean::cpu {

// A partial state set aside: O of every row, then m and l of every row.
struct Partial {
  float* output;
  float* m;
  float* l;
};

inline void clear(const TileState& t) {
  std::fill_n(t.m, t.rows, kMinusInfinity);
  std::fill_n(t.l, t.rows, 0.0f);
  std::fill_n(t.output, t.rows * t.output_stride, 0.0f);
}

inline void set_aside(const TileState& t, const Partial& to) {
  std::copy_n(t.output, t.rows * t.output_stride, to.output);
  std::copy_n(t.m, t.rows, to.m);
  std::copy_n(t.l, t.rows, to.l);
}

inline void merge_into(const TileState& t, const Partial& from) {
  for (int row = 0; row < t.rows; ++row) {
    const Merged merged = merge({t.m[row], t.l[row]}, {from.m[row], from.l[row]});
    t.m[row] = merged.state.m;
    t.l[row] = merged.state.l;
    float* a = t.output + row * t.output_stride;
    const float* b = from.output + row * t.output_stride;
    for (int64_t i = 0; i < t.output_stride; ++i) a[i] = a[i] * merged.weight_a + b[i] * merged.weight_b;
  }
}

}  // namespace lean::cpu
