// What a backend is to the ops: a function for each, of plain parameters that are checked but for the numbers
// inside tensors (see bad_numbers.h).
#pragma once

#include <cstdint>
#include <functional>

#include "append.h"
#include "params.h"

namespace lean {

// Where a GPU's work is queued. A CPU has none, and is done when its function returns.
struct Queue {
  int device;  // the current one
  void* stream;
  std::function<void*(int64_t bytes)>
      allocate;  // device memory, 16-byte aligned, kept until the work is done
};

struct Backend {
  void (*decode)(const DecodeParams&, const Queue&);
  void (*append_kv)(const AppendParams&, const Queue&);
  void (*merge_states)(const MergeParams&, const Queue&);
};

}  // namespace lean
