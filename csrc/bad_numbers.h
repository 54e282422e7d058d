// Which numbers inside a caller's tensors are out of range: lengths, left padding, query counts, slots,
// pages, and where new tokens go. One rule for all backends; each has its way to report: a CPU throws before
// anything is written, a GPU records the first and goes on with what params.h makes of it.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "append.h"
#include "params.h"

namespace lean {

struct BadNumber {
  enum Kind : int32_t {
    none,
    first_count,       // the first entry of cu_seqlens
    count,             // another entry of it
    tree_columns,      // query tokens of a sequence, beside the columns of tree_mask
    leftpad,           // of a sequence
    length,            // of a sequence
    slot,              // of a sequence, in a contiguous cache
    page,              // of a sequence, in its row of block_table
    position,          // of a new token, in the cache
    cache_slot,        // of a new token, through all blocks
    rotary_position,   // of a new token, in the rotary tables
    shared_sequences,  // of a row of shared: which they are
    shared_order,      // where its sequences begin, beside those of an earlier row
    shared_begin,      // its first token
    shared_end,        // its last one
  };
  enum Op : int32_t { decode, append_kv };

  Kind kind = none;
  Op op = decode;
  bool paged = false;     // the caches are
  bool per_head = false;  // each KV head has a number of its own
  int64_t sequence = 0;   // whose number it is
  int64_t kv_head = 0;
  int64_t index = 0;            // of the number, among those of the sequence or in cu_seqlens
  int64_t value = 0;            // what it is
  int64_t least = 0, most = 0;  // what it must be from and to
  int64_t seq_len = 0;          // of the sequence that a new token is added to
};

// The text of the error, as "decode: seq_lens[1] is 51; it must be from 0 to 50, the tokens ...".
std::string describe(const BadNumber& bad);

// What is wrong with where sequence b of `batch` ends by cu_seqlens, and where the first begins, which there
// is in an empty batch too.
LEAN_HOST_DEVICE constexpr BadNumber bad_count(BadNumber::Op op, const Indices& cu_seqlens, int64_t b,
                                               int64_t batch, int64_t tokens) {
  const int64_t begin = cu_seqlens[b];
  if (b == 0 && begin != 0) return {.kind = BadNumber::first_count, .op = op, .value = begin};
  if (b == batch) return {};
  const int64_t end = cu_seqlens[b + 1];
  if (end >= begin && end <= tokens) return {};
  return {.kind = BadNumber::count,
          .op = op,
          .sequence = b,
          .index = b + 1,
          .value = end,
          .least = begin,
          .most = tokens};
}

// What is wrong with the counts, the left padding and the length of sequence b; of several, the first.
LEAN_HOST_DEVICE constexpr BadNumber bad_number(const DecodeParams& p, int64_t b, int64_t head) {
  if (p.cu_seqlens_q && head == 0) {
    const BadNumber bad = bad_count(BadNumber::decode, p.cu_seqlens_q, b, p.batch, p.query_tokens);
    if (bad.kind != BadNumber::none) return bad;
  }
  if (b == p.batch) return {};
  if (p.cu_seqlens_q && p.tree_mask && head == 0) {
    const int64_t count = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    if (count > p.tree_columns) {
      return {.kind = BadNumber::tree_columns, .sequence = b, .value = count, .most = p.tree_columns};
    }
  }
  if (const int64_t leftpad = p.raw_leftpad(b); leftpad < 0 && head == 0) {
    return {.kind = BadNumber::leftpad, .sequence = b, .value = leftpad};
  }
  const int64_t tokens = p.raw_seq_len(b, head);
  if (tokens >= 0 && tokens <= p.pages.capacity()) return {};
  return {.kind = BadNumber::length,
          .paged = bool{p.pages.block_table},
          .per_head = p.lengths_per_head,
          .sequence = b,
          .kv_head = head,
          .value = tokens,
          .most = p.pages.capacity()};
}

// Reports what is wrong with sequences first, first + step, ...
template <class Report>
LEAN_HOST_DEVICE void find_bad_numbers(const DecodeParams& p, int64_t first, int64_t step,
                                       const Report& report) {
  for (int64_t b = first; b < (p.cu_seqlens_q ? max(1, p.batch) : p.batch); b += step) {
    for (int64_t head = 0; head < (p.lengths_per_head ? p.num_kv_heads : 1); ++head) {
      if (const BadNumber bad = bad_number(p, b, head); bad.kind != BadNumber::none) report(bad);
    }
  }
}

// What is wrong with row i of shared beside the rows before it; of several things, the first.
LEAN_HOST_DEVICE constexpr BadNumber bad_shared(const DecodeParams& p, int64_t i) {
  const SharedNode node = p.shared.node(i);
  if (node.is_empty()) return {};
  if (node.first_sequence < 0 || node.first_sequence >= node.end_sequence || node.end_sequence > p.batch) {
    return {.kind = BadNumber::shared_sequences,
            .index = i,
            .value = node.first_sequence,
            .least = node.end_sequence,
            .most = p.batch};
  }
  const int64_t parent = p.shared.deepest(node.first_sequence, node.end_sequence, i);
  LEAN_ROLLED
  for (int64_t j = parent + 1; j < i; ++j) {
    const SharedNode earlier = p.shared.node(j);
    if (earlier.is_empty() || earlier.end_sequence <= node.first_sequence) continue;
    return {.kind = BadNumber::shared_order,
            .sequence = j,
            .index = i,
            .value = node.first_sequence,
            .least = earlier.end_sequence};
  }
  const int64_t begin = parent < 0 ? 0 : p.shared.node(parent).end_token;
  if (node.first_token == begin) return {};
  return {.kind = BadNumber::shared_begin,
          .sequence = parent,
          .index = i,
          .value = node.first_token,
          .least = begin};
}

// What is wrong with how many tokens of sequence b the rows of shared have.
LEAN_HOST_DEVICE constexpr BadNumber bad_shared_tokens(const DecodeParams& p, int64_t b) {
  const SequenceLength length = p.clamped_length(b, 0);
  if (length.q_len == 0) return {};
  const int64_t all_see =
      p.tree_mask ? length.tokens - length.q_len : visible_tokens(p.visibility, length, 0, 0).end;
  LEAN_ROLLED
  for (int64_t i = 0; i < p.shared.count; ++i) {
    const SharedNode node = p.shared.node(i);
    if (b < node.first_sequence || b >= node.end_sequence) continue;
    if (node.end_token > node.first_token && node.end_token <= all_see) continue;
    return {.kind = BadNumber::shared_end,
            .sequence = b,
            .index = i,
            .value = node.end_token,
            .least = node.first_token + 1,
            .most = all_see};
  }
  return {};
}

// Reports what is wrong with rows first, first + step, ... of shared, and with what those rows have of
// sequences first, first + step, ... whose lengths are right.
template <class Report>
LEAN_HOST_DEVICE void find_bad_shared(const DecodeParams& p, int64_t first, int64_t step,
                                      const Report& report) {
  LEAN_ROLLED
  for (int64_t i = first; i < p.shared.count; i += step) {
    if (const BadNumber bad = bad_shared(p, i); bad.kind != BadNumber::none) report(bad);
  }
  LEAN_ROLLED
  for (int64_t b = first; p.shared.count > 0 && b < p.batch; b += step) {
    if (const BadNumber bad = bad_shared_tokens(p, b); bad.kind != BadNumber::none) report(bad);
  }
}

// What there is to report of a block (a page, or a slot of a contiguous cache) that is out of range: `value`
// is pages.raw_block(b, kv_head, index).
LEAN_HOST_DEVICE constexpr BadNumber bad_block(BadNumber::Op op, const PageTable& pages, int64_t b,
                                               int64_t kv_head, int64_t index, int64_t value) {
  return {.kind = pages.block_table ? BadNumber::page : BadNumber::slot,
          .op = op,
          .per_head = pages.head_stride != 0,
          .sequence = b,
          .kv_head = kv_head,
          .index = index,
          .value = value,
          .most = pages.num_blocks - 1};
}

// Reports blocks of a sequence and head that hold `seen`, tokens that some row sees. Other entries of
// block_table may hold anything.
template <class Report>
void find_bad_blocks(const DecodeParams& p, int64_t b, int64_t kv_head, TokenSpan seen,
                     const Report& report) {
  if (seen.begin >= seen.end) return;
  const PageTable& pages = p.pages;
  if (!pages.block_table) {
    const int64_t slot = pages.raw_block(b, kv_head, 0);
    if (!pages.is_block(slot)) report(bad_block(BadNumber::decode, pages, b, kv_head, 0, slot));
    return;
  }
  const int64_t first = seen.begin / pages.block_size, end = ceil_div(seen.end, pages.block_size);
  const int64_t row = b * pages.batch_stride + kv_head * pages.head_stride;
  const auto any_bad = [&](const auto* entries) {
    using Unsigned = std::make_unsigned_t<std::remove_cvref_t<decltype(*entries)>>;
    bool bad = false;  // one comparison per entry, without a branch
    for (int64_t i = first; i < end; ++i) {
      bad |= static_cast<Unsigned>(entries[row + i]) >= static_cast<uint64_t>(pages.num_blocks);
    }
    return bad;
  };
  const void* const entries = pages.block_table.data;
  if (pages.block_table.is_int64 ? !any_bad(static_cast<const int64_t*>(entries))
                                 : !any_bad(static_cast<const int32_t*>(entries))) {
    return;
  }
  for (int64_t i = first; i < end; ++i) {
    const int64_t block = pages.raw_block(b, kv_head, i);
    if (!pages.is_block(block)) report(bad_block(BadNumber::decode, pages, b, kv_head, i, block));
  }
}

// Reports what is wrong with the counts of sequences first, first + step, ...
template <class Report>
LEAN_HOST_DEVICE void find_bad_numbers(const AppendParams& p, int64_t first, int64_t step,
                                       const Report& report) {
  if (!p.cu_seqlens) return;
  for (int64_t b = first; b < max(1, p.batch); b += step) {
    const BadNumber bad = bad_count(BadNumber::append_kv, p.cu_seqlens, b, p.batch, p.tokens);
    if (bad.kind != BadNumber::none) report(bad);
  }
}

// Reports what is wrong with where a new token goes.
template <class Report>
LEAN_HOST_DEVICE void find_bad_place(const AppendParams& p, const NewToken& t, const Report& report) {
  if (p.slots) {
    if (t.block < 0) {
      report(BadNumber{.kind = BadNumber::cache_slot,
                       .op = BadNumber::append_kv,
                       .index = t.index,
                       .value = p.slots[t.index],
                       .most = p.pages.num_blocks * p.pages.block_size - 1});
    }
    return;
  }
  const int64_t seq_len = p.seq_lens[t.sequence];
  BadNumber bad{.op = BadNumber::append_kv,
                .paged = bool{p.pages.block_table},
                .sequence = t.sequence,
                .value = t.position,
                .seq_len = seq_len};
  if (seq_len < 0) {
    bad.kind = BadNumber::length;
    bad.value = seq_len;
  } else if (t.position >= p.pages.capacity()) {
    bad.kind = BadNumber::position;
    bad.most = p.pages.capacity();
  } else if (t.block < 0) {
    const int64_t index = p.pages.block_table ? t.position / p.pages.block_size : 0;
    bad = bad_block(BadNumber::append_kv, p.pages, t.sequence, 0, index,
                    p.pages.raw_block(t.sequence, 0, index));
  } else if (p.cos && t.position >= p.max_position) {
    bad.kind = BadNumber::rotary_position;
    bad.most = p.max_position - 1;
  } else {
    return;
  }
  report(bad);
}

}  // namespace lean
