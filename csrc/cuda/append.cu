// Appending on a GPU: a row of a new token per CTA and turn.
#include "append.h"

#include <algorithm>

#include "cuda/decode.h"
#include "cuda/errors.h"

namespace lean::cuda {
namespace {

constexpr int kAppendThreads = 128;
constexpr int64_t kMaxAppendCtas = 4096;

struct AppendArguments {
  AppendParams p;
  ErrorRecord* errors;
};

// By the threads of one CTA.
LEAN_DEVICE void check_counts(const AppendParams& p, ErrorRecord* errors) {
  if (hw::thread_index() == 0 && p.cu_seqlens[0] != 0) {
    report(errors, Culprit::append_first_cu_seqlens, 0, 0, 0, p.cu_seqlens[0]);
  }
  for (int64_t b = hw::thread_index(); b < p.batch; b += kAppendThreads) {
    const int64_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
    if (end < begin || end > p.tokens) report(errors, Culprit::append_cu_seqlens, b, 0, 0, end);
  }
}

template <class T>
LEAN_KERNEL(kAppendThreads, 1)
append_kernel(LEAN_KERNEL_PARAMETER AppendArguments arguments) {
  const AppendParams& p = arguments.p;
  const int64_t rows = p.rows_per_token();
  if (p.cu_seqlens && hw::cta_index() == 0) check_counts(p, arguments.errors);
  for (int64_t i = hw::cta_index(); i < p.all_tokens() * rows; i += hw::num_ctas()) {
    const NewToken t = new_token(p, i / rows);
    if (t.sequence < 0) continue;
    const int64_t row = i % rows;
    if (row == 0 && hw::thread_index() == 0 && (t.block < 0 || (p.cos && t.position >= p.max_position))) {
      report(arguments.errors, Culprit::append, t.sequence, 0, 0, t.position);
    }
    append_row<hw::Numbers, T>(p, t, row, hw::thread_index(), kAppendThreads);
  }
}

}  // namespace

void append_kv(const AppendParams& p, int device, void* stream) {
  void (*kernel)(AppendArguments) = p.dtype == DType::float16    ? &append_kernel<hw::Half>
                                    : p.dtype == DType::bfloat16 ? &append_kernel<hw::BFloat16>
                                    : p.dtype == DType::float32  ? &append_kernel<float>
                                                                 : &append_kernel<uint8_t>;
  const int64_t ctas = std::min(p.all_tokens() * p.rows_per_token(), kMaxAppendCtas);
  hw::launch(kernel, AppendArguments{p, error_record_of(device)}, ctas, kAppendThreads, 0, stream);
}

}  // namespace lean::cuda
