// Every number that was measured rather than derived: a row per core family. The plan and the kernels take
// these answers and never ask which chip they run on.
//
// "Measured" says which case of benchmarks.cpu_decode showed what, as speed in times of the alternative. Rows
// say which of their values have no such figure.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lean::cpu {

// The L2 of one core, as sysconf tells.
struct L2Cache {
  int64_t bytes;
  int64_t ways;
};

struct Tuning {
  const char* name;

  // The cache that rows are prefetched into: 1 is L1, shortly before they are read; 2 is L2, a run
  // beforehand, for which L1 has no room. Kernels without kHasIntoL1 take L2 always. Measured, L1 against L2:
  // zen5 1.04 to 1.26 (bf16-h{8,32}-kv8-d128-b1-n49152, and -tokens_first), zen4 0.79 to 0.93, intel 1.04
  // to 1.10 where no pages are touched (bf16-h32-kv32-d128-b1-n12288-tokens_first).
  int prefetch_level;

  // Tokens of a head whose memory pages are touched together, so that the walks of the page tables overlap;
  // 0: none are touched. Measured, pages touched against none: zen4 1.25 (bf16-h64-kv8-d128-b1-n49152), intel
  // 0.86 to 0.99 (bf16-h32-kv32-d128-b1-n12288-tokens_first, -n49152). How many at once showed no 3 %: a core
  // that prefetches into L1 has fewer places for them.
  int64_t touch_tokens;

  // The same two of rows of fp32. Measured, L2 with pages touched against L1 without: intel 1.09 to 1.26
  // (fp32-h{8,32}-kv8-d128-b1-n{8192,32768}).
  int fp32_prefetch_level;
  int64_t fp32_touch_tokens;

  // Bytes that the heads of a pass read in a run of kShortRunTokens, at most. The run in work and the next
  // one must fit into L2 together, an L2 of few ways counts half, and where rows are prefetched into L1 less
  // is under way. Measured: zen5 1.17 to 1.21 with all of L2 against a quarter
  // (bf16-h32-kv32-d128-b1-n12288-tokens_first). intel shows no 3 % between a quarter of L2 and all of it.
  int64_t max_pass_bytes;

  // Bytes that the heads of a pass read in a run of kRunTokens, at most; if they have more, runs are short.
  // Short runs keep a thread's q, O and scores in L1 and L2 between a head's run and its next; long runs cost
  // less per token. In an L2 of few ways, prefetched rows push each other out before half of it is full.
  int64_t max_long_run_bytes;

  // Heads that one pass takes, at most: many where whole tokens are contiguous (NHD), fewer in short pages
  // that are stored head by head (HND), whose pieces are long enough. Measured: zen5 1.07 to 1.13 with 32
  // against 8 in NHD (bf16-h32-kv32-d128-b1-n12288-tokens_first), and 0.82 to 1.06 in pages; intel 1.19 with
  // 32 against 8 and 1.2 to 3.7 against 1 in NHD, 1.08 to 1.17 with 8 against 1 in pages.
  int64_t max_heads_per_pass;
  int64_t max_heads_per_pass_in_pages;

  // Bytes of K and V below which another thread costs more than it brings: waking one takes 3 to 4
  // microseconds, in which a core reads and multiplies about this much.
  int64_t min_thread_bytes;

  // Bytes of K and V below which another range costs more to begin than it levels out between threads.
  int64_t min_range_bytes;

  // A range reads at least this many bytes for each byte of the partial states that it may publish, where it
  // can.
  int64_t bytes_per_published_byte;

  // In the time in which a host block merges a byte of its peers' partial states, a thread reads this many
  // bytes of the caches: as from memory that is as fast as L2, where merging shows sooner. Passes take fewer
  // heads where merging theirs would take longer than reading.
  int64_t bytes_read_per_merged_byte;

  // LeanTiles per thread below which passes take fewer heads, so that all threads have some.
  int64_t min_tiles_per_thread;

  // Dot products of bf16 are no faster than the fp32 FMAs that do the same (Intel's cores with AVX-512 BF16:
  // one instruction every other cycle, against two each), so rows of bf16 and int8 are converted to fp32.
  // Measured on a Xeon: 1.24 with 4 query heads per KV head, 1.39 with 8
  // (bf16-h{32,64}-kv8-d128-b1-n8192).
  bool multiplies_in_fp32;
};

// The row of this machine, or the one that the environment variable LEAN_ATTENTION_TUNING names (read at each
// call, so that a test can change it). Throws if there is no such row.
const Tuning& tuning();
const Tuning& tuning(const std::string& name);  // "": of this machine

// All rows; `generic` is that of a core with this L2.
std::vector<Tuning> tuning_rows(const L2Cache& l2);

}  // namespace lean::cpu
