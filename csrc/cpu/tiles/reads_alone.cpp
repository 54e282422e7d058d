// A tile routine that reads and computes nothing: what memory and the schedule allow, for benchmarks.
#include <cstring>
#include <type_traits>

#include "cpu/tiles/tile.h"

namespace lean::cpu {
namespace {

constexpr int kLine = 64;

typedef uint64_t Vector __attribute__((vector_size(16)));

Vector load(const char* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

// Loads `count` rows of `bytes` each, line by line, and asks for a line ahead with each.
template <int level>
void read(const void* const* rows, int count, int bytes, const RowsAhead& ahead) {
  constexpr int kVectorBytes = sizeof(Vector);
  int asked = ahead.count > 0 ? ahead.begin / ahead.bytes : 0;
  int offset = ahead.count > 0 ? ahead.begin % ahead.bytes : 0;
  const auto ask = [&] {
    if (asked >= ahead.count) return;
    __builtin_prefetch(static_cast<const char*>(ahead.rows[asked]) + offset, 0, 4 - level);
    if ((offset += kLine) >= ahead.bytes) {
      offset = 0;
      ++asked;
    }
  };
  Vector a{}, b{}, c{}, d{};
  for (int i = 0; i < count; ++i) {
    const char* at = static_cast<const char*>(rows[i]);
    const char* const end = at + bytes;
    for (; at + kLine <= end; at += kLine) {
      ask();
      a ^= load(at);
      b ^= load(at + kVectorBytes);
      c ^= load(at + 2 * kVectorBytes);
      d ^= load(at + 3 * kVectorBytes);
    }
    if (at < end) ask();
    for (; at + kVectorBytes <= end; at += kVectorBytes) a ^= load(at);
  }
  const Vector sum = a ^ b ^ c ^ d;
  asm volatile("" : : "m"(sum));  // or the compiler would leave out the loads
}

void read(const void* const* rows, int count, int bytes, const RowsAhead& ahead) {
  (ahead.cache_level == 1 ? read<1> : read<2>)(rows, count, bytes, ahead);
}

template <size_t element_bytes>
void read_keys(const TileState& t, const Run& run, const RowView*, const RowsAhead& ahead, const void*) {
  read(run.k_rows, run.tokens, t.head_dim * static_cast<int>(element_bytes), ahead);
}

template <size_t element_bytes>
void read_keys_abreast(const TileState* const* tiles, int heads, const Run& run, const RowView*,
                       const RowsAhead& ahead) {
  read(run.k_rows, run.tokens, heads * tiles[0]->head_dim * static_cast<int>(element_bytes), ahead);
}

template <size_t element_bytes>
void read_values_abreast(const TileState* const* tiles, int heads, const Run& run, const RowsAhead& ahead) {
  read(run.v_rows, run.tokens, heads * tiles[0]->head_dim_v * static_cast<int>(element_bytes), ahead);
}

template <size_t element_bytes>
void read_values(const TileState& t, const Run& run, const RowsAhead& ahead) {
  read(run.v_rows, run.tokens, t.head_dim_v * static_cast<int>(element_bytes), ahead);
}

}  // namespace

TileRoutine reads_alone(TileRoutine like, DType cache_dtype) {
  const auto of_bytes = [&](auto bytes) {
    like.score = read_keys<bytes>;
    like.accumulate = read_values<bytes>;
    like.score_abreast = read_keys_abreast<bytes>;
    like.accumulate_abreast = read_values_abreast<bytes>;
    return like;
  };
  switch (element_size(like.widen != nullptr ? like.row_dtype : cache_dtype)) {
    case 1:
      return of_bytes(std::integral_constant<size_t, 1>{});
    case 2:
      return of_bytes(std::integral_constant<size_t, 2>{});
    default:
      return of_bytes(std::integral_constant<size_t, 4>{});
  }
}

}  // namespace lean::cpu
