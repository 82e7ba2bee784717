// Compares the attention of two views straight from Q and K. What exists of the two matrices is one tile of scores a
// thread. Keys that are padding in both views and queries that do not count are left out before anything is multiplied.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../register.h"
#include "qk/backward.h"
#include "qk/forward.h"

namespace ear_ops::cpu {

namespace {

// One operator. kExchanged: the comparison takes the second view as its first one.
template <Comparison kComparison, bool kExchanged = false>
struct Attention {
  static const char* name() {
    switch (kComparison) {
      case Comparison::kMse:
        return "qk_attention_mse";
      case Comparison::kKl:
        return kExchanged ? "qk_attention_reverse_kl" : "qk_attention_kl";
      case Comparison::kJs:
        return "qk_attention_js";
      default:
        return "qk_scores_mse";
    }
  }

  static std::tuple<Tensor, Tensor> forward(const AttentionProblem& problem) {
    const QKInputs inputs(problem, check(name(), problem, kLimits), kComparison, kExchanged);
    const auto options = problem.query.options().dtype(accumulator_of(problem.query));
    Tensor sums = at::zeros({inputs.pairs, inputs.heads}, options);
    Tensor row_stats = at::zeros({row_stats_of(kComparison), inputs.pairs, inputs.heads, inputs.queries}, options);
    qk_forward(inputs, sums, row_stats);
    return {sums, row_stats};
  }

  static std::vector<Tensor> backward(const Tensor& grad_sums, const AttentionProblem& problem, const Tensor& row_stats,
                                      const c10::List<bool>& needs) {
    const AttentionSizes sizes = check_backward(name(), problem, kLimits, kComparison, grad_sums, row_stats, needs);
    const QKInputs inputs(problem, sizes, kComparison, kExchanged);
    // Rows that are left out keep the zeros; with nothing left out every element is written.
    const bool all_written = !problem.key_mask && !problem.counted_queries && inputs.keys > 0 && inputs.queries > 0;
    Gradients gradients = make_gradients({{problem.query, problem.query_aug}, {problem.key, problem.key_aug}}, needs,
                                         inputs.pairs, [&](const Tensor& like) {
                                           return all_written ? at::empty(like.sizes(), like.options())
                                                              : at::zeros(like.sizes(), like.options());
                                         });
    QKGradients out;
    for (int v = 0; v < 2; ++v) {
      out.query[v] = HeadsPointer(gradients.views[0][inputs.view_of_problem(v)]);
      out.key[v] = HeadsPointer(gradients.views[1][inputs.view_of_problem(v)]);
    }
    qk_backward(inputs, grad_sums.to(accumulator_of(problem.query)).contiguous(), row_stats.contiguous(), out);
    return gradients.returned;
  }

  static void add_to(torch::Library& library) {
    register_operator<&forward, &backward>(library, name(), c10::DispatchKey::CPU);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(ear_ops, m) {
  Attention<Comparison::kMse>::add_to(m);
  Attention<Comparison::kKl>::add_to(m);
  Attention<Comparison::kKl, true>::add_to(m);
  Attention<Comparison::kJs>::add_to(m);
  Attention<Comparison::kScores>::add_to(m);
}

}  // namespace ear_ops::cpu
