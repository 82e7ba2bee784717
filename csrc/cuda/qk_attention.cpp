// Compares attention matrices straight from Q and K, on CUDA.
#include <ATen/ops/sum.h>

#include "../register.h"
#include "qk_call.h"

namespace ear_ops::cuda {

namespace {

constexpr Comparing kMse = {"qk_attention_mse", Comparison::kMse, false};
constexpr Comparing kKl = {"qk_attention_kl", Comparison::kKl, false};
constexpr Comparing kReverseKl = {"qk_attention_reverse_kl", Comparison::kKl, true};
constexpr Comparing kJs = {"qk_attention_js", Comparison::kJs, false};
constexpr Comparing kScoresMse = {"qk_scores_mse", Comparison::kScores, false};

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
