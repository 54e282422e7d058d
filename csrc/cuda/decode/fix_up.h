// How the CTAs of a launch meet: tickets, partial states and their flags, in a workspace that needs no
// preparation.
//
// Memory. The workspace comes from an allocator and holds anything at all. Every launch has a nonce that no
// other launch of the process has had; a flag is up when it holds the nonce, and the ticket word is in use
// when its high bits do. Garbage takes part only if it equals a 64-bit (for tickets: 44-bit) nonce that was
// drawn at random. A captured graph repeats its nonce, so a launch leaves behind no flag that is up (the
// host lowers each one it has seen) and a ticket count of zero. Two launches at once have two workspaces.
//
// Progress. A host block waits for CTAs of higher ranges only. Ranges are handed out from the last to the
// first in the order in which CTAs take tickets, so a CTA waits only for CTAs that took theirs earlier: those
// are running or done, whichever CTAs are resident and whatever else the GPU runs. And a CTA publishes before
// it waits: its one partial belongs to the first segment of its range, and hosting comes after. So of all
// unfinished CTAs the one with the earliest ticket never waits for an unfinished one, and the launch ends.
// Where the grid is larger than the work, the CTAs of the last tickets have no range and leave at once; no
// host waits for them.
#pragma once

#include "cuda/words.h"

namespace lean::cuda {

// Tickets count in the low bits of their word, which bounds the grid.
constexpr int kTicketBits = 20;
constexpr int64_t kMaxCtas = (int64_t{1} << kTicketBits) - 1;

struct Workspace {
  uint64_t* ticket;
  uint64_t* flags;         // one per CTA
  float* partials;         // per CTA: output [rows, head_dim_v], m [rows], l [rows]
  int64_t partial_floats;  // from one CTA's to the next
  uint64_t nonce;          // its low kTicketBits are zero, the others are not

  // Where sequences share prefixes; see nodes.h.
  uint64_t* state_flags;  // [num_kv_heads, state_rows]
  float* states;          // outputs, [num_kv_heads, state_rows, head_dim_v]
  float* state_sums;      // m and l, [num_kv_heads, state_rows, 2]
  int64_t state_rows;     // query rows per KV head, of the batch

  LEAN_DEVICE float* partial(int64_t cta) const { return partials + cta * partial_floats; }
};

// 0 for the first CTA of the launch to take one, then 1, and so on up to num_ctas - 1, each once. By one
// thread of every CTA. Relaxed: the word's own modification order is all that is used.
LEAN_DEVICE int32_t take_ticket(const Workspace& w, int64_t num_ctas) {
  constexpr uint64_t kCount = (uint64_t{1} << kTicketBits) - 1;
  uint64_t seen = hw::fetch_add_relaxed(w.ticket, 1);
  // In a replay the high bits are the nonce from the beginning. Else the word was garbage, and what was added
  // to it is lost: at most one of these exchanges succeeds, after which they are the nonce until the launch
  // ends.
  if ((seen & ~kCount) != w.nonce) {
    for (seen = hw::load_relaxed(w.ticket); (seen & ~kCount) != w.nonce; seen = hw::load_relaxed(w.ticket)) {
      hw::compare_exchange_relaxed(w.ticket, seen, w.nonce);
    }
    seen = hw::fetch_add_relaxed(w.ticket, 1);
  }
  const int32_t ticket = static_cast<int32_t>(seen & kCount);
  // The last one leaves the word as a replay wants to find it.
  if (ticket == num_ctas - 1) hw::store_relaxed(w.ticket, w.nonce);
  return ticket;
}

// Called by one thread, after a block barrier that follows all threads' stores of the partial. The barrier
// orders those stores before this one, and release makes both visible together to who acquires.
LEAN_DEVICE void publish_flag(const Workspace& w, int64_t cta) {
  hw::store_release(w.flags + cta, w.nonce);
}

// Called before a block barrier that precedes all threads' loads of what the flag tells of. Relaxed loads
// and one fence, because each acquiring load would empty the L1 of the SM.
LEAN_DEVICE void wait_for(uint64_t* flag, uint64_t value) {
  for (unsigned nanoseconds = 32; hw::load_relaxed(flag) != value;
       nanoseconds = nanoseconds < 512 ? nanoseconds * 2 : nanoseconds) {
    hw::pause(nanoseconds);
  }
  hw::fence_acquire();
}

// After it a replay finds the flag down. It needs no order: in this launch nobody raises the flag again, and
// the next one begins after this one.
LEAN_DEVICE void lower(uint64_t* flag) {
  hw::store_relaxed(flag, 0);
}

}  // namespace lean::cuda
