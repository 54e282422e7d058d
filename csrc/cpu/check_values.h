// What the CPU backend refuses before it reads or writes anything.
#pragma once

#include "params.h"

namespace lean::cpu {

// Throws std::invalid_argument where a length, a slot, a block or a count of queries is out of range, naming
// it. Entries of block_table that no row sees may hold anything.
void check_values(const DecodeParams& params);

}  // namespace lean::cpu
