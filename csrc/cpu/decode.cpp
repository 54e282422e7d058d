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
  Decode(const DecodeParams& params, const Sharing& sharing, const TileKernel& kernel, const Plan& plan)
      : p_(params),
        sharing_(sharing),
        kernel_(kernel),
        plan_(plan),
        attention_(params, sharing, kernel, plan),
        workspace_(params, kernel, attention_.table(), plan) {}

  void run() {
    write_padding();
    const int64_t shared_rows = sharing_.count() > 0 ? p_.total_query_tokens() * p_.num_heads : 0;
    workspace_.reserve(plan_.ranges.count() * plan_.heads_per_pass, shared_rows, plan_.threads);
    blocks_done_ = std::make_unique<std::atomic<int64_t>[]>(sharing_.count() * p_.num_kv_heads);
    published_ = std::make_unique<std::atomic<uint32_t>[]>(plan_.ranges.count());
    parallel_for(plan_.threads, [&](int64_t thread) { take_ranges(thread); });
  }

 private:
  // Query tokens of a packed q that belong to no sequence come out as rows that see nothing.
  void write_padding() const {
    if (!p_.cu_seqlens_q) return;
    const int64_t row_bytes = p_.v.dims * element_size(p_.dtype);
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
    DequantisedRows dequantised(p_, kernel_, attention_.table(), workspace_.dequantised_rows(thread));
    const LeanRanges& ranges = plan_.ranges;
    const auto length = [&](int64_t i) { return sharing_.length(i); };
    const auto walk_over = [&](LeanRange range, int64_t sequence, int64_t sequence_begin) {
      return SharedWalk(plan_.geometry, range, sequence, sequence_begin, p_.sequences(), sharing_.sequences(),
                        ranges.total_tiles(), length);
    };
    SharedWalk walk = walk_over({0, 0}, 0, 0);
    SegmentQueue segments([&](TakenSegment& taken) {
      while (!walk.next(taken.segment, length)) {
        const int64_t ticket = next_ticket_.fetch_add(1, std::memory_order_relaxed);
        if (ticket >= ranges.count()) return false;
        taken.number = ranges.count() - 1 - ticket;
        const LeanRange range = ranges.range(taken.number);
        const auto& begins = plan_.sequence_begin;
        const int64_t sequence =
            std::upper_bound(begins.begin(), begins.end(), range.begin) - begins.begin() - 1;
        walk = walk_over(range, sequence, begins[sequence]);
      }
      return true;
    });
    while (segments.advance()) process(heads.data(), segments, dequantised);
  }

  template <class Segments>
  void process(HeadState* heads, Segments& segments, DequantisedRows& dequantised) {
    const auto& [segment, cta] = segments.now();
    const int64_t count = segment.kv_heads;
    attention_.attend(heads, segments, dequantised);
    if (!segment.is_host()) return publish(heads, count, cta);
    if (segment.has_peers()) merge_peers(heads, count, cta, plan_.ranges.cta_of(segment.output_end - 1));
    if (const int64_t node = sharing_.prefix(segment.batch); node >= 0) merge_prefix(heads, segment, node);
    for (int64_t i = 0; i < count; ++i) {
      if (sharing_.is_node(segment.batch)) {
        share(heads[i], segment);
      } else {
        attention_.write(heads[i], segment);
      }
    }
  }

  // The states of a segment's rows over what they share.
  Partial shared_states(const Segment& segment, int64_t kv_head) const {
    const int64_t row = p_.first_row(attention_.sequence_of(segment)) * p_.group() +
                        segment.row_block * plan_.geometry.rows_per_block;
    return workspace_.shared_states(kv_head * p_.total_query_tokens() * p_.group() + row);
  }

  // A node's states take the place of its parent's, which are merged into them and which no other node merges
  // for these rows.
  void share(const HeadState& head, const Segment& segment) {
    save(head.tile, shared_states(segment, head.kv_head));
    auto& done = blocks_done_[sharing_.node(segment.batch) * p_.num_kv_heads + head.kv_head];
    done.fetch_add(1, std::memory_order_release);
    done.notify_all();
  }

  void merge_prefix(const HeadState* heads, const Segment& segment, int64_t node) {
    const int64_t blocks = plan_.geometry.row_blocks(sharing_.length(sharing_.sequence(node)).q_len);
    for (int64_t i = 0; i < segment.kv_heads; ++i) {
      const auto& done = blocks_done_[node * p_.num_kv_heads + heads[i].kv_head];
      for (int64_t seen; (seen = done.load(std::memory_order_acquire)) < blocks;) done.wait(seen);
      merge_into(heads[i].tile, shared_states(segment, heads[i].kv_head));
    }
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
  const TileKernel& kernel_;
  const Plan& plan_;
  const Attention attention_;
  Workspace workspace_;
  std::unique_ptr<std::atomic<uint32_t>[]> published_;
  std::unique_ptr<std::atomic<int64_t>[]> blocks_done_;  // row blocks of each node and KV head
  std::atomic<int64_t> next_ticket_{0};
};

}  // namespace

void decode_with(const DecodeParams& params,
                 const std::function<TileKernel(const TileKernel& kernel)>& adapt) {
  const Sharing sharing(params);
  check_values(params, sharing);
  const TileKernel kernel = adapt(tile_kernel(params.dtype, params.k.dtype, most_rows(params, sharing)));
  const Plan plan = make_plan(params, sharing, kernel, tuning(), num_threads());
  Decode(params, sharing, kernel, plan).run();
}

void decode(const DecodeParams& params) {
  decode_with(params, [](const TileKernel& kernel) { return kernel; });
}

}  // namespace lean::cpu
