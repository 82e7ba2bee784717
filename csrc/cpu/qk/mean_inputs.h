// The memory of a checked MeanHeadsProblem, and what the averages over its heads are compared by.
#pragma once

#include <algorithm>
#include <vector>

#include "../../comparison.h"
#include "../tensors.h"

namespace ear_ops::cpu {

// One view. Its heads are others than those of the other view.
struct ViewInputs {
  int64_t heads, key_heads, dim;
  double scale;
  HeadsPointer query, key;
  HeadsPointer bias;            // of the accumulator's type; data null without bias
  int64_t bias_key_stride = 0;  // of the bias' last dimension, 0 where it is broadcast

  int64_t group() const { return heads / key_heads; }  // query heads that share a key head
};

struct MeanInputs {
  int64_t pairs, queries, keys;
  Comparison comparison;
  bool exchanged;  // the problem's second view is view 0 here
  bool is_causal;
  int64_t window;  // 0: none
  Kind kind;
  ViewInputs view[2];
  OptionalTensor key_mask, counted_queries;
  std::vector<double> weights;  // [H] of both views; empty: 1 / H of each
  std::vector<Tensor> keep_alive;

  MeanInputs(const MeanHeadsProblem& problem, const MeanHeadsSizes& sizes, Comparison comparison, bool exchanged)
      : pairs(sizes.pairs),
        queries(sizes.queries),
        keys(sizes.keys),
        comparison(comparison),
        exchanged(exchanged),
        is_causal(problem.is_causal),
        window(problem.window),
        kind(kind_of(problem.query)),
        key_mask(contiguous(problem.key_mask)),
        counted_queries(contiguous(problem.counted_queries)) {
    const auto of_queries = dense_views(problem.query, problem.query_aug, pairs);
    const auto of_keys = dense_views(problem.key, problem.key_aug, pairs);
    for (int v = 0; v < 2; ++v) {
      const int from = view_of_problem(v);
      view[v] = {sizes.heads[from],
                 sizes.key_heads[from],
                 sizes.dim[from],
                 from ? problem.scale_aug : problem.scale,
                 HeadsPointer(of_queries[from]),
                 HeadsPointer(of_keys[from]),
                 {}};
      keep_alive.push_back(of_queries[from]);
      keep_alive.push_back(of_keys[from]);
      if (!problem.attn_bias) continue;
      const Tensor& bias = from && problem.attn_bias_aug ? *problem.attn_bias_aug : *problem.attn_bias;
      view[v].bias = HeadsPointer(bias);
      view[v].bias_key_stride = bias.stride(3);
    }
    if (!problem.head_weights) return;
    const Tensor of_heads = problem.head_weights->to(at::kDouble).contiguous();
    weights.assign(of_heads.data_ptr<double>(), of_heads.data_ptr<double>() + of_heads.numel());
  }

  // Whether each counted query is compared with each real key in each head.
  bool compares_all() const {
    return queries > 0 && keys > 0 && !is_causal && !window && std::ranges::count(weights, 0.0) == 0;
  }
  // Whether each query is compared with each key in each head.
  bool counts_all() const { return compares_all() && !key_mask && !counted_queries; }

  int view_of_problem(int v) const { return exchanged ? 1 - v : v; }
  const uint8_t* key_mask_of(int v, int64_t b) const { return mask_row(key_mask, view_of_problem(v) * pairs + b); }

  // An average is the sum of weight times P_h over the heads, over the divisor. Without weights of the user that is
  // rounded once, so that rows of one key are equal however many heads there are.
  double weight(int64_t head) const { return weights.empty() ? 1.0 : weights[head]; }
  double divisor(int v) const { return weights.empty() ? view[v].heads : 1.0; }
};

}  // namespace ear_ops::cpu
