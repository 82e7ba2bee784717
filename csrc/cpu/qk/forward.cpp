// The sums of (P - T)^2 and the statistics of every row. A block of 64 queries passes over the tiles of its head's
// keys.
//
//   memory     K [S, D] of a key head, once for each share      Q [64, D] of a block
//                | gather, or where it lies                       | gather, transpose
//   scratch    keys [n_keys, ld]                                Q^T [ld, 64]
//                | product
//   scratch    scores of a tile, [keys, 64], of each view
//                | 16 queries at a time in vectors of registers, over all keys of the tile
//   scratch    sweep 1: exp(s - max) in place of the scores --> max and sum of each row, then 1 / sum
//              sweep 2: P - T, its square and d             --> d of each row, and the sum of squares of the block
//   memory     row_stats [6, B, H, L]; sums [B, H], added up over the blocks in order
//
// Up to kOneSweep keys, all scores of a block stay in scratch, and both sweeps pass over them as one tile. Longer rows
// have tiles of kTile keys, and each sweep makes their scores anew.
#include "forward.h"

#include <ATen/ops/zeros.h>

#include "plan.h"

namespace ear_ops::cpu {

namespace {

template <typename P>
struct ForwardTask : QKTask<P> {
  ForwardTask(const QKInputs& inputs, const P& products, Arena& arena)
      : QKTask<P>(inputs, products, arena, kOneSweep, false) {}
};

// Returns sum (P - T)^2 of the loaded block and leaves the statistics in task.stats.
template <typename P>
double forward_block(ForwardTask<P>& task, int64_t b, int64_t head) {
  using A = typename P::Accumulator;
  const int64_t groups = task.lane_groups(), all = task.block.tile_end - task.block.tile_begin;
  const bool one_sweep = all > 0 && all <= kOneSweep;
  for (int64_t c = 0; c < groups; ++c) {
    auto& s = task.stats[c];
    for (int v = 0; v < 2; ++v) {
      std::fill_n(s.max[v], kLanes, -std::numeric_limits<A>::infinity());
      std::fill_n(s.inverse[v], kLanes, A(0));
      std::fill_n(s.d[v], kLanes, A(0));
    }
  }
  double total = 0;
  auto sweep = [&](const auto& body) {  // body(lane group, its statistics) for every tile
    auto tile = [&](int64_t t, int64_t n) {
      task.score(b, head, t, n);
      for (int64_t c = 0; c < groups; ++c) body(task.lane_group(c, t, n), &task.stats[c]);
    };
    if (one_sweep) return tile(task.block.tile_begin, all);
    task.for_tiles(0, task.block.tile_end, tile);
  };
  auto finish = [&](int64_t c) { task.table.finish_softmax(task.block.alive(task.counted, c), &task.stats[c]); };
  if (one_sweep) {
    int64_t c = 0;
    sweep([&](const LaneGroup<A>& group, LaneStats<A>* stats) {
      task.table.softmax_tile(group, stats);
      finish(c++);
      total += task.table.difference_tile(group, true, stats);
    });
  } else {
    sweep([&](const LaneGroup<A>& group, LaneStats<A>* stats) { task.table.softmax_tile(group, stats); });
    for (int64_t c = 0; c < groups; ++c) finish(c);
    sweep([&](const LaneGroup<A>& group, LaneStats<A>* stats) {
      total += task.table.difference_tile(group, false, stats);
    });
  }
  return total;
}

template <typename P>
void forward(const QKInputs& p, Tensor& sums, Tensor& row_stats) {
  using A = typename P::Accumulator;
  const P products(selection());
  A* saved = row_stats.data_ptr<A>();
  const int64_t rows = p.pairs * p.heads * p.queries, per_head = blocks(p.queries);
  const Tensor block_sums = at::zeros({p.pairs * p.heads, per_head}, sums.options().dtype(at::kDouble));
  double* block_sum = block_sums.data_ptr<double>();
  const Plan plan(p, shares_per_task(p.pairs * p.key_heads, workers(p), p.group() * per_head));
  run<ForwardTask<P>>(p, products, plan, [&](ForwardTask<P>& task, const Share& share) {
    task.pack_keys(share.b, share.key_head, false);
    for_blocks(task, share, [&](int64_t head, int64_t block) {
      task.load_queries(share.b, head, block * kBlock);
      block_sum[(share.b * p.heads + head) * per_head + block] = forward_block(task, share.b, head);
      for (int64_t i = 0; i < task.block.n; ++i) {
        const auto& s = task.stats[i / kLanes];
        const int64_t lane = i % kLanes;
        A* to = saved + (share.b * p.heads + head) * p.queries + task.counted.query[task.block.first + i];
        const A values[kRowStats] = {s.max[0][lane],     s.max[1][lane], s.inverse[0][lane],
                                     s.inverse[1][lane], s.d[0][lane],   s.d[1][lane]};
        for (int64_t k = 0; k < kRowStats; ++k) to[k * rows] = values[k];
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
