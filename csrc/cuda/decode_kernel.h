// LeanAttention's decode kernel (arXiv 2405.10480, section 4): one launch in which every CTA finds its lean
// range from the lengths on the device, computes it, publishes at most one partial state, and host blocks
// merge the states of their peers.
//
// Inside a CTA the four warps split the tokens of a segment, 16 at a time in turn, each with a ring of
// asynchronous copies of its own, so that no barrier stands in the loop; they merge once per segment.
#pragma once

#include <utility>

#include "cuda/config.h"
#include "cuda/errors.h"
#include "cuda/fix_up.h"
#include "cuda/shared_state.h"
#include "params.h"
#include "softmax_state.h"

namespace lean::cuda {

#define LEAN_BACKEND_INLINE LEAN_DEVICE
#include "score-inl.h"

// The Math of score-inl.h.
struct ScoreMath {
  using F = float;
  static LEAN_DEVICE F set1(F x) { return x; }
  static LEAN_DEVICE F mul(F a, F b) { return a * b; }
  static LEAN_DEVICE F fma(F a, F b, F c) { return fmaf(a, b, c); }
  static LEAN_DEVICE F tanh(F x) { return tanhf(x); }
};

struct DecodeArguments {
  DecodeParams p;
  Workspace workspace;
  ErrorRecord* errors;
  int64_t min_tiles_per_cta;
  bool aligned;  // every row of K and V begins and ends at a multiple of 16 bytes
};

template <class Config>
constexpr int shared_bytes() {
  return kWarps * (Config::ring_bytes + Config::dequantised_bytes) + Config::q_bytes +
         sizeof(SharedState<Config>);
}

template <class Config>
class DecodeCta {
  using T = typename Config::T;
  using KPanels = typename Config::KPanels;
  using VPanels = typename Config::VPanels;
  using Element = typename Config::Element;
  static constexpr int kSlots = Config::slots;
  static constexpr int kChunkElements = 16 / sizeof(Element);

 public:
  LEAN_DEVICE explicit DecodeCta(const DecodeArguments& arguments)
      : a_(arguments),
        p_(arguments.p),
        geometry_(p_.geometry(Config::rows, Config::tile_tokens)),
        thread_(hw::thread_index()),
        warp_(thread_ / hw::kWarpThreads),
        lane_(thread_ % hw::kWarpThreads) {}

  LEAN_DEVICE void run() {
    if (!find_range()) return;
    const auto length = [this](int64_t i) { return p_.scheduled_length(i); };
    for (;;) {
      hw::sync_block();  // the last segment's state has been read
      if (thread_ == 0) {
        shared().more = walk().next(shared().segment, length);
        if (shared().more) load_segment(shared().segment);
      }
      hw::sync_block();
      if (!shared().more) return;
      process(shared().segment);
    }
  }

 private:
  // ---- Shared memory: a ring per warp, the query rows, a dequantised panel per warp, the shared state.
  // Computed where they are used: pointers kept would take registers.
  LEAN_DEVICE char* ring() const { return hw::shared_memory() + warp_ * Config::ring_bytes; }
  LEAN_DEVICE char* query() const { return hw::shared_memory() + kWarps * Config::ring_bytes; }
  LEAN_DEVICE char* dequantised() const {
    return query() + Config::q_bytes + warp_ * Config::dequantised_bytes;
  }
  LEAN_DEVICE SharedState<Config>& shared() const {
    return *reinterpret_cast<SharedState<Config>*>(query() + Config::q_bytes +
                                                   kWarps * Config::dequantised_bytes);
  }
  LEAN_DEVICE SegmentWalk& walk() const { return *reinterpret_cast<SegmentWalk*>(shared().walk); }

  LEAN_DEVICE void load_segment(const Segment& segment) {
    shared().row_begin = static_cast<int>(segment.row_block) * Config::rows;
    shared().rows = static_cast<int>(geometry_.block_rows(segment.length.q_len, segment.row_block));
    shared().first_token = static_cast<int>(segment.tokens(Config::tile_tokens).begin);
    shared().bad_block = -1;
  }

  // Sets grid, cta and the walk; false where this CTA has nothing to do. They live in shared memory: the loop
  // over tokens needs the registers.
  LEAN_DEVICE bool find_range() {
    if (thread_ == 0) shared().ticket = take_ticket(a_.workspace, hw::num_ctas());
    const int64_t sequences = p_.sequences();
    const int64_t per_thread = ceil_div(sequences, kThreads), first = thread_ * per_thread;
    int64_t sum = 0, total = 0;
    if (ragged()) {
      for (int64_t i = first; i < min(first + per_thread, sequences); ++i) {
        sum += geometry_.sequence_tiles(p_.scheduled_length(i));
      }
      for (int lanes = 1; lanes < hw::kWarpThreads; lanes *= 2) {
        const int64_t below = hw::shuffle_up(sum, lanes);
        if (lane_ >= lanes) sum += below;
      }
      if (lane_ == hw::kWarpThreads - 1) shared().warp_tiles[warp_] = sum;
    }
    hw::sync_block();
    if (shared().ticket == 0) {  // one CTA tells for all
      find_bad_numbers(p_, thread_, kThreads, [this](const BadNumber& bad) { report(a_.errors, bad); });
    }
    if (p_.cu_seqlens_q) write_padding();
    if (ragged()) {
      for (int w = 0; w < kWarps; ++w) {
        if (w == warp_) sum += total;
        total += shared().warp_tiles[w];
      }
    } else {
      total = sequences * geometry_.sequence_tiles(p_.scheduled_length(0));
    }
    if (total == 0) return false;
    const Grid grid{useful_ctas(total, hw::num_ctas(), a_.min_tiles_per_cta), total};
    // Ranges go from the last to the first in the order in which CTAs arrive; see fix_up.h.
    const int64_t cta = grid.num_ctas - 1 - shared().ticket;
    if (cta < 0) return false;
    if (thread_ == 0) {
      shared().grid = grid;
      shared().cta = cta;
    }
    find_sequence(grid.range(cta), first, min(first + per_thread, sequences), sum);
    return true;
  }

  // Starts the walk of `range`, in the one thread whose sequences [first, end) hold its first LeanTile;
  // `end_tile` is one past the last LeanTile of those.
  LEAN_DEVICE void find_sequence(LeanRange range, int64_t first, int64_t end, int64_t end_tile) {
    const int64_t tile = range.begin;
    if (!ragged()) {
      const int64_t tiles = geometry_.sequence_tiles(p_.scheduled_length(0));
      if (thread_ == 0) start_walk(range, tile / tiles, tile / tiles * tiles);
      return;
    }
    if (tile >= end_tile) return;
    int64_t begin_tile = end_tile;
    for (int64_t b = end - 1; b >= first; --b) {
      begin_tile -= geometry_.sequence_tiles(p_.scheduled_length(b));
      if (begin_tile <= tile) {
        start_walk(range, b, begin_tile);
        return;
      }
    }
  }

  LEAN_DEVICE void start_walk(LeanRange range, int64_t sequence, int64_t sequence_begin) {
    walk() = SegmentWalk(geometry_, range, sequence, sequence_begin,
                         [this](int64_t i) { return p_.scheduled_length(i); });
  }

  // Sequences may differ in their LeanTiles.
  LEAN_DEVICE bool ragged() const { return p_.seq_lens || p_.cache_leftpad || p_.cu_seqlens_q; }

  // Query tokens of a packed q that belong to no sequence come out as rows that see nothing.
  LEAN_DEVICE void write_padding() const {
    const int64_t before = p_.first_query(0), end = p_.first_query(p_.batch);
    for (int64_t n = shared().ticket; n < before + p_.query_tokens - end; n += hw::num_ctas()) {
      const int64_t token = n < before ? n : end + n - before;
      for (int64_t i = thread_; i < p_.num_heads * p_.v.dims; i += kThreads) {
        out_row(0, token, i / p_.v.dims)[i % p_.v.dims] = 0;
      }
      for (int64_t head = thread_; head < p_.num_heads; head += kThreads) {
        p_.lse[head * p_.lse_head_stride + token] = kMinusInfinity;
      }
    }
  }
  LEAN_DEVICE uint16_t* out_row(int64_t sequence, int64_t token, int64_t head) const {
    return static_cast<uint16_t*>(p_.out) + sequence * p_.out_batch_stride + token * p_.out_token_stride +
           head * p_.out_head_stride;
  }

  // Row `row` of the output tile is query token row / group of query head row % group.
  LEAN_DEVICE int query_token(int row) const {
    return static_cast<int>((shared().row_begin + row) / static_cast<int>(p_.group()));
  }
  LEAN_DEVICE int query_head(int row) const {
    return static_cast<int>((shared().row_begin + row) % static_cast<int>(p_.group()));
  }

  LEAN_DEVICE void process(const Segment& segment) {
    const TokenSpan tokens = segment.tokens(Config::tile_tokens);
    tokens_ = static_cast<int>(tokens.end - tokens.begin);
    k_ = static_cast<const Element*>(p_.k.data) + p_.k.offset(0, 0, segment.kv_head);
    v_ = static_cast<const Element*>(p_.v.data) + p_.v.offset(0, 0, segment.kv_head);
    if (!p_.pages.block_table && tokens_ > 0) {
      const int64_t block = block_at(0);
      k_ += p_.k.offset(block, tokens.begin, 0);
      v_ += p_.v.offset(block, tokens.begin, 0);
    }
    const int steps = (tokens_ + kStepTokens - 1) / kStepTokens, token_warp = warp_ / Config::dim_warps;
    steps_ = steps > token_warp ? (steps - token_warp + Config::token_warps - 1) / Config::token_warps : 0;

    read_slot_ = 0;
    start_copies();
    load_query(segment);
    find_row_spans(segment.length);
    hw::sync_block();  // the query is there
    attend();
    merge_warps();
    if (thread_ == 0 && shared().bad_block >= 0) report_block(segment, shared().bad_block);
    if (!segment.is_host()) {
      publish();
    } else {
      const int64_t last_peer =
          segment.has_peers() ? shared().grid.cta_of(segment.output_end - 1) : shared().cta;
      write(segment, last_peer);
    }
  }

  // Zeros beyond the rows and dims that exist.
  LEAN_DEVICE void load_query(const Segment& segment) {
    constexpr int kChunks = Config::QRows::chunks;
    for (int i = thread_; i < Config::rows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      Chunk elements{};
      if (row < shared().rows && chunk * 8 < p_.k.dims) {
        const auto* from = static_cast<const uint16_t*>(p_.q) + segment.batch * p_.q_batch_stride +
                           (p_.first_query(segment.batch) + query_token(row)) * p_.q_token_stride +
                           (segment.kv_head * p_.group() + query_head(row)) * p_.q_head_stride + chunk * 8;
        for (int e = 0; e < 8; ++e) elements.bits[e] = from[e];
      }
      *reinterpret_cast<Chunk*>(query() + Config::QRows::offset(row, chunk)) = elements;
    }
  }

  // Tokens, relative to the segment's first, that each row sees and that all see.
  LEAN_DEVICE void find_row_spans(const SequenceLength& length) {
    const auto relative = [&](int64_t token) {
      return static_cast<int>(max(0, min(token - shared().first_token, tokens_)));
    };
    const int64_t new_tokens = length.tokens - length.q_len;
    const int first = query_token(0), last = query_token(shared().rows - 1);
    common_begin_ = relative(visible_tokens(p_.visibility, length, last, last).begin);
    common_end_ =
        relative(p_.tree_mask ? new_tokens : visible_tokens(p_.visibility, length, first, first).end);
    if (thread_ == 0) shared().new_tokens = static_cast<int>(new_tokens - shared().first_token);
    if (p_.alibi_slopes && thread_ < shared().rows) {
      shared().positions[thread_] =
          static_cast<int>(new_tokens - shared().first_token) + query_token(thread_);
      const Segment& segment = shared().segment;
      shared().slopes[thread_] = kLog2e * p_.alibi_slopes[segment.batch * p_.alibi_batch_stride +
                                                          segment.kv_head * p_.group() + query_head(thread_)];
    }
    if (thread_ < Config::rows) {
      const int query = query_token(thread_);
      const TokenSpan seen = visible_tokens(p_.visibility, length, query, query);
      shared().spans[thread_][0] = relative(seen.begin);
      shared().spans[thread_][1] = relative(seen.end);
      if (p_.tree_mask) find_tree_row(new_tokens, query);
    }
  }

  // Rows that do not exist have that of the first.
  LEAN_DEVICE void find_tree_row(int64_t new_tokens, int query) {
    const int64_t sequence = shared().segment.batch;
    const int64_t first = p_.first_query(sequence), own = thread_ < shared().rows ? query : query_token(0);
    shared().tree_rows[thread_] = p_.tree_mask + sequence * p_.tree_batch_stride +
                                  (first + own) * p_.tree_row_stride - (new_tokens - shared().first_token);
    // New tokens that the mask has no column for are not seen.
    const int64_t end = new_tokens + p_.tree_columns - shared().first_token;
    shared().spans[thread_][1] = static_cast<int>(max(0, min(shared().spans[thread_][1], end)));
  }

  // ---- The ring. Items are panels in the order of use: the K panels of a step, then its V panels.

  // The block of the sequence's tokens from index * block_size on; one out of range is another one.
  LEAN_DEVICE int64_t block_at(int64_t index) const {
    const Segment& segment = shared().segment;
    const int64_t block = p_.pages.raw_block(segment.batch, segment.kv_head, index);
    if (p_.pages.is_block(block)) return block;
    shared().bad_block = static_cast<int>(index);  // reported later: here are no registers to spare
    return 0;
  }

  LEAN_DEVICE void report_block(const Segment& segment, int64_t index) const {
    const int64_t block = p_.pages.raw_block(segment.batch, segment.kv_head, index);
    report(a_.errors, bad_block(BadNumber::decode, p_.pages, segment.batch, segment.kv_head, index, block));
  }

  // Where a token of the segment lies; a token past its end lies where its last one does.
  struct Place {
    int block;
    int slot;
  };
  LEAN_DEVICE Place place_of(int token) const {
    const uint32_t absolute = shared().first_token + min(token, tokens_ - 1);
    const uint32_t block_size = static_cast<uint32_t>(p_.pages.block_size), index = absolute / block_size;
    return {static_cast<int>(block_at(p_.pages.block_table ? index : 0)),
            static_cast<int>(p_.pages.block_table ? absolute - index * block_size : absolute)};
  }

  // Panel `panel` of step `step` of this warp, into slot `slot`.
  LEAN_DEVICE void start_copy(int step, int panel, int slot) {
    if (step < steps_) {
      const int token = first_of_step(step);
      char* to = ring() + slot * Config::slot_bytes;
      if (panel < KPanels::count) {
        copy_panel<KPanels>(to, p_.k, k_, token, panel * KPanels::dims);
      } else {
        copy_panel<VPanels>(to, p_.v, v_, token, (panel - KPanels::count) * VPanels::dims + first_dim_v());
      }
    }
    hw::commit_copies();  // empty groups too, so that waiting counts alike
  }

  // Fills the ring but for one slot. Not unrolled: that would be most of the kernel's code.
  LEAN_DEVICE void start_copies() {
#pragma unroll 1
    for (int item = 0; item < kSlots - 1; ++item) {
      start_copy(item / Config::panels, item % Config::panels, item);
    }
  }

  // `from` is k_ or v_. Tokens past the end and dims that the tensor does not have arrive as zeros, unread.
  template <class Panels>
  LEAN_DEVICE void copy_panel(char* to, const CacheView& cache, const Element* from, int token,
                              int first_dim) {
    constexpr int kChunks = Panels::Rows::chunks, kCopies = kStepTokens * kChunks / hw::kWarpThreads;
    static_assert(kStepTokens * kChunks % hw::kWarpThreads == 0);
    const auto row_of = [&](int i) { return (i * hw::kWarpThreads + lane_) / kChunks; };
    const auto chunk_of = [&](int i) { return (i * hw::kWarpThreads + lane_) % kChunks; };
    // Elements from this lane's i-th chunk on that exist.
    const auto count_of = [&](int i) {
      return token + row_of(i) < tokens_
                 ? static_cast<int>(cache.dims) - first_dim - chunk_of(i) * kChunkElements
                 : 0;
    };
    const auto target_of = [&](int i) { return to + Panels::Rows::offset(row_of(i), chunk_of(i)); };
    const bool paged = p_.pages.block_table != nullptr;
    // In pages, lane i % 16 looks up where row i lies.
    int64_t row_offset = 0;
    if (paged) {
      const Place place = place_of(token + lane_ % kStepTokens);
      row_offset = cache.offset(place.block, place.slot, 0);
    }
    const auto paged_source = [&](int i) {
      return from + hw::shuffle(row_offset, row_of(i)) + first_dim + chunk_of(i) * kChunkElements;
    };
    const auto plain_source = [&](int i) {
      return from + (token + row_of(i)) * cache.token_stride + first_dim + chunk_of(i) * kChunkElements;
    };
    if (!a_.aligned) {
#pragma unroll 1
      for (int i = 0; i < kCopies; ++i) {
        const Element* source = paged ? paged_source(i) : plain_source(i);
        CacheChunk elements;
#pragma unroll
        for (int e = 0; e < kChunkElements; ++e) {
          elements.bits[e] = e < count_of(i) ? source[e] : Element{0};
        }
        *reinterpret_cast<CacheChunk*>(target_of(i)) = elements;
      }
    } else {
      // Where a warp copies whole rows at a time, one lane's chunks lie one below the other: the address
      // moves on by adding, which takes fewer registers than products that the compiler keeps from step to
      // step.
      constexpr bool kWholeRows = hw::kWarpThreads % kChunks == 0;
      const Element* next = plain_source(0);
// All at once would keep their addresses in registers.
#pragma unroll 2
      for (int i = 0; i < kCopies; ++i) {
        if (paged) {
          next = paged_source(i);
        } else if constexpr (!kWholeRows) {
          next = plain_source(i);
        }
        const bool valid = count_of(i) > 0;
        hw::copy_async(target_of(i), valid ? next : from, valid);
        if constexpr (kWholeRows) next += hw::kWarpThreads / kChunks * cache.token_stride;
      }
    }
  }

  // Waits for the next item, starts the copy of the one that takes the place of the item before it, and
  // returns where the next item lies. kPanel: its place in the step.
  template <int kPanel>
  LEAN_DEVICE const char* next_item(int step) {
    hw::wait_copies<kSlots - 2>();
    hw::sync_warp();  // all lanes' copies are there, and all lanes have read the item before
    const int slot = read_slot_, before = slot == 0 ? kSlots - 1 : slot - 1;
    constexpr int kItem = kPanel + kSlots - 1;
    start_copy(step + kItem / Config::panels, kItem % Config::panels, before);
    read_slot_ = slot + 1 == kSlots ? 0 : slot + 1;
    const char* panel = ring() + slot * Config::slot_bytes;
    if constexpr (Config::quantised) {
      if constexpr (kPanel < KPanels::count) {
        dequantise_panel<KPanels>(panel);
      } else {
        dequantise_panel<VPanels>(panel);
      }
      return dequantised();
    } else {
      return panel;
    }
  }

  // Converts a panel to T, unscaled. All lanes have read the one before.
  template <class Panels>
  LEAN_DEVICE void dequantise_panel(const char* panel) {
    constexpr int kChunks = Panels::Rows::chunks;
#pragma unroll 1
    for (int i = 0; i < kStepTokens * kChunks / hw::kWarpThreads; ++i) {
      const int index = i * hw::kWarpThreads + lane_, row = index / kChunks, chunk = index % kChunks;
      const WordChunk narrow = *reinterpret_cast<const WordChunk*>(panel + Panels::Rows::offset(row, chunk));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t low = narrow.words[half * 2], high = narrow.words[half * 2 + 1];
        *reinterpret_cast<WordChunk*>(dequantised() +
                                      Panels::DequantisedRows::offset(row, chunk * 2 + half)) = {
            {dequantise_pair(low), dequantise_pair(low >> 16), dequantise_pair(high),
             dequantise_pair(high >> 16)}};
      }
    }
    hw::sync_warp();
  }

  // The elements in the low half of a word.
  LEAN_DEVICE uint32_t dequantise_pair(uint32_t pair) const { return hw::dequantise<T>(p_.k.dtype, pair); }

  LEAN_DEVICE int first_of_step(int step) const {
    return (step * Config::token_warps + warp_ / Config::dim_warps) * kStepTokens;
  }
  // The first of the output's dims that this warp has.
  LEAN_DEVICE int first_dim_v() const {
    return Config::dim_warps == 1 ? 0 : warp_ % Config::dim_warps * Config::warp_dim_v;
  }

  // ---- The tokens of this warp.

  LEAN_DEVICE void attend() {
    clear();
    if constexpr (Config::query_in_registers) {
#pragma unroll
      for (int rt = 0; rt < Config::row_tiles; ++rt) {
#pragma unroll
        for (int kk = 0; kk < Config::head_dim / 16; ++kk) load_query_fragment(q_fragments_[rt][kk], rt, kk);
      }
    }
    for (int step = 0; step < steps_; ++step) {
      float scores[Config::row_tiles][2][4] = {};
      score_panels(scores, step, std::make_integer_sequence<int, KPanels::count>());
      uint32_t weights[Config::row_tiles][4];
      online_softmax_step(scores, weights, first_of_step(step));
      value_panels(weights, step, std::make_integer_sequence<int, VPanels::count>());
    }
  }

  LEAN_DEVICE void clear() {
#pragma unroll
    for (int rt = 0; rt < Config::row_tiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) state_[rt][half] = {kMinusInfinity, 0.0f};
#pragma unroll
      for (int j = 0; j < Config::warp_dim_v / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) output_[rt][j][e] = 0.0f;
      }
    }
  }

  LEAN_DEVICE void load_query_fragment(uint32_t (&a)[4], int rt, int kk) {
    const int row = rt * kTileRows + lane_ % 16, chunk = kk * 2 + lane_ / 16;
    hw::load_matrices(a, query() + Config::QRows::offset(row, chunk));
  }

  template <int... kPanels>
  LEAN_DEVICE void score_panels(float (&scores)[Config::row_tiles][2][4], int step,
                                std::integer_sequence<int, kPanels...>) {
    (score_panel<kPanels>(scores, next_item<kPanels>(step)), ...);
  }

  // scores += Q K^T over the dims of one panel.
  template <int kPanel>
  LEAN_DEVICE void score_panel(float (&scores)[Config::row_tiles][2][4], const char* panel) {
    constexpr int kSteps = KPanels::dims / 16;
#pragma unroll
    for (int kk = 0; kk < kSteps; ++kk) {
      uint32_t b[4];  // tokens 0-7: dims 0-7, 8-15; tokens 8-15: dims 0-7, 8-15
      hw::load_matrices(
          b, panel + KPanels::DequantisedRows::offset(lane_ % 8 + lane_ / 16 * 8, kk * 2 + lane_ / 8 % 2));
#pragma unroll
      for (int rt = 0; rt < Config::row_tiles; ++rt) {
        if constexpr (Config::query_in_registers) {
          multiply_scores(scores[rt], q_fragments_[rt][kPanel * kSteps + kk], b);
        } else {
          uint32_t a[4];
          load_query_fragment(a, rt, kPanel * kSteps + kk);
          multiply_scores(scores[rt], a, b);
        }
      }
    }
  }
  static LEAN_DEVICE void multiply_scores(float (&scores)[2][4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[4]) {
    hw::multiply_add<T>(scores[0], a, b[0], b[1]);
    hw::multiply_add<T>(scores[1], a, b[2], b[3]);
  }

  // One step of online softmax in base 2: scores become weights relative to the new maximum, rounded to T as
  // the A operand of P V; sums and outputs so far are brought to that maximum.
  LEAN_DEVICE void online_softmax_step(float (&scores)[Config::row_tiles][2][4],
                                       uint32_t (&weights)[Config::row_tiles][4], int first_token) {
    const ScoreOptions options = score_options(p_);
    const float scale = p_.scale * options.unit;
    RowScales scales;
    if constexpr (Config::quantised) scales = scales_of(first_token);
    const bool masked = first_token < common_begin_ || first_token + kStepTokens > common_end_;
#pragma unroll
    for (int rt = 0; rt < Config::row_tiles; ++rt) {
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float maximum = kMinusInfinity;
        const int row = rt * kTileRows + half * 8 + lane_ / 4;
        ScoreTerms<ScoreMath> terms(options);
        terms.row_scaled = Config::quantised;
        terms.biased = p_.alibi_slopes != nullptr;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[rt][i / 2][half * 2 + i % 2];
          const int column = i / 2 * 8 + lane_ % 4 * 2 + i % 2, token = first_token + column;
          score = modified_score<ScoreMath>(
              scaled_score<ScoreMath>(score, scale), terms, [&] { return hw::shuffle(scales.k, column); },
              [&] { return -shared().slopes[row]; },
              [&] { return static_cast<float>(abs(shared().positions[row] - token)); },
              [&](float x) { return masked && !is_seen(row, token) ? kMinusInfinity : x; });
          maximum = fmaxf(maximum, score);
        }
        maximum = fmaxf(maximum, hw::shuffle_xor(maximum, 1));
        maximum = fmaxf(maximum, hw::shuffle_xor(maximum, 2));
        SoftmaxState& state = state_[rt][half];
        const float m = fmaxf(state.m, maximum);
        // A row that has seen nothing yet takes any finite number, so that 2^(-inf - m) is 0 and not NaN.
        const float reference = m == kMinusInfinity ? 0.0f : m;
        factor[half] = exp2f(state.m - reference);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[rt][i / 2][half * 2 + i % 2];
          score = exp2f(score - reference);
          sum += score;
          if constexpr (Config::quantised) score *= hw::shuffle(scales.v, i / 2 * 8 + lane_ % 4 * 2 + i % 2);
        }
        state.l = (state.m == kMinusInfinity ? state.l : state.l * factor[half]) + sum;
        state.m = m;
      }
      if (hw::any(factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int j = 0; j < Config::warp_dim_v / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) output_[rt][j][e] *= factor[e / 2];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[rt][i] = hw::pack<T>(scores[rt][i / 2][i % 2 * 2], scores[rt][i / 2][i % 2 * 2 + 1]);
      }
    }
  }

  LEAN_DEVICE bool is_seen(int row, int token) const {
    if (token < shared().spans[row][0] || token >= shared().spans[row][1]) return false;
    return !p_.tree_mask || token < shared().new_tokens || shared().tree_rows[row][token];
  }

  // The scales of token lane % 16 of a step.
  struct RowScales {
    float k;
    float v;
  };
  LEAN_DEVICE RowScales scales_of(int first_token) const {
    const Segment& segment = shared().segment;
    const Place place = place_of(first_token + lane_ % kStepTokens);
    return {p_.k.scale.at(segment.batch, place.block, place.slot, segment.kv_head),
            p_.v.scale.at(segment.batch, place.block, place.slot, segment.kv_head)};
  }

  template <int... kPanels>
  LEAN_DEVICE void value_panels(const uint32_t (&weights)[Config::row_tiles][4], int step,
                                std::integer_sequence<int, kPanels...>) {
    (value_panel<kPanels>(weights, next_item<KPanels::count + kPanels>(step)), ...);
  }

  // output += P V for the dims of one panel.
  template <int kPanel>
  LEAN_DEVICE void value_panel(const uint32_t (&weights)[Config::row_tiles][4], const char* panel) {
    constexpr int kPairs = VPanels::dims / 16;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      uint32_t b[4];  // dims 0-7: tokens 0-7, 8-15; dims 8-15: tokens 0-7, 8-15
      hw::load_matrices_transposed(b,
                                   panel + VPanels::DequantisedRows::offset(lane_ % 16, j * 2 + lane_ / 16));
#pragma unroll
      for (int rt = 0; rt < Config::row_tiles; ++rt) {
        const int column = (kPanel * kPairs + j) * 2;
        hw::multiply_add<T>(output_[rt][column], weights[rt], b[0], b[1]);
        hw::multiply_add<T>(output_[rt][column + 1], weights[rt], b[2], b[3]);
      }
    }
  }

  // ---- The end of a segment.

  LEAN_DEVICE float* staged(int warp) const {
    return reinterpret_cast<float*>(hw::shared_memory() + warp * Config::ring_bytes);
  }

  // Each warp lays its output in its ring, whose copies have all been used; then shared().m becomes the
  // weight of each warp's output, shared().merged_m and shared().l[0] the CTA's state.
  LEAN_DEVICE void merge_warps() {
    hw::wait_copies<0>();
    hw::sync_warp();
#pragma unroll
    for (int rt = 0; rt < Config::row_tiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = rt * kTileRows + half * 8 + lane_ / 4;
        SoftmaxState& state = state_[rt][half];
        state.l += hw::shuffle_xor(state.l, 1);
        state.l += hw::shuffle_xor(state.l, 2);
        if (lane_ % 4 == 0) {
          shared().m[warp_][row] = state.m;
          shared().l[warp_][row] = state.l;
        }
        float* to = staged(warp_) + row * Config::warp_dim_v + lane_ % 4 * 2;
#pragma unroll
        for (int j = 0; j < Config::warp_dim_v / 8; ++j) {
          to[j * 8] = output_[rt][j][half * 2];
          to[j * 8 + 1] = output_[rt][j][half * 2 + 1];
        }
      }
    }
    hw::sync_block();
    if (thread_ < Config::rows) {
      SoftmaxState merged;  // warps of the same tokens have the same state
      for (int w = 0; w < kWarps; w += Config::dim_warps) {
        merged = merge(merged, {shared().m[w][thread_], shared().l[w][thread_]}).state;
      }
      for (int w = 0; w < kWarps; ++w) {
        shared().m[w][thread_] = rescale(shared().m[w][thread_], merged.m);
      }
      shared().merged_m[thread_] = merged.m;
      shared().l[0][thread_] = merged.l;
    }
    hw::sync_block();
  }

  // Four neighbouring elements of the CTA's output.
  LEAN_DEVICE hw::Float4 merged_output(int row, int column) const {
    hw::Float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < Config::token_warps; ++i) {
      const int w = i * Config::dim_warps + column / Config::warp_dim_v;
      add(sum, shared().m[w][row],
          *reinterpret_cast<const hw::Float4*>(staged(w) + row * Config::warp_dim_v +
                                               column % Config::warp_dim_v));
    }
    return sum;
  }

  static LEAN_DEVICE void add(hw::Float4& sum, float weight, hw::Float4 of) {
    sum.x += weight * of.x;
    sum.y += weight * of.y;
    sum.z += weight * of.z;
    sum.w += weight * of.w;
  }

  static constexpr int kQuads = Config::head_dim_v / 4;  // of columns

  LEAN_DEVICE void publish() {
    float* partial = a_.workspace.partial(shared().cta);
    for (int i = thread_; i < shared().rows * kQuads; i += kThreads) {
      const int row = i / kQuads, column = i % kQuads * 4;
      hw::store_shared_between_ctas(
          reinterpret_cast<hw::Float4*>(partial + row * Config::head_dim_v + column),
          merged_output(row, column));
    }
    float* m = partial + Config::rows * Config::head_dim_v;
    if (thread_ < shared().rows) {
      hw::store_shared_between_ctas(m + thread_, shared().merged_m[thread_]);
      hw::store_shared_between_ctas(m + Config::rows + thread_, shared().l[0][thread_]);
    }
    hw::sync_block();
    if (thread_ == 0) publish_flag(a_.workspace, shared().cta);
  }

  // Merges the partial states of the CTAs after this one, up to last_peer, in ascending order, so that
  // results do not depend on who was faster, and writes the output tile.
  LEAN_DEVICE void write(const Segment& segment, int64_t last_peer) {
    for (int64_t peer = shared().cta + 1 + thread_; peer <= last_peer; peer += kThreads) {
      wait_flag(a_.workspace, peer);
    }
    hw::sync_block();
    const int64_t first_query = p_.first_query(segment.batch);
    if (thread_ < shared().rows) {
      const SoftmaxState own{shared().merged_m[thread_], shared().l[0][thread_]};
      SoftmaxState merged = own;
      for (int64_t peer = shared().cta + 1; peer <= last_peer; ++peer) {
        const float* m = a_.workspace.partial(peer) + Config::rows * Config::head_dim_v + thread_;
        merged =
            merge(merged, {hw::load_shared_between_ctas(m), hw::load_shared_between_ctas(m + Config::rows)})
                .state;
      }
      for (int w = 0; w < kWarps; ++w) shared().m[w][thread_] *= rescale(own.m, merged.m);
      shared().merged_m[thread_] = merged.m;
      const int64_t head = segment.kv_head * p_.group() + query_head(thread_);
      float factor = normaliser(merged.l), lse = log_sum_exp(merged);
      if (p_.sinks) {
        const Merged with_sink = merge_sink(merged, p_.sinks[head]);
        factor = normaliser(with_sink.state.l) * with_sink.weight_a;
        lse = log_sum_exp_to(with_sink.state, kLog2e);
      }
      shared().l[0][thread_] = factor;
      p_.lse[segment.batch * p_.lse_batch_stride + head * p_.lse_head_stride + first_query +
             query_token(thread_)] = lse;
    }
    hw::sync_block();
    for (int i = thread_; i < shared().rows * kQuads; i += kThreads) {
      const int row = i / kQuads, column = i % kQuads * 4;
      if (column >= p_.v.dims) continue;
      const float merged_m = shared().merged_m[row];
      hw::Float4 sum = merged_output(row, column);
      for (int64_t peer = shared().cta + 1; peer <= last_peer; ++peer) {
        const float* partial = a_.workspace.partial(peer);
        add(sum,
            rescale(hw::load_shared_between_ctas(partial + Config::rows * Config::head_dim_v + row),
                    merged_m),
            hw::load_shared_between_ctas(
                reinterpret_cast<const hw::Float4*>(partial + row * Config::head_dim_v + column)));
      }
      const float factor = shared().l[0][row];
      auto* out = reinterpret_cast<uint32_t*>(out_row(segment.batch, first_query + query_token(row),
                                                      segment.kv_head * p_.group() + query_head(row)) +
                                              column);
      out[0] = hw::pack<T>(sum.x * factor, sum.y * factor);
      out[1] = hw::pack<T>(sum.z * factor, sum.w * factor);
    }
  }

  struct alignas(16) Chunk {
    uint16_t bits[8];
  };
  struct alignas(16) CacheChunk {
    Element bits[kChunkElements];
  };
  struct alignas(16) WordChunk {
    uint32_t words[4];
  };

  const DecodeArguments& a_;
  const DecodeParams& p_;
  const Geometry geometry_;
  const int thread_;
  const int warp_;
  const int lane_;

  // What follows is of the segment in hand.
  const Element* k_;  // row of its first token; in pages, that of the head in the first block
  const Element* v_;
  int tokens_;
  int steps_;  // of this warp
  int read_slot_;
  int common_begin_;
  int common_end_;
  uint32_t q_fragments_[Config::row_tiles][Config::query_in_registers ? Config::head_dim / 16 : 1][4];
  SoftmaxState state_[Config::row_tiles][2];
  float output_[Config::row_tiles][Config::warp_dim_v / 8][4];
};

template <class Config>
LEAN_KERNEL(kThreads, 2)
decode_kernel(LEAN_KERNEL_PARAMETER DecodeArguments arguments) {
  DecodeCta<Config>(arguments).run();
}

}  // namespace lean::cuda
