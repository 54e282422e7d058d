// What each query row of an output tile sees of a run of tokens.
#pragma once

#include <algorithm>

#include "cpu/kernels/tile_kernel.h"

namespace lean::cpu {

// Row `row` of an output tile is query token row / group of query head row % group.
struct QueryRow {
  int64_t token;
  int64_t head;
};
inline QueryRow query_row(const Geometry& geometry, const Segment& segment, int64_t kv_head, int64_t row) {
  const int64_t packed = segment.row_block * geometry.rows_per_block + row;
  return {packed / geometry.group, kv_head * geometry.group + packed % geometry.group};
}

class RunViews {
 public:
  // Of the `rows` rows of a segment's output tile.
  RunViews(const DecodeParams& p, const Geometry& geometry, const Segment& segment, int rows)
      : p_(p), geometry_(geometry), segment_(segment), rows_(rows) {
    const SequenceLength& length = segment.length;
    const int64_t first = query_token(0), last = query_token(rows - 1);
    common_ = {visible_tokens(p.visibility, length, last, last).begin,
               visible_tokens(p.visibility, length, first, first).end};
    if (p.tree_mask != nullptr && !length.seen_by_all) common_.end = length.tokens - length.q_len;
  }

  // Each row's view of the run of tokens [begin, end); null if all rows see all of them and there are no
  // slopes, for which the row's position counts. It stays until the next call.
  const RowView* of(int64_t begin, int64_t end) {
    if (begin >= common_.begin && end <= common_.end && p_.alibi_slopes == nullptr) return nullptr;
    for (int row = 0; row < rows_; ++row) views_[row] = view(row, begin);
    return views_;
  }

 private:
  int64_t query_token(int row) const { return query_row(geometry_, segment_, 0, row).token; }

  RowView view(int row, int64_t begin) const {
    const int64_t query = query_token(row), new_tokens = segment_.length.tokens - segment_.length.q_len;
    const TokenSpan seen = visible_tokens(p_.visibility, segment_.length, query, query);
    RowView view{static_cast<float>(std::clamp<int64_t>(seen.begin - begin, 0, kRunTokens)),
                 static_cast<float>(std::clamp<int64_t>(seen.end - begin, 0, kRunTokens)),
                 static_cast<float>(new_tokens + query - begin), 0};
    if (p_.tree_mask == nullptr) return view;
    const bool* sees = p_.tree_mask + segment_.batch * p_.tree_batch_stride +
                       (p_.first_query(segment_.batch) + query) * p_.tree_row_stride;
    const int64_t end = std::min(begin + kRunTokens, segment_.length.tokens);
    for (int64_t token = std::max(begin, new_tokens); token < end; ++token) {
      if (!sees[token - new_tokens]) view.hidden |= uint64_t{1} << (token - begin);
    }
    return view;
  }

  const DecodeParams& p_;
  const Geometry& geometry_;
  const Segment& segment_;
  const int rows_;
  TokenSpan common_;  // all rows see these tokens
  RowView views_[kMaxRows] = {};
};

}  // namespace lean::cpu
