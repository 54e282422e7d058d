// Chooses a kernel and a grid, lays out the workspace, and launches.
#include "cuda/backend.h"

#include <algorithm>
#include <atomic>
#include <random>
#include <sstream>
#include <stdexcept>

#include "cuda/decode/config.h"
#include "cuda/decode/fix_up.h"
#include "cuda/host.h"
#include "fail.h"

namespace lean::cuda {
namespace {

// A CTA that gets fewer LeanTiles costs more than it saves. Not yet measured on a GPU.
constexpr int64_t kMinTilesPerCta = 2;

// The kernel that wastes least: rows beyond 16 in tiles of 32 where there are such, else in more row blocks.
const Kernel& choose_kernel(const DecodeParams& p) {
  // Packed queries count by their average, so that the choice depends on shapes alone.
  const int64_t q_len = p.cu_seqlens_q ? ceil_div(p.query_tokens, max(1, p.batch)) : p.query_tokens;
  const int64_t rows = p.group() * q_len;
  const bool quantised = p.quantised();
  const Kernel* best = nullptr;
  const auto padding = [&](const Kernel& k) { return k.head_dim + k.head_dim_v; };
  for (const Kernel& k : kernels_of(p.dtype)) {
    if (k.quantised != quantised || k.head_dim < p.k.dims || k.head_dim_v < p.v.dims) continue;
    if (k.rows > kTileRows && rows <= kTileRows) continue;
    if (best == nullptr || padding(k) < padding(*best) ||
        (padding(k) == padding(*best) && k.rows > best->rows)) {
      best = &k;
    }
  }
  if (best == nullptr) {
    fail("decode: no CUDA kernel for head_dim ", p.k.dims, " and head_dim_v ", p.v.dims,
         quantised ? " in quantised caches" : "");
  }
  return *best;
}

// What is known of devices has a place for each.
void check_index(int device) {
  if (device >= 0 && device < kMaxDevices) return;
  throw std::runtime_error("lean_attention: the device is cuda:" + std::to_string(device) +
                           "; it must be one of the first " + std::to_string(kMaxDevices));
}

// CTAs of the kernel that the device holds at a time.
int64_t resident_ctas(const Kernel& kernel, int device) {
  check_index(device);
  std::atomic<int64_t>& cached = kernel.resident_ctas[device];
  if (const int64_t known = cached.load(std::memory_order_relaxed)) return known;
  const hw::DeviceFacts facts = hw::device_facts(device);
  if (facts.capability < 80) {
    std::ostringstream message;
    message << "decode: cuda:" << device << " has compute capability " << facts.capability / 10 << "."
            << facts.capability % 10 << "; the kernels need 8.0 (Ampere) or newer";
    throw std::runtime_error(message.str());
  }
  const int64_t ctas = int64_t{facts.sms} * hw::ctas_per_sm(kernel.function, kThreads, kernel.shared_bytes);
  if (ctas == 0) {
    std::ostringstream message;
    message << "decode: an SM of cuda:" << device << " cannot hold the kernel's " << kernel.shared_bytes
            << " bytes of shared memory";
    throw std::runtime_error(message.str());
  }
  cached.store(ctas, std::memory_order_relaxed);
  return ctas;
}

// A number that no other launch of this process has, and that memory holds by chance only once in 2^44.
uint64_t new_nonce() {
  static std::atomic<uint64_t> counter = [] {
    std::random_device random;
    return (uint64_t{random()} << 32) | random();
  }();
  for (;;) {
    const uint64_t nonce = counter.fetch_add(1, std::memory_order_relaxed) << kTicketBits;
    if (nonce != 0) return nonce;
  }
}

// Places arrays one after another, each where a GPU's L2 has a line begin.
struct Layout {
  int64_t bytes = 0;

  int64_t add(int64_t count, int64_t size) {
    const int64_t at = bytes;
    bytes = round_up(at + count * size, 128);
    return at;
  }
};

// A device's variable may have no constructor, so this is the memory of an ErrorRecord. It is zero at first.
alignas(ErrorRecord) LEAN_DEVICE_VARIABLE unsigned char error_record[sizeof(ErrorRecord)];

// LeanTiles that a call's sequences may have at most, by its shapes alone.
int64_t most_tiles_of_sequences(const DecodeParams& p, const Geometry& geometry) {
  if (!p.cu_seqlens_q) {
    return p.sequences() * geometry.sequence_tiles({p.pages.capacity(), 0, p.query_tokens});
  }
  const int64_t row_blocks = p.query_tokens * p.group() / geometry.rows_per_block + p.batch;
  return max(1, p.num_kv_heads * row_blocks * geometry.block_tiles({0, p.pages.capacity()}));
}

// And those of nodes. Of each row the nodes have other tokens; each has one row block and one LeanTile at
// most that are not full.
int64_t most_tiles(const DecodeParams& p, const Geometry& geometry) {
  const int64_t of_sequences = most_tiles_of_sequences(p, geometry);
  if (p.shared.count == 0) return of_sequences;
  const int64_t blocks = p.total_query_tokens() * p.group() / geometry.rows_per_block + 1;
  const int64_t tiles = geometry.block_tiles({0, p.pages.capacity()});
  return of_sequences + p.num_kv_heads * (blocks * tiles + p.shared.count * (blocks + tiles));
}

}  // namespace

ErrorRecord* error_record_of(int device) {
  static std::atomic<ErrorRecord*> records[kMaxDevices];
  check_index(device);
  if (ErrorRecord* known = records[device].load(std::memory_order_relaxed)) return known;
  ErrorRecord* found = reinterpret_cast<ErrorRecord*>(hw::device_address(error_record));
  records[device].store(found, std::memory_order_relaxed);
  return found;
}

void decode(const DecodeParams& p, const Queue& queue) {
  if (p.dtype == DType::float32) {
    fail("decode: q is torch.float32; on cuda it must be torch.float16 or torch.bfloat16");
  }
  const Kernel& kernel = choose_kernel(p);
  // The grid depends on shapes alone: lengths are read in the kernel, where CTAs beyond the use of the actual
  // lengths leave at once. A range per LeanTile is all that can be of use.
  const int64_t most = most_tiles(p, p.geometry(kernel.rows, kernel.tile_tokens));
  const Geometry32 geometry = geometry32(p, kernel.rows, kernel.tile_tokens, most);
  const int64_t resident = resident_ctas(kernel, queue.device);  // also checks the device
  const int64_t ctas =
      p.num_ctas > 0 ? std::min(p.num_ctas, most) : useful_ctas(most, resident, kMinTilesPerCta);
  if (ctas > kMaxCtas) {
    fail("decode: num_ctas is ", p.num_ctas, "; on cuda it must be at most ", kMaxCtas);
  }

  const int64_t partial_floats = round_up(kernel.partial_floats, 32);
  const int64_t state_rows = p.shared.count > 0 ? p.group() * p.total_query_tokens() : 0;
  const int64_t states = p.num_kv_heads * state_rows;
  Layout layout;
  const int64_t ticket_at = layout.add(1, sizeof(uint64_t)), flags_at = layout.add(ctas, sizeof(uint64_t)),
                partials_at = layout.add(ctas * partial_floats, sizeof(float)),
                state_flags_at = layout.add(states, sizeof(uint64_t)),
                states_at = layout.add(states * kernel.head_dim_v, sizeof(float)),
                state_sums_at = layout.add(states * 2, sizeof(float));
  char* memory = static_cast<char*>(hw::allocate_workspace(queue.allocate, layout.bytes));
  const auto words = [&](int64_t at) { return reinterpret_cast<uint64_t*>(memory + at); };
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(memory + at); };
  const Workspace workspace{
      .ticket = words(ticket_at),
      .flags = words(flags_at),
      .partials = floats(partials_at),
      .partial_floats = partial_floats,
      .nonce = new_nonce(),
      .state_flags = words(state_flags_at),
      .states = floats(states_at),
      .state_sums = floats(state_sums_at),
      .state_rows = state_rows,
  };
  hw::launch(kernel.function,
             decode_arguments(p, geometry, workspace, error_record_of(queue.device),
                              p.num_ctas == 0 ? kMinTilesPerCta : 1),
             ctas, kThreads, kernel.shared_bytes, queue.stream);
}

std::string take_error(int device) {
  const ErrorRecord record = hw::take_value(error_record_of(device));
  std::string text = describe(record.first);
  if (record.reports > 1) text += " (the first of " + std::to_string(record.reports) + " such)";
  return text;
}

std::vector<KernelFacts> kernel_facts() {
  std::vector<KernelFacts> facts;
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    for (const Kernel& k : kernels_of(dtype)) {
      facts.push_back({dtype, k.head_dim, k.head_dim_v, k.rows, k.quantised, kThreads, k.shared_bytes,
                       k.bytes_in_flight});
    }
  }
  return facts;
}

}  // namespace lean::cuda
