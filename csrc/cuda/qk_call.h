// The arguments of the kernels that compare attention straight from Q and K, out of an AttentionProblem.
#pragma once

#include <ATen/ops/roll.h>

#include <algorithm>

#include "qk_args.h"
#include "tensors.h"

namespace ear_ops::cuda {

// An operator that compares attention. The kernels of a divergence know one direction; the other one exchanges views.
struct Comparing {
  const char* name;
  Comparison comparison;
  bool exchanged;  // view v of the kernels is view 1 - v of the problem

  int view(int v) const { return exchanged ? 1 - v : v; }
};

struct Call {  // the arguments of the kernels, and what keeps their memory alive
  QKArgs args{};
  Element element;
  OptionalTensor key_mask, counted_queries;

  Call(const Comparing& op, const AttentionProblem& problem, const AttentionSizes& sizes)
      : element(element_of(problem.query)),
        key_mask(problem.key_mask && op.exchanged ? problem.key_mask->roll(sizes.pairs, 0)
                                                  : contiguous(problem.key_mask)),
        counted_queries(contiguous(problem.counted_queries)) {
    args.pairs = sizes.pairs;
    args.heads = static_cast<int>(sizes.heads), args.key_heads = static_cast<int>(sizes.key_heads);
    args.queries = static_cast<int>(sizes.queries), args.keys = static_cast<int>(sizes.keys);
    args.dim = static_cast<int>(sizes.dim);
    args.scale = static_cast<float>(problem.scale), args.is_causal = problem.is_causal;
    args.window = static_cast<int>(std::min<int64_t>(problem.window, int64_t(1) << 30));
    args.key_mask = mask_of(key_mask), args.counted_queries = mask_of(counted_queries);
    args.vectorized = true;
    const auto queries = split_views(problem.query, problem.query_aug, sizes.pairs);
    const auto keys = split_views(problem.key, problem.key_aug, sizes.pairs);
    for (int v = 0; v < 2; ++v) {
      const int view = op.view(v);
      args.query[v] = heads_pointer(queries[view]), args.key[v] = heads_pointer(keys[view]);
      args.vectorized = args.vectorized && reads_16_bytes(queries[v]) && reads_16_bytes(keys[v]);
      if (!problem.attn_bias) continue;
      const Tensor& bias = view == 1 && problem.attn_bias_aug ? *problem.attn_bias_aug : *problem.attn_bias;
      args.bias[v] = {floats(bias), strides_of(bias)};
    }
  }
};

}  // namespace ear_ops::cuda
