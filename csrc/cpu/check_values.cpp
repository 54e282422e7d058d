#include "cpu/check_values.h"

#include "fail.h"

namespace lean::cpu {

void refuse(const BadNumber& bad) {
  fail(describe(bad));
}

void check_values(const DecodeParams& p, const Sharing& sharing) {
  find_bad_numbers(p, 0, 1, refuse);
  find_bad_shared(p, 0, 1, refuse);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t tables = p.pages.head_stride != 0 || p.lengths_per_head ? p.num_kv_heads : 1;
    for (int64_t head = 0; head < tables; ++head) {
      const SequenceLength length =
          tables > 1 ? p.clamped_length(b, head) : sharing.length(sharing.nodes() + b);
      if (length.q_len == 0) continue;
      find_bad_blocks(p, b, head, visible_tokens(p.visibility, length, 0, length.q_len - 1), refuse);
    }
  }
  for (int64_t i = 0; i < sharing.nodes(); ++i) {
    const SequenceLength length = sharing.length(i);
    if (length.q_len > 0) find_bad_blocks(p, sharing.batch(i), 0, {length.leftpad, length.tokens}, refuse);
  }
}

}  // namespace lean::cpu
