// In place of the system's: libtorch_cuda.so is there, and current_stream is its one function.
#pragma once

#include <cstdint>

#define RTLD_LAZY 1
#define RTLD_NOLOAD 4

int32_t current_stream(int32_t device, void** stream);

inline void* dlopen(const char*, int) {
  static char library;
  return &library;
}
inline void* dlsym(void*, const char*) {
  return reinterpret_cast<void*>(&current_stream);
}
