// The arguments of the attention_mse kernels.
#pragma once

#include "args.h"

namespace ear_ops::cuda {

struct MapsArgs {
  HeadsPointer attn[2];            // [B, H, L, S] of each view
  const uint8_t* key_mask;         // [2B, S]; null: all real
  const uint8_t* counted_queries;  // [B, L]; null: all count
  float* block_sums;               // [B, H, blocks of threads]
  const float* grad_sums;          // [B, H]
  int64_t pairs;
  int heads, queries, keys;
  bool vectorized;     // rows can be read 16 bytes at a time
  int rows_per_block;  // see maps_rows_per_block
};

inline int maps_rows_per_block(int keys) {  // about 16 Ki elements of each view
  const int rows = 16384 / (keys < 1 ? 1 : keys);
  return rows < 1 ? 1 : rows;
}

// Null, or what went wrong.
const char* launch_maps_forward(Element element, const MapsArgs& args, void* stream);
const char* launch_maps_backward(Element element, const MapsArgs& args, void* stream);

}  // namespace ear_ops::cuda
