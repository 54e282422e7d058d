// The tile kernel for AMX, which multiplies 16 rows of bf16 with 16 others in one instruction: for output
// tiles of many rows. Softmax is that of the other kernels, as a microkernel of 16 rows.
#include "cpu/kernels/registry.h"

#include <array>

#if defined(LEAN_X86)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace lean::cpu::amx_bf16 {

// The kernel (Linux 5.16 and newer) gives a process the memory for its threads' tiles when asked to.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7's edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTiles)) != (kBf16 | kTiles)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace lean::cpu::amx_bf16

LEAN_TARGET_BEGIN("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c")
namespace lean::cpu::amx_bf16 {
#include "cpu/kernels/simd/avx512.h"
#include "cpu/kernels/tile_kernel-inl.h"

#include "cpu/kernels/rows_bf16-inl.h"

#include "cpu/kernels/amx_tiles-inl.h"

// The products of a run are made for all rows at once, tile by tile:
//
//   scores [tokens, rows] = K [tokens, dims] x q [dims, rows]
//   output [rows, dims]  += weights [rows, tokens] x V [tokens, dims]
//
// The right factor of a product has pairs of what is summed over together: q is packed so when a segment
// begins, V once per run for all rows. K is taken as it lies in the cache. Scores come out token-major, as
// softmax takes them, and only the weights have to be transposed.
struct AmxKernel {
  using S = Simd;
  using F = S::F;
  using Microkernel16 = Microkernel<BFloat16, Bf16Rows, kTileRows>;
  using Shared = TileKernelFor<BFloat16, Bf16Rows>;
  using Prefetcher = PrefetcherInto<2, false>;
  using Pair = uint32_t;  // two bf16 numbers

  static constexpr int kTileTokens = kTileRows;
  static constexpr int kTileDims = kTilePairs * 2;  // that one product of tiles sums over
  static constexpr int kHalfTokens = kTilePairs * 2;
  static constexpr int kLine = 64;

  // A thread's memory beside the states: K rows that have to be copied, and a run's V in pairs.
  static int64_t scratch_bytes(int64_t head_dim, int64_t head_dim_v) {
    return kRunTokens * 2 * (round_up(head_dim, kTileDims) + round_up(head_dim_v, kTileDims));
  }
  static char* keys_scratch(const TileState& t) { return static_cast<char*>(t.scratch); }
  static char* values_scratch(const TileState& t) {
    return keys_scratch(t) + kRunTokens * 2 * round_up(t.head_dim, kTileDims);
  }
  static int padded_tokens(const Rows& run) { return static_cast<int>(round_up(run.tokens, kHalfTokens)); }

  // Packed q: [row tile][chunk of kTileDims][pair of dims][row].
  static int64_t query_tile_bytes(const TileState& t) {
    return round_up(t.head_dim, kTileDims) / kTileDims * kTileBytes;
  }
  static void pack_query(const TileState& t, int row, const void* q) {
    char* const tile = static_cast<char*>(t.q) + row / kTileRows * query_tile_bytes(t);
    auto* to = reinterpret_cast<Pair*>(tile) + row % kTileRows;
    const char* from = static_cast<const char*>(q);
    for (int pair = 0; pair < round_up(t.head_dim, kTileDims) / 2; ++pair, to += kTileRows) {
      if (2 * pair < t.head_dim) {
        memcpy(to, from + pair * sizeof(Pair), sizeof(Pair));
      } else {
        *to = 0;
      }
    }
  }

  // Where a tile of K rows lies.
  struct KeyTile {
    const char* first;
    int64_t stride;
  };
  // Rows at equal distances are multiplied where they are.
  static KeyTile key_tile(const TileState& t, const void* const* rows, char* copy) {
    const auto at = [&](int i) { return static_cast<const char*>(rows[i]); };
    const int64_t stride = at(1) - at(0);
    bool regular = t.head_dim % kTileDims == 0;
    for (int i = 2; i < kTileTokens; ++i) regular &= at(i) - at(i - 1) == stride;
    if (regular) return {at(0), stride};
    const int64_t padded = round_up(t.head_dim, kTileDims);
    for (int i = 0; i < kTileTokens; ++i) {
      auto* const to = reinterpret_cast<BFloat16*>(copy) + i * padded;
      for (int column = 0; column < t.head_dim; column += kTileDims) {
        const auto* const from = static_cast<const BFloat16*>(rows[i]) + column;
        const int columns = std::min(t.head_dim - column, kTileDims);
        _mm512_storeu_si512(to + column, Bf16Rows::load_tail(from, columns).x);
      }
    }
    return {copy, padded * 2};
  }

  // Multiplies one or two tiles of tokens with one or two tiles of rows.
  template <int token_tiles, int row_tiles>
  static void multiply_key_tiles(const KeyTile* keys, const char* q, int64_t query_bytes, int64_t key_bytes,
                                 float* scores, Prefetcher* prefetcher) {
    Tiles::zero<0>();
    if constexpr (row_tiles > 1) Tiles::zero<1>();
    if constexpr (token_tiles > 1) Tiles::zero<2>();
    if constexpr (token_tiles > 1 && row_tiles > 1) Tiles::zero<3>();
    for (int64_t column = 0; column < key_bytes; column += kTilePairs * 4, q += kTileBytes) {
      Tiles::load<4>(keys[0].first + column, keys[0].stride);
      if constexpr (token_tiles > 1) Tiles::load<5>(keys[1].first + column, keys[1].stride);
      Tiles::load<6>(q, kTilePairs * 4);
      if constexpr (row_tiles > 1) Tiles::load<7>(q + query_bytes, kTilePairs * 4);
      Tiles::multiply<0, 4, 6>();
      if constexpr (row_tiles > 1) Tiles::multiply<1, 4, 7>();
      if constexpr (token_tiles > 1) Tiles::multiply<2, 5, 6>();
      if constexpr (token_tiles > 1 && row_tiles > 1) Tiles::multiply<3, 5, 7>();
      if (prefetcher != nullptr) {
#pragma GCC unroll 1
        for (int i = 0; i < token_tiles * kTileTokens / 2; ++i) prefetcher->issue<kLine>(0, 0, 1, nullptr);
      }
    }
    constexpr int kTileFloats = kTileTokens * kTileRows, kToNextRows = kRunTokens * kTileRows;
    Tiles::store<0>(scores, kTileRows * 4);
    if constexpr (row_tiles > 1) Tiles::store<1>(scores + kToNextRows, kTileRows * 4);
    if constexpr (token_tiles > 1) Tiles::store<2>(scores + kTileFloats, kTileRows * 4);
    if constexpr (token_tiles > 1 && row_tiles > 1) {
      Tiles::store<3>(scores + kToNextRows + kTileFloats, kTileRows * 4);
    }
  }

  static void multiply_keys(const TileState& t, const Rows& run, Prefetcher& prefetcher) {
    const TilesInUse in_use;
    const int token_tiles = padded_tokens(run) / kTileTokens;
    const int64_t padded = round_up(t.head_dim, kTileDims), query_bytes = query_tile_bytes(t);
    KeyTile keys[kRunTokens / kTileTokens];
    for (int i = 0; i < token_tiles; ++i) {
      keys[i] = key_tile(t, run.row + i * kTileTokens, keys_scratch(t) + i * kTileTokens * padded * 2);
    }
    const char* q = static_cast<const char*>(t.q);
    float* scores = t.scores;
    for (int row = 0; row < t.rows; row += 2 * kTileRows) {
      const bool two = row + kTileRows < t.rows;
      for (int i = 0; i < token_tiles; i += 2) {  // their number is even
        auto* const its_prefetcher = row == 0 ? &prefetcher : nullptr;
        (two ? multiply_key_tiles<2, 2> : multiply_key_tiles<2, 1>)(keys + i, q, query_bytes, padded * 2,
                                                                    scores + i * kTileTokens * kTileRows,
                                                                    its_prefetcher);
      }
      q += 2 * query_bytes;
      scores += 2 * kRunTokens * kTileRows;
    }
  }

  static void score(const TileState& t, const Rows& run, const RowView* views, const Prefetch& prefetch) {
    Prefetcher prefetcher(Shared::some_prefetch(prefetch, run.row, t.head_dim), 0);
    multiply_keys(t, run, prefetcher);
    const int tokens = padded_tokens(run);
    const F scale = S::set1(t.scale);
    float* scores = t.scores;
    for (int row = 0; row < t.rows; row += kTileRows, scores += kRunTokens * kTileRows) {
      F m = S::set1(kMinusInfinity);
      for (int i = 0; i < tokens * kTileRows; i += S::kLanes) {
        const F s = scaled_score<ScoreMath>(S::load(scores + i), scale);
        S::store(scores + i, s);
        m = S::max(s, m);  // m where s is NaN
        if (row == 0) prefetcher.issue<2 * kLine>(0, 0, 1, nullptr);
      }
      Microkernel16::finish_run(t, row, scores, run, tokens, views, m);
    }
  }

  // Puts a run's V rows into the form of a right factor: [half of the run][tile of dims][pair of
  // tokens][dim].
  static void pack_values(const TileState& t, const Rows& run, Prefetcher& prefetcher) {
    const int64_t chunks = ceil_div(t.head_dim_v, kTileDims);
    for (int token = 0; token < padded_tokens(run); token += 2) {
      const int half = token / kHalfTokens, pair = token % kHalfTokens / 2;
      char* to = values_scratch(t) + half * chunks * 2 * kTileBytes + pair * kTilePairs * 4;
      for (int column = 0; column < t.head_dim_v; column += kTileDims, to += 2 * kTileBytes) {
        const int columns = std::min(t.head_dim_v - column, kTileDims);
        const auto step = Bf16Rows::load_step(run.row + token, [&](const BFloat16* row) LEAN_INLINE {
          return columns == kTileDims ? Bf16Rows::load(row + column)
                                      : Bf16Rows::load_tail(row + column, columns);
        });
        _mm512_storeu_si512(to, reinterpret_cast<__m512i>(step.a));
        _mm512_storeu_si512(to + kTileBytes, reinterpret_cast<__m512i>(step.b));
        prefetcher.issue<kLine>(0, 0, 1, nullptr);
      }
    }
  }

  // Adds two tiles of dims of one or two tiles of rows.
  template <int row_tiles>
  static void multiply_value_tiles(const float* weights, const char* values, int halves, int64_t half_bytes,
                                   float* output, int64_t output_stride) {
    float* const next_rows = output + kTileRows * output_stride;
    const int64_t stride = output_stride * 4;
    Tiles::load<0>(output, stride);
    Tiles::load<1>(output + kTileRows, stride);
    if constexpr (row_tiles > 1) {
      Tiles::load<2>(next_rows, stride);
      Tiles::load<3>(next_rows + kTileRows, stride);
    }
    for (int half = 0; half < halves; ++half, values += half_bytes, weights += kTileBytes / 4) {
      Tiles::load<4>(weights, kTilePairs * 4);
      if constexpr (row_tiles > 1) Tiles::load<5>(weights + kRunTokens * kTileRows, kTilePairs * 4);
      Tiles::load<6>(values, kTilePairs * 4);
      Tiles::load<7>(values + kTileBytes, kTilePairs * 4);
      Tiles::multiply<0, 4, 6>();
      Tiles::multiply<1, 4, 7>();
      if constexpr (row_tiles > 1) {
        Tiles::multiply<2, 5, 6>();
        Tiles::multiply<3, 5, 7>();
      }
    }
    Tiles::store<0>(output, stride);
    Tiles::store<1>(output + kTileRows, stride);
    if constexpr (row_tiles > 1) {
      Tiles::store<2>(next_rows, stride);
      Tiles::store<3>(next_rows + kTileRows, stride);
    }
  }

  // Makes weights of a row tile's scores, transposes them and rescales the tile's output. The first tile's
  // softmax prefetches, which is spread over all that takes time.
  static void weigh(const TileState& t, int row, float* scores, const Rows& run, int tokens,
                    Prefetcher& prefetcher) {
    const F correction = Microkernel16::weigh(t, row, scores, run, tokens, [&](int i, F a, F b) LEAN_INLINE {
      Bf16Rows::store_weights<kTileRows>(scores, i, a, b);
      if (row == 0) prefetcher.issue<4 * kLine>(0, 0, 1, nullptr);
    });
    for (int half = 0; half < tokens / kHalfTokens; ++half) transpose(scores + half * kTileBytes / 4);
    const int rows = std::min(t.rows - row, kTileRows);
    if ((_mm512_cmp_ps_mask(correction, S::set1(1.0f), _CMP_NEQ_UQ) & ((1u << rows) - 1)) == 0) return;
    float corrections[S::kLanes];
    S::store(corrections, correction);
    for (int r = 0; r < rows; ++r) {
      float* const output = t.output + (row + r) * t.output_stride;
      const F factor = S::set1(corrections[r]);
      for (int64_t i = 0; i < t.output_stride; i += S::kLanes) {
        S::store(output + i, S::mul(S::load(output + i), factor));
      }
    }
  }

  static void accumulate(const TileState& t, const Rows& run, const Prefetch& prefetch) {
    Prefetcher prefetcher(Shared::some_prefetch(prefetch, run.row, t.head_dim_v), 0);
    pack_values(t, run, prefetcher);
    const TilesInUse in_use;
    const int tokens = padded_tokens(run), halves = tokens / kHalfTokens;
    const int64_t chunks = ceil_div(t.head_dim_v, kTileDims);
    float* scores = t.scores;
    for (int row = 0; row < t.rows; row += 2 * kTileRows, scores += 2 * kRunTokens * kTileRows) {
      const bool two = row + kTileRows < t.rows;
      weigh(t, row, scores, run, tokens, prefetcher);
      if (two) weigh(t, row + kTileRows, scores + kRunTokens * kTileRows, run, tokens, prefetcher);
      const auto multiply = two ? multiply_value_tiles<2> : multiply_value_tiles<1>;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        multiply(scores, values_scratch(t) + chunk * 2 * kTileBytes, halves, chunks * 2 * kTileBytes,
                 t.output + row * t.output_stride + chunk * kTileDims, t.output_stride);
      }
    }
  }

  static void dequantise(DType from, const DequantiseTable& table, const void* const* rows, int count,
                         int columns, void* to, const Prefetch& prefetch) {
    if (from != DType::int8) {
      return Shared::dequantise(from, table, rows, count, columns, to, prefetch);
    }
    auto* out = static_cast<BFloat16*>(to);
    for (int i = 0; i < count; ++i, out += columns) {
      if (i < prefetch.count) prefetch_bytes<2>(prefetch.rows[i], prefetch.bytes);
      const auto* const row = static_cast<const int8_t*>(rows[i]);
      for (int column = 0; column < columns; column += kTileDims) {
        const __mmask32 mask = S::tail_mask(std::min(columns - column, kTileDims));
        const S::Pair x = S::load_pair_tail(row + column, std::min(columns - column, kTileDims));
        _mm512_mask_storeu_epi16(out + column, mask,
                                 reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x.b, x.a)));
      }
    }
  }

  static int64_t fma_loop(int64_t rounds) {
    const TilesInUse in_use;
    alignas(64) static constexpr char zeros[kTileBytes] = {};
    constexpr int kProducts = 16;
    Tiles::load<6>(zeros, kTilePairs * 4);
    Tiles::load<7>(zeros, kTilePairs * 4);
    for (int64_t i = 0; i < rounds; ++i) {
      unrolled<kProducts>([](auto product) LEAN_INLINE { Tiles::multiply<product % 4, 6, 7>(); });
    }
    return rounds * kProducts * kTileRows * kTileTokens * kTileDims;
  }

  // For output tiles of `min_rows` rows or more: with fewer, most of a tile would be empty.
  static constexpr TileKernel kernel(int min_rows) {
    return {.instruction_set = "amx_bf16",
            .row_dtype = DType::bfloat16,
            .chunk_columns = kTileDims,
            .min_rows = min_rows,
            .rows_at_once = kTileRows,
            .max_rows_for_heads = 0,
            .scratch_bytes = scratch_bytes,
            .pack_query = pack_query,
            .score = score,
            .score_heads = nullptr,
            .accumulate = accumulate,
            .accumulate_heads = nullptr,
            .write_output = Shared::write_output,
            .dequantise = dequantise,
            .fma_loop = fma_loop};
  }
};

// Measured on Sapphire Rapids: from these numbers of rows on they are faster than the kernels without AMX.
const TileKernel bfloat16 = AmxKernel::kernel(9);
const TileKernel bfloat16_over_int8 = AmxKernel::kernel(12);
}  // namespace lean::cpu::amx_bf16
LEAN_TARGET_END
#endif
