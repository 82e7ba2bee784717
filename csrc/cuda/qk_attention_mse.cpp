// Compares attention matrices straight from Q and K, on CUDA.
#include <ATen/ops/sum.h>

#include <algorithm>

#include "../register.h"
#include "qk_args.h"
#include "tensors.h"

namespace ear_ops::cuda {

namespace {

constexpr const char* kOp = "qk_attention_mse";
static_assert(kRowStats == row_stats_of(Comparison::kMse));

struct Call {  // the arguments of the kernels, and what keeps their memory alive
  QKArgs args{};
  Element element;
  OptionalTensor key_mask, counted_queries;

  Call(const AttentionProblem& problem, const AttentionSizes& sizes)
      : element(element_of(problem.query)),
        key_mask(contiguous(problem.key_mask)),
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
      args.query[v] = heads_pointer(queries[v]), args.key[v] = heads_pointer(keys[v]);
      args.vectorized = args.vectorized && reads_16_bytes(queries[v]) && reads_16_bytes(keys[v]);
      if (!problem.attn_bias) continue;
      const Tensor& bias = v == 1 && problem.attn_bias_aug ? *problem.attn_bias_aug : *problem.attn_bias;
      args.bias[v] = {floats(bias), strides_of(bias)};
    }
  }
};

std::tuple<Tensor, Tensor> qk_attention_mse(const AttentionProblem& problem) {
  const Launch launch(problem.query);
  const AttentionSizes sizes = check(kOp, problem, kLimits);
  Call call(problem, sizes);
  const auto options = problem.query.options().dtype(at::kFloat);
  const Tensor row_stats = make({kRowStats, sizes.pairs, sizes.heads, sizes.queries}, options);
  const int64_t blocks = qk_forward_blocks(call.element, call.args);
  const Tensor block_sums = make({sizes.pairs, sizes.heads, blocks}, options);
  call.args.row_stats = floats(row_stats), call.args.block_sums = floats(block_sums);
  launch.check(kOp, launch_qk_forward(call.element, call.args, launch.stream()));
  return {blocks == 1 ? block_sums.view({sizes.pairs, sizes.heads}) : block_sums.sum(-1), row_stats};
}

std::vector<Tensor> qk_attention_mse_backward(const Tensor& grad_sums, const AttentionProblem& problem,
                                              const Tensor& row_stats, const c10::List<bool>& needs) {
  const Launch launch(problem.query);
  const AttentionSizes sizes = check_backward(kOp, problem, kLimits, Comparison::kMse, grad_sums, row_stats, needs);
  Call call(problem, sizes);
  const Gradients gradients = make_gradients({{problem.query, problem.query_aug}, {problem.key, problem.key_aug}},
                                             needs, sizes.pairs, make_like);
  for (int v = 0; v < 2; ++v) {
    call.args.query[v].gradient = memory_or_null(gradients.views[0][v]);
    call.args.key[v].gradient = memory_or_null(gradients.views[1][v]);
  }
  const Tensor upstream = grad_sums.to(at::kFloat).contiguous(), stats = row_stats.contiguous();
  call.args.row_stats = floats(stats), call.args.grad_sums = floats(upstream);
  launch.check(kOp, launch_qk_backward(call.element, call.args, launch.stream()));
  return gradients.returned;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(EAR_OPS_LIBRARY, m) {
  register_operator<&qk_attention_mse, &qk_attention_mse_backward>(m, kOp, kDispatchKey);
}

}  // namespace ear_ops::cuda
