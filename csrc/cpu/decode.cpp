// LeanAttention on a CPU: threads take lean ranges, publish at most one partial state of each (one for each
// head of a pass), and host blocks merge them and write the outputs, all in one parallel region (arXiv
// 2405.10480, section 4).
#include "cpu/backend.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/check_values.h"
#include "cpu/core_caches.h"
#include "cpu/kernels/tile_kernel.h"
#include "cpu/kv_reader.h"
#include "cpu/lean_ranges.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace lean::cpu {
namespace {

// With fewer KV bytes per thread another thread costs more than it brings: waking one takes 3 to 4
// microseconds, in which a core reads and multiplies about this much.
constexpr int64_t kMinBytesPerCta = 128 * 1024;

// With fewer KV bytes a range costs more to begin than it levels out between threads. (A CTA is a thread
// here; ranges of a CPU are several per thread.)
constexpr int64_t kMinBytesPerRange = 256 * 1024;

// After this many tokens a partial state is saved and a fresh one begun, so that the longest chain of fp32
// additions stays short: one addition per run, 256 at most, then one per saved state.
constexpr int64_t kSumTokens = 8192;

// The most bytes of a short run of all heads of a pass. A thread takes several heads in one pass over the
// tokens, run by run, where their rows are neighbours in memory: in NHD caches (tokens first) those are the
// rows of a token, in short pages the heads' parts of a page. The run in work and the next one must fit into
// L2 together; an L2 of few ways counts half. Where rows are prefetched into L1, less is under way at a time,
// and to read a part of each token only would cost more than what does not fit.
int64_t max_pass_bytes() {
  const int64_t bytes = l2_cache().bytes;
  if (!l2_cache().has_many_ways()) return bytes / 4;
  return prefetches_into_l1() ? bytes : bytes / 2;
}

// The most bytes that the heads of a pass read in runs of kRunTokens; if they have more, runs are short.
// Short runs keep a thread's q, O and scores in L1 and L2 between a head's run and its next; long runs cost
// less per token. In an L2 of few ways, prefetched rows push each other out before half of it is full.
int64_t max_long_run_bytes() {
  return l2_cache().has_many_ways() ? l2_cache().bytes / 4 : l2_cache().bytes / 16 * 3;
}

// With fewer LeanTiles per thread a pass takes fewer heads, so that all threads have some.
constexpr int64_t kMinTilesPerThread = 2;

// A range reads at least this many bytes for each byte of the partial states that it may publish, where it
// can.
constexpr int64_t kBytesPerPublished = 16;

// In the time in which a host block merges a byte of its peers' partial states, a thread reads this many
// bytes of the caches. That allows for memory as fast as L2, where merging shows sooner.
constexpr int64_t kMergingCost = 64;

class Decode {
 public:
  // A pass takes at most `max_heads_per_pass` heads.
  Decode(const DecodeParams& params, const TileKernel& kernel, int64_t max_heads_per_pass)
      : p_(params),
        kernel_(kernel),
        table_(params.quantised() ? &dequantise_table(params.k.dtype, kernel_.row_dtype) : nullptr),
        dequantises_(DequantisedRows::are_needed(kernel_, table_)),
        page_walk_(params),
        rows_per_block_(most_rows(params)),
        workspace_(params, kernel_, table_, rows_per_block_) {
    check_values(p_);
    const bool tokens_first = p_.k.head_stride < p_.k.token_stride && p_.v.head_stride < p_.v.token_stride;
    const bool short_pages = p_.pages.block_table != nullptr && p_.pages.block_size <= kRunTokens;
    if ((!tokens_first && !short_pages) || p_.pages.head_stride != 0) max_heads_per_pass = 1;
    max_heads_per_pass =
        std::min({max_heads_per_pass, tokens_first ? kMaxHeadsPerPass : kMaxHeadsPerPassInPages,
                  p_.heads_per_sequence(), max_pass_bytes() / (kShortRunTokens * token_bytes())});
    lay_out_sequences(std::max<int64_t>(max_heads_per_pass, 1));
    while (heads_per_pass_ > 1 && !passes_pay_off()) lay_out_sequences(heads_per_pass_ / 2);
    const bool short_runs =
        heads_per_pass_ > 1 && heads_per_pass_ * kRunTokens * token_bytes() > max_long_run_bytes();
    run_tokens_ = dequantises_ || short_runs ? kShortRunTokens : kRunTokens;
    write_padding();
  }

  void run() {
    const int64_t threads = std::min(num_threads(), ranges_.count());
    workspace_.reserve(ranges_.count() * heads_per_pass_, threads, heads_per_pass_);
    published_ = std::make_unique<std::atomic<uint32_t>[]>(ranges_.count());
    parallel_for(threads, [&](int64_t thread) { take_ranges(thread); });
  }

  // The schedules that stream-K replaces, on the same tile kernels: every output tile cut into `splits`
  // equal pieces, and a second parallel region that combines them. One split is FlashAttention-2's grid.
  void run_fixed_split(int64_t splits) {
    const auto length = [&](int64_t sequence) { return p_.scheduled_length(sequence); };
    std::vector<Segment> outputs;
    SegmentWalk walk(geometry_, {0, ranges_.total_tiles()}, 0, 0, length);
    for (Segment segment; walk.next(segment, length);) outputs.push_back(p_.in_batch(segment));
    const int64_t count = outputs.size(), threads = num_threads();
    workspace_.reserve(splits > 1 ? count * splits : 0, threads, heads_per_pass_);
    std::atomic<int64_t> next_piece{0}, next_output{0};
    parallel_for(std::min(threads, count * splits), [&](int64_t thread) {
      HeadState head = workspace_.heads_of(thread)[0];
      DequantisedRows dequantised(p_, kernel_, table_, workspace_.dequantised_rows(thread));
      SegmentQueue pieces([&](TakenSegment& piece) {
        piece.number = next_piece++;
        if (piece.number >= count * splits) return false;
        Segment& segment = piece.segment = outputs[piece.number / splits];
        const int64_t tiles = segment.output_end - segment.output_begin, split = piece.number % splits;
        segment.tiles = {segment.output_begin + tiles * split / splits,
                         segment.output_begin + tiles * (split + 1) / splits};
        return true;
      });
      while (pieces.advance()) {
        const Segment& segment = pieces.now().segment;
        begin_output_tile(head, segment, segment.kv_head);
        attend(&head, pieces, dequantised);
        if (splits == 1) {
          write(head, segment);
        } else {
          save(head.tile, workspace_.partial(pieces.now().number));
        }
      }
    });
    if (splits == 1) return;
    parallel_for(std::min(threads, count), [&](int64_t thread) {
      HeadState head = workspace_.heads_of(thread)[0];
      for (int64_t output; (output = next_output++) < count;) {
        head.kv_head = outputs[output].kv_head;
        head.tile.rows = rows_of(outputs[output]);
        clear(head.tile);
        for (int64_t split = 0; split < splits; ++split)
          merge_into(head.tile, workspace_.partial(output * splits + split));
        write(head, outputs[output]);
      }
    });
  }

 private:
  // The most rows that an output tile of this call has.
  static int64_t most_rows(const DecodeParams& params) {
    int64_t q_len = 0;
    for (int64_t b = 0; b < params.batch; ++b) q_len = std::max(q_len, params.clamped_length(b, 0).q_len);
    return std::clamp<int64_t>(params.group() * q_len, 1, kMaxRows);
  }

  // Computes where each sequence's LeanTiles begin. To the schedule, the heads of a pass are one: a LeanTile
  // is some tokens of them all, and a thread reads their rows together, which is contiguous memory.
  void lay_out_sequences(int64_t heads_per_pass) {
    heads_per_pass_ = heads_per_pass;
    passes_per_sequence_ = ceil_div(p_.heads_per_sequence(), heads_per_pass);
    const int64_t tile_runs = lean_tile_tokens(std::max(p_.k.dims, p_.v.dims)) / kRunTokens;
    geometry_ = p_.geometry(rows_per_block_, std::max<int64_t>(tile_runs / heads_per_pass, 1) * kRunTokens);
    geometry_.num_kv_heads = passes_per_sequence_;
    const int64_t sequences = p_.sequences();
    sequence_begin_.resize(sequences + 1);
    int64_t tiles = 0;
    for (int64_t i = 0; i < sequences; ++i) {
      sequence_begin_[i] = tiles;
      tiles += geometry_.sequence_tiles(p_.scheduled_length(i));
    }
    sequence_begin_[sequences] = tiles;
    ranges_ =
        p_.num_ctas > 0 ? LeanRanges::equal({std::min(p_.num_ctas, tiles), tiles}) : choose_ranges(tiles);
  }

  // There are LeanTiles for all threads, and the partial states of a pass's heads, which one host block
  // merges, are few beside what each thread reads.
  bool passes_pay_off() const {
    // Where the caller fixes the grid, results may not depend on how many threads there are.
    const int64_t threads = p_.num_ctas > 0 ? p_.num_ctas : num_threads();
    if (ranges_.total_tiles() < kMinTilesPerThread * threads) return false;
    int64_t peers = 0;
    for (int64_t i = 0, cta = 0; i < p_.sequences(); ++i) {
      const int64_t tiles =
          (sequence_begin_[i + 1] - sequence_begin_[i]) / passes_per_sequence_;  // of each pass
      for (int64_t begin = sequence_begin_[i]; begin < sequence_begin_[i + 1]; begin += tiles) {
        while (ranges_.range(cta).end <= begin) ++cta;
        const int64_t host = cta;
        while (ranges_.range(cta).end < begin + tiles) ++cta;
        peers = std::max(peers, cta - host);
      }
    }
    return kMergingCost * peers * published_bytes() <= ranges_.total_tiles() * tile_bytes() / threads;
  }

  LeanRanges choose_ranges(int64_t tiles) const {
    return LeanRanges::guided(
        tiles, useful_ctas(tiles, num_threads(), ceil_div(kMinBytesPerCta, tile_bytes())),
        ceil_div(std::max(kMinBytesPerRange, kBytesPerPublished * published_bytes()), tile_bytes()));
  }

  // Bytes of the partial states that one range may publish.
  int64_t published_bytes() const { return heads_per_pass_ * workspace_.partial_floats() * sizeof(float); }
  int64_t tile_bytes() const { return geometry_.tile_tokens * token_bytes() * heads_per_pass_; }

  // Bytes of K and V of one token and head.
  int64_t token_bytes() const { return (p_.k.dims + p_.v.dims) * element_size(p_.k.dtype); }

  // Query tokens of a packed q that belong to no sequence come out as rows that see nothing.
  void write_padding() const {
    if (p_.cu_seqlens_q == nullptr) return;
    const int64_t row_bytes = p_.v.dims * element_size(p_.dtype);
    for (int64_t token = p_.first_query(p_.batch); token < p_.query_tokens; ++token) {
      for (int64_t head = 0; head < p_.num_heads; ++head) {
        std::memset(out_row(0, token, head), 0, row_bytes);
        p_.lse[head * p_.lse_head_stride + token] = kMinusInfinity;
      }
    }
  }

  // What one thread does: the segments of lean ranges, until no range is left. Ranges are handed out from the
  // last to the first, so a host block only waits for ranges that were taken before its own. Before a thread
  // starts a range it is busy with ones that it took earlier, and it publishes before it waits for anything:
  // from the last range down, every wait ends, on however few threads.
  void take_ranges(int64_t thread) {
    std::array<HeadState, kMaxHeadsPerPass> heads = workspace_.heads_of(thread);
    DequantisedRows dequantised(p_, kernel_, table_, workspace_.dequantised_rows(thread));
    const auto length = [&](int64_t i) { return p_.scheduled_length(i); };
    SegmentWalk walk(geometry_, {0, 0}, 0, 0, length);
    SegmentQueue segments([&](TakenSegment& taken) {
      while (!walk.next(taken.segment, length)) {
        const int64_t ticket = next_ticket_.fetch_add(1, std::memory_order_relaxed);
        if (ticket >= ranges_.count()) return false;
        taken.number = ranges_.count() - 1 - ticket;
        const LeanRange range = ranges_.range(taken.number);
        const int64_t sequence =
            std::upper_bound(sequence_begin_.begin(), sequence_begin_.end(), range.begin) -
            sequence_begin_.begin() - 1;
        walk = SegmentWalk(geometry_, range, sequence, sequence_begin_[sequence], length);
      }
      taken.segment = p_.in_batch(taken.segment);
      return true;
    });
    while (segments.advance()) process(heads.data(), segments, dequantised);
  }

  // The KV heads of a segment, which one pass takes.
  struct KvHeads {
    int64_t first;
    int64_t count;
  };
  KvHeads kv_heads_of(const Segment& segment) const {
    if (heads_per_pass_ == 1) return {segment.kv_head, 1};
    const int64_t first = segment.kv_head * p_.num_kv_heads / passes_per_sequence_;
    return {first, (segment.kv_head + 1) * p_.num_kv_heads / passes_per_sequence_ - first};
  }

  template <class Segments>
  void process(HeadState* heads, Segments& segments, DequantisedRows& dequantised) {
    const auto& [segment, cta] = segments.now();
    const KvHeads kv_heads = kv_heads_of(segment);
    for (int64_t i = 0; i < kv_heads.count; ++i) begin_output_tile(heads[i], segment, kv_heads.first + i);
    attend(heads, segments, dequantised);
    if (!segment.is_host()) return publish(heads, kv_heads.count, cta);
    if (segment.has_peers()) merge_peers(heads, kv_heads.count, cta, ranges_.cta_of(segment.output_end - 1));
    for (int64_t i = 0; i < kv_heads.count; ++i) write(heads[i], segment);
  }

  // Row `row` of an output tile is query token row / group of query head row % group.
  struct QueryRow {
    int64_t token;
    int64_t head;
  };
  QueryRow query_row(const Segment& segment, int64_t kv_head, int64_t row) const {
    const int64_t packed = segment.row_block * geometry_.rows_per_block + row;
    return {packed / geometry_.group, kv_head * geometry_.group + packed % geometry_.group};
  }

  SequenceLength clamped_length(const Segment& segment) const {
    return p_.clamped_length(segment.sequence, segment.kv_head);
  }
  int rows_of(const Segment& segment) const {
    return static_cast<int>(geometry_.block_rows(clamped_length(segment).q_len, segment.row_block));
  }

  // The scale that all tokens of a sequence and head have in common.
  static float common_scale(const Scales& scales, int64_t sequence, int64_t kv_head) {
    return scales.per_token() ? 1.0f : scales.at(sequence, 0, 0, kv_head);
  }

  void begin_output_tile(HeadState& head, const Segment& segment, int64_t kv_head) const {
    head.kv_head = kv_head;
    TileState& t = head.tile;
    t.rows = rows_of(segment);
    t.scale = p_.scale * common_scale(p_.k.scale, segment.sequence, kv_head) *
              (p_.softcap == 0.0f ? kLog2e : 1.0f / p_.softcap);
    const int64_t first_query = p_.first_query(segment.sequence);
    for (int row = 0; row < t.rows; ++row) {
      const QueryRow query = query_row(segment, kv_head, row);
      const int64_t offset = segment.sequence * p_.q_batch_stride +
                             (first_query + query.token) * p_.q_token_stride + query.head * p_.q_head_stride;
      kernel_.pack_query(t, row, static_cast<const char*>(p_.q) + offset * element_size(p_.dtype));
      if (t.slopes != nullptr) {
        t.slopes[row] = p_.alibi_slopes[segment.sequence * p_.alibi_batch_stride + query.head] * kLog2e;
      }
    }
  }

  // Attends the heads of the current segment to its tokens.
  template <class Segments>
  void attend(const HeadState* heads, Segments& segments, DequantisedRows& dequantised) const {
    const Segment& segment = segments.now().segment;
    const KvHeads kv_heads = kv_heads_of(segment);
    const int64_t first_head = kv_heads.first, count = kv_heads.count;
    const TokenSpan tokens = segment.tokens(geometry_.tile_tokens);
    for (int64_t i = 0; i < count; ++i) clear(heads[i].tile);
    for (int64_t begin = tokens.begin; begin < tokens.end; begin += kSumTokens) {
      const bool first = begin == tokens.begin;
      for (int64_t i = 0; i < count && !first; ++i) {
        save(heads[i].tile, heads[i].saved);
        clear(heads[i].tile);
      }
      const int64_t end = std::min(begin + kSumTokens, tokens.end);
      const auto next_range = [&]() -> TokenRange {
        if (end < tokens.end) return {segment.sequence, first_head, count, {end, tokens.end}};
        const TakenSegment* const next = segments.next();
        if (next == nullptr) return {};
        const KvHeads of_next = kv_heads_of(next->segment);
        return {next->segment.sequence, of_next.first, of_next.count,
                next->segment.tokens(geometry_.tile_tokens)};
      };
      attend_range(heads, segment, {segment.sequence, first_head, count, {begin, end}}, next_range,
                   dequantised);
      for (int64_t i = 0; i < count && !first; ++i) merge_into(heads[i].tile, heads[i].saved);
    }
  }

  // Attends the heads to a range of the segment's tokens. next_range() is what the thread reads after it, so
  // that its beginning is prefetched too; it may be empty.
  template <class NextRange>
  void attend_range(const HeadState* heads, const Segment& segment, const TokenRange& range,
                    const NextRange& next_range, DequantisedRows& dequantised) const {
    const int rows = heads[0].tile.rows;
    const SequenceLength length = clamped_length(segment);
    const int64_t first_query = query_row(segment, 0, 0).token,
                  last_query = query_row(segment, 0, rows - 1).token;
    // All rows see these tokens; runs inside need no mask.
    TokenSpan common = {visible_tokens(p_.visibility, length, last_query, last_query).begin,
                        visible_tokens(p_.visibility, length, first_query, first_query).end};
    if (p_.tree_mask != nullptr) common.end = length.tokens - length.q_len;
    RunReader runs(page_walk_, run_tokens_, !dequantises_, range, next_range);
    // Rows come with the scales of one head.
    const bool scaled = p_.k.scale.per_token() || p_.v.scale.per_token();
    const bool can_score_heads =
        runs.has_adjoining_heads() && !dequantises_ && !scaled && rows <= kernel_.max_rows_for_heads;
    const TileState* tiles[kMaxHeadsPerPass];
    for (int64_t i = 0; i < range.heads; ++i) tiles[i] = &heads[i].tile;
    RowView views[kMaxRows];
    for (int64_t begin = range.tokens.begin; begin < range.tokens.end; begin += run_tokens_) {
      const int64_t end = std::min(begin + run_tokens_, range.tokens.end);
      const bool viewed = begin < common.begin || end > common.end || p_.alibi_slopes != nullptr;
      if (viewed) fill_views(views, rows, segment, length, begin);
      runs.advance(viewed);
      const RowView* const seen = viewed ? views : nullptr;
      const bool all_heads = can_score_heads && end - begin == run_tokens_;
      if (all_heads) {
        kernel_.score_heads(tiles, range.heads, runs.keys(0), seen, runs.prefetch_beside_keys(0));
      } else {
        for (int64_t i = 0; i < range.heads; ++i) {
          const Rows& keys = runs.keys(i);
          const Prefetch prefetch = runs.prefetch_beside_keys(i);
          const void* const next_q = range.heads == 1 ? nullptr : heads[(i + 1) % range.heads].tile.q;
          if (dequantises_) {
            kernel_.score(heads[i].tile, dequantised.keys(keys, prefetch), seen, {}, next_q);
          } else {
            kernel_.score(heads[i].tile, keys, seen, prefetch, next_q);
          }
        }
      }
      if (all_heads && rows <= kMaxRowsAdded) {
        kernel_.accumulate_heads(tiles, range.heads, runs.values(0), runs.prefetch_beside_values(0));
      } else {
        for (int64_t i = 0; i < range.heads; ++i) {
          const Rows& values = runs.values(i);
          const Prefetch prefetch = runs.prefetch_beside_values(i);
          if (dequantises_) {
            kernel_.accumulate(heads[i].tile, dequantised.values(values, prefetch), {});
          } else {
            kernel_.accumulate(heads[i].tile, values, prefetch);
          }
        }
      }
    }
  }

  void fill_views(RowView* views, int rows, const Segment& segment, SequenceLength length,
                  int64_t begin) const {
    for (int row = 0; row < rows; ++row) {
      const int64_t query = query_row(segment, 0, row).token;
      const TokenSpan seen = visible_tokens(p_.visibility, length, query, query);
      const int64_t offset = length.tokens - length.q_len;
      views[row] = {static_cast<float>(std::clamp<int64_t>(seen.begin - begin, 0, kRunTokens)),
                    static_cast<float>(std::clamp<int64_t>(seen.end - begin, 0, kRunTokens)),
                    static_cast<float>(offset + query - begin), 0};
      if (p_.tree_mask == nullptr) continue;
      const bool* sees = p_.tree_mask + segment.sequence * p_.tree_batch_stride +
                         (p_.first_query(segment.sequence) + query) * p_.tree_row_stride;
      for (int64_t token = std::max(begin, offset); token < std::min(begin + kRunTokens, length.tokens);
           ++token) {
        if (!sees[token - offset]) views[row].hidden |= uint64_t{1} << (token - begin);
      }
    }
  }

  // A range has heads_per_pass_ partial states, from cta * heads_per_pass_ on.
  void publish(const HeadState* heads, int64_t count, int64_t cta) {
    for (int64_t i = 0; i < count; ++i) save(heads[i].tile, workspace_.partial(cta * heads_per_pass_ + i));
    published_[cta].store(1, std::memory_order_release);
    published_[cta].notify_all();
  }

  // Goes in ascending order of the peers' ranges, so that results do not depend on who was faster.
  void merge_peers(const HeadState* heads, int64_t count, int64_t host, int64_t last_peer) {
    for (int64_t peer = host + 1; peer <= last_peer; ++peer) {
      published_[peer].wait(0, std::memory_order_acquire);  // sleeps if it takes long
      for (int64_t i = 0; i < count; ++i)
        merge_into(heads[i].tile, workspace_.partial(peer * heads_per_pass_ + i));
    }
  }

  void write(const HeadState& head, const Segment& segment) const {
    const TileState& t = head.tile;
    const int64_t first_query = p_.first_query(segment.sequence);
    const float value_scale = common_scale(p_.v.scale, segment.sequence, head.kv_head);
    for (int row = 0; row < t.rows; ++row) {
      const QueryRow query = query_row(segment, head.kv_head, row);
      const int64_t token = first_query + query.token;
      const SoftmaxState state{t.m[row], t.l[row]};
      float factor = normaliser(state.l), lse = log_sum_exp(state);
      if (p_.sinks != nullptr) {
        const Merged merged = merge_sink(state, p_.sinks[query.head]);
        factor = normaliser(merged.state.l) * merged.weight_a;
        lse = log_sum_exp_to(merged.state, kLog2e);
      }
      kernel_.write_output(t, row, factor * value_scale, out_row(segment.sequence, token, query.head));
      p_.lse[segment.sequence * p_.lse_batch_stride + query.head * p_.lse_head_stride + token] = lse;
    }
  }

  void* out_row(int64_t sequence, int64_t token, int64_t head) const {
    const int64_t offset =
        sequence * p_.out_batch_stride + token * p_.out_token_stride + head * p_.out_head_stride;
    return static_cast<char*>(p_.out) + offset * element_size(p_.dtype);
  }

  const DecodeParams& p_;
  const TileKernel& kernel_;
  const DequantiseTable* const table_;  // null where caches have q's dtype
  const bool dequantises_;
  const PageWalk page_walk_;
  const int64_t rows_per_block_;
  Workspace workspace_;
  int64_t heads_per_pass_;
  int run_tokens_;
  int64_t passes_per_sequence_;  // each takes some heads; to the schedule they are one KV head
  Geometry geometry_;
  LeanRanges ranges_;
  std::vector<int64_t> sequence_begin_;
  std::unique_ptr<std::atomic<uint32_t>[]> published_;
  std::atomic<int64_t> next_ticket_{0};
};

}  // namespace

void decode(const DecodeParams& params) {
  Decode(params, tile_kernel(params.dtype, params.k.dtype), kMaxHeadsPerPass).run();
}

void decode_fixed_split(const DecodeParams& params, int64_t splits) {
  Decode(params, tile_kernel(params.dtype, params.k.dtype), 1).run_fixed_split(splits);
}

void read_only(const DecodeParams& params) {
  const TileKernel reader = read_only_kernel(tile_kernel(params.dtype, params.k.dtype), params.k.dtype);
  Decode(params, reader, kMaxHeadsPerPass).run();
}

}  // namespace lean::cpu
