// What all CPU kernels need of their tensors: raw pointers and strides of each view, per-thread scratch.
#pragma once

#include <ATen/ops/empty.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <array>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "kernels.h"

namespace ear_ops::cpu {

inline Kind kind_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Kind::kFloat32;
    case at::kDouble:
      return Kind::kFloat64;
    case at::kBFloat16:
      return Kind::kBFloat16;
    case at::kHalf:
      return Kind::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": expected float32, float64, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

inline at::ScalarType accumulator_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Kernels walk rows whose elements lie side by side; every other stride is free.
inline Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

// The two views of one input: both tensors, or the halves of the first.
inline std::array<Tensor, 2> split_views(const Tensor& first, const OptionalTensor& second, int64_t pairs) {
  if (second) return {with_dense_rows(first), with_dense_rows(*second)};
  const Tensor both = with_dense_rows(first);
  return {both.narrow(0, 0, pairs), both.narrow(0, pairs, pairs)};
}

// [B, H, L, D] as bytes.
struct Heads {
  char* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;  // row_stride in elements, the others in bytes

  Heads() = default;
  explicit Heads(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        batch_stride(t.stride(0) * t.element_size()),
        head_stride(t.stride(1) * t.element_size()),
        row_stride(t.stride(2)) {}
  char* head(int64_t b, int64_t h) const { return data + b * batch_stride + h * head_stride; }
};

// Hands out aligned pieces of one block. With no block it only adds up what would be needed. Under AddressSanitizer
// what lies between two pieces is out of bounds.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    used_ += 64;
    if (base_) ASAN_POISON_MEMORY_REGION(piece + count, base_ + used_ - reinterpret_cast<char*>(piece + count));
#endif
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// `count` arenas of `bytes` each, in one allocation of torch's allocator.
class Scratch {
 public:
  Scratch(int64_t count, int64_t bytes) : stride_(bytes + 64), block_(at::empty({stride_ * count}, at::kByte)) {}
  Arena of(int64_t index) const {
    char* base = static_cast<char*>(block_.data_ptr()) + index * stride_;
    return Arena(base + (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64);
  }

 private:
  int64_t stride_;
  Tensor block_;
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline const uint8_t* mask_row(const OptionalTensor& mask, int64_t row) {  // mask: contiguous bool [rows, n]
  return mask ? static_cast<const uint8_t*>(mask->data_ptr()) + row * mask->size(1) : nullptr;
}

inline OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : tensor;
}

}  // namespace ear_ops::cpu
