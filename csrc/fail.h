// How bad input is refused: with a std::invalid_argument, which Python sees as a ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace lean {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace lean
