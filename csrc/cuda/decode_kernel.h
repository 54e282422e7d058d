// LeanAttention's decode kernel (arXiv 2405.10480, section 4): one launch in which every CTA finds its lean
// range from the lengths on the device, computes it, publishes at most one partial state, and host blocks
// merge the states of their peers.
//
// Inside a CTA the four warps split the tokens of a segment, 16 at a time in turn, each with a ring of
// asynchronous copies of its own, so that no barrier stands in the loop; they merge once per segment.
#pragma once

#include <utility>

#include "cuda/config.h"
#include "cuda/fix_up.h"
#include "params.h"
#include "softmax_state.h"

namespace lean::cuda {

struct DecodeArguments {
  DecodeParams p;
  Workspace workspace;
  int64_t min_tiles_per_cta;
  bool aligned;  // every row of K and V begins at a multiple of 16 bytes
};

// What the threads of a CTA tell each other.
template <class Config>
struct SharedState {
  int64_t ticket;
  Grid grid;
  int64_t cta;
  int64_t warp_tiles[kWarps];
  bool more;
  Segment segment;
  alignas(SegmentWalk) char walk[sizeof(SegmentWalk)];
  float m[kWarps][Config::rows];  // of the warps; then the weight of their outputs
  float l[kWarps][Config::rows];
  float merged_m[Config::rows];
};

template <class Config>
constexpr int shared_bytes() {
  return kWarps * Config::ring_bytes + Config::q_bytes + sizeof(SharedState<Config>);
}

template <class Config>
class DecodeCta {
  using T = typename Config::T;
  using KPanels = typename Config::KPanels;
  using VPanels = typename Config::VPanels;
  static constexpr int kSlots = Config::slots;

 public:
  LEAN_DEVICE explicit DecodeCta(const DecodeArguments& arguments)
      : a_(arguments),
        p_(arguments.p),
        geometry_{p_.num_kv_heads, p_.group(), Config::rows, Config::tile_tokens, p_.visibility},
        thread_(hw::thread_index()),
        warp_(thread_ / hw::kWarpThreads),
        lane_(thread_ % hw::kWarpThreads),
        ring_(hw::shared_memory() + warp_ * Config::ring_bytes),
        query_(hw::shared_memory() + kWarps * Config::ring_bytes),
        shared_(*reinterpret_cast<SharedState<Config>*>(query_ + Config::q_bytes)) {}

  LEAN_DEVICE void run() {
    if (!find_range()) return;
    const auto length = [this](int64_t b) { return length_of(b); };
    for (;;) {
      hw::sync_block();  // the last segment's state has been read
      if (thread_ == 0) shared_.more = walk().next(shared_.segment, length);
      hw::sync_block();
      if (!shared_.more) return;
      process(shared_.segment);
    }
  }

 private:
  // A length out of range is brought into it: nothing is read out of bounds.
  LEAN_DEVICE SequenceLength length_of(int64_t sequence) const {
    const int64_t tokens = p_.seq_lens ? p_.seq_lens[sequence * p_.seq_lens_stride] : p_.max_len;
    return {greater(0, lesser(tokens, p_.max_len)), 0};
  }

  LEAN_DEVICE SegmentWalk& walk() { return *reinterpret_cast<SegmentWalk*>(shared_.walk); }

  // Sets grid, cta and the walk; false where this CTA has nothing to do. They live in shared memory: the loop
  // over tokens needs the registers.
  LEAN_DEVICE bool find_range() {
    if (thread_ == 0) shared_.ticket = take_ticket(a_.workspace, hw::num_ctas());
    const int64_t per_thread = ceil_div(p_.batch, kThreads), first = thread_ * per_thread;
    int64_t sum = 0, total = 0;
    if (p_.seq_lens) {
      for (int64_t b = first; b < lesser(first + per_thread, p_.batch); ++b) {
        sum += geometry_.sequence_tiles(length_of(b));
      }
      for (int lanes = 1; lanes < hw::kWarpThreads; lanes *= 2) {
        const int64_t below = hw::shuffle_up(sum, lanes);
        if (lane_ >= lanes) sum += below;
      }
      if (lane_ == hw::kWarpThreads - 1) shared_.warp_tiles[warp_] = sum;
    }
    hw::sync_block();
    if (p_.seq_lens) {
      for (int w = 0; w < kWarps; ++w) {
        if (w == warp_) sum += total;
        total += shared_.warp_tiles[w];
      }
    } else {
      total = p_.batch * geometry_.sequence_tiles(length_of(0));
    }
    const Grid grid{useful_ctas(total, hw::num_ctas(), a_.min_tiles_per_cta), total};
    // Ranges go from the last to the first in the order in which CTAs arrive; see fix_up.h.
    const int64_t cta = grid.num_ctas - 1 - shared_.ticket;
    if (cta < 0) return false;
    if (thread_ == 0) {
      shared_.grid = grid;
      shared_.cta = cta;
    }
    find_sequence(grid.range(cta), first, lesser(first + per_thread, p_.batch), sum);
    return true;
  }

  // Starts the walk of `range`, in the one thread whose sequences [first, end) hold its first LeanTile;
  // `end_tile` is one past the last LeanTile of those.
  LEAN_DEVICE void find_sequence(LeanRange range, int64_t first, int64_t end, int64_t end_tile) {
    const int64_t tile = range.begin;
    if (!p_.seq_lens) {
      const int64_t tiles = geometry_.sequence_tiles(length_of(0));
      if (thread_ == 0) start_walk(range, tile / tiles, tile / tiles * tiles);
      return;
    }
    if (tile >= end_tile) return;
    int64_t begin_tile = end_tile;
    for (int64_t b = end - 1; b >= first; --b) {
      begin_tile -= geometry_.sequence_tiles(length_of(b));
      if (begin_tile <= tile) {
        start_walk(range, b, begin_tile);
        return;
      }
    }
  }

  LEAN_DEVICE void start_walk(LeanRange range, int64_t sequence, int64_t sequence_begin) {
    walk() =
        SegmentWalk(geometry_, range, sequence, sequence_begin, [this](int64_t b) { return length_of(b); });
  }

  // Row `row` of the output tile is query token row / group of query head row % group.
  LEAN_DEVICE int query_token(int row) const {
    return static_cast<int>((row_begin_ + row) / static_cast<int>(p_.group()));
  }
  LEAN_DEVICE int query_head(int row) const {
    return static_cast<int>((row_begin_ + row) % static_cast<int>(p_.group()));
  }

  LEAN_DEVICE void process(const Segment& segment) {
    row_begin_ = static_cast<int>(segment.row_block) * Config::rows;
    rows_ = static_cast<int>(geometry_.block_rows(segment.row_block));
    const TokenSpan tokens = segment.tokens(Config::tile_tokens);
    tokens_ = static_cast<int>(tokens.end - tokens.begin);
    k_ = static_cast<const uint16_t*>(p_.k_cache) + segment.sequence * p_.k_batch_stride +
         segment.kv_head * p_.k_head_stride + tokens.begin * p_.k_token_stride;
    v_ = static_cast<const uint16_t*>(p_.v_cache) + segment.sequence * p_.v_batch_stride +
         segment.kv_head * p_.v_head_stride + tokens.begin * p_.v_token_stride;
    const int steps = (tokens_ + kStepTokens - 1) / kStepTokens;
    steps_ = steps > warp_ ? (steps - warp_ + kWarps - 1) / kWarps : 0;

    read_slot_ = 0;
    start_copies(std::make_integer_sequence<int, kSlots - 1>());
    load_query(segment);
    find_row_spans(segment, tokens.begin);
    hw::sync_block();  // the query is there
    attend();
    merge_warps();
    if (!segment.is_host()) {
      publish();
    } else {
      const int64_t last_peer =
          segment.has_peers() ? shared_.grid.cta_of(segment.output_end - 1) : shared_.cta;
      write(segment, last_peer);
    }
  }

  // Zeros beyond the rows and dims that exist.
  LEAN_DEVICE void load_query(const Segment& segment) {
    constexpr int kChunks = Config::QRows::chunks;
    for (int i = thread_; i < Config::rows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      Chunk elements{};
      if (row < rows_ && chunk * 8 < p_.head_dim) {
        const auto* from = static_cast<const uint16_t*>(p_.q) + segment.sequence * p_.q_batch_stride +
                           query_token(row) * p_.q_token_stride +
                           (segment.kv_head * p_.group() + query_head(row)) * p_.q_head_stride + chunk * 8;
        for (int e = 0; e < 8; ++e) elements.bits[e] = from[e];
      }
      *reinterpret_cast<Chunk*>(query_ + Config::QRows::offset(row, chunk)) = elements;
    }
  }

  // Tokens, relative to the segment's first, that this lane's rows see, and those that all rows see.
  LEAN_DEVICE void find_row_spans(const Segment& segment, int64_t first_token) {
    const SequenceLength length = length_of(segment.sequence);
    const auto relative = [&](int64_t token) {
      return static_cast<int>(greater(0, lesser(token - first_token, tokens_)));
    };
    const int first = query_token(0), last = query_token(rows_ - 1);
    common_begin_ = relative(visible_tokens(p_.visibility, length, last, last).begin);
    common_end_ = relative(visible_tokens(p_.visibility, length, first, first).end);
#pragma unroll
    for (int i = 0; i < 2 * Config::row_tiles; ++i) {
      const int query = query_token(i * 8 + lane_ / 4);
      const TokenSpan seen = visible_tokens(p_.visibility, length, query, query);
      row_span_[i][0] = relative(seen.begin);
      row_span_[i][1] = relative(seen.end);
    }
  }

  // ---- The ring. Items are panels in the order of use: the K panels of a step, then its V panels.

  // Item `kItem` counted from the first panel of step `step` of this warp, into slot `slot`.
  template <int kItem>
  LEAN_DEVICE void start_copy(int step, int slot) {
    constexpr int kPanel = kItem % Config::panels;
    step += kItem / Config::panels;
    if (step < steps_) {
      const int token = (step * kWarps + warp_) * kStepTokens;
      char* to = ring_ + slot * Config::slot_bytes;
      if constexpr (kPanel < KPanels::count) {
        copy_panel<KPanels>(to, k_, p_.k_token_stride, token, kPanel * KPanels::dims, p_.head_dim);
      } else {
        constexpr int kBegin = (kPanel - KPanels::count) * VPanels::dims;
        copy_panel<VPanels>(to, v_, p_.v_token_stride, token, kBegin, p_.head_dim_v);
      }
    }
    hw::commit_copies();  // empty groups too, so that waiting counts alike
  }

  template <int... kItems>
  LEAN_DEVICE void start_copies(std::integer_sequence<int, kItems...>) {
    (start_copy<kItems>(0, kItems), ...);
  }

  // Tokens past the end and dims that the tensor does not have arrive as zeros, unread.
  template <class Panels>
  LEAN_DEVICE void copy_panel(char* to, const uint16_t* from, int64_t token_stride, int token, int first_dim,
                              int64_t dims) {
    constexpr int kChunks = Panels::Rows::chunks;
    static_assert(kStepTokens * kChunks % hw::kWarpThreads == 0);
    // Where a warp copies whole rows at a time, one lane's chunks lie one below the other: the address moves
    // on by adding, which takes fewer registers than products that the compiler keeps from step to step.
    constexpr bool kWholeRows = hw::kWarpThreads % kChunks == 0;
    constexpr int kRowsAtOnce = hw::kWarpThreads / kChunks;
    const uint16_t* next = from + (token + lane_ / kChunks) * token_stride + first_dim + lane_ % kChunks * 8;
#pragma unroll
    for (int i = 0; i < kStepTokens * kChunks / hw::kWarpThreads; ++i) {
      const int index = i * hw::kWarpThreads + lane_, row = index / kChunks, chunk = index % kChunks;
      const int dim = first_dim + chunk * 8;
      const bool valid = token + row < tokens_ && dim < dims;
      if constexpr (!kWholeRows) next = from + (token + row) * token_stride + dim;
      const uint16_t* source = valid ? next : from;
      if constexpr (kWholeRows) next += kRowsAtOnce * token_stride;
      char* target = to + Panels::Rows::offset(row, chunk);
      if (a_.aligned) {
        hw::copy_async(target, source, valid);
      } else {
        Chunk elements{};
        for (int e = 0; e < 8 && valid; ++e) elements.bits[e] = source[e];
        *reinterpret_cast<Chunk*>(target) = elements;
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
    start_copy<kPanel + kSlots - 1>(step, before);
    read_slot_ = slot + 1 == kSlots ? 0 : slot + 1;
    return ring_ + slot * Config::slot_bytes;
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
      soften(scores, weights, (step * kWarps + warp_) * kStepTokens);
      value_panels(weights, step, std::make_integer_sequence<int, VPanels::count>());
    }
  }

  LEAN_DEVICE void clear() {
#pragma unroll
    for (int rt = 0; rt < Config::row_tiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) state_[rt][half] = {kMinusInfinity, 0.0f};
#pragma unroll
      for (int j = 0; j < Config::head_dim_v / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) output_[rt][j][e] = 0.0f;
      }
    }
  }

  LEAN_DEVICE void load_query_fragment(uint32_t (&a)[4], int rt, int kk) {
    const int row = rt * kTileRows + lane_ % 16, chunk = kk * 2 + lane_ / 16;
    hw::load_matrices(a, query_ + Config::QRows::offset(row, chunk));
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
      hw::load_matrices(b, panel + KPanels::Rows::offset(lane_ % 8 + lane_ / 16 * 8, kk * 2 + lane_ / 8 % 2));
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
  LEAN_DEVICE void soften(float (&scores)[Config::row_tiles][2][4], uint32_t (&weights)[Config::row_tiles][4],
                          int first_token) {
    const float scale = p_.scale * kLog2e;
    const bool masked = first_token < common_begin_ || first_token + kStepTokens > common_end_;
#pragma unroll
    for (int rt = 0; rt < Config::row_tiles; ++rt) {
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int (&span)[2] = row_span_[rt * 2 + half];
        float maximum = kMinusInfinity;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[rt][i / 2][half * 2 + i % 2];
          const int token = first_token + i / 2 * 8 + lane_ % 4 * 2 + i % 2;
          score *= scale;
          if (masked && (token < span[0] || token >= span[1])) score = kMinusInfinity;
          maximum = fmaxf(maximum, score);
        }
        maximum = fmaxf(maximum, hw::shuffle_xor(maximum, 1));
        maximum = fmaxf(maximum, hw::shuffle_xor(maximum, 2));
        SoftmaxState& state = state_[rt][half];
        const float m = fmaxf(state.m, maximum);
        // Of a row that has seen nothing yet: any finite number, so that 2^(-inf - m) is 0 and not NaN.
        const float reference = m == kMinusInfinity ? 0.0f : m;
        factor[half] = exp2f(state.m - reference);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[rt][i / 2][half * 2 + i % 2];
          score = exp2f(score - reference);
          sum += score;
        }
        state.l = (state.m == kMinusInfinity ? state.l : state.l * factor[half]) + sum;
        state.m = m;
      }
      if (hw::any(factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int j = 0; j < Config::head_dim_v / 8; ++j) {
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
      hw::load_matrices_transposed(b, panel + VPanels::Rows::offset(lane_ % 16, j * 2 + lane_ / 16));
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

  // Each warp lays its output in its ring, whose copies have all been used; then shared_.m becomes the weight
  // of each warp's output, shared_.merged_m and shared_.l[0] the CTA's state.
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
          shared_.m[warp_][row] = state.m;
          shared_.l[warp_][row] = state.l;
        }
        float* to = staged(warp_) + row * Config::head_dim_v + lane_ % 4 * 2;
#pragma unroll
        for (int j = 0; j < Config::head_dim_v / 8; ++j) {
          to[j * 8] = output_[rt][j][half * 2];
          to[j * 8 + 1] = output_[rt][j][half * 2 + 1];
        }
      }
    }
    hw::sync_block();
    if (thread_ < Config::rows) {
      SoftmaxState merged;
      for (int w = 0; w < kWarps; ++w) {
        merged = merge(merged, {shared_.m[w][thread_], shared_.l[w][thread_]}).state;
      }
      for (int w = 0; w < kWarps; ++w) {
        shared_.m[w][thread_] = rescale(shared_.m[w][thread_], merged.m);
      }
      shared_.merged_m[thread_] = merged.m;
      shared_.l[0][thread_] = merged.l;
    }
    hw::sync_block();
  }

  // Four neighbouring elements of the CTA's output.
  LEAN_DEVICE hw::Float4 merged_output(int row, int column) const {
    hw::Float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      add(sum, shared_.m[w][row],
          *reinterpret_cast<const hw::Float4*>(staged(w) + row * Config::head_dim_v + column));
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
    float* partial = a_.workspace.partial(shared_.cta);
    for (int i = thread_; i < rows_ * kQuads; i += kThreads) {
      const int row = i / kQuads, column = i % kQuads * 4;
      hw::store_shared_between_ctas(
          reinterpret_cast<hw::Float4*>(partial + row * Config::head_dim_v + column),
          merged_output(row, column));
    }
    float* m = partial + Config::rows * Config::head_dim_v;
    if (thread_ < rows_) {
      hw::store_shared_between_ctas(m + thread_, shared_.merged_m[thread_]);
      hw::store_shared_between_ctas(m + Config::rows + thread_, shared_.l[0][thread_]);
    }
    hw::sync_block();
    if (thread_ == 0) announce(a_.workspace, shared_.cta);
  }

  // Merges the partial states of the CTAs after this one, up to last_peer, in ascending order, so that
  // results do not depend on who was faster, and writes the output tile.
  LEAN_DEVICE void write(const Segment& segment, int64_t last_peer) {
    for (int64_t peer = shared_.cta + 1 + thread_; peer <= last_peer; peer += kThreads) {
      await(a_.workspace, peer);
    }
    hw::sync_block();
    if (thread_ < rows_) {
      const SoftmaxState own{shared_.merged_m[thread_], shared_.l[0][thread_]};
      SoftmaxState merged = own;
      for (int64_t peer = shared_.cta + 1; peer <= last_peer; ++peer) {
        const float* m = a_.workspace.partial(peer) + Config::rows * Config::head_dim_v + thread_;
        merged =
            merge(merged, {hw::load_shared_between_ctas(m), hw::load_shared_between_ctas(m + Config::rows)})
                .state;
      }
      for (int w = 0; w < kWarps; ++w) shared_.m[w][thread_] *= rescale(own.m, merged.m);
      shared_.merged_m[thread_] = merged.m;
      shared_.l[0][thread_] = merged.l;
      p_.lse[(segment.sequence * p_.num_heads + segment.kv_head * p_.group() + query_head(thread_)) *
                 p_.visibility.q_len +
             query_token(thread_)] = log_sum_exp(merged);
    }
    hw::sync_block();
    for (int i = thread_; i < rows_ * kQuads; i += kThreads) {
      const int row = i / kQuads, column = i % kQuads * 4;
      if (column >= p_.head_dim_v) continue;
      const float merged_m = shared_.merged_m[row];
      hw::Float4 sum = merged_output(row, column);
      for (int64_t peer = shared_.cta + 1; peer <= last_peer; ++peer) {
        const float* partial = a_.workspace.partial(peer);
        add(sum,
            rescale(hw::load_shared_between_ctas(partial + Config::rows * Config::head_dim_v + row),
                    merged_m),
            hw::load_shared_between_ctas(
                reinterpret_cast<const hw::Float4*>(partial + row * Config::head_dim_v + column)));
      }
      const float factor = normaliser(shared_.l[0][row]);
      const int64_t out_row = (segment.sequence * p_.visibility.q_len + query_token(row)) * p_.num_heads +
                              segment.kv_head * p_.group() + query_head(row);
      uint32_t* out =
          reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p_.out) + out_row * p_.head_dim_v + column);
      out[0] = hw::pack<T>(sum.x * factor, sum.y * factor);
      out[1] = hw::pack<T>(sum.z * factor, sum.w * factor);
    }
  }

  struct alignas(16) Chunk {
    uint16_t bits[8];
  };

  const DecodeArguments& a_;
  const DecodeParams& p_;
  const Geometry geometry_;
  const int thread_;
  const int warp_;
  const int lane_;
  char* const ring_;
  char* const query_;
  SharedState<Config>& shared_;

  // Of the segment in hand.
  const uint16_t* k_;  // row of its first token
  const uint16_t* v_;
  int row_begin_;  // first packed row
  int rows_;
  int tokens_;
  int steps_;  // of this warp
  int read_slot_;
  int common_begin_;
  int common_end_;
  int row_span_[2 * Config::row_tiles][2];
  uint32_t q_fragments_[Config::row_tiles][Config::query_in_registers ? Config::head_dim / 16 : 1][4];
  SoftmaxState state_[Config::row_tiles][2];
  float output_[Config::row_tiles][Config::head_dim_v / 8][4];
};

template <class Config>
LEAN_KERNEL(kThreads, 2)
decode_kernel(LEAN_KERNEL_PARAMETER DecodeArguments arguments) {
  DecodeCta<Config>(arguments).run();
}

}  // namespace lean::cuda
