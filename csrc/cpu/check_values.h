// What the CPU backend refuses before it reads or writes anything.
#pragma once

#include "bad_numbers.h"
#include "cpu/sharing.h"

namespace lean::cpu {

// Throws std::invalid_argument with the number's text.
[[noreturn]] void refuse(const BadNumber& bad);

// Refuses the first number that is out of range.
void check_values(const DecodeParams& params, const Sharing& sharing);

}  // namespace lean::cpu
