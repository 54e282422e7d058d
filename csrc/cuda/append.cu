// Appending on a GPU: a row of a new token per CTA and turn, or per warp where rows are quantised.
#include "append.h"

#include <algorithm>

#include "cuda/backend.h"
#include "cuda/errors.h"
#include "cuda/host.h"
#include "quantise.h"

namespace lean::cuda {
namespace {

constexpr int kAppendThreads = 128;
constexpr int kAppendWarps = kAppendThreads / hw::kWarpThreads;
constexpr int64_t kMaxAppendCtas = 4096;

struct AppendArguments {
  AppendParams p;
  ErrorRecord* errors;
};

// Called by the threads of one CTA.
LEAN_DEVICE void check_counts(const AppendParams& p, ErrorRecord* errors) {
  find_bad_numbers(p, hw::thread_index(), kAppendThreads,
                   [errors](const BadNumber& bad) { report(errors, bad); });
}

// Called by the thread that has the first element of a token's first row.
LEAN_DEVICE void check_place(const AppendParams& p, const NewToken& t, ErrorRecord* errors) {
  find_bad_place(p, t, [errors](const BadNumber& bad) { report(errors, bad); });
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
    if (row == 0 && hw::thread_index() == 0) check_place(p, t, arguments.errors);
    append_row<hw::Numbers, T>(p, t, new_row(p, t, row), hw::thread_index(), kAppendThreads);
  }
}

LEAN_DEVICE uint8_t quantised_to(DType dtype, float x, float scale) {
  if (!(scale > 0.0f)) return filling_of(dtype, scale);
  if (dtype == DType::int8) return quantised<hw::Numbers, DType::int8>(x, scale);
  if (dtype == DType::float8_e4m3) return quantised<hw::Numbers, DType::float8_e4m3>(x, scale);
  return quantised<hw::Numbers, DType::float8_e5m2>(x, scale);
}

// Called by the lanes of one warp.
template <class T>
LEAN_DEVICE void quantise_row(const AppendParams& p, const NewToken& t, const NewRow& row, int lane) {
  int32_t largest = 0;
  for_each_element<hw::Numbers, T>(p, t, row, lane, hw::kWarpThreads, [&largest](int64_t, T x) {
    const int32_t magnitude = magnitude_bits(hw::Numbers::to_float(x));
    largest = magnitude > largest ? magnitude : largest;
  });
  for (int mask = hw::kWarpThreads / 2; mask > 0; mask /= 2) {
    const int32_t other = hw::shuffle(largest, lane ^ mask);
    largest = other > largest ? other : largest;
  }
  const float scale = scale_of_row<hw::Numbers>(p.k_cache.dtype, largest);
  if (lane == 0) *row.scale = scale;
  // The row is still in L1, and is rotated once more.
  uint8_t* const to = static_cast<uint8_t*>(row.to);
  for_each_element<hw::Numbers, T>(p, t, row, lane, hw::kWarpThreads, [&p, to, scale](int64_t i, T x) {
    to[i] = quantised_to(p.k_cache.dtype, hw::Numbers::to_float(x), scale);
  });
}

template <class T>
LEAN_KERNEL(kAppendThreads, 1)
append_quantised_kernel(LEAN_KERNEL_PARAMETER AppendArguments arguments) {
  const AppendParams& p = arguments.p;
  const int64_t rows = p.rows_per_token();
  const int warp = hw::thread_index() / hw::kWarpThreads, lane = hw::thread_index() % hw::kWarpThreads;
  if (p.cu_seqlens && hw::cta_index() == 0) check_counts(p, arguments.errors);
  for (int64_t i = hw::cta_index() * kAppendWarps + warp; i < p.all_tokens() * rows;
       i += hw::num_ctas() * kAppendWarps) {
    const NewToken t = new_token(p, i / rows);
    if (t.sequence < 0) continue;
    if (i % rows == 0 && lane == 0) check_place(p, t, arguments.errors);
    const NewRow row = new_row(p, t, i % rows);
    if (row.scale != nullptr) {
      quantise_row<T>(p, t, row, lane);
    } else {
      append_row<hw::Numbers, T>(p, t, row, lane, hw::kWarpThreads);
    }
  }
}

using AppendKernel = void (*)(AppendArguments);

template <class T>
AppendKernel append_kernel_of(const AppendParams& p) {
  return p.quantises() ? &append_quantised_kernel<T> : &append_kernel<T>;
}

AppendKernel append_kernel_of(const AppendParams& p) {
  switch (p.dtype) {
    case DType::float16:
      return append_kernel_of<hw::Half>(p);
    case DType::bfloat16:
      return append_kernel_of<hw::BFloat16>(p);
    case DType::float32:
      return append_kernel_of<float>(p);
    default:
      return &append_kernel<uint8_t>;
  }
}

}  // namespace

void append_kv(const AppendParams& p, const Queue& queue) {
  const int64_t rows_per_cta = p.quantises() ? kAppendWarps : 1;
  const int64_t ctas = std::min(ceil_div(p.all_tokens() * p.rows_per_token(), rows_per_cta), kMaxAppendCtas);
  hw::launch(append_kernel_of(p), AppendArguments{p, error_record_of(queue.device)}, ctas, kAppendThreads, 0,
             queue.stream);
}

}  // namespace lean::cuda
