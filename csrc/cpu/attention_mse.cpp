// Compares attention probabilities that exist, [B, H, L, S], in one pass over both views.
//
//   memory      P and T, some rows of one head; masks
//                 | four vectors at a time, memory asked for 2 KiB ahead
//   registers   p - t, masked keys being 0
//                 | squared, summed in float32 over 1024 elements, then in float64
//   memory      forward: sums [B, H], the shares of a head added in order
//               backward: 2 g (p - t) and its negative, contiguous
//
// A share is some rows of one head, about 64 Ki elements.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <numeric>

#include "../register.h"
#include "isa.h"
#include "schedule.h"
#include "tensors.h"

namespace ear_ops::cpu {

namespace {

constexpr const char* kOp = "attention_mse";

// The memory of a checked problem.
struct Maps : MapsSizes {
  std::array<Tensor, 2> views;
  std::array<HeadsPointer, 2> data;
  OptionalTensor key_mask, counted_queries;

  Maps(const MapsProblem& problem, const MapsSizes& sizes)
      : MapsSizes(sizes),
        views(dense_views(problem.attn, problem.attn_aug, sizes.pairs)),
        data{HeadsPointer(views[0]), HeadsPointer(views[1])},
        key_mask(contiguous(problem.key_mask)),
        counted_queries(contiguous(problem.counted_queries)) {}

  // Few enough that a single head is shared out, many enough to be worth a thread.
  int64_t rows_per_share() const { return std::max<int64_t>(1, (int64_t(1) << 16) / std::max<int64_t>(keys, 1)); }
  int64_t shares_per_head() const {  // none where there is no element
    return keys == 0 ? 0 : (queries + rows_per_share() - 1) / rows_per_share();
  }
};

// Calls body(share, head of all heads of all pairs, first row, rows) for every share of every head.
template <typename Body>
void for_shares(const Maps& m, const Body& body) {
  const int64_t element = m.views[0].element_size(), per_share = m.rows_per_share(), per_head = m.shares_per_head();
  const int64_t shares = m.pairs * m.heads * per_head;
  const Kind kind = kind_of(m.views[0]);
  run_tasks(shares, workers_for(static_cast<double>(m.views[0].numel())), [&](int64_t, const auto& next) {
    for (int64_t share = next(); share < shares; share = next()) {
      const int64_t head = share / per_head, b = head / m.heads, begin = share % per_head * per_share;
      const uint8_t* counted = mask_row(m.counted_queries, b);
      RowPairs rows = {kind, {}, {}, std::min(per_share, m.queries - begin), m.keys, {}, counted};
      if (counted) rows.counted += begin;
      for (int v = 0; v < 2; ++v) {
        rows.data[v] = m.data[v].head(b, head % m.heads) + begin * m.data[v].row_stride * element;
        rows.stride[v] = m.data[v].row_stride;
        rows.real[v] = mask_row(m.key_mask, v * m.pairs + b);
      }
      body(share, head, begin, rows);
    }
  });
}

Tensor attention_mse(const MapsProblem& problem) {
  const Maps maps(problem, check(kOp, problem, kLimits));
  Tensor sums = at::zeros({maps.pairs, maps.heads}, problem.attn.options().dtype(accumulator_of(problem.attn)));
  with_accumulator(problem.attn, [&]<typename A>() {
    const auto& table = kernels<A>(*selection().isa);
    const int64_t heads = maps.pairs * maps.heads, per_head = maps.shares_per_head();
    std::vector<double> share_sums(heads * per_head);
    for_shares(maps, [&](int64_t share, int64_t, int64_t, const RowPairs& rows) {
      share_sums[share] = table.squared_difference(rows);
    });
    A* sum = sums.data_ptr<A>();
    for (auto head = share_sums.begin(); head != share_sums.end(); head += per_head)
      *sum++ = static_cast<A>(std::accumulate(head, head + per_head, 0.0));
  });
  return sums;
}

std::vector<Tensor> attention_mse_backward(const Tensor& grad_sums, const MapsProblem& problem,
                                           const c10::List<bool>& needs) {
  const Maps maps(problem, check_backward(kOp, problem, kLimits, grad_sums, needs));
  // Contiguous [B, H, L, S], every element of which is written.
  Gradients gradients = make_gradients({{problem.attn, problem.attn_aug}}, needs, maps.pairs,
                                       [](const Tensor& like) { return at::empty(like.sizes(), like.options()); });
  std::array<char*, 2> out = {};
  for (int v = 0; v < 2; ++v)
    if (const Tensor& gradient = gradients.views[0][v]; gradient.defined())
      out[v] = static_cast<char*>(gradient.data_ptr());
  const Tensor upstream = grad_sums.to(accumulator_of(problem.attn)).contiguous();
  const int64_t row_bytes = maps.keys * problem.attn.element_size();
  with_accumulator(problem.attn, [&]<typename A>() {
    const auto& table = kernels<A>(*selection().isa);
    const A* of_head = upstream.data_ptr<A>();
    for_shares(maps, [&](int64_t, int64_t head, int64_t begin, const RowPairs& rows) {
      char* to[2] = {};
      for (int v = 0; v < 2; ++v)
        if (out[v]) to[v] = out[v] + (head * maps.queries + begin) * row_bytes;
      table.difference_gradient(rows, 2 * of_head[head], to[0], to[1]);
    });
  });
  return gradients.returned;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ear_ops, m) {
  register_operator<&attention_mse, &attention_mse_backward>(m, kOp, c10::DispatchKey::CPU);
}

}  // namespace ear_ops::cpu
