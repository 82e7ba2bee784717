// Compares the averages over the heads of two views, and makes the gradients in the same call: the gradient of the sum
// is one number a pair, so all that is left for a backward is to multiply by it. A block of 64 queries passes over its
// keys three times:
//
//   memory     K of all heads, gathered once for each share       Q of a block, of all heads
//                | product
//   scratch    scores, [keys, 64 queries], of each head of both views
//                | add_softmax                                    the statistics of the softmaxes
//                | add_head
//   scratch    e_h in place of the scores, and their sums
//                | compare                                        sums [B], added up over the blocks in order
//   scratch    the slopes of the averages
//                | add_slopes                                     d of each row
//                | head_gradient
//   scratch    dS_h in place of e_h, and products with K and Q
//
// Scores of short rows stay in memory in between. Those of longer ones are multiplied again for each pass.
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

// Of each view, shaped like the inputs, in gradient_dtype; data null where it is not asked for.
struct MeanGradients {
  std::array<HeadsPointer, 2> query, key;

  bool of_view(int v) const { return query[v].data || key[v].data; }
  bool any() const { return of_view(0) || of_view(1); }
};

// The gradients of a block of queries, and of the keys as far as its pair's part of the queries goes. Between tiles of
// a block, grad_queries_t[v] holds the sum over the tiles so far, of all heads.
template <typename P>
struct MeanGradientTask : MeanTask<P> {
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  const Kind gradient_kind = this->inputs.kind == Kind::kFloat16 ? Kind::kFloat32 : this->inputs.kind;
  const MeanGradients& out;
  A *grad_queries_t[2], *grad_queries, *grad_keys[2];  // [heads, ld, kBlock]; [kBlock, ld]; [key_heads, keys, ld]
  Operand *left, *right;                               // dS^T of a tile

  MeanGradientTask(const MeanInputs& inputs, const P& products, const MeanGradients& gradients, Arena& arena)
      : MeanTask<P>(inputs, products, arena, gradients.any()), out(gradients) {
    const bool any = out.any();
    const int64_t rows = round_up(std::min(inputs.queries, kBlock), P::kPadding);
    for (int v = 0; v < 2; ++v) {
      grad_queries_t[v] = arena.take<A>(any * inputs.view[v].heads * this->views[v].ld * rows);
      grad_keys[v] = arena.take<A>(any * grad_keys_size(inputs, v));
    }
    grad_queries = arena.take<A>(any * std::max(this->views[0].ld, this->views[1].ld) * rows);
    left = arena.take<Operand>(any * P::kInPairs * this->wide_tile * rows);
    right = arena.take<Operand>(any * P::kInPairs * this->wide_tile * rows);
  }

  static int64_t grad_keys_size(const MeanInputs& inputs, int v) {
    const int64_t ld = round_up(inputs.view[v].dim, P::kWidth);
    return inputs.view[v].key_heads * round_up(inputs.keys, P::kPadding) * ld;
  }

  // Of the block of queries that is loaded.
  void make_gradients() {
    if (this->keeps_rows) {
      this->for_heads([&](int v, int64_t head) {
        if (!out.of_view(v)) return;
        this->for_tiles(this->wide_tile, [&](int64_t t, int64_t n) { add_gradient(v, head, t, n); });
      });
    } else {
      this->for_tiles(this->tile, [&](int64_t t, int64_t n) {
        this->average(t, n);
        this->compare(t, n);
        this->for_heads([&](int v, int64_t head) {
          if (out.of_view(v)) add_gradient(v, head, t, n);
        });
      });
    }
  }

  void write_queries(int64_t b) {
    this->for_heads([&](int v, int64_t head) {
      if (!out.query[v].data) return;
      const int64_t rows = this->padded_queries, ld = this->views[v].ld;
      this->table.transpose(grad_queries_of(v, head), rows, ld, rows, grad_queries, ld);
      this->table.scatter_rows(grad_queries, ld, this->n_queries, this->inputs.view[v].dim, gradient_kind,
                               out.query[v].row_stride, this->counted.query + this->first, out.query[v].head(b, head));
    });
  }

  void write_keys(int64_t b, A* const from[2]) {
    for (int v = 0; v < 2; ++v)
      for (int64_t head = 0; out.key[v].data && head < this->inputs.view[v].key_heads; ++head)
        this->table.scatter_rows(from[v] + head * this->padded_keys * this->views[v].ld, this->views[v].ld,
                                 this->counted.n_keys, this->inputs.view[v].dim, gradient_kind, out.key[v].row_stride,
                                 this->counted.key, out.key[v].head(b, head));
  }

 private:
  A* grad_queries_of(int v, int64_t head) const {
    return grad_queries_t[v] + head * this->views[v].ld * round_up(std::min(this->inputs.queries, kBlock), P::kPadding);
  }

  // e_h of the keys [t, t + n) become dS_h, which are multiplied.
  void add_gradient(int v, int64_t head, int64_t t, int64_t n) {
    const MeanView<P>& view = this->views[v];
    for (int64_t c = 0; c < this->lane_groups(); ++c)
      this->loops.head_gradient(this->exponentials(v, head, c, t, n), this->sum_of(v, t) + c * kLanes,
                                this->logarithms ? this->top_of(v, t) + c * kLanes : nullptr,
                                this->of_head(view.d, head) + c * kLanes, static_cast<A>(this->inputs.view[v].scale));
    const int64_t rows = this->padded_queries, ld = view.ld;
    A* scores = this->scores_of(v, head, t);
    const Operand *weights_right = right, *weights_left = left;
    int64_t ld_weights = rows;
    if constexpr (P::kInPairs) {
      this->products.round(scores, kMeanLd, n, rows, out.key[v].data ? left : nullptr,
                           out.query[v].data ? right : nullptr);
    } else {
      weights_right = weights_left = scores, ld_weights = kMeanLd;
    }
    if (out.query[v].data)
      this->products.multiply(ld, rows, n, this->keys_t_of(v, this->key_head(v, head)) + t, this->padded_keys,
                              weights_right, ld_weights, grad_queries_of(v, head), rows, t > this->bounds.tile_begin);
    if (out.key[v].data)
      this->products.multiply(n, ld, rows, weights_left, ld_weights, this->rows_of(v, head), ld,
                              grad_keys[v] + (this->key_head(v, head) * this->padded_keys + t) * ld, ld, true);
  }
};

// Calls body(task, b, part) for every part of every pair; the pair is selected in the task.
template <typename P, typename Body>
void run_parts(const MeanInputs& p, const P& products, const MeanGradients& out, int64_t parts, const Body& body) {
  using Task = MeanGradientTask<P>;
  const int64_t count = std::min(workers(p), p.pairs * parts);
  Arena measure(nullptr);
  Task(p, products, out, measure);
  const Scratch scratch(count, measure.used());
  run_tasks(p.pairs * parts, count, [&](int64_t worker, const auto& next) {
    Arena arena = scratch.of(worker);
    Task task(p, products, out, arena);
    int64_t selected = -1;
    for (int64_t i = next(); i < p.pairs * parts; i = next()) {
      if (i / parts != selected) task.select(selected = i / parts);
      if (!task.is_empty()) body(task, selected, i % parts);
    }
    products.release();
  });
}

// A thread makes all gradients of a pair. Few pairs are cut into parts, whose sums for the keys are added up in order.
// How many parts there are depends on the shape alone, so the result does not depend on the number of threads.
template <typename P>
void run(const MeanInputs& p, Tensor& sums, const MeanGradients& out) {
  using A = typename P::Accumulator;
  using Task = MeanGradientTask<P>;
  constexpr int64_t kParts = 4;
  const P products(selection());
  const int64_t per_pair = blocks(p.queries), most = std::max<int64_t>(per_pair, 1);
  const int64_t parts =
      out.any() ? std::min(p.pairs >= kParts ? 1 : (kParts + p.pairs - 1) / std::max<int64_t>(p.pairs, 1), most)
                : shares_per_task(p.pairs, workers(p), per_pair);
  const int64_t sizes[2] = {Task::grad_keys_size(p, 0), Task::grad_keys_size(p, 1)}, size = sizes[0] + sizes[1];
  const bool adds_up = out.any() && parts > 1;
  const Tensor partial = at::empty({adds_up ? p.pairs * parts * size : 0}, sums.options());
  const Tensor block_sums = at::zeros({p.pairs, per_pair}, sums.options().dtype(at::kDouble));
  double* block_sum = block_sums.data_ptr<double>();
  run_parts<P>(p, products, out, parts, [&](Task& task, int64_t b, int64_t part) {
    if (adds_up) {
      task.grad_keys[0] = partial.data_ptr<A>() + (b * parts + part) * size;
      task.grad_keys[1] = task.grad_keys[0] + sizes[0];
    }
    for (int v = 0; out.any() && v < 2; ++v) std::fill_n(task.grad_keys[v], sizes[v], A(0));
    const int64_t all = blocks(task.counted.n_queries);
    for (int64_t block = part * all / parts; block < (part + 1) * all / parts; ++block) {
      task.load_queries(block * kBlock);
      task.softmaxes();
      block_sum[b * per_pair + block] = task.compare_rows();
      if (!out.any() || task.bounds.tile_begin == task.bounds.tile_end) continue;  // no query of the block has a key
      task.make_gradients();
      task.write_queries(b);
    }
    if (!adds_up) task.write_keys(b, task.grad_keys);
  });
  A* sum = sums.data_ptr<A>();
  for (int64_t b = 0; b < p.pairs; ++b)
    sum[b] = static_cast<A>(std::accumulate(block_sum + b * per_pair, block_sum + (b + 1) * per_pair, 0.0));
  if (!adds_up) return;
  run_parts<P>(p, products, out, 1, [&](Task& task, int64_t b, int64_t) {
    A* total = partial.data_ptr<A>() + b * parts * size;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < size; ++i) total[i] += total[part * size + i];
    A* const grad_keys[2] = {total, total + sizes[0]};
    task.write_keys(b, grad_keys);
  });
}

// One operator. kExchanged: the comparison takes the second view as its first one.
template <Comparison kComparison, bool kExchanged = false>
struct MeanHeads {
  static constexpr const char* kOp = kComparison == Comparison::kMse  ? "qk_mean_attention_mse"
                                     : kComparison == Comparison::kJs ? "qk_mean_attention_js"
                                     : kExchanged                     ? "qk_mean_attention_reverse_kl"
                                                                      : "qk_mean_attention_kl";

  static std::tuple<Tensor, std::vector<Tensor>> forward(const MeanHeadsProblem& problem,
                                                         const c10::List<bool>& needs) {
    const MeanInputs inputs(problem, check(kOp, problem, kLimits, needs), kComparison, kExchanged);
    Tensor sums = at::zeros({inputs.pairs}, problem.query.options().dtype(accumulator_of(problem.query)));
    Gradients gradients = make_gradients(
        {{problem.query, problem.query_aug}, {problem.key, problem.key_aug}}, needs, inputs.pairs,
        [](const Tensor& like) { return at::zeros(like.sizes(), like.options().dtype(gradient_dtype(like))); });
    MeanGradients out;
    for (int v = 0; v < 2; ++v) {
      out.query[v] = HeadsPointer(gradients.views[0][inputs.view_of_problem(v)]);
      out.key[v] = HeadsPointer(gradients.views[1][inputs.view_of_problem(v)]);
    }
    with_products(inputs.kind, [&]<typename P>() { run<P>(inputs, sums, out); });
    return {sums, gradients.returned};
  }

  static void add_to(torch::Library& library) { register_forward<&forward>(library, kOp, c10::DispatchKey::CPU); }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(ear_ops, m) {
  MeanHeads<Comparison::kMse>::add_to(m);
  MeanHeads<Comparison::kKl>::add_to(m);
  MeanHeads<Comparison::kKl, true>::add_to(m);
  MeanHeads<Comparison::kJs>::add_to(m);
}

}  // namespace ear_ops::cpu
