// The query rows of a segment: row `row` of an output tile is query token row / group of query head
// row % group. What they see, what is made of their scores, and where their outputs go.
#pragma once

#include "cuda/decode/nodes.h"

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

template <class Config>
class QueryRows {
 public:
  LEAN_DEVICE QueryRows(const DecodeArguments& arguments, const Segment32& segment)
      : a_(arguments),
        segment_(segment),
        begin_(segment.row_block * Config::rows),
        count_(min(Config::rows, a_.geometry.group * segment.length.q_len - begin_)) {}

  LEAN_DEVICE int count() const { return count_; }
  LEAN_DEVICE int token(int row) const { return (begin_ + row) / a_.geometry.group; }
  LEAN_DEVICE int head(int row) const {  // of all query heads
    const int group = a_.geometry.group;
    return segment_.kv_head * group + begin_ + row - token(row) * group;
  }
  // Which sequence a row is of, and its query token there; of a packed q, among all.
  struct Query {
    int32_t batch;
    int32_t token;
  };
  LEAN_DEVICE Query query(int row) const {
    const int32_t of_segment = token(row);
    if (shares(a_) && segment_.length.seen_by_all && !a_.p.cu_seqlens_q) {  // a node has rows of several
      const int32_t sequences = of_segment / a_.q_len;
      return {segment_.batch + sequences, of_segment - sequences * a_.q_len};
    }
    return {segment_.batch, first_query(a_.p, segment_.batch) + of_segment};
  }

  // Lays the rows in shared memory as matrix products take them; zeros beyond the rows and dims that exist.
  // Called by all threads, as is find_spans.
  LEAN_DEVICE void load(const Thread& thread) const {
    constexpr int kChunks = Config::QRows::chunks;
    for (int i = thread.index; i < Config::rows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      hw::Words4 elements{};
      if (row < count_ && chunk * 8 < a_.p.k.dims) {
        const Query of = query(row);
        const uint16_t* const from = static_cast<const uint16_t*>(a_.p.q) + of.batch * a_.p.q_batch_stride +
                                     of.token * a_.p.q_token_stride + head(row) * a_.p.q_head_stride +
                                     chunk * 8;
        elements = a_.aligned_q ? hw::load_vector(reinterpret_cast<const hw::Words4*>(from)) : joined(from);
      }
      char* const to = query_rows<Config>() + Config::QRows::offset(row, 0);
      if constexpr (Config::quantised) {
        store_permuted(to, chunk, elements);
      } else {
        hw::store_vector(reinterpret_cast<hw::Words4*>(to + 16 * chunk), elements);
      }
    }
  }

  // Finds which tokens each row sees, counted from `first_token`, of the segment's [0, tokens). Returns those
  // that all rows see.
  LEAN_DEVICE TokenSpanOf<int32_t> find_spans(const Thread& thread, int32_t first_token,
                                              int32_t tokens) const {
    SharedState<Config>& s = shared_state<Config>();
    const DecodeParams& p = a_.p;
    const Length32 length = segment_.length;
    const int32_t segment_begin = segment_.tokens(Config::tile_tokens).begin - first_token;
    const auto relative = [&](int32_t t) { return max(segment_begin, min(t - first_token, tokens)); };
    const auto seen_by = [&](int query) {
      return visible_tokens(a_.geometry.visibility, length, query, query);
    };
    const int32_t new_tokens = length.seen_by_all ? length.tokens : length.tokens - length.q_len;
    if (thread.index == 0) s.new_tokens = new_tokens - first_token;
    if (thread.index < Config::rows) {
      const int row = thread.index, own = row < count_ ? row : 0, query_token = token(row);
      const TokenSpanOf<int32_t> seen = seen_by(query_token);
      int32_t end = relative(seen.end);
      if (p.tree_mask) {  // new tokens that the mask has no column for are not seen
        end = min(end, max(0, new_tokens + static_cast<int32_t>(p.tree_columns) - first_token));
        s.tree_rows[row] = p.tree_mask + segment_.batch * p.tree_batch_stride +
                           query(own).token * p.tree_row_stride - (new_tokens - first_token);
      }
      s.spans[row][0] = relative(seen.begin);
      s.spans[row][1] = end;
      if (p.alibi_slopes) {
        s.positions[row] = new_tokens - first_token + query_token;
        s.slopes[row] = kLog2e * p.alibi_slopes[segment_.batch * p.alibi_batch_stride + head(own)];
      }
    }
    const int32_t all_end = p.tree_mask ? new_tokens : seen_by(token(0)).end;
    return {relative(seen_by(token(count_ - 1)).begin), relative(all_end)};
  }

 private:
  static LEAN_DEVICE hw::Words4 joined(const uint16_t* from) {
    hw::Words4 words;
    words.x = from[0] | static_cast<uint32_t>(from[1]) << 16;
    words.y = from[2] | static_cast<uint32_t>(from[3]) << 16;
    words.z = from[4] | static_cast<uint32_t>(from[5]) << 16;
    words.w = from[6] | static_cast<uint32_t>(from[7]) << 16;
    return words;
  }

  // In the order of dims in which quantised rows of K come out of registers; see kv_format.h. Of 16 dims,
  // those of even pairs come first.
  static LEAN_DEVICE void store_permuted(char* row, int chunk, hw::Words4 pairs) {
    auto* const to = reinterpret_cast<uint32_t*>(row + 32 * (chunk / 2)) + 2 * (chunk % 2);
    to[0] = pairs.x;
    to[4] = pairs.y;
    to[1] = pairs.z;
    to[5] = pairs.w;
  }

  const DecodeArguments& a_;
  const Segment32& segment_;
  const int begin_;
  const int count_;
};

// A row's view of its segment's tokens. After find_spans, and a barrier.
template <class Config>
class RowView {
 public:
  LEAN_DEVICE RowView(const DecodeArguments& a, int row)
      : has_tree_(a.p.tree_mask != nullptr),
        row_(row),
        begin_(state().spans[row][0]),
        end_(state().spans[row][1]) {}

  LEAN_DEVICE bool sees(int32_t token) const {
    if (token < begin_ || token >= end_) return false;
    return !has_tree_ || token < state().new_tokens || state().tree_rows[row_][token];
  }

 private:
  static LEAN_DEVICE const SharedState<Config>& state() { return shared_state<Config>(); }
  const bool has_tree_;
  const int row_;
  const int32_t begin_, end_;
};

// Stores four columns of a row of `out`, in float32.
template <class Config>
LEAN_COLD void store_floats(bool aligned, int row, int column, hw::Float4 sum) {
  const SharedState<Config>& s = shared_state<Config>();
  const float factor = s.l[0][row];
  float* const out = reinterpret_cast<float*>(s.out_rows[row]) + column;
  sum = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
  if (aligned) {
    hw::store_vector(reinterpret_cast<hw::Float4*>(out), sum);
  } else {
    out[0] = sum.x;
    out[1] = sum.y;
    out[2] = sum.z;
    out[3] = sum.w;
  }
}

// And in its dtype. After merge_states, which says where the row goes, and its factor.
template <class Config>
LEAN_DEVICE void store_output(const DecodeArguments& a, int row, int column, hw::Float4 sum) {
  using T = typename Config::T;
  if (writes_floats(a.p)) return store_floats<Config>(a.aligned_out, row, column, sum);
  const SharedState<Config>& s = shared_state<Config>();
  const float factor = s.l[0][row];
  uint16_t* const out = reinterpret_cast<uint16_t*>(s.out_rows[row]) + column;
  const uint32_t low = hw::pack<T>(sum.x * factor, sum.y * factor);
  const uint32_t high = hw::pack<T>(sum.z * factor, sum.w * factor);
  if (a.aligned_out) {
    hw::store_vector(reinterpret_cast<uint32_t*>(out), low);
    hw::store_vector(reinterpret_cast<uint32_t*>(out + 2), high);
  } else {
    out[0] = static_cast<uint16_t>(low);
    out[1] = static_cast<uint16_t>(low >> 16);
    out[2] = static_cast<uint16_t>(high);
    out[3] = static_cast<uint16_t>(high >> 16);
  }
}

}  // namespace lean::cuda
