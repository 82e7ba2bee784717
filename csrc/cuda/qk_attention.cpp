// Compares attention matrices straight from Q and K, on CUDA.
#include <ATen/ops/roll.h>
#include <ATen/ops/sum.h>

#include <algorithm>

#include "../register.h"
#include "qk_args.h"
#include "tensors.h"

namespace ear_ops::cuda {

namespace {

// An operator that compares attention. The kernels of a divergence know one direction; the other one exchanges views.
struct Comparing {
  const char* name;
  Comparison comparison;
  bool exchanged;  // view v of the kernels is view 1 - v of the problem

  int view(int v) const { return exchanged ? 1 - v : v; }
};

constexpr Comparing kMse = {"qk_attention_mse", Comparison::kMse, false};
constexpr Comparing kKl = {"qk_attention_kl", Comparison::kKl, false};
constexpr Comparing kReverseKl = {"qk_attention_reverse_kl", Comparison::kKl, true};
constexpr Comparing kJs = {"qk_attention_js", Comparison::kJs, false};
constexpr Comparing kScoresMse = {"qk_scores_mse", Comparison::kScores, false};

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

template <const Comparing& kOp>
std::tuple<Tensor, Tensor> forward(const AttentionProblem& problem) {
  const Launch launch(problem.query);
  const AttentionSizes sizes = check(kOp.name, problem, kLimits);
  Call call(kOp, problem, sizes);
  const auto options = problem.query.options().dtype(at::kFloat);
  const Tensor row_stats = make({row_stats_of(kOp.comparison), sizes.pairs, sizes.heads, sizes.queries}, options);
  const int64_t blocks = qk_forward_blocks(kOp.comparison, call.element, call.args);
  const Tensor block_sums = make({sizes.pairs, sizes.heads, blocks}, options);
  call.args.row_stats = floats(row_stats), call.args.block_sums = floats(block_sums);
  launch.check(kOp.name, launch_qk_forward(kOp.comparison, call.element, call.args, launch.stream()));
  return {blocks == 1 ? block_sums.view({sizes.pairs, sizes.heads}) : block_sums.sum(-1), row_stats};
}

template <const Comparing& kOp>
std::vector<Tensor> backward(const Tensor& grad_sums, const AttentionProblem& problem, const Tensor& row_stats,
                             const c10::List<bool>& needs) {
  const Launch launch(problem.query);
  const AttentionSizes sizes = check_backward(kOp.name, problem, kLimits, kOp.comparison, grad_sums, row_stats, needs);
  Call call(kOp, problem, sizes);
  const Gradients gradients = make_gradients({{problem.query, problem.query_aug}, {problem.key, problem.key_aug}},
                                             needs, sizes.pairs, make_like);
  for (int v = 0; v < 2; ++v) {
    call.args.query[v].gradient = memory_or_null(gradients.views[0][kOp.view(v)]);
    call.args.key[v].gradient = memory_or_null(gradients.views[1][kOp.view(v)]);
  }
  const Tensor upstream = grad_sums.to(at::kFloat).contiguous(), stats = row_stats.contiguous();
  call.args.row_stats = floats(stats), call.args.grad_sums = floats(upstream);
  launch.check(kOp.name, launch_qk_backward(kOp.comparison, call.element, call.args, launch.stream()));
  return gradients.returned;
}

}  // namespace

template <const Comparing& kOp>
void register_comparing(torch::Library& library) {
  register_operator<&forward<kOp>, &backward<kOp>>(library, kOp.name, kDispatchKey);
}

TORCH_LIBRARY_FRAGMENT(EAR_OPS_LIBRARY, m) {
  register_comparing<kMse>(m);
  register_comparing<kKl>(m);
  register_comparing<kReverseKl>(m);
  register_comparing<kJs>(m);
  register_comparing<kScoresMse>(m);
}

}  // namespace ear_ops::cuda
