#include "cpu/plan.h"

#include <algorithm>

namespace lean::cpu {
namespace {

class Planner {
 public:
  Planner(const DecodeParams& params, const Sharing& sharing, const TileKernel& kernel, const Tuning& tuning,
          int64_t max_threads)
      : p_(params), sharing_(sharing), t_(tuning), max_threads_(max_threads) {
    plan_.dequantises = p_.quantised() && kernel.dequantise != nullptr;
    const bool fp32 = p_.k.dtype == DType::float32;
    plan_.prefetch_level = fp32 ? t_.fp32_prefetch_level : t_.prefetch_level;
    plan_.touch_tokens = fp32 ? t_.fp32_touch_tokens : t_.touch_tokens;
    plan_.rows_per_block = most_rows(p_, sharing_);
    const int64_t padded_dim = round_up(p_.v.dims, kernel.chunk_columns);
    plan_.partial_floats = round_up(plan_.rows_per_block * (padded_dim + 2), kCacheLineFloats);
  }

  Plan plan(int64_t max_heads_per_pass) {
    lay_out_sequences(std::max<int64_t>(std::min(max_heads_per_pass, useful_heads_per_pass()), 1));
    while (plan_.heads_per_pass > 1 && !passes_pay_off()) lay_out_sequences(plan_.heads_per_pass / 2);
    const bool short_runs =
        plan_.heads_per_pass > 1 && plan_.heads_per_pass * kRunTokens * token_bytes() > t_.max_long_run_bytes;
    plan_.run_tokens = plan_.dequantises || short_runs ? kShortRunTokens : kRunTokens;
    plan_.threads = std::min(max_threads_, plan_.ranges.count());
    return std::move(plan_);
  }

 private:
  // A thread takes several heads in one pass over the tokens, run by run, where their rows are neighbours in
  // memory: in NHD caches (tokens first) those are the rows of a token, in short pages the heads' parts of a
  // page.
  int64_t useful_heads_per_pass() const {
    const bool tokens_first = p_.k.head_stride < p_.k.token_stride && p_.v.head_stride < p_.v.token_stride;
    const bool short_pages = p_.pages.block_table && p_.pages.block_size <= kRunTokens;
    if ((!tokens_first && !short_pages) || p_.pages.head_stride != 0) return 1;
    return std::min({tokens_first ? t_.max_heads_per_pass : t_.max_heads_per_pass_in_pages,
                     p_.heads_per_sequence(), t_.max_pass_bytes / (kShortRunTokens * token_bytes())});
  }

  void lay_out_sequences(int64_t heads_per_pass) {
    plan_.heads_per_pass = heads_per_pass;
    const int64_t tile_runs = lean_tile_tokens(std::max(p_.k.dims, p_.v.dims)) / kRunTokens;
    plan_.geometry =
        p_.geometry(plan_.rows_per_block, std::max<int64_t>(tile_runs / heads_per_pass, 1) * kRunTokens);
    plan_.geometry.passes = ceil_div(p_.heads_per_sequence(), heads_per_pass);
    const int64_t sequences = sharing_.sequences();
    plan_.sequence_begin.resize(sequences + 1);
    int64_t tiles = 0;
    for (int64_t i = 0; i < sequences; ++i) {
      plan_.sequence_begin[i] = tiles;
      tiles += plan_.geometry.sequence_tiles(sharing_.length(i));
    }
    plan_.sequence_begin[sequences] = tiles;
    plan_.ranges =
        p_.num_ctas > 0 ? LeanRanges::equal({std::min(p_.num_ctas, tiles), tiles}) : choose_ranges(tiles);
  }

  // (A CTA is a thread here; ranges of a CPU are several per thread.)
  LeanRanges choose_ranges(int64_t tiles) const {
    const int64_t range_bytes = std::max(t_.min_range_bytes, t_.bytes_per_published_byte * published_bytes());
    return LeanRanges::guided(tiles,
                              useful_ctas(tiles, max_threads_, ceil_div(t_.min_thread_bytes, tile_bytes())),
                              ceil_div(range_bytes, tile_bytes()));
  }

  // There are LeanTiles for all threads, and the partial states of a pass's heads, which one host block
  // merges, are few beside what each thread reads.
  bool passes_pay_off() const {
    // Where the caller fixes the grid, results may not depend on how many threads there are.
    const int64_t threads = p_.num_ctas > 0 ? p_.num_ctas : max_threads_;
    const int64_t total_tiles = plan_.ranges.total_tiles();
    if (total_tiles < t_.min_tiles_per_thread * threads) return false;
    return t_.bytes_read_per_merged_byte * most_peers() * published_bytes() <=
           total_tiles * tile_bytes() / threads;
  }

  // The most ranges beside its host's that an output tile is in.
  int64_t most_peers() const {
    const std::vector<int64_t>& begin = plan_.sequence_begin;
    int64_t peers = 0;
    for (int64_t i = 0, cta = 0; i < sharing_.sequences(); ++i) {
      const int64_t tiles = (begin[i + 1] - begin[i]) / plan_.geometry.passes;
      for (int64_t tile = begin[i]; tile < begin[i + 1]; tile += tiles) {
        while (plan_.ranges.range(cta).end <= tile) ++cta;
        const int64_t host = cta;
        while (plan_.ranges.range(cta).end < tile + tiles) ++cta;
        peers = std::max(peers, cta - host);
      }
    }
    return peers;
  }

  // Bytes of the partial states that one range may publish.
  int64_t published_bytes() const { return plan_.heads_per_pass * plan_.partial_floats * sizeof(float); }
  // Bytes of K and V of a LeanTile, and of one token and head.
  int64_t tile_bytes() const { return plan_.geometry.tile_tokens * token_bytes() * plan_.heads_per_pass; }
  int64_t token_bytes() const { return (p_.k.dims + p_.v.dims) * element_size(p_.k.dtype); }

  const DecodeParams& p_;
  const Sharing& sharing_;
  const Tuning& t_;
  const int64_t max_threads_;
  Plan plan_{};
};

}  // namespace

int64_t most_rows(const DecodeParams& p, const Sharing& sharing) {
  int64_t q_len = 0;
  for (int64_t b = 0; b < p.batch; ++b) q_len = std::max(q_len, p.clamped_length(b, 0).q_len);
  for (int64_t i = 0; i < sharing.nodes(); ++i) q_len = std::max(q_len, sharing.length(i).q_len);
  return std::clamp<int64_t>(p.group() * q_len, 1, max_rows(std::max(p.k.dims, p.v.dims)));
}

Kernels choose_kernels(const DecodeParams& p, const Sharing& sharing) {
  const TileKernel& many = tile_kernel(p.dtype, p.k.dtype, most_rows(p, sharing));
  if (many.min_rows == 1) return {many, many};
  const TileKernel& few = tile_kernel(p.dtype, p.k.dtype, many.min_rows - 1);
  if (p.quantised() && few.dequantise != many.dequantise) return {many, many};
  return {many, sharing.nodes() == 0 || few.column_order == many.column_order ? few : many};
}

Plan make_plan(const DecodeParams& params, const Sharing& sharing, const TileKernel& kernel,
               const Tuning& tuning, int64_t max_threads, int64_t max_heads_per_pass) {
  return Planner(params, sharing, kernel, tuning, max_threads).plan(max_heads_per_pass);
}

}  // namespace lean::cpu
