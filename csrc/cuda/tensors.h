// From tensors to the raw memory that kernels take. All memory comes from torch's allocator and nothing waits for the
// device, so that a call can be captured in a CUDA graph.
#pragma once

#include "../checks.h"
#include "../views.h"
#include "args.h"
#include "launch.h"

namespace ear_ops::cuda {

// Sizes are held in int.
constexpr DeviceLimits kLimits = {"float32, bfloat16 or float16 on CUDA", false, int64_t(1) << 30};

inline Element element_of(const Tensor& tensor) {  // of a tensor that was checked
  switch (tensor.scalar_type()) {
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kFloat16;
    default:
      return Element::kFloat32;
  }
}

inline const uint8_t* mask_of(const OptionalTensor& mask) {  // contiguous
  return mask ? reinterpret_cast<const uint8_t*>(memory_of(*mask)) : nullptr;
}

inline float* floats(const Tensor& tensor) { return reinterpret_cast<float*>(memory_of(tensor)); }

// Whether rows [..., n] of a tensor can be read 16 bytes at a time.
inline bool reads_16_bytes(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, bytes = tensor.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && tensor.stride(last) == 1 &&
                 tensor.size(last) * bytes % 16 == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (tensor.size(i) <= 1 || tensor.stride(i) * bytes % 16 == 0);
  return aligned;
}

inline Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }
inline HeadsPointer heads_pointer(const Tensor& t) { return {memory_of(t), strides_of(t), nullptr}; }

// Memory for the gradient of an input.
inline Tensor make_like(const Tensor& input) { return make(input.sizes(), input.options()); }
inline void* memory_or_null(const Tensor& tensor) { return tensor.defined() ? memory_of(tensor) : nullptr; }

}  // namespace ear_ops::cuda
