// MSE between given attention probabilities: one pass over both views, row by row.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "isa.h"
#include "schedule.h"
#include "views.h"

namespace ear_ops {

namespace cpu {
namespace {

constexpr const char* kOp = "attention_mse";

struct Maps {
  int64_t pairs, heads, queries, keys;
  std::array<Tensor, 2> views;
  std::array<Heads, 2> data;
  OptionalTensor key_mask, counted_queries;
  Kind kind;
};

Maps make_maps(const Tensor& attn, const OptionalTensor& attn_aug, const OptionalTensor& key_mask,
               const OptionalTensor& counted_queries) {
  check_dim(kOp, "attn", attn, 4, "[B, H, L, S]");
  Maps m;
  m.pairs = pairs_of(kOp, "attn", attn, !attn_aug.has_value());
  m.heads = attn.size(1), m.queries = attn.size(2), m.keys = attn.size(3);
  check_optional(kOp, "attn_aug", attn_aug, attn.sizes(), attn.scalar_type());
  check_optional(kOp, "key_mask", key_mask, {2 * m.pairs, m.keys}, at::kBool);
  check_optional(kOp, "counted_queries", counted_queries, {m.pairs, m.queries}, at::kBool);
  m.views = split_views(attn, attn_aug, m.pairs);
  m.data = {Heads(m.views[0]), Heads(m.views[1])};
  m.key_mask = dense(key_mask), m.counted_queries = dense(counted_queries);
  m.kind = kind_of(kOp, attn);
  return m;
}

// Rows of a task: few enough that a single head is shared out, many enough to be worth a thread.
int64_t rows_per_task(const Maps& m) { return std::max<int64_t>(1, (int64_t(1) << 16) / std::max<int64_t>(m.keys, 1)); }

// body(task, b, h, i, row of x, row of x^a) for every counted row.
template <typename Body>
void for_rows(const Maps& m, const Body& body) {
  const int64_t element = m.views[0].element_size(), per_task = rows_per_task(m);
  const int64_t tasks_per_head = (m.queries + per_task - 1) / per_task, tasks = m.pairs * m.heads * tasks_per_head;
  run_tasks(tasks, workers_for(static_cast<double>(m.views[0].numel())), [&](int64_t, const auto& next) {
    for (int64_t task = next(); task < tasks; task = next()) {
      const int64_t b = task / tasks_per_head / m.heads, h = task / tasks_per_head % m.heads;
      const uint8_t* counted = mask_row(m.counted_queries, b);
      const int64_t begin = task % tasks_per_head * per_task;
      for (int64_t i = begin; i < std::min(begin + per_task, m.queries); ++i) {
        if (counted && !counted[i]) continue;
        body(task, b, h, i, m.data[0].head(b, h) + i * m.data[0].row_stride * element,
             m.data[1].head(b, h) + i * m.data[1].row_stride * element);
      }
    }
  });
}

template <typename A>
void forward(const Maps& m, Tensor& sums) {
  const auto& table = kernels<A>(*selection().isa);
  const int64_t per_task = rows_per_task(m);
  const Tensor task_sums =
      at::zeros({m.pairs, m.heads, (m.queries + per_task - 1) / per_task}, sums.options().dtype(at::kDouble));
  double* task_sum = task_sums.data_ptr<double>();
  for_rows(m, [&](int64_t task, int64_t b, int64_t, int64_t, const char* row, const char* row_aug) {
    task_sum[task] += table.squared_difference(row, row_aug, m.kind, mask_row(m.key_mask, b),
                                               mask_row(m.key_mask, m.pairs + b), m.keys);
  });
  sums.copy_(task_sums.sum(-1));
}

template <typename A>
void backward(const Maps& m, const Tensor& grad_sums, const std::array<Heads, 2>& out) {
  const auto& table = kernels<A>(*selection().isa);
  const A* upstream = grad_sums.data_ptr<A>();
  const int64_t element = m.views[0].element_size();
  const bool stream = exceeds_caches(m.views[0]);
  for_rows(m, [&](int64_t, int64_t b, int64_t h, int64_t i, const char* row, const char* row_aug) {
    char* to[2] = {};
    for (int v = 0; v < 2; ++v)
      if (out[v].data) to[v] = out[v].head(b, h) + i * out[v].row_stride * element;
    table.difference_gradient(row, row_aug, m.kind, mask_row(m.key_mask, b), mask_row(m.key_mask, m.pairs + b), m.keys,
                              2 * upstream[b * m.heads + h], stream, to[0], to[1]);
  });
}

}  // namespace
}  // namespace cpu

Tensor attention_mse(const Tensor& attn, const OptionalTensor& attn_aug, const OptionalTensor& key_mask,
                     const OptionalTensor& counted_queries) {
  const auto maps = cpu::make_maps(attn, attn_aug, key_mask, counted_queries);
  Tensor sums = at::empty({maps.pairs, maps.heads}, attn.options().dtype(cpu::accumulator_of(attn)));
  if (maps.kind == cpu::Kind::kFloat64) {
    cpu::forward<double>(maps, sums);
  } else {
    cpu::forward<float>(maps, sums);
  }
  return sums;
}

std::vector<Tensor> attention_mse_backward(const Tensor& grad_sums, const Tensor& attn, const OptionalTensor& attn_aug,
                                           const OptionalTensor& key_mask, const OptionalTensor& counted_queries,
                                           const c10::List<bool>& needs) {
  const auto maps = cpu::make_maps(attn, attn_aug, key_mask, counted_queries);
  check_shape(cpu::kOp, "grad_sums", grad_sums, {maps.pairs, maps.heads});
  TORCH_CHECK_VALUE(needs.size() == 2, cpu::kOp, ": needs: expected 2 entries, got ", needs.size());
  std::vector<Tensor> gradients;
  auto make = [&]() {
    gradients.push_back(counted_queries ? at::zeros(attn.sizes(), attn.options())
                                        : at::empty(attn.sizes(), attn.options()));
    return gradients.back();
  };
  std::array<cpu::Heads, 2> out;
  if (needs.get(0)) {
    const Tensor gradient = make();
    out[0] = cpu::Heads(gradient);
    if (!attn_aug) out[1] = cpu::Heads(gradient.narrow(0, maps.pairs, maps.pairs));
  }
  if (needs.get(1) && attn_aug) out[1] = cpu::Heads(make());
  const Tensor upstream = grad_sums.to(cpu::accumulator_of(attn)).contiguous();
  if (maps.kind == cpu::Kind::kFloat64) {
    cpu::backward<double>(maps, upstream, out);
  } else {
    cpu::backward<float>(maps, upstream, out);
  }
  return gradients;
}

}  // namespace ear_ops
