// What becomes of a segment's state: a peer publishes it, a host block merges those of its peers and writes
// the output tile.
#pragma once

#include "cuda/decode/nodes.h"
#include "cuda/decode/reduce.h"
#include "cuda/decode/rows.h"

namespace lean::cuda {

template <class Config>
constexpr unsigned kQuads = Config::head_dim_v / 4;  // of columns; unsigned, as a divisor a shift

// Loads m and l of `count` peers from the first of their partials on.
template <class Config>
LEAN_COLD void load_peers(const float* partial, int64_t partial_floats, int count, int rows) {
  SharedState<Config>& s = shared_state<Config>();
#pragma unroll 2
  for (int i = hw::thread_index(); i < count * Config::rows; i += kThreads) {
    const int n = i / Config::rows, row = i % Config::rows;
    if (row >= rows) continue;
    const float* const m = partial + n * partial_floats + Config::rows * Config::head_dim_v + row;
    s.peer_m[n][row] = hw::load_shared_between_ctas(m);
    s.peer_l[n][row] = hw::load_shared_between_ctas(m + Config::rows);
  }
}

template <class Config>
class Result {
 public:
  LEAN_DEVICE Result(const DecodeArguments& arguments, const Thread& thread, const Segment32& segment,
                     const SegmentPlace& place)
      : a_(arguments),
        thread_(thread),
        segment_(segment),
        rows_(arguments, segment),
        shared_(arguments, segment, place),
        s_(shared_state<Config>()),
        is_host_(segment.is_host()),
        merges_shared_(is_host_ && shared_.are_merged()),
        leaves_(is_host_ && shared_.are_left()),
        first_peer_(s_.cta + 1),
        end_peer_(is_host_ && segment.has_peers() ? s_.grid.cta_of(segment.output_end - 1) + 1
                                                  : first_peer_) {}

  // A host block merges the states of the CTAs after this one in ascending order, then, of a node, those that
  // are left to it, so that results do not depend on who was faster. Called by all threads.
  LEAN_DEVICE void make() {
    if (is_host_) {
      wait_for_peers();
      merge_states();
    } else {
      store_state();
    }
    constexpr int kMine = (Config::rows * kQuads<Config> + kThreads - 1) / kThreads;
    if constexpr (kMine * 4 <= 32) {
      make_columns<kMine>(0);
    } else {
#pragma unroll 1
      for (int first = 0; first < kMine; first += 8) make_columns<8>(first);
    }
    if (!is_host_ || leaves_) {
      hw::sync_block();
      publish();
    }
  }

 private:
  LEAN_DEVICE float* partial(int32_t peer) const { return a_.workspace.partial(peer); }

  LEAN_DEVICE void publish() const {
    if (!is_host_) {
      if (thread_.index == 0) publish_flag(a_.workspace, s_.cta);
    } else if (thread_.index < rows_.count()) {
      shared_.raise(thread_.index);
    }
  }

  LEAN_DEVICE void wait_for_peers() const {
    LEAN_ROLLED
    for (int32_t peer = first_peer_ + thread_.index; peer < end_peer_; peer += kThreads) {
      wait_for(a_.workspace.flags + peer, a_.workspace.nonce);
      lower(a_.workspace.flags + peer);
    }
    if (merges_shared_ && thread_.index < rows_.count()) shared_.wait(thread_.index);
    if (first_peer_ < end_peer_ || merges_shared_) hw::sync_block();
  }

  // The m and l of this CTA, for the host block.
  LEAN_DEVICE void store_state() const {
    const int row = thread_.index;
    float* const m = partial(s_.cta) + Config::rows * Config::head_dim_v;
    if (row >= rows_.count()) return;
    hw::store_shared_between_ctas(m + row, s_.merged_m[row]);
    hw::store_shared_between_ctas(m + Config::rows + row, s_.l[0][row]);
  }

  // Makes m of the shared state the weights of the warps' outputs, peer_m (if it holds all peers) those of
  // the peers', l[0] the factor of their sum and out_rows where it goes. Writes the log-sum-exps.
  LEAN_DEVICE void merge_states() {
    const int row = thread_.index;
    SoftmaxState merged;
    if (row < rows_.count()) merged = {s_.merged_m[row], s_.l[0][row]};
    LEAN_ROLLED
    for (int32_t peer = first_peer_; peer < end_peer_; peer += kPeersAtOnce) {
      load_peers<Config>(partial(peer), a_.workspace.partial_floats, peers_from(peer), rows_.count());
      hw::sync_block();
      if (row < rows_.count()) {
        LEAN_ROLLED
        for (int i = 0; i < peers_from(peer); ++i) {
          merged = merge(merged, {s_.peer_m[i][row], s_.peer_l[i][row]}).state;
        }
      }
      hw::sync_block();
    }
    if (merges_shared_ && row < rows_.count()) merged = merge_shared(merged);
    if (row < rows_.count()) {
      const float weight = rescale(s_.merged_m[row], merged.m);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) s_.m[w][row] *= weight;
      s_.merged_m[row] = merged.m;
      if (leaves_) {
        hw::store_shared_between_ctas(shared_.sums(row), hw::Float2{merged.m, merged.l});
      } else {
        finish_row(row, merged);
      }
    }
    hw::sync_block();
    if (first_peer_ < end_peer_ && holds_all_peers()) weigh_peers(first_peer_);
  }

  // Merges the state that is left for this thread's row into the one of the segment.
  LEAN_DEVICE SoftmaxState merge_shared(SoftmaxState own) const {
    const hw::Float2 left = hw::load_shared_between_ctas(shared_.sums(thread_.index));
    const SoftmaxState merged = merge(own, {left.x, left.y}).state;
    s_.shared_weight[thread_.index] = rescale(left.x, merged.m);
    return merged;
  }

  LEAN_DEVICE void finish_row(int row, SoftmaxState merged) const {
    const int head = rows_.head(row);
    float factor = normaliser(merged.l), lse = log_sum_exp(merged);
    if (a_.p.sinks) {
      const Merged with_sink = merge_sink(merged, a_.p.sinks[head]);
      factor = normaliser(with_sink.state.l) * with_sink.weight_a;
      lse = log_sum_exp_to(with_sink.state, kLog2e);
    }
    s_.l[0][row] = factor;
    const auto query = rows_.query(row);
    s_.out_rows[row] =
        out_address(a_.p, query.batch * a_.p.out_batch_stride + query.token * a_.p.out_token_stride +
                              head * a_.p.out_head_stride);
    a_.p.lse[query.batch * a_.p.lse_batch_stride + head * a_.p.lse_head_stride + query.token] = lse;
  }

  LEAN_DEVICE int peers_from(int32_t peer) const { return min(kPeersAtOnce, end_peer_ - peer); }
  LEAN_DEVICE bool holds_all_peers() const { return end_peer_ - first_peer_ <= kPeersAtOnce; }

  // Makes weights of the peers' m, which are those from `peer` on.
  LEAN_DEVICE void weigh_peers(int32_t peer) const {
    LEAN_ROLLED
    for (int i = thread_.index; i < peers_from(peer) * Config::rows; i += kThreads) {
      float& m = s_.peer_m[i / Config::rows][i % Config::rows];
      if (i % Config::rows < rows_.count()) m = rescale(m, s_.merged_m[i % Config::rows]);
    }
    hw::sync_block();
  }

  // Makes this thread's quads of columns from its n-th on, kCount of them, whose sums stay in registers.
  template <int kCount>
  LEAN_DEVICE void make_columns(int n) {
    const auto row_of = [&](int i) { return ((n + i) * kThreads + thread_.index) / kQuads<Config>; };
    const auto column_of = [&](int i) { return ((n + i) * kThreads + thread_.index) % kQuads<Config> * 4; };
    // What is loaded for rows that do not exist is another one's. A condition would have loads wait for each
    // other, and what it leaves undefined be in registers through all steps.
    const auto loaded_row = [&](int i) { return min(static_cast<int>(row_of(i)), rows_.count() - 1); };
    const auto in_partial = [&](int32_t cta, int i) {
      return reinterpret_cast<hw::Float4*>(partial(cta) + loaded_row(i) * Config::head_dim_v + column_of(i));
    };
    hw::Float4 sums[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = reduced_output<Config>(loaded_row(i), column_of(i));
    if (!is_host_) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (row_of(i) < rows_.count()) hw::store_shared_between_ctas(in_partial(s_.cta, i), sums[i]);
      }
      return;
    }
    LEAN_ROLLED
    for (int32_t peer = first_peer_; peer < end_peer_; peer += kPeersAtOnce) {
      if (!holds_all_peers()) {
        hw::sync_block();  // the last weights have been used
        load_peers<Config>(partial(peer), a_.workspace.partial_floats, peers_from(peer), rows_.count());
        hw::sync_block();
        weigh_peers(peer);
      }
      // Eight loads are under way together. The second of two peers may be the last one again, of no weight.
      constexpr int kAtOnce = kCount > 4 ? 1 : 2;
      LEAN_ROLLED
      for (int p = 0; p < peers_from(peer); p += kAtOnce) {
        hw::Float4 outs[kAtOnce * kCount];
#pragma unroll
        for (int i = 0; i < kAtOnce * kCount; ++i) {
          const int32_t from = peer + min(p + i / kCount, peers_from(peer) - 1);
          outs[i] = hw::load_shared_between_ctas(in_partial(from, i % kCount));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce * kCount; ++i) {
          const int nth = p + i / kCount;
          if (nth < peers_from(peer)) add(sums[i % kCount], s_.peer_m[nth][loaded_row(i % kCount)], outs[i]);
        }
      }
    }
    const auto in_states = [&](int i) {
      return reinterpret_cast<hw::Float4*>(shared_.output(loaded_row(i), column_of(i)));
    };
    if (merges_shared_) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (row_of(i) >= rows_.count()) continue;  // a node's own state takes the place of the last row's
        add(sums[i], s_.shared_weight[row_of(i)], hw::load_shared_between_ctas(in_states(i)));
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (row_of(i) >= rows_.count()) continue;
      if (leaves_) {
        hw::store_shared_between_ctas(in_states(i), sums[i]);
      } else if (column_of(i) < a_.p.v.dims) {
        store_output<Config>(a_, row_of(i), column_of(i), sums[i]);
      }
    }
  }

  const DecodeArguments& a_;
  const Thread& thread_;
  const Segment32& segment_;
  const QueryRows<Config> rows_;
  const SharedStates<Config> shared_;
  SharedState<Config>& s_;
  const bool is_host_;
  const bool merges_shared_;  // what nodes and sequences below have left
  const bool leaves_;         // its states to the node above
  const int32_t first_peer_;
  const int32_t end_peer_;
};

}  // namespace lean::cuda
