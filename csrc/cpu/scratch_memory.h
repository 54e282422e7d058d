#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace lean::cpu {

// Memory that a calling thread keeps from call to call, so that decoding allocates nothing once
// warm.
class ScratchMemory {
 public:
  float* reserve(size_t floats) {
    if (floats > size_) {
      memory_.reset();
      memory_.reset(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment)));
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<float, Free> memory_;
  size_t size_ = 0;
};

}  // namespace lean::cpu
