// Memory that kernels work in, one arena for each thread.
#pragma once

#include <ATen/ops/empty.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace ear_ops::cpu {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Hands out aligned arrays, one after the other. Without memory it only adds up what would be needed. Under
// AddressSanitizer what lies between two arrays is out of bounds.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    T* array = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    used_ += 64;
    if (base_) ASAN_POISON_MEMORY_REGION(array + count, base_ + used_ - reinterpret_cast<char*>(array + count));
#endif
    return array;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// `count` arenas of `bytes` each, in one allocation of torch's allocator.
class Scratch {
 public:
  Scratch(int64_t count, int64_t bytes) : stride_(bytes + 64), memory_(at::empty({stride_ * count}, at::kByte)) {}
  Arena of(int64_t index) const {
    char* base = static_cast<char*>(memory_.data_ptr()) + index * stride_;
    return Arena(base + (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64);
  }

 private:
  int64_t stride_;
  at::Tensor memory_;
};

}  // namespace ear_ops::cpu
