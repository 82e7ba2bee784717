// The arguments of the kernels that compare attention straight from Q and K.
#pragma once

#include "../comparison.h"
#include "args.h"

namespace ear_ops::cuda {

constexpr int kOwned = 64;    // queries (in the forward and for their gradient) or keys that a block of threads owns
constexpr int kRowStats = 6;  // of a query: maximum, 1 / sum of exponentials, and one more, each of both views; at most

struct BiasPointer {  // [B, H, L, S]; null without bias
  const float* data;
  Strides strides;
};

struct QKArgs {
  HeadsPointer query[2], key[2];  // of each view
  BiasPointer bias[2];
  const uint8_t* key_mask;         // [2B, S]; null: all real
  const uint8_t* counted_queries;  // [B, L]; null: all count
  float* row_stats;                // [6, B, H, L], or nothing where row_stats_of says so
  float* block_sums;               // [B, H, qk_forward_blocks]
  const float* grad_sums;          // [B, H]
  int64_t pairs;
  int heads, key_heads, queries, keys, dim;
  float scale;
  bool is_causal;
  int window;       // 0: none
  bool vectorized;  // rows of both inputs can be read 16 bytes at a time
};

inline int blocks_of(int count) { return (count + kOwned - 1) / kOwned; }  // of threads, that own all of them

// How many blocks of threads share the queries of one head in the forward.
int64_t qk_forward_blocks(Comparison comparison, Element element, const QKArgs& args);

// Null, or what went wrong. The forward writes row_stats and block_sums, the backward the gradients that are not null.
const char* launch_qk_forward(Comparison comparison, Element element, const QKArgs& args, void* stream);
const char* launch_qk_backward(Comparison comparison, Element element, const QKArgs& args, void* stream);

}  // namespace ear_ops::cuda
