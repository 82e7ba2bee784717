// The sums of a comparison and the statistics of every row. A block of 64 queries passes over the tiles of its head's
// keys.
//
//   memory     K [S, D] of a key head, once for each share      Q [64, D] of a block
//                | gather, or where it lies                       | gather, transpose
//   scratch    keys [n_keys, ld]                                Q^T [ld, 64]
//                | product
//   scratch    scores of a tile, [256 keys, 64 queries], of each view
//                | 16 queries at a time in vectors of registers, over all keys of the tile
//   scratch    RunningRows, under the largest score so far
//                | over the tiles; a second time where the comparison takes the softmax of the whole row
//   memory     row_stats [6, B, H, L]; sums [B, H], added up over the blocks in order
#include "forward.h"

#include <ATen/ops/zeros.h>

#include "plan.h"

namespace ear_ops::cpu {

namespace {

template <typename P>
struct ForwardTask : QKTask<P> {
  using A = typename P::Accumulator;

  RunningRows<A>* rows;  // [kBlock / kLanes], of the block's queries

  ForwardTask(const QKInputs& inputs, const P& products, Arena& arena)
      : QKTask<P>(inputs, products, arena, false), rows(arena.take<RunningRows<A>>(kBlock / kLanes)) {}
};

// Returns the sum of the loaded block and leaves the statistics in task.stats.
template <typename P>
double forward_block(ForwardTask<P>& task, int64_t b, int64_t head) {
  const int64_t groups = task.lane_groups();
  for (int64_t c = 0; c < groups; ++c) task.loops.start_rows(&task.rows[c]);
  task.for_tiles(0, task.block.tile_end, [&](int64_t t, int64_t n) {
    task.score(b, head, t, n);
    for (int64_t c = 0; c < groups; ++c) task.loops.add_tile(task.lane_group(c, t, n), &task.rows[c]);
  });
  double total = 0;
  for (int64_t c = 0; c < groups; ++c)
    total += task.loops.finish_rows(task.block.alive(task.counted, c), task.rows[c], &task.stats[c]);
  if (!task.loops.add_values) return total;
  const bool all_kept = task.block.tile_end - task.block.tile_begin <= task.kept;
  task.for_tiles(0, task.block.tile_end, [&](int64_t t, int64_t n) {
    if (!all_kept) task.score(b, head, t, n);
    for (int64_t c = 0; c < groups; ++c) total += task.loops.add_values(task.lane_group(c, t, n), &task.stats[c]);
  });
  return total;
}

template <typename P>
void forward(const QKInputs& p, Tensor& sums, Tensor& row_stats) {
  using A = typename P::Accumulator;
  const P products(selection());
  A* saved = row_stats.data_ptr<A>();
  const int64_t kept = row_stats_of(p.comparison);
  const int64_t rows = p.pairs * p.heads * p.queries, per_head = blocks(p.queries);
  const Tensor block_sums = at::zeros({p.pairs * p.heads, per_head}, sums.options().dtype(at::kDouble));
  double* block_sum = block_sums.data_ptr<double>();
  const Plan plan(p, shares_per_task(p.pairs * p.key_heads, workers(p), p.group() * per_head));
  run<ForwardTask<P>>(p, products, plan, [&](ForwardTask<P>& task, const Share& share) {
    task.pack_keys(share.b, share.key_head, false);
    for_blocks(task, share, [&](int64_t head, int64_t block) {
      task.load_queries(share.b, head, block * kBlock);
      block_sum[(share.b * p.heads + head) * per_head + block] = forward_block(task, share.b, head);
      for (int64_t i = 0; kept && i < task.block.n; ++i) {
        const auto& s = task.stats[i / kLanes];
        const int64_t lane = i % kLanes;
        A* to = saved + (share.b * p.heads + head) * p.queries + task.counted.query[task.block.first + i];
        for (int v = 0; v < 2; ++v) {
          to[v * rows] = s.max[v][lane];
          to[(2 + v) * rows] = s.inverse[v][lane];
          to[(4 + v) * rows] = s.of_comparison[v][lane];
        }
      }
    });
  });
  A* sum = sums.data_ptr<A>();
  for (int64_t i = 0; i < p.pairs * p.heads; ++i)
    sum[i] = static_cast<A>(std::accumulate(block_sum + i * per_head, block_sum + (i + 1) * per_head, 0.0));
}

}  // namespace

void qk_forward(const QKInputs& inputs, Tensor& sums, Tensor& row_stats) {
  with_products(inputs.kind, [&]<typename P>() { forward<P>(inputs, sums, row_stats); });
}

}  // namespace ear_ops::cpu
