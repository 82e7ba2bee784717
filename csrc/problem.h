// The inputs of the operators as one object each. The schemas are in the Python package; `Fields` repeats the flat list
// of a schema, the only time in C++, and register.h makes a problem out of such a list. An input added to a schema is
// added here, to checks.h where it can be wrong, and to the kernels that use it.
//
// Words that mean one thing in all of csrc: a view is x or its augmentation x^a, and a pair is one of each. A row of
// scores is a query and a column is a key; a row of a tensor is what lies along its last dimension. A tile is a
// rectangle of scores. A block is a block of queries on the CPU and a block of threads on CUDA. A share is a part of
// the work. A vector is a machine register on the CPU, and the features of one query or key on CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace ear_ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename... Types>
struct TypeList {};

// A problem refers to the tensors of one call and lives no longer than that call. Where the second view of an input is
// missing, the first tensor holds both views, x first: its first dimension is 2B in place of B.
struct AttentionProblem {
  const Tensor& query;                    // [B, H, L, D]
  const Tensor& key;                      // [B, H_kv, S, D]
  const OptionalTensor& query_aug;        // [B, H, L, D]
  const OptionalTensor& key_aug;          // [B, H_kv, S, D]
  const OptionalTensor& key_mask;         // [2B, S] bool, x first; none: every key is real
  const OptionalTensor& counted_queries;  // [B, L] bool; none: every query counts
  const OptionalTensor& attn_bias;        // [B, H, L, S]
  const OptionalTensor& attn_bias_aug;    // [B, H, L, S]; none: the same bias for both views
  double scale;
  bool is_causal;
  int64_t window;                 // 0: none
  std::optional<double> softcap;  // no kernel computes it

  using Fields = TypeList<const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                          const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                          double, bool, int64_t, std::optional<double>>;
};

// The averages over the heads of two views, whose heads may be others. So H, H_kv and D differ between the views.
struct MeanHeadsProblem {
  const Tensor& query;                    // [B, H, L, D]
  const Tensor& key;                      // [B, H_kv, S, D]
  const OptionalTensor& query_aug;        // [B, H, L, D]
  const OptionalTensor& key_aug;          // [B, H_kv, S, D]
  const OptionalTensor& key_mask;         // [2B, S] bool, x first; none: every key is real
  const OptionalTensor& counted_queries;  // [B, L] bool; none: every query counts
  const OptionalTensor& attn_bias;        // [B, H, L, S]
  const OptionalTensor& attn_bias_aug;    // [B, H, L, S]; none: the same bias for both views
  const OptionalTensor& head_weights;     // [H] of both views, which add up to 1; none: 1 / H
  double scale, scale_aug;
  bool is_causal;
  int64_t window;                 // 0: none
  std::optional<double> softcap;  // no kernel computes it

  using Fields = TypeList<const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                          const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                          const OptionalTensor&, double, double, bool, int64_t, std::optional<double>>;
};

struct WordsProblem {
  const Tensor& query;                  // [B, H, L, D]
  const Tensor& key;                    // [B, H_kv, L, D]
  const OptionalTensor& query_aug;      // [B, H, L, D]
  const OptionalTensor& key_aug;        // [B, H_kv, L, D]
  const OptionalTensor& key_mask;       // [2B, L] bool, x first; none: every key is real
  const Tensor& word_ids;               // [2B, L] int64, x first: the word of each token; negative: none
  const OptionalTensor& attn_bias;      // [B, H, L, L]
  const OptionalTensor& attn_bias_aug;  // [B, H, L, L]; none: the same bias for both views
  double scale;
  bool is_causal;
  int64_t window;                 // 0: none
  std::optional<double> softcap;  // no kernel computes it
  int64_t words;                  // every word id is less

  using Fields = TypeList<const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                          const OptionalTensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, double,
                          bool, int64_t, std::optional<double>, int64_t>;

  // The same queries and keys without their words; refers to the tensors that this refers to.
  AttentionProblem tokens() const {
    static const OptionalTensor none;
    return {query,     key,           query_aug, key_aug,   key_mask, none,
            attn_bias, attn_bias_aug, scale,     is_causal, window,   softcap};
  }
};

struct MapsProblem {
  const Tensor& attn;                     // [B, H, L, S]
  const OptionalTensor& attn_aug;         // [B, H, L, S]
  const OptionalTensor& key_mask;         // [2B, S] bool
  const OptionalTensor& counted_queries;  // [B, L] bool

  using Fields = TypeList<const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&>;
};

struct PooledProblem {
  const Tensor& hidden;              // [B, L, C]
  const OptionalTensor& hidden_aug;  // [B, L, C]
  const OptionalTensor& mask;        // [2B, L] bool

  using Fields = TypeList<const Tensor&, const OptionalTensor&, const OptionalTensor&>;
};

}  // namespace ear_ops
