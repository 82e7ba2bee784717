// The arguments of the attention_mse and pooled_distance kernels, as raw memory: no torch and no CUDA in here.
#pragma once

#include <cstdint>

#include "qk_args.h"

namespace ear_ops::cuda {

struct MapsArgs {                  // attention_mse
  HeadsView attn[2];               // [B, H, L, S] of each view
  const uint8_t* key_mask;         // [2B, S]; null: all real
  const uint8_t* counted_queries;  // [B, L]; null: all count
  float* block_sums;               // [B, H, blocks]
  const float* grad_sums;          // [B, H]
  int64_t pairs;
  int heads, queries, keys;
  bool pieces;         // rows can be read 16 bytes at a time
  int rows_per_block;  // see maps_rows_per_block
};

inline int maps_rows_per_block(int keys) {  // about 16 Ki elements of each view
  const int rows = 16384 / (keys < 1 ? 1 : keys);
  return rows < 1 ? 1 : rows;
}

struct HiddenView {  // one view of [B, L, C]
  const void* data;
  int64_t batch_stride, row_stride, column_stride;  // in elements
  void* gradient;                                   // contiguous; null where it is not asked for
};

struct PooledArgs {  // pooled_distance
  HiddenView hidden[2];
  const uint8_t* mask;     // [2B, L]; null: all real
  float* difference;       // [B, C], of the means
  float* block_sums;       // [B, blocks]
  const float* grad_sums;  // [B]
  int64_t pairs;
  int length, features;
  bool pieces;  // rows can be read 16 bytes at a time
};

// Features of one block of threads: eight accesses side by side.
inline int pooled_slice(Element element) { return element == Element::kFloat32 ? 32 : 64; }

// Null, or what went wrong.
const char* attention_mse_forward(Element element, const MapsArgs& args, void* stream);
const char* attention_mse_backward(Element element, const MapsArgs& args, void* stream);
const char* pooled_distance_forward(Element element, const PooledArgs& args, void* stream);
const char* pooled_distance_backward(Element element, const PooledArgs& args, void* stream);

}  // namespace ear_ops::cuda
