// What this build has and this machine runs, as ops on numbers and JSON: for `python -m lean_attention`,
// benchmarks and tests.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/bench/roofline.h"
#include "cpu/kernels/tile_kernel.h"
#include "cpu/plan.h"
#include "cuda/backend.h"
#include "fail.h"
#include "ops/library.h"
#include "ops/tensor_args.h"
#include "schedule.h"

namespace lean {
namespace {

// JSON of numbers, flags, and names, which need no escapes.
class Json {
 public:
  static std::string of(bool flag) { return flag ? "true" : "false"; }
  static std::string of(const char* name) { return '"' + std::string(name) + '"'; }
  static std::string of(const std::vector<std::string>& values) {
    std::string list;
    for (const std::string& value : values) list += (list.empty() ? "" : ", ") + value;
    return "[" + list + "]";
  }
  template <class Number>
  static std::string of(Number number) {
    return std::to_string(number);
  }
  template <class... Values>
  static std::string list(const Values&... values) {
    return of(std::vector<std::string>{of(values)...});
  }

  template <class Value>
  Json& add(const char* name, const Value& value) {
    return add_json(name, of(value));
  }
  Json& add_json(const char* name, const std::string& value) {
    fields_ += (fields_.empty() ? "" : ", ") + of(name) + ": " + value;
    return *this;
  }
  std::string text() const { return "{" + fields_ + "}"; }

 private:
  std::string fields_;
};

DType dtype_named(std::string_view name) {
  if (name == "float32") return DType::float32;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  fail("dtype must be float32, float16 or bfloat16, got ", name);
}

std::string json_of(const cpu::Tuning& t) {
  return Json()
      .add("name", t.name)
      .add("prefetch_level", t.prefetch_level)
      .add("touch_tokens", t.touch_tokens)
      .add("fp32_prefetch_level", t.fp32_prefetch_level)
      .add("fp32_touch_tokens", t.fp32_touch_tokens)
      .add("max_pass_bytes", t.max_pass_bytes)
      .add("max_long_run_bytes", t.max_long_run_bytes)
      .add("max_heads_per_pass", t.max_heads_per_pass)
      .add("max_heads_per_pass_in_pages", t.max_heads_per_pass_in_pages)
      .add("min_thread_bytes", t.min_thread_bytes)
      .add("min_range_bytes", t.min_range_bytes)
      .add("bytes_per_published_byte", t.bytes_per_published_byte)
      .add("bytes_read_per_merged_byte", t.bytes_read_per_merged_byte)
      .add("min_tiles_per_thread", t.min_tiles_per_thread)
      .add("multiplies_in_fp32", t.multiplies_in_fp32)
      .text();
}

// Rows of the CPU's tuning: the one in force, and all (generic for a core with this L2).
std::string tuning() {
  return json_of(cpu::tuning());
}

std::string tuning_rows(int64_t l2_bytes, int64_t l2_ways) {
  std::vector<std::string> rows;
  for (const cpu::Tuning& row : cpu::tuning_rows({l2_bytes, l2_ways})) rows.push_back(json_of(row));
  return Json::of(rows);
}

// The plan of a decode step by the row of this name, of a core whose L2 has so many bytes and ways. Caches
// are contiguous and full to the longest sequence, or in pages if page_size is not 0. int8 caches have
// dtype's queries.
std::string plan(std::string_view tuning, int64_t l2_bytes, int64_t l2_ways, std::string_view dtype,
                 bool int8, const std::vector<int64_t>& seq_lens, int64_t q_len, int64_t num_heads,
                 int64_t num_kv_heads, int64_t head_dim, bool tokens_first, int64_t page_size,
                 int64_t num_ctas, int64_t threads) {
  const std::vector<cpu::Tuning> rows = cpu::tuning_rows({l2_bytes, l2_ways});
  const auto row = std::find_if(rows.begin(), rows.end(), [&](const auto& r) { return tuning == r.name; });
  if (row == rows.end()) fail("plan: unknown row ", tuning);
  const int32_t no_block = 0;
  DecodeParams p{};
  p.batch = static_cast<int64_t>(seq_lens.size());
  p.seq_lens = {seq_lens.data(), true};
  p.seq_lens_batch_stride = 1;
  const int64_t longest = seq_lens.empty() ? 0 : *std::max_element(seq_lens.begin(), seq_lens.end());
  p.pages.block_size = page_size > 0 ? page_size : longest;
  p.pages.max_blocks = page_size > 0 ? ceil_div(longest, page_size) : 1;
  p.pages.num_blocks = p.batch * p.pages.max_blocks;
  if (page_size > 0) p.pages.block_table = {&no_block, false};
  p.dtype = dtype_named(dtype);
  p.query_tokens = q_len;
  p.num_heads = num_heads;
  p.num_kv_heads = num_kv_heads;
  p.k.dtype = int8 ? DType::int8 : p.dtype;
  p.k.dims = head_dim;
  p.k.token_stride = tokens_first ? num_kv_heads * head_dim : head_dim;
  p.k.head_stride = tokens_first ? head_dim : p.pages.block_size * head_dim;
  p.v = p.k;
  p.visibility = {-1, 0};
  p.num_ctas = num_ctas;
  const cpu::Sharing sharing(p);
  const cpu::Plan plan = cpu::make_plan(p, sharing, cpu::choose_kernels(p, sharing).many, *row, threads);

  const auto length = [&](int64_t i) { return p.scheduled_length(i); };
  std::vector<std::string> range_tiles;
  // Each: range, sequence, first KV head, KV heads, row block, first token, end token.
  std::vector<std::string> segments;
  for (int64_t i = 0, sequence = 0; i < plan.ranges.count(); ++i) {
    const LeanRange range = plan.ranges.range(i);
    range_tiles.push_back(Json::of(range.end - range.begin));
    while (plan.sequence_begin[sequence + 1] <= range.begin) ++sequence;
    SegmentWalk walk(plan.geometry, range, sequence, plan.sequence_begin[sequence], length);
    for (Segment s; walk.next(s, length);) {
      const TokenSpan tokens = s.tokens(plan.geometry.tile_tokens);
      segments.push_back(
          Json::list(i, s.batch, s.kv_head, s.kv_heads, s.row_block, tokens.begin, tokens.end));
    }
  }
  return Json()
      .add("dequantises", plan.dequantises)
      .add("run_tokens", plan.run_tokens)
      .add("prefetch_level", plan.prefetch_level)
      .add("touch_tokens", plan.touch_tokens)
      .add("rows_per_block", plan.rows_per_block)
      .add("heads_per_pass", plan.heads_per_pass)
      .add("partial_bytes", plan.partial_floats * sizeof(float))
      .add("tile_tokens", plan.geometry.tile_tokens)
      .add("passes", plan.geometry.passes)
      .add("range_tiles", range_tiles)
      .add("threads", plan.threads)
      .add("segments", segments)
      .text();
}

std::string instruction_sets() {
  return cpu::runnable_instruction_sets();
}

// For output tiles of so many rows.
std::string chosen_instruction_set(std::string_view dtype, int64_t rows) {
  const DType type = dtype_named(dtype);
  return cpu::tile_kernel(type, type, rows).instruction_set;
}

int64_t read_loop(const Tensor& memory) {
  const Argument arg{"read_loop", "memory", memory};
  arg.has_shape("[bytes]", 1);
  arg.has_dtype(ScalarType::Byte, "");
  arg.has_contiguous_rows();
  return static_cast<int64_t>(cpu::read_loop(memory.const_data_ptr(), memory.numel() / 64 * 64));
}

int64_t fma_loop(std::string_view dtype, int64_t rounds, int64_t rows) {
  return cpu::fma_loop(dtype_named(dtype), rounds, rows);
}

// Of every CUDA kernel in this build: dtype, head_dim, head_dim_v, rows, quantised caches, threads, shared
// bytes, bytes in flight.
std::string cuda_kernels() {
  std::vector<std::string> rows;
#if defined(LEAN_WITH_CUDA)
  for (const cuda::KernelFacts& k : cuda::kernel_facts()) {
    rows.push_back(Json::list(k.dtype == DType::float16 ? "float16" : "bfloat16", k.head_dim, k.head_dim_v,
                              k.rows, k.quantised, k.threads, k.shared_bytes, k.bytes_in_flight));
  }
#endif
  return Json::of(rows);
}

bool has_cuda() {
#if defined(LEAN_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

// The error of `device`, which must be the current one.
std::string take_cuda_error(int64_t device) {
#if defined(LEAN_WITH_CUDA)
  return cuda::take_error(static_cast<int>(device));
#else
  (void)device;
  return {};
#endif
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

}  // namespace
}  // namespace lean

STABLE_TORCH_LIBRARY_FRAGMENT(LEAN_TOOLS_LIBRARY, m) {
  m.def("tuning() -> str");
  m.def("tuning_rows(int l2_bytes, int l2_ways) -> str");
  m.def(
      "plan(*, str tuning, int l2_bytes, int l2_ways, str dtype, bool int8, int[] seq_lens, int q_len, "
      "int num_heads, int num_kv_heads, int head_dim, bool tokens_first, int page_size, int num_ctas, "
      "int threads) -> str");
  m.def("instruction_sets() -> str");
  m.def("chosen_instruction_set(str dtype, int rows=1) -> str");
  m.def("read_loop(Tensor memory) -> int");
  m.def("fma_loop(str dtype, int rounds, int rows=1) -> int");
  m.def("cuda_kernels() -> str");
  m.def("has_cuda() -> bool");
  m.def("take_cuda_error(int device) -> str");
  m.def("compiler() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_TOOLS_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("tuning", TORCH_BOX(&lean::tuning));
  m.impl("tuning_rows", TORCH_BOX(&lean::tuning_rows));
  m.impl("plan", TORCH_BOX(&lean::plan));
  m.impl("instruction_sets", TORCH_BOX(&lean::instruction_sets));
  m.impl("chosen_instruction_set", TORCH_BOX(&lean::chosen_instruction_set));
  m.impl("fma_loop", TORCH_BOX(&lean::fma_loop));
  m.impl("cuda_kernels", TORCH_BOX(&lean::cuda_kernels));
  m.impl("has_cuda", TORCH_BOX(&lean::has_cuda));
  m.impl("take_cuda_error", TORCH_BOX(&lean::take_cuda_error));
  m.impl("compiler", TORCH_BOX(&lean::compiler));
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_TOOLS_LIBRARY, CPU, m) {
  m.impl("read_loop", TORCH_BOX(&lean::read_loop));
}
