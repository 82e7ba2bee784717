// The sum of (P - T)^2 over the rows that a block owns, and the statistics of each row, in one sweep over the keys.
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

#include "qk_steps.cuh"

namespace ear_ops::cuda {

// What a lane sums of its two rows, over the keys that it has seen. With P^ = exp(s - max) of the first view, T^ of the
// second, r = sum P^ / sum T^ and D^ = P^ - r T^, it keeps sum P^, sum T^, sum D^ D^, sum D^ T^ and sum T^ T^. Where
// the softmax of the whole row is P = a P^ and T = b T^, all else follows:
//
//   P - T           = a D^ + c T^ with c = a r - b, which is near 0 where the row's own ratio is near r
//   sum (P - T)^2   = a^2 sum D^ D^ + 2 a c sum D^ T^ + c^2 sum T^ T^
//   sum T (P - T)   = b (a sum D^ T^ + c sum T^ T^)
//   sum P (P - T)   = a (a sum D^ D^ + c sum D^ T^) + a r (a sum D^ T^ + c sum T^ T^)
//
// (P - T)^2 is never expanded into its three products, whose difference would lose the digits of close views.
struct RunningRows {
  float maximum[2][2], sum[2][2];  // of each view and half
  float ratio[2], squares[2], mixed[2], targets[2];
  uint32_t alive;

  EAR_OPS_DEVICE RunningRows() : alive(0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[0][half] = maximum[1][half] = -infinity();
      ratio[half] = 1;
      sum[0][half] = sum[1][half] = squares[half] = mixed[half] = targets[half] = 0;
    }
  }

  // Adds the scores of a tile. They become exponentials. kFirst: nothing was added before.
  template <int kN, bool kFirst = false>
  EAR_OPS_DEVICE void add(float (&scores)[2][kN / 8][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float factor[2];  // of what was summed before, under the maximum of now
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const float before = maximum[v][half];
#pragma unroll
        for (int n = 0; n < kN / 8; ++n)
          maximum[v][half] = fmaxf(maximum[v][half], fmaxf(scores[v][n][2 * half], scores[v][n][2 * half + 1]));
        const float shift = shift_of(maximum[v][half]);
        if (!kFirst) {
          factor[v] = exponential(before, shift);
          sum[v][half] *= factor[v];
        }
#pragma unroll
        for (int n = 0; n < kN / 8; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[v][n][e] = exponential(scores[v][n][e], shift);
            sum[v][half] += scores[v][n][e];
          }
      }
      const float before = ratio[half];
      ratio[half] = sum[1][half] == 0 ? 1 : sum[0][half] / sum[1][half];
      if (!kFirst) {
        const float step = factor[0] * before - factor[1] * ratio[half];
        squares[half] =
            factor[0] * factor[0] * squares[half] + 2 * factor[0] * step * mixed[half] + step * step * targets[half];
        mixed[half] = factor[1] * (factor[0] * mixed[half] + step * targets[half]);
        targets[half] *= factor[1] * factor[1];
      }
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const float target = scores[1][n][e], difference = scores[0][n][e] - ratio[half] * target;
          squares[half] += difference * difference;
          mixed[half] += difference * target;
          targets[half] += target * target;
        }
    }
  }

  // Puts the parts of the four lanes of a row together. Gives the row's statistics and returns sum (P - T)^2.
  EAR_OPS_DEVICE float finish(int half, float (&stats)[kRowStats]) const {
    float scale[2];  // of this lane's P^ and T^
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      stats[v] = shift_of(quad_max(maximum[v][half]));
      const float factor = exponential(maximum[v][half], stats[v]), total = quad_sum(sum[v][half] * factor);
      // A row that compares nothing gets 0. One of nothing but -infinity has no softmax either: it shows as NaN.
      stats[2 + v] = total != 0 ? 1 / total : alive >> (half + 2 * v) & 1 ? not_a_number() : 0.0f;
      scale[v] = stats[2 + v] * factor;
    }
    const float first = scale[0], rest = first * ratio[half] - scale[1];
    const float of_differences = first * squares[half] + rest * mixed[half];
    const float of_targets = first * mixed[half] + rest * targets[half];
    const float loss = quad_sum(first * of_differences + rest * of_targets);
    stats[4] = quad_sum(first * (of_differences + ratio[half] * of_targets));
    stats[5] = -quad_sum(scale[1] * of_targets);
    return loss < 0 ? 0 : loss;  // after rounding
  }
};

// Writes the statistics of the rows and returns this thread's part of the sum of squares over all rows of the block.
template <int kRows>
EAR_OPS_DEVICE float write_rows(const Vectors<Role::kQueries>& queries, int block, const RunningRows& rows) {
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
    for (int k = 0; k < kRowStats; ++k, to += stats_step(a)) store_global(to, real ? stats[half][k] : 0.0f);
    if (real) total += loss[half];
  }
  return total;
}

// Writes what the forward gives: statistics of the rows, and the sum of squares over all rows of the block.
template <int kRows>
EAR_OPS_DEVICE void write_forward(const Vectors<Role::kQueries>& queries, int block, const RunningRows& rows) {
  const QKArgs& a = queries.args;
  float total = write_rows<kRows>(queries, block, rows);
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
template <typename T, int kD, int kRows>
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
  RunningRows rows;
  wait_copies<0>();
  sync_block();
  if constexpr (Products<T>::kSplit) {
    Products<T>::template split<kD, 4 * kRows, kRows / 16>(owned);  // all that there are
    sync_block();
  }
#pragma unroll
  for (int tile = 0; tile < kRows / kVisited; ++tile) {
    if (tile > 0 && tile * kVisited >= a.keys) break;
    float scores[2][kVisited / 8][4];
    clear(scores);
    add_scores<T, kD, kVisited, Role::kQueries, kRows, kRows>(owned, visited + tile * Layout::bytes(kVisited), scores);
    finish_scores<kVisited, Role::kQueries, false>(a, at.pair, at.head, 0, 0, {}, real.template tile<kVisited>(tile),
                                                   scores, &rows.alive);
    if (tile == 0) {
      rows.template add<kVisited, true>(scores);
    } else {
      rows.template add<kVisited>(scores);
    }
  }
  write_forward<kRows>(queries, at.block, rows);
}

template <typename T, int kD, bool kGeneral>
EAR_OPS_KERNEL(kThreads, 1)
forward_long(EAR_OPS_ARGUMENT const QKArgs a) {
  const QueryBlock<kOwned> at(a);
  const int first_owned = at.block * kOwned, chunks = (a.dim + kD - 1) / kD;
  const Vectors<Role::kQueries> queries{a, at.pair, at.head};
  RunningRows rows;
  if (Real<kOwned>(queries, first_owned).any()) {
    const Stages<T, kD, kVisited, Role::kQueries> stages{queries, first_owned, chunks};
    const Steps<kVisited, Role::kQueries> steps(a, at.pair, first_owned, at.head, at.head + 1, chunks, chunks - 1);
    for_tiles<false>(stages, steps, [&](const auto& step, auto& scores, int) {
      finish_scores<kVisited, Role::kQueries, kGeneral>(a, at.pair, at.head, first_owned, step.first_visited, {},
                                                        Real<kVisited>(step.visited(), step.first_visited), scores,
                                                        &rows.alive);
      rows.template add<kVisited>(scores);
    });
  }
  write_forward<kOwned>(queries, at.block, rows);
}

}  // namespace ear_ops::cuda
