// The arguments of the pooled_distance kernels.
#pragma once

#include "args.h"

namespace ear_ops::cuda {

struct HiddenPointer {  // the memory of one view of [B, L, C]
  const void* data;
  int64_t batch_stride, token_stride, feature_stride;  // in elements
  void* gradient;                                      // contiguous; null where it is not asked for
};

struct PooledArgs {
  HiddenPointer hidden[2];
  const uint8_t* mask;     // [2B, L]; null: all real
  float* difference;       // [B, C], of the means
  float* block_sums;       // [B, blocks of threads]
  const float* grad_sums;  // [B]
  int64_t pairs;
  int length, features;
  bool vectorized;  // rows can be read 16 bytes at a time
};

// Features of one block of threads: eight accesses side by side.
inline int pooled_slice(Element element) { return element == Element::kFloat32 ? 32 : 64; }

// Null, or what went wrong.
const char* launch_pooled_forward(Element element, const PooledArgs& args, void* stream);
const char* launch_pooled_backward(Element element, const PooledArgs& args, void* stream);

}  // namespace ear_ops::cuda
