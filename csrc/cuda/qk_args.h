// The arguments of the qk_attention_mse kernels, as raw memory: no torch and no CUDA in here.
#pragma once

#include <cstdint>

namespace ear_ops::cuda {

enum class Element { kFloat32, kBFloat16, kFloat16 };

constexpr int kBlockRows = 64;  // queries (for their gradient and the forward) or keys that a block of threads owns
constexpr int kRowStats = 6;    // of a query: maximum, 1 / sum of exponentials, and d, each of both views

struct Strides {  // in elements
  int64_t batch, head, row, column;
};

struct HeadsView {  // one view of the queries [B, H, L, D] or the keys [B, H_kv, S, D]
  const void* data;
  Strides strides;
  void* gradient;  // contiguous; null where it is not asked for
};

struct BiasView {  // [B, H, L, S]; null without bias
  const float* data;
  Strides strides;
};

struct QKArgs {
  HeadsView query[2], key[2];
  BiasView bias[2];
  const uint8_t* key_mask;         // [2B, S]; null: all real
  const uint8_t* counted_queries;  // [B, L]; null: all count
  float* row_stats;                // [6, B, H, L]
  float* block_sums;               // [B, H, blocks of queries]
  const float* grad_sums;          // [B, H]
  int64_t pairs;
  int heads, key_heads, queries, keys, dim;
  float scale;
  bool is_causal;
  int window;   // 0: none
  bool pieces;  // rows of both inputs can be read 16 bytes at a time
};

inline int blocks_of(int rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// Null, or what went wrong. The forward writes row_stats and block_sums, the backward the gradients that are not null.
const char* qk_attention_mse_forward(Element element, const QKArgs& args, void* stream);
const char* qk_attention_mse_backward(Element element, const QKArgs& args, void* stream);

}  // namespace ear_ops::cuda
