// The names that ops are registered under: torch.ops.lean_attn's, and those for inspection.
//
// A build that shares a process with another one has names of its own: -DLEAN_OP_LIBRARY=<name>.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#if !defined(LEAN_OP_LIBRARY)
#define LEAN_OP_LIBRARY lean_attn
#endif
#define LEAN_TOOLS_LIBRARY C10_CONCATENATE(LEAN_OP_LIBRARY, _tools)
