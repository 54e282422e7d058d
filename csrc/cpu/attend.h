// What a thread does with a segment: attends the heads of a pass to its tokens, run by run.
#pragma once

#include <algorithm>

#include "cpu/float_output.h"
#include "cpu/kv_reader.h"
#include "cpu/visibility.h"
#include "cpu/workspace.h"

namespace lean::cpu {

// After this many tokens a partial state is saved and a fresh one begun, so that the longest chain of fp32
// additions stays short: one addition per run, 256 at most, then one per saved state.
inline constexpr int64_t kSumTokens = 8192;

class Attention {
 public:
  Attention(const DecodeParams& params, const Kernels& kernels, const Plan& plan)
      : p_(params),
        kernels_(kernels),
        plan_(plan),
        table_(params.quantised() ? &dequantise_table(params.k.dtype, kernels.many.row_dtype) : nullptr),
        page_walk_(params) {}

  // Of quantised rows; null where caches have q's dtype.
  const DequantiseTable* table() const { return table_; }

  // Attends the heads of the current segment to its tokens. Their partial states are in `heads` then.
  template <class Segments>
  void attend(HeadState* heads, Segments& segments, DequantisedRows& dequantised) const {
    const Segment& segment = segments.now().segment;
    const int64_t count = segment.kv_heads;
    for (int64_t i = 0; i < count; ++i) begin(heads[i], segment, segment.kv_head + i);
    const TokenSpan tokens = segment.tokens(plan_.geometry.tile_tokens);
    for (int64_t begin = tokens.begin; begin < tokens.end; begin += kSumTokens) {
      const bool first = begin == tokens.begin;
      for (int64_t i = 0; i < count && !first; ++i) {
        save(heads[i].tile, heads[i].saved);
        clear(heads[i].tile);
      }
      const int64_t end = std::min(begin + kSumTokens, tokens.end);
      const auto next_range = [&]() -> TokenRange {
        if (end < tokens.end) return {segment.batch, segment.kv_head, count, {end, tokens.end}};
        const TakenSegment* const next = segments.next();
        if (next == nullptr) return {};
        const Segment& s = next->segment;
        return {s.batch, s.kv_head, s.kv_heads, s.tokens(plan_.geometry.tile_tokens)};
      };
      attend_range(heads, segment, {segment.batch, segment.kv_head, count, {begin, end}}, next_range,
                   dequantised);
      for (int64_t i = 0; i < count && !first; ++i) merge_into(heads[i].tile, heads[i].saved);
    }
  }

  // Makes `head` the empty state of a segment's rows of a KV head.
  void begin(HeadState& head, const Segment& segment, int64_t kv_head) const {
    head.kv_head = kv_head;
    TileState& t = head.tile;
    t.rows = static_cast<int>(plan_.geometry.block_rows(segment.length.q_len, segment.row_block));
    t.scale = p_.scale * common_scale(p_.k.scale, segment.batch, kv_head) * t.score.unit;
    for (int row = 0; row < t.rows; ++row) {
      const QueryRow query = query_row(plan_.geometry, segment, kv_head, row);
      const QueryToken place = query_token(segment, query.token);
      const int64_t offset =
          place.batch * p_.q_batch_stride + place.token * p_.q_token_stride + query.head * p_.q_head_stride;
      kernels_.of(t.rows).pack_query(t, row,
                                     static_cast<const char*>(p_.q) + offset * element_size(p_.dtype));
      if (t.slopes != nullptr) {
        t.slopes[row] = p_.alibi_slopes[segment.batch * p_.alibi_batch_stride + query.head] * kLog2e;
      }
    }
    clear(t);
  }

  // Writes the segment's output tile of a KV head.
  void write(const HeadState& head, const Segment& segment) const {
    const TileState& t = head.tile;
    const float value_scale = common_scale(p_.v.scale, segment.batch, head.kv_head);
    for (int row = 0; row < t.rows; ++row) {
      const QueryRow query = query_row(plan_.geometry, segment, head.kv_head, row);
      const QueryToken place = query_token(segment, query.token);
      const SoftmaxState state{t.m[row], t.l[row]};
      float factor = normaliser(state.l), lse = log_sum_exp(state);
      if (p_.sinks != nullptr) {
        const Merged merged = merge_sink(state, p_.sinks[query.head]);
        factor = normaliser(merged.state.l) * merged.weight_a;
        lse = log_sum_exp_to(merged.state, kLog2e);
      }
      const TileKernel& kernel = kernels_.of(t.rows);
      void* const out = out_row(place.batch, place.token, query.head);
      if (p_.out_dtype == p_.dtype) {
        kernel.write_output(t, row, factor * value_scale, out);
      } else {
        write_floats(kernel, t, row, factor * value_scale, static_cast<float*>(out));
      }
      p_.lse[place.batch * p_.lse_batch_stride + query.head * p_.lse_head_stride + place.token] = lse;
    }
  }

  void* out_row(int64_t sequence, int64_t token, int64_t head) const {
    const int64_t offset =
        sequence * p_.out_batch_stride + token * p_.out_token_stride + head * p_.out_head_stride;
    return static_cast<char*>(p_.out) + offset * element_size(p_.out_dtype);
  }

 private:
  // Where query token `token` of a segment's, which may be of a later sequence, is in q and out.
  struct QueryToken {
    int64_t batch;
    int64_t token;
  };
  QueryToken query_token(const Segment& segment, int64_t token) const {
    if (p_.cu_seqlens_q) return {0, p_.first_query(segment.batch) + token};
    return {segment.batch + token / p_.query_tokens, token % p_.query_tokens};
  }

  // The scale that all tokens of a sequence and head have in common.
  static float common_scale(const Scales& scales, int64_t sequence, int64_t kv_head) {
    return scales.per_token() ? 1.0f : scales.at(sequence, 0, 0, kv_head);
  }

  // Attends the heads to a range of the segment's tokens. next_range() is what the thread reads after it, so
  // that its beginning is prefetched too; it may be empty.
  template <class NextRange>
  void attend_range(const HeadState* heads, const Segment& segment, const TokenRange& range,
                    const NextRange& next_range, DequantisedRows& dequantised) const {
    const int rows = heads[0].tile.rows, run_tokens = plan_.run_tokens;
    const TileKernel& kernel = kernels_.of(rows);
    const bool dequantises = plan_.dequantises;
    RunViews views(p_, plan_.geometry, segment, rows);
    RunReader runs(page_walk_, plan_, range, next_range);
    // Rows come with the scales of one head.
    const bool scaled = p_.k.scale.per_token() || p_.v.scale.per_token();
    const bool can_score_heads =
        runs.has_adjoining_heads() && !dequantises && !scaled && rows <= kernel.max_rows_for_heads;
    const TileState* tiles[kMaxHeadsPerPass];
    for (int64_t i = 0; i < range.heads; ++i) tiles[i] = &heads[i].tile;
    if (kernel.begin_runs != nullptr) kernel.begin_runs();
    for (int64_t begin = range.tokens.begin; begin < range.tokens.end; begin += run_tokens) {
      const int64_t end = std::min(begin + run_tokens, range.tokens.end);
      const RowView* const seen = views.of(begin, end);
      runs.advance(seen != nullptr);
      const bool all_heads = can_score_heads && end - begin == run_tokens;
      if (all_heads) {
        kernel.score_heads(tiles, range.heads, runs.keys(0), seen, runs.prefetch_beside_keys(0));
      } else {
        for (int64_t i = 0; i < range.heads; ++i) {
          const Rows& keys = runs.keys(i);
          const Prefetch prefetch = runs.prefetch_beside_keys(i);
          if (dequantises) {
            kernel.score(heads[i].tile, dequantised.keys(keys, prefetch), seen, {});
          } else {
            kernel.score(heads[i].tile, keys, seen, prefetch);
          }
        }
      }
      if (all_heads && rows <= kMaxRowsAdded) {
        kernel.accumulate_heads(tiles, range.heads, runs.values(0), runs.prefetch_beside_values(0));
      } else {
        for (int64_t i = 0; i < range.heads; ++i) {
          const Rows& values = runs.values(i);
          const Prefetch prefetch = runs.prefetch_beside_values(i);
          if (dequantises) {
            kernel.accumulate(heads[i].tile, dequantised.values(values, prefetch), {});
          } else {
            kernel.accumulate(heads[i].tile, values, prefetch);
          }
        }
      }
    }
    if (kernel.end_runs != nullptr) kernel.end_runs();
  }

  const DecodeParams& p_;
  const Kernels& kernels_;
  const Plan& plan_;
  const DequantiseTable* const table_;
  const PageWalk page_walk_;
};

}  // namespace lean::cpu
