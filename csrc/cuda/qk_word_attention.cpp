// Compares attention between words, on CUDA.
#include <ATen/ops/arange.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sum.h>

#include "../register.h"
#include "qk_call.h"
#include "qk_words_args.h"

namespace ear_ops::cuda {

namespace {

constexpr Comparing kMse = {"qk_word_attention_mse", Comparison::kMse, false};
constexpr Comparing kKl = {"qk_word_attention_kl", Comparison::kKl, false};
constexpr Comparing kReverseKl = {"qk_word_attention_reverse_kl", Comparison::kKl, true};
constexpr Comparing kJs = {"qk_word_attention_js", Comparison::kJs, false};

// The lists of tokens (qk_words_args.h). An id that is not less than `words` is that of no word: the device cannot
// complain. Nothing here waits for it.
struct Lists {
  Tensor number, position, first;

  Lists(const Comparing& op, const WordsProblem& problem, const AttentionSizes& sizes) {
    const Tensor ids = problem.word_ids.masked_fill(problem.word_ids.ge(problem.words), -1);
    Tensor numbers = ids.clamp_min(-1).add(1);
    if (problem.key_mask) numbers = numbers.masked_fill(problem.key_mask->logical_not(), -1);
    if (op.exchanged) numbers = numbers.roll(sizes.pairs, 0);
    const auto [sorted, order] = numbers.to(at::kInt).sort(/*stable=*/std::optional<bool>(true), /*dim=*/1);
    const Tensor bounds = at::arange(problem.words + 2, sorted.options()).repeat({2 * sizes.pairs, 1});
    number = sorted.contiguous(), position = order.to(at::kInt).contiguous();
    first = at::searchsorted(number, bounds, /*out_int32=*/true).contiguous();
  }
};

const int* integers(const Tensor& tensor) { return reinterpret_cast<const int*>(memory_of(tensor)); }

struct WordCall {  // the arguments of the kernels, and what keeps their memory alive
  Call call;
  Lists lists;
  WordArgs args;

  WordCall(const Comparing& op, const WordsProblem& problem, const AttentionSizes& sizes)
      : call(op, problem.tokens(), sizes), lists(op, problem, sizes), args{} {
    static_cast<QKArgs&>(args) = call.args;
    args.comparison = op.comparison, args.numbers = static_cast<int>(problem.words) + 1;
    for (int v = 0; v < 2; ++v)  // kernels that read 16 bytes at a time have 32 bits for the step from row to row
      for (const HeadsPointer* of : {&args.query[v], &args.key[v]})
        args.vectorized = args.vectorized && of->strides.row < int64_t(1) << 31;
    args.number = integers(lists.number), args.position = integers(lists.position), args.first = integers(lists.first);
  }
};

template <const Comparing& kOp>
std::tuple<Tensor, Tensor> forward(const WordsProblem& problem) {
  const Launch launch(problem.query);
  const AttentionSizes sizes = check(kOp.name, problem, kLimits);
  WordCall call(kOp, problem, sizes);
  const auto options = problem.query.options().dtype(at::kFloat);
  const Tensor row_stats = make({kWordRowStats, sizes.pairs, sizes.heads, sizes.queries}, options);
  const Tensor block_sums = make({sizes.pairs, sizes.heads, strip_blocks(call.args)}, options);
  call.args.row_stats = floats(row_stats), call.args.block_sums = floats(block_sums);
  launch.check(kOp.name, launch_words_forward(call.call.element, call.args, launch.stream()));
  return {block_sums.sum(-1), row_stats};
}

template <const Comparing& kOp>
std::vector<Tensor> backward(const Tensor& grad_sums, const WordsProblem& problem, const Tensor& row_stats,
                             const c10::List<bool>& needs) {
  const Launch launch(problem.query);
  const AttentionSizes sizes = check_backward(kOp.name, problem, kLimits, grad_sums, row_stats, needs);
  WordCall call(kOp, problem, sizes);
  const Gradients gradients = make_gradients({{problem.query, problem.query_aug}, {problem.key, problem.key_aug}},
                                             needs, sizes.pairs, make_like);
  for (int v = 0; v < 2; ++v) {
    call.args.query[v].gradient = memory_or_null(gradients.views[0][kOp.view(v)]);
    call.args.key[v].gradient = memory_or_null(gradients.views[1][kOp.view(v)]);
  }
  const Tensor upstream = grad_sums.to(at::kFloat).contiguous(), stats = row_stats.contiguous();
  const Tensor d = make({2, sizes.pairs, sizes.heads, sizes.queries}, upstream.options());
  call.args.row_stats = floats(stats), call.args.grad_sums = floats(upstream), call.args.d = floats(d);
  if (!gradients.returned.empty())
    launch.check(kOp.name, launch_words_backward(call.call.element, call.args, launch.stream()));
  return gradients.returned;
}

template <const Comparing& kOp>
void register_words(torch::Library& library) {
  register_operator<&forward<kOp>, &backward<kOp>>(library, kOp.name, kDispatchKey);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(EAR_OPS_LIBRARY, m) {
  register_words<kMse>(m);
  register_words<kKl>(m);
  register_words<kReverseKl>(m);
  register_words<kJs>(m);
}

}  // namespace ear_ops::cuda
