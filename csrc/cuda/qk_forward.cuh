// The loss of the rows that a block owns, and the statistics of each row, in one sweep over the keys: written here for
// the MSE. What is summed is a matter of the comparison (qk_mse.cuh, qk_divergences.cuh, qk_squared_scores.cuh), and
// one of them takes two sweeps.
//
//   global memory   Q [64, D] and K [S, D] of both views
//                     | cp.async
//   shared memory   Q, and tiles of 64 keys
//                     | mma
//   registers       scores of 64 x 64, both views --> exponentials under the largest score so far --> running sums
//                     | after the last tile, over the lanes of a row
//   written         row_stats [6, B, H, L]: max, 1 / sum, d; block_sums: one sum of squares
//
// forward_short takes rows of at most 128 keys: the block owns up to 128 queries, and all of Q and K comes at once.
// forward_long takes rows of any length: tiles come through the stages of qk_steps.cuh.
#pragma once

#include "qk_mse.cuh"
#include "qk_steps.cuh"

namespace ear_ops::cuda {

// Writes the statistics of the rows and returns this thread's part of the loss of all rows of the block.
template <int kRows, typename Compared>
EAR_OPS_DEVICE float write_rows(const Vectors<Role::kQueries>& queries, int block, typename Compared::Rows& rows) {
  const QKArgs& a = queries.args;
  float total = 0, loss[2], stats[2][kRowStats];
#pragma unroll
  for (int half = 0; half < 2; ++half) loss[half] = rows.finish(half, stats[half]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = block * kRows + owned_of_lane(half);
    if (thread_index() % 4 != 0 || query >= a.queries) continue;
    float* to = a.row_stats + stats_index(a, queries.pair, queries.head, query);
    const bool real = queries.real(0, query);  // in both views
#pragma unroll
    for (int k = 0; k < Compared::kRowStats; ++k, to += stats_step(a)) store_global(to, real ? stats[half][k] : 0.0f);
    if (real) total += loss[half];
  }
  return total;
}

// Writes what the forward gives: statistics of the rows, and the loss of all rows of the block.
template <int kRows, typename Compared>
EAR_OPS_DEVICE void write_forward(const Vectors<Role::kQueries>& queries, int block, typename Compared::Rows& rows) {
  const QKArgs& a = queries.args;
  float total = write_rows<kRows, Compared>(queries, block, rows);
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) total += shuffle_xor(total, lanes);
  char* sums = shared_memory();
  sync_block();  // nobody reads vectors any more
  if (thread_index() % kWarp == 0) store_shared(sums + warp_index() * 4, total);
  sync_block();
  if (thread_index() != 0) return;
  total = 0;
#pragma unroll
  for (int warp = 0; warp < kRows / 16; ++warp) total += load_shared<float>(sums + warp * 4);
  const int blocks = (a.queries + kRows - 1) / kRows;
  store_global(a.block_sums + (queries.pair * a.heads + queries.head) * blocks + block, total);
}

// Where a block of threads works that owns kRows queries.
template <int kRows>
struct QueryBlock {
  int64_t pair;
  int head, block;

  EAR_OPS_DEVICE explicit QueryBlock(const QKArgs& a) {
    const unsigned blocks = (a.queries + kRows - 1) / kRows, index = static_cast<unsigned>(block_index());
    const unsigned row = blocks == 1 ? index : index / blocks, of_pairs = row / a.heads;  // divisions are slow
    block = index - row * blocks;
    head = row - of_pairs * a.heads;
    pair = of_pairs;
  }
  EAR_OPS_DEVICE int key_head(const QKArgs& a) const {
    return a.heads == a.key_heads ? head : head / (a.heads / a.key_heads);
  }
};

// How many blocks of threads of forward_short a multiprocessor must hold.
template <typename T, int kRows>
EAR_OPS_CONSTANT int short_blocks(int kD) {
  return sizeof(T) == 4 || kD > 64 ? 1 : 256 / kRows;
}

// Rows of at most kRows keys and kD features, without bias, window and causal mask.
template <typename T, int kD, int kRows, typename Compared>
EAR_OPS_KERNEL(2 * kRows, (short_blocks<T, kRows>(kD)))
forward_short(EAR_OPS_ARGUMENT const QKArgs a) {
  using Layout = SharedVectors<T, kD>;
  const QueryBlock<kRows> at(a);
  const Vectors<Role::kQueries> queries{a, at.pair, at.head};
  const Vectors<Role::kKeys> keys{a, at.pair, at.key_head(a)};
  char* owned = shared_memory();
  char* visited = owned + 2 * Layout::bytes(kRows);
  copy_vectors<T, kD, kRows, 2 * kRows>(owned, queries, at.block * kRows, 0);
  copy_vectors<T, kD, kRows, 2 * kRows>(visited, keys, 0, 0);
  commit_copies();
  const Real<kRows> real(keys, 0);
  typename Compared::Rows rows;
  wait_copies<0>();
  sync_block();
  if constexpr (Products<T>::kSplit) {
    Products<T>::template split<kD, 4 * kRows, kRows / 16>(owned);  // all that there are
    sync_block();
  }
  const auto with_tile = [&](int tile, const auto& use) {
    float scores[2][kVisited / 8][4];
    clear(scores);
    add_scores<T, kD, kVisited, Role::kQueries, kRows, kRows>(owned, visited + tile * Layout::bytes(kVisited), scores);
    finish_scores<kVisited, Role::kQueries, false, Compared::kInLog2>(
        a, at.pair, at.head, 0, 0, {}, real.template tile<kVisited>(tile), scores, &rows.alive);
    use(scores);
  };
  if constexpr (Compared::kSweepsTwice) {
    // Of two tiles, the first is measured, the last is measured and added while its scores are there, and the first is
    // added. A single tile is the last one.
    const bool two_tiles = kRows > kVisited && a.keys > kVisited;
    const int last_step = two_tiles ? 2 : 1;
#pragma unroll 1
    for (int step = two_tiles ? 0 : 1; step <= last_step; ++step)
      with_tile(two_tiles && step == 1, [&](auto& scores) {
        if (step <= 1) rows.template measure<kVisited>(scores);
        if (step == 1) rows.end_measuring();
        if (step >= 1) rows.template add<kVisited>(scores);
      });
  } else {
    constexpr int kUnrolled = Compared::kFirstIsSimpler ? kRows / kVisited : 1;
#pragma unroll kUnrolled
    for (int tile = 0; tile < kRows / kVisited; ++tile) {
      if (tile > 0 && tile * kVisited >= a.keys) break;
      with_tile(tile, [&](auto& scores) {
        if constexpr (Compared::kFirstIsSimpler)
          if (tile == 0) return rows.template add<kVisited, true>(scores);
        rows.template add<kVisited>(scores);
      });
    }
  }
  write_forward<kRows, Compared>(queries, at.block, rows);
}

template <typename T, int kD, bool kGeneral, typename Compared>
EAR_OPS_KERNEL(kThreads, 1)
forward_long(EAR_OPS_ARGUMENT const QKArgs a) {
  const QueryBlock<kOwned> at(a);
  const int first_owned = at.block * kOwned, chunks = (a.dim + kD - 1) / kD;
  const Vectors<Role::kQueries> queries{a, at.pair, at.head};
  typename Compared::Rows rows;
  if (Real<kOwned>(queries, first_owned).any()) {
    const Stages<T, kD, kVisited, Role::kQueries> stages{queries, first_owned, chunks};
    const Steps<kVisited, Role::kQueries> steps(a, at.pair, first_owned, at.head, at.head + 1, chunks, chunks - 1);
    // Where all keys are in one tile, its scores serve both sweeps.
    const int sweeps = Compared::kSweepsTwice && a.keys > kVisited ? 2 : 1;
#pragma unroll 1
    for (int sweep = 0; sweep < sweeps; ++sweep) {
      if constexpr (Compared::kSweepsTwice)
        if (sweep == 1) rows.end_measuring();
      for_tiles<false>(stages, steps, [&](const auto& step, auto& scores, int) {
        finish_scores<kVisited, Role::kQueries, kGeneral, Compared::kInLog2>(
            a, at.pair, at.head, first_owned, step.first_visited, {},
            Real<kVisited>(step.visited(), step.first_visited), scores, &rows.alive);
        if constexpr (Compared::kSweepsTwice) {
          if (sweep == 0) rows.template measure<kVisited>(scores);
          if (sweep < sweeps - 1) return;
          if (sweeps == 1) rows.end_measuring();
        }
        rows.template add<kVisited>(scores);
      });
    }
  }
  write_forward<kOwned, Compared>(queries, at.block, rows);
}

}  // namespace ear_ops::cuda
