// Compares the masked means of two views of hidden states, on CUDA.
#include <ATen/ops/sum.h>

#include "../register.h"
#include "pooled_distance_args.h"
#include "tensors.h"

namespace ear_ops::cuda {

namespace {

constexpr const char* kOp = "pooled_distance";

struct Call {  // the arguments of the kernels, and what keeps their memory alive
  PooledArgs args{};
  Element element;
  OptionalTensor mask;

  Call(const PooledProblem& problem, const PooledSizes& sizes)
      : element(element_of(problem.hidden)), mask(contiguous(problem.mask)) {
    args.pairs = sizes.pairs;
    args.length = static_cast<int>(sizes.length), args.features = static_cast<int>(sizes.features);
    args.mask = mask_of(mask);
    const auto views = split_views(problem.hidden, problem.hidden_aug, sizes.pairs);
    args.vectorized = reads_16_bytes(views[0]) && reads_16_bytes(views[1]);
    for (int v = 0; v < 2; ++v)
      args.hidden[v] = {memory_of(views[v]), views[v].stride(0), views[v].stride(1), views[v].stride(2), nullptr};
  }
};

std::tuple<Tensor, Tensor> pooled_distance(const PooledProblem& problem) {
  const Launch launch(problem.hidden);
  const PooledSizes sizes = check(kOp, problem, kLimits);
  Call call(problem, sizes);
  const auto options = problem.hidden.options().dtype(at::kFloat);
  const int slice = pooled_slice(call.element);
  const Tensor difference = make({sizes.pairs, sizes.features}, options);
  const Tensor block_sums = make({sizes.pairs, (sizes.features + slice - 1) / slice}, options);
  call.args.difference = floats(difference), call.args.block_sums = floats(block_sums);
  launch.check(kOp, launch_pooled_forward(call.element, call.args, launch.stream()));
  return {block_sums.sum(-1), difference};
}

std::vector<Tensor> pooled_distance_backward(const Tensor& grad_sums, const PooledProblem& problem,
                                             const Tensor& difference, const c10::List<bool>& needs) {
  const Launch launch(problem.hidden);
  const PooledSizes sizes = check_backward(kOp, problem, kLimits, grad_sums, difference, needs);
  Call call(problem, sizes);
  const Gradients gradients = make_gradients({{problem.hidden, problem.hidden_aug}}, needs, sizes.pairs, make_like);
  for (int v = 0; v < 2; ++v) call.args.hidden[v].gradient = memory_or_null(gradients.views[0][v]);
  const Tensor upstream = grad_sums.to(at::kFloat).contiguous(), means = difference.to(at::kFloat).contiguous();
  call.args.difference = floats(means), call.args.grad_sums = floats(upstream);
  launch.check(kOp, launch_pooled_backward(call.element, call.args, launch.stream()));
  return gradients.returned;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(EAR_OPS_LIBRARY, m) {
  register_operator<&pooled_distance, &pooled_distance_backward>(m, kOp, kDispatchKey);
}

}  // namespace ear_ops::cuda
