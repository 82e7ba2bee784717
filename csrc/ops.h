// Host entry points of the operators, the same for every device; the schemas are in ear_ops/_library.py. Both views
// come in one tensor (the *_aug arguments empty, [2B, ...], x first) or in two.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ear_ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> qk_attention_mse(  // sums [B, H], row_stats [6, B, H, L]
    const Tensor& query,                      // [B, H, L, D]
    const Tensor& key,                        // [B, H_kv, S, D]
    const OptionalTensor& query_aug,          // [B, H, L, D]
    const OptionalTensor& key_aug,            // [B, H_kv, S, D]
    const OptionalTensor& key_mask,           // [2B, S] bool
    const OptionalTensor& counted_queries,    // [B, L] bool
    const OptionalTensor& attn_bias,          // [B, H, L, S]
    const OptionalTensor& attn_bias_aug,      // [B, H, L, S]
    double scale, bool is_causal, int64_t window, std::optional<double> softcap);

std::vector<Tensor> qk_attention_mse_backward(  // the gradients that `needs` names, shaped like their inputs
    const Tensor& grad_sums,                    // [B, H]
    const Tensor& query,                        // [B, H, L, D]
    const Tensor& key,                          // [B, H_kv, S, D]
    const OptionalTensor& query_aug,            // [B, H, L, D]
    const OptionalTensor& key_aug,              // [B, H_kv, S, D]
    const OptionalTensor& key_mask,             // [2B, S] bool
    const OptionalTensor& counted_queries,      // [B, L] bool
    const OptionalTensor& attn_bias,            // [B, H, L, S]
    const OptionalTensor& attn_bias_aug,        // [B, H, L, S]
    double scale, bool is_causal, int64_t window, std::optional<double> softcap,
    const Tensor& row_stats,        // [6, B, H, L]
    const c10::List<bool>& needs);  // query, key, query_aug, key_aug

Tensor attention_mse(                        // [B, H]
    const Tensor& attn,                      // [B, H, L, S]
    const OptionalTensor& attn_aug,          // [B, H, L, S]
    const OptionalTensor& key_mask,          // [2B, S] bool
    const OptionalTensor& counted_queries);  // [B, L] bool

std::vector<Tensor> attention_mse_backward(const Tensor& grad_sums,                // [B, H]
                                           const Tensor& attn,                     // [B, H, L, S]
                                           const OptionalTensor& attn_aug,         // [B, H, L, S]
                                           const OptionalTensor& key_mask,         // [2B, S] bool
                                           const OptionalTensor& counted_queries,  // [B, L] bool
                                           const c10::List<bool>& needs);          // attn, attn_aug

std::tuple<Tensor, Tensor> pooled_distance(  // sums [B], difference of the means [B, C]
    const Tensor& hidden,                    // [B, L, C]
    const OptionalTensor& hidden_aug,        // [B, L, C]
    const OptionalTensor& mask);             // [2B, L] bool

std::vector<Tensor> pooled_distance_backward(const Tensor& grad_sums, const Tensor& hidden,
                                             const OptionalTensor& hidden_aug, const OptionalTensor& mask,
                                             const Tensor& difference,
                                             const c10::List<bool>& needs);  // hidden, hidden_aug

// Best multiplications and additions per second of an [m, k] x [k, n] product, and exponentials per second, on all
// threads.
std::vector<double> cpu_rates(int64_t m, int64_t n, int64_t k, at::ScalarType dtype);

}  // namespace ear_ops
