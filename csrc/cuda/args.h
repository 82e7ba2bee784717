// What the arguments of all kernels are made of: raw memory, with no torch and no CUDA in it.
#pragma once

#include <cstdint>

namespace ear_ops::cuda {

enum class Element { kFloat32, kBFloat16, kFloat16 };

struct Strides {  // in elements
  int64_t batch, head, row, column;
};

struct HeadsPointer {  // the memory of one view of [B, H, L, D]
  const void* data;
  Strides strides;
  void* gradient;  // contiguous; null where it is not asked for
};

}  // namespace ear_ops::cuda
