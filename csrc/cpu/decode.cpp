// LeanAttention on a CPU: threads take lean ranges, publish at most one partial state of each (for
// each head, where they take several abreast), and host blocks merge them and write the outputs, all
// in one parallel region (arXiv 2405.10480, section 4).
#include "cpu/decode.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/cache_rows.h"
#include "cpu/check_values.h"
#include "cpu/core_caches.h"
#include "cpu/lean_ranges.h"
#include "cpu/parallel.h"
#include "cpu/tiles/tile.h"
#include "cpu/working_memory.h"

namespace lean::cpu {
namespace {

// KV bytes below which another thread costs more than it brings: waking one takes 3 to 4 microseconds, in
// which a core reads and multiplies about this much.
constexpr int64_t kMinBytesPerCta = 128 * 1024;

// And those below which, as a rule, a range costs more to begin than it levels out between threads.
constexpr int64_t kMinBytesPerRange = 256 * 1024;

// Tokens after which a partial state is set aside and a fresh one begun, so that the longest chain of fp32
// additions stays short: one per run, 256 at most, then one per such chunk.
constexpr int64_t kChunkTokens = 8192;

// A thread takes several heads through the tokens abreast, run by run, where their rows are neighbours in
// memory: in caches stored tokens first those are the rows of a token, in short pages the heads' parts of a
// page. As many as leave the next place room in the second cache level, which one of few ways has in half of
// it. Where rows are asked for through the first, less is asked for at a time, and what does not find room
// costs less than to read only parts of tokens.
int64_t max_bytes_abreast() {
  const int64_t bytes = second_level().bytes;
  if (!second_level().has_many_ways()) return bytes / 4;
  return reads_through_first_level() ? bytes : bytes / 2;
}

// The most bytes that heads abreast read in runs of kRunTokens: of a thread's q, O and scores, less is pushed
// out of the first cache levels between a head's short run and its next, but long ones cost less. In a cache
// of few ways, rows that were asked for push each other out before half of it is full.
int64_t max_bytes_place() {
  return second_level().has_many_ways() ? second_level().bytes / 4 : second_level().bytes / 16 * 3;
}

// LeanTiles per thread below which fewer heads go abreast.
constexpr int64_t kMinTilesPerThread = 2;

// Bytes that a range reads, as a rule, for each byte of the partial states that it may publish.
constexpr int64_t kBytesPerPublished = 16;

// In the time in which a host block merges a byte of its peers' partial states, a thread reads this many
// bytes of the caches, with allowance: where memory is as fast as the second cache level, merging shows
// sooner.
constexpr int64_t kMergingCost = 64;

class Decode {
 public:
  // With at most `max_abreast` heads abreast.
  Decode(const DecodeParams& params, const TileRoutine& routine, int64_t max_abreast)
      : p_(params),
        routine_(routine),
        table_(params.cache_dtype == params.dtype ? nullptr
                                                  : &widening_table(params.cache_dtype, routine_.row_dtype)),
        widens_(WideRows::are_needed(routine_, table_)),
        cache_rows_(params),
        rows_per_block_(most_rows(params)),
        memory_(params, routine_, table_, rows_per_block_) {
    check_values(p_);
    const bool tokens_first = p_.k_head_stride < p_.k_token_stride && p_.v_head_stride < p_.v_token_stride;
    const bool short_pages = p_.block_table != nullptr && p_.block_size <= kRunTokens;
    if ((!tokens_first && !short_pages) || p_.table_head_stride != 0) max_abreast = 1;
    max_abreast =
        std::min({max_abreast, tokens_first ? kMaxAbreast : kMaxAbreastInPages, p_.heads_per_sequence(),
                  max_bytes_abreast() / (kShortRunTokens * token_bytes())});
    lay_out_sequences(std::max<int64_t>(max_abreast, 1));
    while (heads_abreast_ > 1 && !worth_it_abreast()) lay_out_sequences(heads_abreast_ / 2);
    const bool wide_place =
        heads_abreast_ > 1 && heads_abreast_ * kRunTokens * token_bytes() > max_bytes_place();
    run_tokens_ = widens_ || wide_place ? kShortRunTokens : kRunTokens;
    write_padding();
  }

  void run() {
    const int64_t threads = std::min(num_threads(), ranges_.count());
    memory_.reserve(ranges_.count() * heads_abreast_, threads, heads_abreast_);
    published_ = std::make_unique<std::atomic<uint32_t>[]>(ranges_.count());
    parallel_for(threads, [&](int64_t thread) { take_ranges(thread); });
  }

  // The schedules that stream-K replaces, on the same tile routines: every output tile cut into `splits`
  // equal pieces, and a second parallel region that combines them. One split is FlashAttention-2's grid.
  void run_fixed_split(int64_t splits) {
    const auto length = [&](int64_t sequence) { return p_.length_of(sequence); };
    std::vector<Segment> outputs;
    SegmentWalk walk(geometry_, {0, ranges_.total_tiles()}, 0, 0, length);
    for (Segment segment; walk.next(segment, length);) outputs.push_back(p_.in_batch(segment));
    const int64_t count = outputs.size(), threads = num_threads();
    memory_.reserve(splits > 1 ? count * splits : 0, threads, heads_abreast_);
    std::atomic<int64_t> next_piece{0}, next_output{0};
    parallel_for(std::min(threads, count * splits), [&](int64_t thread) {
      Work work = memory_.works_of(thread)[0];
      WideRows wide(p_, routine_, table_, memory_.wide_rows(thread));
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
        begin_output_tile(work, segment, segment.kv_head);
        attend(&work, pieces, wide);
        if (splits == 1) {
          write(work, segment);
        } else {
          set_aside(work.tile, memory_.slot(pieces.now().number));
        }
      }
    });
    if (splits == 1) return;
    parallel_for(std::min(threads, count), [&](int64_t thread) {
      Work work = memory_.works_of(thread)[0];
      for (int64_t output; (output = next_output++) < count;) {
        work.kv_head = outputs[output].kv_head;
        work.tile.rows = rows_of(outputs[output]);
        clear(work.tile);
        for (int64_t split = 0; split < splits; ++split)
          merge_into(work.tile, memory_.slot(output * splits + split));
        write(work, outputs[output]);
      }
    });
  }

 private:
  // Of an output tile.
  static int64_t most_rows(const DecodeParams& params) {
    int64_t q_len = 0;
    for (int64_t b = 0; b < params.batch; ++b) q_len = std::max(q_len, params.length_at(b, 0).q_len);
    return std::clamp<int64_t>(params.group() * q_len, 1, kMaxRows);
  }

  // Computes where each sequence's LeanTiles begin. To the schedule, heads that go abreast are one: a
  // LeanTile is some tokens of them all, and a thread reads their rows whole, which together are contiguous
  // memory.
  void lay_out_sequences(int64_t heads_abreast) {
    heads_abreast_ = heads_abreast;
    head_groups_ = ceil_div(p_.heads_per_sequence(), heads_abreast);
    const int64_t tile_runs = lean_tile_tokens(std::max(p_.head_dim, p_.head_dim_v)) / kRunTokens;
    geometry_ = p_.geometry(rows_per_block_, std::max<int64_t>(tile_runs / heads_abreast, 1) * kRunTokens);
    geometry_.num_kv_heads = head_groups_;
    const int64_t sequences = p_.sequences();
    sequence_begin_.resize(sequences + 1);
    int64_t tiles = 0;
    for (int64_t i = 0; i < sequences; ++i) {
      sequence_begin_[i] = tiles;
      tiles += geometry_.sequence_tiles(p_.length_of(i));
    }
    sequence_begin_[sequences] = tiles;
    ranges_ =
        p_.num_ctas > 0 ? LeanRanges::equal({std::min(p_.num_ctas, tiles), tiles}) : choose_ranges(tiles);
  }

  // Whether there are LeanTiles for all threads, and the partial states of heads abreast, which one host
  // block merges, are few beside what each thread reads.
  bool worth_it_abreast() const {
    // Where the caller fixes the grid, results may not depend on how many threads there are.
    const int64_t threads = p_.num_ctas > 0 ? p_.num_ctas : num_threads();
    if (ranges_.total_tiles() < kMinTilesPerThread * threads) return false;
    int64_t peers = 0;
    for (int64_t i = 0, cta = 0; i < p_.sequences(); ++i) {
      const int64_t tiles = (sequence_begin_[i + 1] - sequence_begin_[i]) / head_groups_;  // of each group
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

  // Of the partial states that a range may publish.
  int64_t published_bytes() const { return heads_abreast_ * memory_.partial_floats() * sizeof(float); }
  int64_t tile_bytes() const { return geometry_.tile_tokens * token_bytes() * heads_abreast_; }

  // Of one token of one head.
  int64_t token_bytes() const { return (p_.head_dim + p_.head_dim_v) * element_size(p_.cache_dtype); }

  // Query tokens of a packed q that belong to no sequence come out as rows that see nothing.
  void write_padding() const {
    if (p_.cu_seqlens_q == nullptr) return;
    const int64_t row_bytes = p_.head_dim_v * element_size(p_.dtype);
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
    std::array<Work, kMaxAbreast> works = memory_.works_of(thread);
    WideRows wide(p_, routine_, table_, memory_.wide_rows(thread));
    const auto length = [&](int64_t i) { return p_.length_of(i); };
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
    while (segments.advance()) process(works.data(), segments, wide);
  }

  // Heads of a segment.
  struct Heads {
    int64_t first;
    int64_t count;
  };
  Heads heads_of(const Segment& segment) const {
    if (heads_abreast_ == 1) return {segment.kv_head, 1};
    const int64_t first = segment.kv_head * p_.num_kv_heads / head_groups_;
    return {first, (segment.kv_head + 1) * p_.num_kv_heads / head_groups_ - first};
  }

  template <class Segments>
  void process(Work* works, Segments& segments, WideRows& wide) {
    const auto& [segment, cta] = segments.now();
    const Heads heads = heads_of(segment);
    for (int64_t i = 0; i < heads.count; ++i) begin_output_tile(works[i], segment, heads.first + i);
    attend(works, segments, wide);
    if (!segment.is_host()) return publish(works, heads.count, cta);
    if (segment.has_peers()) merge_peers(works, heads.count, cta, ranges_.cta_of(segment.output_end - 1));
    for (int64_t i = 0; i < heads.count; ++i) write(works[i], segment);
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

  SequenceLength length_of(const Segment& segment) const {
    return p_.length_at(segment.sequence, segment.kv_head);
  }
  int rows_of(const Segment& segment) const {
    return static_cast<int>(geometry_.block_rows(length_of(segment).q_len, segment.row_block));
  }

  // The scale that all tokens of a sequence and head have in common.
  static float common_scale(const Scales& scales, int64_t sequence, int64_t kv_head) {
    return scales.per_token() ? 1.0f : scales.at(sequence, 0, 0, kv_head);
  }

  void begin_output_tile(Work& work, const Segment& segment, int64_t kv_head) const {
    work.kv_head = kv_head;
    TileState& t = work.tile;
    t.rows = rows_of(segment);
    t.scale = p_.scale * common_scale(p_.k_scale, segment.sequence, kv_head) *
              (p_.softcap == 0.0f ? kLog2e : 1.0f / p_.softcap);
    const int64_t first_query = p_.first_query(segment.sequence);
    for (int row = 0; row < t.rows; ++row) {
      const QueryRow query = query_row(segment, kv_head, row);
      const int64_t offset = segment.sequence * p_.q_batch_stride +
                             (first_query + query.token) * p_.q_token_stride + query.head * p_.q_head_stride;
      routine_.pack_query(t, row, static_cast<const char*>(p_.q) + offset * element_size(p_.dtype));
      if (t.slopes != nullptr) {
        t.slopes[row] = p_.alibi_slopes[segment.sequence * p_.alibi_batch_stride + query.head] * kLog2e;
      }
    }
  }

  // The current one of `segments`.
  template <class Segments>
  void attend(const Work* works, Segments& segments, WideRows& wide) const {
    const Segment& segment = segments.now().segment;
    const Heads heads = heads_of(segment);
    const int64_t first_head = heads.first, count = heads.count;
    const TokenSpan tokens = segment.tokens(geometry_.tile_tokens);
    for (int64_t i = 0; i < count; ++i) clear(works[i].tile);
    for (int64_t begin = tokens.begin; begin < tokens.end; begin += kChunkTokens) {
      const bool first = begin == tokens.begin;
      for (int64_t i = 0; i < count && !first; ++i) {
        set_aside(works[i].tile, works[i].aside);
        clear(works[i].tile);
      }
      const int64_t end = std::min(begin + kChunkTokens, tokens.end);
      const auto upcoming = [&]() -> Stretch {
        if (end < tokens.end) return {segment.sequence, first_head, count, {end, tokens.end}};
        const TakenSegment* const next = segments.next();
        if (next == nullptr) return {};
        const Heads of_next = heads_of(next->segment);
        return {next->segment.sequence, of_next.first, of_next.count,
                next->segment.tokens(geometry_.tile_tokens)};
      };
      attend_chunk(works, segment, {segment.sequence, first_head, count, {begin, end}}, upcoming, wide);
      for (int64_t i = 0; i < count && !first; ++i) merge_into(works[i].tile, works[i].aside);
    }
  }

  // `upcoming()` is what the thread reads after the chunk, so that its beginning is prefetched too; maybe
  // nothing.
  template <class Upcoming>
  void attend_chunk(const Work* works, const Segment& segment, const Stretch& chunk, const Upcoming& upcoming,
                    WideRows& wide) const {
    const int rows = works[0].tile.rows;
    const SequenceLength length = length_of(segment);
    const int64_t first_query = query_row(segment, 0, 0).token,
                  last_query = query_row(segment, 0, rows - 1).token;
    // Tokens that all rows see; runs inside need no mask.
    TokenSpan common = {visible_tokens(p_.visibility, length, last_query, last_query).begin,
                        visible_tokens(p_.visibility, length, first_query, first_query).end};
    if (p_.tree_mask != nullptr) common.end = length.tokens - length.q_len;
    RunQueue runs(cache_rows_, run_tokens_, !widens_, chunk, upcoming);
    // A run has the row scales of one head.
    const bool scaled = cache_rows_.scaled(kKeys) || cache_rows_.scaled(kValues);
    const bool scores_abreast =
        runs.has_whole_tokens() && !widens_ && !scaled && rows <= routine_.max_rows_abreast;
    const TileState* tiles[kMaxAbreast];
    for (int64_t i = 0; i < chunk.heads; ++i) tiles[i] = &works[i].tile;
    RowView views[kMaxRows];
    for (int64_t begin = chunk.tokens.begin; begin < chunk.tokens.end; begin += run_tokens_) {
      const int64_t end = std::min(begin + run_tokens_, chunk.tokens.end);
      const bool viewed = begin < common.begin || end > common.end || p_.alibi_slopes != nullptr;
      if (viewed) fill_views(views, rows, segment, length, begin);
      runs.advance(viewed);
      const RowView* const seen = viewed ? views : nullptr;
      const bool abreast = scores_abreast && end - begin == run_tokens_;
      if (abreast) {
        routine_.score_abreast(tiles, chunk.heads, runs.run(kKeys, 0), seen, runs.ahead(kKeys, 0));
      } else {
        for (int64_t i = 0; i < chunk.heads; ++i) {
          const Run& run = runs.run(kKeys, i);
          const RowsAhead ahead = runs.ahead(kKeys, i);
          const void* const next_q = chunk.heads == 1 ? nullptr : works[(i + 1) % chunk.heads].tile.q;
          if (widens_) {
            routine_.score(works[i].tile, wide.widen(kKeys, run, ahead), seen, {}, next_q);
          } else {
            routine_.score(works[i].tile, run, seen, ahead, next_q);
          }
        }
      }
      if (abreast && rows <= kMaxRowsAdded) {
        routine_.accumulate_abreast(tiles, chunk.heads, runs.run(kValues, 0), runs.ahead(kValues, 0));
      } else {
        for (int64_t i = 0; i < chunk.heads; ++i) {
          const Run& run = runs.run(kValues, i);
          const RowsAhead ahead = runs.ahead(kValues, i);
          if (widens_) {
            routine_.accumulate(works[i].tile, wide.widen(kValues, run, ahead), {});
          } else {
            routine_.accumulate(works[i].tile, run, ahead);
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

  // A CTA has heads_abreast_ slots, from cta * heads_abreast_ on.
  void publish(const Work* works, int64_t heads, int64_t cta) {
    for (int64_t i = 0; i < heads; ++i) set_aside(works[i].tile, memory_.slot(cta * heads_abreast_ + i));
    published_[cta].store(1, std::memory_order_release);
    published_[cta].notify_all();
  }

  // In ascending order of the peers' ranges, so that results do not depend on who was faster.
  void merge_peers(const Work* works, int64_t heads, int64_t host, int64_t last_peer) {
    for (int64_t peer = host + 1; peer <= last_peer; ++peer) {
      published_[peer].wait(0, std::memory_order_acquire);  // sleeps if it takes long
      for (int64_t i = 0; i < heads; ++i) merge_into(works[i].tile, memory_.slot(peer * heads_abreast_ + i));
    }
  }

  void write(const Work& work, const Segment& segment) const {
    const TileState& t = work.tile;
    const int64_t first_query = p_.first_query(segment.sequence);
    const float value_scale = common_scale(p_.v_scale, segment.sequence, work.kv_head);
    for (int row = 0; row < t.rows; ++row) {
      const QueryRow query = query_row(segment, work.kv_head, row);
      const int64_t token = first_query + query.token;
      const SoftmaxState state{t.m[row], t.l[row]};
      float factor = normaliser(state.l), lse = log_sum_exp(state);
      if (p_.sinks != nullptr) {
        const Merged merged = merge_sink(state, p_.sinks[query.head]);
        factor = normaliser(merged.state.l) * merged.weight_a;
        lse = log_sum_exp_to(merged.state, kLog2e);
      }
      routine_.write_output(t, row, factor * value_scale, out_row(segment.sequence, token, query.head));
      p_.lse[segment.sequence * p_.lse_batch_stride + query.head * p_.lse_head_stride + token] = lse;
    }
  }

  void* out_row(int64_t sequence, int64_t token, int64_t head) const {
    const int64_t offset =
        sequence * p_.out_batch_stride + token * p_.out_token_stride + head * p_.out_head_stride;
    return static_cast<char*>(p_.out) + offset * element_size(p_.dtype);
  }

  const DecodeParams& p_;
  const TileRoutine& routine_;
  const WideningTable* const table_;  // null: caches of q's dtype
  const bool widens_;
  const CacheRows cache_rows_;
  const int64_t rows_per_block_;
  WorkingMemory memory_;
  int64_t heads_abreast_;
  int run_tokens_;
  int64_t head_groups_;  // of a sequence: heads that go abreast, to the schedule one KV head
  Geometry geometry_;
  LeanRanges ranges_;
  std::vector<int64_t> sequence_begin_;
  std::unique_ptr<std::atomic<uint32_t>[]> published_;
  std::atomic<int64_t> next_ticket_{0};
};

}  // namespace

void decode(const DecodeParams& params) {
  Decode(params, tile_routine(params.dtype, params.cache_dtype), kMaxAbreast).run();
}

void decode_fixed_split(const DecodeParams& params, int64_t splits) {
  Decode(params, tile_routine(params.dtype, params.cache_dtype), 1).run_fixed_split(splits);
}

void read_caches(const DecodeParams& params) {
  const TileRoutine reader = reads_alone(tile_routine(params.dtype, params.cache_dtype), params.cache_dtype);
  Decode(params, reader, kMaxAbreast).run();
}

}  // namespace lean::cpu
