// The checked arguments of qk_attention_mse.
#pragma once

#include "views.h"

namespace ear_ops::cpu {

struct QKProblem {
  int64_t pairs, heads, key_heads, queries, keys, dim;
  double scale;
  bool is_causal;
  int64_t window;
  Kind kind;
  std::array<Heads, 2> query, key;           // of each view
  std::array<Heads, 2> bias;                 // of the accumulator's type; data null without bias
  std::array<int64_t, 2> bias_key_stride{};  // of the bias' last dimension, 0 where it is broadcast
  OptionalTensor key_mask, counted_queries;
  std::vector<Tensor> keep_alive;

  int64_t group() const { return heads / key_heads; }
};

inline QKProblem make_qk_problem(const Tensor& query, const Tensor& key, const OptionalTensor& query_aug,
                                 const OptionalTensor& key_aug, const OptionalTensor& key_mask,
                                 const OptionalTensor& counted_queries, const OptionalTensor& attn_bias,
                                 const OptionalTensor& attn_bias_aug, double scale, bool is_causal, int64_t window) {
  constexpr const char* kOp = "qk_attention_mse";
  check_dim(kOp, "query", query, 4, "[B, H, L, D]");
  check_dim(kOp, "key", key, 4, "[B, H_kv, S, D]");
  QKProblem p{};
  p.pairs = pairs_of(kOp, "query", query, !query_aug.has_value());
  p.heads = query.size(1), p.queries = query.size(2), p.dim = query.size(3);
  p.key_heads = key.size(1), p.keys = key.size(2);
  TORCH_CHECK_VALUE(p.key_heads > 0 && p.heads % p.key_heads == 0, kOp,
                    ": key: expected a number of heads that divides ", p.heads, ", got shape ", key.sizes());
  check_shape(kOp, "key", key, {query.size(0), p.key_heads, p.keys, p.dim});
  check_dtype(kOp, "key", key, query.scalar_type());
  TORCH_CHECK_VALUE(query_aug.has_value() == key_aug.has_value(), kOp,
                    ": query_aug, key_aug: expected both or neither");
  check_optional(kOp, "query_aug", query_aug, query.sizes(), query.scalar_type());
  check_optional(kOp, "key_aug", key_aug, key.sizes(), query.scalar_type());
  check_optional(kOp, "key_mask", key_mask, {2 * p.pairs, p.keys}, at::kBool);
  check_optional(kOp, "counted_queries", counted_queries, {p.pairs, p.queries}, at::kBool);
  const std::array<int64_t, 4> whole = {p.pairs, p.heads, p.queries, p.keys};
  check_optional(kOp, "attn_bias", attn_bias, whole, accumulator_of(query));
  check_optional(kOp, "attn_bias_aug", attn_bias_aug, whole, accumulator_of(query));
  TORCH_CHECK_VALUE(p.keys < (int64_t(1) << 31) && p.queries < (int64_t(1) << 31), kOp, ": sequences are too long");
  p.scale = scale, p.is_causal = is_causal, p.window = window;
  p.kind = kind_of(kOp, query);
  p.key_mask = dense(key_mask);
  p.counted_queries = dense(counted_queries);
  const auto queries = split_views(query, query_aug, p.pairs), keys = split_views(key, key_aug, p.pairs);
  for (int v = 0; v < 2; ++v) {
    p.keep_alive.insert(p.keep_alive.end(), {queries[v], keys[v]});
    p.query[v] = Heads(queries[v]);
    p.key[v] = Heads(keys[v]);
    if (!attn_bias) continue;
    const Tensor& bias = v == 1 && attn_bias_aug ? *attn_bias_aug : *attn_bias;
    p.bias[v] = Heads(bias);
    p.bias_key_stride[v] = bias.stride(3);
  }
  return p;
}

}  // namespace ear_ops::cpu
