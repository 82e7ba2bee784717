// MSE between given attention probabilities: one pass over both views, row by row.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <numeric>

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

int64_t tasks_per_head(const Maps& m) {  // none where there is no element
  return m.keys == 0 ? 0 : (m.queries + rows_per_task(m) - 1) / rows_per_task(m);
}

// body(task, head of all heads of all pairs, first row, rows) for every piece of every head.
template <typename Body>
void for_pieces(const Maps& m, const Body& body) {
  const int64_t element = m.views[0].element_size(), per_task = rows_per_task(m), per_head = tasks_per_head(m);
  const int64_t tasks = m.pairs * m.heads * per_head;
  run_tasks(tasks, workers_for(static_cast<double>(m.views[0].numel())), [&](int64_t, const auto& next) {
    for (int64_t task = next(); task < tasks; task = next()) {
      const int64_t head = task / per_head, b = head / m.heads, begin = task % per_head * per_task;
      const uint8_t* counted = mask_row(m.counted_queries, b);
      RowPairs rows = {m.kind, {}, {}, std::min(per_task, m.queries - begin), m.keys, {}, counted};
      if (counted) rows.counted += begin;
      for (int v = 0; v < 2; ++v) {
        rows.data[v] = m.data[v].head(b, head % m.heads) + begin * m.data[v].row_stride * element;
        rows.stride[v] = m.data[v].row_stride;
        rows.real[v] = mask_row(m.key_mask, v * m.pairs + b);
      }
      body(task, head, begin, rows);
    }
  });
}

template <typename A>
void forward(const Maps& m, Tensor& sums) {
  const auto& table = kernels<A>(*selection().isa);
  const int64_t heads = m.pairs * m.heads, per_head = tasks_per_head(m);
  std::vector<double> task_sums(heads * per_head);
  for_pieces(m, [&](int64_t task, int64_t, int64_t, const RowPairs& rows) {
    task_sums[task] = table.squared_difference(rows);
  });
  A* sum = sums.data_ptr<A>();
  for (auto head = task_sums.begin(); head != task_sums.end(); head += per_head)
    *sum++ = static_cast<A>(std::accumulate(head, head + per_head, 0.0));
}

// out: of each view, contiguous [B, H, L, S], every element of which is written; null: not asked for.
template <typename A>
void backward(const Maps& m, const Tensor& grad_sums, const std::array<char*, 2>& out) {
  const auto& table = kernels<A>(*selection().isa);
  const A* upstream = grad_sums.data_ptr<A>();
  const int64_t row_bytes = m.keys * m.views[0].element_size();
  for_pieces(m, [&](int64_t, int64_t head, int64_t begin, const RowPairs& rows) {
    char* to[2] = {};
    for (int v = 0; v < 2; ++v)
      if (out[v]) to[v] = out[v] + (head * m.queries + begin) * row_bytes;
    table.difference_gradient(rows, 2 * upstream[head], to[0], to[1]);
  });
}

}  // namespace
}  // namespace cpu

Tensor attention_mse(const Tensor& attn, const OptionalTensor& attn_aug, const OptionalTensor& key_mask,
                     const OptionalTensor& counted_queries) {
  const auto maps = cpu::make_maps(attn, attn_aug, key_mask, counted_queries);
  Tensor sums = at::zeros({maps.pairs, maps.heads}, attn.options().dtype(cpu::accumulator_of(attn)));
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
    gradients.push_back(at::empty(attn.sizes(), attn.options()));
    return static_cast<char*>(gradients.back().data_ptr());
  };
  std::array<char*, 2> out = {};
  if (needs.get(0)) {
    out[0] = make();
    if (!attn_aug) out[1] = out[0] + gradients[0].nbytes() / 2;
  }
  if (needs.get(1) && attn_aug) out[1] = make();
  const Tensor upstream = grad_sums.to(cpu::accumulator_of(attn)).contiguous();
  if (maps.kind == cpu::Kind::kFloat64) {
    cpu::backward<double>(maps, upstream, out);
  } else {
    cpu::backward<float>(maps, upstream, out);
  }
  return gradients;
}

}  // namespace ear_ops
