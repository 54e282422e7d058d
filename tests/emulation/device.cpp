#include "device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define LEAN_ASAN 1
#else
#define LEAN_ASAN 0
#endif

namespace lean::emulation {
namespace {

constexpr size_t kStackBytes = LEAN_ASAN ? 256 * 1024 : 64 * 1024;

// Rounds of the scheduler in which only spinning threads ran, after which a launch counts as hung.
constexpr int kMaxIdleRounds = 2000;

constexpr int kPoison = 0xff;  // NaN in fp16, bf16 and fp32

void join(Clock& clock, const Clock& other) {
  for (const auto& [thread, event] : other) {
    uint64_t& known = clock[thread];
    known = std::max(known, event);
  }
}

bool has(const Clock& clock, int64_t cta, int thread, uint64_t event) {
  const auto found = clock.find({cta, thread});
  return found != clock.end() && found->second >= event;
}

}  // namespace

Device& Device::get() {
  static Device device;
  return device;
}

void Device::configure(const Options& options) {
  options_ = options;
  random_.seed(options.seed);
  queue_.clear();
  workspaces_.clear();
  last_ = {};
  launches_ = 0;
}

void* Device::allocate_workspace(int64_t bytes) {
  char* memory = static_cast<char*>(std::malloc(bytes));
  std::memset(memory, kPoison, bytes);
  workspaces_.emplace_back(memory, std::free);
  return memory;
}

void Device::launch(std::function<void()> kernel, int64_t ctas, int threads, int shared_bytes) {
  ++launches_;
  last_ = {std::move(kernel), ctas, threads, shared_bytes};
  queue_.push_back(last_);
  if (!options_.deferred) run();
}

void Device::replay() {
  queue_.push_back(last_);
  run();
}

// ---- Scheduling.

void Device::run() {
  failure_.clear();
  stored_.clear();  // the launches before are done
  released_.clear();
  ticket_ = nullptr;
  tickets_taken_ = 0;
  int idle = 0;
  for (start_ctas(); !resident_.empty() && failure_.empty(); start_ctas()) {
    Cta& cta = *resident_[random_() % resident_.size()];
    const int first = static_cast<int>(random_() % cta.warps.size());
    bool ran = false;
    progress_ = false;
    for (size_t i = 0; i < cta.warps.size() && !ran; ++i) {
      ran = advance(cta, static_cast<int>((first + i) % cta.warps.size()));
    }
    idle = progress_ ? 0 : idle + 1;
    if (idle > kMaxIdleRounds) {
      failure_ = "no CTA advances: the launch hangs";
      for (const Fiber& f : cta.fibers) {
        if (f.status == Fiber::Status::at_warp)
          failure_ = "a warp collective waits for lanes that do not come";
      }
    }
    if (cta.done == cta.launch->threads) {
      std::erase_if(resident_, [&](const auto& r) {
        if (r.get() != &cta) return false;
        for (Fiber& f : cta.fibers) free_stacks_.push_back(std::move(f.stack));
        return true;
      });
    }
  }
  for (auto& cta : resident_) {  // of a launch that failed
    for (Fiber& f : cta->fibers) {
      if (f.stack) free_stacks_.push_back(std::move(f.stack));
    }
  }
  resident_.clear();
  queue_.clear();
  cta_ = nullptr;
  if (!failure_.empty()) {
    std::ostringstream message;
    message << "emulation (seed " << options_.seed << "): " << failure_;
    throw std::runtime_error(message.str());
  }
}

void Device::start_ctas() {
  while (static_cast<int>(resident_.size()) < options_.resident_ctas) {
    std::vector<Launch*> waiting;
    for (Launch& launch : queue_) {
      if (launch.next_cta < launch.ctas) waiting.push_back(&launch);
    }
    if (waiting.empty()) return;
    Launch& launch = *waiting[random_() % waiting.size()];
    auto cta = std::make_unique<Cta>();
    cta->id = next_id_++;
    cta->index = launch.next_cta;
    cta->launch = &launch;
    cta->fibers.resize(launch.threads);
    cta->warps.resize(launch.threads / kWarpLanes);
    cta->shared = {static_cast<char*>(std::aligned_alloc(128, (launch.shared_bytes + 127) / 128 * 128)),
                   std::free};
    std::memset(cta->shared.get(), kPoison, launch.shared_bytes);
    ++launch.next_cta;
    resident_.push_back(std::move(cta));
  }
}

// Runs the lanes of a warp that can, some rounds of them; false where none can.
bool Device::advance(Cta& cta, int warp) {
  bool ran = false;
  for (int rounds = 1 + static_cast<int>(random_() % 24); rounds > 0 && failure_.empty(); --rounds) {
    bool any = false;
    for (int lane = 0; lane < kWarpLanes && failure_.empty(); ++lane) {
      Fiber& f = cta.fibers[warp * kWarpLanes + lane];
      const bool ready = f.status == Fiber::Status::ready || f.status == Fiber::Status::paused ||
                         (f.status == Fiber::Status::at_warp && cta.warps[warp].generation > f.waits_for) ||
                         (f.status == Fiber::Status::at_block && cta.generation > f.waits_for);
      if (!ready) continue;
      const bool paused = f.status == Fiber::Status::paused;
      resume(cta, warp * kWarpLanes + lane);
      progress_ |= !(paused && f.status == Fiber::Status::paused);
      any = true;
    }
    if (!any) break;
    ran = true;
  }
  return ran;
}

void Device::resume(Cta& cta, int thread) {
  cta_ = &cta;
  thread_ = thread;
  fiber_ = &cta.fibers[thread];
  Fiber& f = *fiber_;
  f.status = Fiber::Status::ready;
  if (!f.stack && !free_stacks_.empty()) {
    f.stack = std::move(free_stacks_.back());
    free_stacks_.pop_back();
  }
  if (!f.stack) f.stack.reset(new char[kStackBytes]);
#if LEAN_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, f.stack.get(), kStackBytes);
#endif
  if (_setjmp(scheduler_) == 0) {
    if (f.started) _longjmp(f.jump, 1);
    f.started = true;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &Device::entry, 0);
    setcontext(&f.context);
  }
#if LEAN_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
}

void Device::entry() {
  get().enter();
}

void Device::enter() {
#if LEAN_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  cta_->launch->kernel();
  ++cta_->done;
  fiber_->status = Fiber::Status::done;
  stop();
}

void Device::stop() {
#if LEAN_ASAN
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack_, scheduler_stack_bytes_);
#endif
  _longjmp(scheduler_, 1);
}

void Device::suspend() {
  Fiber& f = *fiber_;
#if LEAN_ASAN
  __sanitizer_start_switch_fiber(&f.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
  if (_setjmp(f.jump) == 0) _longjmp(scheduler_, 1);
#if LEAN_ASAN
  __sanitizer_finish_switch_fiber(get().fiber_->fake_stack, nullptr, nullptr);
#endif
}

void Device::fail(const std::string& what) {
  std::ostringstream message;
  message << what << " (CTA " << cta_->id << ", thread " << thread_ << ")";
  failure_ = message.str();
  fiber_->status = Fiber::Status::done;
  stop();
  std::abort();
}

// ---- Barriers and collectives.

void Device::collective(Collective which, void* arguments) {
  if (which == Collective::sync_warp && options_.fault == Fault::no_warp_barrier) return;
  Warp& warp = cta_->warps[thread_ / kWarpLanes];
  if (warp.arrived > 0 && warp.collective != which) fail("lanes of a warp are at different collectives");
  warp.collective = which;
  warp.arguments[thread_ % kWarpLanes] = arguments;
  if (++warp.arrived == kWarpLanes) {
    complete(which, warp.arguments);
    warp.arrived = 0;
    ++warp.generation;
    return;
  }
  fiber_->status = Fiber::Status::at_warp;
  fiber_->waits_for = warp.generation;
  suspend();
}

void Device::sync_block() {
  if (++cta_->arrived == cta_->launch->threads) {
    cta_->arrived = 0;
    ++cta_->generation;
    pass_barrier();
    return;
  }
  fiber_->status = Fiber::Status::at_block;
  fiber_->waits_for = cta_->generation;
  suspend();
}

void Device::pause() {
  fiber_->status = Fiber::Status::paused;
  suspend();
}

// ---- Asynchronous copies.

void Device::check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
}

void Device::copy_async(void* to, const void* from, size_t bytes) {
  check_aligned(to, bytes);
  check_aligned(from, bytes);
  std::memset(to, kPoison, bytes);
  fiber_->copies.back().push_back({to, from, bytes});
}

void Device::commit_copies() {
  fiber_->copies.emplace_back();
}

void Device::wait_copies(size_t pending) {
  if (options_.fault == Fault::short_copy_wait) ++pending;
  auto& groups = fiber_->copies;
  while (groups.size() > pending + 1) {
    for (const Copy& copy : groups.front()) {
      if (copy.from) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

// ---- Memory that CTAs share.

// What any thread of the CTA has stored, and what any has acquired, is ordered before what all do from here
// on.
void Device::pass_barrier() {
  if (options_.fault != Fault::no_barrier_before_release) cta_->ordered = cta_->event;
  ++cta_->event;
  if (options_.fault == Fault::no_barrier_after_acquire) return;
  for (Fiber& f : cta_->fibers) {
    join(cta_->clock, f.acquired);
    f.acquired.clear();
  }
}

// Before what the running thread does next.
bool Device::is_ordered(const Stored& stored) const {
  if (stored.cta == cta_->id) return stored.thread == thread_ || stored.event <= cta_->ordered;
  const auto is_in = [&](const Clock& clock) {
    return has(clock, stored.cta, kAllThreads, stored.event) ||
           has(clock, stored.cta, stored.thread, stored.event);
  };
  return is_in(cta_->clock) || is_in(fiber_->acquired);
}

void Device::watch_load(const void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) {
    const auto found = stored_.find(reinterpret_cast<uintptr_t>(address) + i);
    if (found == stored_.end()) fail("a load between CTAs reads what no CTA has stored");
    if (!is_ordered(found->second)) {
      fail("a load between CTAs is not ordered after the store by CTA " + std::to_string(found->second.cta) +
           ", thread " + std::to_string(found->second.thread));
    }
  }
}

void Device::watch_store(const void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) {
    Stored& stored = stored_[reinterpret_cast<uintptr_t>(address) + i];
    if (stored.event != 0 && !is_ordered(stored)) fail("two stores between CTAs are not ordered");
    stored = {cta_->id, thread_, cta_->event};
  }
}

uint64_t Device::load(uint64_t* word) {
  join(fiber_->loaded, released_[word]);
  return *word;
}

void Device::fence_acquire() {
  if (options_.fault != Fault::unordered_acquire) join(fiber_->acquired, fiber_->loaded);
}

void Device::store(uint64_t* word, uint64_t value, bool release) {
  if (options_.fault == Fault::flags_stay_up && value == 0) return;
  if (release && options_.fault != Fault::unordered_release) {
    Clock& released = released_[word] = cta_->clock;
    join(released, fiber_->acquired);
    released[{cta_->id, kAllThreads}] = cta_->ordered;
    released[{cta_->id, thread_}] = cta_->event++;
  } else {
    released_.erase(word);
  }
  *word = value;
}

uint64_t Device::fetch_add(uint64_t* word, uint64_t value) {
  const uint64_t before = *word;
  *word += value;
  if (options_.fault == Fault::reversed_tickets && word == ticket_) {
    constexpr uint64_t kCount = (1 << 20) - 1;
    return (before & ~kCount) | (num_ctas() - 1 - tickets_taken_++);
  }
  return before;
}

void Device::compare_exchange(uint64_t* word, uint64_t expected, uint64_t desired) {
  if (*word != expected) return;
  *word = desired;
  ticket_ = word;
}

}  // namespace lean::emulation
