// Compares attention probabilities that exist, on CUDA.
#include <ATen/ops/sum.h>

#include "../register.h"
#include "attention_mse_args.h"
#include "tensors.h"

namespace ear_ops::cuda {

namespace {

constexpr const char* kOp = "attention_mse";

struct Call {  // the arguments of the kernels, and what keeps their memory alive
  MapsArgs args{};
  Element element;
  OptionalTensor key_mask, counted_queries;

  Call(const MapsProblem& problem, const MapsSizes& sizes)
      : element(element_of(problem.attn)),
        key_mask(contiguous(problem.key_mask)),
        counted_queries(contiguous(problem.counted_queries)) {
    args.pairs = sizes.pairs, args.heads = static_cast<int>(sizes.heads);
    args.queries = static_cast<int>(sizes.queries), args.keys = static_cast<int>(sizes.keys);
    args.key_mask = mask_of(key_mask), args.counted_queries = mask_of(counted_queries);
    const auto views = split_views(problem.attn, problem.attn_aug, sizes.pairs);
    args.vectorized =
        reads_16_bytes(views[0]) && reads_16_bytes(views[1]) && reinterpret_cast<uintptr_t>(args.key_mask) % 8 == 0;
    for (int v = 0; v < 2; ++v) args.attn[v] = heads_pointer(views[v]);
    args.rows_per_block = maps_rows_per_block(args.keys);
  }
};

Tensor attention_mse(const MapsProblem& problem) {
  const Launch launch(problem.attn);
  const MapsSizes sizes = check(kOp, problem, kLimits);
  Call call(problem, sizes);
  const int64_t blocks = (sizes.queries + call.args.rows_per_block - 1) / call.args.rows_per_block;
  const Tensor block_sums = make({sizes.pairs, sizes.heads, blocks}, problem.attn.options().dtype(at::kFloat));
  call.args.block_sums = floats(block_sums);
  launch.check(kOp, launch_maps_forward(call.element, call.args, launch.stream()));
  return block_sums.sum(-1);
}

std::vector<Tensor> attention_mse_backward(const Tensor& grad_sums, const MapsProblem& problem,
                                           const c10::List<bool>& needs) {
  const Launch launch(problem.attn);
  const MapsSizes sizes = check_backward(kOp, problem, kLimits, grad_sums, needs);
  Call call(problem, sizes);
  const Gradients gradients = make_gradients({{problem.attn, problem.attn_aug}}, needs, sizes.pairs, make_like);
  for (int v = 0; v < 2; ++v) call.args.attn[v].gradient = memory_or_null(gradients.views[0][v]);
  const Tensor upstream = grad_sums.to(at::kFloat).contiguous();
  call.args.grad_sums = floats(upstream);
  launch.check(kOp, launch_maps_backward(call.element, call.args, launch.stream()));
  return gradients.returned;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(EAR_OPS_LIBRARY, m) {
  register_operator<&attention_mse, &attention_mse_backward>(m, kOp, kDispatchKey);
}

}  // namespace ear_ops::cuda
