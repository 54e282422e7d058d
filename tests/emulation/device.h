// A GPU in one host thread: every CUDA thread is a fiber, warps and CTAs advance in a seeded random order,
// and what hardware leaves undefined is made to hurt.
//
//   - Fewer CTAs may be resident than the grid has; a CTA leaves its slot only when it is done.
//   - Shared memory begins as NaN for each CTA; the target of an asynchronous copy is NaN until the thread
//     that asked has waited for it.
//   - Memory that CTAs share is watched with vector clocks: a load that no release, acquire and block barrier
//     order after the store it reads is an error, whatever it happened to read.
//   - Warp collectives want all 32 lanes at the same one; a launch in which nobody advances is an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lean::emulation {

constexpr int kWarpLanes = 32;

// Ways to break the hardware that correct kernels rely on, so that tests can show that the emulation notices.
enum class Fault {
  none,
  unordered_release,          // a releasing store orders nothing
  unordered_acquire,          // an acquiring fence orders nothing
  no_barrier_before_release,  // block barriers do not order what other threads stored before a release
  no_barrier_after_acquire,   // nor what other threads load after an acquiring fence
  reversed_tickets,  // CTAs take tickets from the last to the first, so hosts wait for CTAs yet to start
  flags_stay_up,     // the store that lowers a flag is lost
  short_copy_wait,   // waiting for copies leaves one group more pending
  no_warp_barrier,
};

struct Options {
  uint64_t seed = 1;
  int resident_ctas = 4;  // slots
  int sms = 3;
  int ctas_per_sm = 2;
  int capability = 80;
  bool deferred = false;  // launches wait for run(), and then interleave
  Fault fault = Fault::none;
};

enum class Collective {
  sync_warp,
  any,
  shuffle_xor,
  shuffle_up,
  shuffle,
  load_matrices,
  load_transposed,
  multiply_add
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

// Events that are ordered before: those up to this one, of a CTA's thread or (kAllThreads) of all its
// threads.
constexpr int kAllThreads = -1;
using Clock = std::map<std::pair<int64_t, int>, uint64_t>;  // (CTA, thread) -> event

struct Fiber {
  enum class Status { ready, at_warp, at_block, paused, done };
  Status status = Status::ready;
  uint64_t waits_for = 0;  // generation of the barrier
  bool started = false;
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  jmp_buf jump;
  void* fake_stack = nullptr;                // AddressSanitizer's
  std::vector<std::vector<Copy>> copies{1};  // groups; the last is open
  Clock loaded;                              // what the words that it has loaded would order
  Clock acquired;                            // by it alone, since the last block barrier
};

struct Warp {
  int arrived = 0;
  uint64_t generation = 0;
  Collective collective{};
  void* arguments[kWarpLanes] = {};
};

struct Launch {
  std::function<void()> kernel;
  int64_t ctas;
  int threads;
  int shared_bytes;
  int64_t next_cta = 0;
};

struct Cta {
  int64_t id;     // unique on the device
  int64_t index;  // in its launch
  Launch* launch;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, nullptr};
  int arrived = 0;
  uint64_t generation = 0;
  int done = 0;
  uint64_t event = 1;    // one more after each barrier and release
  uint64_t ordered = 0;  // its events before the last barrier
  Clock clock;           // of other CTAs, what all its threads are ordered after
};

class Device {
 public:
  static Device& get();

  void configure(const Options& options);
  const Options& options() const { return options_; }

  void launch(std::function<void()> kernel, int64_t ctas, int threads, int shared_bytes);
  void run();     // all that is queued
  void replay();  // the last launch again, as a captured graph would: same arguments, same workspace
  void* allocate_workspace(int64_t bytes);
  int64_t launches() const { return launches_; }
  int64_t last_grid() const { return last_.ctas; }

  // For the running fiber.
  int thread() const { return thread_; }
  int64_t cta_index() const { return cta_->index; }
  int64_t num_ctas() const { return cta_->launch->ctas; }
  char* shared_memory() const { return cta_->shared.get(); }
  void collective(Collective which, void* arguments);
  void sync_block();
  void pause();
  void copy_async(void* to, const void* from, size_t bytes);
  void check_aligned(const void* address, size_t bytes);
  void commit_copies();
  void wait_copies(size_t pending);
  void watch_load(const void* address, size_t bytes);
  void watch_store(const void* address, size_t bytes);
  uint64_t load(uint64_t* word);
  void fence_acquire();  // for the words that the running thread has loaded
  void store(uint64_t* word, uint64_t value, bool release);
  uint64_t fetch_add(uint64_t* word, uint64_t value);
  void compare_exchange(uint64_t* word, uint64_t expected, uint64_t desired);

 private:
  struct Stored {
    int64_t cta;
    int thread;
    uint64_t event;  // 0: none
  };

  [[noreturn]] void fail(const std::string& what);
  void pass_barrier();
  bool is_ordered(const Stored& stored) const;
  void start_ctas();
  bool advance(Cta& cta, int warp);
  void resume(Cta& cta, int thread);
  void suspend();
  void enter();
  static void entry();
  void stop();

  Options options_;
  std::mt19937_64 random_{1};
  std::deque<Launch> queue_;
  Launch last_{};
  std::vector<std::unique_ptr<Cta>> resident_;
  std::vector<std::unique_ptr<char[]>> free_stacks_;
  std::vector<std::unique_ptr<char, void (*)(void*)>> workspaces_;
  std::unordered_map<uintptr_t, Stored> stored_;  // by address of each 4 bytes
  std::unordered_map<uint64_t*, Clock> released_;
  int64_t next_id_ = 0;
  int64_t launches_ = 0;
  uint64_t* ticket_ = nullptr;  // the word that has been exchanged
  int64_t tickets_taken_ = 0;

  Cta* cta_ = nullptr;
  Fiber* fiber_ = nullptr;
  int thread_ = 0;
  bool progress_ = false;
  std::string failure_;
  jmp_buf scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

// What lane by lane collectives hand over.
struct FloatExchange {
  float value;
  int mask;
};
struct IntExchange {
  int64_t value;
  int lanes;  // how far up, or which
};
struct MatrixLoad {
  uint32_t* r;
  uint16_t row[8];  // read when its lane arrives: the collective orders no memory
};
struct MatrixProduct {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
  float (*to_float)(uint16_t);
};

void complete(Collective which, void* const (&arguments)[kWarpLanes]);

}  // namespace lean::emulation
