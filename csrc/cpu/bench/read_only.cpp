// Decoding with a tile kernel that only reads: what memory and the schedule allow.
#include <cstring>
#include <type_traits>

#include "cpu/backend.h"
#include "cpu/decode.h"

namespace lean::cpu {
namespace {

constexpr int kLine = 64;

typedef uint64_t Vector __attribute__((vector_size(16)));

Vector load(const char* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

// Loads `count` rows of `bytes` each, line by line, and prefetches a line with each.
template <int level>
void read(const void* const* rows, int count, int bytes, const Prefetch& prefetch) {
  constexpr int kVectorBytes = sizeof(Vector);
  int row = prefetch.count > 0 ? prefetch.begin / prefetch.bytes : 0;
  int offset = prefetch.count > 0 ? prefetch.begin % prefetch.bytes : 0;
  const auto prefetch_line = [&] {
    if (row >= prefetch.count) return;
    __builtin_prefetch(static_cast<const char*>(prefetch.rows[row]) + offset, 0, 4 - level);
    if ((offset += kLine) >= prefetch.bytes) {
      offset = 0;
      ++row;
    }
  };
  Vector a{}, b{}, c{}, d{};
  for (int i = 0; i < count; ++i) {
    const char* at = static_cast<const char*>(rows[i]);
    const char* const end = at + bytes;
    for (; at + kLine <= end; at += kLine) {
      prefetch_line();
      a ^= load(at);
      b ^= load(at + kVectorBytes);
      c ^= load(at + 2 * kVectorBytes);
      d ^= load(at + 3 * kVectorBytes);
    }
    if (at < end) prefetch_line();
    for (; at + kVectorBytes <= end; at += kVectorBytes) a ^= load(at);
  }
  const Vector sum = a ^ b ^ c ^ d;
  asm volatile("" : : "m"(sum));  // or the compiler would leave out the loads
}

void read(const void* const* rows, int count, int bytes, const Prefetch& prefetch) {
  (prefetch.cache_level == 1 ? read<1> : read<2>)(rows, count, bytes, prefetch);
}

template <size_t element_bytes>
void read_keys(const TileState& t, const Rows& run, const RowView*, const Prefetch& prefetch) {
  read(run.row, run.tokens, t.head_dim * static_cast<int>(element_bytes), prefetch);
}

template <size_t element_bytes>
void read_keys_of_heads(const TileState* const* heads, int count, const Rows& run, const RowView*,
                        const Prefetch& prefetch) {
  read(run.row, run.tokens, count * heads[0]->head_dim * static_cast<int>(element_bytes), prefetch);
}

template <size_t element_bytes>
void read_values_of_heads(const TileState* const* heads, int count, const Rows& run,
                          const Prefetch& prefetch) {
  read(run.row, run.tokens, count * heads[0]->head_dim_v * static_cast<int>(element_bytes), prefetch);
}

template <size_t element_bytes>
void read_values(const TileState& t, const Rows& run, const Prefetch& prefetch) {
  read(run.row, run.tokens, t.head_dim_v * static_cast<int>(element_bytes), prefetch);
}

// The kernel for a cache of `cache_dtype`, but its `score` and `accumulate` only read the run's rows (and
// prefetch), so that heads stay as empty as they are.
TileKernel read_only_kernel(TileKernel like, DType cache_dtype) {
  const auto of_bytes = [&](auto bytes) {
    like.score = read_keys<bytes>;
    like.accumulate = read_values<bytes>;
    like.score_heads = read_keys_of_heads<bytes>;
    like.accumulate_heads = read_values_of_heads<bytes>;
    return like;
  };
  switch (element_size(like.dequantise != nullptr ? like.row_dtype : cache_dtype)) {
    case 1:
      return of_bytes(std::integral_constant<size_t, 1>{});
    case 2:
      return of_bytes(std::integral_constant<size_t, 2>{});
    default:
      return of_bytes(std::integral_constant<size_t, 4>{});
  }
}

}  // namespace

void read_only(const DecodeParams& params) {
  decode_with(params, [&](const TileKernel& kernel) { return read_only_kernel(kernel, params.k.dtype); });
}

}  // namespace lean::cpu
