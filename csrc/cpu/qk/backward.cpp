// The gradients of queries and keys, from the statistics that the forward kept.
//
//   memory     K of a key head, Q of a block, row_stats
//                | gather, product
//   scratch    scores of a tile, [256 keys, 64 queries], of each view
//                | 16 queries at a time in vectors of registers
//   scratch    dS, the gradient of the scores, in their place
//                | product with K^T                             | product with Q
//   scratch    dQ^T [ld, 64], summed over the tiles           dK [n_keys, ld], summed over the blocks
//                | once for each block                          | once for each share
//   memory     dQ of the block                                dK of the key head
//
// One thread makes the whole of every sum, so that no thread adds to what another one writes.
#include "backward.h"

#include "plan.h"

namespace ear_ops::cpu {

namespace {

// Between tiles of a block: grad_queries_t[v] holds the sum over the tiles so far, once there was one. Between blocks
// of a share: grad_keys[v] holds the sum over the blocks so far. Both include the padding, where they are zero.
template <typename P>
struct BackwardTask : QKTask<P> {
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  A *grad_queries_t[2], *grad_queries, *grad_keys[2];

  BackwardTask(const QKInputs& inputs, const P& products, Arena& arena) : QKTask<P>(inputs, products, arena, true) {
    const int64_t rows = round_up(std::min(inputs.queries, kBlock), P::kPadding);
    const int64_t all = round_up(inputs.keys, P::kPadding), ld = this->ld;
    grad_queries = arena.take<A>(rows * ld);
    for (int v = 0; v < 2; ++v) {
      grad_queries_t[v] = arena.take<A>(rows * ld);
      grad_keys[v] = arena.take<A>(all * ld);
    }
    if constexpr (P::kInPairs) {
      const int64_t tile = std::min(all, kTile);
      left_ = arena.take<Operand>(tile * rows);
      right_ = arena.take<Operand>(tile * rows);
    }
  }

  // Makes operands of the dS^T of a tile, which lies where its scores were.
  void load_gradient(int v, int64_t t, int64_t n, bool of_queries, bool of_keys) {
    if constexpr (P::kInPairs)
      this->products.round(this->scores_of(v, t), kScoresLd, n, this->block.padded, of_keys ? left_ : nullptr,
                           of_queries ? right_ : nullptr);
  }

  // grad_queries_t[v] (+)= K^T dS^T of the loaded tile.
  void add_grad_queries(int v, int64_t t, int64_t n, bool accumulate) {
    const int64_t rows = this->block.padded;
    if constexpr (P::kInPairs) {
      this->keys.add_to_grad_queries(v, t, n, right_, rows, rows, grad_queries_t[v], accumulate);
    } else {
      this->keys.add_to_grad_queries(v, t, n, this->scores_of(v, t), kScoresLd, rows, grad_queries_t[v], accumulate);
    }
  }

  // grad_keys[v] += dS^T Q of the same tile.
  void add_grad_keys(int v, int64_t t, int64_t n) {
    const int64_t rows = this->block.padded, ld = this->ld;
    A* to = grad_keys[v] + t * ld;
    if constexpr (P::kInPairs) {
      this->products.multiply(n, ld, rows, left_, rows, this->block.as_rows(v), this->block.rows_ld(v), to, ld, true);
    } else {
      this->products.multiply(n, ld, rows, this->scores_of(v, t), kScoresLd, this->block.as_rows(v),
                              this->block.rows_ld(v), to, ld, true);
    }
  }

 private:
  Operand *left_, *right_;
};

template <typename P>
void load_stats(BackwardTask<P>& task, const typename P::Accumulator* saved, int64_t b, int64_t head) {
  const auto& p = task.inputs;
  if (row_stats_of(p.comparison) == 0) return;
  const int64_t rows = p.pairs * p.heads * p.queries;
  for (int64_t i = 0; i < task.block.padded; ++i) {
    auto& s = task.stats[i / kLanes];
    const int64_t lane = i % kLanes;
    const bool padding = i >= task.block.n;  // no keys, and so no gradient
    const auto* from =
        saved + (b * p.heads + head) * p.queries + (padding ? 0 : task.counted.query[task.block.first + i]);
    for (int v = 0; v < 2; ++v) {
      s.max[v][lane] = padding ? 0 : from[v * rows];
      s.inverse[v][lane] = padding ? 0 : from[(2 + v) * rows];
      s.of_comparison[v][lane] = padding ? 0 : from[(4 + v) * rows];
    }
  }
}

bool any(const std::array<HeadsPointer, 2>& views) { return views[0].data || views[1].data; }

// The gradients that `out` names, of the queries of the share's blocks and of the keys within [key_begin, key_end).
template <typename P>
void backward_share(BackwardTask<P>& task, const Share& blocks_of, const typename P::Accumulator* upstream,
                    const typename P::Accumulator* saved, int64_t key_begin, int64_t key_end, const QKGradients& out) {
  using A = typename P::Accumulator;
  const auto& p = task.inputs;
  const int64_t b = blocks_of.b, ld = task.ld;
  const bool second = out.query[1].data || out.key[1].data;
  key_end = std::min(key_end, round_up(task.counted.n_keys, P::kPadding));
  if (key_begin >= key_end) return;
  task.pack_keys(b, blocks_of.key_head, any(out.query));
  for (int v = 0; v < 2; ++v)
    if (out.key[v].data) std::fill(task.grad_keys[v] + key_begin * ld, task.grad_keys[v] + key_end * ld, A(0));
  for_blocks(task, blocks_of, [&](int64_t head, int64_t block) {
    const A gradient = static_cast<A>(p.scale) * upstream[b * p.heads + head];
    task.load_queries(b, head, block * kBlock);
    load_stats(task, saved, b, head);
    bool first_tile = true;
    task.for_tiles(key_begin, key_end, [&](int64_t t, int64_t n) {
      task.score(b, head, t, n);
      for (int64_t c = 0; c < task.lane_groups(); ++c)
        task.loops.gradient_tile(task.lane_group(c, t, n), task.stats[c], gradient, second);
      for (int v = 0; v < 2; ++v) {
        if (!out.query[v].data && !out.key[v].data) continue;
        task.load_gradient(v, t, n, out.query[v].data, out.key[v].data);
        if (out.query[v].data) task.add_grad_queries(v, t, n, !first_tile);
        if (out.key[v].data) task.add_grad_keys(v, t, n);
      }
      first_tile = false;
    });
    for (int v = 0; v < 2; ++v) {
      if (!out.query[v].data) continue;
      if (first_tile) std::fill_n(task.grad_queries_t[v], ld * task.block.padded, A(0));
      const bool placed = !P::kInPairs && task.block.placed(task.counted);
      A* rows = task.grad_queries;
      if (placed)
        rows = reinterpret_cast<A*>(out.query[v].head(b, head)) +
               task.counted.query[task.block.first] * out.query[v].row_stride;
      task.table.transpose(task.grad_queries_t[v], task.block.padded, ld, task.block.padded, rows,
                           placed ? out.query[v].row_stride : ld);
      if (placed) continue;
      task.table.scatter_rows(task.grad_queries, ld, task.block.n, p.dim, p.kind, out.query[v].row_stride,
                              task.counted.query + task.block.first, out.query[v].head(b, head));
    }
  });
  for (int v = 0; v < 2; ++v)
    if (out.key[v].data)
      task.table.scatter_rows(task.grad_keys[v] + key_begin * ld, ld,
                              std::min(key_end, task.counted.n_keys) - key_begin, p.dim, p.kind, out.key[v].row_stride,
                              task.counted.key + key_begin, out.key[v].head(b, blocks_of.key_head));
}

// A thread that owns a key head makes both gradients from the same scores. With too few key heads for the threads, the
// blocks and then the keys are shared out instead, at the price of scores made twice. Every sum runs in the same order.
template <typename P>
void backward(const QKInputs& p, const Tensor& grad_sums, const Tensor& row_stats, const QKGradients& out) {
  using A = typename P::Accumulator;
  const P products(selection());
  const A* upstream = grad_sums.data_ptr<A>();
  const A* saved = row_stats.data_ptr<A>();
  const int64_t tasks = p.pairs * p.key_heads, count = workers(p);
  const auto run_shares = [&](int64_t shares, const auto& body) {
    run<BackwardTask<P>>(p, products, Plan(p, shares), body);
  };
  constexpr double kPriceOfTwice = 1.4;
  const double rounds = static_cast<double>((tasks + count - 1) / count);
  if (rounds <= kPriceOfTwice * tasks / count) {
    return run_shares(1, [&](BackwardTask<P>& task, const Share& share) {
      backward_share(task, share, upstream, saved, 0, p.keys + P::kPadding, out);
    });
  }
  if (any(out.query)) {
    const QKGradients queries = {out.query, {}};
    run_shares(shares_per_task(tasks, count, p.group() * blocks(p.queries)),
               [&](BackwardTask<P>& task, const Share& share) {
                 backward_share(task, share, upstream, saved, 0, p.keys + P::kPadding, queries);
               });
  }
  if (any(out.key)) {
    const QKGradients keys = {{}, out.key};
    const int64_t tiles = (p.keys + kTile - 1) / kTile, shares = shares_per_task(tasks, count, tiles);
    run_shares(shares, [&](BackwardTask<P>& task, const Share& share) {
      const Share all_blocks = {share.b, share.key_head, 0, 1};
      backward_share(task, all_blocks, upstream, saved, share.index * tiles / shares * kTile,
                     (share.index + 1) * tiles / shares * kTile, keys);
    });
  }
}

}  // namespace

void qk_backward(const QKInputs& inputs, const Tensor& grad_sums, const Tensor& row_stats, const QKGradients& out) {
  with_products(inputs.kind, [&]<typename P>() { backward<P>(inputs, grad_sums, row_stats, out); });
}

}  // namespace ear_ops::cpu
