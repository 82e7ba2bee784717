// Compares the averages over the heads of two views. For a block of 64 queries, all heads of both views pass over the
// tiles of the keys twice, first for the statistics of their softmaxes:
//
//   memory     K of all heads, gathered once for each share       Q of a block, of all heads
//                | product
//   scratch    scores of a tile, [64 keys, 64 queries], of each head of both views
//                | add_head
//   scratch    e_h in place of the scores, and their sums
//                | compare
//   scratch    the slopes of the averages                     sums [B], added up over the blocks in order
//                | forward: add_slopes                           | backward: head_gradient
//   memory     row_stats [3, B, H, L] of each view            dS_h in place of e_h, and products with K and Q
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <numeric>

#include "../register.h"
#include "qk/mean_task.h"
#include "schedule.h"

namespace ear_ops::cpu {

namespace {

int64_t workers(const MeanInputs& p) {
  constexpr double kPerVector = 16;  // multiplications
  double products = 0;
  for (const ViewInputs& view : p.view) products += 1.0 * p.pairs * view.heads * p.queries * p.keys * view.dim;
  return workers_for(products / kPerVector);
}

int64_t blocks(int64_t queries) { return (queries + kBlock - 1) / kBlock; }

// Calls body(task, b, part) for every part of every pair; the pair is selected in the task.
template <typename Task, typename P, typename Body>
void run_parts(const MeanInputs& p, const P& products, int64_t parts, const Body& body) {
  const int64_t count = std::min(workers(p), p.pairs * parts);
  Arena measure(nullptr);
  Task(p, products, measure);
  const Scratch scratch(count, measure.used());
  run_tasks(p.pairs * parts, count, [&](int64_t worker, const auto& next) {
    Arena arena = scratch.of(worker);
    Task task(p, products, arena);
    int64_t selected = -1;
    for (int64_t i = next(); i < p.pairs * parts; i = next()) {
      if (i / parts != selected) task.select(selected = i / parts);
      if (!task.is_empty()) body(task, selected, i % parts);
    }
    products.release();
  });
}

// Calls body(block) for the part's blocks of queries, which are loaded.
template <typename Task, typename Body>
void for_blocks(Task& task, int64_t part, int64_t parts, const Body& body) {
  const int64_t all = blocks(task.counted.n_queries);
  for (int64_t block = part * all / parts; block < (part + 1) * all / parts; ++block) {
    task.load_queries(block * kBlock);
    body(block);
  }
}

template <typename P>
struct MeanForwardTask : MeanTask<P> {
  MeanForwardTask(const MeanInputs& inputs, const P& products, Arena& arena)
      : MeanTask<P>(inputs, products, arena, false) {}
};

template <typename P>
void forward(const MeanInputs& p, Tensor& sums, std::array<Tensor, 2>& row_stats) {
  using A = typename P::Accumulator;
  const P products(selection());
  A* saved[2] = {row_stats[0].data_ptr<A>(), row_stats[1].data_ptr<A>()};
  const int64_t per_pair = blocks(p.queries), parts = shares_per_task(p.pairs, workers(p), per_pair);
  const Tensor block_sums = at::zeros({p.pairs, per_pair}, sums.options().dtype(at::kDouble));
  double* block_sum = block_sums.data_ptr<double>();
  run_parts<MeanForwardTask<P>>(p, products, parts, [&](MeanForwardTask<P>& task, int64_t b, int64_t part) {
    for_blocks(task, part, parts, [&](int64_t block) {
      task.softmaxes();
      task.for_heads([&](int v, int64_t head) { std::fill_n(task.of_head(task.views[v].d, head), kBlock, A(0)); });
      double total = 0;
      task.for_tiles([&](int64_t t, int64_t n) {
        task.average(t, n);
        total += task.compare(t, n);
        task.for_heads([&](int v, int64_t head) {
          for (int64_t c = 0; c < task.lane_groups(); ++c)
            task.loops.add_slopes(task.exponentials(v, head, c, t, n), task.views[v].sum + c * kLanes,
                                  task.of_head(task.views[v].d, head) + c * kLanes);
        });
      });
      block_sum[b * per_pair + block] = total;
      task.for_heads([&](int v, int64_t head) {
        const int64_t all = p.pairs * p.view[v].heads * p.queries;
        const MeanView<P>& view = task.views[v];
        for (int64_t i = 0; i < task.n_queries; ++i) {
          A* to = saved[v] + task.saved_at(v, head, i);
          to[0] = task.of_head(view.max, head)[i];
          to[all] = task.of_head(view.inverse, head)[i];
          to[2 * all] = static_cast<A>(task.of_head(view.d, head)[i] / p.weight(head));
        }
      });
    });
  });
  A* sum = sums.data_ptr<A>();
  for (int64_t b = 0; b < p.pairs; ++b)
    sum[b] = static_cast<A>(std::accumulate(block_sum + b * per_pair, block_sum + (b + 1) * per_pair, 0.0));
}

// Of each view, shaped like the inputs; data null where it is not asked for.
struct MeanGradients {
  std::array<HeadsPointer, 2> query, key;
};

// Between tiles of a block: grad_queries_t[v] holds the sum over the tiles so far, of all heads.
template <typename P>
struct MeanBackwardTask : MeanTask<P> {
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  A *grad_queries_t[2], *grad_queries, *grad_keys[2];  // [heads, ld, kBlock]; [kBlock, ld]; [key_heads, keys, ld]
  Operand *left, *right;                               // dS^T of a tile

  MeanBackwardTask(const MeanInputs& inputs, const P& products, Arena& arena)
      : MeanTask<P>(inputs, products, arena, true) {
    const int64_t rows = round_up(std::min(inputs.queries, kBlock), P::kPadding);
    for (int v = 0; v < 2; ++v) {
      grad_queries_t[v] = arena.take<A>(inputs.view[v].heads * this->views[v].ld * rows);
      grad_keys[v] = arena.take<A>(grad_keys_size(inputs, v));
    }
    grad_queries = arena.take<A>(std::max(this->views[0].ld, this->views[1].ld) * rows);
    left = arena.take<Operand>(P::kInPairs * this->tile * rows);
    right = arena.take<Operand>(P::kInPairs * this->tile * rows);
  }

  static int64_t ld(const MeanInputs& inputs, int v) { return round_up(inputs.view[v].dim, P::kWidth); }
  static int64_t grad_keys_size(const MeanInputs& inputs, int v) {
    return inputs.view[v].key_heads * round_up(inputs.keys, P::kPadding) * ld(inputs, v);
  }

  A* grad_queries_of(int v, int64_t head) const {
    return grad_queries_t[v] + head * this->views[v].ld * round_up(std::min(this->inputs.queries, kBlock), P::kPadding);
  }

  // Adds the products of dS^T, which is in the place of the scores.
  void multiply_gradient(int v, int64_t head, int64_t t, int64_t n, bool of_queries, bool of_keys, A* of_head,
                         bool accumulate) {
    const int64_t rows = this->padded_queries, ld = this->views[v].ld;
    A* scores = this->scores_of(v, head, t);
    const Operand* weights_right = right;
    const Operand* weights_left = left;
    int64_t ld_weights = rows;
    if constexpr (P::kInPairs) {
      this->products.round(scores, kMeanLd, n, rows, of_keys ? left : nullptr, of_queries ? right : nullptr);
    } else {
      weights_right = weights_left = scores, ld_weights = kMeanLd;
    }
    if (of_queries)
      this->products.multiply(ld, rows, n, this->keys_t_of(v, this->key_head(v, head)) + t, this->padded_keys,
                              weights_right, ld_weights, grad_queries_of(v, head), rows, accumulate);
    if (of_keys)
      this->products.multiply(n, ld, rows, weights_left, ld_weights, this->rows_of(v, head), ld, of_head + t * ld, ld,
                              true);
  }
};

// The gradients of a pair's part of the queries, and what these add to those of the keys.
template <typename P>
void backward_part(MeanBackwardTask<P>& task, int64_t b, int64_t part, int64_t parts, typename P::Accumulator upstream,
                   const typename P::Accumulator* const saved[2], const MeanGradients& out) {
  using A = typename P::Accumulator;
  const MeanInputs& p = task.inputs;
  for_blocks(task, part, parts, [&](int64_t) {
    task.load_stats(saved);
    bool first_tile = true;
    task.for_tiles([&](int64_t t, int64_t n) {
      task.average(t, n);
      task.compare(t, n);
      task.for_heads([&](int v, int64_t head) {
        if (!out.query[v].data && !out.key[v].data) return;
        const MeanView<P>& view = task.views[v];
        for (int64_t c = 0; c < task.lane_groups(); ++c)
          task.loops.head_gradient(task.exponentials(v, head, c, t, n), view.sum + c * kLanes,
                                   task.logarithms ? view.top + c * kLanes : nullptr,
                                   task.of_head(view.d, head) + c * kLanes, static_cast<A>(p.view[v].scale) * upstream);
        A* grad_keys = task.grad_keys[v] + task.key_head(v, head) * task.padded_keys * view.ld;
        task.multiply_gradient(v, head, t, n, out.query[v].data, out.key[v].data, grad_keys, !first_tile);
      });
      first_tile = false;
    });
    if (first_tile) return;  // no query of the block has a key
    task.for_heads([&](int v, int64_t head) {
      if (!out.query[v].data) return;
      const int64_t rows = task.padded_queries, ld = task.views[v].ld;
      task.table.transpose(task.grad_queries_of(v, head), rows, ld, rows, task.grad_queries, ld);
      task.table.scatter_rows(task.grad_queries, ld, task.n_queries, p.view[v].dim, p.kind, out.query[v].row_stride,
                              task.counted.query + task.first, out.query[v].head(b, head));
    });
  });
}

// A thread makes all gradients of a pair. Few pairs are cut into parts, whose sums for the keys are added up in order.
// How many parts there are depends on the shape alone, so the result does not depend on the number of threads.
template <typename P>
void backward(const MeanInputs& p, const Tensor& grad_sums, const std::array<Tensor, 2>& row_stats,
              const MeanGradients& out) {
  using A = typename P::Accumulator;
  using Task = MeanBackwardTask<P>;
  constexpr int64_t kParts = 4;
  const P products(selection());
  const A* upstream = grad_sums.data_ptr<A>();
  const A* saved[2] = {row_stats[0].data_ptr<A>(), row_stats[1].data_ptr<A>()};
  const int64_t most = std::max<int64_t>(blocks(p.queries), 1);
  const int64_t parts = std::min(p.pairs >= kParts ? 1 : (kParts + p.pairs - 1) / std::max<int64_t>(p.pairs, 1), most);
  const int64_t sizes[2] = {Task::grad_keys_size(p, 0), Task::grad_keys_size(p, 1)}, size = sizes[0] + sizes[1];
  const Tensor partial = at::empty({parts > 1 ? p.pairs * parts * size : 0}, row_stats[0].options());
  const auto scatter = [&](const Task& task, int64_t b, A* const grad_keys[2]) {
    for (int v = 0; v < 2; ++v)
      for (int64_t head = 0; out.key[v].data && head < p.view[v].key_heads; ++head)
        task.table.scatter_rows(grad_keys[v] + head * task.padded_keys * task.views[v].ld, task.views[v].ld,
                                task.counted.n_keys, p.view[v].dim, p.kind, out.key[v].row_stride, task.counted.key,
                                out.key[v].head(b, head));
  };
  run_parts<Task>(p, products, parts, [&](Task& task, int64_t b, int64_t part) {
    if (parts > 1) {
      task.grad_keys[0] = partial.data_ptr<A>() + (b * parts + part) * size;
      task.grad_keys[1] = task.grad_keys[0] + sizes[0];
    }
    for (int v = 0; v < 2; ++v) std::fill_n(task.grad_keys[v], sizes[v], A(0));
    // A pair without upstream has no gradient, also where its divergence is infinite.
    if (upstream[b] != 0) backward_part(task, b, part, parts, upstream[b], saved, out);
    if (parts == 1) scatter(task, b, task.grad_keys);
  });
  if (parts == 1) return;
  run_parts<Task>(p, products, 1, [&](Task& task, int64_t b, int64_t) {
    A* total = partial.data_ptr<A>() + b * parts * size;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < size; ++i) total[i] += total[part * size + i];
    A* const grad_keys[2] = {total, total + sizes[0]};
    scatter(task, b, grad_keys);
  });
}

// One operator. kExchanged: the comparison takes the second view as its first one.
template <Comparison kComparison, bool kExchanged = false>
struct MeanHeads {
  static constexpr const char* kOp = kComparison == Comparison::kMse  ? "qk_mean_attention_mse"
                                     : kComparison == Comparison::kJs ? "qk_mean_attention_js"
                                     : kExchanged                     ? "qk_mean_attention_reverse_kl"
                                                                      : "qk_mean_attention_kl";

  static std::tuple<Tensor, Tensor, Tensor> forward(const MeanHeadsProblem& problem) {
    const MeanInputs inputs(problem, check(kOp, problem, kLimits), kComparison, kExchanged);
    const auto options = problem.query.options().dtype(accumulator_of(problem.query));
    Tensor sums = at::zeros({inputs.pairs}, options);
    std::array<Tensor, 2> row_stats;
    for (int v = 0; v < 2; ++v)
      row_stats[v] = at::zeros({kMeanRowStats, inputs.pairs, inputs.view[v].heads, inputs.queries}, options);
    with_products(inputs.kind, [&]<typename P>() { cpu::forward<P>(inputs, sums, row_stats); });
    return {sums, row_stats[kExchanged], row_stats[!kExchanged]};
  }

  static std::vector<Tensor> backward(const Tensor& grad_sums, const MeanHeadsProblem& problem, const Tensor& row_stats,
                                      const Tensor& row_stats_aug, const c10::List<bool>& needs) {
    const MeanInputs inputs(problem, check_backward(kOp, problem, kLimits, grad_sums, row_stats, row_stats_aug, needs),
                            kComparison, kExchanged);
    Gradients gradients =
        make_gradients({{problem.query, problem.query_aug}, {problem.key, problem.key_aug}}, needs, inputs.pairs,
                       [](const Tensor& like) { return at::zeros(like.sizes(), like.options()); });
    MeanGradients out;
    for (int v = 0; v < 2; ++v) {
      out.query[v] = HeadsPointer(gradients.views[0][inputs.view_of_problem(v)]);
      out.key[v] = HeadsPointer(gradients.views[1][inputs.view_of_problem(v)]);
    }
    const Tensor stats[] = {row_stats.contiguous(), row_stats_aug.contiguous()};
    const std::array<Tensor, 2> of_views = {stats[kExchanged], stats[!kExchanged]};
    const Tensor upstream = grad_sums.to(accumulator_of(problem.query)).contiguous();
    with_products(inputs.kind, [&]<typename P>() { cpu::backward<P>(inputs, upstream, of_views, out); });
    return gradients.returned;
  }

  static void add_to(torch::Library& library) {
    register_operator<&forward, &backward>(library, kOp, c10::DispatchKey::CPU);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(ear_ops, m) {
  MeanHeads<Comparison::kMse>::add_to(m);
  MeanHeads<Comparison::kKl>::add_to(m);
  MeanHeads<Comparison::kKl, true>::add_to(m);
  MeanHeads<Comparison::kJs>::add_to(m);
}

}  // namespace ear_ops::cpu
