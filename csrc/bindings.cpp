// Python's view of what is not an op: the schedule and facts about this build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bad_numbers.h"
#include "cpu/bench/roofline.h"
#include "cpu/kernels/tile_kernel.h"
#include "cpu/plan.h"
#include "cuda/backend.h"
#include "fail.h"
#include "schedule.h"
#include "softmax_state.h"

namespace py = pybind11;

namespace lean {
namespace {

// (cta, sequence, kv_head, row_block, first tile, end tile, first token, end token, host cta, last
// peer)
using SegmentRow =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

// Every CTA's segments, in order. A sequence is found by walking from the start: this is for
// inspection; kernels use prefix sums.
std::vector<SegmentRow> segments_of(const Geometry& geometry, const std::vector<SequenceLength>& lengths,
                                    int64_t num_ctas, int64_t first_cta, int64_t end_cta) {
  const auto length_of = [&](int64_t b) { return lengths[b]; };
  std::vector<int64_t> begin{0};
  for (const SequenceLength& length : lengths)
    begin.push_back(begin.back() + geometry.sequence_tiles(length));
  const Grid grid{num_ctas, begin.back()};
  std::vector<SegmentRow> rows;
  for (int64_t cta = first_cta, sequence = 0; cta < end_cta; ++cta) {
    const LeanRange range = grid.range(cta);
    if (range.begin == range.end) continue;
    while (begin[sequence + 1] <= range.begin) ++sequence;
    SegmentWalk walk(geometry, range, sequence, begin[sequence], length_of);
    for (Segment s; walk.next(s, length_of);) {
      const TokenSpan tokens = s.tokens(geometry.tile_tokens);
      rows.emplace_back(cta, s.batch, s.kv_head, s.row_block, s.tiles.begin - s.output_begin,
                        s.tiles.end - s.output_begin, tokens.begin, tokens.end, grid.cta_of(s.output_begin),
                        grid.cta_of(s.output_end - 1));
    }
  }
  return rows;
}

// (tokens, leading tokens that no row sees, query tokens, whether those see all others)
using LengthRow = std::tuple<int64_t, int64_t, int64_t, bool>;

SequenceLength length_of_row(const LengthRow& row) {
  const auto& [tokens, leftpad, q_len, seen_by_all] = row;
  return {tokens, leftpad, q_len, seen_by_all};
}

// What the sequences of the schedule contribute where some share prefixes; and, of each, the row of `shared`
// that it is (-1: none), and the one that merges its states.
std::vector<std::tuple<LengthRow, int64_t, int64_t>> shared_lengths(
    const std::vector<std::array<int32_t, 4>>& shared, const std::vector<int64_t>& seq_lens,
    const std::vector<int64_t>& q_lens, int64_t window_right) {
  std::vector<int64_t> cu_seqlens{0};
  for (const int64_t q_len : q_lens) cu_seqlens.push_back(cu_seqlens.back() + q_len);
  DecodeParams p{};
  p.batch = static_cast<int64_t>(seq_lens.size());
  p.num_kv_heads = 1;
  p.query_tokens = cu_seqlens.back();
  p.seq_lens = {seq_lens.data(), true};
  p.seq_lens_batch_stride = 1;
  p.cu_seqlens_q = {cu_seqlens.data(), true};
  p.pages.num_blocks = p.batch;
  p.pages.max_blocks = 1;
  p.pages.block_size = seq_lens.empty() ? 0 : *std::max_element(seq_lens.begin(), seq_lens.end());
  p.visibility = {-1, window_right};
  p.shared = {shared.empty() ? nullptr : shared[0].data(), static_cast<int64_t>(shared.size())};
  find_bad_shared(p, 0, 1, [](const BadNumber& bad) { fail(describe(bad)); });
  const cpu::Sharing sharing(p);
  std::vector<std::tuple<LengthRow, int64_t, int64_t>> lengths;
  for (int64_t i = 0; i < sharing.sequences(); ++i) {
    const SequenceLength l = sharing.length(i);
    lengths.push_back(
        {{l.tokens, l.leftpad, l.q_len, l.seen_by_all}, sharing.is_node(i) ? i : -1, sharing.parent(i)});
  }
  return lengths;
}

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  throw std::invalid_argument("dtype must be float32, float16 or bfloat16, got " + name);
}

py::dict dict_of(const cpu::Tuning& t) {
  return py::dict(py::arg("name") = t.name, py::arg("prefetch_level") = t.prefetch_level,
                  py::arg("touch_tokens") = t.touch_tokens, py::arg("max_pass_bytes") = t.max_pass_bytes,
                  py::arg("max_long_run_bytes") = t.max_long_run_bytes,
                  py::arg("max_heads_per_pass") = t.max_heads_per_pass,
                  py::arg("max_heads_per_pass_in_pages") = t.max_heads_per_pass_in_pages,
                  py::arg("min_thread_bytes") = t.min_thread_bytes,
                  py::arg("min_range_bytes") = t.min_range_bytes,
                  py::arg("bytes_per_published_byte") = t.bytes_per_published_byte,
                  py::arg("bytes_read_per_merged_byte") = t.bytes_read_per_merged_byte,
                  py::arg("min_tiles_per_thread") = t.min_tiles_per_thread,
                  py::arg("multiplies_in_fp32") = t.multiplies_in_fp32);
}

// The plan of a decode step by the row of this name, of a core whose L2 has so many bytes and ways. Caches
// are contiguous and full to the longest sequence, or in pages if page_size is not 0. int8 caches have
// dtype's queries.
py::dict plan_of(const std::string& tuning, std::pair<int64_t, int64_t> l2, const std::string& dtype,
                 bool int8, const std::vector<int32_t>& seq_lens, int64_t q_len, int64_t num_heads,
                 int64_t num_kv_heads, int64_t head_dim, bool tokens_first, int64_t page_size,
                 int64_t num_ctas, int64_t threads) {
  const std::vector<cpu::Tuning> rows = cpu::tuning_rows({l2.first, l2.second});
  const auto row = std::find_if(rows.begin(), rows.end(), [&](const auto& r) { return tuning == r.name; });
  if (row == rows.end()) throw std::invalid_argument("plan: unknown row " + tuning);
  const int32_t no_block = 0;
  DecodeParams p{};
  p.batch = static_cast<int64_t>(seq_lens.size());
  p.seq_lens = {seq_lens.data(), false};
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
  const cpu::Plan plan = cpu::make_plan(
      p, sharing, cpu::tile_kernel(p.dtype, p.k.dtype, cpu::most_rows(p, sharing)), *row, threads);

  const auto length = [&](int64_t i) { return p.scheduled_length(i); };
  std::vector<int64_t> range_tiles;
  // (range, sequence, first KV head, KV heads, row block, first token, end token)
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>> segments;
  for (int64_t i = 0, sequence = 0; i < plan.ranges.count(); ++i) {
    const LeanRange range = plan.ranges.range(i);
    range_tiles.push_back(range.end - range.begin);
    while (plan.sequence_begin[sequence + 1] <= range.begin) ++sequence;
    SegmentWalk walk(plan.geometry, range, sequence, plan.sequence_begin[sequence], length);
    for (Segment s; walk.next(s, length);) {
      const TokenSpan tokens = s.tokens(plan.geometry.tile_tokens);
      segments.emplace_back(i, s.batch, s.kv_head, s.kv_heads, s.row_block, tokens.begin, tokens.end);
    }
  }
  return py::dict(
      py::arg("dequantises") = plan.dequantises, py::arg("run_tokens") = plan.run_tokens,
      py::arg("prefetch_level") = plan.prefetch_level, py::arg("touch_tokens") = plan.touch_tokens,
      py::arg("rows_per_block") = plan.rows_per_block, py::arg("heads_per_pass") = plan.heads_per_pass,
      py::arg("partial_bytes") = plan.partial_floats * sizeof(float),
      py::arg("tile_tokens") = plan.geometry.tile_tokens, py::arg("passes") = plan.geometry.passes,
      py::arg("range_tiles") = range_tiles, py::arg("threads") = plan.threads,
      py::arg("segments") = segments);
}

// (dtype, head_dim, head_dim_v, rows, quantised caches, threads, shared bytes, bytes in flight) of every CUDA
// kernel in this build.
using KernelRow = std::tuple<std::string, int, int, int, bool, int, int, int>;
std::vector<KernelRow> cuda_kernels() {
  std::vector<KernelRow> rows;
#if defined(LEAN_WITH_CUDA)
  for (const cuda::KernelFacts& k : cuda::kernel_facts()) {
    rows.emplace_back(k.dtype == DType::float16 ? "float16" : "bfloat16", k.head_dim, k.head_dim_v, k.rows,
                      k.quantised, k.threads, k.shared_bytes, k.bytes_in_flight);
  }
#endif
  return rows;
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

PYBIND11_MODULE(_C, m) {
  m.doc() = "lean_attention's compiled core";

  py::class_<lean::Geometry>(m, "Geometry")
      .def(py::init([](int64_t num_kv_heads, int64_t group, int64_t rows_per_block, int64_t tile_tokens,
                       int64_t window_left, int64_t window_right) {
             return lean::Geometry{num_kv_heads,
                                   false,
                                   num_kv_heads,
                                   group,
                                   rows_per_block,
                                   tile_tokens,
                                   {window_left, window_right}};
           }),
           py::kw_only(), py::arg("num_kv_heads"), py::arg("group"), py::arg("rows_per_block"),
           py::arg("tile_tokens"), py::arg("window_left"), py::arg("window_right"))
      .def("sequence_tiles",
           [](const lean::Geometry& g, const lean::LengthRow& row) {
             return g.sequence_tiles(lean::length_of_row(row));
           })
      .def("segments", [](const lean::Geometry& geometry, const std::vector<lean::LengthRow>& lengths,
                          int64_t num_ctas, int64_t first_cta, int64_t end_cta) {
        std::vector<lean::SequenceLength> list;
        for (const lean::LengthRow& row : lengths) list.push_back(lean::length_of_row(row));
        return lean::segments_of(geometry, list, num_ctas, first_cta, end_cta);
      });
  m.def("shared_lengths", &lean::shared_lengths);
  m.def("lean_range", [](int64_t cta, int64_t num_ctas, int64_t total_tiles) {
    const lean::LeanRange range = lean::Grid{num_ctas, total_tiles}.range(cta);
    return std::pair{range.begin, range.end};
  });
  m.def("cta_of", [](int64_t tile, int64_t num_ctas, int64_t total_tiles) {
    return lean::Grid{num_ctas, total_tiles}.cta_of(tile);
  });
  // What threads of a CPU take one after another, from the last to the first.
  using lean::cpu::LeanRanges;
  py::class_<LeanRanges>(m, "LeanRanges")
      .def_static("guided",
                  [](int64_t total_tiles, int64_t threads, int64_t least) {
                    if (threads < 1 || least < 1) {
                      throw std::invalid_argument("LeanRanges: threads and least must be positive");
                    }
                    return LeanRanges::guided(total_tiles, threads, least);
                  })
      .def("__len__", &LeanRanges::count)
      .def("range",
           [](const LeanRanges& ranges, int64_t cta) {
             const lean::LeanRange range = ranges.range(cta);
             return std::pair{range.begin, range.end};
           })
      .def("cta_of", &LeanRanges::cta_of);
  // Partial states as (m, l) pairs; the merge also returns the weights of the two outputs.
  m.def("merge", [](std::pair<float, float> a, std::pair<float, float> b) {
    const lean::Merged merged = lean::merge({a.first, a.second}, {b.first, b.second});
    return std::tuple{merged.state.m, merged.state.l, merged.weight_a, merged.weight_b};
  });
  m.def("log_sum_exp", [](float state_m, float state_l) { return lean::log_sum_exp({state_m, state_l}); });
  m.def("lean_tile_tokens", &lean::lean_tile_tokens);
  // Rows of the CPU's tuning as dicts: the one in force, and all (generic for a core with this L2).
  m.def("tuning", [] { return lean::dict_of(lean::cpu::tuning()); });
  m.def("tuning_rows", [](int64_t l2_bytes, int64_t l2_ways) {
    std::vector<py::dict> rows;
    for (const auto& row : lean::cpu::tuning_rows({l2_bytes, l2_ways})) rows.push_back(lean::dict_of(row));
    return rows;
  });
  m.def("plan", &lean::plan_of, py::kw_only(), py::arg("tuning"), py::arg("l2"), py::arg("dtype"),
        py::arg("int8"), py::arg("seq_lens"), py::arg("q_len"), py::arg("num_heads"), py::arg("num_kv_heads"),
        py::arg("head_dim"), py::arg("tokens_first"), py::arg("page_size"), py::arg("num_ctas"),
        py::arg("threads"));
  m.def("instruction_sets", &lean::cpu::runnable_instruction_sets);
  // For output tiles of so many rows.
  m.def(
      "chosen_instruction_set",
      [](const std::string& dtype, int64_t rows) {
        const lean::DType type = lean::dtype_named(dtype);
        return std::string(lean::cpu::tile_kernel(type, type, rows).instruction_set);
      },
      py::arg("dtype"), py::arg("rows") = 1);
  m.def(
      "read_loop",
      [](uintptr_t address, int64_t bytes) {
        return lean::cpu::read_loop(reinterpret_cast<const void*>(address), bytes);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "fma_loop",
      [](const std::string& dtype, int64_t rounds, int64_t rows) {
        return lean::cpu::fma_loop(lean::dtype_named(dtype), rounds, rows);
      },
      py::arg("dtype"), py::arg("rounds"), py::arg("rows") = 1, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_kernels", &lean::cuda_kernels);
  // The error of `device`, which must be the current one.
  m.def("take_cuda_error", [](int device) {
#if defined(LEAN_WITH_CUDA)
    return lean::cuda::take_error(device);
#else
    (void)device;
    return std::string();
#endif
  });
  m.def("compiler", &lean::compiler);
}
