// The tile kernels for AMX, which multiplies 16 rows of bf16 with 16 others in one instruction: for output
// tiles of many rows, of bf16 or of fp16 as sums of two bf16 numbers. Softmax is that of the other kernels,
// as a microkernel of 16 rows.
#include "cpu/kernels/registry.h"

#include <array>

#if defined(LEAN_X86)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace lean::cpu::amx {

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

}  // namespace lean::cpu::amx

LEAN_TARGET_BEGIN("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c")
namespace lean::cpu::amx {
#include "cpu/kernels/simd/avx512.h"
#include "cpu/kernels/tile_kernel-inl.h"

#include "cpu/kernels/rows_bf16-inl.h"

#include "cpu/kernels/amx_tiles-inl.h"
#include "cpu/kernels/rows_amx-inl.h"

// The products of a run are made for all rows at once, tile by tile:
//
//   scores [tokens, rows] = K [tokens, dims] x q [dims, rows]
//   output [rows, dims]  += weights [rows, tokens] x V [tokens, dims]
//
// The right factor of a product has pairs of what is summed over together: q is packed so when a segment
// begins, V once per run for all rows. K is taken as it lies in the cache, if it is bf16. Scores come out
// token-major, as softmax takes them, and only the weights have to be transposed.
template <class KvRows>
struct AmxKernel {
  using S = Simd;
  using F = S::F;
  using Microkernel16 = Microkernel<BFloat16, Bf16Rows, kTileRows>;
  using Tensor = KvRows::Tensor;
  using Shared = TileKernelFor<Tensor>;
  using Prefetcher = PrefetcherInto<2, false>;
  using Pair = uint32_t;  // two bf16 numbers

  static constexpr int kTileTokens = kTileRows;
  static constexpr int kTileDims = kTilePairs * 2;  // that one product of tiles sums over
  static constexpr int kHalfTokens = kTilePairs * 2;
  static constexpr int kParts = KvRows::kParts;
  static constexpr int64_t kValuesPartBytes = kRunTokens * kLine;  // of kTileDims columns of a run's V
  static constexpr int kWeightsStride = kParts * kLine;            // bytes from a row of weights to the next

  static int64_t padded(int64_t dims) { return round_up(dims, kTileDims); }
  // Bytes of a part of a run's rows.
  static int64_t run_bytes(int64_t dims) { return kRunTokens * 2 * padded(dims); }

  // A thread's memory beside the states: K rows that have to be copied, and kTileDims columns of a run's V in
  // pairs.
  static int64_t scratch_bytes(int64_t dims) { return kParts * (run_bytes(dims) + kValuesPartBytes); }
  static char* keys_scratch(const TileState& t) { return static_cast<char*>(t.scratch); }
  static char* values_scratch(const TileState& t) { return keys_scratch(t) + kParts * run_bytes(t.head_dim); }
  static int padded_tokens(const Rows& run) { return static_cast<int>(round_up(run.tokens, kHalfTokens)); }

  // Packed q: [row tile][part][chunk of kTileDims][pair of dims][row].
  static int64_t query_part_bytes(const TileState& t) { return padded(t.head_dim) / kTileDims * kTileBytes; }
  static void pack_query(const TileState& t, int row, const void* q) {
    char* tile = static_cast<char*>(t.q) + row / kTileRows * kParts * query_part_bytes(t);
    // Rows that fill a tile up are zeros: what they score decides with the others' when a tile is rescaled.
    if (row % kTileRows == 0 && t.rows - row < kTileRows) memset(tile, 0, kParts * query_part_bytes(t));
    for (int column = 0; column < t.head_dim; column += kTileDims, tile += kTileBytes) {
      const auto chunk = load(q, column, t.head_dim);
      for (int part = 0; part < kParts; ++part) {
        Pair pairs[kTilePairs];
        _mm512_storeu_si512(pairs, chunk.part[part]);
        auto* const to = reinterpret_cast<Pair*>(tile + part * query_part_bytes(t)) + row % kTileRows;
        for (int pair = 0; pair < kTilePairs; ++pair) to[pair * kTileRows] = pairs[pair];
      }
    }
  }
  static KvRows::Parts load(const void* row, int column, int dims) {
    return KvRows::load(static_cast<const Tensor*>(row) + column, std::min(dims - column, kTileDims));
  }

  // Where a tile of K rows lies; its parts are `to_part` bytes apart.
  struct KeyTile {
    const char* first;
    int64_t stride;
  };
  // Rows at equal distances are multiplied where they are.
  static KeyTile key_tile(const TileState& t, const void* const* rows, char* copy) {
    const auto at = [&](int i) { return static_cast<const char*>(rows[i]); };
    const int64_t stride = at(1) - at(0);
    bool regular = kParts == 1 && t.head_dim % kTileDims == 0;
    for (int i = 2; i < kTileTokens; ++i) regular &= at(i) - at(i - 1) == stride;
    if (regular) return {at(0), stride};
    const int64_t row_bytes = 2 * padded(t.head_dim);
    for (int i = 0; i < kTileTokens; ++i) {
      for (int column = 0; column < t.head_dim; column += kTileDims) {
        const auto chunk = load(rows[i], column, t.head_dim);
        for (int part = 0; part < kParts; ++part) {
          _mm512_storeu_si512(copy + part * run_bytes(t.head_dim) + i * row_bytes + 2 * column,
                              chunk.part[part]);
        }
      }
    }
    return {copy, row_bytes};
  }

  template <int lines>
  static void prefetch_lines(Prefetcher& prefetcher) {
#pragma GCC unroll 1
    for (int i = 0; i < lines; ++i) prefetcher.template issue<kLine>(0, 0, 1, nullptr);
  }

  // Multiplies two tiles of tokens with one or two tiles of rows.
  template <int row_tiles>
  static void multiply_key_tiles(const TileState& t, const KeyTile* keys, const char* q, float* scores,
                                 Prefetcher* prefetcher) {
    const int64_t to_part = run_bytes(t.head_dim), to_query_part = query_part_bytes(t);
    unrolled<2 * row_tiles>([](auto tile) LEAN_INLINE { Tiles::zero<tile>(); });
    for (const auto& [key_part, query_part] : KvRows::kScoreProducts) {
      const char* right = q + query_part * to_query_part;
      const int64_t end = key_part * to_part + 2 * padded(t.head_dim);
      for (int64_t column = key_part * to_part; column < end; column += kLine, right += kTileBytes) {
        Tiles::load<4>(keys[0].first + column, keys[0].stride);
        Tiles::load<5>(keys[1].first + column, keys[1].stride);
        Tiles::load<6>(right, kLine);
        if constexpr (row_tiles > 1) Tiles::load<7>(right + kParts * to_query_part, kLine);
        Tiles::multiply<0, 4, 6>();
        Tiles::multiply<1, 5, 6>();
        if constexpr (row_tiles > 1) {
          Tiles::multiply<2, 4, 7>();
          Tiles::multiply<3, 5, 7>();
        }
        if (prefetcher != nullptr && key_part + query_part == 0) prefetch_lines<kTileTokens>(*prefetcher);
      }
    }
    constexpr int kTileFloats = kTileTokens * kTileRows, kToNextRows = kRunTokens * kTileRows;
    Tiles::store<0>(scores, kLine);
    Tiles::store<1>(scores + kTileFloats, kLine);
    if constexpr (row_tiles > 1) {
      Tiles::store<2>(scores + kToNextRows, kLine);
      Tiles::store<3>(scores + kToNextRows + kTileFloats, kLine);
    }
  }

  static void multiply_keys(const TileState& t, const Rows& run, Prefetcher& prefetcher) {
    const int token_tiles = padded_tokens(run) / kTileTokens;
    KeyTile keys[kRunTokens / kTileTokens];
    for (int i = 0; i < token_tiles; ++i) {
      char* const copy = keys_scratch(t) + i * kTileTokens * 2 * padded(t.head_dim);
      keys[i] = key_tile(t, run.row + i * kTileTokens, copy);
    }
    const char* q = static_cast<const char*>(t.q);
    float* scores = t.scores;
    for (int row = 0; row < t.rows; row += 2 * kTileRows) {
      const auto multiply = row + kTileRows < t.rows ? multiply_key_tiles<2> : multiply_key_tiles<1>;
      for (int i = 0; i < token_tiles; i += 2) {  // their number is even
        multiply(t, keys + i, q, scores + i * kTileTokens * kTileRows, row == 0 ? &prefetcher : nullptr);
      }
      q += 2 * kParts * query_part_bytes(t);
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
        if (row == 0) prefetcher.template issue<2 * kLine>(0, 0, 1, nullptr);
      }
      Microkernel16::finish_run(t, row, scores, run, tokens, views, m);
    }
  }

  // Puts kTileDims columns of a run's V rows into the form of a right factor:
  // [part][half of the run][tile of dims][pair of tokens][dim].
  static void pack_values(const TileState& t, const Rows& run, int column, Prefetcher& prefetcher) {
    const auto load_row = [&](int token) LEAN_INLINE { return load(run.row[token], column, t.head_dim_v); };
    char* to = values_scratch(t);
    for (int half = 0; half < padded_tokens(run); half += kHalfTokens, to += kTileBytes) {
      for (int token = half; token < half + kHalfTokens; token += 2, to += kLine) {
        const auto a = load_row(token), b = load_row(token + 1);
        for (int part = 0; part < kParts; ++part) {
          char* const to_part = to + part * kValuesPartBytes;
          _mm512_storeu_si512(to_part, KvRows::pair_first(a.part[part], b.part[part]));
          _mm512_storeu_si512(to_part + kTileBytes, KvRows::pair_second(a.part[part], b.part[part]));
        }
        prefetcher.template issue<kLine>(0, 0, 1, nullptr);
      }
    }
  }

  // Adds two tiles of dims of one or two tiles of rows.
  template <int row_tiles>
  static void multiply_value_tiles(const TileState& t, const float* weights, int halves, float* output,
                                   Prefetcher* prefetcher) {
    const int64_t stride = t.output_stride * 4;
    float* const next_rows = output + kTileRows * t.output_stride;
    Tiles::load<0>(output, stride);
    Tiles::load<1>(output + kTileRows, stride);
    if constexpr (row_tiles > 1) {
      Tiles::load<2>(next_rows, stride);
      Tiles::load<3>(next_rows + kTileRows, stride);
    }
    for (const auto& [weight_part, value_part] : KvRows::kSumProducts) {
      const float* left = weights + weight_part * kLine / 4;
      const char* right = values_scratch(t) + value_part * kValuesPartBytes;
      for (int half = 0; half < halves; ++half) {
        Tiles::load<4>(left, kWeightsStride);
        if constexpr (row_tiles > 1) Tiles::load<5>(left + kRunTokens * kTileRows, kWeightsStride);
        Tiles::load<6>(right, kLine);
        Tiles::load<7>(right + kTileBytes, kLine);
        Tiles::multiply<0, 4, 6>();
        Tiles::multiply<1, 4, 7>();
        if constexpr (row_tiles > 1) {
          Tiles::multiply<2, 5, 6>();
          Tiles::multiply<3, 5, 7>();
        }
        if (prefetcher != nullptr && weight_part + value_part == 0) {
          prefetch_lines<kTileTokens / 2>(*prefetcher);
        }
        left += kTileRows * kWeightsStride / 4;
        right += 2 * kTileBytes;
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
  // softmax prefetches, as do the packing of V and the first products: spread over all that takes time.
  static void weigh(const TileState& t, int row, float* scores, const Rows& run, int tokens,
                    Prefetcher& prefetcher) {
    // The parts of a pair of tokens' weights come over their scores, [pair of tokens][part][row], and
    // transposed [row][part][pair of tokens].
    const auto store_pair = [&](int i, F a, F b) LEAN_INLINE {
      const auto pair = KvRows::split(a, b);
      for (int part = 0; part < kParts; ++part) {
        _mm512_storeu_si512(scores + i * kParts / 2 + part * S::kLanes,
                            _mm512_permutexvar_epi16(Bf16Rows::pair_order<kTileRows>(), pair.part[part]));
      }
      if (row == 0) prefetcher.template issue<2 * kLine>(0, 0, 1, nullptr);
    };
    const F correction = Microkernel16::weigh(t, row, scores, run, tokens, store_pair);
    for (int half = 0; half < tokens / kHalfTokens; ++half) {
      for (int part = 0; part < kParts; ++part) {
        transpose(scores + half * kTileRows * kWeightsStride / 4 + part * S::kLanes, kWeightsStride / 4);
      }
    }
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

  // Columns of V are packed just before they are multiplied: what is written fits into L1 beside the output,
  // and the core packs them while it multiplies those before.
  static void accumulate(const TileState& t, const Rows& run, const Prefetch& prefetch) {
    Prefetcher prefetcher(Shared::some_prefetch(prefetch, run.row, t.head_dim_v), 0);
    constexpr int kToNextRows = kRunTokens * kTileRows;
    const int tokens = padded_tokens(run);
    for (int row = 0; row < t.rows; row += kTileRows) {
      weigh(t, row, t.scores + row / kTileRows * kToNextRows, run, tokens, prefetcher);
    }
    for (int column = 0; column < t.head_dim_v; column += kTileDims) {
      pack_values(t, run, column, prefetcher);
      const float* weights = t.scores;
      for (int row = 0; row < t.rows; row += 2 * kTileRows, weights += 2 * kToNextRows) {
        const auto multiply = row + kTileRows < t.rows ? multiply_value_tiles<2> : multiply_value_tiles<1>;
        multiply(t, weights, tokens / kHalfTokens, t.output + row * t.output_stride + column,
                 row == 0 ? &prefetcher : nullptr);
      }
    }
  }

  static void write_output(const TileState& t, int row, float row_factor, void* out) {
    const F factor = S::set1(row_factor);
    const float* from = t.output + row * t.output_stride;
    auto* to = static_cast<Tensor*>(out);
    for (int column = 0; column < t.head_dim_v; column += kTileDims) {
      const __m512i x = KvRows::round(S::mul(S::load(from + column), factor),
                                      S::mul(S::load(from + column + S::kLanes), factor));
      const __mmask32 columns = S::tail_mask(std::min(t.head_dim_v - column, kTileDims));
      _mm512_mask_storeu_epi16(to + column, columns, KvRows::in_order(x));
    }
  }

  static void dequantise(DType from, const DequantiseTable& table, const void* const* rows, int count,
                         int columns, void* to, const Prefetch& prefetch) {
    if (from != DType::int8) return Shared::dequantise(from, table, rows, count, columns, to, prefetch);
    auto* out = static_cast<Tensor*>(to);
    for (int i = 0; i < count; ++i, out += columns) {
      if (i < prefetch.count) prefetch_bytes<2>(prefetch.rows[i], prefetch.bytes);
      const auto* const row = static_cast<const int8_t*>(rows[i]);
      for (int column = 0; column < columns; column += kTileDims) {
        const __mmask32 mask = S::tail_mask(std::min(columns - column, kTileDims));
        const S::Pair x = S::load_pair_tail(row + column, std::min(columns - column, kTileDims));
        _mm512_mask_storeu_epi16(out + column, mask, KvRows::round(x.a, x.b));
      }
    }
  }

  static int64_t fma_loop(int64_t rounds) {
    begin_tiles();
    alignas(64) static constexpr char zeros[kTileBytes] = {};
    constexpr int kProducts = 16;
    Tiles::load<6>(zeros, kTilePairs * 4);
    Tiles::load<7>(zeros, kTilePairs * 4);
    for (int64_t i = 0; i < rounds; ++i) {
      unrolled<kProducts>([](auto product) LEAN_INLINE { Tiles::multiply<product % 4, 6, 7>(); });
    }
    end_tiles();
    constexpr int64_t kPerRound =
        kProducts * kTileRows * kTileTokens * kTileDims / std::size(KvRows::kScoreProducts);
    return rounds * kPerRound;
  }

  // For output tiles of `min_rows` rows or more: with fewer, most of a tile would be empty.
  static constexpr TileKernel kernel(int min_rows) {
    return {.instruction_set = "amx",
            .row_dtype = KvRows::kRowDtype,
            .chunk_columns = kTileDims,
            .column_order = KvRows::kColumnOrder,
            .min_rows = min_rows,
            .rows_at_once = kTileRows,
            .max_rows_for_heads = 0,
            .scratch_bytes = scratch_bytes,
            .begin_runs = begin_tiles,
            .end_runs = end_tiles,
            .pack_query = pack_query,
            .score = score,
            .score_heads = nullptr,
            .accumulate = accumulate,
            .accumulate_heads = nullptr,
            .write_output = write_output,
            .dequantise = dequantise,
            .fma_loop = fma_loop};
  }
};

// Measured on a Xeon: from these numbers of rows on they are faster than the kernels without AMX.
const TileKernel bfloat16 = AmxKernel<AmxBf16Rows>::kernel(6);
const TileKernel bfloat16_over_int8 = AmxKernel<AmxBf16Rows>::kernel(10);
const TileKernel float16 = AmxKernel<AmxFp16Rows>::kernel(24);
const TileKernel float16_over_int8 = AmxKernel<AmxFp16Rows>::kernel(32);
}  // namespace lean::cpu::amx
LEAN_TARGET_END
#endif
