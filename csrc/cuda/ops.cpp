// The operators on tensors: checks their arguments, makes the outputs, and hands raw memory to the kernels, on the
// tensors' device and its current stream. All memory comes from torch's allocator and nothing waits for the device, so
// that a call can be captured in a CUDA graph.
#include "../ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <array>

#include "../checks.h"
#include "elementwise_args.h"
#include "qk_args.h"

#if defined(EAR_OPS_CUDA_ON_HOST)
#include "host.h"
#endif

namespace ear_ops {

namespace cuda {
namespace {

constexpr const char* kQK = "qk_attention_mse";
constexpr const char* kMaps = "attention_mse";
constexpr const char* kPooled = "pooled_distance";

Element element_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": expected float32, bfloat16 or float16 on CUDA, got ", tensor.scalar_type());
  }
}

// The memory of a tensor. The test implementation of the kernels is told that they may touch it.
char* memory_of(const Tensor& tensor) {
  char* data = static_cast<char*>(tensor.data_ptr());
#if defined(EAR_OPS_CUDA_ON_HOST)
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  if (tensor.numel() > 0) host::allow(data, (last + 1) * tensor.element_size());
#endif
  return data;
}

Tensor make(at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor tensor = at::empty(shape, options);
#if defined(EAR_OPS_CUDA_ON_HOST)
  if (tensor.numel() > 0) memset(tensor.data_ptr(), 0xff, tensor.nbytes());  // NaN
#endif
  return tensor;
}

// Makes the tensors' device current and finds its current stream. Only CUDA devices have one.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.device()) {
#if defined(EAR_OPS_CUDA_ON_HOST)
    host::forbid_all();
#else
    stream_ = c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device()).native_handle();
#endif
  }
  void* stream() const { return stream_; }
  void check(const char* op, const char* error) const {
    TORCH_CHECK(!error, op, ": the kernel did not start: ", error);
  }

 private:
  c10::DeviceGuard guard_;
  void* stream_ = nullptr;
};

void check_device(const char* op, const char* name, const Tensor& like, const OptionalTensor& tensor) {
  TORCH_CHECK_VALUE(!tensor || tensor->device() == like.device(), op, ": ", name, ": expected a tensor on ",
                    like.device(), ", got one on ", tensor->device());
}

int to_int(const char* op, const char* what, int64_t n) {
  TORCH_CHECK_VALUE(n < (int64_t(1) << 30), op, ": ", what, ": expected less than 2^30, got ", n);
  return static_cast<int>(n);
}

const uint8_t* mask_of(const OptionalTensor& mask) {  // contiguous
  return mask ? reinterpret_cast<const uint8_t*>(memory_of(*mask)) : nullptr;
}

OptionalTensor dense(const OptionalTensor& tensor) { return tensor ? OptionalTensor(tensor->contiguous()) : tensor; }

// The two views of one input: both tensors, or the halves of the first.
std::array<Tensor, 2> split_views(const Tensor& first, const OptionalTensor& second, int64_t pairs) {
  if (second) return {first, *second};
  return {first.narrow(0, 0, pairs), first.narrow(0, pairs, pairs)};
}

// Whether rows [..., n] can be read 16 bytes at a time.
bool in_pieces(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, bytes = tensor.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && tensor.stride(last) == 1 &&
                 tensor.size(last) * bytes % 16 == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (tensor.size(i) <= 1 || tensor.stride(i) * bytes % 16 == 0);
  return aligned;
}

HeadsView heads_view(const Tensor& t) {
  return {memory_of(t), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}, nullptr};
}

// Gradients as `needs` asks for them, in the order of the inputs; a view's place is within its input's gradient.
class Gradients {
 public:
  // Of an input `first`, whose second view is in `second` or in its own second half; sets each view's pointer.
  void add(const Tensor& first, bool needed, const OptionalTensor& second, bool second_needed, int64_t pairs,
           const std::array<void**, 2>& views) {
    if (needed) {
      Tensor& gradient = out_.emplace_back(make(first.sizes(), first.options()));
      *views[0] = memory_of(gradient);
      if (!second) *views[1] = memory_of(gradient.narrow(0, pairs, pairs));
    }
    if (second && second_needed) *views[1] = memory_of(out_.emplace_back(make(second->sizes(), second->options())));
  }
  std::vector<Tensor>& tensors() { return out_; }

 private:
  std::vector<Tensor> out_;
};

struct QKCall {  // the arguments, and what keeps their memory alive
  QKArgs args{};
  Element element;
  OptionalTensor key_mask, counted_queries;
};

QKCall qk_call(const Tensor& query, const Tensor& key, const OptionalTensor& query_aug, const OptionalTensor& key_aug,
               const OptionalTensor& key_mask, const OptionalTensor& counted_queries, const OptionalTensor& attn_bias,
               const OptionalTensor& attn_bias_aug, double scale, bool is_causal, int64_t window) {
  check_dim(kQK, "query", query, 4, "[B, H, L, D]");
  check_dim(kQK, "key", key, 4, "[B, H_kv, S, D]");
  QKCall call;
  QKArgs& a = call.args;
  call.element = element_of(kQK, query);
  a.pairs = pairs_of(kQK, "query", query, !query_aug.has_value());
  a.heads = to_int(kQK, "query: heads", query.size(1)), a.key_heads = to_int(kQK, "key: heads", key.size(1));
  a.queries = to_int(kQK, "query: length", query.size(2)), a.keys = to_int(kQK, "key: length", key.size(2));
  a.dim = to_int(kQK, "query: head dimension", query.size(3));
  TORCH_CHECK_VALUE(a.key_heads > 0 && a.heads % a.key_heads == 0, kQK,
                    ": key: expected a number of heads that divides ", a.heads, ", got shape ", key.sizes());
  check_shape(kQK, "key", key, {query.size(0), a.key_heads, a.keys, a.dim});
  check_dtype(kQK, "key", key, query.scalar_type());
  TORCH_CHECK_VALUE(query_aug.has_value() == key_aug.has_value(), kQK,
                    ": query_aug, key_aug: expected both or neither");
  check_optional(kQK, "query_aug", query_aug, query.sizes(), query.scalar_type());
  check_optional(kQK, "key_aug", key_aug, key.sizes(), query.scalar_type());
  check_optional(kQK, "key_mask", key_mask, {2 * a.pairs, a.keys}, at::kBool);
  check_optional(kQK, "counted_queries", counted_queries, {a.pairs, a.queries}, at::kBool);
  const std::array<int64_t, 4> whole = {a.pairs, a.heads, a.queries, a.keys};
  check_optional(kQK, "attn_bias", attn_bias, whole, at::kFloat);
  check_optional(kQK, "attn_bias_aug", attn_bias_aug, whole, at::kFloat);
  check_device(kQK, "key", query, key), check_device(kQK, "query_aug", query, query_aug);
  check_device(kQK, "key_aug", query, key_aug), check_device(kQK, "key_mask", query, key_mask);
  check_device(kQK, "counted_queries", query, counted_queries), check_device(kQK, "attn_bias", query, attn_bias);
  check_device(kQK, "attn_bias_aug", query, attn_bias_aug);
  a.scale = static_cast<float>(scale), a.is_causal = is_causal;
  a.window = static_cast<int>(std::min<int64_t>(window, int64_t(1) << 30));
  call.key_mask = dense(key_mask), call.counted_queries = dense(counted_queries);
  a.key_mask = mask_of(call.key_mask), a.counted_queries = mask_of(call.counted_queries);
  a.pieces = true;
  const auto queries = split_views(query, query_aug, a.pairs), keys = split_views(key, key_aug, a.pairs);
  for (int v = 0; v < 2; ++v) {
    a.query[v] = heads_view(queries[v]), a.key[v] = heads_view(keys[v]);
    a.pieces = a.pieces && in_pieces(queries[v]) && in_pieces(keys[v]);
    if (!attn_bias) continue;
    const Tensor& bias = v == 1 && attn_bias_aug ? *attn_bias_aug : *attn_bias;
    a.bias[v] = {reinterpret_cast<const float*>(memory_of(bias)),
                 {bias.stride(0), bias.stride(1), bias.stride(2), bias.stride(3)}};
  }
  return call;
}

Tensor upstream_of(const char* op, const Tensor& like, const Tensor& grad_sums, at::IntArrayRef shape) {
  check_device(op, "grad_sums", like, grad_sums);
  check_shape(op, "grad_sums", grad_sums, shape);
  return grad_sums.to(at::kFloat).contiguous();
}

struct MapsCall {
  MapsArgs args{};
  Element element;
  OptionalTensor key_mask, counted_queries;
};

MapsCall maps_call(const Tensor& attn, const OptionalTensor& attn_aug, const OptionalTensor& key_mask,
                   const OptionalTensor& counted_queries) {
  check_dim(kMaps, "attn", attn, 4, "[B, H, L, S]");
  MapsCall call;
  MapsArgs& a = call.args;
  call.element = element_of(kMaps, attn);
  a.pairs = pairs_of(kMaps, "attn", attn, !attn_aug.has_value());
  a.heads = to_int(kMaps, "attn: heads", attn.size(1)), a.queries = to_int(kMaps, "attn: queries", attn.size(2));
  a.keys = to_int(kMaps, "attn: keys", attn.size(3));
  check_optional(kMaps, "attn_aug", attn_aug, attn.sizes(), attn.scalar_type());
  check_optional(kMaps, "key_mask", key_mask, {2 * a.pairs, a.keys}, at::kBool);
  check_optional(kMaps, "counted_queries", counted_queries, {a.pairs, a.queries}, at::kBool);
  check_device(kMaps, "attn_aug", attn, attn_aug), check_device(kMaps, "key_mask", attn, key_mask);
  check_device(kMaps, "counted_queries", attn, counted_queries);
  call.key_mask = dense(key_mask), call.counted_queries = dense(counted_queries);
  a.key_mask = mask_of(call.key_mask), a.counted_queries = mask_of(call.counted_queries);
  const auto views = split_views(attn, attn_aug, a.pairs);
  a.pieces = in_pieces(views[0]) && in_pieces(views[1]) && reinterpret_cast<uintptr_t>(a.key_mask) % 8 == 0;
  for (int v = 0; v < 2; ++v) a.attn[v] = heads_view(views[v]);
  a.rows_per_block = maps_rows_per_block(a.keys);
  return call;
}

int64_t maps_blocks(const MapsArgs& a) { return (a.queries + a.rows_per_block - 1) / a.rows_per_block; }

struct PooledCall {
  PooledArgs args{};
  Element element;
  OptionalTensor mask;
};

PooledCall pooled_call(const Tensor& hidden, const OptionalTensor& hidden_aug, const OptionalTensor& mask) {
  check_dim(kPooled, "hidden", hidden, 3, "[B, L, C]");
  PooledCall call;
  PooledArgs& a = call.args;
  call.element = element_of(kPooled, hidden);
  a.pairs = pairs_of(kPooled, "hidden", hidden, !hidden_aug.has_value());
  a.length = to_int(kPooled, "hidden: length", hidden.size(1));
  a.features = to_int(kPooled, "hidden: features", hidden.size(2));
  check_optional(kPooled, "hidden_aug", hidden_aug, hidden.sizes(), hidden.scalar_type());
  check_optional(kPooled, "mask", mask, {2 * a.pairs, a.length}, at::kBool);
  check_device(kPooled, "hidden_aug", hidden, hidden_aug), check_device(kPooled, "mask", hidden, mask);
  call.mask = dense(mask);
  a.mask = mask_of(call.mask);
  const auto views = split_views(hidden, hidden_aug, a.pairs);
  a.pieces = in_pieces(views[0]) && in_pieces(views[1]);
  for (int v = 0; v < 2; ++v)
    a.hidden[v] = {memory_of(views[v]), views[v].stride(0), views[v].stride(1), views[v].stride(2), nullptr};
  return call;
}

int64_t pooled_blocks(const PooledCall& call) {
  const int slice = pooled_slice(call.element);
  return (call.args.features + slice - 1) / slice;
}

float* floats(const Tensor& tensor) { return reinterpret_cast<float*>(memory_of(tensor)); }

void check_needs(const char* op, const c10::List<bool>& needs, size_t expected) {
  TORCH_CHECK_VALUE(needs.size() == expected, op, ": needs: expected ", expected, " entries, got ", needs.size());
}

}  // namespace
}  // namespace cuda

std::tuple<Tensor, Tensor> qk_attention_mse(const Tensor& query, const Tensor& key, const OptionalTensor& query_aug,
                                            const OptionalTensor& key_aug, const OptionalTensor& key_mask,
                                            const OptionalTensor& counted_queries, const OptionalTensor& attn_bias,
                                            const OptionalTensor& attn_bias_aug, double scale, bool is_causal,
                                            int64_t window, std::optional<double> softcap) {
  TORCH_CHECK_VALUE(!softcap, "qk_attention_mse: softcap: computed by the reference only, use backend='reference'");
  const cuda::Launch launch(query);
  auto call = cuda::qk_call(query, key, query_aug, key_aug, key_mask, counted_queries, attn_bias, attn_bias_aug, scale,
                            is_causal, window);
  auto& a = call.args;
  const auto options = query.options().dtype(at::kFloat);
  const Tensor row_stats = cuda::make({cuda::kRowStats, a.pairs, a.heads, a.queries}, options);
  const Tensor block_sums = cuda::make({a.pairs, a.heads, cuda::blocks_of(a.queries)}, options);
  a.row_stats = cuda::floats(row_stats), a.block_sums = cuda::floats(block_sums);
  launch.check(cuda::kQK, cuda::qk_attention_mse_forward(call.element, a, launch.stream()));
  return {block_sums.sum(-1), row_stats};
}

std::vector<Tensor> qk_attention_mse_backward(const Tensor& grad_sums, const Tensor& query, const Tensor& key,
                                              const OptionalTensor& query_aug, const OptionalTensor& key_aug,
                                              const OptionalTensor& key_mask, const OptionalTensor& counted_queries,
                                              const OptionalTensor& attn_bias, const OptionalTensor& attn_bias_aug,
                                              double scale, bool is_causal, int64_t window,
                                              std::optional<double> softcap, const Tensor& row_stats,
                                              const c10::List<bool>& needs) {
  TORCH_CHECK_VALUE(!softcap, "qk_attention_mse: softcap: computed by the reference only, use backend='reference'");
  const cuda::Launch launch(query);
  auto call = cuda::qk_call(query, key, query_aug, key_aug, key_mask, counted_queries, attn_bias, attn_bias_aug, scale,
                            is_causal, window);
  auto& a = call.args;
  const Tensor upstream = cuda::upstream_of(cuda::kQK, query, grad_sums, {a.pairs, a.heads});
  check_shape(cuda::kQK, "row_stats", row_stats, {cuda::kRowStats, a.pairs, a.heads, a.queries});
  check_dtype(cuda::kQK, "row_stats", row_stats, at::kFloat);
  cuda::check_device(cuda::kQK, "row_stats", query, row_stats);
  const Tensor stats = row_stats.contiguous();
  cuda::check_needs(cuda::kQK, needs, 4);
  cuda::Gradients queries, keys;
  queries.add(query, needs.get(0), query_aug, needs.get(2), a.pairs, {&a.query[0].gradient, &a.query[1].gradient});
  keys.add(key, needs.get(1), key_aug, needs.get(3), a.pairs, {&a.key[0].gradient, &a.key[1].gradient});
  a.row_stats = cuda::floats(stats), a.grad_sums = cuda::floats(upstream);
  launch.check(cuda::kQK, cuda::qk_attention_mse_backward(call.element, a, launch.stream()));
  std::vector<Tensor> gradients;  // query, key, query_aug, key_aug
  size_t of_queries = 0, of_keys = 0;
  for (size_t input = 0; input < 4; ++input) {
    if (!needs.get(input) || (input >= 2 && !query_aug)) continue;
    gradients.push_back(input % 2 == 0 ? queries.tensors()[of_queries++] : keys.tensors()[of_keys++]);
  }
  return gradients;
}

Tensor attention_mse(const Tensor& attn, const OptionalTensor& attn_aug, const OptionalTensor& key_mask,
                     const OptionalTensor& counted_queries) {
  const cuda::Launch launch(attn);
  auto call = cuda::maps_call(attn, attn_aug, key_mask, counted_queries);
  auto& a = call.args;
  const Tensor block_sums = cuda::make({a.pairs, a.heads, cuda::maps_blocks(a)}, attn.options().dtype(at::kFloat));
  a.block_sums = cuda::floats(block_sums);
  launch.check(cuda::kMaps, cuda::attention_mse_forward(call.element, a, launch.stream()));
  return block_sums.sum(-1);
}

std::vector<Tensor> attention_mse_backward(const Tensor& grad_sums, const Tensor& attn, const OptionalTensor& attn_aug,
                                           const OptionalTensor& key_mask, const OptionalTensor& counted_queries,
                                           const c10::List<bool>& needs) {
  const cuda::Launch launch(attn);
  auto call = cuda::maps_call(attn, attn_aug, key_mask, counted_queries);
  auto& a = call.args;
  const Tensor upstream = cuda::upstream_of(cuda::kMaps, attn, grad_sums, {a.pairs, a.heads});
  cuda::check_needs(cuda::kMaps, needs, 2);
  cuda::Gradients gradients;
  gradients.add(attn, needs.get(0), attn_aug, needs.get(1), a.pairs, {&a.attn[0].gradient, &a.attn[1].gradient});
  a.grad_sums = cuda::floats(upstream);
  launch.check(cuda::kMaps, cuda::attention_mse_backward(call.element, a, launch.stream()));
  return gradients.tensors();
}

std::tuple<Tensor, Tensor> pooled_distance(const Tensor& hidden, const OptionalTensor& hidden_aug,
                                           const OptionalTensor& mask) {
  const cuda::Launch launch(hidden);
  auto call = cuda::pooled_call(hidden, hidden_aug, mask);
  auto& a = call.args;
  const auto options = hidden.options().dtype(at::kFloat);
  const Tensor difference = cuda::make({a.pairs, a.features}, options);
  const Tensor block_sums = cuda::make({a.pairs, cuda::pooled_blocks(call)}, options);
  a.difference = cuda::floats(difference), a.block_sums = cuda::floats(block_sums);
  launch.check(cuda::kPooled, cuda::pooled_distance_forward(call.element, a, launch.stream()));
  return {block_sums.sum(-1), difference};
}

std::vector<Tensor> pooled_distance_backward(const Tensor& grad_sums, const Tensor& hidden,
                                             const OptionalTensor& hidden_aug, const OptionalTensor& mask,
                                             const Tensor& difference, const c10::List<bool>& needs) {
  const cuda::Launch launch(hidden);
  auto call = cuda::pooled_call(hidden, hidden_aug, mask);
  auto& a = call.args;
  const Tensor upstream = cuda::upstream_of(cuda::kPooled, hidden, grad_sums, {a.pairs});
  check_shape(cuda::kPooled, "difference", difference, {a.pairs, a.features});
  cuda::check_device(cuda::kPooled, "difference", hidden, difference);
  const Tensor means = difference.to(at::kFloat).contiguous();
  cuda::check_needs(cuda::kPooled, needs, 2);
  cuda::Gradients gradients;
  gradients.add(hidden, needs.get(0), hidden_aug, needs.get(1), a.pairs,
                {&a.hidden[0].gradient, &a.hidden[1].gradient});
  a.difference = cuda::floats(means), a.grad_sums = cuda::floats(upstream);
  launch.check(cuda::kPooled, cuda::pooled_distance_backward(call.element, a, launch.stream()));
  return gradients.tensors();
}

}  // namespace ear_ops
