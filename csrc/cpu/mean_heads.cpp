// Compares the averages over the heads of two views, and makes the gradients in the same call: the gradient of the sum
// is one number a pair, so all that is left for a backward is to multiply by it. A block of 64 queries passes over its
// keys three times:
//
//   memory     K of all heads, gathered once for each share       Q of a block, of all heads
//                | product
//   scratch    scores, [keys, 64 queries], of each head of both views
//                | add_softmax                                    the statistics of the softmaxes
//                | add_head
//   scratch    e_h in place of the scores, and the sums of f_h e_h
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

Kind kept_as(Kind kind) { return kind == Kind::kFloat16 ? Kind::kFloat32 : kind; }  // the gradients

// A pair's gradients of keys while they are added up: those of view v are [key_heads, keys, ld], keys padded.
template <typename P>
struct KeyGradients {
  using A = typename P::Accumulator;

  A* view[2];

  static int64_t ld(const MeanInputs& p, int v) { return round_up(p.view[v].dim, P::kWidth); }
  static int64_t size_of_view(const MeanInputs& p, int v) {
    return p.view[v].key_heads * round_up(p.keys, P::kPadding) * ld(p, v);
  }
  static int64_t size(const MeanInputs& p) { return size_of_view(p, 0) + size_of_view(p, 1); }

  static KeyGradients at(const MeanInputs& p, A* memory) { return {{memory, memory + size_of_view(p, 0)}}; }
  A* head(const MeanInputs& p, const Counted& counted, int v, int64_t head) const {
    return view[v] + head * round_up(counted.n_keys, P::kPadding) * ld(p, v);
  }
  void write(const MeanInputs& p, const Counted& counted, const MeanGradients& out, int64_t b) const {
    for (int v = 0; v < 2; ++v)
      for (int64_t head = 0; head < p.view[v].key_heads; ++head) write_head(p, counted, out, b, v, head);
  }
  void write_head(const MeanInputs& p, const Counted& counted, const MeanGradients& out, int64_t b, int v,
                  int64_t head) const {
    if (!out.key[v].data) return;
    kernels<A>(*selection().isa)
        .scatter_rows(this->head(p, counted, v, head), ld(p, v), counted.n_keys, p.view[v].dim, kept_as(p.kind),
                      out.key[v].row_stride, counted.key, out.key[v].head(b, head));
  }
};

// The gradients of a block of queries, and of the keys as far as its pair's part of the queries goes. Between tiles of
// a block, grad_queries_t[v] holds the sum over the tiles so far, of all heads.
template <typename P>
struct MeanGradientTask : MeanTask<P> {
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  const MeanGradients& out;
  A *grad_queries_t[2], *grad_queries;  // [heads, ld, kBlock]; [kBlock, ld]
  KeyGradients<P> grad_keys;            // memory of the caller
  bool adds_to_keys = false;            // to what is in it
  Operand *left, *right;                // dS^T of a tile

  MeanGradientTask(const MeanInputs& inputs, const P& products, const MeanGradients& gradients, Arena& arena)
      : MeanTask<P>(inputs, products, arena, gradients.any()), out(gradients) {
    const bool any = out.any();
    const int64_t rows = round_up(std::min(inputs.queries, kBlock), P::kPadding);
    for (int v = 0; v < 2; ++v)
      grad_queries_t[v] = arena.take<A>(any * inputs.view[v].heads * this->views[v].ld * rows);
    grad_queries = arena.take<A>(any * std::max(this->views[0].ld, this->views[1].ld) * rows);
    left = arena.take<Operand>(any * P::kInPairs * this->wide_tile * rows);
    right = arena.take<Operand>(any * P::kInPairs * this->wide_tile * rows);
  }

  // Before the first of `count` blocks. Where each block reaches all keys of all heads, the first one writes its
  // products and does not add them.
  void start_keys(A* memory, int64_t count) {
    grad_keys = KeyGradients<P>::at(this->inputs, memory);
    adds_to_keys = count == 0 || !this->inputs.compares_all();
    if (adds_to_keys) std::fill_n(memory, KeyGradients<P>::size(this->inputs), A(0));
  }

  // Of the block of queries that is loaded.
  void make_gradients() {
    if (this->keeps_rows) {
      this->for_heads([&](int v, int64_t head) {
        if (!out.of_view(v)) return;
        this->sum_slopes(v, head);
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
    adds_to_keys = true;
  }

  void write_queries(int64_t b) {
    this->for_heads([&](int v, int64_t head) {
      if (!out.query[v].data) return;
      const int64_t rows = this->padded_queries, ld = this->views[v].ld;
      this->table.transpose(grad_queries_of(v, head), rows, ld, rows, grad_queries, ld);
      this->table.scatter_rows(grad_queries, ld, this->n_queries, this->inputs.view[v].dim, kept_as(this->inputs.kind),
                               out.query[v].row_stride, this->counted.query + this->first, out.query[v].head(b, head));
    });
  }

 private:
  A* grad_queries_of(int v, int64_t head) const {
    return grad_queries_t[v] + head * this->views[v].ld * round_up(std::min(this->inputs.queries, kBlock), P::kPadding);
  }

  // e_h of the keys [t, t + n) become dS_h, which are multiplied.
  void add_gradient(int v, int64_t head, int64_t t, int64_t n) {
    const MeanView<P>& view = this->views[v];
    const int64_t rows = this->padded_queries, ld = view.ld, key_head = this->key_head(v, head);
    A* scores = this->scores_of(v, head, t);
    const Operand *weights_right = right, *weights_left = left;
    int64_t ld_weights = rows;
    for (int64_t c = 0; c < this->lane_groups(); ++c) {
      const LaneGroup<A> group = this->exponentials(v, head, c, t, n);
      const A *slopes = this->sum_of(v, t) + c * kLanes,
              *peak = this->logarithms ? this->top_of(v, t) + c * kLanes : nullptr,
              *factor = this->of_head(view.factors, head) + c * kLanes, *d = this->of_head(view.d, head) + c * kLanes;
      if constexpr (P::kInPairs) {
        this->loops.head_gradient_bits(group, slopes, peak, factor, d, n, out.key[v].data ? left + c * kLanes : nullptr,
                                       out.query[v].data ? right + 2 * c * kLanes : nullptr, rows);
      } else {
        this->loops.head_gradient(group, slopes, peak, factor, d);
      }
    }
    if constexpr (!P::kInPairs) weights_right = weights_left = scores, ld_weights = kMeanLd;
    if (out.query[v].data)
      this->products.multiply(ld, rows, n, this->keys_t_of(v, key_head) + t, this->padded_keys, weights_right,
                              ld_weights, grad_queries_of(v, head), rows, t > this->bounds.tile_begin);
    if (out.key[v].data)
      this->products.multiply(n, ld, rows, weights_left, ld_weights, this->rows_of(v, head), ld,
                              grad_keys.head(this->inputs, this->counted, v, key_head) + t * ld, ld,
                              adds_to_keys || head % this->inputs.view[v].group() != 0);
  }
};

// The sums of all blocks, and the gradients. Those of the keys are left in `partial` [pairs, parts, size of
// KeyGradients], unless a pair has one part: then they are written, and `partial` has a place for each worker.
template <typename P>
void compare_parts(const MeanInputs& p, const MeanGradients& out, int64_t parts, int64_t count,
                   typename P::Accumulator* partial, double* block_sum) {
  using Task = MeanGradientTask<P>;
  const P products(selection());
  Arena measure(nullptr);
  Task(p, products, out, measure);
  const Scratch scratch(count, measure.used());
  run_tasks(p.pairs * parts, count, [&](int64_t worker, const auto& next) {
    Arena arena = scratch.of(worker);
    Task task(p, products, out, arena);
    int64_t selected = -1;
    for (int64_t i = next(); i < p.pairs * parts; i = next()) {
      const int64_t b = i / parts, part = i % parts;
      if (b != selected) task.select(selected = b);
      if (task.is_empty()) continue;
      const int64_t all = blocks(task.counted.n_queries), begin = part * all / parts, end = (part + 1) * all / parts;
      if (out.any()) task.start_keys(partial + (parts == 1 ? worker : i) * KeyGradients<P>::size(p), end - begin);
      for (int64_t block = begin; block < end; ++block) {
        task.load_queries(block * kBlock);
        task.softmaxes();
        block_sum[b * blocks(p.queries) + block] = task.compare_rows();
        if (!out.any() || task.bounds.tile_begin == task.bounds.tile_end) continue;  // no query of the block has a key
        task.make_gradients();
        task.write_queries(b);
      }
      if (out.any() && parts == 1) task.grad_keys.write(p, task.counted, out, b);
    }
    products.release();
  });
}

// Adds up the parts of the gradients of keys, in their order, and writes them.
template <typename P>
void add_parts(const MeanInputs& p, const MeanGradients& out, int64_t parts, typename P::Accumulator* partial) {
  const int64_t heads = p.view[0].key_heads + p.view[1].key_heads, size = KeyGradients<P>::size(p);
  const int64_t count = std::min(workers(p), p.pairs * heads);
  Arena measure(nullptr);
  Counted(p, measure);
  const Scratch scratch(count, measure.used());
  run_tasks(p.pairs * heads, count, [&](int64_t worker, const auto& next) {
    Arena arena = scratch.of(worker);
    Counted counted(p, arena);
    for (int64_t i = next(); i < p.pairs * heads; i = next()) {
      const int64_t b = i / heads, v = i % heads >= p.view[0].key_heads, head = i % heads - v * p.view[0].key_heads;
      if (!out.key[v].data) continue;
      counted.select(p, b);
      if (counted.n_keys == 0 || counted.n_queries == 0) continue;
      const auto total = KeyGradients<P>::at(p, partial + b * parts * size);
      auto* to = total.head(p, counted, v, head);
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t j = 0; j < counted.n_keys * total.ld(p, v); ++j) to[j] += to[part * size + j];
      total.write_head(p, counted, out, b, v, head);
    }
  });
}

// A thread makes all gradients of a pair. Few pairs are cut into parts, whose sums for the keys are added up in order.
// How many parts there are depends on the shape alone, so the result does not depend on the number of threads.
int64_t parts_of(const MeanInputs& p, bool any_gradient) {
  constexpr int64_t kMostParts = 4, kBlocksOfPart = 4;
  const int64_t per_pair = std::max<int64_t>(blocks(p.queries), 1);
  if (!any_gradient) return shares_per_task(p.pairs, workers(p), per_pair);
  if (p.pairs == 0 || p.pairs >= kMostParts) return 1;
  const int64_t wanted = (kMostParts + p.pairs - 1) / p.pairs;
  return std::clamp<int64_t>(per_pair / kBlocksOfPart, 1, wanted);
}

template <typename P>
void run(const MeanInputs& p, Tensor& sums, const MeanGradients& out) {
  using A = typename P::Accumulator;
  const int64_t parts = parts_of(p, out.any()), per_pair = blocks(p.queries);
  const int64_t count = std::min(workers(p), p.pairs * parts), places = parts == 1 ? count : p.pairs * parts;
  const Tensor partial = at::empty({out.any() ? places * KeyGradients<P>::size(p) : 0}, sums.options());
  const Tensor block_sums = at::zeros({p.pairs, per_pair}, sums.options().dtype(at::kDouble));
  double* block_sum = block_sums.data_ptr<double>();
  compare_parts<P>(p, out, parts, count, partial.data_ptr<A>(), block_sum);
  if (out.any() && parts > 1) add_parts<P>(p, out, parts, partial.data_ptr<A>());
  A* sum = sums.data_ptr<A>();
  for (int64_t b = 0; b < p.pairs; ++b)
    sum[b] = static_cast<A>(std::accumulate(block_sum + b * per_pair, block_sum + (b + 1) * per_pair, 0.0));
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
    Gradients gradients = make_gradients({{problem.query, problem.query_aug}, {problem.key, problem.key_aug}}, needs,
                                         inputs.pairs, [&](const Tensor& like) {
                                           const auto options = like.options().dtype(gradient_dtype(like));
                                           return inputs.counts_all() ? at::empty(like.sizes(), options)
                                                                      : at::zeros(like.sizes(), options);
                                         });
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
