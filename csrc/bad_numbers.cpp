#include "bad_numbers.h"

#include <sstream>

namespace lean {
namespace {

// "1", or "1, 3" where each KV head has a number of its own.
std::string index_of(const BadNumber& bad) {
  std::string text = std::to_string(bad.sequence);
  if (bad.per_head) text += ", " + std::to_string(bad.kv_head);
  return text;
}

}  // namespace

std::string describe(const BadNumber& bad) {
  const bool appends = bad.op == BadNumber::append_kv;
  const char* const counts = appends ? "cu_seqlens" : "cu_seqlens_q";
  std::ostringstream text;
  text << (appends ? "append_kv: " : "decode: ");
  switch (bad.kind) {
    case BadNumber::none:
      return "";
    case BadNumber::first_count:
      text << counts << "[0] is " << bad.value << "; it must be 0";
      break;
    case BadNumber::count:
      text << counts << "[" << bad.index << "] is " << bad.value << "; it must be from " << bad.least
           << ", the entry before, to " << bad.most << ", the tokens of " << (appends ? "k" : "q");
      break;
    case BadNumber::tree_columns:
      text << "sequence " << bad.sequence << " has " << bad.value << " query tokens by " << counts
           << "; tree_mask has columns for " << bad.most;
      break;
    case BadNumber::leftpad:
      text << "cache_leftpad[" << bad.sequence << "] is " << bad.value << "; it must be at least 0";
      break;
    case BadNumber::length:
      text << "seq_lens[" << index_of(bad) << "] is " << bad.value << "; it must be ";
      if (appends) {
        text << "at least 0";
      } else {
        text << "from 0 to " << bad.most << ", the tokens that "
             << (bad.paged ? "a row of block_table" : "the cache") << " holds";
      }
      break;
    case BadNumber::slot:
      text << "cache_batch_idx[" << bad.sequence << "] is " << bad.value << "; it must be from 0 to "
           << bad.most << ", the slots of the cache";
      break;
    case BadNumber::page:
      text << "block_table[" << index_of(bad) << ", " << bad.index << "] is " << bad.value
           << "; it must be from 0 to " << bad.most << ", the blocks of the cache";
      break;
    case BadNumber::position:
      text << "seq_lens[" << bad.sequence << "] is " << bad.seq_len
           << ", and a new token would go to position " << bad.value << "; "
           << (bad.paged ? "a row of block_table" : "the cache") << " holds " << bad.most << " tokens";
      break;
    case BadNumber::cache_slot:
      text << "slot_mapping[" << bad.index << "] is " << bad.value << "; it must be from 0 to " << bad.most
           << ", the slots of all blocks, or -1";
      break;
    case BadNumber::shared_sequences:
      text << "shared[" << bad.index << "] has sequences " << bad.value << " to " << bad.least
           << "; they must be one or more, from 0 to " << bad.most << ", the batch size of q";
      break;
    case BadNumber::shared_order:
      text << "shared[" << bad.index << "] begins with sequence " << bad.value << "; it must lie in shared["
           << bad.sequence << "] or come after it, from sequence " << bad.least << " on";
      break;
    case BadNumber::shared_begin:
      text << "shared[" << bad.index << "] begins with token " << bad.value << "; it must begin with token "
           << bad.least;
      if (bad.sequence >= 0) text << ", where shared[" << bad.sequence << "], in which it lies, ends";
      break;
    case BadNumber::shared_end:
      text << "shared[" << bad.index << "] ends with token " << bad.value << "; it must be from " << bad.least
           << " to " << bad.most << ", the tokens that all query tokens of sequence " << bad.sequence
           << " see";
      break;
    case BadNumber::rotary_position:
      text << "a new token of sequence " << bad.sequence << " is at position " << bad.value
           << "; rotary_cos has positions up to " << bad.most;
      break;
  }
  return text.str();
}

}  // namespace lean
