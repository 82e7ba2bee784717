// The argument checks of every operator, the same for every device. The Python functions have checked what users pass;
// these run again because torch.ops.ear_ops is public and wrong shapes would touch foreign memory. Messages are worded
// alike: operator, argument, what was expected, what came.
#pragma once

#include <ATen/core/List.h>
#include <c10/util/Exception.h>

#include "comparison.h"
#include "problem.h"

namespace ear_ops {

// What the kernels of one device take.
struct DeviceLimits {
  const char* dtypes;  // in words
  bool takes_float64;
  int64_t size;  // every dimension but the first must be less
};

// The dtype of sums, statistics and biases.
inline at::ScalarType accumulator_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Holds the other tensors of a call against its first one.
class Checker {
 public:
  Checker(const char* op, const char* name, const Tensor& first, int64_t dim, const char* layout,
          const DeviceLimits& limits)
      : op_(op), name_(name), first_(first) {
    check_dim(name, first, dim, layout);
    const auto dtype = first.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
                         (dtype == at::kDouble && limits.takes_float64),
                     op, ": ", name, ": expected ", limits.dtypes, ", got ", dtype);
    check_size(name, first, limits);
  }

  // How many pairs of rows there are: both views in one tensor come x first, in an even number of rows.
  int64_t pairs(bool stacked) const {
    TORCH_CHECK_VALUE(!stacked || first_.size(0) % 2 == 0, op_, ": ", name_,
                      ": expected an even batch with both views, got shape ", first_.sizes());
    return stacked ? first_.size(0) / 2 : first_.size(0);
  }

  void check_dim(const char* name, const Tensor& tensor, int64_t dim, const char* layout) const {
    TORCH_CHECK_VALUE(tensor.dim() == dim, op_, ": ", name, ": expected ", dim, " dimensions ", layout, ", got shape ",
                      tensor.sizes());
  }

  void check_size(const char* name, const Tensor& tensor, const DeviceLimits& limits) const {
    for (int64_t i = 1; i < tensor.dim(); ++i)
      TORCH_CHECK_VALUE(tensor.size(i) < limits.size, op_, ": ", name, ": expected dimensions of less than ",
                        limits.size, ", got shape ", tensor.sizes());
  }

  void check_shape(const char* name, const Tensor& tensor, at::IntArrayRef shape) const {
    TORCH_CHECK_VALUE(tensor.device() == first_.device(), op_, ": ", name, ": expected a tensor on ", first_.device(),
                      ", got one on ", tensor.device());
    TORCH_CHECK_VALUE(tensor.sizes() == shape, op_, ": ", name, ": expected shape ", shape, ", got ", tensor.sizes());
  }

  void check(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) const {
    check_shape(name, tensor, shape);
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op_, ": ", name, ": expected dtype ", dtype, ", got ",
                     tensor.scalar_type());
  }

  void check(const char* name, const OptionalTensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) const {
    if (tensor) check(name, *tensor, shape, dtype);
  }

  // A second view has the shape and dtype of the first.
  void check_like(const char* name, const OptionalTensor& tensor, const Tensor& like) const {
    if (tensor) check(name, *tensor, like.sizes(), first_.scalar_type());
  }

  void check_needs(const c10::List<bool>& needs, size_t inputs) const {
    TORCH_CHECK_VALUE(needs.size() == inputs, op_, ": needs: expected ", inputs, " entries, got ", needs.size());
  }

 private:
  const char* op_;
  const char* name_;
  const Tensor& first_;
};

// The checked sizes of a problem, and the checker for what a backward gets beside it.

constexpr int64_t kWordRowStats = 4;  // of a query: maximum, 1 / sum of exponentials, each of both views

struct AttentionSizes {
  int64_t pairs, heads, key_heads, queries, keys, dim;

  int64_t group() const { return heads / key_heads; }  // query heads that share a key head
};

struct MeanHeadsSizes {
  int64_t pairs, queries, keys;
  int64_t heads[2], key_heads[2], dim[2];  // of each view
};

struct MapsSizes {
  int64_t pairs, heads, queries, keys;
};

struct PooledSizes {
  int64_t pairs, length, features;
};

inline AttentionSizes check(const char* op, const AttentionProblem& p, const DeviceLimits& limits) {
  const Checker checker(op, "query", p.query, 4, "[B, H, L, D]", limits);
  checker.check_dim("key", p.key, 4, "[B, H_kv, S, D]");
  checker.check_size("key", p.key, limits);
  const int64_t pairs = checker.pairs(!p.query_aug);
  const AttentionSizes sizes = {pairs, p.query.size(1), p.key.size(1), p.query.size(2), p.key.size(2), p.query.size(3)};
  TORCH_CHECK_VALUE(sizes.key_heads > 0 && sizes.heads % sizes.key_heads == 0, op,
                    ": key: expected a number of heads that divides ", sizes.heads, ", got shape ", p.key.sizes());
  checker.check("key", p.key, {p.query.size(0), sizes.key_heads, sizes.keys, sizes.dim}, p.query.scalar_type());
  TORCH_CHECK_VALUE(p.query_aug.has_value() == p.key_aug.has_value(), op,
                    ": query_aug, key_aug: expected both or neither");
  TORCH_CHECK_VALUE(sizes.dim > 0, op, ": query: expected at least one feature, got shape ", p.query.sizes());
  checker.check_like("query_aug", p.query_aug, p.query);
  checker.check_like("key_aug", p.key_aug, p.key);
  checker.check("key_mask", p.key_mask, {2 * pairs, sizes.keys}, at::kBool);
  checker.check("counted_queries", p.counted_queries, {pairs, sizes.queries}, at::kBool);
  const int64_t whole[] = {pairs, sizes.heads, sizes.queries, sizes.keys};
  checker.check("attn_bias", p.attn_bias, whole, accumulator_of(p.query));
  checker.check("attn_bias_aug", p.attn_bias_aug, whole, accumulator_of(p.query));
  TORCH_CHECK_VALUE(!p.softcap, op, ": softcap: computed by the reference only, use backend='reference'");
  return sizes;
}

inline AttentionSizes check_backward(const char* op, const AttentionProblem& p, const DeviceLimits& limits,
                                     const Tensor& grad_sums, const c10::List<bool>& needs) {
  const AttentionSizes sizes = check(op, p, limits);
  const Checker checker(op, "query", p.query, 4, "[B, H, L, D]", limits);
  checker.check_shape("grad_sums", grad_sums, {sizes.pairs, sizes.heads});
  checker.check_needs(needs, 4);
  return sizes;
}

inline AttentionSizes check_backward(const char* op, const AttentionProblem& p, const DeviceLimits& limits,
                                     Comparison comparison, const Tensor& grad_sums, const Tensor& row_stats,
                                     const c10::List<bool>& needs) {
  const AttentionSizes sizes = check_backward(op, p, limits, grad_sums, needs);
  const Checker checker(op, "query", p.query, 4, "[B, H, L, D]", limits);
  checker.check("row_stats", row_stats, {row_stats_of(comparison), sizes.pairs, sizes.heads, sizes.queries},
                accumulator_of(p.query));
  return sizes;
}

// What gradients are in until an upstream gradient is multiplied in. In float16 some would overflow or vanish.
inline at::ScalarType gradient_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf ? at::kFloat : tensor.scalar_type();
}

inline MeanHeadsSizes check(const char* op, const MeanHeadsProblem& p, const DeviceLimits& limits,
                            const c10::List<bool>& needs) {
  const Checker checker(op, "query", p.query, 4, "[B, H, L, D]", limits);
  const int64_t pairs = checker.pairs(!p.query_aug);
  TORCH_CHECK_VALUE(p.query_aug.has_value() == p.key_aug.has_value(), op,
                    ": query_aug, key_aug: expected both or neither");
  checker.check_dim("key", p.key, 4, "[B, H_kv, S, D]");
  MeanHeadsSizes sizes = {pairs, p.query.size(2), p.key.size(2), {}, {}, {}};
  const Tensor* queries[] = {&p.query, p.query_aug ? &*p.query_aug : &p.query};
  const Tensor* keys[] = {&p.key, p.key_aug ? &*p.key_aug : &p.key};
  const OptionalTensor* biases[] = {&p.attn_bias, p.attn_bias_aug ? &p.attn_bias_aug : &p.attn_bias};
  const char* names[][3] = {{"query", "key", "attn_bias"}, {"query_aug", "key_aug", "attn_bias_aug"}};
  for (int v = 0; v < 2; ++v) {
    const auto& [query_name, key_name, bias_name] = names[v];
    checker.check_dim(query_name, *queries[v], 4, "[B, H, L, D]");
    checker.check_dim(key_name, *keys[v], 4, "[B, H_kv, S, D]");
    const int64_t heads = sizes.heads[v] = queries[v]->size(1), key_heads = sizes.key_heads[v] = keys[v]->size(1);
    const int64_t dim = sizes.dim[v] = queries[v]->size(3), rows = p.query.size(0);
    TORCH_CHECK_VALUE(heads > 0 && key_heads > 0 && heads % key_heads == 0, op, ": ", key_name,
                      ": expected a number of heads that divides ", heads, ", got shape ", keys[v]->sizes());
    TORCH_CHECK_VALUE(dim > 0, op, ": ", query_name, ": expected at least one feature, got shape ",
                      queries[v]->sizes());
    checker.check(query_name, *queries[v], {rows, heads, sizes.queries, dim}, p.query.scalar_type());
    checker.check(key_name, *keys[v], {rows, key_heads, sizes.keys, dim}, p.query.scalar_type());
    checker.check_size(query_name, *queries[v], limits);
    checker.check_size(key_name, *keys[v], limits);
    checker.check(bias_name, *biases[v], {pairs, heads, sizes.queries, sizes.keys}, accumulator_of(p.query));
  }
  checker.check("key_mask", p.key_mask, {2 * pairs, sizes.keys}, at::kBool);
  checker.check("counted_queries", p.counted_queries, {pairs, sizes.queries}, at::kBool);
  checker.check_needs(needs, 4);
  for (int v = 0; v < 2; ++v) checker.check("head_weights", p.head_weights, {sizes.heads[v]}, accumulator_of(p.query));
  TORCH_CHECK_VALUE(!p.softcap, op, ": softcap: computed by the reference only, use backend='reference'");
  return sizes;
}

inline AttentionSizes check(const char* op, const WordsProblem& p, const DeviceLimits& limits) {
  const AttentionSizes sizes = check(op, p.tokens(), limits);
  TORCH_CHECK_VALUE(sizes.keys == sizes.queries, op, ": key: expected as many keys as queries (a self-attention), got ",
                    sizes.keys, " keys and ", sizes.queries, " queries");
  const Checker checker(op, "query", p.query, 4, "[B, H, L, D]", limits);
  checker.check("word_ids", p.word_ids, {2 * sizes.pairs, sizes.queries}, at::kLong);
  TORCH_CHECK_VALUE(p.words > 0 && p.words < limits.size, op, ": words: expected a positive number of less than ",
                    limits.size, ", got ", p.words);
  return sizes;
}

inline AttentionSizes check_backward(const char* op, const WordsProblem& p, const DeviceLimits& limits,
                                     const Tensor& grad_sums, const Tensor& row_stats, const c10::List<bool>& needs) {
  const AttentionSizes sizes = check(op, p, limits);
  const Checker checker(op, "query", p.query, 4, "[B, H, L, D]", limits);
  checker.check_shape("grad_sums", grad_sums, {sizes.pairs, sizes.heads});
  checker.check("row_stats", row_stats, {kWordRowStats, sizes.pairs, sizes.heads, sizes.queries},
                accumulator_of(p.query));
  checker.check_needs(needs, 4);
  return sizes;
}

inline MapsSizes check(const char* op, const MapsProblem& p, const DeviceLimits& limits) {
  const Checker checker(op, "attn", p.attn, 4, "[B, H, L, S]", limits);
  const int64_t pairs = checker.pairs(!p.attn_aug);
  const MapsSizes sizes = {pairs, p.attn.size(1), p.attn.size(2), p.attn.size(3)};
  checker.check_like("attn_aug", p.attn_aug, p.attn);
  checker.check("key_mask", p.key_mask, {2 * pairs, sizes.keys}, at::kBool);
  checker.check("counted_queries", p.counted_queries, {pairs, sizes.queries}, at::kBool);
  return sizes;
}

inline MapsSizes check_backward(const char* op, const MapsProblem& p, const DeviceLimits& limits,
                                const Tensor& grad_sums, const c10::List<bool>& needs) {
  const MapsSizes sizes = check(op, p, limits);
  const Checker checker(op, "attn", p.attn, 4, "[B, H, L, S]", limits);
  checker.check_shape("grad_sums", grad_sums, {sizes.pairs, sizes.heads});
  checker.check_needs(needs, 2);
  return sizes;
}

inline PooledSizes check(const char* op, const PooledProblem& p, const DeviceLimits& limits) {
  const Checker checker(op, "hidden", p.hidden, 3, "[B, L, C]", limits);
  const int64_t pairs = checker.pairs(!p.hidden_aug);
  const PooledSizes sizes = {pairs, p.hidden.size(1), p.hidden.size(2)};
  checker.check_like("hidden_aug", p.hidden_aug, p.hidden);
  checker.check("mask", p.mask, {2 * pairs, sizes.length}, at::kBool);
  return sizes;
}

inline PooledSizes check_backward(const char* op, const PooledProblem& p, const DeviceLimits& limits,
                                  const Tensor& grad_sums, const Tensor& difference, const c10::List<bool>& needs) {
  const PooledSizes sizes = check(op, p, limits);
  const Checker checker(op, "hidden", p.hidden, 3, "[B, L, C]", limits);
  checker.check_shape("grad_sums", grad_sums, {sizes.pairs});
  checker.check_shape("difference", difference, {sizes.pairs, sizes.features});
  checker.check_needs(needs, 2);
  return sizes;
}

}  // namespace ear_ops
