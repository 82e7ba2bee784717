// Compares attention matrices straight from Q and K. What exists of the two matrices is one tile of scores a thread.
// Keys that are padding in both views and queries that do not count are left out before anything is multiplied.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../register.h"
#include "qk/backward.h"
#include "qk/forward.h"

namespace ear_ops::cpu {

namespace {

constexpr const char* kOp = "qk_attention_mse";

std::tuple<Tensor, Tensor> qk_attention_mse(const AttentionProblem& problem) {
  const QKInputs inputs(problem, check(kOp, problem, kLimits));
  const auto options = problem.query.options().dtype(accumulator_of(problem.query));
  Tensor sums = at::zeros({inputs.pairs, inputs.heads}, options);
  Tensor row_stats = at::zeros({kRowStats, inputs.pairs, inputs.heads, inputs.queries}, options);
  qk_forward(inputs, sums, row_stats);
  return {sums, row_stats};
}

std::vector<Tensor> qk_attention_mse_backward(const Tensor& grad_sums, const AttentionProblem& problem,
                                              const Tensor& row_stats, const c10::List<bool>& needs) {
  const QKInputs inputs(problem, check_backward(kOp, problem, kLimits, grad_sums, row_stats, needs));
  // Rows that are left out keep the zeros; with nothing left out every element is written.
  const bool all_written = !problem.key_mask && !problem.counted_queries && inputs.keys > 0 && inputs.queries > 0;
  Gradients gradients = make_gradients({{problem.query, problem.query_aug}, {problem.key, problem.key_aug}}, needs,
                                       inputs.pairs, [&](const Tensor& like) {
                                         return all_written ? at::empty(like.sizes(), like.options())
                                                            : at::zeros(like.sizes(), like.options());
                                       });
  QKGradients out;
  for (int v = 0; v < 2; ++v) {
    out.query[v] = HeadsPointer(gradients.views[0][v]);
    out.key[v] = HeadsPointer(gradients.views[1][v]);
  }
  qk_backward(inputs, grad_sums.to(accumulator_of(problem.query)).contiguous(), row_stats.contiguous(), out);
  return gradients.returned;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ear_ops, m) {
  register_operator<&qk_attention_mse, &qk_attention_mse_backward>(m, kOp, c10::DispatchKey::CPU);
}

}  // namespace ear_ops::cpu
