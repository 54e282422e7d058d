// LeanAttention on a CPU: threads take lean ranges, publish at most one partial state of each (one for each
// head of a pass), and host blocks merge them and write the outputs, all in one parallel region (arXiv
// 2405.10480, section 4).
#include "cpu/decode.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>

#include "cpu/attend.h"
#include "cpu/backend.h"
#include "cpu/check_values.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/workspace.h"
#include "shared_walk.h"

namespace lean::cpu {
namespace {

class Decode {
 public:
  Decode(const DecodeParams& params, const Sharing& sharing, const Kernels& kernels, const Plan& plan)
      : p_(params),
        sharing_(sharing),
        kernels_(kernels),
        plan_(plan),
        attention_(params, kernels, plan),
        workspace_(params, kernels.many, attention_.table(), plan) {}

  void run() {
    write_padding();
    const int64_t shared_rows = sharing_.nodes() > 0 ? p_.total_query_tokens() * p_.num_heads : 0;
    workspace_.reserve(plan_.ranges.count() * plan_.heads_per_pass, shared_rows, plan_.threads);
    depths_ = std::make_unique<std::atomic<int32_t>[]>(shared_rows);
    published_ = std::make_unique<std::atomic<uint32_t>[]>(plan_.ranges.count());
    parallel_for(plan_.threads, [&](int64_t thread) { take_ranges(thread); });
  }

 private:
  // Query tokens of a packed q that belong to no sequence come out as rows that see nothing.
  void write_padding() const {
    if (!p_.cu_seqlens_q) return;
    const int64_t row_bytes = p_.v.dims * element_size(p_.out_dtype);
    for (int64_t token = p_.first_query(p_.batch); token < p_.query_tokens; ++token) {
      for (int64_t head = 0; head < p_.num_heads; ++head) {
        std::memset(attention_.out_row(0, token, head), 0, row_bytes);
        p_.lse[head * p_.lse_head_stride + token] = kMinusInfinity;
      }
    }
  }

  // What one thread does: the segments of lean ranges, until no range is left. Ranges are handed out from the
  // last to the first, so a host block only waits for ranges that were taken before its own. Before a thread
  // starts a range it is busy with ones that it took earlier, and it publishes before it waits for anything:
  // from the last range down, every wait ends, on however few threads.
  void take_ranges(int64_t thread) {
    std::array<HeadState, kMaxHeadsPerPass> heads = workspace_.heads_of(thread);
    DequantisedRows dequantised(p_, kernels_.many, attention_.table(), workspace_.dequantised_rows(thread));
    const LeanRanges& ranges = plan_.ranges;
    const auto length = [&](int64_t i) { return sharing_.length(i); };
    const auto walk_over = [&](LeanRange range, int64_t sequence, int64_t sequence_begin) {
      return SharedWalk(plan_.geometry, range, sequence, sequence_begin, sharing_.nodes(), length);
    };
    SharedWalk walk = walk_over({0, 0}, sharing_.nodes(), 0);
    SegmentQueue segments([&](TakenSegment& taken) {
      while (!walk.next(plan_.geometry, taken.segment, length)) {
        const int64_t ticket = next_ticket_.fetch_add(1, std::memory_order_relaxed);
        if (ticket >= ranges.count()) return false;
        taken.number = ranges.count() - 1 - ticket;
        const LeanRange range = ranges.range(taken.number);
        const auto& begins = plan_.sequence_begin;
        const int64_t sequence =
            std::upper_bound(begins.begin(), begins.end(), range.begin) - begins.begin() - 1;
        walk = walk_over(range, sequence, begins[sequence]);
      }
      taken.sequence = taken.segment.batch;
      taken.segment.batch = sharing_.batch(taken.sequence);
      return true;
    });
    while (segments.advance()) process(heads.data(), segments, dequantised);
  }

  template <class Segments>
  void process(HeadState* heads, Segments& segments, DequantisedRows& dequantised) {
    const auto& [segment, cta, sequence] = segments.now();
    const int64_t count = segment.kv_heads, depth = sharing_.depth(sequence);
    attention_.attend(heads, segments, dequantised);
    if (!segment.is_host()) return publish(heads, count, cta);
    if (segment.has_peers()) merge_peers(heads, count, cta, plan_.ranges.cta_of(segment.output_end - 1));
    for (int64_t i = 0; i < count; ++i) {
      if (sharing_.is_node(sequence)) merge_shared(heads[i], segment, depth + 1);
      if (depth > 0) {
        share(heads[i], segment, depth);
      } else {
        attention_.write(heads[i], segment);
      }
    }
  }

  // Of a segment's first row, among all of the batch's of all heads.
  int64_t shared_row(const HeadState& head, const Segment& segment) const {
    const int64_t row =
        p_.first_row(segment.batch) * p_.group() + segment.row_block * plan_.geometry.rows_per_block;
    return head.kv_head * p_.total_query_tokens() * p_.group() + row;
  }

  // Leaves states to the node above. They take the place of those that have been merged into them.
  void share(const HeadState& head, const Segment& segment, int64_t depth) {
    const int64_t first = shared_row(head, segment);
    save(head.tile, workspace_.shared_states(first));
    for (int row = 0; row < head.tile.rows; ++row) {
      depths_[first + row].store(static_cast<int32_t>(depth), std::memory_order_release);
      depths_[first + row].notify_all();
    }
  }

  // Merges what the nodes and sequences below have left: states of so many nodes to go through.
  void merge_shared(const HeadState& head, const Segment& segment, int64_t depth) {
    const int64_t first = shared_row(head, segment);
    for (int row = 0; row < head.tile.rows; ++row) {
      const auto& left = depths_[first + row];
      for (int32_t seen; (seen = left.load(std::memory_order_acquire)) != depth;) left.wait(seen);
    }
    merge_into(head.tile, workspace_.shared_states(first));
  }

  // A range may publish the partial state of each head of a pass.
  Partial partial(int64_t cta, int64_t head) const {
    return workspace_.partial(cta * plan_.heads_per_pass + head);
  }

  void publish(const HeadState* heads, int64_t count, int64_t cta) {
    for (int64_t i = 0; i < count; ++i) save(heads[i].tile, partial(cta, i));
    published_[cta].store(1, std::memory_order_release);
    published_[cta].notify_all();
  }

  // Goes in ascending order of the peers' ranges, so that results do not depend on who was faster.
  void merge_peers(const HeadState* heads, int64_t count, int64_t host, int64_t last_peer) {
    for (int64_t peer = host + 1; peer <= last_peer; ++peer) {
      published_[peer].wait(0, std::memory_order_acquire);  // sleeps if it takes long
      for (int64_t i = 0; i < count; ++i) merge_into(heads[i].tile, partial(peer, i));
    }
  }

  const DecodeParams& p_;
  const Sharing& sharing_;
  const Kernels& kernels_;
  const Plan& plan_;
  const Attention attention_;
  Workspace workspace_;
  std::unique_ptr<std::atomic<uint32_t>[]> published_;
  // Of each shared state, how many nodes it has still to go through; 0: it is not there yet.
  std::unique_ptr<std::atomic<int32_t>[]> depths_;
  std::atomic<int64_t> next_ticket_{0};
};

}  // namespace

void decode_with(const DecodeParams& params,
                 const std::function<TileKernel(const TileKernel& kernel)>& adapt) {
  const Sharing sharing(params);
  check_values(params, sharing);
  Kernels kernels = choose_kernels(params, sharing);
  kernels = {adapt(kernels.many), adapt(kernels.few)};
  const Plan plan = make_plan(params, sharing, kernels.many, tuning(), num_threads());
  Decode(params, sharing, kernels, plan).run();
}

void decode(const DecodeParams& params) {
  decode_with(params, [](const TileKernel& kernel) { return kernel; });
}

}  // namespace lean::cpu
