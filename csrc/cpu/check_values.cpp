#include "cpu/check_values.h"

#include "fail.h"

namespace lean::cpu {

void refuse(const BadNumber& bad) {
  fail(describe(bad));
}

void check_values(const DecodeParams& p) {
  find_bad_numbers(p, 0, 1, refuse);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t tables = p.pages.head_stride != 0 || p.lengths_per_head ? p.num_kv_heads : 1;
    for (int64_t head = 0; head < tables; ++head) {
      const SequenceLength length = p.clamped_length(b, head);
      if (length.q_len == 0) continue;
      find_bad_blocks(p, b, head, visible_tokens(p.visibility, length, 0, length.q_len - 1), refuse);
    }
  }
}

}  // namespace lean::cpu
