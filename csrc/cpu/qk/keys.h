// The keys of one key head, as operands of matrix products.
#pragma once

#include "../products.h"
#include "counted.h"

namespace ear_ops::cpu {

// Between calls of pack, the j-th key of view v is one row of `ld` elements, zero beyond the head dimension. Keys below
// in_tensor_[v] are read where they lie in the tensor; the others are copies in gathered_[v]. The rows [n_keys, padded)
// are zero.
template <typename P>
class PackedKeys {
 public:
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  int64_t padded = 0;  // n_keys, rounded up to a multiple that products take

  PackedKeys(const QKInputs& inputs, const P& products, int64_t ld, bool transposed, Arena& arena)
      : inputs_(inputs), products_(products), ld_(ld) {
    const int64_t all = round_up(inputs.keys, P::kPadding);
    const bool may_gather = !in_place() || inputs.key_mask;
    for (int v = 0; v < 2; ++v) {
      gathered_[v] = arena.take<Operand>((may_gather ? all : P::kPadding) * ld);
      keys_t_[v] = arena.take<Operand>(transposed * all * ld);
    }
  }

  // `transposed`: for add_to_grad_queries too.
  void pack(const Counted& counted, int64_t b, int64_t key_head, bool transposed) {
    padded = round_up(counted.n_keys, P::kPadding);
    for (int v = 0; v < 2; ++v) {
      const char* head = inputs_.key[v].head(b, key_head);
      const uint8_t* real = inputs_.key_mask_of(v, b);
      in_tensor_[v] = 0;
      if (in_place() && counted.keys_together() && !counted.masks_differ) {
        in_tensor_[v] = counted.n_keys / P::kPadding * P::kPadding;
        tensor_ld_[v] = inputs_.key[v].row_stride;
        tensor_[v] = reinterpret_cast<const Operand*>(head) + counted.key[0] * tensor_ld_[v];
      }
      const int64_t rest = padded - in_tensor_[v];
      products_.gather(head, inputs_.kind, inputs_.key[v].row_stride, counted.key + in_tensor_[v], real,
                       counted.n_keys - in_tensor_[v], rest, inputs_.dim, ld_, gathered_[v]);
      if (!transposed) continue;
      products_.transpose(tensor_[v], tensor_ld_[v], in_tensor_[v], ld_, keys_t_[v], padded);
      products_.transpose(gathered_[v], ld_, rest, ld_, keys_t_[v] + in_tensor_[v], padded);
    }
  }

  // scores [n, rows] = the keys [t, t + n) of view v times queries_t [ld, rows].
  void score(int v, int64_t t, int64_t n, const Operand* queries_t, int64_t rows, A* scores, int64_t ld_scores) const {
    const int64_t placed = std::clamp<int64_t>(in_tensor_[v] - t, 0, n);
    if (placed)
      products_.multiply(placed, rows, ld_, tensor_[v] + t * tensor_ld_[v], tensor_ld_[v], queries_t, rows, scores,
                         ld_scores, false);
    if (placed < n)
      products_.multiply(n - placed, rows, ld_, gathered_[v] + (t + placed - in_tensor_[v]) * ld_, ld_, queries_t, rows,
                         scores + placed * ld_scores, ld_scores, false);
  }

  // grad_queries_t [ld, rows] (+)= K^T of the keys [t, t + n), times weights [n, rows].
  void add_to_grad_queries(int v, int64_t t, int64_t n, const Operand* weights, int64_t ld_weights, int64_t rows,
                           A* grad_queries_t, bool accumulate) const {
    products_.multiply(ld_, rows, n, keys_t_[v] + t, padded, weights, ld_weights, grad_queries_t, rows, accumulate);
  }

 private:
  const QKInputs& inputs_;
  const P& products_;
  const int64_t ld_;
  Operand *gathered_[2], *keys_t_[2];
  const Operand* tensor_[2] = {};
  int64_t tensor_ld_[2] = {}, in_tensor_[2] = {};

  // Whether rows of the tensor are operands as they are. Many rows that lie far apart crowd into few sets of the caches
  // and need many pages, so a copy is faster.
  bool in_place() const {
    constexpr int64_t kMostApart = 2 * kTile;
    const bool near = inputs_.keys <= kMostApart || inputs_.key[0].row_stride == inputs_.dim;
    return near && inputs_.dim == ld_ && inputs_.kind == P::kOperand;
  }
};

}  // namespace ear_ops::cpu
