// The schedule and the merging of states as ops on numbers: what lean_attention.Schedule and tests ask for.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "bad_numbers.h"
#include "cpu/lean_ranges.h"
#include "cpu/sharing.h"
#include "fail.h"
#include "ops/library.h"
#include "schedule.h"
#include "softmax_state.h"

namespace lean {
namespace {

using Numbers = std::vector<int64_t>;

Geometry geometry_of(int64_t num_kv_heads, int64_t group, int64_t rows_per_block, int64_t tile_tokens,
                     int64_t window_left, int64_t window_right) {
  return {num_kv_heads, false, num_kv_heads, group, rows_per_block, tile_tokens, {window_left, window_right}};
}

// Rows of four: tokens, leading tokens that no row sees, query tokens, whether those see all others.
constexpr size_t kLengthNumbers = 4;

std::vector<SequenceLength> lengths_of(const Numbers& numbers) {
  if (numbers.size() % kLengthNumbers != 0) fail("lengths has ", numbers.size(), " numbers; each has 4");
  std::vector<SequenceLength> lengths;
  for (size_t i = 0; i < numbers.size(); i += kLengthNumbers) {
    lengths.push_back({numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3] != 0});
  }
  return lengths;
}

int64_t total_tiles(const Numbers& lengths, int64_t num_kv_heads, int64_t group, int64_t rows_per_block,
                    int64_t tile_tokens, int64_t window_left, int64_t window_right) {
  const Geometry geometry =
      geometry_of(num_kv_heads, group, rows_per_block, tile_tokens, window_left, window_right);
  int64_t tiles = 0;
  for (const SequenceLength& length : lengths_of(lengths)) tiles += geometry.sequence_tiles(length);
  return tiles;
}

// The segments of CTAs [first_cta, end_cta), in order, as rows of ten: cta, sequence, kv_head, row_block,
// first tile, end tile, first token, end token, host cta, last peer. A sequence is found by walking from the
// start: this is for inspection; kernels use prefix sums.
Numbers segments(const Numbers& length_numbers, int64_t num_kv_heads, int64_t group, int64_t rows_per_block,
                 int64_t tile_tokens, int64_t window_left, int64_t window_right, int64_t num_ctas,
                 int64_t first_cta, int64_t end_cta) {
  const Geometry geometry =
      geometry_of(num_kv_heads, group, rows_per_block, tile_tokens, window_left, window_right);
  const std::vector<SequenceLength> lengths = lengths_of(length_numbers);
  const auto length_of = [&](int64_t b) { return lengths[b]; };
  Numbers begin{0};
  for (const SequenceLength& length : lengths)
    begin.push_back(begin.back() + geometry.sequence_tiles(length));
  const Grid grid{num_ctas, begin.back()};
  Numbers rows;
  for (int64_t cta = first_cta, sequence = 0; cta < end_cta; ++cta) {
    const LeanRange range = grid.range(cta);
    if (range.begin == range.end) continue;
    while (begin[sequence + 1] <= range.begin) ++sequence;
    SegmentWalk walk(geometry, range, sequence, begin[sequence], length_of);
    for (Segment s; walk.next(s, length_of);) {
      const TokenSpan tokens = s.tokens(geometry.tile_tokens);
      rows.insert(rows.end(), {cta, s.batch, s.kv_head, s.row_block, s.tiles.begin - s.output_begin,
                               s.tiles.end - s.output_begin, tokens.begin, tokens.end,
                               grid.cta_of(s.output_begin), grid.cta_of(s.output_end - 1)});
    }
  }
  return rows;
}

// What the sequences of the schedule contribute where some share prefixes, as rows of six: a length's four
// numbers, the row of `shared` that it is (-1: none), and the one that merges its states.
// `shared` has rows of four.
Numbers shared_lengths(const Numbers& shared, const Numbers& seq_lens, const Numbers& q_lens,
                       int64_t window_right) {
  using Int32 = std::numeric_limits<int32_t>;
  std::vector<int32_t> rows;
  for (const int64_t number : shared) {
    if (number < Int32::min() || number > Int32::max()) {
      fail("decode: shared has ", number, "; it must fit 32 bits");
    }
    rows.push_back(static_cast<int32_t>(number));
  }
  Numbers cu_seqlens{0};
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
  p.shared = {rows.empty() ? nullptr : rows.data(), static_cast<int64_t>(rows.size() / 4)};
  find_bad_shared(p, 0, 1, [](const BadNumber& bad) { fail(describe(bad)); });
  const cpu::Sharing sharing(p);
  Numbers lengths;
  for (int64_t i = 0; i < sharing.sequences(); ++i) {
    const SequenceLength l = sharing.length(i);
    lengths.insert(lengths.end(), {l.tokens, l.leftpad, l.q_len, l.seen_by_all ? 1 : 0,
                                   sharing.is_node(i) ? i : -1, sharing.parent(i)});
  }
  return lengths;
}

std::tuple<int64_t, int64_t> lean_range(int64_t cta, int64_t num_ctas, int64_t total) {
  const LeanRange range = Grid{num_ctas, total}.range(cta);
  return {range.begin, range.end};
}

int64_t cta_of(int64_t tile, int64_t num_ctas, int64_t total) {
  return Grid{num_ctas, total}.cta_of(tile);
}

// Where each range begins that a CPU's threads take one after another, from the last to the first, and one
// past the last LeanTile; and the range of each of `tiles`.
std::tuple<Numbers, Numbers> guided_ranges(int64_t total, int64_t threads, int64_t least,
                                           const Numbers& tiles) {
  if (threads < 1 || least < 1) fail("guided_ranges: threads and least must be positive");
  const cpu::LeanRanges ranges = cpu::LeanRanges::guided(total, threads, least);
  Numbers begins, ctas;
  for (int64_t cta = 0; cta < ranges.count(); ++cta) begins.push_back(ranges.range(cta).begin);
  begins.push_back(ranges.total_tiles());
  for (const int64_t tile : tiles) ctas.push_back(ranges.cta_of(tile));
  return {begins, ctas};
}

// Of two states (m, l): that of both, and the weights of their outputs.
std::tuple<double, double, double, double> merge_pair(double m_a, double l_a, double m_b, double l_b) {
  const auto state = [](double m, double l) {
    return SoftmaxState{static_cast<float>(m), static_cast<float>(l)};
  };
  const Merged merged = merge(state(m_a, l_a), state(m_b, l_b));
  return {merged.state.m, merged.state.l, merged.weight_a, merged.weight_b};
}

double state_log_sum_exp(double m, double l) {
  return log_sum_exp({static_cast<float>(m), static_cast<float>(l)});
}

int64_t tile_tokens_of(int64_t head_dim) {
  return lean_tile_tokens(head_dim);
}

}  // namespace
}  // namespace lean

#define LEAN_GEOMETRY \
  "int num_kv_heads, int group, int rows_per_block, int tile_tokens, int window_left, int window_right"

STABLE_TORCH_LIBRARY_FRAGMENT(LEAN_TOOLS_LIBRARY, m) {
  m.def("total_tiles(int[] lengths, *, " LEAN_GEOMETRY ") -> int");
  m.def("segments(int[] lengths, *, " LEAN_GEOMETRY ", int num_ctas, int first_cta, int end_cta) -> int[]");
  m.def("shared_lengths(int[] shared, int[] seq_lens, int[] q_lens, int window_right) -> int[]");
  m.def("lean_range(int cta, int num_ctas, int total_tiles) -> (int, int)");
  m.def("cta_of(int tile, int num_ctas, int total_tiles) -> int");
  m.def("guided_ranges(int total_tiles, int threads, int least, int[] tiles) -> (int[], int[])");
  m.def("merge(float m_a, float l_a, float m_b, float l_b) -> (float, float, float, float)");
  m.def("log_sum_exp(float m, float l) -> float");
  m.def("lean_tile_tokens(int head_dim) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(LEAN_TOOLS_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("total_tiles", TORCH_BOX(&lean::total_tiles));
  m.impl("segments", TORCH_BOX(&lean::segments));
  m.impl("shared_lengths", TORCH_BOX(&lean::shared_lengths));
  m.impl("lean_range", TORCH_BOX(&lean::lean_range));
  m.impl("cta_of", TORCH_BOX(&lean::cta_of));
  m.impl("guided_ranges", TORCH_BOX(&lean::guided_ranges));
  m.impl("merge", TORCH_BOX(&lean::merge_pair));
  m.impl("log_sum_exp", TORCH_BOX(&lean::state_log_sum_exp));
  m.impl("lean_tile_tokens", TORCH_BOX(&lean::tile_tokens_of));
}
