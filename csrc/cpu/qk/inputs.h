// The memory of a checked AttentionProblem, and what its views are compared by.
#pragma once

#include "../tensors.h"

namespace ear_ops::cpu {

struct QKInputs : AttentionSizes {
  Comparison comparison;
  bool exchanged;  // the problem's second view is view 0 here
  double scale;
  bool is_causal;
  int64_t window;  // 0: none
  Kind kind;
  std::array<HeadsPointer, 2> query, key;    // of each view
  std::array<HeadsPointer, 2> bias;          // of the accumulator's type; data null without bias
  std::array<int64_t, 2> bias_key_stride{};  // of the bias' last dimension, 0 where it is broadcast
  OptionalTensor key_mask, counted_queries;
  std::array<Tensor, 4> keep_alive;

  QKInputs(const AttentionProblem& problem, const AttentionSizes& sizes, Comparison comparison, bool exchanged)
      : AttentionSizes(sizes),
        comparison(comparison),
        exchanged(exchanged),
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
      const int from = view_of_problem(v);
      query[v] = HeadsPointer(queries[from]);
      key[v] = HeadsPointer(keys[from]);
      if (!problem.attn_bias) continue;
      const Tensor& of_view = from == 1 && problem.attn_bias_aug ? *problem.attn_bias_aug : *problem.attn_bias;
      bias[v] = HeadsPointer(of_view);
      bias_key_stride[v] = of_view.stride(3);
    }
  }

  int view_of_problem(int v) const { return exchanged ? 1 - v : v; }
  const uint8_t* key_mask_of(int v, int64_t b) const { return mask_row(key_mask, view_of_problem(v) * pairs + b); }
};

}  // namespace ear_ops::cpu
