#include "cpu/check_values.h"

#include <sstream>
#include <stdexcept>

namespace lean::cpu {
namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

void check_query_counts(const DecodeParams& p) {
  if (p.cu_seqlens_q == nullptr) return;
  if (p.cu_seqlens_q[0] != 0) fail("decode: cu_seqlens_q[0] is ", p.cu_seqlens_q[0], "; it must be 0");
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t begin = p.cu_seqlens_q[b], end = p.cu_seqlens_q[b + 1];
    if (end < begin || end > p.query_tokens) {
      fail("decode: cu_seqlens_q[", b + 1, "] is ", end, "; it must be from ", begin,
           ", the entry before, to ", p.query_tokens, ", the tokens of q");
    }
    if (p.tree_mask != nullptr && end - begin > p.tree_columns) {
      fail("decode: sequence ", b, " has ", end - begin,
           " query tokens by cu_seqlens_q; tree_mask has columns for ", p.tree_columns);
    }
  }
}

// "3", or "[3, 1]" where every KV head has its own.
std::string index_text(int64_t b, int64_t kv_head, bool per_head) {
  std::ostringstream text;
  text << b;
  if (per_head) text << ", " << kv_head;
  return text.str();
}

void check_blocks(const DecodeParams& p, int64_t b, int64_t kv_head, TokenSpan seen) {
  if (seen.begin >= seen.end) return;
  if (p.pages.block_table == nullptr) {
    if (p.pages.cache_batch_idx != nullptr && !p.pages.is_block(p.pages.cache_batch_idx[b])) {
      fail("decode: cache_batch_idx[", b, "] is ", p.pages.cache_batch_idx[b], "; it must be from 0 to ",
           p.pages.num_blocks - 1, ", the slots of the cache");
    }
    return;
  }
  const int64_t first = seen.begin / p.pages.block_size, end = ceil_div(seen.end, p.pages.block_size);
  const int32_t* entries = p.pages.block_table + b * p.pages.batch_stride + kv_head * p.pages.head_stride;
  bool bad = false;  // one comparison per entry, without a branch
  for (int64_t i = first; i < end; ++i) bad |= static_cast<uint32_t>(entries[i]) >= p.pages.num_blocks;
  if (!bad) return;
  for (int64_t i = first; i < end; ++i) {
    if (!p.pages.is_block(entries[i])) {
      fail("decode: block_table[", index_text(b, kv_head, p.pages.head_stride != 0), ", ", i, "] is ",
           entries[i], "; it must be from 0 to ", p.pages.num_blocks - 1, ", the blocks of the cache");
    }
  }
}

}  // namespace

void check_values(const DecodeParams& p) {
  check_query_counts(p);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.raw_leftpad(b) < 0) {
      fail("decode: cache_leftpad[", b, "] is ", p.raw_leftpad(b), "; it must be at least 0");
    }
    const int64_t lengths = p.lengths_per_head ? p.num_kv_heads : 1;
    for (int64_t head = 0; head < lengths; ++head) {
      const int64_t tokens = p.raw_seq_len(b, head);
      if (tokens < 0 || tokens > p.pages.capacity()) {
        fail("decode: seq_lens[", index_text(b, head, p.lengths_per_head), "] is ", tokens,
             "; it must be from 0 to ", p.pages.capacity(), ", the tokens that ",
             p.pages.block_table ? "a row of block_table" : "the cache", " holds");
      }
    }
    const int64_t tables = p.pages.head_stride != 0 || p.lengths_per_head ? p.num_kv_heads : 1;
    for (int64_t head = 0; head < tables; ++head) {
      const SequenceLength length = p.clamped_length(b, head);
      if (length.q_len > 0)
        check_blocks(p, b, head, visible_tokens(p.visibility, length, 0, length.q_len - 1));
    }
  }
}

}  // namespace lean::cpu
