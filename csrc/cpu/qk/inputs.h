// The memory of a checked AttentionProblem.
#pragma once

#include "../tensors.h"

namespace ear_ops::cpu {

struct QKInputs : AttentionSizes {
  double scale;
  bool is_causal;
  int64_t window;  // 0: none
  Kind kind;
  std::array<HeadsPointer, 2> query, key;    // of each view
  std::array<HeadsPointer, 2> bias;          // of the accumulator's type; data null without bias
  std::array<int64_t, 2> bias_key_stride{};  // of the bias' last dimension, 0 where it is broadcast
  OptionalTensor key_mask, counted_queries;
  std::array<Tensor, 4> keep_alive;

  QKInputs(const AttentionProblem& problem, const AttentionSizes& sizes)
      : AttentionSizes(sizes),
        scale(problem.scale),
        is_causal(problem.is_causal),
        window(problem.window),
        kind(kind_of(problem.query)),
        key_mask(contiguous(problem.key_mask)),
        counted_queries(contiguous(problem.counted_queries)) {
    const auto queries = dense_views(problem.query, problem.query_aug, pairs);
    const auto keys = dense_views(problem.key, problem.key_aug, pairs);
    keep_alive = {queries[0], queries[1], keys[0], keys[1]};
    for (int v = 0; v < 2; ++v) {
      query[v] = HeadsPointer(queries[v]);
      key[v] = HeadsPointer(keys[v]);
      if (!problem.attn_bias) continue;
      const Tensor& of_view = v == 1 && problem.attn_bias_aug ? *problem.attn_bias_aug : *problem.attn_bias;
      bias[v] = HeadsPointer(of_view);
      bias_key_stride[v] = of_view.stride(3);
    }
  }
};

}  // namespace ear_ops::cpu
