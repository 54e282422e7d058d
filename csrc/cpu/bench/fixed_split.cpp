// The schedules that stream-K replaces, on the same tile kernels: every output tile is cut into equal pieces,
// and a second parallel region combines them. One piece each is FlashAttention-2's grid.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/attend.h"
#include "cpu/backend.h"
#include "cpu/check_values.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/workspace.h"

namespace lean::cpu {
namespace {

std::vector<Segment> output_tiles(const DecodeParams& p, const Plan& plan) {
  const auto length = [&](int64_t sequence) { return p.scheduled_length(sequence); };
  std::vector<Segment> outputs;
  SegmentWalk walk(plan.geometry, {0, plan.ranges.total_tiles()}, 0, 0, length);
  for (Segment segment; walk.next(segment, length);) outputs.push_back(segment);
  return outputs;
}

// Piece `split` of `splits` of an output tile.
Segment piece_of(Segment output, int64_t split, int64_t splits) {
  const int64_t tiles = output.output_end - output.output_begin;
  output.tiles = {output.output_begin + tiles * split / splits,
                  output.output_begin + tiles * (split + 1) / splits};
  return output;
}

}  // namespace

void decode_fixed_split(const DecodeParams& params, int64_t splits) {
  const Sharing sharing(params);
  check_values(params, sharing);
  const Kernels kernels = choose_kernels(params, sharing);
  const TileKernel& kernel = kernels.many;
  const Plan plan = make_plan(params, sharing, kernel, tuning(), num_threads(), 1);
  const Attention attention(params, kernels, plan);
  Workspace workspace(params, kernel, attention.table(), plan);
  const std::vector<Segment> outputs = output_tiles(params, plan);
  const int64_t count = outputs.size(), threads = num_threads();
  workspace.reserve(splits > 1 ? count * splits : 0, 0, threads);
  std::atomic<int64_t> next_piece{0}, next_output{0};
  parallel_for(std::min(threads, count * splits), [&](int64_t thread) {
    HeadState head = workspace.heads_of(thread)[0];
    DequantisedRows dequantised(params, kernel, attention.table(), workspace.dequantised_rows(thread));
    SegmentQueue pieces([&](TakenSegment& piece) {
      piece.number = next_piece++;
      if (piece.number >= count * splits) return false;
      piece.segment = piece_of(outputs[piece.number / splits], piece.number % splits, splits);
      return true;
    });
    while (pieces.advance()) {
      attention.attend(&head, pieces, dequantised);
      if (splits == 1) {
        attention.write(head, pieces.now().segment);
      } else {
        save(head.tile, workspace.partial(pieces.now().number));
      }
    }
  });
  if (splits == 1) return;
  parallel_for(std::min(threads, count), [&](int64_t thread) {
    HeadState head = workspace.heads_of(thread)[0];
    for (int64_t output; (output = next_output++) < count;) {
      attention.begin(head, outputs[output], outputs[output].kv_head);
      for (int64_t split = 0; split < splits; ++split) {
        merge_into(head.tile, workspace.partial(output * splits + split));
      }
      attention.write(head, outputs[output]);
    }
  });
}

}  // namespace lean::cpu
