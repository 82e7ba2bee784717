// What the CPU kernels need of a tensor: its element type, and its memory with dense rows.
#pragma once

#include <array>

#include "../checks.h"
#include "../views.h"
#include "kernels.h"

namespace ear_ops::cpu {

// Positions within a sequence are held in int32.
constexpr DeviceLimits kLimits = {"float32, float64, bfloat16 or float16", true, int64_t(1) << 31};

inline Kind kind_of(at::ScalarType dtype) {  // one of those that checks let through
  switch (dtype) {
    case at::kDouble:
      return Kind::kFloat64;
    case at::kBFloat16:
      return Kind::kBFloat16;
    case at::kHalf:
      return Kind::kFloat16;
    default:
      return Kind::kFloat32;
  }
}
inline Kind kind_of(const Tensor& tensor) { return kind_of(tensor.scalar_type()); }

// Calls body with the type that kernels accumulate in as its template argument.
template <typename Body>
void with_accumulator(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == at::kDouble) {
    body.template operator()<double>();
  } else {
    body.template operator()<float>();
  }
}

// Kernels walk rows of a tensor whose elements lie side by side; every other stride is free.
inline Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

inline std::array<Tensor, 2> dense_views(const Tensor& first, const OptionalTensor& second, int64_t pairs) {
  return split_views(with_dense_rows(first), second ? OptionalTensor(with_dense_rows(*second)) : second, pairs);
}

// The memory of one view of [B, H, L, D].
struct HeadsPointer {
  char* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;  // row_stride in elements, the others in bytes

  HeadsPointer() = default;
  explicit HeadsPointer(const Tensor& t)  // an undefined tensor has no memory
      : data(t.defined() ? static_cast<char*>(t.data_ptr()) : nullptr) {
    if (!data) return;
    batch_stride = t.stride(0) * t.element_size();
    head_stride = t.stride(1) * t.element_size();
    row_stride = t.stride(2);
  }
  char* head(int64_t b, int64_t h) const { return data + b * batch_stride + h * head_stride; }
};

inline const uint8_t* mask_row(const OptionalTensor& mask, int64_t row) {  // mask: contiguous bool [rows, n]
  return mask ? static_cast<const uint8_t*>(mask->data_ptr()) + row * mask->size(1) : nullptr;
}

}  // namespace ear_ops::cpu
