// Compares the averages over the heads of two views straight from Q and K, on CUDA.
#include <ATen/ops/sum.h>

#include "../register.h"
#include "mean_args.h"
#include "qk_call.h"

namespace ear_ops::cuda {

namespace {

constexpr int kKeyParts = 8;  // blocks of threads that share the keys of 64 queries in the forward, at most

constexpr Comparing kMse = {"qk_mean_attention_mse", Comparison::kMse, false};
constexpr Comparing kKl = {"qk_mean_attention_kl", Comparison::kKl, false};
constexpr Comparing kReverseKl = {"qk_mean_attention_reverse_kl", Comparison::kKl, true};
constexpr Comparing kJs = {"qk_mean_attention_js", Comparison::kJs, false};

// So float16 has the kernels of float32.
std::array<Tensor, 2> in_gradient_dtype(const std::array<Tensor, 2>& views) {
  return {views[0].to(gradient_dtype(views[0])), views[1].to(gradient_dtype(views[1]))};
}

struct MeanCall {  // the arguments of the kernels, and what keeps their memory alive
  MeanArgs args{};
  Element element;
  OptionalTensor key_mask, counted_queries, head_weights;
  std::array<Tensor, 2> queries, keys;

  MeanCall(const Comparing& op, const MeanHeadsProblem& problem, const MeanHeadsSizes& sizes)
      : key_mask(contiguous(problem.key_mask)),
        counted_queries(contiguous(problem.counted_queries)),
        head_weights(contiguous(problem.head_weights)),
        queries(in_gradient_dtype(split_views(problem.query, problem.query_aug, sizes.pairs))),
        keys(in_gradient_dtype(split_views(problem.key, problem.key_aug, sizes.pairs))) {
    element = element_of(queries[0]);
    const uint8_t *masks = mask_of(key_mask), *counted = mask_of(counted_queries);
    for (int v = 0; v < 2; ++v) {
      const int from = op.view(v);
      QKArgs& view = args.view[v];
      view.pairs = sizes.pairs;
      view.heads = static_cast<int>(sizes.heads[from]), view.key_heads = static_cast<int>(sizes.key_heads[from]);
      view.queries = static_cast<int>(sizes.queries), view.keys = static_cast<int>(sizes.keys);
      view.dim = static_cast<int>(sizes.dim[from]);
      view.scale = static_cast<float>(from ? problem.scale_aug : problem.scale);
      view.is_causal = problem.is_causal;
      view.window = static_cast<int>(std::min<int64_t>(problem.window, int64_t(1) << 30));
      view.key_mask = masks ? masks + from * sizes.pairs * sizes.keys : nullptr;
      view.counted_queries = counted;
      view.query[0] = heads_pointer(queries[from]), view.key[0] = heads_pointer(keys[from]);
      view.vectorized = reads_16_bytes(queries[from]) && reads_16_bytes(keys[from]);
      args.divisor[v] = head_weights ? 1.0f : static_cast<float>(view.heads);
      if (!problem.attn_bias) continue;
      const Tensor& bias = from && problem.attn_bias_aug ? *problem.attn_bias_aug : *problem.attn_bias;
      view.bias[0] = {floats(bias), strides_of(bias)};
    }
    args.head_weights = head_weights ? floats(*head_weights) : nullptr;
    args.slopes.planes = slope_planes(op.comparison);
    args.key_parts = std::clamp(blocks_of(args.view[0].keys), 1, kKeyParts);
  }
};

template <const Comparing& kOp>
std::tuple<Tensor, std::vector<Tensor>> forward(const MeanHeadsProblem& problem, const c10::List<bool>& needs) {
  const Launch launch(problem.query);
  const MeanHeadsSizes sizes = check(kOp.name, problem, kLimits, needs);
  MeanCall call(kOp, problem, sizes);
  MeanArgs& args = call.args;
  const Gradients gradients =
      make_gradients({{problem.query, problem.query_aug}, {problem.key, problem.key_aug}}, needs, sizes.pairs,
                     [](const Tensor& like) { return make(like.sizes(), like.options().dtype(gradient_dtype(like))); });
  const auto options = problem.query.options().dtype(at::kFloat);
  std::array<Tensor, 2> row_stats;
  for (int v = 0; v < 2; ++v) {
    QKArgs& view = args.view[v];
    view.query[0].gradient = memory_or_null(gradients.views[0][kOp.view(v)]);
    view.key[0].gradient = memory_or_null(gradients.views[1][kOp.view(v)]);
    const int rows = view.query[0].gradient || view.key[0].gradient ? kMeanStats : kMeanStats - 1;
    row_stats[v] = make({rows, sizes.pairs, view.heads, sizes.queries}, options);
    view.row_stats = floats(row_stats[v]);
  }
  const Tensor block_sums = make({sizes.pairs, blocks_of(args.view[0].queries), args.key_parts}, options);
  const Tensor slopes = make_scratch({slopes_size(args)}, options);
  args.block_sums = floats(block_sums), args.slopes.data = floats(slopes);
  launch.check(kOp.name, launch_mean_heads(kOp.comparison, call.element, args, launch.stream()));
  return {block_sums.sum({1, 2}), gradients.returned};
}

template <const Comparing& kOp>
void register_comparing(torch::Library& library) {
  register_forward<&forward<kOp>>(library, kOp.name, kDispatchKey);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(EAR_OPS_LIBRARY, m) {
  register_comparing<kMse>(m);
  register_comparing<kKl>(m);
  register_comparing<kReverseKl>(m);
  register_comparing<kJs>(m);
}

}  // namespace ear_ops::cuda
